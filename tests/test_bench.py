"""The baselines compute the same as the model; every subcommand runs; a wrong setting is one line, before measuring."""

import functools
import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import Forked, call

from bench import __main__ as bench
from bench import timing
from bench.baselines import HalfRouter, OneHotMoE, TurnRouter, replace
from lab import common
from model import GPTConfig, MoE, Router

ROOT = Path(__file__).resolve().parents[1]
SHAPE = ("--device", "cpu", "--n_embd", "32", "--n_head", "2", "--vocab_size", "300", "--T", "32", "--threads", "1")
SHORT = ("--rounds", "2", "--warmup", "1", "--n_layer", "2", "--n_exp", "4", "--shard_tokens", "60000",
         "--megabytes", "0.05", "--tokenizer", "bytes", "--examples", "4", "--new_tokens", "4")  # fmt: skip

# -- baselines


@pytest.mark.parametrize("capacity", [0.5, 1.25, math.inf])
@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"n_shared_exp": 1, "use_aux_loss": True, "top_k": 1}])
def test_one_hot_dispatch_is_the_moe_layer(capacity, settings):
    """Outputs, router losses, statistics and all gradients."""
    torch.manual_seed(0)
    ours = MoE(GPTConfig(n_embd=32, n_head=2, n_exp=4, train_capacity=capacity, gate="softmax", **settings))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.1)
        ours.router.w_g.weight.mul_(4)  # uneven enough that capacity 1.25 drops some
    x = torch.randn(2, 32, 32) + torch.randn(32)  # the part common to all tokens makes the load uneven
    outputs, gradients = [], []
    for moe in (ours, replace(ours, OneHotMoE)):
        x_leaf = x.clone().requires_grad_()
        y, losses = moe(x_leaf)
        sum(losses.values(), (y * torch.ones_like(y).cumsum(-1) / 32).sum()).backward()
        outputs.append((y, losses, moe.count, moe.stats))
        gradients.append([x_leaf.grad, *(parameter.grad for parameter in moe.parameters())])
    assert (ours.stats[0] > 0) == (not math.isinf(capacity))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)
    for a, b in zip(*gradients, strict=True):
        assert b.norm() > 0
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_forced_routing():
    router = Router(GPTConfig(n_embd=32, n_head=2, n_exp=8))
    x = torch.randn(64, 32)
    half = replace(router, HalfRouter)(x).expert_TK
    assert ((half == 0).sum(1) == torch.tensor([1, 0] * 32)).all()
    assert (half[::2, 0] == 0).all()
    assert (half[:, 1] != half[:, 0]).all()
    in_turn = replace(router, TurnRouter)(x)
    assert (torch.bincount(in_turn.expert_TK.flatten()) == 16).all()
    torch.testing.assert_close(in_turn.logits_TE, router(x).logits_TE)


# -- timing


def test_peak_bytes_counts_what_is_held_at_once():
    def run():
        a = torch.empty(1_000_000)
        del a
        b, c = torch.empty(500_000), torch.empty(1_000_000)
        return b, c

    assert 6_000_000 <= timing.peak_bytes("cpu", run) < 6_100_000


def test_compiling_after_the_warmup_is_an_error_there_alone():
    settings = {"device": "cpu", "clock": "wall", "warmup": 1, "rounds": 2, "compile": True, "profile": False}
    double = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)

    def interleave(size_of_round):
        run = {"double": lambda data, mark: (double(data), mark())}
        return timing.interleave(types.SimpleNamespace(**settings), run, lambda i: torch.ones(size_of_round(i)))

    assert [len(phases) for phases in interleave(lambda i: 3)["double"]] == [1, 1]
    with pytest.raises(RuntimeError, match="recompile"):
        interleave(lambda i: 4 + i)
    assert double(torch.ones(7)).tolist() == [2] * 7


# -- subcommands


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder to which every subcommand has written; step in a process of its own, the others in this one."""
    folder = tmp_path_factory.mktemp("bench")
    tokens = {"step": (64, 128), "scale": (64, 128, 256), "moe": (64,)}
    data = folder / "hellaswag.jsonl"
    endings = ["runs.", "runs home.", "is a shoe.", "sleeps."]
    lines = [json.dumps({"ctx": f"A man {verb}. He", "endings": endings, "label": 1}) for verb in ("eats", "is tired")]
    data.write_text("\n".join(lines))
    for name in bench.BENCHES:
        extra = ("--tokens", *tokens[name]) if name in tokens else ()
        dtype = "both" if name in ("step", "moe") else "float32"
        words = (name, *SHAPE, *SHORT, "--data", data, "--dtype", dtype, "--out_dir", folder, *extra)
        if name == "step":
            process = Forked("-m", "bench", *words)
            out, errors = process.communicate()
            code = process.poll()
        else:
            code, out, errors = call("bench.__main__", *words)
        assert code == 0, f"{name}: {errors}"
        assert out.strip() and "profiler_start" not in errors, name
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", bench.BENCHES)
def test_subcommand_writes_whole_json(results, name):
    paths = sorted(results.glob(f"{name}_cpu_*.json"))
    assert len(paths) == (2 if name in ("step", "moe") else 1)
    for path in paths:
        result = json.loads(path.read_text())
        assert {"machine", "settings", "rows", "targets", "samples_s"} <= set(result)
        assert {"device", "threads", "torch", "python", "commit"} <= set(result["machine"])
        assert result["settings"]["rounds"] == 2
        assert result["rows"]
        assert {len(rounds) for rounds in result["samples_s"].values()} == {2}
    assert not list(results.glob("*.tmp"))


@pytest.mark.slow
def test_every_moe_variant_of_step_has_router_statistics(results):
    rows = json.loads((results / "step_cpu_float32.json").read_text())["rows"]
    assert {row["variant"] for row in rows} == set(bench.steps.VARIANTS)
    assert all((row["max_vio"] > 0) == (row["variant"] != "dense") for row in rows)


@pytest.mark.slow
def test_fast_implementations_give_the_results_of_the_baselines(results):
    for name in ("hellaswag", "sample"):
        rows = json.loads((results / f"{name}_cpu_float32.json").read_text())["rows"]
        assert all(row["agreement"] == 1 for row in rows if row["impl"] != "published"), rows


@pytest.mark.slow
def test_memory_is_linear_and_one_hot_is_not(results):
    """At these sizes the fixed part is small, so compare the slopes of the two steps."""
    rows = json.loads((results / "scale_cpu_float32.json").read_text())["rows"]
    memory = {name: [row["MB"] for row in rows if row["variant"] == name] for name in ("top2_capacity", "one_hot")}
    growth = {}
    for name, (small, middle, large) in memory.items():
        growth[name] = (large - middle) / (middle - small)  # from 128 to 256 tokens by from 64 to 128: 2 where linear
    assert growth["top2_capacity"] < 2.5 < growth["one_hot"], memory


@pytest.mark.slow
def test_each_size_is_a_graph_of_its_own_whatever_torch_allows(tmp_path, monkeypatch):
    """torch.compile stops at 8 graphs of one function unless told otherwise; here at 1."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    words = ("--n_layer", 1, "--rounds", 1, "--warmup", 1, "--dtype", "float32", "--variants", "dense", "--compile")
    with torch._dynamo.config.patch(recompile_limit=1):
        code, out, errors = call(
            "bench.__main__", "step", *SHAPE, *words, "--out_dir", tmp_path, "--tokens", 32, 64, 96
        )
    assert code == 0, out + errors
    rows = json.loads((tmp_path / "step_cpu_float32.json").read_text())["rows"]
    assert [row["tokens"] for row in rows] == [32, 64, 96]


# -- another repository's model

VS_MODEL = """
from dataclasses import dataclass
import torch.nn as nn
import torch.nn.functional as F

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=config.bias)

    def forward(self, idx, targets=None):
        logits = self.lm_head(self.wte(idx))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


def run(monkeypatch, *argv):
    """Exit code of `python -m bench`, in this process."""
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, argv)])
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as caught:
        common.run(bench.main)
    torch.set_num_threads(threads)
    return caught.value.code


def test_step_beside_another_repository(tmp_path, monkeypatch):
    path = tmp_path / "model.py"
    path.write_text("import vs_beside\n" + VS_MODEL)
    (tmp_path / "vs_beside.py").write_text("")
    monkeypatch.setattr(sys, "path", [*sys.path])
    words = ("step", *SHAPE, *SHORT, "--variants", "dense", "--tokens", 64, "--dtype", "float32")
    assert run(monkeypatch, *words, "--vs", path, "--out_dir", tmp_path) == 0
    result = json.loads((tmp_path / "step_cpu_float32.json").read_text())
    assert [row["variant"] for row in result["rows"]] == ["dense", "vs"]
    assert result["rows"][1].keys() >= {"ms", "ratio", "excess", "MB"}
    assert len(result["samples_s"]["vs@64"]) == 2
