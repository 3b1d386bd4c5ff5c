"""balance.py against loops over micro-batches, sequences and tokens: losses, gradients, biases, what a step leaves."""

import math

import balance
import pytest
import torch
import torch.distributed as dist
from conftest import lines

import runlog
from lab import checkpoint, optim
from model import GPT, GPTConfig

TINY = {"block_size": 32, "vocab_size": 61, "n_layer": 2, "n_head": 2, "n_embd": 16, "train_capacity": math.inf}


def layer(**settings):
    """One MoE layer in float64 whose router prefers some experts."""
    config = GPTConfig(**TINY | {"n_exp": 4, "use_aux_loss": True} | settings)
    moe = GPT(config, torch.Generator().manual_seed(0)).double().moe_layers()[0][1]
    moe.router.w_g.weight.data.mul_(30)
    return moe


def inputs(n, B=3, S=8):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, S, 16, dtype=torch.float64, generator=generator) for _ in range(n)]


def choices(moe, x_TD):
    """(chosen experts of each token as lists, probabilities (T, E)), by argsort."""
    logits = x_TD @ moe.router.w_g.weight.t()
    return logits.argsort(dim=-1, descending=True)[:, : moe.config.top_k].tolist(), logits.softmax(-1)


# -- the loss


def loss_of_load(n_tokens, count, probs, n_exp):
    return n_exp * sum(count[e] / n_tokens * probs[:, e].mean() for e in range(n_exp))


def step_by_loop(moe, batches):
    """Qwen (2501.11873) algorithm 1: a buffer of counts over the micro-batches of a step."""
    buffer, n_tokens, losses = [0] * moe.config.n_exp, 0, []
    for x in batches:
        chosen, probs = choices(moe, x.flatten(0, 1))
        for experts in chosen:
            n_tokens += 1
            for e in experts:
                buffer[e] += 1
        losses.append(loss_of_load(n_tokens, buffer, probs, moe.config.n_exp))
    return losses


def sequences_by_loop(moe, batches):
    """DeepSeek-V3 (2412.19437) eq. 17-20, times top_k: a loss per sequence, then their mean."""
    losses = []
    for x in batches:
        per_sequence = []
        for x_SD in x:
            chosen, probs = choices(moe, x_SD)
            count = [sum(experts.count(e) for experts in chosen) for e in range(moe.config.n_exp)]
            per_sequence.append(loss_of_load(len(x_SD), count, probs, moe.config.n_exp))
        losses.append(sum(per_sequence) / len(per_sequence))
    return losses


def losses_of(moe, batches):
    """As the model makes them: with the scope step, in the end, of all layers at once."""
    so_far, losses = torch.zeros(1, moe.config.n_exp + 1, dtype=torch.int64), []
    for x in batches:
        value = moe(x)[1]["aux_loss"]
        in_step = moe.config.balance_scope == "step"
        losses += balance.losses_in_step(so_far, [value], x[..., 0].numel()) if in_step else [value]
    return losses


def micro_batches_by_loop(moe, batches):
    return [step_by_loop(moe, [x])[0] for x in batches]


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("scope, reference", [
    ("micro_batch", micro_batches_by_loop), ("step", step_by_loop), ("sequence", sequences_by_loop),
])  # fmt: skip
def test_the_balance_loss_of_each_scope(scope, reference, top_k):
    moe, batches = layer(balance_scope=scope, top_k=top_k, gate="softmax"), inputs(3)
    results = []
    for way in (losses_of, reference):
        moe.zero_grad()
        for x in batches:
            x.requires_grad_().grad = None
        losses = way(moe, batches)
        sum(losses).backward()
        results.append([torch.stack(losses), moe.router.w_g.weight.grad, *(x.grad for x in batches)])
    for ours, theirs in zip(*results, strict=True):  # loads are float32
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_the_scopes_differ_and_agree_where_they_count_the_same_tokens():
    losses = {}
    for scope in balance.SCOPES:
        losses[scope] = [loss.item() for loss in losses_of(layer(balance_scope=scope), inputs(2))]
        (losses[f"{scope}, one sequence"],) = losses_of(layer(balance_scope=scope), inputs(1, B=1))
    assert losses["step"][0] == pytest.approx(losses["micro_batch"][0]) != losses["sequence"][0]
    assert abs(losses["step"][1] - losses["micro_batch"][1]) > 1e-3
    alone = [value.item() for name, value in losses.items() if "one" in name]
    assert alone == pytest.approx([alone[0]] * 3)


def test_the_layers_of_a_model_share_one_all_reduce_per_micro_batch(monkeypatch):
    config = GPTConfig(**TINY | {"n_layer": 3}, stride=1, n_exp=4, use_aux_loss=True, balance_scope="step")
    model, seen, reduced, real = GPT(config, torch.Generator().manual_seed(0)), [], [], dist.all_reduce
    for _, moe in model.moe_layers():
        moe.router.register_forward_hook(lambda module, args, routing: seen.append(routing))
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: (reduced.append(tensor.shape), real(tensor)))
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        batches = [torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(s)) for s in range(2)]
        losses = [model(idx).losses["aux_loss"] for idx in batches]
    finally:
        dist.destroy_process_group()
    assert reduced == [(3, 5), (3, 5)]  # layers x (experts, tokens)
    count, expected = [[0] * 4 for _ in range(3)], [0, 0]
    for i, routing in enumerate(seen):
        batch, at = divmod(i, 3)
        count[at] = [n + (routing.expert_TK == e).sum().item() for e, n in enumerate(count[at])]
        expected[batch] += loss_of_load(32 * (batch + 1), count[at], routing.probs_TE, 4).item()
    assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-5)


def test_a_new_step_and_an_evaluation_forget_and_leave_nothing():
    config = GPTConfig(**TINY, n_exp=4, use_aux_loss=True, balance_scope="step")
    model = GPT(config, torch.Generator().manual_seed(0))
    first, second = (torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(s)) for s in range(2))
    alone = model(second).losses["aux_loss"]
    model(first)
    model.start_step()
    assert torch.equal(model(second).losses["aux_loss"], alone)
    before = model.so_far.clone()
    model.eval()(first)
    assert torch.equal(model.so_far, before) and before[:, -1].tolist() == [32]
    assert not any("so_far" in name for name in model.state_dict())


SKIPPED = [
    {"use_aux_loss": True, "balance_scope": "step", "aux_loss_weight": 1.0}, {"use_quantile_balance": True},
    {"use_bias_balance": True, "bias_balance_rate": 0.1},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("settings", SKIPPED, ids=str)
def test_a_skipped_step_leaks_nothing(train, monkeypatch, settings):
    """After step 3 was skipped the run is the one of a process that starts there, with empty buffers."""
    real, calls = optim.clip_gradients, []

    def clip(model, grad_clip):
        calls.append(1)
        return real(model, grad_clip) * (math.inf if len(calls) == 4 else 1)

    monkeypatch.setattr(optim, "clip_gradients", clip)
    settings = settings | {"on_nonfinite": "skip", "save_checkpoint_every": 1, "keep_checkpoints": 99}
    for name in ("left", "cut"):
        calls.clear()
        _, streams = train(**settings, name=name)
        assert streams["skipped"][0].tolist() == [3]
    paths = checkpoint.checkpoints("checkpoints/cut_test_seed_1337")
    biases = [checkpoint.load(path)["model"].get("transformer.h.0.mlp.router.balance_bias") for path in paths]
    by_step = dict(zip(map(checkpoint.step_of, paths), biases, strict=True))
    assert by_step[3] is None or (torch.equal(by_step[3], by_step[4]) and not torch.equal(by_step[4], by_step[5]))
    for path in paths:
        if checkpoint.step_of(path) > 4:
            path.unlink()
    train(**settings, name="cut", resume="auto")
    assert lines(log_of("cut")) == lines(log_of("left"))


def log_of(name):
    return runlog.log_path("logs", name, "test", 1337)


# -- the bias


def scores_of(n_tokens=4096, n_exp=8, std=0.5, kind="sigmoid"):
    """Scores (T, E) of a router that prefers some experts."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n_tokens, n_exp, generator=generator) + torch.randn(n_exp, generator=generator)
    return (std * logits).sigmoid() if kind == "sigmoid" else (std * logits).softmax(-1)


def load_of(scores, bias, top_k):
    """Fraction of the tokens that each expert takes."""
    chosen = (scores + bias).topk(top_k, dim=-1).indices
    return torch.bincount(chosen.flatten(), minlength=scores.shape[1]) / len(scores)


def test_the_sign_bias_moves_by_the_rate_toward_equal_load():
    bias = balance.sign_step(torch.zeros(4), torch.tensor([9.0, 1.0, 5.0, 5.0]), 0.01)
    assert bias.tolist() == pytest.approx([-0.01, 0.01, 0.0, 0.0])


def test_a_margin_lies_below_the_bias_of_the_chosen_experts_alone():
    scores, bias = scores_of(64, 6).double(), torch.linspace(-0.1, 0.1, 6).double()
    margins = balance.margins(scores, bias, 2)
    for t in range(64):
        ranked = sorted(range(6), key=lambda e: -(scores[t, e] + bias[e]).item())
        alpha = scores[t, ranked[2]] + bias[ranked[2]]
        torch.testing.assert_close(margins[t], alpha - scores[t])
        assert set(ranked[:2]) == {e for e in range(6) if bias[e] > margins[t, e] + 1e-12}


@pytest.mark.parametrize("n_exp, top_k", [(8, 2), (8, 1), (16, 4), (64, 2)])
def test_the_histogram_gives_the_exact_quantile_within_a_bin(n_exp, top_k):
    scores = scores_of(n_exp=n_exp)
    margins = balance.margins(scores, torch.zeros(n_exp), top_k)
    exact = margins.sort(dim=0).values[math.ceil(len(scores) * top_k / n_exp) - 1]
    torch.testing.assert_close(exact, torch.quantile(margins, top_k / n_exp, dim=0), rtol=0, atol=5e-3)
    ours = balance.quantile_step(balance.histogram(margins), top_k)
    bin_width = 2 * balance.LARGEST / balance.BINS
    torch.testing.assert_close(ours, exact - exact.mean(), rtol=0, atol=2 * bin_width)
    assert ours.mean().abs() < 1e-6


def test_the_histogram_adds_up_and_keeps_what_lies_beyond_its_ends():
    margins = torch.tensor([[-5.0, 0.1], [5.0, 0.1], [1.0, -1.0]])
    counts = balance.histogram(margins)
    assert counts.sum(1).tolist() == [3, 3] and counts[0, 0] == 1 and counts[0, -1] == 2 and counts[1, 0] == 1
    assert torch.equal(counts, balance.histogram(margins[:1]) + balance.histogram(margins[1:]))


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
@pytest.mark.parametrize("n_exp, top_k", [(8, 2), (16, 4), (32, 8)])
def test_quantile_steps_give_each_expert_its_part_of_frozen_scores(n_exp, top_k, kind):
    scores, bias = scores_of(n_exp=n_exp, kind=kind), torch.zeros(n_exp)
    first = load_of(scores, bias, top_k)
    for _ in range(12):
        bias = balance.quantile_step(balance.histogram(balance.margins(scores, bias, top_k)), top_k)
    wanted = top_k / n_exp
    assert first.max() > 1.5 * wanted
    assert (load_of(scores, bias, top_k) / wanted - 1).abs().max() < 0.1


def test_an_underloaded_expert_gets_a_higher_bias():
    scores = scores_of()
    load = load_of(scores, torch.zeros(8), 2)
    bias = balance.quantile_step(balance.histogram(balance.margins(scores, torch.zeros(8), 2)), 2)
    assert bias[load.argmin()] == bias.max() > 0 > bias[load.argmax()] == bias.min()


def test_with_all_experts_chosen_no_bias_moves():
    margins = balance.margins(scores_of(), torch.zeros(8), 8)
    assert balance.quantile_step(balance.histogram(margins), 8).tolist() == [0.0] * 8


@pytest.mark.parametrize("gate", ["topk_softmax", "sigmoid"])
def test_a_models_quantile_bias(gate):
    """From the histograms of two micro-batches; gates are of unbiased scores; evaluation counts nothing."""
    model = GPT(GPTConfig(**TINY, n_exp=8, gate=gate, use_quantile_balance=True), torch.Generator().manual_seed(0))
    ((_, moe),) = model.moe_layers()
    router = moe.router
    router.w_g.weight.data.mul_(10)
    model.transformer.h[0].ln_2.bias.data.fill_(1.0)  # common to all tokens: makes the load uneven
    batches = [torch.randint(61, (8, 32), generator=torch.Generator().manual_seed(s)) for s in range(2)]
    seen = []
    router.register_forward_hook(lambda module, args, routing: seen.append(routing))
    max_vio = []
    for _ in range(12):
        seen.clear()
        table = 0
        for idx in batches:
            model(idx)
            table = table + model.router_table()
        max_vio.append(model.router_stats(table)[0]["max_vio"])
        scores = torch.cat([routing.scores_TE for routing in seen])
        before = router.balance_bias.clone()
        counted = moe.margins.clone()
        model.eval()(batches[0])
        assert torch.equal(moe.margins, counted)
        model.train().update_balance_bias(table)
        expected = balance.quantile_step(balance.histogram(balance.margins(scores, before, 2)), 2)
        torch.testing.assert_close(router.balance_bias, expected)
    assert max_vio[0] > 0.5 and max_vio[-1] < 0.15
    routing, scores_TK = seen[0], seen[0].scores_TE.gather(1, seen[0].expert_TK)
    weights = scores_TK / scores_TK.sum(-1, keepdim=True)  # a softmax over the chosen, normalised, is the same
    torch.testing.assert_close(routing.gate_TK, weights)
    assert "transformer.h.0.mlp.router.balance_bias" in model.state_dict()
    assert not any("margins" in name for name in model.state_dict())


@pytest.mark.slow
def test_a_trained_quantile_bias_is_that_of_the_training_steps_alone(train):
    for name, every in (("often", 1), ("never", 0)):
        _, streams = train(use_quantile_balance=True, name=name, val_loss_every=every)
        assert streams["max_vio"][1][-1] < streams["max_vio"][1][0]
    often, never = (checkpoint.load_model(f"checkpoints/{name}_test_seed_1337")[0] for name in ("often", "never"))
    bias = often.moe_layers()[0][1].router.balance_bias
    assert torch.equal(bias, never.moe_layers()[0][1].router.balance_bias)
    assert bias.abs().max() > 1e-3 and bias.mean().abs() < 1e-6
