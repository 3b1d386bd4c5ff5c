"""Runs of equal settings are one group; a group's difference to its baseline has an interval, a p and an outcome."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import SETTINGS, call, write_log
from scipy import stats

import compare
import curves
import identity
import runlog
import train_single_gpu
from lab.common import UserError

ROOT = Path(__file__).resolve().parents[1]


# ---- settings and groups


def test_runs_of_other_settings_are_not_averaged(tmp_path):
    for run_id, seed, settings in (("x", 1, {}), ("x", 2, {}), ("y", 3, {"data_seed": 5}), ("y", 1, {"max_lr": 0.01})):
        last = 4 if "max_lr" in settings else seed
        write_log(
            tmp_path / f"log_moe_{run_id}_seed_{seed}.txt", ["0 val 5\n", f"9 val {last}\n"], seed=seed, **settings
        )
    table = compare.summary(tmp_path)
    assert table.runs.tolist() == [3, 1] and table.val_mean.tolist() == [2, 4]
    assert table.settings.tolist() == ["max_lr 0.0006", "max_lr 0.01"]
    assert "max_lr 0.01 " in compare.format_summary(table)


def test_a_change_on_resume_makes_another_group(tmp_path):
    change = [{"step": 5, "settings": {"B": 4}}]
    for seed, changes in ((1, []), (2, change), (3, change)):
        record = {"settings": SETTINGS | {"seed": seed, "B": 8}, "changes": changes}
        write_log(tmp_path / f"log_moe_a_seed_{seed}.txt", record=record)
    table = compare.summary(tmp_path)
    assert table.runs.tolist() == [1, 2] and table.settings.tolist() == ["B 8", "B 4, changed at step 5"]


def test_older_logs_are_grouped_by_their_arguments(tmp_path):
    """From before runs had an identity: what cannot change a number does not count."""
    runs = runlog.load_runs(ROOT / "results/cpu_small")
    assert [len(group) for group in compare.group(runs)] == [3] * 18
    args = runs[0].meta["args"]
    for i, other in enumerate(({}, {"logs_dir": "x", "seed": 9, "progress": "bar", "block_size": 64}, {"B": 8})):
        record = runs[0].meta | {"args": args | other}
        write_log(tmp_path / f"log_moe_{i}_seed_1.txt", record=record)
    assert compare.summary(tmp_path).settings.tolist() == ["B 16", "B 8"]


def test_a_log_without_settings_is_not_averaged_with_one_that_has_them(tmp_path):
    write_log(tmp_path / "log_moe_a_seed_1.txt", max_lr=0.1)
    write_log(tmp_path / "log_moe_b_seed_1.txt")
    write_log(tmp_path / "log_moe_b_seed_2.txt")
    table = compare.summary(tmp_path)
    assert table.runs.tolist() == [1, 2] and table.settings.tolist() == ["", "no settings recorded"]


def test_the_group_of_a_run_is_its_identity_without_the_seeds(tmp_path):
    run = runlog.load_run(write_log(tmp_path / "log_moe_a_seed_1.txt", seed=7))
    assert compare.group_key(run) == ("moe", identity.identity(SETTINGS, without=compare.SEEDS))


def test_summary_averages_over_seeds_and_leaves_out_what_failed(tmp_path):
    for seed, last in ((1, 3.25), (2, 3.0), (3, 9.0)):
        lines = [f"{step} val {value}\n{step} tok_per_sec 100\n" for step, value in ((0, 5), (10, 3.5), (20, last))]
        write_log(tmp_path / f"log_moe_a_seed_{seed}.txt", lines)
    write_log(tmp_path / "log_moe_a_seed_4.txt", ["0 val 5\n", "10 val 1\n"])
    row = compare.summary(sorted(tmp_path.glob("*.txt"))).iloc[0]
    assert (row.runs, row.diverged, row.unfinished, row.step) == (4, 1, 1, 20)
    assert row.val_mean == row.best_val_mean == 3.125 and row.tok_per_sec == 100
    assert math.isclose(row.val_std, np.std([3.0, 3.25], ddof=1))


def test_summary_of_the_published_runs():
    runs = runlog.load_published(ROOT / "results/published/curves.csv")
    table = compare.summary(runs, at_step=25_250).set_index("variant")
    assert math.isclose(table.val_mean["no_moe"], (3.1197 + 3.1337) / 2)
    assert math.isclose(table.val_mean["noisy_top_k"], (2.9728 + 2.9801 + 2.9743) / 3)
    assert table.loc["router_full_prec", ["runs", "diverged", "died", "unfinished"]].tolist() == [5, 2, 1, 1]
    assert table.spikes.isna().all(), "the curves hold no train loss: spikes are not known, rather than 0"


def test_runs_of_other_data_seeds_are_one_group(tmp_path):
    """The trainer puts a data seed into the name of the log, and cuts a long name with a hash of it."""
    for flags in (
        {"max_lr": 0.02},
        {"use_router_z_loss": True, "switch_tfm_init_scale": 0.1, "gate": "sigmoid", "n_embd": 64},
    ):
        for seed in (7, 1234):
            settings = {"n_layer": 4, "data_seed": seed, "T": 64, "warmup_steps": 100} | flags
            name = identity.run_name(train_single_gpu.Args(**settings))
            write_log(tmp_path / f"log_{name}_a_seed_{seed}.txt", seed=seed, **settings)
    names = {run.name for run in runlog.load_runs(tmp_path)}
    assert len(names) == 4 and max(map(len, names)) == identity.LONGEST_NAME
    assert compare.summary(tmp_path).runs.tolist() == [2, 2]


def test_logs_of_two_given_names_are_two_groups(tmp_path):
    for name in ("before", "after"):
        write_log(tmp_path / f"log_{name}_a_seed_1.txt", seed=1)
    assert compare.summary(tmp_path).runs.tolist() == [1, 1]


# ---- curves


@pytest.mark.parametrize("n", [1, 199, 200, 201, 399, 400, 2000])
def test_thin_gives_at_most_so_many_points(n):
    steps, means = curves.thin(np.arange(n), np.arange(n, dtype=float))
    assert len(steps) == len(means) == min(n, curves.POINTS) and steps[-1] == n - 1


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


def write_run(folder, name, seed, tokens, val, hours=1.0, flops=6.0, steps=None, **settings):
    """A run of `steps` steps of 100 tokens (default: to the end of its schedule) that ends at `val` after `hours`."""
    known = {"seed": seed, "max_steps": tokens // 100} | settings
    steps = steps or known["max_steps"]
    lines = [f"0 val 5\n0 hours 0\n{steps - 1} hours {hours}\n", f"{steps // 2} val 4\n{steps} val {val}\n"]
    record = {"settings": SETTINGS | known, "changes": [], "args": {}, "device": "a", "flops_per_token": flops}
    record["tokens_per_step"] = 100
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
            write_run(folder, "no_moe", seed, tokens, loss_at(tokens), hours=tokens / 10_000, n_exp=1)
        write_run(folder, "moe", seed, 10_000, loss_at(20_000 if seed == 1 else 15_000), hours=1.25, flops=7.5)


def with_speedups(folder, baseline):
    groups = compare.group(runlog.load_runs(folder))
    return compare.add_speedups(compare.summary_of(groups), groups, baseline)


def test_speedups_in_the_table(tmp_path):
    make_experiment(tmp_path)
    table, words = with_speedups(tmp_path, "no_moe")
    row = table.set_index("variant").loc["only_moe"]
    means = [row[f"x_{currency}_mean"] for currency in curves.CURRENCIES]
    assert means == pytest.approx([1.75, 1.75 / 1.25, 1.75 / 1.25], rel=1e-3)
    assert row.x_tokens_std == pytest.approx(0.5 / 2**0.5, rel=1e-3)
    assert "from 6 runs of 3 lengths" in words and "tokens ** 0.4" in words
    code, out, errors = call("runlog", tmp_path, "--baseline", "no_moe")
    assert code == 0 and "1.75±0.35" in out and "val = 1.5" in out, errors


def test_pairs_have_equal_seeds_and_data_and_runs_that_ended(tmp_path):
    make_experiment(tmp_path)
    write_run(tmp_path, "other_seed", 3, 10_000, 3.0, use_aux_loss=True)
    write_run(tmp_path, "other_data", 1, 10_000, 3.0, data="d1")
    write_run(tmp_path, "mid_schedule", 1, 10_000, 3.0, gate="sigmoid", steps=50)
    write_run(
        tmp_path, "by_the_clock", 1, 10_000, loss_at(20_000), hours=2.0, steps=100, max_steps=300, max_minutes=120
    )
    table, _ = with_speedups(tmp_path, "no_moe,max_steps=100")
    found = table[table.variant != "no_moe"].dropna(subset="x_tokens_mean")
    assert found.settings.tolist() and found.x_tokens_mean.tolist() == pytest.approx([2, 1.75], rel=1e-3)


def test_currencies_that_the_logs_do_not_tell_have_no_column(tmp_path):
    """Hours of another machine are not compared either."""
    make_experiment(tmp_path)
    for path in tmp_path.glob("log_moe_*.json"):
        record = json.loads(path.read_text()) | {"device": "b", "flops_per_token": None}
        path.write_text(json.dumps(record))
    code, out, errors = call("runlog", tmp_path, "--baseline", "no_moe")
    assert code == 0 and "x tokens" in out and "x flops" not in out and "x hours" not in out, errors


@pytest.mark.parametrize("name", ["no_moe", "moe"])
def test_hours_of_a_machine_that_was_shared_are_not_compared(tmp_path, name):
    make_experiment(tmp_path)
    for path in tmp_path.glob(f"log_{name}_*_seed_2.txt"):
        lines = [line.split() for line in path.read_text().splitlines()]
        slow = [(step, stream, 1.3 * float(x) if stream == "hours" else x) for step, stream, x in lines]
        path.write_text("".join(f"{step} {stream} {x}\n" for step, stream, x in slow))
    row = with_speedups(tmp_path, "no_moe")[0].set_index("variant").loc["only_moe"]
    assert math.isnan(row.x_hours_mean) and row.x_tokens_mean == pytest.approx(1.75, rel=1e-3)


def test_without_three_lengths_the_table_says_so(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path, "no_moe", seed, 10_000, loss_at(10_000), n_exp=1)
    code, out, _ = call("runlog", tmp_path, "--baseline", "no_moe")
    assert code == 0 and "no effective speedup over no_moe: 1 lengths of finished" in out


# ---- differences


def pairs_of(losses, data_seed=None):
    return [((seed, seed if data_seed is None else data_seed, "d"), loss) for seed, loss in enumerate(losses)]


def test_the_paired_difference_is_that_of_the_textbook():
    """Student's t over the differences: mean -0.02, standard error 0.01 / sqrt(3) ..."""
    found = compare.difference(pairs_of([1.97, 2.98, 3.99]), pairs_of([2.0, 3.0, 4.0]))
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert found[:3] == pytest.approx((-0.02, -0.02 - half, -0.02 + half), rel=1e-5)
    assert (found.n, found.test) == (3, "paired") and found.std == pytest.approx(0.01)
    assert found.p == pytest.approx(2 * stats.t.cdf(-0.02 / (0.01 / math.sqrt(3)), 2))


def test_where_all_runs_see_the_same_data_the_test_is_welchs():
    a, b = [1.2, 1.0, 1.1], [2.0, 2.3, 2.2, 2.1]
    found = compare.difference(pairs_of(a, 1337), pairs_of(b, 1337))
    parts = [np.var(values, ddof=1) / len(values) for values in (a, b)]
    free = sum(parts) ** 2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (a, b), strict=True))
    half = stats.t.ppf(0.975, free) * math.sqrt(sum(parts))
    assert found[:3] == pytest.approx((1.1 - 2.15, -1.05 - half, -1.05 + half)) and (found.n, found.test) == (
        3,
        "Welch",
    )


@pytest.mark.parametrize(("a", "b"), [([1.0], [2.0, 2.1]), ([], [1.0, 2.0]), ([1.0, 1.0], [2.0, 2.0])])
def test_too_few_runs_or_no_spread_give_no_interval(a, b):
    found = compare.difference(pairs_of(a), pairs_of(b))
    assert math.isnan(found.p) and math.isnan(found.low)
    assert compare.outcome(found, math.nan, 0, 0) == "-"


def test_a_repeated_run_is_one_pair():
    repeated = [*pairs_of([1.0, 2.0, 3.5]), ((0, 0, "d"), 1.2)]
    found = compare.difference(repeated, pairs_of([2.0, 3.0, 4.0]))
    assert found.n == 3 and found.minus == pytest.approx((-0.9 - 1.0 - 0.5) / 3)


def test_holm():
    """Holm (1979): the smallest p times n, the next times n - 1, never below the one before, at most 1."""
    assert compare.holm([0.01, 0.04, 0.03, 0.6]) == pytest.approx([0.04, 0.09, 0.09, 0.6])
    assert compare.holm([0.02, math.nan, 0.5]) == pytest.approx([0.04, math.nan, 0.5], nan_ok=True)
    assert compare.holm([0.5, 0.6]).max() == 1 and not len(compare.holm([]))


def difference_of(low, high, p):
    return compare.Difference((low + high) / 2, low, high, p, 3, "paired", 0.1)


@pytest.mark.parametrize(
    ("low", "high", "corrected", "failed", "wanted"),
    [
        (-2, -1, 0.01, (0, 0), "works"),
        (1, 2, 0.01, (0, 0), "harms"),
        (-2, -1, 0.07, (0, 0), "mixed"),
        (-1, 1, 0.9, (0, 0), "no difference seen"),
        (-2, -1, 0.01, (1 / 3, 0), "mixed"),
        (-2, -1, 0.01, (2 / 3, 0), "breaks"),
        (-2, -1, 0.01, (2 / 3, 2 / 3), "works"),
        (1, 2, 0.01, (0, 2 / 3), "works"),
    ],
)
def test_outcomes(low, high, corrected, failed, wanted):
    assert compare.outcome(difference_of(low, high, 0.01), corrected, *failed) == wanted


def test_runs_that_were_stopped_early_are_no_failures():
    states = pd.Series(["ok", "diverged", "stuck", "unfinished", "died"])
    assert compare.failed_part(states) == pytest.approx(2 / 3) and compare.failed_part(states[3:]) == 0


def make_groups(folder, seeds=(1, 2, 3), **more):
    """Dense of 100 and 200 steps, dense with another beta2; top 2 with both and with a load-balance loss."""
    arms = [("no_moe", 2.0, {"n_exp": 1}), ("no_moe", 1.9, {"n_exp": 1, "max_steps": 200}),
            ("no_moe", 1.8, {"n_exp": 1, "beta2": 0.99}), ("moe", 1.7, {"beta2": 0.99}), ("moe", 1.6, {}),
            ("moe_aux_loss", 1.595, {"use_aux_loss": True})]  # fmt: skip
    for i, (name, loss, settings) in enumerate(arms):
        for seed in seeds:
            known = {"data_seed": seed} | settings | more
            val = loss + 0.1 * seed + 0.002 * ((seed * (i + 2)) % 3)
            write_run(folder / f"{i}", name, seed, 10_000, val, **known)
    return compare.group(runlog.load_runs(folder))


def test_each_group_has_the_baseline_of_its_shared_settings(tmp_path):
    groups = make_groups(tmp_path)
    table = compare.add_differences(compare.summary_of(groups), groups, "no_moe")
    rows = {(row.variant, row.settings): row for row in table.itertuples()}
    assert len(rows) == 6
    baselines = {key: row.baseline for key, row in rows.items()}
    assert baselines.pop(("only_moe", "beta2 0.99")) == "no_moe beta2 0.99"
    assert set(baselines.values()) == {"no_moe"}, "values that most groups have are not named"
    assert rows["only_moe", "beta2 0.99"].minus == pytest.approx(-0.1, abs=0.005)
    assert rows["only_moe", ""].minus == pytest.approx(-0.4, abs=0.005)
    assert [row.outcome for row in rows.values()].count("baseline") == 1
    assert rows["only_moe", ""].test == "paired" and rows["only_moe", ""].n == 3


def test_a_baseline_with_settings_is_that_of_every_group(tmp_path):
    groups = make_groups(tmp_path)
    table = compare.add_differences(compare.summary_of(groups), groups, "no_moe,max_steps=200")
    assert table.baseline.nunique() == 1
    row = table[table.variant == "aux_only"].iloc[0]
    assert row.minus == pytest.approx(-0.305, abs=0.005) and row.x_spent_flops == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("absent", "no such runs; there are no_moe, only_moe, aux_only"),
        ("no_moe,max_lr=7", "0 groups of that name fit (max_steps 100, beta2 0.95; "),
        ("no_moe,max_steps=100", "2 groups of that name fit (beta2 0.95; beta2 0.99)"),
    ],
)
def test_a_baseline_that_is_not_there_is_one_line(tmp_path, spec, words):
    make_groups(tmp_path, seeds=(1,))
    code, _, errors = call("runlog", tmp_path, "--baseline", spec)
    assert code == 2 and words in errors and errors.count("\n") == 1, errors


def test_losses_on_other_data_are_not_compared(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path / "a", "no_moe", seed, 10_000, 2.0 + seed, n_exp=1)
        write_run(tmp_path / "b", "moe", seed, 10_000, 1.0 + seed, data="d1")
    groups = compare.group(runlog.load_runs(tmp_path))
    table = compare.add_differences(compare.summary_of(groups), groups, "no_moe")
    assert table.minus.isna().all() and table.outcome.tolist() == ["-", "baseline"]


def test_a_run_in_mid_schedule_is_marked_and_compared_only_at_a_step(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path, "no_moe", seed, 10_000, 2.0 + seed / 10, n_exp=1)
        write_run(tmp_path, "moe", seed, 20_000, 1.0 + seed / 10, steps=100)
    code, out, _ = call("runlog", tmp_path, "--baseline", "no_moe")
    [row] = (line for line in out.splitlines() if "only_moe" in line)
    assert code == 0 and "1.1500±0.0707*" in row and "[" not in row and "*: read in mid-schedule" in out
    _, out, _ = call("runlog", tmp_path, "--baseline", "no_moe", "--at_step", 50)
    assert out.count("4.0000±0.0000*") == 2 and "+0.000" in out


def test_the_table_says_no_difference_and_the_least_it_can_see(tmp_path):
    make_groups(tmp_path)
    code, out, _ = call("runlog", tmp_path, "--baseline", "only_moe")
    [row] = (line for line in out.splitlines() if "aux_only" in line)
    assert code == 0 and "no difference seen" in row and "paired, n = 3" in row
    assert "of paired differences 0.00" in out and "is not told from zero" in out


def test_the_least_difference_is_the_half_width_of_the_interval(tmp_path):
    """One comparison of three pairs: the footer's number is the half-width in its row."""
    for i, name in enumerate(("no_moe", "moe")):
        for seed in (1, 2, 3):
            val = 2 + seed / 10 + 0.003 * ((seed * (i + 2)) % 3)
            write_run(tmp_path, name, seed, 10_000, val, data_seed=seed, n_exp=1 if name == "no_moe" else 8)
    groups = compare.group(runlog.load_runs(tmp_path))
    table = compare.add_differences(compare.summary_of(groups), groups, "no_moe")
    row = table[table.variant == "only_moe"].iloc[0]
    assert f"reaches {(row.high - row.low) / 2:.4f} to each side (paired, " in compare.least_difference(table)


def test_commits_and_machines_of_a_comparison_are_named(tmp_path):
    for seed, commit in ((1, "a"), (2, "b-dirty")):
        path = write_run(tmp_path, "moe", seed, 10_000, 2.0)
        path.with_suffix(".json").write_text(
            json.dumps(json.loads(path.with_suffix(".json").read_text()) | {"commit": commit})
        )
    code, out, _ = call("runlog", tmp_path, "--baseline", "only_moe")
    assert code == 0 and "commits: a, b-dirty; machines: a\n" in out


def test_streams_that_are_absent_are_dashes(tmp_path):
    for n_exp in (1, 8):
        write_run(tmp_path, f"name{n_exp}", 1, 10_000, 2.0, n_exp=n_exp)
    write_log(tmp_path / "log_name9_a_seed_1.txt", ["0 val 5\n", "0 max_vio 2\n", "0 spike 0\n", "9 val 4\n"], n_exp=9)
    shown = compare.cells(compare.summary(tmp_path))
    assert shown.max_vio.tolist() == ["-", "-", "2.00"] and shown.spikes.tolist() == ["-", "-", "0.0"]
