"""Text -> shards -> five small models -> table, text, figure: the whole project on a CPU, without a download.

    make demo            # or: python demo.py

Trains a dense GPT-2, its Mixture of Experts (top 2 of 8 experts) and the same MoE with a load-balance loss: 2 layers,
128 wide, bytes as tokens, the source of Python's standard library as text. Dense and balanced MoE are trained with two
seeds, so that their difference can be compared with the difference between two seeds. Two slow CPU cores need less
than four minutes. Every command is printed before it runs. Logs, text and figure are in results/demo/, shards in
data/bytes/; an earlier results/demo/ is kept until the new one is complete.
"""

import contextlib
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
from tqdm import tqdm

import identity
import runlog
from lab import common
from lab.common import Positive, Seed, UserError

matplotlib.use("Agg")  # a file, no window
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
SHARDS = HERE / "data" / "bytes"
OUT = HERE / "results" / "demo"


class Model(NamedTuple):
    name: str  # in the names of its logs
    label: str
    colour: str
    n_seeds: int
    flags: str


MODELS = (
    Model("moe_balanced", "MoE, balanced", "#117733", 2, "--n_exp 8 --stride 1 --use_aux_loss"),
    Model("moe", "MoE", "#4477AA", 1, "--n_exp 8 --stride 1"),
    Model("dense", "dense", "#000000", 2, "--n_exp 1"),
)
SIZE = "--vocab_size 257 --n_layer 2 --n_head 4 --n_embd 128 --T 64 --B 16 --total_batch_size 1024"
SCHEDULE = "--warmup_steps 50 --max_lr 4e-3 --val_loss_every 50 --val_loss_steps 32"
OFF = "--hellaswag_every 0 --sample_from_model_every 0 --device cpu --progress lines"
LAYER, N_EXP = 1, 8  # the MoE layer whose load the figure shows: without balancing, the last one is the least even


@dataclass
class Args:
    steps: Positive = 450  # Training steps per model, 1,024 bytes each
    seed: Seed = 1  # First seed; the second is the next number


# ---------------------------------------------------------------------------------------------------------------------
# Running the scripts


def command(script, flags, *more, prefix=""):
    """Print and return the command line of one of the project's scripts; it runs in the folder of this file."""
    arguments = [script, *shlex.split(flags), *map(str, more)]
    tqdm.write(f"\n$ {prefix}python {shlex.join(arguments)}")
    return [sys.executable, *arguments]


def run(script, flags, *more):
    """Run a script to its end. UserError unless it succeeds; it has printed why."""
    if subprocess.run(command(script, flags, *more), cwd=HERE, check=False).returncode:
        raise UserError(f"{script} failed: see above")


class Job(NamedTuple):
    model: Model
    seed: int
    log: Path


def start(job, steps, save):
    """Start the training process of a job on one core, its output beside its log."""
    saves = ["--checkpoint_dir", shown(OUT)] if save else ["--no_save_checkpoint"]
    line = command(
        "train_single_gpu.py", f"{job.model.flags} {SIZE} --max_steps {steps} {SCHEDULE} {OFF}", "--name",
        job.model.name, "--run_id", "demo", "--seed", job.seed, "--data_root", shown(SHARDS), "--logs_dir", shown(OUT),
        *saves, prefix="OMP_NUM_THREADS=1 ",
    )  # fmt: skip
    with open(job.log.with_suffix(".out"), "wb") as out:
        return subprocess.Popen(
            line, cwd=HERE, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )


def jobs_of(seed):
    """Every model with the first seed, then those that have a second one; slow ones first."""
    pairs = [(model, seed + i) for i in range(2) for model in MODELS if i < model.n_seeds]
    return [Job(model, s, Path(runlog.log_path(OUT, model.name, "demo", s))) for model, s in pairs]


def train_all(jobs, steps):
    """Run all jobs, one process per core at a time; returns {job: its log, read}, dense first."""
    waiting, busy, runs = list(jobs), {}, {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bar = tqdm(total=len(jobs) * steps, unit="step", disable=None, dynamic_ncols=True)
    try:
        while waiting or busy:
            while waiting and len(busy) < cores:
                job = waiting.pop(0)
                busy[job] = start(job, steps, save=job == jobs[0])  # the text comes from the first
            time.sleep(0.3)
            for job, process in list(busy.items()):
                if process.poll() is not None:
                    del busy[job]
                    runs[job] = finished(job, process.returncode)
            bar.update(sum(identity.last_step(job.log) + 1 for job in [*busy, *runs]) - bar.n)
    finally:
        bar.close()
        for process in busy.values():
            process.terminate()
        for process in busy.values():
            process.wait()
    return {job: runs[job] for job in sorted(jobs, key=lambda job: -MODELS.index(job.model))}


def finished(job, code):
    """The log of a run that has ended, read. UserError, with the last line it printed, if it failed."""
    if code:
        lines = job.log.with_suffix(".out").read_text(errors="replace").strip().splitlines()
        raise UserError(f"training of {job.model.label} failed: {lines[-1] if lines else f'exit code {code}'}")
    log = runlog.load_run(job.log)
    val = log.streams["val"][1]
    tqdm.write(f"{job.model.label}, seed {job.seed}: validation loss {val[0]:.3f} -> {val[-1]:.3f} nats per byte")
    return log


@contextlib.contextmanager
def replacing(folder):
    """Give the block a new, empty `folder`. The earlier one comes back if the block fails, and is removed if not."""
    earlier = folder.with_name(folder.name + ".old")
    if earlier.exists():  # a demo was killed: the folder is not complete
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        folder.rename(earlier)
    folder.mkdir(parents=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder)
        if earlier.exists():
            earlier.rename(folder)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def shown(path):
    return str(path.relative_to(HERE)) if path.is_relative_to(HERE) else str(path)


# ---------------------------------------------------------------------------------------------------------------------
# Table and figure


def print_table(runs):
    """A row per run, and the one comparison that two seeds allow."""
    heads = ("model", "seed", "parameters", "active", "first val", "last val", "MaxVio", "dropped", "seconds")
    print("\n{:15}{:>5}{:>12}{:>10}{:>11}{:>10}{:>8}{:>9}{:>9}".format(*heads))
    rows = runlog.table_of_runs(list(runs.values()))
    for (job, log), row in zip(runs.items(), rows.itertuples(), strict=True):
        load = f"{row.max_vio:8.2f}{row.drop_frac:9.1%}" if math.isfinite(row.max_vio) else f"{'-':>8}{'-':>9}"
        print(
            f"{job.model.label:15}{job.seed:5}{log.meta['params_total']:12,}{log.meta['params_active']:10,}"
            f"{log.streams['val'][1][0]:11.3f}{row.val:10.3f}{load}{log.streams['hours'][1][-1] * 3600:9.0f}"
        )
    print("val: cross-entropy in nats per byte. MaxVio: load of the busiest expert / mean load - 1. dropped: choices")
    print("beyond an expert's capacity. Both are medians over the last quarter of the steps.")
    dense, moe = ([row.val for row in rows.itertuples() if row.name == name] for name in ("dense", "moe_balanced"))
    gap = sum(dense) / len(dense) - sum(moe) / len(moe)
    spread = max(max(dense) - min(dense), max(moe) - min(moe))
    words = "below" if gap > 0 else "above"
    print(f"\nThe balanced MoE ends {abs(gap):.3f} {words} dense; two seeds of one model differ by up to {spread:.3f}.")


def plot(runs, path):
    """Validation loss of every run, and the load of the experts without and with balancing."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    plot_losses(left, runs)
    plot_load(right, runs)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_losses(axes, runs):
    """One thin line per run, labelled at its end; the first tenth of the steps, far above the rest, is cut off."""
    ends, late = {}, []
    for job, log in runs.items():
        steps, val = log.streams["val"]
        axes.plot(steps, val, color=job.model.colour, linewidth=1)
        ends.setdefault(job.model, []).append(val[-1])
        late += list(val[steps >= 0.1 * steps[-1]])
    axes.set_ylim(min(late) - 0.02, max(late) + 0.02)
    means, place = {model: sum(values) / len(values) for model, values in ends.items()}, -math.inf
    for model in sorted(means, key=means.get):
        place = max(means[model], place + 0.06 * (max(late) - min(late)))  # labels must not overlap
        axes.annotate(model.label, (steps[-1], place), (6, 0), textcoords="offset points", va="center",
                      color=model.colour, annotation_clip=False)  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="step (1,024 bytes each)", ylabel="nats per byte")
    axes.set_title(f"Validation loss, one line per seed (all start at {val[0]:.1f})", loc="left", fontsize=10)


def plot_load(axes, runs):
    """Share of choices per expert, sorted, mean over the last quarter of the logged steps."""
    models = {job.model.name: (job.model, log) for job, log in runs.items()}
    for shift, name in ((-0.2, "moe"), (0.2, "moe_balanced")):
        model, log = models[name]
        streams = [log.streams[f"load_{LAYER}_{e}"][1] for e in range(N_EXP)]
        load = sorted((values[-max(1, len(values) // 4) :].mean() for values in streams), reverse=True)
        label = "with the load-balance loss" if name == "moe_balanced" else "without"
        axes.bar([e + 1 + shift for e in range(N_EXP)], load, width=0.4, color=model.colour, label=label)
    axes.axhline(1 / N_EXP, color="grey", linewidth=1, linestyle=":")
    axes.text(N_EXP + 0.4, 1 / N_EXP, "even", color="grey", va="bottom", ha="right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set(xlabel="expert, busiest first", ylabel="share of choices (0.5 is the most possible)", ylim=(0, 0.52))
    axes.set_title(f"Expert load, layer {LAYER}", loc="left", fontsize=10)


# ---------------------------------------------------------------------------------------------------------------------


def main():
    args = common.parse(Args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the training processes are ended too
    began, jobs = time.perf_counter(), jobs_of(args.seed)
    with common.lock(OUT, "wait for it"), replacing(OUT):
        run("fineweb.py", "--stdlib --tokenizer bytes", "--out", shown(SHARDS))
        runs = train_all(jobs, args.steps)
        run("sample.py", '--prompt "class " --max_new_tokens 300 --temperature 0.7 --device cpu', "--seed", args.seed,
            "--checkpoint", shown(next(OUT.glob("*/step_*.pt"))))  # fmt: skip
        print_table(runs)
        plot(runs, OUT / "demo.png")
    print(f"\nfigure: {shown(OUT / 'demo.png')}; {time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    common.run(main)
