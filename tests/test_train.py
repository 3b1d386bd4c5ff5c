"""The training script: tiny runs of the real thing, in this process or as a user starts it."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, end, flags, fork, lines, run_script, script, streams, tiny

import train_single_gpu as trainer
import weights
from lab import checkpoint, common, logger, optim, runs
from lab.common import UserError
from lab.data import DataLoader
from lab.tokenizer import get_tokenizer
from model import GPTConfig, MoE

NOISY = {"use_noisy_top_k": True, "use_aux_loss": True, "use_router_z_loss": True}
ROW = {"ctx": "the router", "label": 1, "endings": ["zzzz qqqq", "sends a token", "!!!!", "@@@@"]}


# -- settings


def test_published_defaults():
    """Of Args as committed; a user's own edit of Args is no error of the code, and the test is skipped."""
    published = {
        "total_batch_size": 524_288, "B": 16, "T": 1024, "vocab_size": 50304, "max_lr": 6e-4, "warmup_steps": 2000,
        "max_steps": 190_730, "val_loss_every": 250, "sample_from_model_every": 250, "save_checkpoint_every": 10_000,
        "n_exp": 8, "top_k": 2, "stride": 2, "aux_loss_weight": 0.01, "router_z_loss_weight": 0.001,
        "train_capacity": 1.25, "eval_capacity": 2.0, "min_capacity": 4, "switch_tfm_init_scale": 1.0, "n_layer": 12,
        "n_head": 12, "n_embd": 768,
    }
    edited = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "train_single_gpu.py"], cwd=ROOT).returncode
    args = trainer.Args()
    if edited and any(getattr(args, name) != value for name, value in published.items()):
        pytest.skip("Args is edited")
    assert {name: getattr(args, name) for name in published} == published


@pytest.mark.slow
def test_every_setting_has_a_help_text_and_is_read_somewhere(capsys):
    with pytest.raises(SystemExit, match="0"):
        trainer.read_args(["--help"])
    box = capsys.readouterr().out.replace("│", " ")
    shown = " ".join(box.split("options", 1)[1].split())
    sources = "".join(path.read_text() for path in (*ROOT.glob("*.py"), *ROOT.glob("lab/*.py")))
    for field in dataclasses.fields(trainer.Args):
        (text,) = re.findall(rf" --{field.name}[ ,](.*?)\(default", shown)
        assert len(text) > 15, f"no help for {field.name}"
        read = (f"args.{field.name}", f"self.{field.name}", f"config.{field.name}", f'"{field.name}"')
        assert any(word in sources for word in read), f"nothing reads {field.name}"


def test_settings_reach_the_model(train):
    """Values unlike the defaults, read back from the model of the checkpoint."""
    unlike = {
        "n_exp": 3, "top_k": 3, "stride": 1, "gate": "sigmoid", "n_shared_exp": 1, "use_noisy_top_k": True,
        "use_aux_loss": True, "use_router_z_loss": True, "use_bias_balance": True, "aux_loss_weight": 0.5,
        "router_z_loss_weight": 0.25, "train_capacity": 3.0, "eval_capacity": math.inf, "min_capacity": 7,
        "use_switch_tfm_init": True, "switch_tfm_init_scale": 0.1, "router_use_full_prec": True, "dropout": 0.1,
        "bias": False, "balance_scope": "step", "block_size": 48,
    }
    _, folder = train(**unlike, max_steps=1)
    model, _ = weights.open_model(folder, torch.device("cpu"))
    expected = GPTConfig(**unlike, vocab_size=257, n_layer=2, n_head=2, n_embd=32)
    assert dataclasses.asdict(model.config) == dataclasses.asdict(expected)


@pytest.mark.slow
def test_args_edited_as_nanogpt_is_edited_work_and_a_name_that_is_no_setting_is_refused(tmp_path, shards):
    """With or without a type, of the model, its experts or the training; the record holds the values."""
    for name in ("lab", *(path.name for path in ROOT.glob("*.py"))):
        (tmp_path / name).symlink_to(ROOT / name)
    source = (ROOT / "train_single_gpu.py").read_text()
    (tmp_path / "train_single_gpu.py").unlink()
    marker = "    # the run\n"
    edited = re.sub(r"    max_lr: Rate = \S+", "    max_lr = 1e-2", source)
    edited = re.sub(r"    n_exp: Positive = \S+", "    n_exp = 3", edited)
    edited = edited.replace(marker, '    top_k = 1\n    gate = "softmax"\n' + marker)
    (tmp_path / "train_single_gpu.py").write_text(edited)
    settings = tiny(data_root=shards, max_steps=2)
    words = flags({key: value for key, value in settings.items() if key not in ("top_k", "gate", "n_exp", "max_lr")})
    end(fork(script, tmp_path / "train_single_gpu.py", words, cwd=tmp_path))
    config = runs.read_config(tmp_path / "logs/run_seed_1337")
    assert config["settings"]["max_lr"] == 1e-2 and config["settings"]["top_k"] == 1
    assert config["model"]["n_exp"] == 3 and config["model"]["gate"] == "softmax"

    (tmp_path / "train_single_gpu.py").write_text(edited.replace("    top_k = 1\n", "    topk = 1\n"))
    done = run_script(tmp_path / "train_single_gpu.py", *words, cwd=tmp_path, check=2)
    assert "topk is no setting" in done.stderr and "Traceback" not in done.stderr


# -- learning

GOLDEN = {  # every fourth train loss, then val at 0, 10, 20
    True: ([5.5775, 5.0830, 4.4991, 4.0414, 3.7996], [5.5691, 4.2483, 3.7096]),
    False: ([5.5771, 5.0799, 4.4931, 4.0368, 3.7919], [5.5693, 4.2392, 3.6988]),
}


@pytest.mark.parametrize("settings, tolerance", [({"n_exp": 1}, 2e-4), (NOISY, 2e-3)], ids=["dense", "moe"])
def test_golden_curve(train, settings, tolerance):
    """Twenty steps: whoever changes these changed what is computed. (A router may flip a choice on another CPU.)"""
    found = streams(train(max_steps=20, val_loss_every=10, **settings)[1])
    golden_train, golden_val = GOLDEN["n_exp" in settings]
    assert found["train"][1][::4] == pytest.approx(golden_train, abs=tolerance)
    assert found["val"][1] == pytest.approx(golden_val, abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    {}, {"n_exp": 1}, {"top_k": 1, "gate": "softmax"}, {"dtype": "bfloat16"}, {"optimizer": "muon"},
    {"use_bias_balance": True}, {"use_quantile_balance": True}, {"recompute": "blocks", "dropout": 0.1},
], ids=str)
def test_loss_falls(train, settings):
    found = streams(train(**{"max_steps": 60, "max_lr": 1e-2} | settings)[1])
    val = found["val"][1]
    assert val[0] == pytest.approx(math.log(257), abs=0.2) and val[-1] < 2.7
    assert found["val"][0].tolist() == list(range(0, 61, 5)) and len(found["train"][0]) == 60


@pytest.mark.slow
def test_every_stream_is_explained(train):
    """docs/measuring.md has all streams of a run with everything on."""
    Path("rows.jsonl").write_text(json.dumps(ROW))
    _, folder = train(**NOISY, hellaswag_every=5, hellaswag_data="rows.jsonl")
    page = (ROOT / "docs/measuring.md").read_text()
    for stream in streams(folder):
        parts = [part if not part.isdigit() else "{}" for part in stream.split("_")]
        known = "_".join(parts).replace("load_{}_{}", "load_{layer}_{expert}").replace("_{}", "_{layer}")
        assert f"`{known}`" in page, f"{known} is not in docs/measuring.md"


@pytest.mark.slow
def test_validation_is_a_fixed_text_whatever_the_batch_and_the_router_losses(train, shards):
    """val: cross-entropy alone, over the first val_tokens; statistics are those of all its batches."""
    settings = NOISY | {"val_tokens": 352, "max_steps": 1, "eval_capacity": math.inf}
    a = streams(train(**settings, name="a")[1])
    b = streams(train(**settings, name="b", B=1, total_batch_size=256, aux_loss_weight=3.0)[1])
    assert a["val"][1][0] == pytest.approx(b["val"][1][0], rel=1e-6)
    model, _ = weights.open_model("logs/a_seed_1337", torch.device("cpu"))
    loader = DataLoader(shards, "val", B=4, T=32, vocab_size=257)
    x, y = loader.rows_at(0, 11)
    with torch.no_grad():
        loss = model(x, y).ce_loss.item()
    count = model.moe_layers()[0][1].count
    assert a["val"][1][-1] == pytest.approx(loss, abs=1e-5)
    assert a["val_bpb"][1][-1] == pytest.approx(loss / math.log(2), rel=1e-5)  # no end of text in these shards
    assert a["val_max_vio_0"][1][-1] == pytest.approx((count.max() / count.mean() - 1).item(), rel=1e-4)


def test_a_model_that_sees_later_tokens_is_warned_of(train, capsys, monkeypatch):
    assert train()[0] == 0 and "too good to be true" not in capsys.readouterr().out
    mix = MoE.mix
    monkeypatch.setattr(MoE, "mix", lambda moe, x_TD, *args: mix(moe, x_TD, *args) + x_TD.mean(0))
    assert train(name="leaky")[0] == 0 and "too good to be true" in capsys.readouterr().out


def test_the_last_validation_is_also_made_without_capacity(train):
    found = {capacity: streams(train(name=f"of_{capacity}", eval_capacity=capacity)[1]) for capacity in (0.5, math.inf)}
    assert "val_dropless" not in found[math.inf] and found[0.5]["val_dropless"][0].tolist() == [10]
    assert found[0.5]["val_dropless"][1] == found[math.inf]["val"][1][-1] != found[0.5]["val"][1][-1]


@pytest.mark.slow
def test_bits_per_byte_of_gpt2_tokens_made_elsewhere(train, tmp_path):
    """Without meta.json tokens are GPT-2's; end of text has no bytes, and its loss counts."""
    text = (Path(__file__).parent / "data/prose_200kB.txt").read_text("utf-8")
    tokens = np.array(get_tokenizer("gpt2").encode_ordinary(text[:4000]), np.uint16)[: 3 * 4 * 32]
    tokens = np.insert(tokens, 10, 50256)  # the inputs and targets of three batches
    for split in ("train", "val"):
        np.save(tmp_path / f"{split}_000000.npy", tokens)
    settings = {"n_exp": 1, "vocab_size": 50304, "data_root": str(tmp_path), "val_tokens": 384, "max_steps": 1}
    found = streams(train(**settings)[1])
    n_bytes = len(get_tokenizer("gpt2").decode_bytes(tokens[1 : 3 * 4 * 32 + 1].tolist())) - len("<|endoftext|>")
    np.testing.assert_allclose(found["val_bpb"][1], found["val"][1] / np.log(2) * 3 * 4 * 32 / n_bytes, rtol=1e-6)


@pytest.mark.slow
def test_micro_batches_do_not_change_the_run(train):
    """A dense model: the loss over micro-batches is the loss of the big batch."""
    found = [streams(train(n_exp=1, B=B, name=f"b{B}")[1])["train"][1] for B in (8, 4, 1)]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-5)


# -- the same run again: resume = not stopping


@pytest.mark.slow
def test_same_seed_same_log_and_evaluation_leaves_no_trace(train):
    settings = NOISY | {"dropout": 0.1}
    a, b = (train(**settings, name=name)[1] for name in "ab")
    assert lines(a) == lines(b)
    _, c = train(**settings, name="c", sample_from_model_every=2, val_loss_every=3, save_checkpoint_every=4)
    _, d = train(**settings, name="d", val_loss_every=0)
    a, c, d = streams(a), streams(c), streams(d)
    for stream in ("train", "grad_norm", "aux_loss", "router_entropy", "max_vio"):
        assert a[stream][1].tolist() == c[stream][1].tolist() == d[stream][1].tolist(), stream
    assert "val" not in d


@pytest.mark.parametrize("settings", [
    NOISY | {"dropout": 0.1}, *(pytest.param(settings, marks=pytest.mark.slow) for settings in [
        {"n_exp": 1, "schedule": "wsd"}, {"use_bias_balance": True, "sample_from_model_every": 3},
        {"use_quantile_balance": True}, {"optimizer": "muon", "use_aux_loss": True},
        {"use_aux_loss": True, "balance_scope": "step"},
    ])
], ids=str)
def test_a_resumed_run_is_the_run_left_alone(train, settings):
    """Also where the log was cut in the middle of a line, and reaches further than the checkpoint."""
    settings = settings | {"save_checkpoint_every": 3, "keep_checkpoints": 9}
    _, left = train(**settings, name="left")
    _, cut = train(**settings, name="cut")
    for step in (9, 3, 6):
        for path in checkpoint.checkpoints(cut):
            if checkpoint.step_of(path) > step:
                path.unlink()
        with open(cut / "log.txt", "a") as f:
            f.write("11 tra")
        args = trainer.read_args(["--resume", str(cut)])  # no other flag
        assert trainer.run(args) == 0
        assert lines(cut) == lines(left)


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on(train, tmp_path, shards):
    settings = {"max_steps": 3000, "val_loss_every": 0, **NOISY}
    command = [sys.executable, str(ROOT / "train_single_gpu.py"), *flags(tiny(data_root=shards, **settings))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    next(line for line in process.stdout if "step     20 | loss" in line)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    folder = tmp_path / "logs/run_seed_1337"
    assert process.returncode == 130 and f"--resume {Path('logs/run_seed_1337')}" in said
    stopped = checkpoint.step_of(checkpoint.newest(folder))
    assert stopped > 20
    assert trainer.run(trainer.read_args(["--resume", str(folder), "--stop_after", str(stopped + 3)])) == 0
    assert lines(folder) == lines(train(**settings, name="left", stop_after=stopped + 3)[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bench", "compare", "doctor", "hellaswag", "routes", "sample", "sweep",
                                  "train_single_gpu", "weights"])
def test_ctrl_c_while_modules_are_imported_ends_quietly(name, tmp_path):
    command = [sys.executable, str(ROOT / f"{name}.py"), "--help"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=tmp_path)
    time.sleep(0.7)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1].decode()
    assert process.returncode == 130 and "Traceback" not in said and time.monotonic() - began < 2


@pytest.mark.slow
def test_a_branch_starts_from_the_state_of_another_run(train, shards):
    """A stable run of WSD decays from its middle; the branch records its parent and step."""
    settings = {"schedule": "wsd", "decay_steps": 2, "save_checkpoint_every": 5, "max_steps": 12}
    _, stable = train(**settings, name="stable")
    at = checkpoint.step_path(stable, 5)
    words = ["--branch", str(at), "--name", "short", "--max_steps", "8", "--decay_steps", "3"]
    args = trainer.read_args(words)
    assert trainer.run(args) == 0
    branch = runs.read_config("logs/short_seed_1337")
    assert branch["parent"] == {"run": str(at), "step": 5} and branch["settings"]["max_lr"] == 3e-3
    found, there = streams(Path("logs/short_seed_1337")), streams(stable)
    assert found["train"][0].tolist() == [5, 6, 7] and found["train"][1][0] == there["train"][1][5]
    assert found["lr"][1][-1] < there["lr"][1][7]
    with pytest.raises(UserError, match="holds a run"):
        trainer.run(trainer.read_args(words))


# -- how runs end


def test_a_run_that_diverges_says_so(train, capsys):
    code, folder = train(max_lr=1e38, warmup_steps=8, save_checkpoint_every=1, grad_clip=math.inf)
    found = streams(folder)
    (step,), (flag,) = found["diverged"]
    assert code == 3 and flag == 1 and runs.state(runs.read_config(folder), runs.read_log(folder)) == "diverged"
    state = checkpoint.load(checkpoint.newest(folder))
    assert state["step"] <= step and all(value.isfinite().all() for value in state["model"].values())
    assert "lower --max_lr" in capsys.readouterr().out


@pytest.mark.slow
def test_a_full_disk_does_not_end_the_run_but_its_last_checkpoint_must_be_written(train, monkeypatch, capsys):
    real = checkpoint.save

    def full(state, path):
        if state["step"] < full_below:
            raise OSError(28, "No space left on device")
        real(state, path)

    monkeypatch.setattr(checkpoint, "save", full)
    full_below = 10
    code, folder = train(save_checkpoint_every=3, name="a")
    assert code == 0 and len(streams(folder)["train"][0]) == 10
    assert "No space left on device" in capsys.readouterr().out
    full_below = 11
    with pytest.raises(UserError, match="no checkpoint could be written"):
        train(save_checkpoint_every=3, name="b")
    assert len(streams(Path("logs/b_seed_1337"))["train"][0]) == 10


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_log_disk_keeps_the_last_checkpoint(train, monkeypatch):
    real = logger.Run.log

    def log(self, step, streams):
        if step == 7:
            self.file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 - closed by the run
        real(self, step, streams)

    monkeypatch.setattr(logger.Run, "log", log)
    with pytest.raises(OSError, match="No space left"):
        train(save_checkpoint_every=3)
    assert checkpoint.step_of(checkpoint.newest("logs/run_seed_1337")) == 6


# -- around the loop


@pytest.mark.slow
def test_init_from_a_dense_checkpoint_upcycles_it_and_eval_only_reads_it(train, shards, capsys):
    _, dense = train(n_exp=1, name="dense", max_steps=30, max_lr=1e-2)
    inf = {"train_capacity": math.inf, "eval_capacity": math.inf}
    _, upcycled = train(n_exp=4, name="upcycled", init_from=str(dense), max_steps=1, **inf)
    last = streams(dense)["val"][1][-1]
    assert streams(upcycled)["val"][1][0] == pytest.approx(last, abs=1e-4)
    capsys.readouterr()
    args = trainer.Args(**tiny(n_exp=1, data_root=str(shards), init_from=str(dense), eval_only=True, name="x"))
    assert trainer.run(args) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("train loss ") and said[1].startswith(f"val loss {last:.4f} nats per token, ")
    assert not Path("logs/x_seed_1337").exists()


@pytest.mark.slow
def test_samples_and_hellaswag_in_training(train, capsys):
    Path("rows.jsonl").write_text("".join(json.dumps(ROW | {"ind": i}) + "\n" for i in range(6)))
    settings = {"max_steps": 40, "max_lr": 1e-2}
    _, plain = train(**settings, name="plain")
    _, folder = train(**settings, name="evaluated", hellaswag_every=5, hellaswag_data="rows.jsonl",
                      sample_from_model_every=5)
    found = streams(folder)
    assert found["hella"][0].tolist() == list(range(0, 41, 5)) and found["hella"][1][-1] == 1.0
    assert found["hella_bpb"][1][0] == pytest.approx(math.log2(257), abs=0.3)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 40 sample")]
    assert len(said) == 4 and all("Hello, I'm a language model," in line for line in said)
    assert found["train"][1].tolist() == streams(plain)["train"][1].tolist()


@pytest.mark.slow
def test_any_module_with_init_log_and_finish_is_a_tracker(train, monkeypatch, tmp_path):
    (tmp_path / "mytracker.py").write_text(
        "import json\nseen = []\n"
        "def init(project, name, config, id): seen.append((project, name, id))\n"
        "def log(streams, step): seen.append((step, streams['train']) if 'train' in streams else step)\n"
        "def finish(): json.dump(seen, open('seen.json', 'w'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    _, folder = train(tracker="mytracker", max_steps=2, val_loss_every=0)
    (_, name, key), *logged = json.loads(Path("seen.json").read_text())
    assert name == "run_seed_1337" and key == runs.read_config(folder)["tracker_id"]
    assert [step for step, _ in logged] == [0, 1]


def test_a_laptop_is_not_misled(train, capsys):
    """A run of more than a day on a CPU says so, and how a smaller one is started."""
    train(max_steps=10**9, stop_after=1)
    assert "--n_layer" not in capsys.readouterr().out
    train(max_steps=10**9, stop_after=10**9, name="long", max_minutes=1e-9)
    said = capsys.readouterr().out
    assert "on this CPU at least " in said and "warning: for a run of minutes: --n_layer 4" in said


def test_the_schedule_of_the_run_is_logged(train):
    args = trainer.Args(**tiny())
    assert streams(train()[1])["lr"][1] == pytest.approx([optim.learning_rate(step, args) for step in range(10)])


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_single_gpu", "hellaswag", "sample", "routes", "sweep", "weights", "bench"])
def test_the_process_is_set_up_before_torch_is_loaded(script):
    """Idle OpenMP threads must not spin beside another process: the setting is read when torch loads."""
    code = (
        f"import builtins, os, sys\nreal = builtins.__import__\n"
        "def watch(name, *rest, **more):\n"
        "    if name.split('.')[0] == 'torch': assert 'GOMP_SPINCOUNT' in os.environ; raise SystemExit(9)\n"
        "    return real(name, *rest, **more)\n"
        f"builtins.__import__ = watch\nsys.path.insert(0, {str(ROOT)!r})\nimport {script}\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 9
    assert common.DONE == 0


@pytest.mark.slow
def test_edited_defaults_break_no_quick_test(tmp_path):
    """Ten defaults edited as a user edits them, with and without types; in that copy run the quick tests that start
    runs: the defaults of Args reach no others."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(lambda name: (ROOT / name).is_file(), names.split("\0")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    edited = tmp_path / "train_single_gpu.py"
    source = edited.read_text()
    for name, value in {"max_lr": "1e-2", "n_exp": "16", "B": "8", "max_steps": "500", "data_root": '"mine"'}.items():
        source, n = re.subn(rf"^    {name}: .* = \S+", f"    {name} = {value}", source, flags=re.MULTILINE)
        assert n == 1
    typed = "    n_layer: Positive = 4\n    use_aux_loss: bool = True\n    gate: str = 'softmax'\n"
    source = source.replace("    # the run\n", typed + "    top_k = 1\n    use_noisy_top_k = True\n    # the run\n")
    edited.write_text(source)
    users = re.compile(r"^import train_single_gpu|^from train_single_gpu|\(train[,)]", re.MULTILINE)
    tests = [str(path) for path in tmp_path.glob("tests/test_*.py") if users.search(path.read_text())]
    assert len(tests) >= 5
    command = [sys.executable, "-m", "pytest", "-m", "not slow", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:]
