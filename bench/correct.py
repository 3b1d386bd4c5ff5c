"""Loss and gradients on a device against those on the CPU: every variant of sweep.py on a small model.

The reference is the CPU in float32. Every other computation gets its choice of experts, because a tie that is rounded
the other way sends a token elsewhere, and its noise. A bfloat16 result may be as far from the reference as twice that
of the CPU's own bfloat16, and a little more.
"""

import contextlib
import itertools
import math
import warnings
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F

import sweep
from bench.baselines import replace
from lab.common import autocast
from model import GPT, MODEL_FIELDS, GPTConfig, MoE, Router

SHAPE = {"block_size": 64, "vocab_size": 512, "n_layer": 2, "n_head": 2, "n_embd": 64}
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # relative error; bfloat16: beyond twice that of the CPU
COMPILED = ("only_moe", "no_moe", "top1_softmax_aux", "quantile_balance")  # variants without noise, to compile


class FixedRouter(Router):
    """A router that takes the given choices."""

    def choose(self, logits_TE, scores_TE):
        return self.chosen_TK


class Gradients(NamedTuple):
    loss: float
    grads: dict  # {parameter: float32 on the CPU}
    chosen: list  # (T, K) of each MoE layer


def noise_of_the_cpu(like):
    """The same normal numbers on every device and in every type."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1)).to(like)


def compute(config, device, dtype, chosen=(), compiled=False):
    """Loss and gradients of one batch; `chosen` of another computation replaces the router's own choice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a top-1 router without gradient
        model = GPT(config, torch.Generator().manual_seed(0)).to(device)
    seen = []
    for i, (_, moe) in enumerate(model.moe_layers()):
        if chosen:
            moe.router = replace(moe.router, FixedRouter)
            moe.router.chosen_TK = chosen[i].to(device)
        else:
            moe.router.register_forward_hook(lambda module, inputs, routing: seen.append(routing.expert_TK.cpu()))
    ids = torch.randint(config.vocab_size, (4, config.block_size + 1), generator=torch.Generator().manual_seed(2))
    backend = "inductor" if torch.device(device).type == "cuda" else "aot_eager"
    call = torch.compile(model, fullgraph=True, dynamic=False, backend=backend) if compiled else model
    with mock.patch("torch.randn_like", noise_of_the_cpu), autocast(device, dtype):
        loss = call(ids[:, :-1].to(device), ids[:, 1:].to(device)).loss
    loss.backward()
    grads = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return Gradients(loss.item(), grads, seen)


def largest_error(result, reference):
    """Largest relative error of the loss and of the gradient of any parameter; inf where a gradient is missing."""
    if result.grads.keys() != reference.grads.keys():
        return math.inf
    floor = 1e-3 * math.hypot(*(grad.norm().item() for grad in reference.grads.values()))
    errors = [
        (result.grads[name] - grad).norm().item() / (grad.norm().item() + floor)
        for name, grad in reference.grads.items()
    ]
    errors.append(abs(result.loss - reference.loss) / abs(reference.loss))
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def row(check, dtype, error, limit, **more):
    name = str(dtype).removeprefix("torch.")
    return {"check": check, **more, "dtype": name, "error": error, "limit": limit, "ok": error <= limit}


def settings_of_model(name):
    return {field: value for field, value in sweep.VARIANTS[name].settings.items() if field in MODEL_FIELDS}


def check_variant(name, device, compiled=False):
    """Rows of a variant of sweep.py, with capacity and dropless, in float32 and bfloat16."""
    settings, rows = {"n_exp": 8} | settings_of_model(name), []
    for capacity in (0.75, math.inf) if settings["n_exp"] > 1 else (None,):  # 0.75 drops a quarter at least
        config = GPTConfig(**SHAPE | settings | ({} if capacity is None else {"train_capacity": capacity}))
        reference = compute(config, "cpu", torch.float32)
        for dtype in (torch.bfloat16,) if compiled else (torch.float32, torch.bfloat16):
            limit = LIMIT[dtype]
            if dtype == torch.bfloat16:
                limit += 2 * largest_error(compute(config, "cpu", dtype, reference.chosen), reference)
            result = compute(config, device, dtype, reference.chosen, compiled)
            error = largest_error(result, reference)
            rows.append(row("compiled" if compiled else "variant", dtype, error, limit, name=name, capacity=capacity))
        if compiled:
            break
    return rows


def check_choices(name, device):
    """How many choices the router of the device makes as that of the CPU does, float32: all but ties."""
    config = GPTConfig(**SHAPE | {"n_exp": 8} | settings_of_model(name))
    ours, theirs = (compute(config, place, torch.float32).chosen for place in (device, "cpu"))
    differing = torch.cat([(a != b).flatten() for a, b in zip(ours, theirs, strict=True)]).float().mean().item()
    return [row("choices", torch.float32, differing, 0.01, name=name)]


def check_experts(device):
    """A MoE layer on uneven choices, some experts without any, against a float64 loop over the experts."""
    config = GPTConfig(n_embd=64, n_head=2, n_exp=8, expert_hidden=96, train_capacity=math.inf)
    share_E, generator = torch.tensor([0.0, 1, 6, 0, 0.02, 3, 3, 0]), torch.Generator().manual_seed(3)
    chosen_TK = share_E.expand(391, -1).multinomial(config.top_k, generator=generator)
    x_TD, grad_TD = torch.randn(2, 391, config.n_embd, generator=generator, dtype=torch.float64)
    weights = MoE(config).double()
    for p in weights.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=generator)

    def run(forward, device, dtype):
        moe = MoE(config).to(device, torch.promote_types(dtype, torch.float32))
        moe.load_state_dict(weights.state_dict())
        moe.router = replace(moe.router, FixedRouter)
        moe.router.chosen_TK, weight = chosen_TK.to(device), moe.router.w_g.weight
        x = x_TD.to(weight, copy=True).requires_grad_()
        with autocast(device, torch.bfloat16) if dtype == torch.bfloat16 else contextlib.nullcontext():
            y = forward(moe, x)
        y.backward(grad_TD.to(y))
        found = {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in moe.named_parameters()}
        return Gradients(y.norm().item(), {name: t.double().cpu() for name, t in found.items()}, [])

    def loop(moe, x_TD):
        routing, experts = moe.router(x_TD), moe.experts
        gate_TE = torch.zeros_like(routing.logits_TE).scatter(1, routing.expert_TK, routing.gate_TK)
        h_ETF = F.gelu(x_TD @ experts.c_fc + experts.fc_bias, approximate="tanh")
        return torch.einsum("te,etd->td", gate_TE, h_ETF @ experts.c_proj + experts.proj_bias)

    def layer(moe, x_TD):
        return moe(x_TD[None])[0][0]

    reference, rows = run(loop, "cpu", torch.float64), []
    for dtype, limit in LIMIT.items():
        if dtype == torch.bfloat16:
            limit += 2 * largest_error(run(layer, "cpu", dtype), reference)
        rows.append(row("experts", dtype, largest_error(run(layer, device, dtype), reference), limit, name="uneven"))
    return rows


def check_grouped_mm(device):
    """torch's grouped product in bfloat16, output and gradients, against one float64 product per expert."""
    D, H, counts = 64, 96, (0, 37, 200, 0, 1, 83, 70, 0)
    ends_E, generator = torch.tensor(counts).cumsum(0).int(), torch.Generator().manual_seed(3)
    shapes = (sum(counts), D), (len(counts), D, H), (sum(counts), H)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    spans = list(itertools.pairwise([0, *ends_E.tolist()]))

    def run(product, device, dtype):
        x_ND, weight_EDF, grad_NF = (tensor.to(device, dtype, copy=True) for tensor in inputs)
        y_NF = product(x_ND.requires_grad_(), weight_EDF.requires_grad_())
        tensors = (y_NF, *torch.autograd.grad(y_NF, (x_ND, weight_EDF), grad_NF))
        grads = {name: t.detach().double().cpu() for name, t in zip(("y", "x", "weight"), tensors, strict=True)}
        return Gradients(grads["y"].norm().item(), grads, [])

    reference = run(lambda x, w: torch.cat([x[i:j] @ w[e] for e, (i, j) in enumerate(spans)]), "cpu", torch.float64)
    result = run(lambda x, w: F.grouped_mm(x, w, offs=ends_E.to(device)), device, torch.bfloat16)
    limit = LIMIT[torch.bfloat16]
    return [row("grouped product", torch.bfloat16, largest_error(result, reference), limit, name="grouped_mm")]
