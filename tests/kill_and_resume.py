"""A run killed with SIGKILL at random moments and resumed each time, against the same run left alone.

    python tests/kill_and_resume.py --kills 100

The run saves a checkpoint at every step, and every third kill waits until one is being written. Passes when every life
found a whole checkpoint and the two logs are equal, line for line, but for the clock streams. Prints a JSON summary.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import conftest  # noqa: E402

import checkpoint  # noqa: E402
import common  # noqa: E402

TRAINER = Path(__file__).parent.parent / "train_single_gpu.py"


@dataclass
class Args:
    kills: int = 20  # so often, at least
    seed: int = 0  # of the moments


def main():
    args = common.parse(Args)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(torture(Path(folder), args.kills, random.Random(args.seed)), indent=1))


def torture(folder, kills, rng):
    """Returns what happened; raises AssertionError when the killed run is not the run left alone."""
    rows = [{"ctx": "the router", "label": i % 4, "endings": ["sends", "a token", "drops", "none"]} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = conftest.TINY_RUN | {
        "data_root": conftest.write_shards(folder / "words"), "max_steps": 12 * kills, "val_loss_every": 5,
        "hellaswag_every": 10, "hellaswag_data": folder / "rows.jsonl", "sample_from_model_every": 7,
        "save_checkpoint_every": 1, "use_noisy_top_k": True, "use_aux_loss": True, "dropout": 0.1,
        "logs_dir": folder, "checkpoint_dir": folder, "n_embd": 128, "progress": "lines",
    }  # fmt: skip
    command = [sys.executable, TRAINER, *conftest.flags(settings)]
    subprocess.run([*command, "--name", "left"], check=True, stdout=subprocess.DEVNULL)
    command += ["--name", "killed", "--resume", "auto"]
    home, killed, mid_write, lived = folder / "killed_test_seed_1337", 0, 0, []
    while True:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        ended = wait_for_step(process)
        if not ended and killed < kills:
            time.sleep(rng.uniform(0, 0.4))
            while killed % 3 == 2 and process.poll() is None and not any(home.glob("step_*.tmp")):
                time.sleep(0.001)
            process.kill()
            killed += 1
        said = process.communicate()[0]
        assert process.returncode in (0, -9), said[-2000:]
        mid_write += any(home.glob("*.tmp"))
        if process.returncode == 0:
            break
        path, state = checkpoint.load_newest(home)
        lived.append(state["step"] if path else 0)
    left, cut = (conftest.lines(folder / f"log_{name}_test_seed_1337.txt") for name in ("left", "killed"))
    assert cut == left
    assert not any(home.glob("*.tmp"))
    return {"kills": killed, "while_writing_a_checkpoint": mid_write, "lines_compared": len(left), "resumed_at": lived}


def wait_for_step(process):
    """Until the first training step of this life is printed; True if it ended without one."""
    return all("| loss" not in line for line in process.stdout)


if __name__ == "__main__":
    common.run(main)
