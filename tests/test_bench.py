"""The one-hot reference is the same layer; every subcommand runs; the training step stays one compiled graph."""

import copy
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from bench import __main__ as bench
from bench import baselines, timing
from model import GPT, GPTConfig

BENCHES = ("step", "scale", "moe", "tokenize", "loader", "hellaswag", "sample")
TINY = ("--device", "cpu", "--rounds", "2", "--warmup", "1", "--n_layer", "2", "--n_embd", "32", "--n_head", "2",
        "--vocab_size", "300", "--T", "32", "--n_exp", "4", "--threads", "1", "--shard_tokens", "60000",
        "--megabytes", "0.05", "--tokenizer", "bytes", "--examples", "4", "--new_tokens", "4")  # fmt: skip


def tiny_model(**settings):
    torch.manual_seed(0)
    shape = {"block_size": 32, "vocab_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 32}
    return GPT(GPTConfig(**shape, **settings))


@pytest.mark.parametrize("capacity", [0.5, 1.25, math.inf])
@pytest.mark.parametrize("bias", [True, False])
def test_one_hot_reference_is_the_moe_layer(capacity, bias):
    ours = tiny_model(n_exp=4, train_capacity=capacity, bias=bias).moe_layers()[0][1]
    with torch.no_grad():
        ours.router.w_g.weight.mul_(20)  # uneven enough that capacity 1.25 drops some
        for parameter in ours.experts.parameters():
            parameter.normal_(std=0.1)  # biases too, which start as zeros
    reference = copy.deepcopy(ours)
    reference.forward = types.MethodType(baselines.one_hot_moe, reference)
    x = torch.randn(2, 32, 32) + torch.randn(32)  # what tokens have in common makes the load uneven
    outputs, gradients = [], []
    for moe in (ours, reference):
        x_leaf = x.clone().requires_grad_()
        y = moe(x_leaf)[0]
        y.backward(torch.ones_like(y).cumsum(-1) / 32)
        outputs.append(y)
        gradients.append([x_leaf.grad, *(parameter.grad for parameter in moe.parameters())])
    dropped = float(ours.stats[0])
    assert (dropped > 0) == (not math.isinf(capacity))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)
    for a, b in zip(*gradients, strict=True):
        assert b.norm() > 0
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_forced_routing():
    logits = torch.randn(64, 8)
    half = bench.select_half(2, logits, None)
    assert ((half == 0).sum(1) == torch.tensor([1, 0] * 32)).all()
    assert (half[::2, 0] == 0).all()
    assert (half[:, 1] != half[:, 0]).all()
    in_turn = bench.select_in_turn(2, logits, None)
    assert (torch.bincount(in_turn.flatten()) == 16).all()


def test_peak_bytes_counts_what_is_held_at_once():
    def run():
        a = torch.empty(1_000_000)
        del a
        b, c = torch.empty(500_000), torch.empty(1_000_000)
        return b, c

    assert 6_000_000 <= timing.peak_bytes("cpu", run) < 6_100_000


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder to which every subcommand has written, each run as a user would; they run at the same time."""
    folder = tmp_path_factory.mktemp("bench")
    script = str(Path(bench.__file__))
    tokens = {"step": ("64", "128"), "scale": ("64", "128", "256"), "moe": ("64",)}
    data = folder / "hellaswag.jsonl"
    endings = ["runs.", "runs home.", "is a shoe.", "sleeps."]
    lines = [json.dumps({"ctx": f"A man {verb}. He", "endings": endings, "label": 1}) for verb in ("eats", "is tired")]
    data.write_text("\n".join(lines))
    processes = {}
    for name in BENCHES:
        extra = ("--tokens", *tokens[name]) if name in tokens else ()
        dtype = "both" if name in ("step", "moe") else "float32"
        words = [sys.executable, script, name, *TINY, "--data", str(data), "--dtype", dtype, "--out_dir", str(folder)]
        words += extra
        processes[name] = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for name, process in processes.items():
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, f"{name}: {errors}"
        assert out.strip(), name
    return folder


@pytest.mark.parametrize("name", BENCHES)
def test_subcommand_writes_whole_json(results, name):
    paths = sorted(results.glob(f"{name}_cpu_*.json"))
    assert len(paths) == (2 if name in ("step", "moe") else 1)
    for path in paths:
        result = json.loads(path.read_text())
        assert {"machine", "settings", "rows", "targets", "samples_s"} <= set(result)
        assert {"torch", "threads", "commit", "name"} <= set(result["machine"])
        assert result["settings"]["rounds"] == 2
        assert result["rows"]
        assert all(
            len(rounds) == 2 and all(min(phases) >= 0 for phases in rounds) for rounds in result["samples_s"].values()
        )
    assert not list(results.glob("*.tmp"))


def test_fast_ways_give_what_the_usual_ones_give(results):
    for name in ("hellaswag", "sample"):
        rows = json.loads((results / f"{name}_cpu_float32.json").read_text())["rows"]
        assert all(row["agreement"] == 1 for row in rows if row["way"] != "published"), rows


def test_memory_is_linear_and_one_hot_is_not(results):
    """At these sizes the fixed part is small; the slope of the largest step is what counts."""
    rows = json.loads((results / "scale_cpu_float32.json").read_text())["rows"]
    memory = {name: [row["MB"] for row in rows if row["variant"] == name] for name in ("top2_capacity", "one_hot")}
    for name, growth in (("top2_capacity", 2.0), ("one_hot", 2.4)):
        small, middle, large = memory[name]
        ratio = (large - middle) / (middle - small)  # 2 where linear: the step from 128 to 256 is twice that from 64
        assert (ratio < 1.1 * growth) if name == "top2_capacity" else (ratio > growth), (name, memory)


@pytest.mark.parametrize("argv, words", [
    (("step", "--tokens", "100"), "--tokens 100 is not a multiple of --T"),
    (("step", "--variants", "dens"), "no 'dens'"),
    (("step", "--imbalanced", "--uniform_routing"), "exclude each other"),
    (("step", "--rounds", "0"), "--rounds 0"),
    (("sample", "--T", "32", "--new_tokens", "30"), "--new_tokens 30 must lie in 4 to T - 8 = 24"),
])  # fmt: skip
def test_bad_settings_are_said(argv, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", *argv, "--device", "cpu"])
    with pytest.raises(bench.UserError, match=words):
        bench.main()


@pytest.mark.parametrize("settings", [
    {"n_exp": 1},
    {"n_exp": 4, "use_noisy_top_k": True, "use_aux_loss": True, "use_router_z_loss": True, "train_capacity": 0.5},
], ids=["dense", "moe"])  # fmt: skip
def test_steady_state_has_no_break_and_no_recompile(settings):
    torch._dynamo.reset()
    counters.clear()
    model = tiny_model(**settings)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.AdamW(model.optimizer_groups(0.1), lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        if step == 1:
            graphs = counters["stats"]["unique_graphs"]
        x, y = torch.randint(64, (2, 2, 32), generator=generator)
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            compiled(x, y).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert graphs == counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_compiled_step_is_the_plain_step():
    torch._dynamo.reset()
    model = tiny_model(n_exp=4)
    x, y = torch.randint(64, (2, 2, 32))
    gradients = []
    for called in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        called(x, y).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
