"""The baselines of bench.py compute what the model does; its commands run as a user starts them."""

import functools
import json
import math
import multiprocessing
import signal
import sys

import pytest
import torch
from conftest import FORKS, end, fork_ranks, run_script, script

import bench
from lab import common
from model import GPTConfig, MoE

SHAPE = ("--device", "cpu", "--n_embd", "32", "--n_head", "2", "--n_layer", "2", "--n_exp", "4", "--vocab_size", "300",
         "--T", "32", "--threads", "1", "--rounds", "2", "--out")
VS_MODEL = """
import dataclasses, torch, variants  # a file of its own that has the name of one of ours
@dataclasses.dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float; bias: bool
class GPT(torch.nn.Linear):
    def __init__(self, config):
        super().__init__(variants.width, config.vocab_size)
    def forward(self, idx, targets=None):
        logits = super().forward(self.weight[idx])
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


def rows_of(path):
    return {(row["model"], row["tokens"]): row for row in json.loads(path.read_text())["rows"]}


@pytest.mark.parametrize("capacity", [0.5, 1.25, math.inf])
@pytest.mark.parametrize("settings", [{}, {"n_shared_exp": 1, "use_aux_loss": True, "top_k": 1, "gate": "softmax"}])
def test_one_hot_dispatch_is_the_moe_layer(capacity, settings):
    torch.manual_seed(0)
    moe = MoE(GPTConfig(n_embd=32, n_head=2, n_exp=4, train_capacity=capacity, **settings))
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.1 if p.shape[0] != 4 else 0.4)  # uneven enough that capacity 1.25 drops some
    x = torch.randn(2, 32, 32) + torch.randn(32)  # the part common to all tokens makes the load uneven
    found = []
    for mix in (moe.mix, functools.partial(bench.one_hot_mix, moe)):
        moe.mix, leaf = mix, x.clone().requires_grad_()
        moe.zero_grad()
        y, losses = moe(leaf)
        sum(losses.values(), (y * torch.ones_like(y).cumsum(-1) / 32).sum()).backward()
        grads = [p.grad for p in moe.parameters()]
        found.append([y, *losses.values(), moe.count.clone(), moe.stats.clone(), leaf.grad, *grads])
    assert (moe.stats[0] > 0) == (not math.isinf(capacity))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_ratio_is_the_median_within_rounds_with_its_interval():
    dense, top2 = bench.Cell("dense", 2048), bench.Cell("top2", 2048)
    known = {"GB": 1, "first_s": 1, "max_vio": 0, "peak": None}
    slow = [1, 1, 1, 9, 9, 9, 1, 1, 1]  # the machine slows both
    samples = {dense: slow, top2: [a * (1.1 + 0.1 * i) for i, a in enumerate(slow)]}
    row = bench.make_row(bench.Args(), top2, {dense: known | {"flops": 2}, top2: known | {"flops": 3}}, samples)
    # of nine values the second and the second largest enclose the median in 96 % of cases
    assert [round(row[name], 6) for name in ("ratio", "low", "high", "excess")] == [1.5, 1.2, 1.8, 1.0]


def test_report_holds_steps_and_training_against_the_prediction(tmp_path, monkeypatch, capsys):
    rows = [{"model": "dense", "tokens": 16_384, "tok/s": 231_000}]
    result = {"machine": {"device": "NVIDIA H100 80GB HBM3"}, "rows": rows}
    (tmp_path / "step_cuda_bfloat16.json").write_text(json.dumps(result))
    (tmp_path / "config.json").write_text('{"settings": {"n_exp": 8, "B": 64, "T": 1024}, "resumed": []}')
    (tmp_path / "log.txt").write_text("0 tok_per_sec 1\n1 tok_per_sec 1\n2 tok_per_sec 388000\n")  # 0 and 1 compile
    monkeypatch.setattr(sys, "argv", ["bench.py", "report", "--out", str(tmp_path)])
    bench.main()
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[-2:] for line in table[1:]] == [["462000", "0.5"], ["388000", "1.0"]]


@pytest.mark.slow
def test_step_beside_another_repository_and_one_hot(tmp_path):
    (tmp_path / "model.py").write_text(VS_MODEL)
    (tmp_path / "variants.py").write_text("width = 8")
    words = ("--variants", "dense", "top2", "top2_capacity", "one_hot", "--tokens", 64, "--vs", tmp_path)
    done = run_script("bench.py", "step", *SHAPE, tmp_path, *words, check=2)
    assert "vs top2, 64 tokens: TypeError" in done.stderr  # it has no experts
    rows = rows_of(tmp_path / "step_cpu_float32.json")
    assert rows["vs dense", 64]["over"] == "dense 64" and len(rows["vs dense", 64]["seconds"]) == 2
    assert rows["one_hot", 64]["over"] == "top2_capacity 64" and rows["one_hot", 64]["max_vio"] > 0


@pytest.mark.slow
def test_scale_of_two_ranks_and_of_one_hot_dispatch(tmp_path, monkeypatch):
    words = ("scale", *SHAPE, tmp_path, "--tokens", 64, "--variants", "top2")
    for rank in fork_ranks(2, script, "bench.py", words):
        end(rank)
    rows = rows_of(tmp_path / "scale_cpu_float32.json")
    assert rows["fsdp top2", 64]["GB"] < rows["ddp top2", 64]["GB"]

    words = ("bench.py", "scale", *SHAPE, tmp_path, "--tokens", 64, 128, 256, "--uniform_routing")
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # bench.py sets SIGTERM, of this process here
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: FORKS)  # the test above has spawned processes
    assert bench.main() == common.DONE
    rows = rows_of(tmp_path / "scale_cpu_float32.json")
    assert {row["max_vio"] for row in rows.values()} == {0}
    for name, linear in (("top2_capacity", True), ("one_hot", False)):
        small, middle, large = [rows[name, tokens]["GB"] for tokens in (64, 128, 256)]
        assert ((large - middle) / (middle - small) < 2.2) == linear, name
