"""common.py: one line for what cannot be parsed, and the exit codes."""

import io
import math
import os
import platform
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch

from lab import common
from lab.common import TEMP_SUFFIX, Fraction, Positive, Rate, UserError, atomic_write, lock

ROOT = Path(common.__file__).parent


@dataclass
class Base:
    # shape
    n_layer: Positive = 12  # Blocks
    rate: Fraction | None = None  # Rate of something


@dataclass
class Args(Base):
    """Settings for these tests."""

    n_exp: int = 8  # Experts
    use_noise: bool = False  # Noise
    # the gate
    gate: Literal["a", "b"] = "a"  # Gate
    max_lr: Annotated[Rate, "a mark of another kind"] = 0.1  # Peak learning rate
    n_layer: Positive = 4  # Blocks, fewer


def test_underscores_and_dashes_are_the_same():
    assert common.parse(Args, ["--n_exp", "3", "--use-noise"]) == common.parse(Args, ["--n-exp", "3", "--use_noise"])


def test_help_has_the_docstring_and_each_setting_once_in_its_group():
    lines = common.help_text(Args).splitlines()
    assert lines[0].startswith("common.py: ")
    shape, gate = lines.index("shape"), lines.index("the gate")
    assert lines[shape + 1].split() == ["--n_layer", "Blocks,", "fewer", "[4]"]  # as the subclass has it
    assert lines[gate + 1].split() == ["--gate", "{a,b}", "Gate", "[a]"] and lines[gate + 2].endswith("rate [0.1]")
    assert "\n".join(lines).count("--") == len(Args.__dataclass_fields__)


@pytest.mark.parametrize("words, said", [
    (["--n_layer", "0"], "--n_layer must be at least 1, not 0"), (["--rate", "nan"], "--rate"),
    (["--max_lr", "inf"], "--max_lr must be at least 0, finite, not inf"),
    (["--rate", "1"], "--rate must be at least 0 and below 1"),
    (["--learning_rate", "1"], "did you mean --max_lr?"), (["--use_noise", "true"], "--flag and --no_flag"),
    (["--use_noise=False"], "--flag and --no_flag"),
])  # fmt: skip
def test_values_outside_their_range_and_flags_of_nanogpt(words, said):
    with pytest.raises(UserError) as error:
        common.parse(Args, words)
    assert said in str(error.value)


@pytest.mark.parametrize("field, value", [("n_exp", "8"), ("use_noise", 1), ("gate", "c"), ("n_layer", 1.5)])
def test_a_value_of_the_wrong_type_from_python_is_named(field, value):
    with pytest.raises(UserError, match=field):
        common.check_settings(Args(**{field: value}))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_under_stdout_is_one_line():
    script = "import common\ncommon.run(lambda: [print(i) for i in range(10**5)] and None)"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("words, said", [
    (["--n_expp", "3"], "Unrecognized options: --n_expp, 3 - did you mean --n-exp?"), (["--gate", "c"], "('a', 'b')"),
    (["--n_exp", "x"], "--n-exp: invalid literal"), (["stray"], "stray"), (["--n_exp"], "Missing value"),
])  # fmt: skip
def test_one_line_whatever_the_terminal(words, said, encoding, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(common.UserError) as error:
        common.parse(Args, words)
    assert said in str(error.value) and "─" not in str(error.value) and "--help)" in str(error.value)


@pytest.mark.parametrize("body, code, said", [
    ("return 3", 3, ""), ("pass", 0, ""), ("raise common.UserError('do\\n  that')", 2, "error: do that\n"),
    ("raise KeyboardInterrupt", 130, ""), ("raise ValueError('a bug')", 1, "Traceback"),
    ("raise OSError(28, 'No space left on device', 'out.json')", 2, "error: out.json: No space left on device"),
    ("print('x' * 10**6); open('/nowhere/at/all')", 2, "error: /nowhere/at/all: No such file or directory"),
])  # fmt: skip
def test_exit_codes(body, code, said):
    script = f"import common\ndef main():\n    {body}\ncommon.run(main)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(common.__file__).parent
    )
    assert done.returncode == code and done.stderr.startswith(said) and (said or not done.stderr)


def test_a_reader_that_leaves_is_no_error():
    script = "import common\ndef main():\n    [print(i) for i in range(10**5)]\ncommon.run(main)"
    writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              cwd=ROOT)  # fmt: skip
    writer.stdout.readline()
    writer.stdout.close()
    assert writer.stderr.read() == b"" and writer.wait() == 0


def test_exit_now_says_what_was_printed_and_leaves_python_as_it_is():
    script = "import atexit, common\natexit.register(print, 'shut down')\nprint('said')\ncommon.exit_now(3)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(common.__file__).parent
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "said\n", "")


PAGE_FAULTS = """
import resource, sys
from lab import common

if sys.argv[1] == "keep":
    common.keep_freed_memory()
for step in range(12):
    if step == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    gradients = [bytearray(b"1") * 20_000_000 for _ in range(4)]  # 4,900 pages each
    del gradients
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an allocator other than glibc's")
def test_freed_memory_is_used_again():
    command = [sys.executable, "-c", PAGE_FAULTS]
    faults = {word: int(subprocess.check_output([*command, word], cwd=ROOT)) for word in ("keep", "-")}
    assert faults["keep"] < 1000 and faults["-"] > 100_000, faults


# -- atomic files and locks


def test_written_and_nothing_left(tmp_path):
    with atomic_write(tmp_path / "a", "w") as f:
        f.write("new")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_text() == "new" and os.listdir(tmp_path) == ["a"]


def test_an_error_leaves_the_older_file(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "a", "w") as f:
        f.write("half")
        raise RuntimeError
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_a_kill_leaves_the_older_file_and_is_no_obstacle(tmp_path):
    (tmp_path / "a").write_text("old")
    script = f"import os\nfrom common import atomic_write\nwith atomic_write({str(tmp_path / 'a')!r}, 'w') as f:\n"
    script += f"    f.write('half'); f.flush(); os.kill(os.getpid(), {signal.SIGKILL})"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_text() == "old" and (tmp_path / ("a" + TEMP_SUFFIX)).read_text() == "half"
    with atomic_write(tmp_path / "a", "w") as f:
        f.write("new")
    assert (tmp_path / "a").read_text() == "new" and os.listdir(tmp_path) == ["a"]


def test_a_second_live_writer_is_refused_and_a_dead_one_is_no_obstacle(tmp_path, monkeypatch):
    path = tmp_path / "log_moe_a_seed_1.txt"
    script = f"from common import lock\nwith lock({str(path)!r}, ''):\n    print('held', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    holder = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, **pipes)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {holder.pid} on .*; wait"), lock(path, "wait"):
        pass
    with monkeypatch.context() as windows:
        windows.setattr(Path, "read_text", lambda *_, **__: Path("/nowhere/at/all").read_bytes())
        with pytest.raises(UserError, match="process unknown; wait"), lock(path, "wait"):
            pass
    holder.kill()
    holder.wait()
    assert os.path.exists(f"{path}.lock")  # stale
    with lock(path, "wait"):
        pass


def test_a_lock_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="; choose another"):
        lock(tmp_path / "file" / "log", "choose another").__enter__()


# -- any system

WITHOUT_UNIX = """
import sys
import torch  # whatever it imports on this system is its own
from transformers import GenerationMixin, PreTrainedModel

for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
import signal

for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2"):
    if hasattr(signal, name):
        delattr(signal, name)
import importlib, pathlib

for path in [*sorted(pathlib.Path().glob("*.py")), *sorted(pathlib.Path("bench").glob("*.py"))]:
    importlib.import_module(".".join(path.with_suffix("").parts))
    print(path)
"""


@pytest.mark.slow
def test_every_file_imports_without_unix():
    done = subprocess.run([sys.executable, "-c", WITHOUT_UNIX], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    files = {str(path.relative_to(ROOT)) for folder in (ROOT, ROOT / "bench") for path in folder.glob("*.py")}
    assert set(done.stdout.split()) == files and len(files) > 25


@pytest.mark.parametrize(("asked", "opened"), [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cpu", "cpu")])
def test_a_rank_opens_its_own_gpu_alone(monkeypatch, asked, opened):
    seen = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(str(device)))
    monkeypatch.setattr(common, "choose_device", lambda name: seen.append(name) or torch.device(name))
    assert str(common.set_up_machine(asked, "bfloat16").device) == opened
    assert seen == [opened] * (1 if opened == "cpu" else 2)


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="4 processes on this machine, which has 2 GPUs: lower --nproc_per_node"):
        common.gpu_of_rank(0)


def test_memory_is_known_without_proc(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(Path, "read_text", lambda self: "")  # as where there is no /proc
    assert 2**27 < common.free_memory(device) <= (math.inf if os.name == "nt" else 2**50)
