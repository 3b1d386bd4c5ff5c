"""Speed and memory. Every claim is a ratio of things timed in the same rounds of one run.

    python -m bench step                       # training steps: dense and MoE variants, against what their FLOPs say
    python -m bench step --vs nanoGPT/model.py # the same, with the dense step of another repository beside them
    python -m bench scale                      # time and memory per token as the micro-batch grows, one-hot dispatch
    python -m bench moe                        # the MoE layer by parts, and other implementations of each part
    python -m bench tokenize | loader | hellaswag | sample      # against the baselines as published
    python -m bench step --device cuda --compile --imbalanced   # one expert gets half of all tokens
    python -m bench gpu --minutes 9            # all that a first run on a GPU should tell (gpu.py)
    python -m bench roofline --gpu h100        # the step predicted from its bytes and FLOPs (roofline.py)

Prints a table and writes {bench}_{device}_{dtype}.json with every sample to --out_dir. What the numbers led to:
results/bench/README.md; every trial: results/bench/LOG.md.

Each round draws new data, as training does: oneDNN compiles a kernel for each new number of rows of an expert, and with
one batch repeated that cost would not be seen. Token frequencies follow Zipf's law and router weights are three times
their initial size, so that the load is at least as uneven as in training (column max_vio).
"""

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from bench import gpu, pipeline, roofline, steps
from bench.moe import bench_moe
from bench.timing import write_result
from lab import common
from lab.common import FiniteAboveZero, NotNegative, Positive, Range, Seed, UserError

BENCHES = {
    "step": steps.bench_step,
    "scale": steps.bench_scale,
    "moe": bench_moe,
    "tokenize": pipeline.bench_tokenize,
    "loader": pipeline.bench_loader,
    "hellaswag": pipeline.bench_hellaswag,
    "sample": pipeline.bench_sample,
}
RUNS = {"gpu": gpu.run, "roofline": roofline.run}  # these write files of their own
TRAINING = ("step", "scale", "moe")
WHOLE_RUNS = ("hellaswag", "sample")  # GPT-2 124M on either device: seconds to minutes each, so fewer rounds
CPU_SHAPE = {"n_layer": 6, "n_embd": 384, "n_head": 6, "vocab_size": 4096, "T": 256, "one_hot_max_tokens": 8192}
GPT2_SHAPE = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50304, "T": 1024, "one_hot_max_tokens": 16384}
TOKENS = {  # per micro-batch
    ("step", "cpu"): (2048, 8192),
    ("step", "cuda"): (16384, 65536),
    ("scale", "cpu"): (2048, 4096, 8192, 16384),
    ("scale", "cuda"): (2048, 4096, 8192, 16384, 32768, 65536),
    ("moe", "cpu"): (2048, 8192),
    ("moe", "cuda"): (16384, 65536),
    ("roofline", "cpu"): (16384, 65536),
}


@dataclass
class Args:
    bench: Annotated[Literal[(*BENCHES, *RUNS)], tyro.conf.Positional]  # Subcommand

    # measuring
    device: Literal["auto", "cpu", "cuda"] = "auto"  # Device
    dtype: Literal["float32", "bfloat16", "both"] = "both"  # Type of matrix products (autocast); weights stay float32
    rounds: Positive | None = None  # Timed rounds (default: 9; hellaswag and sample: 3)
    warmup: NotNegative | None = None  # Rounds before them, in which kernels compile (default: 8; 1)
    clock: Literal["wall", "cpu"] = "wall"  # cpu: time of the process, for --threads 1 on a busy machine
    threads: Positive | None = None  # Threads of torch on the CPU (default: all cores)
    compile: bool = False  # torch.compile the training step
    profile: bool = False  # Profile one more round per variant: trace_*.json, opens in Perfetto
    out_dir: Path | None = (
        None  # Folder of the files (default: results/bench; gpu: results/gpu/DEVICE; roofline: results/gpu)
    )
    seed: Seed = 1337  # Seed of weights and data

    # step, scale, moe
    variants: tuple[str, ...] = tuple(steps.VARIANTS)  # Variants of step; dense is always there
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: step trains each variant with Muon too, beside AdamW
    recompute: tuple[Literal["experts", "blocks"], ...] = ()  # step times each variant with these recomputed, too
    vs: str = ""  # Path of another repository's model.py with nanoGPT's GPT and GPTConfig, timed by step
    tokens: tuple[int, ...] | None = None  # Tokens per micro-batch, one or more sizes (default: by subcommand)
    imbalanced: bool = False  # Expert 0 is the first choice of every second token and no choice of the others
    uniform_routing: bool = False  # Experts in turn, whatever the router says: what imbalance costs
    one_hot_max_tokens: Positive | None = None  # Largest micro-batch of one-hot dispatch (default: 8192; CUDA 16384)

    # shape; the default in brackets is that of CUDA, hellaswag and sample
    T: Positive | None = None  # Tokens per sequence (default: 256 [1024])
    n_layer: Positive | None = None  # Blocks (default: 6 [12])
    n_embd: Positive | None = None  # Width (default: 384 [768])
    n_head: Positive | None = None  # Attention heads (default: 6 [12])
    vocab_size: Positive | None = None  # Vocabulary size (default: 4096 [50304])
    n_exp: Annotated[int, Range(at_least=2)] = 8  # Experts of the MoE variants

    # tokenize, loader, hellaswag, sample
    megabytes: Annotated[float, Range(at_least=0.001, below=math.inf)] = 30.0  # Text of tokenize: Python's own library
    shard_tokens: Positive = 100_000_000  # Tokens in the shard of loader
    tokenizer: str = "gpt2"  # Tokenizer of tokenize and hellaswag: gpt2 or bytes
    data: str = ""  # HellaSwag jsonl in the official format (default: data/hellaswag, downloaded when missing)
    examples: Positive = 200  # HellaSwag examples, at most
    new_tokens: Positive = 480  # Tokens that sample writes

    # gpu
    minutes: FiniteAboveZero = 9.0  # Time of all parts together
    parts: tuple[Literal[tuple(gpu.SHARES)], ...] = tuple(gpu.SHARES)  # Parts to measure
    data_root: str = ""  # Shards to train on (default: made from Python's own library)

    # roofline
    gpu: Literal[tuple(roofline.GPUS)] = "h100"  # GPU to predict for
    grouped_tflops: FiniteAboveZero | None = None  # Rate of grouped products (default: that of all products)


def main():
    args = common.parse(Args)
    fill_defaults(args)
    check_args(args)
    if args.bench in RUNS:
        return RUNS[args.bench](args)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cpu" and args.bench in TRAINING:  # as train_single_gpu.py does
        common.keep_freed_memory()
    for dtype in choose_dtypes(args):
        write_result(args, dtype, *measure(args, dtype))


def measure(args, dtype):
    """Rows, samples and targets of the subcommand."""
    if not args.compile:
        return BENCHES[args.bench](args, dtype)
    # One graph per variant and size, all of one function: more than torch's limit of 8.
    with torch._dynamo.config.patch(recompile_limit=256):
        return BENCHES[args.bench](args, dtype)


def fill_defaults(args):
    """Settings that depend on the device and the subcommand."""
    if args.bench == "gpu":
        gpu.fill_defaults(args)
        return
    predicted = args.bench == "roofline"
    args.out_dir = args.out_dir or Path("results/gpu" if predicted else "results/bench")
    args.device = "cuda" if not predicted and common.choose_device(args.device).type == "cuda" else "cpu"
    whole_run = args.bench in WHOLE_RUNS
    defaults = GPT2_SHAPE if args.device == "cuda" or whole_run or predicted else CPU_SHAPE
    defaults = defaults | ({"rounds": 3, "warmup": 1} if whole_run else {"rounds": 9, "warmup": 8})
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    tokens = TOKENS.get((args.bench, args.device), ()) if args.tokens is None else args.tokens
    args.tokens = tuple(sorted(set(tokens)))


def choose_dtypes(args):
    if args.bench in ("tokenize", "loader"):
        return ["uint16"]  # their output; no arithmetic
    if args.bench in ("hellaswag", "sample"):  # as hellaswag.py and sample.py choose
        return ["bfloat16" if args.device == "cuda" else "float32"]
    return ["float32", "bfloat16"] if args.dtype == "both" else [args.dtype]


def check_args(args):
    """UserError for what cannot be measured, before anything is."""
    if args.bench in (*TRAINING, *RUNS):
        check_tokens(args)
    if not args.variants:
        raise UserError(f"--variants needs at least one of {', '.join(steps.VARIANTS)}")
    for name in args.variants:
        if name not in steps.VARIANTS:
            raise UserError(f"--variants: no {name!r}; there are {', '.join(steps.VARIANTS)}")
    if args.imbalanced and args.uniform_routing:
        raise UserError("--imbalanced and --uniform_routing exclude each other: pass one")
    if args.compile and not args.warmup:
        raise UserError("--compile compiles in the warm-up: pass --warmup 1 or more")
    try:
        steps.config_of(args, "top2")
    except ValueError as error:
        raise UserError(f"--{error}") from None
    pipeline.check_args(args)
    check_step_only(args)
    check_out_dir(args.out_dir)


def check_tokens(args):
    if not args.tokens or (args.bench == "scale" and len(args.tokens) < 2):
        raise UserError(f"--tokens: {args.bench} needs {'two sizes' if args.bench == 'scale' else 'a size'} or more")
    for tokens in args.tokens:
        if tokens < args.T or tokens % args.T:
            raise UserError(f"--tokens {tokens} is not a positive multiple of --T {args.T}")


def check_step_only(args):
    if args.vs and args.bench != "step":
        raise UserError("--vs is timed by step alone: python -m bench step --vs PATH")
    if args.optimizer != "adamw" and args.bench != "step":
        raise UserError("--optimizer is timed by step alone: python -m bench step --optimizer muon")
    if args.recompute and args.bench != "step":
        raise UserError("--recompute is timed by step alone: python -m bench step --recompute blocks")
    if args.vs:
        steps.load_vs(args)


def check_out_dir(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write to --out_dir {folder}: {error.strerror}; name another folder") from None


if __name__ == "__main__":
    common.run(main)
