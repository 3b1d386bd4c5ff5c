"""Reading runs: their folders, settings and logs, and how they ended. No torch: tables start at once.

    logs/{name}_seed_{seed}/    config.json   log.txt   step_010000.pt ...   lock

lab/logger.py writes them, and says what happens on resume. A log holds a line `step stream value` for each value;
docs/measuring.md lists the streams.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from lab.common import UserError

SEEDS = ("seed", "data_seed")  # the settings in which the runs of a group differ
# Settings that cannot change what a run computes: not part of a group's identity.
UNCOUNTED = (
    "name", "logs_dir", "checkpoint_dir", "resume", "branch", "eval_only", "data_root", "stop_after", "tracker",
    "sample_from_model_every", "hellaswag_data", "save_checkpoint", "save_checkpoint_every", "keep_checkpoints",
    "device", "use_compile", "activation_memory_budget", "recompute", "fsdp", "dist_timeout",
)
# Settings that may change when a run is resumed: it is then still the same run.
MAY_CHANGE = (
    *UNCOUNTED, "max_steps", "max_minutes", "B", "dtype", "val_loss_every", "hellaswag_every", "hellaswag_limit",
)
FORMATS = {"hella": ".4f"} | dict.fromkeys(("train", "val", "val_dropless", "val_bpb", "hella_bpb"), ".6f")  # else .7g
EVALUATIONS = ("val", "val_dropless", "val_bpb", "hella", "hella_bpb")

# ---------------------------------------------------------------------------------------------------------------------
# Finding and reading


def folder_of(args):
    """The folder of the run that these settings name."""
    named = args.resume not in ("", "auto")
    return Path(args.resume) if named else Path(args.logs_dir, f"{args.name}_seed_{args.seed}")


def find(paths):
    """Run folders, sorted: those given, those below given folders, and those of given log.txt files."""
    found = set()
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"no such folder: {path}")
        found |= {path.parent} if path.is_file() else {config.parent for config in path.rglob("config.json")}
    return sorted(folder for folder in found if (folder / "log.txt").exists())


def read_config(folder):
    """config.json as a dict; UserError where it is missing or damaged."""
    path = Path(folder, "config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config["settings"], dict):
            raise TypeError("its settings are no dict")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not describe a run ({type(error).__name__}: {error})") from None
    return config


def settings_of(config):
    """The settings of a run as they are now: those it began with, and what later resumes have changed."""
    settings = dict(config["settings"])
    for resumed in config["resumed"]:
        settings |= {name: new for name, (_, new) in resumed["changed"].items()}
    return settings


def check_unchanged(args, config, folder):
    """UserError if a setting that defines the run in `folder` is another one in `args`."""
    then = settings_of(config)
    for field in dataclasses.fields(args):
        now, was = getattr(args, field.name), then.get(field.name, field.default)  # an older run lacks newer settings
        if now != was and field.name not in MAY_CHANGE:
            remedy = "leave the flag out, or pass another --name or --logs_dir"
            raise UserError(f"--{field.name} is {now}, and {folder} was made with {was}: {remedy}")


def read_log(path):
    """log.txt, or that of a run folder, as a pandas.DataFrame of step, stream, value. The trainer needs no pandas.

    A last line cut short by a kill is left out.
    """
    import pandas as pd

    path = Path(path, "log.txt") if Path(path).is_dir() else Path(path)
    data = path.read_bytes()
    lines = data[: data.rfind(b"\n") + 1].decode(errors="replace").splitlines()
    table = pd.DataFrame([line.split(" ") for line in lines], columns=["step", "stream", "value"])
    return table.astype({"step": int, "stream": str, "value": float})


# ---------------------------------------------------------------------------------------------------------------------
# How a run ended. Runs that are "ok" are averaged, the others are counted.

SPIKE_WINDOW, SPIKE_MARGIN = 128, 0.5  # a train loss this far, in nats, above the median of so many before it
DIVERGED_MARGIN = 1.0  # diverged: the trainer said so, or the last val is this far above the run's best
REGRESSED_MARGIN = 0.1  # regressed: the last val is this far above the run's best
STUCK_PART = 0.95  # stuck: after STUCK_STEPS val is still above this part of what token pairs alone give
STUCK_STEPS = 1000


def state(config, log):
    """ok, unfinished, died, diverged, stuck or regressed, of a run's config (None: not known) and log."""
    val = log[log.stream == "val"]
    last_step = log.step.max() if len(log) else 0
    if (log.stream == "diverged").any():
        return "diverged"
    if last_step == 0:
        return "died"
    if len(val):
        last, best = val.value.iloc[-1], val.value.min()
        if not last <= best + DIVERGED_MARGIN:
            return "diverged"
        from_scratch = config is not None and config["settings"]["init_from"] == "scratch" and config["pair_loss"]
        if from_scratch and last_step >= STUCK_STEPS and best > STUCK_PART * config["pair_loss"]:
            return "stuck"
        if last > best + REGRESSED_MARGIN:
            return "regressed"
    if config is None:
        return "ok"
    return "ok" if at_end(settings_of(config), log) else "unfinished"


def at_end(settings, log):
    """Whether a log goes to max_steps, or to max_minutes of training."""
    hours = log.value[log.stream == "hours"]
    if settings["max_minutes"] and len(hours) and 60 * hours.iloc[-1] >= settings["max_minutes"]:
        return True
    last_step = settings["max_steps"] - (not (log.stream == "val").any())  # val of step s is measured after s updates
    return len(log) > 0 and bool(log.step.max() >= last_step)


def spike_steps(log):
    """The steps at which a loss spike begins; steps of one excursion in a row count once."""
    train = log[log.stream == "train"]
    before = train.value.rolling(SPIKE_WINDOW, min_periods=32).median().shift(1)
    steps = train.step[train.value > before + SPIKE_MARGIN].to_numpy()
    return steps[np.diff(steps, prepend=-2) > 1].tolist()


def pair_loss(train, val, vocab_size):
    """Nats per token of `val` by counted pairs of `train`, uint16 arrays: absolute discounting by 0.75 on top of single
    tokens. What a model knows that has learned which token follows which, and nothing else."""
    single = np.bincount(train, minlength=vocab_size) + 1.0
    pairs, counts = np.unique(train[:-1].astype(np.int64) * vocab_size + train[1:], return_counts=True)
    followed = np.bincount(train[:-1], minlength=vocab_size)
    kinds = np.bincount(pairs // vocab_size, minlength=vocab_size)  # of tokens that have followed
    wanted = val[:-1].astype(np.int64) * vocab_size + val[1:]
    place = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
    count = np.where(pairs[place] == wanted, counts[place], 0)
    seen = followed[val[:-1]]
    left = np.where(seen > 0, 0.75 * kinds[val[:-1]] / np.maximum(seen, 1), 1.0)  # for tokens that never followed
    p = np.maximum(count - 0.75, 0) / np.maximum(seen, 1) + left * single[val[1:]] / single.sum()
    return float(-np.log(p).mean())
