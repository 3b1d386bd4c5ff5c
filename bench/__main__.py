"""Speed and memory. Every claim is a ratio of things timed in turn, round after round, in one run.

    python -m bench step                    # training steps: dense and MoE variants, against what their FLOPs say
    python -m bench scale                   # time a token and memory as the micro-batch grows, and one-hot dispatch
    python -m bench moe                     # the MoE layer by parts, and other ways to do each part
    python -m bench tokenize | loader | hellaswag | sample      # against the usual way to do the same
    python -m bench step --device cuda --compile --imbalanced   # one expert gets half of all tokens

Prints a table and writes results/bench/{name}_{device}_{dtype}.json with every sample. What the numbers led to, and
what was tried and dropped: results/bench/README.md.

Each round draws new data, as training does: with the same batch every round each expert would see the same number of
rows every time, and oneDNN's kernels, which are made for one number of rows, would never be made anew.
Token frequencies are Zipf's and router weights three times their initial size, so that load is at least as uneven as in
training (MaxVio 0.6 to 7; the table says).
"""

import functools
import itertools
import math
import multiprocessing
import sysconfig
import tempfile
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro

import common
import fineweb
import hellaswag
import kernels
import model as gpt
import sample
from bench.baselines import encode_document, from_prefix, one_by_one, one_hot_moe
from bench.timing import Target, median_ratio, median_seconds, peak_bytes, report, take_turns
from common import UserError
from dataloader import DataLoader
from model import GPT, GPTConfig
from tokenizer import get_tokenizer

VARIANTS = {  # settings of GPTConfig; n_exp 8 and no capacity where nothing else is said
    "dense": {"n_exp": 1},
    "top1": {"top_k": 1, "gate": "softmax"},
    "top2": {},
    "top2_capacity": {"train_capacity": 1.25},
    "noisy_aux_z": {"use_noisy_top_k": True, "use_aux_loss": True, "use_router_z_loss": True},
    "one_hot": {"train_capacity": 1.25},
}
CPU_SHAPE = {"n_layer": 6, "n_embd": 384, "n_head": 6, "vocab_size": 4096, "T": 256, "one_hot_max_tokens": 8192}
GPT2_SHAPE = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50304, "T": 1024, "one_hot_max_tokens": 16384}
WHOLE_RUNS = ("hellaswag", "sample")  # of GPT-2 124M on either device: seconds to minutes each, so fewer rounds
TOKENS = {  # a micro-batch
    ("step", "cpu"): (2048, 8192),
    ("step", "cuda"): (16384, 65536),
    ("scale", "cpu"): (2048, 4096, 8192, 16384),
    ("scale", "cuda"): (2048, 4096, 8192, 16384, 32768, 65536),
    ("moe", "cpu"): (2048, 8192),
    ("moe", "cuda"): (16384, 65536),
}


@dataclass
class Args:
    bench: Annotated[
        Literal["step", "scale", "moe", "tokenize", "loader", "hellaswag", "sample"], tyro.conf.Positional
    ]  # what to measure
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16", "both"] = "both"  # bfloat16: autocast, weights stay float32
    rounds: int | None = None  # timed rounds, after the warm-up (default: 9; hellaswag and sample: 3)
    warmup: int | None = None  # rounds before them: torch.compile works in the first, oneDNN makes kernels in all: 8, 1
    clock: Literal["wall", "cpu"] = "wall"  # cpu: time of the process, for --threads 1 on a busy machine
    compile: bool = False  # torch.compile the training step
    profile: bool = False  # one more round of each variant under the profiler: trace_*.json, opens in Perfetto
    imbalanced: bool = False  # every second token's first choice is expert 0, the others never choose it
    uniform_routing: bool = False  # experts in turn, whatever the router says: what imbalance costs
    variants: tuple[str, ...] = tuple(VARIANTS)  # of step; dense is the one that others are compared with
    tokens: tuple[int, ...] | None = None  # tokens a micro-batch (default: by bench and device)
    T: int | None = None  # tokens a sequence (default: 256 on cpu, 1024 on cuda and for GPT-2; so the five below)
    n_layer: int | None = None  # 6, 12
    n_embd: int | None = None  # 384, 768
    n_head: int | None = None  # 6, 12
    vocab_size: int | None = None  # 4096, 50304
    one_hot_max_tokens: int | None = None  # above it one-hot dispatch, which is quadratic, is left out: 8192, 16384
    n_exp: int = 8  # experts
    threads: int | None = None  # of torch on the CPU (default: all cores)
    shard_tokens: int = 100_000_000  # of loader
    megabytes: float = 30.0  # of text, the Python library's own, for tokenize
    tokenizer: str = "gpt2"  # of tokenize and hellaswag: gpt2 or bytes
    data: str = ""  # of hellaswag, jsonl in the official format; empty: data/hellaswag, downloaded when missing
    examples: int = 200  # of hellaswag, at most
    new_tokens: int = 480  # of sample
    out_dir: Path = Path("results/bench")
    seed: int = 1337


def main():
    args = common.parse(Args)
    args.device = choose_device(args.device)
    whole_run = args.bench in WHOLE_RUNS
    defaults = GPT2_SHAPE if args.device == "cuda" or whole_run else CPU_SHAPE
    for name, value in (defaults | ({"rounds": 3, "warmup": 1} if whole_run else {"rounds": 9, "warmup": 8})).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.tokens = args.tokens or TOKENS.get((args.bench, args.device), ())
    check_args(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cpu" and args.bench in ("step", "scale", "moe"):  # as train_single_gpu.py
        common.keep_freed_memory()
    measure = globals()["bench_" + args.bench]
    for dtype in choose_dtypes(args):
        report(args, dtype, *measure(args, dtype))


def choose_device(name):
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device here: pass --device cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def choose_dtypes(args):
    if args.bench in ("tokenize", "loader"):
        return ["uint16"]  # what they make; no arithmetic
    if args.bench == "hellaswag":  # hellaswag.py's own choice
        return ["bfloat16" if args.device == "cuda" else "float32"]
    if args.bench == "sample":  # as sample.py
        return ["float32"]
    return ["float32", "bfloat16"] if args.dtype == "both" else [args.dtype]


def check_args(args):
    if args.rounds < 1 or args.warmup < 0:
        raise UserError(f"--rounds {args.rounds} must be at least 1, --warmup {args.warmup} at least 0")
    for tokens in args.tokens:
        if tokens % args.T:
            raise UserError(f"--tokens {tokens} is not a multiple of --T {args.T}")
    for name in args.variants:
        if name not in VARIANTS:
            raise UserError(f"--variants: no {name!r}; there are {', '.join(VARIANTS)}")
    if args.bench == "sample" and not QUARTERS <= args.new_tokens <= args.T - 8:
        raise UserError(f"--new_tokens {args.new_tokens} must lie in {QUARTERS} to T - 8 = {args.T - 8}")
    if args.imbalanced and args.uniform_routing:
        raise UserError("--imbalanced and --uniform_routing exclude each other: pass one")


# ---------------------------------------------------------------------------------------------------------------------
# Training steps


class Trainer(NamedTuple):
    model: GPT
    called: torch.nn.Module  # the model, or it compiled
    optimizer: torch.optim.Optimizer
    dtype: torch.dtype


def build_trainer(args, name, dtype):
    settings = {"n_exp": args.n_exp, "train_capacity": math.inf} | VARIANTS[name]
    shape = {field: getattr(args, field) for field in ("vocab_size", "n_layer", "n_head", "n_embd")}
    torch.manual_seed(args.seed)
    model = GPT(GPTConfig(block_size=args.T, **shape, **settings)).to(args.device)
    for _, moe in model.moe_layers():
        set_routing(args, moe.router)
        if name == "one_hot":
            moe.forward = types.MethodType(one_hot_moe, moe)
    # A small rate: the routing of the first rounds is still that of the last.
    optimizer = torch.optim.AdamW(model.optimizer_groups(0.1), lr=1e-5, fused=True)
    called = torch.compile(model, fullgraph=True, dynamic=False) if args.compile else model
    return Trainer(model, called, optimizer, getattr(torch, dtype))


def set_routing(args, router):
    with torch.no_grad():
        router.w_g.weight.mul_(3)
    if args.uniform_routing:
        router.select = functools.partial(select_in_turn, router.top_k)
    elif args.imbalanced:
        router.select = functools.partial(select_half, router.top_k)


def select_in_turn(top_k, logits_TE, scores_TE):
    n_tokens, n_exp = logits_TE.shape
    pairs = torch.arange(n_tokens * top_k, device=logits_TE.device)
    return pairs.view(n_tokens, top_k) % n_exp


def select_half(top_k, logits_TE, scores_TE):
    """Expert 0 is the first choice of every second token and no choice of the others."""
    even_T = torch.arange(len(logits_TE), device=logits_TE.device) % 2 == 0
    forced_T = torch.where(even_T, math.inf, -math.inf)
    return torch.cat([forced_T[:, None], logits_TE[:, 1:]], dim=1).topk(top_k, dim=-1).indices


def train_step(trainer, batch, mark):
    with torch.autocast(batch[0].device.type, trainer.dtype, enabled=trainer.dtype != torch.float32):
        loss = trainer.called(*batch).loss
    mark()
    loss.backward()
    mark()
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0, foreach=True)
    mark()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    mark()


PHASES = ("forward", "backward", "clip", "optimizer")


def zipf_batch(args, tokens, round_number):
    """(x, y), each (B, T); the k-th most frequent token has frequency 1 / k, as in text."""
    generator = torch.Generator().manual_seed(args.seed + round_number)
    frequency = 1 / torch.arange(1.0, args.vocab_size + 1)
    ids = torch.multinomial(frequency, tokens + 1, replacement=True, generator=generator).to(args.device)
    return ids[:-1].view(-1, args.T), ids[1:].view(-1, args.T)


def first_steps(args, name, dtype, tokens):
    """Of a model built for this alone: seconds of its first step, in which torch.compile works, and the peak memory of
    a later one in bytes, parameters and optimizer state included."""
    torch.compiler.set_stance("default")
    trainer = build_trainer(args, name, dtype)
    start = time.perf_counter()
    train_step(trainer, zipf_batch(args, tokens, 0), lambda: None)
    if args.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    train_step(trainer, zipf_batch(args, tokens, 1), lambda: None)  # the first made the optimizer's state
    held = sum(p.nbytes for p in trainer.model.parameters())
    held += sum(t.nbytes for state in trainer.optimizer.state.values() for t in state.values())
    peak = peak_bytes(args.device, lambda: train_step(trainer, zipf_batch(args, tokens, 2), lambda: None))
    return seconds, held + peak


def matmul_run(args, dtype):
    """A square product of the type, for the rate that MFU is measured against."""
    n = 8192 if args.device == "cuda" else min(2048, 4 * args.n_embd)
    a, b = (torch.randn(n, n, device=args.device, dtype=getattr(torch, dtype)) for _ in range(2))
    return 2 * n**3, lambda data, mark: (a @ b, mark())


def time_steps(args, dtype, cells):
    """Rows and samples for cells (variant, tokens); a variant has one model for all its sizes."""
    first = {cell: first_steps(args, cell[0], dtype, cell[1]) for cell in cells}
    trainers = {name: build_trainer(args, name, dtype) for name in dict.fromkeys(name for name, _ in cells)}
    matmul_flops, matmul = matmul_run(args, dtype)

    def run_cell(name, tokens):
        return lambda batches, mark: train_step(trainers[name], batches[tokens], mark)

    runs = {f"{name}@{tokens}": run_cell(name, tokens) for name, tokens in cells} | {"matmul": matmul}
    sizes = {tokens for _, tokens in cells}
    samples = take_turns(args, runs, lambda i: {tokens: zipf_batch(args, tokens, i) for tokens in sizes})
    rate = matmul_flops / median_seconds(samples, "matmul")
    rows = [step_row(args, samples, trainers, rate, *first[cell], *cell) for cell in cells]
    return rows, samples


def step_row(args, samples, trainers, rate, first_seconds, peak, name, tokens):
    key, base = f"{name}@{tokens}", f"dense@{tokens}"
    flops = trainers[name].model.estimate_flops_per_token(args.T)
    seconds = median_seconds(samples, key)
    row = {"variant": name, "tokens": tokens, "ms": seconds * 1e3}
    row |= {phase: median_seconds(samples, key, i) * 1e3 for i, phase in enumerate(PHASES)}
    row |= {"tok/s": tokens / seconds, "us/tok": seconds / tokens * 1e6}
    if base in samples:
        row["ratio"] = median_ratio(samples, key, base)
        row["flop_ratio"] = flops / trainers["dense"].model.estimate_flops_per_token(args.T)
        row["excess"] = row["ratio"] / row["flop_ratio"]
    row |= {"MFU": flops * tokens / seconds / rate, "TFLOP/s": flops * tokens / seconds / 1e12}
    row |= {"MB": peak / 1e6, "first s": first_seconds}
    stats = [] if name == "one_hot" else trainers[name].model.router_stats()  # of the largest size, the last to run
    row["max_vio"] = max((layer["max_vio"] for layer in stats), default=0.0)
    return row


def add_one_hot(args, dtype, rows, samples, targets):
    """The three, and those of one-hot dispatch, in turn with top2_capacity, which is the same function.

    Apart from the rest: it takes gigabytes, which go back to the kernel, and what follows it in a round pays for that
    (seconds in the kernel: 273 in 15 rounds of all variants, 6 in 21 rounds without one_hot).
    """
    sizes = [tokens for tokens in args.tokens if tokens <= args.one_hot_max_tokens]
    if not sizes:
        return rows, samples, targets
    cells = [(name, tokens) for tokens in sizes for name in ("top2_capacity", "one_hot")]
    pairs, apart = time_steps(args, dtype, cells)
    for tokens, capped, one_hot in zip(sizes, pairs[::2], pairs[1::2], strict=True):
        if tokens >= 8192:  # below, one-hot dispatch is not yet what costs
            gain = median_ratio(apart, f"one_hot@{tokens}", f"top2_capacity@{tokens}")
            targets.append(Target(f"speed over one_hot at {tokens}", gain, ">=", 6 if args.device == "cuda" else 3.4))
            targets.append(Target(f"memory over one_hot at {tokens}", capped["MB"] / one_hot["MB"], "<=", 1 / 3))
    return rows + pairs[1::2], samples | {f"{key}, apart": seconds for key, seconds in apart.items()}, targets


def bench_step(args, dtype):
    variants = dict.fromkeys(("dense", *args.variants))
    cells = [(name, tokens) for tokens in args.tokens for name in variants if name != "one_hot"]
    rows, samples = time_steps(args, dtype, cells)
    by_cell = {(row["variant"], row["tokens"]): row for row in rows}
    targets = []
    for tokens in args.tokens:
        dense, top2 = by_cell["dense", tokens], by_cell.get(("top2", tokens))
        if args.device == "cuda":
            targets.append(Target(f"dense MFU at {tokens}", dense["MFU"], ">=", 0.58))
        if top2 and args.device == "cuda":
            speed = median_ratio(samples, f"dense@{tokens}", f"top2@{tokens}")
            limit = 0.75 if args.imbalanced else 0.80
            targets.append(Target(f"top2 tokens/s over dense at {tokens}", speed, ">=", limit))
            targets.append(Target(f"top2 GB at {tokens}", top2["MB"] / 1e3, "<=", 80))
        elif top2:
            limit = 1.12 if dtype == "float32" else 1.2
            targets.append(Target(f"top2 over dense, beyond FLOPs, at {tokens}", top2["excess"], "<=", limit))
    return add_one_hot(args, dtype, rows, samples, targets) if "one_hot" in variants else (rows, samples, targets)


def bench_scale(args, dtype):
    rows, samples = time_steps(args, dtype, [("top2_capacity", tokens) for tokens in args.tokens])
    first, last = args.tokens[0], args.tokens[-1]
    growth = median_ratio(samples, f"top2_capacity@{last}", f"top2_capacity@{first}") * first / last
    targets = [Target(f"time a token at {last} over {first}", growth, "<=", 1.1)]
    memory = {row["tokens"]: row["MB"] for row in rows}
    if len(memory) > 2:  # linear: each step up costs the same a token
        sizes = sorted(memory)
        slopes = [(memory[b] - memory[a]) / (b - a) for a, b in itertools.pairwise(sizes)]
        targets.append(Target("memory a token, largest step over smallest", max(slopes) / min(slopes), "<=", 1.1))
    return add_one_hot(args, dtype, rows, samples, targets)


# ---------------------------------------------------------------------------------------------------------------------
# The MoE layer by parts


class Case(NamedTuple):
    """One round's inputs of every part, leaves that ask for gradients."""

    x_TD: torch.Tensor
    gate_TK: torch.Tensor
    expert_TK: torch.Tensor
    plan: gpt.Plan
    x_ND: torch.Tensor
    h_NF: torch.Tensor
    y_ND: torch.Tensor


def new_case(moe, tokens, dtype, round_number):
    generator = torch.Generator().manual_seed(round_number)
    D, device = moe.config.n_embd, moe.experts.c_fc.device
    shared = torch.randn(D, generator=generator) / 3  # a part common to all tokens makes the load uneven
    x_TD = (torch.randn(tokens, D, generator=generator) + shared).to(device, dtype)
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        routing = moe.router(x_TD)
        plan = gpt.sort_by_expert(routing.expert_TK, moe.config.n_exp)
        x_ND = x_TD[plan.pair_N % tokens]
        h_NF = torch.randn(len(x_ND), 4 * D, device=device).to(dtype)
        y_ND = torch.randn(len(x_ND), D, device=device).to(dtype)
    for leaf in (x_TD, routing.gate_TK, x_ND, h_NF, y_ND):
        leaf.requires_grad_()
    return Case(x_TD, routing.gate_TK, routing.expert_TK, plan, x_ND, h_NF, y_ND)


def sort_by_comparison(case, n_exp):
    expert_N = case.expert_TK.t().reshape(-1)
    pair_N = expert_N.sort(stable=True).indices
    row_N = torch.empty_like(pair_N).scatter_(0, pair_N, torch.arange(len(pair_N), device=pair_N.device))
    return row_N, torch.zeros_like(row_N[:n_exp]).scatter_add_(0, expert_N, torch.ones_like(expert_N))


def combine_by_scatter(case):
    """Each sorted row added to its token. On CUDA the order of the additions is not fixed."""
    gate_N = case.gate_TK.t().reshape(-1)[case.plan.pair_N].to(case.y_ND.dtype)
    tokens_N = case.plan.pair_N % len(case.x_TD)
    return torch.zeros_like(case.x_TD).index_add(0, tokens_N, case.y_ND * gate_N[:, None])


def padded_products(case, weight_EDF):
    """Groups copied into a buffer of twice the mean group, then one batched product: the price of a fixed shape."""
    slots_C = torch.arange(2 * len(case.x_ND) // len(weight_EDF), device=weight_EDF.device)
    rows_EC = (case.plan.ends_E - case.plan.count_E)[:, None] + slots_C
    return case.x_ND[rows_EC.clamp(max=len(case.x_ND) - 1).long()] @ weight_EDF


class Way(NamedTuple):
    part: str
    name: str
    run: Callable  # of a Case
    inputs: Callable | None  # of a Case: what gradients are taken of; None where there are none


def moe_ways(moe, dtype):
    """Of each part first the way that model.py goes, then others."""
    E, D = moe.config.n_exp, moe.config.n_embd
    mlp = gpt.MLP(moe.config, 4 * D).to(moe.experts.c_fc.device)
    weight = moe.experts.c_fc.detach().to(dtype).requires_grad_()
    bias = moe.experts.fc_bias.detach().squeeze(1).to(dtype)
    flat = weight.detach()[0].t().contiguous().requires_grad_()

    def layer(x_TD):
        return moe(x_TD[None])[0]

    return [
        Way("router", "ours", lambda c: moe.router(c.x_TD).gate_TK, lambda c: [c.x_TD, moe.router.w_g.weight]),
        Way("sort", "counting", lambda c: gpt.sort_by_expert(c.expert_TK, E), None),
        Way("sort", "comparison", lambda c: sort_by_comparison(c, E), None),
        Way("gather", "back by gather", lambda c: kernels.Dispatch.apply(c.x_TD, *c.plan[:2]), lambda c: [c.x_TD]),
        Way("gather", "back by scatter", lambda c: c.x_TD[c.plan.pair_N % len(c.x_TD)], lambda c: [c.x_TD]),
        Way("product", "ours", lambda c: kernels.grouped_linear(c.x_ND, weight, bias, c.plan.ends_E),
            lambda c: [c.x_ND, weight]),
        Way("product", "one dense", lambda c: F.linear(c.x_ND, flat, bias[0]), lambda c: [c.x_ND, flat]),
        Way("product", "grouped_mm", lambda c: F.grouped_mm(c.x_ND, weight, offs=c.plan.ends_E),
            lambda c: [c.x_ND, weight]),
        Way("product", "padded to 2x", lambda c: padded_products(c, weight), lambda c: [c.x_ND, weight]),
        Way("activation", "gelu tanh", lambda c: F.gelu(c.h_NF, approximate="tanh"), lambda c: [c.h_NF]),
        Way("combine", "by gather", lambda c: kernels.Combine.apply(c.y_ND, c.gate_TK, *c.plan[:2]),
            lambda c: [c.y_ND, c.gate_TK]),
        Way("combine", "by scatter", combine_by_scatter, lambda c: [c.y_ND, c.gate_TK]),
        Way("experts", "ours", lambda c: moe.experts(c.x_ND, c.plan.ends_E),
            lambda c: [c.x_ND, *moe.experts.parameters()]),
        Way("experts", "one dense MLP", lambda c: mlp(c.x_ND), lambda c: [c.x_ND, *mlp.parameters()]),
        Way("layer", "ours", lambda c: layer(c.x_TD), lambda c: [c.x_TD, *moe.parameters()]),
        Way("layer", "one dense MLP", lambda c: mlp(c.x_TD), lambda c: [c.x_TD, *mlp.parameters()]),
    ]  # fmt: skip


def forward_costs(moe, dtype, tokens):
    """{part: (GB it must move at least, GFLOP)} of a forward; a backward moves and does about twice that."""
    E, D, N, H = moe.config.n_exp, moe.config.n_embd, tokens * moe.config.top_k, 4 * moe.config.n_embd
    width, product = torch.finfo(dtype).bits / 8e9, 2 * N * D * H / 1e9
    gather, rows = (tokens + N) * D * width, (N * (D + H) + E * D * H) * width
    experts = 2 * rows + 2 * N * H * width
    router = tokens * D * width, 2 * tokens * D * E / 1e9
    return {
        "router": router, "sort": (24e-9 * N, 0), "gather": (gather, 0), "product": (rows, product),
        "activation": (2 * N * H * width, 0), "combine": (gather, 0), "experts": (experts, 2 * product),
        "layer": (router[0] + 2 * gather + experts, router[1] + 2 * product),
    }  # fmt: skip


def run_way(way, dtype, case, mark):
    with torch.autocast(case.x_TD.device.type, dtype, enabled=dtype != torch.float32):
        out = way.run(case)
    mark()
    if way.inputs is not None:
        torch.autograd.grad(out, way.inputs(case), torch.ones_like(out), allow_unused=True)
    mark()


def bench_moe(args, dtype):
    trainer = build_trainer(args, "top2", dtype)
    moe, dtype = trainer.model.moe_layers()[0][1], trainer.dtype
    rows, all_samples = [], {}
    for tokens in args.tokens:
        ways = {f"{way.part}/{way.name}@{tokens}": way for way in moe_ways(moe, dtype)}
        runs = {key: functools.partial(run_way, way, dtype) for key, way in ways.items()}
        samples = take_turns(args, runs, lambda i, tokens=tokens: new_case(moe, tokens, dtype, i))
        costs, first = forward_costs(moe, dtype, tokens), {}
        for key, way in ways.items():
            base = first.setdefault(way.part, key)
            seconds, (gbytes, gflop) = median_seconds(samples, key, 0), costs[way.part]
            rows.append({
                "tokens": tokens, "part": way.part, "way": way.name, "forward": seconds * 1e3,
                "backward": median_seconds(samples, key, 1) * 1e3, "over first": median_ratio(samples, key, base),
                "GB": gbytes, "GB/s": gbytes / seconds, "GFLOP": gflop, "GFLOP/s": gflop / seconds,
            })  # fmt: skip
        all_samples |= samples
    return rows, all_samples, []


# ---------------------------------------------------------------------------------------------------------------------
# Data, evaluation, sampling: against the usual way


def two_ways(args, ours, usual, prepare=lambda i: None):
    """Rows, samples and {way: what it returned last} of two functions; the caller compares the results."""
    results = {}

    def keep(name, run):
        def go(data, mark):
            results[name] = run(data)
            mark()

        return go

    samples = take_turns(args, {"ours": keep("ours", ours), "usual": keep("usual", usual)}, prepare)
    rows = [{"way": name, "s": median_seconds(samples, name), "times faster": median_ratio(samples, "usual", name)}
            for name in samples]  # fmt: skip
    return rows, samples, results


def bench_tokenize(args, dtype):
    documents = library_text(args.megabytes)
    workers = fineweb.cores()

    def ours(data):
        return np.concatenate(list(fineweb.tokenize(documents, args.tokenizer, workers)))

    def usual(data):
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            encode = functools.partial(encode_document, args.tokenizer)
            return np.concatenate(list(pool.imap(encode, documents, chunksize=16)))

    rows, samples, results = two_ways(args, ours, usual)
    if not np.array_equal(results["ours"], results["usual"]):
        raise RuntimeError("the two ways gave different tokens")
    for row in rows:
        row["M tokens/s"] = len(results["ours"]) / row["s"] / 1e6
    return rows, samples, [Target("times faster than Pool.imap", rows[0]["times faster"], ">=", 1.2)]


def library_text(megabytes):
    """Python's own library, a document a file, up to this much."""
    documents, left = [], megabytes * 1e6
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py")):
        if left <= 0:
            break
        documents.append(path.read_text(encoding="utf-8", errors="replace")[: int(left)])
        left -= len(documents[-1])
    return [text for text in documents if text]


def bench_loader(args, dtype):
    B, T = 8, args.T
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bench_train_000000.npy")
        np.save(path, np.random.default_rng(args.seed).integers(50257, size=args.shard_tokens, dtype=np.uint16))

        def ours(data, mark):
            loader = DataLoader(folder, "train", B, T)
            loader.next_batch()
            mark()
            for _ in range(100):
                loader.next_batch()
            mark()
            loader.pool.shutdown()

        def usual(data, mark):
            """The published loader: the whole shard to int64, then slices of it, in file order."""
            tokens = torch.tensor(np.load(path).astype(np.int32), dtype=torch.long)
            batches = (tokens[i * B * T : (i + 1) * B * T + 1] for i in range(101))
            views = ((part[:-1].view(B, T), part[1:].view(B, T)) for part in batches)
            next(views)
            mark()
            for x, y in views:
                x.to("cpu"), y.to("cpu")
            mark()

        samples = take_turns(args, {"ours": ours, "usual": usual})
        memory = {"ours": 0.0, "usual": 8e-6 * args.shard_tokens}
    rows = [
        {"way": name, "open, first batch ms": median_seconds(samples, name, 0) * 1e3,
         "a batch us": median_seconds(samples, name, 1) * 1e4, "MB copied": memory[name],
         "times faster to open": median_ratio(samples, "usual", name, 0)}
        for name in samples
    ]  # fmt: skip
    return rows, samples, [Target("times faster to open", rows[0]["times faster to open"], ">=", 10)]


def bench_hellaswag(args, dtype):
    model = build_trainer(args, "dense", dtype).model.eval()
    examples = hellaswag.load_examples(args.data or None, args.examples)
    examples = hellaswag.tokenize(examples, get_tokenizer(args.tokenizer))

    def ours(data):
        return hellaswag.evaluate(model, examples, args.device).predictions

    def usual(data):
        with torch.no_grad(), torch.autocast(args.device, getattr(torch, dtype), enabled=dtype != "float32"):
            return [one_by_one(model, example, args.device) for example in examples]

    rows, samples, results = two_ways(args, ours, usual)
    agree = float(np.mean(np.array(results["ours"]) == np.array(results["usual"])))
    for row in rows:
        row |= {"examples": len(examples), "examples/s": len(examples) / row["s"], "agreement": agree}
    limit = 30 if args.device == "cuda" else 2
    targets = [Target("times faster than one by one", rows[0]["times faster"], ">=", limit)]
    if dtype == "float32":  # bfloat16 rounds near ties either way
        targets.append(Target("same predictions", agree, ">=", 1))
    return rows, samples, targets


def bench_sample(args, dtype):
    """Greedy text from one short prompt, with the key/value cache and with the whole prefix again for every token.

    `published` is the latter with nanoMoE's dispatch too. Its capacity drops tokens, so its text may be another one.
    """
    dense, top2, one_hot = (build_trainer(args, name, dtype).model.eval() for name in ("dense", "top2", "one_hot"))
    prompt = torch.randint(args.vocab_size, (1, 8), generator=torch.Generator().manual_seed(args.seed)).to(args.device)
    ways = {
        "dense/cache": (dense, from_cache), "dense/prefix": (dense, from_prefix),
        "top2/cache": (top2, from_cache), "top2/published": (one_hot, from_prefix),
    }  # fmt: skip
    texts, quarter = {}, args.new_tokens // QUARTERS

    def run_way(name, data, mark):
        model, way = ways[name]
        texts[name] = []
        for i, tokens in enumerate(way(model, prompt, QUARTERS * quarter), start=1):
            texts[name].append(tokens.item())
            if i % quarter == 0:
                mark()

    samples = take_turns(args, {name: functools.partial(run_way, name) for name in ways})
    rows, targets = [], []
    for name in ways:
        variant, way = name.split("/")
        base = f"{variant}/cache"
        rows.append({
            "variant": variant, "way": way, "s": median_seconds(samples, name),
            "tokens/s": QUARTERS * quarter / median_seconds(samples, name),
            "first quarter": quarter / median_seconds(samples, name, 0),
            "last quarter": quarter / median_seconds(samples, name, -1),
            "cache is times faster": median_ratio(samples, name, base),
            "agreement": float(np.mean(np.array(texts[name]) == np.array(texts[base]))),
        })  # fmt: skip
    for name in ("dense/prefix", "top2/published"):
        gain = median_ratio(samples, name, name.split("/")[0] + "/cache")
        targets.append(Target(f"times faster than {name}", gain, ">=", 10))
    for name in ("dense/cache", "top2/cache"):
        growth = median_seconds(samples, name, -1) / median_seconds(samples, name, 0)
        targets.append(Target(f"{name}, time of the last quarter over the first", growth, "<=", 1.2))
    return rows, samples, targets


QUARTERS = 4  # parts of a text, timed apart: does a token cost more the later it comes?


def from_cache(model, prompt, new_tokens):
    return sample.stream(model, prompt, new_tokens, temperature=0)


if __name__ == "__main__":
    common.run(main)
