"""Groups of runs in a table, and the difference of each to a baseline: how large, how sure, and what it costs.

    python compare.py logs                                             # a row per group
    python compare.py logs --baseline no_moe                           # each group minus dense
    python compare.py results/equal --baseline no_moe,max_steps=2596   # minus this dense model: equal FLOPs
    python compare.py logs --baseline no_moe --best_rate               # each arm at its own best learning rate
    python compare.py logs/equal --keep results/equal                  # what tables and figures need, some 50 kB
    python compare.py logs/no_moe_seed_1 --against results/reference/llmc_gpt2_124M.csv

A folder holds runs (lab/runs.py) or is an experiment that --keep wrote (lab/results.py). A group is the runs of one
name whose settings differ in the seeds alone. Its baseline is the group of the baseline's name that differs from it in
the fewest settings. Compared are groups of equal validation text and length; what --baseline names may differ.

Difference: mean last val minus that of the baseline, in nats, with a 95 % interval and the p of a t-test. A seed counts
once: repeats are averaged. Runs that failed (diverged, stuck, regressed) are counted, not averaged. Where the order of
the data follows the seed (--data_seed) equal seeds are pairs: paired test. Where every run sees the same data they are
none, as models of other shape draw other weights: Welch's test. Holm's method corrects p for the rows of the table;
--names, chosen before the runs, makes a smaller one. Outcome, the first rule that holds:

    breaks, works       more, fewer runs failed than of the baseline, and Fisher's exact test gives p below 0.05
    mixed               runs failed and that test does not decide; survivors are no sample and get no interval
    -                   too few runs for an interval
    no difference seen  the interval holds zero: it says how large a difference may still be there
    mixed               the interval does not hold zero, but p after Holm's correction is 0.05 or more
    works, harms        the loss is lower, higher, and p after Holm's correction is below 0.05

Effective speedup x: the tokens, FLOPs or hours that the baseline would need to reach a run's loss, over those of the
run, by loss = limit + scale / tokens ** exponent through baselines of three lengths. FLOPs are of the model and Muon's
products.
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from lab import common, results, runs
from lab.common import NotNegative, UserError

# isort: split
import numpy as np
import pandas as pd
import tyro
from scipy import optimize, stats

from lab.results import LOADS, MEASURED, NUMBERS, as_text
from variants import VARIANTS

ADDED = ("group", "settings", "rate", "tokens", "flops")
NOT_COUNTED = (*MEASURED, *ADDED, *runs.SEEDS, *runs.UNCOUNTED, "val_loss_every", "hellaswag_every")
SIZES = ("n_exp", "n_embd", "max_steps", "max_lr", "muon_lr", "warmup_steps")  # order of the groups of one name
VAL_TEXT = ("data", "tokenizer", "vocab_size", "T", "val_tokens")  # losses are comparable only where these agree
LENGTH = ("max_steps", "max_minutes", "decay_steps")  # the baselines of one power law differ in these alone
RATES, BUDGETS = ("max_lr", "muon_lr"), ["tokens", "flops", "hours"]
CHECKS = (  # of --against: stream, first and last step, largest gap that other data explain, what a larger one means
    ("train", 0, 0, 0.1, "initialisation, vocabulary, or a loss that is no mean of nats per token"),
    ("grad_norm", 0, 0, 2.0, "a smaller batch, which has a larger norm, or embedding and head that are not tied"),
    ("lr", 0, math.inf, 2e-6, "max_lr, warmup_steps, or max_steps, the horizon of the schedule"),
    ("train", 1, 100, 0.15, "the learning rate if lr is off, else batch size, betas, clipping"),
    ("val", 101, 1000, 0.06, "the data or their order, or the learning rate"),
    ("val", 1001, math.inf, 0.03, "data, weight decay or min_lr; a wrong schedule shows as 0.1 and more"),
)
FAILED = ("diverged", "stuck", "regressed")
NO_TEST = {"low": math.nan, "high": math.nan, "p": math.nan}
NOTHING = {"minus": math.nan, "pairs": 0, "test": "", **NO_TEST}

# ---------------------------------------------------------------------------------------------------------------------
# Groups


def in_words(table, without=()):
    """Name and settings of each row as text: runs of equal rows are one group."""
    kept = ["name", *(column for column in table if column not in (*NOT_COUNTED, *without))]
    return table[kept].map(as_text).astype(object)


def add_groups(table):
    """The runs sorted, with the number of their group and, in `settings`, how it differs from others of its name."""
    order = {name: i for i, name in enumerate(VARIANTS)}
    by = ["order", "name", *(size for size in SIZES if size in table)]
    table = table.assign(order=table.name.map(order).fillna(len(order)), settings="")
    table = table.sort_values(by, ignore_index=True).drop(columns="order")
    words = in_words(table)
    table["group"] = words.groupby(list(words), sort=False).ngroup()
    for _, rows in words.groupby("name"):
        kinds = rows.nunique().sort_values(ascending=False, kind="stable")
        for column in kinds.index[kinds > 1]:
            table.loc[rows.index, "settings"] += ", " + column + " " + rows[column]
    table["settings"] = table.settings.str.removeprefix(", ")
    table["tokens"] = table.step * table.get("total_batch_size", math.nan)
    table["flops"] = table.tokens * table.flops_per_token + table.step * table.optimizer_flops.astype(float).fillna(0)
    return table


def at_best_rates(table, selection=()):
    """The runs of each arm at the rate with the lowest mean val over the selection seeds, without those seeds.

    An arm is a group but for its rates; a rate at which a selection seed failed is not chosen. Rates within 0.1 % are
    tied. `rate`: whether the best is the arm's own, at the edge of its rates, or the only one, shared with others.
    """
    selection, found = set(selection or sorted(set(table.seed))[: table.seed.nunique() // 2]), []
    for rate in RATES:  # sweep.py --rates calls its runs {variant}_lr_{rate}
        if rate in table:
            pairs = zip(table.name, table[rate], strict=True)
            table = table.assign(name=[name.removesuffix(f"_lr_{value:g}") for name, value in pairs])
    for _, arm in table.groupby([column for _, column in in_words(table, RATES).items()], sort=False):
        tried = arm[arm.seed.isin(selection)].groupby("group")
        whole = tried.state.agg(lambda states: set(states) == {"ok"}) & (tried.seed.nunique() == len(selection))
        means = tried.val.mean()[whole].sort_values()
        if not len(means):
            continue
        tied = arm[arm.group.isin(means.index[means <= 1.001 * means.iloc[0]])]
        varied = [rate for rate in RATES if rate in arm and arm[rate].nunique() > 1]
        words = [f"{rate} {'='.join(sorted(map(as_text, set(tied[rate]))))}" for rate in varied]
        at_edge = any(set(tied[rate]) <= {arm[rate].min(), arm[rate].max()} for rate in varied)
        kind = "edge: " if at_edge else "own: " if varied else "shared"
        best = arm[(arm.group == means.index[0]) & ~arm.seed.isin(selection)]
        found.append(best.assign(rate=kind + ", ".join(words)))
    if not found:
        raise UserError(f"no arm has a rate at which the seeds {sorted(selection)} are ok: other --selection_seeds")
    return add_groups(pd.concat(found, ignore_index=True))


def summarize(table):
    """(groups, samples): a row per group with means over seeds and their spread; {group: a row per seed that is ok}.

    Of a group without a run that is ok the unfinished ones are shown, and marked.
    """
    groups, samples, seeds = {}, {}, list(runs.SEEDS)
    for number, rows in table.groupby("group"):
        failed, state = rows[rows.state.isin(FAILED)], "ok" if "ok" in set(rows.state) else "unfinished"
        good = rows[(rows.state == state) & ~rows.seed.isin(failed.seed)].groupby(seeds)
        sample = good[[*NUMBERS, "step", "tokens", "flops"]].mean().join(good.machine.first())
        means, stds = sample.drop(columns="machine").mean(), sample.drop(columns="machine").std()
        row = rows.iloc[0].to_dict() | means.to_dict() | stds.add_suffix("_std").to_dict()
        row |= {"runs": len(rows), "n": rows.groupby(seeds).ngroups, "n_failed": failed.groupby(seeds).ngroups}
        row |= {"n_ok": len(sample) if state == "ok" else 0, "early": state == "unfinished" and len(sample) > 0}
        row["failed"] = ", ".join(f"{n} {state}" for state, n in rows.state.value_counts().items() if state != "ok")
        row["step"] = sample.step.min() if len(sample) else rows.step.max()
        row["spikes"] = rows.spikes.mean(skipna=False)
        groups[number], samples[number] = row, sample
    return pd.DataFrame.from_dict(groups, orient="index"), samples


# ---------------------------------------------------------------------------------------------------------------------
# Differences


def difference(a, b):
    """Mean of the losses `a` minus that of `b`, Series by (seed, data_seed), with interval, p, test and pairs."""
    apart, follows = (a - b).dropna(), [losses.index.unique("data_seed").size > 1 for losses in (a, b)]
    paired = all(follows) and len(apart) > 0
    n, minus = (len(apart), apart.mean()) if paired else (min(len(a), len(b)), a.mean() - b.mean())
    found = {"minus": minus, "pairs": n, "test": "paired" if paired else "Welch"} | NO_TEST
    if n < 2 or max(map(np.ptp, [apart] if paired else [a, b])) < 1e-7:  # less than a digit of the log
        return found
    test = stats.ttest_1samp(apart, 0) if paired else stats.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval(0.95)
    return found | {"low": low, "high": high, "p": test.pvalue}


def holm(p):
    """A Series of p-values corrected for their number by Holm's method; nan does not count."""
    known = p.dropna().sort_values()
    return (known * np.arange(len(known), 0, -1)).cummax().clip(upper=1).reindex(p.index)


def outcome(row, base):
    """The outcome of a row by the rules at the top of this file."""
    if row.why:
        return row.why
    if row.n_failed + base.n_failed:
        if stats.fisher_exact([[row.n_failed, row.n_ok], [base.n_failed, base.n_ok]]).pvalue >= 0.05:
            return "mixed"
        return "breaks" if row.n_failed * base.n_ok > base.n_failed * row.n_ok else "works"
    if math.isnan(row.p):
        return "-"
    if row.low <= 0 <= row.high:
        return "no difference seen"
    if row.p_holm >= 0.05:
        return "mixed"
    return "works" if row.minus < 0 else "harms"


def find_baselines(groups, words, spec):
    """(the number of each group's baseline, the settings named) of a spec such as no_moe,max_steps=2596."""
    name, *pairs = spec.split(",")
    named, fits = dict(pair.partition("=")[::2] for pair in pairs), groups.name == name
    for setting, value in named.items():
        fits &= words[setting] == value if setting in words else False
    if not fits.any():
        raise UserError(f"--baseline {spec}: no such runs; there are {', '.join(dict.fromkeys(groups.name))}")
    nearest = pd.Series({i: (words[fits] != words.loc[i]).sum(axis=1).idxmin() for i in groups.index})
    nearest[fits] = groups.n[fits].idxmax() if fits.all() else nearest[~fits].mode()[0]
    return nearest, named


def unlike(row, base, named):
    """Why the losses of two groups are not compared, in words; "" where they are."""
    for name in VAL_TEXT:
        if name in row.index and as_text(row[name]) != as_text(base[name]):
            return f"other data or validation text: {name} {as_text(row[name])} and {as_text(base[name])}"
    if row.early or base.early:
        return "unfinished: --at_step compares on the way"
    lengths = [group.step if math.isnan(group.tokens) else group.tokens for group in (row, base) if group.n_ok]
    by_clock = as_text(row.get("max_minutes")) == as_text(base.get("max_minutes")) != "-"
    meant = row["name"] != base["name"] and named.keys() & {*LENGTH, "total_batch_size"}
    return "" if by_clock or meant or len(set(lengths)) < 2 else "other length"


def add_differences(groups, samples, words, spec):
    """The groups with their baseline's number, the difference to it, p after Holm's correction, and the outcome."""
    nearest, named = find_baselines(groups, words, spec)
    found = []
    for i, row in groups.iterrows():
        base = groups.loc[nearest[i]]
        why = "baseline" if i == nearest[i] else unlike(row, base, named)
        apart = NOTHING if why else difference(samples[i].val, samples[nearest[i]].val)
        if row.n_failed + base.n_failed:
            apart = apart | NO_TEST
        found.append(apart | {"base": nearest[i], "why": why, "x_spent": row.flops / base.flops})
    groups = groups.join(pd.DataFrame(found, index=groups.index))
    groups["p_holm"] = holm(groups.p)
    groups["outcome"] = [outcome(row, groups.loc[row.base]) for _, row in groups.iterrows()]
    return groups


def fit_power_law(tokens, losses):
    """(limit, scale, exponent) of loss = limit + scale / tokens ** exponent, least squares; None if there is no fit."""
    if tokens.nunique() < 3:
        return None
    start, bounds = (0.8 * losses.min(), 0.2 * losses.min(), 0.3), ((0, 0, 0.01), (np.inf, np.inf, 3))
    law, part = (lambda x, limit, scale, exponent: limit + scale * x**-exponent), (tokens / tokens.max()).to_numpy()
    try:
        limit, scale, exponent = optimize.curve_fit(law, part, losses, start, bounds=bounds)[0]
    except RuntimeError:  # it did not converge
        return None
    on_edge = not 0.0101 < exponent < 2.97 or scale < 1e-6
    return None if on_edge else (limit, scale * tokens.max() ** exponent, exponent)


def add_speedups(groups, samples, words):
    """The groups with x_tokens, x_flops, x_hours over their baseline, mean and _std, and the power law in words."""
    words, found = words.drop(columns=list(LENGTH), errors="ignore"), {i: {} for i in groups.index}
    for i, row in groups.iterrows():
        alike = groups.index[(words == words.loc[row.base]).all(axis=1) & (groups.n_ok > 0)]
        bases = pd.concat([samples[row.base][:0], *(samples[k] for k in alike)])
        law = fit_power_law(bases.tokens, bases.val)
        if i in alike or law is None:
            continue
        limit, scale, exponent = law
        ratios = []
        for seed, run in samples[i][samples[i].index.isin(bases.index)].iterrows():
            twins = bases[bases.index == seed]  # of the same seed and data: the nearest in length counts
            twin = twins.iloc[np.log(twins.tokens / run.tokens).abs().argmin()]
            need = ((twin.val - limit) / (run.val - limit)) ** (1 / exponent)
            ratios.append(need * twin[BUDGETS].astype(float) / run[BUDGETS].astype(float))
        ratios = pd.DataFrame(ratios, columns=BUDGETS).add_prefix("x_")
        # hours count on one machine that no other job slowed down for a while
        hours = [samples[k].hours for k in (i, *alike)]
        if {*bases.machine} != {*samples[i].machine} or any(h.max() > 1.25 * h.min() for h in hours):
            ratios["x_hours"] = math.nan
        found[i] = ratios.mean().to_dict() | ratios.std().add_suffix("_std").to_dict()
        law = f"{limit:.4f} + {scale:.4g} / tokens ** {exponent:.4f}, from {len(bases)} runs"
        found[i]["law"] = f"x: over {groups.name[row.base]}, val = {law} of {bases.tokens.nunique()} lengths"
    return groups.join(pd.DataFrame.from_dict(found, orient="index"))


# ---------------------------------------------------------------------------------------------------------------------
# Output


def hold_against(folder, curve):
    """One run beside a published curve, a CSV of step, val, train, lr, grad_norm, at shared steps; and a verdict."""
    log, theirs = runs.read_log(folder), pd.read_csv(curve).set_index("step")
    log = log[log.stream.isin(theirs.columns) & log.step.isin(theirs.index)]
    ours = log.pivot_table("value", "step", "stream", aggfunc="last").reindex(columns=theirs.columns)
    both = pd.concat({"theirs": theirs, "ours": ours, "gap": ours - theirs}, axis=1, join="inner")
    both = both.swaplevel(axis=1)[list(theirs.columns)]
    lines = [both[(both.index <= 10) | both["val"].gap.notna()].to_string(na_rep="-", float_format="{:.6g}".format)]
    off, facts, mine = [], Path(curve).with_suffix(".json"), runs.settings_of(runs.read_config(folder))
    for name, value in json.loads(facts.read_text("utf-8")).items() if facts.exists() else ():
        if as_text(mine.get(name)) != as_text(value):
            lines.append(f"setting: {name} is {as_text(mine.get(name))}, theirs {as_text(value)}")
    for stream, first, last, allowed, meaning in CHECKS:
        gap = both[stream].gap.loc[first:last].abs().max()
        verdict = "not reached" if math.isnan(gap) else "ok" if gap <= allowed else f"off: look at {meaning}"
        off += [stream] if verdict.startswith("off") else []
        lines.append(f"{stream}, steps {first} to {last}: gap {gap:.2g}, allowed {allowed:g}: {verdict}")
    verdict = f"{off[0]} is off first, the rest may follow from it" if off else "the setup agrees as far as this goes"
    return "\n".join([*lines, f"verdict: {verdict}"])


def number(mean, std=math.nan, digits=2):
    """1.7054±0.0078, 1.7054, or a dash."""
    if math.isnan(mean):
        return "-"
    return f"{mean:.{digits}f}" + ("" if math.isnan(std) else f"±{std:.{digits}f}")


def cells(groups):
    """The table with text in every cell, the important columns first, without columns that hold dashes alone."""
    shown = groups[["name", "settings", "n", "failed"]].astype(str).replace("", "-")
    rows, rates = [row for _, row in groups.iterrows()], groups.reindex(columns=list(RATES)).map(as_text)
    shown["val"] = [number(row.val, row.val_std, 4) + "*" * bool(row.early) for row in rows]
    if "minus" in groups:
        ends = [f" [{row.low:+.3f}, {row.high:+.3f}]" if row.low == row.low else "" for row in rows]
        shown["minus baseline [95 %]"] = [f"{row.minus:+.3f}{end}" for row, end in zip(rows, ends, strict=True)]
        shown["outcome"] = groups.outcome
        if groups.base.nunique() > 1:
            shown["against"] = groups.settings[groups.base].replace("", "-").to_numpy()
        shown["test"] = [f"{row.test}, n = {row.pairs}" if row.test else "-" for row in rows]
        for column, head in (("p", "p"), ("p_holm", f"p (Holm of {groups.p.count()})")):
            shown[head] = ["< 0.001" if p < 0.001 else number(p, digits=3) for p in groups[column]]
        same = [rates.loc[i].equals(rates.loc[base]) for i, base in groups.base.items()]
        shown["rate"] = groups.get("rate", pd.Series(same, groups.index).map({True: "shared", False: "own"}))
        shown["FLOPs"] = [f"x{row.x_spent:.2f}" for row in rows]
        for name in BUDGETS if "x_tokens" in groups else []:
            shown[f"x {name}"] = [number(row[f"x_{name}"], row[f"x_{name}_std"]) for row in rows]
    else:
        for name in ("best_val", "val_bpb", "hella", "best_hella"):
            shown[name] = [number(row[name], row[f"{name}_std"], 4) for row in rows]
        shown["tok_per_sec"] = [number(row.tok_per_sec, digits=0) for row in rows]
    shown["step"] = groups.step.astype(int).astype(str)
    for name in ("spikes", *LOADS):
        shown[name] = groups[name].map(number)
    shown = shown.replace({"+nan": "-", "xnan": "-"})
    return shown[[head for head in shown if head == "val" or set(shown[head]) != {"-"}]]


def lay_out(shown, width):
    """Left-aligned text that fits the terminal: words lose their middle, then columns at the right are left out."""
    shown, left_out, most = shown.copy(), [], max(24, width // 5)
    for head in {"name", "settings", "outcome", "against", "rate"} & {*shown}:
        middle = shown[head].str[: most // 2] + ".." + shown[head].str[2 - most // 2 :]
        shown[head] = shown[head].where(shown[head].str.len() <= most, middle)
    while True:
        rows = [list(shown), *shown.to_numpy().tolist()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        if sum(widths) + 2 * len(widths) <= width or len(widths) == 1:
            break
        left_out.insert(0, shown.columns[-1])
        shown = shown.iloc[:, :-1]
    lines = ["  ".join(word.ljust(size) for word, size in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"(no room in {width} columns for {', '.join(left_out)}: COLUMNS=250 shows them)"] if left_out else []
    return "\n".join(lines)


def notes(table, groups, at_step):
    """Lines below the table: what it can see, what was averaged and left out, commits and machines."""
    words = [f"spread over seeds {groups.val_std.median():.4f} (median of the groups)"]
    if "minus" in groups and groups.p.count():
        half = (groups.high - groups.low).median() / 2
        words[0] += f"; intervals reach {half:.4f} to each side (median): less is not told from zero"
    if (groups.runs > groups.n).any():
        words.append(f"{(groups.runs - groups.n).sum()} runs are repeats of a seed: seeds are averaged first")
    if groups.early.any() or at_step is not None:
        words.append("* or --at_step: read in mid-schedule, where the learning rate is still high")
    if lost := set(table.name) - set(groups.name):
        words.append(f"left out, because a selection seed failed at every rate: {', '.join(sorted(lost))}")
    commits, machines = (", ".join(sorted(set(table[name].map(as_text)))) for name in ("commit", "machine"))
    laws = groups.law.dropna().unique() if "law" in groups else []
    return [*words, f"commits: {commits}; machines: {machines}", *laws]


@dataclass
class Args:
    paths: tyro.conf.Positional[tuple[str, ...]] = ("logs",)  # Folders with runs or kept experiments
    baseline: str = ""  # Name of the group to subtract, with settings if several fit: no_moe,max_steps=2596
    names: tuple[str, ...] = ()  # Names in the table beside the baseline; choose them before the runs (default: all)
    at_step: NotNegative | None = None  # Step at which the runs are judged (default: the last of each)
    best_rate: bool = False  # Choose the learning rate of each arm on some seeds, report on the others
    selection_seeds: tuple[int, ...] = ()  # Seeds that choose the rate (default: the lower half)
    keep: str = ""  # Folder to keep the runs in as an experiment
    against: str = ""  # CSV of a published curve to hold one run against


def compare(table, baseline="", best_rate=False, selection_seeds=()):
    """(groups, samples) of a table of runs, as the command prints them; summarize() says what they hold."""
    table = add_groups(table)
    table = at_best_rates(table, selection_seeds) if best_rate else table
    groups, samples = summarize(table)
    if baseline:
        words = in_words(table).groupby(table.group).first()
        groups = add_speedups(add_differences(groups, samples, words, baseline), samples, words)
    return groups, samples


def main():
    args = common.parse(Args)
    if args.against:
        return print(*(hold_against(folder, args.against) for folder in runs.find(args.paths)), sep="\n\n")
    table, curves = results.read(args.paths, args.at_step)
    if args.keep:
        return results.keep(table, curves, args.keep)
    if args.names:
        table = table[table.name.isin((*args.names, args.baseline.partition(",")[0]))]
    groups, _ = compare(table, args.baseline, args.best_rate, args.selection_seeds)
    print(lay_out(cells(groups), shutil.get_terminal_size((250, 24)).columns))
    print(*notes(table, groups, args.at_step), sep="\n")


if __name__ == "__main__":
    common.run(main)
