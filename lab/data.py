"""Token shards -> batches: memory-mapped, seeded, resumable, in an order that is the same for any number of ranks.

    loader = DataLoader("edu_fineweb10B", "train", B=16, T=1024)
    x, y = loader.next_batch()         # int64 (B, T) on the device; y is x shifted by one token
    loader.load_state_dict(state)      # continue after the last batch that next_batch() had returned
    fingerprint("edu_fineweb10B")      # 12 hex digits that identify the tokens of a folder

Formats of shards, recognised by their first bytes (fineweb.py writes .npy; this file alone reads them and meta.json):

    <anything>_{train,val}_{index}.npy    uint16, one dimension
    <anything>_{train,val}_{index}.bin    llm.c and modded-nanogpt: 256 int32 (magic, version, tokens), then uint16
    train.bin, val.bin                    nanoGPT: uint16 without a header

Order. A row is T + 1 tokens; the next row begins with the last token of this one. An epoch holds every row of every
shard. The order of the shards, the first token of each (in [0, T)) and the order of the rows of a shard are drawn from
(data_seed, epoch). Rows are shuffled because in file order a small batch holds pieces of a single document, and a small
model then takes long to get past bigram statistics. The epochs form one endless list of rows; a step takes the next
world_size * B of them, B per rank. N ranks with G / N micro-steps therefore read the same rows as one process with G,
and a state saved by N ranks resumes on M.

Memory. A shard is mapped while the rows of a batch are read and is never converted as a whole, so that opening a shard
does not stall and resident memory stays constant for a corpus of any size.
"""

import functools
import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lab.common import UserError

SHARD_NAME = re.compile(r"(?!\.).*(?:^|_)(train|val)(?:_.*)?\.(?:npy|bin)")  # not *.tmp: half-written
RAW_NAMES = ("train.bin", "val.bin")
BIN_MAGIC, BIN_VERSION, BIN_HEADER_BYTES = 20240520, 1, 256 * 4
TOKEN = np.dtype("<u2")
SHARD_ORDER, ROW_ORDER = 1, 2  # domain numbers, the first number of every seed: no two kinds of draws share a stream


# ---------------------------------------------------------------------------------------------------------------------
# Files: shards and meta.json


class Shard(NamedTuple):
    path: Path
    start: int  # bytes before the first token
    tokens: int
    stamp: tuple  # (size, mtime), compared at every read: the file may be changed under a running job


def bad_shard(path, reason):
    remedy = f"delete {path.parent} and run its fineweb.py command again, or choose another folder"
    return UserError(f"{path}: {reason}; {remedy}")


def split_of(name):
    """Split of a shard from its name, train or val; None for any other file."""
    match = SHARD_NAME.fullmatch(name)
    return match and match[1]


def find_shards(root, split):
    """The paths of a split's shards, sorted by name."""
    remedy = (
        f"get FineWeb-Edu with `python fineweb.py --pretokenized kjj0/finewebedu10B-gpt2 --out {root}`, or for a CPU"
        " run `python fineweb.py --stdlib --tokenizer bytes --out data/bytes` and pass"
        " `--data_root data/bytes --vocab_size 257`"
    )
    try:
        names = sorted(os.listdir(root))
    except OSError as error:
        raise UserError(f"cannot read the folder {root} ({error.strerror}): {remedy}") from None
    paths = [Path(root, name) for name in names if split_of(name) == split]
    if not paths:
        raise UserError(f"no {split} shards in {root}: {remedy}")
    return paths


def locate_tokens(path, head, size):
    """(bytes before the first token, number of tokens) from the first bytes of the file. Raises ValueError."""
    if size == 0:
        raise ValueError("the file is empty")
    if head.startswith(b"\x93NUMPY"):
        start, tokens = locate_npy_tokens(path)
    elif head[:4] == np.int32(BIN_MAGIC).tobytes():  # no raw file: 55432 is no token of GPT-2
        start, tokens = BIN_HEADER_BYTES, count_bin_tokens(head)
    elif path.name in RAW_NAMES:
        start, tokens = 0, -(-size // TOKEN.itemsize)
    else:
        raise ValueError(f"begins neither as .npy nor with the .bin magic {BIN_MAGIC}")
    if tokens < 1 or size != start + TOKEN.itemsize * tokens:
        raise ValueError(f"{tokens:,} tokens need {start + TOKEN.itemsize * tokens:,} bytes, the file has {size:,}")
    return start, tokens


def locate_npy_tokens(path):
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy evaluates the header: a damaged one can raise nearly anything
        raise ValueError(f"not a whole .npy file ({error})") from None
    if array.dtype != TOKEN or array.ndim != 1:
        raise ValueError(f"holds {array.dtype} of shape {array.shape}, where tokens are uint16 in one dimension")
    return array.offset, len(array)


def count_bin_tokens(head):
    if len(head) < BIN_HEADER_BYTES:
        raise ValueError(f"ends within its header, after {len(head)} bytes")
    version, tokens = (int(number) for number in np.frombuffer(head, "<i4")[1:3])
    if version != BIN_VERSION:
        raise ValueError(f".bin version {version} is unknown; version {BIN_VERSION} holds uint16 tokens")
    return tokens


def open_shard(path):
    """The Shard at `path`, from its header. Raises UserError for a file that is damaged or no shard."""
    try:
        with open(path, "rb") as f:
            head, stat = f.read(BIN_HEADER_BYTES), os.fstat(f.fileno())
        start, tokens = locate_tokens(path, head, stat.st_size)
    except (OSError, ValueError) as error:
        raise bad_shard(path, getattr(error, "strerror", None) or error) from None
    return Shard(path, start, tokens, (stat.st_size, stat.st_mtime_ns))


def map_tokens(shard, f):
    """The tokens of a shard, uint16, mapped from its open file `f`."""
    return np.memmap(f, TOKEN, "r", shard.start, (shard.tokens,))


def read_meta(root):
    """meta.json as a dict. Shards made elsewhere have none: the tokenizer is then GPT-2's, and "shards" is missing."""
    path = Path(root, "meta.json")
    meta = {"tokenizer": "gpt2", "vocab_size": 0}
    try:
        meta = meta | json.loads(path.read_bytes())
        typed = [(meta["tokenizer"], str), (meta["vocab_size"], int)]
        for shard in meta.get("shards", []):
            typed += [(shard["file"], str), (shard["tokens"], int), (shard.get("sha256", ""), str)]
        for value, kind in typed:
            if not isinstance(value, kind):
                raise ValueError(f"{value!r} is no {kind.__name__}")
    except (FileNotFoundError, NotADirectoryError):  # find_shards() names a folder that is none
        pass
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise bad_shard(path, f"not a readable meta.json ({type(error).__name__}: {error})") from None
    return meta


def check_listed(root, split, meta, lengths):
    """The split's shards are those that meta.json lists, at their lengths. (sha256 would mean reading them all.)"""
    listed = {shard["file"]: shard["tokens"] for shard in meta["shards"]} if "shards" in meta else lengths
    for name in sorted(listed | lengths):
        if split_of(name) != split or listed.get(name) == lengths.get(name):
            continue
        if name not in listed:
            remedy = "move it to another folder, or run an interrupted fineweb.py again"
            raise UserError(f"{Path(root, name)} is not listed in meta.json: {remedy}")
        found = f"has {lengths[name]:,} tokens" if name in lengths else "is missing"
        raise bad_shard(Path(root, name), f"{found}, meta.json lists {listed[name]:,} tokens")


def fingerprint(data_root):
    """12 hex digits that identify the tokens of a folder, wherever it lies. Reads meta.json and the headers only.

    Hashes of every shard of both splits: name, number of tokens and, if meta.json has it, sha256.
    """
    sha256 = {shard["file"]: shard.get("sha256", "") for shard in read_meta(data_root).get("shards", [])}
    digest = hashlib.sha256()
    for path in [path for split in ("train", "val") for path in find_shards(data_root, split)]:
        line = f"{path.name}\0{open_shard(path).tokens}\0{sha256.get(path.name, '')}\n"
        digest.update(line.encode(errors="surrogatepass"))
    return digest.hexdigest()[:12]


# ---------------------------------------------------------------------------------------------------------------------
# Rows and their order


def read_rows(shard, firsts, T, vocab_size):
    """Rows of T + 1 tokens that begin at the tokens `firsts`: uint16 (len(firsts), T + 1)."""
    remedy = "restore it, then continue with --resume auto"
    try:
        # Opened and compared each time: reading a map past the end of a truncated file kills the process.
        with open(shard.path, "rb") as f:
            stat = os.fstat(f.fileno())
            if (stat.st_size, stat.st_mtime_ns) != shard.stamp:
                sizes = f"{shard.stamp[0]:,} bytes at the start, {stat.st_size:,} now"
                raise UserError(f"{shard.path} was changed while in use ({sizes}): {remedy}")
            tokens = map_tokens(shard, f)
            rows = np.stack([tokens[first : first + T + 1] for first in firsts])
    except OSError as error:
        raise UserError(f"{shard.path} can no longer be read ({error.strerror}): {remedy}") from None
    largest = int(rows.max())
    if largest >= vocab_size:
        remedy = f"pass --vocab_size {largest + 1} or more if its tokenizer is that large, or another --data_root"
        raise UserError(f"{shard.path}: token {largest} is outside --vocab_size {vocab_size}: {remedy}")
    return rows


def plan_epoch(tokens, T, seed, epoch):
    """(order of the shards, first token of each, cumulative rows of each); `tokens` holds the length of every shard.

    With `seed` None: sorted, from token 0. A shard too short for a row has none; any other has at least one.
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
        self.shards = [open_shard(path) for path in find_shards(data_root, split)]
        self.lengths = {shard.path.name: shard.tokens for shard in self.shards}
        self.tokens = np.array([shard.tokens for shard in self.shards])
        self.total_tokens = int(self.tokens.sum())
        self.file_rows = int(plan_epoch(self.tokens, T, None, 0)[2][-1])
        self._check_meta()
        self._check_size()
        self.seed = data_seed if split == "train" else None  # None: not shuffled
        self.position = (0, 0)  # (epoch, row) after the last batch handed out, never after the one read ahead
        self.pool = ThreadPoolExecutor(1)  # its thread starts with the first batch and ends with the loader
        self.ahead = None

    def _check_meta(self):
        meta = read_meta(self.root)
        self.tokenizer, size, self.complete = meta["tokenizer"], meta["vocab_size"], meta.get("complete", True)
        if size > self.vocab_size:
            problem = f"tokenizer {self.tokenizer} has {size} tokens, more than --vocab_size {self.vocab_size}"
            remedy = f"pass --vocab_size {size} or more, or another --data_root"
            raise UserError(f"{Path(self.root, 'meta.json')}: {problem}: {remedy}")
        check_listed(self.root, self.split, meta, self.lengths)

    def _check_size(self):
        for shard in self.shards[:-1] or self.shards:  # the last of several holds the rest and may be short
            if shard.tokens <= self.T:
                needed = f"one row is T + 1 = {self.T + 1:,}: pass a smaller --T or another --data_root"
                raise UserError(f"{shard.path} holds {shard.tokens:,} tokens, {needed}")
        if self.split == "train" and self.file_rows < self.B * self.world_size:
            batch = f"one batch of all processes is B * T * processes + 1 = {self.B * self.T * self.world_size + 1:,}"
            names = ", ".join(list(self.lengths)[:3]) + (", ..." if len(self.lengths) > 3 else "")
            remedy = "pass a smaller --B or --T, or a --data_root with more text"
            raise UserError(f"{self.root} ({names}) holds {self.total_tokens:,} training tokens, {batch}: {remedy}")

    def describe(self):
        unfinished = (
            "" if self.complete else "; unfinished: run fineweb.py again, before training (more shards end --resume)"
        )
        size = f"{len(self.shards)} {self.split} shards, {self.total_tokens:,} tokens ({self.tokenizer})"
        return f"{self.root}: {size}{unfinished}"

    def tokens_in(self, batches):
        """Distinct tokens predicted in batch_at(0) to batch_at(batches - 1), which repeat rows of a small split."""
        return min(batches * self.B, self.file_rows) * self.T

    def _seek(self, epoch, row, seed):
        """(epoch, row, plan of the epoch), with rows past the end of an epoch carried into the next."""
        while True:
            plan = plan_epoch(self.tokens, self.T, seed, epoch)
            rows = int(plan[2][-1])
            if row < rows:
                return epoch, row, plan
            epoch, row = epoch + 1, row - rows

    def _read_rows(self, epoch, row, seed):
        """x and y, int64 (B, T): B rows from `row` of `epoch`, across the ends of shards and epochs."""
        x, y = np.empty((2, self.B, self.T), np.int64)
        done = 0
        while done < self.B:
            epoch, row, (order, first, ends) = self._seek(epoch, row, seed)
            i = int(np.searchsorted(ends, row, side="right"))  # the shard that holds this row
            start = int(ends[i - 1]) if i else 0
            rows = order_rows(int(ends[i]) - start, seed, epoch, int(order[i]))[row - start :][: self.B - done]
            tokens = read_rows(self.shards[order[i]], first[i] + rows * self.T, self.T, self.vocab_size)
            x[done : done + len(rows)], y[done : done + len(rows)] = tokens[:, :-1], tokens[:, 1:]
            done, row = done + len(rows), row + len(rows)
        return x, y

    def _read_batch(self, epoch, row):
        """x and y of this rank for the batch at (epoch, row), and the position after it."""
        x, y = self._read_rows(epoch, row + self.rank * self.B, self.seed)
        return x, y, self._seek(epoch, row + self.world_size * self.B, self.seed)[:2]

    def _to_device(self, *arrays):
        import torch  # here, not above: fineweb.py and its workers use this file without torch

        tensors = [torch.from_numpy(array) for array in arrays]
        if torch.device(self.device).type == "cuda":  # from pinned memory the copy is asynchronous
            tensors = [tensor.pin_memory() for tensor in tensors]
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)

    def next_batch(self):
        """(x, y) of this rank, int64 (B, T) on the device. A thread reads the next batch meanwhile, with numpy alone.

        An error in the thread is raised by the call that would have returned its batch.
        """
        future, self.ahead = self.ahead or self.pool.submit(self._read_batch, *self.position), None
        x, y, self.position = future.result()
        self.ahead = self.pool.submit(self._read_batch, *self.position)
        return self._to_device(x, y)

    def batch_at(self, i):
        """Batch `i` of the split in file order, independent of next_batch(). A small split repeats rows."""
        return self._to_device(*self._read_rows(0, i * self.B % self.file_rows, None))

    def state_dict(self):
        """The position, equal on every rank, and the settings and shards it belongs to."""
        epoch, row = self.position
        return {"epoch": epoch, "row": row, "T": self.T, "data_seed": self.data_seed, "shards": self.lengths}

    def load_state_dict(self, state):
        """Continue from `state`. B and world_size may differ from the run that saved it; T, seed and shards may not."""
        try:
            epoch, row, then = int(state["epoch"]), int(state["row"]), dict(state["shards"])
            settings = {name: state[name] for name in ("T", "data_seed")}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the checkpoint has no position in the data ({error!r}): start without --resume") from None
        for name, value in settings.items():
            if value != getattr(self, name):
                now = getattr(self, name)
                raise UserError(f"the checkpoint was made with --{name} {value}, not {now}: pass --{name} {value}")
        changed = [name for name in sorted(then | self.lengths) if then.get(name) != self.lengths.get(name)]
        if changed:
            name, more = changed[0], f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            difference = f"{name}: {then.get(name, 'no')} tokens then, {self.lengths.get(name, 'none')} now{more}"
            remedy = "pass the --data_root it was trained on, or start without --resume"
            raise UserError(f"the {self.split} shards in {self.root} are not the checkpoint's ({difference}): {remedy}")
        if epoch < 0 or not 0 <= row < self.file_rows:
            raise UserError(f"the checkpoint has a wrong position (epoch {epoch}, row {row}): resume from an older one")
        self.position, self.ahead = (epoch, row), None
