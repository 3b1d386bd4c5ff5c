"""identity.py: a number always belongs to the settings it is filed under, whatever is resumed, renamed or edited."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, Forked, flags, lines

import checks
import compare
import identity
import runlog
import train_single_gpu as trainer
from lab import checkpoint, common, optim
from lab.common import UserError
from model import GPT, GPTConfig

ROOT = Path(trainer.__file__).parent


def log_of(name="a", run_id="test", logs_dir="logs"):
    return runlog.log_path(logs_dir, name, run_id, 1337)


def record_of(name="a"):
    return json.loads(log_of(name).with_suffix(".json").read_text())


def start(until, **settings):
    """A trainer in a process of its own, once it has printed `until`."""
    process = Forked(ROOT / "train_single_gpu.py", *flags(TINY_RUN | settings))
    process.read_until(until)
    return process


# -- the settings that count


def test_published_values_are_the_defaults_and_cover_what_counts():
    """Whoever commits an edited default, or a setting without a neutral value, hears of it here."""
    counted = identity.counted_settings(trainer.Args()) | {"dtype": "bfloat16"}  # what auto is on a GPU
    assert counted == identity.PUBLISHED
    every = {name for name, hint in common.hints(trainer.Args).items() if identity.role(hint).counts}
    assert every == set(identity.PUBLISHED)
    # As in the settings of build-gpt2-moe.
    published = {
        "n_exp": 8, "top_k": 2, "stride": 2, "train_capacity": 1.25, "eval_capacity": 2.0, "min_capacity": 4,
        "aux_loss_weight": 0.01, "router_z_loss_weight": 0.001, "switch_tfm_init_scale": 1.0, "max_lr": 6e-4,
        "warmup_steps": 2000, "max_steps": 190_730, "total_batch_size": 524_288, "B": 16, "T": 1024,
    }  # fmt: skip
    assert {name: identity.PUBLISHED[name] for name in published} == published


def test_identity_is_a_function_of_what_counts(shards):
    def of(without=(), **settings):
        return identity.identity(identity.settings_of(trainer.Args(data_root=str(shards), **settings)), without)

    assert of() == of(logs_dir="x", keep_checkpoints=9, device="cpu", name="b", progress="bar", block_size=1024)
    assert len({of(), of(n_exp=1), of(seed=1), of(max_lr=1e-3), of(B=8), of(val_loss_steps=3), of(stride=1)}) == 7
    assert of(without=("seed",), seed=1) == of(without=("seed",), seed=2)
    assert of(n_exp=1, use_aux_loss=True) == of(n_exp=1), "a dense model has no experts to balance"


def test_moving_the_data_is_the_same_run_and_other_data_is_not(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "moved")
    args = trainer.Args(data_root=str(shards)), trainer.Args(data_root=str(tmp_path / "moved"))
    assert identity.settings_of(args[0]) == identity.settings_of(args[1])
    path = tmp_path / "moved" / "words_val_000000.npy"
    path.rename(path.with_name("other_val_000000.npy"))
    (tmp_path / "moved" / "meta.json").unlink()
    assert set(identity.differences(*map(identity.settings_of, args))) == {"data"}


def test_edited_defaults_change_neither_names_nor_identities(shards, monkeypatch):
    """A user edits Args in place: the run is named after what it is, not after what differs from the edited file."""
    edited = {"top_k": 1, "gate": "softmax", "use_aux_loss": True, "n_exp": 16}
    before = trainer.Args(data_root=str(shards), **edited)
    fields = [(name, trainer.Args.__annotations__.get(name, "int"), dataclasses.field(default=value))
              for name, value in edited.items()]  # fmt: skip
    after = dataclasses.make_dataclass("Args", fields, bases=(trainer.Args,))(data_root=str(shards))
    assert identity.run_name(after) == identity.run_name(before) == "moe_top_k_1_aux_loss_gate_softmax_n_exp_16"
    assert identity.settings_of(after) == identity.settings_of(before)


def test_long_names_are_cut_and_still_differ():
    settings = {
        "n_layer": 3,
        "n_head": 3,
        "n_embd": 33,
        "T": 77,
        "max_lr": 1.234e-5,
        "warmup_steps": 12345,
        "dropout": 0.125,
    }
    names = {identity.run_name(trainer.Args(**settings, stride=s, min_lr=lr)) for s in (3, 4) for lr in (1e-6, 2e-6)}
    assert len(names) == 4 and all(len(name) <= identity.LONGEST_NAME for name in names)
    assert identity.run_name(trainer.Args(**settings, max_steps=1)) == identity.run_name(trainer.Args(**settings))


@pytest.mark.parametrize("name", ["a/b", "../../x", "", ".hidden", "ü", "a b"])
def test_names_that_no_reader_takes_are_refused(name):
    with pytest.raises(UserError, match="may hold only letters"):
        identity.run_stem(name, "1", 1)


def test_a_name_is_found_again():
    assert identity.parse_stem(identity.run_stem("moe_aux_loss", "20250101", 42)) == ("moe_aux_loss", "20250101", 42)


# -- starting where something is


def test_the_hint_after_a_name_clash_names_what_differs(train):
    train(name="a")
    with pytest.raises(UserError, match=r"holds this run: pass --resume auto"):
        train(name="a")
    with pytest.raises(
        UserError, match=r"holds another run \(--max_lr 0.003 there, 0.01 here\): pass another --run_id"
    ):
        train(name="a", max_lr=1e-2)


@pytest.mark.slow
def test_another_logs_dir_never_gets_the_other_run(train):
    train(name="a", max_lr=1e-3, logs_dir="logs")
    for settings in ({"max_lr": 1e-1}, {}):
        with pytest.raises(UserError, match=r"--max_lr 0.001, not|which is not there: pass the --logs_dir of that run"):
            train(name="a", logs_dir="elsewhere", resume="auto", **{"max_lr": 1e-3} | settings)
    assert not Path("elsewhere/log_a_test_seed_1337.json").exists()


def test_a_log_that_ends_before_the_checkpoint_is_not_continued(train):
    train(name="a", max_steps=6)
    kept = log_of().read_text().splitlines()[:9]
    log_of().write_text("\n".join(kept) + "\n")
    with pytest.raises(UserError, match="which ends at step"):
        train(name="a", max_steps=8, resume="auto")


@pytest.mark.slow
def test_resume_auto_without_a_checkpoint_keeps_the_log(train, capsys):
    train(name="a", save_checkpoint=False)
    before = log_of().read_text()
    with pytest.raises(UserError, match="--n_layer 2 there, 1 here"):
        train(name="a", n_layer=1, resume="auto")
    assert log_of().read_text() == before
    train(name="a", resume="auto")
    assert Path(f"{log_of()}.1").read_text() == before
    assert f"kept as {log_of()}.1" in capsys.readouterr().out


@pytest.mark.slow
def test_resume_auto_takes_no_variant_with_a_longer_name(train):
    train(name="moe", run_id="20250101", max_steps=4)
    train(name="moe_noisy_top_k", use_noisy_top_k=True, run_id="20250102", max_steps=4)
    _, streams = train(name="moe", run_id="", max_steps=6, resume="auto")
    assert streams["train"][0].tolist() == list(range(6))


def test_resume_auto_passes_over_a_start_that_was_refused(train):
    train(name="moe", run_id="20250101", max_steps=4)
    with pytest.raises(UserError, match="nowhere"):
        train(name="moe", run_id="20250102", data_root="nowhere")
    assert Path("checkpoints/moe_20250102_seed_1337").is_dir()
    _, streams = train(name="moe", run_id="", max_steps=6, resume="auto")
    assert streams["train"][0].tolist() == list(range(6))


@pytest.mark.slow
def test_two_logs_folders_do_not_share_checkpoints(train, shards):
    first = start("step      1 | loss", data_root=shards, max_steps=100_000, logs_dir="a", name="r")
    try:
        with pytest.raises(UserError, match=rf"checkpoints/r_test_seed_1337.*{first.pid}") as error:
            train(logs_dir="b", name="r")
        assert "\n" not in str(error.value)
    finally:
        first.kill()
        first.communicate()


# -- settings that change on resume


@pytest.mark.slow
def test_settings_that_may_change_take_effect_and_are_recorded(train):
    train(name="a", n_exp=1, max_steps=4)
    train(name="a", n_exp=1, max_steps=6, weight_decay=0.9, beta1=0.5, resume="auto")
    groups = checkpoint.load_newest(Path("checkpoints/a_test_seed_1337"))[1]["args"]
    assert groups["weight_decay"] == 0.9
    change = {"step": 4, "settings": {"max_steps": 6, "weight_decay": 0.9, "beta1": 0.5}}
    assert record_of()["changes"] == [change] and record_of()["settings"]["weight_decay"] == 0.1
    train(name="a", n_exp=1, max_steps=8, weight_decay=0.9, beta1=0.5, resume="auto")
    assert record_of()["changes"] == [change, {"step": 6, "settings": {"max_steps": 8}}]


@pytest.mark.slow
def test_a_changed_weight_decay_reaches_the_optimizer(train):
    """From one checkpoint, with and without the change: the next steps differ."""
    for name in ("a", "b"):
        train(name=name, n_exp=1, max_steps=4)
    _, same = train(name="a", n_exp=1, max_steps=8, resume="auto")
    _, changed = train(name="b", n_exp=1, max_steps=8, weight_decay=50.0, resume="auto")
    assert same["train"][1][:5].tolist() == changed["train"][1][:5].tolist()
    assert same["train"][1][-1] != changed["train"][1][-1]


def test_a_resume_that_takes_no_step_changes_nothing(train, capsys):
    train(name="a", max_steps=4)
    record, (saved,) = record_of(), Path("checkpoints/a_test_seed_1337").glob("*.pt")
    stamp = saved.stat().st_mtime_ns
    assert train(name="a", max_steps=4, weight_decay=0.5, dtype="bfloat16", resume="auto")[0] == 0
    assert record_of() == record and saved.stat().st_mtime_ns == stamp
    assert "this run is finished" in capsys.readouterr().out


@pytest.mark.slow
def test_a_branch_is_a_run_of_its_own(train):
    train(name="a", max_steps=6, save_checkpoint_every=3)
    path = "checkpoints/a_test_seed_1337/step_000003.pt"
    with pytest.raises(UserError, match="--n_exp 4, not 8"):
        train(name="a", max_steps=6, resume=path, run_id="fork", n_exp=8)
    _, streams = train(name="a", max_steps=6, max_lr=1e-4, resume=path, run_id="fork")
    assert streams["train"][0].tolist() == [3, 4, 5]
    record = json.loads(log_of(run_id="fork").with_suffix(".json").read_text())
    parent = identity.identity(record_of()["settings"], without=identity.SEEDS)
    assert record["settings"]["parent"] == f"{parent}@3" and record["settings"]["max_lr"] == 1e-4
    train(name="a", max_steps=8, max_lr=1e-4, resume="auto", run_id="fork")
    assert runlog.read(log_of(run_id="fork"))["train"][0].tolist() == [3, 4, 5, 6, 7]


@pytest.mark.slow
def test_branches_of_several_seeds_are_one_group(train):
    for seed in (1, 2):
        train(name="a", n_exp=1, seed=seed, data_seed=seed, max_steps=2)
        path = f"checkpoints/a_test_seed_{seed}/step_000002.pt"
        train(name="a", n_exp=1, seed=seed, data_seed=seed, max_steps=3, resume=path, run_id="fork")
    train(name="a", n_exp=1, seed=3, data_seed=2, max_steps=3, resume=path, run_id="other")  # parent's seed is 2
    groups = [[(run.run_id, run.seed) for run in group] for group in compare.group(runlog.load_runs("logs"))]
    assert sorted(map(sorted, groups)) == [[("fork", 1), ("fork", 2)], [("other", 3)], [("test", 1), ("test", 2)]]


@pytest.mark.slow
def test_eval_only_evaluates_the_run_it_is_told_to(train, shards, capsys):
    _, streams = train(name="a", max_steps=30, max_lr=1e-2)
    capsys.readouterr()
    for resume in ("auto", "checkpoints/a_test_seed_1337"):
        args = trainer.Args(**TINY_RUN | {"data_root": str(shards), "name": "a", "resume": resume, "eval_only": True})
        assert trainer.run(args) == 0
        assert f"val loss {streams['val'][1][-1]:.4f}" in capsys.readouterr().out
    with pytest.raises(UserError, match="--T 64 is more than the 32 positions of the model"):
        trainer.run(dataclasses.replace(args, T=64))


# -- weights from elsewhere

SHAPE = {name: getattr(trainer.Args, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}  # no flags


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{}, SHAPE], ids=["the source's shape", "no shape"])
def test_resuming_does_not_need_the_source_of_the_weights(train, shape):
    train(name="source", max_steps=2)
    shutil.move("checkpoints/source_test_seed_1337", "source")
    train(name="a", init_from="source", max_steps=4, **shape)
    shutil.rmtree("source")
    code, streams = train(name="a", init_from="source", max_steps=6, resume="auto", **shape)
    assert code == 0 and len(streams["train"][0]) == 6


def test_shape_flags_that_the_weights_contradict_are_refused(train):
    train(name="source", max_steps=1)
    with pytest.raises(UserError, match="n_layer 3"):
        train(name="a", init_from="checkpoints/source_test_seed_1337", n_layer=3)


@pytest.mark.slow
def test_settings_of_experts_are_checked_against_the_shape_of_the_weights(train):
    """Not against that of the flags: 3 does not divide 4 x 32, and 4 x 36 it does; 2 layers are not 12."""
    for width in (32, 36):
        train(name=f"source{width}", n_exp=1, n_embd=width, max_steps=1)
    upcycled = SHAPE | {"n_exp": 6, "top_k": 3, "max_steps": 1}
    train(name="a", init_from="checkpoints/source36_test_seed_1337", expert_hidden="iso", **upcycled)
    for wrong, said in (({"expert_hidden": "iso"}, "= 128 / 3"), ({"first_dense": 2}, "first_dense 2 of n_layer 2")):
        with pytest.raises(UserError, match=said):
            train(name="b", init_from="checkpoints/source32_test_seed_1337", **upcycled | wrong)
    with pytest.raises(UserError, match="GB are free"):
        train(name="b", init_from="checkpoints/source32_test_seed_1337", **upcycled | {"n_exp": 10**8})


def test_the_record_tells_the_shape_of_the_weights(train, shards, tmp_path):
    train(name="source", max_steps=1)
    train(name="a", init_from="checkpoints/source_test_seed_1337", max_steps=1, **SHAPE)
    assert record_of()["args"]["n_layer"] == record_of()["config"]["n_layer"] == 2
    assert record_of()["args"]["vocab_size"] == 257


def test_tokens_that_the_weights_do_not_know_are_refused(train, shards, tmp_path):
    shutil.copytree(shards, tmp_path / "gpt2")
    meta = json.loads((shards / "meta.json").read_text()) | {"tokenizer": "gpt2", "vocab_size": 50257}
    (tmp_path / "gpt2" / "meta.json").write_text(json.dumps(meta))
    train(name="source", max_steps=1)
    source = "checkpoints/source_test_seed_1337"
    start = {"name": "a", "data_root": str(tmp_path / "gpt2"), "vocab_size": 50304}
    for wrong in ({}, {"resume": "auto"}, {"eval_only": True}):  # auto: nothing is there to resume
        with pytest.raises(UserError, match=r"was trained on bytes tokens|257 tokens"):
            train(**start, **wrong, init_from=source)
    with pytest.raises(UserError, match=r"was trained on bytes tokens|257 tokens"):
        train(**start, resume=source, eval_only=True)


# -- runs that break, and disks that fill


def test_a_run_that_diverges_where_samples_are_due_says_so(train):
    wild = {"n_exp": 1, "max_lr": 1e38, "warmup_steps": 1, "grad_clip": float("inf")}
    code, streams = train(name="a", sample_from_model_every=1, sample_prompt="ab", **wild)
    assert code == 3 and len(streams["diverged"][0]) == 1


@pytest.mark.slow
def test_a_run_of_skipped_steps_ends(train):
    wild = {"n_exp": 1, "max_lr": 1e38, "warmup_steps": 1, "grad_clip": float("inf"), "on_nonfinite": "skip"}
    code, streams = train(name="a", max_steps=200, **wild)
    assert code == 3 and len(streams["skipped"][0]) == trainer.MOST_SKIPPED_IN_A_ROW
    assert len(streams["diverged"][0]) == 1


@pytest.mark.slow
def test_a_skipped_step_leaves_nothing_for_the_balance_bias(train, monkeypatch):
    """Steps 2 to 4 are not finite and dropped; resumed after them the log is that of the run left alone."""
    real = optim.clip_gradients

    def train_with_skips(first, **settings):
        steps = iter(range(first, 100))

        def clip(model, grad_clip):
            return real(model, grad_clip) * (float("nan") if next(steps) in (2, 3, 4) else 1)

        monkeypatch.setattr(optim, "clip_gradients", clip)
        train(use_bias_balance=True, bias_balance_rate=0.1, on_nonfinite="skip", save_checkpoint_every=5, **settings)

    train_with_skips(name="left", first=0)
    train_with_skips(name="cut", first=0)
    Path("checkpoints/cut_test_seed_1337/step_000010.pt").unlink()
    train_with_skips(name="cut", first=5, resume="auto")
    assert lines(log_of("cut")) == lines(log_of("left"))
    assert runlog.read(log_of("left"))["skipped"][0].tolist() == [2, 3, 4]


@pytest.mark.slow
def test_an_empty_prompt_begins_a_document(train, capsys):
    assert train(name="a", sample_prompt="", sample_from_model_every=5)[0] == 0
    assert "step 5 sample 3:" in capsys.readouterr().out


def test_a_checkpoint_folder_that_cannot_be_written_is_found_at_start(train):
    with pytest.raises(UserError, match=r"--checkpoint_dir|choose another folder"):
        train(name="a", checkpoint_dir="/proc/nowhere")


LOG_OF_3000_BYTES = """
import resource, signal
from lab import common, logger, train_single_gpu

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
real = logger.RunLog.write

def write(*args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, -1))
    try:
        real(*args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))

logger.RunLog.write = write
common.run(train_single_gpu.main)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="limits the size of files by RLIMIT_FSIZE")
def test_a_full_disk_under_the_log_loses_nothing(train, shards):
    Path("full.py").write_text(LOG_OF_3000_BYTES)
    settings = {"max_steps": 60, "n_exp": 1}
    full = Forked("full.py", *flags(TINY_RUN | settings | {"name": "a", "data_root": shards}))
    _, said = full.communicate()
    assert full.wait() == 2 and said.startswith("error: cannot write the log") and said.count("\n") == 1, said
    assert 0 < log_of().stat().st_size <= 3000
    train(**settings, name="a", resume="auto")
    train(**settings, name="left")
    assert lines(log_of("a")) == lines(log_of("left"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP on this system")
@pytest.mark.parametrize("leave", ["hang up", "close the pipe"])
def test_a_terminal_that_closes_saves_a_checkpoint(leave, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = start("step      3 | loss", data_root=shards, max_steps=100_000, name="a")
    if leave == "hang up":
        process.send_signal(signal.SIGHUP)
    else:
        process.stdout.close()
    assert process.wait() == 130
    assert list(Path("checkpoints/a_test_seed_1337").glob("*.pt"))


# -- before anything is built


@pytest.mark.parametrize("wrong, said", [
    ({"seed": 2**64}, "seed"), ({"seed": 2**63}, "seed"), ({"n_embd": "64"}, "n_embd must be int, not '64'"),
    ({"device": "meta"}, "--device meta"), ({"device": "mkldnn"}, "--device"), ({"gate": "relu"}, "gate"),
    ({"n_embd": 100_000_000, "n_head": 1}, "GB are free"), ({"vocab_size": 10**11}, "GB are free"),
    ({"n_exp": 10**8}, "GB are free"), ({"n_layer": 10**8}, "GB are free"), ({"min_lr": 1.0}, "above --max_lr"),
    ({"name": "a/b"}, "--name"), ({"run_id": "a_b"}, "run_id"), ({"switch_tfm_init_scale": float("inf")}, "switch_tfm"),
    ({"resume": "autoo"}, "autoo"),
], ids=str)  # fmt: skip
def test_wrong_settings_are_one_line_and_leave_nothing(wrong, said, train):
    with pytest.raises(UserError, match=said) as error:
        train(**{"name": "x"} | wrong)
    assert "\n" not in str(error.value) and not list(Path().rglob("*.pt")) and not list(Path().rglob("log_*.txt"))


@pytest.mark.parametrize("wrong", [{"n_embd": 100, "n_head": 2}, {"expert_hidden": 100}])
def test_widths_that_cuda_cannot_read_are_refused(wrong):
    config = checks.model_config(trainer.Args(**TINY_RUN | {"n_exp": 4} | wrong))
    on_cuda = common.Machine(torch.device("cuda"), torch.bfloat16, 0, 1, False)
    with pytest.raises(UserError, match="100 is not a multiple of 8"):
        checks.check_widths(config, on_cuda)
    checks.check_widths(config, on_cuda._replace(device=torch.device("cpu")))
    checks.check_widths(config, on_cuda._replace(dtype=torch.float32))


def test_weights_without_qk_norm_are_not_read_into_a_model_with_it(train):
    train(name="source", max_steps=1)
    with pytest.raises(UserError, match="qk_norm"):
        train(name="a", init_from="checkpoints/source_test_seed_1337", qk_norm=True)


def test_settings_without_effect_are_named(train, capsys):
    train(n_exp=1, use_noisy_top_k=True, top_k=1, warmup_steps=50, name="a")
    said = capsys.readouterr().out
    assert "--top_k, --use_noisy_top_k: no effect on a dense model" in said
    assert "--warmup_steps 50 is not below --max_steps 10" in said


@pytest.mark.parametrize(("settings", "said"), [
    ({"balance_scope": "step"}, ["--balance_scope: no effect without --use_aux_loss"]),
    ({"balance_scope": "step", "use_aux_loss": True}, []),
    ({"switch_tfm_init_scale": 0.1, "aux_loss_weight": 0.1}, ["--aux_loss_weight: no", "--switch_tfm_init_scale: no"]),
    ({"recompute": "experts", "n_exp": 1}, ["--recompute experts: no effect on a dense"]),
    ({"warmup_steps": 10}, ["--warmup_steps 10 is not below"]),
], ids=str)  # fmt: skip
def test_settings_without_effect_are_noted(settings, said):
    notes = list(checks.notes(trainer.Args(**TINY_RUN | settings)))
    assert len(notes) == len(said) and all(note.startswith(words) for note, words in zip(notes, said, strict=True))


def test_parameters_are_counted_without_building_the_model():
    tricks = {"n_exp": 3, "stride": 1, "n_shared_exp": 2, "use_noisy_top_k": True}
    narrow = {"n_exp": 8, "expert_hidden": "iso", "first_dense": 1, "stride": 2, "qk_norm": True}
    shared = {
        "n_exp": 4,
        "expert_hidden": 7,
        "n_shared_exp": 2,
        "shared_expert_hidden": 5,
        "use_quantile_balance": True,
    }
    for settings in ({}, {"n_exp": 4}, tricks, {"n_exp": 4, "bias": False}, narrow, shared):
        config = GPTConfig(n_layer=3, n_embd=16, n_head=2, block_size=8, vocab_size=50, **settings)
        assert checks.count_params(config)[0] == sum(p.numel() for p in GPT(config).parameters())


def test_ctrl_c_while_torch_is_imported():
    script = "import common, time\nprint('in', flush=True)\ntime.sleep(600)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, **pipes)  # a fork has torch already
    assert process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == common.INTERRUPTED and said == ""


@pytest.mark.slow
def test_an_interrupt_within_a_validation_is_answered_at_once(train, monkeypatch):
    """The validation is given up and made again on resume; the log is that of a run left alone."""
    real, calls = trainer.DataLoader.batch_at, []

    def batch_at(self, i):
        calls.append(i)
        if len(calls) == 20 + 3:  # in the validation at step 5
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, i)

    settings = {"val_loss_steps": 20, "max_steps": 10}
    with monkeypatch.context() as patch:
        patch.setattr(trainer.DataLoader, "batch_at", batch_at)
        code, streams = train(name="cut", **settings)
    assert code == common.INTERRUPTED and len(calls) == 23 and streams["val"][0].tolist() == [0]
    train(name="cut", resume="auto", **settings)
    train(name="left", **settings)
    assert lines(log_of("cut")) == lines(log_of("left"))


@pytest.mark.slow
def test_an_interrupt_within_a_step_keeps_the_run(shards, tmp_path, monkeypatch):
    """64 micro-batches per step: the step is given up, and resumed the log is that of a run left alone."""
    monkeypatch.chdir(tmp_path)
    settings = {"data_root": str(shards), "B": 1, "total_batch_size": 2048, "max_steps": 4, "val_loss_every": 2}
    real, calls = trainer.seed_noise, []

    def interrupted(device, seed, step, micro_batch):
        calls.append(step)
        if len(calls) == 2 * 64 + 30:
            os.kill(os.getpid(), signal.SIGTERM)
        real(device, seed, step, micro_batch)

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    try:
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "seed_noise", interrupted)
            assert trainer.run(trainer.Args(**TINY_RUN | settings | {"name": "cut"})) == common.INTERRUPTED
        assert len(calls) == 2 * 64 + 30 and Path("checkpoints/cut_test_seed_1337/step_000002.pt").exists()
        for again in ({"name": "cut", "resume": "auto"}, {"name": "left"}):
            assert trainer.run(trainer.Args(**TINY_RUN | settings | again)) == 0
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), handlers, strict=True):
            signal.signal(number, handler)
    assert lines(log_of("cut")) == lines(log_of("left"))
