"""Fully sharded training (`--fsdp`) for models that outgrow one GPU: each of N ranks holds 1/N of parameters, gradients
and optimizer state."""

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method


def shard(model):
    """Shard a GPT in place: one group of parameters per block and one for the rest. Every rank calls it."""
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "hidden_states")  # HellaSwag and sampling call it without forward()
    return model
