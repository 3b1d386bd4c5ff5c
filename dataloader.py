"""Token shards -> batches: memory-mapped, seeded, resumable, and the same tokens for any number of ranks.

    loader = DataLoader("edu_fineweb10B", "train", B=16, T=1024)
    x, y = loader.next_batch()         # int64 (B, T) on the device; y is x one token further on
    loader.load_state_dict(state)      # goes on after the last batch that next_batch() had returned

Shards (fineweb.py writes the first kind), told apart by how they begin:

    <anything>_{train,val}_{index}.npy    uint16, 1-D
    <anything>_{train,val}_{index}.bin    llm.c and modded-nanogpt: 256 int32 (magic, version, tokens), then uint16
    train.bin, val.bin                    nanoGPT: uint16 and nothing else

Order. A row is T + 1 tokens, and the next row begins with the last token of this one. An epoch is every row of every
shard: shards in an order, each from a first token in [0, T), and the rows of a shard in an order, all drawn from
(data_seed, epoch). In file order a small batch would be pieces of one document: a 4-layer model on bytes, 2,048 a step,
then takes more than 700 steps to learn more than which byte follows which. The epochs form one endless list of rows;
a step takes the next world_size * B of them, B a rank. So the order depends on data_seed alone: N ranks with G/N
micro-steps read what one process reads in G, and a state saved by N ranks resumes on M.

Copying a 100M-token shard to int64 costs 800 MB and 0.8 s each time one is opened. Here a shard is mapped while the
rows of a batch are read, and no longer: nothing to stall on, and resident memory stays flat over a corpus of any size.
"""

import functools
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import UserError

SHARD_NAME = re.compile(r"(?!\.).*(?:^|_)(train|val)(?:_.*)?\.(?:npy|bin)")  # not *.tmp: half-written
RAW_NAMES = ("train.bin", "val.bin")
BIN_MAGIC, BIN_VERSION, BIN_HEADER_BYTES = 20240520, 1, 256 * 4
TOKEN = np.dtype("<u2")


class Shard(NamedTuple):
    path: Path
    start: int  # bytes before the first token
    tokens: int
    stamp: tuple  # (size, mtime): tells when the file is changed under a running job


def bad_shard(path, reason):
    remedy = f"delete it and make the shards again, e.g. `python fineweb.py --stdlib --out {path.parent}`"
    return UserError(f"{path}: {reason}; {remedy}")


def split_of(name):
    match = SHARD_NAME.fullmatch(name)
    return match and match[1]


def find_shards(root, split):
    """The paths of a split's shards, sorted by name."""
    remedy = f"make shards, e.g. `python fineweb.py --stdlib --out {root}`, or pass another --data_root"
    try:
        names = sorted(os.listdir(root))
    except OSError as error:
        raise UserError(f"cannot read the folder {root} ({error.strerror}): {remedy}") from None
    paths = [Path(root, name) for name in names if split_of(name) == split]
    if not paths:
        raise UserError(f"no {split} shards in {root}: {remedy}")
    return paths


def locate_tokens(path, head, size):
    """(bytes before the first token, number of tokens), read off the beginning of the file. Raises ValueError."""
    if size == 0:
        raise ValueError("the file is empty")
    if head.startswith(b"\x93NUMPY"):
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy evaluates the header: a damaged one can raise nearly anything
            raise ValueError(f"not a whole .npy file ({error})") from None
        if array.dtype != TOKEN or array.ndim != 1:
            raise ValueError(f"holds {array.dtype} of shape {array.shape}, where tokens are uint16 in one dimension")
        start, tokens = array.offset, len(array)
    elif head[:4] == np.int32(BIN_MAGIC).tobytes():  # taken as raw tokens: 55432 first, which GPT-2 does not have
        if size < BIN_HEADER_BYTES:
            raise ValueError(f"ends within its header, after {size} bytes")
        version, tokens = (int(number) for number in np.frombuffer(head, "<i4")[1:3])
        if version != BIN_VERSION:
            raise ValueError(f".bin version {version}, where {BIN_VERSION} (uint16 tokens) is known")
        start = BIN_HEADER_BYTES
    elif path.name in RAW_NAMES:
        start, tokens = 0, -(-size // TOKEN.itemsize)
    else:
        raise ValueError(f"begins neither as .npy nor with the .bin magic {BIN_MAGIC}")
    if tokens < 1 or size != start + TOKEN.itemsize * tokens:
        raise ValueError(f"{tokens:,} tokens need {start + TOKEN.itemsize * tokens:,} bytes, the file has {size:,}")
    return start, tokens


def open_shard(path):
    try:
        with open(path, "rb") as f:
            head, stat = f.read(BIN_HEADER_BYTES), os.fstat(f.fileno())
        start, tokens = locate_tokens(path, head, stat.st_size)
    except (OSError, ValueError) as error:
        raise bad_shard(path, getattr(error, "strerror", None) or error) from None
    return Shard(path, start, tokens, (stat.st_size, stat.st_mtime_ns))


def read_meta(root):
    """(tokenizer, its vocabulary size or 0, {file: tokens}) from meta.json; shards made elsewhere have none: GPT-2."""
    path = Path(root, "meta.json")
    try:
        meta = json.loads(path.read_text())
        lengths = {shard["file"]: int(shard["tokens"]) for shard in meta.get("shards", [])}
        return str(meta.get("tokenizer", "gpt2")), int(meta.get("vocab_size", 0)), lengths
    except FileNotFoundError:
        return "gpt2", 0, {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise bad_shard(path, f"not a readable meta.json ({type(error).__name__}: {error})") from None


def read_rows(shard, firsts, T, vocab_size):
    """Rows of T + 1 tokens, uint16 (len(firsts), T + 1), from the tokens `firsts` on; the shard is mapped meanwhile."""
    try:
        # Opened and compared each time, because reading a map past the end of a truncated file kills the process.
        with open(shard.path, "rb") as f:
            stat = os.fstat(f.fileno())
            if (stat.st_size, stat.st_mtime_ns) != shard.stamp:
                sizes = f"{shard.stamp[0]:,} bytes at the start, {stat.st_size:,} now"
                raise UserError(f"{shard.path} was changed while in use ({sizes}): put it back, then --resume auto")
            tokens = np.memmap(f, TOKEN, "r", shard.start, (shard.tokens,))
            rows = np.stack([tokens[first : first + T + 1] for first in firsts])
    except OSError as error:
        problem = f"{shard.path} can no longer be read ({error.strerror})"
        raise UserError(f"{problem}: put it back, then --resume auto") from None
    largest = int(rows.max())
    if largest >= vocab_size:
        remedy = f"pass at least --vocab_size {largest + 1} if its tokenizer is that large; if not"
        raise bad_shard(shard.path, f"token {largest} is outside --vocab_size {vocab_size}: {remedy}")
    return rows


def plan_epoch(tokens, T, seed, epoch):
    """(order of the shards, first token in each, rows up to the end of each); `tokens` is the length of every shard.

    With `seed` None: sorted, from token 0. A shard too short for a row has none; any other has at least one.
    """
    if seed is None:
        order, first = np.arange(len(tokens)), np.zeros(len(tokens), np.int64)
    else:
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(tokens))
        first = rng.integers(0, np.clip(tokens[order] - T, 1, T))
    return order, first, np.cumsum((tokens[order] - 1 - first) // T)


@functools.lru_cache(maxsize=2)  # of the shard being read and of the next
def order_rows(rows, seed, epoch, shard):
    """The order of a shard's rows. With `seed` None: as in the file."""
    return np.arange(rows) if seed is None else np.random.default_rng((seed, epoch, shard)).permutation(rows)


class DataLoader:
    def __init__(self, data_root, split, B, T, data_seed=1337, rank=0, world_size=1, vocab_size=50304, device="cpu"):
        if min(B, T) < 1 or data_seed < 0:
            raise UserError(f"--B {B} and --T {T} must be at least 1, --data_seed {data_seed} at least 0")
        self.root, self.split, self.B, self.T, self.data_seed = data_root, split, B, T, data_seed
        self.rank, self.world_size, self.vocab_size, self.device = rank, world_size, vocab_size, torch.device(device)
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
        """The vocabulary fits, and each shard listed is there at its length. Its sha256 would mean reading it all."""
        self.tokenizer, size, listed = read_meta(self.root)
        if size > self.vocab_size:
            problem = f"tokenizer {self.tokenizer} has {size} tokens, more than --vocab_size {self.vocab_size}"
            raise UserError(f"{Path(self.root, 'meta.json')}: {problem}: pass at least --vocab_size {size}")
        for name, tokens in listed.items():
            if split_of(name) == self.split and self.lengths.get(name) != tokens:
                has = f"has {self.lengths[name]:,} tokens" if name in self.lengths else "is missing"
                raise bad_shard(Path(self.root, name), f"{has}, where meta.json lists {tokens:,} tokens")

    def _check_size(self):
        for shard in self.shards[:-1] or self.shards:  # the last of several may be short: what remained of the corpus
            if shard.tokens <= self.T:
                needed = f"one row is T + 1 = {self.T + 1:,}: pass a smaller --T, or"
                raise bad_shard(shard.path, f"holds {shard.tokens:,} tokens, {needed}")
        if self.split == "train" and self.file_rows < self.B * self.world_size:
            batch = f"one batch of all processes is B * T * processes + 1 = {self.B * self.T * self.world_size + 1:,}"
            more = f"pass a smaller --B, or make more, e.g. `python fineweb.py --stdlib --out {self.root}`"
            names = ", ".join(list(self.lengths)[:3]) + (", ..." if len(self.lengths) > 3 else "")
            raise UserError(f"{self.root} ({names}) holds {self.total_tokens:,} training tokens, {batch}: {more}")

    def describe(self):
        return f"{self.root}: {len(self.shards)} {self.split} shards, {self.total_tokens:,} tokens ({self.tokenizer})"

    def _seek(self, epoch, row, seed):
        """Carry rows past the end of an epoch over into the following; also returns the plan of the epoch reached."""
        while True:
            plan = plan_epoch(self.tokens, self.T, seed, epoch)
            rows = int(plan[2][-1])
            if row < rows:
                return epoch, row, plan
            epoch, row = epoch + 1, row - rows

    def _read_rows(self, epoch, row, seed):
        """The B rows from `row` of `epoch` on, across the ends of shards and epochs, as int64 arrays x, y."""
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
        """This rank's share of the batch at (epoch, row), and the position after it."""
        x, y = self._read_rows(epoch, row + self.rank * self.B, self.seed)
        return x, y, self._seek(epoch, row + self.world_size * self.B, self.seed)[:2]

    def _to_device(self, *arrays):
        tensors = [torch.from_numpy(array) for array in arrays]
        if self.device.type == "cuda":  # from pinned memory the copy is only queued, and the CPU goes on
            tensors = [tensor.pin_memory() for tensor in tensors]
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)

    def next_batch(self):
        """(x, y) of this rank. A thread reads the next batch meanwhile; it does numpy only, so needs no CUDA stream.

        What goes wrong in the thread is raised by the call that would have returned that batch.
        """
        future, self.ahead = self.ahead or self.pool.submit(self._read_batch, *self.position), None
        x, y, self.position = future.result()
        self.ahead = self.pool.submit(self._read_batch, *self.position)
        return self._to_device(x, y)

    def batch_at(self, i):
        """Batch `i` of the split in file order, whatever was read before. It wraps: a small val split repeats rows."""
        return self._to_device(*self._read_rows(0, i * self.B % self.file_rows, None))

    def state_dict(self):
        """The position, the same on every rank, and what it has a meaning for."""
        epoch, row = self.position
        return {"epoch": epoch, "row": row, "T": self.T, "data_seed": self.data_seed, "shards": self.lengths}

    def load_state_dict(self, state):
        """Go on from `state`. B and world_size may differ from the run that saved it; what changes the rows may not."""
        for name in ("T", "data_seed"):
            then, now = state[name], getattr(self, name)
            if then != now:
                raise UserError(f"the checkpoint was made with --{name} {then}, not {now}: pass --{name} {then}")
        then, now = state["shards"], self.lengths
        changed = [name for name in sorted(then | now) if then.get(name) != now.get(name)]
        if changed:
            name, more = changed[0], f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            what = f"{name}: {then.get(name, 'no')} tokens then, {now.get(name, 'none')} now{more}"
            remedy = "pass the --data_root it was trained on, or start without --resume"
            raise UserError(f"the {self.split} shards in {self.root} are not the checkpoint's ({what}): {remedy}")
        self.position, self.ahead = (state["epoch"], state["row"]), None
