"""A run killed with SIGKILL at random moments and resumed each time, against the same run left alone.

    python tests/kill_and_resume.py --kills 100
    python tests/kill_and_resume.py --kills 20 --ranks 2        # with --fsdp: all processes are killed at once

The run saves a checkpoint at every step, and every third kill waits until one is being written. Passes when every life
found a whole checkpoint and the two logs are equal, line for line, but for the clock streams. Prints a JSON summary.
"""

import contextlib
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch.distributed.run

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import conftest  # noqa: E402

from lab import (
    checkpoint,
    common,
)

TRAINER = Path(__file__).parent.parent / "train_single_gpu.py"


@dataclass
class Args:
    kills: int = 20  # so often, at least
    ranks: int = 1  # more: a run of so many processes, sharded
    seed: int = 0  # of the moments


def main():
    args = common.parse(Args)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(torture(Path(folder), args.kills, random.Random(args.seed), args.ranks), indent=1))


def torture(folder, kills, rng, ranks=1):
    """Returns what happened; raises AssertionError when the killed run is not the run left alone."""
    rows = [{"ctx": "the router", "label": i % 4, "endings": ["sends", "a token", "drops", "none"]} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = conftest.TINY_RUN | {
        "data_root": conftest.write_shards(folder / "words"), "max_steps": 12 * kills, "val_loss_every": 5,
        "hellaswag_every": 10, "hellaswag_data": folder / "rows.jsonl", "sample_from_model_every": 7,
        "save_checkpoint_every": 1, "use_noisy_top_k": True, "use_aux_loss": True, "dropout": 0.1,
        "logs_dir": folder, "checkpoint_dir": folder, "n_embd": 128, "progress": "lines",
    }  # fmt: skip
    words = [TRAINER, *conftest.flags(settings), *["--fsdp"][: ranks - 1]]
    if ranks > 1:
        words = [torch.distributed.run.__file__, "--standalone", f"--nproc_per_node={ranks}", *words]
    left = conftest.Forked(*words, "--name", "left")
    said = left.communicate()
    assert left.poll() == 0, said
    words += ["--name", "killed", "--resume", "auto"]
    home, killed, mid_write, lived = folder / "killed_test_seed_1337", 0, 0, []
    while True:
        process = conftest.Forked(*words)
        ended = any(wait_for_step(process) for _ in range(rng.randint(1, 3) if ranks > 1 else 1))
        if not ended and killed < kills:
            time.sleep(rng.uniform(0, 0.4))
            while ranks == 1 and killed % 3 == 2 and process.poll() is None and not any(home.glob("step_*.tmp")):
                time.sleep(0.001)
            kill(process)
            killed += 1
        said = process.communicate()[1]
        assert process.poll() in (0, -9), said[-2000:]
        mid_write += any(half_written(home))
        if process.poll() == 0:
            break
        path, state = checkpoint.load_newest(home)
        lived.append(state["step"] if path else 0)
    left, cut = (conftest.lines(folder / f"log_{name}_test_seed_1337.txt") for name in ("left", "killed"))
    assert cut == left
    assert not any(half_written(home))
    return {"kills": killed, "while_writing_a_checkpoint": mid_write, "lines_compared": len(left), "resumed_at": lived}


def kill(process):
    """SIGKILL to the process and all that it has started."""
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


def half_written(home):
    """Files under a temporary name, and sharded sets that have no index."""
    return [path for path in home.glob("step_*") if path.suffix == ".tmp" or path not in checkpoint.checkpoints(home)]


def wait_for_step(process):
    """Until the first training step of this life is printed; True if it ended without one."""
    return all("| loss" not in line for line in process.stdout)


if __name__ == "__main__":
    common.run(main)
