"""What a run writes: its log file, the facts beside it, the terminal, Weights & Biases.

Rank 0 alone writes; on other ranks all of this does nothing. runlog.py has the format of the log and reads it.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import checks
import identity
import runlog
from lab import optim
from lab.common import UserError, atomic_write

# ---------------------------------------------------------------------------------------------------------------------
# The log file


class LogFull(UserError):
    """The log can no longer be written; the trainer saves a checkpoint, then ends with this error."""


class RunLog:
    """Appends to a log; every `write` reaches the operating system before it returns, so kill -9 loses no line."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - open for as long as the run lasts
        except OSError as error:
            raise UserError(f"cannot write the log {path}: {error.strerror}; choose another --logs_dir") from None

    def write(self, step, streams):
        """One line per stream; LogFull, with no half line left behind, where the disk is full."""
        form = runlog.FORMATS
        lines = [f"{step} {name} {float(x):{form.get(name, runlog.OTHER_FORMAT)}}\n" for name, x in streams.items()]
        data, end = "".join(lines).encode(), self.file.seek(0, os.SEEK_END)
        try:
            if self.file.write(data) != len(data):
                raise OSError(28, "No space left on device")
        except OSError as error:
            with contextlib.suppress(OSError):
                self.file.truncate(end)
            raise LogFull(
                f"cannot write the log {self.path}: {error.strerror}; free space, then --resume auto"
            ) from None

    def sync(self):
        """On disk, not only in the system's cache: a checkpoint must never be newer than the log that it continues."""
        with contextlib.suppress(OSError):
            os.fsync(self.file.fileno())

    def close(self):
        self.file.close()


def truncate(path, step):
    """Keep the whole lines of steps below `step`: a run resumed at `step` writes the others again.

    A line cut short by a kill is dropped, and so is whatever a power cut left after the last sync.
    """
    path = Path(path)
    if not path.exists():
        return
    with open(path, "rb") as f, atomic_write(path) as out:
        for line in f:
            fields = line.split()
            if line.endswith(b"\n") and len(fields) == 3 and fields[0].isdigit() and int(fields[0]) < step:
                out.write(line)


# ---------------------------------------------------------------------------------------------------------------------
# The facts beside the log


def git_commit():
    """Commit of the code, with -dirty when it differs from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def processor_name():
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return platform.processor() or platform.machine()


def describe_machine(device):
    """Facts that a measured number depends on."""
    on_cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else f"{device} ({processor_name()})",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "commit": git_commit(),
    }


def describe_run(args, settings, model, machine):
    """The JSON beside the log: it can be audited alone."""
    return {
        "identity": identity.identity(settings),
        "settings": settings,
        "changes": [],  # made on resume: {"step": the first with the new values, "settings": {name: value}}
        "args": dataclasses.asdict(args),
        "config": dataclasses.asdict(model.config),
        "params_total": model.num_params(),
        "params_active": model.num_active_params(),
        "flops_per_token": model.estimate_flops_per_token(args.T),
        "tokens_per_step": args.total_batch_size,
        "dtype": str(machine.dtype).removeprefix("torch."),
        "world_size": machine.world_size,
        **describe_machine(machine.device),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The terminal


class Console:
    """Rank 0's terminal: a bar with loss, tokens/s and time left, or a line per step where the output is a file."""

    def __init__(self, args, machine):
        self.silent = not machine.is_main
        self.as_bar = args.progress == "bar" or (args.progress == "auto" and sys.stderr.isatty())
        self.max_steps, self.bar = args.max_steps, None
        self.lost = False  # nobody reads any more: `| head`, a closed terminal, a full disk

    def say(self, text):
        if self.silent or self.lost:
            return
        try:
            tqdm.write(str(text)) if self.bar is not None else print(text, flush=True)
        except OSError:
            self.lost = True

    def start(self, step):
        if self.as_bar and not self.silent:
            self.bar = tqdm(total=self.max_steps, initial=step, unit="step", dynamic_ncols=True, mininterval=0.5)

    def bar_over(self, items, name):
        """`items`, with a bar of their own where they take longer than a second."""
        return tqdm(items, desc=name, unit="batch", delay=1, leave=False, disable=self.silent or not self.as_bar)

    def step(self, step, result, lr, seconds, tok_per_sec):
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {result.ce_loss:.3f}, {tok_per_sec:,.0f} tok/s", refresh=False)
            self.bar.update()
        else:
            self.say(
                f"step {step:6d} | loss {result.ce_loss:.6f} | lr {lr:.4e} | norm {result.grad_norm:.4f} | "
                f"dt {seconds * 1e3:.2f} ms | tok/s {tok_per_sec:,.0f}"
            )

    def warn_of_disk(self, error):
        self.say(
            f"warning: a checkpoint could not be written ({error}); training continues, older checkpoints are kept"
        )

    def close(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def duration(seconds):
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:,.0f} seconds" if seconds >= 1 else f"{1e3 * seconds:,.0f} ms"


@functools.cache
def matmul_rate():
    """FLOP/s of float32 products on this CPU, from 20 ms of them."""
    a, n = torch.ones(512, 512), 0
    a @ a  # starts the threads
    began = time.perf_counter()
    while time.perf_counter() - began < 0.02:
        a @ a
        n += 1
    return n * 2 * 512**3 / (time.perf_counter() - began)


def print_header(run):
    """What is about to run, on what, and on a CPU about how long it will take."""
    args, record, say, console = run.args, run.record, run.console.say, run.console
    say(f"{args.name}, seed {args.seed}: {record['params_total']:,} parameters, {record['params_active']:,} active")
    shape = f"{args.total_batch_size // (args.B * args.T)} micro-batches of {args.B} x {args.T}"
    say(f"{args.max_steps:,} steps of {args.total_batch_size:,} tokens ({shape})")
    say(f"data: {run.loader.describe()}")
    say(f"{record['device']}, {record['dtype']}, {record['world_size']} process(es), torch {record['torch']}")
    if run.machine.device.type == "cpu" and not console.silent:
        seconds = record["flops_per_token"] * args.total_batch_size / matmul_rate()
        left = seconds * (args.max_steps - run.progress.step)
        if left > 60:
            say(f"on this CPU at least {duration(seconds)} per step, {duration(left)} in all")
    for note in checks.notes(args):
        say(f"note: {note}")
    say(f"log: {run.log.path}; checkpoints: {run.folder if args.save_checkpoint else 'none'}")
    if run.progress.step >= args.max_steps:
        say(f"this run is finished ({run.progress.step} of {args.max_steps} steps): a higher --max_steps continues it")
    console.start(run.progress.step)


# ---------------------------------------------------------------------------------------------------------------------
# All of it together


class Log:
    """Rank 0's log file, the JSON beside it, and Weights & Biases when asked for."""

    def __init__(self, args, machine, path, record, progress):
        self.file = self.wandb = self.error = None
        self.path, self.unlogged = path, progress.unlogged
        if not machine.is_main:
            return
        if args.wandb:
            self.wandb = start_wandb(args, path.stem, record)
        truncate(path, progress.step)
        self.file = RunLog(path)
        if progress.step < args.max_steps or not path.with_suffix(".json").exists():
            with atomic_write(path.with_suffix(".json"), "w") as f:
                json.dump(record, f, indent=1)
        for step in sorted(self.unlogged):
            self.file.write(step, self.unlogged.pop(step))

    def write(self, step, streams):
        """A full disk is kept in `error`, and the lines for the next checkpoint: the run that continues writes them."""
        if self.wandb:
            self.wandb.log(streams, step=step)
        try:
            if self.file and not self.error:
                self.file.write(step, streams)
        except LogFull as error:
            self.error = error
        if self.error:
            self.unlogged.setdefault(step, {}).update(streams)

    def sync(self):
        if self.file:
            self.file.sync()

    def close(self):
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish()


def start_wandb(args, name, record):
    import wandb  # here: seconds to import, and few runs want it

    try:
        settings = wandb.Settings(init_timeout=30)
        return wandb.init(
            project=args.wandb_project, name=name, id=name, config=record, resume="allow", settings=settings
        )
    except Exception as error:  # a kind of its own for no login, no network, a bad project name
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = "run `wandb login`, or set WANDB_MODE=offline, or leave out --wandb"
        raise UserError(f"--wandb: {what}: {remedy}") from None


def record_step(run, result, lr, seconds):
    """Bring Progress up to date, write the log lines of the step, show it."""
    args, progress, step = run.args, run.progress, run.progress.step
    tok_per_sec = args.total_batch_size / seconds
    if step > run.first_step or not run.compiled:  # the first step of a compiled model compiles it
        progress.hours += seconds / 3600
    streams = step_streams(args, step, result, progress, lr) | {"tok_per_sec": tok_per_sec, "hours": progress.hours}
    progress.skipped += not result.applied
    progress.skipped_in_a_row = 0 if result.applied else progress.skipped_in_a_row + 1
    if math.isfinite(result.ce_loss):
        progress.history = [*progress.history, result.ce_loss][-runlog.SPIKE_WINDOW :]
    progress.step = step + 1
    run.log.write(step, streams)
    run.console.step(step, result, lr, seconds, tok_per_sec)
    run.stop.requested |= run.console.lost


def step_streams(args, step, result, progress, lr):
    """{stream: value} of one step, the clock apart; per layer where a validation is due, and in the last step."""
    streams = {"train": result.ce_loss, **result.losses, "lr": lr, "grad_norm": result.grad_norm}
    router = result.router
    if router:
        for stream, name in (("max_vio", "max_vio"), ("drop_frac", "drop_frac"), ("router_entropy", "entropy")):
            streams[stream] = sum(layer[name] for layer in router) / len(router)  # mean over the MoE layers
        streams["router_logit"] = max(layer["max_logit"] for layer in router)
        every = args.val_loss_every
        if every > 0 and (step % every == 0 or optim.is_over(step + 1, args, result.clock)):
            noise = ["noise_std"] if args.use_noisy_top_k else []
            streams |= layer_streams(router, ["max_vio", "drop_frac", "logit_std", *noise])
            streams |= {f"load_{layer['layer']}_{e}": load for layer in router for e, load in enumerate(layer["load"])}
    if runlog.is_spike(progress.history, result.ce_loss):
        streams["spike"] = 1
    if not result.applied:
        streams["skipped"] = progress.skipped + 1
    return streams


def val_streams(found):
    """{stream: value} of a train_single_gpu.Validation."""
    bits = {} if math.isnan(found.bpb) else {"val_bpb": found.bpb}
    return {"val": found.loss} | bits | layer_streams(found.router, ["max_vio", "drop_frac", "logit_std"], "val_")


def layer_streams(router, names, prefix=""):
    """{stream: value} of some of the statistics, per MoE layer."""
    return {f"{prefix}{name}_{layer['layer']}": layer[name] for name in names for layer in router}


def report_divergence(run, result, position):
    """Say so in the log, and leave beside it what is needed to replay the step. The last checkpoint stays as it is."""
    step, loss = run.progress.step, result.ce_loss
    run.log.write(step, {"train": loss, "grad_norm": result.grad_norm, "diverged": 1})
    run.console.say(f"diverged at step {step}: loss {loss}, gradient norm {result.grad_norm}")
    if not run.machine.is_main:
        return
    run.saver.wait()
    if run.folder.is_dir() and any(run.folder.glob("step_*")):
        remedy = "--resume auto --on_nonfinite skip drops such steps; a lower --max_lr needs --resume PATH and --run_id"
        run.console.say(f"the last checkpoint is kept in {run.folder}: {remedy}")
    else:
        run.console.say("there is no checkpoint: lower --max_lr, or raise --warmup_steps")
    with atomic_write(run.log.path.with_suffix(".diverged.json"), "w") as f:
        json.dump({"step": step, "loader": position, "loss": str(loss)}, f)
