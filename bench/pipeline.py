"""`tokenize`, `loader`, `hellaswag`, `sample`: data, evaluation and text, against the baselines as published."""

import copy
import functools
import multiprocessing
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
import torch

import fineweb
import hellaswag
import sample
from bench.baselines import encode_document, from_prefix, one_by_one
from bench.steps import build_model
from bench.timing import Target, interleave, median_ratio, median_seconds
from lab.common import UserError, autocast
from lab.data import DataLoader
from lab.tokenizer import get_tokenizer

LOADER_B, LOADER_BATCHES = 8, 100  # sequences per batch of `loader`, batches timed after the first
QUARTERS = 4  # a text of `sample` is timed in this many parts: does a later token cost more?


def check_args(args):
    """UserError for settings that a subcommand of this file cannot use."""
    if args.bench == "sample" and not QUARTERS <= args.new_tokens <= args.T - 8:
        raise UserError(f"--new_tokens {args.new_tokens} must lie in {QUARTERS} to T - 8 = {args.T - 8}")
    needed = (LOADER_BATCHES + 1) * LOADER_B * args.T + 1
    if args.bench == "loader" and args.shard_tokens < needed:
        raise UserError(f"--shard_tokens {args.shard_tokens} must be at least {needed} with --T {args.T}")
    if args.bench in ("tokenize", "hellaswag"):
        vocab_size = get_tokenizer(args.tokenizer).vocab_size
        if args.bench == "hellaswag" and args.vocab_size < vocab_size:
            raise UserError(f"--vocab_size {args.vocab_size} must be at least {vocab_size} with {args.tokenizer}")


def compare(args, ours, baseline):
    """Rows, samples and {impl: its last result} of two functions without arguments; the caller compares the results."""
    results = {}

    def timed(name, run):
        def call(data, mark):
            results[name] = run()
            mark()

        return call

    samples = interleave(args, {"ours": timed("ours", ours), "baseline": timed("baseline", baseline)})
    rows = [
        {"impl": name, "s": median_seconds(samples, name), "times faster": median_ratio(samples, "baseline", name)}
        for name in samples
    ]
    return rows, samples, results


# ---------------------------------------------------------------------------------------------------------------------
# Data


def library_text(megabytes):
    """Documents, one per file of Python's own library, up to this many million characters."""
    documents, left = [], megabytes * 1e6
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py")):
        if left <= 0:
            break
        documents.append(path.read_text(encoding="utf-8", errors="replace")[: int(left)])
        left -= len(documents[-1])
    return [text for text in documents if text]


def bench_tokenize(args, dtype):
    """Text to tokens on all cores, against multiprocessing.Pool.imap as in build-nanogpt."""
    documents = library_text(args.megabytes)
    workers = fineweb.cores()

    def ours():
        return np.concatenate(list(fineweb.tokenize(documents, args.tokenizer, workers)))

    def baseline():
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            encode = functools.partial(encode_document, args.tokenizer)
            return np.concatenate(list(pool.imap(encode, documents, chunksize=16)))

    rows, samples, results = compare(args, ours, baseline)
    if not np.array_equal(results["ours"], results["baseline"]):
        raise RuntimeError("the two implementations gave different tokens")
    for row in rows:
        row["M tokens/s"] = len(results["ours"]) / row["s"] / 1e6
    return rows, samples, [Target("times faster than Pool.imap", rows[0]["times faster"], ">=", 1.2)]


def bench_loader(args, dtype):
    """Opening a shard and reading batches, against the published loader, which reads the whole shard as int64."""
    B, T = LOADER_B, args.T
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bench_train_000000.npy")
        np.save(path, np.random.default_rng(args.seed).integers(50257, size=args.shard_tokens, dtype=np.uint16))

        def ours(data, mark):
            loader = DataLoader(folder, "train", B, T)
            loader.next_batch()
            mark()
            for _ in range(LOADER_BATCHES):
                loader.next_batch()
            mark()
            loader.pool.shutdown()

        def baseline(data, mark):
            tokens = torch.tensor(np.load(path).astype(np.int32), dtype=torch.long)
            parts = (tokens[i * B * T : (i + 1) * B * T + 1] for i in range(LOADER_BATCHES + 1))  # in file order
            batches = ((part[:-1].view(B, T), part[1:].view(B, T)) for part in parts)
            next(batches)
            mark()
            for x, y in batches:
                x.to("cpu"), y.to("cpu")
            mark()

        samples = interleave(args, {"ours": ours, "baseline": baseline})
    memory = {"ours": 0.0, "baseline": 8e-6 * args.shard_tokens}
    rows = [
        {"impl": name, "open, first batch ms": median_seconds(samples, name, 0) * 1e3,
         "us per batch": median_seconds(samples, name, 1) / LOADER_BATCHES * 1e6, "MB copied": memory[name],
         "times faster to open": median_ratio(samples, "baseline", name, 0)}
        for name in samples
    ]  # fmt: skip
    return rows, samples, [Target("times faster to open", rows[0]["times faster to open"], ">=", 10)]


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and text


def bench_hellaswag(args, dtype):
    """HellaSwag in packed batches, against one example at a time."""
    model = build_model(args, "dense").eval()
    examples = hellaswag.load_examples(args.data or None, args.examples)
    examples = hellaswag.tokenize(examples, get_tokenizer(args.tokenizer))

    def ours():
        return hellaswag.evaluate(model, examples, args.device).predictions

    def baseline():
        with torch.no_grad(), autocast(args.device, getattr(torch, dtype)):
            return [one_by_one(model, example, args.device) for example in examples]

    rows, samples, results = compare(args, ours, baseline)
    agree = float(np.mean(np.array(results["ours"]) == np.array(results["baseline"])))
    for row in rows:
        row |= {"examples": len(examples), "examples/s": len(examples) / row["s"], "agreement": agree}
    limit = 30 if args.device == "cuda" else 2
    targets = [Target("times faster than one by one", rows[0]["times faster"], ">=", limit)]
    if dtype == "float32":  # bfloat16 rounds near ties in either
        targets.append(Target("same predictions", agree, ">=", 1))
    return rows, samples, targets


def bench_sample(args, dtype):
    """Greedy text from a prompt of 8 tokens: with the key/value cache, and with the prefix computed again per token.

    The cache's weights are stored as sample.py stores them, the others' as in training. `published` is the latter with
    one-hot dispatch, as in nanoMoE. Its capacity drops tokens, so its text may differ.
    """
    dense, top2, one_hot = (build_model(args, name).eval() for name in ("dense", "top2", "one_hot"))
    stored = copy.deepcopy((dense, top2))
    if args.device == "cpu":
        for model in stored:
            sample.store_by_input(model)
    prompt = torch.randint(args.vocab_size, (1, 8), generator=torch.Generator().manual_seed(args.seed)).to(args.device)
    from_cache = functools.partial(sample.stream, temperature=0)
    impls = {
        "dense/cache": (stored[0], from_cache), "dense/prefix": (dense, from_prefix),
        "top2/cache": (stored[1], from_cache),
        "top2/published": (one_hot, functools.partial(from_prefix, dropless=False)),
    }  # fmt: skip
    texts, quarter = {}, args.new_tokens // QUARTERS

    def run_impl(name, data, mark):
        model, write = impls[name]
        texts[name] = []
        with autocast(args.device, sample.inference_dtype(prompt.device, model.config)):
            for i, tokens in enumerate(write(model, prompt, QUARTERS * quarter), start=1):
                texts[name].append(tokens.item())
                if i % quarter == 0:
                    mark()

    samples = interleave(args, {name: functools.partial(run_impl, name) for name in impls})
    return [sample_row(samples, texts, name) for name in impls], samples, sample_targets(samples)


def sample_row(samples, texts, name):
    variant, impl = name.split("/")
    base, quarter = f"{variant}/cache", len(texts[name]) // QUARTERS
    return {
        "variant": variant, "impl": impl, "s": median_seconds(samples, name),
        "tokens/s": len(texts[name]) / median_seconds(samples, name),
        "first quarter": quarter / median_seconds(samples, name, 0),
        "last quarter": quarter / median_seconds(samples, name, -1),
        "cache is times faster": median_ratio(samples, name, base),
        "agreement": float(np.mean(np.array(texts[name]) == np.array(texts[base]))),
    }  # fmt: skip


def sample_targets(samples):
    targets = []
    for name in ("dense/prefix", "top2/published"):
        gain = median_ratio(samples, name, name.split("/")[0] + "/cache")
        targets.append(Target(f"times faster than {name}", gain, ">=", 10))
    for name in ("dense/cache", "top2/cache"):
        growth = median_seconds(samples, name, -1) / median_seconds(samples, name, 0)
        targets.append(Target(f"{name}, time of the last quarter over the first", growth, "<=", 1.2))
    return targets
