"""On a GPU: outputs and gradients of every variant against the CPU. `make gpu` begins with it; skipped without CUDA.

The reference is the CPU in float32. The other computations are given its choice of experts, because a tie that is
rounded the other way sends a token elsewhere, and its noise. A bfloat16 result may be as far from the reference as
twice the CPU's own bfloat16, and a little more.
"""

import dataclasses
import functools
import math
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from lab import devices
from model import GPT, GPTConfig
from variants import VARIANTS

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # relative error; bfloat16: beyond twice that of the CPU
COMPILED = ("no_moe", "only_moe", "top1_softmax_aux", "quantile_balance")  # without noise: a graph draws its own


def noise_of_the_cpu(like):
    """The same normal numbers on every device and in every type."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1)).to(like)


def mix_by_loop(moe, x_TD, routing, plan, capacity):
    """MoE.mix without capacity, by every expert on every token."""
    experts = moe.experts
    gate_TE = torch.zeros_like(routing.logits_TE).scatter(1, routing.expert_TK, routing.gate_TK)
    h_ETF = F.gelu(x_TD @ experts.c_fc + experts.fc_bias, approximate="tanh")
    return torch.einsum("te,etd->td", gate_TE, h_ETF @ experts.c_proj + experts.proj_bias)


def config_of(name, capacity):
    fields = {field.name for field in dataclasses.fields(GPTConfig)}
    settings = {key: value for key, value in VARIANTS[name].settings.items() if key in fields}
    shape = {"block_size": 64, "vocab_size": 512, "n_layer": 2, "n_head": 2, "n_embd": 64, "n_exp": 8}
    return GPTConfig(**shape | {"train_capacity": capacity} | settings)


def compute(config, device, dtype, chosen=(), compiled=False, mix=None):
    """({name: float32 tensor on the CPU} of loss, logits and gradients of one batch, experts chosen in each MoE layer).

    `chosen` replaces the routers' choices, `mix` MoE.mix.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a top-1 router without gradient
        model = GPT(config, torch.Generator().manual_seed(0)).to(device)
    seen = []
    for i, (_, moe) in enumerate(model.moe_layers()):
        if chosen:
            given_TK = chosen[i].to(device)
            moe.router.choose = lambda logits_TE, scores_TE, given_TK=given_TK: given_TK
        else:
            moe.router.register_forward_hook(lambda module, inputs, routing: seen.append(routing.expert_TK.cpu()))
        if mix:
            moe.mix = functools.partial(mix, moe)
    machine = devices.Machine(torch.device(device), dtype, rank=0, world_size=1, fsdp=False)
    args = SimpleNamespace(use_compile=compiled, activation_memory_budget=None, recompute="none", fsdp=False)
    call = devices.parallelize(model, args, machine)
    ids = torch.randint(config.vocab_size, (4, 65), generator=torch.Generator().manual_seed(2)).to(device)
    with mock.patch("torch.randn_like", noise_of_the_cpu), machine.autocast():
        loss = call(ids[:, :-1], ids[:, 1:]).loss
        loss.backward()
        found = {"loss": loss.detach(), "logits": call(ids[:, :-1]).logits.detach()}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.float().cpu() for name, tensor in found.items()}, seen


def largest_error(found, reference):
    """Largest relative error of any tensor; one that is almost zero is measured against the norm of a typical one."""
    assert found.keys() == reference.keys()
    norms = {name: tensor.norm().item() for name, tensor in reference.items()}
    floor = 1e-3 * math.hypot(*norms.values()) / math.sqrt(len(norms))
    errors = [(found[name] - reference[name]).norm().item() / (norm + floor) for name, norm in norms.items()]
    assert not any(map(math.isnan, errors))
    return max(errors)


@functools.cache
def on_the_cpu(name, capacity):
    """(float32 results, choices, allowed error of bfloat16)."""
    reference, seen = compute(config_of(name, capacity), "cpu", torch.float32)
    chosen = tuple(seen[: len(seen) // 2])  # those of the forward with targets
    of_bf16 = largest_error(compute(config_of(name, capacity), "cpu", torch.bfloat16, chosen)[0], reference)
    return reference, chosen, LIMIT[torch.bfloat16] + 2 * of_bf16


@pytest.mark.parametrize("capacity", [0.75, math.inf])  # 0.75 drops a quarter of the pairs at least
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_computes_what_it_does_on_the_cpu(name, capacity):
    reference, chosen, limit = on_the_cpu(name, capacity)
    config = config_of(name, capacity)
    assert largest_error(compute(config, DEVICE, torch.float32, chosen)[0], reference) <= LIMIT[torch.float32]
    assert largest_error(compute(config, DEVICE, torch.bfloat16, chosen)[0], reference) <= limit


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_computes_what_eager_does(name):
    reference, chosen, limit = on_the_cpu(name, 0.75)
    eager, _ = compute(config_of(name, 0.75), DEVICE, torch.bfloat16, chosen)
    compiled, _ = compute(config_of(name, 0.75), DEVICE, torch.bfloat16, chosen, compiled=True)
    assert largest_error(compiled, eager) <= limit
    assert largest_error(compiled, reference) <= limit


def test_grouped_products_with_empty_groups_against_a_loop():
    share_E = torch.tensor([0.0, 1, 6, 0, 0.02, 3, 3, 0])  # three experts without rows
    chosen = [share_E.expand(256, -1).multinomial(2, generator=torch.Generator().manual_seed(3))]
    config = config_of("only_moe", math.inf)
    reference, _ = compute(config, "cpu", torch.float32, chosen, mix=mix_by_loop)
    for dtype, limit in LIMIT.items():
        of_cpu = largest_error(compute(config, "cpu", dtype, chosen)[0], reference)
        assert largest_error(compute(config, DEVICE, dtype, chosen)[0], reference) <= limit + 2 * of_cpu
