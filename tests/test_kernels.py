"""lab/kernels.py against plain references, outputs and all gradients. Whole MoE layers in float64: test_model.py."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from test_model import SETTINGS, gradients, make, tokens

from lab import devices, kernels


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def values_and_gradients(function, grad, *tensors):
    """[function(*tensors), gradients of the tensors]; a tensor may be None."""
    leaves = [t if t is None else t.clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


# -- cross-entropy


def full_cross_entropy(h, weight, targets, reduction="mean"):
    """All logits at once, torch's own loss; negative targets ignored."""
    return F.cross_entropy(h @ weight.t(), targets.clamp(min=-1), ignore_index=-1, reduction=reduction)


@pytest.mark.parametrize("ignored", [-1, -100])
@pytest.mark.parametrize("rows_per_chunk", [1, 7, 32, 100])
def test_chunked_cross_entropy(rows_per_chunk, ignored, monkeypatch):
    """The same loss and gradients, and the same loss without gradients and per position."""
    monkeypatch.setitem(kernels.LOGITS_PER_CHUNK, "cpu", rows_per_chunk * 50)
    h, weight, targets = randn(65, 8), randn(50, 8, seed=1), torch.arange(65) % 50
    targets[::9] = ignored
    results = []
    for loss_of in (kernels.linear_cross_entropy, full_cross_entropy):
        found = values_and_gradients(lambda h, weight, f=loss_of: f(h, weight, targets), torch.tensor(2.0), h, weight)
        with torch.no_grad():
            results.append([*found, loss_of(h, weight, targets), loss_of(h, weight, targets, "none")])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    assert (results[0][-1][targets < 0] == 0).all()


def peak_bytes(run):
    """Most bytes that tensors made by run() held at one time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_cross_entropy_holds_one_chunk_at_a_time(dtype, monkeypatch):
    monkeypatch.setitem(kernels.LOGITS_PER_CHUNK, "cpu", 64 * 1000)
    weight = torch.randn(1000, 8, requires_grad=True)

    def peak(rows):
        h, targets = torch.randn(rows, 8, dtype=dtype, requires_grad=True), torch.arange(rows)
        return peak_bytes(lambda: kernels.linear_cross_entropy(h, weight, targets))

    assert peak(256) < peak(64) + 64 * 1000  # bytes; a chunk in float32 has four times as many


@pytest.mark.slow
def test_the_compiled_chunk_is_one_graph_and_gives_the_same_loss(monkeypatch):
    monkeypatch.setitem(kernels.LOGITS_PER_CHUNK, "cpu", 32 * 50)
    h, weight, targets = randn(64, 8), randn(50, 8, seed=1), torch.arange(64) % 50
    targets[::9] = -1

    def loss_by(chunk_loss):
        def loss_of(h, weight):
            return kernels.linear_cross_entropy(h, weight, targets, chunk_loss=chunk_loss)

        return values_and_gradients(loss_of, torch.tensor(1.0), h, weight)

    compiled = torch.compile(kernels.chunk_loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(loss_by(compiled), loss_by(kernels.chunk_loss), rtol=1e-12, atol=1e-14)


def test_second_derivatives_of_the_chunked_loss_are_refused():
    h = randn(5, 8).requires_grad_()
    loss = kernels.linear_cross_entropy(h, randn(50, 8, seed=1), torch.arange(5))
    (grad,) = torch.autograd.grad(loss**2, h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# -- GELU


@pytest.mark.parametrize("shape", [(4, 3), (300, 1000)])  # the second: more than two parts, the last not full
def test_gelu(shape):
    x, grad = 3 * randn(*shape), randn(*shape, seed=1)
    ours = values_and_gradients(kernels.Gelu.apply, grad, x)
    torch.testing.assert_close(ours, values_and_gradients(lambda x: F.gelu(x, approximate="tanh"), grad, x))
    assert torch.equal(kernels.Gelu.apply(x[::2]), ours[0][::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_has_the_precision_of_its_type(dtype):
    x = torch.tensor([-100.0, -9.0, -3.0, -0.75, -1e-4, 0.0, 1e-4, 0.75, 3.0, 9.0, 100.0, 3e38], dtype=dtype)
    exact, eps = F.gelu(x.double(), approximate="tanh"), torch.finfo(dtype).eps
    torch.testing.assert_close(kernels.Gelu.apply(x).double(), exact, rtol=4 * eps, atol=1e-3 * eps**0.5)


# -- sort, dispatch, grouped products, combine


def sort_with_python(expert_TK, n_exp):
    """Plan by Python's sort, which is stable: choice 0 of all tokens, then choice 1, ..."""
    expert_N = expert_TK.t().flatten().tolist()
    pair_N = sorted(range(len(expert_N)), key=expert_N.__getitem__)
    count_E = [expert_N.count(e) for e in range(n_exp)]
    return {
        "row_N": [pair_N.index(n) for n in range(len(expert_N))],
        "pair_N": pair_N,
        "place_N": [expert_N[:n].count(e) for n, e in enumerate(expert_N)],
        "expert_N": sorted(expert_N),
        "count_E": count_E,
        "ends_E": list(itertools.accumulate(count_E)),
    }


SIZES = [(1, 1, 1), (37, 3, 5), (6, 2, 9), (20, 4, 4)]


def random_choices(T, K, E):
    return torch.rand(T, E, generator=torch.Generator().manual_seed(0)).topk(K).indices


@pytest.mark.parametrize("T, K, E", SIZES)
def test_sort_by_expert(T, K, E):
    expert_TK = random_choices(T, K, E)
    plan = kernels.sort_by_expert(expert_TK, E)
    assert {name: part.tolist() for name, part in plan._asdict().items()} == sort_with_python(expert_TK, E)


@pytest.mark.parametrize("T, K, E", SIZES)
def test_dispatch_and_combine(T, K, E):
    plan = kernels.sort_by_expert(random_choices(T, K, E), E)
    pairs, rows = plan.pair_N.tolist(), plan.row_N.tolist()
    x, y, gate, grad = randn(T, 6), randn(T * K, 6, seed=1), randn(T, K, seed=2), randn(T, 6, seed=3)

    def combine_by_loop(y, gate):
        return torch.stack([sum(gate[t, k] * y[rows[k * T + t]] for k in range(K)) for t in range(T)])

    ours = values_and_gradients(lambda x: kernels.dispatch(x, plan), y, x)
    theirs = values_and_gradients(lambda x: torch.stack([x[pair % T] for pair in pairs]), y, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    ours = values_and_gradients(lambda y, gate: kernels.combine(y, gate, plan), grad, y, gate)
    torch.testing.assert_close(ours, values_and_gradients(combine_by_loop, grad, y, gate), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("counts", [[0, 5, 64, 193, 0, 63, 65, 1], [130, 0, 1, 0, 70, 0, 0, 0], [0, 0, 0, 9]], ids=str)
@pytest.mark.parametrize("D, H", [(16, 24), (24, 16), (7, 5)])  # the last: no whole 16 bytes
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_grouped_linear(dtype, tolerance, with_bias, D, H, counts):
    """Rows of many experts, some without any, against a product per expert in float64."""
    N, E = sum(counts), len(counts)
    plan = kernels.sort_by_expert(torch.arange(E).repeat_interleave(torch.tensor(counts))[:, None], E)
    x, weight, bias, grad = randn(N, D), randn(E, D, H, seed=1), randn(E, H, seed=2), randn(N, H, seed=3)
    tensors = [t.to(dtype) for t in ([x, weight, bias] if with_bias else [x, weight])] + [None] * (not with_bias)

    def product_per_expert(x, weight, bias):
        parts = [part @ weight[e] for e, part in enumerate(x.split(counts))]
        return torch.cat([part if bias is None else part + bias[e] for e, part in enumerate(parts)])

    ours = values_and_gradients(lambda *args: kernels.grouped_linear(*args, plan), grad.to(dtype), *tensors)
    exact = [t if t is None else t.double() for t in tensors]
    theirs = values_and_gradients(product_per_expert, grad.to(dtype).double(), *exact)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype and (a.double() - b).norm() <= tolerance * b.norm()


# -- what keeps memory or time: the cache, blocks that are computed again


@pytest.mark.parametrize("name", ["dense", "qk_norm", "tight", "all_tricks"])
@torch.no_grad()
def test_the_cache_gives_the_logits_of_the_whole_sequence(name):
    model = make(**SETTINGS[name]).double().eval()
    idx, cache, hidden = tokens(S=20)[0], model.new_cache(2), []
    for start, end in ((0, 5), (5, 6), (6, 13), (13, 20)):
        hidden.append(model.hidden_states(idx[:, start:end], cache=cache, dropless=True))
    logits = model.lm_head(torch.cat(hidden, 1))
    torch.testing.assert_close(logits, model(idx, dropless=True).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["all_tricks", "quantile_sigmoid"])
def test_blocks_computed_again_change_no_bit_and_take_less_memory(name):
    """Gradients of two micro-batches, the router's statistics, what is counted over the step, the random state."""
    results, kept = [], {False: 0, True: 0}
    for again in (False, True):

        def keep(tensor, again=again):
            kept[again] += tensor.nbytes
            return tensor

        model = make(**SETTINGS[name], n_embd=32, dropout=0.1)
        if again:
            for block in model.transformer.h:
                block.forward = devices.computed_again(block.forward)
        model.start_step()
        for seed in range(2):
            torch.manual_seed(seed)
            idx, targets = tokens(S=32, seed=seed)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = model(idx, targets).loss
            loss.backward()
        state = {"loss": loss.detach(), "random": torch.get_rng_state()}
        results.append(state | dict(model.named_buffers()) | gradients(model))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert kept[True] < 0.5 * kept[False]
