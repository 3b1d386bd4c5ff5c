"""`bench gpu`: five parts in their order, each whole on disk whatever ends the run, wrong results found."""

import json
import math
import os
import shlex
import signal
import time
import types

import moe
import psutil
import pytest
import torch
from conftest import Forked

from bench import correct, gpu, report
from lab.common import UserError

NAMES = [f"{i}_{part}.json" for i, part in enumerate(gpu.SHARES, start=1)]
SMALL = shlex.split("--device cpu --threads 1 --n_embd 32 --tokens 64 128 --rounds 1 --warmup 1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    endings = ["runs.", "runs home.", "is a shoe.", "sleeps."]
    path = tmp_path_factory.mktemp("hellaswag") / "hellaswag.jsonl"
    path.write_text(json.dumps({"ctx": "A man eats. He", "endings": endings, "label": 1}))
    return path


@pytest.fixture(scope="module")
def start(shards, data):
    """start(folder, minutes, *words): a process of `python -m bench gpu`."""

    def start(folder, minutes, *words):
        words = ("-m", "bench", "gpu", *SMALL, "--minutes", minutes, "--out_dir", folder, *words)
        return Forked(*words, "--data", data, "--data_root", shards)

    return start


def load(folder, part):
    return json.loads((folder / NAMES[list(gpu.SHARES).index(part)]).read_text())


# -- the whole command


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """(folder, stdout) of a run with more time than it needs: its last part ends at its last step."""
    folder = tmp_path_factory.mktemp("gpu")
    process = start(folder, 60)
    out, errors = process.communicate()
    assert process.poll() == 0, out + errors
    return folder, out


@pytest.mark.slow
def test_every_part_is_measured(whole):
    folder, out = whole
    assert sorted(path.name for path in folder.glob("*_*.json") if path.name in NAMES) == NAMES
    for part in gpu.SHARES:
        found = load(folder, part)
        assert found["status"] == "done"
        assert {section["status"] for section in found["sections"].values()} == {"done"}
        assert all(section["rows"] for section in found["sections"].values())
    assert not list(folder.glob("*.tmp"))
    text = (folder / "report.md").read_text()
    assert json.loads((folder / "report.json").read_text())["parts"].keys() == gpu.SHARES.keys()
    for words in ("GB/s", "max_vio", "examples/s", "tok/s", "grouped product"):
        assert words in out and words in text


@pytest.mark.slow
def test_steps_of_every_variant_and_size(whole):
    rows = [
        row for section in load(whole[0], "step")["sections"].values() for row in section["rows"] if "variant" in row
    ]
    assert {row["variant"] for row in rows} == set(gpu.steps.VARIANTS)
    assert {row["tokens"] for row in rows} == {64, 128}
    busiest = max(row["max_vio"] for row in load(whole[0], "step")["sections"]["imbalanced 64"]["rows"])
    assert busiest >= 1  # an expert with half of all choices of 8 experts, top 2


@pytest.mark.slow
def test_both_runs_learn(whole):
    sections = load(whole[0], "train")["sections"]
    for name in gpu.RUNS:
        rows = sections[f"run {name}"]["rows"]
        assert rows[-1]["val"] < rows[0]["val"] and rows[-1]["hours"] > 0
        assert rows[-1]["tokens"] == rows[-1]["step"] * 1024


@pytest.mark.slow
def test_no_time(start, tmp_path):
    """With hardly any time every part has a file that says so, and the report is written."""
    process = start(tmp_path, 0.01)
    out, errors = process.communicate()
    assert process.poll() == 0, out + errors
    states = [load(tmp_path, part)["status"] for part in gpu.SHARES]
    assert all(state == "done" or state.startswith("stopped at its time limit: ") for state in states), states
    assert "stopped" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_killed_after_two_parts(start, tmp_path):
    """Both are whole, and no process is left behind."""
    process = start(tmp_path, 60, "--parts", "machine", "data", "train")
    while not (tmp_path / NAMES[4]).exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(children, timeout=600)[1]
    for part in ("machine", "data"):
        assert load(tmp_path, part)["status"] == "done"
    assert list(json.loads((tmp_path / "report.json").read_text())["parts"]) == ["machine", "data"]


# -- a part that fails


def args(folder):
    return types.SimpleNamespace(out_dir=folder, device="cpu", threads=None)


def run_part(folder, monkeypatch, sections, seconds=600.0):
    monkeypatch.setitem(gpu.PARTS, "step", lambda args, end: iter(sections))
    gpu.run_part(args(folder), "step", time.monotonic() + seconds)
    return load(folder, "step")


def rows(value):
    return lambda: ([{"value": value}], {}, [])


def raising(error):
    def function():
        raise error

    return function


@pytest.mark.slow
def test_sections_after_one_that_fails_still_run(tmp_path, monkeypatch):
    sections = [("a", rows(1)), ("b", raising(ValueError("broken\nin two"))), ("c", raising(UserError("no data"))),
                ("d", raising(torch.OutOfMemoryError("CUDA out of memory"))), ("e", rows(2))]  # fmt: skip
    found = run_part(tmp_path, monkeypatch, sections)
    assert found["status"] == "done"
    states = {name: section["status"] for name, section in found["sections"].items()}
    assert states == {"a": "done", "b": "failed: ValueError: broken", "c": "not run: no data",
                      "d": "out of memory: CUDA out of memory", "e": "done"}  # fmt: skip
    assert found["sections"]["e"]["rows"] == [{"value": 2}]
    assert "in two" in found["sections"]["b"]["traceback"]
    assert list(report.failures({"parts": {"step": found}})) == ["step, b: failed: ValueError: broken"]


def test_a_part_that_dies_keeps_its_sections(tmp_path, monkeypatch):
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    found = run_part(tmp_path, monkeypatch, [("a", rows(1)), ("b", die), ("c", rows(2))])
    assert found["status"] == "died with exit code -9: b"
    assert list(found["sections"]) == ["a"] and found["sections"]["a"]["rows"] == [{"value": 1}]
    assert list(report.failures({"parts": {"step": found}})) == ["step: died with exit code -9: b"]


@pytest.mark.slow
def test_a_part_that_hangs_is_ended(tmp_path, monkeypatch):
    found = run_part(tmp_path, monkeypatch, [("hang", lambda: time.sleep(3600))], seconds=1.0)
    assert found["status"].startswith("stopped at its time limit")


def test_a_section_that_cannot_end_in_time_is_not_started():
    earlier = {"compiled 1": {"seconds": 100.0}}
    now = time.monotonic()
    assert gpu.measure_section(earlier, "compiled 2", rows(1), now + 50)["status"] == "not run, no time left"
    assert gpu.measure_section(earlier, "eager 2", rows(1), now + 50)["status"] == "done"


# -- the checks


def test_a_wrong_gradient_is_found():
    right = correct.Gradients(2.0, {"a": torch.ones(4), "b": torch.full((4,), 1e-3)}, [])
    assert correct.largest_error(right, right) == 0
    for grads in ({"a": torch.ones(4)}, right.grads | {"a": torch.tensor([1, 1, 1, math.nan])}):
        assert correct.largest_error(right._replace(grads=grads), right) == math.inf
    wrong = right._replace(grads=right.grads | {"b": torch.full((4,), 1.01e-3)})
    assert correct.largest_error(wrong, right) == pytest.approx(0.005, rel=0.1)
    assert correct.largest_error(right._replace(loss=2.2), right) == pytest.approx(0.1)


def test_a_wrong_layer_is_found(monkeypatch):
    """Each expert takes a row of the next: the report names the check."""
    assert all(row["ok"] for row in correct.check_experts("cpu"))
    ours = moe.sort_by_expert

    def sort_wrongly(expert_TK, n_exp):
        plan = ours(expert_TK, n_exp)
        return plan._replace(ends_E=(plan.ends_E + 1).clamp(max=expert_TK.numel()))

    monkeypatch.setattr(moe, "sort_by_expert", sort_wrongly)
    found = correct.check_experts("cpu")
    assert found[0]["dtype"] == "float32" and not found[0]["ok"]
    parts = {"correct": {"status": "done", "seconds": 1, "sections": {"e": {"status": "done", "rows": found[:1]}}}}
    assert [line.split(",")[0] for line in report.failures({"parts": parts})] == ["correct"]


@pytest.mark.slow
def test_variants_drop_choices_and_see_the_same_noise():
    """Capacity and dropless differ; float32 on the CPU is its own reference, noise included."""
    found = correct.check_variant("router_full_prec", "cpu")
    assert [row["error"] for row in found if row["dtype"] == "float32"] == [0, 0]
    assert len({row["error"] for row in found if row["dtype"] == "bfloat16"}) == 2
    assert all(row["ok"] for row in found)
