"""Text -> token shards. By default FineWeb-Edu, as published: 1 val and 99 train shards of 100M GPT-2 tokens.

    python fineweb.py                                          # FineWeb-Edu sample-10BT, streamed, to edu_fineweb10B/
    python fineweb.py --max_tokens 1_000_000_000               # its first billion tokens
    python fineweb.py --pretokenized kjj0/finewebedu10B-gpt2 --out edu_fineweb10B  # ready shards of it: saves hours
    python fineweb.py --dataset Skylion007/openwebtext         # any text of the Hub, or a folder of parquet files
    python fineweb.py --files notes/ books.jsonl.zst           # local text
    python fineweb.py --stdlib --tokenizer bytes --out data/bytes  # the Python standard library: no download, for a CPU

Shards are `shard_{val,train}_{index:06d}.npy`: uint16, one dimension, the end-of-text token before each document; a
document may span shards. Shard 0 is val, the first part of the text. `meta.json` beside them holds the settings, the
counts and the sha256 of each. The order of documents is fixed: equal input gives equal bytes for any --workers.

The same command continues a killed one. A shard appears whole or not at all, and after each one meta.json records where
in the text the next begins, so that at most one shard is tokenized twice.

A text longer than half a million characters is encoded in pieces, cut where GPT-2's split into words cuts too, so that
the tokens are the same. If half a million characters hold no such place (no spaces), they are cut anyway.

Faster than the common recipe (`Pool.imap` over `encode_ordinary`, one array per document) because of the word split of
tokenizer.py, tasks of half a million characters and forked workers; results/bench/README.md has the numbers. Tried and
dropped: threads, which wait for each other outside tiktoken.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from tqdm import tqdm

from lab import common
from lab import data as dataloader
from lab.common import Fraction, Positive, Range, UserError, atomic_write, lock
from lab.tokenizer import SPACE, get_tokenizer
from textfiles import checked_text, find_files, missing_column, read_documents, stdlib_files

FINEWEB, SAMPLE = "HuggingFaceFW/fineweb-edu", "sample-10BT"
PIECE = 500_000  # characters per call of the tokenizer and per task of a worker: tens of milliseconds of work
PRETOKENIZED_SHARD = 100_000_000  # tokens in each shard of kjj0/finewebedu10B-gpt2


@dataclass
class Args:
    # Source: one of these
    dataset: str | None = None  # data set of the Hub, or folder of its files (default HuggingFaceFW/fineweb-edu)
    files: tuple[str, ...] | None = None  # local files and folders: .txt .md .py .jsonl, .gz .zst of them, .parquet
    stdlib: bool = False  # the .py files of Python's standard library
    pretokenized: str | None = None  # repository of the Hub with ready GPT-2 shards

    # Parts of the source
    config: str | None = None  # configuration of --dataset (FineWeb-Edu: sample-10BT)
    split: str | None = None  # split of --dataset (default train)
    column: str | None = None  # column or JSON key that holds the text (default text)

    # Shards
    out: str | None = None  # folder of the shards (default edu_fineweb10B for FineWeb-Edu, else data/<source>)
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"  # tokenizer, 50,257 or 257 tokens
    shard_size: Annotated[int, Range(at_least=2)] = 100_000_000  # tokens per shard; the last one holds the rest
    max_tokens: Annotated[int, Range(at_least=4)] | None = None  # tokens to write, val included (default all)
    val_fraction: Fraction | None = None  # val's share of the text; 0: the whole first shard (local text: 0.05)
    workers: Positive | None = None  # processes that tokenize (default one per core, at most 8)


def main():
    args = check_args(common.parse(Args))
    out = Path(args.out)
    check_writable(out)
    source, batches = open_source(args)
    with lock(out, "wait for it, or choose another --out"):
        meta = read_meta(out, new_meta(args, source))
        state = " is complete" if meta["complete"] else ""
        if not meta["complete"]:
            if args.pretokenized:
                fetch_pretokenized(args, out, meta)
            else:
                write_shards(args, out, meta, batches)
    print(f"{out}{state}: {summary(meta)}\ntrain with: {train_command(out, meta)}")


def train_command(out, meta):
    vocab_size = "" if meta["tokenizer"] == "gpt2" else f" --vocab_size {meta['vocab_size']}"
    return f"python train_single_gpu.py --data_root {shlex.quote(str(out))}{vocab_size}"


def summary(meta):
    return f"{len(meta['shards'])} shards, {meta['tokens']:,} tokens, {meta['documents']:,} documents"


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def check_args(args):
    """Refuse contradictory settings and fill in the defaults that depend on the source."""
    for flag in ("dataset", "files", "pretokenized", "config", "split", "column", "out"):
        values = args.files if flag == "files" else (getattr(args, flag),)
        if values is not None and (not values or "" in values):
            raise UserError(f"--{flag} is empty: give a value, or leave it out")
    sources = [flag for flag in ("dataset", "files", "stdlib", "pretokenized") if getattr(args, flag)]
    if len(sources) > 1:
        raise UserError(f"--{sources[0]} and --{sources[1]} are two sources: give one")
    source = sources[0] if sources else "dataset"
    refuse_unused(args, source)
    get_tokenizer(args.tokenizer)
    args.dataset = args.dataset or (FINEWEB if source == "dataset" else None)
    if args.dataset == FINEWEB:
        args.config = args.config or SAMPLE
    if args.val_fraction is None:
        args.val_fraction = default_val_fraction(args, source)
    if args.val_fraction and source == "dataset" and args.max_tokens is None:
        raise UserError("--val_fraction of a streamed data set, whose length is unknown, needs --max_tokens")
    args.split, args.column = args.split or "train", args.column or "text"
    args.workers = args.workers or min(cores(), 8)
    args.out = args.out or default_out(args)
    check_memory(args)
    return args


def check_memory(args):
    """Refuse a shard that does not fit into memory; the memory is reserved, not used, and given back."""
    tokens = min(args.shard_size, args.max_tokens or math.inf)
    try:
        np.empty(tokens, np.uint16)
    except (MemoryError, ValueError, OverflowError):
        needed = f"{tokens:,} tokens need {2 * tokens / 1e9:,.0f} GB of memory"
        raise UserError(f"--shard_size {args.shard_size}: {needed}: pass a smaller one") from None


def refuse_unused(args, source):
    """Refuse a flag that the source would ignore."""
    used_by = {
        "config": ("dataset",),
        "split": ("dataset",),
        "column": ("dataset", "files"),
        "tokenizer": ("dataset", "files", "stdlib"),
        "shard_size": ("dataset", "files", "stdlib"),
        "val_fraction": ("dataset", "files", "stdlib"),
        "workers": ("dataset", "files", "stdlib"),
    }
    for flag, users in used_by.items():
        if source not in users and getattr(args, flag) != getattr(Args, flag):
            raise UserError(f"--{flag} has no meaning with --{source}: leave it out")


def default_val_fraction(args, source):
    """0 (a whole shard, as published) for more text than a shard, else 0.05."""
    plenty = source == "dataset" and (args.max_tokens or math.inf) > args.shard_size
    return 0.0 if plenty or source == "pretokenized" else 0.05


def default_out(args):
    if args.pretokenized:
        return f"data/{Path(args.pretokenized).name}"
    if args.stdlib or args.files:
        return "data/stdlib" if args.stdlib else "data/files"
    return "edu_fineweb10B" if (args.dataset, args.config) == (FINEWEB, SAMPLE) else f"data/{Path(args.dataset).name}"


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_writable(out):
    """Refuse an unwritable --out before any work; nothing is created."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: choose another")
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: cannot write into {nearest}")


# ---------------------------------------------------------------------------------------------------------------------
# Sources: each gives (description for meta.json, batches). batches(position) continues from an earlier position and
# yields (position, [(starts a document, piece of text), ...]).


def open_source(args):
    if args.pretokenized:
        return {"kind": "pretokenized", "repository": args.pretokenized}, None
    if args.stdlib or args.files:
        return open_local(args)
    source = {key: getattr(args, key) for key in ("dataset", "config", "split", "column")}
    return {"kind": "dataset", **source}, lambda position=None: dataset_batches(args, position)


def open_local(args):
    if args.stdlib:
        paths, source = stdlib_files(), {"kind": "stdlib"}
    else:
        paths = find_files(args.files)
        source = {"kind": "files", "paths": [str(Path(path)) for path in args.files], "column": args.column}
    # Names and sizes show, without reading, that the text was edited since an interrupted run.
    sizes = [f"{name}\0{path.stat().st_size}\n" for name, path in paths]
    fingerprint = hashlib.sha256("".join(sizes).encode(errors="surrogateescape")).hexdigest()
    source |= {"files": len(paths), "fingerprint": fingerprint}
    return source, lambda position=None: local_batches([path for _, path in paths], args.column, position)


def local_batches(paths, column, position):
    """A position is the number of pieces before it. They are read again, which is cheap compared with encoding."""
    every = (piece for path in paths for chunks in read_documents(path, column) for piece in split_text(chunks))
    position = position or 0
    groups = ([piece] for piece in itertools.islice(every, position, None))
    while batch := next_batch(groups):
        yield position, batch
        position += len(batch)


def dataset_batches(args, position):
    """A position is the state of the stream, from which `datasets` finds the file and the row."""
    stream = load_stream(args)
    if position is not None:
        with hub_errors(args.dataset):
            stream.load_state_dict(position)
    rows = dataset_texts(stream, args)
    groups = (list(split_text([text])) for text in rows)
    with contextlib.closing(rows):
        while batch := next_batch(groups):
            yield position, batch
            position = stream.state_dict()


def next_batch(groups):
    """The next groups of pieces, about PIECE characters together, as one list; empty at the end."""
    batch, size = [], 0
    for group in groups:
        batch += group
        size += sum(len(text) for _, text in group)
        if size >= PIECE:
            break
    return batch


def split_text(chunks):
    """The document that arrives in `chunks`, as pieces (is it the first, text) of up to PIECE characters."""
    first, rest = True, ""
    for chunk in chunks:
        text, start = rest + chunk, 0  # cut by position: cutting the text itself would copy a long one at each piece
        while len(text) - start > PIECE:
            cut = start + cut_point(text[start : start + PIECE + 1])
            yield first, text[start:cut]
            first, start = False, cut
        rest = text[start:]
    if rest:
        yield first, rest


def cut_point(text):
    """The last place in `text[:PIECE]` where a cut leaves GPT-2's tokens as they are, or PIECE if there is none.

    Such a place is before the last character of a run of white space with other text after it: see tokenizer.py.
    """
    for start in (max(PIECE - 10_000, 1), 1):
        places = [match.start() for match in re.finditer(f"[{SPACE}](?=[^{SPACE}])", text[start : PIECE + 1])]
        if places:
            return start + places[-1]
    return PIECE


# ---------------------------------------------------------------------------------------------------------------------
# Data sets of the Hub


@contextlib.contextmanager
def hub_errors(name):
    """Turn any error inside into a UserError with its first line, the name of the data set and the remedy.

    `datasets` and the network layers below it raise a dozen unrelated classes, so every exception counts as a fault of
    the data set or the network.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"cannot read {name}: {reason}; check the name, --config, --split and the network, and start again"
            " to continue; --files (local text) and --stdlib (Python's own library) need no network"
        ) from error


def load_stream(args):
    """The data set as a stream of rows with only the text in them."""
    with hub_errors(args.dataset):
        import datasets
        import huggingface_hub

        datasets.disable_progress_bars()
        datasets.utils.logging.set_verbosity_error()
        huggingface_hub.logging.set_verbosity_error()
        if not Path(args.dataset).exists():
            # One request without retries: `load_dataset` would retry for half a minute without a network.
            huggingface_hub.HfApi().dataset_info(args.dataset, timeout=20)
        stream = datasets.load_dataset(args.dataset, args.config, split=args.split, streaming=True)
        names = stream.column_names
    if names is None:  # some formats know them only at the first row
        return stream
    if args.column not in names:
        raise UserError(missing_column(args.column, names, args.dataset))
    return stream.select_columns([args.column])


def dataset_texts(stream, args):
    with hub_errors(args.dataset):
        for row in stream:
            text = checked_text(row, args.column, args.dataset)
            if text:
                yield text


def fetch_pretokenized(args, out, meta):
    """Download ready shards, unchanged, and write their meta.json. Files that are here are not fetched again."""
    with hub_errors(args.pretokenized):
        import huggingface_hub

        huggingface_hub.logging.set_verbosity_error()
        api = huggingface_hub.HfApi()
        info = api.dataset_info(args.pretokenized, timeout=20)
        names = choose_shards([entry.rfilename for entry in info.siblings], args)
        out.mkdir(parents=True, exist_ok=True)
        for name in tqdm(names, unit="shard", disable=None):
            huggingface_hub.hf_hub_download(
                args.pretokenized, name, repo_type="dataset", revision=info.sha, local_dir=out
            )
    meta["source"]["revision"] = info.sha
    for name in names:
        shard = dataloader.open_shard(out / name)
        with open(shard.path, "rb") as f:
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
            meta["documents"] += int(np.count_nonzero(dataloader.map_tokens(shard, f) == meta["eot"]))
        meta["shards"].append({"file": name, "tokens": shard.tokens, "sha256": sha256})
        meta["tokens"] += shard.tokens
    meta["complete"] = True
    save_meta(out, meta)


def choose_shards(names, args):
    """The first val shard and as many train shards as --max_tokens asks for."""
    val, train = (sorted(n for n in names if re.fullmatch(rf"\w+_{split}_\d+\.bin", n)) for split in ("val", "train"))
    if not val or not train:
        raise UserError(f"{args.pretokenized} has no shards named ..._val_000000.bin and ..._train_000001.bin")
    wanted = math.inf if args.max_tokens is None else math.ceil(args.max_tokens / PRETOKENIZED_SHARD)
    return val[:1] + train[: max(1, min(wanted - 1, len(train)))]


# ---------------------------------------------------------------------------------------------------------------------
# Text -> tokens, on several processes, in order


def tokenize(documents, tokenizer, workers):
    """uint16 arrays that together are the tokens of `documents` (strings) in order, end of text before each.

    tokens = np.concatenate(list(tokenize(texts, "gpt2", workers=2)))
    """
    groups = (list(split_text([text])) for text in documents)
    batches = ((None, batch) for batch in iter(lambda: next_batch(groups), []))
    return (tokens for _, tokens in encode_batches(batches, tokenizer, workers))


def encode_batches(batches, tokenizer, workers):
    """(position, tokens) of each (position, pieces), in order; only a few batches are in work at any time."""
    if workers == 1:
        yield from ((position, encode_batch(tokenizer, batch)) for position, batch in batches)
        return
    get_tokenizer(tokenizer)  # built before the fork, so that workers inherit it
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)
    under_way = collections.deque()
    try:
        # The first task starts all workers: before `batches` opens a data set, whose threads a fork must not cut off.
        pool.submit(os.getpid)
        for position, batch in batches:
            under_way.append((position, pool.submit(encode_batch, tokenizer, batch)))
            if len(under_way) > 2 * workers:
                position, future = under_way.popleft()
                yield position, future.result()
        while under_way:
            position, future = under_way.popleft()
            yield position, future.result()
    except concurrent.futures.BrokenExecutor as error:
        raise UserError("a worker process died, perhaps out of memory: start again with fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker():
    """Leave Ctrl-C to the parent, and end when the parent is killed: workers would wait forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def encode_batch(tokenizer, batch):
    tokenizer = get_tokenizer(tokenizer)
    eot = np.array([tokenizer.eot], dtype=np.uint16)
    parts = []
    for first, text in batch:
        if first:
            parts.append(eot)
        parts.append(tokenizer.encode_to_numpy(text))
    return np.concatenate(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens -> shards


def new_meta(args, source):
    tokenizer = get_tokenizer(args.tokenizer)
    settings = {"shard_size": args.shard_size, "max_tokens": args.max_tokens, "val_fraction": args.val_fraction}
    if args.pretokenized:
        settings = {"max_tokens": args.max_tokens}
    return {
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "eot": tokenizer.eot,
        "source": source,
        "settings": settings,
        "documents": 0,
        "tokens": 0,
        "shards": [],
        "complete": False,
    }


def read_meta(out, new):
    """meta.json of an earlier run into `out`, or `new` without one. Raises UserError if it had other settings."""
    path = out / "meta.json"
    if not path.exists():
        if any(itertools.chain(out.glob("*.npy"), out.glob("*.bin"))) and new["source"]["kind"] != "pretokenized":
            raise UserError(f"{out} holds shards of unknown origin (no meta.json): choose another --out")
        return new
    old = dataloader.read_meta(out)
    if any(type(old.get(key)) is not type(value) for key, value in new.items()) or not can_continue(old):
        raise dataloader.bad_shard(path, "not written by fineweb.py")
    found = {"tokenizer": old["tokenizer"], **old["source"], **old["settings"]}
    wanted = {"tokenizer": new["tokenizer"], **new["source"], **new["settings"]}
    for key, value in wanted.items():
        if found.get(key) != value:
            other = "other text" if key == "fingerprint" else f"{key} {found.get(key)}, not {value}"
            raise UserError(f"{out} holds shards of {other}: choose another --out, or delete {out}")
    lengths = {shard["file"]: dataloader.open_shard(out / shard["file"]).tokens for shard in old["shards"]}
    for split in ("train", "val"):
        dataloader.check_listed(out, split, old, lengths)
    return old


FROM_THE_START = {"position": None, "used": 0}


def can_continue(meta):
    """Whether the place to continue has the form that save_shard() writes, and the counts agree."""
    resume = meta.get("resume", FROM_THE_START)
    if not isinstance(resume, dict) or resume.keys() != FROM_THE_START.keys():
        return False
    position, of_data_set = resume["position"], meta["source"].get("kind") == "dataset"
    known = position is None or type(position) is (dict if of_data_set else int)
    counts = [position if type(position) is int else 0, resume["used"]]
    whole = all(type(count) is int and count >= 0 for count in counts)
    return known and whole and meta["tokens"] == sum(shard["tokens"] for shard in meta["shards"])


def write_shards(args, out, meta, batches):
    """Encode what is missing and write it, shard by shard; `meta` follows."""
    resume = meta.pop("resume", FROM_THE_START)
    val_tokens = meta["shards"][0]["tokens"] if meta["shards"] else val_size(args, batches)
    stream = encode_batches(batches(resume["position"]), args.tokenizer, args.workers)
    used = resume["used"]  # tokens of the first batch that a shard holds already
    shard, filled = new_shard(args, meta, val_tokens), 0
    with contextlib.closing(stream), progress_bar(args, meta, val_tokens) as bar:
        for position, tokens in stream:
            bar.update(len(tokens) - used)
            while used < len(tokens) and len(shard):
                part = tokens[used : used + len(shard) - filled]
                shard[filled : filled + len(part)] = part
                filled, used = filled + len(part), used + len(part)
                if filled == len(shard):
                    save_shard(out, meta, shard, {"position": position, "used": used})
                    shard, filled = new_shard(args, meta, val_tokens), 0
            if not len(shard):  # --max_tokens are written
                break
            used = 0
    check_enough(meta, filled)
    save_shard(out, meta, shard[:filled])


def progress_bar(args, meta, val_tokens):
    """Progress in tokens; the total is unknown if a data set is read to its end."""
    total = args.max_tokens or (round(val_tokens / args.val_fraction) if args.val_fraction else None)
    return tqdm(total=total, initial=meta["tokens"], unit="tok", unit_scale=True, disable=None)


def val_size(args, batches):
    """Tokens of val: --val_fraction of all characters or of --max_tokens, whichever is less; 2 to one shard."""
    if not args.val_fraction:
        return args.shard_size
    most = min(args.shard_size, max(2, args.val_fraction * (args.max_tokens or math.inf)))
    if args.dataset:
        return round(most)
    # Counting also reads every file to its end: bad input is found before anything is written.
    total = sum(len(text) for _, batch in batches() for _, text in batch)
    tokens, characters = 0.0, 0
    for _, batch in batches():
        size, encoded = sum(len(text) for _, text in batch), len(encode_batch(args.tokenizer, batch))
        if size == total:
            refuse_tiny(encoded)
        tokens += min(1, (args.val_fraction * total - characters) / size) * encoded
        characters += size
        if characters >= args.val_fraction * total or tokens >= most:
            break
    return round(min(most, max(2, tokens)))


def refuse_tiny(tokens):
    if tokens < 4:
        raise UserError(f"the text has {tokens} tokens; val and train need 2 each: use more text")


def new_shard(args, meta, val_tokens):
    """The array of the next shard, uninitialised; its size is 0 once --max_tokens are written."""
    size = args.shard_size if meta["shards"] else val_tokens
    return np.empty(min(size, (args.max_tokens or math.inf) - meta["tokens"]), dtype=np.uint16)


def check_enough(meta, filled):
    """Refuse a result without at least 2 training tokens: an input and its target. `filled`: tokens not saved yet."""
    total = meta["tokens"] + filled
    if not total:
        raise UserError("there is no text in the source: nothing to write")
    val = meta["shards"][0]["tokens"] if meta["shards"] else filled
    if total - val < 2:
        raise UserError(
            f"{total:,} tokens fill the val shard and leave nothing to train on:"
            " use more text, --val_fraction 0.05 or a smaller --shard_size"
        )


def save_shard(out, meta, tokens, resume=None):
    """Write the next shard if `tokens` is not empty, then meta.json with the place to continue, or complete."""
    with writing(out):
        if not meta["shards"]:  # first of all, so that an interrupted folder is known to be ours
            out.mkdir(parents=True, exist_ok=True)
            save_meta(out, meta)
        if len(tokens):
            meta["shards"].append(write_npy(out, len(meta["shards"]), tokens))
        meta["tokens"] += len(tokens)
        meta["documents"] += int(np.count_nonzero(tokens == meta["eot"]))
        if resume is None:
            meta.pop("resume", None)
            meta["complete"] = True
        else:
            meta["resume"] = resume
        save_meta(out, meta)


def write_npy(out, index, tokens):
    """Write one shard; returns its entry in meta.json."""
    name = f"shard_{'train' if index else 'val'}_{index:06d}.npy"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(tokens))
    with atomic_write(out / name) as f:
        f.write(header.getvalue())
        f.write(tokens)  # not np.save: its error on a full disk does not name the cause
    digest = hashlib.sha256(header.getvalue())
    digest.update(tokens)
    return {"file": name, "tokens": len(tokens), "sha256": digest.hexdigest()}


@contextlib.contextmanager
def writing(out):
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; make room, then start again to continue") from error


def save_meta(out, meta):
    with atomic_write(out / "meta.json", "w") as f:
        json.dump(meta, f, indent=1)
        f.write("\n")


if __name__ == "__main__":
    common.run(main)
