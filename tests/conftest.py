"""Tests are tiny: one thread each, in this process and in the ones it starts, so that two can run side by side."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import multiprocessing
import runpy
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
# What a shell starts with & ignores SIGINT, and hands that on; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Slow tests first, so that two workers end together."""
    items.sort(key=lambda item: "slow" not in item.keywords)


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


def tiny(**settings):
    """Settings of a tiny run, whatever the defaults in Args are."""
    return {
        "name": "run", "seed": 1337, "data_seed": 1337, "init_from": "scratch", "block_size": None, "vocab_size": 257,
        "n_layer": 2, "n_head": 2, "n_embd": 32, "dropout": 0.0, "bias": True, "n_exp": 4, "top_k": 2, "stride": 2,
        "gate": "topk_softmax", "use_noisy_top_k": False, "use_aux_loss": False, "use_router_z_loss": False,
        "train_capacity": 1.25, "eval_capacity": 2.0, "min_capacity": 4, "T": 32, "B": 4, "total_batch_size": 256,
        "max_steps": 10, "warmup_steps": 4, "max_lr": 3e-3, "weight_decay": 0.1, "beta2": 0.95,
        "schedule": "cosine", "optimizer": "adamw", "val_loss_every": 5, "val_tokens": 256, "hellaswag_every": 0,
        "sample_from_model_every": 0, "save_checkpoint_every": 10_000, "keep_checkpoints": 3, "device": "cpu",
        "dtype": "float32", "logs_dir": "logs", "checkpoint_dir": "",
    } | settings


def flags(settings):
    """Settings as command-line flags; those that are None are left out."""
    words = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


@pytest.fixture
def train(shards, tmp_path, monkeypatch):
    """train(**settings) -> (exit code, run folder): a tiny run of the real trainer in this process."""
    import train_single_gpu as trainer

    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}

    def run(**settings):
        settings = tiny(**{"data_root": str(shards)} | settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            code = trainer.run(trainer.Args(**settings))
        return code, Path(settings["logs_dir"], f"{settings['name']}_seed_{settings['seed']}")

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_script(name, *words, cwd=None, env=None, check=None):
    """A script of the repository in a process of its own, as a user starts it; `check`: the exit code it must have."""
    command = [sys.executable, str(ROOT / name), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | (env or {}), timeout=300)
    assert check is None or done.returncode == check, done.stdout[-2000:] + done.stderr[-3000:]
    return done


FORKS = multiprocessing.get_context("forkserver")  # of a process that has imported the trainer and computed nothing


def in_fork(function, args, cwd, env, pipe, streams):
    assert "train_single_gpu" in sys.modules, "the fork server did not find what it should import"
    signal.alarm(300)  # nobody waits longer, and nothing is left behind
    for number in streams:
        os.dup2(pipe.fileno(), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    function(*args)


def fork(function, *args, cwd=None, env=None, streams=(1, 2)):
    """function(*args) in a process that starts in 0.1 s of CPU, not the 4 s of imports; `out` has what it prints."""
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # where the server itself imports from
        FORKS.set_forkserver_preload(["conftest", "train_single_gpu"])
        multiprocessing.forkserver.ensure_running()
    reader, writer = FORKS.Pipe(duplex=False)
    given = (function, args, cwd or os.getcwd(), os.environ | (env or {}), writer, streams)
    process = FORKS.Process(target=in_fork, args=given, daemon=True)
    process.start()
    writer.close()
    process.out = os.fdopen(os.dup(reader.fileno()))
    return process


def script(name, words):
    sys.argv = [str(ROOT / name), *map(str, words)]
    runpy.run_path(sys.argv[0], run_name="__main__")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def fork_ranks(n, function, *args, **options):
    """A fork per rank, with the environment that torchrun gives them."""
    env = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)]
    return [fork(function, *args, env=rank, **options) for rank in ranks]


def end(process, code=0):
    """What it printed, once it has ended with this exit code, or one of these."""
    with process.out:
        said = process.out.read()
    process.join()
    assert process.exitcode in (code if isinstance(code, tuple) else (code,)), said[-3000:]
    return said


CLOCK = ("tok_per_sec", "hours")


def lines(folder):
    """The lines of a run's log without the two streams that measure the machine."""
    return [line for line in (folder / "log.txt").read_text().splitlines() if line.split()[1] not in CLOCK]


def streams(folder):
    """{stream: (steps, values)} of a run's log."""
    from lab import runs

    table = runs.read_log(folder)
    return {name: (rows.step.to_numpy(), rows.value.to_numpy()) for name, rows in table.groupby("stream")}
