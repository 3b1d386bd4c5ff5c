"""common.py: settings and their ranges, edits of Args, exit codes, files that are whole or absent."""

import os
import subprocess
import sys
from typing import Literal

import pytest
from conftest import ROOT

from lab import common
from lab.common import TEMP_SUFFIX, Fraction, Positive, Rate, UserError, atomic_write, lock


@common.settings
class Base:
    n_layer: Positive = 12  # Blocks
    rate: Fraction | None = None  # Rate of something
    width: Positive | Literal["iso"] | None = None  # Width


@common.settings
class Args(Base):
    n_layer = 4
    use_noise: bool = False  # Noise
    gate: Literal["a", "b"] = "a"  # Gate
    max_lr: Rate = 0.1  # Peak learning rate
    seed = 7  # an own setting without a type: its value's, where args.seed is read


def test_underscores_and_dashes_are_the_same_and_unknown_flags_can_be_kept():
    args = common.parse(Args, ["--n_layer", "3", "--use-noise"])
    assert args == common.parse(Args, ["--n-layer", "3", "--use_noise"]) == Args(n_layer=3, use_noise=True)
    args, rest = common.parse(Args, ["--gate", "b", "--top_k", "1"], unknown=True)
    assert args.gate == "b" and rest == ["--top_k", "1"]
    assert common.parse(Args, ["--seed", "8"], default=Args(gate="b")) == Args(gate="b", seed=8)


def test_an_edit_without_a_type_has_the_type_of_the_setting_that_it_edits():
    assert Args().n_layer == 4 and Args.__annotations__["n_layer"] == Positive and Args().seed == 7
    with pytest.raises(UserError, match="n_layer must be at least 1"):
        common.parse(Args, ["--n_layer", "0"])


def test_a_name_that_nothing_reads_is_no_setting():
    with pytest.raises(UserError, match="n_layers is no setting"):
        @common.settings
        class Typo(Base):
            n_layers = 4


@pytest.mark.parametrize("words, said", [
    (["--rate", "1"], "--rate must be at least 0 and below 1, not 1"), (["--rate", "nan"], "--rate must be"),
    (["--max_lr", "inf"], "--max_lr must be"), (["--width", "0"], "--width must be at least 1"),
])
def test_values_outside_their_range(words, said):
    with pytest.raises(UserError, match=said):
        common.parse(Args, words)


def test_a_value_of_python_outside_its_choices():
    with pytest.raises(ValueError, match="gate must be one of a, b, not 'c'"):
        common.check_ranges(Args(gate="c"))
    common.check_ranges(Args(width="iso", rate=None))


@pytest.mark.parametrize("body, code", [
    ("return 3", 3), ("raise common.UserError('lower --B')", 2), ("raise KeyboardInterrupt", 130),
    ("open('/no/such/file')", 2), ("return None", 0), ("1 / 0", 1),
])
def test_exit_codes(body, code):
    script = f"from lab import common\ndef main():\n    {body}\ncommon.run(main)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code
    assert (("Traceback" in done.stderr) == (code == 1) and done.stderr.count("\n") == (code == 2)) or code == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_under_stdout_is_exit_code_2():
    script = "from lab import common\ncommon.run(lambda: [print(i) for i in range(10**5)] and None)"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 2 and "No space left on device" in done.stderr


def test_a_reader_that_leaves_is_no_error():
    script = "from lab import common\ncommon.run(lambda: [print(i) for i in range(10**5)] and None)"
    pipe = f"{sys.executable} -c '{script}' | head -1"
    done = subprocess.run(pipe, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "0\n" and done.stderr == ""


def test_an_atomic_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "out.txt"
    with atomic_write(path, "w") as f:
        f.write("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path, "w") as f:
        f.write(f"half {1 / 0}")
    assert path.read_text() == "old" and not list(tmp_path.glob(f"*{TEMP_SUFFIX}"))


def test_one_holder_of_a_lock(tmp_path):
    path = tmp_path / "new/lock"
    code = f"from lab import common\ncommon.run(lambda: common.lock({str(path)!r}, 'wait').__enter__())"
    with lock(path, "wait"):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert other.returncode == 2 and "held by another process: wait" in other.stderr
    assert not path.parent.exists(), "nothing was written"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
