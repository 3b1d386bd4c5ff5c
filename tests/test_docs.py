"""The documents are true: the diff of docs/add_a_trick.md is applied and trained, commands parse, links lead on."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import runlog
import train_single_gpu
from lab import common

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "results/README.md", "results/published/README.md", "docs/add_a_trick.md")


def commands(page):
    """(script or module, its arguments, number of ranks) of each python or torchrun line in the code of a page."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^    (?:.* )?((?:python|torchrun) .*)$", text, re.MULTILINE):
        words = shlex.split(line, comments=True)
        start = next((i for i, word in enumerate(words) if word.endswith(".py") or word == "bench"), None)
        if start is not None:
            ranks = next((int(word.split("=")[1]) for word in words if word.startswith("--nproc_per_node=")), 1)
            yield words[start], words[start + 1 :], ranks


def check(script, arguments, ranks):
    """Parse a command line as the script does, without running it. UserError for what it would refuse."""
    arguments = [word for word in arguments if word != "--use_simbal" and not word.startswith("$")]
    module = importlib.import_module("bench.__main__" if script == "bench" else Path(script).stem)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    args = common.parse(module.Args, arguments[:cut])
    if script == "train_single_gpu.py":
        train_single_gpu.check_args(args, ranks)
    if script == "sweep.py":
        assert set(args.variants) <= {"all", "simbal", *module.VARIANTS}  # docs/add_a_trick.md adds simbal
        train_single_gpu.check_args(common.parse(train_single_gpu.Args, arguments[cut + 1 :]), 1)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses(page, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests")  # results/README.md names a script there
    found = list(commands(page))
    assert found
    for script, arguments, ranks in found:
        try:
            check(script, arguments, ranks)
        except common.UserError as error:
            pytest.fail(f"{page}: {script} {shlex.join(arguments)}: {error}")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_file_leads_to_one(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if not link.startswith("http")]
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


def test_the_readme_names_every_script():
    table = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in ROOT.glob("*.py") if f"`{path.name}`" not in table] == []


@pytest.fixture(scope="module")
def with_the_trick(tmp_path_factory):
    """A copy of the repository's code with the diff of docs/add_a_trick.md applied."""
    folder = tmp_path_factory.mktemp("repository")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    page = (ROOT / "docs" / "add_a_trick.md").read_text(encoding="utf-8")
    [diff] = re.findall(r"^```diff\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=folder, check=True)
    return folder


TINY = shlex.split(
    "--vocab_size 257 --n_layer 2 --n_head 2 --n_embd 32 --T 32 --B 4 --total_batch_size 128 --max_steps 20 "
    "--max_lr 4e-3 --warmup_steps 0 --val_loss_every 20 --val_loss_steps 2 --hellaswag_every 0 "
    "--sample_from_model_every 0 --no_save_checkpoint --device cpu --progress lines"
)


@pytest.mark.slow
def test_the_worked_example_trains(with_the_trick, shards, tmp_path):
    logs = {}
    for name, flags in (("trick", ["--use_simbal"]), ("plain", [])):
        logs[name] = tmp_path / name
        command = [sys.executable, "train_single_gpu.py", *TINY, *flags, "--run_id", "doc"]
        command += ["--data_root", shards, "--logs_dir", logs[name]]
        subprocess.run(command, cwd=with_the_trick, check=True, timeout=600)
    [log], [plain] = (list(folder.glob("log_*.txt")) for folder in logs.values())
    assert "_simbal_" in log.name and "simbal" not in plain.name  # named by what is on, as before where it is off
    streams = runlog.read(log)
    loss, ce = streams["simbal_loss"][1], streams["train"][1]
    assert len(loss) == 20 and np.isfinite(loss).all() and loss[-1] < loss[0]
    assert np.isfinite(ce).all() and ce[-5:].mean() < ce[0]
    assert "simbal_loss" not in runlog.read(plain)


@pytest.mark.slow
def test_the_worked_example_is_a_variant_of_the_sweep(with_the_trick, shards):
    flags = shlex.split("--variants only_moe simbal --seeds 1 2 3 --dry_run --")
    command = [sys.executable, "sweep.py", *flags, *TINY, "--data_root", shards]
    result = subprocess.run(command, cwd=with_the_trick, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("--use_simbal") == 3


def test_the_gap_that_the_load_balance_loss_makes_in_the_published_val():
    curves = pd.read_csv(ROOT / "results" / "published" / "curves.csv").query("run_id != 20250625")  # short ones
    val = curves.set_index(["variant", "seed", "step"]).sort_index().val
    text = (ROOT / "results" / "published" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (0\.\d+ \|.*) \|$", text, re.MULTILINE)
    assert [int(seed) for seed, _ in rows] == [42, 2025, 1337]
    for seed, cells in rows:
        both = (val[name, int(seed)] for name in ("moe_noisy_top_k_aux_loss", "moe_noisy_top_k"))
        gap = next(both) - next(both)
        assert cells.split(" | ") == [f"{gap[step]:.4f}" for step in (0, 5_000, 10_000, 15_000, 20_000, 25_250)]
