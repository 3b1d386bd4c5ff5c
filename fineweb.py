"""Text -> token shards. By default FineWeb-Edu, as published: 1 val and 99 train shards of 100M GPT-2 tokens.

    python fineweb.py                                          # FineWeb-Edu sample-10BT, streamed, to edu_fineweb10B/
    python fineweb.py --pretokenized kjj0/finewebedu10B-gpt2 --out edu_fineweb10B  # ready shards of it: saves hours
    python fineweb.py --dataset Skylion007/openwebtext         # any text of the Hub, or a folder of parquet files
    python fineweb.py --files notes/ books.jsonl.zst           # local text
    python fineweb.py --stdlib --tokenizer bytes --out data/bytes  # the Python standard library: no download, for a CPU

Shards are `shard_{val,train}_{index:06d}.npy`: uint16, one dimension, the end-of-text token before each document; a
document may span shards. Shard 0 is val, the first part of the text. meta.json beside them holds settings, counts,
sha256, and where in the text the next shard begins: the same command continues a killed one. Equal input gives equal
bytes for any --workers. Dropped: threads, which wait for each other; `datasets` for local files (\\r\\n becomes \\n).
"""

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
import sysconfig
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from lab import common  # first: Ctrl-C while the others are imported ends quietly

# isort: split
import huggingface_hub
import numpy as np
import pyarrow.parquet

from lab import data
from lab.common import Fraction, Positive, Range, UserError
from lab.tokenizer import get_tokenizer

FINEWEB, SAMPLE = "HuggingFaceFW/fineweb-edu", "sample-10BT"
# Pieces of a text, as a million spaces overflow tiktoken's stack; cut where GPT-2 cuts words: the tokens stay the same.
SIZE, SPACE = 500_000, r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
PIECES = re.compile(rf"(?s)(?>.{{1,{SIZE}}})\Z|.{{1,{SIZE - 1}}}(?=[{SPACE}][^{SPACE}])|.{{1,{SIZE}}}")


@dataclass
class Args:
    dataset: str | None = None  # data set of the Hub, or folder of its files (default HuggingFaceFW/fineweb-edu)
    files: tuple[str, ...] | None = None  # local files and folders: .txt .md .py .jsonl, .gz .zst of them, .parquet
    stdlib: bool = False  # the .py files of Python's standard library
    pretokenized: str | None = None  # repository of the Hub with ready GPT-2 shards
    config: str | None = None  # configuration of --dataset (FineWeb-Edu: sample-10BT)
    split: str = "train"  # split of --dataset
    column: str = "text"  # column or JSON key that holds the text
    out: str | None = None  # folder of the shards (default edu_fineweb10B for FineWeb-Edu, else data/<source>)
    tokenizer: str = "gpt2"  # gpt2 (50,257 tokens), gpt2:N (its first N tokens, for small models) or bytes (257)
    shard_size: Annotated[int, Range(at_least=2)] = 100_000_000  # tokens per shard; the last one holds the rest
    max_tokens: Annotated[int, Range(at_least=4)] | None = None  # tokens to write, val included (default all)
    val_fraction: Fraction | None = None  # val's share of the text; 0: the whole first shard (local text: 0.05)
    workers: Positive = 8  # processes that tokenize


def main():
    args = common.parse(Args)
    meta, finish = open_source(args)
    out = Path(args.out)
    with common.lock(out / "lock", "wait for it, or choose another --out"):
        if (out / "meta.json").exists():
            new, meta = meta, json.loads((out / "meta.json").read_bytes())
            for part in ("tokenizer", "source", "settings"):
                if new[part] != meta.get(part):
                    raise UserError(f"{out} has shards of other {part} ({meta.get(part)}): choose another --out")
        if not meta["complete"]:
            finish(args, out, meta)
    print(f"{out}: {len(meta['shards'])} shards, {meta['tokens']:,} tokens, {meta['documents']:,} documents")
    command = f"python train_single_gpu.py --data_root {shlex.quote(str(out))}"
    command += f" --vocab_size {meta['vocab_size']}" if meta["tokenizer"] != "gpt2" else ""
    if not Path("/dev/nvidiactl").exists():
        flops = 6 * 2000 * 1024 * (1.05e6 + 128 * meta["vocab_size"])  # 6 per token and active parameter
        print(f"no NVIDIA GPU here, so a small model: {flops:.1e} FLOPs, about {flops / 3e12:.0f} minutes on a CPU")
        command += " --n_layer 4 --n_head 4 --n_embd 128 --T 64 --total_batch_size 1024 --max_steps 2000"
        command += " --warmup_steps 100 --max_lr 4e-3 --hellaswag_every 0 --use_aux_loss"
    print(f"train with: {command}")


def open_source(args):
    """(new meta.json, function that makes the shards). Fills in the settings whose default depends on the source."""
    sources = ("dataset", "files", "stdlib", "pretokenized")
    kind, *others = [name for name in sources if getattr(args, name) != getattr(Args, name)] or ["dataset"]
    if others:
        raise UserError(f"--{kind} and --{others[0]} are two sources: give one")
    if kind == "dataset" and args.dataset in (None, FINEWEB):
        args.dataset, args.config = FINEWEB, args.config or SAMPLE
    name = args.pretokenized or args.dataset or kind
    args.out = args.out or ("edu_fineweb10B" if args.config == SAMPLE else f"data/{Path(name).name}")
    if args.val_fraction is None:  # where there is more text than a shard, val is a whole one, as published
        args.val_fraction = 0.0 if kind == "dataset" and (args.max_tokens or math.inf) > args.shard_size else 0.05
    tokenizer = get_tokenizer("gpt2" if kind == "pretokenized" else args.tokenizer)
    source = {"kind": kind, "name": name, "config": args.config, "split": args.split, "column": args.column}
    settings = {"shard_size": args.shard_size, "max_tokens": args.max_tokens, "val_fraction": args.val_fraction}
    meta = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot, "source": source}
    meta |= {"settings": settings, "documents": 0, "tokens": 0, "shards": [], "complete": False}
    if kind in ("files", "stdlib"):
        paths = list(find_files(args))
        sizes = repr([(str(path), path.stat().st_size) for path in paths])  # show an edit since an interrupted run
        source["fingerprint"] = hashlib.sha256(sizes.encode()).hexdigest()
        return meta, partial(write_shards, documents=partial(local_documents, args, paths))
    if not Path(name).exists():
        try:  # once, where `datasets` alone tries for half a minute without a network
            huggingface_hub.HfApi().dataset_info(name, timeout=10)
        except Exception as error:
            raise UserError(f"no {name} on the Hub ({error}): use --files, --stdlib, or download elsewhere") from error
    return meta, partial(write_shards, documents=partial(hub_documents, args)) if args.dataset else download_shards


def find_files(args):
    """Paths of the files to read: those given, in their order, and those in the folders given, sorted."""
    kinds = "py" if args.stdlib else r"(txt|md|py|jsonl)(\.gz|\.zst)?|parquet"
    wanted = rf"(?!(.*/)?(\.|(__pycache__|site-packages|dist-packages)/)).+\.({kinds})"
    for root in map(Path, [sysconfig.get_path("stdlib")] if args.stdlib else args.files):
        names = {path: path.relative_to(root).as_posix() for path in sorted(root.rglob("*"))} or {root: root.name}
        paths = [path for path, name in names.items() if re.fullmatch(wanted, name) and path.is_file()]
        if not paths:
            raise UserError(f"--files {root}: no .txt .md .py .jsonl (.gz .zst of them too) or .parquet file there")
        yield from paths


def local_documents(args, paths, first):
    """(place, pieces) of every document from a place on: the number of those before it, which are read again."""
    number, encoding = 0, "utf-8" if args.stdlib else "utf-8-sig"  # -sig: a byte-order mark is dropped
    for path in paths:
        try:
            if path.suffix == ".parquet":
                tables = pyarrow.parquet.ParquetFile(path).iter_batches(64, columns=[args.column], use_threads=False)
                texts = (text for table in tables for text in table.column(args.column).to_pylist())
            else:  # pyarrow unpacks .gz and .zst, and notices a cut one
                f = io.TextIOWrapper(pyarrow.input_stream(str(path)), encoding=encoding, newline="\n")
                rows = (json.loads(line)[args.column] for line in f if line.strip())
                texts = rows if ".jsonl" in path.suffixes else [f.read()]
            for text in filter(None, texts):
                if number >= (first or 0):
                    yield number, PIECES.findall(text)
                number += 1
        except (OSError, ValueError, LookupError, TypeError) as error:
            if not args.stdlib:  # some of Python's tests are not UTF-8
                raise UserError(f"{path}: {error} (UTF-8 is needed, see iconv; --column {args.column})") from error


def hub_documents(args, state):
    """(place, pieces) of every document from a place on: a state of the stream of `datasets`, None at the beginning."""
    import datasets  # here, because it takes seconds
    stream = datasets.load_dataset(args.dataset, args.config, split=args.split, streaming=True)
    stream = stream.select_columns([args.column])
    stream.load_state_dict(state or stream.state_dict())
    for row in stream:
        yield state, PIECES.findall(row[args.column] or "")
        state = stream.state_dict()


def download_shards(args, out, meta):
    """Download ready shards of 100M tokens, unchanged, and list them in meta.json. Files that are here stay."""
    train = range(1, max(2, math.ceil((args.max_tokens or 1e12) / 1e8)))
    wanted = ["*_val_*.bin", *(f"*_train_{i:06d}.bin" for i in train)]
    huggingface_hub.snapshot_download(args.pretokenized, repo_type="dataset", allow_patterns=wanted, local_dir=out)
    meta |= {"documents": 0, "tokens": 0, "shards": []}  # of a listing that was interrupted
    shards = data.find_shards(out, "val") + data.find_shards(out, "train")
    for shard in shards:
        meta["complete"] = shard is shards[-1]
        add_shard(out, meta, None, shard.path.name)


def make_batches(documents, first=0):
    """Lists of (place of the document, number of the piece, piece), about SIZE characters each, from piece `first`."""
    pieces = ((place, i, piece) for place, found in documents for i, piece in enumerate(found))
    batch, size = [], 0
    for item in itertools.islice(pieces, first, None):
        batch.append(item)
        size += len(item[2])
        if size >= SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode(name, batch):
    """Tokens of a batch, uint16, with end of text before each document."""
    tokenizer, ids = get_tokenizer(name), []
    for _, number, piece in batch:
        ids += [tokenizer.eot] * (number == 0) + tokenizer.encode_ordinary(piece)
    return np.array(ids, np.uint16)


def encode_all(batches, args):
    """(batch, its tokens) in order, from several processes."""
    with ProcessPoolExecutor(args.workers, initializer=start_worker) as pool:
        pool.submit(os.getpid).result()  # starts all workers, before the threads of `datasets`, which a fork would lose
        while group := list(itertools.islice(batches, 4 * args.workers)):
            yield from zip(group, pool.map(partial(encode, args.tokenizer), group), strict=True)


def start_worker():
    """Leave Ctrl-C to the parent, and end when the parent is killed: a worker would wait forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def write_shards(args, out, meta, documents):
    """Tokenize what is missing. A shard is written when the token after it is known, with the place of that one."""
    document, piece, used = meta.get("resume", (None, 0, 0))  # used: tokens of the batch that are in shards or parts
    size = args.shard_size if meta["shards"] else val_size(args, documents)
    missing, parts, filled = (args.max_tokens or math.inf) - meta["tokens"], [], 0
    for batch, tokens in encode_all(make_batches(documents(document), piece), args):
        while used < len(tokens) and missing:
            if filled == size:
                meta["resume"] = [*batch[0][:2], used]
                add_shard(out, meta, parts)
                size, parts, filled = args.shard_size, [], 0
            part = tokens[used:][: min(size - filled, missing)]
            parts.append(part)
            used, filled, missing = used + len(part), filled + len(part), missing - len(part)
        if not missing:
            break
        used = 0
    if not meta["shards"]:
        raise UserError(f"{filled} tokens leave none to train on beside val: use more text, or --val_fraction 0.05")
    meta |= {"complete": True, "resume": None}
    add_shard(out, meta, parts)


def val_size(args, documents):
    """Tokens of val: --val_fraction of all characters or of --max_tokens, whichever is less; 2 to one shard."""
    share, sizes, crlf, tokens = args.val_fraction, [], 0, 0.0
    most = min(args.shard_size, max(2, share * (args.max_tokens or math.inf))) if share else args.shard_size
    if args.dataset or not share:
        return round(most)
    for batch in make_batches(documents(None)):  # to the end: bad input is found before anything is written
        sizes.append(sum(len(piece) for _, _, piece in batch))
        crlf += sum(piece.count("\r\n") for _, _, piece in batch)
    if crlf and args.files:
        print(f"note: {crlf:,} lines end in \\r\\n, and each \\r becomes a token: `tr -d '\\r'` removes them")
    for i, batch in enumerate(make_batches(documents(None))):
        tokens += min(1, (share * sum(sizes) - sum(sizes[:i])) / sizes[i]) * len(encode(args.tokenizer, batch))
        if sum(sizes[: i + 1]) >= share * sum(sizes) or tokens >= most:
            break
    return round(min(most, max(2, tokens)))


def add_shard(out, meta, parts, name=None):
    """List a shard in meta.json: a file that is there, or the next one, written from the tokens in `parts`."""
    path = out / (name or f"shard_{'train' if meta['shards'] else 'val'}_{len(meta['shards']):06d}.npy")
    if parts:
        tokens = np.concatenate(parts)
        with common.atomic_write(path) as f:  # not np.save: its error on a full disk does not name the cause
            np.lib.format.write_array_header_1_0(f, np.lib.format.header_data_from_array_1_0(tokens))
            f.write(tokens)
    tokens = np.memmap(path, data.TOKEN, "r", data.open_shard(path).start)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    meta["shards"].append({"file": path.name, "tokens": len(tokens), "sha256": sha256})
    meta["tokens"] += len(tokens)
    meta["documents"] += int(np.count_nonzero(tokens == meta["eot"]))
    with common.atomic_write(out / "meta.json", "w") as f:
        json.dump(meta, f, indent=1)
    print(f"{path}: {meta['tokens']:,} tokens so far", flush=True)


if __name__ == "__main__":
    common.run(main)
