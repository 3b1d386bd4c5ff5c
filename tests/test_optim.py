"""optim.py: schedules by steps and by the clock, groups of the optimizer, branches that decay."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import lines

import checks
import runlog
import train_single_gpu as trainer
from lab import checkpoint, common, optim
from lab.common import UserError
from model import GPT, GPTConfig


def test_learning_rate():
    args = trainer.Args(max_lr=1.0, min_lr=0.2, warmup_steps=10, max_steps=110)
    assert optim.learning_rate(0, args) == pytest.approx(0.1)
    assert optim.learning_rate(9, args) == optim.learning_rate(10, args) == pytest.approx(1.0)
    assert optim.learning_rate(60, args) == pytest.approx(0.6)
    assert optim.learning_rate(110, args) == optim.learning_rate(500, args) == pytest.approx(0.2)
    assert optim.learning_rate(0, dataclasses.replace(args, warmup_steps=0)) == pytest.approx(1.0)


def test_wsd_is_constant_and_then_one_minus_sqrt():
    args = trainer.Args(max_lr=1.0, min_lr=0.2, warmup_steps=10, max_steps=110, schedule="wsd", decay_steps=25)
    rates = [optim.learning_rate(step, args) for step in range(111)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10) and rates[10:86] == [1.0] * 76
    for step in (90, 100, 110):
        assert rates[step] == pytest.approx(0.2 + 0.8 * (1 - math.sqrt((step - 85) / 25)))
    by_default = dataclasses.replace(args, decay_steps=None)
    assert optim.learning_rate(88, by_default) == 1.0 and optim.learning_rate(89, by_default) < 1.0  # a fifth of 110


@pytest.mark.parametrize("schedule, halfway, late", [
    ("cosine", 0.6, 0.2 + 0.4 * (1 + math.cos(0.9 * math.pi))), ("wsd", 1.0, 0.2 + 0.8 * (1 - math.sqrt(0.5))),
])  # fmt: skip
def test_with_max_minutes_the_schedule_follows_the_clock(schedule, halfway, late):
    args = trainer.Args(max_lr=1.0, min_lr=0.2, warmup_steps=0, schedule=schedule, max_minutes=60.0)
    for step in (5, 50_000):
        assert optim.learning_rate(step, args, hours=0.5) == pytest.approx(halfway)
        assert optim.learning_rate(step, args, hours=0.9) == pytest.approx(late)
    assert optim.is_over(5, args, 1.0) and not optim.is_over(5, args, 0.99)


@pytest.mark.slow
def test_a_run_of_fixed_minutes_ends_by_the_clock_and_keeps_it_on_resume(train):
    settings = {"name": "a", "max_minutes": 0.02, "max_steps": 100_000, "val_loss_every": 50}
    code, streams = train(**settings)
    hours = streams["hours"][1]
    assert code == 0 and hours[-2] * 60 < 0.02 + 0.01 and len(streams["train"][0]) < 100_000
    assert streams["val"][0][-1] == streams["train"][0][-1] + 1  # the last validation is at the end
    assert streams["load_0_3"][0][-1] == streams["max_vio_0"][0][-1] == streams["train"][0][-1]
    assert streams["lr"][1][-1] < 0.5 * max(streams["lr"][1])
    code, again = train(**settings | {"resume": "auto", "max_minutes": 0.03})
    assert code == 0 and again["hours"][1][len(hours) - 1] == hours[-1] < again["hours"][1][-1]


@pytest.mark.slow
def test_one_stable_run_decays_from_two_of_its_checkpoints(train):
    wsd = {"schedule": "wsd", "name": "a"}
    _, stable = train(**wsd, max_steps=40, save_checkpoint_every=10, keep_checkpoints=9)
    assert stable["lr"][1][:32] == pytest.approx([*np.arange(1, 5) * 0.75e-3, *[3e-3] * 28])
    default = trainer.Args.max_steps
    for step in (10, 20):
        branch = wsd | {"run_id": f"from{step}", "decay_steps": 5, "max_steps": default}
        _, streams = train(**branch, resume=f"checkpoints/a_test_seed_1337/step_{step:06d}.pt")
        assert streams["train"][0].tolist() == list(range(step, step + 5))
        assert streams["lr"][1][0] == 3e-3 and streams["lr"][1][-1] == pytest.approx(
            3e-4 + 2.7e-3 * (1 - math.sqrt(0.8))
        )
        path = runlog.log_path("logs", "a", f"from{step}", 1337)
        before = lines(path)
        assert train(**branch, resume="auto")[0] == 0  # the same flags again: the branch is finished
        assert (
            lines(path) == before
            and json.loads(path.with_suffix(".json").read_text())["settings"]["max_steps"] == step + 5
        )


@pytest.mark.parametrize("wrong, said", [
    ({"decay_steps": 5}, "--schedule wsd"), ({"schedule": "wsd", "decay_steps": 11}, "more than --max_steps 10"),
    ({"schedule": "wsd", "decay_steps": 5, "max_minutes": 1.0}, "leave one out"), ({"max_minutes": 0.0}, "max_minutes"),
    ({"muon_lr": 0.01}, "--optimizer muon"), ({"optimizer": "muon", "max_lr": 0.0}, "--max_lr above 0"),
    ({"router_lr_scale": 0.0}, "router_lr_scale"), ({"router_weight_decay": -1.0}, "router_weight_decay"),
])  # fmt: skip
def test_settings_that_contradict_each_other(wrong, said, train):
    with pytest.raises(UserError, match=said):
        train(**wrong)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    "fields", [{}, {"n_exp": 4, "n_shared_exp": 2, "use_noisy_top_k": True}, {"n_exp": 4, "bias": False}], ids=str
)
def test_the_memory_of_the_optimizer_is_estimated_by_its_moments(fields, optimizer):
    model = GPT(GPTConfig(n_layer=3, n_head=2, n_embd=16, block_size=8, vocab_size=32, **fields))
    args = trainer.Args(optimizer=optimizer)
    built = optim.build_optimizer(model, args)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    built.step()
    moments = [tensor for state in built.state.values() for name, tensor in state.items() if name != "step"]
    machine = common.Machine(torch.device("cpu"), torch.float32, 0, 1, False)
    needed = checks.needed_bytes(args, model.config, machine)["optimizer"]
    assert needed == sum(tensor.nbytes for tensor in moments) > 0


def test_groups_hold_every_parameter_once_and_the_router_apart_where_it_differs():
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=32, n_exp=4, use_noisy_top_k=True))
    names = {p: name for name, p in model.named_parameters()}
    for settings in ({}, {"router_weight_decay": 0.0}, {"router_lr_scale": 3.0}):
        groups = optim.build_optimizer(model, trainer.Args(**settings)).param_groups
        held = [names[p] for group in groups for p in group["params"]]
        assert sorted(held) == sorted(names.values()) and len(groups) == (3 if settings else 2)
        for group in groups:
            for name in map(names.get, group["params"]):
                plain = name.endswith("bias") or ".ln_" in name
                router = ".router." in name and bool(settings)
                decay = settings.get("router_weight_decay", 0.1) if router else 0.0 if plain else 0.1
                assert (group["weight_decay"], group["lr_scale"]) == (
                    decay,
                    settings.get("router_lr_scale", 1.0) if router else 1.0,
                )


def test_the_router_moves_by_its_own_rate(train):
    """One step from the same weights: Adam's first update is the rate, decay aside."""
    for scale in (1.0, 4.0):
        train(name=f"s{scale:g}", router_lr_scale=scale, weight_decay=0.0, max_steps=1, warmup_steps=0, max_lr=1e-3)
    generator = torch.Generator().manual_seed(1337)
    start = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=257, n_exp=4), generator)
    moved = {}
    for name in ("s1", "s4"):
        model, _ = checkpoint.load_model(Path(f"checkpoints/{name}_test_seed_1337"))
        for key, p in model.named_parameters():
            moved[name, key] = (p - start.get_parameter(key)).abs().max().item()
    router, other = "transformer.h.0.mlp.router.w_g.weight", "transformer.h.0.attn.c_attn.weight"
    assert (
        moved["s4", router] == pytest.approx(4 * moved["s1", router], rel=1e-3)
        and moved["s1", other] == moved["s4", other]
    )
