import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Forked

import demo
import runlog
from lab import common


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The demo's folders in tmp_path, with an earlier result in place."""
    monkeypatch.setattr(demo, "OUT", tmp_path / "demo")
    monkeypatch.setattr(demo, "SHARDS", tmp_path / "bytes")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "earlier.png").write_bytes(b"figure")
    return tmp_path


def run(command, **_):
    """As subprocess.run, in a fork."""
    process = Forked(*command[1:])
    print(*process.communicate())
    return process


def start(command, stdout, **_):
    """As subprocess.Popen, in a fork."""
    return Forked(*command[1:], out=Path(stdout.name), err=Path(stdout.name))


@pytest.fixture
def forks(monkeypatch):
    """The demo's scripts run in forks; the failing ones, below, as the demo starts them."""
    monkeypatch.setattr(demo, "subprocess", SimpleNamespace(run=run, Popen=start, STDOUT=None))
    monkeypatch.chdir(demo.HERE)  # which the demo gives its processes


def run_demo(monkeypatch, *flags):
    """The demo's exit code."""
    monkeypatch.setattr(sys, "argv", ["demo.py", *flags])
    with pytest.raises(SystemExit) as ended:
        common.run(demo.main)
    return ended.value.code


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


@pytest.mark.slow
def test_the_demo_shows_commands_table_text_and_figure(folders, forks, monkeypatch, capfd):
    monkeypatch.setattr(demo, "SCHEDULE", demo.SCHEDULE.replace("--val_loss_steps 32", "--val_loss_steps 2"))
    assert run_demo(monkeypatch, "--steps", "8", "--seed", "3") == 0
    out = capfd.readouterr().out
    assert out.count("$ OMP_NUM_THREADS=1 python train_single_gpu.py") == 5
    assert out.index("$ python fineweb.py") < out.index("$ OMP_NUM_THREADS=1") < out.index("$ python sample.py")
    logs = {path.name: runlog.load_run(path) for path in demo.OUT.glob("log_*.txt")}
    assert sorted(logs) == [
        "log_dense_demo_seed_3.txt", "log_dense_demo_seed_4.txt", "log_moe_balanced_demo_seed_3.txt",
        "log_moe_balanced_demo_seed_4.txt", "log_moe_demo_seed_3.txt",
    ]  # fmt: skip
    for log in logs.values():
        assert f"{log.streams['val'][1][-1]:10.3f}" in out.split("first val")[1]
    assert "aux_loss" in logs["log_moe_balanced_demo_seed_3.txt"].streams
    assert "aux_loss" not in logs["log_moe_demo_seed_3.txt"].streams
    assert (demo.OUT / "demo.png").stat().st_size > 10_000
    assert names(folders) == ["bytes", "demo"] and not (demo.OUT / "earlier.png").exists()


@pytest.mark.parametrize("flags", [("--steps", "0"), ("--seed", "-1"), ("--bogus",)])
def test_bad_flags_leave_the_earlier_result(folders, monkeypatch, flags):
    assert run_demo(monkeypatch, *flags) == common.USER_ERROR
    assert names(folders) == ["demo"] and names(demo.OUT) == ["earlier.png"]


@pytest.mark.slow
def test_a_step_that_fails_leaves_the_earlier_result(folders, monkeypatch, shards, capfd):
    monkeypatch.setattr(demo, "SHARDS", shards)  # of another source: fineweb.py refuses to add to them
    assert run_demo(monkeypatch) == common.USER_ERROR
    assert "fineweb.py failed" in capfd.readouterr().err
    assert names(folders) == ["demo"] and names(demo.OUT) == ["earlier.png"]


@pytest.mark.slow
def test_a_training_that_fails_ends_the_others_and_says_why(folders, monkeypatch, capfd):
    monkeypatch.setattr(demo, "SIZE", demo.SIZE.replace("--T 64", "--T 63"))
    assert run_demo(monkeypatch, "--steps", "100000") == common.USER_ERROR
    assert "training of MoE" in (err := capfd.readouterr().err) and "--total_batch_size 1024 is not a multiple" in err
    assert names(demo.OUT) == ["earlier.png"]


def test_a_killed_demo_leaves_the_earlier_result_to_the_next_one(tmp_path):
    (tmp_path / "demo.old").mkdir()
    (tmp_path / "demo.old" / "earlier.png").touch()
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "half.txt").touch()
    with pytest.raises(KeyboardInterrupt), demo.replacing(tmp_path / "demo"):
        assert names(tmp_path / "demo") == []
        raise KeyboardInterrupt
    assert names(tmp_path) == ["demo"] and names(tmp_path / "demo") == ["earlier.png"]


def test_the_committed_runs_show_what_the_readme_says_of_the_demo():
    """The balanced MoE ends below dense by more than 0.03 and more than two seeds differ; all losses fall by 3 nats."""
    runs = runlog.load_runs(demo.HERE / "results" / "demo_cpu")
    val = {}
    for run in runs:
        values = run.streams["val"][1]
        val.setdefault(run.name, []).append(values[-1])
        assert values[0] - values[-1] > 3 and values[-1] < 2.5
    gap = statistics.mean(val["dense"]) - statistics.mean(val["moe_balanced"])
    spread = max(max(values) - min(values) for values in val.values())
    assert len(val["dense"]) == len(val["moe_balanced"]) == 2
    assert gap > 0.03 and gap > 2 * spread
    by_name = runlog.table_of_runs(runs).groupby("name").max_vio.mean()
    assert by_name["moe"] > 1.5 and by_name["moe_balanced"] < 0.5
