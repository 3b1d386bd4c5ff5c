"""Token shards -> batches: memory-mapped, seeded, resumable, in an order that is the same for any number of ranks.

    loader = DataLoader("edu_fineweb10B", "train", B=16, T=1024)
    x, y = loader.next_batch()         # int64 (B, T) on the device; y is x shifted by one token
    loader.load_state_dict(state)      # continue after the last batch that next_batch() had returned
    fingerprint("edu_fineweb10B")      # 12 hex digits that identify the tokens of a folder

Formats of shards:

    <anything>_{train,val}_{index}.npy    uint16, one dimension (fineweb.py)
    <anything>_{train,val}_{index}.bin    llm.c and modded-nanogpt: 256 int32 (magic, version, tokens), then uint16
    train.bin, val.bin                    nanoGPT: uint16 without a header

Order. A row is T + 1 tokens; the next row begins with the last token of this one. An epoch holds every row of every
shard. The order of the shards, the first token of each (in [0, T)) and the order of the rows of a shard are drawn from
(data_seed, epoch). Rows are shuffled because in file order a small batch holds pieces of a single document, and a small
model then takes long to get past bigram statistics. The epochs form one endless list of rows; a step takes the next
world_size * B of them, B per rank. N ranks with G / N micro-steps therefore read the same rows as one process with G,
and a state saved by N ranks resumes on M.
"""

import functools
import hashlib
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lab.common import UserError

SHARD_NAME = re.compile(r"(?!\.).*(?:^|_)(train|val)(?:_.*)?\.(?:npy|bin)")  # not *.tmp: half-written
BIN_MAGIC, BIN_HEADER, PAGE = np.int32(20240520).tobytes(), 256 * 4, 4096  # sizes in bytes
TOKEN = np.dtype("<u2")
SHARD_ORDER, ROW_ORDER = 1, 2  # domain numbers, the first number of every seed: no two kinds of draws share a stream


class Shard(NamedTuple):
    path: Path
    start: int  # bytes before the first token
    tokens: int
    stamp: tuple  # (size, mtime), compared at every read: the file may be changed under a running job


def split_of(name):
    """The split of a shard from its name, train or val; None for any other file."""
    match = SHARD_NAME.fullmatch(name)
    return match and match[1]


def find_shards(root, split):
    """The shards of a split, sorted by name."""
    shards = [open_shard(path) for path in sorted(Path(root).glob("*")) if split_of(path.name) == split]
    if not shards:
        gpu = "python fineweb.py --pretokenized kjj0/finewebedu10B-gpt2 --out edu_fineweb10B"
        cpu = "python fineweb.py --stdlib --tokenizer bytes --out data/bytes"
        raise UserError(f"no {split} shards in the folder {root}: make some with `{gpu}`, or for a CPU `{cpu}`")
    return shards


def open_shard(path):
    """The Shard at `path`, from its first bytes. UserError for a file that is damaged or holds other tokens."""
    try:
        with open(path, "rb") as f:
            head, stat = f.read(BIN_HEADER), path.stat()
        start, tokens = locate_tokens(path, head, stat.st_size)
        if tokens < 1 or stat.st_size != start + TOKEN.itemsize * tokens:
            raise ValueError(f"its {tokens:,} tokens do not fill its {stat.st_size:,} bytes")
    except Exception as error:  # numpy evaluates the header of .npy: a damaged one can raise nearly anything
        raise UserError(f"{path} is no whole shard ({error}): make it again, or pass another --data_root") from None
    return Shard(path, start, tokens, (stat.st_size, stat.st_mtime_ns))


def locate_tokens(path, head, size):
    """(bytes before the first token, number of tokens) of a file of `size` bytes that begins with `head`."""
    if head.startswith(b"\x93NUMPY"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.dtype != TOKEN or array.ndim != 1:
            raise ValueError(f"it holds {array.dtype} of shape {array.shape}, not uint16 in one dimension")
        return array.offset, len(array)
    if head.startswith(BIN_MAGIC):  # no raw file: 55432 is no token of GPT-2
        return BIN_HEADER, int(np.frombuffer(head, "<i4")[2])
    if path.name not in ("train.bin", "val.bin"):
        raise ValueError("it begins neither as .npy nor as .bin of llm.c")
    # Integers of 32 or 64 bits, and most headers, are half zeros or more; token 0 is rare in any text.
    first = np.frombuffer(head[: len(head) // 2 * 2], TOKEN)
    if np.sum(first == 0) > 0.4 * len(first):
        raise ValueError("its tokens are not uint16, or it has a header: many of the first are 0")
    return 0, size // TOKEN.itemsize


def read_meta(root):
    """meta.json of a folder of shards; its "shards" become {file: (tokens, sha256 or None)}. Shards without one are of
    GPT-2's tokenizer, except beside meta.pkl, nanoGPT's vocabulary of characters: "unknown", without bits per byte."""
    path = Path(root, "meta.json")
    meta = {"tokenizer": "unknown" if Path(root, "meta.pkl").exists() else "gpt2", "vocab_size": 0, "shards": []}
    try:
        if path.exists():
            meta |= json.loads(path.read_bytes())
        meta["tokenizer"], meta["vocab_size"] = str(meta["tokenizer"]), int(meta["vocab_size"])
        meta["shards"] = {str(shard["file"]): (int(shard["tokens"]), shard.get("sha256")) for shard in meta["shards"]}
    except Exception as error:  # any damage
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): make the shards again") from None
    return meta


def fingerprint(data_root):
    """12 hex digits that identify the tokens of a folder, wherever it lies: from name, number of tokens and sha256 of
    each shard; where meta.json has no sha256, that of the first, a middle and the last page of the file."""
    listed, digest, seen = read_meta(data_root)["shards"], hashlib.sha256(), {}
    for shard in find_shards(data_root, "train") + find_shards(data_root, "val"):
        known = listed.get(shard.path.name, (0, None))[1]
        if not known:
            data = np.memmap(shard.path, np.uint8, "r")
            pages = [data[:PAGE], data[len(data) // 2 :][:PAGE], data[-PAGE:]]
            known = hashlib.sha256(np.concatenate(pages)).hexdigest()
        if known in seen:
            print(f"note: {shard.path} seems a copy of {seen[known]}, and its text counts twice", file=sys.stderr)
        seen[known] = shard.path.name
        digest.update(f"{shard.path.name}\0{shard.tokens}\0{known}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()[:12]


def read_rows(shard, firsts, T, vocab_size):
    """Rows of T + 1 tokens that begin at the tokens `firsts`: uint16 (len(firsts), T + 1), out of a mapped file."""
    stat = shard.path.stat()
    if (stat.st_size, stat.st_mtime_ns) != shard.stamp:  # reading a map past the end of its file kills the process
        raise UserError(f"{shard.path} was changed while in use: restore it, then continue with --resume auto")
    tokens = np.memmap(shard.path, TOKEN, "r", shard.start, (shard.tokens,))
    rows = np.stack([tokens[first : first + T + 1] for first in firsts])
    largest = int(rows.max())
    if largest >= vocab_size:
        raise UserError(f"{shard.path} has token {largest}: --vocab_size {vocab_size} is too small, or the data wrong")
    return rows


def plan_epoch(tokens, T, seed, epoch):
    """(order of the shards, first token of each, cumulative rows of each) of shards that are `tokens` long.

    With `seed` None: as in the files. A shard too short for a row has none; any other has at least one.
    """
    if seed is None:
        order, first = np.arange(len(tokens)), np.zeros(len(tokens), np.int64)
    else:
        rng = np.random.default_rng((SHARD_ORDER, seed, epoch))
        order = rng.permutation(len(tokens))
        first = rng.integers(0, np.clip(tokens[order] - T, 1, T))
    return order, first, np.cumsum((tokens[order] - 1 - first) // T)


@functools.lru_cache(maxsize=2)  # the shard being read and the next one
def order_rows(rows, seed, epoch, shard):
    """The order of a shard's rows. With `seed` None: as in the file."""
    if seed is None:
        return np.arange(rows)
    return np.random.default_rng((ROW_ORDER, seed, epoch, shard)).permutation(rows)


class DataLoader:
    """Batches of one split for one rank; see the top of this file."""

    def __init__(self, data_root, split, B, T, data_seed=1337, rank=0, world_size=1, vocab_size=50304, device="cpu"):
        self.root, self.split, self.B, self.T, self.data_seed = data_root, split, B, T, data_seed
        self.rank, self.world_size, self.vocab_size, self.device = rank, world_size, vocab_size, device
        self.shards = find_shards(data_root, split)
        self.lengths = {shard.path.name: shard.tokens for shard in self.shards}
        self.tokens = np.array([shard.tokens for shard in self.shards])
        self.total_tokens = int(self.tokens.sum())
        self.file_rows = int(plan_epoch(self.tokens, T, None, 0)[2][-1])
        self.meta = read_meta(data_root)
        self.tokenizer, vocabulary = self.meta["tokenizer"], self.meta["vocab_size"]
        # Refuse shards that meta.json does not list, less text than one batch, and tokens that the model lacks.
        listed = {name: tokens for name, (tokens, _) in self.meta["shards"].items() if split_of(name) == split}
        if self.meta["shards"] and listed != self.lengths:
            name = min(listed.items() ^ self.lengths.items())[0]
            raise UserError(f"{Path(data_root, name)} is not as meta.json lists it: move it, or make the shards again")
        rows = B * world_size if split == "train" else 1
        if self.file_rows < rows:
            found = f"{self.total_tokens:,} {split} tokens, {self.file_rows} rows of T + 1"
            raise UserError(f"{data_root} holds {found}; a batch needs {rows} rows: lower --B or --T, or use more text")
        if vocabulary > vocab_size:
            raise UserError(f"{data_root} has {self.tokenizer} tokens: pass --vocab_size {vocabulary} or more")
        read_rows(self.shards[0], [0], min(T, self.shards[0].tokens - 1), vocab_size)
        self.seed = data_seed if split == "train" else None  # None: not shuffled
        self.position = (0, 0)  # (epoch, row) after the last batch handed out, never after the one read ahead
        self.pool = ThreadPoolExecutor(1)  # its thread starts with the first batch and ends with the loader
        self.ahead = None

    def describe(self):
        text = f"{self.root}: {len(self.shards)} {self.split} shards, {self.total_tokens:,} tokens ({self.tokenizer})"
        return text if self.meta.get("complete", True) else f"{text}; unfinished: run its fineweb.py command again"

    def _seek(self, epoch, row, seed):
        """(epoch, row, plan of the epoch), with rows past the end of an epoch carried into the next."""
        plan = plan_epoch(self.tokens, self.T, seed, epoch)
        while row >= plan[2][-1]:
            epoch, row = epoch + 1, row - int(plan[2][-1])
            plan = plan_epoch(self.tokens, self.T, seed, epoch)
        return epoch, row, plan

    def _read_rows(self, epoch, row, seed, count):
        """x and y, int64 (count, T): the rows from `row` of `epoch`, across the ends of shards and epochs."""
        x, y = np.empty((2, count, self.T), np.int64)
        done = 0
        while done < count:
            epoch, row, (order, first, ends) = self._seek(epoch, row, seed)
            i = int(np.searchsorted(ends, row, side="right"))  # the shard that holds this row
            start = int(ends[i - 1]) if i else 0
            rows = order_rows(int(ends[i]) - start, seed, epoch, int(order[i]))[row - start :][: count - done]
            tokens = read_rows(self.shards[order[i]], first[i] + rows * self.T, self.T, self.vocab_size)
            x[done : done + len(rows)], y[done : done + len(rows)] = tokens[:, :-1], tokens[:, 1:]
            done, row = done + len(rows), row + len(rows)
        return x, y

    def _read_batch(self, epoch, row):
        """x and y of this rank for the batch at (epoch, row), and the position after it."""
        x, y = self._read_rows(epoch, row + self.rank * self.B, self.seed, self.B)
        return x, y, self._seek(epoch, row + self.world_size * self.B, self.seed)[:2]

    def to_device(self, *arrays):
        """Tensors of these arrays on the device, without waiting for a GPU."""
        import torch  # here, not above: fineweb.py uses this file without torch

        tensors = [torch.from_numpy(array) for array in arrays]
        if torch.device(self.device).type == "cuda":  # from pinned memory the copy runs beside the work of the GPU
            return tuple(tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors)
        return tuple(tensor.to(self.device) for tensor in tensors)

    def next_batch(self):
        """(x, y) of this rank, int64 (B, T) on the device. A thread reads the next batch meanwhile."""
        future, self.ahead = self.ahead or self.pool.submit(self._read_batch, *self.position), None
        x, y, self.position = future.result()
        self.ahead = self.pool.submit(self._read_batch, *self.position)
        return self.to_device(x, y)

    def rows_at(self, first, count):
        """(x, y), int64 (count, T): rows of the split in file order, from the first again at its end. Stateless."""
        return self.to_device(*self._read_rows(0, first % self.file_rows, None, count))

    def state_dict(self):
        """The position, equal on every rank, and the settings and shards it belongs to."""
        epoch, row = self.position
        return {"epoch": epoch, "row": row, "T": self.T, "data_seed": self.data_seed, "shards": self.lengths}

    def load_state_dict(self, state):
        """Continue from `state`. B and world_size may differ from the run that saved it; T, seed and shards may not."""
        then, now = {**state, **state["shards"]}, {**self.state_dict(), **self.lengths}
        for name in sorted((then | now).keys() - {"epoch", "row", "shards"}):
            if then.get(name) != now.get(name):
                found = f"{name} {then.get(name, 'none')}, now {now.get(name, 'none')}"
                raise UserError(f"the checkpoint was made on other data ({found}): give it the data it had")
        self.position, self.ahead = (int(state["epoch"]), int(state["row"])), None
