"""Variants x seeds: runs train_single_gpu.py once for each, here or on a SLURM cluster.

    python sweep.py --variants all --seeds 42 2025 1337 --dry_run -- --max_steps 5000         # commands and cost
    python sweep.py --variants no_moe noisy_top_k --jobs 2 -- --device cpu --max_steps 500    # CPU, two at a time
    python sweep.py --data_per_seed --gpus 0 1 2 3 -- --max_steps 5000                        # one process per GPU
    python sweep.py --slurm partition=gpu,time=24:00:00,mem=64 -- --max_steps 5000            # one job per run

What follows `--` are settings of train_single_gpu.py for every run; the settings of a variant win over them. With
--data_per_seed the differences of a comparison are taken within each seed (compare.py), and their spread holds that of
the data. The same command again continues: runs that finished or diverged are passed over, interrupted ones resume from
their newest checkpoint. A log that was made with other settings refuses the sweep. Ctrl-C lets the running ones save
first. Exit code 2 if any run failed, after all the others have had their turn.
"""

import functools
import math
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

import identity
import runlog
import slurm
import train_single_gpu
from identity import PUBLISHED
from lab import checkpoint, common
from lab import data as dataloader
from lab.common import DIVERGED, DONE, INTERRUPTED, AboveZero, Positive, UserError
from model import GPT

TRAINER = Path(__file__).resolve().parent / "train_single_gpu.py"

# ---------------------------------------------------------------------------------------------------------------------
# The variants: the one table of names, settings and looks. A variant is its settings on top of the published values
# (identity.PUBLISHED) of compared_settings(), whatever the defaults in train_single_gpu.Args are.


class Variant(NamedTuple):
    name: str
    label: str
    colour: str  # told apart by colour-blind readers (sets of Paul Tol, Okabe and Ito) ...
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
SMALL_INIT = ALL_TRICKS | {"switch_tfm_init_scale": 0.1}
ONE_SHARED = {"n_shared_exp": 1, "top_k": 1, "gate": "softmax"}  # as many active parameters as top 2
ISO = {"expert_hidden": "iso"}  # as many active parameters as dense, but for the router
QUARTER = AUX | ISO | {"n_exp": 16, "top_k": 4}
QUANTILE = {"use_quantile_balance": True}
SWITCH_MLP = {"mlp_init": "switch", "mlp_init_scale": 1.0}
MUON = {"optimizer": "muon"}

LADDER = (  # the published ablation: each adds one trick to the one before
    Variant("no_moe", "dense", "#000000", "-", "", {"n_exp": 1}),
    Variant("only_moe", "MoE, top 2", "#4477AA", "--", "o", {}),
    Variant("noisy_top_k", "+ router noise", "#EE6677", "-", "s", NOISY),
    Variant("aux_loss", "+ load-balance loss", "#228833", "--", "^", NOISY | AUX),
    Variant("z_loss", "+ router z-loss", "#CCBB44", "-.", "D", NOISY | AUX | Z),
    Variant("router_full_prec", "+ router in float32", "#66CCEE", "-", "v", NOISY | AUX | Z | FULL_PREC),
    Variant("switch_tfm_init", "+ Switch init: all tricks", "#AA3377", ":", "P", ALL_TRICKS),
    Variant("top1", "top 1, router without gradient", "#999933", "--", "x", {"top_k": 1}),
    Variant("top1_noisy", "top 1 without gradient, noise", "#DDAA33", "-.", "+", {"top_k": 1} | NOISY),
)
NEW = (
    Variant("top1_softmax", "top 1, softmax gate", "#332288", "-", "o", {"top_k": 1, "gate": "softmax"}),
    Variant("top1_softmax_aux", "top 1, softmax gate, balanced", "#661100", "--", "p", SWITCH_ROUTER),
    Variant("dropless", "dropless", "#44AA99", "--", "s", {"train_capacity": math.inf, "eval_capacity": math.inf}),
    Variant("aux_only", "load-balance loss alone", "#117733", ":", "^", AUX),
    Variant("z_only", "router z-loss alone", "#CC6677", "-.", "D", Z),
    Variant("switch_tfm_init_0.1", "all tricks, Switch init at 0.1", "#882255", "-", "P", SMALL_INIT),
    Variant("bias_balance", "bias balancing", "#EE7733", "--", "v", {"use_bias_balance": True}),
    Variant("shared_expert", "1 shared + 1 of 8", "#0077BB", "-.", "*", ONE_SHARED),
    Variant("sigmoid", "sigmoid gate", "#AA4499", ":", "X", {"gate": "sigmoid"}),
)
TRAINING = (  # optimizer, schedule, stability; the table of methods in README.md has the papers
    Variant("muon", "Muon", "#663333", "-", "o", MUON),
    Variant("dense_muon", "dense, Muon", "#222255", "--", "s", MUON | {"n_exp": 1}),
    Variant("wsd", "WSD schedule", "#225555", "-.", "^", {"schedule": "wsd"}),
    Variant("qk_norm", "QK norm", "#77AADD", ":", "D", {"qk_norm": True}),
    Variant("output_z_loss", "z-loss on output logits", "#EE8866", "-", "v", {"output_z_loss_weight": 1e-4}),
    Variant("router_lr", "router at 4 x the rate", "#44BB99", "--", "P", {"router_lr_scale": 4.0}),
    Variant("router_no_decay", "router without decay", "#666633", "-.", "*", {"router_weight_decay": 0.0}),
)
METHODS = (  # of the experts
    Variant("half_width", "half width, balanced", "#E69F00", "-", "o", AUX | ISO),
    Variant("quarter_width", "top 4 of 16, quarter width, balanced", "#56B4E9", "--", "s", QUARTER),
    Variant("shared_half_width", "1 shared + 1 of 8, half width", "#009E73", "-.", "^", ISO | ONE_SHARED),
    Variant("first_dense", "first layer dense", "#0072B2", ":", "D", {"first_dense": 1}),
    Variant("step_balance", "balance over the step", "#D55E00", "-", "v", AUX | {"balance_scope": "step"}),
    Variant("sequence_balance", "balance per sequence", "#CC79A7", "--", "P", AUX | {"balance_scope": "sequence"}),
    Variant("quantile_balance", "quantile balancing", "#CC3311", "-.", "*", QUANTILE),
    Variant("sigmoid_quantile", "sigmoid gate, quantile bias", "#33BBEE", ":", "X", QUANTILE | {"gate": "sigmoid"}),
    Variant("frozen_router", "frozen router", "#555555", "-", "x", {"freeze_router": True}),
    Variant("gate_scale", "gate scale 2.5", "#EE3377", "--", "o", {"gate_scale": 2.5}),
    Variant("selected_z", "z-loss on selected logits", "#009988", "-.", "s", Z | {"z_loss_on": "selected"}),
    Variant("noise_scaled", "router noise at 0.4", "#88CCEE", ":", "^", NOISY | {"noise_scale": 0.4}),
    Variant("switch_only", "Switch init alone", "#EE99AA", "-.", "P", SWITCH_INIT),
    Variant("switch_mlp", "Switch init of all MLPs", "#DDCC77", "-", "D", SWITCH_MLP),
    Variant("dense_switch_mlp", "dense, Switch init of MLPs", "#AAAA00", "--", "v", SWITCH_MLP | {"n_exp": 1}),
)
VARIANTS = {variant.name: variant for variant in LADDER + NEW + TRAINING + METHODS}
__doc__ += "\nVariants: " + "\n".join(textwrap.wrap(", ".join(VARIANTS), 110, subsequent_indent="    "))


def variant_of(run):
    """The Variant whose settings a runlog.Run has, or None. Logs without settings are found by their name.

    Compared are n_exp 1 or more and compared_settings(); the number of experts and every other setting may be any.
    """
    settings = run.settings
    if settings is None:
        return by_log_name().get(run.name)
    dense = is_dense(settings)
    neutral = compared_settings(dense)
    mine = {name: settings.get(name, value) for name, value in neutral.items()}
    for variant in VARIANTS.values():
        wanted = {name: value for name, value in variant.settings.items() if name != "n_exp"}
        if is_dense(variant.settings) == dense and mine == neutral | wanted:
            return variant
    return None


def is_dense(settings):
    return settings.get("n_exp", PUBLISHED["n_exp"]) == 1


def look_of(run):
    """The Variant of a run; for one that is not in the table, a grey one labelled with its unpublished settings."""
    if found := variant_of(run):
        return found
    label = run.name.replace("_", " ")
    if run.settings is not None:
        published = compared_settings(dense := is_dense(run.settings))
        differs = {name: value for name, value in run.settings.items() if value != published.get(name, value)}
        words = [identity.name_part(*pair).replace("_", " ") for pair in differs.items()]
        label = ", ".join(["dense" if dense else "MoE", *words])
    return Variant(run.name, label, "#777777", "-", "", {})


def compared_settings(dense=False):
    """{name: neutral value} of the settings in the table and, but for a dense model, of all that a MoE has."""
    args = train_single_gpu.Args()
    in_table = {name for variant in VARIANTS.values() for name in variant.settings} - {"n_exp", *args.moe_fields()}
    names = sorted(in_table) + ([] if dense else list(args.moe_fields()))
    return {name: identity.neutral(args, name) for name in names}


@functools.cache
def by_log_name():
    settings = ({**PUBLISHED, **variant.settings} for variant in VARIANTS.values())
    names = [identity.run_name(train_single_gpu.Args(**fields)) for fields in settings]
    return dict(zip(names, VARIANTS.values(), strict=True))


@dataclass
class Args:
    variants: tuple[str, ...] = ("all",)  # Names of variants, or all
    seeds: tuple[int, ...] = (42, 2025, 1337)  # Seeds: one run of every variant for each
    data_per_seed: bool = False  # Each seed has its own order of the data, so that runs of equal seed are pairs
    run_id: str = "sweep"  # Part of every log's name; another one starts everything afresh
    gpus: tuple[str, ...] = ()  # GPUs, one process on each; one given twice takes two (default: all visible ones)
    jobs: Positive | None = None  # Processes at once on the CPU, which share its cores
    dry_run: bool = False  # Print commands, tokens, FLOPs and hours, and start nothing
    tok_per_sec: AboveZero | None = None  # Tokens per second for the hours of --dry_run (default: that in the logs)
    slurm: str = ""  # partition=..,time=..,gpus=..,cpus=..,mem=<GB> and any other sbatch option: one job per run
    cluster: Literal["slurm", "local"] | None = None  # Where --slurm submits to; local: processes on this machine


@dataclass
class Job:
    """One run: its command, and what is known of it from its process and its log."""

    variant: str
    command: list[str]
    args: train_single_gpu.Args
    log: Path
    folder: Path  # of its checkpoints
    state: str = "waiting"
    poll: Callable[[], int | None] = lambda: None  # the exit code once there is one
    process: subprocess.Popen | None = None
    last: dict = field(default_factory=dict)  # {stream: (step, value)}: the last line of each stream
    read_to: int = 0  # bytes of the log taken in
    inode: int = 0
    changed: str = ""  # settings that differ from those of its log, where the trainer lets them change

    def __str__(self):
        return f"{self.variant} seed {self.args.seed}"


# ---------------------------------------------------------------------------------------------------------------------
# What to run


RESERVED = {"seed": "--seeds", "run_id": "--run_id"}  # trainer's setting: the sweep's, which stands before --


def make_jobs(args, flags):
    """One Job per variant and seed, seed by seed so that the first comparison is whole early."""
    unknown = [name for name in args.variants if name not in VARIANTS and name != "all"]
    if unknown or not args.variants:
        wrong = f"no variant {unknown[0]!r}" if unknown else "--variants names no variant"
        raise UserError(f"{wrong}; there are: all {' '.join(VARIANTS)}")
    if not args.seeds:
        raise UserError("--seeds names no seed: give at least one number")
    reserved = RESERVED | ({"data_seed": "--seeds"} if args.data_per_seed else {})
    for name in (name for name in map(setting_of, flags) if name in (*reserved, "resume")):
        instead = f"pass {reserved[name]} before `--`" if name in reserved else "leave it out"
        raise UserError(f"--{name} after `--`: sweep.py sets it for each run; {instead}")
    names = list(VARIANTS) if "all" in args.variants else list(dict.fromkeys(args.variants))
    jobs = [make_job(args, name, seed, flags) for seed in dict.fromkeys(args.seeds) for name in names]
    owners = {}
    for job in jobs:
        other = owners.setdefault(job.log, job)
        if other is not job:
            raise UserError(f"{other} and {job} are the same run with these flags: leave out one, or the flag after --")
    for job in jobs:
        follow(job)
        job.state = "diverged" if "diverged" in job.last else "waiting" if missing(job) else "done"
        check_settings(job)
    return jobs


def setting_of(flag):
    """max_steps for --max_steps, --max-steps and --max_steps=5; None for a value."""
    return flag[2:].partition("=")[0].replace("-", "_") if flag.startswith("--") else None


def make_job(args, name, seed, flags):
    settings = VARIANTS[name].settings | {"seed": seed, "run_id": args.run_id, "resume": "auto"}
    settings |= {"data_seed": seed} if args.data_per_seed else {}
    argv = [*as_flags(edited_settings(name)), *flags, *as_flags(settings)]
    try:
        train_args = common.parse(train_single_gpu.Args, argv)
        train_single_gpu.check_args(train_args, world_size=1)
    except UserError as error:
        raise UserError(f"train flags: {str(error).replace(Path(sys.argv[0]).name, TRAINER.name)}") from None
    parts = train_args.name or identity.run_name(train_args), args.run_id, seed
    folder = Path(train_args.checkpoint_dir) / identity.run_stem(*parts)
    return Job(
        name, [sys.executable, str(TRAINER), *argv], train_args, runlog.log_path(train_args.logs_dir, *parts), folder
    )


def edited_settings(name):
    """The published values of a variant's settings whose default in train_single_gpu.Args is another one."""
    dense = is_dense(VARIANTS[name].settings)
    published = compared_settings(dense) | ({} if dense else {"n_exp": PUBLISHED["n_exp"]})
    return {name: value for name, value in published.items() if value != getattr(train_single_gpu.Args, name)}


def as_flags(settings):
    flags = []
    for name, value in settings.items():
        flags += [f"--{name}"] if value is True else [f"--no_{name}"] if value is False else [f"--{name}", str(value)]
    return flags


def follow(job):
    """Read the lines that the log has gained. Malformed ones are passed over: the trainer removes or names them."""
    try:
        f = open(job.log, "rb")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        return
    with f:
        stat = os.fstat(f.fileno())
        if stat.st_ino != job.inode or stat.st_size < job.read_to:  # a resumed run has cut and replaced its log
            job.inode, job.read_to, job.last = stat.st_ino, 0, {}
        f.seek(job.read_to)
        new = f.read()
    new = new[: new.rfind(b"\n") + 1]
    job.read_to += len(new)
    for step, stream, value in filter(None, map(runlog.parse_line, new.splitlines())):
        job.last[stream] = (step, value)


def missing(job):
    """What a finished run has and this one has not, as text; "" for a finished run."""
    stream, last = ("val", job.args.max_steps) if job.args.val_loss_every else ("train", job.args.max_steps - 1)
    if job.last.get(stream, (-1,))[0] < last:
        return f"no {stream} of step {last} in {job.log}"
    newest = checkpoint.newest(job.folder) if job.args.save_checkpoint else None
    if job.args.save_checkpoint and (newest is None or checkpoint.step_of(newest) < job.args.max_steps):
        return f"no checkpoint of step {job.args.max_steps} in {job.folder}"
    return ""


def check_settings(job):
    """UserError for a run whose log was made with other settings than the wanted ones.

    A run that is still to be continued may have those changed that the trainer lets change on resume.
    """
    record = identity.read_record(job.log) if job.last else {}
    there = runlog.recorded_settings(record)
    if there is None:
        return
    here = identity.settings_of(job.args) | {"parent": there.get("parent")}
    here["hellaswag_limit"] = here["hellaswag_limit"] or "auto"  # the trainer chooses by the machine
    if "settings" not in record:  # made before logs named their data
        here["data"] = there["data"]
    pairs = identity.differences(there, here)
    job.changed = identity.describe(pairs)
    over = job.state != "waiting" or max(step for step, _ in job.last.values()) > job.args.max_steps
    fixed = common.hints(train_single_gpu.Args)
    pairs = {name: pair for name, pair in pairs.items() if over or identity.role(fixed.get(name)).fixed}
    if "data" in pairs:
        raise UserError(f"{job}: {job.log} was made with other shards than those in {job.args.data_root}: {REMEDY}")
    if pairs:
        raise UserError(f"{job}: {job.log} was made with other settings ({identity.describe(pairs)}): {REMEDY}")


REMEDY = "pass the same ones, or another --run_id"


# ---------------------------------------------------------------------------------------------------------------------
# Here: a process for each slot


def run_here(jobs, slots):
    """Keep every slot busy until all jobs have run. On Ctrl-C the running ones are told to stop, and waited for."""
    waiting, busy = [job for job in jobs if job.state == "waiting"], {}
    show = Display(jobs)
    asked, heeded = [], 0  # signals are noted, not raised: an exception within Popen would leave a process unknown
    handlers = {  # SIGTERM, a cluster's notice, counts like Ctrl-C; a process that ignores Ctrl-C (shell &) keeps to it
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
                    if asked and job.state == "failed":  # killed, or stopped while it was still importing
                        job.state = "interrupted"
            show.update()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        show.update(final=True)
    if asked:
        raise KeyboardInterrupt


def start(job, gpu, n_slots):
    """Start the run on the GPU of that name; None is a share of the CPU."""
    env = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // n_slots)), **os.environ}
    if gpu is not None:
        env["CUDA_VISIBLE_DEVICES"] = gpu
    job.process = slurm.launch(job.command, job.log, env)
    job.poll, job.state = job.process.poll, "running"
    return job


def ended(job):
    """Whether the run is over; its state then says how."""
    follow(job)
    code = job.poll()
    if code is not None:
        follow(job)  # lines written between the two
        job.state = {DIVERGED: "diverged", INTERRUPTED: "interrupted"}.get(code, "failed")
        if code == DONE and not missing(job):
            job.state = "done"
    return code is not None


def stop(jobs, kill):
    """Tell the runs to save a checkpoint and end; with `kill`, on a second Ctrl-C, end them at once."""
    if kill:
        for job in jobs:
            job.process.kill()
    else:
        print(f"\nstopping: {len(jobs)} runs save a checkpoint; Ctrl-C again to kill them", file=sys.stderr)
        for job in jobs:  # not SIGINT: a process started with & by a shell ignores it until it has its own handler
            job.process.terminate()


# ---------------------------------------------------------------------------------------------------------------------
# On a cluster: a SLURM job for each run


def run_on_cluster(jobs, options, cluster):
    """Submit the waiting jobs and watch their logs. Ctrl-C ends the watching, not the jobs."""
    todo = [job for job in jobs if job.state == "waiting"]
    if not todo:
        return
    for job, submitted in zip(todo, slurm.submit(todo, options, cluster), strict=True):
        job.state = "submitted"
        job.poll = lambda submitted=submitted: slurm.exit_code(submitted)
    show = Display(jobs)
    try:
        while todo:
            time.sleep(1)
            todo = [job for job in todo if not ended(job)]
            show.update()
    except KeyboardInterrupt:
        print("\nthe jobs continue without this table; scancel ends them", file=sys.stderr)
        raise
    finally:
        show.update(final=True)


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
    """Why a run failed: the last line on its stderr, or what it should have left behind."""
    if job.state != "failed":
        return ""
    if job.poll() == DONE:
        return f" - {missing(job)}, though it ended with exit code 0"
    err = job.log.with_suffix(".err")
    lines = err.read_text(errors="replace").strip().splitlines() if err.exists() else []
    return f" - {lines[-1]} (all of it: {err})" if lines else f" - exit code {job.poll()}, nothing in {err}"


def estimate(jobs, n_slots, tok_per_sec):
    """Print every command, then tokens, FLOPs and hours of the steps that are left to do."""
    flops = {job.variant: flops_per_token(job.args) for job in jobs}
    speeds = {job.variant: speed for job in jobs if (speed := median_speed(job))}
    total_tokens = total_flops = total_hours = 0
    print(f"{'variant':20} {'seed':>6}  {'state':11} {'identity':12} {'tokens':>9} {'FLOPs':>9} {'hours':>7}")
    for job in jobs:
        done = job.last["train"][0] + 1 if "train" in job.last else 0
        left = 0 if job.state in ("done", "diverged") else max(0, job.args.max_steps - done)
        tokens = left * job.args.total_batch_size
        # A variant that has not run yet is taken to be as slow as the slowest that has.
        speed = tok_per_sec or speeds.get(job.variant) or min(speeds.values(), default=None)
        hours = tokens / speed / 3600 if speed else float("nan")
        total_tokens, total_hours = total_tokens + tokens, total_hours + hours
        total_flops += tokens * flops[job.variant]
        known = identity.read_record(job.log).get("identity", "-")
        cost = f"{tokens:9.3g} {tokens * flops[job.variant]:9.3g} {hours:7.2f}"
        print(f"{job.variant:20} {job.args.seed:>6}  {job.state:11} {known:12} {cost}")
    print(f"{'all':20} {'':>6}  {'':11} {'':12} {total_tokens:9.3g} {total_flops:9.3g} {total_hours:7.2f}")
    if np.isnan(total_hours):
        print("hours are not known before a run has logged its speed: give --tok_per_sec")
    else:
        print(f"{total_hours / n_slots:.2f} hours on the clock with {n_slots} at once")
    for job in jobs:
        print(shlex.join(job.command))


def median_speed(job):
    """Tokens per second in the log, None where it cannot be read or has none."""
    try:
        streams = runlog.read(job.log)
    except (UserError, OSError):
        return None
    return float(np.median(streams["tok_per_sec"][1])) if "tok_per_sec" in streams else None


def flops_per_token(args):
    with torch.device("meta"), warnings.catch_warnings():  # shapes without memory
        warnings.simplefilter("ignore")
        return GPT(train_single_gpu.model_config(args)).estimate_flops_per_token(args.T)


# ---------------------------------------------------------------------------------------------------------------------


def visible_gpus():
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(count)] if names is None else [name.strip() for name in names.split(",")][:count]


def slots_of(args):
    """The name of a GPU for each process that runs at once; None stands for a share of the CPU."""
    if args.jobs is not None and args.gpus:
        raise UserError("--jobs is for the CPU and --gpus for GPUs: leave out one of them")
    if args.jobs is not None:
        return [None] * args.jobs
    visible = visible_gpus()
    for gpu in args.gpus:
        if gpu not in visible:
            there = f"there are {' '.join(visible)}" if visible else "this process sees no GPU: use --jobs"
            raise UserError(f"--gpus {gpu} is not available: {there}")
    return list(args.gpus) or visible or [None]


def parse(argv):
    """Args, and the trainer's flags after `--`."""
    cut = argv.index("--") if "--" in argv else len(argv)
    try:
        args = common.parse(Args, argv[:cut])
    except UserError:
        names = {name.removeprefix("no_") for name in map(setting_of, argv[:cut]) if name}
        theirs = [name for name in common.hints(train_single_gpu.Args) if name in names - common.hints(Args).keys()]
        if theirs:
            raise UserError(
                f"--{theirs[0]} is a setting of the trainer: put it after `--`, as in sweep.py ... -- --{theirs[0]} ..."
            ) from None
        raise
    if args.cluster and not args.slurm:
        raise UserError("--cluster says where --slurm submits to: give --slurm too, or leave it out")
    return args, argv[cut + 1 :]


def main():
    args, flags = parse(sys.argv[1:])
    jobs = make_jobs(args, flags)
    slots = [None] * len(jobs) if args.slurm else slots_of(args)
    if args.slurm:
        slurm.parameters(args.slurm, args.cluster)  # refused before anything starts
    if args.dry_run:
        return estimate(jobs, len(slots), args.tok_per_sec)
    for job in jobs:
        if job.state == "waiting" and "checkpoint" in (lost := missing(job)):
            print(f"{job}: {lost}: it is trained again from the newest one", flush=True)
        if job.state == "waiting" and job.changed:
            print(f"{job}: continues with other settings ({job.changed}); another --run_id starts it anew", flush=True)
    if not args.slurm:  # on a cluster the shards may lie on its nodes alone
        for root in {job.args.data_root for job in jobs if job.state == "waiting"}:
            dataloader.fingerprint(root)  # refused once, not by every run
    if args.slurm:
        run_on_cluster(jobs, args.slurm, args.cluster or "slurm")
    else:
        run_here(jobs, slots)
    bad = [job for job in jobs if job.state in ("failed", "interrupted")]
    if bad:
        first = f"{bad[0]} {bad[0].state}{reason(bad[0])}"
        raise UserError(f"{len(bad)} of {len(jobs)} runs did not finish: {first}; the same command resumes them")


if __name__ == "__main__":
    common.run(main)
