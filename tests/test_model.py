"""model.py against plain references: the MoE layer in float64 with all gradients, GPT-2, losses, routing, balancing."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from bench.baselines import TurnRouter, replace
from model import GPT, GPTConfig, MoE

TINY = {"block_size": 32, "vocab_size": 61, "n_layer": 3, "n_head": 2, "n_embd": 16}
VARIANTS = {
    "dense": {},
    "top_2": {"n_exp": 8},
    "top_1": {"n_exp": 8, "top_k": 1},
    "top_1_softmax": {"n_exp": 8, "top_k": 1, "gate": "softmax"},
    "softmax": {"n_exp": 4, "gate": "softmax"},
    "sigmoid": {"n_exp": 4, "gate": "sigmoid"},
    "sigmoid_top_1": {"n_exp": 4, "gate": "sigmoid", "top_k": 1},
    "noisy": {"n_exp": 8, "use_noisy_top_k": True},
    "aux": {"n_exp": 8, "use_noisy_top_k": True, "use_aux_loss": True},
    "z": {"n_exp": 8, "use_aux_loss": True, "use_router_z_loss": True},
    "full_prec": {"n_exp": 8, "use_noisy_top_k": True, "router_use_full_prec": True},
    "switch_init": {"n_exp": 8, "use_switch_tfm_init": True, "switch_tfm_init_scale": 0.1},
    "bias_balance": {"n_exp": 8, "use_bias_balance": True},
    "shared": {"n_exp": 4, "top_k": 1, "gate": "softmax", "n_shared_exp": 1},
    "dropless": {"n_exp": 8, "train_capacity": math.inf, "eval_capacity": math.inf},
    "tight": {"n_exp": 3, "train_capacity": 0.5, "min_capacity": 1},
    "no_bias": {"n_exp": 8, "bias": False},
    "all_experts": {"n_exp": 4, "top_k": 4},
    "all_tricks": {"n_exp": 4, "use_noisy_top_k": True, "use_aux_loss": True, "use_router_z_loss": True,
                   "router_use_full_prec": True, "use_switch_tfm_init": True, "gate": "sigmoid",
                   "use_bias_balance": True, "n_shared_exp": 1, "train_capacity": 1.0},
}  # fmt: skip


def make(seed=0, **settings):
    config = GPTConfig(**TINY | settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # top_k=1 with topk_softmax has its own test
        model = GPT(config, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():  # trained-like: no zero biases, no unit norms, routers that prefer
        for name, p in model.named_parameters():
            scale = 3.0 if ".router." in name else 0.3
            p.add_(scale * torch.randn(p.shape, generator=generator))
        for _, moe in model.moe_layers():
            if config.use_bias_balance:
                moe.router.balance_bias.copy_(0.3 * torch.randn(config.n_exp, generator=generator))
    return model


def tokens(B=2, S=17, vocab=61, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (B, S), generator=generator) for _ in range(2)]


# -- the reference: one token and one choice at a time


def loop_over_tokens(moe, x, dropless=False):
    """MoE.forward as the papers write it: a loop over choices and tokens, capacity given out first choices first."""
    config, experts = moe.config, moe.experts
    x_TD = x.reshape(-1, x.shape[-1])
    n_tokens = x_TD.shape[0]
    logits = x_TD @ moe.router.w_g.weight.t()
    if config.use_noisy_top_k and moe.training:
        noise = torch.randn_like(logits)  # the layer's own draw, from the same seed
        logits = logits + noise * F.softplus(x_TD @ moe.router.w_noise.weight.t())
    probs = logits.softmax(-1)
    scores = logits.sigmoid() if config.gate == "sigmoid" else probs
    ranked = scores + moe.router.balance_bias if config.use_bias_balance else scores
    factor = config.train_capacity if moe.training else config.eval_capacity
    capacity = math.inf
    if not dropless and factor < math.inf:
        capacity = math.floor(config.top_k * factor * n_tokens / config.n_exp)
        capacity = max(config.min_capacity, capacity + capacity % 2)
    taken, out = [0] * config.n_exp, [torch.zeros_like(x_TD[0]) for _ in range(n_tokens)]
    chosen = ranked.argsort(dim=-1, descending=True)[:, : config.top_k]
    for k in range(config.top_k):
        for t in range(n_tokens):
            e = chosen[t, k].item()
            taken[e] += 1
            if taken[e] > capacity:
                continue
            picked = chosen[t]
            if config.gate == "topk_softmax":
                gate = logits[t, e].exp() / logits[t, picked].exp().sum()
            elif config.gate == "sigmoid" and config.top_k > 1:
                gate = scores[t, e] / scores[t, picked].sum()
            else:
                gate = scores[t, e]
            h = x_TD[t] @ experts.c_fc[e] + (experts.fc_bias[e, 0] if config.bias else 0)
            y = F.gelu(h, approximate="tanh") @ experts.c_proj[e] + (experts.proj_bias[e, 0] if config.bias else 0)
            out[t] = out[t] + gate * y
    out = torch.stack(out)
    if moe.shared is not None:
        out = out + moe.shared(x_TD)
    losses = {}
    if config.use_aux_loss:
        load = torch.bincount(chosen.flatten(), minlength=config.n_exp) / n_tokens
        losses["aux_loss"] = config.n_exp * (load * probs.mean(0)).sum()
    if config.use_router_z_loss:
        losses["z_loss"] = (logits.exp().sum(-1).log() ** 2).mean()
    return out.view(x.shape), losses


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "dense"])
def test_moe_layer_equals_the_loop_over_tokens(variant, training):
    moe = make(**VARIANTS[variant]).double().moe_layers()[0][1].train(training)
    x = torch.randn(3, 11, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(3, 11, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    results = []
    for layer in (moe, lambda x: loop_over_tokens(moe, x)):
        moe.zero_grad()
        torch.manual_seed(7)
        x_ = x.clone().requires_grad_()
        out, losses = layer(x_)
        sum(losses.values(), (out * weight).sum()).backward()
        grads = {name: p.grad for name, p in moe.named_parameters() if p.grad is not None}
        results.append(({"out": out, "x": x_.grad} | losses, grads))
    (values, grads), (values_, grads_) = results
    torch.testing.assert_close(values, values_, rtol=1e-9, atol=1e-9)
    assert grads.keys() >= grads_.keys()
    for name, ours in grads.items():
        torch.testing.assert_close(ours, grads_.get(name, torch.zeros_like(ours)), rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("favoured", [0, 2])
def test_an_expert_with_all_tokens_and_experts_with_none(favoured):
    moe = make(n_exp=4, top_k=1, gate="softmax", train_capacity=math.inf).double().moe_layers()[0][1]
    with torch.no_grad():
        moe.router.w_g.weight.zero_()
        moe.router.w_g.weight[favoured] = 1.0
    x = torch.rand(1, 13, 16, dtype=torch.float64)
    out, _ = moe(x)
    torch.testing.assert_close(out, loop_over_tokens(moe, x)[0])
    out.sum().backward()
    for e in range(4):
        assert (moe.experts.c_fc.grad[e].abs().sum() > 0) == (e == favoured)
    assert moe.count.tolist() == [13 * (e == favoured) for e in range(4)]


def test_capacity_is_the_published_formula():
    moe = make(n_exp=8, train_capacity=1.25, eval_capacity=2.0).moe_layers()[0][1]
    assert moe.capacity(1000) == 312  # floor(2 * 1.25 * 1000 / 8)
    assert moe.capacity(1004) == 314  # 313, made even
    assert moe.capacity(8) == 4  # min_capacity
    assert moe.eval().capacity(1000) == 500
    assert make(n_exp=2).moe_layers()[0][1].capacity(64) is None  # as many as there are tokens
    for factor in (math.inf, 1e308):
        assert make(n_exp=8, train_capacity=factor).moe_layers()[0][1].capacity(1000) is None


# -- the whole model


@pytest.mark.parametrize("settings, total, active", [
    ({"n_exp": 1}, 123_689_472, 123_689_472),
    ({"n_exp": 8}, 322_068_480, 152_060_928),
    ({"n_exp": 8, "use_noisy_top_k": True}, 322_068_480 + 36_864, 152_060_928 + 36_864),
])  # fmt: skip
def test_parameter_counts_are_the_published_ones(settings, total, active):
    with torch.device("meta"):
        model = GPT(GPTConfig(**settings))
    assert (model.num_params(), model.num_active_params()) == (total, active)


def test_flops_per_token():
    with torch.device("meta"):
        dense, moe = GPT(GPTConfig()), GPT(GPTConfig(n_exp=8))
    assert dense.estimate_flops_per_token(1024) == pytest.approx(855e6, rel=1e-3)
    assert moe.estimate_flops_per_token(1024) / dense.estimate_flops_per_token(1024) == pytest.approx(1.20, abs=0.002)


def test_positional_settings_are_those_of_nanogpt():
    config = GPTConfig(8, 32, 1, 2, 16, 0.5, False, n_exp=4)
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "n_exp")
    assert [getattr(config, name) for name in names] == [8, 32, 1, 2, 16, 0.5, False, 4]


def test_parameter_names_are_gpt2s_and_the_published_ones():
    names = set(make(n_exp=4, use_noisy_top_k=True).state_dict())
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.bias", "lm_head.weight",
            "transformer.h.0.attn.c_attn.weight", "transformer.h.0.mlp.router.w_g.weight",
            "transformer.h.0.mlp.router.w_noise.weight", "transformer.h.0.mlp.experts.c_fc",
            "transformer.h.0.mlp.experts.c_proj", "transformer.h.0.mlp.experts.fc_bias",
            "transformer.h.0.mlp.experts.proj_bias", "transformer.h.1.mlp.c_fc.weight",
            "transformer.h.2.mlp.experts.c_fc"} <= names  # fmt: skip
    experts = make(n_exp=4).transformer.h[0].mlp.experts
    assert [tuple(p.shape) for p in (experts.c_fc, experts.c_proj, experts.fc_bias, experts.proj_bias)] == [
        (4, 16, 64), (4, 64, 16), (4, 1, 64), (4, 1, 16)]  # fmt: skip


def test_dense_logits_equal_transformers_gpt2():
    transformers = pytest.importorskip("transformers")
    shape = {"n_positions": 32, "vocab_size": 61, "n_layer": 3, "n_head": 2, "n_embd": 16}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    ours = make().eval()
    state = theirs.state_dict()
    for name, value in ours.state_dict().items():
        transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))  # GPT-2 keeps (in, out)
        state[name].copy_(value.t() if transposed else value)
    idx, targets = tokens()
    with torch.no_grad():
        torch.testing.assert_close(ours(idx).logits, theirs(idx).logits, rtol=1e-5, atol=1e-5)
        loss = F.cross_entropy(theirs(idx).logits.flatten(0, 1), targets.flatten())
        torch.testing.assert_close(ours(idx, targets).ce_loss, loss)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_is_cross_entropy_plus_weighted_router_losses(variant):
    model = make(**VARIANTS[variant])
    idx, targets = tokens()
    torch.manual_seed(3)
    out = model(idx, targets)
    torch.manual_seed(3)
    plain = model(idx)
    assert out.logits is None and plain.loss is None
    ce = F.cross_entropy(plain.logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(out.ce_loss, ce)
    torch.testing.assert_close(out.loss, ce + 0.01 * out.aux_loss + 0.001 * out.z_loss)
    switches = {"aux_loss": "use_aux_loss", "z_loss": "use_router_z_loss"}
    assert set(out.losses) == {name for name, switch in switches.items() if VARIANTS[variant].get(switch)}
    assert all(value > 0 for value in out.losses.values())
    assert out.losses.keys() or out.aux_loss == out.z_loss == 0
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_weights_of_the_router_losses_reach_the_loss():
    idx, targets = tokens()
    out = make(n_exp=4, use_aux_loss=True, use_router_z_loss=True, aux_loss_weight=5.0, router_z_loss_weight=7.0)(
        idx, targets
    )
    torch.testing.assert_close(out.loss, out.ce_loss + 5 * out.aux_loss + 7 * out.z_loss)


def test_ignored_targets_and_loss_per_position():
    model = make(n_exp=4).eval()
    idx, targets = tokens()
    targets[0, 3:9] = -1
    per_position = model(idx, targets, reduction="none").ce_loss
    assert per_position.shape == targets.shape and (per_position[targets == -1] == 0).all()
    torch.testing.assert_close(per_position.sum() / (targets >= 0).sum(), model(idx, targets).ce_loss)


# -- routing


@pytest.mark.parametrize("gate, top_k, learns", [
    ("softmax", 1, True), ("sigmoid", 1, True), ("topk_softmax", 2, True), ("softmax", 2, True),
    ("sigmoid", 2, True), ("topk_softmax", 1, False),
])  # fmt: skip
def test_the_router_gets_a_gradient(gate, top_k, learns):
    model = make(n_exp=4, top_k=top_k, gate=gate)
    model(*tokens()).loss.backward()
    norm = model.transformer.h[0].mlp.router.w_g.weight.grad.norm().item()
    assert norm > 1e-4 if learns else norm == 0.0


def test_top_1_with_a_constant_gate_warns_once():
    config = GPTConfig(**TINY, n_exp=4, top_k=1)
    with pytest.warns(UserWarning, match="gate='softmax'") as caught:
        GPT(config)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GPT(GPTConfig(**TINY, n_exp=4, top_k=1, gate="softmax"))
        GPT(GPTConfig(**TINY, n_exp=1, top_k=1))


def test_balance_loss_equals_transformers():
    module = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    model = make(n_exp=8, use_aux_loss=True)
    seen = []
    for _, moe in model.moe_layers():
        moe.router.register_forward_hook(lambda module, args, routing: seen.append(routing.logits_TE))
    out = model(*tokens())
    theirs = sum(module.load_balancing_loss_func((logits,), num_experts=8, top_k=2) for logits in seen)
    assert len(seen) == 2
    torch.testing.assert_close(out.aux_loss, theirs)


def test_uniform_routing_gives_a_balance_loss_of_k():
    moe = make(n_exp=8, use_aux_loss=True).moe_layers()[0][1]
    with torch.no_grad():
        moe.router.w_g.weight.zero_()
    moe.router = replace(moe.router, TurnRouter)
    assert moe(torch.randn(1, 16, 16))[1]["aux_loss"].item() == pytest.approx(2.0)


@pytest.mark.parametrize("variant", ["top_2", "top_1_softmax", "sigmoid", "bias_balance", "shared"])
def test_dropless_hides_the_future_and_the_neighbours(variant):
    """With capacity, on a router that overflows, the same change does reach other sequences."""
    model = make(**VARIANTS[variant] | {"train_capacity": 0.5, "eval_capacity": 0.5, "min_capacity": 1}).eval()
    idx, _ = tokens(B=3, S=24)
    changed = idx.clone()
    changed[0, 15:] = (changed[0, 15:] + 1) % 61
    changed[1] = (changed[1] + 7) % 61
    with torch.no_grad():
        same = model(idx, dropless=True).logits - model(changed, dropless=True).logits
        leaky = model(idx).logits - model(changed).logits
    assert same[0, :15].abs().max() < 1e-4 and same[2].abs().max() < 1e-4
    assert leaky[2].abs().max() > 1e-2


def test_dropless_config_needs_no_flag():
    model = make(n_exp=4, train_capacity=math.inf, eval_capacity=math.inf)
    idx, _ = tokens()
    assert torch.equal(model(idx).logits, model(idx, dropless=True).logits)
    assert all(layer["drop_frac"] == 0 for layer in model.router_stats())


def test_noise_is_drawn_in_training_only():
    model = make(n_exp=8, use_noisy_top_k=True)
    idx, targets = tokens()
    assert model(idx, targets).ce_loss != model(idx, targets).ce_loss
    model.eval()
    state = torch.get_rng_state()
    assert model(idx, targets).ce_loss == model(idx, targets).ce_loss
    assert torch.equal(state, torch.get_rng_state())


def test_w_noise_is_computed_in_training_only():
    moe, calls = make(n_exp=8, use_noisy_top_k=True).moe_layers()[0][1], []
    moe.router.w_noise.register_forward_hook(lambda *_: calls.append(moe.training))
    for training in (True, False):
        moe.train(training)(torch.randn(1, 9, 16))
    assert calls == [True]


def test_the_shared_expert_gets_dropout_once():
    moe = make(n_exp=4, n_shared_exp=1, dropout=0.5, bias=False).moe_layers()[0][1]
    with torch.no_grad():
        moe.experts.c_proj.zero_()
    out, _ = moe(torch.randn(4, 200, 16))
    assert (out == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("full_prec", [False, True])
def test_router_precision(full_prec, noisy):
    """Under bf16 autocast: float32 logits with router_use_full_prec, bf16 products without, even on a bf16 input."""
    moe = make(n_exp=8, router_use_full_prec=full_prec, use_noisy_top_k=noisy).moe_layers()[0][1].eval()
    x_TD = torch.randn(50, 16)
    exact = x_TD @ moe.router.w_g.weight.t()
    with torch.autocast("cpu", torch.bfloat16):
        ours = moe.router.logits(x_TD)[0]
        from_bf16 = moe.router.logits(x_TD.bfloat16())[0]
    assert ours.dtype == from_bf16.dtype == torch.float32
    assert torch.allclose(ours, exact, atol=1e-5) == full_prec
    assert torch.allclose(from_bf16, x_TD.bfloat16().float() @ moe.router.w_g.weight.t(), atol=1e-5) == full_prec


def test_router_stats_of_the_last_forward():
    model = make(n_exp=4, train_capacity=0.5, min_capacity=1)
    seen = []
    for _, moe in model.moe_layers():
        moe.router.register_forward_hook(lambda module, args, routing: seen.append(routing))
    idx, targets = tokens()
    model(idx, targets)
    first = model.router_stats()
    model(targets, idx)
    assert model.router_stats() != first
    assert [layer["layer"] for layer in first] == [0, 2]
    for layer, routing in zip(first, seen[:2], strict=True):
        counts = torch.bincount(routing.expert_TK.flatten(), minlength=4).double()
        assert layer["load"] == pytest.approx((counts / counts.sum()).tolist())
        assert sum(layer["load"]) == pytest.approx(1)
        assert layer["max_vio"] == pytest.approx((counts.max() / counts.mean() - 1).item(), rel=1e-5)
        capacity = 8  # floor(2 * 0.5 * 34 / 4)
        assert layer["drop_frac"] == pytest.approx((counts - capacity).clamp(min=0).sum().item() / counts.sum().item())
        probs = routing.logits_TE.softmax(-1)
        assert layer["entropy"] == pytest.approx(-(probs * probs.log()).sum(-1).mean().item(), rel=1e-4)
        assert layer["max_logit"] == pytest.approx(routing.logits_TE.abs().max().item())


def test_spread_of_clean_logits_and_of_noise():
    """The noise of a router with w_noise 0 has standard deviation softplus(0) * noise_scale."""
    model = make(n_exp=8, use_noisy_top_k=True, noise_scale=3.0)
    seen = []
    for _, moe in model.moe_layers():
        moe.router.w_noise.weight.data.zero_()
        moe.router.register_forward_hook(lambda module, args, routing: seen.append(module.product(args[0], module.w_g)))
    idx, targets = tokens(B=64, S=32)
    for training in (True, False):
        seen.clear()
        model.train(training)(idx, targets)
        for layer, clean_TE in zip(model.router_stats(), seen, strict=True):
            assert layer["logit_std"] == pytest.approx((clean_TE.var(-1).mean() ** 0.5).item(), rel=1e-5)
            assert layer["noise_std"] == pytest.approx(3 * math.log(2) * training, rel=0.05)


def test_dropless_forwards_leave_the_statistics_alone():
    """Sampling and HellaSwag log nothing of the router."""
    model, (idx, targets) = make(n_exp=4), tokens()
    model(idx, targets)
    before = model.router_stats()
    model(targets, idx, dropless=True)
    assert model.router_stats() == before


def test_two_models_never_mix_and_forwards_leave_nothing_behind():
    """nanoMoE's module-level list of losses made a training step pay for earlier forwards."""
    model, other = make(n_exp=4, use_aux_loss=True), make(seed=5, n_exp=4, use_aux_loss=True)
    idx, targets = tokens()
    before = model(idx, targets)
    for _ in range(3):
        model(idx)
        other(idx, targets)
    after = model(idx, targets)
    assert torch.equal(before.loss, after.loss) and torch.equal(before.aux_loss, after.aux_loss)


def balanced_model():
    model = make(n_layer=1, n_exp=4, use_bias_balance=True, bias_balance_rate=0.01, train_capacity=math.inf)
    router = model.moe_layers()[0][1].router
    router.balance_bias.zero_()
    with torch.no_grad():
        router.w_g.weight.mul_(0.1)
    return model, router


def test_bias_balancing_evens_the_load():
    model, _ = balanced_model()
    idx, _ = tokens(B=8, S=32)
    max_vio = []
    for _ in range(100):
        model(idx)
        max_vio.append(model.router_stats()[0]["max_vio"])
        model.update_balance_bias(model.router_table())
    assert max_vio[0] > 0.2 and max_vio[-1] < 0.06
    assert "transformer.h.0.mlp.router.balance_bias" in model.state_dict()


def test_the_balance_update_depends_on_the_table_alone():
    """A forward whose step is skipped, or an evaluation, leaves nothing for the next update."""
    model, router = balanced_model()
    table = torch.zeros(1, model.COUNTS + 4)
    table[0, model.COUNTS :] = torch.tensor([7.0, 1.0, 4.0, 4.0])
    for seed in range(2):
        router.balance_bias.zero_()
        model(tokens(seed=seed)[0])
        model.update_balance_bias(table)
        torch.testing.assert_close(router.balance_bias, torch.tensor([-0.01, 0.01, 0.0, 0.0]))


# -- initialisation and optimizer


def test_initial_loss_and_standard_deviations():
    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=256, vocab_size=1000, n_exp=4), torch.Generator().manual_seed(0))
    std = {name: p.std().item() for name, p in model.named_parameters()}
    residual = 0.02 / math.sqrt(8)
    for name, expected in (("wte.weight", 0.02), ("h.0.attn.c_attn.weight", 0.02), ("h.0.mlp.router.w_g.weight", 0.02),
                           ("h.0.mlp.experts.c_fc", 0.02), ("h.0.mlp.experts.c_proj", residual),
                           ("h.1.mlp.c_proj.weight", residual), ("h.1.attn.c_proj.weight", residual)):  # fmt: skip
        assert std["transformer." + name] == pytest.approx(expected, rel=0.05), name
    idx, targets = tokens(vocab=1000)
    assert model(idx, targets).ce_loss.item() == pytest.approx(math.log(1000), abs=0.2)


def test_switch_init_reaches_the_moe_layers_only():
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 256, "vocab_size": 100, "n_exp": 4, "use_noisy_top_k": True}
    config = GPTConfig(**shape, use_switch_tfm_init=True, switch_tfm_init_scale=0.1)
    switch, plain = (GPT(c, torch.Generator().manual_seed(0)) for c in (config, GPTConfig(**shape)))
    std = {name: p.std().item() for name, p in switch.named_parameters()}
    # a normal cut at 2 std keeps 0.88 of it
    for name, fan_in in (("router.w_g.weight", 256), ("router.w_noise.weight", 256), ("experts.c_fc", 256),
                         ("experts.c_proj", 1024)):  # fmt: skip
        assert std[f"transformer.h.0.mlp.{name}"] == pytest.approx(0.88 * math.sqrt(0.1 / fan_in), rel=0.05), name
        limit = 2 * math.sqrt(0.1 / fan_in)
        assert dict(switch.named_parameters())[f"transformer.h.0.mlp.{name}"].abs().max() <= limit
    for name, p in plain.named_parameters():
        if ".router." not in name and ".experts." not in name:
            assert std[name] == pytest.approx(p.std().item(), rel=0.1, abs=1e-6), name


def test_an_uncovered_parameter_is_an_error():
    model = make()
    model.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(RuntimeError, match="extra"):
        model.init_weights()


def test_weight_decay_spares_biases_and_norms():
    model = make(n_exp=4, use_noisy_top_k=True, n_shared_exp=1)
    decayed, plain = model.optimizer_groups(0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    kept = {names[id(p)] for p in plain["params"]}
    assert {"transformer.h.0.mlp.experts.fc_bias", "transformer.h.0.mlp.experts.proj_bias"} <= kept
    assert kept == {name for name in names.values() if "bias" in name or ".ln_" in name}
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_same_generator_same_weights_and_the_global_one_untouched():
    state = torch.get_rng_state()
    a, b = (GPT(GPTConfig(**TINY, n_exp=4), torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("wrong, named", [
    ({"n_embd": 18, "n_head": 4}, "n_head"), ({"n_exp": 2, "top_k": 3}, "top_k"), ({"n_layer": 0}, "n_layer"),
    ({"eval_capacity": math.nan}, "eval_capacity"), ({"train_capacity": -1}, "train_capacity"),
    ({"train_capacity": 0}, "train_capacity"),
    ({"dropout": 1.0}, "dropout"), ({"aux_loss_weight": math.nan}, "aux_loss_weight"), ({"n_exp": 0}, "n_exp"),
    ({"router_z_loss_weight": -1.0}, "router_z_loss_weight"), ({"n_shared_exp": -1}, "n_shared_exp"),
    ({"stride": 0}, "stride"), ({"switch_tfm_init_scale": 0.0}, "switch_tfm_init_scale"),
])  # fmt: skip
def test_impossible_configurations_are_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        GPTConfig(**wrong)


def test_more_tokens_than_positions():
    with pytest.raises(ValueError, match="block_size 32"):
        make()(torch.zeros(1, 33, dtype=torch.long))


# -- precision, compilation, size


@pytest.mark.parametrize("variant", ["dense", "top_2", "z", "shared"])
def test_bf16_autocast_agrees_with_float32(variant):
    """With a seed where rounding moves no choice of top_2; such a move alone changes gradients by 3 %."""
    model = GPT(GPTConfig(**TINY | {"n_embd": 64}, **VARIANTS[variant]), torch.Generator().manual_seed(1))
    idx, targets = tokens(B=4, S=32)
    losses, grads = [], []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(idx, targets)
        out.loss.backward()
        assert out.ce_loss.dtype == torch.float32
        losses.append(out.ce_loss.item())
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    for name in ("transformer.wte.weight", "transformer.h.2.attn.c_attn.weight", "transformer.ln_f.weight"):
        a, b = grads[0][name], grads[1][name]
        assert ((a - b).norm() / a.norm()).item() < 2e-2, name


@pytest.mark.parametrize("variant", ["dense", "top_2", "all_tricks"])
def test_bf16_weights(variant):
    """model.bfloat16(), short rows: forward and backward agree with float32."""
    model = make(**VARIANTS[variant])
    torch.manual_seed(0)
    exact = model(*tokens()).ce_loss.item()
    torch.manual_seed(0)
    out = model.bfloat16()(*tokens())
    out.loss.backward()
    assert out.ce_loss.item() == pytest.approx(exact, rel=0.05)
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())


def test_micro_batches_add_up_to_the_big_batch():
    model = make().double()
    idx, targets = tokens(B=4)
    model(idx, targets).loss.backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for part in range(2):
        (model(idx[2 * part : 2 * part + 2], targets[2 * part : 2 * part + 2]).loss / 2).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], msg=name)


def test_layer_type():
    assert [block.is_moe for block in make(n_exp=4, n_layer=5, stride=2).transformer.h] == [True, False] * 2 + [True]
    assert [block.is_moe for block in make(n_exp=4, n_layer=4, stride=3).transformer.h] == [True, False, False, True]
    assert isinstance(make(n_exp=4).transformer.h[0].mlp, MoE) and not make().moe_layers()


@pytest.mark.parametrize("settings", [
    {"use_noisy_top_k": True, "use_aux_loss": True, "balance_scope": "step"},
    {"use_quantile_balance": True, "gate": "sigmoid", "n_shared_exp": 1, "train_capacity": 1.0},
], ids=str)  # fmt: skip
def test_recomputed_activations_change_no_bit_and_take_less_memory(settings):
    """Gradients of two micro-batches, the router's statistics, what is counted over the step, the random state."""

    def two_backwards(part):
        kept = []
        model = GPT(GPTConfig(block_size=32, vocab_size=61, n_layer=2, n_head=2, n_embd=32, n_exp=4, stride=1,
                              dropout=0.1, **settings), torch.Generator().manual_seed(0))  # fmt: skip
        model.recompute(part)
        model.start_step()
        for seed in range(2):
            torch.manual_seed(seed)
            idx = torch.randint(61, (2, 32))
            with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
                loss = model(idx, idx).loss
            loss.backward()
        grads = [p.grad for p in model.parameters()]
        return [loss.detach(), torch.get_rng_state(), model.router_table(), *grads, *model.buffers()], sum(kept)

    results = {part: two_backwards(part) for part in ("none", "experts", "blocks")}
    for part in ("experts", "blocks"):
        assert all(map(torch.equal, results[part][0], results["none"][0])), part
    assert results["blocks"][1] < results["experts"][1] < results["none"][1]
