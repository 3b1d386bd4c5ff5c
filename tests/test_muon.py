"""muon.py: Muon against its formula with an exact SVD and against torch's, AdamW for the rest, resume, bench.

test_distributed.py trains with it on 1, 2 and 4 ranks.
"""

import copy
import json
import sys

import pytest
import torch

from bench import __main__ as bench
from lab import checkpoint, common
from lab.common import UserError
from lab.muon import COEFFICIENTS, STEPS, Muon, muon_groups, newton_schulz
from model import GPT, GPTConfig

SMALL = {"block_size": 16, "vocab_size": 61, "n_layer": 2, "n_head": 2, "n_embd": 16}
MOE = {"n_exp": 4, "n_shared_exp": 1, "use_noisy_top_k": True, "use_bias_balance": True, "train_capacity": float("inf")}
SETTINGS = {"dense": {}, "moe": MOE, "no_bias": {**MOE, "bias": False}}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def small_model(seed=0, **fields):
    return GPT(GPTConfig(**{**SMALL, **fields}), torch.Generator().manual_seed(seed))


def muon_of(model, lr=1e-3, lr_scale=20.0, **settings):
    optimizer = Muon(muon_groups(model, model.optimizer_groups(0.1), lr_scale), lr=lr, **settings)
    for group in optimizer.param_groups:  # as the training loop does
        group["lr"] = lr * group["lr_scale"]
    return optimizer


def tokens(seed, rows=2):
    return torch.randint(61, (rows, 8), generator=torch.Generator().manual_seed(seed))


def train_step(model, optimizer, seed=0, batch=None):
    torch.manual_seed(seed)  # router noise
    loss = model.train()(*(batch or [tokens(seed)] * 2)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def steps_of(optimizer_of, weight, gradients):
    """The weight after one step per gradient."""
    p = torch.nn.Parameter(weight.clone())
    optimizer = optimizer_of(p)
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
    return p.detach()


def muon_steps(weight, gradients, stacked=1, **settings):
    settings = {"lr": 0.02, "weight_decay": 0.1, **settings}
    return steps_of(lambda p: Muon([{"params": [p], "muon": True, "stacked": stacked}], **settings), weight, gradients)


# -- the update


def reference(weight, gradients, lr=0.02, weight_decay=0.1, momentum=0.95):
    """The formula for one matrix (outputs, inputs): the polynomial of Newton-Schulz on exact singular values."""
    average = torch.zeros_like(weight)
    for gradient in gradients:
        average = momentum * average + (1 - momentum) * gradient
        u, s, vh = torch.linalg.svd((1 - momentum) * gradient + momentum * average, full_matrices=False)
        s = s / s.square().sum().sqrt()
        for _ in range(STEPS):
            s = sum(c * s**power for c, power in zip(COEFFICIENTS, (1, 3, 5), strict=True))
        scale = max(1, weight.shape[0] / weight.shape[1]) ** 0.5
        weight = (1 - lr * weight_decay) * weight - lr * scale * u @ s.diag() @ vh
    return weight


def gradients_of(shape, n=4):
    return [random(*shape, seed=seed, dtype=torch.float64) for seed in range(1, n + 1)]


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16), (1, 5)], ids=str)
def test_a_linear_follows_the_formula(shape):
    weight, gradients = random(*shape, dtype=torch.float64), gradients_of(shape)
    torch.testing.assert_close(muon_steps(weight, gradients), reference(weight, gradients), rtol=1e-9, atol=1e-10)


def test_the_fused_projection_is_three_matrices():
    weight, gradients = random(24, 8, dtype=torch.float64), gradients_of((24, 8))
    alone = [reference(weight.chunk(3)[i], [gradient.chunk(3)[i] for gradient in gradients]) for i in range(3)]
    torch.testing.assert_close(muon_steps(weight, gradients, stacked=3), torch.cat(alone), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", [(4, 8, 24), (4, 24, 8), (1, 8, 8)], ids=str)
def test_each_expert_is_a_linear_of_its_own(shape):
    """Experts keep (inputs, outputs), a Linear (outputs, inputs). The third expert never gets a token."""
    weight, gradients = random(*shape, dtype=torch.float64), gradients_of(shape)
    for gradient in gradients:
        gradient *= torch.tensor([1.0, 1e4, 0.0, 1e-3], dtype=torch.float64)[: shape[0], None, None]
    together = muon_steps(weight, gradients)
    for e in range(shape[0]):
        as_linear = weight[e].t().contiguous(), [gradient[e].t().contiguous() for gradient in gradients]
        torch.testing.assert_close(together[e].t(), muon_steps(*as_linear), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(together[e].t(), reference(*as_linear) if e != 2 else 0.998**4 * weight[e].t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64, 16), (5, 16, 64), (3, 32, 32)], ids=str)
def test_singular_values_of_the_update_are_near_1(shape, dtype):
    x = random(*shape) + (3 * torch.eye(32) if shape[1] == shape[2] else 0)  # square: none of them near 0
    values = torch.linalg.svdvals(newton_schulz(x, dtype).float())
    assert values.min() > 0.65 and values.max() < 1.25
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    turned = u.mT @ newton_schulz(x, dtype).float() @ vh.mT  # diagonal: the singular vectors are those of x
    off_diagonal = turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))
    assert off_diagonal.abs().max() < (0.05 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)], ids=str)
def test_a_linear_is_updated_as_by_torch(shape):
    """torch's iterates in bfloat16 on every device, so ours does too here."""
    weight, gradients = random(*shape), [g.float() for g in gradients_of(shape)]
    theirs = steps_of(
        lambda p: torch.optim.Muon([p], lr=0.02, weight_decay=0.1, adjust_lr_fn="original"), weight, gradients
    )
    torch.testing.assert_close(muon_steps(weight, gradients, ns_dtype=torch.bfloat16), theirs, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(muon_steps(weight, gradients), theirs, rtol=0, atol=0.02 * 4 * 0.05)


def test_all_other_parameters_are_updated_as_by_adamw():
    """Bit for bit, given the same gradients."""
    model = small_model(**MOE)
    other = copy.deepcopy(model)
    optimizer = muon_of(model, lr=1e-2, betas=(0.8, 0.9), eps=1e-6)
    adamw = torch.optim.AdamW(other.optimizer_groups(0.1), lr=1e-2, betas=(0.8, 0.9), eps=1e-6, fused=True)
    hidden = {p for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    for seed in range(4):
        for i, (p, q) in enumerate(zip(model.parameters(), other.parameters(), strict=True)):
            p.grad = random(*p.shape, seed=1000 * seed + i)
            q.grad = p.grad.clone()
        optimizer.step()
        adamw.step()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q) == (p not in hidden), name


# -- groups


@pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS)
def test_hidden_matrices_and_nothing_else_get_muon(fields):
    model = small_model(**fields)
    groups = muon_groups(model, model.optimizer_groups(0.1), 20.0)
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len({*held}) and {*held} == {*model.parameters()}
    names = {p: name for name, p in model.named_parameters()}
    for group in groups:
        muon = group.get("muon", False)
        assert group["lr_scale"] == (20.0 if muon else 1.0)
        for p in group["params"]:
            block, name = names[p].startswith("transformer.h."), names[p]
            matrix = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight", "experts.c_fc", "experts.c_proj"))
            assert muon == (block and matrix), name
            assert group.get("stacked", 1) == (3 if name.endswith("c_attn.weight") else 1), name
            assert group["weight_decay"] == (0.0 if name.endswith("bias") or ".ln_" in name else 0.1), name


def test_settings_of_a_group_are_kept():
    """A router's own rate and decay; a factor of a hidden matrix is multiplied."""
    model = small_model(**MOE)
    router = [p for name, p in model.named_parameters() if ".router." in name]
    rest = [p for name, p in model.named_parameters() if ".router." not in name]
    groups = [
        {"params": router, "weight_decay": 0.3, "lr_scale": 0.5}, {"params": rest, "weight_decay": 0.1, "lr_scale": 2.0}
    ]  # fmt: skip
    first, *others = muon_groups(model, groups, 10.0)
    assert first == {"params": router, "weight_decay": 0.3, "lr_scale": 0.5}
    assert [group["lr_scale"] for group in others] == [2.0, 20.0, 20.0]


def test_a_model_without_hidden_matrices_and_an_unknown_parameter_are_refused():
    model = small_model()
    embeddings = [{"params": [model.lm_head.weight]}]
    with pytest.raises(UserError, match=r"--optimizer muon needs hidden matrices .*: use --optimizer adamw"):
        muon_groups(model, embeddings)
    model.transformer.h[0].attn.temperature = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match=r"transformer.h.0.attn.temperature, shape \(2,\)"):
        muon_groups(model, model.optimizer_groups(0.1))
    with pytest.raises(ValueError, match=r"not the shape \(2,\)"):
        Muon([{"params": [torch.nn.Parameter(torch.ones(2))], "muon": True}], lr=0.1)


# -- training


@pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS)
def test_the_loss_falls_by_muon_alone(fields):
    """At rate 0 AdamW does nothing: the hidden matrices learn a map of tokens to tokens."""
    model = small_model(**fields)
    optimizer = muon_of(model)
    for group in optimizer.param_groups:
        group["lr"] *= group["muon"]
    before, losses = copy.deepcopy(model), []
    for seed in range(20):
        idx = tokens(seed, rows=8)
        losses.append(train_step(model, optimizer, seed, (idx, (7 * idx + 3) % 61)))
    assert losses[-1] < losses[0] - 0.1
    hidden = {p for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q) == (p not in hidden), name


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, MOE, MOE | {"freeze_router": True}], ids=["dense", "moe", "frozen_router"])
def test_a_restored_run_continues_bit_for_bit(tmp_path, fields):
    model = small_model(**fields)
    optimizer = muon_of(model)
    for seed in range(3):
        train_step(model, optimizer, seed)
    state = checkpoint.get_state(model, optimizer)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    moments = state["optimizer"]["state"]
    assert moments.keys() == trained
    assert moments["transformer.h.0.attn.c_attn.weight"].keys() == {"momentum_buffer"}
    assert moments["transformer.wte.weight"].keys() == {"step", "exp_avg", "exp_avg_sq"}
    checkpoint.save(state, tmp_path / "a.pt")
    other = small_model(seed=9, **fields)
    other_optimizer = muon_of(other)
    checkpoint.set_state(other, other_optimizer, checkpoint.load(tmp_path / "a.pt"), "a.pt")
    for seed in range(3, 6):
        assert train_step(model, optimizer, seed) == train_step(other, other_optimizer, seed)
    states = [checkpoint.get_state(*pair) for pair in ((model, optimizer), (other, other_optimizer))]
    for of_one, of_other in zip(*(s["optimizer"]["state"].values() for s in states), strict=True):
        torch.testing.assert_close(of_one, of_other, rtol=0, atol=0)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_loaded_state_lies_on_the_device_of_its_parameters():
    """AdamW's step too, which torch leaves on the CPU unless the group is fused; meta stands for a GPU."""
    model = small_model()
    train_step(model, optimizer := muon_of(model))
    with torch.device("meta"):
        other = small_model()
    (loaded := muon_of(other)).load_state_dict(optimizer.state_dict())
    assert {tensor.device.type for state in loaded.state.values() for tensor in state.values()} == {"meta"}


def test_the_state_of_adamw_is_refused():
    model = small_model()
    adamw = torch.optim.AdamW(model.optimizer_groups(0.1), lr=1e-3)
    train_step(model, adamw)
    with pytest.raises(UserError, match=r"optimizer transformer.h.0.* momentum_buffer is missing"):
        checkpoint.set_state(model, muon_of(model), checkpoint.get_state(model, adamw), "x")


# -- bench


def run_bench(monkeypatch, *argv):
    shape = ("--device", "cpu", "--n_embd", "32", "--n_head", "2", "--vocab_size", "300", "--T", "32", "--threads", "1")
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, argv), *shape, "--n_layer", "1", "--n_exp", "2"])
    with pytest.raises(SystemExit) as caught:
        common.run(bench.main)
    return caught.value.code


def test_step_has_a_row_with_muon_per_variant(tmp_path, monkeypatch):
    words = ("--rounds", 1, "--warmup", 1, "--variants", "dense", "top2", "--tokens", 64, "--dtype", "float32")
    assert run_bench(monkeypatch, "step", "--optimizer", "muon", *words, "--out_dir", tmp_path) == 0
    rows = json.loads((tmp_path / "step_cpu_float32.json").read_text())["rows"]
    rows = {row["variant"]: row for row in rows}
    assert list(rows) == ["dense", "top2", "dense+muon", "top2+muon"]
    for name in ("dense", "top2"):  # one buffer per hidden matrix, not two
        assert rows[f"{name}+muon"]["MB"] < rows[name]["MB"]
        assert rows[f"{name}+muon"]["flop_ratio"] == rows[name]["flop_ratio"]


def test_other_subcommands_refuse_the_optimizer(tmp_path, monkeypatch, capsys):
    assert run_bench(monkeypatch, "scale", "--optimizer", "muon", "--out_dir", tmp_path) == 2
    assert "--optimizer is timed by step alone" in capsys.readouterr().err
