"""Where a run computes: device, type of the matrix products, ranks; torch.compile, DDP and FSDP.

Tried and dropped: compiling the whole model, which takes 3.5 times as long to start and moves the same bytes.
"""

import ctypes
import functools
import inspect
import os
import platform
import time
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import device_mesh, fsdp
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from lab.common import UserError
from lab.kernels import chunk_loss


class Machine(NamedTuple):
    device: torch.device
    dtype: torch.dtype  # of autocast; float32: no autocast
    rank: int
    world_size: int
    fsdp: bool

    @property
    def is_main(self):
        return self.rank == 0

    @property
    def eval_share(self):
        """(rank, world size) for sharing out evaluation. Under FSDP every rank does all of it: a forward needs all."""
        return (0, 1) if self.fsdp else (self.rank, self.world_size)

    def autocast(self):
        return autocast(self.device, self.dtype)


def autocast(device, dtype):
    """torch.autocast of matrix products to `dtype`; off for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def world():
    """(rank, world size) as torchrun tells it in the environment; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def choose_device(name):
    """torch.device of that name; "auto" is the first available of cuda, mps, cpu."""
    chosen = name
    if name == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=chosen).device
    except (RuntimeError, AssertionError) as error:  # no such device; a GPU that is full, too old or broken
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {chosen} cannot be used ({reason}): free it, or pass --device cpu") from None


def set_up_machine(args):
    """The Machine of the settings device, dtype, fsdp and dist_timeout; joins torchrun's process group."""
    rank, world_size = world()
    name = args.device
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available() and name in ("auto", "cuda"):
        local_rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= count:
            raise UserError(f"rank {local_rank} of this machine has no GPU, there are {count}: lower --nproc_per_node")
        name = f"cuda:{local_rank}"
        torch.cuda.set_device(name)
    device = choose_device(name)
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=args.dist_timeout))
    # auto: bfloat16 where the GPU computes it itself. Emulated it is many times slower than float32.
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = args.dtype == "bfloat16" or (args.dtype == "auto" and native)
    if device.type == "cpu":
        keep_freed_memory()
    elif not bf16:  # under bf16 the only float32 products left are the router's with router_use_full_prec: no TF32
        torch.set_float32_matmul_precision("high")
    return Machine(device, torch.bfloat16 if bf16 else torch.float32, rank, world_size, args.fsdp)


# Dense bfloat16 FLOP/s of a GPU, by a part of its name; from the data sheets. An unknown GPU has no MFU.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12,
              "4090": 165e12, "3090": 71e12}


@functools.cache
def peak_flops(device):
    """FLOP/s of bfloat16 products of this GPU, None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def matmul_rate():
    """FLOP/s of float32 products on this CPU, from 20 ms of them."""
    a, n = torch.ones(512, 512), 0
    a @ a  # starts the threads
    began = time.perf_counter()
    while time.perf_counter() - began < 0.02:
        a @ a
        n += 1
    return n * 2 * 512**3 / (time.perf_counter() - began)


def keep_freed_memory():
    """Tell glibc to keep freed memory (up to 2 GB) for the next allocation.

    A training step on the CPU frees its gradients and allocates them again; without this their pages go back to the
    kernel each time.
    """
    if platform.libc_ver()[0] == "glibc":
        libc, m_trim_threshold, m_mmap_threshold = ctypes.CDLL(None), -1, -3  # mallopt(3)
        libc.mallopt(m_mmap_threshold, 32 * 2**20)  # the maximum: larger blocks are always mapped anew
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def from_rank_0(machine, function, *args):
    """function(*args) as rank 0 alone computes it, on every rank: any value that pickles. Its UserError is raised by
    all, so that none waits for a rank that has ended."""
    result = [None, None]
    if machine.is_main:
        try:
            result[0] = function(*args)
        except (UserError, OSError) as error:
            result[1] = str(error)
    if machine.world_size > 1:
        dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise UserError(result[1])
    return result[0]


# ---------------------------------------------------------------------------------------------------------------------
# Compile and wrap


def is_compiled(args, machine):
    return args.use_compile and machine.device.type == "cuda"


def parallelize(model, args, machine):
    """Compile the model block by block, wrap it in DDP or FSDP; parameters are shared with `model`."""
    if is_compiled(args, machine):
        # Blocks are DDP's own overlap of compute and reduction; its optimizer would split each of them again.
        torch._dynamo.config.optimize_ddp = False
        if args.activation_memory_budget is not None:
            torch._functorch.config.activation_memory_budget = args.activation_memory_budget
        for block in model.transformer.h:
            # Compiled, F.grouped_mm takes bfloat16 alone: in float32 the blocks of experts run eager.
            if machine.dtype == torch.bfloat16 or not block.is_moe:
                block.forward = torch.compile(block.forward)
        model.cross_entropy = functools.partial(model.cross_entropy, chunk_loss=torch.compile(chunk_loss))
    elif args.activation_memory_budget is not None:
        raise UserError("--activation_memory_budget is for compiled blocks, on CUDA: here pass --recompute blocks")
    if args.recompute == "blocks":
        for block in model.transformer.h:
            block.forward = computed_again(block.forward)
    if args.fsdp:
        return shard(model)
    if machine.world_size == 1:
        return model
    # Buffers are statistics and the balance bias, which every rank computes alike.
    known = inspect.signature(DistributedDataParallel).parameters
    no_sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch < 2.13
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **{no_sync: False})


def computed_again(function):
    """`function`, computed again in backward with the same random numbers instead of keeping what it made."""

    def call(*args):
        again = torch.is_grad_enabled()
        return activation_checkpoint(function, *args, use_reentrant=False) if again else function(*args)

    return call


def shard(model):
    """FSDP of a GPT in place: one group of parameters per block and one for the rest. Every rank calls it."""
    mesh = device_mesh.init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for block in model.transformer.h:
        fsdp.fully_shard(block, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)
    fsdp.register_fsdp_forward_method(model, "hidden_states")  # HellaSwag and sampling call it without forward()
    return model
