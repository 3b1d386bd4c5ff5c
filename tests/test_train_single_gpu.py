"""The training script: tiny runs of the real thing, in this process or as a user starts it."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, Forked, flags, lines

import identity
import runlog
import train_single_gpu as trainer
from lab import checkpoint, common, optim
from lab.common import UserError
from lab.data import DataLoader
from lab.tokenizer import get_tokenizer
from model import GPT, GPTConfig

ROOT = Path(trainer.__file__).parent
NOISY = {"use_noisy_top_k": True, "use_aux_loss": True, "use_router_z_loss": True}


def start(*more, **settings):
    """A trainer in a process of its own."""
    return Forked(ROOT / "train_single_gpu.py", *flags(TINY_RUN | settings), *more)


def folder_of(run_id="test", **settings):
    return Path("checkpoints") / log_of(run_id, **settings).stem.removeprefix("log_")


def log_of(run_id="test", name=None, **settings):
    name = name or identity.run_name(trainer.Args(**TINY_RUN | settings))
    return runlog.log_path("logs", name, run_id, 1337)


# -- settings


def test_defaults_are_the_published_ones():
    published = {
        "total_batch_size": 524_288, "B": 16, "T": 1024, "vocab_size": 50304, "use_compile": True, "max_lr": 6e-4,
        "warmup_steps": 2000, "max_steps": 190_730, "val_loss_steps": 20, "val_loss_every": 250,
        "sample_from_model_every": 250, "save_checkpoint_every": 10_000, "n_exp": 8, "top_k": 2, "stride": 2,
        "aux_loss_weight": 0.01, "router_z_loss_weight": 0.001, "train_capacity": 1.25, "eval_capacity": 2.0,
        "min_capacity": 4, "switch_tfm_init_scale": 1.0, "n_layer": 12, "n_head": 12, "n_embd": 768,
    }  # fmt: skip
    args = trainer.Args()
    assert {name: getattr(args, name) for name in published} == published
    assert optim.learning_rate(args.max_steps, args) == pytest.approx(6e-5)


def test_every_setting_is_explained_once_and_in_its_group():
    text = common.help_text(trainer.Args)
    for name, field in trainer.Args.__dataclass_fields__.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"  --{name} ")]
        assert len(line.split("  ")[-1]) > 8, f"no help for {name}"
        assert field.default in (None, "", True, False) or f"[{field.default}]" in line
    assert text.startswith("Trains GPT-2") and text.index("mixture of experts") < text.index("--top_k")
    assert text.index("\ncheckpoints") < text.index("--keep_checkpoints") < text.index("\nmachine")


def test_settings_reach_the_model(train):
    """Values unlike the defaults, read back from the model of the checkpoint."""
    unlike = {
        "n_exp": 3, "top_k": 3, "stride": 1, "gate": "sigmoid", "n_shared_exp": 1, "use_noisy_top_k": True,
        "use_aux_loss": True, "use_router_z_loss": True, "use_bias_balance": True, "aux_loss_weight": 0.5,
        "router_z_loss_weight": 0.25, "train_capacity": 3.0, "eval_capacity": math.inf, "min_capacity": 7,
        "use_switch_tfm_init": True, "switch_tfm_init_scale": 0.1, "router_use_full_prec": True, "dropout": 0.1,
        "bias": False, "balance_scope": "step", "block_size": 48,
    }  # fmt: skip
    train(**unlike, max_steps=1, name="unlike")
    model, _ = checkpoint.load_model("checkpoints/unlike_test_seed_1337/step_000001.pt")
    assert dataclasses.asdict(model.config) == dataclasses.asdict(
        GPTConfig(**unlike, vocab_size=257, n_layer=2, n_head=2, n_embd=32)
    )


@pytest.mark.parametrize("settings, name", [
    ({"n_exp": 1, "use_noisy_top_k": True}, "no_moe"), ({}, "moe"), ({"use_noisy_top_k": True}, "moe_noisy_top_k"),
    ({"aux_loss_weight": 1.0, "use_aux_loss": True, "stride": 1}, "moe_stride_1_aux_loss_aux_loss_weight_1"),
    (NOISY, "moe_noisy_top_k_aux_loss_router_z_loss"), ({"top_k": 1}, "moe_top_k_1"),
    ({"top_k": 1, "use_noisy_top_k": True}, "moe_top_k_1_noisy_top_k"),
    (NOISY | {"router_use_full_prec": True, "use_switch_tfm_init": True},
     "moe_noisy_top_k_aux_loss_router_z_loss_switch_tfm_init_router_full_prec"),
    ({"train_capacity": math.inf, "gate": "sigmoid"}, "moe_gate_sigmoid_capacity_inf"),
    ({"n_exp": 1, "max_lr": 1e-3, "init_from": "some/where"}, "no_moe_init_from_where_max_lr_0.001"),
    ({"train_capacity": 2.0, "n_shared_exp": 1}, "moe_shared_1_capacity_2"),
    ({"use_switch_tfm_init": True, "switch_tfm_init_scale": 0.1, "use_bias_balance": True},
     "moe_switch_tfm_init_init_scale_0.1_bias_balance"), ({"max_steps": 5, "B": 1, "logs_dir": "x"}, "moe"),
])  # fmt: skip
def test_names_are_the_published_ones(settings, name):
    assert identity.run_name(trainer.Args(**settings)) == name


@pytest.mark.slow
def test_a_wrong_flag_exits_2():
    command = [sys.executable, str(ROOT / "train_single_gpu.py"), *flags(TINY_RUN), "--n_expp", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "--n-exp" in done.stderr


# -- learning


@pytest.mark.parametrize("settings, tolerance", [({"n_exp": 1}, 2e-4), (NOISY, 2e-3)], ids=["dense", "moe"])
def test_golden_curve(train, settings, tolerance):
    """Twenty steps: whoever changes these changed what is computed. (A router may flip a choice on another CPU.)"""
    _, streams = train(max_steps=20, val_loss_every=10, **settings)
    golden_train, golden_val = GOLDEN["n_exp" in settings]
    assert streams["train"][1][::4] == pytest.approx(golden_train, abs=tolerance)
    assert streams["val"][1] == pytest.approx(golden_val, abs=tolerance)


GOLDEN = {  # every fourth train loss, then val at 0, 10, 20
    True: ([5.5775, 5.0830, 4.4991, 4.0414, 3.7996], [5.5691, 4.2483, 3.7096]),
    False: ([5.5771, 5.0799, 4.4931, 4.0368, 3.7919], [5.5693, 4.2392, 3.6988]),
}


@pytest.mark.parametrize("settings", [{"n_exp": 4}, *(pytest.param(settings, marks=pytest.mark.slow) for settings in [
    {"n_exp": 1}, {"n_exp": 4, "top_k": 1, "gate": "softmax"}, {"dtype": "bfloat16"}, {"optimizer": "muon"},
    {"optimizer": "adafactor", "max_lr": 0.3}, {"use_bias_balance": True}, {"use_quantile_balance": True},
    {"init_from": "scratch", "dropout": 0.1},
])], ids=str)  # fmt: skip
def test_loss_falls(train, settings):
    _, streams = train(**{"max_steps": 60, "max_lr": 1e-2} | settings)
    val = streams["val"][1]
    assert val[0] == pytest.approx(math.log(257), abs=0.2)
    assert val[-1] < 2.7
    assert streams["val"][0].tolist() == list(range(0, 61, 5)) and len(streams["train"][0]) == 60


def test_streams_of_a_moe_and_of_a_dense_run(train):
    _, moe = train(**NOISY)
    _, dense = train(n_exp=1)
    common = {"train", "val", "val_bpb", "lr", "grad_norm", "tok_per_sec", "hours"}
    assert set(dense) == common
    router = {"aux_loss", "z_loss", "max_vio", "drop_frac", "router_entropy", "router_logit"}
    of_layer = {f"{name}_0" for name in ("max_vio", "drop_frac", "logit_std", "noise_std")}
    in_val = {f"val_{name}_0" for name in ("max_vio", "drop_frac", "logit_std")}
    assert set(moe) == common | router | of_layer | in_val | {f"load_0_{e}" for e in range(4)}
    assert sum(moe[f"load_0_{e}"][1][0] for e in range(4)) == pytest.approx(1, abs=1e-5)
    about = json.loads(log_of(n_exp=1).with_suffix(".json").read_text())
    assert about["args"]["n_exp"] == 1 and about["params_total"] == about["params_active"] > 0
    assert {"commit", "torch", "device", "flops_per_token", "tokens_per_step", "config"} <= set(about)


def test_every_stream_is_in_the_table_of_the_format(train):
    """runlog.py's docstring decodes the names; three of them need a run that fails."""
    row = {"ctx": "the router", "label": 1, "endings": ["zzzz qqqq", "sends a token", "!!!!", "@@@@"]}
    Path("rows.jsonl").write_text(json.dumps(row))
    _, streams = train(**NOISY, output_z_loss_weight=0.1, hellaswag_every=5, hellaswag_data="rows.jsonl")
    rows = re.findall(r"^ {8}([a-z_{}, ]+?)(?:, \.\.\.)?(?:  .*)?$", runlog.__doc__, re.MULTILINE)
    names = {name: re.sub(r"{\w+}", r"\\d+", name) for row in rows for name in row.split(", ")}
    assert [stream for stream in streams if not any(re.fullmatch(name, stream) for name in names.values())] == []
    unseen = [name for name, regex in names.items() if not any(re.fullmatch(regex, stream) for stream in streams)]
    assert unseen == ["spike", "skipped", "diverged"]


def test_validation_statistics_are_those_of_its_batches(train, shards):
    """Counts add up over the batches, before the largest is divided by the mean; bytes are those of the targets."""
    _, streams = train(**NOISY, eval_capacity=0.5, min_capacity=1, val_loss_steps=3)
    model, _ = checkpoint.load_model(folder_of(**NOISY, eval_capacity=0.5, min_capacity=1, val_loss_steps=3))
    loader, counts, drops, variances = DataLoader(shards, "val", B=4, T=32, vocab_size=257), 0, [], []
    moe = model.moe_layers()[0][1]
    with torch.no_grad():
        for i in range(3):
            model(*loader.batch_at(i))
            counts, (layer,) = counts + moe.count, model.router_stats()
            drops, variances = [*drops, layer["drop_frac"]], [*variances, layer["logit_std"] ** 2]
    last = {name: values[-1] for name, (_, values) in streams.items()}
    assert last["val_max_vio_0"] == pytest.approx((counts.max() / counts.mean() - 1).item(), rel=1e-5)
    assert last["val_drop_frac_0"] == pytest.approx(np.mean(drops), rel=1e-5) and last["val_drop_frac_0"] > 0
    assert last["val_logit_std_0"] == pytest.approx(np.mean(variances) ** 0.5, rel=1e-5)
    assert last["val_bpb"] == pytest.approx(last["val"] / math.log(2), rel=1e-6)  # no end of text in these shards


@pytest.mark.slow
def test_bits_per_byte_of_gpt2_tokens_made_elsewhere(train, tmp_path):
    """Without meta.json tokens are GPT-2's; end of text has no bytes, and its loss counts."""
    text = (Path(__file__).parent / "data/prose_200kB.txt").read_text("utf-8")
    tokens = get_tokenizer("gpt2").encode_to_numpy(text)[: 3 * 4 * 32]
    tokens = np.insert(tokens, 10, 50256)  # the inputs and targets of three batches
    for split in ("train", "val"):
        np.save(tmp_path / f"{split}_000000.npy", tokens)
    _, streams = train(n_exp=1, vocab_size=50304, data_root=str(tmp_path), val_loss_steps=3, max_steps=1)
    n_bytes = len(get_tokenizer("gpt2").decode_bytes(tokens[1 : 3 * 4 * 32 + 1])) - len("<|endoftext|>")
    np.testing.assert_allclose(streams["val_bpb"][1], streams["val"][1] / np.log(2) * 3 * 4 * 32 / n_bytes, rtol=1e-6)


@pytest.mark.slow
def test_val_is_cross_entropy_alone(train, shards):
    """With router losses of any weight, val at step 0 is the same number."""
    _, light = train(**NOISY, run_id="a")
    _, heavy = train(**NOISY, run_id="b", aux_loss_weight=3.0, router_z_loss_weight=3.0)
    assert light["val"][1][0] == heavy["val"][1][0]
    model, _ = checkpoint.load_model(folder_of(run_id="a", **NOISY))
    loader = DataLoader(shards, "val", B=4, T=32, vocab_size=257)
    with torch.no_grad():
        losses = [model(*loader.batch_at(i)).ce_loss.item() for i in range(2)]
    assert light["val"][1][-1] == pytest.approx(np.mean(losses), abs=1e-5)


def test_a_signal_cuts_the_validation_of_one_process_and_of_no_sharded_rank(shards, monkeypatch):
    """Sharded ranks evaluate together: where one left, the others would wait for it."""
    model = GPT(GPTConfig(block_size=32, vocab_size=257, n_layer=1, n_head=2, n_embd=16), torch.Generator())
    loader, told = DataLoader(shards, "val", B=4, T=32, vocab_size=257), types.SimpleNamespace(requested=True)
    alone = common.Machine(torch.device("cpu"), torch.float32, 0, 1, fsdp=False)
    console = types.SimpleNamespace(bar_over=lambda items, name: items)
    assert trainer.validate(model, loader, 3, alone, console, told) is None and model.training
    monkeypatch.setattr(trainer.dist, "all_reduce", lambda sums: sums.mul_(2))
    sharded = trainer.validate(model, loader, 3, alone._replace(world_size=2, fsdp=True), console, told)
    assert sharded.loss == trainer.validate(model, loader, 3, alone, console).loss


@pytest.mark.slow
def test_micro_batches_do_not_change_the_run(train):
    """A dense model: the loss over micro-batches is the loss of the big batch."""
    runs = [train(n_exp=1, B=B, run_id=f"b{B}")[1]["train"][1] for B in (8, 4, 1)]
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-5)
    np.testing.assert_allclose(runs[2], runs[0], rtol=1e-5)


@pytest.mark.slow
def test_another_seed_is_another_run_on_the_same_data(train):
    a, b = (train(seed=seed)[1]["train"][1] for seed in (1, 2))
    assert a[0] != b[0] and a[0] == pytest.approx(b[0], abs=0.1)


# -- the same run again


@pytest.mark.slow
def test_same_seed_same_log_and_evaluation_leaves_no_trace(train):
    settings = NOISY | {"dropout": 0.1}
    train(**settings, name="a")
    train(**settings, name="b")
    assert lines(log_of(name="a")) == lines(log_of(name="b"))
    train(**settings, name="c", sample_from_model_every=2, val_loss_every=3, save_checkpoint_every=4)
    train(**settings, name="d", val_loss_every=0)
    a, c, d = (runlog.read(log_of(name=name)) for name in "acd")
    for stream in ("train", "grad_norm", "aux_loss", "router_entropy", "max_vio"):
        assert a[stream][1].tolist() == c[stream][1].tolist() == d[stream][1].tolist(), stream
    assert "val" not in d


@pytest.mark.parametrize("settings", [
    NOISY | {"dropout": 0.1}, *(pytest.param(settings, marks=pytest.mark.slow) for settings in [
        {"n_exp": 1}, {"use_bias_balance": True, "sample_from_model_every": 3}, {"optimizer": "adafactor"},
        {"optimizer": "muon", "use_aux_loss": True}])
], ids=str)  # fmt: skip
def test_a_resumed_run_is_the_run_left_alone(train, settings):
    settings = settings | {"save_checkpoint_every": 3, "keep_checkpoints": 9}
    train(**settings, name="left")
    train(**settings, name="cut")
    folder = Path("checkpoints/cut_test_seed_1337")
    for step in (9, 3, 6):
        for path in checkpoint.checkpoints(folder):
            if int(path.stem[5:]) > step:
                path.unlink()
        with open(log_of(name="cut"), "a") as f:
            f.write("11 tra")  # cut off in the middle of a line
        assert train(**settings, name="cut", resume="auto")[0] == 0
        assert lines(log_of(name="cut")) == lines(log_of(name="left"))


@pytest.mark.slow
def test_resume_by_path_and_without_a_run_id(train):
    train(name="a", max_steps=6, save_checkpoint_every=3)
    older = "checkpoints/a_test_seed_1337/step_000003.pt"
    with pytest.raises(UserError, match=r"step_000006.pt is newer than .*step_000003.pt"):
        train(name="a", max_steps=10, resume=older)
    code, fork = train(name="a", max_steps=10, resume=older, run_id="fork")
    assert code == 0 and fork["train"][0].tolist() == list(range(3, 10))
    Path("checkpoints/a_test_seed_1337/step_000006.pt").unlink()
    code, streams = train(name="a", max_steps=10, resume=older)
    assert code == 0 and streams["train"][0].tolist() == list(range(10))
    train(name="a", run_id="", max_steps=12, resume="auto")
    newest = max(Path("checkpoints").iterdir(), key=os.path.getmtime).name
    assert newest == "a_test_seed_1337"
    assert runlog.read(log_of(name="a"))["train"][0].tolist() == list(range(12))


def test_a_finished_run_is_not_overwritten(train):
    train()
    with pytest.raises(UserError, match="--resume auto"):
        train()


@pytest.mark.slow
def test_settings_that_differ_from_the_checkpoint(train, capsys):
    train(max_steps=4, name="a")
    for changed in (
        {"n_exp": 8},
        {"T": 16},
        {"seed": 1337, "top_k": 1},
        {"data_seed": 5},
        {"router_use_full_prec": True},
    ):
        with pytest.raises(UserError, match="the checkpoint was made with"):
            train(max_steps=6, resume="auto", **{"name": "a"} | changed)
    capsys.readouterr()
    assert train(max_steps=6, resume="auto", name="a", B=8, val_loss_every=2)[0] == 0
    said = capsys.readouterr().out
    assert "--B was 4 in the checkpoint and is 8 now" in said and "--max_steps was 4" in said


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on(train, tmp_path, shards):
    settings = {"max_steps": 100_000, "data_root": str(shards), "save_checkpoint_every": 100_000, **NOISY}
    process = start(name="cut", **settings)
    process.read_until("step     20 | loss")
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate()
    assert process.poll() == 130 and "--resume auto" in rest
    (saved,) = Path("checkpoints/cut_test_seed_1337").glob("*.pt")
    stopped = int(saved.stem[5:])
    assert stopped > 20
    train(name="cut", resume="auto", **settings | {"max_steps": stopped + 10})
    train(name="left", **settings | {"max_steps": stopped + 10})
    cut, left = (runlog.read(log_of(name=name)) for name in ("cut", "left"))
    for stream in ("train", "val"):  # until it stopped, max_steps and so the learning rate were others
        upto = cut[stream][0] <= 4
        assert cut[stream][1][upto].tolist() == left[stream][1][upto].tolist()
    assert cut["train"][0].tolist() == list(range(stopped + 10))


@pytest.mark.slow
def test_two_runs_of_one_name_at_once(train, shards):
    first = start(data_root=shards, max_steps=100_000, save_checkpoint_every=2)
    try:
        first.read_until("step      3 | loss")
        with pytest.raises(UserError, match=str(first.pid)) as error:
            train(resume="auto")
        assert "\n" not in str(error.value)
    finally:
        first.kill()
        first.communicate()
    steps = checkpoint.step_of(checkpoint.checkpoints(folder_of())[-1]) + 2
    code, streams = train(resume="auto", max_steps=steps)  # the lock of the killed one is no obstacle
    assert code == 0 and len(streams["train"][0]) == steps


# -- divergence


def test_a_run_that_diverges_says_so(train, tmp_path):
    settings = {"max_lr": 1e38, "warmup_steps": 8, "save_checkpoint_every": 1, "grad_clip": math.inf}
    code, streams = train(**settings)
    assert code == 3
    (step,), (flag,) = streams["diverged"]
    assert flag == 1 and not math.isfinite(streams["train"][1][-1] + streams["grad_norm"][1][-1])
    replay = json.loads(log_of(**settings).with_suffix(".diverged.json").read_text())
    assert replay["step"] == step and replay["loader"]["row"] == step * 8  # rows of 32 tokens, 256 a step
    newest = checkpoint.load_newest(folder_of(**settings))[1]
    assert newest["step"] <= step and all(value.isfinite().all() for value in newest["model"].values())
    assert runlog.diverged(streams)


def test_steps_can_be_skipped(train):
    settings = {"max_lr": 1e38, "grad_clip": math.inf, "on_nonfinite": "skip", "max_steps": 6}
    code, streams = train(**settings)
    skipped = streams["skipped"][1].tolist()
    assert code == 0 and skipped == list(range(1, len(skipped) + 1)) and len(streams["train"][0]) == 6
    state = checkpoint.load_newest(folder_of(**settings))[1]
    assert state["progress"]["skipped"] == len(skipped) > 0


@pytest.mark.slow
def test_a_spike_is_counted(train, monkeypatch):
    """A batch of unlike text in the middle of a learned one."""
    original, calls = DataLoader.next_batch, []

    def next_batch(self):
        x, y = original(self)
        calls.append(1)
        return (x, torch.randint_like(y, 257)) if len(calls) in (101, 102) else (x, y)  # both halves of step 50

    monkeypatch.setattr(DataLoader, "next_batch", next_batch)
    _, streams = train(max_steps=55, max_lr=1e-2)
    assert streams["spike"][0].tolist() == [50] and runlog.spike_steps(streams).tolist() == [50]


# -- around the loop


@pytest.mark.slow
def test_a_full_disk_does_not_end_the_run_but_its_last_checkpoint_must_be_written(train, monkeypatch, capsys):
    written, real = [], checkpoint.save

    def full(state, path):
        written.append(state["step"])
        if state["step"] < full_below:
            raise OSError(28, "No space left on device")
        real(state, path)

    monkeypatch.setattr(checkpoint, "save", full)
    full_below = 10
    code, streams = train(save_checkpoint_every=3, name="a")
    assert code == 0 and len(streams["train"][0]) == 10 and written == [3, 6, 9, 10]
    assert "No space left on device" in capsys.readouterr().out
    full_below = 11
    with pytest.raises(UserError, match="last checkpoint could not be written"):
        train(save_checkpoint_every=3, name="b")
    assert len(runlog.read(log_of(name="b"))["train"][0]) == 10


def test_no_checkpoint_when_none_is_wanted(train):
    train(save_checkpoint=False)
    assert not Path("checkpoints").exists()


@pytest.mark.slow
def test_init_from_a_dense_checkpoint_upcycles_it(train):
    train(n_exp=1, name="dense", max_steps=30, max_lr=1e-2)
    _, streams = train(n_exp=4, name="upcycled", init_from="checkpoints/dense_test_seed_1337", max_steps=1,
                       train_capacity=math.inf, eval_capacity=math.inf)  # fmt: skip
    dense = runlog.read(log_of(name="dense"))["val"][1][-1]
    assert streams["val"][1][0] == pytest.approx(dense, abs=1e-4)


@pytest.mark.slow
def test_eval_only_prints_train_and_val_loss(train, shards, capsys):
    train(n_exp=1, name="dense", max_steps=30, max_lr=1e-2)
    capsys.readouterr()
    settings = TINY_RUN | {"data_root": str(shards), "init_from": "checkpoints/dense_test_seed_1337"}
    assert trainer.run(trainer.Args(**settings, eval_only=True)) == 0
    said = capsys.readouterr().out.splitlines()
    val = runlog.read(log_of(name="dense"))["val"][1][-1]
    assert said[0].startswith("train loss ") and said[1].startswith(f"val loss {val:.4f} nats per token, ")
    assert f" {val / math.log(2):.4f} bits per byte" in said[1]
    assert len(list(Path("logs").glob("*.txt"))) == 1  # that of the dense run


@pytest.mark.slow
def test_samples_come_from_the_model(train, capsys):
    train(sample_from_model_every=5, sample_prompt="the router ", max_steps=40, max_lr=1e-2)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 40 sample")]
    assert len(said) == 4 and all("the router " in line for line in said)


@pytest.mark.slow
def test_hellaswag_stream(train, tmp_path):
    row = {"ind": 0, "ctx": "the router", "label": 1, "endings": ["zzzz qqqq", "sends a token", "!!!!", "@@@@"]}
    Path("rows.jsonl").write_text("".join(json.dumps(row | {"ind": i}) + "\n" for i in range(6)))
    _, streams = train(hellaswag_every=5, hellaswag_data="rows.jsonl", max_steps=40, max_lr=1e-2)
    assert streams["hella"][0].tolist() == list(range(0, 41, 5)) and streams["hella"][1][-1] == 1.0
    bits = streams["hella_bpb"][1]
    assert bits[0] == pytest.approx(math.log2(257), abs=0.3) and bits[-1] < 4
    _, plain = train(max_steps=40, max_lr=1e-2, name="plain")
    assert plain["train"][1].tolist() == streams["train"][1].tolist()


@pytest.mark.slow
def test_wandb_offline(train, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(wandb=True, max_steps=2)
    assert list(Path("wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.slow
def test_shards_that_change_under_a_running_job(train, shards, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in shards.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    process = start(data_root=copy, max_steps=100_000)
    process.read_until("step      1 | loss")
    os.truncate(copy / "words_train_000001.npy", 1000)
    _, said = process.communicate()
    assert process.poll() == 2 and said.startswith("error: ") and "words_train_000001.npy" in said
