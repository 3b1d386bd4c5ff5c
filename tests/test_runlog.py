"""The log: what is written is read back, runs of equal settings are put together, and how a run ended is seen."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import common
import curves
import identity
import logger
import runlog
from common import UserError

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED_LOG = ROOT / "tests/data/log_moe_20250711_seed_1337.txt"
CURVES = ROOT / "results/published/curves.csv"
FULL_PREC = "moe_noisy_top_k_aux_loss_router_z_loss_router_full_prec"
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


@pytest.fixture
def command_line(monkeypatch, capsys):
    """command_line(*argv) of the script in this process: (exit code, stdout, stderr)."""

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["runlog.py", *map(str, argv)])
        with pytest.raises(SystemExit) as end:
            common.run(runlog.main)
        return end.value.code, *capsys.readouterr()

    return call


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
    assert runlog.summary([tmp_path]).runs.tolist() == [1]


def test_a_log_and_its_copy_in_another_folder_count_once(tmp_path):
    log = write_log(tmp_path / "logs" / "log_moe_a_seed_1.txt", max_lr=1e-3)
    (tmp_path / "kept").mkdir()
    runlog.thin_into(tmp_path / "kept", [runlog.load_run(log)])
    write_log(tmp_path / "again" / "log_moe_a_seed_1.txt", ["0 val 5\n", "10 val 3.001\n"], max_lr=1e-3)
    problems = []
    runs = runlog.load_runs(tmp_path, problems.append)
    assert sorted(run.path.parent.name for run in runs) == ["again", "logs"]
    assert "it is counted once" in problems[0] and len(problems) == 1


# ---- settings and groups


def test_runs_of_other_settings_are_not_averaged(tmp_path):
    for run_id, seed, settings in (("x", 1, {}), ("x", 2, {}), ("y", 3, {"data_seed": 5}), ("y", 1, {"max_lr": 0.01})):
        last = 4 if "max_lr" in settings else seed
        write_log(
            tmp_path / f"log_moe_{run_id}_seed_{seed}.txt", ["0 val 5\n", f"9 val {last}\n"], seed=seed, **settings
        )
    table = runlog.summary(tmp_path)
    assert table.runs.tolist() == [3, 1] and table.val_mean.tolist() == [2, 4]
    assert table.settings.tolist() == ["max_lr 0.0006", "max_lr 0.01"]
    assert "max_lr 0.01 " in runlog.format_summary(table)


def test_a_change_on_resume_makes_another_group(tmp_path):
    change = [{"step": 5, "settings": {"B": 4}}]
    for seed, changes in ((1, []), (2, change), (3, change)):
        record = {"settings": SETTINGS | {"seed": seed, "B": 8}, "changes": changes}
        write_log(tmp_path / f"log_moe_a_seed_{seed}.txt", record=record)
    table = runlog.summary(tmp_path)
    assert table.runs.tolist() == [1, 2] and table.settings.tolist() == ["B 8", "B 4, changed at step 5"]


def test_older_logs_are_grouped_by_their_arguments(tmp_path):
    """From before runs had an identity: what cannot change a number does not count."""
    runs = runlog.load_runs(ROOT / "results/cpu_small")
    assert [len(group) for group in runlog.group(runs)] == [3] * 18
    args = runs[0].meta["args"]
    for i, other in enumerate(({}, {"logs_dir": "x", "seed": 9, "progress": "bar", "block_size": 64}, {"B": 8})):
        record = runs[0].meta | {"args": args | other}
        write_log(tmp_path / f"log_moe_{i}_seed_1.txt", record=record)
    assert runlog.summary(tmp_path).settings.tolist() == ["B 16", "B 8"]


def test_a_log_without_settings_is_not_averaged_with_one_that_has_them(tmp_path):
    write_log(tmp_path / "log_moe_a_seed_1.txt", max_lr=0.1)
    write_log(tmp_path / "log_moe_b_seed_1.txt")
    write_log(tmp_path / "log_moe_b_seed_2.txt")
    table = runlog.summary(tmp_path)
    assert table.runs.tolist() == [1, 2] and table.settings.tolist() == ["", "no settings recorded"]


def test_the_group_of_a_run_is_its_identity_without_the_seeds(tmp_path):
    run = runlog.load_run(write_log(tmp_path / "log_moe_a_seed_1.txt", seed=7))
    assert runlog.group_key(run) == ("moe", identity.identity(SETTINGS, without=runlog.SEEDS))


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
    row = runlog.summary([path]).iloc[0]
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


def test_summary_averages_over_seeds_and_leaves_out_what_failed(tmp_path):
    for seed, last in ((1, 3.25), (2, 3.0), (3, 9.0)):
        lines = [f"{step} val {value}\n{step} tok_per_sec 100\n" for step, value in ((0, 5), (10, 3.5), (20, last))]
        write_log(tmp_path / f"log_moe_a_seed_{seed}.txt", lines)
    write_log(tmp_path / "log_moe_a_seed_4.txt", ["0 val 5\n", "10 val 1\n"])
    row = runlog.summary(sorted(tmp_path.glob("*.txt"))).iloc[0]
    assert (row.runs, row.diverged, row.unfinished, row.step) == (4, 1, 1, 20)
    assert row.val_mean == row.best_val_mean == 3.125 and row.tok_per_sec == 100
    assert math.isclose(row.val_std, np.std([3.0, 3.25], ddof=1))


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


def test_summary_of_the_published_runs():
    table = runlog.summary(runlog.load_published(CURVES), at_step=25_250).set_index("variant")
    assert math.isclose(table.val_mean["no_moe"], (3.1197 + 3.1337) / 2)
    assert math.isclose(table.val_mean["moe_noisy_top_k"], (2.9728 + 2.9801 + 2.9743) / 3)
    assert table.loc[FULL_PREC, ["runs", "diverged", "died", "unfinished"]].tolist() == [5, 2, 1, 1]
    assert table.spikes.isna().all(), "the curves hold no train loss: spikes are not known, rather than 0"


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


# ---- curves


@pytest.mark.parametrize("n", [1, 199, 200, 201, 399, 400, 2000])
def test_thin_gives_at_most_so_many_points(n):
    steps, means = curves.thin(np.arange(n), np.arange(n, dtype=float))
    assert len(steps) == len(means) == min(n, curves.POINTS) and steps[-1] == n - 1


def test_crossing_passes_over_nan():
    x, values = np.arange(5.0), np.array([5, math.nan, 3, 1, math.nan])
    assert curves.crossing(x, values, 2) == 2.5 and curves.crossing(x, values, 4) == 1
    assert math.isnan(curves.crossing(x, values, 0)) and math.isnan(curves.crossing([], np.array([]), 0))


def test_tokens_follow_a_batch_size_changed_on_resume():
    changes = [{"step": 10, "settings": {"total_batch_size": 30}}, {"step": 20, "settings": {"B": 1}}]
    run = runlog.Run("moe", "a", 1, {}, {"tokens_per_step": 100, "flops_per_token": 2, "changes": changes}, Path("log"))
    steps = np.array([0, 5, 10, 15, 25])
    assert curves.along(run, steps, "tokens").tolist() == [0, 500, 1000, 1150, 1450]
    assert curves.along(run, steps, "flops").tolist() == [0, 1000, 2000, 2300, 2900]
    assert curves.along(run._replace(meta={}), steps, "tokens") is None


# ---- effective speedup

LAW = curves.PowerLaw(limit=1.5, scale=80.0, exponent=0.4)
BUDGETS = (10_000, 20_000, 40_000)


def loss_at(tokens, law=LAW):
    return law.limit + law.scale / tokens**law.exponent


def write_run(folder, name, seed, tokens, val, hours=1.0, flops=6.0, steps=100, **settings):
    """A run of `steps` steps that ends at `val` after `tokens` tokens and `hours`."""
    lines = [f"0 val 5\n0 hours 0\n{steps - 1} hours {hours}\n", f"{steps} val {val}\n"]
    known = {"seed": seed, "max_steps": 100, "total_batch_size": tokens // 100} | settings
    record = {"settings": SETTINGS | known, "changes": [], "args": {}, "device": "a", "flops_per_token": flops}
    record["tokens_per_step"] = tokens // 100
    return write_log(folder / f"log_{name}_{tokens}-{steps}_seed_{seed}.txt", lines, record)


def test_a_power_law_is_found_in_its_own_points():
    for law in (LAW, curves.PowerLaw(0.0, 90.0, 0.08), curves.PowerLaw(2.7, 3e4, 0.9)):
        points = [(tokens, loss_at(tokens, law)) for tokens in (1e4, 3e4, 1e5, 1e6)]
        assert curves.fit_power_law(points) == pytest.approx(law, rel=1e-3, abs=2e-3)


def test_a_power_law_is_found_in_spite_of_noise():
    rng = np.random.default_rng(0)
    points = [(tokens, loss_at(tokens) + 0.005 * rng.standard_normal()) for tokens in (1e4, 3e4, 1e5, 3e5) * 5]
    law = curves.fit_power_law(points)
    assert law.limit == pytest.approx(LAW.limit, abs=0.1) and law.exponent == pytest.approx(LAW.exponent, abs=0.05)


@pytest.mark.parametrize("points", [[], [(1e4, 3.0)] * 5, [(1e4, 3.0), (2e4, 2.8), (2e4, 2.81)]])
def test_fewer_than_three_lengths_give_no_law(points):
    with pytest.raises(UserError, match=f"{len(dict(points))} lengths.*needs 3"):
        curves.fit_power_law(points)


@pytest.mark.parametrize("losses", [(3.0, 3.1, 3.2), (3.0, 2.9, 2.7), (3.0, 3.0, 3.0)])
def test_losses_that_are_on_no_law_are_refused(losses):
    with pytest.raises(UserError, match="on no power law"):
        curves.fit_power_law(list(zip(BUDGETS, losses, strict=True)))


def test_effective_speedup_of_a_variant_that_needs_half_the_tokens():
    """It spends 1.2 times the FLOPs per token, and twice the time. FLOPs per token must not count twice."""
    base = curves.Final(loss_at(20_000), {"tokens": 20_000, "flops": 6 * 20_000, "hours": 1.0})
    variant = curves.Final(loss_at(2 * 10_000), {"tokens": 10_000, "flops": 7.2 * 10_000, "hours": 1.0})
    found = curves.effective_speedup(base, variant, LAW)
    assert found == pytest.approx({"tokens": 2.0, "flops": 2 / 1.2, "hours": 1.0})
    longer = curves.Final(loss_at(40_000), {"tokens": 20_000})
    assert curves.effective_speedup(base, longer, LAW)["tokens"] == pytest.approx(2.0)
    assert math.isnan(curves.effective_speedup(base, longer, LAW)["hours"])
    beyond = curves.effective_speedup(base, variant._replace(loss=1.4), LAW)
    assert set(beyond.values()) == {math.inf}
    assert all(map(math.isnan, curves.effective_speedup(base._replace(loss=1.4), variant, LAW).values()))


def test_the_speedup_is_the_published_formula():
    """A = (L_base - L_inf) C^a; C_need = (A / (L_var - L_inf))^(1/a); (C_need / rate_base) / (C / rate_variant)."""
    loss_base, loss_variant, tokens, hours = 9.0, 8.0, 20_000, (1.0, 1.5)
    A = (loss_base - LAW.limit) * tokens**LAW.exponent
    need = (A / (loss_variant - LAW.limit)) ** (1 / LAW.exponent)
    rates = [tokens / spent for spent in hours]
    finals = [curves.Final(loss, {"tokens": tokens, "hours": spent})
              for loss, spent in zip((loss_base, loss_variant), hours, strict=True)]  # fmt: skip
    found = curves.effective_speedup(*finals, LAW)
    assert found["tokens"] == pytest.approx(need / tokens)
    assert found["hours"] == pytest.approx((need / rates[0]) / (tokens / rates[1]))


def make_experiment(folder):
    """Dense runs of three lengths, and a MoE of 10,000 tokens as good as 20,000 (seed 1) and 15,000 (seed 2) dense."""
    for seed in (1, 2):
        for tokens in BUDGETS:
            write_run(folder, "no_moe", seed, tokens, loss_at(tokens), hours=tokens / 10_000)
        write_run(folder, "moe", seed, 10_000, loss_at(20_000 if seed == 1 else 15_000), hours=1.25, flops=7.5)


def test_speedups_in_the_table(tmp_path):
    make_experiment(tmp_path)
    runs = runlog.load_runs(tmp_path)
    table, words = runlog.add_speedups(runlog.summary(runs), runs, "no_moe")
    row = table.set_index("variant").loc["moe"]
    means = [row[f"x_{currency}_mean"] for currency in curves.CURRENCIES]
    assert means == pytest.approx([1.75, 1.75 / 1.25, 1.75 / 1.25], rel=1e-3)
    assert row.x_tokens_std == pytest.approx(0.5 / 2**0.5, rel=1e-3)
    assert table[table.variant == "no_moe"].x_tokens_mean.isna().all()
    assert "from 6 runs of 3 lengths" in words and "tokens ** 0.4" in words
    done = command_line(tmp_path, "--base", "no_moe")
    assert done.returncode == 0 and "1.75±0.35" in done.stdout and "val = 1.5" in done.stdout, done.stderr


def test_pairs_have_equal_seeds_and_data_and_runs_that_ended(tmp_path):
    make_experiment(tmp_path)
    write_run(tmp_path, "other_seed", 3, 10_000, 3.0)
    write_run(tmp_path, "other_data", 1, 10_000, 3.0, data="d1")
    write_run(tmp_path, "mid_schedule", 1, 10_000, 3.0, max_steps=200)
    write_run(tmp_path, "by_the_clock", 1, 10_000, loss_at(20_000), hours=2.0, max_steps=200, max_minutes=120.0)
    runs = runlog.load_runs(tmp_path)
    table, words = runlog.add_speedups(runlog.summary(runs), runs, "no_moe")
    found = table.set_index("variant").x_tokens_mean.drop("no_moe").dropna()
    assert set(found.index) == {"moe", "by_the_clock"} and found.by_the_clock == pytest.approx(2, rel=1e-3)
    assert "; 1 runs that failed or are not at the end of their schedule are left out" in words


def test_currencies_that_the_logs_do_not_tell_are_dashes(command_line, tmp_path):
    """Hours of another machine are not compared either."""
    make_experiment(tmp_path)
    for path in tmp_path.glob("log_moe_*.json"):
        record = json.loads(path.read_text()) | {"device": "b", "flops_per_token": None}
        path.write_text(json.dumps(record))
    _, out, _ = command_line(tmp_path, "--base", "no_moe")
    (row,) = (line for line in out.splitlines() if line.split()[:1] == ["moe"])
    header = out.splitlines()[0].split()
    assert header.index("x_tokens") < header.index("x_flops") < header.index("x_hours")
    assert "1.75±0.35" in row and row.split().count("-") >= 2


def test_a_base_without_three_lengths_or_with_two_settings_is_one_line(command_line, tmp_path):
    for seed in (1, 2):
        write_run(tmp_path, "no_moe", seed, 10_000, loss_at(10_000))
    for argv, message in (
        (["--base", "absent"], "absent: no run of that name among no_moe"),
        (["--base", "no_moe"], "1 lengths of finished"),
        (["--base", "no_moe", "--at_step", 5], "--at_step"),
        (["--base", "x", "--thin", "y"], "--thin"),
    ):
        code, _, said = command_line(tmp_path, *argv)
        assert code == 2 and message in said and said.count("\n") == 1, said
    write_run(tmp_path, "no_moe", 3, 10_000, 3.0, max_lr=0.1)
    code, _, said = command_line(tmp_path, "--base", "no_moe")
    assert code == 2 and "10,000 tokens differ in max_lr" in said


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
    assert runlog.dashed(runlog.summary([tmp_path / "log_moe_c_seed_1.csv"]).spikes[0], 1) == "-"


def test_spikes_of_a_published_log_of_every_50th_step_are_unknown():
    assert runlog.spike_steps(runlog.read(PUBLISHED_LOG)) is None


def test_command_line(command_line, tmp_path):
    log = write_log(tmp_path / "logs" / "log_moe_a_seed_1.txt", max_lr=0.1)
    for paths in ([log], [log, log.with_suffix(".json")], [log.parent]):
        code, out, err = command_line(*paths)
        assert code == 0 and "3.0000" in out and not err, err
    assert command_line("absent.txt") == (2, "", "error: no such log: absent.txt\n")
    assert command_line()[2].startswith("error: no logs given") and command_line(tmp_path / "logs")[0] == 0


def test_the_command_line_skips_an_odd_log_and_says_so(command_line, tmp_path):
    bad = write_log(tmp_path / "log_moe_a_seed_2.txt", ["1 \xff\n"])
    code, _, err = command_line(bad)
    assert code == 2 and err.count("\n") == 1 and "line 1" in err
    write_log(tmp_path / "log_moe_a_seed_1.txt")
    code, out, err = command_line(tmp_path)
    assert code == 0 and "3.0000" in out and f"skipped: {bad}, line 1" in err


def test_the_table_prints_where_the_terminal_is_ascii(tmp_path):
    for seed in (1, 2):
        write_log(tmp_path / f"log_moe_a_seed_{seed}.txt")
    command = [sys.executable, str(ROOT / "runlog.py"), str(tmp_path)]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=ascii_only)
    assert done.returncode == 0 and "3.0000 +- 0.0000" in done.stdout, done.stderr


@pytest.mark.parametrize("where", ["file", "file/deep"])
def test_a_folder_that_cannot_be_written_is_one_line(command_line, tmp_path, where):
    write_log(tmp_path / "log_moe_a_seed_1.txt")
    (tmp_path / "file").write_text("")
    code, _, err = command_line(tmp_path, "--thin", tmp_path / where)
    assert code == 2 and err.count("\n") == 1 and "--thin" in err, err
