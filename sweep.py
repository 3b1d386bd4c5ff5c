"""Variants x seeds: runs train_single_gpu.py once for each, here or on a SLURM cluster.

    python sweep.py --variants all --seeds 42 2025 1337 --dry_run -- --max_steps 5000         # commands and cost
    python sweep.py --variants no_moe noisy_top_k --jobs 2 -- --device cpu --max_steps 500    # CPU, two at a time
    python sweep.py --gpus 0 1 2 3 -- --max_steps 5000                                        # one process a GPU
    python sweep.py --slurm partition=gpu,time=24:00:00,mem=64 -- --max_steps 5000            # one job a run

What follows `--` goes to every run as it is; a variant's own settings come after it and win. Call the same line again
to go on: finished and diverged runs are passed over, interrupted ones resume from their newest checkpoint. Ctrl-C lets
the running ones save first. Exit codes as everywhere; 2 if any run failed, after all the others have had their turn.
"""

import functools
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

import common
import runlog
import train_single_gpu
from common import UserError
from model import GPT

TRAINER = Path(__file__).resolve().parent / "train_single_gpu.py"
DIVERGED, INTERRUPTED = 3, 130  # exit codes of the trainer

# ---------------------------------------------------------------------------------------------------------------------
# The variants: the one table of names, settings and looks. The settings are fields of train_single_gpu.Args.


class Variant(NamedTuple):
    name: str
    label: str
    colour: str  # told apart by colour-blind readers (Paul Tol's bright and muted sets) ...
    line: str  # ... and, together with the marker, in grey
    marker: str
    settings: dict


NOISY = {"use_noisy_top_k": True}
AUX = {"use_aux_loss": True}
Z = {"use_router_z_loss": True}
FULL_PREC = {"router_use_full_prec": True}
SWITCH_INIT = {"use_switch_tfm_init": True}
SWITCH_ROUTER = {"top_k": 1, "gate": "softmax"} | AUX
ALL_TRICKS = NOISY | AUX | Z | FULL_PREC | SWITCH_INIT

PUBLISHED = (  # the published ablation: each adds one trick to the one before
    Variant("no_moe", "dense", "#000000", "-", "", {"n_exp": 1}),
    Variant("only_moe", "MoE, top 2", "#4477AA", "--", "o", {}),
    Variant("noisy_top_k", "+ router noise", "#EE6677", "-", "s", NOISY),
    Variant("aux_loss", "+ load-balance loss", "#228833", "--", "^", NOISY | AUX),
    Variant("z_loss", "+ router z-loss", "#CCBB44", "-.", "D", NOISY | AUX | Z),
    Variant("router_full_prec", "+ router in float32", "#66CCEE", "-", "v", NOISY | AUX | Z | FULL_PREC),
    Variant("switch_tfm_init", "+ Switch init", "#AA3377", ":", "P", ALL_TRICKS),
    Variant("top1", "top 1, router without gradient", "#999933", "--", "x", {"top_k": 1}),
    Variant("top1_noisy", "top 1 without gradient, noise", "#DDAA33", "-.", "+", {"top_k": 1} | NOISY),
)
NEW = (
    Variant("top1_softmax", "top 1, softmax gate", "#332288", "-", "o", {"top_k": 1, "gate": "softmax"}),
    Variant("top1_softmax_aux", "top 1, softmax gate, balanced", "#661100", "--", "p", SWITCH_ROUTER),
    Variant("dropless", "dropless", "#44AA99", "--", "s", {"train_capacity": math.inf, "eval_capacity": math.inf}),
    Variant("aux_only", "load-balance loss alone", "#117733", ":", "^", AUX),
    Variant("z_only", "router z-loss alone", "#CC6677", "-.", "D", Z),
    Variant(
        "switch_tfm_init_0.1",
        "all tricks, Switch init at 0.1",
        "#882255",
        "-",
        "P",
        ALL_TRICKS | {"switch_tfm_init_scale": 0.1},
    ),
    Variant("bias_balance", "bias balancing", "#EE7733", "--", "v", {"use_bias_balance": True}),
    Variant(
        "shared_expert",
        "1 shared + 1 of 8",
        "#0077BB",
        "-.",
        "*",
        {"n_shared_exp": 1, "top_k": 1, "gate": "softmax"},  # as many active parameters as top 2
    ),
    Variant("sigmoid", "sigmoid gate", "#AA4499", ":", "X", {"gate": "sigmoid"}),
)
VARIANTS = {variant.name: variant for variant in PUBLISHED + NEW}


def variant_of(run):
    """The Variant whose settings a runlog.Run was made with, or None. Published logs tell by their name alone."""
    if "args" not in run.meta:
        return _by_log_name().get(run.name)
    mine = run.meta["args"]
    if mine["n_exp"] == 1:
        return VARIANTS["no_moe"]
    defaults = _fields_that_vary()
    for variant in (variant for variant in VARIANTS.values() if variant.name != "no_moe"):
        wanted = defaults | variant.settings
        if all(mine.get(name, defaults[name]) == value for name, value in wanted.items()):
            return variant
    return None


def _fields_that_vary():
    """The defaults of all fields that some MoE variant sets; how many experts there are does not make a variant."""
    names = {name for variant in VARIANTS.values() for name in variant.settings} - {"n_exp"}
    return {name: getattr(train_single_gpu.Args, name) for name in sorted(names)}


@functools.cache
def _by_log_name():
    return {train_single_gpu.variant_name(train_single_gpu.Args(**v.settings)): v for v in VARIANTS.values()}


@dataclass
class Args:
    variants: tuple[str, ...] = ("all",)  # names from the table in sweep.py, or `all`
    seeds: tuple[int, ...] = (42, 2025, 1337)  # one run of every variant for each
    run_id: str = "sweep"  # part of every log's name; another one starts everything afresh
    gpus: tuple[int, ...] = ()  # one process on each; a number given twice takes two; default: all there are
    jobs: int | None = None  # processes at once on the CPU, which share its cores
    dry_run: bool = False  # print the commands, tokens, FLOPs and hours, and start nothing
    tok_per_sec: float | None = None  # speed to estimate hours with; default: that of runs already in the logs
    slurm: str = ""  # partition=..,time=..,gpus=..,cpus=..,mem=<GB> and any other sbatch option: one SLURM job a run
    cluster: Literal["slurm", "local"] = "slurm"  # where --slurm submits to; local: submitit's executor on this machine


@dataclass
class Job:
    """One run: its command, and what is known of it from its process and its log."""

    variant: str
    command: list[str]
    args: train_single_gpu.Args
    log: Path
    state: str = "waiting"
    poll: Callable[[], int | None] = lambda: None  # the exit code once there is one
    process: subprocess.Popen | None = None
    last: dict = field(default_factory=dict)  # {stream: (step, value)}: the last line of each stream
    read_to: int = 0  # bytes of the log taken in
    inode: int = 0

    def __str__(self):
        return f"{self.variant} seed {self.args.seed}"


# ---------------------------------------------------------------------------------------------------------------------
# What to run


def make_jobs(args, flags):
    """One Job per variant and seed, seed by seed so that the first comparison is whole early."""
    unknown = [name for name in args.variants if name not in VARIANTS and name != "all"]
    if unknown:
        raise UserError(f"no variant {unknown[0]!r}; there are: all {' '.join(VARIANTS)}")
    names = list(VARIANTS) if "all" in args.variants else list(dict.fromkeys(args.variants))
    jobs = [make_job(args, name, seed, flags) for seed in dict.fromkeys(args.seeds) for name in names]
    owners = {}
    for job in jobs:
        other = owners.setdefault(job.log, job)
        if other is not job:
            raise UserError(f"{other} and {job} are the same run with these flags: leave out one, or the flag after --")
    for job in jobs:
        follow(job)
    return jobs


def make_job(args, name, seed, flags):
    settings = {**VARIANTS[name].settings, "seed": seed, "run_id": args.run_id, "resume": "auto"}
    argv = [*flags, *as_flags(settings)]
    try:
        train_args = common.parse(train_single_gpu.Args, argv)
        train_single_gpu.check_args(train_args, world_size=1)
    except UserError as error:
        raise UserError(f"train flags: {str(error).replace(Path(sys.argv[0]).name, TRAINER.name)}") from None
    run_name = train_args.name or train_single_gpu.variant_name(train_args)
    log = runlog.log_path(train_args.logs_dir, run_name, args.run_id, seed)
    return Job(name, [sys.executable, str(TRAINER), *argv], train_args, log)


def as_flags(settings):
    flags = []
    for name, value in settings.items():
        flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return flags


def follow(job):
    """Take in what the log has gained, and from that the state of a run that has no process."""
    if job.log.exists():
        stat = job.log.stat()
        if stat.st_ino != job.inode:  # a resumed run has cut and replaced its log
            job.inode, job.read_to, job.last = stat.st_ino, 0, {}
        with open(job.log, "rb") as f:
            f.seek(job.read_to)
            new = f.read()
        new = new[: new.rfind(b"\n") + 1]
        job.read_to += len(new)
        for line in new.splitlines():
            step, stream, value = line.split()
            job.last[stream.decode()] = (int(step), float(value))
    if job.state == "waiting":
        if "diverged" in job.last:
            job.state = "diverged"
        elif job.last.get("val", (-1,))[0] >= job.args.max_steps:
            job.state = "done"


# ---------------------------------------------------------------------------------------------------------------------
# Here: a process for each slot


def run_here(jobs, slots):
    """Keep every slot busy until all jobs have run. On Ctrl-C the running ones are told, and waited for."""
    waiting, busy = [job for job in jobs if job.state == "waiting"], {}
    show = Display(jobs)
    asked, heeded = [], 0  # not exceptions: one within Popen would leave a process that nobody knows of
    handlers = {  # a cluster's notice is as good as a Ctrl-C; what a shell starts with & goes on ignoring Ctrl-C
        number: signal.signal(number, lambda number, _: asked.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        while busy or (waiting and not asked):
            for slot in range(len(slots)):
                if slot not in busy and waiting and not asked:
                    busy[slot] = start(waiting.pop(0), slots[slot], len(slots))
            time.sleep(0.2)
            if (n := len(asked)) > heeded:
                stop(busy.values(), kill=heeded > 0)
                heeded = n
            for slot, job in list(busy.items()):
                if ended(job):
                    del busy[slot]
                    if asked and job.state == "failed":  # killed, or told while it was still importing
                        job.state = "interrupted"
            show.update()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        show.update(final=True)
    if asked:
        raise KeyboardInterrupt


def start(job, gpu, n_slots):
    """Start the run on `gpu`; None is a share of the CPU."""
    env = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // n_slots)), **os.environ}
    if gpu is not None:
        env["CUDA_VISIBLE_DEVICES"] = str(gpu)
    job.process = launch(job.command, job.log, env)
    job.poll, job.state = job.process.poll, "running"
    return job


def launch(command, log, env):
    """A trainer's process, its output beside its log.

    In a session of its own: neither the terminal's Ctrl-C nor SLURM's SIGUSR2, both meant for us, may kill it unsaved.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log.with_suffix(".out"), "ab") as out, open(log.with_suffix(".err"), "wb") as err:
        return subprocess.Popen(command, env=env, stdout=out, stderr=err, start_new_session=True)


def ended(job):
    """Whether the run is over; its state then says how."""
    follow(job)
    code = job.poll()
    if code is not None:
        follow(job)  # what was written between the two
        job.state = {0: "done", DIVERGED: "diverged", INTERRUPTED: "interrupted"}.get(code, "failed")
    return code is not None


def stop(jobs, kill):
    """Pass the interrupt on: each run saves a checkpoint and leaves. A second Ctrl-C does not wait for that."""
    if kill:
        for job in jobs:
            job.process.kill()
    else:
        print(f"\nstopping: {len(jobs)} runs save a checkpoint; Ctrl-C again to kill them", file=sys.stderr)
        for job in jobs:  # not SIGINT, which what a shell starts with & ignores until it has its own handler
            job.process.terminate()


# ---------------------------------------------------------------------------------------------------------------------
# On a cluster: a SLURM job for each run


class TrainJob:
    """What a node executes. submitit pickles it, and calls `checkpoint` on pre-emption and when the time is up."""

    def __init__(self, command, log):
        self.command, self.log = command, log

    def __call__(self):
        self.process = launch(self.command, self.log, os.environ)
        while self.process.poll() is None:
            time.sleep(0.2)
        return self.process.returncode

    def checkpoint(self):
        from submitit.helpers import DelayedSubmission

        self.process.send_signal(signal.SIGTERM)
        # Not process.wait(): this runs in a signal handler, maybe inside the poll() above, which holds Popen's lock.
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(TrainJob(self.command, self.log))


def run_on_cluster(jobs, options, cluster):
    """Submit what is to be run and watch the logs. Ctrl-C stops the watching, not the jobs."""
    todo = [job for job in jobs if job.state == "waiting"]
    if not todo:
        return
    for job, submitted in zip(todo, submit(todo, options, cluster), strict=True):
        job.state = "submitted"
        job.poll = lambda submitted=submitted: exit_code(submitted)
    show = Display(jobs)
    try:
        while todo:
            time.sleep(1)
            todo = [job for job in todo if not ended(job)]
            show.update()
    except KeyboardInterrupt:
        print("\nthe jobs go on without this table; scancel ends them", file=sys.stderr)
        raise
    finally:
        show.update(final=True)


def submit(jobs, options, cluster):
    import submitit

    folder = jobs[0].log.parent / "submitit"
    parameters = slurm_parameters(options, cluster)
    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster, **{f"{cluster}_max_num_timeout": 1000})
        executor.update_parameters(name="moe-sweep", **parameters)
        with executor.batch():
            return [executor.submit(TrainJob(job.command, job.log)) for job in jobs]
    except (RuntimeError, ValueError, NameError) as error:
        raise UserError(f"--slurm {options}: {error}") from None


def slurm_parameters(options, cluster):
    """submitit's parameters from `partition=gpu,time=12:00:00,account=lab`."""
    pairs = [option.partition("=") for option in options.split(",") if option]
    given = {name.strip(): value.strip() for name, _, value in pairs}
    if not given or "" in given.values():
        raise UserError(f"--slurm {options!r}: write it as partition=gpu,time=12:00:00,...")
    try:
        parameters = {"timeout_min": slurm_minutes(given.pop("time", "24:00:00"))}
        parameters["gpus_per_node"] = int(given.pop("gpus", 1))
        parameters["cpus_per_task"] = int(given.pop("cpus", 8))
        parameters["mem_gb"] = float(given.pop("mem", 64))
    except ValueError as error:
        raise UserError(f"--slurm {options!r}: {error}; time is minutes or [days-]hours:minutes:seconds") from None
    if cluster == "local":
        return parameters
    if "partition" in given:
        parameters["slurm_partition"] = given.pop("partition")
    return parameters | {"slurm_additional_parameters": given}


def slurm_minutes(text):
    """90, 1:30:00 or 2-12:00:00 as minutes, rounded up."""
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if len(parts) == 1:
        return parts[0]
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return (int(days or 0) * 24 + hours) * 60 + minutes + (seconds > 0)


def exit_code(submitted):
    """Of a submitit job; None while it runs, 1 for a job that the cluster ended."""
    import submitit

    if not submitted.done():
        return None
    try:
        return submitted.result()
    except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError):
        return 1


# ---------------------------------------------------------------------------------------------------------------------
# What is shown

ORDER = ("running", "submitted", "failed", "interrupted", "diverged", "done", "waiting")


def table(jobs):
    lines = [f"{'variant':20} {'seed':>6}  {'state':11} {'step':>15} {'val':>8} {'tok/s':>9}"]
    for job in sorted(jobs, key=lambda job: ORDER.index(job.state)):
        step = max((step for step, _ in job.last.values()), default=0)
        val, speed = (f"{job.last[k][1]:.{d}f}" if k in job.last else "-" for k, d in (("val", 4), ("tok_per_sec", 0)))
        progress = f"{step}/{job.args.max_steps}"
        lines.append(f"{job.variant:20} {job.args.seed:>6}  {job.state:11} {progress:>15} {val:>8} {speed:>9}")
    counts = Counter(job.state for job in jobs)
    return [*lines, "  ".join(f"{counts[state]} {state}" for state in ORDER if counts[state])]


class Display:
    """The table, redrawn in a terminal; elsewhere a line for each change of state."""

    def __init__(self, jobs):
        self.jobs, self.shown, self.drawn = jobs, {}, 0.0

    def update(self, final=False):
        if sys.stdout.isatty() and not final:
            if time.monotonic() - self.drawn > 1:
                self.drawn = time.monotonic()
                height = os.get_terminal_size().lines - 2
                *rows, total = table(self.jobs)
                print("\x1b[H\x1b[J" + "\n".join([*rows[:height], total]), flush=True)
            return
        for job in self.jobs:
            if self.shown.get(id(job), "waiting") != job.state:
                print(f"{job}: {job.state}{reason(job)}", flush=True)
                self.shown[id(job)] = job.state
        if final:
            print("\n".join(table(self.jobs)), flush=True)


def reason(job):
    """Why a run failed: the last line on its stderr."""
    err = job.log.with_suffix(".err")
    if job.state != "failed" or not err.exists():
        return ""
    lines = err.read_text(errors="replace").strip().splitlines()
    return f" - {lines[-1]} (all of it: {err})" if lines else f" - exit code {job.poll()}, nothing in {err}"


def estimate(jobs, n_slots, tok_per_sec):
    """Print every command, then tokens, FLOPs and hours: what is left to be done, not what is."""
    flops = {job.variant: flops_per_token(job.args) for job in jobs}
    speeds = {job.variant: median_speed(job) for job in jobs if "tok_per_sec" in job.last}
    total_tokens = total_flops = total_hours = 0
    print(f"{'variant':20} {'seed':>6}  {'state':11} {'tokens':>9} {'FLOPs':>9} {'hours':>7}")
    for job in jobs:
        done = 0 if job.state == "waiting" and "val" not in job.last else job.last["val"][0]
        left = 0 if job.state in ("done", "diverged") else max(0, job.args.max_steps - done)
        tokens = left * job.args.total_batch_size
        # A variant that has not run yet is taken to be as slow as the slowest that has.
        speed = tok_per_sec or speeds.get(job.variant) or min(speeds.values(), default=None)
        hours = tokens / speed / 3600 if speed else float("nan")
        total_tokens, total_hours = total_tokens + tokens, total_hours + hours
        total_flops += tokens * flops[job.variant]
        cost = f"{tokens:9.3g} {tokens * flops[job.variant]:9.3g} {hours:7.2f}"
        print(f"{job.variant:20} {job.args.seed:>6}  {job.state:11} {cost}")
    print(f"{'all':20} {'':>6}  {'':11} {total_tokens:9.3g} {total_flops:9.3g} {total_hours:7.2f}")
    if np.isnan(total_hours):
        print("hours are not known before a run has logged its speed: give --tok_per_sec")
    else:
        print(f"{total_hours / n_slots:.2f} hours on the clock with {n_slots} at once")
    for job in jobs:
        print(shlex.join(job.command))


def median_speed(job):
    return float(np.median(runlog.read(job.log)["tok_per_sec"][1]))


def flops_per_token(args):
    with torch.device("meta"), warnings.catch_warnings():  # shapes without memory
        warnings.simplefilter("ignore")
        return GPT(train_single_gpu.model_config(args)).estimate_flops_per_token(args.T)


# ---------------------------------------------------------------------------------------------------------------------


def slots_of(args):
    """A GPU number for each process that runs at once; None stands for a share of the CPU."""
    if args.jobs is not None:
        if args.jobs < 1 or args.gpus:
            raise UserError("--jobs counts processes on the CPU, at least 1, and does not go with --gpus")
        return [None] * args.jobs
    return list(args.gpus) or list(range(torch.cuda.device_count())) or [None]


def main():
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    args = common.parse(Args, argv[:cut])
    jobs = make_jobs(args, argv[cut + 1 :])
    slots = slots_of(args)
    if args.dry_run:
        return estimate(jobs, len(jobs) if args.slurm else len(slots), args.tok_per_sec)
    if args.slurm:
        run_on_cluster(jobs, args.slurm, args.cluster)
    else:
        run_here(jobs, slots)
    bad = [job for job in jobs if job.state in ("failed", "interrupted")]
    if bad:
        first = f"{bad[0]} {bad[0].state}{reason(bad[0])}"
        raise UserError(f"{len(bad)} of {len(jobs)} runs did not finish: {first}; the same command resumes them")


if __name__ == "__main__":
    common.run(main)
