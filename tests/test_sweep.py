"""The sweep: its table of variants, what it refuses, and real runs of the real trainer at a tiny size."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import pytest

import common
import runlog
import sweep
import train_single_gpu
from common import lock

ROOT = Path(__file__).resolve().parents[1]
TINY = "--n_layer 2 --n_head 2 --n_embd 16 --n_exp 4 --vocab_size 257 --B 2 --T 16 --total_batch_size 32"
QUIET = "--val_loss_steps 1 --sample_from_model_every 0 --hellaswag_every 0 --warmup_steps 1 --device cpu"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        np.save(folder / f"random_{split}_000000.npy", rng.integers(0, 256, 20_000).astype(np.uint16))
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "bytes", "vocab_size": 257, "eot": 256}))
    return folder


def train_flags(shards, *more):
    return ["--", "--data_root", str(shards), *TINY.split(), *QUIET.split(), *more]


def start(folder, *argv):
    """The sweep as a process in `folder`, one thread a run."""
    command = [sys.executable, str(ROOT / "sweep.py"), *argv]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call(*argv) is the sweep in this process, in a folder of its own: (what it printed, its error or None)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["sweep.py", *argv])
        error = None
        try:
            sweep.main()
        except common.UserError as raised:
            error = str(raised)
        return capsys.readouterr().out, error

    return call


def wait_for(condition, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def steps_logged(folder):
    logs = folder.glob("logs/log_*.txt")
    return [max((steps[-1] for steps, _ in runlog.read(log).values()), default=0) for log in logs]


# ---- the table


def test_every_variant_has_its_own_log_name_colour_and_look():
    runs = [train_single_gpu.Args(**variant.settings) for variant in sweep.VARIANTS.values()]
    assert len({train_single_gpu.variant_name(args) for args in runs}) == len(runs) == len(sweep.VARIANTS)
    assert len({variant.colour for variant in sweep.VARIANTS.values()}) == len(sweep.VARIANTS)
    assert len({(variant.line, variant.marker) for variant in sweep.PUBLISHED}) == len(sweep.PUBLISHED)
    assert len({(variant.line, variant.marker) for variant in sweep.NEW}) == len(sweep.NEW)


@pytest.mark.parametrize("name", sweep.VARIANTS)
def test_a_runs_variant_is_found_by_its_settings(name):
    flags = sweep.as_flags(sweep.VARIANTS[name].settings)
    if name != "no_moe":
        flags += ["--n_exp", "4", "--n_embd", "64"]  # neither makes another variant
    args = json.loads(json.dumps(asdict(common.parse(train_single_gpu.Args, flags))))
    run = runlog.Run("any name", "a", 1, {}, {"args": args}, Path("log"))
    assert sweep.variant_of(run).name == name
    args["aux_loss_weight"], args["top_k"] = 0.5, 3
    assert name == "no_moe" or sweep.variant_of(run) is None


def test_published_names_are_known():
    names = [path.split(",")[0] for path in (ROOT / "results/published/curves.csv").read_text().splitlines()[1:]]
    runs = [runlog.Run(name, "a", 1, {}, {}, Path("log")) for name in set(names)]
    assert {sweep.variant_of(run).name for run in runs} == {variant.name for variant in sweep.PUBLISHED}


def test_equal_active_parameters_of_the_shared_expert():
    settings = [sweep.VARIANTS[name].settings for name in ("only_moe", "shared_expert")]
    two_routed, one_shared = (sweep.flops_per_token(train_single_gpu.Args(**fields)) for fields in settings)
    assert two_routed == one_shared


# ---- what is said before anything starts


def test_dry_run(call, tmp_path):
    out, error = call("--dry_run", "--tok_per_sec", "1e6", "--jobs", "2", "--", "--max_steps", "5000")
    assert error is None
    commands = [line for line in out.splitlines() if "train_single_gpu.py" in line]
    assert len(commands) == 18 * 3 and all("--max_steps 5000" in line and "--resume auto" in line for line in commands)
    tokens = 18 * 3 * 5000 * 524_288
    assert f"{tokens:9.3g}" in out and f"{tokens / 1e6 / 3600 / 2:.2f} hours on the clock with 2 at once" in out
    dense = next(line for line in out.splitlines() if line.startswith("no_moe"))
    assert math.isclose(float(dense.split()[4]), 5000 * 524_288 * 855e6, rel_tol=0.01)  # FACTS: 855 MFLOP a token
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--", "--B", "0"], "--B must be at least 1"),
        (["--variants", "moe"], "no variant 'moe'"),
        (["--", "--use_noisy_top_k"], "are the same run with these flags"),
        (["--jobs", "0"], "--jobs"),
        (["--run_id", "a_b"], "--run_id"),
        (["--slurm", "partition"], "write it as partition=gpu"),
        (["--slurm", "partition=a,time=soon"], "time is minutes or"),
    ],
)
def test_refused(call, tmp_path, argv, message):
    assert message in call(*argv)[1]
    assert not list(tmp_path.glob("logs/log_*"))


def test_an_unknown_train_flag_is_refused_in_the_trainers_words(tmp_path):
    process = start(tmp_path, "--", "--max_step", "5")
    assert "did you mean --max-steps? (see train_single_gpu.py --help)" in process.communicate()[1]
    assert process.returncode == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "minutes"), [("90", 90), ("1:30:00", 90), ("0:00:30", 1), ("2-12:00:00", 3600)])
def test_slurm_time(text, minutes):
    assert sweep.slurm_minutes(text) == minutes


# ---- real runs


def test_finished_runs_are_skipped_and_failures_passed_over(call, tmp_path, shards):
    argv = ("--variants", "no_moe", "only_moe", "--seeds", "1", "--jobs", "2", *train_flags(shards, "--max_steps", "3"))
    blocked = runlog.log_path(tmp_path / "logs", "moe_n_exp_4", "sweep", 1)
    with lock(blocked, ""):  # as another process that writes this log would
        out, error = call(*argv)
    assert "1 of 2 runs did not finish: only_moe seed 1 failed" in error and "is being written" in error
    assert "no_moe seed 1: done" in out
    dense = runlog.log_path(tmp_path / "logs", "no_moe", "sweep", 1)
    first = dense.read_text()
    out, error = call(*argv)
    assert error is None and "only_moe seed 1: running" in out and "no_moe seed 1: running" not in out
    assert dense.read_text() == first
    assert runlog.read(blocked)["val"][0][-1] == 3


def test_ctrl_c_leaves_runs_that_resume(call, tmp_path, shards):
    argv = ("--variants", "no_moe", "--seeds", "1", "--jobs", "1", *train_flags(shards, "--max_steps", "2000"))
    process = start(tmp_path, *argv)
    wait_for(lambda: any(step > 5 for step in steps_logged(tmp_path)))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 130 and "no_moe seed 1: interrupted" in out, err
    (done,) = steps_logged(tmp_path)
    assert done < 1999
    argv = [*argv[:-1], str(done + 3)]
    out, error = call(*argv)
    assert error is None and "no_moe seed 1: done" in out
    steps = runlog.read(next(tmp_path.glob("logs/log_*.txt")))["train"][0]
    assert steps.tolist() == list(range(done + 3))


def test_a_background_sweep_stops_while_its_runs_start(tmp_path, shards):
    argv = ("--variants", "no_moe", "--seeds", "1", "--jobs", "1", *train_flags(shards, "--max_steps", "1000000"))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts what ends in &
    try:
        process = start(tmp_path, *argv)
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for(psutil.Process(process.pid).children)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "no_moe seed 1: interrupted" in out, err


def test_a_signal_while_a_run_starts_reaches_it(call, shards, monkeypatch):
    launch, processes = sweep.launch, []

    def signalled(*args):
        processes.append(launch(*args))
        os.kill(os.getpid(), signal.SIGTERM)
        return processes[-1]

    monkeypatch.setattr(sweep, "launch", signalled)
    argv = ("--variants", "no_moe", "--seeds", "1", "2", "--jobs", "1", *train_flags(shards, "--max_steps", "1000000"))
    try:
        with pytest.raises(KeyboardInterrupt):
            call(*argv)
        assert [process.returncode is not None for process in processes] == [True]
    finally:
        for process in processes:
            process.kill()


def test_a_second_ctrl_c_does_not_wait(tmp_path, shards):
    argv = ("--variants", "no_moe", "--seeds", "1", "--jobs", "1", *train_flags(shards, "--max_steps", "1000000"))
    process = start(tmp_path, *argv)
    wait_for(lambda: any(step > 5 for step in steps_logged(tmp_path)))
    (run,) = psutil.Process(process.pid).children()
    run.suspend()  # it can neither save nor leave
    process.send_signal(signal.SIGINT)
    while "stopping: 1 runs" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "no_moe seed 1: interrupted" in out, err
    assert not run.is_running()


def test_a_diverged_run_is_recorded_and_passed_over(call, shards):
    argv = ("--variants", "no_moe", "--seeds", "1", *train_flags(shards, "--max_steps", "20", "--max_lr", "1e30"))
    for started in (True, False):
        out, error = call(*argv)
        assert error is None and "no_moe seed 1: diverged" in out and ("running" in out) == started


def test_submitit_job_resumes_after_preemption(tmp_path, shards):
    """The local executor for real: the job is told that it is pre-empted, saves, is queued again and finishes."""
    slurm = ("--slurm", "partition=any,time=30", "--cluster", "local")
    run = ("--variants", "no_moe", "--seeds", "1", *slurm, *train_flags(shards, "--max_steps", "400"))
    process = start(tmp_path, *run)
    wait_for(lambda: any(step > 5 for step in steps_logged(tmp_path)))
    children = psutil.Process(process.pid).children(recursive=True)
    job = next(child for child in children if "submitit.core._submit" in child.cmdline())
    job.send_signal(signal.SIGUSR2)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "no_moe seed 1: done" in out, err
    assert "Requeued job" in "".join(path.read_text() for path in tmp_path.glob("logs/submitit/*_log.*"))
    steps = runlog.read(next(tmp_path.glob("logs/log_*.txt")))["train"][0]
    assert steps.tolist() == list(range(400))


@pytest.mark.skipif(shutil.which("sbatch") is not None, reason="a SLURM cluster is here")
def test_without_slurm_the_user_is_told(call, shards):
    assert call("--slurm", "partition=a", *train_flags(shards))[1].startswith("--slurm partition=a: ")
