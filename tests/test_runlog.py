"""The log: a run that is written is read back, and how it ended is seen."""

import math
from pathlib import Path

import numpy as np
import pytest
from conftest import Forked, call, write_log

import compare
import curves
import logger
import runlog
from lab.common import UserError

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED_LOG = ROOT / "tests/data/log_moe_20250711_seed_1337.txt"
CURVES = ROOT / "results/published/curves.csv"
FULL_PREC = "moe_noisy_top_k_aux_loss_router_z_loss_router_full_prec"


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
    log = logger.RunLog(path)
    log.write(0, {"val": 10.9999384, "hella": 0.25604})
    log.write(0, {"load_0_1": 0.125, "train": math.nan, "lr": 6e-4 / 2000, "grad_norm": math.inf})
    assert path.read_text() == (  # before it is closed: every write is visible at once
        "0 val 10.999938\n0 hella 0.2560\n0 load_0_1 0.125\n0 train nan\n0 lr 3e-07\n0 grad_norm inf\n"
    )
    log.close()
    streams = runlog.read(path)
    assert list(streams) == ["val", "hella", "load_0_1", "train", "lr", "grad_norm"]
    steps, values = streams["val"]
    assert steps.dtype == np.int64 and values.dtype == np.float64 and values.tolist() == [10.999938]
    assert math.isnan(streams["train"][1][0]) and math.isinf(streams["grad_norm"][1][0])


@pytest.mark.parametrize("torn", ["2", "2 tra", "2 train", "2 train 3.", "2 train 3.25"])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    path = write_log(tmp_path / "log", ["0 val 4.5\n", "1 train 4.25\n", torn])
    streams = runlog.read(path)
    assert {name: steps.tolist() for name, (steps, _) in streams.items()} == {"val": [0], "train": [1]}


MALFORMED = [b"1 train", b"1 train 2 3", b"x train 2", b"1 train two", b"", b"1.5 train 2", b"1 train 2 3 x 4"]
MALFORMED += [b"99999999999999999999999 train 2", b"1 \xff 2", bytes(64)]


@pytest.mark.parametrize("bad", MALFORMED)
@pytest.mark.parametrize("header", [b"", runlog.CSV_HEADER])
def test_any_other_malformed_line_is_named(tmp_path, bad, header):
    path = tmp_path / "log"
    path.write_bytes(header + b"0 val 4.5\n" + bad + b"\n2 train 4\n")
    with pytest.raises(UserError, match=f"line {3 if header else 2}"):
        runlog.read(path)


@pytest.mark.parametrize("text", ["", "0 va"])
def test_an_empty_log_has_no_streams(tmp_path, text):
    assert runlog.read(write_log(tmp_path / "log", [text])) == {}


def test_truncate_keeps_the_steps_before(tmp_path):
    kept = ["0 val 4.5\n", "0 train 4.25\n", "1 train 4.125\n"]
    path = write_log(tmp_path / "log", [*kept, "2 val 4.0\n", "2 train 4.0\n", "3 tr"])
    logger.truncate(path, 2)
    assert path.read_text() == "".join(kept)
    assert [p.name for p in tmp_path.iterdir()] == ["log"]
    logger.truncate(tmp_path / "absent", 2)  # a run killed before its first line


def test_a_log_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--logs_dir"):
        logger.RunLog(tmp_path / "file" / "log_moe_a_seed_1.txt")


def test_a_folder_with_odd_logs_gives_the_others_and_names_those(tmp_path):
    good = write_log(tmp_path / "deep" / "log_moe_a_seed_1.txt", max_lr=1e-3)
    write_log(tmp_path / "log_moe_a_seed_2.txt", ["1 train\n"])
    write_log(tmp_path / "log_moe_a_seed_3.txt").with_suffix(".json").write_text("{")
    write_log(tmp_path / "log_moe_a_seed_4.txt", record={"settings": [1], "args": 3})
    write_log(tmp_path / "log_foo.txt")
    (tmp_path / "log_moe_a_seed_1.txt.1").write_text("an older life of a run")
    problems = []
    assert [run.path for run in runlog.load_runs(tmp_path, problems.append)] == [good]
    odd = ["log_foo.txt", *(f"log_moe_a_seed_{seed}." for seed in (2, 3, 4))]
    assert len(problems) == 4 and all(any(name in str(problem) for problem in problems) for name in odd)
    assert compare.summary([tmp_path]).runs.tolist() == [1]


def test_a_log_and_its_copy_in_another_folder_count_once(tmp_path):
    log = write_log(tmp_path / "logs" / "log_moe_a_seed_1.txt", max_lr=1e-3)
    (tmp_path / "kept").mkdir()
    runlog.thin_into(tmp_path / "kept", [runlog.load_run(log)])
    write_log(tmp_path / "again" / "log_moe_a_seed_1.txt", ["0 val 5\n", "10 val 3.001\n"], max_lr=1e-3)
    problems = []
    runs = runlog.load_runs(tmp_path, problems.append)
    assert sorted(run.path.parent.name for run in runs) == ["again", "logs"]
    assert "it is counted once" in problems[0] and len(problems) == 1


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
        (["0 val 5\n", "10 val 4\n", "20 val 4.09\n"], "ok"),
        (["0 val 5\n", "10 val 4\n", "20 val 4.9\n"], "regressed"),
        (["0 val 5\n", "10 val 3\n", "20 val 4.1\n"], "diverged"),
        (["0 val 5\n", "10 val 3\n", "20 val nan\n"], "diverged"),
        (["0 val nan\n", "10 val nan\n"], "diverged"),
        (["0 val 5\n", "7 train nan\n", "7 diverged 1\n"], "diverged"),
        (["0 val 5\n", "500 val 2.2\n", "1000 val 2.15\n"], "stuck"),
        (["0 val 5\n", "500 val 2.05\n", "1000 val 2.2\n"], "regressed"),
        (["0 val 5\n", "500 val 2.2\n", "999 val 2.15\n"], "ok"),  # too short to tell
        (["500 val 3\n", "2000 val 2.9\n"], "ok"),  # it branched off another run
        (["0 train 3\n", "1 train 3\n"], "ok"),
        (["0 val 5\n", "0 hella 0.25\n"], "died"),
        ([], "died"),
    ],
)
def test_state_of_a_run(tmp_path, lines, state):
    path = write_log(tmp_path / "log_moe_a_seed_1.txt", lines)
    assert runlog.table_of_runs([path]).state.tolist() == [state]
    row = compare.summary([path]).iloc[0]
    assert row.runs == 1 and row[list(runlog.STATES[1:])].sum() == (state != "ok")
    assert math.isnan(row.val_mean) == (state != "ok" or "val" not in "".join(lines))


def test_a_finetuned_model_is_not_stuck(tmp_path):
    lines = ["0 val 3.1\n", "2000 val 3\n"]
    path = write_log(tmp_path / "log_moe_a_seed_1.txt", lines, init_from="gpt2")
    assert runlog.state_of(runlog.load_run(path)) == "ok"


def test_runs_that_never_learned_are_told_from_those_that_did():
    """At 16 thousandths 13 of these 30 runs end at the loss of which byte follows which, the others far below."""
    runs = runlog.load_runs(ROOT / "results/cpu_small_lr_0.016")
    lost = {run.path.stem for run in runs if runlog.state_of(run) == "stuck"}
    assert lost == {run.path.stem for run in runs if run.streams["val"][1][-1] > 2.3} and len(lost) == 13
    assert {runlog.state_of(run) for run in runlog.load_runs(ROOT / "results/cpu_small")} == {"ok"}


def test_table_of_runs_takes_the_last_quarter(tmp_path):
    lines = [f"{step} max_vio {step}\n{step} drop_frac {step / 100}\n{step} val {9 - step}\n" for step in range(9)]
    row = runlog.table_of_runs([write_log(tmp_path / "log_moe_a_seed_7.txt", lines)]).iloc[0]
    assert (row["name"], row.seed, row.state, row.step, row.val, row.max_vio) == ("moe", 7, "ok", 8, 1, 7)
    assert math.isclose(row.drop_frac, 0.07) and math.isnan(row.hella)


# ---- the published runs


def test_states_of_the_published_runs_at_step_25_250():
    runs = runlog.load_published(CURVES)
    table = runlog.table_of_runs(runs, at_step=25_250)
    found = {state: set(zip(rows.name, rows.seed, strict=True)) for state, rows in table.groupby("state")}
    z_loss, init = (
        FULL_PREC.removesuffix("_router_full_prec"),
        FULL_PREC.replace("router_full", "switch_tfm_init_router_full"),
    )
    assert found["diverged"] == {("moe", 1337), (z_loss, 1337), (FULL_PREC, 2025), (FULL_PREC, 1338)}
    assert found["regressed"] == {(z_loss, 42), (z_loss, 2025), (init, 42), (init, 2025), ("moe_top_k_1", 42)}
    assert found["died"] == {(FULL_PREC, 1337)} and "stuck" not in found
    # Top 1 diverges later: 3.34 at step 25,250, 7.70 at its last step, 50,500.
    later = {(run.name, run.seed) for run in runs if runlog.diverged(run.streams)}
    assert later == {*found["diverged"], ("moe_top_k_1", 42)}


def test_a_published_log_gives_its_committed_curve(tmp_path):
    folder = tmp_path / "logs"
    write_log(folder / PUBLISHED_LOG.name, [PUBLISHED_LOG.read_text()])
    runlog.published_curves(folder, tmp_path / "curves.csv")
    header, *rows = (tmp_path / "curves.csv").read_text().splitlines()
    committed = CURVES.read_text().splitlines()
    assert header == committed[0] and rows == [row for row in committed if row.startswith("moe,20250711,1337,")]


def test_committed_curves_load():
    runs = runlog.load_published(CURVES)
    steps, val = {run[:3]: run for run in runs}["no_moe", "20250629", 42].streams["val"]
    assert len(runs) == 29 and val[steps == 25_250].tolist() == [3.1197]


# ---- thinned CSV and command line


def test_thinned_csv_keeps_what_matters(tmp_path):
    path = tmp_path / "log_moe_a_seed_1.txt"
    log = logger.RunLog(path)
    for step in range(5000):
        if step % 250 == 0:
            log.write(step, {"val": 5 - step / 5000, "load_0_0": 0.5})
        spike = {"spike": 1} if step in (300, 301) else {}
        log.write(step, {"train": float(step), "hours": step / 3600, "lr": 1e-3} | spike)
    log.close()
    out = tmp_path / "log_moe_a_seed_1.csv"
    runlog.to_csv(path, out)
    whole, thin = runlog.read(path), runlog.read(out)
    for stream in ("val", "load_0_0"):
        assert np.array_equal(whole[stream], thin[stream])
    assert thin["train"][1].mean() == whole["train"][1].mean() and len(thin["train"][0]) == curves.POINTS
    assert (thin["hours"][0] + 1).tolist() == thin["val"][0][1:].tolist(), "the time of each val but the first"
    assert runlog.spike_steps(thin).tolist() == [300]
    assert out.stat().st_size < 20_000
    assert [run.path.suffix for run in runlog.load_runs(tmp_path)] == [".txt"]


def test_a_clean_run_has_no_spikes_in_its_csv_either(tmp_path):
    """Loss rising slowly by 2 nats: no step is a spike, though means over 15 steps would look like 75 of them."""
    losses = 3 + np.maximum(0, np.arange(3000) - 1500) / 750
    log = write_log(tmp_path / "log_moe_a_seed_1.txt", [f"{step} train {loss}\n" for step, loss in enumerate(losses)])
    out = tmp_path / "log_moe_b_seed_1.csv"
    runlog.to_csv(log, out)
    assert runlog.spike_steps(runlog.read(log)).tolist() == runlog.spike_steps(runlog.read(out)).tolist() == []
    assert runlog.table_of_runs([out], at_step=100).spikes.tolist() == [0]
    old = [line for line in out.read_text().splitlines(keepends=True) if ",spike," not in line]
    assert runlog.spike_steps(runlog.read(write_log(tmp_path / "log_moe_c_seed_1.csv", old))) is None
    assert compare.dashed(compare.summary([tmp_path / "log_moe_c_seed_1.csv"]).spikes[0], 1) == "-"


def test_spikes_of_a_published_log_of_every_50th_step_are_unknown():
    assert runlog.spike_steps(runlog.read(PUBLISHED_LOG)) is None


def test_command_line(tmp_path):
    log = write_log(tmp_path / "logs" / "log_moe_a_seed_1.txt", max_lr=0.1)
    for paths in ([log], [log, log.with_suffix(".json")], [log.parent]):
        code, out, errors = call("runlog", *paths)
        assert code == 0 and "3.0000" in out and not errors
    assert call("runlog", "absent.txt") == (2, "", "error: no such log: absent.txt\n")
    code, _, errors = call("runlog")
    assert code == 2 and errors.startswith("error: no logs given")


@pytest.mark.slow
def test_the_script_is_run_as_one(tmp_path):
    write_log(tmp_path / "log_moe_a_seed_1.txt", max_lr=0.1)
    process = Forked(ROOT / "runlog.py", tmp_path, "--baseline", "moe")
    out, errors = process.communicate()
    assert process.poll() == 0 and "3.0000" in out, errors


def test_the_command_line_skips_an_odd_log_and_says_so(tmp_path):
    bad = write_log(tmp_path / "log_moe_a_seed_2.txt", ["1 \xff\n"])
    code, _, errors = call("runlog", bad)
    assert code == 2 and errors.count("\n") == 1 and "line 1" in errors
    write_log(tmp_path / "log_moe_a_seed_1.txt")
    code, out, errors = call("runlog", tmp_path)
    assert code == 0 and "3.0000" in out and f"skipped: {bad}, line 1" in errors


def test_the_table_prints_where_the_terminal_is_ascii(tmp_path):
    for seed in (1, 2):
        write_log(tmp_path / f"log_moe_a_seed_{seed}.txt")
    code, out, errors = call("runlog", tmp_path, encoding="ascii")
    assert code == 0 and "3.0000 +- 0.0000" in out, errors
