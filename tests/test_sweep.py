"""The sweep: the table of variants, what it refuses, and real runs of the real trainer at a tiny size."""

import dataclasses
import json
import os
import signal
import sys
import threading
import time

import conftest
import psutil
import pytest
import torch

import sweep
import train_single_gpu
import variants
from lab import common, runs
from lab.common import DONE, INTERRUPTED, USER_ERROR, UserError


def flags(shards, **settings):
    return conftest.flags(conftest.tiny(name=None, seed=None, data_root=shards, **{"max_steps": 3} | settings))


def plan(*flags, variants=("no_moe",), seeds=(1,), **settings):
    return sweep.plan(sweep.Args(variants=variants, seeds=seeds, **settings), [*map(str, flags)])


def test_every_variant_has_its_own_name_colour_and_look():
    tables = (variants.LADDER, variants.NEW, variants.TRAINING, variants.METHODS)
    rows = [row for table in tables for row in table]
    assert len({row.name for row in rows}) == len({row.colour for row in rows}) == len(rows) == len(variants.VARIANTS)
    assert all(len({(row.line, row.marker) for row in table}) == len(table) for table in tables)


def test_runs_are_named_after_variant_rate_and_seed_and_the_rate_goes_to_the_optimizer():
    options = {"variants": ("only_moe", "muon"), "seeds": (1, 2), "rates": (1e-3, 0.02), "data_per_seed": True}
    jobs = plan("--max_lr", "0.5", "--muon_lr", "0.6", "--logs_dir", "a", **options)
    names = ["only_moe_lr_0.001_seed_1", "muon_lr_0.001_seed_1", "only_moe_lr_0.02_seed_1", "muon_lr_0.02_seed_1"]
    assert [job.folder.as_posix() for job in jobs[:4]] == [f"a/{name}" for name in names]
    assert [(job.args.max_lr, job.args.muon_lr) for job in jobs[2:4]] == [(0.02, 0.6), (0.5, 0.02)]
    assert [(job.args.seed, job.args.data_seed) for job in jobs] == [(1, 1)] * 4 + [(2, 2)] * 4


@pytest.mark.slow
def test_the_commands_give_the_trainer_the_settings_of_the_plan():
    for job in plan("--top_k", 3, "--n_exp", 16, "--max_lr", 1e-3, variants=("all",)):
        args = train_single_gpu.read_args(job.command[2:])
        wanted = variants.VARIANTS[args.name].settings
        assert args == job.args and {setting: getattr(args, setting) for setting in wanted} == wanted


@pytest.mark.parametrize(
    ("words", "options", "reason"),
    [
        (["--seed", "5"], {}, "--seed: the sweep sets it"), (["--name=a"], {}, "--name=a: the sweep sets it"),
        (["--n_layer", "0"], {}, str(USER_ERROR)), ([], {"seeds": ()}, "nothing to run"),
        (["--max_step", "5"], {}, str(USER_ERROR)), (["--top_k", "99"], {"variants": ("only_moe",)}, str(USER_ERROR)),
        (["--use_noisy_top_k"], {"variants": ("only_moe", "noisy_top_k")}, "are the same run"),
    ],
)
def test_refused_before_anything_starts(words, options, reason):
    with pytest.raises((UserError, SystemExit), match=reason):
        plan(*words, **options)


def test_only_visible_gpus_are_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sweep.slots_of(sweep.Args()) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-b")
    assert sweep.slots_of(sweep.Args(jobs=3)) == ["2", "GPU-b", "2"]
    assert sweep.slots_of(sweep.Args(gpus=("GPU-b",))) == ["GPU-b"]
    with pytest.raises(UserError, match="--gpus 0: not among the visible GPUs"):
        sweep.slots_of(sweep.Args(gpus=("0",)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert sweep.slots_of(sweep.Args(jobs=2)) == [None, None]


def write_run(job, log, data="ab", **settings):
    """The folder of a job as an earlier run would have left it, with its settings but for those given."""
    job.folder.mkdir(parents=True)
    config = {"settings": dataclasses.asdict(job.args) | settings, "resumed": [], "data": data}
    (job.folder / "config.json").write_text(json.dumps(config))
    (job.folder / "log.txt").write_text(log)

ENDED = "0 val 5.5\n2 train 5\n3 val 5.25\n"


@pytest.mark.parametrize(
    ("log", "checkpoint", "state"),
    [
        (ENDED, "step_000003.pt", "done"), (ENDED, "", "done"), (ENDED[:-3], "", "waiting"), ("", "", "waiting"),
        (ENDED, "step_000002.pt", "waiting"),  # stopped within its last evaluation
        ("1 train 5\n2 train 5\n", "", "done"), ("0 val 5\n1 train nan\n1 diverged 1\n", "", "diverged"),
    ],
)
def test_finished_and_diverged_runs_are_known(shards, tmp_path, log, checkpoint, state):
    (job,) = plan(*flags(shards, logs_dir=tmp_path))
    write_run(job, log, device="mps", B=1, max_steps=2)  # which may change
    (job.folder / checkpoint).touch()
    sweep.look_at(job, "ab")
    assert job.state == state


def test_a_run_of_other_settings_or_data_refuses_the_sweep(shards, tmp_path):
    other = ({"n_embd": 16}, {"data_seed": 7}, {"data": "0123"}, {})
    reasons = ("--n_embd is 32, and .* was made with 16", "--data_seed is 1337, and .* was made with 7",
               "on other data", "at step 5 already")
    jobs = plan(*flags(shards, logs_dir=tmp_path), variants=("no_moe",), seeds=(1, 2, 3, 4))
    for job, settings, reason, step in zip(jobs, other, reasons, (1, 1, 1, 5), strict=True):
        write_run(job, f"{step} train 5\n", **settings)
        with pytest.raises(UserError, match=reason):
            sweep.look_at(job, "ab")


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call(*words) -> (exit code, stdout, stderr): the sweep of seed 1 in this process, in a folder of its own."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["sweep.py", "--seeds", "1", *words])
        with pytest.raises(SystemExit) as end:
            common.run(sweep.main)
        return end.value.code, *capsys.readouterr()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def fake_jobs(tmp_path, *programs):
    """Jobs that run Python programs instead of the trainer."""
    jobs = plan("--logs_dir", tmp_path, seeds=range(len(programs)))
    return [dataclasses.replace(jobs[i], command=[sys.executable, "-c", programs[i]]) for i in range(len(programs))]


def test_a_run_ends_as_its_exit_code_says_and_sees_its_gpu_alone(call, tmp_path, capsys):
    says = "import os; print(os.environ['CUDA_VISIBLE_DEVICES']); raise SystemExit"
    jobs = fake_jobs(tmp_path, *[f"{says}({code})" for code in (0, 3, 130, 2)], "import os; os.kill(os.getpid(), 9)")
    assert not sweep.run_here(jobs, ["GPU-b"])
    assert [job.state for job in jobs] == ["done", "diverged", "interrupted", "failed", "failed"]
    assert jobs[0].out.read_text().endswith("\nGPU-b\n")
    assert f"failed with exit code 2: GPU-b (all of it: {jobs[3].out}); 1 left" in capsys.readouterr().out


def test_a_second_ctrl_c_does_not_wait(call, tmp_path):
    (job,) = fake_jobs(tmp_path, "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)")
    before = psutil.Process().children()  # the fork server of another test
    for seconds in (1, 2):
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        sweep.run_here([job], [None])
    assert psutil.wait_procs(set(psutil.Process().children()) - set(before), timeout=60)[1] == []


@pytest.mark.slow
def test_dry_run_prints_commands_and_cost_and_starts_nothing(tmp_path):
    words = ("--max_steps", "5000", "--n_layer", "2", "--jobs", "2", "--tok_per_sec", "1e6", "--dry_run")
    out = conftest.run_script("sweep.py", *words, "--seeds", "1", cwd=tmp_path, check=DONE).stdout
    assert out.count("--max_steps 5000 --n_layer 2") == out.count("--resume auto") == len(variants.VARIANTS)
    hours = len(variants.VARIANTS) * 5000 * 524_288 / 1e6 / 3600
    assert f"{hours:.3g} hours one after another, {hours / 2:.3g} with 2 at a time" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_others_run_when_one_fails_and_the_same_command_continues(call, shards, tmp_path):
    words = ("--variants", "only_moe", "no_moe", *flags(shards))
    held_folder, other = tmp_path / "logs" / "only_moe_seed_1", tmp_path / "logs" / "no_moe_seed_1"
    with common.lock(held_folder / "lock", ""):  # as another process that trains there
        code, out, err = call(*words)
    assert code == USER_ERROR and "1 of 2 runs did not finish, first only_moe_seed_1 with exit code 2" in err
    assert "held by another process" in err and "no_moe_seed_1: done" in out
    first = (other / "log.txt").read_text()
    code, out, err = call(*words)
    assert code == DONE and out.count("running") == 1 and (other / "log.txt").read_text() == first, err


@pytest.mark.slow
def test_stopped_and_preempted_runs_continue_with_the_log_of_a_run_left_alone(call, shards, tmp_path):
    """Ctrl-C, then the same command through submitit's local executor, whose job is pre-empted and queued again."""
    words, ours = flags(shards, max_steps=250, val_loss_every=50), tmp_path / "logs/only_moe_seed_1"
    command = ["--seeds", "1", "--variants", "only_moe", *words]

    def wait_for_step(step):
        while not (ours / "log.txt").exists() or not runs.read_log(ours).step.max() >= step:
            assert process.is_alive()
            time.sleep(0.05)

    process = conftest.fork(conftest.script, "sweep.py", command)
    wait_for_step(5)
    os.kill(process.pid, signal.SIGINT)
    assert "only_moe_seed_1: interrupted" in conftest.end(process, INTERRUPTED)

    slurm = ["--slurm", "cluster=local", "timeout_min=30", "slurm_partition=any"]
    process = conftest.fork(conftest.script, "sweep.py", [*command, *slurm])
    wait_for_step(runs.read_log(ours).step.max() + 5)
    children = psutil.Process(process.pid).children(recursive=True)
    next(child for child in children if "submitit.core._submit" in child.cmdline()).send_signal(signal.SIGUSR2)
    assert "only_moe_seed_1: done" in conftest.end(process)

    (alone,) = plan(*words, "--logs_dir", "alone", variants=("only_moe",))
    assert train_single_gpu.run(alone.args) == DONE
    first, second = (resumed["step"] for resumed in runs.read_config(ours)["resumed"])
    assert 0 < first < second < 250 and conftest.lines(ours) == conftest.lines(alone.folder)


def test_wrong_parameters_of_submitit_are_refused(shards, tmp_path):
    for words in (["timeout_min"], ["cluster=local", "slurm_foo=3"]):
        with pytest.raises(UserError, match="--slurm needs name=value"):
            sweep.run_on_cluster(plan(*flags(shards, logs_dir=tmp_path)), words)
