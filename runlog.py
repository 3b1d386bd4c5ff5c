"""Reads the logs of runs and says how each run ended. logger.py writes logs, compare.py makes the table of them.

    python runlog.py logs                                        # a table of every log in a folder, a row per group
    python runlog.py logs/log_moe_*.txt --at_step 25250          # of these logs, at one step
    python runlog.py logs --baseline no_moe                      # differences to dense with intervals (compare.py)
    python runlog.py logs --thin results/small                   # a small CSV per run, to be kept
    python runlog.py --published FOLDER --out results/published/curves.csv

A log is text, append-only, one `step stream value` per line, named `log_{name}_{run_id}_seed_{seed}.txt`:

    0 val 10.999938
    0 hella 0.2560
    0 train 11.004575

The logs of swag2198/build-gpt2-moe have the same form. Beside a log lies `{stem}.json` with settings, identity,
versions and FLOPs per token of the run. The streams:

    after s updates, at validations
        val                       cross-entropy of the val split, nats per token; no router loss in it
        val_bpb                   the same in bits per byte of text: comparable over tokenizers
        hella                     HellaSwag accuracy, by mean loss over an ending's tokens (acc_norm)
        hella_bpb                 loss of HellaSwag's right endings, bits per byte, mean over examples
        val_max_vio_{layer}       max_vio of one layer over the val batches; so are the next two
        val_drop_frac_{layer}     choices dropped, fraction
        val_logit_std_{layer}     standard deviation of the router logits
    of the update numbered s, at every step
        train                     cross-entropy, nats per token, mean over the step's batch
        aux_loss, z_loss, ...     router losses that are on (ROUTER_LOSSES in moe.py), unweighted, sum over layers
        output_z_loss             mean squared logsumexp of the output logits, where it is on
        lr, grad_norm             learning rate; norm of the gradient before clipping
        max_vio                   load of the busiest expert / mean load - 1, mean over layers; 0 is balanced
        drop_frac                 choices dropped because an expert was full, fraction, mean over layers
        router_entropy            entropy of the router's softmax, nats, mean over tokens and layers
        router_logit              largest |router logit| of all layers, with noise
        tok_per_sec, hours        tokens per second of the step; hours of training so far, evaluation excluded
    of the update numbered s, where a validation is due
        load_{layer}_{expert}     fraction of the layer's choices that went to the expert
        max_vio_{layer}           max_vio and drop_frac of one layer
        drop_frac_{layer}
        logit_std_{layer}         standard deviation over the experts of the router logits without noise
        noise_std_{layer}         the same of the noise, with use_noisy_top_k
    of the update numbered s, where it happens
        spike                     1: train was SPIKE_MARGIN above the median of the steps before it
        skipped                   the update was dropped for a loss or gradient that is not finite; how many so far
        diverged                  1: the run ended for such a loss or gradient
"""

import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

from curves import WHOLE, thin
from identity import PUBLISHED, parse_stem, read_record, run_stem
from lab import common
from lab.common import NotNegative, UserError, atomic_write

# train and hella as published, val with two digits more
FORMATS = {"train": ".6f", "val": ".6f", "val_bpb": ".6f", "hella": ".4f", "hella_bpb": ".6f"}
OTHER_FORMAT = ".7g"  # a float32 to its last useful digit
CSV_HEADER = b"step,stream,value\n"

# Loss spike: a train loss more than SPIKE_MARGIN nats above the median of the SPIKE_WINDOW finite losses before it.
# A batch of 4,096 tokens scatters by less than 0.1 nat, so 0.5 is no sampling noise.
SPIKE_WINDOW = 128
SPIKE_MIN_HISTORY = 32
SPIKE_MARGIN = 0.5

# How a run ended. Only runs that are "ok" are averaged; the others are counted.
DIVERGED_MARGIN = 1.0  # diverged: the trainer said so, or the last val is not finite or this far above the run's best
REGRESSED_MARGIN = 0.1  # regressed: the last val is this far above the run's best; healthy published runs: below 0.035
# stuck: a run from scratch whose val never fell below this part of its first val. A model that knows only which token
# follows which stands at 0.44 of it on bytes of English prose (2.46 of 5.55 nats) and higher on GPT-2's tokens; runs
# that learn end at 0.27 to 0.37, short ones at too high rates anywhere up to the line.
STUCK_PART = 0.42
STUCK_MIN_STEPS = 1000  # a shorter run may simply not have had the time
UNFINISHED = 0.9  # unfinished: the run stopped before this part of the longest run of its group
STATES = ("ok", "diverged", "stuck", "regressed", "died", "unfinished")

PUBLISHED_AUX_LOSS = 0.12  # the least that the load-balance loss adds to a published val: 0.01 x 6 layers x 2
LOADS = ("max_vio", "worst_vio", "drop_frac", "val_drop")  # columns of table_of_runs


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

    An incomplete last line is a write that was killed, and is left out. Any other malformed line is a UserError.
    """
    data = Path(path).read_bytes()
    data = data[: data.rfind(b"\n") + 1]
    if data.startswith(CSV_HEADER):
        data = data[len(CSV_HEADER) :].replace(b",", b" ")
    fields = data.split()
    # If every line has three fields, slices are columns; a line with more or fewer shifts a stream's name into them.
    try:
        if len(fields) != 3 * data.count(b"\n"):
            raise ValueError
        steps = np.array(fields[0::3], dtype="S").astype(np.int64)
        values = np.array(fields[2::3], dtype="S").astype(np.float64)
        codes = {}
        streams = np.array([codes.setdefault(name, len(codes)) for name in fields[1::3]], dtype=np.int64)
        names = {name.decode(): code for name, code in codes.items()}
    except (ValueError, OverflowError):
        raise malformed(path) from None
    return {name: (steps[streams == code], values[streams == code]) for name, code in names.items()}


def malformed(path):
    """UserError that names the first line that is not `step stream value`."""
    with open(path, "rb") as f:
        for number, line in enumerate(f, start=1):
            if number == 1 and line == CSV_HEADER:
                continue
            if parse_line(line.replace(b",", b" ")) is None:
                break
    shown = line[:60].decode(errors="replace").strip()
    return UserError(f"{path}, line {number}: {shown!r} is not `step stream value`: fix or remove that line")


def parse_line(line):
    """(step, stream, value) of a line of a log, bytes; None for a malformed one."""
    try:
        step, stream, value = line.split()
        step, stream, value = int(step), stream.decode(), float(value)
    except ValueError:
        return None
    return (step, stream, value) if abs(step) < 2**63 else None


class Run(NamedTuple):
    name: str
    run_id: str
    seed: int
    streams: dict  # {stream: (steps, values)}
    meta: dict  # the JSON beside the log, {} where there is none
    path: Path

    @property
    def settings(self):
        return recorded_settings(self.meta)


def load_run(path):
    """The Run of one log or thinned CSV. UserError for a file that is not one, or whose JSON is damaged."""
    path = Path(path)
    parts, streams, meta = parse_path(path), read(path), read_record(path)
    try:
        recorded_settings(meta)
    except (TypeError, KeyError, AttributeError):
        raise UserError(
            f"{path.with_suffix('.json')} does not hold the settings of a run: restore it, or remove it"
        ) from None
    if "args" in meta and "train" in streams:  # logger.py logs every spike: a run without any had none
        first = streams["train"][0][:1]
        streams.setdefault("spike", (first, np.zeros(len(first))))
    return Run(*parts, streams, meta, path)


def find_logs(paths):
    """The logs and thinned CSVs among files and in folders; of a log and its CSV side by side, the log."""
    found = {}
    for path in map(Path, paths):
        if path.is_dir():
            for kind in ("csv", "txt"):
                found |= {log.with_suffix(""): log for log in sorted(path.rglob(f"log_*.{kind}"))}
        elif not path.is_file():
            raise UserError(f"no such log: {path}")
        elif path.suffix not in (".json", ".out", ".err", ".lock"):  # those lie beside logs
            found[path.with_suffix("") if path.suffix == ".txt" else path] = path
    return list(found.values())


def warn(problem):
    print(f"skipped: {problem}", file=sys.stderr)


def load_runs(paths, skip=warn):
    """Runs of logs, thinned CSVs and folders, ordered by name, run_id and seed.

    A log that cannot be read is left out, and so is a second copy of the same run; skip(problem) is called for each.
    """
    runs = []
    for path in find_logs([paths] if isinstance(paths, (str, Path)) else paths):
        try:
            run = load_run(path)
        except (UserError, OSError) as error:
            skip(error)
            continue
        same = next((i for i, other in enumerate(runs) if is_same_run(run, other)), None)
        if same is None:
            runs.append(run)
        else:
            skip(f"{run.path} is the same run as {runs[same].path}: it is counted once")
            runs[same] = run if run.path.suffix == ".txt" else runs[same]
    return sorted(runs, key=lambda run: (run.name, run.run_id, run.seed))


def is_same_run(a, b):
    """Whether two logs, in two folders, are of one run: equal names, equal settings, equal val as far as both go."""
    if a[:3] != b[:3] or not a.settings or a.settings != b.settings:
        return False
    (_, val_a), (_, val_b) = (run.streams.get("val", (None, np.zeros(0))) for run in (a, b))
    n = min(len(val_a), len(val_b))
    return n > 0 and np.array_equal(val_a[:n], val_b[:n], equal_nan=True)


def load_published(path):
    """The runs of `results/published/curves.csv`, as `load_runs` gives ours."""
    import pandas as pd  # here and below: the trainer imports this file, and needs no pandas

    if not Path(path).exists():
        return []
    runs, meta = [], {"tokens_per_step": PUBLISHED["total_batch_size"]}
    for (name, run_id, seed), rows in pd.read_csv(path, dtype={"run_id": str}).groupby(["variant", "run_id", "seed"]):
        parts = {stream: rows.dropna(subset=stream) for stream in ("val", "hella")}
        streams = {stream: (part.step.to_numpy(), part[stream].to_numpy()) for stream, part in parts.items()}
        runs.append(Run(name, run_id, int(seed), streams, meta, Path(path)))
    return runs


def without_aux_loss(run):
    """A published run with PUBLISHED_AUX_LOSS subtracted from val, if the load-balance loss is in it."""
    if "aux_loss" not in run.name or "val" not in run.streams:
        return run
    steps, val = run.streams["val"]
    return run._replace(streams=run.streams | {"val": (steps, val - PUBLISHED_AUX_LOSS)})


def recorded_settings(record):
    """{name: value} of the counted settings in the JSON beside a log, as they were at its end; None without any.

    A record from before runs had an identity gives its arguments, and its --data_root in place of the data.
    """
    if "settings" in record:
        changed = [change["settings"] for change in record.get("changes", [])]
        return {name: value for settings in (record["settings"], *changed) for name, value in settings.items()}
    if "args" not in record:
        return None
    args = record["args"]
    settings = {name: args[name] for name in PUBLISHED if name in args}
    settings |= {"dtype": record.get("dtype", args.get("dtype")), "data": args.get("data_root")}
    return settings | ({"block_size": None} if args.get("block_size") == args.get("T") else {})


# ---------------------------------------------------------------------------------------------------------------------
# Judging a run


def is_spike(history, loss):
    """Is `loss` a spike after the losses `history`? The caller keeps the last SPIKE_WINDOW finite ones, as floats."""
    if len(history) < SPIKE_MIN_HISTORY or not math.isfinite(loss):
        return False
    return loss > float(np.median(history[-SPIKE_WINDOW:])) + SPIKE_MARGIN


def spike_steps(streams):
    """The steps at which a loss spike begins (steps of one excursion in a row count once); None where it is not known.

    Taken from the `spike` stream. Logs without one are judged by the same rule from `train`, if they hold every step of
    it; means over steps, as a thinned CSV holds, say nothing about spikes.
    """
    if "spike" in streams:
        steps, flags = streams["spike"]
        steps = steps[flags > 0]
    elif "train" in streams and (np.diff(streams["train"][0]) == 1).all():
        import pandas as pd

        steps, losses = streams["train"]
        steps, losses = steps[np.isfinite(losses)], losses[np.isfinite(losses)]
        median = pd.Series(losses).rolling(SPIKE_WINDOW, min_periods=SPIKE_MIN_HISTORY).median().shift(1).to_numpy()
        steps = steps[losses > median + SPIKE_MARGIN]
    else:
        return None
    return steps[np.diff(steps, prepend=-2) > 1]


def died_at_start(streams):
    """True for a run that never got past step 0. One published run did that."""
    return max((steps[-1] for steps, _ in streams.values() if len(steps)), default=0) == 0


def diverged(streams):
    """True if the trainer logged it, or the last val is not finite or DIVERGED_MARGIN above the run's own best."""
    _, val = streams.get("val", (None, np.zeros(0)))
    return "diverged" in streams or (len(val) > 0 and not val[-1] <= lowest(val) + DIVERGED_MARGIN)


def stuck(run):
    """True for a run from scratch of STUCK_MIN_STEPS steps whose val never fell below STUCK_PART of its first."""
    steps, val = run.streams.get("val", (np.zeros(0, np.int64), np.zeros(0)))
    from_scratch = (run.settings or {}).get("init_from", "scratch") == "scratch"
    if not from_scratch or not len(val) or steps[0] != 0 or steps[-1] < STUCK_MIN_STEPS:
        return False
    return lowest(val) > STUCK_PART * val[0]


def regressed(streams):
    """True if the last val is REGRESSED_MARGIN above the run's own best."""
    _, val = streams.get("val", (None, np.zeros(0)))
    return len(val) > 0 and val[-1] > lowest(val) + REGRESSED_MARGIN


def state_of(run):
    """One of STATES, from the run alone: `unfinished` is for whoever knows how far the run should have got."""
    if died_at_start(run.streams):
        return "died"
    if diverged(run.streams):
        return "diverged"
    return "stuck" if stuck(run) else "regressed" if regressed(run.streams) else "ok"


def at_end(run, at_step=None):
    """True if the last val is that of the end of the run's schedule: at max_steps, or at max_minutes of training."""
    run = cut(run, at_step)
    settings, step = run.settings or {}, run.streams.get("val", ([0], None))[0][-1]
    last, hours = (column[-1] for column in run.streams.get("hours", ([0], [0.0])))
    in_time = step > last and 60 * hours >= (settings.get("max_minutes") or math.inf)
    return in_time or step >= settings.get("max_steps", math.inf)


def lowest(values):
    """The lowest finite value, nan without one."""
    values = values[np.isfinite(values)]
    return values.min() if len(values) else math.nan


def up_to(streams, step):
    """The same streams without the values after `step`."""
    cut = {name: (steps[steps <= step], values[steps <= step]) for name, (steps, values) in streams.items()}
    return {name: columns for name, columns in cut.items() if len(columns[0])}


def cut(run, at_step):
    """The run up to a step; whole for None."""
    return run if at_step is None else run._replace(streams=up_to(run.streams, at_step))


def table_of_runs(paths, at_step=None):
    """A pandas.DataFrame with one row per run, from logs, thinned CSVs, folders or `Run`s.

    val, hella: last. best_val, best_hella: the best. tok_per_sec: median over all steps. max_vio, drop_frac: median
    over the last quarter of the steps. worst_vio, val_drop: of the layer where it is largest, in the last validation.
    nan for a stream that the log does not have. With `at_step`, logs are read only as far as that step, and a run that
    has no val there is unfinished.
    """
    import pandas as pd

    return pd.DataFrame([_measure(run, at_step) for run in as_runs(paths)], columns=[*_COLUMNS])


def as_runs(paths):
    """Runs as they are, anything else through load_runs()."""
    if isinstance(paths, (str, Path)):
        return load_runs(paths)
    return list(paths) if all(hasattr(path, "streams") for path in paths) else load_runs(paths)


_COLUMNS = (
    *("name", "run_id", "seed", "state", "step", "val", "best_val", "hella", "best_hella"),
    *("spikes", "tok_per_sec", *LOADS),
)


def _measure(run, at_step):
    run = cut(run, at_step)
    streams, spikes = run.streams, spike_steps(run.streams)
    step = int(streams["val"][0][-1]) if "val" in streams else 0
    state = state_of(run)
    if state in ("ok", "stuck") and at_step is not None and step < at_step:
        state = "unfinished"
    return {
        "name": run.name,
        "run_id": run.run_id,
        "seed": run.seed,
        "state": state,
        "step": step,
        "val": _of(streams, "val", lambda val: val[-1]),
        "best_val": _of(streams, "val", lowest),
        "hella": _of(streams, "hella", lambda hella: hella[-1]),
        "best_hella": _of(streams, "hella", max),
        "spikes": math.nan if spikes is None else len(spikes),
        "tok_per_sec": _of(streams, "tok_per_sec", np.median),
        "max_vio": _last_quarter(streams, "max_vio"),
        "worst_vio": _worst(streams, "val_max_vio_"),
        "drop_frac": _last_quarter(streams, "drop_frac"),
        "val_drop": _worst(streams, "val_drop_frac_"),
    }


def _of(streams, name, measure):
    return float(measure(streams[name][1])) if name in streams else math.nan


def _worst(streams, prefix):
    return max(
        (float(values[-1]) for name, (_, values) in streams.items() if name.startswith(prefix)), default=math.nan
    )


def _last_quarter(streams, name):
    steps, values = streams.get(name, (np.zeros(0), np.zeros(0)))
    return np.median(values[steps >= 0.75 * steps[-1]]) if len(values) else math.nan


# ---------------------------------------------------------------------------------------------------------------------
# Keeping results small

EVENTS = ("skipped", "diverged")


def to_csv(path, out):
    """Write the log `path` as a CSV of some ten KB: `step,stream,value`, which `read` reads too.

    val, hella, the expert loads and events are kept whole, the clock (`hours`) where val is; a stream logged every step
    is thinned to POINTS means. `spike` begins with a 0 at the first step where the spikes of the run are known.
    """
    lines = []
    streams = load_run(path).streams
    val_steps = streams["val"][0] if "val" in streams else np.zeros(0, np.int64)
    if (spikes := spike_steps(streams)) is not None:
        first = min(steps[0] for steps, _ in streams.values())
        spikes = streams["spike"][0][streams["spike"][1] > 0] if "spike" in streams else spikes
        streams["spike"] = np.array([first, *spikes]), np.array([0, *np.ones_like(spikes)])
    for name, (steps, values) in streams.items():
        if name in EVENTS:
            steps, values = steps[values > 0], values[values > 0]
        elif name == "hours":
            keep = np.isin(steps + 1, val_steps)  # `hours` of update s - 1 is when val of step s is measured
            steps, values = steps[keep], values[keep]
        elif name not in (*WHOLE, "spike") and not name.startswith("load_"):
            steps, values = thin(steps, values)
        form = FORMATS.get(name, ".5g")
        lines += [f"{step},{name},{value:{form}}\n" for step, value in zip(steps, values, strict=True)]
    with atomic_write(out, "w") as f:
        f.writelines([CSV_HEADER.decode(), *lines])


def thin_into(folder, runs):
    """A CSV of every run in `folder`, and the JSON beside its log."""
    common.check_writable(folder, "--thin")
    for run in runs:
        if "max_steps" in (run.settings or {}) and state_of(run) == "ok" and not at_end(run):
            print(f"{run.path} has not reached the end of its schedule", file=sys.stderr)
        out = Path(folder) / f"{run.path.stem}.csv"
        to_csv(run.path, out)
        record = run.path.with_suffix(".json")
        if record.exists() and record.resolve() != out.with_suffix(".json").resolve():
            shutil.copyfile(record, out.with_suffix(".json"))


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
    paths: tyro.conf.Positional[tuple[str, ...]] = ()  # Logs, thinned CSVs, and folders that hold them
    baseline: str | None = None  # Variant or log name, with settings if several fit: no_moe,max_steps=2596
    at_step: NotNegative | None = None  # Step at which the runs are judged (default: the last of each)
    thin: str | None = None  # Folder for a small CSV per log, written instead of the table
    published: str | None = None  # Folder with the unpacked published logs; writes --out and nothing else
    out: str = "results/published/curves.csv"  # File that --published writes


def main():
    args = common.parse(Args)
    if args.published:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        return published_curves(args.published, args.out)
    if not args.paths:
        raise UserError("no logs given: name logs or a folder, e.g. python runlog.py logs")
    problems = []
    runs = load_runs(args.paths, problems.append)
    if not runs:
        raise UserError(str(problems[0]) if problems else f"no log_*.txt or log_*.csv in {' '.join(args.paths)}")
    if args.thin and (args.baseline or args.at_step is not None):
        raise UserError("--thin writes logs and no table: leave out --baseline and --at_step")
    if args.thin:
        thin_into(args.thin, runs)
    else:
        import compare  # here: it imports this file, and torch

        text = compare.report(runs, args.baseline, args.at_step)
        encoding = sys.stdout.encoding or "utf-8"
        print(text if "±".encode(encoding, "ignore") else text.replace("±", " +- "))
    for problem in problems:
        warn(problem)


if __name__ == "__main__":
    common.run(main)
