"""Fully sharded training (`--fsdp`): each of N ranks holds 1/N of parameters, gradients and optimizer state.

For models that outgrow one GPU. Checkpoints stay what they are: whole tensors, so a run of N ranks, sharded or not,
goes on over M.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only


def shard(model):
    """Shard a GPT in place, a group of parameters per block and one for the rest. Every rank calls it."""
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "hidden_states")  # called by HellaSwag and sampling without forward()
    return model


def whole(state):
    """The state dict with its sharded tensors gathered. Every rank calls it."""
    return tree_map_only(DTensor, lambda tensor: tensor.full_tensor(), state)


@torch.no_grad()
def fill(model, optimizer, state):
    """Load a checkpoint of whole tensors into a sharded model and its optimizer. Every rank calls it."""
    spread = {name: like(state["model"][name], tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict(spread)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        i: {
            name: like(value, params[i]) if value.shape == params[i].shape else value
            for name, value in of_param.items()
        }
        for i, of_param in state["optimizer"]["state"].items()
    }
    optimizer.load_state_dict(state["optimizer"] | {"state": moments})


def like(tensor, sharded):
    """`tensor` in the layout of `sharded`; as it is where that is no DTensor (a buffer)."""
    if not isinstance(sharded, DTensor):
        return tensor
    return distribute_tensor(tensor.to(sharded.device), sharded.device_mesh, sharded.placements)
