"""The tables of results/README.md are what the logs say."""

import re
from pathlib import Path

import runlog
import sweep

RESULTS = Path(__file__).resolve().parents[1] / "results"
SEEDS = [42, 2025, 1337]


def table_under(heading):
    """{variant: the cells of its row after the first} of the table under `heading`."""
    text = (RESULTS / "README.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\S+)` \|(.*)\|$", text, re.MULTILINE)
    return {name: [cell.strip() for cell in rest.split("|")][1:] for name, rest in rows}


def all_variants():
    """The rows of `cpu_small`."""
    runs = runlog.load_runs(RESULTS / "cpu_small")
    names = {run.name: sweep.variant_of(run).name for run in runs}
    cells = {}
    for row in runlog.summary(runs).itertuples():
        max_vio = "-" if row.variant == "no_moe" else f"{row.max_vio:.2f}"
        val = f"{row.val_mean:.3f} ± {row.val_std:.3f}"
        cells[names[row.variant]] = [val, f"{row.diverged} of {row.runs}", f"{row.spikes:.1f}", max_vio]
    return cells


def last_vals(folder, max_lr):
    """{variant, or name of the log of one that is not in the table: the last val of each seed}."""
    runs = runlog.load_runs(RESULTS / folder)
    assert all(run.meta["args"]["max_lr"] == max_lr for run in runs)
    variants = [sweep.variant_of(run) for run in runs]
    names = [variant.name if variant else run.name for variant, run in zip(variants, runs, strict=True)]
    val = {(name, run.seed): run.streams["val"][1][-1] for name, run in zip(names, runs, strict=True)}
    return {name: " ".join(f"{val[name, seed]:.3f}" for seed in SEEDS) for name in names}


def higher_rate():
    """The rows of `cpu_small_lr_0.016`, beside the same runs of `cpu_small` where there are such."""
    low, high = last_vals("cpu_small", 4e-3), last_vals("cpu_small_lr_0.016", 1.6e-2)
    return {name: [low.get(name, "-"), cell] for name, cell in high.items()}


def test_table_of_the_cpu_runs():
    assert table_under("The setting") == all_variants()


def test_table_of_the_higher_learning_rate():
    assert table_under("How stable is MoE training, and which tricks help?") == higher_rate()
