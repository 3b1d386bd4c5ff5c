"""HellaSwag (Zellers et al. 2019, 1905.07830): which of four endings does the model find the most likely?

    python hellaswag.py --checkpoint checkpoints/moe_20250629_seed_42        # the newest in a folder, or a .pt file
    python hellaswag.py --init_from gpt2                                     # published: GPT-2 124M 0.2955, XL 0.4893
    python hellaswag.py --checkpoint PATH --data hellaswag_val.jsonl --limit 1000 --out results/hella.json

and inside training (the `hella` stream):  evaluate(model, tokenize(load_examples(), tokenizer), device).acc_norm

Completion style: tokens(context) + tokens(" " + ending); `acc` chooses by the total loss over the ending's tokens,
`acc_norm` by their mean. Of endings that tie, the first is chosen. context + ending longer than block_size is cropped
on the left.

What is computed, for the same numbers as scoring the endings one by one:

    row   [context | ending 0 | ending 1 | ending 2 | ending 3]; an ending's last token predicts nothing and is left
          out; an ending attends to the context and to itself, and its positions go on from the context's end
    head  the output projection only where the next token is an ending's
    batch rows sorted by length, to a budget of tokens, padded on the right, routed dropless: no row sees another

lm_eval's `hellaswag` has another prompt ("activity_label: " before the context, whose second part is capitalised, and
WikiHow's brackets cleaned away), and its acc_norm divides by the ending's characters, ours by its tokens. Given its
prompts, our total losses are its log-likelihoods, so `acc` agrees; acc_norm agrees once divided by characters.
"""

import http.client
import itertools
import json
import math
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
import common
from common import UserError, atomic_write
from kernels import compute_dtype, linear_cross_entropy

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
PATH = Path("data/hellaswag/hellaswag_val.jsonl")
BATCH_TOKENS = {"cpu": 2048, "cuda": 65_536, "mps": 8192}  # a batch, padding included: what each keeps busy with

# ---------------------------------------------------------------------------------------------------------------------
# The examples


class Example(NamedTuple):
    context: tuple[int, ...]  # tokens, at least one, as of each ending
    endings: tuple[tuple[int, ...], ...]  # four
    label: int  # the right one


def load_examples(path=None, limit=None):
    """The first `limit` (default: all) examples of a jsonl file in the official format, as dicts; checked.

    Without a path: the official validation set, downloaded once. Over several ranks let one call this first.
    Raises UserError: no network, no such file, a malformed line (with its number).
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}")
    if path is None:
        path = PATH
        if not path.exists():
            download(URL, path)
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the HellaSwag jsonl with --data FILE") from error
    numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    examples = [parse(line, f"{path} line {number}") for number, line in itertools.islice(numbered, limit)]
    if not examples:
        raise UserError(f"{path} holds no examples; delete it to download it again, or give another with --data FILE")
    return examples


def download(url, path, timeout=30):
    """`url` to `path`, whole or not at all."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url}: {error}; fetch the file on another machine and give it with --data FILE") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as f:
            f.write(data)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give the file with --data FILE") from error


def parse(line, where):
    try:
        example = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where} is not JSON; expected the official format, one object a line") from None
    fault = find_fault(example)
    if fault:
        raise UserError(f"{where}: {fault}; expected the official format: ctx, four endings, label 0 to 3")
    return example


def find_fault(example):
    """What is wrong with a line, or None."""
    if not isinstance(example, dict):
        return "not a JSON object"
    missing = [name for name in ("ctx", "endings", "label") if name not in example]
    if missing:
        return f"no {missing[0]!r}"
    if not is_text(example["ctx"]):
        return "'ctx' is not a text of at least one word"
    endings = example["endings"]
    if not isinstance(endings, list) or len(endings) != 4:
        return "'endings' is not a list of four"
    for i, ending in enumerate(endings):
        if not is_text(ending):
            return f"ending {i} is not a text of at least one word"
    if type(example["label"]) is not int or example["label"] not in range(4):
        return f"label {example['label']!r} is not one of 0 to 3"
    return None


def is_text(value):
    return isinstance(value, str) and not value.isspace() and value != ""


def tokenize(examples, tokenizer):
    """What `evaluate` takes, from what `load_examples` gives; done once for any number of evaluations."""

    def encode(text):
        return tuple(tokenizer.encode_ordinary(text))

    return [Example(encode(x["ctx"]), tuple(encode(" " + text) for text in x["endings"]), x["label"]) for x in examples]


# ---------------------------------------------------------------------------------------------------------------------
# Examples into rows, rows into batches. Ending i of example e has the slot number 4 e + i.


class Row(NamedTuple):
    length: int  # in tokens
    context: tuple
    endings: dict  # tokens of an ending -> its slot; endings that are equal need one


def crop(context, ending, block_size):
    """The last block_size tokens of context + ending, again in two parts.

    The first token left is not scored, since nothing predicts it: it counts as context, even if it was the ending's.
    """
    drop = len(context) + len(ending) - block_size
    if drop <= 0:
        return context, ending
    start = max(1, len(context) - drop)
    tokens = (context + ending)[drop:]
    return tokens[:start], tokens[start:]


def build_rows(examples, block_size):
    """(rows, longest first; for each slot the slot computed for it; for each slot its scored tokens; examples cropped).

    Endings share a row if their contexts are the same after cropping: all four, unless one is too long for block_size.
    Equal endings are computed once, so that they tie exactly.
    """
    if block_size < 2:
        raise UserError(f"a model of block_size {block_size} predicts nothing from a context: at least 2 are needed")
    rows, cropped = [], 0
    computed, counts = np.zeros((2, 4 * len(examples)), dtype=np.int64)
    for e, (context, endings, _) in enumerate(examples):
        groups = {}
        for slot, ending in enumerate(endings, start=4 * e):
            kept, tail = crop(context, ending, block_size)
            computed[slot] = groups.setdefault(kept, {}).setdefault(tail, slot)
            counts[slot] = len(tail)
        for kept, tails in groups.items():
            rows.append(Row(len(kept) + sum(map(len, tails)) - len(tails), kept, tails))
        cropped += len(context) + max(map(len, endings)) > block_size
    rows.sort(key=lambda row: -row.length)
    return rows, computed, counts, cropped


def split_rows(rows, batch_tokens, rank, world_size):
    """This rank's share of the rows, in batches of at most batch_tokens, padding included (or of one row).

    Each rank gets the same number of batches, of about the same size: none waits for another.
    """
    start = 0
    while start < len(rows):
        count = world_size * max(1, batch_tokens // rows[start].length)
        unscored = rows[start]._replace(endings={})  # for a rank beyond the last few rows
        yield rows[start : start + count][rank::world_size] or [unscored]
        start += count


class Batch(NamedTuple):
    tokens: torch.Tensor  # int64 (3, B, S): token, position, segment (padding: -1)
    scored: torch.Tensor  # int64 (2, N): index among the B*S tokens of the one that predicts, target
    slots: np.ndarray  # int64 (N,)


class Layout(NamedTuple):
    """A row spelt out in ints: three lists of an entry a token, three of an entry a scored token."""

    tokens: list
    positions: list
    segments: list  # 0 the context, from 1 the endings
    sources: list  # index in the row of the token whose hidden state predicts the scored one
    targets: list
    slots: list


def lay_out(row):
    n = len(row.context)
    out = Layout([*row.context], [*range(n)], [0] * n, [], [], [])
    for segment, (ending, slot) in enumerate(row.endings.items(), start=1):
        start, seen = len(out.tokens), len(ending) - 1
        out.tokens.extend(ending[:-1])
        out.positions.extend(range(n, n + seen))
        out.segments.extend([segment] * seen)
        out.sources.extend([n - 1, *range(start, start + seen)])
        out.targets.extend(ending)
        out.slots.extend([slot] * len(ending))
    return out


def collate(rows, device):
    length = rows[0].length  # the longest
    tokens = np.zeros((3, len(rows), length), dtype=np.int64)
    tokens[2] = -1
    sources, targets, slots = [], [], []
    for b, row in enumerate(map(lay_out, rows)):
        tokens[:, b, : len(row.tokens)] = row.tokens, row.positions, row.segments
        sources.extend(b * length + source for source in row.sources)
        targets.extend(row.targets)
        slots.extend(row.slots)
    parts = torch.from_numpy(tokens), torch.tensor([sources, targets], dtype=torch.int64)
    if device.type == "cuda":  # from pinned memory the copy does not stop the host
        parts = [part.pin_memory() for part in parts]
    return Batch(*(part.to(device, non_blocking=True) for part in parts), np.array(slots, dtype=np.int64))


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


class Result(NamedTuple):
    acc: float  # by total loss; nan if a loss is not finite
    acc_norm: float  # by mean loss
    stderr: float  # of acc_norm
    n: int
    seconds: float
    cropped: int  # examples too long for block_size
    ties: int  # examples in which two endings share the least mean loss
    predictions: list[int]  # the ending chosen by mean loss


def score(model, batch):
    """Loss (N,), float32, of each scored token."""
    idx, positions, segments = batch.tokens
    sources, targets = batch.scored
    own = segments[:, :, None] == segments[:, None, :]  # (B, S, S)
    attn_mask = (own | (segments == 0)[:, None, :]).tril()  # padding attends too: a row without any key would be nan
    h = model.hidden_states(idx, positions=positions, attn_mask=attn_mask[:, None], dropless=True)
    h = h.flatten(0, 1)[sources]
    return linear_cross_entropy(h.to(compute_dtype(h)), model.lm_head.weight, targets, reduction="none")


@torch.no_grad()
def ending_losses(model, examples, device, batch_tokens=None, rank=0, world_size=1, progress=False):
    """Total loss (n, 4) and number of scored tokens (n, 4) of each ending, numpy; number of examples cropped.

    float32 on CPU, bf16 autocast on CUDA. Leaves mode, gradients and random state as they are.
    """
    device = torch.device(device)
    rows, computed, counts, cropped = build_rows(examples, model.config.block_size)
    counts = counts.reshape(-1, 4)
    labels = np.array([example.label for example in examples])
    shares = split_rows(rows, batch_tokens or BATCH_TOKENS.get(device.type, 8192), rank, world_size)
    batches = (collate(share, device) for share in shares)
    total = np.zeros(len(computed))
    was_training = model.training
    model.eval()
    try:
        with (
            torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
            tqdm(total=len(examples) // world_size, unit="example", disable=None if progress else True) as bar,
        ):
            batch = next(batches)
            while batch is not None:
                losses = score(model, batch)
                upcoming = next(batches, None)  # made while the device is busy
                total += np.bincount(batch.slots, losses.cpu(), minlength=len(total))
                show(bar, total[computed].reshape(-1, 4), counts, labels)
                batch = upcoming
    finally:
        model.train(was_training)
    if world_size > 1:
        reduced = torch.from_numpy(total).to(device)
        dist.all_reduce(reduced)
        total = reduced.cpu().numpy()
    return total[computed].reshape(-1, 4), counts, cropped


def show(bar, total, counts, labels):
    """Accuracy so far, on the examples whose four endings have a loss."""
    if bar.disable:
        return
    done = total.all(axis=1)
    if done.any():
        correct = (total / counts).argmin(axis=1) == labels
        bar.set_postfix(acc_norm=f"{correct[done].mean():.4f}", refresh=False)
    bar.update(int(done.sum()) - bar.n)


def evaluate(model, examples, device, batch_tokens=None, rank=0, world_size=1, progress=False):
    """Result of a GPT on what `tokenize` gave. Every rank of a world calls it, and gets the result on all examples.

    `model` is the GPT itself, not a compiled or wrapped one: rows come in many lengths. Call it outside autocast.
    """
    start = time.perf_counter()
    total, counts, cropped = ending_losses(model, examples, device, batch_tokens, rank, world_size, progress)
    seconds = time.perf_counter() - start
    mean = total / counts
    labels = np.array([example.label for example in examples])
    predictions = mean.argmin(axis=1)  # the first of those that tie
    acc, acc_norm = (total.argmin(axis=1) == labels).mean(), (predictions == labels).mean()
    if not np.isfinite(total).all():
        acc = acc_norm = math.nan  # a broken model must not pass for one that guesses
    ties = ((mean == mean.min(axis=1, keepdims=True)).sum(axis=1) > 1).sum()
    stderr = standard_error(acc_norm, len(examples))
    return Result(float(acc), float(acc_norm), stderr, len(examples), seconds, cropped, int(ties), predictions.tolist())


def standard_error(accuracy, n):
    return math.sqrt(accuracy * (1 - accuracy) / n)


# ---------------------------------------------------------------------------------------------------------------------
# The script


@dataclass
class Args:
    """HellaSwag accuracy of a checkpoint or of GPT-2."""

    checkpoint: str = ""  # a checkpoint of train_single_gpu.py
    init_from: str = ""  # or gpt2, gpt2-medium, gpt2-large, gpt2-xl, a Hugging Face folder
    data: str = ""  # jsonl in the official format; empty: data/hellaswag, downloaded when missing
    limit: int | None = None  # examples (default: all 10,042)
    out: str = ""  # JSON file to write: acc, acc_norm, stderr, n, seconds, cropped, ties, predictions
    device: str = "auto"  # cuda, mps, cpu; auto: the first of them there is
    batch_tokens: int | None = None  # tokens a batch, padding included (default: 65,536 on cuda, 2,048 on CPU)


def check_args(args):
    """Everything that can be said to be wrong before anything is loaded."""
    if args.batch_tokens is not None and args.batch_tokens < 1:
        raise UserError(f"--batch_tokens must be at least 1, not {args.batch_tokens}")
    if args.out and not Path(args.out).resolve().parent.is_dir():
        raise UserError(f"--out {args.out}: there is no such folder, make it first")
    if args.out and Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is a folder: name a file in it")


def report(result):
    print(f"acc       {result.acc:.4f} ± {standard_error(result.acc, result.n):.4f}  (by total loss)")
    print(f"acc_norm  {result.acc_norm:.4f} ± {result.stderr:.4f}  (by mean loss over the ending's tokens)")
    notes = f"{result.cropped} cropped to the block size, {result.ties} with a tie"
    print(f"examples  {result.n} in {result.seconds:.1f} s; {notes}")


def main():
    args = common.parse(Args)
    check_args(args)
    device = common.choose_device(args.device)
    model, tokenizer = checkpoint.open_model(args.checkpoint, args.init_from, device)
    examples = tokenize(load_examples(args.data or None, args.limit), tokenizer)
    result = evaluate(model, examples, device, args.batch_tokens, progress=True)
    name = args.checkpoint or args.init_from
    if math.isnan(result.acc):
        raise UserError(f"{name} gives losses that are not finite: take an earlier checkpoint")
    report(result)
    if args.out:
        with atomic_write(args.out, "w") as f:
            json.dump({"model": name, **result._asdict()}, f)


if __name__ == "__main__":
    common.run(main)
