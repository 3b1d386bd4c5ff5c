"""What a long run must survive: kills at random moments; and what it must not do: grow."""

import random
import threading

import psutil
from kill_and_resume import torture


def test_killed_and_resumed_is_the_run_left_alone(tmp_path):
    """Two kills; `python tests/kill_and_resume.py --kills 20` for more, with its output in results/survival.json."""
    assert torture(tmp_path, 2, random.Random(1))["kills"] == 2


def test_memory_and_file_handles_stay_flat_over_2000_steps(train):
    process, seen = psutil.Process(), []

    def watch(stop):
        while not stop.wait(0.25):
            seen.append((process.memory_info().rss, process.num_fds()))

    stop = threading.Event()
    watcher = threading.Thread(target=watch, args=(stop,))
    watcher.start()
    code, streams = train(max_steps=2000, n_embd=16, n_layer=1, total_batch_size=64, B=2, val_loss_every=100,
                          sample_from_model_every=500, save_checkpoint_every=100)  # fmt: skip
    stop.set()
    watcher.join()
    assert code == 0 and len(streams["train"][0]) == 2000
    quarter = len(seen) // 4
    memory, handles = zip(*seen, strict=True)
    early, late = (sorted(part)[len(part) // 2] for part in (memory[quarter : 2 * quarter], memory[-quarter:]))
    assert late < 1.02 * early
    assert max(handles[-quarter:]) <= max(handles[quarter : 2 * quarter]) + 1
