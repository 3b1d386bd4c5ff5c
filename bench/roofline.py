"""`roofline`: a training step predicted from its bytes and FLOPs, before any GPU has run it.

    python -m bench roofline --gpu h100                        # writes results/gpu/roofline_h100.txt
    python -m bench roofline --gpu h100 --grouped_tflops 500   # another rate of the grouped products

The operators of the model's forward and backward are recorded on fake tensors, by the code for CUDA and bfloat16, and
joined into kernels about as torch.compile joins them:

- A product, attention, top-k, a scan, a scatter and a sum along columns (gradient of a bias) are each a kernel.
- Any other operator joins a kernel whose result it reads, or that reads the same, if all else that it reads is there
  when that kernel starts; a kernel whose results nobody has read yet can start later.
- A kernel reads its inputs once and writes the results that other kernels read. It reads rows that are too long to be
  held twice (the logits), and so does the backward of a norm, whose sums along columns are a second pass.
- A result that costs no more to compute again than to read (product + bias) is not written.

A kernel takes the longer of FLOPs / rate and bytes / bandwidth, and GAP. Not counted: top-k and scans that few
processors share, the choice of kernels, imbalance between experts, the host.
"""

import collections
import contextlib
import dataclasses
from typing import NamedTuple
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.steps import config_of
from bench.timing import print_table
from lab import kernels as model_kernels
from lab.common import atomic_write
from model import GPT


class GPU(NamedTuple):
    """Rates in TFLOP/s, bandwidth in TB/s."""

    name: str
    peak: float  # bfloat16 without sparsity, of the data sheet
    product: float  # large products, as a rule 70 to 80 % of the peak
    attention: tuple  # causal, head width 64: forward, backward (half of the square counted)
    bandwidth: float  # 90 % of the data sheet's


# Peaks and bandwidths: NVIDIA's data sheets of H100 SXM (989 TFLOP/s, 3.35 TB/s), H200 SXM (989, 4.8), A100 SXM 80 GB
# (312, 2.04). All other rates are assumptions, to be replaced by those that `bench gpu` measures.
GPUS = {
    "h100": GPU("H100 SXM", 989, 700, (280, 200), 3.0),
    "h200": GPU("H200 SXM", 989, 700, (280, 200), 4.3),
    "a100": GPU("A100 SXM 80 GB", 312, 250, (140, 100), 1.8),
}
GAP = 1.5e-6  # seconds between two kernels
VARIANTS = ("dense", "top2", "narrow")
KINDS = ("product", "grouped product", "attention", "elementwise", "column sum", "apart", "accumulate")
STEP_TOKENS = 524_288  # per optimizer step
OPTIMIZER_BYTES = 40  # per parameter: norm 4, clip 8, AdamW reads 16 and writes 12

# ---------------------------------------------------------------------------------------------------------------------
# Recording operators


class Op(NamedTuple):
    name: str
    kind: str  # one of KINDS, or "row sum"
    reads: dict  # {storage: bytes}
    writes: dict
    numel: int  # elements that it works on
    flops: float
    shape: str  # that of its largest tensor
    backward: bool  # in the graph of the backward pass, which shares no kernel with that of the forward pass
    again: tuple  # storages that it reads a second time, or ALL that its kernel reads


PRODUCTS = ("mm", "addmm", "bmm", "_grouped_mm")
APART = ("topk", "sort", "cumsum", "scatter", "scatter_", "scatter_add", "scatter_add_", "embedding_dense_backward",
         "searchsorted", "index_put", "index_put_", "bincount")  # fmt: skip
FILLS = ("zeros", "zeros_like", "new_zeros", "ones_like", "full", "full_like", "arange")
EMPTY = ("empty", "empty_like", "new_empty")
GATHERS = ("index_select", "gather", "embedding", "index")
ROW_SUMS = ("native_layer_norm", "native_layer_norm_backward", "_softmax", "_log_softmax", "_softmax_backward_data",
             "_log_softmax_backward_data", "sum", "mean", "amax", "max", "var", "logsumexp", "argmax")  # fmt: skip
ALL = ("all",)
LONG_ROW = 16_384  # elements; shorter rows are held between the two passes of a softmax


class Recorder(TorchDispatchMode):
    """Lists the operators that read or write memory."""

    def __init__(self, gradients=()):
        super().__init__()
        self.ops, self.alive = [], []  # storages are kept, so that no two have the same address
        self.gradients, self.backward = {key_of(grad) for grad in gradients}, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs, outputs = ([t for t in tree_leaves(x) if isinstance(t, torch.Tensor)] for x in ((args, kwargs), out))
        changed = func._schema.is_mutable
        is_view = {key_of(t) for t in outputs} <= {key_of(t) for t in inputs} and not changed
        name = func.__name__.split(".")[0]
        if outputs and not is_view and name not in EMPTY and not str(func).startswith("prim."):
            self.alive += [t.untyped_storage() for t in (*inputs, *outputs)]
            self.ops.append(self.describe(name, args, () if name in FILLS else inputs, outputs, changed))
        return out

    def describe(self, name, args, inputs, outputs, changed):
        reads, writes = ({key_of(t): bytes_of(t) for t in ts} for ts in (inputs, outputs))
        largest, again = max((*inputs, *outputs), key=torch.Tensor.numel), ()
        kind, flops, shape, numel = "elementwise", 0.0, tuple(largest.shape), largest.numel()
        if name in PRODUCTS:
            kind = "grouped product" if name == "_grouped_mm" else "product"
            a, b = inputs[:2] if kind == "grouped product" else inputs[-2:]
            flops, shape = 2 * a.numel() * b.shape[-1], f"{tuple(a.shape)} x {tuple(b.shape)}"
        elif "scaled_dot_product" in name:
            B, H, S, width = inputs[1].shape
            kind, flops = "attention", (2.5 if "backward" in name else 1) * 2 * B * H * S * S * width
        elif changed and key_of(args[0]) in self.gradients:
            kind = "accumulate"
        elif name in APART:
            kind = "apart"
            if "scatter" in name:  # touches as many places as it has sources
                reads = {key: min(size, 2 * bytes_of(inputs[-1])) for key, size in reads.items()}
                writes = {key: min(size, bytes_of(inputs[-1])) for key, size in writes.items()}
        elif name in GATHERS:
            source, numel, shape = inputs[0], outputs[0].numel(), tuple(outputs[0].shape)
            reads[key_of(source)] = min(bytes_of(source), numel * source.element_size())
        elif name in ROW_SUMS:
            kind = "row sum"
            if name == "sum" and is_over_columns(args, inputs[0]):
                kind = "column sum"
            if name == "native_layer_norm_backward":  # gradients of weight and bias: sums along columns
                again = tuple(map(key_of, inputs[:2]))
            if "softmax" in name and inputs[0].shape[-1] > LONG_ROW:
                again = ALL
        return Op(name, kind, reads, writes, numel, flops, str(shape), self.backward, again)


def key_of(tensor):
    return tensor.untyped_storage()._cdata


def bytes_of(tensor):
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def is_over_columns(args, x):
    dims = args[1] if len(args) > 1 else None
    return bool(dims) and x.dim() > 1 and (x.dim() - 1) not in {dim % x.dim() for dim in dims}


@contextlib.contextmanager
def as_on_cuda():
    """The model's code for CUDA under torch.compile, on fake tensors of the CPU."""
    with (
        FakeTensorMode(),
        mock.patch.object(torch.Tensor, "is_cuda", property(lambda tensor: True), create=True),
        mock.patch.object(torch.compiler, "is_compiling", lambda: True),
        mock.patch.dict(model_kernels.LOGITS_PER_CHUNK, cpu=model_kernels.LOGITS_PER_CHUNK["cuda"]),
    ):
        yield


def record_step(config, tokens):
    """Ops of forward and backward of one micro-batch that adds to existing gradients, and the model."""
    with as_on_cuda():
        model = GPT(config)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        ids = torch.zeros(tokens // config.block_size, config.block_size, dtype=torch.int64)
        with Recorder([p.grad for p in model.parameters()]) as recorder:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(ids, ids).loss
            recorder.backward = True
            loss.backward()
    return recorder.ops, model


# ---------------------------------------------------------------------------------------------------------------------
# Joining operators into kernels


@dataclasses.dataclass(eq=False)
class Kernel:
    start: int  # the kernels run in the order of these numbers
    ops: list
    numel: int
    is_read: bool = False  # another kernel reads its results: it must not start later
    is_gone: bool = False  # its operators belong to another kernel now
    bytes: int = 0

    @property
    def is_apart(self):
        return self.ops[0].kind not in ("elementwise", "row sum")

    @property
    def backward(self):
        return self.ops[0].backward

    @property
    def kind(self):
        return self.ops[0].kind if self.is_apart else "elementwise"

    @property
    def flops(self):
        return sum(op.flops for op in self.ops)


def join(ops):
    """Kernels in their order, with their bytes."""
    kernels, maker, reader = [], {}, {}  # {storage: kernel that wrote it last, or read it last}
    for i, op in enumerate(ops):
        sources = {maker[key] for key in op.reads if key in maker}
        kernel = None
        if op.kind in ("elementwise", "row sum"):
            beside = {reader[key] for key in op.reads if key in reader} - sources
            kernel = choose_kernel(op, i, sources, beside, maker)
        if kernel is None:
            kernel = Kernel(i, [], op.numel)
            kernels.append(kernel)
        kernel.ops.append(op)
        kernel.numel = max(kernel.numel, op.numel)
        for source in sources - {kernel}:
            source.is_read = True
        maker.update(dict.fromkeys(op.writes, kernel))
        reader.update(dict.fromkeys(op.reads, kernel))
    kernels = sorted((kernel for kernel in kernels if not kernel.is_gone), key=lambda kernel: kernel.start)
    return count_bytes(kernels)


def choose_kernel(op, now, sources, beside, maker):
    """The kernel that an element-wise operator joins, with others of its `sources`; None: a new one.

    Kernels `beside` it read the same and have the same size.
    """
    sources = {k for k in sources if k.backward == op.backward}
    fitting = [k for k in sources if not k.is_apart and (k.numel == op.numel or 8 * op.numel <= k.numel)]
    beside = [k for k in beside if not (k.is_gone or k.is_apart) and (k.numel, k.backward) == (op.numel, op.backward)]
    for target in [*sorted(fitting, key=lambda k: (-k.numel, k.start)), *beside]:
        start = target.start if target.is_read else now
        others = {k for k in sources if k is not target and k.start >= start}
        if all(can_join(k, target, start, maker) for k in others):
            for k in sources - {target}:
                if k in others or (not k.is_apart and not k.is_read and k.numel == target.numel):
                    absorb(target, k, maker)
            target.start = start
            return target
    return None


def can_join(kernel, target, start, maker):
    """Whether all that `kernel` reads is there before `start`."""
    if kernel.is_apart or kernel.numel > target.numel:
        return False
    own = {key for op in kernel.ops for key in op.writes}
    makers = {maker.get(key) for op in kernel.ops for key in op.reads if key not in own} - {None, target}
    return all(k.start < start for k in makers)


def absorb(target, kernel, maker):
    target.ops += kernel.ops
    target.is_read |= kernel.is_read
    kernel.is_gone = True
    maker.update({key: target for key, k in maker.items() if k is kernel})


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


def count_bytes(kernels):
    """The kernels that write something, each with its bytes."""
    readers, makers = collections.defaultdict(set), collections.defaultdict(set)
    for kernel in kernels:
        for op in kernel.ops:
            for key in op.reads:
                readers[key].add(kernel)
            for key in op.writes:
                makers[key].add(kernel)
    instead = {}
    for kernel in kernels:
        if not kernel.is_apart:
            instead |= cheap_to_repeat(kernel, readers, makers)
    for kernel in kernels:
        kernel.bytes = bytes_of_kernel(kernel, readers, instead)
    return [kernel for kernel in kernels if kernel.bytes]


def cheap_to_repeat(kernel, readers, makers):
    """{storage: {storage: bytes} to read instead} of results that are made from kept products, element by element, and
    are read by element-wise kernels alone."""
    made_from, instead = {}, {}
    for op in kernel.ops:
        sources = {}
        for key, size in op.reads.items():
            sources |= made_from.get(key, {key: size})
        for key, size in op.writes.items():
            others = readers[key] - {kernel}
            large = [k for k, amount in sources.items() if 16 * amount > size]
            kept = large and all(makers[k] and all(maker.is_apart for maker in makers[k]) for k in large)
            if op.kind == "elementwise" and len(makers[key]) == 1:
                made_from[key] = sources
                if kept and others and sum(sources[k] for k in large) <= size and not any(k.is_apart for k in others):
                    instead[key] = sources
    return instead


def bytes_of_kernel(kernel, readers, instead):
    reads, writes, own = {}, {}, set()
    for op in kernel.ops:
        for key, size in op.reads.items():
            for source, amount in ({} if key in own else instead.get(key, {key: size})).items():
                if source not in own:
                    reads[source] = max(reads.get(source, 0), amount)
        for key, size in op.writes.items():
            own.add(key)
            if key not in instead and (kernel.is_apart or readers[key] - {kernel}):
                writes[key] = max(writes.get(key, 0), size)
    if not writes:
        return 0
    twice = sum(sum(reads.values()) if op.again is ALL else sum(reads.get(k, 0) for k in op.again) for op in kernel.ops)
    return sum(reads.values()) + sum(writes.values()) + twice


# ---------------------------------------------------------------------------------------------------------------------
# Time


def seconds_of(kernel, gpu, grouped_rate):
    """The longer of computing and moving, and the gap before the next kernel."""
    backward = any("backward" in op.name for op in kernel.ops)
    rate = {"attention": gpu.attention[backward], "grouped product": grouped_rate}.get(kernel.kind, gpu.product)
    return max(kernel.flops / rate, kernel.bytes / gpu.bandwidth) / 1e12 + GAP


def list_passes(kernels, gpu, grouped_rate):
    """A row per kind of kernel, in their order; those below 1 MB together in the last."""
    groups = {}
    for kernel in kernels:
        names = " ".join(dict.fromkeys(op.name.strip("_") for op in kernel.ops))
        shape = max(kernel.ops, key=lambda op: op.numel).shape
        key = (kernel.kind, shape, names) if kernel.bytes >= 1e6 or kernel.flops else ("small", "", "")
        groups.setdefault(key, []).append(kernel)
    small = {key: groups.pop(key) for key in [("small", "", "")] if key in groups}
    return [
        {"kernels": len(group), "kind": kind, "shape": shape, "MB each": sum(k.bytes for k in group) / 1e6 / len(group),
         "GFLOP each": sum(k.flops for k in group) / 1e9 / len(group),
         "ms": 1e3 * sum(seconds_of(k, gpu, grouped_rate) for k in group), "operators": shorten(names)}
        for (kind, shape, names), group in (groups | small).items()
    ]  # fmt: skip


def shorten(names, most=70):
    return names if len(names) <= most else names[: most - 3] + "..."


def predict(args, name, tokens):
    """(row of the summary, rows of the passes) of a variant at `tokens` per micro-batch."""
    gpu = GPUS[args.gpu]
    grouped_rate = args.grouped_tflops or gpu.product
    ops, model = record_step(config_of(args, name), tokens)
    kernels = join(ops)
    by_kind = collections.Counter()
    for kernel in kernels:
        by_kind[kernel.kind] += seconds_of(kernel, gpu, grouped_rate)
    micro_batches = max(1, STEP_TOKENS // tokens)
    optimizer = OPTIMIZER_BYTES * sum(p.numel() for p in model.parameters()) / gpu.bandwidth / 1e12
    seconds = by_kind.total() + optimizer / micro_batches
    flops = model.estimate_flops_per_token(args.T) * tokens / seconds / 1e12
    row = {"variant": name, "tokens": tokens, "kernels": len(kernels), "GB": sum(k.bytes for k in kernels) / 1e9}
    row |= {f"{kind} ms": by_kind[kind] * 1e3 for kind in KINDS} | {"optimizer ms": optimizer * 1e3 / micro_batches}
    row |= {"ms": seconds * 1e3, "tok/s": tokens / seconds, "MFU": flops / gpu.product, "of peak": flops / gpu.peak}
    return row, list_passes(kernels, gpu, grouped_rate)


def run(args):
    """Print the prediction; write it, and every pass, to {out_dir}/roofline_{gpu}.txt."""
    found = {(name, tokens): predict(args, name, tokens) for tokens in args.tokens for name in VARIANTS}
    for (_, tokens), (row, _) in found.items():
        row["over dense"] = row["tok/s"] / found["dense", tokens][0]["tok/s"]
    gpu = GPUS[args.gpu]
    rates = f"products {gpu.product} TFLOP/s, grouped {args.grouped_tflops or gpu.product}, attention {gpu.attention}"
    title = f"A prediction, not a measurement. {gpu.name}: {rates}, {gpu.bandwidth} TB/s"
    path = args.out_dir / f"roofline_{args.gpu}.txt"
    with atomic_write(path, "w") as f, contextlib.redirect_stdout(f):
        print(title)
        print_table([row for row, _ in found.values()])
        for (name, tokens), (_, passes) in found.items():
            print(f"\n{name}, {tokens} tokens per micro-batch")
            print_table(passes)
    print(title)
    print_table([row for row, _ in found.values()])
    print(path)
