"""HellaSwag (Zellers et al. 2019, 1905.07830): which of four endings does the model find most likely?

    python hellaswag.py --checkpoint logs/moe_seed_42                        # a run's folder, or one checkpoint
    python hellaswag.py --init_from gpt2                                     # published: GPT-2 124M 0.2955, XL 0.4893
    python hellaswag.py --checkpoint RUN --data hellaswag_val.jsonl --limit 1000 --out results/hella.json

and in training (streams `hella`, `hella_bpb`):  evaluate(model, tokenize(load_examples(), tokenizer), machine)

Completion style: tokens(context) + tokens(" " + ending). `acc` chooses the ending with the lowest total loss over its
tokens, `acc_norm` the one with the lowest mean loss; the first of endings that tie. If context + ending is longer than
block_size, the left end is cropped. `bpb` is the loss of the right ending in bits per byte of " " + ending: for small
models it has less noise than accuracy (2508.13144).

Four endings share one forward pass over their context. The numbers are those of scoring each ending alone:

    row    [context | ending 0 | ending 1 | ending 2 | ending 3], each ending without its last token, which predicts
           nothing. An ending attends to the context and to itself; its positions continue from the context's end.
    head   the output projection only where the next token belongs to an ending
    batch  rows sorted by length, up to a budget of tokens, padded on the right, routed dropless: no row sees another

lm_eval's `hellaswag` has another prompt ("activity_label: " before the context, whose second part is capitalised, and
WikiHow's brackets removed), and its acc_norm divides by the characters of the ending, ours by its tokens. Given its
prompts, our total losses are its log-likelihoods, so `acc` agrees; acc_norm agrees once divided by characters.
"""

import http.client
import json
import math
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lab import common
from lab.common import Positive, UserError, atomic_write

# isort: split
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import sdpa_kernel
from tqdm import tqdm

from lab import devices
from lab.kernels import compute_dtype, linear_cross_entropy
from lab.tokenizer import token_bytes
from sample import NO_CUDNN, inference_dtype
from weights import open_model

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
PATH = Path("data/hellaswag/hellaswag_val.jsonl")
BATCH_TOKENS = {"cpu": 2048, "cuda": 65_536, "mps": 8192}  # per batch, padding included: enough to fill the device

# ---------------------------------------------------------------------------------------------------------------------
# The examples


class Example(NamedTuple):
    context: tuple[int, ...]  # tokens, at least one
    endings: tuple[tuple[int, ...], ...]  # tokens of the four endings, at least one each
    label: int  # index of the right ending
    right_bytes: tuple[int, ...]  # bytes of text of each token of the right ending


def load_examples(path="", limit=None):
    """The first `limit` examples (None: all) of a jsonl file, as dicts with ctx, endings and label.

    Without a path: the official validation set, downloaded once. Labels may be numbers or, as on the Hub, text.
    """
    path, examples = Path(path or PATH), []
    try:
        if path == PATH and not path.exists():
            with urllib.request.urlopen(URL, timeout=10) as response:
                data = response.read()
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as f:
                f.write(data)
        lines = path.read_bytes().splitlines()
    except (OSError, http.client.HTTPException) as error:
        remedy = f"name the file of {URL} with --data (in training: --hellaswag_data)"
        raise UserError(f"no HellaSwag at {path} ({error}): {remedy}") from None
    for number, line in enumerate(lines[:limit], start=1):
        try:
            example = json.loads(line)
            texts, label = [example["ctx"], *example["endings"]], int(example["label"])
            if len(texts) != 5 or not all(text.strip() for text in texts) or label not in range(4):
                raise ValueError
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"{path} line {number}: not an example with ctx, four endings and label 0 to 3") from None
        examples.append({"ctx": texts[0], "endings": texts[1:], "label": label})
    if not examples:
        raise UserError(f"{path} holds no examples: delete it to download it again")
    return examples


def tokenize(examples, tokenizer):
    """Examples for `evaluate` from the dicts of `load_examples`; once for any number of evaluations."""
    bytes_of_token = token_bytes(tokenizer.name)
    tokenized = []
    for example in examples:
        context = tuple(tokenizer.encode_ordinary(example["ctx"]))
        endings = tuple(tuple(tokenizer.encode_ordinary(" " + ending)) for ending in example["endings"])
        right_bytes = tuple(bytes_of_token[list(endings[example["label"]])].tolist())
        tokenized.append(Example(context, endings, example["label"], right_bytes))
    return tokenized


# ---------------------------------------------------------------------------------------------------------------------
# Examples into rows, rows into batches. Ending i of example e has the slot number 4 e + i.


class Row(NamedTuple):
    length: int  # in tokens
    context: tuple
    endings: list  # (tokens of an ending, its slot)


def crop(context, ending, block_size):
    """(context, ending) of the last block_size tokens of context + ending.

    The first token that is left counts as context, even if it was the ending's: nothing predicts it.
    """
    drop = len(context) + len(ending) - block_size
    if drop <= 0:
        return context, ending
    start = max(1, len(context) - drop)
    tokens = (context + ending)[drop:]
    return tokens[:start], tokens[start:]


def build_rows(examples, block_size):
    """(rows, longest first; scored tokens of each ending, int64 (n, 4)).

    Endings share a row if their contexts are equal after cropping: all four, unless one is too long for block_size.
    """
    rows = []
    counts = np.zeros((len(examples), 4), dtype=np.int64)
    for e, example in enumerate(examples):
        endings_after = {}  # context -> [(ending, slot)]
        for i, ending in enumerate(example.endings):
            context, ending = crop(example.context, ending, block_size)
            endings_after.setdefault(context, []).append((ending, 4 * e + i))
            counts[e, i] = len(ending)
        for context, endings in endings_after.items():
            length = len(context) + sum(len(ending) - 1 for ending, _ in endings)
            rows.append(Row(length, context, endings))
    rows.sort(key=lambda row: -row.length)
    return rows, counts


def split_rows(rows, batch_tokens):
    """Batches of rows: at most batch_tokens each, padding included, or one row."""
    batches, start = [], 0
    while start < len(rows):
        end = start + max(1, batch_tokens // rows[start].length)
        batches.append(rows[start:end])
        start = end
    return batches


def collate(rows, device):
    """Rows, the longest first, as tensors on the device: tokens (3, B, S), scored (3, N), both int64.

    tokens: token; position; segment (0 the context, 1 to 4 the endings, -1 padding). scored, an entry per token of an
    ending: index, among the B*S tokens, of the token that predicts it; the token itself; slot of the ending.
    """
    S = rows[0].length
    tokens = np.zeros((3, len(rows), S), dtype=np.int64)
    tokens[2] = -1
    scored = []
    for b, row in enumerate(rows):
        n = end = len(row.context)
        tokens[:, b, :n] = row.context, range(n), [0] * n
        for segment, (ending, slot) in enumerate(row.endings, start=1):
            # Each ending stands behind the one before it, at positions as if behind the context.
            start, end = end, end + len(ending) - 1
            tokens[:, b, start:end] = ending[:-1], range(n, n + end - start), [segment] * (end - start)
            # Its first token is predicted by the last one of the context, each other by the one before.
            sources = [n - 1, *range(start, end)]
            for source, target in zip(sources, ending, strict=True):
                scored.append((b * S + source, target, slot))
    parts = torch.from_numpy(tokens), torch.tensor(scored, dtype=torch.int64).T
    if device.type == "cuda":  # the copy from pinned memory does not block the host
        parts = [part.pin_memory() for part in parts]
    return [part.to(device, non_blocking=True) for part in parts]


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


def score(model, tokens, scored):
    """Losses (N,), float32, nats, of the scored tokens of a batch from collate()."""
    idx, positions, segments = tokens
    own = segments[:, :, None] == segments[:, None, :]  # (B, S, S)
    attn_mask = (own | (segments == 0)[:, None, :]).tril()  # padding attends too: without any key it would be nan
    with sdpa_kernel(NO_CUDNN):
        h = model.hidden_states(idx, positions=positions, attn_mask=attn_mask[:, None], dropless=True)
    h = h.flatten(0, 1)[scored[0]]
    return linear_cross_entropy(h.to(compute_dtype(h)), model.lm_head.weight, scored[1], reduction="none")


@torch.no_grad()
def ending_losses(model, examples, device, rank=0, world_size=1, batch_tokens=None, progress=False):
    """Total losses in nats, float64 (n, 4), and scored tokens, int64 (n, 4), of all endings, numpy; on every rank.

    `model` is the GPT itself, not a compiled or wrapped one: rows have many lengths. It is left as it was.
    """
    device = torch.device(device)
    rows, counts = build_rows(examples, model.config.block_size)
    batches = split_rows(rows[rank::world_size], batch_tokens or BATCH_TOKENS[device.type])
    losses, slots = [], []
    was_training = model.training
    model.eval()
    try:
        with devices.autocast(device, inference_dtype(device, model.config)):
            for batch in tqdm(batches, unit="batch", disable=None if progress else True):
                tokens, scored = collate(batch, device)
                losses.append(score(model, tokens, scored))  # stays there: the next batch is built meanwhile
                slots.append(scored[2])
    finally:
        model.train(was_training)
    total = torch.zeros(counts.size, dtype=torch.float64)
    if losses:  # a rank beyond the last row has none
        total.index_add_(0, torch.cat(slots).cpu(), torch.cat(losses).cpu().double())
    if world_size > 1:
        reduced = total.to(device)
        dist.all_reduce(reduced)
        total = reduced.cpu()
    return total.numpy().reshape(-1, 4), counts


def summarize(examples, total, counts):
    """Accuracies, bits per byte and predictions of the losses; nan where a loss is not finite."""
    n = len(examples)
    labels = np.array([example.label for example in examples])
    mean = total / counts
    predictions = mean.argmin(axis=1)  # the first of endings that tie
    acc, acc_norm = (total.argmin(axis=1) == labels).mean(), (predictions == labels).mean()
    if not np.isfinite(total).all():
        acc = acc_norm = math.nan  # a diverged model must not look like one that guesses
    right = np.arange(n), labels
    scored_bytes = [sum(x.right_bytes[-count:]) for x, count in zip(examples, counts[right], strict=True)]
    bpb = (total[right] / math.log(2) / scored_bytes).mean()
    return {
        "acc": float(acc),  # by total loss
        "acc_norm": float(acc_norm),  # by mean loss
        "bpb": float(bpb),  # of the right ending, mean over examples
        "stderr": math.sqrt(acc_norm * (1 - acc_norm) / n),  # of acc_norm
        "n": n,
        "predictions": predictions.tolist(),  # by mean loss
    }


def evaluate(model, examples, machine):
    """The streams of the log: {"hella": acc_norm, "hella_bpb": bits per byte}. Every rank calls it."""
    result = summarize(examples, *ending_losses(model, examples, machine.device, *machine.eval_share))
    return {"hella": result["acc_norm"], "hella_bpb": result["bpb"]}


# ---------------------------------------------------------------------------------------------------------------------
# The script


@dataclass
class Args:
    checkpoint: str = ""  # Run of train_single_gpu.py: its folder (the newest checkpoint) or one checkpoint
    init_from: str = ""  # GPT-2 from Hugging Face (gpt2 ... gpt2-xl), or a folder in its format
    data: str = ""  # jsonl file in the official format (default: data/hellaswag, downloaded when missing)
    limit: Positive | None = None  # Number of examples, from the first (default: all 10,042)
    out: str = ""  # JSON file for the result and the predictions
    device: str = "auto"  # cuda, mps or cpu; auto: the first that is available
    batch_tokens: Positive | None = None  # Tokens per batch, padding included (default: by device)


def main():
    args = common.parse(Args)
    if bool(args.checkpoint) == bool(args.init_from):
        raise UserError("give one model: --checkpoint RUN or --init_from gpt2")
    source, device = args.checkpoint or args.init_from, devices.choose_device(args.device)
    model, tokenizer = open_model(source, device)
    examples = tokenize(load_examples(args.data, args.limit), tokenizer)
    start = time.perf_counter()
    losses = ending_losses(model, examples, device, batch_tokens=args.batch_tokens, progress=True)
    seconds = time.perf_counter() - start
    cropped = sum(len(x.context) + max(map(len, x.endings)) > model.config.block_size for x in examples)
    result = {"model": source, "seconds": seconds, "cropped": cropped, **summarize(examples, *losses)}
    if math.isnan(result["acc"]):
        raise UserError(f"{source} gives losses that are not finite: use an earlier checkpoint")
    print(f"acc       {result['acc']:.4f}  (by total loss)")
    print(f"acc_norm  {result['acc_norm']:.4f} +/- {result['stderr']:.4f}  (by mean loss over the ending's tokens)")
    print(f"bpb       {result['bpb']:.4f}  (bits per byte of the right ending)")
    print(f"examples  {result['n']} in {seconds:.1f} s, {cropped} cropped to the block size")
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.out, "w") as f:
            json.dump(result, f)


if __name__ == "__main__":
    common.run(main)
