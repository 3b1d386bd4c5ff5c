"""The log of a run: names and identity, the one reader, and statistics over many runs (logger.py writes).

    python runlog.py logs/log_*.txt                                    # a table, one row per variant
    python runlog.py logs/log_*.txt --at_step 25250                    # the same at one step
    python runlog.py logs/log_*.txt --thin results/small               # a small CSV per run, to be kept
    python runlog.py --published FOLDER --out results/published/curves.csv

A log is text, append-only, one `step stream value` per line, named `log_{name}_{run_id}_seed_{seed}.txt`:

    0 val 10.999938
    0 hella 0.2560
    0 train 11.004575

The logs of swag2198/build-gpt2-moe have the same form and parse with the same reader. Values at step s are those after
s updates (`val`, `hella`, `load_{layer}_{expert}`) or of the update numbered s (`train`, `grad_norm`, ...).
Beside a log lies `{stem}.json` with the settings, versions and FLOPs per token of the run.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

import common
from common import UserError, atomic_write
from identity import parse_stem, read_record, run_stem

FORMATS = {"train": ".6f", "val": ".6f", "hella": ".4f"}  # as published; val has two digits more
OTHER_FORMAT = ".7g"  # a float32 to its last useful digit
CSV_HEADER = b"step,stream,value\n"

# Loss spike: a train loss more than SPIKE_MARGIN nats above the median of the SPIKE_WINDOW finite losses before it.
# A batch of 4,096 tokens scatters by less than 0.1 nat, so 0.5 is no sampling noise.
SPIKE_WINDOW = 128
SPIKE_MIN_HISTORY = 32
SPIKE_MARGIN = 0.5

# Diverged: the trainer said so, or the last val is not finite or this many nats above the run's own best.
DIVERGED_MARGIN = 1.0
UNFINISHED = 0.9  # a run that stopped before this part of its variant's longest run is not averaged with it


# ---------------------------------------------------------------------------------------------------------------------
# Names


def log_path(logs_dir, name, run_id, seed):
    """The path of a run's log."""
    return Path(logs_dir) / f"log_{run_stem(name, run_id, seed)}.txt"


def parse_path(path):
    """(name, run_id, seed) of a log or of its thinned CSV; the inverse of `log_path`."""
    path = Path(path)
    parts = parse_stem(path.stem.removeprefix("log_"))
    if not parts or not path.name.startswith("log_") or path.suffix not in (".txt", ".csv"):
        raise UserError(f"{path} is not named like a log: log_<name>_<run_id>_seed_<seed>.txt")
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read(path):
    """{stream: (steps int64, values float64)} of a log or a thinned CSV.

    A last line without its end is a write that was killed, and is left out. Any other malformed line is a UserError.
    """
    data = Path(path).read_bytes()
    data = data[: data.rfind(b"\n") + 1]
    if data.startswith(CSV_HEADER):
        data = data[len(CSV_HEADER) :].replace(b",", b" ")
    fields = data.split()
    # If every line has three fields, slices are columns; a line that has not puts a stream's name among the numbers.
    try:
        if len(fields) != 3 * data.count(b"\n"):
            raise ValueError
        steps = np.array(fields[0::3], dtype="S").astype(np.int64)
        values = np.array(fields[2::3], dtype="S").astype(np.float64)
    except ValueError:
        raise _malformed(path) from None
    codes = {}
    streams = np.array([codes.setdefault(name, len(codes)) for name in fields[1::3]], dtype=np.int64)
    return {name.decode(): (steps[streams == code], values[streams == code]) for name, code in codes.items()}


def _malformed(path):
    with open(path, "rb") as f:
        for number, line in enumerate(f, start=1):
            fields = line.replace(b",", b" ").split()
            try:
                int(fields[0]), float(fields[2])
                if len(fields) != 3:
                    raise ValueError
            except (ValueError, IndexError):
                if number > 1 or line != CSV_HEADER:
                    break
    shown = line[:60].decode(errors="replace").strip()
    return UserError(f"{path}, line {number}: {shown!r} is not `step stream value`; remove or mend that line")


class Run(NamedTuple):
    name: str
    run_id: str
    seed: int
    streams: dict  # {stream: (steps, values)}
    meta: dict  # the .json beside the log, {} where there is none
    path: Path


def load_run(path):
    path = Path(path)
    return Run(*parse_path(path), read(path), read_record(path), path)


def load_runs(folder):
    """Every run under `folder`, in order of name and seed. Of a run's log and thinned CSV side by side, the log."""
    paths = [path for kind in ("csv", "txt") for path in sorted(Path(folder).rglob(f"log_*.{kind}"))]
    runs = [load_run(path) for path in {path.with_suffix(""): path for path in paths}.values()]
    return sorted(runs, key=lambda run: (run.name, run.run_id, run.seed))


def load_published(path):
    """The runs of `results/published/curves.csv`, as `load_runs` gives ours."""
    import pandas as pd  # here and below: the trainer imports this file, and needs no pandas

    if not Path(path).exists():
        return []
    runs = []
    for (name, run_id, seed), rows in pd.read_csv(path, dtype={"run_id": str}).groupby(["variant", "run_id", "seed"]):
        parts = {stream: rows.dropna(subset=stream) for stream in ("val", "hella")}
        streams = {stream: (part.step.to_numpy(), part[stream].to_numpy()) for stream, part in parts.items()}
        runs.append(Run(name, run_id, int(seed), streams, {"tokens_per_step": 524_288}, Path(path)))
    return runs


# ---------------------------------------------------------------------------------------------------------------------
# Judging a run


def is_spike(history, loss):
    """Is `loss` a spike after the losses `history`? The caller keeps the last SPIKE_WINDOW finite ones, as floats."""
    if len(history) < SPIKE_MIN_HISTORY or not math.isfinite(loss):
        return False
    return loss > float(np.median(history[-SPIKE_WINDOW:])) + SPIKE_MARGIN


def spike_steps(streams):
    """The steps at which a loss spike begins; steps of one excursion in a row count once.

    Taken from the `spike` stream; computed from `train`, by the same rule, for logs that have none.
    """
    if "spike" in streams or "train" not in streams:
        steps, flags = streams.get("spike", (np.zeros(0, np.int64), np.zeros(0)))
        steps = steps[flags > 0]
    else:
        import pandas as pd

        steps, losses = streams["train"]
        steps, losses = steps[np.isfinite(losses)], losses[np.isfinite(losses)]
        median = pd.Series(losses).rolling(SPIKE_WINDOW, min_periods=SPIKE_MIN_HISTORY).median().shift(1).to_numpy()
        steps = steps[losses > median + SPIKE_MARGIN]
    return steps[np.diff(steps, prepend=-2) > 1]


def died_at_start(streams):
    """True for a run that never got past step 0. One published run did that, and nobody noticed."""
    return max((steps[-1] for steps, _ in streams.values() if len(steps)), default=0) == 0


def diverged(streams):
    """True if the trainer logged it, or the last val is not finite or DIVERGED_MARGIN above the run's own best."""
    if "diverged" in streams:
        return True
    _, val = streams.get("val", (None, np.zeros(0)))
    return len(val) > 0 and not val[-1] <= np.nanmin(val) + DIVERGED_MARGIN


def up_to(streams, step):
    """The same streams without what came after `step`."""
    cut = {name: (steps[steps <= step], values[steps <= step]) for name, (steps, values) in streams.items()}
    return {name: columns for name, columns in cut.items() if len(columns[0])}


# ---------------------------------------------------------------------------------------------------------------------
# The table


def summary(paths, at_step=None):
    """A pandas.DataFrame with one row per variant, from logs, thinned CSVs or `Run`s.

    runs, diverged, died (never got past step 0), unfinished; then mean and standard deviation over the seeds of the
    *remaining* runs: what diverged is counted, not averaged. `step` is the smallest last step averaged; spikes are per
    run, over all runs. The other columns as in `table_of_runs`.
    """
    import pandas as pd

    rows = table_of_runs(paths, at_step)
    return pd.DataFrame([_row(name, group) for name, group in rows.groupby("name", sort=False)])


def table_of_runs(paths, at_step=None):
    """A pandas.DataFrame with one row per run, from logs, thinned CSVs or `Run`s.

    val, hella: last. best_val, best_hella: the best. tok_per_sec: median over all steps. max_vio, drop_frac: median
    over the last quarter of the steps. With `at_step`, logs are read only as far as that step, and a run that has no
    val there is unfinished.
    """
    import pandas as pd

    runs = [run if isinstance(run, Run) else load_run(run) for run in paths]
    return pd.DataFrame([_measure(run, at_step) for run in runs], columns=[*_COLUMNS])


_COLUMNS = (
    *("name", "seed", "state", "step", "val", "best_val", "hella", "best_hella"),
    *("spikes", "tok_per_sec", "max_vio", "drop_frac"),
)


def _measure(run, at_step):
    streams = run.streams if at_step is None else up_to(run.streams, at_step)
    last = {name: columns[1][-1] for name, columns in streams.items()}
    step = int(streams["val"][0][-1]) if "val" in streams else 0
    state = "died" if died_at_start(streams) else "diverged" if diverged(streams) else "ok"
    if state == "ok" and at_step is not None and step < at_step:
        state = "unfinished"
    return {
        "name": run.name,
        "seed": run.seed,
        "state": state,
        "step": step,
        "val": last.get("val", np.nan),
        "best_val": np.nanmin(streams["val"][1]) if "val" in streams else np.nan,
        "hella": last.get("hella", np.nan),
        "best_hella": np.nanmax(streams["hella"][1]) if "hella" in streams else np.nan,
        "spikes": len(spike_steps(streams)),
        "tok_per_sec": np.median(streams["tok_per_sec"][1]) if "tok_per_sec" in streams else np.nan,
        "max_vio": _last_quarter(streams, "max_vio"),
        "drop_frac": _last_quarter(streams, "drop_frac"),
    }


def _last_quarter(streams, name):
    steps, values = streams.get(name, (np.zeros(0), np.zeros(0)))
    return np.median(values[steps >= 0.75 * steps[-1]]) if len(values) else np.nan


def _row(name, group):
    state = group.state.copy()
    state[(state == "ok") & (group.step < UNFINISHED * group.step.max())] = "unfinished"
    good = group[state == "ok"]
    row = {"variant": name, "runs": len(group)}
    row |= {what: int((state == what).sum()) for what in ("diverged", "died", "unfinished")}
    row["step"] = int(good.step.min()) if len(good) else int(group.step.max())
    for column in ("val", "best_val", "hella", "best_hella"):
        row |= {f"{column}_mean": good[column].mean(), f"{column}_std": good[column].std()}
    row["spikes"] = group.spikes.mean()
    return row | {column: good[column].mean() for column in ("tok_per_sec", "max_vio", "drop_frac")}


def format_summary(table):
    """The table as text: mean±std in one column; a dash where there is nothing."""
    shown = table[["variant", "runs", "diverged", "died", "unfinished", "step"]].copy()
    for column, digits in (("val", 4), ("best_val", 4), ("hella", 4), ("best_hella", 4)):
        pairs = zip(table[f"{column}_mean"], table[f"{column}_std"], strict=True)
        shown[column] = [_mean_std(mean, std, digits) for mean, std in pairs]
    for column, digits in (("spikes", 1), ("tok_per_sec", 0), ("max_vio", 2)):
        shown[column] = ["-" if math.isnan(value) else f"{value:.{digits}f}" for value in table[column]]
    return shown.to_string(index=False)


def _mean_std(mean, std, digits):
    if math.isnan(mean):
        return "-"
    return f"{mean:.{digits}f}" + ("" if math.isnan(std) else f"±{std:.{digits}f}")


# ---------------------------------------------------------------------------------------------------------------------
# Curves for the figures

POINTS = 200  # kept of a stream that is logged every step
WHOLE = ("val", "hella")  # never thinned: a mean over a steep part is not on the curve


def thin(steps, values, points=POINTS):
    """At most `points` means over equal numbers of steps, each at the last step of its part."""
    if len(steps) <= 2 * points:
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
    per_step = run.meta.get("tokens_per_step")
    per_token = run.meta.get("flops_per_token") if axis == "flops" else 1
    return steps * float(per_step) * per_token if per_step and per_token else None


def band(runs, stream, axis="step"):
    """(x, mean, lowest, highest) over the runs of one variant, at the steps they all have; None without data."""
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


def crossing(x, values, target):
    """Where `values` first comes down to `target`, between the points by a straight line; nan if it never does."""
    below = np.flatnonzero(np.asarray(values) <= target)
    if not len(below):
        return math.nan
    i = below[0]
    return float(x[i] if i == 0 else np.interp(-target, [-values[i - 1], -values[i]], [x[i - 1], x[i]]))


# ---------------------------------------------------------------------------------------------------------------------
# Keeping results small

EVENTS = ("spike", "skipped", "diverged")


def to_csv(path, out):
    """Write the log `path` as a CSV of some ten KB: `step,stream,value`, which `read` reads too.

    val, hella, the expert loads and events are kept whole, the clock (`hours`) where val is; a stream logged every step
    is thinned to POINTS means.
    """
    lines = []
    streams = read(path)
    val_steps = streams["val"][0] if "val" in streams else np.zeros(0, np.int64)
    for name, (steps, values) in streams.items():
        if name in EVENTS:
            steps, values = steps[values > 0], values[values > 0]
        elif name == "hours":
            keep = np.isin(steps + 1, val_steps)  # `hours` of update s - 1 is when val of step s is measured
            steps, values = steps[keep], values[keep]
        elif name not in WHOLE and not name.startswith("load_"):
            steps, values = thin(steps, values)
        form = FORMATS.get(name, ".5g")
        lines += [f"{step},{name},{value:{form}}\n" for step, value in zip(steps, values, strict=True)]
    with atomic_write(out, "w") as f:
        f.writelines([CSV_HEADER.decode(), *lines])


def published_curves(folder, out):
    """Write val and hella of every log in `folder` as one CSV, a line for each step that has either."""
    lines = []
    for path in sorted(Path(folder).glob("log_*.txt")):
        name, run_id, seed = parse_path(path)
        streams = read(path)
        val, hella = (dict(zip(*streams.get(stream, ((), ())), strict=True)) for stream in ("val", "hella"))
        for step in sorted({*val, *hella}):
            pair = [f"{column[step]:.4f}" if step in column else "" for column in (val, hella)]
            lines.append(",".join([name, run_id, str(seed), str(step), *pair]) + "\n")
    if not lines:
        raise UserError(f"no log_*.txt in {folder}: unpack the published logs there")
    with atomic_write(out, "w") as f:
        f.writelines(["variant,run_id,seed,step,val,hella\n", *lines])


@dataclass
class Args:
    paths: tyro.conf.Positional[tuple[str, ...]] = ()  # logs or thinned CSVs
    at_step: int | None = None  # judge the runs at this step; default: at the last step of each
    thin: str | None = None  # write a small CSV per log into this folder instead of the table
    published: str | None = None  # folder with the unpacked published logs; writes --out and nothing else
    out: str = "results/published/curves.csv"  # where --published goes


def main():
    args = common.parse(Args)
    if args.published:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        return published_curves(args.published, args.out)
    missing = next((path for path in args.paths if not Path(path).is_file()), None)
    if missing or not args.paths:
        raise UserError(f"no such log: {missing}" if missing else "no logs given: python runlog.py logs/log_*.txt")
    if not args.thin:
        return print(format_summary(summary(args.paths, args.at_step)))
    Path(args.thin).mkdir(parents=True, exist_ok=True)
    for path in map(Path, args.paths):
        to_csv(path, Path(args.thin) / f"{path.stem}.csv")
        if path.with_suffix(".json").exists():
            (Path(args.thin) / f"{path.stem}.json").write_text(path.with_suffix(".json").read_text())


if __name__ == "__main__":
    common.run(main)
