"""A run killed with SIGKILL at random moments and resumed each time, against the same run left alone.

    python tests/kill_and_resume.py --kills 30
    python tests/kill_and_resume.py --kills 10 --ranks 2        # with --fsdp: all processes are killed at once

The run saves a checkpoint at every step, and every third kill waits until one is being written. Passes when every life
found a whole checkpoint and the two logs are equal, line for line, but for the clock streams. Prints a JSON summary.
"""

import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from conftest import end, flags, fork, fork_ranks, lines, script, tiny, write_shards  # noqa: E402

from lab import checkpoint, common  # noqa: E402


@dataclass
class Args:
    kills: int = 20  # Kills, at least
    ranks: int = 1  # Processes; more than one: sharded
    seed: int = 0  # Seed for the moments


def main():
    args = common.parse(Args)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(torture(Path(folder), args.kills, random.Random(args.seed), args.ranks), indent=1))


def torture(folder, kills, rng, ranks=1):
    """What happened; AssertionError when the killed run is not the run left alone."""
    settings = tiny(
        data_root=write_shards(folder / "words"), max_steps=12 * kills, sample_from_model_every=7, n_embd=128,
        save_checkpoint_every=1, use_noisy_top_k=True, use_aux_loss=True, dropout=0.1, logs_dir=folder, resume="auto",
    )
    words = [*flags(settings), *(["--fsdp"] if ranks > 1 else [])]

    def start(name):
        call = (script, "train_single_gpu.py", [*words, "--name", name])
        return fork_ranks(ranks, *call) if ranks > 1 else [fork(*call)]

    for process in start("left"):
        end(process)
    home, killed, mid_write, lived = folder / "killed_seed_1337", 0, 0, []
    while True:
        processes = start("killed")
        ended = all("| loss" not in line for line in processes[0].out)  # until the first step of this life
        if not ended and killed < kills:
            time.sleep(rng.uniform(0, 0.4))
            while killed % 3 == 2 and processes[0].is_alive() and not any(half_written(home)):
                time.sleep(0.001)
            for process in processes:
                process.kill()
            killed += 1
        for process in processes:
            end(process, (0, -9))
        mid_write += any(half_written(home))
        if processes[0].exitcode == 0:
            break
        if checkpoint.newest(home):
            lived.append(checkpoint.read(home)[1]["step"])
    left, cut = lines(folder / "left_seed_1337"), lines(home)
    assert cut == left
    assert not any(half_written(home))
    return {"kills": killed, "while_writing_a_checkpoint": mid_write, "lines_compared": len(left), "resumed_at": lived}


def half_written(home):
    """Files under a temporary name, and sharded sets that have no index."""
    whole = checkpoint.checkpoints(home)
    return [path for path in home.glob("step_*") if path not in whole]


if __name__ == "__main__":
    common.run(main)
