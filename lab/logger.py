"""What a run writes: its folder, settings, log, console and tracker. Rank 0 alone writes.

What happens on resume:  `--resume FOLDER` takes the settings of its config.json; flags given beside it may change those
in runs.MAY_CHANGE, and the change is added to config.json with its step. Any other change, and other data, are refused.
The newest whole checkpoint is loaded, and the log is cut back to its step, so that no step stands in it twice.
`--resume auto` does the same for the folder of this name and seed, and starts it where it has no checkpoint.
`--branch FOLDER --name NEW` starts a new run from another run's settings, weights, optimizer and place in the data.
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

import torch
from tqdm import tqdm

from lab import checkpoint, runs
from lab.common import UserError, atomic_write, lock

# ---------------------------------------------------------------------------------------------------------------------
# The machine


def git_commit():
    """Commit of the code, with -dirty when it differs from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def describe_machine(device):
    """Facts that a measured number depends on, saved with every result."""
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
        self.opened, self.lost, self.last, self.resumed = contextlib.ExitStack(), False, {}, False

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
            self.opened.enter_context(lock(folder / "lock", "wait for it, or choose another --name"))
        is_there = (self.folder / "config.json").exists()
        used = is_there or (self.folder / "log.txt").exists() or checkpoint.newest(self.checkpoints)
        if used and not args.resume:
            remedy = f"--resume {self.folder} continues it, another --name starts anew"
            raise UserError(f"{self.folder} holds a run: {remedy}")
        if is_there:
            self.config = runs.read_config(self.folder)
            runs.check_unchanged(args, self.config, self.folder)
        elif used or args.resume not in ("", "auto"):
            raise UserError(f"{self.folder} has no config.json: no run to continue")

        # Continue from the run's own newest checkpoint, else from its parent's, else from the start: --resume auto
        # alone does so, and never over a log that is finished.
        source = self.checkpoints if checkpoint.newest(self.checkpoints) else args.branch
        if source:
            self.path, self.state = checkpoint.read(source, ("loader", "config", "step"))
        elif is_there and (args.resume != "auto" or self.is_finished()):
            raise UserError(f"{self.folder} has no checkpoint to continue from: delete the folder to start again")
        self.resumed = is_there and self.state is not None
        plain = ("step", "hours", "best", "loader", "config", "tokenizer")
        return args.name, self.state and {key: self.state[key] for key in plain}

    def is_finished(self):
        log = self.folder / "log.txt"
        return log.exists() and runs.at_end(runs.settings_of(self.config), runs.read_log(log))

    def locate(self):
        """The folders of the run, once rank 0 has given it a name. Every rank calls it."""
        self.folder = runs.folder_of(self.args)
        self.checkpoints = self.folder
        if self.args.checkpoint_dir:
            self.checkpoints = Path(self.args.checkpoint_dir, self.folder.name)

    def start(self, step, facts):
        """Write config.json, or add to it what has changed; cut the log back to `step`, open it, start the tracker."""
        if not self.is_main:
            return
        settings = dataclasses.asdict(self.args)
        if not self.resumed:
            parent = {"run": str(self.args.branch), "step": step} if self.args.branch else None
            self.config = {
                "name": self.args.name, "command": shlex.join(sys.argv), "settings": settings, **facts,
                "started": f"{datetime.now():%Y-%m-%dT%H:%M}", "tracker_id": secrets.token_hex(4), "parent": parent,
                "resumed": [],
            }
        else:
            if self.config["data"] != facts["data"]:
                raise UserError(f"{self.args.data_root} holds other data than {self.folder} was trained on")
            then = runs.settings_of(self.config)
            changed = {
                name: [then.get(name), value] for name, value in settings.items()
                if name not in ("resume", "branch", "logs_dir") and value != then.get(name)
            }
            self.config["resumed"].append({"step": step, "changed": changed})
        with atomic_write(self.folder / "config.json", "w") as f:
            json.dump(self.config, f, indent=1)
        self.cut_log(step)
        self.file = self.opened.enter_context(open(self.folder / "log.txt", "ab", buffering=0))  # noqa: SIM115
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
            self.opened.callback(self.tracker.finish)
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
        lines = [f"{step} {name} {float(value):{runs.FORMATS.get(name, '.7g')}}\n" for name, value in streams.items()]
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
            total = min(self.args.max_steps, self.args.stop_after or self.args.max_steps)
            self.bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True, mininterval=0.5)
            self.opened.callback(self.bar.close)
        if self.bar is None:
            self.say(f"step {step:6d} | loss {streams['train']:.6f} | {text}")
        else:
            self.bar.set_postfix_str(f"loss {streams['train']:.3f} | {text}", refresh=False)
            self.bar.update()

    def close(self):
        """End bar, tracker and log; give the folder back."""
        self.opened.close()
