"""The pages are true: every command parses, links lead on, the trick of docs/add_a_trick.md works to its last line."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, streams, tiny

LIMITS = {"README.md": 130, "results/README.md": 120}  # lines; 105 for the other pages, two screens
PAGES = [*LIMITS, *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
EXPERIMENTS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("results/*/README.md"))
TRICK = "docs/add_a_trick.md"


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def commands(page):
    """The words of each python or torchrun command of a page, in its code and between backticks."""
    text = read(page).replace("\\\n", " ")
    found = re.findall(r"^ {4,}((?:python|torchrun) .*)$", text, re.MULTILINE)
    found += re.findall(r"`((?:python |torchrun )?(?:--\S+ )*\w+\.py [^`]+)`", text)
    return [shlex.split(command, comments=True) for command in found if ".py" in command]


def check(words):
    """Parse a command as its script does, without running it. SystemExit or UserError for what it would refuse."""
    from lab import common

    start = next(i for i, word in enumerate(words) if word.endswith(".py"))
    name, given = words[start].removesuffix(".py"), words[start + 1 :]
    given = [word for word in given if word != "..."]
    if "--help" in given:
        return
    module, trainer = (importlib.import_module(script) for script in (name, "train_single_gpu"))
    if name != "train_single_gpu":
        found = common.parse(module.Args, given, unknown=name == "sweep")
        if name != "sweep":
            return
        given = found[1]
    # The published defaults, where settings of Args must fit to each other: users edit them.
    usual = {"B": 16, "T": 1024, "total_batch_size": 524_288, "block_size": None, "fsdp": False, "optimizer": "adamw"}
    common.parse(trainer.Args, given, trainer.Args(**usual)).model_config()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses(page, monkeypatch):
    for words in commands(page):
        ranks = [int(word.split("=")[1]) for word in words if re.match(r"--(nproc_per_node|nnodes)=", word)]
        monkeypatch.setenv("WORLD_SIZE", str(int(np.prod(ranks))))
        if page == TRICK:  # its own variant and switch
            words = ["only_moe" if word == "simbal" else word for word in words if word != "--use_simbal"]
        try:
            check(words)
        except (SystemExit, Exception) as error:
            pytest.fail(f"{page}: {shlex.join(words)}: {error}")


@pytest.mark.parametrize("page", PAGES + EXPERIMENTS)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), f"{page}: {link}"
        titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not anchor or anchor in anchors, f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_short(page):
    assert len(read(page).splitlines()) <= LIMITS.get(page, 105)


def test_the_readme_names_every_script():
    assert [path.name for path in ROOT.glob("*.py") if f"`{path.name}`" not in read("README.md")] == []


# ---------------------------------------------------------------------------------------------------------------------
# The worked example


RUNS = """
import importlib, json, sys
import train_single_gpu as trainer
from variants import VARIANTS

settings, *commands = json.loads(sys.argv[1])
for name in ("only_moe", "simbal"):
    for seed in (1, 2, 3):
        own = VARIANTS[name].settings | {"name": name, "seed": seed, "data_seed": seed}
        assert trainer.run(trainer.Args(**settings | own)) == 0
for sys.argv in commands:
    importlib.import_module(sys.argv[0]).main()
"""


@pytest.mark.slow
def test_the_worked_example(shards, tmp_path):
    """The page's diff trains, its model is exported, the page's last command prints a difference with an interval."""
    code = tmp_path / "code"
    shutil.copytree(ROOT / "lab", code / "lab", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, code)
    [diff] = re.findall(r"^```diff\n(.*?)^```$", read(TRICK), re.MULTILINE | re.DOTALL)
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=code, check=True)
    last = next(words[3:] for words in commands(TRICK) if "--baseline" in words)
    export = ["weights", "--checkpoint", str(tmp_path / "simbal_seed_1"), "--export_hf", str(tmp_path / "export")]
    settings = tiny(data_root=str(shards), logs_dir=str(tmp_path), max_steps=20, val_loss_every=20)
    words = json.dumps([settings, export, ["compare", str(tmp_path), *last]])
    done = subprocess.run([sys.executable, "-c", RUNS, words], cwd=code, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    losses = streams(tmp_path / "simbal_seed_1")["simbal_loss"][1]
    assert len(losses) == 20 and losses[-1] < losses[0]
    assert "simbal_loss" not in streams(tmp_path / "only_moe_seed_1")
    difference = r"^simbal +.* [-+]\d\.\d{3} \[[-+]\d\.\d{3}, [-+]\d\.\d{3}\]"
    assert (tmp_path / "export/config.json").exists() and re.search(difference, done.stdout, re.MULTILINE), done.stdout
