"""The settings of the table of methods in README.md, off by default: each against a plain reference, or by hand."""

import dataclasses
import math
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_RUN, lines
from torch._dynamo.testing import CompileCounterWithBackend

import checks
import runlog
import sample
import train_single_gpu as trainer
from lab import checkpoint, common, kernels
from lab.common import UserError
from model import GPT, GPTConfig

TINY = {"block_size": 32, "vocab_size": 61, "n_layer": 3, "n_head": 2, "n_embd": 16}
METHODS = {
    "half_width": {"n_exp": 8, "expert_hidden": "iso"},
    "quarter_width": {"n_exp": 16, "top_k": 4, "expert_hidden": "iso"},
    "odd_width": {"n_exp": 5, "top_k": 3, "expert_hidden": 7, "bias": False},
    "wide": {"n_exp": 4, "expert_hidden": 100},
    "shared_widths": {"n_exp": 4, "expert_hidden": 24, "n_shared_exp": 2, "shared_expert_hidden": 10},
    "shared_iso": {"n_exp": 8, "top_k": 1, "gate": "softmax", "n_shared_exp": 1, "expert_hidden": "iso"},
    "gate_scale": {"n_exp": 8, "gate_scale": 2.5},
    "gate_scale_sigmoid": {"n_exp": 8, "gate": "sigmoid", "gate_scale": 2.5, "n_shared_exp": 1},
    "selected_z": {"n_exp": 8, "use_router_z_loss": True, "z_loss_on": "selected"},
    "selected_z_noisy": {"n_exp": 8, "top_k": 3, "use_noisy_top_k": True, "use_router_z_loss": True,
                         "z_loss_on": "selected"},
    "noise_scale": {"n_exp": 8, "use_noisy_top_k": True, "noise_scale": 0.4},
    "frozen": {"n_exp": 8, "freeze_router": True, "use_aux_loss": True, "gate": "softmax"},
    "quantile": {"n_exp": 8, "use_quantile_balance": True},
    "quantile_sigmoid": {"n_exp": 8, "use_quantile_balance": True, "gate": "sigmoid"},
    "all": {"n_exp": 16, "top_k": 3, "expert_hidden": 12, "n_shared_exp": 1, "shared_expert_hidden": 9,
            "gate": "sigmoid", "gate_scale": 2.0, "use_noisy_top_k": True, "noise_scale": 0.3, "first_dense": 1,
            "use_router_z_loss": True, "z_loss_on": "selected", "use_quantile_balance": True, "qk_norm": True,
            "use_aux_loss": True, "balance_scope": "sequence", "output_z_loss_weight": 0.01, "mlp_init": "switch"},
}  # fmt: skip


def make(seed=0, **settings):
    """A model with weights as after some training: no zero biases, routers that prefer."""
    model = GPT(GPTConfig(**TINY | {"train_capacity": math.inf} | settings), torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_((3.0 if ".router." in name else 0.3) * torch.randn(p.shape, generator=generator))
        for _, moe in model.moe_layers():
            if moe.router.biased:
                moe.router.balance_bias.copy_(0.3 * torch.randn(moe.config.n_exp, generator=generator))
    return model


def tokens(B=2, S=17, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(61, (B, S), generator=generator) for _ in range(2)]


def gradients_of(module, call):
    """(value, gradients by name) of `call()`, a scalar; zero where a parameter got none."""
    module.zero_grad()
    value = call()
    value.backward()
    return value.detach(), {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}


# -- the MoE layer, token by token


def mlp_by_hand(x, c_fc, fc_bias, c_proj, proj_bias):
    h = x @ c_fc + (0 if fc_bias is None else fc_bias)
    return F.gelu(h, approximate="tanh") @ c_proj + (0 if proj_bias is None else proj_bias)


def layer_by_hand(moe, x):
    """A dropless MoE layer and its router losses: one token after another, one expert after another."""
    config, router, experts, shared = moe.config, moe.router, moe.experts, moe.shared
    out, z, loads, probs = [], [], [], []
    noise = torch.randn_like(x.flatten(0, 1) @ router.w_g.weight.t()) if config.use_noisy_top_k else None
    for t, token in enumerate(x.flatten(0, 1)):
        logits = router.w_g.weight @ token
        if noise is not None:
            logits = logits + config.noise_scale * noise[t] * (router.w_noise.weight @ token).exp().add(1).log()
        p = logits.exp() / logits.exp().sum()
        scores = 1 / (1 + (-logits).exp()) if config.gate == "sigmoid" else p
        bias = router.balance_bias if config.use_quantile_balance else torch.zeros_like(scores)
        chosen = (scores + bias).argsort(descending=True)[: config.top_k].tolist()
        norm = sum(scores[e] for e in chosen) if config.gate != "softmax" and config.top_k > 1 else 1
        y = torch.zeros_like(token)
        for e in chosen:
            biases = (experts.fc_bias[e, 0], experts.proj_bias[e, 0]) if config.bias else (None, None)
            y = y + config.gate_scale * scores[e] / norm * mlp_by_hand(
                token, experts.c_fc[e], biases[0], experts.c_proj[e], biases[1]
            )
        if shared is not None:
            y = y + mlp_by_hand(
                token, shared.c_fc.weight.t(), shared.c_fc.bias, shared.c_proj.weight.t(), shared.c_proj.bias
            )
        counted = logits[chosen] if config.z_loss_on == "selected" else logits
        out.append(y), z.append(counted.exp().sum().log() ** 2)
        loads.append(torch.bincount(torch.tensor(chosen), minlength=config.n_exp).to(p.dtype)), probs.append(p)
    B = len(x) if config.balance_scope == "sequence" else 1
    f, P = (torch.stack(rows).view(B, -1, config.n_exp).mean(1) for rows in (loads, probs))
    losses = {"aux_loss": config.n_exp * (f * P).sum(1).mean()} if config.use_aux_loss else {}
    losses |= {"z_loss": sum(z) / len(z)} if config.use_router_z_loss else {}
    return torch.stack(out).view(x.shape), losses


def check_layer(moe, x):
    """Output, losses and all gradients equal those of layer_by_hand()."""
    weight = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    results = []
    for layer in (moe, lambda x: layer_by_hand(moe, x)):

        def total(layer=layer):
            torch.manual_seed(7)  # of the noise
            x_ = x.clone().requires_grad_()
            out, losses = layer(x_)
            results.append({"x": x_, "out": out} | losses)
            return sum(losses.values(), (out * weight).sum())

        grads = gradients_of(moe, total)[1]
        results[-1] |= {"x": results[-1]["x"].grad, "grads": grads}
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-9)
    return results[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_equals_the_loop_over_tokens(method):
    moe = make(**METHODS[method]).double().moe_layers()[0][1]
    x = torch.randn(2, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = check_layer(moe, x)["grads"]
    assert (grads["router.w_g.weight"].abs().sum() > 0) == (not moe.config.freeze_router)


@pytest.mark.parametrize("n_exp", [8, 16, 32, 64])
@pytest.mark.parametrize("n_embd", [8, 48])
@pytest.mark.parametrize("width", ["iso", 5, None])
def test_many_experts_of_which_most_get_no_token(n_exp, n_embd, width):
    settings = {"n_exp": n_exp, "n_embd": n_embd, "expert_hidden": width, "n_layer": 1}
    moe = make(**settings).double().moe_layers()[0][1]
    x = torch.randn(1, 3, n_embd, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = check_layer(moe, x)["grads"]
    unused = moe.count == 0
    assert unused.sum() >= n_exp - 6 and moe.count.sum() == 6
    for name in ("c_fc", "c_proj", "fc_bias", "proj_bias"):
        sums = grads[f"experts.{name}"].flatten(1).abs().sum(1)
        assert ((sums == 0) == unused).all()


def test_noise_at_scale_0_is_no_noise():
    settings = {"n_exp": 8, "use_noisy_top_k": True, "eval_capacity": math.inf}
    quiet, plain = make(**settings, noise_scale=0.0), make(**settings)
    idx, targets = tokens()
    in_eval = plain.eval()(idx, targets).ce_loss
    assert torch.equal(quiet(idx, targets).ce_loss, in_eval)
    assert not torch.equal(plain.train()(idx, targets).ce_loss, in_eval)
    _, grads = gradients_of(quiet, lambda: quiet(idx, targets).loss)
    assert all(grad.abs().sum() == 0 for name, grad in grads.items() if "w_noise" in name)


def test_first_dense_leaves_the_leading_blocks_dense():
    def layers(**settings):
        return [layer for layer, _ in make(n_exp=4, n_layer=6, **settings).moe_layers()]

    assert layers() == layers(first_dense=0) == [0, 2, 4]
    assert layers(first_dense=1) == [1, 3, 5] and layers(first_dense=2, stride=1) == [2, 3, 4, 5]
    assert layers(first_dense=5) == [5] and layers(first_dense=2, stride=3) == [2, 5]
    dense = make(n_exp=4, first_dense=2).transformer.h
    assert [(block.is_moe, type(block.mlp).__name__) for block in dense] == [(False, "MLP")] * 2 + [(True, "MoE")]


# -- attention and the loss of the output


def test_qk_norm_divides_queries_and_keys_by_their_root_mean_square():
    block = make(qk_norm=True).double().transformer.h[0]
    attn, x = block.attn, torch.randn(2, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def by_hand(x):
        q, k, v = (part.unflatten(-1, (2, 8)) for part in (x @ attn.c_attn.weight.t() + attn.c_attn.bias).split(16, -1))
        q, k = (part / (part.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() for part in (q, k))
        heads = []
        for h in range(2):
            scores = q[:, :, h] @ k[:, :, h].transpose(1, 2) / math.sqrt(8)
            future = torch.ones(9, 9, dtype=torch.bool).triu(1)
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[:, :, h])
        return torch.cat(heads, -1) @ attn.c_proj.weight.t() + attn.c_proj.bias

    weight = torch.randn(2, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours, theirs = (gradients_of(attn, lambda f=f: (f(x) * weight).sum()) for f in (attn, by_hand))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        attn.c_attn.weight[:32] *= 7
        attn.c_attn.bias[:32] *= 7
        torch.testing.assert_close(attn(x), by_hand(x))  # larger queries and keys change nothing
        torch.testing.assert_close((attn(x) * weight).sum(), ours[0], rtol=1e-6, atol=1e-9)


def test_qk_norm_keeps_the_type_of_the_values(monkeypatch):
    """Under CUDA's autocast rms_norm gives float32, and attention refuses types that differ."""
    real = F.rms_norm
    monkeypatch.setattr(F, "rms_norm", lambda x, shape: real(x.float(), shape))
    model = GPT(GPTConfig(**TINY | {"block_size": 160}, qk_norm=True), torch.Generator().manual_seed(0))
    idx, targets = tokens(S=160)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(idx, targets)
        out.loss.backward()
        model.eval()
        sample.generate(model, idx[:, :3], 4)
    assert out.loss.isfinite()


def full_z_loss(h, weight, targets, z_weight):
    """(cross-entropy + z_weight * z-loss, cross-entropy, z-loss) of all logits at once; negative targets ignored."""
    logits = h @ weight.t()
    ce = F.cross_entropy(logits, targets.clamp(min=-1), ignore_index=-1)
    z_loss = torch.logsumexp(logits, dim=-1)[targets >= 0].square().mean()
    return ce + z_weight * z_loss, ce, z_loss


@pytest.mark.parametrize("z_weight", [1e-4, 0.3])
@pytest.mark.parametrize("ignored", [-1, -100])
@pytest.mark.parametrize("rows_per_chunk", [1, 7, 32, 100])
def test_chunked_z_loss(rows_per_chunk, ignored, z_weight, monkeypatch):
    monkeypatch.setitem(kernels.LOGITS_PER_CHUNK, "cpu", rows_per_chunk * 50)
    generator = torch.Generator().manual_seed(0)
    h, weight = (torch.randn(n, 8, dtype=torch.float64, generator=generator) for n in (65, 50))
    targets = torch.randint(50, (65,), generator=generator)
    targets[::9] = ignored
    results = []
    for losses_of in (kernels.linear_cross_entropy_with_z_loss, full_z_loss):
        h_, weight_ = h.clone().requires_grad_(), weight.clone().requires_grad_()
        losses = losses_of(h_, weight_, targets, z_weight)
        (2 * losses[0]).backward()
        results.append((*(loss.detach() for loss in losses), h_.grad, weight_.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"n_exp": 4, "use_aux_loss": True}], ids=str)
def test_the_z_loss_of_the_output_is_optimised_and_not_measured(settings):
    with_z, without = (make(**settings, output_z_loss_weight=weight).double() for weight in (0.5, 0.0))
    idx, targets = tokens()
    targets[0, 3:9] = -1
    out, plain = with_z(idx, targets), without(idx, targets)
    logits = without(idx).logits[targets >= 0]
    torch.testing.assert_close(out.losses["output_z_loss"], torch.logsumexp(logits, -1).square().mean())
    torch.testing.assert_close(out.loss, plain.loss + 0.5 * out.losses["output_z_loss"])
    assert torch.equal(out.ce_loss, plain.ce_loss) and "output_z_loss" not in plain.losses
    with torch.no_grad():
        torch.testing.assert_close(with_z(idx, targets).ce_loss, plain.ce_loss)
    per_position = with_z(idx, targets, reduction="none").ce_loss
    torch.testing.assert_close(per_position.sum() / (targets >= 0).sum(), plain.ce_loss)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["qk_norm", *METHODS])
def test_sampling_with_the_cache_equals_recomputation(method):
    model = make(**METHODS.get(method, {"qk_norm": True})).double().eval()
    idx, cache = tokens(S=5)[0], model.new_cache(2)
    with torch.no_grad():
        for _ in range(20):
            logits = sample.next_logits(model, idx, cache)
            torch.testing.assert_close(logits, model(idx, dropless=True).logits[:, -1], rtol=1e-9, atol=1e-9)
            idx = torch.cat([idx, logits.argmax(-1, keepdim=True)], dim=1)


# -- initialisation


def stds(**settings):
    config = GPTConfig(n_layer=2, n_head=4, n_embd=256, vocab_size=100, block_size=8, **settings)
    model = GPT(config, torch.Generator().manual_seed(0))
    return {name.removeprefix("transformer.h."): p.std().item() for name, p in model.named_parameters()}


@pytest.mark.parametrize("mlp_init", ["switch", "switch_fc"])
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_mlp_init_draws_every_mlp_and_no_router(mlp_init, scale):
    moe = {"n_exp": 4, "n_shared_exp": 1, "expert_hidden": 512, "use_noisy_top_k": True}
    switch, plain = stds(**moe, mlp_init=mlp_init, mlp_init_scale=scale), stds(**moe)
    fan_ins = {"0.mlp.experts.c_fc": 256, "0.mlp.shared.c_fc.weight": 256, "1.mlp.c_fc.weight": 256,
               "0.mlp.experts.c_proj": 512, "0.mlp.shared.c_proj.weight": 512, "1.mlp.c_proj.weight": 1024}  # fmt: skip
    for name, fan_in in fan_ins.items():
        if mlp_init == "switch" or "c_fc" in name:  # a normal cut at 2 std keeps 0.88 of it
            assert switch[name] == pytest.approx(0.88 * math.sqrt(scale / fan_in), rel=0.05), name
        else:
            assert switch[name] == pytest.approx(0.02 / math.sqrt(4), rel=0.05), name
    for name in plain.keys() - fan_ins.keys():
        assert switch[name] == pytest.approx(plain[name], rel=0.1, abs=1e-6), name
    dense = stds(mlp_init=mlp_init, mlp_init_scale=scale)
    assert dense["0.mlp.c_fc.weight"] == pytest.approx(0.88 * math.sqrt(scale / 256), rel=0.05)


def test_mlp_init_and_the_initialisation_of_moe_layers_have_a_scale_each():
    std = stds(n_exp=4, mlp_init="switch", mlp_init_scale=0.1, use_switch_tfm_init=True, switch_tfm_init_scale=1.0)
    assert std["0.mlp.router.w_g.weight"] == pytest.approx(0.88 / math.sqrt(256), rel=0.05)
    for name in ("0.mlp.experts.c_fc", "1.mlp.c_fc.weight"):
        assert std[name] == pytest.approx(0.88 * math.sqrt(0.1 / 256), rel=0.05)


# -- counts, by hand: 768 wide, 12 layers, six of them MoE, an MLP of 4,722,432 parameters


@pytest.mark.parametrize("settings, total, active", [
    ({"n_exp": 1}, 123_689_472, 123_689_472),
    # per MoE layer: the experts and the router in the place of the MLP, of these top_k experts are active
    ({"n_exp": 8}, 123_689_472 + 6 * (7 * 4_722_432 + 6_144), 123_689_472 + 6 * (4_722_432 + 6_144)),
    ({"n_exp": 8, "top_k": 1, "gate": "softmax"}, 322_068_480, 123_689_472 + 6 * 6_144),
    # an expert 1536 wide: 2 * 768 * 1536 + 1536 + 768 = 2,361,600
    ({"n_exp": 8, "expert_hidden": "iso"}, 208_748_544, 123_730_944),
    ({"n_exp": 8, "expert_hidden": 1536}, 208_748_544, 123_730_944),
    # an expert 768 wide: 2 * 768 * 768 + 2 * 768 = 1,181,184; the router 768 * 16 = 12,288
    ({"n_exp": 16, "top_k": 4, "expert_hidden": "iso"}, 208_822_272, 123_777_024),
    ({"n_exp": 8, "top_k": 1, "gate": "softmax", "n_shared_exp": 1}, 350_403_072, 152_060_928),
    ({"n_exp": 8, "n_shared_exp": 1, "shared_expert_hidden": 1536}, 336_238_080, 166_230_528),
    ({"n_exp": 8, "top_k": 1, "gate": "softmax", "n_shared_exp": 1, "expert_hidden": "iso"}, 222_918_144, 123_730_944),
    # two shared of 100 are one of 200: 2 * 768 * 200 + 200 + 768 = 308,168
    ({"n_exp": 8, "n_shared_exp": 2, "shared_expert_hidden": 100},
     322_068_480 + 6 * 308_168, 152_060_928 + 6 * 308_168),
    ({"n_exp": 8, "first_dense": 1}, 322_068_480, 152_060_928),
    ({"n_exp": 8, "first_dense": 2}, 289_005_312, 147_332_352),  # five MoE layers
    ({"n_exp": 64, "expert_hidden": "iso"}, 123_689_472 + 6 * (64 * 2_361_600 + 49_152 - 4_722_432),
     123_689_472 + 6 * (2 * 2_361_600 + 49_152 - 4_722_432)),
], ids=str)  # fmt: skip
def test_parameters_active_parameters_and_flops_by_hand(settings, total, active):
    with torch.device("meta"):
        model = GPT(GPTConfig(**settings))
    assert (model.num_params(), model.num_active_params()) == (total, active)
    assert checks.count_params(model.config)[0] == total + 1024 * 768
    assert model.estimate_flops_per_token(1024) == 6 * active + 113_246_208  # 12 layers * 12 * 768 * 1024


@pytest.mark.parametrize("method", ["dense", "full_width", *METHODS])
def test_needed_memory_is_no_more_than_what_backward_keeps(method):
    """Activations: most of the tensors that a forward keeps are counted, and none that it does not keep."""
    model = make(**{"n_embd": 64} | METHODS.get(method, {"n_exp": {"dense": 1, "full_width": 8}.get(method)}))
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.state_dict().values()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(torch.zeros(4, 32, dtype=torch.long), torch.zeros(4, 32, dtype=torch.long))
    args = trainer.Args(**TINY_RUN | {"B": 4, "T": 32, "n_embd": 64})
    machine = types.SimpleNamespace(dtype=torch.float32, world_size=1)
    needed = checks.needed_bytes(args, model.config, machine)
    assert needed["parameters"] == needed["gradients"] == 4 * sum(p.numel() for p in model.parameters())
    assert 0.3 * sum(kept.values()) < needed["activations"] <= sum(kept.values())
    assert out.loss.isfinite()


# -- combinations that are mistakes


@pytest.mark.parametrize("wrong, said", [
    ({"n_exp": 1, "expert_hidden": "iso"}, "expert_hidden iso needs experts"),
    ({"n_exp": 1, "expert_hidden": 64}, "expert_hidden 64 needs experts"),
    ({"n_exp": 1, "shared_expert_hidden": 64}, "shared_expert_hidden 64 needs experts"),
    ({"shared_expert_hidden": 64}, "no effect without n_shared_exp"),
    ({"top_k": 3, "expert_hidden": "iso"}, r"expert_hidden iso is 4 n_embd / \(top_k \+ n_shared_exp\) = 128 / 3"),
    ({"n_shared_exp": 1, "shared_expert_hidden": 8, "top_k": 1, "expert_hidden": "iso", "gate": "softmax"}, "iso"),
    ({"expert_hidden": 0}, "expert_hidden must be at least 1"),
    ({"expert_hidden": "half"}, "expert_hidden must be int or iso, not 'half'"),
    ({"use_bias_balance": True, "use_quantile_balance": True}, "move the same bias: choose one"),
    ({"first_dense": 2}, "first_dense 2 of n_layer 2 leaves no MoE layer"),
    ({"z_loss_on": "selected"}, "z_loss_on selected has no effect without use_router_z_loss"),
    ({"noise_scale": 0.4}, "noise_scale 0.4 has no effect without use_noisy_top_k"),
    ({"mlp_init_scale": 0.1}, "mlp_init_scale is the scale of mlp_init switch"),
])  # fmt: skip
def test_a_combination_that_is_a_mistake_is_one_line_before_anything_is_built(train, wrong, said):
    with pytest.raises(UserError, match=said) as error:
        train(**wrong)
    assert str(error.value).startswith("--") and "\n" not in str(error.value)
    assert not list(Path().iterdir())


def test_the_old_name_of_a_scope_names_the_new_one():
    with pytest.raises(ValueError, match="global is called step now"):
        GPTConfig(n_exp=8, balance_scope="global")
    with pytest.raises(UserError, match="global is called step now"):
        common.parse(trainer.Args, ["--balance_scope", "global"])


def test_the_settings_of_experts_are_harmless_in_a_dense_model():
    for settings in ({"first_dense": 9}, {"noise_scale": 0.4}, {"z_loss_on": "selected"}, {"bias_balance_rate": 0.1},
                     {"use_bias_balance": True, "use_quantile_balance": True}):  # fmt: skip
        assert not make(n_exp=1, **settings).moe_layers()


def test_widths_on_the_command_line():
    for words, width in (([], None), (["--expert_hidden", "iso"], "iso"), (["--expert_hidden", "96"], 96)):
        assert common.parse(trainer.Args, words).expert_hidden == width
    with pytest.raises(UserError, match="iso"):
        common.parse(trainer.Args, ["--expert_hidden", "half"])


# -- upcycling into narrow experts

SPLIT = [
    {"expert_hidden": "iso", "n_exp": 8}, {"expert_hidden": "iso", "n_exp": 16, "top_k": 4},
    {"expert_hidden": 32, "n_exp": 8, "top_k": 4, "stride": 1}, {"expert_hidden": 16, "n_exp": 8, "top_k": 8},
    {"expert_hidden": "iso", "n_exp": 8, "gate": "sigmoid", "gate_scale": 2.5}, {"n_exp": 4, "gate_scale": 0.5},
    {"expert_hidden": 32, "n_exp": 6, "use_quantile_balance": True, "n_shared_exp": 1, "freeze_router": True},
]  # fmt: skip


def dense_source(**settings):
    dense = make(**settings)
    return dense.eval(), (dataclasses.asdict(dense.config), dict(dense.state_dict()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("settings", SPLIT, ids=str)
def test_slices_of_a_dense_mlp_compute_the_dense_function(settings, bias):
    dense, source = dense_source(bias=bias)
    model = checkpoint.upcycle(*source, settings, "dense.pt", torch.Generator().manual_seed(3)).eval()
    idx = torch.arange(60).view(2, 30)
    with torch.no_grad():
        expected, ours = dense(idx).logits, model(idx, dropless=True).logits
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    m = 64 // model.config.hidden_of_expert
    for layer, moe in model.moe_layers():
        groups = moe.router.w_g.weight.view(-1, m, 16)
        assert torch.equal(groups, groups[:, :1].expand_as(groups))
        assert len(groups[:, 0].unique(dim=0)) == len(groups) and groups.std() > 0.005
        rows = dense.transformer.h[layer].mlp.c_fc.weight.chunk(m)
        for e in range(moe.config.n_exp):
            assert torch.equal(moe.experts.c_fc[e].t(), rows[e % m])


@pytest.mark.slow
def test_an_upcycled_narrow_model_is_saved_and_trained_on(train):
    train(n_exp=1, max_steps=4, name="dense")
    source = "checkpoints/dense_test_seed_1337"
    settings = {"init_from": source, "expert_hidden": "iso", "train_capacity": math.inf, "eval_capacity": math.inf}
    _, streams = train(n_exp=4, name="narrow", max_steps=4, **settings)
    _, dense = train(n_exp=1, max_steps=1, name="more", init_from=source)
    assert streams["val"][1][0] == pytest.approx(dense["val"][1][0], abs=1e-5)
    model, _ = checkpoint.load_model("checkpoints/narrow_test_seed_1337")
    rows = model.moe_layers()[0][1].router.w_g.weight
    assert not torch.equal(rows[0], rows[1])  # loaded as they were trained, not tied again


@pytest.mark.parametrize("settings, said", [
    ({"expert_hidden": 48}, "--expert_hidden 48 .* dense.pt, 64 wide.* m divides n_exp and top_k: .* 64 or 32$"),
    ({"expert_hidden": 16}, "64 or 32$"), ({"expert_hidden": 128}, "64 or 32$"),
    ({"expert_hidden": 16, "top_k": 4}, "64 or 32$"), ({"expert_hidden": 32, "n_exp": 5}, "pass --expert_hidden 64$"),
    ({"expert_hidden": 32, "gate": "softmax"}, "do not sum to 1: pass --expert_hidden 64$"),
    ({"expert_hidden": 32, "gate": "sigmoid", "top_k": 1}, "do not sum to 1"),
    ({"expert_hidden": 32, "use_noisy_top_k": True}, "noise would separate slices: pass --expert_hidden 64$"),
])  # fmt: skip
def test_a_width_that_does_not_fit_is_refused_with_those_that_do(settings, said):
    _, source = dense_source()
    with pytest.raises(UserError, match=said):
        checkpoint.upcycle(*source, {"n_exp": 6} | settings, "dense.pt", torch.Generator())


# -- whole runs

RUNS = {
    "narrow": {"n_exp": 8, "top_k": 4, "expert_hidden": "iso", "use_aux_loss": True},
    "shared": {"n_shared_exp": 1, "shared_expert_hidden": 24, "gate_scale": 2.5, "first_dense": 1},
    "quantile": {"use_quantile_balance": True, "gate": "sigmoid"},
    "step": {"use_aux_loss": True, "balance_scope": "step", "aux_loss_weight": 1.0},
    "sequence": {"use_aux_loss": True, "balance_scope": "sequence", "use_router_z_loss": True, "z_loss_on": "selected"},
    "frozen": {"freeze_router": True, "use_noisy_top_k": True, "noise_scale": 0.4},
    "stability": {"n_exp": 1, "qk_norm": True, "output_z_loss_weight": 1e-2, "mlp_init": "switch"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_run_left_alone(train, name):
    settings = RUNS[name] | {"save_checkpoint_every": 3, "keep_checkpoints": 9}
    train(**settings, name="left")
    train(**settings, name="cut")
    for step in (9, 3):
        for path in checkpoint.checkpoints(Path("checkpoints/cut_test_seed_1337")):
            if checkpoint.step_of(path) > step:
                path.unlink()
        assert train(**settings, name="cut", resume="auto")[0] == 0
        assert lines(log_of("cut")) == lines(log_of("left"))


def log_of(name):
    return runlog.log_path("logs", name, "test", 1337)


@pytest.mark.slow
def test_a_frozen_router_stays_as_drawn_and_everything_else_moves(train):
    settings = RUNS["frozen"] | {"use_aux_loss": True, "weight_decay": 1.0}
    train(**settings, name="a", save_checkpoint_every=4)
    paths = checkpoint.checkpoints("checkpoints/a_test_seed_1337")
    first, last = (checkpoint.load_model(path)[0] for path in (paths[0], paths[-1]))
    drawn = GPT(last.config, torch.Generator().manual_seed(1337))
    compared = zip(drawn.named_parameters(), first.parameters(), last.parameters(), strict=True)
    moved = {name: not torch.equal(p, q) and not torch.equal(q, r) for (name, p), q, r in compared}
    stayed = {name: torch.equal(p, q) for (name, p), q in zip(drawn.named_parameters(), last.parameters(), strict=True)}
    for name in moved:
        assert stayed[name] == (".router." in name) and moved[name] == (".router." not in name), name


def test_the_z_loss_of_the_output_is_a_stream_and_not_in_val(train):
    _, streams = train(**RUNS["stability"], name="a")
    _, plain = train(n_exp=1, qk_norm=True, mlp_init="switch", name="b")
    assert len(streams["output_z_loss"][1]) == 10 and streams["output_z_loss"][1][0] > 10
    assert streams["val"][1][0] == plain["val"][1][0] and streams["train"][1][0] == pytest.approx(plain["train"][1][0])
    assert streams["output_z_loss"][1][-1] < streams["output_z_loss"][1][0]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    pytest.param({"n_exp": 8, "use_aux_loss": True, "balance_scope": "step", "eval_capacity": math.inf}, id="step"),
    pytest.param({"n_exp": 4, "use_noisy_top_k": True, "use_aux_loss": True, "use_router_z_loss": True,
                  "router_use_full_prec": True, "use_switch_tfm_init": True, "gate": "sigmoid",
                  "use_bias_balance": True, "n_shared_exp": 1, "train_capacity": 1.0}, id="capacity"),
    pytest.param(METHODS["all"], id="all"),
])  # fmt: skip
def test_one_graph_per_mode(settings):
    """One graph for training and one for evaluation, whatever the routing: fullgraph raises at a graph break, which
    every wait for the device and every shape that depends on data would be. Gradients equal the eager ones. Every
    variant in training: test_recompile.py."""
    torch._dynamo.reset()
    # in float64 no rounding moves a margin into the next bin
    model, eager = (make(**settings | {"n_layer": 2}).double() for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")  # traces the backward too
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed, training in enumerate((True, True, False, False, True)):
        for m, call in ((model, compiled), (eager, eager)):
            m.train(training).zero_grad()
            torch.manual_seed(seed)
            with torch.set_grad_enabled(training):
                loss = call(*tokens(seed=seed)).loss
            if training:
                loss.backward()
    assert counter.frame_count == 2
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9, msg=name)
    for (name, ours), theirs in zip(model.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=name)
