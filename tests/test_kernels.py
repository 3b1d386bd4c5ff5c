"""kernels.py against plain references, outputs and all gradients. The docstrings there name these references."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from bench import moe as bench_moe
from bench import timing
from lab import kernels
from model import GPT, GPTConfig

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


def experts_by_loop(x_TD, expert_TK, gate_TK, fc, fc_bias, proj, proj_bias):
    """One token and one choice at a time, torch's own GELU."""
    out = []
    for x, experts, gates in zip(x_TD, expert_TK, gate_TK, strict=True):
        hidden = [x @ fc[e] + (0 if fc_bias is None else fc_bias[e]) for e in experts]
        hidden = [F.gelu(h, approximate="tanh") for h in hidden]
        rows = [h @ proj[e] + (0 if proj_bias is None else proj_bias[e]) for h, e in zip(hidden, experts, strict=True)]
        out.append(sum(gate * row for gate, row in zip(gates, rows, strict=True)))
    return torch.stack(out)


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


@pytest.mark.slow
def test_compiled_cross_entropy(monkeypatch):
    """It takes the gradient of the logits by comparison, not by a scatter: losses and gradients are the same."""
    monkeypatch.setitem(kernels.LOGITS_PER_CHUNK, "cpu", 32 * 50)
    h, weight, targets = random_loss_inputs()
    loss_of, results = kernels.linear_cross_entropy_with_z_loss, []
    for loss in (loss_of, torch.compile(loss_of, backend="aot_eager", fullgraph=True)):
        h_, weight_ = h.clone().requires_grad_(), weight.clone().requires_grad_()
        losses = loss(h_, weight_, targets, 0.1)
        losses[0].backward()
        results.append([*losses, h_.grad, weight_.grad])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("n_rows, rows", [(1, 128), (2048, 1024), (8192, 1664), (16384, 1920), (2049, 1152)])
def test_large_chunks_have_a_multiple_of_128_rows_and_are_below_32_mb(n_rows, rows):
    assert kernels.chunk_rows(torch.empty(n_rows, 1), torch.empty(4096, 1)) == rows
    assert 4 * rows * 4096 < 2**25


def test_chunks_of_a_large_vocabulary_have_equal_size():
    assert kernels.chunk_rows(torch.empty(1024, 1), torch.empty(50304, 1)) == 147


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
    shapes = ((T, 6), (T * K, 6), (T, K))
    x, y, gate = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    assert torch.equal(kernels.dispatch(x, plan.pair_N), dispatch_by_index(x, plan))
    for ours, gates in (
        (kernels.combine(y, gate, plan.row_N), gate), (kernels.sum_rows(y, plan.row_N, T), torch.ones(T, K))
    ):  # fmt: skip
        torch.testing.assert_close(ours, combine_by_loop(y, gates.double(), plan), rtol=1e-12, atol=1e-12)


# -- GELU


@pytest.mark.parametrize("shape", [(3,), (300, 1000)])  # the second: more than two parts, the last not full
def test_gelu(shape):
    x = 3 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for gelu in (kernels.Gelu.apply, lambda x: F.gelu(x, approximate="tanh")):
        x_ = x.clone().requires_grad_()
        y = gelu(x_)
        y.backward(x.flip(0))
        results.append((y.detach(), x_.grad))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)
    assert torch.equal(kernels.gelu_forward(x.t() if x.dim() == 2 else x), results[0][0].t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_has_the_precision_of_its_type(dtype):
    x = torch.tensor([-100.0, -9.0, -3.0, -0.75, -1e-4, 0.0, 1e-4, 0.75, 3.0, 9.0, 100.0, 3e38], dtype=dtype)
    exact = F.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(
        kernels.gelu_forward(x).double(),
        exact,
        rtol=4 * torch.finfo(dtype).eps,
        atol=1e-3 * torch.finfo(dtype).eps ** 0.5,
    )


# -- the experts

ROW_COUNTS = [  # of eight experts: none, fewer than a window, whole windows, a remainder, few or none before
    [0, 5, 64, 193, 0, 63, 65, 1],
    [130, 0, 1, 0, 70, 0, 0, 0],
    [3, 2, 4, 70, 128, 1100, 500, 0],
    [0, 0, 0, 0, 0, 0, 0, 9],
]
FLOAT64, FLOAT32, BFLOAT16 = (torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)


@pytest.mark.parametrize("counts", ROW_COUNTS)
@pytest.mark.parametrize("D, H", [(16, 24), (24, 16)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [FLOAT64, FLOAT32, BFLOAT16])
def test_experts_on_sorted_rows(dtype, tolerance, with_bias, D, H, counts):
    check_experts(dtype, tolerance, with_bias, D, H, counts)


@pytest.mark.parametrize("counts", ROW_COUNTS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [FLOAT32, BFLOAT16])
def test_experts_on_sorted_rows_as_on_cuda(dtype, tolerance, with_bias, counts, monkeypatch):
    """F.grouped_mm, which also runs on the CPU."""
    monkeypatch.setattr(kernels, "uses_grouped_mm", lambda x: True)
    check_experts(dtype, tolerance, with_bias, 16, 24, counts)


def check_experts(dtype, tolerance, with_bias, D, H, counts):
    """Output and gradients of tokens that are sorted already, of which each chooses one expert."""
    generator = torch.Generator().manual_seed(0)
    N, E = sum(counts), len(counts)
    rows, ends = torch.arange(N), torch.tensor(counts).cumsum(0, dtype=torch.int32)
    expert_N1 = torch.arange(E).repeat_interleave(torch.tensor(counts))[:, None]
    shapes = (N, D), (N, 1), (E, D, H), (E, H), (E, H, D), (E, D), (N, D)
    x, gate, fc, fc_bias, proj, proj_bias, grad = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )
    leaves = [x, gate.to(torch.promote_types(dtype, torch.float32)), fc / D**0.5, fc_bias, proj / H**0.5, proj_bias]
    if not with_bias:
        leaves[3] = leaves[5] = None

    def ours(x, gate, *weights):
        return kernels.ExpertMLPs.apply(x, expert_N1, gate, *weights, rows, rows, ends)

    def reference(x, gate, fc, fc_bias, proj, proj_bias):
        h = F.gelu(loop_over_experts(x, fc, fc_bias, ends), approximate="tanh")
        return gate * loop_over_experts(h, proj, proj_bias, ends)

    results = []
    for run, to in ((ours, lambda t: t), (reference, torch.Tensor.double)):
        copies = [t if t is None else to(t).clone().requires_grad_() for t in leaves]
        y = run(*copies)
        y.backward(to(grad))
        results.append([y.detach(), *(t.grad for t in copies if t is not None)])
    assert [t.dtype for t in results[0]] == [dtype, *(t.dtype for t in leaves if t is not None)]
    for a, b in zip(*results, strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < tolerance


@pytest.mark.parametrize("T, K, E", [(1, 1, 1), (37, 3, 5), (20, 4, 4)])
@pytest.mark.parametrize("biases", ["both", "neither"])
def test_expert_mlps(T, K, E, biases):
    """Outputs and all gradients; the gate of the last token is 0, as that of a pair over capacity."""
    expert_TK, plan = random_plan(T, K, E)
    generator = torch.Generator().manual_seed(1)
    shapes = ((T, 6), (T, K), (E, 6, 10), (E, 10), (E, 10, 6), (E, 6))
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    tensors[1][-1] = 0
    if biases == "neither":
        tensors[3] = tensors[5] = None
    grad = torch.randn(T, 6, generator=generator, dtype=torch.float64)
    results = []
    for run in (
        lambda x, *more: kernels.ExpertMLPs.apply(x, expert_TK, *more, plan.row_N, plan.pair_N, plan.ends_E),
        lambda x, *more: experts_by_loop(x, expert_TK, *more),
    ):
        leaves = [t if t is None else t.clone().requires_grad_() for t in tensors]
        out = run(*leaves)
        out.backward(grad)
        results.append([out.detach(), *(leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None)])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_moe_layer_keeps_few_bytes_for_backward(dtype):
    """In units of the input's bytes: 4 K = 8 for the pre-activations, 1 for the input, the rest per token or pair."""
    layer = GPT(GPTConfig(n_exp=8, n_layer=1, n_embd=192, n_head=1, vocab_size=1, block_size=1)).transformer.h[0].mlp
    (ours,) = (i for i in bench_moe.implementations(layer, dtype) if (i.part, i.name) == ("layer", "ours"))
    assert 9 < bench_moe.kept_units(ours, dtype, bench_moe.new_inputs(layer, 64, dtype, 0)) < 10


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
