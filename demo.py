"""The whole way once, small: text -> shards -> a dense GPT-2 and its MoE -> table, text, figure. No download.

    make demo            # or: python demo.py

Two CPU cores need one and a half to four minutes; with a GPU the same command uses it. The text is Python's own
standard library, the tokenizer GPT-2's. Everything lands in results/demo/, the shards in data/stdlib/.
"""

import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib

import common
import runlog

matplotlib.use("Agg")  # a file, no window
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
SHARDS = HERE / "data" / "stdlib"
OUT = HERE / "results" / "demo"
VARIANTS = {"dense": ["--n_exp", "1"], "MoE, noisy top 2 of 8": ["--n_exp", "8", "--use_noisy_top_k"]}
# GPT-2's vocabulary on a body small enough for two cores: two thirds of the work is the output projection.
SIZE = ["--n_layer", "4", "--n_head", "4", "--n_embd", "128", "--T", "128", "--B", "8", "--total_batch_size", "1024"]
SCHEDULE = ["--warmup_steps", "10", "--max_lr", "2e-3", "--val_loss_every", "10", "--val_loss_steps", "4"]


@dataclass
class Args:
    """Train a dense GPT-2 and its Mixture-of-Experts twin for a few minutes, and show what came of it."""

    steps: int = 100  # of each model, 1,024 tokens a step
    seed: int = 1337  # of both models


def run(script, *arguments):
    """Run one of the project's scripts as a user would; its exit code ends the demo when it is not 0."""
    done = subprocess.run([sys.executable, HERE / script, *map(str, arguments)], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def train(label, args):
    """Train one variant; returns its log, read, and the folder of its checkpoint."""
    print(f"\n== {label}", flush=True)
    folder = OUT / ("moe" if "MoE" in label else "dense")
    run("train_single_gpu.py", *VARIANTS[label], *SIZE, *SCHEDULE, "--data_root", SHARDS, "--seed", args.seed,
        "--max_steps", args.steps, "--run_id", "demo", "--logs_dir", folder, "--checkpoint_dir", folder,
        "--hellaswag_every", 0, "--sample_from_model_every", 0, "--progress", "bar")  # fmt: skip
    return runlog.load_run(next(folder.glob("log_*.txt"))), next(folder.glob("*/step_*.pt"))


def print_table(runs):
    print(f"\n{'variant':24}{'parameters':>13}{'active':>13}{'first val':>11}{'last val':>10}{'tokens/s':>10}")
    for label, (log, _) in runs.items():
        (_, val), (_, speed) = log.streams["val"], log.streams["tok_per_sec"]
        print(
            f"{label:24}{log.meta['params_total']:13,}{log.meta['params_active']:13,}"
            f"{val[0]:11.3f}{val[-1]:10.3f}{statistics.median(speed):10,.0f}"
        )


def plot(runs, path):
    """Validation loss of both runs, and the share of tokens of each expert of the MoE's first layer over time."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for (label, (log, _)), style in zip(runs.items(), (("#000000", "--"), ("#0072B2", "-")), strict=True):
        left.plot(*log.streams["val"], color=style[0], linestyle=style[1], label=label)
    left.set(
        xlabel="step (1,024 tokens each)", ylabel="validation cross-entropy (nats per token)", title="Validation loss"
    )
    left.legend(frameon=False)
    streams = runs["MoE, noisy top 2 of 8"][0].streams
    loads = [streams[f"load_0_{e}"] for e in range(8)]
    right.stackplot(loads[0][0], [values for _, values in loads], colors=plt.get_cmap("cividis").resampled(8).colors)
    for boundary in range(1, 8):
        right.axhline(boundary / 8, color="white", linewidth=0.5, linestyle=":")
    right.set(xlabel="step", ylabel="share of choices, 8 experts stacked", title="Expert load, first MoE layer")
    right.set(xlim=(loads[0][0][0], loads[0][0][-1]), ylim=(0, 1))
    figure.savefig(path, dpi=150)


def main():
    args = common.parse(Args)
    began = time.perf_counter()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    run("fineweb.py", "--stdlib", "--out", SHARDS)
    runs = {label: train(label, args) for label in VARIANTS}
    print_table(runs)
    print("\n== text from the MoE")
    run("sample.py", "--checkpoint", runs["MoE, noisy top 2 of 8"][1], "--prompt", "def main(", "--num_samples", 2,
        "--max_new_tokens", 60, "--top_k", 50)  # fmt: skip
    figure = OUT / "demo.png"
    plot(runs, figure)
    print(f"\nfigure: {figure.relative_to(Path.cwd()) if figure.is_relative_to(Path.cwd()) else figure}")
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    common.run(main)
