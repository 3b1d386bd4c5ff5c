"""Reads the logs of runs, says how each run ended, and puts runs of equal settings together (logger.py writes logs).

    python runlog.py logs                                        # a table of every log in a folder, a row per group
    python runlog.py logs/log_moe_*.txt --at_step 25250          # of these logs, at one step
    python runlog.py logs --base no_moe                          # with effective speedups over those runs (curves.py)
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
        aux_loss, z_loss, ...     router losses that are on (ROUTER_LOSSES in model.py), unweighted, sum over layers
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

A group is the runs of one name whose settings differ in nothing but the seeds; identity.py says which settings count.
Logs from before runs had an identity are grouped by the settings they recorded, logs without a JSON by their name.
"""

import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

import common
import curves
from common import NotNegative, UserError, atomic_write
from curves import WHOLE, thin
from identity import PUBLISHED, identity, name_part, parse_stem, read_record, run_stem

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
# that learn end at 0.27 to 0.35.
STUCK_PART = 0.42
STUCK_MIN_STEPS = 1000  # a shorter run may simply not have had the time
UNFINISHED = 0.9  # unfinished: the run stopped before this part of the longest run of its group
STATES = ("ok", "diverged", "stuck", "regressed", "died", "unfinished")

SEEDS = ("seed", "data_seed")  # the settings in which the runs of a group may differ


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


# ---------------------------------------------------------------------------------------------------------------------
# Settings and groups


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


def group_key(run):
    """Equal for the runs of one group: same name, same settings but for the seeds, same changes on resume."""
    if run.settings is None:
        return run.name, None
    return run.name, identity(run.settings | {"changes": run.meta.get("changes") or None}, without=SEEDS)


def group(runs):
    """[runs of one group, ...] in the order of their first run."""
    groups = {}
    for run in runs:
        groups.setdefault(group_key(run), []).append(run)
    return list(groups.values())


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
    """For each group, as text, the settings that differ from the other groups of its name; "" if it is alone."""
    texts = {}
    for name in dict.fromkeys(runs[0].name for runs in groups):
        mine = [i for i, runs in enumerate(groups) if runs[0].name == name]
        for i, found in zip(mine, differing([groups[i][0].settings for i in mine]), strict=True):
            texts[i] = describe_group(groups[i][0], found) if len(mine) > 1 else ""
    return [texts[i] for i in range(len(groups))]


def describe_group(run, settings):
    """Settings as text: `max_lr 0.016, stride 1`; and the steps at which the run was resumed with other ones."""
    if run.settings is None:
        return "no settings recorded"
    words = [name_part(*pair).replace("_" + str(pair[1]), " " + str(pair[1])) for pair in settings.items()]
    return ", ".join([*words, *(f"changed at step {change['step']}" for change in run.meta.get("changes", []))])


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


def at_end(run):
    """True if the last val is that of the end of the run's schedule: at max_steps, or at max_minutes of training."""
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


# ---------------------------------------------------------------------------------------------------------------------
# The table


def summary(paths, at_step=None):
    """A pandas.DataFrame with one row per group, from logs, thinned CSVs, folders or `Run`s.

    variant: the name; settings: those that differ from the other groups of that name; runs, and how many of them
    ended in each of the STATES but "ok". Then mean and standard deviation over the runs that are ok: the others are
    counted, not averaged. `step` is the smallest last step averaged; spikes are per run, over all runs, nan where a run
    does not tell. The other columns as in `table_of_runs`.
    """
    import pandas as pd

    groups = group(as_runs(paths))
    rows = [_row(runs, text, at_step) for runs, text in zip(groups, tell_apart(groups), strict=True)]
    return pd.DataFrame(rows)


def table_of_runs(paths, at_step=None):
    """A pandas.DataFrame with one row per run, from logs, thinned CSVs, folders or `Run`s.

    val, hella: last. best_val, best_hella: the best. tok_per_sec: median over all steps. max_vio, drop_frac: median
    over the last quarter of the steps. nan for a stream that the log does not have. With `at_step`, logs are read only
    as far as that step, and a run that has no val there is unfinished.
    """
    import pandas as pd

    return pd.DataFrame([_measure(run, at_step) for run in as_runs(paths)], columns=[*_COLUMNS])


def as_runs(paths):
    """Runs as they are, anything else through load_runs()."""
    if isinstance(paths, (str, Path)):
        return load_runs(paths)
    return list(paths) if all(isinstance(path, Run) for path in paths) else load_runs(paths)


_COLUMNS = (
    *("name", "run_id", "seed", "state", "step", "val", "best_val", "hella", "best_hella"),
    *("spikes", "tok_per_sec", "max_vio", "drop_frac"),
)


def _measure(run, at_step):
    if at_step is not None:
        run = run._replace(streams=up_to(run.streams, at_step))
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
        "drop_frac": _last_quarter(streams, "drop_frac"),
    }


def _of(streams, name, measure):
    return float(measure(streams[name][1])) if name in streams else math.nan


def _last_quarter(streams, name):
    steps, values = streams.get(name, (np.zeros(0), np.zeros(0)))
    return np.median(values[steps >= 0.75 * steps[-1]]) if len(values) else math.nan


def _row(runs, settings, at_step):
    table = table_of_runs(runs, at_step)
    state = table.state.copy()
    state[state.isin(("ok", "stuck")) & (table.step < UNFINISHED * table.step.max())] = "unfinished"
    good = table[state == "ok"]
    row = {"variant": runs[0].name, "settings": settings, "runs": len(table)}
    row |= {word: int((state == word).sum()) for word in STATES[1:]}
    row["step"] = int(good.step.min()) if len(good) else int(table.step.max())
    for column in ("val", "best_val", "hella", "best_hella"):
        row |= {f"{column}_mean": good[column].mean(), f"{column}_std": good[column].std()}
    row["spikes"] = table.spikes.mean(skipna=False)
    return row | {column: good[column].mean() for column in ("tok_per_sec", "max_vio", "drop_frac")}


def add_speedups(table, runs, name):
    """(summary(runs) with columns of the effective speedup over the runs called `name`, the fit in words).

    curves.py has the formula. One value per pair of equal seeds, of runs that are ok and at the end of their schedule.
    """
    import pandas as pd

    if name not in (names := {run.name for run in runs}):
        raise UserError(f"--base {name}: no run of that name among {', '.join(sorted(names))}")
    finals = {run.path: run for run in runs if state_of(run) == "ok" and at_end(run) and "tokens_per_step" in run.meta}
    baselines = [run for run in finals.values() if run.name == name]
    points = [(end.spent["tokens"], end.loss) for end in map(curves.final, baselines)]
    try:
        check_baselines(baselines)
        law = curves.fit_power_law(points)
    except UserError as error:
        raise UserError(f"--base {name}: {error}") from None
    rows = []
    for members in group(runs):
        others = [run for run in members if run.path in finals and run.name != name]
        pairs = pd.DataFrame([curves.speedup_of_pair(run, baselines, law) for run in others])
        pairs = pairs.reindex(columns=curves.CURRENCIES)
        rows.append({f"x_{c}_mean": pairs[c].mean() for c in pairs} | {f"x_{c}_std": pairs[c].std() for c in pairs})
    fit = f"val = {law.limit:.4f} + {law.scale:.4g} / tokens ** {law.exponent:.4f}"
    lengths = len({tokens for tokens, _ in points})
    words = (
        f"x: effective speedup over {name} ({fit}, from {len(points)} runs of {lengths} lengths), one value per seed"
    )
    early = len(runs) - len(finals)
    words += f"; {early} runs that failed or are not at the end of their schedule are left out" if early else ""
    return table.join(pd.DataFrame(rows)), words


def check_baselines(runs):
    """UserError if runs of one length differ in their settings: a law is through one setting per length."""
    of_length = {}
    for members in group(runs):
        for tokens in {curves.final(run).spent["tokens"] for run in members}:
            of_length.setdefault(tokens, []).append(members[0])
    for tokens, found in of_length.items():
        names = [name for name in differing([run.settings for run in found])[0] if name != "parent"]
        if names:  # branches of several seeds differ in their parents alone
            raise UserError(
                f"its runs of {tokens:,.0f} tokens differ in {', '.join(names)}: name the logs of one setting"
            )


def format_summary(table):
    """The table as text: mean±std in one column, a dash where there is nothing; without columns that say nothing."""
    counts = [state for state in STATES[1:] if state == "diverged" or table[state].any()]
    shown = table[["variant", "runs", *counts, "step"]].copy()
    if table.settings.any():
        shown.insert(1, "settings", [shorten(text) for text in table.settings])
    speedups = [f"x_{currency}" for currency in curves.CURRENCIES if f"x_{currency}_mean" in table]
    for column in ("val", "best_val", "hella", "best_hella", *speedups):
        digits, pairs = (
            2 if column in speedups else 4,
            zip(table[f"{column}_mean"], table[f"{column}_std"], strict=True),
        )
        shown[column] = [
            dashed(mean, digits) + ("" if math.isnan(std) else f"±{std:.{digits}f}") for mean, std in pairs
        ]
    for column, digits in (("spikes", 1), ("tok_per_sec", 0), ("max_vio", 2)):
        shown[column] = [dashed(value, digits) for value in table[column]]
    return shown.to_string(index=False)


def dashed(value, digits):
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def shorten(settings, most=4):
    words = settings.split(", ")
    return ", ".join(words[:most]) + (f", {len(words) - most} more" if len(words) > most else "")


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
    at_step: NotNegative | None = None  # Step at which the runs are judged (default: the last of each)
    base: str | None = None  # Name of the baseline runs, of 3 lengths or more, for effective speedups
    thin: str | None = None  # Folder for a small CSV per log, written instead of the table
    published: str | None = None  # Folder with the unpacked published logs; writes --out and nothing else
    out: str = "results/published/curves.csv"  # File that --published writes


def show(runs, args):
    """The table as text, and what its speedups are."""
    table = summary(runs, args.at_step)
    if not args.base:
        return format_summary(table)
    table, words = add_speedups(table, runs, args.base)
    return f"{format_summary(table)}\n{words}"


def main():
    args = common.parse(Args)
    if args.published:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        return published_curves(args.published, args.out)
    if not args.paths:
        raise UserError("no logs given: name logs or a folder, e.g. python runlog.py logs")
    if args.base and (args.thin or args.at_step is not None):
        raise UserError("--base compares final values in the table: leave out --at_step and --thin")
    problems = []
    runs = load_runs(args.paths, problems.append)
    if not runs:
        raise UserError(str(problems[0]) if problems else f"no log_*.txt or log_*.csv in {' '.join(args.paths)}")
    if args.thin:
        thin_into(args.thin, runs)
    else:
        text = show(runs, args)
        encoding = sys.stdout.encoding or "utf-8"
        print(text if "±".encode(encoding, "ignore") else text.replace("±", " +- "))
    for problem in problems:
        warn(problem)


if __name__ == "__main__":
    common.run(main)
