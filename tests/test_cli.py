"""cli.py: one line for what cannot be parsed, and the exit codes."""

import io
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

import cli


@dataclass
class Args:
    n_exp: int = 8  # experts
    use_noise: bool = False  # noise
    gate: Literal["a", "b"] = "a"  # gate


def test_underscores_and_dashes_are_the_same():
    assert cli.parse(Args, ["--n_exp", "3", "--use-noise"]) == cli.parse(Args, ["--n-exp", "3", "--use_noise"])


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("words, said", [
    (["--n_expp", "3"], "Unrecognized options: --n_expp, 3 - did you mean --n-exp?"), (["--gate", "c"], "('a', 'b')"),
    (["--n_exp", "x"], "--n-exp: invalid literal"), (["stray"], "stray"), (["--n_exp"], "Missing value"),
])  # fmt: skip
def test_one_line_whatever_the_terminal(words, said, encoding, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(cli.UserError) as error:
        cli.parse(Args, words)
    assert said in str(error.value) and "─" not in str(error.value) and "--help)" in str(error.value)


@pytest.mark.parametrize("body, code, said", [
    ("return 3", 3, ""), ("pass", 0, ""), ("raise cli.UserError('do\\n  that')", 2, "error: do that\n"),
    ("raise KeyboardInterrupt", 130, ""), ("raise ValueError('a bug')", 1, "Traceback"),
])  # fmt: skip
def test_exit_codes(body, code, said):
    script = f"import cli\ndef main():\n    {body}\ncli.run(main)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=cli.__file__[:-6])
    assert done.returncode == code and done.stderr.startswith(said) and (said or not done.stderr)


def test_a_reader_that_leaves_is_no_error():
    script = "import cli\ndef main():\n    [print(i) for i in range(10**5)]\ncli.run(main)"
    writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              cwd=cli.__file__[:-6])  # fmt: skip
    writer.stdout.readline()
    writer.stdout.close()
    assert writer.stderr.read() == b"" and writer.wait() == 0


def test_exit_now_says_what_was_printed_and_leaves_python_as_it_is():
    script = "import atexit, cli\natexit.register(print, 'shut down')\nprint('said')\ncli.exit_now(3)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=cli.__file__[:-6])
    assert (done.returncode, done.stdout, done.stderr) == (3, "said\n", "")


PAGE_FAULTS = """
import resource, sys
import cli

if sys.argv[1] == "keep":
    cli.keep_freed_memory()
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
    faults = {
        word: int(subprocess.check_output([*command, word], cwd=Path(cli.__file__).parent)) for word in ("keep", "-")
    }
    assert faults["keep"] < 1000 and faults["-"] > 100_000, faults
