"""A rank of test_distributed.py: one tiny run after another in one process, to pay for the start once.

Arguments: a JSON list of settings, and the URL at which the ranks meet.
"""

import json
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
import torch.distributed as dist

import train_single_gpu as trainer
from lab import common

warnings.simplefilter("ignore", UserWarning)
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=world_size)  # one for all of them
for settings in json.loads(sys.argv[1].replace("{rank}", os.environ["RANK"])):
    if settings.get("compile_on_cpu"):  # the same graphs; inductor would take a minute to compile them
        torch.compiler.set_stance(force_backend="aot_eager")
    code = trainer.run(trainer.Args(**settings))
    assert code == 0, code
dist.destroy_process_group()
common.exit_now(0)
