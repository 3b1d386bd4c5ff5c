"""The model against plain code in the precision of training: gradients of a layer, and 200 steps.

Plain: one-hot dispatch, every expert's slots in one batched product, logits of all positions in float32, and PyTorch's
own cross-entropy. Fast: model.py. Both from the same weights, on the same data, with the same noise.
"""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench.baselines import OneHotMoE, replace
from model import GPT, GPTConfig, MoE

SHAPE = {"block_size": 16, "vocab_size": 257, "n_layer": 2, "n_head": 2, "n_embd": 32, "n_exp": 4}
STEPS, SEEDS = 200, (1, 2, 3)


def relative_error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def layer_gradients(moe, x):
    """Output and gradients of a MoE layer under bf16 autocast, by name."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = moe(x)[0]
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype))
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in moe.named_parameters()}


@pytest.mark.parametrize("gate", ["topk_softmax", "softmax", "sigmoid"])
def test_bf16_layer_agrees_with_the_plain_one(gate):
    torch.manual_seed(0)
    fast = MoE(GPTConfig(block_size=64, n_embd=64, n_head=2, n_exp=8, gate=gate, train_capacity=1.25))
    with torch.no_grad():
        for p in fast.parameters():
            p.normal_(std=0.1)
    x = (torch.randn(8, 64, 64) + torch.randn(64)).bfloat16()  # the part common to all tokens makes the load uneven
    ours, theirs = (layer_gradients(moe, x) for moe in (fast, replace(fast, OneHotMoE)))
    assert fast.stats[0] > 0, "some pairs are dropped"
    for name, b in theirs.items():
        assert relative_error(ours[name], b) < 1e-2, name


def plain_loss(model, idx, targets):
    logits = model.lm_head(model.hidden_states(idx)).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train_curve(seed, plain):
    """Losses (STEPS,) of a small model on bytes of Python source, under bf16 autocast."""
    text = np.frombuffer(Path(argparse.__file__).read_bytes(), np.uint8).astype(np.int64)
    model = GPT(GPTConfig(**SHAPE, use_noisy_top_k=True), torch.Generator().manual_seed(seed))
    if plain:
        for layer, moe in model.moe_layers():
            model.transformer.h[layer].mlp = replace(moe, OneHotMoE)
    optimizer = torch.optim.AdamW(model.optimizer_groups(0.1), lr=3e-3, fused=not plain)
    rng, losses = np.random.default_rng(0), []  # the same data for every seed, as in training
    for step in range(STEPS):
        starts = rng.integers(len(text) - 17, size=8)
        rows = torch.from_numpy(np.stack([text[i : i + 17] for i in starts]))
        torch.manual_seed(1000 * seed + step)
        with torch.autocast("cpu", torch.bfloat16):
            idx, targets = rows[:, :-1], rows[:, 1:]
            loss = plain_loss(model, idx, targets) if plain else model(idx, targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return np.array(losses)


@pytest.mark.slow
def test_200_steps_lie_within_seed_noise_of_plain_code():
    """Losses averaged over 20 steps: fast and plain differ by less than two seeds do. In float32, where rounding is no
    question, the tests of outputs and gradients say more."""
    plain, fast = (
        np.stack([train_curve(seed, is_plain) for seed in SEEDS]).reshape(len(SEEDS), -1, 20).mean(-1)
        for is_plain in (True, False)
    )
    assert plain[:, -1].max() < plain[:, 0].min() - 1, "they learn"
    assert np.abs(fast - plain).mean() < plain.std(axis=0, ddof=1).mean()
