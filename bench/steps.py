"""Training steps: `step` times variants against dense and their FLOPs, `scale` one variant as the micro-batch grows."""

import importlib.util
import itertools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from bench.baselines import HalfRouter, OneHotMoE, TurnRouter, replace
from bench.timing import Target, interleave, median_ratio, median_seconds, peak_bytes
from lab.common import UserError, autocast
from lab.muon import Muon, muon_groups
from model import GPT, GPTConfig

VARIANTS = {  # settings of GPTConfig; --n_exp experts and no capacity unless given here
    "dense": {"n_exp": 1},
    "top1": {"top_k": 1, "gate": "softmax"},
    "top2": {},
    "top2_capacity": {"train_capacity": 1.25},
    "narrow": {"n_exp": 16, "top_k": 4, "expert_hidden": "iso"},  # a quarter of the width
    "noisy_aux_z": {"use_noisy_top_k": True, "use_aux_loss": True, "use_router_z_loss": True},
    "one_hot": {"train_capacity": 1.25},  # top2_capacity by one-hot dispatch
}
MUON = "+muon"  # ends the name of a variant that is trained with Muon, not AdamW
RECOMPUTED = {"experts": "+experts", "blocks": "+blocks"}  # ends the name of a variant whose backward computes it again
PHASES = ("forward", "backward", "clip", "optimizer")


class Trainer(NamedTuple):
    model: torch.nn.Module
    loss: Callable  # (x, y) -> scalar, of the model, compiled or not
    optimizer: torch.optim.Optimizer
    dtype: torch.dtype


# ---------------------------------------------------------------------------------------------------------------------
# Models


def config_of(args, name):
    """GPTConfig of a variant. Raises ValueError for a shape that no model can have."""
    shape = {field: getattr(args, field) for field in ("vocab_size", "n_layer", "n_head", "n_embd")}
    settings = {"n_exp": args.n_exp, "train_capacity": math.inf} | VARIANTS[name.split("+")[0]]
    return GPTConfig(block_size=args.T, **shape, **settings)


def build_model(args, name):
    """The variant on the device, its router weights three times as large as they start, so that the load is uneven."""
    torch.manual_seed(args.seed)
    with torch.device(args.device):
        model = GPT(config_of(args, name))
    router_class = TurnRouter if args.uniform_routing else HalfRouter if args.imbalanced else None
    for layer, moe in model.moe_layers():
        if name == "one_hot":
            moe = model.transformer.h[layer].mlp = replace(moe, OneHotMoE)
        with torch.no_grad():
            moe.router.w_g.weight.mul_(3)
        if router_class:
            moe.router = replace(moe.router, router_class)
    return model


def load_vs(args):
    """The dense model of `--vs PATH`: another repository's model.py with nanoGPT's GPT and GPTConfig."""
    path = Path(args.vs)
    spec = importlib.util.spec_from_file_location("vs_model", path)
    if spec is None or not path.is_file():
        raise UserError(f"--vs {path} is not a Python file: give the path of a model.py like nanoGPT's")
    module = sys.modules["vs_model"] = importlib.util.module_from_spec(spec)
    sys.path.append(str(path.resolve().parent))  # it may import files beside it, as nanoMoE's does
    shape = {"n_layer": args.n_layer, "n_head": args.n_head, "n_embd": args.n_embd, "dropout": 0.0, "bias": True}
    torch.manual_seed(args.seed)
    try:
        spec.loader.exec_module(module)
        config = module.GPTConfig(block_size=args.T, vocab_size=args.vocab_size, **shape)
        model = module.GPT(config).to(args.device)
        x, y = zipf_batch(args, args.T, 0)
        _, loss = model(x, y)
        loss.backward()
        model.zero_grad(set_to_none=True)
        return model
    except Exception as error:  # foreign code may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"--vs {path} has no GPT and GPTConfig with nanoGPT's interface: {reason}") from error


def build_trainer(args, name, dtype):
    """Trainer of a variant, or of `--vs` for the name "vs"."""
    if name == "vs":
        model, loss_at = load_vs(args), 1  # position of the loss in the output
        decayed = [p for p in model.parameters() if p.dim() > 1]
        plain = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    else:
        model, loss_at = build_model(args, name), 0
        groups = model.optimizer_groups(0.1)
    # A small rate: the routing of the first rounds is still that of the last.
    if name.endswith(MUON):
        optimizer = Muon(muon_groups(model, groups), lr=1e-5)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1e-5, fused=True)
    if args.compile and name.endswith(RECOMPUTED["blocks"]):  # as in training
        for block in model.transformer.h:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
    for part in [part for part, ending in RECOMPUTED.items() if name.endswith(ending)]:
        model.recompute(part)
    whole = args.compile and not name.endswith(RECOMPUTED["blocks"])
    call = torch.compile(model, fullgraph=name != "vs", dynamic=False) if whole else model
    return Trainer(model, lambda x, y: call(x, y)[loss_at], optimizer, getattr(torch, dtype))


# ---------------------------------------------------------------------------------------------------------------------
# One step


def train_step(trainer, batch, mark=lambda: None):
    """One optimizer step on (x, y); mark() at the end of each of PHASES."""
    with autocast(batch[0].device, trainer.dtype):
        loss = trainer.loss(*batch)
    mark()
    loss.backward()
    mark()
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0, foreach=True)
    mark()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    mark()


def zipf_batch(args, tokens, round_number):
    """(x, y), each (B, T); the k-th most frequent token has frequency proportional to 1 / k, as in text."""
    generator = torch.Generator().manual_seed(args.seed + round_number)
    frequency = 1 / torch.arange(1.0, args.vocab_size + 1)
    ids = torch.multinomial(frequency, tokens + 1, replacement=True, generator=generator).to(args.device)
    return ids[:-1].view(-1, args.T), ids[1:].view(-1, args.T)


def first_steps(args, name, dtype, tokens):
    """(seconds of the first step, compilation included; peak bytes of a later step, parameters and optimizer state
    included) of a model built for this alone."""
    trainer = build_trainer(args, name, dtype)
    start = time.perf_counter()
    train_step(trainer, zipf_batch(args, tokens, 0))
    if args.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    train_step(trainer, zipf_batch(args, tokens, 1))  # the first step created the optimizer state
    held = sum(p.nbytes for p in trainer.model.parameters())
    held += sum(t.nbytes for state in trainer.optimizer.state.values() for t in state.values())
    peak = peak_bytes(args.device, lambda: train_step(trainer, zipf_batch(args, tokens, 2)))
    return seconds, held + peak


# ---------------------------------------------------------------------------------------------------------------------
# Timing


def matmul_run(args, dtype):
    """(FLOPs, run) of a square product, whose rate MFU is measured against."""
    n = 8192 if args.device == "cuda" else min(2048, 4 * args.n_embd)
    a, b = (torch.randn(n, n, device=args.device, dtype=getattr(torch, dtype)) for _ in range(2))
    return 2 * n**3, lambda data, mark: (a @ b, mark())


def time_steps(args, dtype, cells):
    """Rows and samples of cells (variant, tokens); a variant has one model for all its sizes."""
    first = {cell: first_steps(args, cell[0], dtype, cell[1]) for cell in cells}
    trainers = {name: build_trainer(args, name, dtype) for name in dict.fromkeys(name for name, _ in cells)}
    matmul_flops, matmul = matmul_run(args, dtype)

    def run_cell(name, tokens):
        return lambda batches, mark: train_step(trainers[name], batches[tokens], mark)

    runs = {f"{name}@{tokens}": run_cell(name, tokens) for name, tokens in cells} | {"matmul": matmul}
    sizes = {tokens for _, tokens in cells}
    samples = interleave(args, runs, lambda i: {tokens: zipf_batch(args, tokens, i) for tokens in sizes})
    rate = matmul_flops / median_seconds(samples, "matmul")
    rows = [step_row(args, samples, trainers, rate, *first[cell], *cell) for cell in cells]
    return rows, samples


def step_row(args, samples, trainers, rate, first_seconds, peak, name, tokens):
    """One row of the table. `excess` is the time ratio to dense divided by the FLOP ratio."""
    key, base = f"{name}@{tokens}", f"dense@{tokens}"
    flops = trainers["dense" if name == "vs" else name].model.estimate_flops_per_token(args.T)
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
    stats = [] if name == "vs" else trainers[name].model.router_stats()  # of the largest size, the last to run
    row["max_vio"] = max((layer["max_vio"] for layer in stats), default=0.0)
    return row


def add_one_hot(args, dtype, rows, samples, targets):
    """The three, with those of one-hot dispatch, timed in rounds with top2_capacity, which is the same function.

    In rounds of its own: it takes gigabytes, which go back to the kernel, and slows what follows it in a round.
    """
    sizes = [tokens for tokens in args.tokens if tokens <= args.one_hot_max_tokens]
    if not sizes:
        return rows, samples, targets
    cells = [(name, tokens) for tokens in sizes for name in ("top2_capacity", "one_hot")]
    pairs, apart = time_steps(args, dtype, cells)
    for tokens, capped, one_hot in zip(sizes, pairs[::2], pairs[1::2], strict=True):
        if tokens >= 8192:  # below that, one-hot dispatch does not yet dominate
            gain = median_ratio(apart, f"one_hot@{tokens}", f"top2_capacity@{tokens}")
            targets.append(Target(f"speed over one_hot at {tokens}", gain, ">=", 6 if args.device == "cuda" else 3.4))
            targets.append(Target(f"memory over one_hot at {tokens}", capped["MB"] / one_hot["MB"], "<=", 1 / 3))
    return rows + pairs[1::2], samples | {f"{key}, apart": seconds for key, seconds in apart.items()}, targets


# ---------------------------------------------------------------------------------------------------------------------
# Subcommands


def bench_step(args, dtype):
    """Variants, those of --optimizer and --recompute too, and `--vs`, against dense in the same rounds."""
    names = [name for name in dict.fromkeys(("dense", *args.variants)) if name != "one_hot"]
    again = [
        name + RECOMPUTED[part] for name in names for part in args.recompute if (name, part) != ("dense", "experts")
    ]
    names += [name + MUON for name in names] * (args.optimizer == "muon") + again + ["vs"] * bool(args.vs)
    rows, samples = time_steps(args, dtype, [(name, tokens) for tokens in args.tokens for name in names])
    targets = step_targets(args, rows, samples)
    return add_one_hot(args, dtype, rows, samples, targets) if "one_hot" in args.variants else (rows, samples, targets)


def step_targets(args, rows, samples):
    """Targets of dense and top2, at each size."""
    by_cell = {(row["variant"], row["tokens"]): row for row in rows}
    targets = []
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        dense, top2 = by_cell["dense", tokens], by_cell.get(("top2", tokens))
        if args.device == "cuda":
            targets.append(Target(f"dense MFU at {tokens}", dense["MFU"], ">=", 0.58))
        if top2 and args.device == "cuda":
            speed = median_ratio(samples, f"dense@{tokens}", f"top2@{tokens}")
            limit = 0.75 if args.imbalanced else 0.80
            targets.append(Target(f"top2 tokens/s over dense at {tokens}", speed, ">=", limit))
            targets.append(Target(f"top2 GB at {tokens}", top2["MB"] / 1e3, "<=", 80))
        elif top2:
            targets.append(Target(f"top2 over dense, beyond FLOPs, at {tokens}", top2["excess"], "<=", 1.05))
    return targets


def bench_scale(args, dtype):
    """Time and memory per token of top 2 with capacity, from the smallest micro-batch to the largest."""
    rows, samples = time_steps(args, dtype, [("top2_capacity", tokens) for tokens in args.tokens])
    first, last = args.tokens[0], args.tokens[-1]
    growth = median_ratio(samples, f"top2_capacity@{last}", f"top2_capacity@{first}") * first / last
    targets = [Target(f"time per token at {last} over {first}", growth, "<=", 1.05)]
    memory = [(row["tokens"], row["MB"]) for row in rows]
    if len(memory) > 2:  # linear: memory per added token is the same at every step
        slopes = [(mb - mb_) / (tokens - tokens_) for (tokens_, mb_), (tokens, mb) in itertools.pairwise(memory)]
        targets.append(Target("memory per token, largest step over smallest", max(slopes) / min(slopes), "<=", 1.1))
    return add_one_hot(args, dtype, rows, samples, targets)
