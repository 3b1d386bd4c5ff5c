"""model.py against plain loops in float64, losses and all gradients; routing, balancing, initialisation, counts."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig, RouterStats

TINY = {"block_size": 32, "vocab_size": 61, "n_layer": 3, "n_head": 2, "n_embd": 16, "n_exp": 8}
DROPLESS = {"train_capacity": math.inf, "eval_capacity": math.inf}
TIGHT = {"train_capacity": 0.5, "eval_capacity": 0.5, "min_capacity": 1}
NOISY, AUX, Z = {"use_noisy_top_k": True}, {"use_aux_loss": True}, {"use_router_z_loss": True}
SETTINGS = {
    "dense": {"n_exp": 1},
    "qk_norm": {"n_exp": 1, "qk_norm": True, "bias": False},
    # gates
    "top_2": {},
    "top_1": {"top_k": 1},
    "top_1_softmax": {"top_k": 1, "gate": "softmax"},
    "top_1_sigmoid": {"top_k": 1, "gate": "sigmoid"},
    "softmax": {"n_exp": 4, "gate": "softmax"},
    "sigmoid": {"n_exp": 5, "top_k": 3, "gate": "sigmoid"},
    "all_experts": {"n_exp": 4, "top_k": 4, "use_quantile_balance": True},
    "sigmoid_shared": {"gate": "sigmoid", "n_shared_exp": 1},
    # router, losses, balancing
    "noisy": NOISY,
    "noisy_full_prec": NOISY | {"router_use_full_prec": True},
    "frozen": AUX | {"freeze_router": True, "gate": "softmax"},
    "aux": AUX | {"aux_loss_weight": 0.5},
    "aux_step": AUX | NOISY | {"balance_scope": "step", "top_k": 3},
    "aux_sequence": AUX | {"balance_scope": "sequence", "gate": "sigmoid"},
    "z": Z | {"router_z_loss_weight": 0.7},
    "aux_z_sigmoid": AUX | Z | NOISY | {"gate": "sigmoid", "top_k": 3},
    "bias_balance": {"use_bias_balance": True},
    "quantile": {"use_quantile_balance": True},
    "quantile_sigmoid": {"use_quantile_balance": True, "gate": "sigmoid"},
    # shapes, capacity
    "shared": {"n_exp": 4, "top_k": 1, "gate": "softmax", "n_shared_exp": 2, "expert_hidden": 24},
    "half_width": {"expert_hidden": "iso"},
    "odd_width": {"n_exp": 5, "top_k": 3, "expert_hidden": 7, "bias": False},
    "first_dense": {"first_dense": 1},
    "every_layer": {"stride": 1, "n_layer": 2},
    "dropless": DROPLESS,
    "tight": TIGHT | {"n_exp": 3},
    "all_tricks": NOISY | AUX | Z | {
        "n_exp": 16, "top_k": 3, "expert_hidden": 12, "n_shared_exp": 1, "gate": "sigmoid", "first_dense": 1,
        "use_quantile_balance": True, "qk_norm": True, "balance_scope": "sequence", "router_use_full_prec": True,
        "mlp_init": "switch", "train_capacity": 1.0,
    },
}


def make(seed=0, **settings):
    """A model as after some training: no zero biases, no unit norms, routers that prefer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # top_k=1 with topk_softmax has its own test
        model = GPT(GPTConfig(**TINY | settings), torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 3.0 if ".router." in name else 0.3
            p.add_(scale * torch.randn(p.shape, generator=generator))
        for name, b in model.named_buffers():
            if name.endswith("balance_bias"):
                b.copy_(0.3 * torch.randn(b.shape, generator=generator))
    return model


def tokens(B=2, S=17, seed=0, vocab=61):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (2, B, S), generator=generator).unbind()


def gradients(model):
    """{name: gradient}, 0 where a parameter got none."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def router_stats(model, *batches):
    """(RouterStats, a dict per MoE layer) of forwards of these batches."""
    stats = RouterStats(model)
    for idx in batches:
        model(idx)
        stats.add()
    return stats, stats.reduce(torch.zeros(0))[1]


def routings(model):
    """A list to which each forward of each router appends its Routing."""
    seen = []
    for _, moe in model.moe_layers():
        moe.router.register_forward_hook(lambda module, args, routing: seen.append(routing))
    return seen


# -- the reference: one token and one choice at a time


def reference_mlp(x, c_fc, fc_bias, c_proj, proj_bias):
    hidden = x @ c_fc if fc_bias is None else x @ c_fc + fc_bias
    y = F.gelu(hidden, approximate="tanh") @ c_proj
    return y if proj_bias is None else y + proj_bias


def reference_layer(moe, x, dropless=False):
    """A MoE layer as the papers write it: x (B, S, D) -> output (B, S, D) and {name: router loss}."""
    config, experts, router, shared = moe.config, moe.experts, moe.router, moe.shared
    K, E, x_TD = config.top_k, config.n_exp, x.flatten(0, 1)
    T = len(x_TD)

    # logits, with noise in training (Shazeer eq. 4)
    logits = torch.stack([router.w_g.weight @ token for token in x_TD])
    if config.use_noisy_top_k and moe.training:
        spread = torch.stack([(router.w_noise.weight @ token).exp().add(1).log() for token in x_TD])
        logits = logits + torch.randn_like(logits) * spread
    probs = logits.exp() / logits.exp().sum(-1, keepdim=True)
    scores = 1 / (1 + (-logits).exp()) if config.gate == "sigmoid" else probs

    # choices; the bias moves them and nothing else
    biased = config.use_bias_balance or config.use_quantile_balance
    ranked = scores + router.balance_bias if biased else scores
    chosen = [row.argsort(descending=True)[:K].tolist() for row in ranked]

    # capacity: the first choices of all tokens come before the second ones
    factor = config.train_capacity if moe.training else config.eval_capacity
    capacity = T
    if not dropless and factor < math.inf:
        capacity = math.floor(K * factor * T / E)
        capacity = max(config.min_capacity, capacity + capacity % 2)
    taken, kept = [0] * E, set()
    for k in range(K):
        for t in range(T):
            taken[chosen[t][k]] += 1
            if taken[chosen[t][k]] <= capacity:
                kept.add((t, k))

    # gates and experts
    out = []
    for t, token in enumerate(x_TD):
        y = torch.zeros_like(token)
        norm = sum(scores[t, e] for e in chosen[t])
        for k, e in enumerate(chosen[t]):
            gate = scores[t, e]
            if config.gate == "topk_softmax" or (config.gate == "sigmoid" and K > 1):
                gate = gate / norm
            biases = (experts.fc_bias[e, 0], experts.proj_bias[e, 0]) if config.bias else (None, None)
            if (t, k) in kept:
                of_expert = reference_mlp(token, experts.c_fc[e], biases[0], experts.c_proj[e], biases[1])
                y = y + gate * of_expert
        if config.n_shared_exp:
            y = y + reference_mlp(
                token, shared.c_fc.weight.t(), shared.c_fc.bias, shared.c_proj.weight.t(), shared.c_proj.bias
            )
        out.append(y)

    # load-balance loss (Switch eq. 4) over all tokens or per sequence, z-loss (ST-MoE eq. 5)
    losses, parts = {}, scores / scores.sum(-1, keepdim=True)
    if config.use_aux_loss:
        counts = torch.tensor([[row.count(e) for e in range(E)] for row in chosen], dtype=x.dtype)
        n_parts = len(x) if config.balance_scope == "sequence" else 1
        per_part = zip(counts.chunk(n_parts), parts.chunk(n_parts), strict=True)
        losses["aux_loss"] = sum(E * (f.mean(0) * P.mean(0)).sum() for f, P in per_part) / n_parts
    if config.use_router_z_loss:
        losses["z_loss"] = sum(row.exp().sum().log() ** 2 for row in logits) / T
    return torch.stack(out).view(x.shape), losses


def reference_loss(model, idx, targets, dropless=False):
    """(loss, cross-entropy, {name: router loss}) with reference_layer() in the place of every MoE layer."""
    config, losses = model.config, {}

    def forward_of(moe):
        def forward(x, dropless=False):
            y, of_layer = reference_layer(moe, x, dropless)
            for name, value in of_layer.items():
                losses[name] = losses.get(name, 0) + value
            return y, {}

        return forward

    for _, moe in model.moe_layers():
        moe.forward = forward_of(moe)
    logits = model(idx, dropless=dropless).logits
    ce = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    weights = {"aux_loss": config.aux_loss_weight, "z_loss": config.router_z_loss_weight}
    return ce + sum(weights[name] * value for name, value in losses.items()), ce, losses


def check_against_reference(model, idx, targets, **how):
    """Losses and all gradients; returns the gradients."""
    plain = copy.deepcopy(model)
    torch.manual_seed(7)
    out = model(idx, targets, **how)
    out.loss.backward()
    torch.manual_seed(7)
    loss, ce, losses = reference_loss(plain, idx, targets, **how)
    loss.backward()
    ours = {"loss": out.loss, "ce": out.ce_loss} | out.losses | gradients(model)
    theirs = {"loss": loss, "ce": ce} | losses | gradients(plain)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # loads are float32
    return gradients(model)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_losses_and_gradients_equal_the_loop_over_tokens(name, training):
    idx, targets = tokens(S=11)
    targets[0, 3:9] = -1
    check_against_reference(make(**SETTINGS[name]).double().train(training), idx, targets)


@pytest.mark.parametrize("n_exp, top_k", [(2, 1), (5, 5), (16, 3), (64, 2)])
@pytest.mark.parametrize("B, S", [(1, 1), (1, 3), (3, 11)])
def test_odd_sizes_and_experts_without_tokens(B, S, n_exp, top_k):
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 7, "n_exp": n_exp, "top_k": top_k, "expert_hidden": 5}
    model = make(**shape, gate="softmax", min_capacity=1).double()
    seen = routings(model)
    grads = check_against_reference(model, *tokens(B, S), dropless=True)
    unused = torch.bincount(seen[0].expert_TK.flatten(), minlength=n_exp) == 0
    for name, grad in grads.items():
        if ".experts." in name:
            assert torch.equal(grad.flatten(1).abs().sum(1) == 0, unused), name


def test_capacity_is_the_published_formula():
    moe = make(train_capacity=1.25, eval_capacity=2.0, min_capacity=4).moe_layers()[0][1]
    assert moe.capacity(1000) == 312  # floor(2 * 1.25 * 1000 / 8)
    assert moe.capacity(1004) == 314  # 313, made even
    assert moe.capacity(8) == 4  # min_capacity
    assert moe.eval().capacity(1000) == 500
    for settings in ({"n_exp": 2}, {"train_capacity": math.inf}, {"train_capacity": 1e308}):  # no pair can be dropped
        assert make(**settings).moe_layers()[0][1].capacity(1000) is None


# -- GPT-2


@pytest.mark.slow
def test_dense_logits_equal_transformers_gpt2():
    transformers = pytest.importorskip("transformers")
    shape = {"n_positions": 32, "vocab_size": 61, "n_layer": 3, "n_head": 2, "n_embd": 16}
    theirs, ours = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval(), make(n_exp=1).eval()
    state = theirs.state_dict()
    for name, value in ours.state_dict().items():
        transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))  # GPT-2 keeps (in, out)
        state[name].copy_(value.t() if transposed else value)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()[0]).logits, theirs(tokens()[0]).logits, rtol=1e-5, atol=1e-5)


def test_qk_norm_divides_queries_and_keys_by_their_root_mean_square():
    attn, x = make(qk_norm=True).double().transformer.h[0].attn, torch.rand(2, 9, 16, dtype=torch.float64)
    with torch.no_grad():
        q, k, v = F.linear(x, attn.c_attn.weight, attn.c_attn.bias).split(16, -1)
        heads = []
        for part in (slice(0, 8), slice(8, 16)):
            q_h, k_h = (p[..., part] / p[..., part].square().mean(-1, keepdim=True).sqrt() for p in (q, k))
            future = torch.ones(9, 9, dtype=torch.bool).triu(1)
            scores = (q_h @ k_h.mT / math.sqrt(8)).masked_fill(future, -math.inf)
            heads.append(scores.softmax(-1) @ v[..., part])
        expected = F.linear(torch.cat(heads, -1), attn.c_proj.weight, attn.c_proj.bias)
        torch.testing.assert_close(attn(x), expected, rtol=1e-9, atol=1e-9)


def test_ignored_targets_and_loss_per_position():
    model = make().eval()
    idx, targets = tokens()
    targets[0, 3:9] = -1
    out = model(idx, targets, reduction="none")
    assert out.logits is None and out.ce_loss.shape == targets.shape and (out.ce_loss[targets == -1] == 0).all()
    torch.testing.assert_close(out.ce_loss.sum() / (targets >= 0).sum(), model(idx, targets).ce_loss)
    with pytest.raises(ValueError, match="block_size 32"):
        model(torch.zeros(1, 33, dtype=torch.long))


def test_two_models_never_mix_and_forwards_leave_nothing_behind():
    """nanoMoE's module-level list of losses made a training step pay for earlier forwards."""
    model, other = make(use_aux_loss=True), make(seed=5, use_aux_loss=True)
    idx, targets = tokens()
    before = model(idx, targets)
    for _ in range(3):
        model(idx)
        other(idx, targets)
    assert torch.equal(before.loss, model(idx, targets).loss)
    assert make()(idx, targets).aux_loss == make()(idx, targets).z_loss == 0


# -- the future, the neighbours and the router's gradient


def two_that_differ():
    """Three sequences, twice: the second time the first one's last tokens and all of the second one differ."""
    idx, _ = tokens(B=3, S=24)
    changed = idx.clone()
    changed[0, 15:] = (changed[0, 15:] + 1) % 61
    changed[1] = (changed[1] + 7) % 61
    return idx, changed


@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_dropless_a_later_token_moves_no_earlier_logit_and_no_neighbour(name):
    model = make(**SETTINGS[name] | TIGHT).eval()
    before, after = (model(idx, dropless=True).logits for idx in two_that_differ())
    assert (before - after)[0, :15].abs().max() < 1e-3 and (before - after)[2].abs().max() < 1e-3


@torch.no_grad()
def test_capacity_leaks_to_the_neighbours_as_published():
    model = make(**TIGHT).eval()
    before, after = (model(idx).logits for idx in two_that_differ())
    assert (before - after)[2].abs().max() > 1e-2


@pytest.mark.parametrize("gate", ["topk_softmax", "softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
def test_the_router_learns_at_every_top_k_that_can(gate, top_k):
    """A softmax over the one chosen expert is the constant 1: the published top-1 router never learned."""
    model = make(top_k=top_k, gate=gate, **DROPLESS)
    model(*tokens()).loss.backward()
    norm = model.transformer.h[0].mlp.router.w_g.weight.grad.norm().item()
    assert norm == 0.0 if (gate, top_k) == ("topk_softmax", 1) else norm > 1e-4
    frozen = make(top_k=top_k, gate=gate, freeze_router=True).transformer.h[0].mlp.router
    assert not any(p.requires_grad for p in frozen.parameters())


def test_top_1_with_a_constant_gate_warns_once():
    with pytest.warns(UserWarning, match="gate='softmax'") as caught:
        GPT(GPTConfig(**TINY, top_k=1))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GPT(GPTConfig(**TINY, top_k=1, gate="softmax"))


def test_ties_are_broken_the_same_way_in_every_type():
    """Scores are float32 whatever the product was: equal rows of a router stay equal, and topk sees the same."""
    router = make(n_exp=8, top_k=3).moe_layers()[0][1].router.eval()
    router.w_g.weight.data[1:] = router.w_g.weight.data[0]
    x_TD = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    expected = router(x_TD).expert_TK
    assert torch.equal(router.double()(x_TD.double()).expert_TK, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router.float()(x_TD).expert_TK, expected)


def test_noise_is_drawn_in_training_only():
    idx, targets = tokens()
    model, quiet = make(use_noisy_top_k=True, **DROPLESS), make(**DROPLESS)
    quiet.load_state_dict({name: p for name, p in model.state_dict().items() if "w_noise" not in name})
    assert model(idx, targets).ce_loss != model(idx, targets).ce_loss
    in_training = quiet(idx, targets).ce_loss
    state = torch.get_rng_state()
    assert model.eval()(idx, targets).ce_loss == model(idx, targets).ce_loss == in_training
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("full_prec", [False, True])
def test_router_precision_under_autocast(full_prec):
    """float32 logits with router_use_full_prec, even of a bf16 input; bf16 products without."""
    router = make(router_use_full_prec=full_prec, use_noisy_top_k=True).moe_layers()[0][1].router.eval()
    for dtype in (torch.float32, torch.bfloat16):
        x_TD = torch.randn(50, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
        exact = x_TD.double() @ router.w_g.weight.double().t()
        with torch.autocast("cpu", torch.bfloat16):
            routing = router(x_TD)
        assert routing.logits_TE.dtype == routing.probs_TE.dtype == routing.gate_TK.dtype == torch.float32
        assert torch.allclose(routing.logits_TE.double(), exact, atol=1e-5) == full_prec


def test_shared_experts_get_dropout_once():
    moe = make(n_shared_exp=1, dropout=0.5, bias=False).moe_layers()[0][1]
    with torch.no_grad():
        moe.experts.c_proj.zero_()
    out, _ = moe(torch.randn(4, 200, 16))
    assert (out == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)


# -- balancing


@pytest.mark.slow
def test_balance_loss_equals_transformers():
    module = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    model = make(use_aux_loss=True)
    seen = routings(model)
    ours = model(*tokens()).aux_loss
    theirs = [module.load_balancing_loss_func((routing.logits_TE,), num_experts=8, top_k=2) for routing in seen]
    assert len(theirs) == 2
    torch.testing.assert_close(ours, sum(theirs))


def test_the_balance_loss_of_a_step_equals_that_of_one_big_batch():
    """Loads are those of the step so far (Qwen, 2501.11873, algorithm 1): the last micro-batch has those of all."""
    step, whole = (make(**AUX, **DROPLESS, balance_scope=scope).double() for scope in ("step", "micro_batch"))
    first, second = (tokens(seed=seed)[0] for seed in (1, 2))
    loss, expected = 0, whole(torch.cat([first, second])).aux_loss
    for one, other in ((first, second), (second, first)):
        step.start_step()
        torch.testing.assert_close(step(one).aux_loss, whole(one).aux_loss)  # the last step is forgotten
        step.eval()(first)  # an evaluation counts nothing
        loss = loss + step.train()(other).aux_loss / 2
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradients(step), gradients(whole), rtol=1e-6, atol=1e-9)
    assert step.state_dict().keys() == whole.state_dict().keys()


def biased_model(**settings):
    """One MoE layer, its load uneven, its bias 0."""
    model = GPT(GPTConfig(**TINY | {"n_layer": 1}, **settings, **DROPLESS), torch.Generator().manual_seed(0))
    router = model.transformer.h[0].mlp.router
    with torch.no_grad():
        router.w_g.weight.mul_(10)
        model.transformer.h[0].ln_2.bias.fill_(1.0)  # common to all tokens
    return model, router


def one_step(model, batches):
    """Forwards of a step, an evaluation, which must leave nothing, and the bias update; returns the step's MaxVio."""
    stats, layers = router_stats(model, *batches)
    model.eval()(batches[0])
    model.train()
    stats.move_biases()
    return layers[0]["max_vio"]


def test_the_sign_bias_moves_by_the_rate_toward_equal_load():
    model, router = biased_model(use_bias_balance=True, bias_balance_rate=0.02)
    seen, batches = routings(model), [tokens(B=8, S=32, seed=seed)[0] for seed in range(2)]
    expected, max_vio = [0.0] * 8, []
    for _ in range(30):
        seen.clear()
        max_vio.append(one_step(model, batches))
        chosen = torch.cat([routing.expert_TK for routing in seen[:2]])
        counts = [(chosen == e).sum().item() for e in range(8)]
        for e in range(8):
            expected[e] += 0.02 * ((counts[e] < sum(counts) / 8) - (counts[e] > sum(counts) / 8))
        assert router.balance_bias.tolist() == pytest.approx(expected, abs=1e-6)
    assert max_vio[-1] < 0.3 * max_vio[0]
    assert "transformer.h.0.mlp.router.balance_bias" in model.state_dict()


@pytest.mark.parametrize("gate, top_k", [("topk_softmax", 2), ("sigmoid", 2), ("sigmoid", 1)])
def test_the_quantile_bias_is_the_quantile_of_the_steps_margins(gate, top_k):
    """Of both micro-batches, mean-centred, within a bin of the histogram."""
    model, router = biased_model(use_quantile_balance=True, gate=gate, top_k=top_k)
    seen, batches = routings(model), [tokens(B=8, S=32, seed=seed)[0] for seed in range(2)]
    max_vio = []
    for _ in range(12):
        seen.clear()
        before = router.balance_bias.clone()
        max_vio.append(one_step(model, batches))
        scores = torch.cat([routing.scores_TE for routing in seen[:2]])
        alpha = (scores + before).sort(dim=-1, descending=True).values[:, top_k]  # the largest that is not chosen
        exact = torch.quantile(alpha[:, None] - scores, top_k / 8, dim=0)
        torch.testing.assert_close(router.balance_bias, exact - exact.mean(), rtol=0, atol=5e-3)
    assert max_vio[0] > 0.5 and max_vio[-1] < 0.15


def test_router_stats_of_two_micro_batches():
    model = make(n_exp=4, use_noisy_top_k=True, **TIGHT)
    for _, moe in model.moe_layers():
        moe.router.w_noise.weight.data.zero_()  # noise of standard deviation softplus(0)
    seen = routings(model)
    _, found = router_stats(model, *tokens(B=64, S=32))
    assert [layer["layer"] for layer in found] == [0, 2]
    for layer, first, second in zip(found, seen[:2], seen[2:], strict=True):
        counts = [torch.bincount(routing.expert_TK.flatten(), minlength=4) for routing in (first, second)]
        dropped = [(count - 512).clamp(min=0).sum().item() / 4096 for count in counts]  # capacity: 2 * 0.5 * 2048 / 4
        load = sum(counts).double() / 8192
        logits = torch.stack([first.logits_TE, second.logits_TE])
        probs, clean = logits.softmax(-1), torch.stack([first.clean_TE, second.clean_TE])
        assert layer["load"] == pytest.approx(load.tolist())
        assert layer["max_vio"] == pytest.approx(4 * load.max().item() - 1, rel=1e-5)
        assert layer["drop_frac"] == pytest.approx(sum(dropped) / 2)
        assert layer["entropy"] == pytest.approx(-(probs * probs.log()).sum(-1).mean().item(), rel=1e-4)
        assert layer["max_logit"] == pytest.approx(logits.abs().max().item())
        assert layer["logit_std"] == pytest.approx(clean.var(-1).mean().sqrt().item(), rel=1e-5)
        assert layer["noise_std"] == pytest.approx(math.log(2), rel=0.05)


# -- initialisation


def standard_deviations(**settings):
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 256, "vocab_size": 1000, "block_size": 32}
    moe = {"n_exp": 4, "n_shared_exp": 1, "expert_hidden": 512, "use_noisy_top_k": True}
    model = GPT(GPTConfig(**shape | moe | settings), torch.Generator().manual_seed(0))
    return {name.removeprefix("transformer.h."): p.std().item() for name, p in model.named_parameters()}, model


def test_gpt2s_initialisation():
    std, model = standard_deviations()
    for name, value in std.items():
        residual = name.endswith(("c_proj.weight", "experts.c_proj"))
        expected = 0.0 if "bias" in name or "ln_" in name else 0.02 / math.sqrt(4) if residual else 0.02
        assert value == pytest.approx(expected, rel=0.1), name
    assert model(*tokens(vocab=1000)).ce_loss.item() == pytest.approx(math.log(1000), abs=0.2)


@pytest.mark.parametrize("settings, drawn", [
    ({"use_switch_tfm_init": True, "switch_tfm_init_scale": 0.1}, (".router.", ".experts.")),
    ({"mlp_init": "switch"}, (".experts.", ".shared.", "1.mlp.")),
])
def test_switchs_initialisation_reaches_its_weights_and_no_others(settings, drawn):
    """A normal cut at 2 standard deviations keeps 0.88 of its own."""
    plain, _ = standard_deviations()
    std, model = standard_deviations(**settings)
    for name, value in std.items():
        if "bias" in name or not any(part in name for part in drawn):
            assert value == pytest.approx(plain[name], rel=0.1, abs=1e-6), name
            continue
        fan_in = 256 if "c_proj" not in name else 1024 if name.startswith("1.mlp") else 512
        expected = math.sqrt(settings.get("switch_tfm_init_scale", 1.0) / fan_in)
        assert value == pytest.approx(0.88 * expected, rel=0.05), name
        assert model.get_parameter(f"transformer.h.{name}").abs().max() <= 2 * expected, name


def test_an_uncovered_parameter_is_refused():
    model = make()
    model.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(RuntimeError, match="extra"):
        model.init_weights()


def test_same_generator_same_weights_and_the_global_one_untouched():
    state = torch.get_rng_state()
    a, b = (GPT(GPTConfig(**TINY), torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


# -- names, counts, refusals


def test_parameter_names_and_shapes_are_gpt2s_and_the_published_ones():
    model = GPT(GPTConfig(**TINY | {"n_exp": 4}, use_noisy_top_k=True, use_bias_balance=True))
    shapes = {name.removeprefix("transformer."): tuple(p.shape) for name, p in model.state_dict().items()}
    assert {
        "wte.weight": (61, 16), "wpe.weight": (32, 16), "ln_f.weight": (16,), "lm_head.weight": (61, 16),
        "h.0.ln_1.weight": (16,), "h.0.attn.c_attn.weight": (48, 16), "h.0.attn.c_proj.bias": (16,),
        "h.0.mlp.router.w_g.weight": (4, 16), "h.0.mlp.router.w_noise.weight": (4, 16), "h.0.ln_2.bias": (16,),
        "h.0.mlp.router.balance_bias": (4,), "h.0.mlp.experts.c_fc": (4, 16, 64), "h.0.mlp.experts.c_proj": (4, 64, 16),
        "h.0.mlp.experts.fc_bias": (4, 1, 64), "h.0.mlp.experts.proj_bias": (4, 1, 16),
        "h.1.mlp.c_fc.weight": (64, 16), "h.1.mlp.c_proj.weight": (16, 64), "h.2.mlp.experts.c_fc": (4, 16, 64),
    }.items() <= shapes.items()
    assert len(shapes) == 5 + 3 * 8 + 4 + 2 * 7 and model.lm_head.weight is model.transformer.wte.weight


# 768 wide, 12 layers, six of them MoE: a dense MLP has 4,722,432 parameters, a router for 8 experts 6,144
@pytest.mark.parametrize("settings, total, active", [
    ({"n_exp": 1}, 123_689_472, 123_689_472),
    ({"n_exp": 8}, 322_068_480, 152_060_928),
    ({"n_exp": 8, "use_noisy_top_k": True}, 322_068_480 + 36_864, 152_060_928 + 36_864),
    ({"n_exp": 8, "top_k": 1, "gate": "softmax"}, 322_068_480, 123_689_472 + 6 * 6_144),
    ({"n_exp": 8, "expert_hidden": "iso"}, 208_748_544, 123_730_944),  # an expert: 2 * 768 * 1536 + 1536 + 768
    ({"n_exp": 16, "top_k": 4, "expert_hidden": "iso"}, 208_822_272, 123_777_024),
    ({"n_exp": 8, "top_k": 1, "gate": "softmax", "n_shared_exp": 1}, 350_403_072, 152_060_928),
    ({"n_exp": 8, "first_dense": 2}, 289_005_312, 147_332_352),  # five MoE layers
], ids=str)
def test_parameters_active_parameters_and_flops_by_hand(settings, total, active):
    shape = {"block_size": 1024, "vocab_size": 50304, "n_layer": 12, "n_head": 12, "n_embd": 768}
    with torch.device("meta"):
        model = GPT(GPTConfig(**shape, **settings))
    assert (model.num_params(), model.num_active_params()) == (total, active)
    assert model.estimate_flops_per_token(1024) == 6 * active + 12 * 12 * 768 * 1024


@pytest.mark.parametrize("settings, layers", [
    ({"stride": 2}, [0, 2, 4]), ({"stride": 3}, [0, 3]), ({"stride": 1, "first_dense": 4}, [4, 5]),
    ({"stride": 2, "first_dense": 1}, [1, 3, 5]), ({"stride": 9}, [0]), ({"n_exp": 1, "first_dense": 9}, []),
])
def test_every_stride_th_block_is_a_moe_layer(settings, layers):
    assert [layer for layer, _ in make(**{"n_layer": 6, "n_exp": 4} | settings).moe_layers()] == layers


@pytest.mark.parametrize("wrong, named", [
    ({"n_embd": 18, "n_head": 4}, "n_head"), ({"n_exp": 2, "top_k": 3}, "top_k"), ({"n_layer": 0}, "n_layer"),
    ({"eval_capacity": math.nan}, "eval_capacity"), ({"train_capacity": 0}, "train_capacity"),
    ({"dropout": 1.0}, "dropout"), ({"aux_loss_weight": math.nan}, "aux_loss_weight"), ({"gate": "relu"}, "gate"),
    ({"top_k": 3, "expert_hidden": "iso"}, "expert_hidden"), ({"expert_hidden": 0}, "expert_hidden"),
    ({"use_bias_balance": True, "use_quantile_balance": True}, "use_quantile_balance"), ({"first_dense": 3}, "dense"),
], ids=str)
def test_impossible_configurations_are_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        GPTConfig(**TINY | wrong)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", ["dense", "qk_norm", "top_2", "z", "shared"])
def test_bf16_agrees_with_float32(name, autocast):
    """By autocast or by the weights. The seed is one where rounding moves no choice of top_2."""
    model = GPT(GPTConfig(**TINY | {"n_embd": 64} | SETTINGS[name]), torch.Generator().manual_seed(1))
    other = copy.deepcopy(model if autocast else model.bfloat16())
    model.float()
    grads = []
    for m in (model, other):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and m is other):
            out = m(*tokens(B=4, S=32))
        out.loss.backward()
        assert out.ce_loss.dtype == torch.float32
        grads.append({"loss": out.ce_loss.detach()} | gradients(m))
    for key in ("loss", "transformer.wte.weight", "transformer.h.2.attn.c_attn.weight", "transformer.ln_f.weight"):
        tolerance = 1e-3 if key == "loss" else 2e-2 if autocast else 4e-2
        assert (grads[0][key] - grads[1][key].float()).norm() < tolerance * grads[0][key].norm(), key
