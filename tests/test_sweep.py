"""The sweep: its table of variants, what it refuses, and real runs of the real trainer at a tiny size."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import pytest
import torch
from conftest import Forked

import identity
import runlog
import slurm
import sweep
import train_single_gpu
from lab import checkpoint, common
from lab.common import AboveZero, Positive, UserError, lock
from model import GATES

ROOT = Path(__file__).resolve().parents[1]
TINY = "--n_layer 2 --n_head 2 --n_embd 16 --n_exp 4 --vocab_size 257 --B 2 --T 16 --total_batch_size 32"
ONE = ("--variants", "no_moe", "--seeds", "1")
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


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call(*argv) is the sweep in this process, in a folder of its own: (what it printed, its error or None)."""
    monkeypatch.setattr(slurm, "launch", Forked.launch)
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


def wait_for(condition, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def steps_logged(folder):
    logs = folder.glob("logs/log_*.txt")
    return [max((steps[-1] for steps, _ in runlog.read(log).values()), default=0) for log in logs]


@pytest.fixture
def edited(monkeypatch):
    """train_single_gpu.Args with other defaults, as a user edits them in the file."""

    @dataclass
    class Args(train_single_gpu.Args):
        n_exp: Positive = 16
        top_k: Positive = 1
        gate: Literal[tuple(GATES)] = "softmax"
        use_aux_loss: bool = True
        train_capacity: AboveZero = 3.0

    monkeypatch.setattr(train_single_gpu, "Args", Args)


def make_jobs(*argv):
    return sweep.make_jobs(*sweep.parse([*argv]))


def write_run(job, lines, **settings):
    """The log of a job as another run would have left it, with its settings but for those given, and a checkpoint."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    job.log.write_bytes(lines.encode() if isinstance(lines, str) else lines)
    record = {"settings": identity.settings_of(job.args) | settings, "changes": [], "identity": "0123456789ab"}
    job.log.with_suffix(".json").write_text(json.dumps(record))
    job.folder.mkdir(parents=True, exist_ok=True)
    checkpoint.step_path(job.folder, job.args.max_steps).touch()


# ---- the table


TABLES = (sweep.LADDER, sweep.NEW, sweep.TRAINING, sweep.METHODS)


def test_every_variant_has_its_own_log_name_colour_and_look():
    assert len(sweep.by_log_name()) == len(sweep.VARIANTS) == len([v for table in TABLES for v in table])
    assert len({variant.colour for variant in sweep.VARIANTS.values()}) == len(sweep.VARIANTS)
    for table in TABLES:
        assert len({(variant.line, variant.marker) for variant in table}) == len(table)


def run_with(settings, name="any name"):
    return runlog.Run(name, "a", 1, {}, {"settings": json.loads(json.dumps(settings)), "args": {}}, Path("log"))


@pytest.mark.slow
@pytest.mark.parametrize("name", sweep.VARIANTS)
@pytest.mark.parametrize("defaults", ["published", "edited"])
def test_a_runs_variant_is_found_by_its_settings(name, defaults, request):
    if defaults == "edited":
        request.getfixturevalue("edited")
    dense = sweep.is_dense(sweep.VARIANTS[name].settings)
    flags = [] if dense else ["--n_exp", "4"]  # how many there are makes no other variant
    flags += ["--n_embd", "72", "--max_lr", "0.1", "--aux_loss_weight", "0.01"]
    (job,) = make_jobs("--variants", name, "--seeds", "1", "--", *flags)
    settings = identity.counted_settings(job.args)
    assert sweep.variant_of(run_with(settings)).name == name
    for other in ({"top_k": 3}, {"stride": 1}, {"aux_loss_weight": 1.0}, {"bias_balance_rate": 0.1}):
        found = sweep.variant_of(run_with(settings | other))
        assert (found.name if found else None) == (name if dense else None)
    for other in ({"mlp_init_scale": 0.1}, {"qk_norm": True, "schedule": "wsd"}):
        assert sweep.variant_of(run_with(settings | other)) is None
    assert sweep.variant_of(run_with(settings | {"muon_lr": 0.1, "decay_steps": 9, "dropout": 0.1})).name == name


def test_a_run_that_is_no_variant_is_labelled_with_its_settings():
    (job,) = make_jobs("--variants", "aux_only", "--seeds", "1", "--", "--stride", "1", "--n_layer", "2")
    run = run_with(identity.counted_settings(job.args))
    assert sweep.look_of(run).label == "MoE, stride 1, aux loss" and sweep.look_of(run).name == run.name
    run = run_with({"n_exp": 1, "mlp_init": "switch_fc"})
    assert sweep.look_of(run).label == "dense, mlp init switch-fc"


def test_the_variants_of_runs_from_before_identities_are_known(edited):
    runs = runlog.load_runs(ROOT / "results/cpu_small")
    assert {sweep.variant_of(run).name for run in runs} == {variant.name for variant in sweep.LADDER + sweep.NEW}
    labels = {sweep.look_of(run).label for run in runlog.load_runs(ROOT / "results/cpu_small_lr_0.016")}
    assert "MoE, aux loss, router z loss, router full prec" in labels and len(labels) == 10


@pytest.mark.slow
def test_edited_defaults_change_neither_names_nor_variants(request):
    def look():
        jobs = make_jobs("--seeds", "1")
        moe = ["n_exp", *train_single_gpu.Args.moe_fields()]
        return [(job.log.name, [getattr(job.args, name) for name in moe if job.args.n_exp > 1]) for job in jobs]

    published = look()
    request.getfixturevalue("edited")
    assert look() == published
    (job,) = make_jobs("--variants", "only_moe", "--seeds", "1", "--", "--stride", "1", "--n_exp", "4")
    assert {"--top_k", "--no_use_aux_loss", "--gate"} <= set(job.command), "as the trainer has the edited defaults"
    assert (job.args.top_k, job.args.stride, job.args.n_exp) == (2, 1, 4), "flags after -- apply to every run"
    (job,) = make_jobs("--variants", "top1", "--seeds", "1", "--", "--top_k", "4")
    assert job.args.top_k == 1, "and the settings of the variant win over them"


def test_published_names_are_known():
    names = [path.split(",")[0] for path in (ROOT / "results/published/curves.csv").read_text().splitlines()[1:]]
    runs = [runlog.Run(name, "a", 1, {}, {}, Path("log")) for name in set(names)]
    assert {sweep.variant_of(run).name for run in runs} == {variant.name for variant in sweep.LADDER}


def flops(name, **settings):
    return sweep.flops_per_token(train_single_gpu.Args(**{"n_exp": 8} | sweep.VARIANTS[name].settings | settings))


def test_variants_of_equal_flops():
    """But for the routers: 6 FLOPs per weight, 6 layers of 768 x n_exp weights, and the biases of narrow experts."""
    assert flops("only_moe") == flops("shared_expert")
    router, output_bias = 6 * 6 * 768 * 8, 6 * 6 * 768
    assert flops("half_width") == flops("no_moe") + router + output_bias
    assert flops("shared_half_width") == flops("half_width")
    assert flops("quarter_width") == flops("no_moe") + 2 * router + 3 * output_bias


@pytest.mark.parametrize("each", [True, False])
def test_the_order_of_the_data_follows_the_seed_on_request(each):
    jobs = make_jobs("--variants", "no_moe", "only_moe", "--seeds", "1", "2", *["--data_per_seed"][: int(each)])
    assert [job.args.data_seed for job in jobs] == ([1, 1, 2, 2] if each else [1337] * 4)
    assert all(("--data_seed" in job.command) == each for job in jobs) and len({job.log for job in jobs}) == 4


# ---- errors before anything starts


@pytest.mark.slow
def test_dry_run(call, tmp_path):
    out, error = call("--dry_run", "--seeds", "1", "--tok_per_sec", "1e6", "--jobs", "2", "--", "--max_steps", "5000")
    assert error is None
    commands = [line for line in out.splitlines() if "train_single_gpu.py" in line]
    n_runs = len(sweep.VARIANTS)
    assert len(commands) == n_runs and all("--max_steps 5000" in line and "--resume auto" in line for line in commands)
    tokens = n_runs * 5000 * 524_288
    assert f"{tokens:9.3g}" in out and f"{tokens / 1e6 / 3600 / 2:.2f} hours on the clock with 2 at once" in out
    dense = next(line for line in out.splitlines() if line.startswith("no_moe"))
    assert math.isclose(float(dense.split()[5]), 5000 * 524_288 * 855e6, rel_tol=0.01)  # 855 MFLOP per token
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_help_lists_the_variants_and_the_double_dash():
    out, _ = Forked(ROOT / "sweep.py", "--help").communicate()
    assert all(name in out for name in sweep.VARIANTS) and "What follows `--`" in out


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        *(("90", 90), ("30:00", 30), ("0:30", 1), ("1:30:00", 90), ("0:00:30", 1)),
        *(("2-12", 3600), ("1-0", 1440), ("1-0:30", 1470), ("2-12:00:00", 3600), ("2-12:00:01", 3601)),
    ],
)
def test_slurm_time(text, minutes):
    assert slurm.minutes_of(text) == minutes


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "1-", "-5", "1-2-3", "1.5", "0", "0:00", "1-1:2:3:4", "2h"])
def test_other_slurm_times_are_refused(text):
    with pytest.raises(ValueError, match="time"):
        slurm.minutes_of(text)


# ---- GPUs


@pytest.mark.parametrize(
    ("visible", "count", "gpus", "slots"),
    [
        (None, 0, (), [None]),
        (None, 2, (), ["0", "1"]),
        ("2,3", 2, (), ["2", "3"]),
        ("GPU-a, GPU-b", 2, (), ["GPU-a", "GPU-b"]),
        ("2,-1,3", 1, (), ["2"]),
        ("", 0, (), [None]),
        ("2,3", 2, ("3", "3"), ["3", "3"]),
        ("2,3", 2, ("0",), UserError),
        (None, 2, ("2",), UserError),
        ("", 0, ("0",), UserError),
    ],
)
def test_only_visible_gpus_are_used(monkeypatch, visible, count, gpus, slots):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if slots is UserError:
        with pytest.raises(UserError, match=f"--gpus {gpus[0]} is not available"):
            sweep.slots_of(sweep.Args(gpus=gpus))
    else:
        assert sweep.slots_of(sweep.Args(gpus=gpus)) == slots


def test_a_run_sees_the_gpu_of_its_slot_alone(tmp_path):
    command = [sys.executable, "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"]
    job = sweep.Job("no_moe", command, train_single_gpu.Args(), tmp_path / "log_a_b_seed_1.txt", tmp_path)
    assert sweep.start(job, "GPU-b", 1).process.wait() == 0
    assert job.log.with_suffix(".out").read_text() == "GPU-b\n"


# ---- runs that are there already


def tiny_jobs(shards, *more, variants=("no_moe",), seeds=("1",)):
    return make_jobs("--variants", *variants, "--seeds", *seeds, *train_flags(shards, "--max_steps", "3", *more))


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


FINISHED = "0 val 5.5\n2 train 5\n3 val 5\n"


def test_finished_and_diverged_runs_of_equal_settings_are_known(shards, in_folder):
    one, two, three = tiny_jobs(shards, seeds=("1", "2", "3"))
    write_run(one, FINISHED)
    write_run(two, "0 val 5\n1 train nan\n1 diverged 1\n")
    write_run(three, "0 val 5\n1 train 5\n")
    jobs = tiny_jobs(shards, "--device", "auto", "--progress", "lines", "--sample_prompt", "x", seeds=("1", "2", "3"))
    assert [job.state for job in jobs] == ["done", "diverged", "waiting"]


@pytest.mark.slow
@pytest.mark.parametrize("lines", [FINISHED, "0 val 5\n1 diverged 1\n", "0 val 5\n1 train 5\n"])
@pytest.mark.parametrize("other", [{"n_embd": 32}, {"dropout": 0.5}, {"val_loss_steps": 7}, {"data": "0123"}])
def test_a_run_of_other_settings_refuses_the_sweep(shards, in_folder, lines, other):
    (job,) = tiny_jobs(shards)
    write_run(job, lines, **other)
    name = next(iter(other))
    if name == "val_loss_steps" and "train 5" in lines and "3 val" not in lines:
        assert tiny_jobs(shards)[0].state == "waiting", "the trainer lets it change on resume, and records that"
        return
    with pytest.raises(UserError, match=r"made with other (settings|shards).*another --run_id") as error:
        tiny_jobs(shards)
    assert name == "data" or f"--{name} {other[name]} there" in str(error.value)


def test_a_run_that_went_on_further_refuses_the_sweep(shards, in_folder):
    (job,) = tiny_jobs(shards)
    write_run(job, "0 val 5\n3 val 5\n5 val 5\n", max_steps=5)
    with pytest.raises(UserError, match="--max_steps 5 there, 3 here"):
        tiny_jobs(shards)
    assert (
        make_jobs("--variants", "no_moe", "--seeds", "1", *train_flags(shards, "--max_steps", "9"))[0].state
        == "waiting"
    )


def test_settings_chosen_by_the_machine_agree_with_auto(shards, in_folder):
    (job,) = tiny_jobs(shards)
    write_run(job, FINISHED, dtype="bfloat16", hellaswag_limit=200)
    assert tiny_jobs(shards)[0].state == "done"


def test_a_run_without_its_last_checkpoint_is_not_done(shards, in_folder):
    (job,) = tiny_jobs(shards)
    write_run(job, FINISHED)
    checkpoint.step_path(job.folder, 3).rename(checkpoint.step_path(job.folder, 2))
    assert tiny_jobs(shards)[0].state == "waiting" and "no checkpoint of step 3" in sweep.missing(tiny_jobs(shards)[0])
    assert tiny_jobs(shards, "--no_save_checkpoint")[0].state == "done"


ODD = [
    b"foo",
    b"1 2 3 4",
    b"x val 3",
    b"1 val y",
    bytes(100),
    b"\xff val \xfe",
    b"9" * 30 + b" val 1",
    b"9" * 5000 + b" val 1",
]


@pytest.mark.slow
@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_a_damaged_log_does_not_stop_the_sweep(shards, in_folder, odd, capsys):
    (job,) = tiny_jobs(shards)
    write_run(job, b"0 val 5\n" + odd + b"\n1 train 4\n2 tra")
    (job,) = tiny_jobs(shards)
    assert job.state == "waiting" and job.last == {"val": (0, 5.0), "train": (1, 4.0)}
    sweep.estimate([job], 1, None)
    assert "no_moe" in capsys.readouterr().out


def test_a_damaged_json_beside_a_log_is_one_line(shards, in_folder):
    (job,) = tiny_jobs(shards)
    write_run(job, FINISHED)
    job.log.with_suffix(".json").write_text("{")
    with pytest.raises(UserError, match="restore it, or remove it"):
        tiny_jobs(shards)


def test_the_cost_of_a_diverged_run_without_val(call, shards, in_folder):
    (job,) = tiny_jobs(shards, "--val_loss_every", "0")
    write_run(job, "0 train 5\n1 train nan\n1 diverged 1\n")
    argv = ("--variants", "no_moe", "--seeds", "1", *train_flags(shards, "--max_steps", "3", "--val_loss_every", "0"))
    out, error = call("--dry_run", *argv)
    assert error is None and "diverged    0123456789ab" in out


def test_exit_code_0_without_the_last_val_is_a_failure(shards, in_folder, capsys):
    (job,) = tiny_jobs(shards)
    job.command = [sys.executable, "-c", ""]
    sweep.run_here([job], [None])
    assert job.state == "failed" and "no_moe seed 1: failed - no val of step 3" in capsys.readouterr().out


# ---- real runs


def three_steps(shards, *variants):
    return "--variants", *variants, "--seeds", "1", "--jobs", "1", *train_flags(shards, "--max_steps", "3")


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """A folder with the finished run of three_steps(shards, "no_moe")."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(slurm, "launch", Forked.launch)
        patch.setattr(sys, "argv", ["sweep.py", *three_steps(shards, "no_moe")])
        sweep.main()
    return folder


@pytest.mark.slow
def test_finished_runs_are_passed_over_and_failures_do_not_stop_the_others(call, trained, tmp_path, shards):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    argv = three_steps(shards, "no_moe", "only_moe", "top1_softmax")
    dense, moe, top_1 = (job.log for job in make_jobs(*argv))
    first = dense.read_text()
    with lock(moe, ""):  # as another process that writes this log would
        out, error = call(*argv)
    assert "1 of 3 runs did not finish: only_moe seed 1 failed" in error and "is being written" in error
    assert "top1_softmax seed 1: done" in out and "no_moe seed 1: running" not in out
    assert dense.read_text() == first and runlog.read(top_1)["val"][0][-1] == 3


@pytest.mark.slow
def test_a_run_is_never_filed_under_other_settings(call, trained, tmp_path, shards):
    """Another learning rate under the name of a run, with the logs in another folder, and in the same one."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (log,) = tmp_path.glob("logs/log_*.txt")
    argv = (*three_steps(shards, "no_moe"), "--name", runlog.parse_path(log)[0])
    out, error = call(*argv, "--logs_dir", "b", "--max_lr", "0.1")
    assert "no_moe seed 1 failed" in error and f"b/{log.name}" in error and "done" not in out
    out, error = call(*argv, "--max_lr", "0.1")
    assert "made with other settings (--max_lr 0.0006 there, 0.1 here)" in error and not out
    out, error = call(*argv, "--max_steps", "5")
    assert error is None and "no_moe seed 1: done" in out, "more steps continue the run"
    assert "continues with other settings (--max_steps 3 there, 5 here)" in out
    assert runlog.read(log)["train"][0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_a_run_that_lost_its_checkpoints_is_trained_again(call, trained, tmp_path, shards):
    shutil.copytree(trained / "logs", tmp_path / "logs")
    out, error = call(*three_steps(shards, "no_moe"))
    assert error is None and "no checkpoint of step 3" in out and "no_moe seed 1: running" in out
    assert len(list(tmp_path.glob("checkpoints/*/step_000003.pt"))) == 1


@pytest.mark.slow
def test_ctrl_c_leaves_runs_that_resume(call, tmp_path, shards):
    argv = ("--variants", "no_moe", "--seeds", "1", "--jobs", "1", *train_flags(shards, "--max_steps", "100000"))
    process = Forked(ROOT / "sweep.py", *argv, OMP_NUM_THREADS="1")
    wait_for(lambda: any(step > 5 for step in steps_logged(tmp_path)))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.wait() == 130 and "no_moe seed 1: interrupted" in out, err
    (done,) = steps_logged(tmp_path)
    argv = [*argv[:-1], str(done + 3)]
    out, error = call(*argv)
    assert error is None and "no_moe seed 1: done" in out
    steps = runlog.read(next(tmp_path.glob("logs/log_*.txt")))["train"][0]
    assert steps.tolist() == list(range(done + 3))


@pytest.mark.slow
def test_a_background_sweep_stops_while_its_runs_start(in_folder, shards):
    argv = ("--variants", "no_moe", "--seeds", "1", "--jobs", "1", *train_flags(shards, "--max_steps", "1000000"))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts what ends in &
    try:
        command, env = [sys.executable, str(ROOT / "sweep.py"), *argv], {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for(psutil.Process(process.pid).children)
    process.terminate()
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130 and "no_moe seed 1: interrupted" in out, err


@pytest.mark.slow
def test_a_signal_while_a_run_starts_reaches_it(call, shards, monkeypatch):
    launch, processes = slurm.launch, []

    def signalled(*args):
        processes.append(launch(*args))
        os.kill(os.getpid(), signal.SIGTERM)
        return processes[-1]

    monkeypatch.setattr(slurm, "launch", signalled)
    argv = ("--variants", "no_moe", "--seeds", "1", "2", "--jobs", "1", *train_flags(shards, "--max_steps", "1000000"))
    try:
        with pytest.raises(KeyboardInterrupt):
            call(*argv)
        assert [process.returncode is not None for process in processes] == [True]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait(in_folder, tmp_path, shards):
    argv = ("--variants", "no_moe", "--seeds", "1", "--jobs", "1", *train_flags(shards, "--max_steps", "1000000"))
    process = Forked(ROOT / "sweep.py", *argv, OMP_NUM_THREADS="1")
    wait_for(lambda: any(step > 5 for step in steps_logged(tmp_path)))
    (run,) = psutil.Process(process.pid).children()
    run.suspend()  # it can neither save nor leave
    process.send_signal(signal.SIGINT)
    while "stopping: 1 runs" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.wait() == 130 and "no_moe seed 1: interrupted" in out, err
    assert not run.is_running()


@pytest.mark.slow
def test_a_diverged_run_is_recorded_and_passed_over(call, shards):
    argv = ("--variants", "no_moe", "--seeds", "1", *train_flags(shards, "--max_steps", "20", "--max_lr", "1e30"))
    for started in (True, False):
        out, error = call(*argv)
        assert error is None and "no_moe seed 1: diverged" in out and ("running" in out) == started


@pytest.mark.slow
def test_submitit_job_resumes_after_preemption(in_folder, tmp_path, shards):
    """The local executor for real: the job is told that it is pre-empted, saves, is queued again and finishes."""
    slurm = ("--slurm", "partition=any,time=30", "--cluster", "local")
    run = ("--variants", "no_moe", "--seeds", "1", *slurm, *train_flags(shards, "--max_steps", "400"))
    process = Forked(ROOT / "sweep.py", *run, OMP_NUM_THREADS="1")
    wait_for(lambda: any(step > 5 for step in steps_logged(tmp_path)))
    children = psutil.Process(process.pid).children(recursive=True)
    job = next(child for child in children if "submitit.core._submit" in child.cmdline())
    job.send_signal(signal.SIGUSR2)
    out, err = process.communicate()
    assert process.poll() == 0 and "no_moe seed 1: done" in out, err
    assert "Requeued job" in "".join(path.read_text() for path in tmp_path.glob("logs/submitit/*_log.*"))
    steps = runlog.read(next(tmp_path.glob("logs/log_*.txt")))["train"][0]
    assert steps.tolist() == list(range(400))


@pytest.mark.skipif(shutil.which("sbatch") is not None, reason="a SLURM cluster is here")
@pytest.mark.slow
def test_without_slurm_the_user_is_told(call, shards):
    assert call("--slurm", "partition=a", *train_flags(shards))[1].startswith("--slurm partition=a: ")
