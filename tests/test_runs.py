"""One folder per run: starting, refusing, resuming, changing; reading it back; how it ended. No mistaken identity."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import end, flags, fork, lines, script, streams, tiny

import train_single_gpu as trainer
from lab import checkpoint, runs
from lab.common import UserError


def resume(folder, *words):
    return trainer.run(trainer.read_args(["--resume", str(folder), *words]))


def test_config_json_describes_the_run(train, shards):
    _, folder = train(n_exp=1)
    config = runs.read_config(folder)
    assert config["settings"]["data_root"] == str(shards) and config["model"]["n_exp"] == 1
    assert config["parameters"] == config["active_parameters"] > 0 and config["tokens_per_step"] == 256
    known = {"commit", "torch", "device", "flops_per_token", "data", "tokenizer", "pair_loss", "tracker_id", "started"}
    assert known <= set(config) and config["resumed"] == [] and config["parent"] is None
    assert 1 < config["pair_loss"] < 3  # a walk over eight words


def test_a_folder_that_holds_a_run_is_refused_without_resume(train):
    _, folder = train()
    before = lines(folder)
    with pytest.raises(UserError, match=r"holds a run: --resume logs/run_seed_1337"):
        train()
    (folder / "config.json").unlink()  # a log or a checkpoint alone is a run too
    with pytest.raises(UserError, match="holds a run"):
        train()
    assert lines(folder) == before


def test_resume_takes_the_settings_of_the_run_and_appends_what_changed(train):
    _, folder = train(max_steps=4, use_aux_loss=True, dropout=0.1)
    config = runs.read_config(folder)
    assert resume(folder, "--max_steps", "6", "--B", "8") == 0
    now = runs.read_config(folder)
    assert now["resumed"] == [{"step": 4, "changed": {"max_steps": [4, 6], "B": [4, 8]}}]
    assert {**now, "resumed": []} == config, "written once"
    assert runs.settings_of(now)["max_steps"] == 6 and runs.settings_of(now)["use_aux_loss"]
    assert streams(folder)["train"][0].tolist() == list(range(6))


@pytest.mark.parametrize("changed", [
    {"n_exp": 8}, {"T": 16}, {"top_k": 1}, {"data_seed": 5}, {"seed": 7}, {"max_lr": 1e-2}, {"val_tokens": 128},
], ids=str)
def test_a_setting_that_makes_another_run_is_refused_with_both_values(train, changed):
    _, folder = train(max_steps=2)
    ((name, value),) = changed.items()
    was = runs.read_config(folder)["settings"][name]
    with pytest.raises(UserError, match=f"--{name} is {value}, and .* was made with {was}"):
        resume(folder, *flags(changed))
    if name != "seed":  # another seed has another folder
        with pytest.raises(UserError, match=f"--{name} is {value}"):
            train(max_steps=2, resume="auto", **changed)


def test_auto_continues_a_run_that_has_a_checkpoint_and_starts_any_other(train):
    _, left = train(name="left", max_steps=6)
    _, folder = train(max_steps=6, resume="auto", save_checkpoint_every=3)
    assert lines(folder) == lines(left)
    for path in checkpoint.checkpoints(folder):
        path.unlink()  # killed before its first checkpoint
    (folder / "log.txt").write_text("0 train 9.9\n")
    train(max_steps=6, resume="auto", save_checkpoint_every=3)
    assert lines(folder) == lines(left)
    assert runs.read_config(folder)["resumed"] == [] and runs.read_config(folder)["pair_loss"]
    checkpoint.newest(folder).unlink()
    assert train(max_steps=6, resume="auto", save_checkpoint_every=3)[0] == 0
    assert lines(folder) == lines(left)


def test_other_data_of_the_same_name_is_refused(train, shards, tmp_path):
    """Also where no meta.json tells, and the names and lengths are the same."""
    for name in ("a", "b"):
        shutil.copytree(shards, tmp_path / name)
        (tmp_path / name / "meta.json").unlink()
    path = tmp_path / "b/words_train_000001.npy"
    np.save(path, np.load(path)[::-1].copy())
    _, folder = train(max_steps=2, data_root=str(tmp_path / "a"))
    assert resume(folder, "--max_steps", "3", "--data_root", str(tmp_path / "a")) == 0
    with pytest.raises(UserError, match="holds other data"):
        resume(folder, "--max_steps", "4", "--data_root", str(tmp_path / "b"))
    shutil.rmtree(tmp_path / "a")
    shutil.move(tmp_path / "b", tmp_path / "a")
    with pytest.raises(UserError, match="holds other data"):
        resume(folder, "--max_steps", "4")


def test_a_moved_folder_is_the_same_run(train):
    _, left = train(name="left", save_checkpoint_every=3)
    _, folder = train(save_checkpoint_every=3)
    checkpoint.step_path(folder, 10).unlink()
    moved = Path("elsewhere/renamed")
    shutil.move(folder, moved)
    assert resume(moved) == 0
    assert lines(moved) == lines(left) and not folder.exists()


@pytest.mark.slow
def test_two_runs_never_write_one_folder(train, shards, tmp_path):
    """Neither one log, nor, from two log folders, one folder of checkpoints. A killed run's lock is no obstacle."""
    words = flags(tiny(data_root=shards, max_steps=100_000, checkpoint_dir="ck", save_checkpoint_every=2))
    first = fork(script, "train_single_gpu.py", words, cwd=tmp_path)
    try:
        next(line for line in first.out if "step      5 | loss" in line)
        for other in ({"resume": "auto"}, {"logs_dir": "other_logs"}):
            with pytest.raises(UserError, match="lock is held by another process"):
                train(max_steps=100_000, checkpoint_dir="ck", save_checkpoint_every=2, **other)
    finally:
        first.kill()
        end(first, -9)
    assert not Path("other_logs/run_seed_1337").exists(), "a refused start leaves nothing behind"
    saved = checkpoint.step_of(checkpoint.newest("ck/run_seed_1337"))
    assert resume("logs/run_seed_1337", "--stop_after", str(saved + 2)) == 0


def test_a_refused_start_leaves_nothing_behind(train, tmp_path):
    with pytest.raises(UserError, match="no_shards"):
        train(data_root=str(tmp_path / "no_shards"))
    with pytest.raises(UserError, match="positions"):
        train(name="dense", n_exp=1, max_steps=1)
        train(init_from="logs/dense_seed_1337", T=64)
    assert not Path("logs/run_seed_1337").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"settings": 3}', "\xff"])
def test_a_damaged_config_is_an_error_that_names_it(train, text):
    _, folder = train(max_steps=1)
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"config.json does not describe a run"):
        resume(folder)


def test_reading_logs(tmp_path):
    for name in ("b/x_seed_1", "b/y_seed_2", "c"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "log.txt").write_text("0 val 5.5\n0 train 5.25\n1 tra")
    (tmp_path / "c/log.txt").unlink()
    found = runs.find([tmp_path, tmp_path / "b/x_seed_1/log.txt"])
    assert [path.name for path in found] == ["x_seed_1", "y_seed_2"]
    table = runs.read_log(found[0])
    assert table.to_dict("records") == [
        {"step": 0, "stream": "val", "value": 5.5}, {"step": 0, "stream": "train", "value": 5.25},
    ]
    with pytest.raises(UserError, match="no such folder"):
        runs.find([tmp_path / "missing"])


def log_of(val, steps=None, train=None):
    steps = steps or [100 * i for i in range(len(val))]
    rows = [(step, "val", value) for step, value in zip(steps, val, strict=True)]
    rows += [(step, "train", value) for step, value in enumerate(train or [])]
    return pd.DataFrame(rows, columns=["step", "stream", "value"])


def config_of(**more):
    settings = {"init_from": "scratch", "max_steps": 400, "max_minutes": None}
    return {"settings": settings | more.pop("settings", {}), "resumed": [], "pair_loss": 2.46} | more


@pytest.mark.parametrize("expected, val, more", [
    ("ok", [5.5, 3.0, 2.0, 1.8, 1.7], {}), ("unfinished", [5.5, 3.0, 2.0], {}), ("died", [5.5], {}),
    ("diverged", [5.5, 2.0, 1.8, 1.7, float("nan")], {}), ("diverged", [5.5, 2.0, 1.8, 1.7, 3.0], {}),
    ("regressed", [5.5, 2.0, 1.8, 1.7, 1.85], {}),
    ("stuck", [5.5, 2.6, 2.5, 2.45, 2.4], {"steps": [0, 500, 1000, 1500, 2000]}),
    ("ok", [11.0, 6.2, 5.4, 4.7, 4.3], {"steps": [0, 250, 500, 750, 1000], "pair_loss": 6.5}),  # llm.c's GPT-2: healthy
], ids=str)
def test_how_a_run_ended(expected, val, more):
    """Stuck is judged by the text: pairs alone give 2.46 nats per byte of prose, and 6.5 per GPT-2 token."""
    steps = more.pop("steps", None)
    end = (steps or [400])[-1]
    assert runs.state(config_of(settings={"max_steps": end}, **more), log_of(val, steps)) == expected


def test_spikes_are_counted_once_per_excursion():
    train = [3.0] * 60 + [3.6, 3.7] + [3.0] * 20 + [9.0] + [3.0] * 5
    assert runs.spike_steps(log_of([], [], train)) == [60, 82]


def test_pair_loss_is_that_of_counted_pairs():
    """Against a plain count; text made of pairs alone has the entropy of its next token."""
    rng = np.random.default_rng(0)
    text = np.zeros(50_000, np.uint16)
    for i in range(1, len(text)):  # token t is followed by t+1 or t+2, mod 8
        text[i] = (text[i - 1] + rng.integers(1, 3)) % 8
    assert runs.pair_loss(text[:40_000], text[40_000:], 8) == pytest.approx(np.log(2), abs=0.01)
    train, val = rng.integers(0, 5, 300).astype(np.uint16), rng.integers(0, 6, 50).astype(np.uint16)
    single = np.bincount(train, minlength=6) + 1.0
    losses = []
    for a, b in itertools.pairwise(val):
        after = [int(y) for x, y in itertools.pairwise(train) if x == a]
        p = single[b] / single.sum()
        if after:
            p = max(after.count(b) - 0.75, 0) / len(after) + 0.75 * len(set(after)) / len(after) * p
        losses.append(-np.log(p))
    assert runs.pair_loss(train, val, 6) == pytest.approx(np.mean(losses), rel=1e-9)


@pytest.mark.slow
def test_a_closed_terminal_ends_the_run_with_a_checkpoint(tmp_path, shards):
    """`train | head`: nobody reads any more. The run saves and ends as if it were interrupted."""
    words = flags(tiny(data_root=shards, max_steps=100_000, val_loss_every=0))
    process = fork(script, "train_single_gpu.py", words, cwd=tmp_path)
    next(line for line in process.out if "step      5 | loss" in line)
    process.out.close()
    process.join()
    assert process.exitcode == 130
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "logs/run_seed_1337")) > 5


def test_an_evaluation_is_of_the_run_that_is_named(train, capsys):
    """With the settings of that run, whatever the defaults are, and of its newest checkpoint."""
    _, a = train(name="a", n_exp=1, max_steps=12, max_lr=1e-2)
    _, b = train(name="b", use_aux_loss=True, max_steps=4, val_tokens=128)
    capsys.readouterr()
    for folder in (a, b):
        assert resume(folder, "--eval_only") == 0
        last = streams(folder)["val"][1][-1]
        assert f"val loss {last:.4f} nats per token" in capsys.readouterr().out


def test_a_branch_that_was_killed_before_its_first_checkpoint_starts_from_its_parent_again(train):
    train(name="parent", save_checkpoint_every=5)
    words = ["--branch", "logs/parent_seed_1337", "--name", "child", "--max_steps", "14", "--resume", "auto"]
    assert trainer.run(trainer.read_args(words)) == 0
    child = Path("logs/child_seed_1337")
    left, config = lines(child), runs.read_config(child)
    assert streams(child)["train"][0].tolist() == [10, 11, 12, 13]
    for path in checkpoint.checkpoints(child):
        path.unlink()
    assert trainer.run(trainer.read_args(words)) == 0
    assert lines(child) == left and runs.read_config(child)["parent"] == config["parent"]


def test_a_finished_log_without_checkpoints_is_never_begun_again(train):
    _, folder = train(save_checkpoint=False)
    before = (folder / "log.txt").read_text()
    for resume in ("auto", str(folder)):
        with pytest.raises(UserError, match="no checkpoint to continue from"):
            train(save_checkpoint=False, resume=resume)
    assert (folder / "log.txt").read_text() == before
