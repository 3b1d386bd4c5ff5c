"""doctor.py: healthy models are not accused, broken routers are found by the row that names the fault."""

import dataclasses
import json

import pytest
import torch
import transformers
from conftest import end, fork, run_script, script

import doctor
from lab import checkpoint
from model import GPT, ROUTER_LOSSES, GPTConfig, RouterLoss, RouterStats
from model import load_balance_loss as balance
from variants import VARIANTS

SMALL = {"block_size": 32, "vocab_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_exp": 8, "stride": 1}
pytestmark = pytest.mark.filterwarnings("ignore:top_k=1")


def gpt(**settings):
    return GPT(GPTConfig(**SMALL | settings), torch.Generator().manual_seed(0))


def text(seed=0, n=16):
    """Rows (n, 32) of tokens i, i + 5, ... modulo 64."""
    return (torch.randint(64, (n, 1), generator=torch.Generator().manual_seed(seed)) + 5 * torch.arange(32)) % 64


def sick(model, pairs=0.0):
    rows = [row for row in doctor.examine(doctor.Subject(model), text(), pairs)[0] if row.meaning]
    return {row.check: [other for other in rows if other.check == row.check] for row in rows}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_new_model_of_every_variant_is_not_accused(name):
    fields = {field.name for field in dataclasses.fields(GPTConfig)}
    found = sick(gpt(**{field: value for field, value in VARIANTS[name].settings.items() if field in fields}))
    assert list(found) == (["gradient"] if name in ("top1", "top1_noisy") else [])  # theirs is 0 by design


@pytest.mark.slow
@pytest.mark.parametrize("steps, settings", [
    (10, {}), (100, {"use_aux_loss": True, "use_router_z_loss": True, "top_k": 1, "gate": "softmax"}),
    (100, {"use_quantile_balance": True, "gate": "sigmoid"}),
])
def test_a_trained_one_is_not_accused(steps, settings):
    model = gpt(**settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        idx, stats = text(step + 1, 8), RouterStats(model.train())
        model(idx[:, :-1], idx[:, 1:].contiguous()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        stats.add()
        stats.reduce(torch.zeros(1))
        stats.move_biases()
    rows, ce = doctor.examine(doctor.Subject(model), text(), pairs=1.0)
    assert [row for row in rows if row.verdict == "sick"] == []
    assert (ce < 0.5) == (steps == 100) == all(row.verdict == "ok" for row in rows)  # load is seen once it has learned


@pytest.mark.parametrize("check, formula", [
    ("aux_loss value", lambda moe, r, *rest: balance(moe, r._replace(probs_TE=r.probs_TE.softmax(-1)), *rest)),
    ("aux_loss value", lambda *args: balance(*args) / 8),
    ("aux_loss pull", lambda *args: balance(*args).detach()),
])
def test_a_broken_load_balance_loss(monkeypatch, check, formula):
    monkeypatch.setitem(ROUTER_LOSSES, "aux_loss", RouterLoss("use_aux_loss", "aux_loss_weight", formula))
    found = sick(gpt(use_aux_loss=True))
    assert {*found} == {check} and [row.layer for row in found[check]] == ["0", "1"]


def test_top_1_without_gradient_is_sick_and_a_frozen_router_is_not():
    assert "set gate softmax" in sick(gpt(top_k=1))["gradient"][0].meaning
    assert sick(gpt(freeze_router=True, use_aux_loss=True)) == {}


def shift(moe, move):  # the router's logits (T, E)
    product = moe.router.product
    moe.router.product = lambda x_TD, linear: move(product(x_TD, linear))


def round_at_64(x):  # as where a large part that all logits share is added before rounding
    return (x + 64).to(torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32).float()


def add_mean(moe, dim):  # over the positions (1) or the rows (0) of the batch
    moe.register_forward_hook(lambda moe, args, out: (out[0] + args[0].mean(dim, keepdim=True), out[1]))


BROKEN = {  # check that finds it: what breaks a MoE layer
    "noise in evaluation": lambda moe: shift(moe, lambda x: x + torch.randn_like(x)),
    "state moved in evaluation": lambda moe: moe.register_forward_hook(
        lambda moe, args, out: setattr(moe.router.balance_bias, "data", moe.router.balance_bias + 1e-6)),
    "dead experts": lambda moe: shift(moe, lambda x: x - torch.tensor([50.0] + [0.0] * 7)),
    "smallest router row": lambda moe: moe.router.w_g.weight.data[3].zero_(),
    "future leak": lambda moe: add_mean(moe, 1),
    "other rows leak": lambda moe: add_mean(moe, 0),
    "tied tokens": lambda moe: moe.router.w_g.weight.data[1:4].copy_(moe.router.w_g.weight.data[0]),
    **dict.fromkeys(("router_logit", "entropy"), lambda moe: moe.router.w_g.weight.data.mul_(1e5)),
    "same in bfloat16": lambda moe: shift(moe, round_at_64),
    "gradient": lambda moe: shift(moe, lambda x: x.detach()),
}


@pytest.mark.parametrize("check", BROKEN)
def test_a_broken_router_is_found_in_its_own_layer(check):
    model = gpt(use_bias_balance=check == "state moved in evaluation")
    BROKEN[check](model.transformer.h[1].mlp)
    assert [row.layer for row in sick(model, pairs=100.0)[check]] in (["1"], [""])


LLAMA = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32, "eos_token_id": 0}


def foreign(kind):
    torch.manual_seed(0)
    experts = {"num_experts_per_tok": 2, "num_local_experts" if kind == "Mixtral" else "num_experts": 8}
    config = getattr(transformers, f"{kind}Config")(**LLAMA, **({} if kind == "Llama" else experts))
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", ["Mixtral", "Olmoe", "Qwen2Moe", "Qwen3Moe", "Llama"])
def test_a_foreign_model_is_not_accused_and_what_it_hides_is_not_seen(kind):
    subject = doctor.Subject(foreign(kind))
    rows, _ = doctor.examine(subject, text())
    assert {row.verdict for row in rows} == {"ok", "not seen"} and subject.layers == ["0", "1"] * (kind != "Llama")
    theirs = getattr(subject.model(text(), output_router_logits=True), "router_logits", ())
    assert all(map(torch.equal, [r.logits_TE for r in subject(text())[2]], theirs))


@pytest.mark.parametrize("check, hurt", [
    ("gradient", lambda gate: gate.register_forward_hook(lambda m, args, out: (out[0], out[1].detach(), out[2]))),
    ("smallest router row", lambda gate: gate.weight.data[2].zero_()),
    ("router_logit", lambda gate: gate.weight.data.mul_(1e5)),
    ("noise in evaluation", lambda gate: gate.register_forward_pre_hook(lambda m, args: (torch.randn_like(args[0]),))),
])
def test_a_broken_mixtral_is_found(check, hurt):
    model = foreign("Mixtral")
    hurt(model.model.layers[1].mlp.gate)
    assert [row.layer for row in sick(model)[check]] in (["1"], [""])


@pytest.mark.parametrize("bad, verdict", [(0, "ok"), (1, "sick")])
def test_a_log_that_spikes_grows_and_loses_its_balance(tmp_path, bad, verdict):
    settings = {"init_from": "scratch", "use_aux_loss": True, "max_steps": 1000, "max_minutes": None}
    (tmp_path / "config.json").write_text(json.dumps({"settings": settings, "pair_loss": 3.0, "resumed": []}))
    lines = ["0 val 2", f"1000 val {2 + bad}"]
    for s in range(1000):
        lines += [f"{s} train {2 + bad * (s % 200 == 150)}", f"{s} max_vio {0.3 + bad * s / 300}"]
        lines += [f"{s} grad_norm {0.5 + bad * s / 10}", f"{s} router_logit {9 + bad * s}"]
    (tmp_path / "log.txt").write_text("\n".join(lines) + "\n")
    assert [row.verdict for row in doctor.check_log(tmp_path)] == [verdict] * 5


@pytest.mark.slow
def test_the_script(shards, train, tmp_path):
    _, folder = train(max_steps=120, use_aux_loss=True, val_loss_every=60, n_embd=16, n_exp=4)
    assert str(shards) in run_script("doctor.py", folder, cwd=tmp_path, check=0).stdout
    model = gpt(vocab_size=257, top_k=1)
    state = {"model": model.state_dict(), "config": dataclasses.asdict(model.config), "tokenizer": "bytes"}
    checkpoint.save(state, tmp_path / "top1.pt")
    assert "gate softmax" in end(fork(script, "doctor.py", [tmp_path / "top1.pt", "--data_root", shards]), code=1)
    foreign("Mixtral").save_pretrained(tmp_path / "mixtral")
    assert "random tokens" in end(fork(script, "doctor.py", [tmp_path / "mixtral"]))
    foreign("Llama").save_pretrained(tmp_path / "llama")
    assert "not seen: no router" in end(fork(script, "doctor.py", [tmp_path / "llama"]))
    (tmp_path / "mixtral/model.safetensors").write_bytes(b"torn")
    for word in ("nowhere", tmp_path / "mixtral"):
        assert "error: " in end(fork(script, "doctor.py", [word]), code=2)
