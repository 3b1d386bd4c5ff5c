"""Runs of equal settings are one group; its difference to a baseline has an interval and an outcome, or a reason."""

import json
import math
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import run_script
from scipy import stats

import compare
from lab import results, runs
from lab.common import UserError

ROOT = Path(__file__).resolve().parents[1]
CURVE = ROOT / "results/reference/llmc_gpt2_124M.csv"
SETTINGS = {
    "n_exp": 8, "T": 64, "B": 16, "total_batch_size": 100, "max_steps": 100, "max_minutes": None, "max_lr": 0.004,
    "muon_lr": 0.02, "val_tokens": 640, "vocab_size": 257, "init_from": "scratch", "data_seed": 1337, "logs_dir": "a",
}


def write_run(folder, name, seed, val=2.0, log="", resumed=(), facts=None, **settings):
    """A run folder with a log of two validations, unless another log is given: the last at max_steps."""
    settings = SETTINGS | {"seed": seed, "name": name} | settings
    facts = {"data": "d0", "flops_per_token": 6.0, "commit": "c", "device": "cpu", "world_size": 1} | (facts or {})
    config = {"name": name, "settings": settings, "tokenizer": "bytes", "threads": 1, "pair_loss": None} | facts
    path = Path(folder, f"{name}_seed_{seed}")
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config | {"resumed": list(resumed)}))
    last = settings["max_steps"]
    log = log or f"0 val 5\n0 hours 0.5\n{last // 2} val 4\n{last - 1} hours 1\n{last} val {val}\n"
    (path / "log.txt").write_text(log)
    return path


def groups_of(*folders, baseline="", at_step=None, **how):
    table, _ = results.read(folders, at_step)
    groups, _ = compare.compare(table, baseline, **how)
    return groups


def call(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, words)])
    compare.main()
    return capsys.readouterr().out


def test_only_seeds_and_what_cannot_change_a_number_may_differ_in_a_group(tmp_path):
    write_run(tmp_path / "a", "moe", 1, val=1.0)
    write_run(tmp_path / "a", "moe", 2, val=3.0, data_seed=5, logs_dir="elsewhere")
    write_run(tmp_path / "b", "moe", 3, val=3.5, max_lr=0.01)
    changed = {"B": [16, 8], "logs_dir": ["a", "b"]}
    write_run(tmp_path / "b", "moe", 4, val=3.7, resumed=[{"step": 9, "changed": changed}])
    write_run(tmp_path / "b", "renamed", 5, val=3.9)
    groups = groups_of(tmp_path)
    assert groups.val.tolist() == [2.0, 3.7, 3.5, 3.9] and groups.n.tolist() == [2, 1, 1, 1]
    assert groups.settings[0] == "B 16, max_lr 0.004, changed -" and groups.settings[1].endswith("changed B at 9")


def test_a_seed_counts_once(tmp_path, monkeypatch, capsys):
    for i, (seed, val) in enumerate(((1, 2.0), (1, 2.2), (2, 3.0))):
        write_run(tmp_path / str(i), "moe", seed, val)
    groups = groups_of(tmp_path)
    assert groups.n.tolist() == [2] and groups.val[0] == pytest.approx(2.55)
    assert groups.val_std[0] == pytest.approx(np.std([2.1, 3.0], ddof=1))
    assert "1 runs are repeats of a seed" in call(monkeypatch, capsys, tmp_path)
    table, curves = results.read([tmp_path])
    results.keep(table, curves, tmp_path / "kept")
    for at_step in (None, 50):
        assert len(results.read([tmp_path], at_step)[0]) == 3, "a log and its kept copy are one run"


def test_failed_runs_are_counted_and_not_averaged(tmp_path):
    logs = ["", "0 val 5\n50 val 3\n100 val 4.5\n", "0 val 5\n7 diverged 1\n", "0 val 5\n9 val 4\n"]
    for seed, log in enumerate(logs):
        write_run(tmp_path, "moe", seed, log=log)
    row = groups_of(tmp_path).iloc[0]
    assert (row.n, row.n_failed, row.val) == (4, 2, 2.0) and row.failed == "2 diverged, 1 unfinished"


def losses(values, data_seed=None):
    keys = [(seed, seed if data_seed is None else data_seed) for seed in range(len(values))]
    return pd.Series(values, pd.MultiIndex.from_tuples(keys, names=runs.SEEDS), dtype=float)


def test_the_paired_difference_is_that_of_the_textbook():
    """Student's t over the differences: mean -0.02, standard error 0.01 / sqrt(3)."""
    found = compare.difference(losses([1.97, 2.98, 3.99]), losses([2.0, 3.0, 4.0, 9.0]))
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert (found["minus"], found["low"], found["high"]) == pytest.approx((-0.02, -0.02 - half, -0.02 + half), rel=1e-5)
    assert (found["pairs"], found["test"]) == (3, "paired")
    assert found["p"] == pytest.approx(2 * stats.t.cdf(-0.02 / (0.01 / math.sqrt(3)), 2))


def test_where_all_runs_see_the_same_data_the_test_is_welchs():
    a, b = [1.2, 1.0, 1.1], [2.0, 2.3, 2.2, 2.1]
    found = compare.difference(losses(a, 1337), losses(b, 1337))
    parts = [np.var(values, ddof=1) / len(values) for values in (a, b)]
    free = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 3)
    half = stats.t.ppf(0.975, free) * math.sqrt(sum(parts))
    assert (found["minus"], found["low"], found["high"]) == pytest.approx((-1.05, -1.05 - half, -1.05 + half))
    assert (found["pairs"], found["test"]) == (3, "Welch")


def test_too_few_runs_or_no_spread_give_no_interval():
    for a, b in (([1.0], [2.0, 2.1]), ([], [1.0, 2.0]), ([1.0, 1.0], [2.0, 2.0])):
        assert math.isnan(compare.difference(losses(a), losses(b))["p"])


def test_holm():
    """Holm (1979): the smallest p times n, the next times n - 1, never below the one before, at most 1."""
    assert compare.holm(pd.Series([0.01, 0.04, 0.03, 0.6])).tolist() == pytest.approx([0.04, 0.09, 0.09, 0.6])
    assert compare.holm(pd.Series([0.02, math.nan, 0.5])).tolist() == pytest.approx([0.04, math.nan, 0.5], nan_ok=True)


@pytest.mark.parametrize(
    ("low", "high", "p_holm", "failed", "of_baseline", "wanted"),
    [
        (-2, -1, 0.01, (0, 3), (0, 3), "works"),
        (1, 2, 0.01, (0, 3), (0, 3), "harms"),
        (-2, -1, 0.07, (0, 3), (0, 3), "mixed"),
        (-1, 1, 0.9, (0, 3), (0, 3), "no difference seen"),
        (-2, -1, 0.01, (1, 2), (0, 3), "mixed"),
        (-2, -1, 0.01, (3, 0), (0, 3), "mixed"),  # Fisher: p = 0.1
        (-2, -1, 0.01, (5, 0), (0, 5), "breaks"),
        (1, 2, 0.01, (0, 5), (5, 0), "works"),
        (math.nan, math.nan, math.nan, (0, 1), (0, 1), "-"),
    ],
)
def test_outcomes(low, high, p_holm, failed, of_baseline, wanted):
    row = {"why": "", "minus": (low + high) / 2, "low": low, "high": high, "p": p_holm, "p_holm": p_holm}
    row, base = (pd.Series(row | {"n_failed": n, "n_ok": ok}) for n, ok in (failed, of_baseline))
    assert compare.outcome(row, base) == wanted


@pytest.mark.slow
def test_synthetic_sweeps_of_equal_arms():
    """200 sweeps of five arms and a baseline that are equal: intervals cover zero, failures of 30 % decide nothing."""
    rng, covered, false, by_failure = np.random.default_rng(0), [], [], []
    for _ in range(200):
        data = rng.normal(0, 0.01, 5)  # the order of the data moves all arms of a seed alike
        base, *arms = (losses(2 + data + rng.normal(0, 0.01, 5)) for _ in range(6))
        table = pd.DataFrame([compare.difference(arm, base) for arm in arms]).assign(why="", n_failed=0, n_ok=5)
        table["p_holm"] = compare.holm(table.p)
        covered += [*((table.low <= 0) & (table.high >= 0))]
        false.append(any(compare.outcome(row, table.iloc[0]) in ("works", "harms") for _, row in table.iterrows()))
        failed = table.assign(n_failed=rng.binomial(5, 0.3, 5), p=math.nan).eval("n_ok = 5 - n_failed")
        by_failure += [compare.outcome(row, failed.iloc[0]) in ("works", "breaks") for _, row in failed[1:].iterrows()]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02) and np.mean(false) <= 0.07 and np.mean(by_failure) <= 0.05


def make_arms(folder, seeds=(1, 2, 3)):
    """Dense of 100 and 200 steps, dense with another rate; top 2 with both rates and with a load-balance loss."""
    arms = [("no_moe", 2.0, {}), ("no_moe", 1.9, {"max_steps": 200}), ("no_moe", 1.8, {"max_lr": 0.01})]
    arms += [("only_moe", 1.7, {"max_lr": 0.01}), ("only_moe", 1.6, {}), ("aux_only", 1.595, {"use_aux_loss": True})]
    for i, (name, loss, settings) in enumerate(arms):
        for seed in seeds:
            val = loss + 0.1 * seed + 0.002 * ((seed * (i + 2)) % 3)
            n_exp = 1 if name == "no_moe" else 8
            write_run(folder / str(i), name, seed, val, data_seed=seed, n_exp=n_exp, **settings)


def test_each_group_has_the_baseline_that_differs_least(tmp_path):
    make_arms(tmp_path)
    groups = groups_of(tmp_path, baseline="no_moe")
    rows = {(row["name"], row.max_lr, row.max_steps): row for _, row in groups.iterrows()}
    assert rows["only_moe", 0.01, 100].minus == pytest.approx(-0.1, abs=0.005)
    assert rows["only_moe", 0.004, 100].minus == pytest.approx(-0.4, abs=0.005)
    assert rows["no_moe", 0.004, 200].outcome == "other length" and list(groups.outcome).count("baseline") == 1
    assert set(groups.test) == {"", "paired"}


def test_a_baseline_with_settings_is_that_of_every_group(tmp_path):
    make_arms(tmp_path, seeds=(1, 2))
    groups = groups_of(tmp_path, baseline="no_moe,max_steps=200")
    row = groups[groups.name == "aux_only"].iloc[0]
    assert groups.base.nunique() == 1 and row.minus == pytest.approx(-0.305, abs=0.005) and row.x_spent == 0.5
    with pytest.raises(UserError, match="no such runs; there are no_moe, only_moe, aux_only"):
        groups_of(tmp_path, baseline="no_moe,max_lr=7")


@pytest.mark.parametrize(
    ("settings", "facts", "words"),
    [
        ({"T": 32}, {}, "other data or validation text: T 32 and 64"),
        ({"val_tokens": 64}, {}, "other data or validation text: val_tokens 64 and 640"),
        ({}, {"data": "d1"}, "other data or validation text: data d1 and d0"),
        ({"max_steps": 50}, {}, "other length"),
        ({"total_batch_size": 200}, {}, "other length"),
        ({"max_steps": 200, "log": "0 val 5\n100 val 2\n"}, {}, "unfinished"),
        ({"B": 8}, {}, "-"),  # a batch split is no other text
    ],
)
def test_unlike_things_get_a_reason_and_no_verdict(tmp_path, settings, facts, words):
    write_run(tmp_path, "no_moe", 1, n_exp=1)
    write_run(tmp_path, "moe", 1, facts=facts, **settings)
    row = groups_of(tmp_path, baseline="no_moe").iloc[1]
    assert row.outcome.startswith(words) and math.isnan(row.minus) == (words != "-")


def test_runs_are_judged_at_a_step(tmp_path):
    for seed, seconds in ((1, "4.01"), (2, "4.03")):
        write_run(tmp_path, "no_moe", seed, n_exp=1)
        write_run(tmp_path, "moe", seed, log=f"0 val 5\n50 val {seconds}\n80 val 3\n")
    write_run(tmp_path, "moe", 3, log="0 val 5\n40 val 4\n")
    row = groups_of(tmp_path, baseline="no_moe", at_step=50).iloc[1]
    assert (row.val, row.failed, row.outcome) == (pytest.approx(4.02), "1 unfinished", "no difference seen")

def loss_at(tokens):
    return 1.5 + 80.0 / tokens**0.4


def test_a_power_law_is_found_in_its_own_points():
    tokens = pd.Series([1e4, 3e4, 1e5, 1e6])
    for law in ((1.5, 80.0, 0.4), (0.1, 90.0, 0.08), (2.7, 3e4, 0.9)):
        found = compare.fit_power_law(tokens, law[0] + law[1] / tokens ** law[2])
        assert found == pytest.approx(law, rel=2e-3, abs=2e-3)
    for values in ((3.0, 3.1, 3.2, 3.3), (3.0, 3.0, 3.0, 3.0)):
        assert compare.fit_power_law(tokens, pd.Series(values)) is None
    assert compare.fit_power_law(tokens[:2], pd.Series([3.0, 2.0])) is None


def make_lengths(folder, device="cpu", slow=1.0):
    """Dense of three lengths, and a MoE of 10,000 tokens as good as 20,000 (seed 1) and 15,000 (seed 2) dense ones."""
    for seed in (1, 2):
        for steps in (100, 200, 400):
            hours = steps / 100 * slow ** (seed - 1)
            log = f"0 val 5\n{steps - 1} hours {hours}\n{steps} val {loss_at(100 * steps)}\n"
            write_run(folder / f"{steps}", "no_moe", seed, log=log, max_steps=steps, n_exp=1)
        log = f"0 val 5\n99 hours 1.25\n100 val {loss_at(20_000 if seed == 1 else 15_000)}\n"
        facts = {"flops_per_token": 7, "optimizer_flops": 50, "device": device}  # 7.5 per token of 100 per step
        write_run(folder, "only_moe", seed, log=log, facts=facts)
    return groups_of(folder, baseline="no_moe").set_index("name").loc["only_moe"]


@pytest.mark.slow
def test_speedups_are_those_of_the_published_formula(tmp_path):
    """C_need = (A / (L_var - L_inf))^(1/a) tokens; FLOPs per token count once; hours on one machine, not shared."""
    row = make_lengths(tmp_path / "a")
    assert [row.x_tokens, row.x_flops, row.x_hours] == pytest.approx([1.75, 1.75 / 1.25, 1.75 / 1.25], rel=1e-3)
    assert row.x_tokens_std == pytest.approx(0.5 / 2**0.5, rel=1e-3)
    assert "val = 1.5" in row.law and "from 6 runs of 3 lengths" in row.law
    assert math.isnan(make_lengths(tmp_path / "b", device="other").x_hours)
    assert math.isnan(make_lengths(tmp_path / "c", slow=1.3).x_hours)


@pytest.mark.slow
def test_rates_are_chosen_on_other_seeds_than_those_reported(tmp_path):
    vals = {"no_moe": {1e-3: 2.0, 2e-3: 1.9, 4e-3: 2.1}, "only_moe": {1e-3: 1.85, 2e-3: 1.851, 4e-3: 1.8}}
    for name, rates in vals.items():
        for rate, val in rates.items():
            for seed in (1, 2, 3, 4):
                unlucky = 1.0 if seed > 2 and rate == 1e-3 else 0.0  # what reported seeds say must not choose
                log = "0 val 5\n9 diverged 1\n" if (name, rate, seed) == ("only_moe", 4e-3, 2) else ""
                folder, n_exp = tmp_path / f"{rate:g}", 1 if name == "no_moe" else 8
                run = f"{name}_lr_{rate:g}"  # as sweep.py --rates calls it
                write_run(folder, run, seed, val - unlucky + seed / 100, log, max_lr=rate, n_exp=n_exp)
    dense, moe = (row for _, row in groups_of(tmp_path, baseline="no_moe", best_rate=True).iterrows())
    assert (dense.rate, dense.n) == ("own: max_lr 0.002", 2) and dense.val == pytest.approx(1.935)
    assert moe.rate == "own: max_lr 0.001=0.002", "4e-3 failed on a selection seed; the others are within 0.1 %"
    assert groups_of(tmp_path / "0.004", best_rate=True, selection_seeds=(1,)).rate.tolist() == ["shared", "shared"]
    dense = groups_of(tmp_path / "0.002", tmp_path / "0.001", best_rate=True, selection_seeds=(3, 4)).iloc[0]
    assert dense.rate == "edge: max_lr 0.001"


def test_what_is_kept_gives_the_same_table(tmp_path):
    lines = [f"{s} train {3 + s % 7 / 100}\n{s} max_vio {s}\n{s} hours {s / 9}\n" for s in range(1000)]
    lines += [f"{s} val {5 - s / 1000}\n" for s in range(0, 1001, 100)] + ["999 load_0_0 0.5\n", "300 load_0_0 1\n"]
    for seed in (1, 2):
        write_run(tmp_path / "logs", "only_moe", seed, log="".join(lines), max_steps=1000, max_lr=0.001 * seed)
    table, curves = results.read([tmp_path / "logs"])
    results.keep(table, curves, tmp_path / "kept")
    again, kept = results.read([tmp_path / "kept"])
    for column in set(table):
        assert table[column].map(results.as_text).tolist() == again[column].map(results.as_text).tolist(), column
    sizes = kept[kept.run == kept.run[0]].groupby("stream").size()
    assert sizes.to_dict() == {"val": 11, "hours": 10, "train": 40, "max_vio": 40, "load_0_0": 1}
    assert kept.value[kept.stream == "train"].mean() == pytest.approx(3.03, rel=1e-3)
    with pytest.raises(UserError, match="holds other runs"):
        results.keep(table[:1], curves, tmp_path / "kept")


@pytest.mark.parametrize(("fault", "words"), [("", "agrees"), ("lr", "lr is off"), ("init", "train"), ("late", "val")])
def test_a_run_is_held_against_a_published_curve(tmp_path, monkeypatch, capsys, fault, words):
    theirs, lines = pd.read_csv(CURVE), []
    for _, row in theirs[theirs.step <= 1500].iterrows():
        row["lr"] *= 2 if fault == "lr" else 1
        row[["val", "train"]] += 0.5 if fault == "init" else 0.1 * (fault == "late" and row.step > 1000) + 0.01
        lines += [f"{row.step:.0f} {name} {value}\n" for name, value in row[1:].dropna().items()]
    folder = write_run(tmp_path, "no_moe", 1, log="".join(lines))
    out = call(monkeypatch, capsys, folder, "--against", CURVE)
    assert words in out.splitlines()[-1] and "setting: total_batch_size is 100, theirs 524288" in out


def test_the_table_fits_the_terminal(tmp_path):
    make_arms(tmp_path, seeds=(1, 2))
    shown = compare.cells(groups_of(tmp_path, baseline="no_moe"))
    for width in (60, 90, 140, 400):
        text = compare.lay_out(shown, width)
        rows = [line for line in text.splitlines() if not line.startswith("(")]
        assert len(rows) == 7 and max(map(len, rows)) <= width and rows[1].startswith("no_moe ")
        assert ("no room" in text) == (width < 200)


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(ROOT.glob("results/*/README.md")), ids=lambda page: page.parent.name)
def test_every_command_of_a_results_folder_prints_its_table(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    lines = [line.strip().partition("  #")[0] for line in page.read_text("utf-8").splitlines()]
    for line in lines:
        if line.startswith("python compare.py results/"):
            assert "spread over seeds" in call(monkeypatch, capsys, *shlex.split(line)[2:]), line


@pytest.mark.slow
def test_the_numbers_that_the_readme_leads_with():
    rows = groups_of(ROOT / "results/equal", baseline="no_moe").set_index(["name", "n_exp"])
    top2, half = rows.loc["only_moe", 8], rows.loc["half_width", 8]
    assert [round(top2[name], 3) for name in ("minus", "low", "high")] == [-0.065, -0.086, -0.045]
    assert [round(half[name], 3) for name in ("minus", "low", "high", "p_holm")] == [-0.039, -0.058, -0.020, 0.023]


@pytest.mark.slow
def test_the_script_is_run_as_one(tmp_path):
    write_run(tmp_path, "moe", 1, val=3.25)
    assert "3.2500" in run_script("compare.py", tmp_path, check=0).stdout
