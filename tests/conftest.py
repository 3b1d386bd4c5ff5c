"""Tests are tiny: one thread each, in this process and in the ones it starts, so that two can run side by side."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import importlib
import io
import json
import signal
import sys
import warnings

import numpy as np
import pytest

# What a shell starts with & ignores SIGINT, and hands that on; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

TOKENS = {"val": 6_000, "train": 60_000}


def write_shards(folder):
    """Shards of a byte-level text that a small model learns something of: a seeded walk over a few words."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    words = [b"the router ", b"sends ", b"a token ", b"to ", b"two experts ", b"and ", b"drops ", b"none\n"]
    text = b"".join(words[i] for i in rng.integers(len(words), size=sum(TOKENS.values()) // 4))
    stream, shards, start = np.frombuffer(text, np.uint8).astype(np.uint16), [], 0
    for i, (split, n) in enumerate(TOKENS.items()):
        np.save(folder / f"words_{split}_{i:06d}.npy", stream[start : start + n])
        shards.append({"file": f"words_{split}_{i:06d}.npy", "tokens": n})
        start += n
    meta = {"tokenizer": "bytes", "vocab_size": 257, "eot": 256, "source": "tests", "shards": shards}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture
def train(shards, tmp_path, monkeypatch):
    """train(**settings) -> (exit code, streams of the log): a tiny run of the real trainer in this process."""
    import runlog
    import train_single_gpu as trainer

    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(**settings):
        args = trainer.Args(**TINY_RUN | {"data_root": str(shards)} | settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            code = trainer.run(args)
        return code, runlog.read(runlog.log_path(args.logs_dir, args.name, args.run_id, args.seed))

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


TINY_RUN = {
    "run_id": "test", "vocab_size": 257, "n_layer": 2, "n_head": 2, "n_embd": 32, "n_exp": 4, "T": 32, "B": 4,
    "total_batch_size": 256, "max_steps": 10, "warmup_steps": 4, "max_lr": 3e-3, "val_loss_every": 5,
    "val_loss_steps": 2, "hellaswag_every": 0, "sample_from_model_every": 0, "device": "cpu",
}  # fmt: skip
SETTINGS = {"n_layer": 4, "seed": 1, "data_seed": 1337, "max_lr": 6e-4, "data": "d0"}
LINES = ["0 val 5\n", "0 train 5\n", "10 val 3\n"]


def write_log(path, lines=LINES, record=None, **settings):
    """A log, and beside it the JSON `record`, or one with SETTINGS changed by `settings`, or none."""
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(lines))
    if settings:
        record = {"settings": SETTINGS | settings, "changes": [], "args": {}, "tokens_per_step": 100}
    if record is not None:
        path.with_suffix(".json").write_text(json.dumps(record))
    return path


CLOCK = ("tok_per_sec", "hours")


def lines(path):
    """The lines of a log without the two streams that measure the machine."""
    return [line for line in path.read_text().splitlines() if line.split()[1] not in CLOCK]


def flags(settings):
    """Settings as command-line flags."""
    words = []
    for name, value in settings.items():
        words += [f"--{name}"] if value is True else [f"--no_{name}"] if value is False else [f"--{name}", str(value)]
    return words


def call(script, *argv, encoding="utf-8"):
    """(exit code, stdout, stderr) of a script of the repository, called in this process."""
    import common

    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    before, sys.argv = sys.argv, [f"{script}.py", *map(str, argv)]
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            common.run(importlib.import_module(script).main)
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
    for stream in streams:
        stream.flush()
    return code, *(stream.buffer.getvalue().decode(encoding) for stream in streams)
