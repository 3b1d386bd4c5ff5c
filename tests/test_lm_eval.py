"""An exported MoE in lm-evaluation-harness, by its command: the numbers are those of hellaswag.py."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import hellaswag
from lab.tokenizer import get_tokenizer
from model import GPT, GPTConfig
from weights import export_hf

DATA = ROOT / "tests" / "data" / "hellaswag_50.jsonl"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: make test-eval"),
]

TASK = f"""
task: hellaswag_file
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {json.dumps(str(DATA))}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{ctx}}}}"
doc_to_choice: endings
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def test_its_accuracy_and_likelihoods_are_ours(tmp_path):
    """With plain bytes. No text is longer than the positions: its window for such a text differs."""
    tokenizer = get_tokenizer("bytes")
    model = GPT(GPTConfig(1024, tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=32, n_exp=4))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.normal_(std=0.3, generator=generator)
    export_hf(model, tmp_path / "out", "bytes")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "hellaswag_file.yaml").write_text(TASK)
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "hellaswag_file",
        "--model_args", f"pretrained={tmp_path / 'out'},trust_remote_code=True",
        "--include_path", str(tmp_path / "tasks"), "--device", "cpu", "--batch_size", "8",
        "--output_path", str(tmp_path / "results"), "--log_samples",
    ]
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    env = {**os.environ, **offline, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]

    examples = hellaswag.tokenize(hellaswag.load_examples(DATA), tokenizer)
    losses, counts = hellaswag.ending_losses(model, examples, "cpu")
    result = json.loads(next((tmp_path / "results").rglob("results_*.json")).read_text())["results"]["hellaswag_file"]
    assert result["acc,none"] == hellaswag.summarize(examples, losses, counts)["acc"]
    lines = next((tmp_path / "results").rglob("samples_*.jsonl")).read_text().splitlines()
    rows = sorted((json.loads(line) for line in lines), key=lambda row: row["doc_id"])
    theirs = np.array([[float(value) for (value, _), *_ in row["resps"]] for row in rows])
    np.testing.assert_allclose(-theirs, losses, rtol=1e-5)
