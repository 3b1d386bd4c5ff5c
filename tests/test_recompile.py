"""Blocks compiled on the CPU: one graph per kind, none compiled again, none split by DDP, gradients as eager ones;
what they keep for backward."""

import copy
import functools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import end, fork
from test_model import SETTINGS, gradients, make, tokens
from torch._dynamo.testing import CompileCounterWithBackend

from lab import common, devices
from model import GPT, GPTConfig

pytestmark = pytest.mark.slow


def count_graphs(compile=torch.compile):
    """A counter of graphs, of forward and backward, and torch.compile for it, which raises at a graph break."""
    counter = CompileCounterWithBackend("aot_eager")
    return counter, functools.partial(compile, backend=counter, fullgraph=True)


def parallel(model, world_size=1, budget=None):
    """The model as on CUDA, in bfloat16."""
    args = SimpleNamespace(activation_memory_budget=budget, recompute="none", fsdp=False)
    machine = devices.Machine(torch.device("cpu"), torch.bfloat16, 0, world_size, False)
    with mock.patch.object(devices, "is_compiled", lambda *_: True):
        return devices.parallelize(model, args, machine)


def kept_bytes(call, model, x, y):
    """Bytes that a forward keeps for its backward, which it makes, without the weights."""
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = call(x, y).loss
        total = sum(n_bytes for pointer, n_bytes in kept.items() if pointer not in weights)
    loss.backward()
    return total


def test_a_budget_of_memory_keeps_less_for_backward_and_changes_no_gradient(monkeypatch):
    """Of dense and of MoE blocks; 0 keeps what enters a block and what the loss keeps."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    kept, found = {}, {}
    for budget in (None, 0.0):
        torch._dynamo.reset()
        model = make(n_layer=2, n_exp=4, n_embd=64, use_aux_loss=True)
        with torch._functorch.config.patch(activation_memory_budget=1.0):  # and back to that
            kept[budget] = kept_bytes(parallel(model, budget=budget), model, *tokens(S=32))
        found[budget] = gradients(model)
        torch.testing.assert_close(found[budget], found[None], rtol=1e-2, atol=1e-4)
    assert kept[0.0] < 0.2 * kept[None]


@pytest.mark.parametrize("name", ["tight", "aux_step", "all_tricks"])
def test_compiled_training_is_eager_training_in_a_graph_per_kind_of_block(name, monkeypatch):
    """Three micro-batches with an evaluation between them, whatever the routing."""
    torch._dynamo.reset()
    counter, compile = count_graphs()
    monkeypatch.setattr(torch, "compile", compile)
    eager = make(**SETTINGS[name] | {"n_layer": 4, "n_exp": 8, "expert_hidden": 32})
    compiled = parallel(copy.deepcopy(eager))
    for seed in range(3):
        for model in (eager, compiled):
            torch.manual_seed(seed)
            with torch.autocast("cpu", torch.bfloat16):
                model(*tokens(seed=seed)).loss.backward()
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                model.eval()(*tokens(S=9, seed=seed))
            model.train()
    assert counter.frame_count == 3  # MoE block, dense block, chunk of the loss
    torch.testing.assert_close(gradients(compiled), gradients(eager), rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(dict(compiled.named_buffers()), dict(eager.named_buffers()), rtol=1e-3, atol=1e-5)


def step_under_ddp():
    counter, torch.compile = count_graphs()
    config = GPTConfig(n_layer=2, n_head=12, n_embd=768, vocab_size=64, block_size=8, n_exp=4)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    model = parallel(GPT(config, torch.Generator().manual_seed(0)), world_size=2)
    with torch.autocast("cpu", torch.bfloat16):
        model(*tokens(S=8)).loss.backward()
    common.exit_now(counter.frame_count)


def test_ddp_splits_no_block_of_real_size():
    """torch's DDPOptimizer would cut what is compiled at every 25 MB of gradients; blocks are DDP's own overlap. In a
    process that ends at once: one that frees a model under DDP sometimes waits for ever for a thread of gloo."""
    end(fork(step_under_ddp), code=3)  # graphs
