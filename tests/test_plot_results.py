"""The notebook draws no, one and several experiments, odd logs among them, and is committed without outputs."""

import contextlib
import io
import json
import os

os.environ.setdefault("MPLBACKEND", "Agg")

import shutil
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient

import identity
import logger
import runlog
import train_single_gpu

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "plot_results.ipynb"
CURVES = ROOT / "results/published/curves.csv"
FIGURES = ROOT / "results/figures"


def cells():
    return [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]


def in_kernel():
    """What the notebook prints when Jupyter runs it."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")


def in_this_process():
    """The same in this process, which saves the start of a kernel."""
    namespace, text = {"__name__": "notebook"}, io.StringIO()
    with matplotlib.rc_context(), contextlib.redirect_stdout(text), contextlib.chdir(ROOT):
        for cell in cells():
            exec(cell.source, namespace)
    return text.getvalue()


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """execute() runs the notebook on the folder `tmp_path`: the text it prints and the names of its figures."""
    monkeypatch.setenv("RESULTS", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "Agg")

    def call(how=in_this_process):
        text = how()
        assert "cannot be drawn" not in text, text
        figures = sorted((tmp_path / "figures").glob("*.png"))
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in figures)
        assert not list((tmp_path / "figures").glob("*.svg"))
        return text, {path.stem for path in figures}

    return call


def make_run(folder, seed, steps=60, diverge_at=None, last=2.0, streams=("val", "hella"), **settings):
    """A log as the trainer writes it, with invented numbers, and the JSON beside it."""
    args = train_single_gpu.Args(seed=seed, run_id="made", max_steps=steps, **settings)
    path = runlog.log_path(folder, args.name or identity.run_name(args), args.run_id, seed)
    rng = np.random.default_rng(seed)
    log = logger.RunLog(path)
    for step in range(steps + 1):
        if step % 10 == 0:
            values = {"val": last + (11 - last) / (step + 1), "hella": 0.25}
            log.write(step, {stream: values[stream] for stream in streams})
        if step == steps:
            break
        if step == diverge_at:
            log.write(step, {"train": np.nan, "diverged": 1})
            break
        log.write(step, {"train": last + 4 / (step + 1), "grad_norm": 1 + rng.random()})
        log.write(step, {"tok_per_sec": 1e4, "hours": (step + 1) / 100})
        if args.n_exp > 1:
            log.write(step, {"max_vio": 0.5, "drop_frac": 0.1})
        if args.n_exp > 1 and step % 10 == 0:
            layers = range(0, 4, args.stride)
            log.write(step, {f"load_{layer}_{e}": 1 / args.n_exp for layer in layers for e in range(args.n_exp)})
    log.close()
    counted = identity.counted_settings(args) | {"data": "made"}
    record = {"identity": identity.identity(counted), "settings": counted, "changes": [], "args": vars(args)}
    record |= {"flops_per_token": 1e6, "tokens_per_step": 524_288}
    path.with_suffix(".json").write_text(json.dumps(record))
    return path


def test_no_logs_and_no_published_curves(execute, tmp_path):
    text, figures = execute()
    assert text == f"0 runs in {tmp_path}\n" and not figures


@pytest.mark.slow
def test_published_curves_and_one_run(execute, tmp_path):
    (tmp_path / "published").mkdir()
    shutil.copy(CURVES, tmp_path / "published")
    make_run(tmp_path / "alone", seed=1, n_exp=8)
    text, figures = execute()
    published = {f"published_{figure}" for figure in ("val_by_seed", "hella_by_seed", "moe_against_dense")}
    assert figures == published | {"alone_curves", "alone_stability", "alone_expert_load"}
    assert "moe 20250625 seed 42, repeated later" in text
    table = pd.read_csv(tmp_path / "figures/published_summary.csv").set_index("label")
    assert (table.step == 25_250).all() and table.spikes.isna().all()


@pytest.mark.slow
def test_several_experiments_with_every_kind_of_run(execute, tmp_path):
    for seed in (1, 2):
        make_run(tmp_path / "small/dense", seed, n_exp=1)
        make_run(tmp_path / "small/moe", seed, use_aux_loss=True, diverge_at=35 if seed == 2 else None)
        make_run(tmp_path / "small/moe", seed, n_exp=4, stride=1)  # no variant, and other layers
        make_run(tmp_path / "small/moe", seed, use_aux_loss=True, aux_loss_weight=1.0)
        make_run(tmp_path / "higher", seed, use_aux_loss=True, max_lr=0.5, steps=1000, last=6.0)
        make_run(tmp_path / "lower", seed, use_aux_loss=True, steps=1000)
    log = make_run(tmp_path / "elsewhere", seed=3, gate="sigmoid")
    runlog.thin_into(tmp_path / "small/moe", [runlog.load_run(log)])
    shutil.rmtree(tmp_path / "elsewhere")
    text, figures = execute(in_kernel)
    assert "  small: 9 runs in 5 groups" in text, "dense and MoE of one experiment lie in two folders"
    every = {f"small_{figure}" for figure in ("curves", "stability", "expert_load", "last_val")}
    assert (
        figures >= every | {"higher_curves", "lower_curves"}
        and len(figures & {"higher_learning_rates", "lower_learning_rates"}) == 1
    )
    table = pd.read_csv(tmp_path / "figures/small_summary.csv")
    rows = table[table.variant == "moe_aux_loss"]
    assert rows[["label", "runs", "diverged"]].values.tolist() == [["aux_only", 2, 1]]
    assert {"sigmoid", "no_moe", "aux_only"} < set(table.label)
    rates = pd.read_csv(next((tmp_path / "figures").glob("*_learning_rates.csv"))).sort_values("max_lr")
    assert rates.variant.tolist() == ["aux_only"] * 2 and rates.stuck.tolist() == [0, 2]
    assert pd.read_csv(tmp_path / "figures/small_to_dense.csv").variant.tolist().count("aux_only") == 1


@pytest.mark.slow
def test_odd_logs_are_named_and_do_not_stop_the_others(execute, tmp_path):
    folder = tmp_path / "runs"
    for n_exp in (1, 8):
        make_run(folder, seed=1, n_exp=n_exp)
    make_run(folder, seed=3, streams=(), stride=1)  # --val_loss_every 0
    make_run(folder, seed=4, steps=1)
    make_run(folder, seed=5, diverge_at=0)
    make_run(folder, seed=6).with_suffix(".json").write_text("{")
    shutil.copy(make_run(tmp_path / "a", seed=7), folder / "log_foo.txt")
    make_run(folder, seed=8).write_text("0 val 5\n1 train\n")
    make_run(folder, seed=9).write_text("")
    make_run(folder, seed=10).with_suffix(".json").unlink()
    shutil.copy(ROOT / "tests/data/log_moe_20250711_seed_1337.txt", folder)  # a published log: no JSON
    text, figures = execute()
    skipped = [line for line in text.splitlines() if line.startswith("skipped: ")]
    assert len(skipped) == 3 and all(
        any(name in line for line in skipped) for name in ("seed_6.json", "log_foo.txt", "seed_8.txt")
    )
    assert any(name.endswith("_curves") for name in figures) and any(name.endswith("_stability") for name in figures)


def test_notebook_is_committed_clean():
    assert all(cell.execution_count is None and not cell.outputs for cell in cells())


def test_committed_figures_are_small_and_no_other_kind():
    files = list(FIGURES.iterdir())
    assert {path.suffix for path in files} <= {".png", ".csv"}
    assert max(path.stat().st_size for path in files) <= 200_000
    assert sum(path.stat().st_size for path in files) < 2_000_000 and (FIGURES / "hero.png").exists()
