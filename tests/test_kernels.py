"""kernels.py against plain references, outputs and all gradients. The docstrings there name these references."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import kernels
from bench import timing

# -- references


def full_cross_entropy(h, weight, targets, reduction="mean"):
    """All logits at once, torch's own loss; negative targets ignored."""
    return F.cross_entropy(h @ weight.t(), targets.clamp(min=-1), ignore_index=-1, reduction=reduction)


def sort_with_python(expert_TK, n_exp):
    """Plan by Python's sort, which is stable: choice 0 of all tokens, then choice 1, ..."""
    expert_N = [e for choices in expert_TK.t().tolist() for e in choices]
    pair_N = sorted(range(len(expert_N)), key=expert_N.__getitem__)
    row_N = [pair_N.index(n) for n in range(len(expert_N))]
    place_N = [expert_N[:n].count(e) for n, e in enumerate(expert_N)]
    count_E = [expert_N.count(e) for e in range(n_exp)]
    return row_N, pair_N, place_N, count_E, [sum(count_E[: e + 1]) for e in range(n_exp)]


def dispatch_by_index(x_TD, plan):
    """Row i is the token of the pair in sorted row i."""
    return torch.stack([x_TD[pair % len(x_TD)] for pair in plan.pair_N.tolist()])


def combine_by_loop(y_ND, gate_TK, plan):
    """One token and one choice at a time."""
    T, K = gate_TK.shape
    rows = [[plan.row_N[k * T + t] for k in range(K)] for t in range(T)]
    return torch.stack([sum(gate_TK[t, k] * y_ND[rows[t][k]] for k in range(K)) for t in range(T)])


def loop_over_experts(x_ND, weight_EDF, bias_EF, ends_E):
    """One product per expert."""
    starts = [0, *ends_E.tolist()]
    return torch.cat([
        x_ND[start:end] @ weight_EDF[e] + (0 if bias_EF is None else bias_EF[e])
        for e, (start, end) in enumerate(itertools.pairwise(starts))
    ])  # fmt: skip


# -- cross-entropy


def random_loss_inputs(ignored=-1):
    generator = torch.Generator().manual_seed(0)
    h, weight = (torch.randn(n, 8, dtype=torch.float64, generator=generator) for n in (65, 50))
    targets = torch.randint(50, (65,), generator=generator)
    targets[::9] = ignored
    return h, weight, targets


@pytest.mark.parametrize("ignored", [-1, -100])
@pytest.mark.parametrize("rows_per_chunk", [1, 7, 32, 100])
def test_chunked_cross_entropy(rows_per_chunk, ignored, monkeypatch):
    """The same loss and gradients, and the same loss without gradients and per position."""
    monkeypatch.setitem(kernels.LOGITS_PER_CHUNK, "cpu", rows_per_chunk * 50)
    h, weight, targets = random_loss_inputs(ignored)
    results = []
    for loss_of in (kernels.linear_cross_entropy, full_cross_entropy):
        h_, weight_ = h.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = loss_of(h_, weight_, targets)
        (2 * loss).backward()
        with torch.no_grad():
            per_position = loss_of(h, weight, targets, "none")
            results.append((loss.detach(), h_.grad, weight_.grad, loss_of(h, weight, targets), per_position))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert (results[0][4][targets < 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_cross_entropy_holds_one_chunk_at_a_time(dtype, monkeypatch):
    monkeypatch.setitem(kernels.LOGITS_PER_CHUNK, "cpu", 64 * 1000)
    weight = torch.randn(1000, 8, requires_grad=True)

    def peak(rows):
        h, targets = torch.randn(rows, 8, dtype=dtype, requires_grad=True), torch.arange(rows)
        return timing.peak_bytes("cpu", lambda: kernels.linear_cross_entropy(h, weight, targets))

    assert peak(256) < peak(64) + 64 * 1000  # bytes; a chunk in float32 has four times as many


def test_second_derivatives_of_the_chunked_loss_are_refused():
    h, weight, targets = random_loss_inputs()
    h.requires_grad_()
    loss = kernels.linear_cross_entropy(h, weight, targets)
    (grad,) = torch.autograd.grad(loss**2, h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# -- dispatch and combine


def random_plan(T, K, E):
    expert_TK = torch.rand(T, E, generator=torch.Generator().manual_seed(0)).topk(K).indices
    return expert_TK, kernels.sort_by_expert(expert_TK, E)


@pytest.mark.parametrize("T, K, E", [(1, 1, 1), (37, 3, 5), (6, 2, 9), (20, 4, 4)])
def test_sort_by_expert(T, K, E):
    expert_TK, plan = random_plan(T, K, E)
    assert [part.tolist() for part in plan] == list(sort_with_python(expert_TK, E))


@pytest.mark.parametrize("T, K, E", [(1, 1, 1), (37, 3, 5), (20, 4, 4)])
def test_dispatch_and_combine(T, K, E):
    _, plan = random_plan(T, K, E)
    generator = torch.Generator().manual_seed(1)
    shapes = ((T, 6), (T * K, 6), (T, K), (T * K, 6), (T, 6))
    x, y, gate, grad_rows, grad_out = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    ways = (
        (lambda x: kernels.Dispatch.apply(x, plan.row_N, plan.pair_N),
         lambda y, gate: kernels.Combine.apply(y, gate, plan.row_N, plan.pair_N)),
        (lambda x: dispatch_by_index(x, plan), lambda y, gate: combine_by_loop(y, gate, plan)),
    )  # fmt: skip
    results = []
    for dispatch, combine in ways:
        x_, y_, gate_ = (t.clone().requires_grad_() for t in (x, y, gate))
        rows, out = dispatch(x_), combine(y_, gate_)
        torch.autograd.backward([rows, out], [grad_rows, grad_out])
        results.append((rows, out, x_.grad, y_.grad, gate_.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# -- the linear layer of each expert

ROW_COUNTS = [  # of eight experts: none, fewer than a window, whole windows, a remainder, few or none before
    [0, 5, 64, 193, 0, 63, 65, 1],
    [130, 0, 1, 0, 70, 0, 0, 0],
    [3, 2, 4, 70, 128, 1100, 500, 0],
    [0, 0, 0, 0, 0, 0, 0, 9],
]


def linear_inputs(counts, D, H, dtype):
    """x, weight, bias, gradient of the output, ends_E."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(counts), D), (len(counts), D, H), (len(counts), H), (sum(counts), H))
    tensors = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return *tensors, torch.tensor(counts).cumsum(0, dtype=torch.int32)


def assert_close_in_norm(ours, exact, tolerance):
    for a, b in zip(ours, exact, strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < tolerance


@pytest.mark.parametrize("counts", ROW_COUNTS)
@pytest.mark.parametrize("D, H", [(16, 24), (24, 16)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_grouped_linear(dtype, tolerance, with_bias, D, H, counts):
    *tensors, grad, ends = linear_inputs(counts, D, H, dtype)
    tensors = tensors if with_bias else tensors[:2]
    results = []
    for layer, cast in ((kernels.grouped_linear, dtype), (loop_over_experts, torch.float64)):
        leaves = [t.to(cast, copy=True).requires_grad_() for t in tensors]
        y = layer(*leaves, *([] if with_bias else [None]), ends)
        y.backward(grad.to(cast))
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    assert all(part.dtype == dtype for part in results[0])
    assert_close_in_norm(*results, tolerance)


@pytest.mark.parametrize("counts", ROW_COUNTS)
def test_bias_after_grouped_mm(counts):
    """AddExpertBias, which CUDA uses in bf16, is a linear layer whose weights are the identity."""
    y, _, bias, grad, ends = linear_inputs(counts, 24, 24, torch.float64)
    identity = torch.eye(24, dtype=torch.float64).expand(8, 24, 24)
    results = []
    for add in (kernels.AddExpertBias.apply, lambda y, bias, ends: loop_over_experts(y, identity, bias, ends)):
        leaves = [t.clone().requires_grad_() for t in (y, bias)]
        out = add(*leaves, ends)
        out.backward(grad)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert_close_in_norm(*results, 1e-12)


def test_products_of_bfloat16_rows_have_few_shapes():
    """oneDNN compiles a kernel for each: routing changes with every batch and must not bring new ones."""
    generator = torch.Generator().manual_seed(0)
    sizes = set()
    for _ in range(200):
        load = torch.rand(8, generator=generator) ** 3
        ends = torch.multinomial(load, 4096, replacement=True, generator=generator).bincount(minlength=8).cumsum(0)
        sizes |= {end - low for _, low, _, end in kernels.row_windows(ends.tolist(), torch.bfloat16)}
    sizes = {size for size in sizes if size > 64}  # fewer only where the very first rows are an expert's own
    assert {size % 64 for size in sizes} == {0} and len(sizes) < 30
