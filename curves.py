"""Curves of runs: thinned, against tokens, FLOPs or hours, and the effective speedup of a variant over a baseline.

    band(runs, "val", "hours")                             # mean, lowest and highest of a group
    law = fit_power_law([(tokens, val), ...])              # of baselines of several lengths
    effective_speedup(final(base), final(variant), law)    # {"tokens": 1.31, "flops": 1.09, "hours": 0.84}

A run is a runlog.Run. Effective speedup: how many times the variant's tokens, FLOPs or hours the baseline would need to
reach the variant's loss. The baseline's loss after C tokens is L(C) = L_inf + A / C**a. L_inf and a are fitted to
baselines of several lengths, A goes through the one baseline that the variant is compared with, so that

    C_need / C_base = ((L_base - L_inf) / (L_variant - L_inf)) ** (1 / a)

and the speedup is C_need / C_base * spent_base / spent_variant, spent in tokens, FLOPs or hours. The fit is in tokens
alone: FLOPs or rates enter once. Losses must be final ones of annealed runs; in mid-schedule they are not on the law.
"""

import math
from typing import NamedTuple

import numpy as np

from lab.common import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Curves for the figures

POINTS = 100  # kept of a stream that is logged every step
WHOLE = ("val", "val_bpb", "hella", "hella_bpb")  # never thinned: a mean over a steep part is not on the curve


def thin(steps, values, points=POINTS):
    """At most `points` means over equal numbers of steps, each at the last step of its part."""
    if len(steps) <= points:
        return steps, values
    parts = np.array_split(np.arange(len(steps)), points)
    return steps[[part[-1] for part in parts]], np.array([values[part].mean() for part in parts])


def along(run, steps, axis):
    """`steps` of this run as "step", "tokens", "flops" or "hours" of training; None where the run does not tell."""
    if axis == "step":
        return steps.astype(float)
    if axis == "hours":
        known = run.streams.get("hours")
        return None if known is None else np.interp(steps, known[0] + 1, known[1])  # logged after the step's update
    per_token = run.meta.get("flops_per_token") if axis == "flops" else 1
    return tokens_before(run.meta, steps) * per_token if run.meta.get("tokens_per_step") and per_token else None


def tokens_before(meta, steps):
    """Training tokens before each step; the tokens per step may change when a run is resumed."""
    starts, sizes = [0], [meta["tokens_per_step"]]
    for change in meta.get("changes", []):
        if "total_batch_size" in change["settings"]:
            starts.append(change["step"])
            sizes.append(change["settings"]["total_batch_size"])
    ends = [*starts[1:], math.inf]
    parts = zip(starts, ends, sizes, strict=True)
    return sum(size * np.clip(steps - start, 0, end - start).astype(float) for start, end, size in parts)


def band(runs, stream, axis="step"):
    """(x, mean, lowest, highest) over the runs of one group, at the steps they all have; None without data."""
    runs = [run for run in runs if stream in run.streams]
    if not runs:
        return None
    columns = [dict(zip(*run.streams[stream], strict=True)) for run in runs]
    steps = np.array(sorted(set.intersection(*map(set, columns))), dtype=np.int64)
    x = [along(run, steps, axis) for run in runs]
    if not len(steps) or any(values is None for values in x):
        return None
    x, values = np.mean(x, axis=0), np.array([[column[step] for step in steps] for column in columns])
    if stream not in WHOLE:
        x, values = thin(steps, x)[1], np.array([thin(steps, row)[1] for row in values])
    return x, values.mean(axis=0), values.min(axis=0), values.max(axis=0)


# ---------------------------------------------------------------------------------------------------------------------
# Effective speedup

CURRENCIES = ("tokens", "flops", "hours")
EXPONENTS = (0.01, 3.0)  # tried; published scaling laws of the loss in tokens have 0.05 to 0.4


class PowerLaw(NamedTuple):
    """loss = limit + scale / budget ** exponent"""

    limit: float
    scale: float
    exponent: float


def fit_power_law(points):
    """The PowerLaw of least squared error through (budget, loss) pairs. UserError for fewer than 3 budgets, or no law.

    For a given exponent the law is linear in the others, so that one search over the exponent finds the minimum.
    """
    budgets, losses = np.array(sorted(points), dtype=float).reshape(-1, 2).T
    distinct = sorted(set(budgets))
    if len(distinct) < 3:
        there = ", ".join(f"{budget:,.0f} tokens" for budget in distinct)
        raise UserError(
            f"{len(distinct)} lengths of finished runs{there and f' ({there})'}, a power law needs 3: "
            "train the baseline with other --max_steps too"
        )

    def solve(exponent):  # in budgets relative to the largest
        terms = np.stack([np.ones_like(budgets), (budgets / budgets.max()) ** -exponent], axis=1)
        solution = np.linalg.lstsq(terms, losses, rcond=None)[0]
        return ((terms @ solution - losses) ** 2).sum(), *solution

    low, high = EXPONENTS
    for _ in range(8):  # each keeps a 25th of the interval, in logarithms
        grid = np.geomspace(low, high, 51)
        best = int(np.argmin([solve(exponent)[0] for exponent in grid]))
        low, high = grid[max(0, best - 1)], grid[min(50, best + 1)]
    exponent = math.sqrt(low * high)
    _, limit, scale = solve(exponent)
    if not (EXPONENTS[0] * 1.01 < exponent < EXPONENTS[1] / 1.01 and limit >= 0 and scale > 0):
        raise UserError("the baseline's losses are on no power law: add seeds, or lengths further apart")
    return PowerLaw(float(limit), float(scale * budgets.max() ** exponent), exponent)


class Final(NamedTuple):
    """The end of a run."""

    loss: float  # last val
    spent: dict  # {currency: amount} up to then, without the currencies that the log does not tell


def final(run):
    steps, val = run.streams["val"]
    spent = {currency: along(run, steps[-1:], currency) for currency in CURRENCIES}
    return Final(float(val[-1]), {name: float(amount[0]) for name, amount in spent.items() if amount is not None})


def effective_speedup(base, variant, law):
    """{currency: speedup of one Final over another}: nan where a run does not tell, inf for a loss below the limit."""
    if base.loss <= law.limit:
        need = math.nan
    elif variant.loss <= law.limit:
        need = math.inf
    else:
        need = ((base.loss - law.limit) / (variant.loss - law.limit)) ** (1 / law.exponent)
    ratios = {name: base.spent.get(name, math.nan) / variant.spent.get(name, math.nan) for name in CURRENCIES}
    return {name: need * ratio for name, ratio in ratios.items()}


def speedup_of_pair(run, baselines, law):
    """Effective speedup of a run over the baseline of the same seeds and data, the nearest in length; {} without one.

    Hours are compared on equal machines only.
    """
    twins = [base for base in baselines if pair_key(base) == pair_key(run)]
    if not twins:
        return {}
    end = final(run)
    base = min(twins, key=lambda twin: abs(math.log(final(twin).spent["tokens"] / end.spent["tokens"])))
    found = effective_speedup(final(base), end, law)
    machines = [[other.meta.get(name) for name in ("device", "threads", "world_size")] for other in (base, run)]
    return found if machines[0] == machines[1] else found | {"hours": math.nan}


def pair_key(run):
    settings = run.settings or {}
    return run.seed, settings.get("data_seed"), settings.get("data")
