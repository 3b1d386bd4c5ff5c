"""HellaSwag (Zellers et al. 2019, 1905.07830): which of four endings does the model find most likely?

    python hellaswag.py --checkpoint checkpoints/moe_20250629_seed_42        # a .pt file, or a folder: its newest
    python hellaswag.py --init_from gpt2                                     # published: GPT-2 124M 0.2955, XL 0.4893
    python hellaswag.py --checkpoint PATH --data hellaswag_val.jsonl --limit 1000 --out results/hella.json

and in training (streams `hella`, `hella_bpb`):  evaluate(model, tokenize(load_examples(), tokenizer), device)

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
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from lab import checkpoint, common
from lab.common import Positive, SharedError, UserError, atomic_write
from lab.kernels import compute_dtype, linear_cross_entropy
from lab.tokenizer import token_bytes
from sample import attention_without_cudnn, inference_dtype, require_memory

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


def load_examples(path=None, limit=None, flag="--data"):
    """The first `limit` (default: all) examples of a jsonl file in the official format, as dicts.

    Without a path: the official validation set, downloaded once. Raises UserError, with the `flag` that names another
    file: no network, no such file, a malformed line (with its number).
    """
    if not path:
        path = PATH
        if not path.exists():
            download(URL, path, flag)
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the HellaSwag jsonl with {flag} FILE") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    examples = [parse(line, f"{path} line {number}") for number, line in numbered[:limit]]
    if not examples:
        raise UserError(f"{path} holds no examples; delete it to download it again, or give another with {flag} FILE")
    return examples


def download(url, path, flag, timeout=10):
    """Download `url` to `path`, whole or not at all. A network that is silent for `timeout` seconds is an error."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url}: {error}; download it on another machine and give it with {flag} FILE") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as f:
            f.write(data)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give the file with {flag} FILE") from error


def parse(line, where):
    """One line as a dict; UserError, beginning with `where`, unless it has the official format."""
    try:
        example = json.loads(line)
        label, endings, texts = example["label"], example["endings"], [example["ctx"], *example["endings"]]
        valid = isinstance(endings, list) and len(endings) == 4 and type(label) is int and label in range(4)
        valid = valid and all(isinstance(text, str) and text.strip() for text in texts)
    except (ValueError, LookupError, TypeError, RecursionError):
        valid = False
    if not valid:
        raise UserError(f"{where} is not a HellaSwag example: a JSON object with ctx, four endings and label 0 to 3")
    return example


def tokenize(examples, tokenizer):
    """Examples for `evaluate` from the dicts of `load_examples`; once for any number of evaluations."""
    lengths = token_bytes(tokenizer.name)

    def encode(text):
        return tuple(tokenizer.encode_ordinary(text))

    def example(ctx, endings, label, **_):
        endings = tuple(encode(" " + text) for text in endings)
        return Example(encode(ctx), endings, label, tuple(lengths[[*endings[label]]].tolist()))

    return [example(**x) for x in examples]


def load_for_training(path, limit, tokenizer, every, machine, say):
    """Tokenised examples for the trainer, or None if `every` is 0 or, after a message, if the download fails.

    Rank 0 loads and sends them to the other ranks: all ranks evaluate the same examples, or none does, also where nodes
    share no disk. Raises UserError on every rank for a fault of the file at `path`.
    """
    if every == 0:
        return None
    loaded = [None]
    if machine.is_main:
        try:
            loaded = [tokenize(load_examples(path, limit, "--hellaswag_data"), tokenizer)]
        except UserError as error:
            loaded = [error]
    if machine.world_size > 1:
        dist.broadcast_object_list(loaded, device=machine.device)
    if not isinstance(loaded[0], UserError):
        return loaded[0]
    if path:
        raise SharedError(str(loaded[0]))
    say(f"no HellaSwag in this run: {loaded[0]}")
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Examples into rows, rows into batches. Ending i of example e has the slot number 4 e + i.


class Row(NamedTuple):
    length: int  # in tokens
    context: tuple
    endings: dict  # tokens of an ending -> its slot; equal endings share one


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
    """(rows, longest first; slot whose loss is computed for each slot; scored tokens per slot; examples cropped).

    Endings share a row if their contexts are equal after cropping: all four, unless one is too long for block_size.
    Equal endings are computed once, so that they tie exactly.
    """
    if block_size < 2:
        raise UserError(f"a model of block_size {block_size} predicts nothing: HellaSwag needs at least 2")
    rows, cropped = [], 0
    computed, counts = np.zeros((2, 4 * len(examples)), dtype=np.int64)
    for e, (context, endings, *_) in enumerate(examples):
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
    """Batches of this rank's rows: at most batch_tokens each, padding included, or one row.

    Each rank gets the same number of batches of about the same size, so that none waits for another.
    """
    start = 0
    while start < len(rows):
        count = world_size * max(1, batch_tokens // rows[start].length)
        unscored = rows[start]._replace(endings={})  # for a rank beyond the last few rows
        yield rows[start : start + count][rank::world_size] or [unscored]
        start += count


class Batch(NamedTuple):
    tokens: torch.Tensor  # int64 (3, B, S): token, position, segment (padding: -1)
    scored: torch.Tensor  # int64 (2, N): index, among the B*S tokens, of the token that predicts; target
    slots: np.ndarray  # int64 (N,)


class Layout(NamedTuple):
    """A row as lists: the first three have one entry per token, the others one per scored token."""

    tokens: list
    positions: list
    segments: list  # 0: the context; 1 to 4: the endings
    sources: list  # index in the row of the token whose hidden state predicts the scored token
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
    """Batch of rows, padded to the first, which is the longest."""
    length = rows[0].length
    tokens = np.zeros((3, len(rows), length), dtype=np.int64)
    tokens[2] = -1
    sources, targets, slots = [], [], []
    for b, row in enumerate(map(lay_out, rows)):
        tokens[:, b, : len(row.tokens)] = row.tokens, row.positions, row.segments
        sources.extend(b * length + source for source in row.sources)
        targets.extend(row.targets)
        slots.extend(row.slots)
    parts = torch.from_numpy(tokens), torch.tensor([sources, targets], dtype=torch.int64)
    if device.type == "cuda":  # the copy from pinned memory does not block the host
        parts = [part.pin_memory() for part in parts]
    return Batch(*(part.to(device, non_blocking=True) for part in parts), np.array(slots, dtype=np.int64))


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


class Result(NamedTuple):
    acc: float  # by total loss; nan if a loss is not finite
    acc_norm: float  # by mean loss
    bpb: float  # bits per byte of the right ending, mean over examples
    stderr: float  # of acc_norm
    n: int
    seconds: float
    cropped: int  # examples longer than block_size
    ties: int  # examples in which two endings share the lowest mean loss
    predictions: list[int]  # endings chosen by mean loss


def score(model, batch):
    """Losses (N,), float32, of the scored tokens of a Batch."""
    idx, positions, segments = batch.tokens
    sources, targets = batch.scored
    own = segments[:, :, None] == segments[:, None, :]  # (B, S, S)
    attn_mask = (own | (segments == 0)[:, None, :]).tril()  # padding attends too: without any key it would be nan
    with attention_without_cudnn(idx.device):
        h = model.hidden_states(idx, positions=positions, attn_mask=attn_mask[:, None], dropless=True)
    h = h.flatten(0, 1)[sources]
    return linear_cross_entropy(h.to(compute_dtype(h)), model.lm_head.weight, targets, reduction="none")


@torch.no_grad()
def ending_losses(model, examples, device, batch_tokens=None, rank=0, world_size=1, progress=False):
    """Total losses (n, 4) and scored tokens (n, 4) of the endings, numpy; number of examples cropped.

    Products are of inference_dtype. Mode, gradients and random state of the model are unchanged.
    """
    device = torch.device(device)
    rows, computed, counts, cropped = build_rows(examples, model.config.block_size)
    counts = counts.reshape(-1, 4)
    labels = np.array([example.label for example in examples])
    shares = split_rows(rows, batch_tokens or BATCH_TOKENS[device.type], rank, world_size)
    batches = (collate(share, device) for share in shares)
    total = np.zeros(len(computed))
    was_training = model.training
    model.eval()
    try:
        with (
            common.autocast(device, inference_dtype(device, model.config)),
            tqdm(total=len(examples) // world_size, unit="example", disable=None if progress else True) as bar,
        ):
            batch = next(batches)
            while batch is not None:
                losses = score(model, batch)
                upcoming = next(batches, None)  # built while the device computes
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
    """Show acc_norm of the examples whose four endings have a loss."""
    if bar.disable:
        return
    done = total.all(axis=1)
    if done.any():
        correct = (total / counts).argmin(axis=1) == labels
        bar.set_postfix(acc_norm=f"{correct[done].mean():.4f}", refresh=False)
    bar.update(int(done.sum()) - bar.n)


def evaluate(model, examples, device, batch_tokens=None, rank=0, world_size=1, progress=False):
    """Result of a GPT on tokenised examples. Every rank of the world calls it and gets the Result of all examples.

    `model` is the GPT itself, not a compiled or wrapped one: rows have many lengths. Call it outside autocast.
    """
    start = time.perf_counter()
    total, counts, cropped = ending_losses(model, examples, device, batch_tokens, rank, world_size, progress)
    seconds = time.perf_counter() - start
    mean = total / counts
    labels = np.array([example.label for example in examples])
    predictions = mean.argmin(axis=1)  # the first of endings that tie
    acc, acc_norm = (total.argmin(axis=1) == labels).mean(), (predictions == labels).mean()
    bpb = bits_per_byte(total, counts, examples).mean()
    if not np.isfinite(total).all():
        acc = acc_norm = math.nan  # a diverged model must not look like one that guesses
    ties = ((mean == mean.min(axis=1, keepdims=True)).sum(axis=1) > 1).sum()
    stderr = standard_error(acc_norm, len(examples))
    scores = float(acc), float(acc_norm), float(bpb), stderr
    return Result(*scores, len(examples), seconds, cropped, int(ties), predictions.tolist())


def bits_per_byte(total, counts, examples):
    """Loss (n,) of each right ending, in bits per byte of its scored tokens."""
    places = [(i, example.label) for i, example in enumerate(examples)]
    n_bytes = [sum(examples[i].right_bytes[-counts[i, label] :]) for i, label in places]
    return np.array([total[place] for place in places]) / math.log(2) / n_bytes


def standard_error(accuracy, n):
    return math.sqrt(accuracy * (1 - accuracy) / n)


# ---------------------------------------------------------------------------------------------------------------------
# The script


@dataclass
class Args:
    checkpoint: str = ""  # Checkpoint of train_single_gpu.py: a .pt file, or a folder (its newest)
    init_from: str = ""  # GPT-2 from Hugging Face (gpt2 ... gpt2-xl), or a folder in its format
    data: str = ""  # jsonl file in the official format (default: data/hellaswag, downloaded when missing)
    limit: Positive | None = None  # Number of examples, from the first (default: all 10,042)
    out: str = ""  # JSON file for the result and the predictions
    device: str = "auto"  # cuda, mps or cpu; auto: the first that is available
    batch_tokens: Positive | None = None  # Tokens per batch, padding included (default: by device)


def check_out(out):
    """UserError if `out` cannot be written: found before the evaluation, not after it."""
    path = Path(out)
    if path.exists() and not path.is_file():
        raise UserError(f"--out {out} is not a file: name a file")
    try:
        with tempfile.TemporaryFile(dir=path.resolve().parent) as f:
            f.write(bytes(100_000))  # more than a result of all examples needs: a full disk is found too
    except OSError as error:
        raise UserError(f"--out {out}: its folder cannot be written to: {error.strerror}") from None


def check_memory(model, examples, args, device):
    """UserError if a batch of --batch_tokens needs more memory than is free."""
    tokens = sum(len(x.context) + sum(map(len, x.endings)) for x in examples)
    tokens = min(tokens, args.batch_tokens or BATCH_TOKENS[device.type])
    width = inference_dtype(device, model.config).itemsize
    require_memory(10 * model.config.n_embd * width, tokens, device, "--batch_tokens")


def report(result):
    """Print both accuracies with their standard errors, and the loss of the right endings."""
    print(f"acc       {result.acc:.4f} +/- {standard_error(result.acc, result.n):.4f}  (by total loss)")
    print(f"acc_norm  {result.acc_norm:.4f} +/- {result.stderr:.4f}  (by mean loss over the ending's tokens)")
    print(f"bpb       {result.bpb:.4f}  (bits per byte of the right ending)")
    notes = f"{result.cropped} cropped to the block size, {result.ties} with a tie"
    print(f"examples  {result.n} in {result.seconds:.1f} s; {notes}")


def main():
    args = common.parse(Args)
    if args.out:
        check_out(args.out)
    device = common.choose_device(args.device)
    model, tokenizer = checkpoint.open_model(args.checkpoint, args.init_from, device)
    examples = tokenize(load_examples(args.data, args.limit), tokenizer)
    check_memory(model, examples, args, device)
    result = evaluate(model, examples, device, args.batch_tokens, progress=True)
    name = args.checkpoint or args.init_from
    if math.isnan(result.acc):
        raise UserError(f"{name} gives losses that are not finite: use an earlier checkpoint")
    if args.out:
        with atomic_write(args.out, "w") as f:
            json.dump({"model": name, **result._asdict()}, f)
    report(result)


if __name__ == "__main__":
    common.run(main)
