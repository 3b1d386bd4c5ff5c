"""What a long run must survive: kills at random moments; and what it must not do: grow."""

import random
import statistics

import psutil
import pytest
from kill_and_resume import torture

import train_single_gpu as trainer

pytestmark = pytest.mark.slow


def test_killed_and_resumed_is_the_run_left_alone(tmp_path):
    """Two kills; `python tests/kill_and_resume.py --kills 100` for more, with its output in results/survival.json.

    A sharded run: test_two_nodes_of_which_one_dies_... in test_distributed.py, and `--ranks 2`.
    """
    assert torture(tmp_path, 2, random.Random(1))["kills"] == 2


def test_memory_and_file_handles_stay_flat_over_2000_steps(train, monkeypatch):
    """From step 600 on: by then the first evaluation, checkpoints and samples have loaded what they need."""
    process, step, seen = psutil.Process(), trainer.train_step, []

    def watched_step(*args):
        seen.append((process.memory_info().rss, process.num_fds()))
        return step(*args)

    monkeypatch.setattr(trainer, "train_step", watched_step)
    code, streams = train(max_steps=2000, n_embd=16, n_layer=1, total_batch_size=64, B=2, val_loss_every=100,
                          sample_from_model_every=500, save_checkpoint_every=100)  # fmt: skip
    assert code == 0 and len(streams["train"][0]) == len(seen) == 2000
    memory, handles = zip(*seen, strict=True)
    assert statistics.median(memory[1600:]) < 1.02 * statistics.median(memory[600:1000])
    assert max(handles[1600:]) <= max(handles[600:1000]) + 1
