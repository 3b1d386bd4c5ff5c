"""lab/optim.py: schedules by steps and by the clock, groups of the optimizer, Muon and AdamW against torch's."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lab import optim
from lab.common import UserError
from model import GPT, GPTConfig

# -- the schedule


def settings(**changed):
    defaults = {
        "max_lr": 1.0, "min_lr": 0.2, "warmup_steps": 10, "max_steps": 110, "schedule": "cosine", "decay_steps": None,
        "max_minutes": None, "weight_decay": 0.1, "muon_lr": 20.0,
        "optimizer": "adamw", "beta2": 0.9,
    }
    return SimpleNamespace(**defaults | changed)


def rates_of(args, n_steps, minutes_per_step=None):
    """The rates of a run; the clock does not count the first step, which compiles."""
    minutes = [0.0, 0.0, *itertools.accumulate(minutes_per_step or [0.0] * n_steps)]
    return [optim.learning_rate(step, args, minutes[step] / 60) for step in range(n_steps + 1)]


def test_cosine():
    rates = rates_of(settings(), 500)
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    for step in range(10, 110):
        assert rates[step] == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi * (step - 10) / 100)))
    assert rates[110:] == pytest.approx([0.2] * 391)
    assert rates_of(settings(min_lr=None), 110)[-1] == pytest.approx(0.1)


def test_wsd_is_constant_and_then_one_minus_sqrt():
    rates = rates_of(settings(schedule="wsd", decay_steps=25), 110)
    assert rates[9:86] == [1.0] * 77
    for step in range(86, 111):
        assert rates[step] == pytest.approx(0.2 + 0.8 * (1 - math.sqrt((step - 85) / 25)))
    by_default = rates_of(settings(schedule="wsd"), 110)
    assert by_default[88] == 1.0 > by_default[89]  # the last fifth


@pytest.mark.parametrize("schedule, decay_steps", [
    ("cosine", None), ("wsd", None), ("wsd", 1), ("wsd", 30), ("wsd", 99),
])
@pytest.mark.parametrize("warmup_steps", [0, 1, 7, 50, 99])
@pytest.mark.parametrize("ended_by", ["steps", "clock", "clock of uneven steps"])
def test_the_rate_never_jumps(schedule, decay_steps, warmup_steps, ended_by):
    """It rises by equal parts, is max_lr at the end of the warmup, and falls from there to min_lr without a gap."""
    n, clock = 100, {"max_minutes": 60.0, "max_steps": 400} if "clock" in ended_by else {"max_steps": 100}
    args = settings(schedule=schedule, decay_steps=decay_steps, warmup_steps=warmup_steps, **clock)
    weights = [1 + 2 * (step % 5 == 0) if "uneven" in ended_by else 1 for step in range(n - 1)]
    rates = rates_of(args, n, [60 * weight / sum(weights) for weight in weights])
    assert rates[:warmup_steps] == pytest.approx([(step + 1) / warmup_steps for step in range(warmup_steps)])
    after = rates[warmup_steps:]
    drops = [first - second for first, second in itertools.pairwise(after)]
    assert after[0] == pytest.approx(1.0) and after[-1] == pytest.approx(0.2) and min(drops) >= 0
    # The steepest places are the middle of the cosine and the first step of 1 - sqrt, the longest step falling on them.
    step = max(weights) / sum(weights) * n / (n - warmup_steps)
    if schedule == "wsd":
        decay = (decay_steps or 0.2 * args.max_steps) / (args.max_steps - warmup_steps)
        steepest = math.sqrt(step / min(1.0, decay))
    else:
        steepest = math.pi / 2 * step
    assert max(drops) <= 0.8 * min(1.0, steepest) + 1e-9


def test_by_the_clock_the_rate_is_that_of_the_part_of_the_time_that_is_done():
    for schedule, halfway in (("cosine", 0.6), ("wsd", 1.0)):
        args = settings(schedule=schedule, warmup_steps=0, max_steps=10**6, max_minutes=60.0)
        assert [optim.learning_rate(step, args, 0.5) for step in (5, 50_000)] == pytest.approx([halfway] * 2)
    assert optim.is_over(5, args, 1.0) and not optim.is_over(5, args, 0.99) and optim.is_over(10**6, args, 0.0)


# -- groups

SMALL = {"block_size": 16, "vocab_size": 61, "n_layer": 2, "n_head": 2, "n_embd": 16}
MOE = {"n_exp": 4, "n_shared_exp": 1, "use_noisy_top_k": True, "use_bias_balance": True, "train_capacity": math.inf}
MODELS = {"dense": {}, "moe": MOE, "no_bias": MOE | {"bias": False}}


def small_model(**fields):
    return GPT(GPTConfig(**SMALL | fields), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_each_parameter_has_its_decay_and_its_rate(fields, optimizer):
    """Biases, the experts' too, and norms are not decayed; Muon takes the hidden matrices."""
    model = small_model(**fields)
    built = optim.build_optimizer(model, settings(optimizer=optimizer))
    optim.set_learning_rate(built, 0.5)
    held = [(p, group) for group in built.param_groups for p in group["params"]]
    group_of = dict(held)
    assert len(held) == len(group_of) == len(list(model.parameters()))
    matrix = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight", ".experts.c_fc", ".experts.c_proj")
    for name, p in model.named_parameters():
        decay, rate = 0.1, 0.5
        if name.endswith("bias") or ".ln_" in name:
            decay = 0.0
        if optimizer == "muon" and name.endswith(matrix):
            rate = 0.5 * 20.0
        assert (group_of[p]["weight_decay"], group_of[p]["lr"]) == (decay, rate), name


def test_a_parameter_in_no_group_is_refused(monkeypatch):
    model = small_model()
    held = list(model.parameters())
    monkeypatch.setattr(model, "parameters", lambda: [*held, torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(RuntimeError, match="exactly the model's parameters"):
        optim.build_optimizer(model, settings())


# -- Muon and AdamW


def gradient_of(p, i, step):
    """A random gradient, the same for equal arguments; of four experts one has none, the others very unlike ones."""
    grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * step + i), dtype=p.dtype)
    return grad * torch.tensor([1.0, 0.0, 1e-3, 1e4], dtype=p.dtype)[:, None, None] if p.dim() == 3 else grad


def muon_by_svd(weight, gradients, lr, weight_decay, momentum=0.95):
    """The formula for one matrix (outputs, inputs): the polynomial of Newton-Schulz on exact singular values."""
    average = torch.zeros_like(weight)
    for gradient in gradients:
        average = momentum * average + (1 - momentum) * gradient
        u, s, vh = torch.linalg.svd((1 - momentum) * gradient + momentum * average, full_matrices=False)
        s = s / s.square().sum().sqrt().clamp(min=1e-7)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        scale = max(1, weight.shape[0] / weight.shape[1]) ** 0.5
        weight = (1 - lr * weight_decay) * weight - lr * scale * u @ s.diag() @ vh
    return weight


def matrices_of(name, tensor):
    """The matrices (outputs, inputs) of a hidden parameter: c_attn is three, Experts (E, inputs, outputs) are E."""
    if ".experts." in name:
        return [part.t() for part in tensor]
    return tensor.chunk(3) if ".c_attn." in name else [tensor]


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_muon_follows_its_formula_for_each_matrix_and_the_rest_is_adamws(fields):
    """AdamW's part bit for bit; in float64 the hidden matrices follow the formula."""
    start = small_model(**fields).double()
    models, rates = {}, {"muon_lr": 0.02, "max_lr": 1e-3}
    for name in ("muon", "adamw"):
        models[name] = copy.deepcopy(start)
        optimizer = optim.build_optimizer(models[name], settings(optimizer=name, **rates))
        optim.set_learning_rate(optimizer, 1e-3)
        for step in range(4):
            for i, p in enumerate(models[name].parameters()):
                p.grad = gradient_of(p, i, step)
            optimizer.step()
    for i, (name, p) in enumerate(models["muon"].named_parameters()):
        if p.dim() == 1 or not name.startswith("transformer.h.") or ".router." in name or name.endswith("bias"):
            assert torch.equal(p, models["adamw"].get_parameter(name)), name
            continue
        gradients = [matrices_of(name, gradient_of(p, i, step)) for step in range(4)]
        weights = matrices_of(name, start.get_parameter(name))
        for ours, weight, *of_matrix in zip(matrices_of(name, p), weights, *gradients, strict=True):
            torch.testing.assert_close(ours, muon_by_svd(weight, of_matrix, 0.02, 0.1), rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("fields", [*MODELS.values(), {"expert_hidden": 8, "n_exp": 4}])
def test_the_flops_of_an_update_are_those_that_torch_counts(fields):
    model, args = small_model(**fields), settings(optimizer="muon")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with FlopCounterMode(display=False) as counter:
        optim.build_optimizer(model, args).step()
    assert optim.flops_per_step(model, args) == counter.get_total_flops() > 0
    assert optim.flops_per_step(model, settings()) == 0


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)], ids=str)
def test_a_matrix_is_updated_as_by_torchs_muon(shape):
    """torch's iterates in bfloat16 on every device, so ours does too here."""
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    optimizers = [
        optim.Muon([{"params": [ours], "matrices": 1}], lr=0.02, weight_decay=0.1, ns_dtype=torch.bfloat16),
        torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="original"),
    ]
    for step in range(4):
        ours.grad, theirs.grad = (gradient_of(ours, 0, step) for _ in range(2))
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_muon_without_hidden_matrices_is_refused():
    with pytest.raises(UserError, match=r"--optimizer muon needs hidden matrices .*: use --optimizer adamw"):
        optim.Muon([{"params": [torch.nn.Parameter(torch.ones(2, 2))]}], lr=0.1)


def test_a_loaded_state_lies_on_the_device_of_its_parameters():
    """AdamW's step too, which torch leaves on the CPU unless the group is fused; meta stands for a GPU."""
    model, args = small_model(**MOE), settings(optimizer="muon")
    with torch.device("meta"):
        other = optim.build_optimizer(small_model(**MOE), args)
    optimizer = optim.build_optimizer(model, args)
    for i, p in enumerate(model.parameters()):
        p.grad = gradient_of(p, i, 0)
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    assert {tensor.device.type for state in other.state.values() for tensor in state.values()} == {"meta"}
