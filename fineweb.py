"""Text -> token shards. By default FineWeb-Edu, as published: 1 val and 99 train shards of 100M GPT-2 tokens.

    python fineweb.py                                          # FineWeb-Edu sample-10BT, streamed, to edu_fineweb10B/
    python fineweb.py --max_tokens 1_000_000_000               # its first billion tokens
    python fineweb.py --pretokenized kjj0/finewebedu10B-gpt2   # the same, ready-made: saves hours
    python fineweb.py --dataset Skylion007/openwebtext         # any text of the Hub, or a folder of parquet files
    python fineweb.py --files notes/ books.jsonl.zst           # local text
    python fineweb.py --stdlib --tokenizer bytes --out data/b  # the Python standard library: no download at all

Shards are `shard_{val,train}_{index:06d}.npy`: uint16, one dimension, the end-of-text token before each document; a
document may span shards. Shard 0 is val, the first part of the text. `meta.json` beside them holds the settings, the
counts and the sha256 of each. The order of documents is fixed: equal input gives equal bytes, whatever --workers is.

Kill it at any moment and start it again with the same flags: a shard appears whole or not at all, and after each one
meta.json says where in the text the next begins, so at most one shard is tokenized twice.

A text longer than half a million characters is encoded in pieces, cut where GPT-2's split into words cuts anyway, so
the tokens are the same. Only half a million characters without any such place (no spaces) are cut where they stand.

Speed against the usual recipe (`Pool.imap` over `encode_ordinary`, an array for each document), 2 workers, 30 MB each,
start of the workers included: 1.25-1.9x less CPU time on English prose, 1.3-2.4x on Python source (`bench.py
tokenize`). It comes from the split of tokenizer.py, from half a million characters a task and from forking rather than
spawning (0.5 s a worker).
Dropped: threads, which wait for each other outside tiktoken (2 of them no faster than 1).
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
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import common
from common import UserError, atomic_write, lock
from textfiles import checked_text, find_files, missing_column, read_documents, stdlib_files
from tokenizer import SPACE, get_tokenizer

FINEWEB = "HuggingFaceFW/fineweb-edu"
PIECE = 500_000  # characters given to the tokenizer at once, and to a worker: 30 ms of work, 2 MB on its way
PRETOKENIZED_SHARD = 100_000_000  # tokens in each shard of kjj0/finewebedu10B-gpt2
BIN_MAGIC, BIN_HEADER = 20240520, 1024  # of llm.c's and modded-nanogpt's .bin shards


@dataclass
class Args:
    dataset: str | None = None  # data set of the Hub, or a folder of its files (default HuggingFaceFW/fineweb-edu)
    config: str | None = None  # its configuration (FineWeb-Edu: sample-10BT)
    split: str | None = None  # its split (default train)
    column: str | None = None  # column or JSON key that holds the text (default text)
    files: tuple[str, ...] = ()  # local files and folders instead: .txt .md .py .jsonl .parquet, and .gz .zst of them
    stdlib: bool = False  # the .py files of Python's own standard library instead
    pretokenized: str | None = None  # fetch ready GPT-2 shards from this repository of the Hub instead
    out: str | None = None  # folder of the shards (default edu_fineweb10B for FineWeb-Edu, else data/<source>)
    tokenizer: str = "gpt2"  # gpt2 or bytes
    shard_size: int = 100_000_000  # tokens in a shard; the last one has what is left
    max_tokens: int | None = None  # stop after so many tokens, val included (default: all)
    val_fraction: float | None = None  # val's part of the text; 0: the whole first shard (default: 0.05 for local text)
    workers: int | None = None  # processes that tokenize (default: one a core, at most 8)


def main():
    args = check_args(common.parse(Args))
    out = Path(args.out)
    check_writable(out)
    source, batches = open_source(args)
    with lock(out, "wait for it, or choose another --out"):
        meta = read_meta(out, new_meta(args, source))
        if meta["complete"]:
            print(f"{out} is complete: {summary(meta)}")
            return
        if args.pretokenized:
            fetch_pretokenized(args, out, meta)
        else:
            write_shards(args, out, meta, batches)
    print(f"{out}: {summary(meta)}")


def summary(meta):
    return f"{len(meta['shards'])} shards, {meta['tokens']:,} tokens, {meta['documents']:,} documents"


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def check_args(args):
    """Refuse nonsense and fill in the defaults that depend on the source."""
    sources = [flag for flag in ("dataset", "files", "stdlib", "pretokenized") if getattr(args, flag)]
    if len(sources) > 1:
        raise UserError(f"--{sources[0]} and --{sources[1]} are two sources: give one")
    source = sources[0] if sources else "dataset"
    refuse_unused(args, source)
    get_tokenizer(args.tokenizer)
    for flag in ("shard_size", "max_tokens", "workers"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag} {value} must be at least 1")
    if args.max_tokens == 1:
        raise UserError("--max_tokens 1 leaves nothing to train on")
    if source == "dataset" and args.dataset is None:
        args.dataset, args.config = FINEWEB, args.config or "sample-10BT"
    if args.val_fraction is None:
        args.val_fraction = default_val_fraction(args, source)
    if not 0 <= args.val_fraction < 1:
        raise UserError(f"--val_fraction {args.val_fraction} must be at least 0 and below 1")
    if args.val_fraction and source == "dataset" and args.max_tokens is None:
        raise UserError("--val_fraction of a streamed data set, whose length is not known, needs --max_tokens")
    args.split, args.column = args.split or "train", args.column or "text"
    args.workers = args.workers or min(cores(), 8)
    args.out = args.out or default_out(args)
    return args


def refuse_unused(args, source):
    """A flag that the source would silently ignore is a mistake."""
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
    """0 (a whole shard, as published) where text is plenty, else 0.05: of Shakespeare one batch, 16 x 1024 tokens."""
    plenty = source == "dataset" and (args.max_tokens or math.inf) > args.shard_size
    return 0.0 if plenty or source == "pretokenized" else 0.05


def default_out(args):
    if args.pretokenized:
        return f"data/{Path(args.pretokenized).name}"
    if args.stdlib or args.files:
        return "data/stdlib" if args.stdlib else "data/files"
    return "edu_fineweb10B" if args.dataset == FINEWEB else f"data/{Path(args.dataset).name}"


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_writable(out):
    """Say so now rather than when the first shard is full. Nothing is created yet."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: choose another")
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: cannot write into {nearest}")


# ---------------------------------------------------------------------------------------------------------------------
# Sources: each gives (description for meta.json, batches), where batches(position) goes on from an earlier position and
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
    # Names and sizes tell apart, at no cost, an interrupted run's text from text edited since.
    sizes = [f"{name}\0{path.stat().st_size}\n" for name, path in paths]
    source |= {"files": len(paths), "fingerprint": hashlib.sha256("".join(sizes).encode()).hexdigest()}
    return source, lambda position=None: local_batches([path for _, path in paths], args.column, position)


def local_batches(paths, column, position):
    """A position is the number of pieces before it: what is skipped is read again, which is cheap next to encoding."""
    every = (piece for path in paths for chunks in read_documents(path, column) for piece in split_text(chunks))
    position = position or 0
    groups = ([piece] for piece in itertools.islice(every, position, None))
    while batch := next_batch(groups):
        yield position, batch
        position += len(batch)


def dataset_batches(args, position):
    """A position is the state of the stream, by which `datasets` finds the file and the row again."""
    stream = load_stream(args)
    if position is not None:
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
    first, text = True, ""
    for chunk in chunks:
        text += chunk
        while len(text) > PIECE:
            cut = cut_point(text)
            yield first, text[:cut]
            first, text = False, text[cut:]
    if text:
        yield first, text


def cut_point(text):
    """The last place in `text[:PIECE]` where a cut leaves GPT-2's tokens as they are, PIECE where there is none.

    Such a place is before the last character of a run of white space that something else follows: see tokenizer.py.
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
    """Name the data set and the way out, whatever goes wrong inside.

    `datasets` and the network layers below it raise a dozen unrelated classes, so anything that comes out of them
    counts as the fault of the data set or the network, with the first line of its own message.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"cannot read {name}: {reason}; check the name, --config, --split and the network, and start again"
            " to go on - or use --files (local text) or --stdlib (Python's own library), which need no network"
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
            # One question without retries: `load_dataset` would ask for half a minute before it finds no network.
            huggingface_hub.HfApi().dataset_info(args.dataset, timeout=20)
        stream = datasets.load_dataset(args.dataset, args.config, split=args.split, streaming=True)
        names = stream.column_names
    if names is None:  # not known before the first row, for some formats
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
    """Download ready shards and describe them; their bytes stay as they are. What is here is not fetched again."""
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
        tokens = read_bin(out / name)
        meta["shards"].append({"file": name, "tokens": len(tokens), "sha256": file_sha256(out / name)})
        meta["tokens"] += len(tokens)
        meta["documents"] += int(np.count_nonzero(tokens == meta["eot"]))
    meta["complete"] = True
    save_meta(out, meta)


def choose_shards(names, args):
    """The first val shard and as many train shards as --max_tokens asks for."""
    val, train = (sorted(n for n in names if re.fullmatch(rf"\w+_{split}_\d+\.bin", n)) for split in ("val", "train"))
    if not val or not train:
        raise UserError(f"{args.pretokenized} has no shards named ..._val_000000.bin and ..._train_000001.bin")
    wanted = math.inf if args.max_tokens is None else math.ceil(args.max_tokens / PRETOKENIZED_SHARD)
    return val[:1] + train[: max(1, min(wanted - 1, len(train)))]


def read_bin(path):
    """Tokens of a .bin shard, after a look at its header."""
    header = np.fromfile(path, dtype=np.int32, count=BIN_HEADER // 4)
    if len(header) < 256 or header[0] != BIN_MAGIC or path.stat().st_size != BIN_HEADER + 2 * int(header[2]):
        raise UserError(f"{path} is not a whole token shard: delete it and start again")
    return np.memmap(path, dtype=np.uint16, mode="r", offset=BIN_HEADER)


def file_sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Text -> tokens, on several processes, in order


def tokenize(documents, tokenizer, workers):
    """uint16 arrays that, one after the other, are the tokens of `documents` (strings), end of text before each.

    tokens = np.concatenate(list(tokenize(texts, "gpt2", workers=2)))
    """
    groups = (list(split_text([text])) for text in documents)
    batches = ((None, batch) for batch in iter(lambda: next_batch(groups), []))
    return (tokens for _, tokens in encode_batches(batches, tokenizer, workers))


def encode_batches(batches, tokenizer, workers):
    """(position, tokens) of each (position, pieces), in order; only a few batches are under way at any time."""
    if workers == 1:
        yield from ((position, encode_batch(tokenizer, batch)) for position, batch in batches)
        return
    get_tokenizer(tokenizer)  # forked workers find it built
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
        raise UserError("a worker died, perhaps for want of memory: start again, with fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker():
    """Ctrl-C is the parent's business; a parent killed without a word must not leave workers waiting for ever."""
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
    """What an earlier run left in `out`, or else `new`. Raises UserError where the two do not fit together."""
    path = out / "meta.json"
    if not path.exists():
        if any(itertools.chain(out.glob("*.npy"), out.glob("*.bin"))) and new["source"]["kind"] != "pretokenized":
            raise UserError(f"{out} holds shards of unknown origin (no meta.json): choose another --out")
        return new
    try:
        old = json.loads(path.read_bytes())
        found = {"tokenizer": old["tokenizer"], **old["source"], **old["settings"]}
        shards = [(out / shard["file"], shard["tokens"]) for shard in old["shards"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: delete {out} or choose another --out") from error
    wanted = {"tokenizer": new["tokenizer"], **new["source"], **new["settings"]}
    for key, value in wanted.items():
        if found.get(key) != value:
            what = "other text" if key == "fingerprint" else f"{key} {found.get(key)}, not {value}"
            raise UserError(f"{out} holds shards of {what}: choose another --out, or delete {out}")
    for shard, tokens in shards:
        if not shard.exists() or abs(shard.stat().st_size - 2 * tokens) > BIN_HEADER:
            raise UserError(f"{shard} is missing or not whole: delete {out} and start again")
    return old


def write_shards(args, out, meta, batches):
    """Encode what is missing and write it, shard by shard; `meta` follows."""
    resume = meta.pop("resume", {"position": None, "used": 0})
    val_tokens = meta["shards"][0]["tokens"] if meta["shards"] else val_size(args, batches)
    stream = encode_batches(batches(resume["position"]), args.tokenizer, args.workers)
    used = resume["used"]  # tokens of the first batch that are in a shard already
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
            if not len(shard):  # --max_tokens are there
                break
            used = 0
    check_enough(meta, filled)
    save_shard(out, meta, shard[:filled])


def progress_bar(args, meta, val_tokens):
    """In tokens; their number is known, or follows from the part that is val, unless a data set is read to its end."""
    total = args.max_tokens or (round(val_tokens / args.val_fraction) if args.val_fraction else None)
    return tqdm(total=total, initial=meta["tokens"], unit="tok", unit_scale=True, disable=None)


def val_size(args, batches):
    """Tokens in val: --val_fraction of all characters, or of --max_tokens if that is less; at most one shard."""
    if not args.val_fraction:
        return args.shard_size
    most = min(args.shard_size, max(1, args.val_fraction * (args.max_tokens or math.inf)))
    if args.dataset:
        return round(most)
    # Counting also reads every file to its end, so that bad input is found before anything is written.
    wanted = args.val_fraction * sum(len(text) for _, batch in batches() for _, text in batch)
    tokens, characters = 0.0, 0
    for _, batch in batches():
        size = sum(len(text) for _, text in batch)
        tokens += min(1, (wanted - characters) / size) * len(encode_batch(args.tokenizer, batch))
        characters += size
        if characters >= wanted or tokens >= most:
            break
    return round(min(most, max(1, tokens)))


def new_shard(args, meta, val_tokens):
    """An empty shard of the size that comes next; of no size once --max_tokens are there."""
    size = args.shard_size if meta["shards"] else val_tokens
    return np.empty(min(size, (args.max_tokens or math.inf) - meta["tokens"]), dtype=np.uint16)


def check_enough(meta, filled):
    if not meta["tokens"] + filled:
        raise UserError("there is no text in the source: nothing to write")
    if len(meta["shards"]) + (filled > 0) < 2:
        raise UserError(
            f"{meta['tokens'] + filled:,} tokens are not more than the val shard, which leaves nothing to train on:"
            " use more text, --val_fraction 0.05 or a smaller --shard_size"
        )


def save_shard(out, meta, tokens, resume=None):
    """Write the next shard, if `tokens` has any, then meta.json: where to go on, or that all is done."""
    with writing(out):
        if not meta["shards"]:  # from here on the folder is known to be ours, whenever the process may die
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
        f.write(tokens)  # not np.save, whose error for a full disk does not say that the disk is full
    digest = hashlib.sha256(header.getvalue())
    digest.update(tokens)
    return {"file": name, "tokens": len(tokens), "sha256": digest.hexdigest()}


@contextlib.contextmanager
def writing(out):
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; make room, then start again to go on") from error


def save_meta(out, meta):
    with atomic_write(out / "meta.json", "w") as f:
        json.dump(meta, f, indent=1)
        f.write("\n")


if __name__ == "__main__":
    common.run(main)
