"""MB that a block of GPT-2 124M keeps for backward by --activation_memory_budget, counted without a GPU.

    LD_PRELOAD=fake_cuda.so PYTHONPATH=.:tests python results/bench/kept_activations.py

The library is built as in tests/test_cuda_path.py. A block is compiled for the fake device, 16 x 1,024 tokens in
bfloat16, up to Inductor's kernels: what the compiler keeps is what its backward is given. Attention is flash attention,
which that device would not choose.
"""

import functools
from types import SimpleNamespace

import fake_cuda
import torch
import torch.nn.functional as F
from torch._functorch import config as functorch
from torch._subclasses.fake_tensor import FakeTensorMode

from lab import devices
from model import GPT, GPTConfig

TOKENS, WIDTH = (16, 1024), 768
MACHINE = devices.Machine(torch.device("cuda"), torch.bfloat16, 0, 1, False)


def flash_attention(q, k, v, mask=None, dropout_p=0.0, is_causal=False, **_):
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]


def kept_by(budget, n_exp):
    """MB of the tensors that the forward of a block saves, without its weights."""
    torch._dynamo.reset()
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes(), tensor  # the tensor, so that no other gets its place
        return tensor

    config = GPTConfig(block_size=1024, vocab_size=64, n_layer=1, n_head=12, n_embd=WIDTH, n_exp=n_exp, stride=1)
    args = SimpleNamespace(activation_memory_budget=budget, recompute="none", fsdp=False)
    fake, saved = FakeTensorMode(allow_non_fake_inputs=True), torch.autograd.graph.saved_tensors_hooks
    with fake, torch.device("cuda"), functorch.patch(activation_memory_budget=1.0), MACHINE.autocast():
        model = GPT(config)
        devices.is_compiled = lambda *_: True
        devices.parallelize(model, args, MACHINE)
        with saved(keep, lambda tensor: tensor):
            y = model.transformer.h[0](torch.empty(*TOKENS, WIDTH, requires_grad=True))
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        del y
    return sum(n_bytes for key, (n_bytes, _) in kept.items() if key not in weights) / 1e6


fake_cuda.pretend()
F.scaled_dot_product_attention = flash_attention
torch.compile = functools.partial(torch.compile, backend="aot_eager_decomp_partition", fullgraph=True)
for budget in (None, 0.9, 0.7, 0.5, 0.3, 0.0):
    print(budget, f"dense {kept_by(budget, 1):.0f} MB, top 2 {kept_by(budget, 8):.0f} MB", flush=True)
