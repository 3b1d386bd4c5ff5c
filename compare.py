"""Groups of runs in a table, and the difference of each group to a baseline: how large, how sure, and what it costs.

    python runlog.py logs                                      # a row per group
    python runlog.py logs --baseline no_moe                    # each group minus dense of the same shared settings
    python runlog.py logs --baseline no_moe,max_steps=2596     # minus this one: equal FLOPs, each on its own schedule

A group is the runs of one name whose settings differ in nothing but the seeds; identity.py says which settings count.
Logs from before runs had an identity are grouped by the settings they recorded, logs without a JSON by their name.
The baseline of a group is the one that agrees with it in most shared settings: all but those of a variant.

Difference: the last val of a group minus that of its baseline, in nats, with its 95 % interval and the p-value of a
t-test. Only runs that are ok count. Where the data change with the seed (--data_seed), runs of equal seed and data are
pairs, and the test is the paired one. Where every run sees the same data, a seed is no pair, because models of other
shape draw other initial weights from it; then the test is Welch's. Holm's method corrects p over the rows of a table.

Outcome, the first rule that applies. A failed run is one that diverged, got stuck or regressed (runlog.py).

    breaks              half or more of the runs failed, and less than half of the baseline's
    works               less than half of the runs failed, and half or more of the baseline's
    -                   too few runs for an interval
    mixed               a larger part of the runs failed than of the baseline's
    no difference seen  the interval holds zero: it says how large a difference may still be there
    mixed               the interval does not hold zero, but p after Holm's correction is 0.05 or more
    works, harms        the loss is lower, higher, and p after Holm's correction is below 0.05
"""

import dataclasses
import math
import re
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

import curves
import identity
import runlog
import sweep
import train_single_gpu
from identity import PUBLISHED, name_part
from lab.common import UserError

SEEDS = ("seed", "data_seed")  # the settings in which the runs of a group may differ
LENGTH = ("max_steps", "max_minutes", "decay_steps", "parent")  # baselines for a power law differ in these alone
SAME_VAL = ("data", "vocab_size", "val_loss_steps")  # losses are comparable only where these are equal
SIZES = ("n_exp", "n_embd", "max_steps", "max_lr", "warmup_steps")  # groups of a variant are sorted by these
FAILED = ("diverged", "stuck", "regressed")
SIGNIFICANT = 0.05
STEADY = 1.25  # runs of one group whose hours differ by a larger factor shared their machine: no hours are compared

# ---------------------------------------------------------------------------------------------------------------------
# Groups


def group_key(run):
    """Equal for the runs of one group: same name, same settings but for the seeds, same changes on resume."""
    settings = run.settings
    if settings is None:
        return run.name, None
    changes = run.meta.get("changes") or None
    return given_name(run), identity.identity(settings | {"changes": changes}, without=SEEDS)


def given_name(run):
    """A log's name without its data seed; "" for a name that the trainer made of the settings, which decide then."""
    settings = run.settings
    known = [field.name for field in dataclasses.fields(train_single_gpu.Args) if field.name in settings]
    args = train_single_gpu.Args(**{name: settings[name] for name in known})
    if run.name == identity.run_name(args):
        return ""
    return re.sub(rf"_data_seed_{settings.get('data_seed')}(?=_|$)", "", run.name)


def group(runs):
    """[runs of one group, ...] in the order of their first run."""
    groups = {}
    for run in runs:
        groups.setdefault(group_key(run), []).append(run)
    return list(groups.values())


def variant(runs):
    """Name of a group's variant in sweep.py; the log's name of runs that are none."""
    return sweep.look_of(runs[0]).name


def in_order(groups):
    """Groups in the order of the table of variants, those of one variant from small to large."""
    order = {name: i for i, name in enumerate(sweep.VARIANTS)}

    def place(runs):
        settings = runs[0].settings or {}
        return order.get(variant(runs), len(order)), *(settings.get(name) or 0 for name in SIZES)

    return sorted(groups, key=place)


def differing(all_settings):
    """For each of several settings, {name: value} of the names in which they differ, most values first; {} for None."""
    known = [settings for settings in all_settings if settings is not None]
    names = dict.fromkeys(name for settings in known for name in settings if name not in SEEDS)
    distinct = {name: len({str(settings.get(name, PUBLISHED.get(name))) for settings in known}) for name in names}
    differ = sorted((name for name in names if distinct[name] > 1), key=lambda name: -distinct[name])
    return [
        {} if settings is None else {name: settings.get(name, PUBLISHED.get(name)) for name in differ}
        for settings in all_settings
    ]


def tell_apart(groups):
    """For each group, as text, the settings that tell it from the other groups of its variant; "" if it is alone.

    Values that more than half of all groups have are left out.
    """
    names, texts = [variant(runs) for runs in groups], [""] * len(groups)
    all_settings = [runs[0].settings for runs in groups]
    for name in {name for name in names if names.count(name) > 1}:
        mine = [i for i, other in enumerate(names) if other == name]
        for i, found in zip(mine, differing([all_settings[i] for i in mine]), strict=True):
            special = {key: value for key, value in found.items() if not is_usual(all_settings, key, value)}
            texts[i] = describe_group(groups[i][0], special)
    return texts


def is_usual(all_settings, name, value):
    """Whether more than half of several settings have this value."""
    values = [(settings or {}).get(name, PUBLISHED.get(name)) for settings in all_settings]
    return values.count(value) > len(values) / 2


def describe_group(run, settings):
    """Settings as text: `max_lr 0.016, stride 1`; and the steps at which the run was resumed with other ones."""
    if run.settings is None:
        return "no settings recorded"
    words = [name_part(*pair).replace("_" + str(pair[1]), " " + str(pair[1])) for pair in settings.items()]
    return ", ".join([*words, *(f"changed at step {change['step']}" for change in run.meta.get("changes", []))])


def shared_settings(run):
    """The settings that variants share: all but the seeds and those of a variant."""
    ofvariant = ("n_exp", *sweep.compared_settings(), *SEEDS)
    return {name: value for name, value in (run.settings or {}).items() if name not in ofvariant}


def disagreement(a, b):
    """The names of the shared settings in which the runs of two groups differ."""
    a, b = shared_settings(a[0]), shared_settings(b[0])
    return [name for name in {**a, **b} if a.get(name, PUBLISHED.get(name)) != b.get(name, PUBLISHED.get(name))]


# ---------------------------------------------------------------------------------------------------------------------
# The table


def summary(paths, at_step=None):
    """A pandas.DataFrame with one row per group, from logs, thinned CSVs, folders or `Run`s.

    variant: its name in sweep.py; settings: those that differ from the other groups of that variant; runs, and how many
    of them ended in each of the STATES but "ok". Then mean and standard deviation over the runs that are ok: the others
    are counted, not averaged. `step` is the smallest last step averaged; spikes are per run, over all runs, nan where a
    run does not tell. mid_schedule: some run that is ok was read before the end of its schedule. The other columns as
    in runlog.table_of_runs.
    """
    return summary_of(group(runlog.as_runs(paths)), at_step)


def summary_of(groups, at_step=None):
    texts = tell_apart(groups)
    return pd.DataFrame([_row(runs, text, at_step) for runs, text in zip(groups, texts, strict=True)])


def measured(runs, at_step=None):
    """runlog.table_of_runs() of one group, where a run that stopped early is unfinished."""
    table = runlog.table_of_runs(runs, at_step)
    early = table.state.isin(("ok", "stuck")) & (table.step < runlog.UNFINISHED * table.step.max())
    return table.assign(state=table.state.where(~early, "unfinished"))


def of_state(runs, table, state="ok"):
    """The runs of a state that have a val, in the order of their measured() table."""
    return [run for run, found in zip(runs, table.state, strict=True) if found == state and "val" in run.streams]


def mid_schedule(run, at_step=None):
    """True where the last val is known not to be that of the end of the schedule."""
    return "max_steps" in (run.settings or {}) and not runlog.at_end(run, at_step)


def _row(runs, settings, at_step):
    table = measured(runs, at_step)
    good = table[table.state == "ok"]
    row = {"variant": variant(runs), "settings": settings, "runs": len(table)}
    row |= {state: int((table.state == state).sum()) for state in runlog.STATES[1:]}
    row["step"] = int(good.step.min()) if len(good) else int(table.step.max())
    for column in ("val", "best_val", "hella", "best_hella"):
        row |= {f"{column}_mean": good[column].mean(), f"{column}_std": good[column].std()}
    row["spikes"] = table.spikes.mean(skipna=False)
    row["mid_schedule"] = any(mid_schedule(run, at_step) for run in of_state(runs, table))
    return row | {column: good[column].mean() for column in ("tok_per_sec", *runlog.LOADS)}


# ---------------------------------------------------------------------------------------------------------------------
# Differences


class Difference(NamedTuple):
    """Loss of a group minus that of its baseline, nats."""

    minus: float = math.nan  # mean
    low: float = math.nan  # of the 95 % interval
    high: float = math.nan
    p: float = math.nan
    n: int = 0  # pairs, or the smaller number of runs
    test: str = ""  # paired or Welch
    std: float = math.nan  # of the paired differences


def difference(losses, baseline):
    """The Difference between two lists of (pair_key of the run, loss). The docstring of this file says which test."""
    pairs = np.array(paired(losses, baseline)).reshape(-1, 2)
    if len(pairs) > 1:
        apart = pairs[:, 0] - pairs[:, 1]
        n, minus, widths = len(pairs), apart.mean(), np.ptp(apart)
    else:
        a, b = ([loss for _, loss in runs] for runs in (losses, baseline))
        if not a or not b:
            return Difference()
        n, minus, widths = min(len(a), len(b)), np.mean(a) - np.mean(b), max(np.ptp(a), np.ptp(b))
    if n < 2 or widths < 1e-7:  # less than a digit of the log
        return Difference(float(minus), n=n)
    test, std = ("paired", float(apart.std(ddof=1))) if len(pairs) > 1 else ("Welch", math.nan)
    found = stats.ttest_rel(*pairs.T) if test == "paired" else stats.ttest_ind(a, b, equal_var=False)
    low, high = found.confidence_interval(0.95)
    return Difference(float(minus), float(low), float(high), float(found.pvalue), n, test, std)


def paired(losses, baseline):
    """[(loss, loss of the baseline)] of equal seeds and data, where data change with the seed. Repeats are averaged."""
    means = []
    for runs in (losses, baseline):
        keys = dict.fromkeys(key for key, _ in runs)
        means.append({key: np.mean([loss for other, loss in runs if other == key]) for key in keys})
    keys = [key for key in means[0] if key in means[1]]
    return [(means[0][key], means[1][key]) for key in keys] if len({key[1:] for key in keys}) > 1 else []


def holm(p):
    """p-values corrected for their number by Holm's method; nan stays nan and does not count."""
    p = np.asarray(p, dtype=float)
    corrected, largest = np.full(len(p), math.nan), 0.0
    known = [i for i in np.argsort(p) if not math.isnan(p[i])]
    for rank, i in enumerate(known):
        largest = max(largest, min(1.0, p[i] * (len(known) - rank)))
        corrected[i] = largest
    return corrected


def outcome(found, corrected, failed, failed_baseline):
    """The outcome of a Difference by the rule in this file's docstring; failed are parts of the runs."""
    if failed >= 0.5 > failed_baseline:
        return "breaks"
    if failed_baseline >= 0.5 > failed:
        return "works"
    if math.isnan(found.p):
        return "-"
    if failed > failed_baseline:
        return "mixed"
    if found.low <= 0 <= found.high:
        return "no difference seen"
    if corrected >= SIGNIFICANT:
        return "mixed"
    return "works" if found.minus < 0 else "harms"


def failed_part(states):
    """The part of the runs that failed, of those that did not die at the start and were not stopped early."""
    known = states[states.isin(("ok", *FAILED))]
    return known.isin(FAILED).mean() if len(known) else 0.0


def least_difference(table):
    """What the table can see, in words: the spread over seeds and the half-width of a 95 % interval."""
    free = (table.runs_ok - 1).clip(lower=0)[table.val_std.notna()]
    if not free.sum():
        return "no group has two runs that are ok: there is no spread over seeds"
    spread = math.sqrt((free * table.val_std**2).sum() / free.sum())
    words = f"standard deviation over seeds {spread:.4f} (pooled, {free.sum()} degrees of freedom)"
    for test in ("paired", "Welch"):
        rows = table[table.test == test]
        if len(rows):
            n = int(rows.n.median())
            of_pairs = math.sqrt(((rows.n - 1) * rows["std"] ** 2).sum() / (rows.n - 1).sum())
            sd, free = (of_pairs, n - 1) if test == "paired" else (spread * math.sqrt(2), 2 * n - 2)
            width = stats.t.ppf(0.975, free) * sd / math.sqrt(n)
            of = f", of paired differences {of_pairs:.4f}" if test == "paired" else ""
            words += f"{of}; with {n} seeds the 95 % interval reaches {width:.4f} to each side ({test}, uncorrected): "
            words += "a difference measured smaller than that is not told from zero"
    return words


def provenance(groups):
    """The commits and machines of the runs, in words: a comparison should have one of each."""
    metas = [run.meta for runs in groups for run in runs]
    commits = sorted({str(meta.get("commit", "unknown")) for meta in metas})
    devices = sorted({str(meta.get("device", "unknown")) for meta in metas})
    shown = ", ".join(commits[:3]) + (f" and {len(commits) - 3} more" if len(commits) > 3 else "")
    return f"commits: {shown}; machines: {', '.join(devices)}"


# ---------------------------------------------------------------------------------------------------------------------
# Baselines


def find_baselines(groups, spec):
    """For each group the number of its baseline; the baseline that most groups have is its own.

    spec: the name of a variant or log, and settings that tell it from others of that name: no_moe,max_steps=2596. With
    settings it is the baseline of every group.
    """
    name, wanted = parse_spec(spec)
    of_name, named = matching(groups, name), matching(groups, spec)
    if not named and not of_name:
        raise UserError(f"--baseline {spec}: no such runs; there are {', '.join(dict.fromkeys(map(variant, groups)))}")
    if not named or (wanted and len(named) > 1):
        runs = [groups[i][0] for i in named or of_name]
        found = differing([run.settings for run in runs])
        texts = "; ".join(describe_group(*pair) for pair in zip(runs, found, strict=True))
        raise UserError(
            f"--baseline {spec}: {len(named)} groups of that name fit ({texts}): give settings as name=value"
        )

    def distance(i, j):
        return len(disagreement(groups[i], groups[j]))

    main = max(named, key=lambda j: (sum(not distance(i, j) for i in range(len(groups))), len(groups[j])))
    others = [main, *(j for j in named if j != main)]
    return [main if i in named else min(others, key=lambda j: distance(i, j)) for i in range(len(groups))]


def parse_spec(spec):
    """(name, {setting: value as text}) of no_moe,max_steps=2596"""
    name, *pairs = spec.split(",")
    return name, dict(pair.strip().partition("=")[::2] for pair in pairs)


def matching(groups, spec):
    """The numbers of the groups with the name and settings of a spec."""
    name, wanted = parse_spec(spec)

    def fits(run):
        settings = PUBLISHED | (run.settings or {})
        return name in (variant([run]), run.name) and all(str(settings.get(k)) == v for k, v in wanted.items())

    return [i for i, runs in enumerate(groups) if fits(runs[0])]


def add_differences(table, groups, spec, at_step=None):
    """summary_of(groups) with the columns of Difference, p_holm, outcome, and the group that is the baseline.

    x_spent_flops, x_spent_tokens: FLOPs and tokens of the runs, relative to the baseline.
    """
    chosen = find_baselines(groups, spec)
    tables = [measured(runs, at_step) for runs in groups]
    good = [[runlog.cut(run, at_step) for run in of_state(*pair)] for pair in zip(groups, tables, strict=True)]
    if at_step is None:  # a run that is still in mid-schedule is compared with nothing
        good = [[run for run in runs if not mid_schedule(run)] for runs in good]
    losses = [[(curves.pair_key(run), curves.final(run).loss) for run in runs] for runs in good]
    failed = [failed_part(found.state) for found in tables]
    comparable = [not set(SAME_VAL) & set(disagreement(groups[i], groups[j])) for i, j in enumerate(chosen)]
    found = [
        difference(losses[i], losses[j]) if i != j and comparable[i] else Difference() for i, j in enumerate(chosen)
    ]
    corrected = holm([row.p for row in found])
    added = pd.DataFrame([row._asdict() for row in found])
    added["p_holm"], added["runs_ok"] = corrected, list(map(len, good))
    added["baseline"] = [f"{table.variant[j]} {table.settings[j]}".strip() for j in chosen]
    for currency in ("tokens", "flops"):
        spent = [
            np.mean([curves.final(run).spent.get(currency, math.nan) for run in runs] or [math.nan]) for runs in good
        ]
        added[f"x_spent_{currency}"] = [spent[i] / spent[j] for i, j in enumerate(chosen)]
    added["outcome"] = [
        "baseline" if i == j else outcome(found[i], corrected[i], failed[i], failed[j]) for i, j in enumerate(chosen)
    ]
    return table.join(added)


def add_speedups(table, groups, spec):
    """(table with columns of the effective speedup over each group's baseline, the fit in words). curves.py has both.

    One value per pair of equal seeds and data, of runs that are ok and at the end of their schedule. The power law is
    fitted to the runs of the baseline's name and settings, of all their lengths. Without one the columns are nan, and
    those of hours are where a group's runs are not STEADY.
    """
    chosen = find_baselines(groups, spec)
    finals = [[run for run in of_state(runs, measured(runs)) if runlog.at_end(run)] for runs in groups]
    laws, words, fits, rows = {}, [], {}, []
    for j in sorted(set(chosen)):
        of_law = [i for i in range(len(groups)) if variant(groups[i]) == variant(groups[j])
                  and set(disagreement(groups[i], groups[j])) <= set(LENGTH)]  # fmt: skip
        bases = [run for i in of_law for run in finals[i] if "tokens_per_step" in run.meta]
        points = [(end.spent["tokens"], end.loss) for end in map(curves.final, bases)]
        name = f"{table.variant[j]} {table.settings[j]}".strip()
        try:
            laws[j] = bases, curves.fit_power_law(points), of_law
        except UserError as error:
            words.append(f"no effective speedup over {name}: {error}")
            continue
        law, lengths = laws[j][1], len({tokens for tokens, _ in points})
        found = f"val = {law.limit:.4f} + {law.scale:.4g} / tokens ** {law.exponent:.4f}"
        found += f", from {len(points)} runs of {lengths} lengths"
        fits.setdefault(found, []).append(name)
    words += [f"x: effective speedup over {', '.join(of)} ({fit}), one value per seed" for fit, of in fits.items()]
    for i, j in enumerate(chosen):
        of_law = laws[j][2] if j in laws else []
        others = finals[i] if of_law and i not in of_law else []
        others = [run for run in others if "tokens_per_step" in run.meta]
        pairs = pd.DataFrame([curves.speedup_of_pair(run, *laws[j][:2]) for run in others])
        pairs = pairs.reindex(columns=curves.CURRENCIES)
        if not all(steady(finals[k]) for k in (i, *of_law)):
            pairs["hours"] = math.nan
        rows.append({f"x_{c}_mean": pairs[c].mean() for c in pairs} | {f"x_{c}_std": pairs[c].std() for c in pairs})
    return table.join(pd.DataFrame(rows)), "\n".join(words)


def steady(runs):
    """Whether the hours of the runs of one group agree."""
    hours = [hours for run in runs if (hours := curves.final(run).spent.get("hours"))]
    return not hours or max(hours) <= STEADY * min(hours)


# ---------------------------------------------------------------------------------------------------------------------
# As text


def cells(table):
    """The table with text in every cell; a dash where there is nothing, and no column of dashes."""
    shown = table[["variant"]].copy()
    shown["settings"] = [shorten(text) for text in table.settings]
    shown["n"] = table.runs
    shown["failed"] = [", ".join(f"{row[s]} {s}" for s in runlog.STATES[1:] if row[s]) for _, row in table.iterrows()]
    shown["step"] = table.step
    shown["val"] = [spread(*pair, 4) for pair in zip(table.val_mean, table.val_std, strict=True)]
    shown.loc[table.mid_schedule, "val"] += "*"
    if "minus" in table:
        main = table.baseline[table.outcome == "baseline"]
        shown["against"] = table.baseline.where(~table.baseline.isin(main), "")
        shown["minus baseline [95 %]"] = [
            interval(*row) for row in zip(table.minus, table.low, table.high, strict=True)
        ]
        shown["test"] = [f"{test}, n = {n}" if test else "" for test, n in zip(table.test, table.n, strict=True)]
        shown["p"] = list(map(p_value, table.p))
        shown["p (Holm)"] = list(map(p_value, table.p_holm))
        shown["outcome"] = table.outcome
        shown["FLOPs"] = [f"x{value:.2f}" if math.isfinite(value) else "-" for value in table.x_spent_flops]
    else:
        for column in ("best_val", "hella", "best_hella"):
            shown[column] = [
                spread(*pair, 4) for pair in zip(table[f"{column}_mean"], table[f"{column}_std"], strict=True)
            ]
        shown["tok_per_sec"] = [dashed(value, 0) for value in table.tok_per_sec]
    for currency in curves.CURRENCIES:
        if f"x_{currency}_mean" in table:
            pairs = zip(table[f"x_{currency}_mean"], table[f"x_{currency}_std"], strict=True)
            shown[f"x {currency}"] = [spread(*pair, 2) for pair in pairs]
    shown["spikes"] = [dashed(value, 1) for value in table.spikes]
    for column in ("max_vio", "worst_vio", "drop_frac", "val_drop"):
        shown[column] = [dashed(value, 2) for value in table[column]]
    says = [head for head in shown if head == "val" or not set(map(str, shown[head])) <= {"", "-"}]
    return shown[says].replace("", "-")


def format_summary(table):
    """The table as text for a terminal."""
    return cells(table).to_string(index=False)


def report(runs, baseline=None, at_step=None):
    """The table for a terminal, with differences to a baseline, and notes below."""
    groups = in_order(group(runs))
    table = summary_of(groups, at_step)
    words = []
    if baseline:
        table = add_differences(table, groups, baseline, at_step)
        words = [least_difference(table), provenance(groups)]
        if at_step is None:
            table, fits = add_speedups(table, groups, baseline)
            words.append(fits)
    return "\n".join([format_summary(table), *words, *notes(table)])


def notes(table):
    """What a mark in the table means, if there is one."""
    words = []
    if table.mid_schedule.any():
        words.append("*: read in mid-schedule, where the learning rate is still high: not the loss of a finished run")
    return words


def spread(mean, std, digits):
    return dashed(mean, digits) + ("" if math.isnan(std) else f"±{std:.{digits}f}")


def interval(minus, low, high):
    if math.isnan(minus):
        return "-"
    return f"{minus:+.3f}" + ("" if math.isnan(low) else f" [{low:+.3f}, {high:+.3f}]")


def p_value(p):
    return "< 0.001" if p < 0.001 else dashed(p, 3)


def dashed(value, digits):
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def shorten(settings, most=4):
    words = settings.split(", ")
    return ", ".join(words[:most]) + (f", {len(words) - most} more" if len(words) > most else "")
