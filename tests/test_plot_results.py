"""The notebook draws the committed experiments and made runs, odd ones among them, and is committed without outputs."""

import shutil
import types
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from test_compare import write_run

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = nbformat.read(ROOT / "plot_results.ipynb", as_version=4)
CODE = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"]


def draw(folder, monkeypatch, only=""):
    """Run the cells in this process on folder/results and folder/logs; the names of the figures."""
    for name, value in (("RESULTS", folder / "results"), ("LOGS", folder / "logs"), ("FIGURES", only)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    module = types.ModuleType("plot_results")
    exec(compile("\n\n".join(CODE), "plot_results.ipynb", "exec"), vars(module))
    return {path.stem for path in folder.glob("results/figures/*.png")}


def write_moe(folder, name, seed, steps=60, last=2.0, streams=("val", "hella"), diverge_at=None, **settings):
    """A run with invented numbers: val, hella and loads every 10 steps, train and max_vio at every one."""
    rng, lines, is_moe = np.random.default_rng(seed), [], settings.get("n_exp", 8) > 1
    for step in range(steps + 1):
        if step % 10 == 0:
            values = {"val": last + (5 - last) / (step + 1) + seed / 100, "hella": 0.25 + step / 1000}
            lines += [f"{step} {stream} {values[stream]}" for stream in streams]
        if step == diverge_at:
            lines += [f"{step} diverged 1"]
        if step in (steps, diverge_at):
            break
        lines += [f"{step} train {last + rng.random() / 10}", f"{step} hours {step / 100}"]
        lines += [f"{step} max_vio {rng.random()}"] * is_moe
        if is_moe and step % 10 == 0:
            lines += [f"{step} load_{layer}_{e} {rng.random()}" for layer in (0, 2) for e in range(4)]
    return write_run(folder, name, seed, log="\n".join(lines) + "\n", max_steps=steps, **settings)


def test_nothing_to_draw(tmp_path, monkeypatch, capsys):
    assert draw(tmp_path, monkeypatch) == set() and capsys.readouterr().out == ""


@pytest.mark.slow
def test_own_runs_of_every_kind(tmp_path, monkeypatch):
    logs = tmp_path / "logs"
    for seed in (1, 2):
        write_moe(logs / "demo", "no_moe", seed, n_exp=1)
        write_moe(logs / "demo", "only_moe", seed, last=1.9, diverge_at=35 if seed == 2 else None)
        write_moe(logs / "demo", "my_trick", seed, last=1.8)
        write_moe(logs / "rates", "dense", seed, n_exp=1, streams=("val",), max_lr=0.001 * seed)
    write_moe(logs, "no_val", 3, streams=())
    write_moe(logs, "one_step", 4, steps=1)
    write_moe(logs, "at_once", 5, diverge_at=0)
    demo = {f"logs_demo_{figure}" for figure in ("curves", "last_loss", "load")}
    assert draw(tmp_path, monkeypatch, only="demo") == demo
    shutil.rmtree(tmp_path / "results")
    others = {"logs_logs_curves", "logs_logs_load", "logs_rates_curves", "logs_rates_learning_rates"}
    assert draw(tmp_path, monkeypatch) == demo | others


@pytest.mark.slow
def test_the_committed_experiments_in_a_kernel(tmp_path, monkeypatch):
    """As `make figures` does it; the figures are those that are committed, beside that of the demo."""
    shutil.copytree(ROOT / "results", tmp_path / "results", ignore=shutil.ignore_patterns("figures", "bench", "gpu"))
    for name in ("RESULTS", "LOGS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    notebook = nbformat.read(ROOT / "plot_results.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    drawn = {path.name for path in (tmp_path / "results/figures").iterdir()}
    committed = [path for path in (ROOT / "results/figures").glob("*.png") if not path.name.startswith("logs_")]
    assert drawn == {path.name for path in committed}
    assert len(committed) <= 8 and max(path.stat().st_size for path in committed) <= 150_000


def test_the_notebook_is_committed_clean_and_short():
    cells = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
    assert all(cell.execution_count is None and not cell.outputs for cell in cells)
    assert sum(source.count("\n") + 1 for source in CODE) <= 350
