"""The digest, and the tables of variants in results/README.md and README.md, are those of the logs in results/."""

import functools
import itertools
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import compare
import curves
import digest
import runlog
from lab.common import UserError

RESULTS = Path(__file__).resolve().parents[1] / "results"
PAGES = (RESULTS / "README.md", RESULTS.parent / "README.md")
SEEDS = (42, 2025, 1337)  # the order in which the last vals of single seeds are given


@functools.cache
def experiments():
    return digest.experiments()


@functools.cache
def facts(folder):
    """{variant, or log name of a run that is none: [(row of the summary, {seed: last val}) of each group]}."""
    found = {}
    for group in experiments()[folder].groups:
        row = compare.summary(group).iloc[0]
        val = {run.seed: run.streams["val"][1][-1] for run in group if "val" in run.streams}
        found.setdefault(row.variant, []).append((row, val))
    return found


def expected(header, row, seeds):
    """What the cell of a column should hold, as text; None for a column that this test does not know."""
    if "last val" in header:
        return " ".join(f"{seeds[seed]:.3f}" for seed in SEEDS if seed in seeds)
    if header.startswith("val") and not re.search("minus|dense|than|%", header):
        return f"{row.val_mean:.3f} ± {row.val_std:.3f}"
    for state in runlog.STATES[1:]:
        if header == state:
            return f"{row[state]} of {row.runs}"
    if header.startswith("spikes"):
        return f"{row.spikes:.1f}"
    return (
        "-" if header == "MaxVio" and row.variant == "no_moe" else f"{row.max_vio:.2f}" if header == "MaxVio" else None
    )


def by_hand(page):
    """The text of a page without the tables that digest.py makes."""
    return re.sub(r"<!-- digest:.*?<!-- end -->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def tables(page):
    """[(header, rows)] of the tables written by hand whose first column is `a variant`."""
    lines = [line.strip() for line in by_hand(page).splitlines()]
    blocks = re.findall(r"(?:^\|.*\|\n?)+", "\n".join(lines), re.MULTILINE)
    cells = [[[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()] for block in blocks]
    return [(rows[0], rows[2:]) for rows in cells if len(rows) > 2 and re.fullmatch(r"`\w[\w.]*`", rows[2][0])]


def holds(folder, header, column, rows):
    """Whether a column holds what the runs of this folder say; rows with a dash have no run there, or no number."""
    for cells in rows:
        known = [expected(header, *group) for group in facts(folder).get(cells[0].strip("`"), [])]
        if cells[column] not in ("-", *known):
            return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(RESULTS.parent)))
def test_tables_of_variants(page):
    for headers, rows in tables(page):
        if not {row[0].strip("`") for row in rows} & {name for folder in experiments() for name in facts(folder)}:
            continue  # a table of something else
        groups = [*itertools.chain(*facts(next(iter(experiments()))).values())]
        known = {header for header in headers[1:] if any(expected(header, *group) is not None for group in groups)}
        for column, header in enumerate(headers[1:], start=1):
            found = header not in known or any(holds(folder, header, column, rows) for folder in experiments())
            assert found, f"{page}: column {header!r}"


# -- numbers in sentences: `-0.039 [-0.058, -0.020]`, and runs that are stuck


def losses(runs, states=("ok",)):
    """{seed and data: last val} of the runs in these states."""
    good = [run for run in runs if runlog.state_of(run) in states and "val" in run.streams]
    return {curves.pair_key(run): run.streams["val"][1][-1] for run in good}


def interval(values, digits=3):
    """Mean and 95 % interval by t, as printed."""
    mean, half = np.mean(values), stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return as_printed(mean, mean - half, mean + half, digits)


def as_printed(mean, low, high, digits=3):
    """Rounded; the same for the opposite sign, because a sentence says in words which side is lower."""
    mean, low, high = (round(x * 10**digits) for x in (mean, low, high))
    return digits, *min((mean, low, high), (-mean, -high, -low))


def minus(a, b):
    """Paired differences of two losses()."""
    return np.array([a[key] - b[key] for key in a if key in b])


def differences():
    """The intervals of all pairs of groups of one folder: of the runs that are ok, and of all that ended."""
    found = set()
    for experiment in experiments().values():
        for states in (("ok",), ("ok", *compare.FAILED)):
            for a, b in itertools.combinations([losses(runs, states) for runs in experiment.groups], 2):
                if len(apart := minus(a, b)) > 1 and np.ptp(apart) > 0:
                    found.add(interval(apart))
    return found


def gap(folder, *specs):
    """The paired difference of two groups, each a variant with settings as a marker has them."""
    groups = experiments()[folder].groups
    a, b = (losses(groups[compare.matching(groups, spec)[0]]) for spec in specs)
    return minus(a, b)


def speedups():
    """{steps: a DataFrame, a row per seed} of the effective speedup of top 2 over dense in `lengths`."""
    groups = experiments()["lengths"].groups
    dense = [run for i in compare.matching(groups, "no_moe") for run in groups[i]]
    law = curves.fit_power_law([(end.spent["tokens"], end.loss) for end in map(curves.final, dense)])
    moes = {groups[i][0].settings["max_steps"]: groups[i] for i in compare.matching(groups, "only_moe")}
    return {
        steps: pd.DataFrame([curves.speedup_of_pair(run, dense, law) for run in sorted(runs, key=lambda run: run.seed)])
        for steps, runs in moes.items()
    }


def more_intervals():
    """Those of differences between differences, and of speedups, which have two digits."""
    muon, adamw = gap("methods", "muon", "dense_muon"), gap("methods", "only_moe", "no_moe,n_embd=128")
    switch = gap("equal", "switch_mlp", "only_moe"), gap("equal", "dense_switch_mlp", "no_moe,max_steps=2000")
    leads = [gap("lengths", f"only_moe,max_steps={n}", f"no_moe,max_steps={n}") for n in (1000, 4000)]
    x = speedups()
    of_speed = [x[steps][currency] for steps in x for currency in curves.CURRENCIES] + [x[4000].tokens - x[1000].tokens]
    return set(map(interval, (muon - adamw, switch[0] - switch[1], leads[1] - leads[0]))) | {
        interval(values.to_numpy(), digits=2) for values in of_speed
    }


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(RESULTS.parent)))
def test_intervals_in_sentences(page):
    number = r"([-+]?\d+\.\d+)"
    found = re.findall(rf"{number}\s+\[{number},\s+{number}\]", by_hand(page))
    known = differences() | more_intervals()
    wrong = [words for words in found if as_printed(*map(float, words), len(words[0].partition(".")[2])) not in known]
    assert len(found) > 25 and not wrong


TRICKS = ("noisy_top_k", "aux_only", "z_only", "switch_only", "switch_tfm_init")
SEVEN = ("no_moe", "only_moe", *TRICKS)
RATES = [2e-3, 4e-3, 8e-3, 1.2e-2]
STUCK = [  # words of a page, variants, warmup, rates, stuck runs, all runs
    ("nothing is stuck (none of 21 runs of the seven", SEVEN, 100, [2e-3], 0, 21),
    ("learn up to 1.2e-2 (none of 36 runs is stuck)", ("no_moe", "only_moe", "aux_only"), 100, RATES, 0, 36),
    ("with a z-loss up to 8e-3", ("z_only",), 100, RATES[:3], 0, 9),
    ("with noise up to 4e-3, with all tricks up to 4e-3", ("noisy_top_k", "switch_tfm_init"), 100, RATES[:2], 0, 12),
    ("with Switch initialisation alone at 2e-3 only", ("switch_only",), 100, [2e-3], 0, 3),
    ("17 of 18 MoE runs are stuck", ("only_moe", *TRICKS), 100, [1.6e-2], 17, 18),
    ("and 2 of 3 dense ones", ("no_moe",), 100, [1.6e-2], 2, 3),
    ("up to 1.2e-2 nothing is stuck (none of 84 runs)", SEVEN, 400, RATES, 0, 84),
    ("At 1.6e-2 3 of 21 runs are", SEVEN, 400, [1.6e-2], 3, 21),
    ("none of 6 MoEs does", ("only_moe", "switch_tfm_init"), 400, [3.2e-2], 6, 6),
    ("3 of 3 runs with Switch initialisation", ("switch_only",), 100, [1.2e-2], 3, 3),
    ("and 3 of 3 with noise get stuck", ("noisy_top_k",), 100, [1.2e-2], 3, 3),
    ("and 0 of 9 dense, plain top-2 and load-balanced runs", ("no_moe", "only_moe", "aux_only"), 100, [1.2e-2], 0, 9),
    ("With 400 warmup steps 0 of 30 do at both rates", ("no_moe", "only_moe", "aux_only", "noisy_top_k", "switch_only"),
     400, [8e-3, 1.2e-2], 0, 30),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("words", "variants", "warmup", "rates", "n", "total"), STUCK, ids=[row[0] for row in STUCK])
def test_counts_of_stuck_runs_in_sentences(words, variants, warmup, rates, n, total):
    assert words in " ".join(" ".join(map(by_hand, PAGES)).split())
    groups = [runs for name, found in experiments().items() if name.startswith("basin_") for runs in found.groups]
    runs = [run for runs in groups if compare.variant(runs) in variants for run in runs]
    runs = [run for run in runs if run.settings["warmup_steps"] == warmup and run.settings["max_lr"] in rates]
    states = list(map(runlog.state_of, runs))
    assert (states.count("stuck"), len(states)) == (n, total) and set(states) <= {"ok", "stuck"}


# -- the other numbers of results/README.md: sentences made here from the logs, which must stand in it word for word


def group_of(folder, spec):
    groups = experiments()[folder].groups
    return groups[compare.matching(groups, spec)[0]]


def lead(folder, *specs):
    """How far the first group ends below the second, the mean over pairs of seeds."""
    return f"{-gap(folder, *specs).mean():.3f}"


def welch(name):
    """Unpaired difference to plain top 2 in cpu_small, with the half-width of its interval."""
    pair = (list(losses(group_of("cpu_small", spec)).items()) for spec in (name, "only_moe"))
    found = compare.difference(*pair)
    return f"{found.minus:+.3f} ± {(found.high - found.low) / 2:.3f}"


def row_against(baseline, folder, spec):
    """The row of a group in what `python runlog.py results/FOLDER --baseline BASELINE` prints."""
    groups = experiments()[folder].groups
    return compare.add_differences(compare.summary_of(groups), groups, baseline).loc[compare.matching(groups, spec)[0]]


def measured(spec, column):
    """A column of runlog.table_of_runs() of a group of cpu_small, from the lowest to the highest."""
    return sorted(runlog.table_of_runs(group_of("cpu_small", spec))[column])


def seeds(folder, spec):
    """The last val of each seed, in the order of SEEDS."""
    val = {run.seed: run.streams["val"][1][-1] for run in group_of(folder, spec)}
    return " ".join(f"{val[seed]:.3f}" for seed in SEEDS)


def stuck(folder, *specs):
    """`1 of 3`, of the runs of these groups."""
    states = [runlog.state_of(run) for spec in specs for run in group_of(folder, spec)]
    return f"{states.count('stuck')} of {len(states)}"


def over(stream, name, first, last=1000):
    """Mean of a stream of each run of `balance` from one step to another."""
    columns = [run.streams[stream] for run in group_of("balance", name)]
    return [values[(steps >= first) & (steps <= last)].mean() for steps, values in columns]


def sentences_of_equal():
    dense, wide = "no_moe,max_steps=2000", [f"half_width,n_exp={n}" for n in (8, 16, 32, 64)]
    narrow = [lead("equal", name, dense) for name in wide]
    yield f"(-{narrow[0]}). With full-width"
    row = row_against("no_moe,max_steps=2596", "equal", "only_moe")
    yield f"it leads by {-row.minus:.3f}, p = {row.p:.3f}, which does not pass"
    yield f"8, 16 and 32 narrow experts end {narrow[0]}, {narrow[1]} and {narrow[2]} below dense"
    assert (gap("equal", wide[3], dense) > 0).all()
    yield "64 experts are worse than dense in every seed"
    frozen, learned = lead("equal", "frozen_router", dense), lead("equal", "only_moe", dense)
    yield f"keeps about half of the gain: {frozen} of {learned} below dense"
    row = row_against("frozen_router", "equal", "only_moe")
    yield f"(p = {row.p:.2f}; {row.p_holm:.2f} after Holm's correction)"
    yield f"Dense gains {lead('equal', 'dense_switch_mlp', dense)} by it"
    same = lead("equal", "switch_mlp", "dense_switch_mlp")
    yield f"with the same initialisation is {same}, not {lead('equal', 'switch_mlp', dense)}."


def sentences_of_balance():
    names = ("aux_only", "bias_balance", "step_balance", "quantile_balance")
    rows = [row_against("only_moe", "balance", name) for name in names]
    yield f"the intervals reach from {min(row.low for row in rows):.3f} to {max(row.high for row in rows):+.3f}."
    vio = {name: over("max_vio", name, 200) for name in names}
    mean = {name: f"{np.mean(values):.2f}" for name, values in vio.items()}
    yield f"(mean MaxVio {mean['quantile_balance']} over steps 200 to 1,000)"
    yield f"the losses follow ({mean['aux_only']} and {mean['step_balance']})"
    low, high, drop = min(vio["bias_balance"]), max(vio["bias_balance"]), np.mean(over("drop_frac", "bias_balance", 0))
    yield f"({mean['bias_balance']}; from {low:.2f} to {high:.2f} by seed, and {100 * drop:.0f} % of choices"


def sentences_of_the_basin():
    first_products = "moe_n_layer_4_n_head_4_n_embd_128_mlp_init_switch-fc_T_64_max_lr_0.008_warmup_steps_100"
    tenth = "moe_switch_tfm_init_init_scale_0.1_n_layer_4_n_head_4_n_embd_128_T_64_max_lr_0.008_warmup_steps_100"

    def at(name, warmup=100):
        """How many are stuck at 8e-3, and the last val of each seed."""
        spec = f"{name},warmup_steps={warmup}"
        return stuck("basin_8e-3", spec), f"({seeds('basin_8e-3', spec)})"

    yield f"routers and experts, as in the paper, are stuck in {at('switch_only')[0]} runs"
    yield f"all MLPs without the routers (`switch_mlp`) in {at('switch_mlp')[0]}"
    yield f"as the published code has it, in {' '.join(at(first_products))}"
    yield f"at a tenth of the scale, which the paper recommends, in {' '.join(at(tenth))}"
    yield f"With the other tricks that tenth is stuck again, {' '.join(at('switch_tfm_init_0.1'))}"
    yield f"and after 400 steps in {at('switch_tfm_init_0.1', 400)[0]}."
    yield f"with all its MLPs initialised like this is stuck in {at('dense_switch_mlp')[0]}."
    count, val = at("noise_scaled")
    yield f"{count} are stuck at 0.4 of the published scale {val}, {at('noisy_top_k')[0]} at the published one"
    yield f"{at('aux_loss')[0]} with a load-balance loss beside it, {at('z_loss')[0]} with a z-loss as well."
    basin = [found for name, found in experiments().items() if name.startswith("basin_")]
    firsts = [run.streams["val"][1][0] for found in basin for runs in found.groups for run in runs]
    yield f"0.42 of its first ({0.42 * min(firsts):.2f} to {0.42 * max(firsts):.2f}; "
    near = losses(group_of("basin_1.2e-2", "no_moe,warmup_steps=100"))
    yield f"at 1.2e-2 one does (dense, {max(near.values()):.3f}), at the two highest"
    late = {}
    for name in ("switch_only", "only_moe", "aux_only"):
        group = group_of("basin_1.6e-2", f"{name},warmup_steps=400")
        late[name] = f"{max(losses(group, ('stuck',)).values()):.3f}"
    yield f"one with Switch initialisation alone ({late['switch_only']}), and one plain and one with a load-balance"
    yield f"late rather than on a plateau ({late['only_moe']}, {late['aux_only']})."
    dense = sorted(losses(group_of("basin_3.2e-2", "no_moe,warmup_steps=400")).values())
    yield f"dense runs end just below it ({dense[0]:.2f} to {dense[-1]:.2f})"
    alone = [gap("basin_4e-3", f"{name},warmup_steps={w}", f"only_moe,warmup_steps={w}")
             for name in ("noisy_top_k", "aux_only", "z_only") for w in (100, 400)]  # fmt: skip
    for apart in alone:
        _, _, low, high = interval(apart)
        assert low < 0 < high
    most = max(abs(apart.mean()) for apart in alone)
    yield f"alone differ from plain top 2 by {most:.3f} at most, every interval holding zero"
    yield f"noise is stuck in {stuck('rates_1.6e-2', 'noisy_top_k,warmup_steps=100')} with 100 warmup steps and in none"
    assert stuck("rates_1.6e-2", "noisy_top_k,warmup_steps=400", "no_moe", "only_moe").startswith("0 of")


def sentences_of_the_older_runs():
    vio, drop = ({name: measured(name, column) for name in ("only_moe", "noisy_top_k", "aux_only", "bias_balance")}
                 for column in ("max_vio", "drop_frac"))  # fmt: skip
    low, _, high = (f"{100 * part:.0f}" for part in drop["only_moe"])
    yield f"MaxVio is {vio['only_moe'][0]:.1f} to {vio['only_moe'][-1]:.1f} and capacity 1.25 drops {low} to {high} %"
    yield f"({100 * drop['noisy_top_k'][0]:.0f} to {100 * drop['noisy_top_k'][-1]:.0f} %)"
    yield f"MaxVio is {np.mean(vio['aux_only']):.1f} and at most {100 * max(drop['aux_only']):.1f} % is dropped"
    yield f"with bias balancing {np.mean(vio['bias_balance']):.1f} and {100 * max(drop['bias_balance']):.1f} %."
    yield f"plain: {welch('aux_only')}; bias balancing {welch('bias_balance')}; `dropless` {welch('dropless')}; "
    yield f"noise {welch('noisy_top_k')} (95 % intervals)"
    fast, no_noise = "cpu_small_lr_0.016", "moe_aux_loss_router_z_loss_router_full_prec"
    switch = "moe_aux_loss_router_z_loss_switch_tfm_init_router_full_prec"
    yield f"{stuck(fast, 'noisy_top_k', 'aux_loss', 'router_full_prec')} runs with noise are stuck"
    assert stuck(fast, "only_moe", "aux_only", "dropless", no_noise) == "0 of 12"
    yield "of the 12 MoE runs without noise none"
    yield f"none, though seed 2025 came close: {max(losses(group_of(fast, 'no_moe')).values()):.3f})"
    yield f"Switch's at 1.0 is stuck in {stuck(fast, 'switch_tfm_init', switch)} runs"


@pytest.mark.slow
@pytest.mark.parametrize(
    "sentences", [sentences_of_equal, sentences_of_balance, sentences_of_the_basin, sentences_of_the_older_runs]
)
def test_sentences_have_the_numbers_of_the_logs(sentences):
    page = " ".join(by_hand(PAGES[0]).split())
    absent = [words for words in sentences() if " ".join(words.split()) not in page]
    assert not absent


@pytest.mark.slow
def test_a_wrong_number_would_be_seen():
    headers = ["variant", "what", "val, nats per byte", "diverged", "spikes per run", "MaxVio", "last val at 4e-3"]
    right = ["`aux_only`", "x", "1.638 ± 0.004", "0 of 3", "0.3", "0.21", "1.636 1.642 1.634"]
    folder = "cpu_small"
    for column in range(2, len(right)):
        assert holds(folder, headers[column], column, [right])
        wrong = [*right[:column], right[column].replace(right[column][-1], "9"), *right[column + 1 :]]
        assert not holds(folder, headers[column], column, [wrong])


def test_the_page_of_results_has_tables():
    assert tables(PAGES[0])


@pytest.mark.slow
def test_the_digest_and_the_tables_between_markers_are_those_of_the_logs():
    stale = [str(path) for path, text in digest.pages(experiments()).items() if path.read_text("utf-8") != text]
    assert not stale, "run python digest.py"


@pytest.mark.slow
def test_a_table_between_markers_is_made_anew():
    folders = {"cpu_small": experiments()["cpu_small"]}
    page = "before\n<!-- digest: cpu_small no_moe aux_only -->\nold\n<!-- end -->\nafter\n"
    filled = digest.filled(page, folders)
    assert filled.startswith("before\n<!-- digest") and filled.endswith("|\n\n<!-- end -->\nafter\n")
    [row] = [line for line in filled.splitlines() if line.startswith("| `")]
    assert row.startswith("| `aux_only` | load-balance loss alone | 3 | 1.6376±0.0043 | -0.077 [-0.103, -0.052] |")
    assert digest.filled(filled, folders) == filled
    two = digest.filled(page.replace("aux_only", "sigmoid aux_only,n_exp=8"), folders)
    assert [line.split("`")[1] for line in two.splitlines() if line.startswith("| `")] == ["sigmoid", "aux_only"]
    for words in ("absent no_moe", "cpu_small no_moe absent", "cpu_small absent"):
        with pytest.raises(UserError, match="absent"):
            digest.filled(page.replace("cpu_small no_moe aux_only", words), folders)


@pytest.mark.slow
def test_a_table_of_rates_has_a_row_per_warmup():
    """Three folders of one rate each: the best in bold, failures counted, a dash without runs."""
    folders = {f"rates_{rate}": digest.Experiment(RESULTS / f"basin_{rate}") for rate in ("4e-3", "8e-3", "3.2e-2")}
    table = digest.table_of_rates(folders, "rates_* switch_only no_moe")
    heads, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert heads == ["variant", "label", "warmup", "0.004", "0.008", "0.032"]
    assert [row[0] for row in rows] == ["`switch_only`"] * 2 + ["`no_moe`"] * 2
    assert [row[2] for row in rows] == ["100", "400"] * 2
    assert rows[0][3:] == ["1 of 3 stuck", "3 of 3 stuck", "-"]
    assert rows[1][3:] == ["**1.938±0.005**", "2.092±0.045", "-"]
    assert rows[2][3:] == ["**2.031±0.015**", "2.038±0.014", "3 of 3 stuck"]
    with pytest.raises(UserError, match="no runs of absent"):
        digest.table_of_rates(folders, "rates_* absent")
    with pytest.raises(UserError, match="muon has two groups"):
        digest.table_of_rates(folders, "rates_4e-3* muon")


@pytest.mark.slow
def test_the_rows_of_a_digest_table():
    """Against plain MoE the MoEs; against a baseline with settings those that differ in these alone."""
    groups = experiments()["cpu_small"].groups
    assert len(digest.comparable(groups, "no_moe")) == 18 and len(digest.comparable(groups, "only_moe")) == 17
    longer = [run._replace(meta=changed(run, max_steps=2596)) for run in groups[0]]
    other = [run._replace(meta=changed(run, B=4)) for run in groups[1]]
    rows = digest.comparable([*groups, longer, other], "no_moe,max_steps=2596")
    assert longer in rows and other not in rows and groups[0] not in rows and len(rows) == 18


def changed(run, **settings):
    return run.meta | {"args": run.meta["args"] | settings}
