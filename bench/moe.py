"""`moe`: the MoE layer by parts. For each part the implementation of the model first, then others."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench.steps import build_model
from bench.timing import Target, interleave, median_ratio, median_seconds
from lab import kernels
from lab.common import autocast
from model import MLP


class Inputs(NamedTuple):
    """Inputs of every part in one round. Float tensors are leaves that require gradients."""

    x_TD: torch.Tensor
    gate_TK: torch.Tensor
    expert_TK: torch.Tensor
    plan: kernels.Plan
    x_ND: torch.Tensor
    h_NF: torch.Tensor
    y_ND: torch.Tensor
    grad_NF: torch.Tensor  # of the first product's output; a constant


def new_inputs(moe, tokens, dtype, round_number):
    generator = torch.Generator().manual_seed(round_number)
    D, device = moe.config.n_embd, moe.experts.c_fc.device
    shared = torch.randn(D, generator=generator) / 3  # common to all tokens: makes the load uneven
    x_TD = (torch.randn(tokens, D, generator=generator) + shared).to(device, dtype)
    with torch.no_grad(), autocast(device, dtype):
        routing = moe.router(x_TD)
        plan = kernels.sort_by_expert(routing.expert_TK, moe.config.n_exp)
        x_ND = x_TD[plan.pair_N % tokens]
        h_NF = torch.randn(len(x_ND), moe.config.hidden_of_expert, device=device).to(dtype)
        y_ND, grad_NF = torch.randn(len(x_ND), D, device=device).to(dtype), torch.randn_like(h_NF)
    for leaf in (x_TD, routing.gate_TK, x_ND, h_NF, y_ND):
        leaf.requires_grad_()
    return Inputs(x_TD, routing.gate_TK, routing.expert_TK, plan, x_ND, h_NF, y_ND, grad_NF)


# ---------------------------------------------------------------------------------------------------------------------
# Other implementations


def sort_by_comparison(inputs, n_exp):
    expert_N = inputs.expert_TK.t().reshape(-1)
    pair_N = expert_N.sort(stable=True).indices
    row_N = torch.empty_like(pair_N).scatter_(0, pair_N, torch.arange(len(pair_N), device=pair_N.device))
    return row_N, torch.zeros_like(row_N[:n_exp]).scatter_add_(0, expert_N, torch.ones_like(expert_N))


def combine_by_scatter(inputs):
    """Each sorted row added to its token. On CUDA the order of the additions is not fixed."""
    gate_N = inputs.gate_TK.t().reshape(-1)[inputs.plan.pair_N].to(inputs.y_ND.dtype)
    token_N = inputs.plan.pair_N % len(inputs.x_TD)
    return torch.zeros_like(inputs.x_TD).index_add(0, token_N, inputs.y_ND * gate_N[:, None])


def padded_products(inputs, weight_EDF):
    """Groups copied into a buffer of twice the mean group, then one batched product: the cost of a fixed shape."""
    slots_C = torch.arange(2 * len(inputs.x_ND) // len(weight_EDF), device=weight_EDF.device)
    rows_EC = (inputs.plan.ends_E - inputs.plan.count_E)[:, None] + slots_C
    return inputs.x_ND[rows_EC.clamp(max=len(inputs.x_ND) - 1).long()] @ weight_EDF


# ---------------------------------------------------------------------------------------------------------------------
# The table of implementations


class Impl(NamedTuple):
    part: str
    name: str
    run: Callable  # Inputs -> output
    backward: Callable | None  # (Inputs, output) -> gradients; None: not timed


def grads_of(leaves):
    """The backward of Impl by autograd; leaves: Inputs -> tensors whose gradients are computed."""
    return lambda i, out: torch.autograd.grad(out, leaves(i), torch.ones_like(out), allow_unused=True)


def implementations(moe, dtype):
    """For each part the model's implementation first, then others."""
    E = moe.config.n_exp
    mlp, one_expert = (
        MLP(moe.config, width, dropout=0.0).to(moe.experts.c_fc.device)
        for width in (moe.config.hidden, moe.config.hidden_of_expert)
    )
    weight = moe.experts.c_fc.detach().to(dtype).requires_grad_()
    bias = moe.experts.fc_bias.detach().squeeze(1).to(dtype)
    flat = weight.detach()[0].t().contiguous().requires_grad_()

    def product_grads(i, out):
        grad_x = kernels.grouped_linear(i.grad_NF, weight.transpose(1, 2), None, i.plan.ends_E)
        return grad_x, *kernels.grouped_weight_grads(i.x_ND, i.grad_NF, i.plan.ends_E)

    return [
        Impl("router", "ours", lambda i: moe.router(i.x_TD).gate_TK,
             grads_of(lambda i: [i.x_TD, moe.router.w_g.weight])),
        Impl("sort", "counting", lambda i: kernels.sort_by_expert(i.expert_TK, E), None),
        Impl("sort", "comparison", lambda i: sort_by_comparison(i, E), None),
        Impl("gather", "back by gather", lambda i: kernels.dispatch(i.x_TD.detach(), i.plan.pair_N),
             lambda i, out: kernels.sum_rows(out, i.plan.row_N, len(i.x_TD))),
        Impl("gather", "back by scatter", lambda i: i.x_TD[i.plan.pair_N % len(i.x_TD)], grads_of(lambda i: [i.x_TD])),
        Impl("product", "grouped_mm", lambda i: kernels.grouped_linear(i.x_ND, weight, bias, i.plan.ends_E),
             product_grads),
        Impl("product", "one dense", lambda i: F.linear(i.x_ND, flat, bias[0]), grads_of(lambda i: [i.x_ND, flat])),
        Impl("product", "padded to 2x", lambda i: padded_products(i, weight), grads_of(lambda i: [i.x_ND, weight])),
        Impl("activation", "ours", lambda i: kernels.Gelu.apply(i.h_NF), grads_of(lambda i: [i.h_NF])),
        Impl("activation", "gelu tanh", lambda i: F.gelu(i.h_NF, approximate="tanh"), grads_of(lambda i: [i.h_NF])),
        Impl("combine", "by gather", lambda i: kernels.combine(i.y_ND, i.gate_TK, i.plan.row_N), None),
        Impl("combine", "by scatter", combine_by_scatter, None),
        Impl("experts", "ours", lambda i: moe.experts(i.x_TD, i.expert_TK, i.gate_TK, i.plan),
             grads_of(lambda i: [i.x_TD, i.gate_TK, *moe.experts.parameters()])),
        Impl("experts", "one dense MLP", lambda i: one_expert(i.x_ND),
             grads_of(lambda i: [i.x_ND, *one_expert.parameters()])),
        Impl("layer", "ours", lambda i: moe(i.x_TD[None])[0][0], grads_of(lambda i: [i.x_TD, *moe.parameters()])),
        Impl("layer", "one dense MLP", lambda i: mlp(i.x_TD), grads_of(lambda i: [i.x_TD, *mlp.parameters()])),
    ]  # fmt: skip


def run_impl(impl, dtype, inputs, mark):
    with autocast(inputs.x_TD.device, dtype):
        out = impl.run(inputs)
    mark()
    if impl.backward is not None:
        impl.backward(inputs, out)
    mark()


def kept_units(impl, dtype, inputs):
    """Bytes that autograd keeps per token and pair after the forward, over those of x: units of T * D."""
    kept, rows = {}, (len(inputs.x_TD), len(inputs.x_ND))  # weights, also those cast, have other first dimensions

    def keep(tensor):
        if tensor.dim() and len(tensor) in rows:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(inputs.x_TD.device, dtype):
        out = impl.run(inputs)
    return sum(kept.values()) / inputs.x_TD.nbytes if out.requires_grad else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# The subcommand


def forward_costs(moe, dtype, tokens):
    """{part: (GB it must move at least, GFLOP)} of a forward; a backward moves and computes about twice that."""
    E, D, H = moe.config.n_exp, moe.config.n_embd, moe.config.hidden_of_expert
    N = tokens * moe.config.top_k
    width, product = torch.finfo(dtype).bits / 8e9, 2 * N * D * H / 1e9
    gather, rows = (tokens + N) * D * width, (N * (D + H) + E * D * H) * width
    experts = 2 * rows + 2 * N * H * width
    router = tokens * D * width, 2 * tokens * D * E / 1e9
    return {
        "router": router, "sort": (24e-9 * N, 0), "gather": (gather, 0), "product": (rows, product),
        "activation": (2 * N * H * width, 0), "combine": (gather, 0), "experts": (experts, 2 * product),
        "layer": (router[0] + 2 * gather + experts, router[1] + 2 * product),
    }  # fmt: skip


def bench_moe(args, dtype):
    """Every implementation of every part, forward and backward, on the first MoE layer of top2."""
    dtype = getattr(torch, dtype)
    moe = build_model(args, "top2").moe_layers()[0][1]
    rows, samples, targets = [], {}, []
    for tokens in args.tokens:
        impls = {f"{impl.part}/{impl.name}@{tokens}": impl for impl in implementations(moe, dtype)}
        runs = {key: functools.partial(run_impl, impl, dtype) for key, impl in impls.items()}
        samples |= interleave(args, runs, lambda i, tokens=tokens: new_inputs(moe, tokens, dtype, i))
        costs, first = forward_costs(moe, dtype, tokens), {}
        for key, impl in impls.items():
            base = first.setdefault(impl.part, key)
            row = moe_row(samples, impl, tokens, key, base, *costs[impl.part])
            if impl.part in ("experts", "layer"):
                row["kept"] = kept_units(impl, dtype, new_inputs(moe, tokens, dtype, 0))
            rows.append(row)
            if key == f"layer/ours@{tokens}":
                targets.append(Target(f"units of T * D that a layer keeps at {tokens}", row["kept"], "<=", 10))
    return rows, samples, targets


def moe_row(samples, impl, tokens, key, base, gbytes, gflop):
    seconds = median_seconds(samples, key, 0)
    return {
        "tokens": tokens, "part": impl.part, "impl": impl.name, "forward": seconds * 1e3,
        "backward": median_seconds(samples, key, 1) * 1e3, "over first": median_ratio(samples, key, base),
        "GB": gbytes, "GB/s": gbytes / seconds, "GFLOP": gflop, "GFLOP/s": gflop / seconds, "kept": "",
    }  # fmt: skip
