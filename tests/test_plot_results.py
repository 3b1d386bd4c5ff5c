"""The notebook runs with no, one and several runs present, and is committed without outputs."""

import json
import shutil
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient

import runlog
import train_single_gpu

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "plot_results.ipynb"
CURVES = ROOT / "results/published/curves.csv"


def execute(results, monkeypatch):
    """Run the notebook on the folder `results`; return the text it printed and the names of its figures."""
    monkeypatch.setenv("RESULTS", str(results))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")
    figures = sorted((results / "figures").glob("*.png"))
    assert [path.stem for path in figures] == sorted(path.stem for path in (results / "figures").glob("*.svg"))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in figures)
    return text, [path.stem for path in figures]


def make_run(folder, seed, steps=60, diverge_at=None, **settings):
    """A log as the trainer writes it, with invented numbers, and the JSON beside it."""
    args = train_single_gpu.Args(seed=seed, run_id="made", max_steps=steps, **settings)
    path = runlog.log_path(folder, train_single_gpu.variant_name(args), args.run_id, seed)
    rng = np.random.default_rng(seed)
    with runlog.RunLog(path) as log:
        for step in range(steps + 1):
            if step % 10 == 0:
                log.write(step, val=2 + 4 / (step + 1), hella=0.25)
            if step == steps:
                break
            if step == diverge_at:
                log.write(step, train=np.nan, diverged=1)
                break
            log.write(step, train=2 + 4 / (step + 1), grad_norm=1 + rng.random())
            log.write(step, tok_per_sec=1e4, hours=(step + 1) / 100)
            if args.n_exp > 1:
                log.write(step, max_vio=0.5, drop_frac=0.1)
            if args.n_exp > 1 and step % 10 == 0:
                log.write(step, {f"load_{layer}_{e}": 1 / 8 for layer in (0, 2) for e in range(8)})
    about = {"args": vars(args), "config": {"vocab_size": 50304}, "flops_per_token": 1e6, "tokens_per_step": 524_288}
    path.with_suffix(".json").write_text(json.dumps(about))
    return path


def test_no_logs_and_no_published_curves(tmp_path, monkeypatch):
    assert execute(tmp_path, monkeypatch)[1] == []


def test_published_curves_and_one_run(tmp_path, monkeypatch):
    header, *rows = CURVES.read_text().splitlines(keepends=True)
    (tmp_path / "published").mkdir()
    (tmp_path / "published/curves.csv").write_text(header + "".join(rows[::10]))  # fewer: drawing is what takes time
    make_run(tmp_path / "alone", seed=1, n_exp=8)
    text, figures = execute(tmp_path, monkeypatch)
    published = {f"published_{figure}" for figure in ("val_by_seed", "hella_by_seed", "moe_against_dense")}
    assert published <= set(figures) and "alone_expert_load" in figures
    assert "alone: no dense run to compare with" in text


def test_several_runs_one_diverged_one_thinned(tmp_path, monkeypatch):
    for seed in (1, 2):
        make_run(tmp_path / "small", seed, n_exp=1)
        make_run(tmp_path / "small", seed, use_aux_loss=True, diverge_at=35 if seed == 2 else None)
        make_run(tmp_path / "small", seed, n_exp=4)  # not in the table of variants by name, but by settings
        make_run(tmp_path / "higher", seed, use_aux_loss=True, max_lr=0.5)
    log = make_run(tmp_path / "elsewhere", seed=3, gate="sigmoid")
    runlog.to_csv(log, tmp_path / "small" / f"{log.stem}.csv")
    shutil.move(log.with_suffix(".json"), tmp_path / "small")
    shutil.rmtree(tmp_path / "elsewhere")
    text, figures = execute(tmp_path, monkeypatch)
    panels = ("balance", "expert_load", "grad_norm", "hella_by_seed", "moe_against_dense", "same_loss", "val_by_seed")
    assert {f"small_{panel}" for panel in panels} <= set(figures)
    rows = (tmp_path / "figures/small_summary.csv").read_text().splitlines()
    assert [row.split(",")[:4] for row in rows if "aux_loss" in row] == [["moe_aux_loss", "aux_only", "2", "1"]]
    assert "only_moe" in text and "sigmoid" in text
    (rates,) = (tmp_path / "figures").glob("*_learning_rates.csv")
    head, *rows = (row.split(",")[:4] for row in rates.read_text().splitlines())
    assert head == ["variant", "max_lr", "runs", "diverged"]
    assert rows == [["aux_only", "0.5000", "2", "0"], ["aux_only", "0.0006", "2", "1"]]


def test_notebook_is_committed_clean():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count is None and not cell.outputs for cell in cells)


def test_published_curves_are_small():
    assert CURVES.stat().st_size < 1_000_000
