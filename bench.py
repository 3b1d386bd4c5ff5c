"""Speed and memory of the training step. Every claim is a ratio of things timed in the same rounds of one run.

    python bench.py step                                      # dense and MoE, and one-hot dispatch as published
    python bench.py step --variants dense top2 --vs ../nanoMoE               # beside another repository's model.py
    python bench.py step --variants dense top2 --imbalanced   # every second token goes to expert 0
    python bench.py scale --tokens 2048 4096 8192 16384       # time and memory per token as the micro-batch grows
    torchrun --standalone --nproc_per_node=2 bench.py scale --variants top2  # a rank by itself, DDP, FSDP
    python bench.py report --out results/gpu/NVIDIA_H200      # what `make gpu` measured, beside docs/speed.md

Prints a table and writes {bench}_{device}_{dtype}.json, with every sample and the facts of the machine, to --out, anew
after each round. A round times one step of each model, on new data, as in training. A ratio is the median over rounds
of the ratio within a round, with its 95 % interval; excess is the ratio of times divided by that of FLOPs. Token
frequencies follow Zipf's law and router weights are three times their usual size: the load is rather too uneven.
"""

import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise each use of the profiler prints two lines

from lab import common
from lab.common import Fraction, NotNegative, Positive, Range, UserError

# isort: split
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro

import model as ours
from lab import devices, logger, runs

ROOT = Path(__file__).resolve().parent
VARIANTS = {  # settings of GPTConfig; --n_exp experts and no capacity unless given here
    "dense": {"n_exp": 1},
    "top1": {"top_k": 1, "gate": "softmax"},
    "top2": {},
    "narrow": {"n_exp": 16, "top_k": 4, "expert_hidden": "iso"},
    "top2_capacity": {"train_capacity": 1.25},
    "one_hot": {"train_capacity": 1.25},  # the function of top2_capacity, by one-hot dispatch
}
ON_GPU = {  # defaults where there is one: GPT-2 124M, and the trainer's tokens per step
    "device": "cuda", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50_304, "T": 1024,
    "tokens": (16_384, 65_536), "step_tokens": 524_288,
}


@dataclass(frozen=True)
class Args:
    bench: tyro.conf.Positional[Literal["step", "scale", "report"]] = "step"  # What to measure

    # models and data
    variants: tuple[Literal[tuple(VARIANTS)], ...] = ()  # Models (default: all; scale: top2_capacity, one_hot)
    vs: str = ""  # Another model.py, or its folder, with nanoGPT's GPT and GPTConfig; its variants are timed too
    imbalanced: bool = False  # Expert 0 is the first choice of every second token and no choice of the others
    uniform_routing: bool = False  # Experts in turn, whatever the router says: shows what imbalance costs
    n_layer: Positive = 6  # Blocks
    n_embd: Positive = 384  # Width
    n_head: Positive = 6  # Attention heads
    vocab_size: Positive = 4096  # Vocabulary size
    n_exp: Annotated[int, Range(at_least=2)] = 8  # Experts of the MoE variants
    T: Positive = 256  # Tokens per sequence
    tokens: tuple[Positive, ...] = (2048, 8192)  # Tokens per micro-batch, one or more sizes
    step_tokens: NotNegative = 0  # Tokens per optimizer step and rank (0: one micro-batch)

    # machine and measuring
    device: Literal["cpu", "cuda"] = "cpu"  # Device
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # Matrix products; auto: bfloat16 on cuda
    use_compile: bool = True  # torch.compile, on cuda
    activation_memory_budget: Fraction | None = None  # Part of its activations that a compiled block keeps
    recompute: Literal["none", "blocks"] = "none"  # Activations computed again in backward
    threads: NotNegative = 0  # Threads of torch on the CPU (0: all cores)
    clock: Literal["wall", "cpu"] = "wall"  # cpu: time of the process, for --threads 1 on a busy machine
    fsdp: bool = True  # Under torchrun, time FSDP beside DDP
    dist_timeout: Positive = 600  # Seconds until ranks that wait for a dead one stop
    rounds: NotNegative = 9  # Timed rounds
    warmup: Annotated[int, Range(at_least=3)] = 3  # Steps of each model before them, in which kernels compile
    out: str = "logs/bench"  # Folder of the files


class Cell(NamedTuple):
    """One model at one size, timed once per round."""

    variant: str
    tokens: int  # per micro-batch
    kind: str = ""  # vs: the model of --vs; ddp, fsdp: over the ranks of torchrun

    def __str__(self):
        return f"{self.kind} {self.variant}".strip()


# ---------------------------------------------------------------------------------------------------------------------
# Dispatch as published, and routers of known load: each takes the place of a method of model.py


def one_hot_mix(moe, x_TD, routing, plan, capacity):
    """MoE.mix with tokens sent to the experts' slots, and back, by (T, E * C) matrices: with top 2 and capacity 1.25
    T * E * C = 2.5 T**2 numbers, so memory and time per token grow with T."""
    n_tokens, n_exp, experts = len(x_TD), moe.config.n_exp, moe.experts
    capacity = capacity or n_tokens
    choices_NE = F.one_hot(routing.expert_TK.t().reshape(-1), n_exp)  # all first choices, then all second ones
    place_N = (choices_NE * (choices_NE.cumsum(0) - 1)).sum(1)
    slots_NC = F.one_hot(place_N.clamp(max=capacity - 1), capacity) * (place_N < capacity)[:, None]
    gates_NE = choices_NE * routing.gate_TK.t().reshape(-1, 1)
    pairs = zip(gates_NE.split(n_tokens), slots_NC.split(n_tokens), strict=True)
    combine_TEC = sum(gates_TE[:, :, None] * slots_TC[:, None] for gates_TE, slots_TC in pairs)
    dispatch_TEC = (combine_TEC > 0).to(x_TD.dtype)
    x_ECD = (dispatch_TEC.flatten(1).t() @ x_TD).view(n_exp, capacity, -1)
    h_ECF = x_ECD @ experts.c_fc.to(x_TD.dtype) + experts.fc_bias.to(x_TD.dtype)
    y_ECD = F.gelu(h_ECF, approximate="tanh") @ experts.c_proj.to(x_TD.dtype) + experts.proj_bias.to(x_TD.dtype)
    return combine_TEC.flatten(1).to(y_ECD.dtype) @ y_ECD.flatten(0, 1)


def choose_in_turn(router, logits_TE, scores_TE):
    """Router.choose that gives every expert the same number of pairs."""
    pairs = torch.arange(len(logits_TE) * router.config.top_k, device=logits_TE.device)
    return pairs.view(len(logits_TE), -1) % logits_TE.shape[1]


def choose_half(router, logits_TE, scores_TE):
    """Router.choose with expert 0 the first choice of every second token and never chosen by the others."""
    even_T = torch.arange(len(logits_TE), device=logits_TE.device) % 2 == 0
    forced_T = torch.where(even_T, torch.inf, -torch.inf)
    return torch.cat([forced_T[:, None], logits_TE[:, 1:]], dim=1).topk(router.config.top_k, dim=-1).indices


# ---------------------------------------------------------------------------------------------------------------------
# Models and their steps


@functools.cache
def machine_of(args):
    """The Machine of this process."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    # Each variant and size has static graphs of its own: more than torch allows by default.
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 256
    return devices.set_up_machine(args)


def import_model(path):
    """Another repository's model.py as a module, in a process that has no further use for this one's modules."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    for name, module in list(sys.modules.items()):  # it may import files beside it that have the names of ours
        file = Path(getattr(module, "__file__", None) or "/")
        if file.parent in (ROOT, ROOT / "lab") and file.name != "bench.py":
            del sys.modules[name]
    sys.path.insert(0, str(folder.resolve()))
    return __import__("model")


@functools.cache
def build(args, cell):
    """(model, the same compiled and wrapped, optimizer) of a cell. Router weights are three times their usual size."""
    machine = machine_of(args)
    source = import_model(args.vs) if cell.kind == "vs" else ours
    settings = {"n_exp": args.n_exp, "train_capacity": torch.inf} | VARIANTS[cell.variant]
    if settings["n_exp"] == 1:
        settings = {}  # nanoGPT's GPTConfig has no n_exp
    settings |= {name: getattr(args, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    torch.manual_seed(0)
    with machine.device:
        model = source.GPT(source.GPTConfig(block_size=args.T, dropout=0.0, bias=True, **settings))

    for name, p in model.named_parameters():
        if name.endswith("w_g.weight"):
            p.data.mul_(3)
    for _, moe in model.moe_layers() if hasattr(model, "moe_layers") else ():
        if args.imbalanced or args.uniform_routing:
            moe.router.choose = functools.partial(choose_half if args.imbalanced else choose_in_turn, moe.router)
        if cell.variant == "one_hot":
            moe.mix = functools.partial(one_hot_mix, moe)

    if cell.kind == "vs":
        call = torch.compile(model) if devices.is_compiled(args, machine) else model
    else:
        of_rank = machine if cell.kind else machine._replace(world_size=1)
        call = devices.parallelize(model, replace(args, fsdp=cell.kind == "fsdp"), of_rank)
    # At this small rate the routing of the first round is still that of the last.
    return model, call, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def zipf_batch(args, tokens, seed, device):
    """(x, y), each (B, T); the k-th most frequent token has frequency proportional to 1 / k, as in text."""
    frequency = 1 / torch.arange(1.0, args.vocab_size + 1)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.multinomial(frequency, tokens + 1, replacement=True, generator=generator).to(device)
    return ids[:-1].view(-1, args.T), ids[1:].view(-1, args.T)


def now(args):
    """Seconds at which all work so far is done."""
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if args.clock == "cpu" else time.perf_counter()


def micro_batches(args, cell):
    return max(1, args.step_tokens // cell.tokens)


def train_step(args, cell, number):
    """Seconds of one optimizer step, clipping included, on data of that number."""
    machine, n = machine_of(args), micro_batches(args, cell)
    model, call, optimizer = build(args, cell)
    first = (number * machine.world_size + machine.rank) * n
    batches = [zipf_batch(args, cell.tokens, first + i, machine.device) for i in range(n)]
    if machine.world_size > 1:
        dist.barrier()

    start = now(args)
    for x, y in batches:
        with machine.autocast():
            out = call(x, y)
            loss = out.loss if hasattr(out, "loss") else out[1]  # nanoGPT's models return (logits, loss)
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return now(args) - start


def peak_bytes(args, function, *arguments):
    """Most bytes that tensors made by function(*arguments) held at one time."""
    if args.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function(*arguments)
        return torch.cuda.max_memory_allocated() - before
    # On the CPU from allocations and frees: the resident set depends on what the process did before.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function(*arguments)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def warm_up(args, cell):
    """Build the model and make the steps before the rounds. Returns the facts that need no round."""
    start = time.perf_counter()
    train_step(args, cell, 0)
    facts = {"first_s": time.perf_counter() - start, "max_vio": 0.0}
    model, _, optimizer = build(args, cell)
    held = [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
    held = [t.to_local() if hasattr(t, "to_local") else t for t in held]  # this rank's part of sharded ones
    facts["GB"] = (sum(t.nbytes for t in held) + peak_bytes(args, train_step, args, cell, 1)) / 1e9
    for number in range(2, args.warmup):
        facts["seconds"] = train_step(args, cell, number)
    machine = machine_of(args)
    facts["peak"] = devices.peak_flops(machine.device) if machine.dtype == torch.bfloat16 else None
    if cell.kind != "vs":
        facts["flops"] = model.estimate_flops_per_token(args.T)
        for _, moe in model.moe_layers():  # Wang 2024: largest load / mean load - 1, of the last forward
            facts["max_vio"] = max(facts["max_vio"], float(moe.count.max() / moe.count.mean() - 1))
    return facts


# ---------------------------------------------------------------------------------------------------------------------
# Rounds and their table


def groups_of(args):
    """Lists of cells that are timed in the same rounds: the models of one size for step, everything for scale."""
    names = args.variants or (("top2_capacity", "one_hot") if args.bench == "scale" else tuple(VARIANTS))
    kinds = ["", "vs"] if args.vs else [""]
    if devices.world()[1] > 1:
        kinds = ["", "ddp", "fsdp"] if args.fsdp else ["", "ddp"]
    pairs = [pair for pair in itertools.product(names, kinds) if pair != ("one_hot", "vs")]
    groups = [[Cell(name, tokens, kind) for name, kind in pairs] for tokens in args.tokens]
    return [list(itertools.chain(*groups))] if args.bench == "scale" else groups


def measure(args, cells, facts, samples):
    """Time a group of cells: adds what is known of each to `facts`, and seconds per step to `samples`."""
    # Another repository's model gets a process of its own for its modules and operators, one-hot dispatch for its
    # memory: gigabytes that go back to the system after it, and slow the model that follows.
    apart = {cell: cell.kind or "one_hot" for cell in cells if cell.kind == "vs" or cell.variant == "one_hot"}
    pools = {name: ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) for name in set(apart.values())}

    def call(function, cell, *more):
        pool = pools.get(apart.get(cell))
        return pool.submit(function, args, cell, *more).result() if pool else function(args, cell, *more)

    for cell in cells:
        try:
            facts[cell], samples[cell] = call(warm_up, cell), []
        except Exception as error:  # no memory, or another repository's model: the others are measured all the same
            facts[cell] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            print(f"{cell}, {cell.tokens} tokens: {facts[cell]['error']}", file=sys.stderr)
        write_result(args, facts, samples)
    for number in range(args.warmup, args.warmup + args.rounds):
        for cell in cells:
            if cell in samples:
                samples[cell].append(call(train_step, cell, number))
        write_result(args, facts, samples)
    for pool in pools.values():
        pool.shutdown()
    build.cache_clear()


def base_of(args, cell):
    """The cell that this one's time is divided by."""
    if cell.kind:
        return cell._replace(kind="")
    if cell.variant == "one_hot":
        return cell._replace(variant="top2_capacity")
    return cell._replace(tokens=min(args.tokens)) if args.bench == "scale" else cell._replace(variant="dense")


def make_row(args, cell, facts, samples):
    """The row of a cell in the table; before the first round, with the time of the last step before it."""
    row, known, base = {"model": str(cell), "tokens": cell.tokens}, facts[cell], base_of(args, cell)
    if "error" in known:
        return row | known
    seconds, tokens = statistics.median(samples[cell] or [known["seconds"]]), cell.tokens * micro_batches(args, cell)
    row |= {"ms": seconds * 1e3, "tok/s": round(tokens / seconds), "GB": known["GB"], "first_s": known["first_s"]}
    if "flops" in known:
        row |= {"max_vio": known["max_vio"], "TFLOP/s": known["flops"] * tokens / seconds / 1e12}
        if known["peak"]:
            row["MFU"] = row["TFLOP/s"] * 1e12 / known["peak"]
    if base != cell and samples.get(base) and samples[cell]:
        per_token = base.tokens * micro_batches(args, base) / tokens  # 1 unless the sizes differ
        ratios = sorted(per_token * a / b for a, b in zip(samples[cell], samples[base], strict=False))
        below = itertools.accumulate(math.comb(len(ratios), k) / 2 ** len(ratios) for k in range(len(ratios)))
        rank = sum(part < 0.025 for part in below)  # the interval of a median by order statistics
        row |= {"ratio": statistics.median(ratios), "low": ratios[max(0, rank - 1)], "high": ratios[-max(1, rank)]}
        row["over"] = f"{base} {base.tokens}"
        row |= {"excess": row["ratio"] * facts[base]["flops"] / known["flops"]} if "flops" in known else {}
    return row | {"seconds": samples[cell]}


def write_result(args, facts, samples):
    """Write rows and samples; returns the rows."""
    machine, rows = machine_of(args), [make_row(args, cell, facts, samples) for cell in facts]
    dtype = str(machine.dtype).removeprefix("torch.")
    facts = {"dtype": dtype, "ranks": machine.world_size, "load_average": os.getloadavg()}
    facts |= logger.describe_machine(machine.device)
    if machine.is_main:
        with common.atomic_write(Path(args.out, f"{args.bench}_{args.device}_{dtype}.json"), "w") as f:
            json.dump({"machine": facts, "settings": asdict(args), "rows": rows}, f, indent=1)
    return rows


def print_table(rows):
    import pandas as pd  # slow to import, and the processes that only measure do without

    table = pd.DataFrame(row for row in rows if "error" not in row).drop(columns="seconds", errors="ignore")
    print(table.round(3).to_string(index=False, na_rep=""), flush=True)


def report(args):
    """Print tokens/s of steps and of training, as `make gpu` measured them, beside the predictions of docs/speed.md."""
    result = json.loads(Path(args.out, "step_cuda_bfloat16.json").read_text(encoding="utf-8"))
    kept = ("model", "tokens", "tok/s", "ratio", "MFU", "GB")
    rows = [{name: row.get(name) for name in kept} for row in result["rows"] if "tok/s" in row]
    for folder in runs.find([args.out]):
        settings, log = runs.settings_of(runs.read_config(folder)), runs.read_log(folder)
        model = "training dense" if settings["n_exp"] == 1 else "training top2"
        speed = log.value[log.stream == "tok_per_sec"].iloc[2:].median()  # the first steps compile
        rows.append({"model": model, "tokens": settings["B"] * settings["T"], "tok/s": speed})
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    for gpu, model, tokens, speed in re.findall(r"\| (\w+) \| (\w+) \| ([\d,]+) \| ([\d,]+) \|", page):
        for row in rows:
            if gpu in result["machine"]["device"] and row["model"].endswith(model) and f"{row['tokens']:,}" == tokens:
                row["predicted"] = int(speed.replace(",", ""))
                row["of it"] = row["tok/s"] / row["predicted"]
    print_table(rows)


def main():
    args = common.parse(Args, default=Args(**ON_GPU) if torch.cuda.is_available() else None)
    if args.bench == "report":
        return report(args)
    if args.imbalanced and args.uniform_routing:
        raise UserError("--imbalanced and --uniform_routing exclude each other: pass one")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that no other process is left behind
    facts, samples = {}, {}
    for cells in groups_of(args):
        measure(args, cells, facts, samples)
        rows = write_result(args, facts, samples)
        if machine_of(args).is_main:
            print_table(rows[-len(cells) :])
    return common.USER_ERROR if any("error" in row for row in rows) else common.DONE


if __name__ == "__main__":
    common.run(main)
