"""The code that runs on CUDA, on a cuda:0 without a GPU: its tensors have shapes, types and strides, and no data.

    LD_PRELOAD=library python fake_cuda.py DATA_ROOT    # a line of JSON per variant and per fault that is put in

Started by test_cuda_path.py; the library is built from fake_cuda.cpp. A variant makes two training steps, compiled,
with validation, HellaSwag and samples between them, while `Watch` sees every operator.
"""

import contextlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))
import moe
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hellaswag
import sample
import sweep
import train_single_gpu as trainer
from lab import common, kernels, optim
from lab.data import DataLoader
from lab.tokenizer import get_tokenizer
from model import GPT

# ---------------------------------------------------------------------------------------------------------------------
# The device

ANSWERS = {
    "is_available": True, "is_initialized": True, "is_bf16_supported": True, "device_count": 1, "current_device": 0,
    "_exchange_device": 0, "_maybe_exchange_device": 0, "_lazy_init": None, "manual_seed_all": None,
    "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,
}  # fmt: skip


def pretend():
    """Tell torch's Python code that there is one CUDA device."""

    def constant(value):  # a function for each name: dynamo tells them apart
        return lambda *args, **kwargs: value

    for name, value in ANSWERS.items():
        setattr(torch.cuda, name, constant(value))
    fake_tensor.init_gpu_context = constant(None)
    FakeTensorMode.avoid_device_init = property(constant(True))
    torch.Generator = Generator


class Generator(torch.Generator):
    """Of the CPU, whatever the device: fake tensors draw nothing."""

    def __new__(cls, device=None):
        return super().__new__(cls)


# ---------------------------------------------------------------------------------------------------------------------
# What a GPU would refuse or wait for

# Operators in which the host waits for the device; multinomial checks its probabilities on the host.
WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::bincount",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave", "aten::multinomial",
}  # fmt: skip


class Wrong(Exception):
    pass


def require(good, problem):
    if not good:
        raise Wrong(problem)


class Watch(TorchDispatchMode):
    """Raises Wrong at operands that a kernel refuses, at products in float32 and where the host waits for the device.

    Allowed products in float32 have a size `router_width`; None allows none. Counts grouped products; reads, transfers
    to the host by tolist() and cpu(), whose values are made up; uploads, transfers to the device that block the host.
    """

    def __init__(self, router_width):
        super().__init__()
        self.router_width, self.grouped = router_width, 0
        self.start()

    def start(self):
        self.reads, self.uploads, self.updated = 0, 0, False

    @classmethod
    def ignore_compile_internals(cls):  # else torch.compile does nothing under this mode
        return True

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "generator"}  # nothing is drawn
        from_cuda = any(x.is_cuda for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
        waits = name in WAITING or name.startswith("moe::experts")  # the loop over experts reads their loads
        require(not (waits and from_cuda), f"{name}: the host waits for the device")
        if name == "aten::_grouped_mm":
            self.grouped += 1
            check_grouped_mm(*args, **kwargs)
        if name in ("aten::mm", "aten::addmm") and args[-1].dtype == torch.float32:
            sizes = (*args[-2].shape, *args[-1].shape)
            require(self.router_width in sizes, f"a product in float32: {sizes}")
        if name == "aten::_pin_memory":
            pinned = args[0].clone()
            pinned.pinned = True
            return pinned
        out = op(*args, **kwargs)
        if name in ("aten::_to_copy", "aten::copy_"):
            source = args[name == "aten::copy_"]
            free = hasattr(source, "pinned") and (kwargs.get("non_blocking") or args[2:] == (True,))
            self.uploads += out.is_cuda and source.is_cpu and not free
        to_host = from_cuda and any(x.is_cpu for x in tree_leaves(out) if isinstance(x, torch.Tensor))
        require(not to_host, f"{name}: a copy to the host")
        return out

    def read(self, tensor):
        """1.0, 0 or False in the shape of the tensor, on the host."""
        require(not (tensor.is_cuda and self.updated), "the host waits for the optimizer")
        self.reads += tensor.is_cuda
        with unset_fake_temporarily():
            return torch.full(tensor.shape, tensor.dtype.is_floating_point, dtype=tensor.dtype)

    def after_update(self, *_):
        self.updated = True


def check_grouped_mm(a, b, offs, *_):
    """Rows (N, D) by experts (E, D, F), or the gradient of the experts, (D, N) by (N, F)."""
    shapes = f"{tuple(a.shape)}, strides {a.stride()}, by {tuple(b.shape)}, strides {b.stride()}"
    require(a.dtype == b.dtype == torch.bfloat16, f"grouped_mm in {a.dtype} and {b.dtype}")
    require(offs.dtype == torch.int32 and offs.is_contiguous(), f"grouped_mm, offsets {offs.dtype} {offs.stride()}")
    experts = b.dim() == 3 and a.is_contiguous() and (b.is_contiguous() or b.mT.is_contiguous())
    require(experts or (a.mT.is_contiguous() and b.dim() == 2 and b.is_contiguous()), f"grouped_mm of {shapes}")
    aligned = all(stride % 8 == 0 for stride in (*a.stride(), *b.stride()) if stride > 1)
    require(aligned, f"grouped_mm, rows that are no multiple of 16 bytes: {shapes}")


attention, grouped_mm = F.scaled_dot_product_attention, F.grouped_mm


def check_attention(q, k, v, mask=None, **settings):
    require(q.dtype == k.dtype == v.dtype == torch.bfloat16, f"attention in {q.dtype}")
    if mask is not None or q.shape != k.shape:
        require(not torch.backends.cuda.cudnn_sdp_enabled(), "attention by cuDNN, which plans anew for every shape")
    return attention(q, k, v, mask, **settings)


def check_gradients(optimizer, *_):
    for p in (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad):
        require(p.grad is not None and p.grad.is_cuda and p.grad.dtype == p.dtype, f"gradient of {tuple(p.shape)}")
        require(p.grad.is_contiguous(), f"gradient of {tuple(p.shape)}, strides {p.grad.stride()}")


# ---------------------------------------------------------------------------------------------------------------------
# A run, and its parts

TINY = {"vocab_size": 320, "n_layer": 1, "n_head": 4, "n_embd": 64, "n_exp": 8, "T": 32, "B": 2,
        "total_batch_size": 64, "device": "cuda"}  # fmt: skip
EXAMPLE = {"ctx": "the router sends", "endings": ["a token", "tokens", "to two experts", "a token"], "label": 2}
LIMITS = {"step": (2, 0), "validation": (1, 1), "hellaswag": (1, 0), "samples": (3, 1), "next step": (2, 0)}


def new_run(data_root, args, counter, watch):
    machine = common.set_up_machine(args.device, args.dtype)
    require(torch.get_float32_matmul_precision() == "highest", "products in float32 are TF32: --router_use_full_prec")
    with torch.device("cuda"):
        model = GPT(trainer.model_config(args))
    data = {"B": args.B, "T": args.T, "vocab_size": args.vocab_size, "device": machine.device}
    optimizer = optim.build_optimizer(model, args)
    optimizer.register_step_pre_hook(check_gradients)
    optimizer.register_step_post_hook(watch.after_update)
    return SimpleNamespace(
        args=args, machine=machine, raw_model=model, optimizer=optimizer,
        model=torch.compile(model, backend=counter, fullgraph=True) if counter else model,
        loader=DataLoader(data_root, "train", **data), val_loader=DataLoader(data_root, "val", **data),
        console=SimpleNamespace(bar_over=lambda batches, name: batches), log=SimpleNamespace(error=None),
        stop=SimpleNamespace(requested=False), progress=trainer.Progress(), saved_at=time.monotonic(),
    )  # fmt: skip


def parts_of(run):
    model, tokenizer = run.raw_model, get_tokenizer("bytes")
    examples = hellaswag.tokenize([EXAMPLE] * 2, tokenizer)
    prompt = "a" * (run.args.T - 2)  # the window slides at the third token
    return {
        "step": lambda: trainer.train_step(run),
        "validation": lambda: trainer.validate(model, run.val_loader, 2, run.machine, run.console),
        "hellaswag": lambda: hellaswag.evaluate(model, examples, run.machine.device),
        "samples": lambda: sample.continue_prompt(model, tokenizer, prompt, 2, 4, 0, run.machine),
        "next step": lambda: trainer.train_step(run),
    }


def watch_run(data_root, settings, parts=tuple(LIMITS), compiled=True):
    """{error: None or the text of the first one, graphs: number compiled, grouped: number of grouped products}."""
    torch._dynamo.reset_code_caches()
    args, counter = trainer.Args(**TINY | settings), CompileCounterWithBackend("eager")
    watch, error = Watch(args.n_exp if args.router_use_full_prec else None), None
    with FakeTensorMode(allow_non_fake_inputs=True), watch, contextlib.ExitStack() as patches:
        for name, read in (("cpu", lambda x: watch.read(x)), ("tolist", lambda x: watch.read(x).tolist())):
            patches.enter_context(mock.patch.object(FakeTensor, name, read))
        patches.enter_context(mock.patch.object(F, "scaled_dot_product_attention", check_attention))
        patches.enter_context(mock.patch.dict(kernels.LOGITS_PER_CHUNK, cuda=2**14))  # two chunks
        run = new_run(data_root, args, counter if compiled else None, watch)
        try:
            for name in parts:
                watch.start()
                parts_of(run)[name]()
                reads, uploads = LIMITS[name]
                require(watch.reads <= reads, f"{name}: {watch.reads} transfers to the host, at most {reads}")
                require(watch.uploads <= uploads, f"{name}: {watch.uploads} uploads that block, at most {uploads}")
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        run.loader.pool.shutdown()
    return {"error": error, "graphs": counter.frame_count, "grouped": watch.grouped}


# ---------------------------------------------------------------------------------------------------------------------
# Variants


NUMBERS = {"first_dense", "use_switch_tfm_init", "switch_tfm_init_scale", "mlp_init", "mlp_init_scale", "gate_scale",
           "noise_scale", "expert_hidden", "router_lr_scale", "router_weight_decay", "schedule"}  # fmt: skip
REST = {"bias": False, "dropout": 0.1, "qk_norm": True, "output_z_loss_weight": 1e-4}
MORE = {  # settings that no variant has, and several at once
    "dense, rest": {"n_exp": 1} | REST,
    "MoE, rest, narrow": {"train_capacity": math.inf, "expert_hidden": 32} | REST,
    "Muon, shared expert": {"optimizer": "muon", "n_shared_exp": 1},
}


def variants():
    """{name: settings} of the variants in sweep.py that differ in their graph, not in numbers and widths alone, and of
    MORE. One whose settings are a part of another one's is left out.

    Not Adafactor: torch's reads two norms per parameter.
    """
    found = dict(MORE)
    for variant in sweep.VARIANTS.values():
        settings = {name: value for name, value in variant.settings.items() if name not in NUMBERS}
        found |= {variant.name: settings} if settings not in found.values() else {}
    return {name: x for name, x in found.items() if not any(x.items() < other.items() for other in found.values())}


# ---------------------------------------------------------------------------------------------------------------------
# Faults, each of which Watch must find


class Fault(NamedTuple):
    owner: object  # where the replacement is put ...
    name: str  # ... in the place of this
    replacement: Callable
    part: str = "step"
    compiled: bool = False


def wrong_product(change):
    """F.grouped_mm with its arguments changed."""
    return Fault(F, "grouped_mm", lambda x, weight, offs: change(x, weight, offs))


class ChangeGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, change):
        ctx.change = change
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(grad), None


def wrong_gradient(change):
    def product(x, weight, offs):
        if weight.dim() == 2:  # x is transposed and weight the gradient
            return grouped_mm(x, change(weight), offs=offs)
        return ChangeGradient.apply(grouped_mm(x, weight, offs=offs), change)

    return wrong_product(product)


def wrong_record(record, compiled=False):
    return Fault(moe.MoE, "record", lambda self, routing, plan, capacity: record(plan), compiled=compiled)


def product_in_float32(router, x_TD, linear):
    with torch.autocast("cuda", enabled=False):
        return F.linear(x_TD.float(), linear.weight)


def checked_draw(logits, *_):
    return torch.multinomial(torch.softmax(logits.float(), -1), 1)[:, 0]


FAULTS = {
    "int64 offsets": wrong_product(lambda x, weight, offs: grouped_mm(x, weight, offs=offs.long())),
    "strided offsets": wrong_product(lambda x, weight, offs: grouped_mm(x, weight, offs=offs.repeat(2)[::2])),
    "float32 operands": wrong_product(lambda x, weight, offs: grouped_mm(x.float(), weight.float(), offs=offs)),
    "expanded gradient": wrong_gradient(lambda grad: grad[:1].expand_as(grad)),
    "transposed gradient": wrong_gradient(lambda grad: grad.t().contiguous().t()),
    "odd width": wrong_product(
        lambda x, weight, offs: grouped_mm(F.pad(x, (0, 4)), F.pad(weight, (0, 4, 0, 4)), offs=offs)
    ),
    "loop over experts": Fault(moe, "compute_dtype", lambda x: torch.float32),
    "router in float32": Fault(moe.Router, "product", product_in_float32),
    "item": wrong_record(lambda plan: plan.count_E.sum().item()),
    "copy to the host": wrong_record(lambda plan: plan.count_E.to("cpu")),
    "upload": wrong_record(lambda plan: plan.count_E.new_tensor([1])),
    "graph break": wrong_record(lambda plan: torch._dynamo.graph_break(), compiled=True),
    "batch not pinned": Fault(torch.Tensor, "pin_memory", lambda self: self),
    "read after the update": Fault(GPT, "update_balance_bias", lambda self, table: table.tolist()),
    "attention by cuDNN": Fault(hellaswag, "attention_without_cudnn", contextlib.nullcontext, "hellaswag"),
    "look at each token": Fault(sample, "CHECK_EVERY", 1, "samples"),
    "checked draw": Fault(sample, "sample_next", checked_draw, "samples"),
}


def watch_fault(data_root, fault):
    with mock.patch.object(fault.owner, fault.name, fault.replacement):
        return watch_run(data_root, {}, (fault.part,), fault.compiled)


def main():
    pretend()
    warnings.simplefilter("ignore", UserWarning)
    for kind, cases, watch in ("variants", variants(), watch_run), ("faults", FAULTS, watch_fault):
        for name, case in cases.items():
            print(json.dumps({"kind": kind, "name": name} | watch(sys.argv[1], case)), flush=True)


if __name__ == "__main__":
    main()
