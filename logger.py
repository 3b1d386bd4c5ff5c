"""What a run says: the terminal, its log file, Weights & Biases, and the facts beside the log.

Only rank 0 says anything; on other ranks all of this does nothing.
"""

import contextlib
import dataclasses
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import runlog
from common import atomic_write


class Console:
    """Rank 0's terminal: a bar with step, loss, tokens/s and time left, or a line a step where the output is a file."""

    def __init__(self, args, machine):
        self.silent = not machine.is_main
        self.as_bar = args.progress == "bar" or (args.progress == "auto" and sys.stderr.isatty())
        self.max_steps, self.bar = args.max_steps, None

    def say(self, text):
        if not self.silent:
            tqdm.write(str(text)) if self.bar is not None else print(text, flush=True)

    def start(self, step):
        if self.as_bar and not self.silent:
            self.bar = tqdm(total=self.max_steps, initial=step, unit="step", dynamic_ncols=True, mininterval=0.5)

    def step(self, step, result, lr, seconds, tok_per_sec):
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {result.ce_loss:.3f}, {tok_per_sec:,.0f} tok/s", refresh=False)
            self.bar.update()
        else:
            self.say(
                f"step {step:6d} | loss {result.ce_loss:.6f} | lr {lr:.4e} | norm {result.grad_norm:.4f} | "
                f"dt {seconds * 1e3:.2f} ms | tok/s {tok_per_sec:,.0f}"
            )

    def close(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Log:
    """Rank 0's log file, and Weights & Biases beside it when asked. On other ranks it does nothing."""

    def __init__(self, args, machine, path, start, about):
        self.file = self.wandb = None
        if not machine.is_main:
            return
        runlog.truncate(path, start)
        self.file = runlog.RunLog(path)
        with atomic_write(path.with_suffix(".json"), "w") as f:
            json.dump(about, f, indent=1)
        if args.wandb:
            import wandb  # here: seconds to import, and few runs want it

            names = {"project": args.wandb_project, "name": path.stem, "id": path.stem}
            self.wandb = wandb.init(**names, config=about, resume="allow")

    def write(self, step, streams):
        if self.file:
            self.file.write(step, streams)
        if self.wandb:
            self.wandb.log(streams, step=step)

    def sync(self):
        if self.file:
            self.file.sync()

    def close(self):
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish()


def git_commit():
    """Commit of the code, with -dirty when it differs from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def describe_run(args, model, machine):
    """What makes the log auditable alone: settings, sizes, versions, device, commit."""
    on_cuda = machine.device.type == "cuda"
    return {
        "args": dataclasses.asdict(args),
        "config": dataclasses.asdict(model.config),
        "params_total": model.num_params(),
        "params_active": model.num_active_params(),
        "flops_per_token": model.estimate_flops_per_token(args.T),
        "tokens_per_step": args.total_batch_size,
        "device": torch.cuda.get_device_name(machine.device) if on_cuda else f"{machine.device} ({platform.machine()})",
        "dtype": str(machine.dtype).removeprefix("torch."),
        "world_size": machine.world_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git_commit(),
    }


def print_header(args, about, data, log_path, say):
    say(f"{args.name}, seed {args.seed}: {about['params_total']:,} parameters, {about['params_active']:,} active")
    shape = f"{args.total_batch_size // (args.B * args.T)} micro-batches of {args.B} x {args.T}"
    say(f"{args.max_steps:,} steps of {args.total_batch_size:,} tokens ({shape})")
    say(f"data: {data}")
    say(f"{about['device']}, {about['dtype']}, {about['world_size']} process(es), torch {about['torch']}")
    say(f"log: {log_path}")
