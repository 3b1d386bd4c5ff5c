"""The code that runs on CUDA, on a cuda:0 without a GPU: its tensors have shapes, types and strides, and no data.

    LD_PRELOAD=library python fake_cuda.py DATA_ROOT    # a line of JSON per variant and per fault that is put in

Started by test_cuda_path.py; the library is built from fake_cuda.cpp. A variant is the trainer's own loop: two steps,
compiled, with validation, HellaSwag and samples around them, while `Watch` sees every operator.
"""

import contextlib
import functools
import json
import math
import sys
import warnings
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hellaswag
import sample
import train_single_gpu as trainer
import weights
from lab import devices, kernels, optim
from lab.tokenizer import get_tokenizer
from model import GPT, MoE, Router, RouterStats
from variants import VARIANTS

# ---------------------------------------------------------------------------------------------------------------------
# The device

ANSWERS = {
    "is_available": True, "is_initialized": True, "is_bf16_supported": True, "device_count": 1, "current_device": 0,
    "_exchange_device": 0, "_maybe_exchange_device": 0, "_lazy_init": None, "manual_seed_all": None,
    "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None, "get_device_name": "fake",
}


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
    "aten::_unique2", "aten::repeat_interleave", "aten::multinomial",
}
# Of a part of a run: transfers to the host, and uploads that block the host. Samples are four tokens.
LIMITS = {"step": (1, 0), "validation": (1, 0), "hellaswag": (2, 0), "samples": (9, 1)}


def require(good, problem):
    if not good:
        raise AssertionError(problem)


class Watch(TorchDispatchMode):
    """Raises at operands that a kernel refuses, at products in float32 and where the host waits for the device.

    Allowed products in float32 are those of a router with router_use_full_prec. Counts grouped products; reads,
    transfers to the host by tolist(), cpu() and bool(), whose values are made up; uploads, transfers to the device that
    block the host.
    """

    def __init__(self, args):
        super().__init__()
        self.router_width, self.grouped = args.n_exp if args.router_use_full_prec else None, 0
        self.start()

    def start(self):
        self.reads, self.uploads, self.updated = 0, 0, False

    def check(self, part):
        """Hold what happened since the last check to the limits of this part of a run."""
        reads, uploads = LIMITS[part]
        require(self.reads <= reads, f"{part}: {self.reads} transfers to the host, at most {reads}")
        require(self.uploads <= uploads, f"{part}: {self.uploads} uploads that block, at most {uploads}")
        self.start()

    def watched(self, part, function):
        def call(*args):
            self.start()
            result = function(*args)
            self.check(part)
            return result

        return call

    @classmethod
    def ignore_compile_internals(cls):  # else torch.compile does nothing under this mode
        return True

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "generator"}  # nothing is drawn
        from_cuda = any(x.is_cuda for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
        require(not (name in WAITING and from_cuda), f"{name}: the host waits for the device")
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
# A run

TINY = {
    "vocab_size": 320, "n_layer": 2, "n_head": 4, "n_embd": 64, "n_exp": 8, "T": 32, "B": 2, "total_batch_size": 128,
    "max_steps": 2, "warmup_steps": 1, "val_loss_every": 1, "val_tokens": 128, "hellaswag_every": 1,
    "sample_from_model_every": 1, "save_checkpoint": False, "device": "cuda", "dtype": "auto",
}
EXAMPLE = {"ctx": "the router sends", "endings": ["a token", "tokens", "to two experts", "a token"], "label": 2}


def samples(run, model, tokenizer, args, machine, step):
    prompt = "a" * (args.T - 2)  # the window slides at the third token
    sample.continue_prompt(model, tokenizer, prompt, 2, 4, 0, machine)


def patches(watch, counter):
    """(owner, name, replacement): what holds the trainer's loop to `watch`, and compiles for `counter`."""
    build_model, build_optimizer = trainer.build_model, optim.build_optimizer
    tokenizer = get_tokenizer("bytes")

    def model_on_cuda(*args):
        with torch.device("cuda"):
            return build_model(*args)

    def watched_optimizer(*args):
        optimizer = build_optimizer(*args)
        optimizer.register_step_pre_hook(check_gradients)
        optimizer.register_step_post_hook(lambda *_: setattr(watch, "updated", True))
        return optimizer

    return [
        (FakeTensor, "cpu", lambda x: watch.read(x)), (FakeTensor, "numpy", lambda x: watch.read(x).numpy()),
        (FakeTensor, "tolist", lambda x: watch.read(x).tolist()), (FakeTensor, "__bool__", lambda x: x.tolist()),
        (F, "scaled_dot_product_attention", check_attention),
        (torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True)),
        (GPT, "to", lambda model, device: model), (trainer, "build_model", model_on_cuda),
        (weights, "leak", lambda *_: 0.0),  # it looks at values
        (optim, "build_optimizer", watched_optimizer),
        (trainer, "load_evaluations", lambda *_: (tokenizer, hellaswag.tokenize([EXAMPLE] * 2, tokenizer))),
        (trainer, "start", lambda *_: None), (trainer, "log_step", lambda *_: watch.check("step")),
        (trainer, "validate", watch.watched("validation", trainer.validate)),
        (hellaswag, "evaluate", watch.watched("hellaswag", hellaswag.evaluate)),
        (trainer, "say_samples", watch.watched("samples", samples)),
    ]


def watch_run(data_root, settings, compiled=True):
    """{error: None or the text of the first one, graphs: number compiled, grouped: number of grouped products}."""
    torch._dynamo.reset_code_caches()
    args = trainer.Args(**TINY | settings, data_root=data_root, use_compile=compiled)
    run = mock.MagicMock(open=lambda: ("fake", None), args=args, state=None, lost=False, last={})
    watch, counter, error = Watch(args), CompileCounterWithBackend("eager"), None
    with FakeTensorMode(allow_non_fake_inputs=True), watch, contextlib.ExitStack() as stack:
        for owner, name, replacement in patches(watch, counter):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(mock.patch.dict(kernels.LOGITS_PER_CHUNK, cuda=2**14))  # two chunks
        try:
            machine = devices.set_up_machine(args)
            require(torch.get_float32_matmul_precision() == "highest", "float32 is TF32: --router_use_full_prec")
            trainer.train(args, machine, run)
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
    return {"error": error, "graphs": counter.frame_count, "grouped": watch.grouped}


RUNS = {
    "dense": {"n_exp": 1, "qk_norm": True, "bias": False, "dropout": 0.1},
    "top 2": {},
    "top 1": {"top_k": 1, "gate": "softmax", "n_shared_exp": 1, "optimizer": "muon", "freeze_router": True},
    "losses": {"use_noisy_top_k": True, "use_aux_loss": True, "use_router_z_loss": True, "router_use_full_prec": True},
    "step": {"use_aux_loss": True, "balance_scope": "step", "train_capacity": math.inf, "eval_capacity": math.inf,
             "use_router_z_loss": True},
    "sequence": {"use_aux_loss": True, "balance_scope": "sequence", "gate": "sigmoid", "use_bias_balance": True},
    "quantile": {"use_quantile_balance": True, "recompute": "blocks", "first_dense": 1},
}
NUMBERS = {"use_switch_tfm_init", "switch_tfm_init_scale", "mlp_init", "expert_hidden", "n_exp",
           "top_k", "schedule"}  # the graph is the same


def all_runs():
    """RUNS, and each variant with a setting that none of them has."""
    found, covered = dict(RUNS), {item for settings in RUNS.values() for item in settings.items()}
    for variant in VARIANTS.values():
        if {item for item in variant.settings.items() if item[0] not in NUMBERS} - covered:
            found[variant.name] = variant.settings
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Faults, each of which Watch must find


def transposed_gradient(x, weight, offs):
    y = grouped_mm(x, weight, offs=offs)
    if y.requires_grad:
        y.register_hook(lambda grad: grad.t().contiguous().t())
    return y


def product_in_float32(router, x_TD, linear):
    with torch.autocast("cuda", enabled=False):
        return F.linear(x_TD.float(), linear.weight)


FAULTS = {  # (owner, name, replacement, compiled)
    "int64 offsets": (F, "grouped_mm", lambda x, weight, offs: grouped_mm(x, weight, offs=offs.long()), False),
    "transposed gradient": (F, "grouped_mm", transposed_gradient, False),
    "router in float32": (Router, "product", product_in_float32, False),
    "item": (MoE, "record", lambda moe, routing, plan, capacity: plan.count_E.sum().item(), False),
    "graph break": (MoE, "record", lambda *_: torch._dynamo.graph_break(), True),
    "batch not pinned": (torch.Tensor, "pin_memory", lambda tensor: tensor, False),
    "read after the update": (RouterStats, "move_biases", lambda stats: stats.sums_L.tolist(), False),
    "attention by cuDNN": (hellaswag, "sdpa_kernel", lambda kernels: contextlib.nullcontext(), False),
}


def watch_fault(data_root, fault):
    *replaced, compiled = fault
    with mock.patch.object(*replaced):
        return watch_run(data_root, {}, compiled)


def main():
    pretend()
    warnings.simplefilter("ignore", UserWarning)
    for kind, cases, watch in ("variants", all_runs(), watch_run), ("faults", FAULTS, watch_fault):
        for name, case in cases.items():
            print(json.dumps({"kind": kind, "name": name} | watch(sys.argv[1], case)), flush=True)


if __name__ == "__main__":
    main()
