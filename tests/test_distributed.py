"""Several processes on one CPU, gloo: the run they make together is the run that one makes."""

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, end, flags, fork_ranks, free_port, lines, script, streams, tiny

import train_single_gpu as trainer
from lab import checkpoint, common, devices

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
VARIANTS = {
    "no_moe": {"n_exp": 1, "qk_norm": True, "mlp_init": "switch"},
    "moe": {"train_capacity": math.inf, "use_switch_tfm_init": True, "switch_tfm_init_scale": 0.1},
    "aux": {"use_aux_loss": True, "use_router_z_loss": True, "router_use_full_prec": True},
    "balance": {"use_bias_balance": True, "gate": "sigmoid", "n_shared_exp": 1},
    "noisy": {"use_noisy_top_k": True, "dropout": 0.1},  # noise belongs to the micro-batch, so even this agrees
    "narrow": {"n_exp": 8, "top_k": 4, "expert_hidden": "iso", "use_aux_loss": True},
    "quantile": {"use_quantile_balance": True, "gate": "sigmoid", "n_shared_exp": 1},
    "sequence": {"use_aux_loss": True, "balance_scope": "sequence", "use_router_z_loss": True,
                 "top_k": 1, "gate": "softmax"},
    "muon": {"optimizer": "muon", "n_shared_exp": 1, "first_dense": 1},
}
CASES = {  # ranks, sharded, names: of 4 those that add up or draw
    "2": (2, False, tuple(VARIANTS)), "4": (4, False, ("aux", "balance", "noisy", "quantile")),
    "2 sharded": (2, True, ("no_moe", "aux", "balance", "quantile")),
}


def train_one_after_another(runs):
    """A rank: the runs in one process, and one process group for all of them."""
    warnings.simplefilter("ignore", UserWarning)
    dist.init_process_group("gloo")
    for settings in runs:
        if settings.pop("compiled", False):  # the same graphs; inductor would take a minute to compile them
            devices.is_compiled = lambda *_: True
            torch.compiler.set_stance(force_backend="aot_eager")
        logs_dir = settings["logs_dir"].replace("{rank}", os.environ["RANK"])
        assert trainer.run(trainer.Args(**settings | {"logs_dir": logs_dir})) == 0
    dist.destroy_process_group()
    common.exit_now(0)


def launch(n, folder, *runs):
    """The runs, one after the other, on n processes, with their run folders in `folder`; their streams."""
    defaults = {"n_embd": 16, "B": 2, "max_steps": 6, "val_tokens": 192, "logs_dir": str(folder)}
    runs = [tiny(**defaults | run) for run in runs]
    for rank in fork_ranks(n, train_one_after_another, runs):
        end(rank)
    return {run["name"]: streams(next(folder.rglob(f"{run['name']}_seed_1337"))) for run in runs}


def agree(found, expected, names=("train", "val", "grad_norm")):
    for name in names:
        np.testing.assert_allclose(found[name][1], expected[name][1], rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory):
    runs = [{"name": name, "data_root": str(shards)} | variant for name, variant in VARIANTS.items()]
    return launch(1, tmp_path_factory.mktemp("alone"), *runs)


@pytest.mark.parametrize("n, fsdp, names", CASES.values(), ids=CASES)
def test_n_processes_make_the_run_of_one(n, fsdp, names, alone, shards, tmp_path):
    settings = {"data_root": str(shards), "fsdp": fsdp}
    together = launch(n, tmp_path, *[settings | {"name": name} | VARIANTS[name] for name in names])
    router = ["val_bpb", "max_vio_0", "val_max_vio_0", "drop_frac", "val_drop_frac_0", "router_logit", "logit_std_0"]
    for name in names:
        agree(together[name], alone[name])
        agree(together[name], alone[name], {"aux": [*router, "aux_loss", "z_loss"], "noisy": router}.get(name, []))


def test_a_sharded_checkpoint_continues_on_fewer_ranks_and_on_one(alone, shards, tmp_path):
    """4 sharded ranks to step 2, 2 sharded ranks to step 4, then 1 process: the run of one process."""
    settings = {"data_root": str(shards), "save_checkpoint_every": 2, "name": "aux", "keep_checkpoints": 9}
    settings |= VARIANTS["aux"]
    launch(4, tmp_path, settings | {"fsdp": True})
    folder = tmp_path / "aux_seed_1337"
    for n, last, fsdp in ((2, 2, True), (1, 4, False)):
        for path in checkpoint.checkpoints(folder):
            if checkpoint.step_of(path) > last:
                Path(path, checkpoint.INDEX).unlink() if path.is_dir() else path.unlink()
        (found,) = launch(n, tmp_path, settings | {"resume": "auto", "fsdp": fsdp}).values()
        assert found["train"][0].tolist() == list(range(6))
        agree(found, alone["aux"])


def test_compiled_blocks_make_the_run_of_one(alone, shards, tmp_path):
    """Each block compiled by itself, under DDP, and under FSDP with its activations computed again in backward."""
    settings = {"data_root": str(shards), "compiled": True} | VARIANTS["aux"]
    runs = [settings | {"name": "ddp"}, settings | {"name": "fsdp", "fsdp": True, "recompute": "blocks"}]
    for found in launch(2, tmp_path, *runs).values():
        agree(found, alone["aux"], ("train", "val", "aux_loss"))


def test_balance_over_the_step_is_the_loss_of_the_whole_batch(shards, tmp_path):
    """With balance_scope step the loads of N ranks of B=4/N are those of one process of B=4; two of them per step."""
    inf = {"train_capacity": math.inf, "eval_capacity": math.inf}
    local = {"data_root": str(shards), "use_aux_loss": True, "aux_loss_weight": 1.0, "max_steps": 5, "stride": 1} | inf
    step = local | {"balance_scope": "step"}
    (whole,) = launch(1, tmp_path, step | {"name": "whole", "B": 4}).values()
    two = launch(2, tmp_path, step | {"name": "two", "B": 2}, local | {"name": "local", "B": 2})
    for stream in ("train", "aux_loss", "grad_norm"):
        np.testing.assert_allclose(two["two"][stream][1], whole[stream][1], rtol=1e-4, err_msg=stream)
    assert np.abs(two["local"]["aux_loss"][1] - whole["aux_loss"][1]).max() > 1e-3


def test_torchrun_ends_well_and_a_killed_rank_ends_the_job_which_can_be_resumed(shards, tmp_path):
    """Ranks end without shutting Python down, in which a thread of gloo sometimes aborts a run that went well."""
    words = flags(tiny(data_root=shards, save_checkpoint_every=5, max_steps=100_000, val_loss_every=0))
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", str(ROOT / "train_single_gpu.py"), *words]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    next(line for line in job.stdout if "step     12 | loss" in line)
    psutil.Process(job.pid).children()[-1].kill()
    job.communicate(timeout=120)
    assert job.returncode != 0
    folder = tmp_path / "logs/run_seed_1337"
    last = checkpoint.step_of(checkpoint.newest(folder))
    more = ["--resume", str(folder), "--stop_after", str(last + 3)]
    done = subprocess.run([*command[:6], *more], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0 and f"done after {last + 3} steps" in done.stdout, done.stderr[-3000:]
    assert streams(folder)["train"][0].tolist() == list(range(last + 3))


def test_a_signal_to_one_rank_ends_all_with_a_checkpoint(shards, tmp_path):
    """They leave together, whichever was told: none waits for the other in a step or in an evaluation."""
    words = flags(tiny(data_root=shards, max_steps=100_000, n_embd=16, B=2, val_loss_every=3))
    ranks = fork_ranks(2, script, "train_single_gpu.py", words, cwd=tmp_path)
    next(line for line in ranks[0].out if "step     12 | loss" in line)
    ranks[1].terminate()
    said = [end(rank, 130) for rank in ranks]
    assert "stopped after" in said[0]
    folder = tmp_path / "logs/run_seed_1337"
    last = checkpoint.step_of(checkpoint.newest(folder))
    assert streams(folder)["train"][0].tolist() == list(range(last)) and last > 12


def test_two_nodes_of_which_one_dies_start_again_and_make_the_run_left_alone(shards, tmp_path):
    """Two torchrun agents of one rank each, as on two machines; sharded."""
    settings = {"name": "nodes", "data_root": str(shards), "save_checkpoint_every": 5, "max_steps": 30, "fsdp": True,
                "val_loss_every": 20, "dist_timeout": 20, "resume": "auto"}
    launch(2, tmp_path / "alone", settings)
    words = flags(tiny(n_embd=16, B=2, val_tokens=192, logs_dir=tmp_path / "nodes") | settings)
    train = [str(ROOT / "train_single_gpu.py"), *words]

    def start_nodes():
        meet = [f"--master_port={free_port()}", "--master_addr=127.0.0.1", "--nnodes=2", "--nproc_per_node=1"]
        commands = [[*TORCHRUN, *meet, f"--node_rank={node}", *train] for node in (0, 1)]
        return [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for line in commands]

    nodes = start_nodes()
    next(line for line in nodes[0].stdout if "step     12 | loss" in line)
    for process in [*psutil.Process(nodes[1].pid).children(), nodes[1]]:
        process.kill()
    for node in nodes:
        node.communicate(timeout=120)
    assert nodes[0].returncode
    for node in start_nodes():
        said = node.communicate(timeout=300)[1]
        assert node.returncode == 0, said[-3000:]
    assert lines(tmp_path / "nodes/nodes_seed_1337") == lines(tmp_path / "alone/nodes_seed_1337")


def test_ranks_that_share_no_disk_resume_the_same_run(alone, shards, tmp_path):
    """Rank 0 finds the run, has its log and loads it; the other gets it all from rank 0."""
    settings = {"name": "moe", "data_root": str(shards), "save_checkpoint_every": 2, "keep_checkpoints": 9}
    settings |= VARIANTS["moe"] | {"logs_dir": str(tmp_path / "{rank}")}
    launch(2, tmp_path, settings)
    assert not (tmp_path / "1").exists()
    for path in checkpoint.checkpoints(tmp_path / "0/moe_seed_1337"):
        if checkpoint.step_of(path) > 2:
            path.unlink()
    (found,) = launch(2, tmp_path, settings | {"resume": "auto"}).values()
    agree(found, alone["moe"])


def test_an_error_is_said_once_and_ends_every_rank_with_2(shards, tmp_path):
    """Of the data, which every rank meets, and of the run's folder, which rank 0 alone sees."""
    (tmp_path / "logs/run_seed_1337").mkdir(parents=True)
    (tmp_path / "logs/run_seed_1337/log.txt").write_text("0 train 1\n")
    for data_root, error in (("nowhere", "nowhere"), (shards, "holds a run")):
        words = flags(tiny(data_root=data_root))
        ranks = fork_ranks(2, script, "train_single_gpu.py", words, cwd=tmp_path, streams=(2,))
        said = [end(rank, 2) for rank in ranks]
        assert said[0].count("error: ") == 1 and error in said[0] and "error: " not in said[1]
