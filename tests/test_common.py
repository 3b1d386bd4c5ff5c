"""common.py: one line for what cannot be parsed, and the exit codes."""

import io
import os
import platform
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

import common
from common import TEMP_SUFFIX, UserError, atomic_write, lock

ROOT = Path(common.__file__).parent


@dataclass
class Args:
    n_exp: int = 8  # experts
    use_noise: bool = False  # noise
    gate: Literal["a", "b"] = "a"  # gate


def test_underscores_and_dashes_are_the_same():
    assert common.parse(Args, ["--n_exp", "3", "--use-noise"]) == common.parse(Args, ["--n-exp", "3", "--use_noise"])


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
import common

if sys.argv[1] == "keep":
    common.keep_freed_memory()
for step in range(12):
    if step == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    gradients = [bytearray(b"1") * 20_000_000 for _ in range(4)]  # 4,900 pages each
    del gradients
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


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


def test_a_second_live_writer_is_refused_and_a_dead_one_is_no_obstacle(tmp_path):
    path = tmp_path / "log_moe_a_seed_1.txt"
    script = f"from common import lock\nwith lock({str(path)!r}, ''):\n    print('held', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    holder = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, **pipes)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {holder.pid} on .*; wait"), lock(path, "wait"):
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
