"""The prediction of a step: bytes worked out by hand, FLOPs as GPT counts them."""

import sys

import pytest
import torch
import torch.nn.functional as F

from bench import __main__ as bench
from bench import roofline
from lab import common
from model import GPTConfig

N, D, H = 512, 64, 256


def kernels_of(function, *shapes, grad=True):
    """Kernels of function(leaves), bfloat16, and of the backward of its result."""
    with roofline.as_on_cuda(), torch.set_grad_enabled(grad):
        leaves = [torch.empty(shape, dtype=torch.bfloat16, requires_grad=grad) for shape in shapes]
        with roofline.Recorder() as recorder:
            out = function(*leaves)
            recorder.backward = True
            if grad:
                out.backward(torch.empty_like(out))
    return roofline.join(recorder.ops)


def units(kernels):
    """(kind, bytes / 2), the numbers of bfloat16."""
    return [(kernel.kind, kernel.bytes // 2) for kernel in kernels]


def test_bytes_of_an_mlp():
    """Each product reads two matrices and writes one; GELU reads and writes H wide, its backward reads two of them."""
    found = units(kernels_of(lambda x, fc, proj: F.gelu(x @ fc) @ proj, (N, D), (D, H), (H, D)))
    product = ("product", N * D + D * H + N * H)
    forward = [product, ("elementwise", 2 * N * H), product]
    assert found == [*forward, product, product, ("elementwise", 3 * N * H), product, product]


def test_a_bias_costs_nothing_before_and_a_sum_along_columns_after():
    """Product and bias together are not written: the backward of GELU adds them again."""
    found = units(kernels_of(lambda x, fc, bias, proj: F.gelu(x @ fc + bias) @ proj, (N, D), (D, H), (H,), (H, D)))
    elementwise = [size for kind, size in found if kind == "elementwise"]
    assert elementwise == [2 * N * H + H, 3 * N * H + H]
    assert [size for kind, size in found if kind == "column sum"] == [N * H + H]


def test_the_residual_and_the_norm_are_one_kernel():
    """It reads x and y and writes the residual, for later, and the norm, for a product."""

    def function(x, y, weight, bias, proj):
        residual = x + y
        return F.layer_norm(residual, (D,), weight, bias) @ proj + residual

    kernels = kernels_of(function, (N, D), (N, D), (D,), (D,), (D, D), grad=False)
    assert units(kernels) == [("elementwise", 4 * N * D + 2 * D), ("product", 2 * N * D + D * D)]


@pytest.mark.parametrize("width, passes", [(1024, 1), (20_000, 2)])
def test_rows_that_are_too_long_are_read_twice(width, passes):
    def function(h, weight):
        return ((h @ weight).float().log_softmax(-1).exp() * 0.5).bfloat16() @ weight.t()

    [softmax] = [k for k in kernels_of(function, (N, D), (D, width), grad=False) if k.kind == "elementwise"]
    assert softmax.bytes == 2 * N * width * (passes + 1)


SHAPE = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 512, "block_size": 64}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"n_exp": 8}, {"n_exp": 16, "top_k": 4, "expert_hidden": "iso"}])
def test_flops_are_those_that_the_model_counts(settings):
    """But for the products that sum the gradients of the experts' biases. GPT counts the whole square of attention,
    and its backward twice; here half the square and 2.5 times."""
    tokens, config = 256, GPTConfig(**SHAPE, train_capacity=float("inf"), **settings)
    ops, model = roofline.record_step(config, tokens)
    summing = {f"({config.n_exp}, {tokens * config.top_k})"}
    products = sum(op.flops for op in ops if "product" in op.kind and op.shape.split(" x ")[0] not in summing)
    attention = sum(op.flops for op in ops if op.kind == "attention") * 12 / 7
    small = sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias") or ".ln_" in name)
    counted = model.estimate_flops_per_token(config.block_size) * tokens
    assert counted - 6 * small * tokens <= products + attention <= counted


@pytest.mark.slow
def test_gradients_are_added_up():
    """Each gradient is read, added to the one of earlier micro-batches and written: 12 bytes per parameter."""
    ops, model = roofline.record_step(GPTConfig(**SHAPE), 128)
    kernels = roofline.join(ops)
    assert sum(k.bytes for k in kernels if k.kind == "accumulate") == 12 * sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch, capsys):
    words = "bench roofline --gpu a100 --n_layer 2 --n_embd 64 --n_head 2 --vocab_size 512 --T 64 --tokens 128 256"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--out_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        common.run(bench.main)
    assert caught.value.code == 0
    text = (tmp_path / "roofline_a100.txt").read_text()
    assert text.startswith("A prediction, not a measurement. A100")
    assert text.count("tokens per micro-batch") == 6 and "grouped product" in text
    assert text.splitlines()[:7] == capsys.readouterr().out.splitlines()[:7]
