"""A compiled run stays one graph: steps change, and evaluation comes between them."""

import functools
import json

import fake_cuda
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

RUN = {
    "max_steps": 50, "n_layer": 1, "T": 16, "B": 2, "total_batch_size": 32, "val_loss_every": 10, "hellaswag_every": 10,
    "sample_from_model_every": 25, "compile_on_cpu": True, "save_checkpoint": False,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", fake_cuda.variants())
def test_one_graph_over_fifty_steps(name, train, tmp_path, monkeypatch):
    """With validation, HellaSwag and samples between them. fullgraph raises at a graph break."""
    torch._dynamo.reset()
    (tmp_path / "hellaswag.jsonl").write_text(json.dumps(fake_cuda.EXAMPLE))
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True))
    code, streams = train(**RUN | fake_cuda.variants()[name], hellaswag_data=str(tmp_path / "hellaswag.jsonl"))
    assert code == 0 and len(streams["train"][0]) == 50 and len(streams["hella"][0]) == 6
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"output_z_loss_weight": 1e-4}], ids=str)
def test_each_kind_of_block_and_the_loss_are_a_graph_each(settings, train, monkeypatch):
    """Where blocks are computed again, as over several ranks: a MoE block, a dense one, the loss."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True))
    run = RUN | settings | {"n_layer": 4, "max_steps": 4, "hellaswag_every": 0, "val_loss_every": 2}
    code, _ = train(**run, recompute="blocks")
    assert code == 0 and counter.frame_count == 3
