"""The log: what is written is read back, what a kill tears is dropped, and the published logs give FACTS' numbers."""

import math
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

import runlog
from common import UserError

ROOT = Path(__file__).resolve().parents[1]
ARCHIVE = ROOT / "../shared/data/seed_logs/seed_logs.tar.xz"
DENSE = "no_moe"
FULL_PREC = "moe_noisy_top_k_aux_loss_router_z_loss_router_full_prec"


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    if not ARCHIVE.exists():
        pytest.skip("the published logs are not here (../shared/data/seed_logs)")
    folder = tmp_path_factory.mktemp("published")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return sorted(folder.rglob("log_*.txt"))


def write_log(path, lines):
    path.write_text("".join(lines))
    return path


# ---- names


@pytest.mark.parametrize("name", ["no_moe", "moe_top_k_1_noisy_top_k", "moe_switch_tfm_init_0.1"])
def test_path_and_name_are_inverse(name):
    assert runlog.parse_path(runlog.log_path("logs", name, "20250629", 42)) == (name, "20250629", 42)


@pytest.mark.parametrize("run_id", ["a_b", "", "a/b", "..\n"])
def test_run_id_that_could_not_be_told_from_the_name_is_refused(run_id):
    with pytest.raises(UserError, match="--run_id"):
        runlog.log_path("logs", "moe", run_id, 42)


def test_a_foreign_file_name_is_refused():
    with pytest.raises(UserError, match="not named like a log"):
        runlog.parse_path("train.log")


# ---- writing and reading


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "deep" / "log_moe_a_seed_1.txt"
    with runlog.RunLog(path) as log:
        log.write(0, val=10.9999384, hella=0.25604)
        log.write(0, {"load_0_1": 0.125}, train=math.nan, lr=6e-4 / 2000, grad_norm=math.inf)
        log.sync()
    assert path.read_text() == (
        "0 val 10.999938\n0 hella 0.2560\n0 load_0_1 0.125\n0 train nan\n0 lr 3e-07\n0 grad_norm inf\n"
    )
    streams = runlog.read(path)
    assert list(streams) == ["val", "hella", "load_0_1", "train", "lr", "grad_norm"]
    steps, values = streams["val"]
    assert steps.dtype == np.int64 and values.dtype == np.float64 and values.tolist() == [10.999938]
    assert math.isnan(streams["train"][1][0]) and math.isinf(streams["grad_norm"][1][0])


def test_every_write_is_visible_at_once(tmp_path):
    path = tmp_path / "log_moe_a_seed_1.txt"
    log = runlog.RunLog(path)
    log.write(7, train=1.0)
    assert path.read_text() == "7 train 1.000000\n"
    log.close()


@pytest.mark.parametrize("torn", ["2", "2 tra", "2 train", "2 train 3.", "2 train 3.25"])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    path = write_log(tmp_path / "log", ["0 val 4.5\n", "1 train 4.25\n", torn])
    streams = runlog.read(path)
    assert {name: steps.tolist() for name, (steps, _) in streams.items()} == {"val": [0], "train": [1]}


MALFORMED = ["1 train", "1 train 2 3", "x train 2", "1 train two", "", "1.5 train 2", "1 train 2 3 x 4"]


@pytest.mark.parametrize("bad", MALFORMED)
def test_any_other_malformed_line_is_named(tmp_path, bad):
    path = write_log(tmp_path / "log", ["0 val 4.5\n", bad + "\n", "2 train 4\n"])
    with pytest.raises(UserError, match="line 2"):
        runlog.read(path)


@pytest.mark.parametrize("text", ["", "0 va"])
def test_an_empty_log_has_no_streams(tmp_path, text):
    assert runlog.read(write_log(tmp_path / "log", [text])) == {}


def test_truncate_keeps_the_steps_before(tmp_path):
    kept = ["0 val 4.5\n", "0 train 4.25\n", "1 train 4.125\n"]
    path = write_log(tmp_path / "log", [*kept, "2 val 4.0\n", "2 train 4.0\n", "3 tr"])
    runlog.truncate(path, 2)
    assert path.read_text() == "".join(kept)
    assert [p.name for p in tmp_path.iterdir()] == ["log"]
    runlog.truncate(tmp_path / "absent", 2)  # a run killed before its first line


def test_a_log_that_cannot_be_written_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--logs_dir"):
        runlog.RunLog(tmp_path / "file" / "log_moe_a_seed_1.txt")


# ---- judging


def test_spike_rule():
    history = [3.0] * runlog.SPIKE_MIN_HISTORY
    assert not runlog.is_spike(history[1:], 9.0)
    assert not runlog.is_spike(history, 3.0 + runlog.SPIKE_MARGIN)
    assert runlog.is_spike(history, 3.01 + runlog.SPIKE_MARGIN)
    assert not runlog.is_spike(history, math.nan)


def test_spikes_from_the_stream_and_from_train_are_the_same():
    rng = np.random.default_rng(0)
    losses = 3 + 0.05 * rng.standard_normal(1000)
    losses[[400, 401, 402, 700]] += 1.0  # an excursion of three steps, and one of one
    history, flagged = [], []
    for step, loss in enumerate(losses):
        if runlog.is_spike(history, loss):
            flagged.append(step)
        history = [*history, loss][-runlog.SPIKE_WINDOW :]
    computed = runlog.spike_steps({"train": (np.arange(1000), losses)})
    logged = runlog.spike_steps({"spike": (np.array(flagged), np.ones(len(flagged)))})
    assert computed.tolist() == logged.tolist() == [400, 700]


@pytest.mark.parametrize(
    ("lines", "state"),
    [
        (["0 val 5\n", "10 val 4\n", "20 val 4.9\n"], "ok"),
        (["0 val 5\n", "10 val 3\n", "20 val 4.1\n"], "diverged"),
        (["0 val 5\n", "10 val 3\n", "20 val nan\n"], "diverged"),
        (["0 val 5\n", "7 train nan\n", "7 diverged 1\n"], "diverged"),
        (["0 val 5\n", "0 hella 0.25\n"], "died"),
        ([], "died"),
    ],
)
def test_state_of_a_run(tmp_path, lines, state):
    path = write_log(tmp_path / "log_moe_a_seed_1.txt", lines)
    row = runlog.summary([path]).iloc[0]
    assert row.runs == 1 and row.diverged == (state == "diverged") and row.died == (state == "died")


def test_summary_averages_over_seeds_and_leaves_out_what_failed(tmp_path):
    for seed, last in ((1, 3.0), (2, 3.5), (3, 9.0)):
        lines = [f"{step} val {value}\n{step} tok_per_sec 100\n" for step, value in ((0, 5), (10, 3.25), (20, last))]
        write_log(tmp_path / f"log_moe_a_seed_{seed}.txt", lines)
    write_log(tmp_path / "log_moe_a_seed_4.txt", ["0 val 5\n", "10 val 1\n"])
    row = runlog.summary(sorted(tmp_path.glob("*.txt"))).iloc[0]
    assert (row.runs, row.diverged, row.unfinished, row.step) == (4, 1, 1, 20)
    assert row.val_mean == 3.25 and row.best_val_mean == 3.125 and row.tok_per_sec == 100
    assert math.isclose(row.val_std, np.std([3.0, 3.5], ddof=1))


def test_table_of_runs_takes_the_last_quarter(tmp_path):
    lines = [f"{step} max_vio {step}\n{step} drop_frac {step / 100}\n{step} val {9 - step}\n" for step in range(9)]
    row = runlog.table_of_runs([write_log(tmp_path / "log_moe_a_seed_7.txt", lines)]).iloc[0]
    assert (row["name"], row.seed, row.state, row.step, row.val, row.max_vio) == ("moe", 7, "ok", 8, 1, 7)
    assert math.isclose(row.drop_frac, 0.07) and math.isnan(row.hella)


# ---- the published logs


def test_published_logs_all_parse(published):
    sizes = [len(steps) for path in published for steps, _ in runlog.read(path).values()]
    assert len(published) == 29 and sum(sizes) == 966_294


def test_divergence_rule_flags_the_published_runs(published):
    runs = [runlog.load_run(path) for path in published]
    at_25_250 = {(r.name, r.seed) for r in runs if runlog.diverged(runlog.up_to(r.streams, 25_250))}
    in_the_table = {
        ("moe", 1337),
        ("moe_noisy_top_k_aux_loss_router_z_loss", 1337),
        (FULL_PREC, 2025),
        (FULL_PREC, 1338),
    }
    assert at_25_250 == in_the_table
    # Top-1 diverges later: 3.34 at step 25,250, 7.70 at its last step, 50,500.
    assert {(r.name, r.seed) for r in runs if runlog.diverged(r.streams)} == {*in_the_table, ("moe_top_k_1", 42)}
    assert [(r.name, r.seed) for r in runs if runlog.died_at_start(r.streams)] == [(FULL_PREC, 1337)]


def test_summary_of_the_published_logs(published):
    table = runlog.summary(published, at_step=25_250).set_index("variant")
    assert math.isclose(table.val_mean[DENSE], (3.1197 + 3.1337) / 2)
    assert math.isclose(table.val_mean["moe_noisy_top_k"], (2.9728 + 2.9801 + 2.9743) / 3)
    assert table.loc[FULL_PREC, ["runs", "diverged", "died", "unfinished"]].tolist() == [5, 2, 1, 1]
    assert table.spikes[DENSE] == 0


def test_published_curves_are_the_committed_ones(published, tmp_path):
    runlog.published_curves(published[0].parent, tmp_path / "curves.csv")
    assert (tmp_path / "curves.csv").read_bytes() == (ROOT / "results/published/curves.csv").read_bytes()


def test_committed_curves_load():
    runs = runlog.load_published(ROOT / "results/published/curves.csv")
    steps, val = {run[:3]: run for run in runs}["no_moe", "20250629", 42].streams["val"]
    assert len(runs) == 29 and val[steps == 25_250].tolist() == [3.1197]


# ---- thinned CSV and command line


def test_thinned_csv_keeps_what_matters(tmp_path):
    path = tmp_path / "log_moe_a_seed_1.txt"
    with runlog.RunLog(path) as log:
        for step in range(5000):
            if step % 250 == 0:
                log.write(step, val=5 - step / 5000, load_0_0=0.5)
            log.write(step, train=float(step), hours=step / 3600, lr=1e-3, spike=step in (300, 301))
    out = tmp_path / "log_moe_a_seed_1.csv"
    runlog.to_csv(path, out)
    whole, thin = runlog.read(path), runlog.read(out)
    for stream in ("val", "load_0_0"):
        assert np.array_equal(whole[stream], thin[stream])
    assert thin["train"][1].mean() == whole["train"][1].mean() and len(thin["train"][0]) == runlog.POINTS
    assert (thin["hours"][0] + 1).tolist() == thin["val"][0][1:].tolist(), "the time of each val but the first"
    assert runlog.spike_steps(thin).tolist() == [300]
    assert out.stat().st_size < 20_000
    assert [run.path.suffix for run in runlog.load_runs(tmp_path)] == [".txt"]


def test_command_line(tmp_path):
    write_log(tmp_path / "log_moe_a_seed_1.txt", ["0 val 5\n", "10 val 3\n"])
    done = subprocess.run([sys.executable, ROOT / "runlog.py", *tmp_path.glob("*.txt")], capture_output=True, text=True)
    assert done.returncode == 0 and "3.0000" in done.stdout, done.stderr
    done = subprocess.run([sys.executable, ROOT / "runlog.py", "absent.txt"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: no such log: absent.txt\n"
