"""Tests are tiny: one thread each, in this process and in the ones it starts, so that two can run side by side."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import atexit
import contextlib
import gc
import importlib
import io
import json
import multiprocessing
import runpy
import signal
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

# What a shell starts with & ignores SIGINT, and hands that on; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Slow tests first, so that two workers end together."""
    items.sort(key=lambda item: "slow" not in item.keywords)


def pytest_collection_finish():
    """What is imported stays: torch._dynamo.reset and others collect garbage, and need not look at it each time."""
    gc.collect()
    gc.freeze()


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
    from lab import common

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


# -- scripts as processes of their own, without the seconds that importing torch takes

ROOT = Path(__file__).resolve().parents[1]
FORKS = multiprocessing.get_context("forkserver")
PRELOAD = ["train_single_gpu", "sweep", "sharded", "pytest", "torch._dynamo"]
FORKS.set_forkserver_preload([*PRELOAD, "torch.distributed.fsdp", "torch.distributed.run"])
atexit.register(lambda: [process.kill() for process in multiprocessing.active_children()])  # of tests that failed


def run_forked(words, env, cwd, out, err):
    """In the child: `python words[0] words[1] ...` in `cwd`, printing into two pipes or to the end of two files."""
    for target, number in ((out, 1), (err, 2)):
        with open(target, "ab") if isinstance(target, Path) else target as file:
            os.dup2(file.fileno(), number)
    os.chdir(cwd)
    os.environ.update(env)
    encoding = os.environ.get("PYTHONIOENCODING")
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding=encoding, closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [str(word) for word in words]
    sys.path.insert(0, str(ROOT))
    if sys.argv[0] == "-m":
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


class Forked:
    """A script, or -m and a module, as subprocess.Popen would start it, in a fork of a server that has torch and the
    trainer imported.

    For tests of signals, pipes, locks and ranks. What is printed before it ends must fit a pipe or be read.
    """

    def __init__(self, *words, out=None, err=None, **env):
        """out, err: paths of files, to whose end it prints; else `stdout` and `stderr` are pipes."""
        pipes = [None if path else FORKS.Pipe(duplex=False) for path in (out, err)]
        ends = [path or pipe[1] for path, pipe in zip((out, err), pipes, strict=True)]
        self.process = FORKS.Process(target=run_forked, args=(words, env, os.getcwd(), *ends))
        self.process.start()
        self.pid = self.process.pid
        self.stdout, self.stderr = (pipe and os.fdopen(os.dup(pipe[0].fileno())) for pipe in pipes)
        for pipe in filter(None, pipes):
            pipe[1].close()

    @classmethod
    def launch(cls, command, log, env):
        """As slurm.launch."""
        log.parent.mkdir(parents=True, exist_ok=True)
        return cls(*command[1:], out=log.with_suffix(".out").absolute(), err=log.with_suffix(".err").absolute(), **env)

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)

    def terminate(self):
        self.process.terminate()

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.process.kill()

    def wait(self, timeout=600):
        """The exit code."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, "timed out"
        return self.process.exitcode

    def communicate(self, timeout=3600):
        """(rest of stdout, rest of stderr) when it has ended; after so many seconds it is killed."""
        late = threading.Timer(timeout, self.kill)
        late.start()
        with self.stdout, self.stderr, ThreadPoolExecutor(1) as pool:
            err = pool.submit(self.stderr.read)
            said = self.stdout.read(), err.result()
        late.cancel()
        self.wait()
        return said

    def read_until(self, text):
        """Read lines of stdout up to the first one that contains `text`."""
        while text not in (line := self.stdout.readline()):
            assert line, f"ended without {text!r}: {self.stderr.read()}"
