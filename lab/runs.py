"""A run's folder: settings, log, console and tracker while it trains; reading it back; how it ended.

    logs/{name}_seed_{seed}/    config.json   log.txt   step_010000.pt ...   lock

What happens on resume:  `--resume FOLDER` takes the settings of its config.json; flags given beside it may change those
in MAY_CHANGE, and the change is added to config.json with its step. Any other change, and other data, are refused. The
newest whole checkpoint is loaded, and the log is cut back to its step, so that no step stands in it twice.
`--resume auto` does the same for the folder of this name and seed, and starts it where it has no checkpoint.
`--branch FOLDER --name NEW` starts a new run from another run's settings, weights, optimizer and place in the data.

A log holds a line `step stream value` for each value; docs/measuring.md lists the streams. Rank 0 alone writes.
"""

import contextlib
import dataclasses
import importlib
import inspect
import json
import os
import platform
import secrets
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lab import checkpoint
from lab.common import UserError, atomic_write, lock

SEEDS = ("seed", "data_seed")  # the settings in which the runs of a group differ
# Settings that cannot change what a run computes: not part of a group's identity.
UNCOUNTED = (
    "name", "logs_dir", "checkpoint_dir", "resume", "branch", "eval_only", "data_root", "stop_after", "yes", "tracker",
    "sample_from_model_every", "sample_prompt", "hellaswag_data", "save_checkpoint", "save_checkpoint_every",
    "keep_checkpoints", "keep_best", "device", "compile_on_cpu", "use_compile", "recompute", "fsdp", "dist_timeout",
)
# Settings that may change when a run is resumed: it is then still the same run.
MAY_CHANGE = (
    *UNCOUNTED, "max_steps", "max_minutes", "B", "dtype", "val_loss_every", "hellaswag_every", "hellaswag_limit",
)
FORMATS = {"train": ".6f", "val": ".6f", "val_bpb": ".6f", "hella": ".4f", "hella_bpb": ".6f"}  # as published; else .7g
EVALUATIONS = ("val", "val_bpb", "hella", "hella_bpb")

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
    settings = settings_of(config)
    hours = log.value[log.stream == "hours"]
    in_time = settings["max_minutes"] and len(hours) and 60 * hours.iloc[-1] >= settings["max_minutes"]
    return "ok" if in_time or last_step >= settings["max_steps"] - (not len(val)) else "unfinished"


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


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def git_commit():
    """Commit of the code, with -dirty when it differs from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def describe_machine(device):
    """Facts that a measured number depends on, saved with every result."""
    import torch  # compare.py reads runs without it

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        name = f"{name} ({cpu})" if device.type == "cpu" else name
    return {
        "device": name, "threads": torch.get_num_threads(), "torch": str(torch.__version__),
        "python": platform.python_version(), "commit": git_commit(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Writing


class Run:
    """Rank 0's folder, log, console and tracker of a run; on other ranks all of it does nothing."""

    def __init__(self, args, is_main):
        self.args, self.is_main = args, is_main
        self.folder = self.config = self.state = self.path = self.file = self.bar = self.tracker = None
        self.locks, self.lost, self.last = contextlib.ExitStack(), False, {}

    # -- opening

    def open(self):
        """Lock the folder and find what to continue from. Rank 0 alone calls it, before anything is built.

        Returns (name, plain values of the checkpoint to continue from, or None); its tensors are in `state`.
        """
        args = self.args
        kind = "no_moe" if args.n_exp == 1 else "moe"
        args.name = args.name or f"{kind}_{datetime.now():%Y%m%d-%H%M%S}"
        self.locate()
        for folder in {self.folder, self.checkpoints}:
            self.locks.enter_context(lock(folder / "lock", "wait for it, or choose another --name"))
        is_there = (self.folder / "config.json").exists()
        used = is_there or (self.folder / "log.txt").exists() or checkpoint.newest(self.checkpoints)
        if used and not args.resume:
            remedy = f"--resume {self.folder} continues it, another --name starts anew"
            raise UserError(f"{self.folder} holds a run: {remedy}")
        if is_there:
            self.config = read_config(self.folder)
            self.check_unchanged()
        elif used or args.resume not in ("", "auto"):
            raise UserError(f"{self.folder} has no config.json: no run to continue")
        source = args.branch if args.branch and not is_there else self.checkpoints
        if (args.branch and not is_there) or checkpoint.newest(self.checkpoints):
            self.path, self.state = checkpoint.read(source, ("loader", "config", "step"))
        elif is_there and args.resume != "auto":
            raise UserError(f"{self.folder} has no checkpoint yet: delete it and start again, or pass --resume auto")
        plain = ("step", "hours", "best", "loader", "config", "tokenizer")
        return args.name, self.state and {key: self.state[key] for key in plain}

    def locate(self):
        """The folders of the run, once rank 0 has given it a name. Every rank calls it."""
        self.folder = folder_of(self.args)
        self.checkpoints = self.folder
        if self.args.checkpoint_dir:
            self.checkpoints = Path(self.args.checkpoint_dir, self.folder.name)

    def check_unchanged(self):
        """Refuse to resume if a setting that defines the run changed."""
        then = settings_of(self.config)
        for field in dataclasses.fields(self.args):
            now = getattr(self.args, field.name)
            was = then.get(field.name, field.default)  # an older run lacks a newer setting
            if now != was and field.name not in MAY_CHANGE:
                raise UserError(
                    f"--{field.name} is {now}, and {self.folder} was made with {was}: leave the flag out, "
                    "or pass another --name"
                )

    def start(self, step, facts):
        """Write config.json, or add to it what has changed; cut the log back to `step`, open it, start the tracker."""
        if not self.is_main:
            return
        settings = dataclasses.asdict(self.args)
        if self.config is None or not self.state:
            parent = {"run": str(self.args.branch), "step": step} if self.args.branch else None
            self.config = {
                "name": self.args.name, "command": shlex.join(sys.argv), "settings": settings, **facts,
                "started": f"{datetime.now():%Y-%m-%dT%H:%M}", "tracker_id": secrets.token_hex(4), "parent": parent,
                "resumed": [],
            }
        else:
            if self.config["data"] != facts["data"]:
                raise UserError(f"{self.args.data_root} holds other data than {self.folder} was trained on")
            then = settings_of(self.config)
            changed = {
                name: [then.get(name), value] for name, value in settings.items()
                if name not in ("resume", "logs_dir") and value != then.get(name)
            }
            self.config["resumed"].append({"step": step, "changed": changed})
        with atomic_write(self.folder / "config.json", "w") as f:
            json.dump(self.config, f, indent=1)
        self.cut_log(step)
        self.file = open(self.folder / "log.txt", "ab", buffering=0)  # noqa: SIM115 - open as long as the run lasts
        if self.args.tracker:
            self.start_tracker()

    def cut_log(self, step):
        """Keep the whole lines of evaluations up to `step` excluded and of updates below it: the rest comes again."""
        path = self.folder / "log.txt"
        if not path.exists():
            return
        with open(path, "rb") as f, atomic_write(path) as out:
            for line in f:
                fields = line.split()
                if line.endswith(b"\n") and len(fields) == 3 and fields[0].isdigit() and int(fields[0]) < step:
                    out.write(line)

    def start_tracker(self):
        """wandb, trackio, swanlab: any module with init, log and finish."""
        try:
            self.tracker = importlib.import_module(self.args.tracker)
            wanted = {
                "project": "moe-lab", "name": self.folder.name, "config": self.config, "resume": "allow",
                "id": self.config["tracker_id"],
            }
            known = inspect.signature(self.tracker.init).parameters
            self.tracker.init(**{name: value for name, value in wanted.items() if name in known})
        except Exception as error:  # a kind of its own for no login, no network, no such module
            self.tracker = None
            raise UserError(f"--tracker {self.args.tracker}: {str(error) or type(error).__name__}") from None

    # -- while it runs

    def log(self, step, streams):
        """A line per stream; each call reaches the operating system before it returns, so that kill -9 loses no line.

        OSError where the disk is full: the last checkpoint stays, and a resumed run writes these lines again.
        """
        self.last |= streams
        if not self.is_main:
            return
        lines = [f"{step} {name} {float(value):{FORMATS.get(name, '.7g')}}\n" for name, value in streams.items()]
        data = "".join(lines).encode()
        if self.file.write(data) != len(data):
            raise OSError(28, "No space left on device", str(self.folder / "log.txt"))
        if self.tracker:
            self.tracker.log(streams, step=step)

    def sync(self):
        """Bring the log to disk: a checkpoint must never be newer than the log that it continues."""
        if self.is_main:
            os.fsync(self.file.fileno())

    def say(self, text):
        """Print; `lost` becomes True when nobody reads any more (`| head`, a closed terminal)."""
        if not self.is_main or self.lost:
            return
        try:
            tqdm.write(str(text)) if self.bar is not None else print(text, flush=True)
        except OSError:
            self.lost = True

    def show_step(self, step, streams, text):
        """A bar in a terminal, a line per step elsewhere."""
        if not self.is_main:
            return
        if self.bar is None and sys.stderr.isatty():
            self.bar = tqdm(total=self.args.max_steps, initial=step, unit="step", dynamic_ncols=True, mininterval=0.5)
        if self.bar is None:
            self.say(f"step {step:6d} | loss {streams['train']:.6f} | {text}")
        else:
            self.bar.set_postfix_str(f"loss {streams['train']:.3f} | {text}", refresh=False)
            self.bar.update()

    def close(self):
        """End bar, log and tracker; give the folder back."""
        if self.bar is not None:
            self.bar.close()
        if self.file:
            self.file.close()
        if self.tracker:
            self.tracker.finish()
        self.locks.close()
