"""Several processes on one CPU, gloo: the run they make together is the run that one makes."""

import json
import math
import re
import socket
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch.distributed.run
from conftest import TINY_RUN, Forked, flags, lines

import runlog
from lab import checkpoint

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parent
WORKER, TRAINER = TESTS / "distributed_worker.py", TESTS.parent / "train_single_gpu.py"
TORCHRUN = torch.distributed.run.__file__  # a path, for Forked
TWO = ("--standalone", "--nproc_per_node=2")
VARIANTS = {
    "no_moe": {"n_exp": 1},
    "moe": {"train_capacity": math.inf, "use_switch_tfm_init": True, "switch_tfm_init_scale": 0.1},
    "aux": {"use_aux_loss": True, "use_router_z_loss": True, "router_use_full_prec": True},
    "balance": {"use_bias_balance": True, "gate": "sigmoid", "n_shared_exp": 1},
    "noisy": {"use_noisy_top_k": True, "dropout": 0.1},  # noise belongs to the micro-batch, so even this agrees
    "narrow": {"n_exp": 8, "top_k": 4, "expert_hidden": "iso", "use_aux_loss": True, "gate_scale": 2.5},
    "quantile": {"use_quantile_balance": True, "gate": "sigmoid", "n_shared_exp": 1, "shared_expert_hidden": 24},
    "sequence": {"use_aux_loss": True, "balance_scope": "sequence", "use_router_z_loss": True, "z_loss_on": "selected",
                 "top_k": 1, "gate": "softmax"},
    "frozen": {"freeze_router": True, "first_dense": 1, "use_noisy_top_k": True, "noise_scale": 0.4},
    "muon": {"optimizer": "muon", "n_shared_exp": 1},  # a dense block and one of experts
    "stability": {"n_exp": 1, "qk_norm": True, "output_z_loss_weight": 1e-2, "mlp_init": "switch"},
}  # fmt: skip
SETTINGS = TINY_RUN | {"n_embd": 16, "B": 2, "max_steps": 9, "val_loss_steps": 3, "progress": "lines"}


def launch(n, folder, runs):
    """The runs, one after the other, on n processes; their logs by name."""
    folder.mkdir(exist_ok=True)
    runs = [SETTINGS | {"logs_dir": str(folder), "checkpoint_dir": str(folder)} | run for run in runs]
    for rank in start(n, folder, runs):
        _, said = rank.communicate()
        assert rank.poll() == 0, said[-3000:]
    return {run["name"]: runlog.read(next(Path(folder).rglob(f"log_{run['name']}_test_*.txt"))) for run in runs}


def start(n, folder, runs):
    """The n ranks, as torchrun would start them, which imports torch n + 1 times."""
    meeting = folder / "meeting"
    meeting.unlink(missing_ok=True)
    words = (WORKER, json.dumps(runs), meeting.as_uri())
    return [Forked(*words, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n)) for rank in range(n)]


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory):
    runs = [{"name": name, "data_root": str(shards)} | variant for name, variant in VARIANTS.items()]
    return launch(1, tmp_path_factory.mktemp("alone"), runs)


FOUR = ("aux", "balance", "noisy", "quantile")  # what the ranks add up or draw


@pytest.mark.parametrize("n, names", [(2, tuple(VARIANTS)), (4, FOUR)], ids=["2", "4"])
def test_n_processes_make_the_run_of_one(n, names, alone, shards, tmp_path):
    together = launch(n, tmp_path, [{"name": name, "data_root": str(shards)} | VARIANTS[name] for name in names])
    for name in names:
        balance = [f"{split}{stat}_0" for split in ("", "val_") for stat in ("max_vio", "drop_frac", "logit_std")]
        more = {"aux": ["val_bpb", *balance], "noisy": ["noise_std_0", *balance]}.get(name, [])
        more += {"aux_loss", "z_loss", "output_z_loss"} & set(alone[name])
        for stream in ("train", "val", "grad_norm", *more):
            np.testing.assert_allclose(
                together[name][stream][1], alone[name][stream][1], rtol=1e-5, atol=2e-6, err_msg=f"{name} {stream}"
            )


def test_a_sharded_checkpoint_continues_on_fewer_ranks_and_on_one(alone, shards, tmp_path):
    """4 sharded ranks to step 3, 2 sharded ranks to step 6, then 1 process: the run of one process."""
    common = {"data_root": str(shards), "save_checkpoint_every": 3, "use_aux_loss": True, "use_router_z_loss": True,
              "router_use_full_prec": True, "name": "aux", "keep_checkpoints": 9}  # fmt: skip
    launch(4, tmp_path, [common | {"fsdp": True}])
    folder = tmp_path / "aux_test_seed_1337"
    for n, last, fsdp in ((2, 3, True), (1, 6, False)):
        assert {path.name for path in folder.glob("step_*")} == {f"step_00000{step}" for step in (3, 6, 9)}
        for path in checkpoint.checkpoints(folder):
            if checkpoint.step_of(path) > last:
                checkpoint.remove(path)
        (log,) = launch(n, tmp_path, [common | {"resume": "auto", "fsdp": fsdp}]).values()
        assert log["train"][0].tolist() == list(range(9))
        np.testing.assert_allclose(log["train"][1], alone["aux"]["train"][1], rtol=1e-5)
        np.testing.assert_allclose(log["val"][1], alone["aux"]["val"][1], rtol=1e-5)


def test_sharded_ranks_make_the_run_of_one_and_hold_their_part(alone, shards, tmp_path):
    runs = [
        {"name": name, "data_root": str(shards), "fsdp": True} | VARIANTS[name]
        for name in ("no_moe", "aux", "balance", "quantile", "frozen", "stability")
    ]
    together = launch(2, tmp_path, runs)
    for name, streams in together.items():
        np.testing.assert_allclose(streams["train"][1], alone[name]["train"][1], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(streams["val"][1], alone[name]["val"][1], rtol=1e-5, err_msg=name)


def test_compiled_blocks_make_the_run_of_one(alone, shards, tmp_path):
    """Each block and the loss compiled by themselves, under DDP, and under FSDP with its activations computed again in
    backward."""
    common = {"data_root": str(shards), "compile_on_cpu": True} | VARIANTS["aux"]
    runs = [common | {"name": "ddp"}, common | {"name": "fsdp", "fsdp": True, "recompute": "blocks"}]
    for name, streams in launch(2, tmp_path, runs).items():
        for stream in ("train", "val", "aux_loss"):
            expected = alone["aux"][stream][1]
            np.testing.assert_allclose(streams[stream][1], expected, rtol=1e-5, err_msg=f"{name} {stream}")


WATCHED = """
import atexit, pathlib, runpy, sys
script, marks = sys.argv[1:3]
atexit.register(lambda: pathlib.Path(marks, "shut_down").touch())
sys.argv[1:] = sys.argv[3:]
sys.path.insert(0, str(pathlib.Path(script).parent))
runpy.run_path(script, run_name="__main__")
"""


def test_ranks_end_without_shutting_python_down(shards, tmp_path):
    """While it shuts down, a thread of gloo that frees its last tensor would abort a run that has gone well."""
    (tmp_path / "watched.py").write_text(WATCHED)
    settings = SETTINGS | {"max_steps": 2, "data_root": str(shards), "logs_dir": str(tmp_path / "logs"),
                           "checkpoint_dir": str(tmp_path)}  # fmt: skip
    job = Forked(TORCHRUN, *TWO, tmp_path / "watched.py", TRAINER, tmp_path, *flags(settings))
    out, errors = job.communicate()
    assert job.poll() == 0, errors[-3000:]
    assert "step      1 | loss" in out and not (tmp_path / "shut_down").exists()
    (log,) = (tmp_path / "logs").glob("log_*.txt")
    assert runlog.read(log)["val"][0][-1] == 2


MEMORY = """
import sys
import torch, torch.distributed as dist, common
from model import GPT, GPTConfig
rank, n = common.world()
dist.init_process_group("gloo", init_method=sys.argv[1], rank=rank, world_size=n)
model = GPT(GPTConfig(block_size=32, vocab_size=256, n_layer=2, n_head=2, n_embd=32, n_exp=64, stride=1))
total = sum(p.numel() for p in model.parameters())
common.shard(model)
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
idx = torch.arange(64).view(2, 32)
model(idx, idx).loss.backward()
optimizer.step()
local = lambda tensors: sum(t.to_local().numel() for t in tensors)
params = list(model.parameters())
moments = [s for p in params for k, s in optimizer.state[p].items() if k != "step"]
print(total, local(params), local(p.grad for p in params), local(moments))
dist.destroy_process_group()
common.exit_now(0)
"""


def test_memory_of_a_sharded_rank_falls_as_one_over_n(tmp_path):
    """n_exp 64 on 4 ranks: parameters, gradients and both moments of each."""
    (tmp_path / "memory.py").write_text(MEMORY)
    words = (tmp_path / "memory.py", (tmp_path / "meeting").as_uri())
    for rank in [Forked(*words, RANK=str(rank), WORLD_SIZE="4") for rank in range(4)]:
        out, err = rank.communicate()
        assert rank.poll() == 0, err[-3000:]
        total, params, grads, moments = map(int, out.split())
        assert params == grads == moments / 2 == pytest.approx(total / 4, rel=0.02)


def test_balance_over_the_step_is_the_loss_of_the_whole_batch(shards, tmp_path):
    """With --balance_scope step the loads of N ranks of B=4/N are those of one process of B=4; two of them per step."""
    common = {"data_root": str(shards), "use_aux_loss": True, "aux_loss_weight": 1.0, "max_steps": 5, "stride": 1,
              "train_capacity": math.inf, "eval_capacity": math.inf}  # fmt: skip
    step = common | {"balance_scope": "step"}
    (whole,) = launch(1, tmp_path, [step | {"name": "whole", "B": 4}]).values()
    two = launch(2, tmp_path, [step | {"name": "two", "B": 2}, common | {"name": "local", "B": 2}])
    (four,) = launch(4, tmp_path, [step | {"name": "four", "B": 1}]).values()
    for stream in ("train", "aux_loss", "grad_norm"):
        for streams in (two["two"], four):
            np.testing.assert_allclose(streams[stream][1], whole[stream][1], rtol=1e-4, err_msg=stream)
    assert np.abs(two["local"]["aux_loss"][1] - whole["aux_loss"][1]).max() > 1e-3


def test_a_killed_rank_ends_the_job_and_it_can_be_resumed(shards, tmp_path):
    common = {"name": "killed", "data_root": str(shards), "save_checkpoint_every": 5, "dist_timeout": 600}
    runs = [SETTINGS | common | {"max_steps": 100_000, "logs_dir": str(tmp_path), "checkpoint_dir": str(tmp_path)}]
    job = Forked(TORCHRUN, *TWO, WORKER, json.dumps(runs), (tmp_path / "first").as_uri())
    job.read_until("step     12 | loss")
    psutil.Process(job.pid).children()[-1].kill()
    _, said = job.communicate()
    assert job.poll() != 0
    assert re.search(r"Signal 9|SIGKILL|exitcode.*-9", said)
    (log,) = launch(2, tmp_path, [common | {"resume": "auto", "max_steps": 30}]).values()
    assert log["train"][0].tolist()[:10] == list(range(10)) and log["train"][0][-1] >= 9


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start_nodes(folder, settings):
    """Two torchrun agents of one rank each, as on two machines; the first has rank 0."""
    words = (TORCHRUN, "--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}")
    runs = json.dumps([SETTINGS | {"logs_dir": str(folder), "checkpoint_dir": str(folder)} | settings])
    return [Forked(*words, f"--node_rank={node}", WORKER, runs, "env://") for node in (0, 1)]


def test_two_nodes_of_which_one_dies_start_again_and_make_the_run_left_alone(shards, tmp_path):
    common = {"name": "nodes", "data_root": str(shards), "save_checkpoint_every": 5, "max_steps": 40, "fsdp": True,
              "val_loss_every": 20, "dist_timeout": 20, "resume": "auto"}  # fmt: skip
    launch(2, tmp_path / "alone", [common])
    nodes = start_nodes(tmp_path / "nodes", common)
    nodes[0].read_until("step     12 | loss")
    for process in [*psutil.Process(nodes[1].pid).children(), nodes[1]]:
        process.kill()
    (_, said), _ = [node.communicate() for node in nodes]
    assert nodes[0].poll() and re.search("Connection (closed|reset) by peer|Broken pipe|timed out", said), said
    nodes = start_nodes(tmp_path / "nodes", common)
    for node in nodes:
        _, said = node.communicate()
        assert node.poll() == 0, said[-3000:]
    alone, killed = (lines(tmp_path / name / "log_nodes_test_seed_1337.txt") for name in ("alone", "nodes"))
    assert killed == alone


def test_ranks_that_share_no_disk_resume_the_same_run(alone, shards, tmp_path):
    """Rank 0 finds the run, has its log and loads it; the others get it all from rank 0."""
    common = {"name": "moe", "data_root": str(shards), "save_checkpoint_every": 3, "keep_checkpoints": 9}
    common |= VARIANTS["moe"]
    folders = {"checkpoint_dir": str(tmp_path / "{rank}"), "logs_dir": str(tmp_path / "{rank}")}
    launch(2, tmp_path, [common | folders])
    assert not (tmp_path / "1").exists()
    for path in checkpoint.checkpoints(tmp_path / "0" / "moe_test_seed_1337"):
        if checkpoint.step_of(path) > 3:
            path.unlink()
    (log,) = launch(2, tmp_path, [common | folders | {"resume": "auto", "run_id": ""}]).values()
    np.testing.assert_allclose(log["train"][1], alone["moe"]["train"][1], rtol=1e-5)
    np.testing.assert_allclose(log["val"][1], alone["moe"]["val"][1], rtol=1e-5)


def test_an_error_of_all_ranks_is_one_line(shards, tmp_path):
    settings = SETTINGS | {"data_root": "nowhere", "logs_dir": str(tmp_path), "checkpoint_dir": str(tmp_path)}
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for words, error in (
        (flags(settings), "cannot read the folder nowhere"),
        (["--max_lr", "fast"], "Error parsing --max-lr"),
    ):
        ranks = [Forked(TRAINER, *words, RANK=str(rank), LOCAL_RANK=str(rank), **meeting) for rank in range(2)]
        said = "".join(rank.communicate()[1] for rank in ranks)
        assert said.startswith(f"error: {error}") and said.count("\n") == 1, said
        assert [rank.poll() for rank in ranks] == [2, 2]


def test_an_error_of_one_rank_ends_all_and_names_it(shards, tmp_path):
    (tmp_path / "0").symlink_to(shards)
    settings = SETTINGS | {"data_root": str(tmp_path / "{rank}"), "logs_dir": str(tmp_path)}
    ranks = start(2, tmp_path, [settings | {"checkpoint_dir": str(tmp_path)}])
    said = [rank.communicate()[1] for rank in ranks]
    assert all(rank.poll() for rank in ranks)
    assert any(f"rank 1: cannot read the folder {tmp_path / '1'}" in text for text in said)
