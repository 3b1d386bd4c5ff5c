"""atomic.py: a file is whole or absent, whatever happens while it is written, and has one writer at a time."""

import os
import signal
import subprocess
import sys

import pytest

from atomic import TEMP_SUFFIX, atomic_write, lock
from cli import UserError

ROOT = os.path.dirname(os.path.dirname(__file__))


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
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_text() == "old" and (tmp_path / ("a" + TEMP_SUFFIX)).read_text() == "half"
    with atomic_write(tmp_path / "a", "w") as f:
        f.write("new")
    assert (tmp_path / "a").read_text() == "new" and os.listdir(tmp_path) == ["a"]


def test_a_second_live_writer_is_refused_and_a_dead_one_is_no_obstacle(tmp_path):
    path = tmp_path / "log_moe_a_seed_1.txt"
    script = f"from atomic import lock\nwith lock({str(path)!r}, ''):\n    print('held', flush=True); input()"
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
    assert not os.path.exists(f"{path}.lock")


def test_a_lock_that_cannot_be_made_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="; choose another"):
        lock(tmp_path / "file" / "log", "choose another").__enter__()
