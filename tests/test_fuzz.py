"""A thousand random damages of shards, meta files, logs, checkpoints and exports: never a traceback, nothing executed.

A damage is a cut, flipped bytes, zeros, two files exchanged, a pickle with a payload, and in JSON and checkpoints a key
deleted or a value of another type. The draws are seeded: number N of a test is always the same damage.
"""

import contextlib
import copy
import io
import json
import math
import os
import pickle
import random
import shutil
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, write_shards

import compare
import fineweb
import runlog
import sweep
import train_single_gpu as trainer
from lab import checkpoint, common
from lab.data import DataLoader, fingerprint
from model import GPT, GPTConfig

pytestmark = pytest.mark.slow
WRONG = (None, True, -1, 0.5, 2**70, math.inf, math.nan, "", "x", [], {}, [[]], {"a": 1}, ["x", 2])
RAN = "it_ran"


class Payload:
    def __reduce__(self):
        return os.mkdir, (RAN,)


def places(value):
    """(parent, key) of everything in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from places(inner)


def edit(value, rng):
    """The same value with one key deleted, or one of a wrong type."""
    value = copy.deepcopy(value)
    parent, key = rng.choice(list(places(value)))
    if rng.random() < 0.4:
        del parent[key]
    else:
        parent[key] = rng.choice(WRONG)
    return value


def damage_bytes(data, rng):
    data, start = bytearray(data), rng.randrange(len(data))
    kind = rng.randrange(4)
    if kind == 0:
        return data[:start]
    for _ in range(rng.choice((1, 1, 1, 9)) if kind < 3 else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    if kind == 3:
        n = min(len(data) - start, rng.randrange(1, 400))
        data[start : start + n] = bytes(n)
    return bytes(data)


def write_payload(path):
    """The file with a pickle in it that runs code where it is loaded."""
    if path.suffix == ".npy":
        np.save(path, np.array([Payload()]), allow_pickle=True)
    elif path.suffix == ".pt":
        with zipfile.ZipFile(path) as old:
            content = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(path, "w") as new:
            for name, data in content.items():
                new.writestr(name, pickle.dumps({"format": 2, "model": Payload()}) if name.endswith(".pkl") else data)
    else:
        path.write_bytes(pickle.dumps(Payload()))


def damage(folder, rng):
    """Damage one file of the folder, or exchange two; returns its path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    path, kind = rng.choice(paths), rng.random()
    if kind < 0.05:
        write_payload(path)
    elif kind < 0.1:
        other = rng.choice(paths)
        a, b = path.read_bytes(), other.read_bytes()
        path.write_bytes(b), other.write_bytes(a)
    elif kind < 0.6 and path.suffix == ".json":
        path.write_text(json.dumps(edit(json.loads(path.read_text()), rng)))
    elif kind < 0.6 and path.suffix == ".pt":
        state = checkpoint.load(path)
        part = rng.choice([{"model", "optimizer"}, state.keys() - {"model", "optimizer"}])  # tensors or plain values
        checkpoint.save(state | edit({name: state[name] for name in state if name in part}, rng), path)
    else:
        path.write_bytes(damage_bytes(path.read_bytes(), rng))
    return path


@pytest.fixture
def survive(tmp_path, monkeypatch):
    """survive(n, make, read): n damages of the folder that make(folder) fills; the number that read(folder) refused."""
    monkeypatch.chdir(tmp_path)

    def survive(n, make, read):
        whole, folder, refused = tmp_path / "whole", tmp_path / "damaged", 0
        make(whole)
        for number in range(n):
            shutil.copytree(whole, folder)
            path = damage(folder, random.Random(number))
            try:
                with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                    warnings.simplefilter("ignore")
                    read(folder)
            except common.UserError as error:
                refused += 1
                assert "\n" not in str(error)
            except Exception as error:
                raise AssertionError(f"damage {number} of {path.name}: {type(error).__name__}: {error}") from error
            assert not os.path.exists(RAN), f"damage {number} of {path.name} was executed"
            assert not list(folder.rglob("*.tmp")), f"damage {number} of {path.name} left a half-written file"
            shutil.rmtree(folder)
        return refused

    return survive


def test_shards(survive):
    def make(folder):
        write_shards(folder)
        tokens = np.arange(2000, dtype=np.uint16) % 257
        header = np.array([20240520, 1, len(tokens), *[0] * 253], dtype="<i4")
        (folder / "b_train_000002.bin").write_bytes(header.tobytes() + tokens.tobytes())
        meta = json.loads((folder / "meta.json").read_text())
        meta["shards"].append({"file": "b_train_000002.bin", "tokens": len(tokens)})
        (folder / "meta.json").write_text(json.dumps(meta))

    def read(folder):
        fingerprint(folder)
        loader, val = (DataLoader(folder, split, 4, 32, vocab_size=257) for split in ("train", "val"))
        batches = [*(loader.next_batch() for _ in range(3)), val.batch_at(5)]
        assert all(x.shape == y.shape == (4, 32) and x.max() < 257 for x, y in batches)

    assert survive(250, make, read) > 80


def test_an_interrupted_fineweb(survive, monkeypatch):
    flags = [
        "fineweb.py",
        "--files",
        "a.txt",
        "b.txt",
        "--tokenizer",
        "bytes",
        "--shard_size",
        "3000",
        "--workers",
        "1",
    ]

    def make(folder):
        for name in ("a.txt", "b.txt"):
            with open(name, "w") as f:
                f.write(f"{name}: the router sends a token\n" * 200)
        monkeypatch.setattr(fineweb, "PIECE", 1000)
        monkeypatch.setattr(sys, "argv", [*flags, "--out", str(folder)])
        save, saved = fineweb.save_shard, []

        def killed_after_two(*args):
            save(*args)
            saved.append(args)
            if len(saved) == 2:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(fineweb, "save_shard", killed_after_two)
            fineweb.main()

    def read(folder):
        sys.argv = [*flags, "--out", str(folder)]
        with contextlib.redirect_stdout(io.StringIO()):
            fineweb.main()
        meta = json.loads((folder / "meta.json").read_text())
        assert meta["complete"] and meta["tokens"] == sum(shard["tokens"] for shard in meta["shards"])
        fingerprint(folder)

    assert survive(150, make, read) > 50


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """A folder with log, JSON and checkpoint of a run of 4 steps, and its shards."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(shards, folder / "words")
    assert trainer.run(run_args(folder, 4)) == 0
    return folder


def run_args(folder, steps, **settings):
    folders = {"data_root": str(folder / "words"), "logs_dir": str(folder), "checkpoint_dir": str(folder)}
    small = {"val_loss_every": 2, "n_embd": 16, "n_layer": 1, "progress": "lines"}
    return trainer.Args(**TINY_RUN | folders | small | {"name": "a", "max_steps": steps} | settings)


def test_logs(survive, trained):
    def make(folder):
        folder.mkdir()
        for path in trained.glob("log_*"):
            shutil.copy(path, folder)

    def read(folder):
        (log,) = folder.glob("log_*.txt")
        run = runlog.load_run(log)
        compare.report([run])
        runlog.thin_into("thin", [run])
        sweep.look_of(run)

    assert survive(250, make, read) > 80


def test_checkpoints(survive, trained):
    """Damaged bytes that no checksum covers leave the tensors as they were."""
    (path,) = trained.rglob("step_*.pt")
    good = checkpoint.load_model(path)[0].state_dict()

    def make(folder):
        folder.mkdir()
        shutil.copy(path, folder)

    def read(folder):
        weights = checkpoint.load_model(folder / path.name)[0].state_dict()
        assert weights.keys() == good.keys() and all(torch.equal(weights[name], good[name]) for name in good)

    assert survive(150, make, read) > 50


def test_exports(survive):
    def make(folder):
        for name, n_exp in (("moe", 4), ("dense", 1)):
            config = GPTConfig(16, 257, n_layer=1, n_head=1, n_embd=4, n_exp=n_exp, stride=1)
            checkpoint.export_hf(GPT(config), folder / name, {"tokenizer": "bytes"})

    def read(folder):
        for name in ("moe", "dense"):
            checkpoint.open_model("", str(folder / name), "cpu")

    assert survive(100, make, read) > 20


def test_resumed_runs(survive, trained):
    """Log, JSON, checkpoint, shards or meta.json of the run that continues."""

    def read(folder):
        with contextlib.redirect_stdout(io.StringIO()):
            assert trainer.run(run_args(folder, 5, resume="auto")) in (common.DONE, common.DIVERGED)

    assert survive(100, lambda folder: shutil.copytree(trained, folder), read) > 30
