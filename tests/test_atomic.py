"""atomic.py: a file is whole or absent, whatever happens while it is written."""

import os
import signal
import subprocess
import sys

import pytest

from atomic import TEMP_SUFFIX, atomic_write


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
    script = f"import os\nfrom atomic import atomic_write\nwith atomic_write({str(tmp_path / 'a')!r}, 'w') as f:\n"
    script += f"    f.write('half'); f.flush(); os.kill(os.getpid(), {signal.SIGKILL})"
    root = os.path.dirname(os.path.dirname(__file__))
    assert subprocess.run([sys.executable, "-c", script], cwd=root).returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_text() == "old" and (tmp_path / ("a" + TEMP_SUFFIX)).read_text() == "half"
    with atomic_write(tmp_path / "a", "w") as f:
        f.write("new")
    assert (tmp_path / "a").read_text() == "new" and os.listdir(tmp_path) == ["a"]
