"""What a long run must survive: kills at random moments; and what it must not do: grow."""

import random
import statistics

import psutil
import pytest
from conftest import streams
from kill_and_resume import torture

import train_single_gpu as trainer

pytestmark = pytest.mark.slow


def test_killed_and_resumed_is_the_run_left_alone(tmp_path):
    """Two kills; `python tests/kill_and_resume.py --kills 30` for more. A sharded run: test_distributed.py."""
    assert torture(tmp_path, 2, random.Random(1))["kills"] == 2


def test_memory_and_file_handles_stay_flat_over_800_steps(train, monkeypatch):
    """From step 300 on: by then the first evaluation, checkpoints and samples have loaded what they need."""
    process, log_step, seen = psutil.Process(), trainer.log_step, []

    def watched(*args):
        seen.append((process.memory_info().rss, process.num_fds()))
        log_step(*args)

    monkeypatch.setattr(trainer, "log_step", watched)
    code, folder = train(max_steps=800, n_embd=16, n_layer=1, total_batch_size=64, B=2, val_loss_every=100,
                         sample_from_model_every=200, save_checkpoint_every=100)
    assert code == 0 and len(streams(folder)["train"][0]) == len(seen) == 800
    memory, handles = zip(*seen, strict=True)
    assert statistics.median(memory[650:]) < 1.008 * statistics.median(memory[300:450])
    assert max(handles[650:]) <= max(handles[300:450]) + 1
