"""The notebook draws no, one and several experiments, odd logs among them, and is committed without outputs."""

import json
import os

os.environ.setdefault("MPLBACKEND", "Agg")

import shutil
import types
from pathlib import Path

import nbformat
import numpy as np
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


def draw(results, monkeypatch, capsys):
    """Run the cells in this process on a folder: (their names, the text they print, the names of the figures)."""
    monkeypatch.setenv("RESULTS", str(results))
    monkeypatch.chdir(ROOT)
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    code = "\n\n".join(cell.source for cell in cells if cell.cell_type == "code")
    module = types.ModuleType("plot_results")
    exec(compile(code, str(NOTEBOOK), "exec"), vars(module))
    text = capsys.readouterr().out
    assert "cannot be drawn" not in text, text
    figures = sorted((results / "figures").glob("*.png"))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in figures)
    return module, text, {path.stem for path in figures}


def make_run(folder, seed, steps=60, diverge_at=None, last=2.0, streams=("val", "hella"), run_id="made", **settings):
    """A log as the trainer writes it, with invented numbers, and the JSON beside it."""
    args = train_single_gpu.Args(seed=seed, run_id=run_id, max_steps=steps, **settings)
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
    record |= {"flops_per_token": 1e6, "tokens_per_step": 524_288, "params_active": 2**20}
    path.with_suffix(".json").write_text(json.dumps(record))
    return path


@pytest.mark.slow
def test_the_notebook_runs_in_a_kernel_without_logs(tmp_path, monkeypatch):
    monkeypatch.setenv("RESULTS", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert "".join(output.get("text", "") for output in outputs) == f"0 runs in {tmp_path}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_published_curves_and_one_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "published").mkdir()
    shutil.copy(CURVES, tmp_path / "published")
    make_run(tmp_path / "alone", seed=1, n_exp=8)
    module, text, figures = draw(tmp_path, monkeypatch, capsys)
    assert figures == {"published_curves", "alone_curves", "alone_hella", "alone_expert_load"}
    assert "moe 20250625 seed 42, repeated later" in text
    balanced = next(group for group in module.published if group.name == "aux_loss")
    val = balanced.runs[0].streams["val"][1]
    assert val[-1] == pytest.approx(balanced_last(balanced.runs[0]) - 0.12), "the load-balance loss is taken out"


def balanced_last(drawn):
    """The published val of a run at the last step that is drawn."""
    steps, val = next(run for run in runlog.load_published(CURVES) if run[:3] == drawn[:3]).streams["val"]
    return val[steps == drawn.streams["val"][0][-1]][0]


@pytest.mark.slow
def test_every_kind_of_run_and_folder(tmp_path, monkeypatch, capsys):
    for seed in (1, 2):
        make_run(tmp_path / "small", seed, n_exp=1)
        make_run(tmp_path / "small", seed, use_aux_loss=True, diverge_at=35 if seed == 2 else None)
        make_run(tmp_path / "small", seed, n_exp=4, stride=1)  # no variant, and other layers
        make_run(tmp_path / "small", seed, use_aux_loss=True, aux_loss_weight=1.0)
        for rate, last in ((0.5, 6.0), (6e-4, 2.0)):
            make_run(tmp_path / f"rates_{rate:g}", seed, steps=1000, last=last, use_aux_loss=True, max_lr=rate)
    module, text, figures = draw(tmp_path, monkeypatch, capsys)
    small = {f"small_{figure}" for figure in ("curves", "hella", "expert_load", "last_val")}
    assert figures == small | {"rates_learning_rates"}, "a folder of one rate has no figures of its own"
    assert "  small: 8 runs in 4 groups" in text
    by_label = {group.label: group for group in module.experiments["small"]}
    assert by_label["load-balance loss alone"].failed == "1 of 2 diverged"
    [(name, groups)] = module.families()
    assert name == "rates" and [group.failed for group in groups] == ["", "2 of 2 stuck"]


@pytest.mark.slow
def test_figures_of_the_questions(tmp_path, monkeypatch, capsys):
    arms = [{"n_exp": 1}, {"n_exp": 1, "steps": 80}, {"n_exp": 1, "n_embd": 148}, {}, {"n_exp": 1, "optimizer": "muon"}]
    arms += [{"steps": 80}, {"n_exp": 1, "steps": 100}, {"steps": 100}]
    half = {"use_aux_loss": True, "expert_hidden": "iso"}
    for seed in (1, 2, 3):
        for i, settings in enumerate([*arms, *(half | {"n_exp": n} for n in (8, 16, 32))]):
            known = {"data_seed": seed, "n_embd": 128, "T": 64, "run_id": f"arm{i}"} | settings
            make_run(tmp_path / "equal", seed, last=2 + 0.1 * seed + 0.01 * ((seed * i) % 5) - 0.02 * i, **known)
        for settings in ({}, {"use_aux_loss": True}, {"use_bias_balance": True}):
            make_run(tmp_path / "balance", seed, last=2 + seed / 100, data_seed=seed, B=4, **settings)
        for rate in (1e-3, 2e-3):
            for warmup in (10, 20):
                for n_exp in (1, 8):
                    make_run(tmp_path / f"rates_{rate:g}", seed, warmup_steps=warmup, max_lr=rate, n_exp=n_exp, T=32)
    module, _, figures = draw(tmp_path, monkeypatch, capsys)
    assert figures >= {"hero", "balance_balance", "rates_learning_rates", "rates_warmup"}
    assert figures >= {"equal_experts", "equal_lengths"}
    pairs = [
        [group.runs[0].settings for group in pair] for pair in module.pairs_of_lengths(module.experiments["equal"])
    ]
    assert [(d["n_embd"], d["max_steps"], moe["max_steps"]) for d, moe in pairs] == [(128, n, n) for n in (60, 80, 100)]
    for row in module.comparisons(module.experiments["equal"], "no_moe"):
        assert row.found.test == "paired" and len(row.dots) == row.found.n == 3, row.label
        assert np.mean(row.dots) == pytest.approx(row.found.minus)


@pytest.mark.slow
def test_odd_logs_are_named_and_do_not_stop_the_others(tmp_path, monkeypatch, capsys):
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
    _, text, figures = draw(tmp_path, monkeypatch, capsys)
    skipped = [line for line in text.splitlines() if line.startswith("skipped: ")]
    assert len(skipped) == 3 and all(
        any(name in line for line in skipped) for name in ("seed_6.json", "log_foo.txt", "seed_8.txt")
    )
    assert figures >= {"runs_curves", "runs_last_val"}


def test_notebook_is_committed_clean():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count is None and not cell.outputs for cell in cells)


def test_committed_figures_are_small_and_no_other_kind():
    files = list(FIGURES.iterdir())
    assert {path.suffix for path in files} == {".png"}
    assert max(path.stat().st_size for path in files) <= 200_000
    assert sum(path.stat().st_size for path in files) < 2_000_000 and (FIGURES / "hero.png").exists()
