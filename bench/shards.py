"""Sharded checkpoints on several CPU ranks: peak memory of a rank, and the training time that a save takes.

    python -m bench.shards --ranks 2 4 --out results/scale/shards.json

Peak memory is the largest resident set (VmHWM) of any rank, libraries included, from the second training step on, or
over a save with the step after it, or over a resume in a new process. The time of a save is that of two steps with it
less that of two steps without, from the call until the set is whole. `gather` is the single file that rank 0 writes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from lab import common  # before torch

# isort: split
import torch
import torch.distributed as dist

from lab import checkpoint
from model import GPT, GPTConfig

SHAPE = {"block_size": 32, "vocab_size": 4096, "n_layer": 6, "n_head": 6, "n_embd": 384, "n_exp": 8, "stride": 1}


@dataclass
class Args:
    ranks: tuple[int, ...] = (2, 4)  # Numbers of ranks
    out: str = "results/scale/shards.json"  # File to write
    rounds: int = 3  # Times that each is measured: the least time and the largest memory count
    folder: str = ""  # Folder of the checkpoints, of a rank that this script has started
    phase: str = ""  # save, gather or resume, of such a rank


def main():
    args = common.parse(Args)
    if args.phase:
        return run_rank(args)
    rows = [row for n in args.ranks for row in run_ranks(args, n)]
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with common.atomic_write(args.out, "w") as f:
        json.dump({"shape": SHAPE, "parameters": GPT(GPTConfig(**SHAPE)).num_params(), "rows": rows}, f, indent=1)
    for row in rows:
        print(row)


def run_ranks(args, n):
    """Rows of n ranks: each phase in processes of its own."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for phase in ("save", "gather", "resume"):
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "-m", "bench.shards"]
            command = [sys.executable, *launcher, "--phase", phase, "--folder", folder, "--rounds", str(args.rounds)]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows += [{"ranks": n, **json.loads(line)} for line in said.splitlines()]
    training = next(row["peak_mb"] for row in rows if row["phase"] == "training")
    return [row | {"of_training": round(row["peak_mb"] / training, 3)} for row in rows]


def run_rank(args):
    """One rank: build, shard, then the phase; rank 0 prints a line of JSON per measurement."""
    machine = common.set_up_machine("cpu", "float32", fsdp=True)
    torch.set_num_threads(1)
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=600))
    libraries = resident("VmRSS")
    restart_peak()
    model = common.shard(GPT(GPTConfig(**SHAPE), torch.Generator().manual_seed(0)))
    optimizer = torch.optim.AdamW(model.optimizer_groups(0.1), lr=1e-4, fused=True)
    folder = Path(args.folder)
    if args.phase == "resume":
        state = checkpoint.load(folder / "step_000002") if machine.is_main else None
        checkpoint.set_state(model, optimizer, state, folder)
        report("resume", machine, peak(machine))
    else:
        report("libraries", machine, libraries)
        report("build", machine, peak(machine))
        train(model, optimizer, 1)
        measure(args, model, optimizer, checkpoint.BackgroundSaver(9, print, group), machine)
    dist.destroy_process_group()
    common.exit_now(0)


def measure(args, model, optimizer, saver, machine):
    """Peak memory and time: of training, then of the saves of this phase."""

    def save(name, step):
        fields, folder = {"step": step, "config": {}}, Path(args.folder)
        if name != "gather":
            saver.save_shards(model, optimizer, fields, checkpoint.step_path(folder, step), name == "async")
        elif (state := checkpoint.get_state(model, optimizer)) and machine.is_main:
            saver.save(state | fields, checkpoint.step_path(folder, step))

    runs = [timed(lambda: train(model, optimizer, 2), machine) for _ in range(args.rounds)]
    alone = min(seconds for seconds, _ in runs)
    if args.phase == "save":
        report("training", machine, max(most for _, most in runs), alone)
    for step, name in enumerate(("sync", "async") if args.phase == "save" else ("gather",), 1):
        runs = []
        for _ in range(args.rounds):

            def run(name=name, step=step):
                save(name, step)
                train(model, optimizer, 2)
                saver.wait()

            runs.append(timed(run, machine))
        report(name, machine, max(most for _, most in runs), min(seconds for seconds, _ in runs) - alone)


def train(model, optimizer, steps):
    for _ in range(steps):
        idx = torch.randint(SHAPE["vocab_size"], (1, SHAPE["block_size"]))
        model(idx, idx).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def timed(function, machine):
    """(seconds, peak MB of any rank) of function()."""
    dist.barrier()
    restart_peak()
    start = time.perf_counter()
    function()
    dist.barrier()
    return time.perf_counter() - start, peak(machine)


def peak(machine):
    """Largest resident set since restart_peak() of any rank, MB."""
    most = [None] * machine.world_size
    dist.all_gather_object(most, resident("VmHWM"))
    return max(most)


def resident(field):
    """MB, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def restart_peak():
    Path("/proc/self/clear_refs").write_text("5")  # proc(5)


def report(phase, machine, megabytes, seconds=None):
    if machine.is_main:
        row = {"phase": phase, "peak_mb": round(megabytes)} | (
            {} if seconds is None else {"seconds": round(seconds, 2)}
        )
        os.write(1, (json.dumps(row) + "\n").encode())


if __name__ == "__main__":
    common.run(main)
