"""Variants x seeds (x learning rates): one run of train_single_gpu.py for each, here or on a SLURM cluster.

    python sweep.py --variants all --max_steps 5000 --dry_run                                # commands and cost
    python sweep.py --variants no_moe aux_only --jobs 2 --device cpu --max_steps 500         # two runs at a time
    python sweep.py --variants no_moe aux_only --gpus 0 1 2 3 --max_steps 5000               # one run per GPU
    python sweep.py --variants no_moe muon --rates 1e-3 2e-3 4e-3 --logs_dir logs/rates      # a run per rate, too
    python sweep.py --slurm slurm_partition=gpu timeout_min=1440 mem_gb=64 --max_steps 5000  # one SLURM job per run

Variants are rows of variants.py. Flags that are not listed below are settings of train_single_gpu.py for every run;
those of a variant and of --rates win over them. A run's folder is {logs_dir}/{variant}_seed_{seed}, with --rates
{variant}_lr_{rate}_seed_{seed}; what the run prints is in a file beside it, .out.

The same command again continues: finished and diverged runs are passed over, interrupted ones resume. A folder with a
run of other settings refuses the sweep before anything starts. Ctrl-C and SIGTERM let the running ones save first.
Exit code 2 if any run failed, after all others have had their turn.
"""

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lab import common
from lab.common import DIVERGED, DONE, INTERRUPTED, FiniteAboveZero, Positive, Seed, UserError

# isort: split
import torch

import train_single_gpu
from lab import checkpoint, data, optim, runs
from model import GPT
from variants import VARIANTS


@dataclass
class Args:
    variants: tuple[Literal[("all", *VARIANTS)], ...] = ("all",)  # Rows of variants.py
    seeds: tuple[Seed, ...] = (42, 2025, 1337)  # One run of every variant for each seed
    rates: tuple[FiniteAboveZero, ...] = ()  # One run for each peak learning rate: muon_lr with Muon, else max_lr
    data_per_seed: bool = False  # Each seed has its own order of the data, so that runs of equal seed are pairs
    gpus: tuple[str, ...] = ()  # GPUs that the runs share (default: all visible ones)
    jobs: Positive | None = None  # Runs at a time (default: one per GPU; one on a CPU, whose cores they share)
    slurm: tuple[str, ...] = ()  # Parameters of submitit, name=value: one SLURM job per run (cluster=local: processes)
    dry_run: bool = False  # Print commands, tokens, FLOPs and hours, and start nothing
    tok_per_sec: FiniteAboveZero | None = None  # Tokens per second of one run, for the hours of --dry_run


@dataclass
class Job:
    """One run of the sweep."""

    name: str
    args: train_single_gpu.Args
    command: list[str]
    folder: Path
    out: Path  # all that it prints; beside the folder, for a new run refuses a folder that is not empty
    state: str = "waiting"  # waiting, running, submitted, done, diverged, interrupted or failed
    step: int = 0  # the last in its log
    reason: str = ""  # why it failed


# ---------------------------------------------------------------------------------------------------------------------
# What to run


def plan(args, flags):
    """One Job per variant, rate and seed, from the trainer's flags for all; seed by seed, to compare early."""
    for flag in flags:
        if flag.partition("=")[0] in ("--seed", "--name", "--resume"):
            raise UserError(f"{flag}: the sweep sets it for each run, by --seeds and --variants; leave it out")
    shared = train_single_gpu.read_args(flags)  # refuses a wrong flag before anything starts

    names = list(VARIANTS) if "all" in args.variants else list(dict.fromkeys(args.variants))
    jobs = []
    for seed in dict.fromkeys(args.seeds):
        for rate in dict.fromkeys(args.rates) or [None]:
            jobs += [make_job(args, shared, flags, name, seed, rate) for name in names]
    if not jobs:
        raise UserError("nothing to run: --variants and --seeds need at least one value each")

    # two names of the same training would look like two results
    known = {}
    for job in jobs:
        same = known.setdefault(str(dataclasses.asdict(job.args) | {"name": ""}), job)
        if same is not job:
            raise UserError(f"{same.name} and {job.name} are the same run with these flags: leave out one of them")
    return jobs


def make_job(args, shared, flags, variant, seed, rate):
    """The run of one variant, seed and rate (None: the rate of the flags)."""
    settings, name = dict(VARIANTS[variant].settings), variant
    if rate is not None:
        optimizer = settings.get("optimizer", shared.optimizer)
        settings["muon_lr" if optimizer == "muon" else "max_lr"] = rate
        name = f"{variant}_lr_{rate:g}"
    settings |= {"seed": seed, "name": name, "resume": "auto"}
    settings |= {"data_seed": seed} if args.data_per_seed else {}
    try:
        run_args = dataclasses.replace(shared, **settings)
    except ValueError as error:
        raise UserError(f"{name}: --{error}") from None

    command = [sys.executable, train_single_gpu.__file__, *flags]
    for setting, value in settings.items():  # of two equal flags the last counts
        flag = f"--no_{setting}" if value is False else f"--{setting}"
        command += [flag] if isinstance(value, bool) else [flag, str(value)]
    folder = runs.folder_of(run_args)
    return Job(folder.name, run_args, command, folder, folder.with_name(f"{folder.name}.out"))


def look_at(job, fingerprint):
    """Take step and state of a job from its folder; UserError for a run of other settings, or of other data."""
    if not (job.folder / "log.txt").exists():
        return
    args, config, log = job.args, runs.read_config(job.folder), runs.read_log(job.folder)
    job.step = int(log.step.max()) if len(log) else 0
    runs.check_unchanged(args, config, job.folder)
    remedy = "pass the same, or another --logs_dir"
    if job.step > args.max_steps:
        raise UserError(f"{job.folder} is at step {job.step} already, here --max_steps is {args.max_steps}: {remedy}")
    if fingerprint not in (None, config["data"]):
        raise UserError(f"{job.folder} was trained on other data than {args.data_root} holds: {remedy}")

    # over: the log goes to the end, and so does the newest checkpoint, if any is kept
    end = {"max_steps": min(args.max_steps, args.stop_after or args.max_steps), "max_minutes": args.max_minutes}
    newest = checkpoint.newest(Path(args.checkpoint_dir, job.name) if args.checkpoint_dir else job.folder)
    saved = newest is None or checkpoint.step_of(newest) >= job.step
    if (log.stream == "diverged").any():
        job.state = "diverged"
    elif runs.at_end(end, log) and saved:
        job.state = "done"


# ---------------------------------------------------------------------------------------------------------------------
# Here, one process per slot; or on a cluster, one SLURM job per run


def slots_of(args):
    """The GPU of each run at a time, as CUDA_VISIBLE_DEVICES names it; None without GPUs."""
    visible = [str(i) for i in range(torch.cuda.device_count())]
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        visible = os.environ["CUDA_VISIBLE_DEVICES"].split(",")[: len(visible)]
    for gpu in args.gpus:
        if gpu not in visible:  # such a run would train on the CPU
            raise UserError(f"--gpus {gpu}: not among the visible GPUs ({' '.join(visible) or 'none'})")
    gpus = args.gpus or visible or [None]
    return [gpus[i % len(gpus)] for i in range(args.jobs or len(gpus))]


def launch(command, out, env):
    """The trainer as a process that prints to the end of the file `out`.

    It has a session of its own: Ctrl-C in the terminal and SLURM's SIGUSR2 must not end it before it has saved.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        return subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def run_here(todo, slots):
    """Keep every slot busy until all jobs have run, or the first Ctrl-C. Returns whether it was told to stop."""
    stop, told, began = common.Stop(), False, time.monotonic()
    waiting, free, busy = list(todo), list(slots), {}
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(slots)))}
    try:
        while busy or (waiting and not stop.requested):
            while waiting and free and not stop.requested:
                job, gpu = waiting.pop(0), free.pop(0)
                env = threads | os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
                busy[launch(job.command, job.out, env)] = job, gpu
                job.state = "running"
                print(f"{job.name}: running", flush=True)
            time.sleep(0.2)
            if stop.requested and not told:
                told = True
                for process in busy:  # not SIGINT, which a process started with & by a shell may ignore
                    process.terminate()
            for process, (job, gpu) in list(busy.items()):
                code = process.poll()
                if code is not None:
                    del busy[process]
                    free.append(gpu)
                    ended(job, INTERRUPTED if told and code < 0 else code, todo, began)
    except BaseException as error:  # a second Ctrl-C does not wait for checkpoints; a full disk leaves no run behind
        for process in busy:
            process.kill() if isinstance(error, KeyboardInterrupt) else process.terminate()
        raise
    return told


class TrainJob:
    """The function that a node runs. submitit pickles it, and calls `checkpoint` on pre-emption and time-out."""

    def __init__(self, command, out):
        self.command, self.out = command, out

    def __call__(self):
        self.process = launch(self.command, self.out, os.environ)
        while self.process.poll() is None:
            time.sleep(0.2)
        return self.process.returncode

    def checkpoint(self):
        """Let the trainer save and end; the job that submitit queues again resumes from there."""
        from submitit.helpers import DelayedSubmission

        self.process.send_signal(signal.SIGTERM)
        # Not process.wait(): this runs in a signal handler, perhaps within poll() above, which holds Popen's lock.
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(TrainJob(self.command, self.out))


def run_on_cluster(todo, words):
    """Submit the jobs with submitit's parameters, `name=value`, and wait. Ctrl-C ends the waiting, not the jobs."""
    import submitit
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        given = dict(word.split("=", 1) for word in words)
        given = {name: int(value) if value.isdigit() else value for name, value in given.items()}
        cluster = given.pop("cluster", "slurm")
        requeue = {f"{cluster}_max_num_timeout": 1000}
        executor = submitit.AutoExecutor(todo[0].folder.parent / "submitit", cluster, **requeue)
        defaults = {"name": "moe-sweep", "timeout_min": 1440, "gpus_per_node": 1, "cpus_per_task": 8}
        executor.update_parameters(**defaults | given)
    except (RuntimeError, ValueError, NameError, AssertionError) as error:
        raise UserError(f"--slurm needs name=value, such as timeout_min=60 slurm_partition=gpu: {error}") from None

    with executor.batch():
        submitted = [executor.submit(TrainJob(job.command, job.out)) for job in todo]
    began, busy = time.monotonic(), dict(zip(submitted, todo, strict=True))
    for handle, job in busy.items():
        job.state = "submitted"
        print(f"{job.name}: submitted, scancel {handle.job_id} ends it", flush=True)
    while busy:
        time.sleep(1)
        for handle in [handle for handle in busy if handle.done()]:
            try:
                code = handle.result()
            except (UncompletedJobError, FailedJobError):  # ended by the cluster
                code = 1
            ended(busy.pop(handle), code, todo, began)


def ended(job, code, todo, began):
    """Take the state of a job from its exit code; print it, and the time left as the jobs so far suggest it."""
    job.state = {DONE: "done", DIVERGED: "diverged", INTERRUPTED: "interrupted"}.get(code, "failed")
    if job.state == "failed":
        lines = job.out.read_text(errors="replace").strip().splitlines() if job.out.exists() else ["no output"]
        job.reason = f" with exit code {code}: {lines[-1]} (all of it: {job.out})"
    n_left = sum(other.state in ("waiting", "running", "submitted") for other in todo)
    minutes = (time.monotonic() - began) / 60 * n_left / (len(todo) - n_left)
    print(f"{job.name}: {job.state}{job.reason}; {n_left} left, about {minutes:.0f} min", flush=True)


def show_cost(jobs, n_slots, tok_per_sec):
    """Print every command with tokens and FLOPs of the steps that are left, and the sum."""
    total_tokens = total_flops = 0
    for job in jobs:
        steps = job.args.max_steps - job.step if job.state == "waiting" else 0
        tokens = steps * job.args.total_batch_size
        with torch.device("meta"):  # shapes without memory
            model = GPT(job.args.model_config())
        flops = tokens * model.estimate_flops_per_token(job.args.T) + steps * optim.flops_per_step(model, job.args)
        total_tokens += tokens
        total_flops += flops
        print(f"{job.name}: {job.state}, {tokens:.3g} tokens, {flops:.3g} FLOPs\n    {shlex.join(job.command)}")
    print(f"all: {total_tokens:.3g} tokens, {total_flops:.3g} FLOPs; hours with --tok_per_sec")
    if tok_per_sec:
        hours = total_tokens / tok_per_sec / 3600
        print(f"{hours:.3g} hours one after another, {hours / n_slots:.3g} with {n_slots} at a time")


def main():
    args, flags = common.parse(Args, unknown=True)
    jobs = plan(args, flags)
    slots = [None] * len(jobs) if args.slurm else slots_of(args)
    fingerprint = None if args.slurm or args.dry_run else data.fingerprint(jobs[0].args.data_root)
    for job in jobs:
        look_at(job, fingerprint)
    if args.dry_run:
        return show_cost(jobs, len(slots), args.tok_per_sec)

    for job in jobs:
        print(f"{job.name}: {job.state}")
    todo, stopped = [job for job in jobs if job.state == "waiting"], False
    if args.slurm and todo:
        run_on_cluster(todo, args.slurm)
    elif todo:
        stopped = run_here(todo, slots)
    print(f"next: python compare.py {jobs[0].folder.parent}")
    if stopped:
        return INTERRUPTED
    failed = [job for job in jobs if job.state in ("failed", "interrupted")]
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} runs did not finish, first {failed[0].name}{failed[0].reason}; "
                        "the same command resumes them")


if __name__ == "__main__":
    common.run(main)
