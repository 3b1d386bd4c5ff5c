"""The stream of batches against a list-based reference, exact resume, the three formats, and bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from lab.common import UserError
from lab.data import DataLoader, fingerprint, order_rows, plan_epoch

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = (101, 57, 230, 40)  # of the training shards: 40 is shorter than some T below, as a remainder may be
B, T = 3, 8


def name_of(split, i, suffix="npy"):
    return f"text_{split}_{i:06d}.{suffix}"


def write_npy(path, tokens):
    np.save(path, np.asarray(tokens, np.uint16))


def write_bin(path, tokens, magic=20240520, version=1, count=None, cut=None):
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes((header.tobytes() + np.asarray(tokens, np.uint16).tobytes())[:cut])


def corpus(folder, lengths=LENGTHS, split="train"):
    """Shards whose tokens count on from 0 over the whole split, so that a token says where it was read."""
    folder.mkdir(exist_ok=True)
    starts = np.cumsum([0, *lengths])
    for i, length in enumerate(lengths):
        write_npy(folder / name_of(split, i), np.arange(starts[i], starts[i] + length))
    return folder


@pytest.fixture
def data(tmp_path):
    return corpus(tmp_path / "data")


def take(loader, n):
    """The rows (T + 1 tokens) of the next n batches, one list."""
    rows = []
    for _ in range(n):
        x, y = loader.next_batch()
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (loader.B, loader.T)
        assert torch.equal(x[:, 1:], y[:, :-1])
        rows += torch.cat([x, y[:, -1:]], dim=1).tolist()
    return rows


def reference_rows(lengths, T, seed, epochs):
    """The stream as the docstring of dataloader.py describes it, with Python lists."""
    texts, total = [], 0
    for length in lengths:
        texts.append(list(range(total, total + length)))
        total += length
    rows = []
    for epoch in range(epochs):
        rng = np.random.default_rng((1, seed, epoch))
        order = [int(i) for i in rng.permutation(len(texts))]
        starts = rng.integers(0, [max(1, min(T, len(texts[i]) - T)) for i in order])
        for i, start in zip(order, starts, strict=True):
            text, in_file_order = texts[i][start:], []
            while len(text) >= T + 1:
                in_file_order.append(text[: T + 1])
                text = text[T:]
            shuffled = np.random.default_rng((2, seed, epoch, i)).permutation(len(in_file_order))
            rows += [in_file_order[j] for j in shuffled]
    return rows


# ---------------------------------------------------------------- order


@pytest.mark.parametrize(("B", "T", "seed"), [(1, 1, 0), (3, 8, 1337), (5, 7, 1), (2, 39, 2), (2, 56, 3), (11, 13, 4)])
def test_stream_is_the_reference(data, B, T, seed):
    want = reference_rows(LENGTHS, T, seed, epochs=4)
    n = len(want) // B
    assert n * B > 3 * len(want) // 4, "the stream must cross epochs"
    assert take(DataLoader(data, "train", B, T, data_seed=seed), n) == want[: n * B]


def test_an_epoch_misses_less_than_a_row_at_each_end_of_a_shard(data):
    rows_of_epoch = len(reference_rows(LENGTHS, T, 7, epochs=1))
    rows = take(DataLoader(data, "train", 1, T, data_seed=7), rows_of_epoch)
    seen = [token for row in rows for token in row[:-1]]
    assert len(seen) == len(set(seen)), "a token is read once per epoch"
    assert sum(LENGTHS) - len(seen) <= len(LENGTHS) * 2 * T
    assert all(row == list(range(row[0], row[0] + T + 1)) for row in rows), "a row never crosses shards"


def test_epochs_and_seeds_differ(data):
    n = len(reference_rows(LENGTHS, T, 1, epochs=1))
    rows = take(DataLoader(data, "train", 1, T, data_seed=1), 2 * n)
    assert rows[:n] != rows[n:]
    assert rows[:n] != take(DataLoader(data, "train", 1, T, data_seed=2), n)
    assert rows[:n] == take(DataLoader(data, "train", 1, T, data_seed=1), n)


def test_order_of_shards_and_of_rows_are_drawn_apart():
    """Ten shards and ten rows in shard 0: seeds (1, 0) and (1, 0, 0) would give both the same order."""
    order, _, _ = plan_epoch(np.full(10, 100), T, 1, 0)
    assert order.tolist() != order_rows(10, 1, 0, 0).tolist()


def test_order_does_not_depend_on_B(data):
    assert take(DataLoader(data, "train", 1, T), 120) == take(DataLoader(data, "train", 8, T), 15)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_what_one_process_reads(data, world_size):
    """N ranks, one micro-step each, against one process with N micro-steps: the same rows, rank after rank."""
    alone = DataLoader(data, "train", B, T)
    ranks = [DataLoader(data, "train", B, T, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(20):  # several epochs
        shares = [take(rank, 1) for rank in ranks]
        assert [row for share in shares for row in share] == take(alone, world_size)
        assert len({rank.position for rank in ranks}) == 1 and ranks[0].state_dict() == alone.state_dict()


def test_val_is_in_file_order_and_batch_at_is_stateless(data):
    corpus(data, (50, 30), split="val")
    val = DataLoader(data, "val", 2, T)
    starts = [0, 8, 16, 24, 32, 40, 50, 58, 66]  # (50 - 1) // 8 rows of the first shard, (30 - 1) // 8 of the second
    for i in (3, 0, 5, 3, 10**9):
        x, y = val.batch_at(i)
        assert x[:, 0].tolist() == [starts[(2 * i + b) % 9] for b in range(2)]
        assert torch.equal(y, x + 1)
    assert take(val, 1)[0][0] == 0 and val.batch_at(0)[0][0, 0] == 0


def test_batch_at_leaves_the_training_stream_alone(data):
    want, loader = take(DataLoader(data, "train", B, T), 4), DataLoader(data, "train", B, T)
    rows = take(loader, 2)
    loader.batch_at(1)
    assert rows + take(loader, 2) == want


def test_val_smaller_than_a_batch_wraps(tmp_path):
    val = DataLoader(corpus(tmp_path, (T + 1,), split="val"), "val", 4, T)
    assert val.batch_at(0)[0].tolist() == [list(range(T))] * 4


def test_tokens_in_counts_each_token_once(data):
    val = DataLoader(corpus(data, (50, 30), split="val"), "val", 2, T)
    for batches in range(8):
        seen = {token for i in range(batches) for token in val.batch_at(i)[1].flatten().tolist()}
        assert val.tokens_in(batches) == len(seen)
    assert val.tokens_in(10**9) == 9 * T


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("B", [1, 5])
def test_resume_at_every_batch_across_shards_and_epochs(data, B):
    n = 3 * len(reference_rows(LENGTHS, T, 1337, epochs=1)) // B
    loader, states, rows = DataLoader(data, "train", B, T), [], []
    for _ in range(n):
        states.append(json.dumps(loader.state_dict()))  # plain numbers: torch.load(weights_only=True) takes them too
        rows += take(loader, 1)
    for i in range(0, n, 3):
        again = DataLoader(data, "train", B, T)
        take(again, 1)  # a batch is read ahead by now: it must be dropped
        again.load_state_dict(json.loads(states[i]))
        assert take(again, min(3, n - i)) == rows[i * B : (i + 3) * B]


def test_state_counts_batches_handed_out_not_read_ahead(data):
    loader = DataLoader(data, "train", 4, T)
    for i in range(1, 5):
        take(loader, 1)
        loader.ahead.result()  # the thread has read one more
        assert (loader.state_dict()["epoch"], loader.state_dict()["row"]) == (0, 4 * i)


def test_state_of_four_ranks_resumes_on_one_with_another_B(data):
    want = take(DataLoader(data, "train", 1, T), 120)
    ranks = [DataLoader(data, "train", 2, T, rank=rank, world_size=4) for rank in range(4)]
    rows = [row for _ in range(9) for rank in ranks for row in take(rank, 1)]
    alone = DataLoader(data, "train", 6, T)
    alone.load_state_dict(ranks[3].state_dict())
    assert rows + take(alone, 8) == want


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"T": T + 1}, ["--T 8", "not 9"]),
        ({"data_seed": 5}, ["--data_seed 1337", "not 5"]),
        ({"remove": 1}, ["text_train_000001.npy", "57 tokens then", "none now"]),
        ({"add": 4}, ["text_train_000004.npy", "no tokens then", "99 now"]),
        ({"length": 0}, ["text_train_000000.npy", "101 tokens then", "99 now"]),
    ],
)
def test_another_stream_is_refused_by_name(data, change, words):
    state = DataLoader(data, "train", B, T).state_dict()
    if "remove" in change:
        (data / name_of("train", change.pop("remove"))).unlink()
    for key in {"add", "length"} & set(change):
        write_npy(data / name_of("train", change.pop(key)), np.arange(99))
    loader = DataLoader(data, "train", B, **({"T": T} | change))
    with pytest.raises(UserError) as error:
        loader.load_state_dict(state)
    assert all(word in str(error.value) for word in words), error.value
    assert loader.position == (0, 0)


@pytest.mark.parametrize("change", [{"row": None}, {"row": -1}, {"row": 10**18}, {"epoch": "x"}, {"shards": 5}])
def test_a_damaged_position_is_refused(data, change):
    loader = DataLoader(data, "train", B, T)
    with pytest.raises(UserError, match="position"):
        loader.load_state_dict(loader.state_dict() | change)
    with pytest.raises(UserError, match="position"):
        loader.load_state_dict({})
    assert loader.position == (0, 0)


# ---------------------------------------------------------------- formats


def test_three_formats_give_the_same_tokens(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50257, 500)
    folders = [tmp_path / kind for kind in ("npy", "bin", "raw")]
    for folder in folders:
        folder.mkdir()
    write_npy(folders[0] / "a_train_000000.npy", tokens)
    write_bin(folders[1] / "a_train_000000.bin", tokens)
    (folders[2] / "train.bin").write_bytes(tokens.astype(np.uint16).tobytes())
    npy, bin_, raw = (take(DataLoader(folder, "train", B, T), 30) for folder in folders)
    assert npy == bin_ == raw
    x, y = DataLoader(folders[1], "train", B, T).batch_at(0)
    assert x.flatten().tolist() == tokens[: B * T].tolist() and y[-1, -1] == tokens[B * T]


def test_a_shard_belongs_to_a_split_by_its_name(tmp_path):
    train = ["edu_train_000001.npy", "train_000002.npy", "x_val_train_3.npy", "tiny_train.npy"]
    val = ["edu_val_000000.npy", "my_train_set_val_000000.npy"]
    neither = ["edu_train_000009.npy.tmp", "constraint_000000.npy", "._edu_train_000001.npy", "train.txt", "strain.bin"]
    for name in [*train, *val]:
        write_npy(tmp_path / name, np.arange(100))
    for name in neither:
        (tmp_path / name).write_bytes(b"?")
    assert list(DataLoader(tmp_path, "train", B, T).lengths) == sorted(train)
    assert list(DataLoader(tmp_path, "val", B, T).lengths) == sorted(val)


def test_meta(data):
    loader = DataLoader(data, "train", B, T)
    assert loader.tokenizer == "gpt2" and loader.total_tokens == sum(LENGTHS)
    shards = [{"file": name_of("train", i), "tokens": n, "sha256": "-"} for i, n in enumerate(LENGTHS)]
    (data / "meta.json").write_text(json.dumps({"tokenizer": "bytes", "vocab_size": 257, "shards": shards}))
    loader = DataLoader(data, "train", B, T)
    assert loader.tokenizer == "bytes"
    assert loader.describe() == f"{data}: 4 train shards, 428 tokens (bytes)"
    meta = {"tokenizer": "bytes", "vocab_size": 257, "shards": shards, "complete": False}
    (data / "meta.json").write_text(json.dumps(meta))
    assert "(bytes); unfinished: run fineweb.py again" in DataLoader(data, "train", B, T).describe()


def list_shards(folder, sha256=None):
    """Write the meta.json that lists the shards of `folder`."""
    shards = [{"file": p.name, "tokens": len(np.load(p))} for p in sorted(folder.glob("*.npy"))]
    shards = [shard | ({"sha256": sha256} if sha256 else {}) for shard in shards]
    (folder / "meta.json").write_text(json.dumps({"shards": shards}))


def test_fingerprint_is_that_of_the_tokens(data, tmp_path):
    corpus(data, (50,), split="val")
    seen = [fingerprint(data)]
    assert len(seen[0]) == 12 and int(seen[0], 16) >= 0
    list_shards(data)
    assert fingerprint(data) == seen[0], "a meta.json without sha256 adds nothing"
    for sha256 in ("aa", "bb"):
        list_shards(data, sha256)
        seen.append(fingerprint(data))
    write_npy(data / name_of("val", 0), range(51))
    seen.append(fingerprint(data))
    (data / name_of("val", 0)).rename(data / name_of("val", 1))
    seen.append(fingerprint(data))
    (data / name_of("train", 3)).unlink()
    seen.append(fingerprint(data))
    assert len(set(seen)) == len(seen)
    assert fingerprint(data.rename(tmp_path / "moved")) == seen[-1]


def test_fingerprint_of_an_unreadable_folder_is_refused(data):
    with pytest.raises(UserError, match="no val shards"):
        fingerprint(data)
    corpus(data, (50,), split="val")
    (data / FIRST).write_bytes(b"garbage")
    with pytest.raises(UserError, match=FIRST):
        fingerprint(data)
    with pytest.raises(UserError, match="cannot read the folder"):
        fingerprint(data / "missing")


# ---------------------------------------------------------------- bad input


def edit(name, change):
    """A breaker: rewrite the bytes of one file."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def replace(write, *args, **kwargs):
    """A breaker: the folder holds nothing but one shard, `args[0]`, made by `write`."""

    def breaker(folder):
        for path in folder.iterdir():
            path.unlink()
        write(folder / args[0], *args[1:], **kwargs)

    return breaker


def meta(text):
    return lambda folder: (folder / "meta.json").write_text(text)


class Trap:
    def __reduce__(self):
        return os._exit, (1,)  # unpickling it would end the test run here


def list_all_but_one(folder):
    list_shards(folder)
    about = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(about | {"shards": about["shards"][1:]}))


def make_folder(folder):
    (folder / name_of("train", 9)).mkdir()


FIRST, SHORT = name_of("train", 0), name_of("train", 1)
MAKE = "python fineweb.py --pretokenized kjj0/finewebedu10B-gpt2 --out {root}"
MAKE_ON_CPU = (
    "`python fineweb.py --stdlib --tokenizer bytes --out data/bytes` and pass `--data_root data/bytes --vocab_size 257`"
)
AGAIN = "delete {root} and run its fineweb.py command again, or choose another folder"
BIN = "a_train_000000.bin"
BAD = {
    "no folder": (shutil.rmtree, {}, ["cannot read", MAKE, MAKE_ON_CPU]),
    "no shards": (lambda folder: [p.unlink() for p in folder.iterdir()], {}, ["no train shards in", MAKE]),
    "other split": (lambda folder: None, {"split": "val"}, ["no val shards in", MAKE]),
    "empty": (edit(FIRST, lambda b: b""), {}, [FIRST, "empty", AGAIN]),
    "truncated": (edit(FIRST, lambda b: b[:-2]), {}, [FIRST, "not a whole .npy", AGAIN]),
    "header only": (edit(FIRST, lambda b: b[:60]), {}, [FIRST, "not a whole .npy", AGAIN]),
    "trailing bytes": (edit(FIRST, lambda b: b + b"??"), {}, [FIRST, "101 tokens need 330 bytes", "332", AGAIN]),
    "garbage": (edit(FIRST, lambda b: b"garbage" * 99), {}, [FIRST, "neither", AGAIN]),
    "folder for a file": (make_folder, {}, [name_of("train", 9), "directory", AGAIN]),
    "int32": (replace(np.save, FIRST, np.arange(99, dtype=np.int32)), {}, [FIRST, "int32", "uint16", AGAIN]),
    "float": (replace(np.save, FIRST, np.zeros(99)), {}, [FIRST, "float64", AGAIN]),
    "big endian": (replace(np.save, FIRST, np.zeros(99, ">u2")), {}, [FIRST, ">u2", AGAIN]),
    "2-D": (replace(np.save, FIRST, np.zeros((9, 99), np.uint16)), {}, [FIRST, "(9, 99)", AGAIN]),
    "no tokens": (replace(write_npy, FIRST, []), {}, [FIRST, AGAIN]),
    "pickle": (
        replace(np.save, FIRST, np.array([Trap()] * 99), allow_pickle=True),
        {},
        [FIRST, "Python objects", AGAIN],
    ),
    "bin magic": (replace(write_bin, BIN, range(99), magic=20240801), {}, [BIN, "neither", "20240520", AGAIN]),
    "bin version": (replace(write_bin, BIN, range(99), version=7), {}, [BIN, "version 7", AGAIN]),
    "bin count": (replace(write_bin, BIN, range(99), count=100), {}, [BIN, "100 tokens need", AGAIN]),
    "bin negative": (replace(write_bin, BIN, range(99), count=-512), {}, [BIN, "-512 tokens", AGAIN]),
    "bin header cut": (replace(write_bin, BIN, [], cut=12), {}, [BIN, "12 bytes", AGAIN]),
    "raw odd": (replace(Path.write_bytes, "train.bin", b"\1" * 201), {}, ["train.bin", "the file has 201", AGAIN]),
    "raw by another name": (replace(Path.write_bytes, BIN, b"\1" * 200), {}, [BIN, "neither", AGAIN]),
    "short shard": (
        lambda folder: None,
        {"T": 60, "B": 1},
        [SHORT, "57 tokens", "T + 1 = 61: pass a smaller --T or"],
    ),
    "only shard short": (replace(write_npy, FIRST, range(T)), {}, [FIRST, "8 tokens", "T + 1 = 9", "--T"]),
    "less than a batch": (lambda folder: None, {"B": 60}, ["428 training tokens", "481", FIRST, "--B"]),
    "less for all ranks": (lambda folder: None, {"B": 20, "world_size": 3}, ["481", FIRST, "--B"]),
    "token": (lambda folder: None, {"vocab_size": 80}, ["outside --vocab_size 80", "pass --vocab_size", ".npy"]),
    "meta not json": (meta("{"), {}, ["meta.json", AGAIN]),
    "meta not a dict": (meta("[]"), {}, ["meta.json", AGAIN]),
    "meta without a file": (meta('{"shards": [{"tokens": 1}]}'), {}, ["meta.json", "file", AGAIN]),
    "meta vocabulary": (meta('{"vocab_size": 50257}'), {"vocab_size": 500}, ["meta.json", "pass --vocab_size 50257"]),
    "meta other length": (
        meta(json.dumps({"shards": [{"file": FIRST, "tokens": 102}]})),
        {},
        [FIRST, "has 101 tokens", "lists 102", AGAIN],
    ),
    "meta lists more": (
        lambda folder: [list_shards(folder), (folder / name_of("train", 2)).unlink()],
        {},
        [name_of("train", 2), "is missing, meta.json lists 230 tokens", AGAIN],
    ),
    "meta infinite vocabulary": (meta('{"vocab_size": Infinity}'), {}, ["meta.json", "inf is no int", AGAIN]),
    "meta infinite length": (meta('{"shards": [{"file": "a", "tokens": 1e999}]}'), {}, ["meta.json", "inf", AGAIN]),
    "meta file is no name": (meta('{"shards": [{"file": 5, "tokens": 1}]}'), {}, ["meta.json", "5 is no str", AGAIN]),
    "meta nested": (meta("[" * 100_000), {}, ["meta.json", "RecursionError", AGAIN]),
    "meta not UTF-8": (lambda folder: (folder / "meta.json").write_bytes(b'{"a": "\xff"}'), {}, ["meta.json", AGAIN]),
    "unlisted": (list_all_but_one, {}, [FIRST, "is not listed in meta.json", "move it"]),
    "none listed": (meta('{"shards": []}'), {}, [FIRST, "is not listed in meta.json", "run an interrupted fineweb.py"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_naming_file_and_remedy(data, case):
    breaker, settings, words = BAD[case]
    breaker(data)
    settings = {"split": "train", "B": B, "T": T} | settings
    with pytest.raises(UserError) as error:
        take(DataLoader(data, **settings), 40)
    message = str(error.value)
    assert all(word.format(root=data) in message for word in words), message
    assert "\n" not in message and "or;" not in message


@pytest.mark.slow
def test_a_flipped_bit_in_a_header_never_ends_in_a_traceback(tmp_path):
    path, refused = tmp_path / FIRST, 0
    write_npy(path, np.arange(200))
    whole = path.read_bytes()
    for position in range(128):
        for bit in (0, 3, 6, 7):
            data = bytearray(whole)
            data[position] ^= 1 << bit
            path.write_bytes(data)
            try:
                DataLoader(tmp_path, "train", B, T)
            except UserError as error:
                refused += FIRST in str(error)
    assert refused > 150


def truncate_keeping_mtime(path):
    os.truncate(path, path.stat().st_size // 2)
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize("suffix", ["npy", "bin"])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (truncate_keeping_mtime, ["was changed while in use", "now"]),
        (lambda path: path.unlink(), ["can no longer be read", "No such file"]),
        (lambda path: path.write_bytes(path.read_bytes()), ["was changed while in use"]),
    ],
)
def test_a_shard_lost_under_a_running_job_is_an_error(tmp_path, suffix, fault, words):
    path = tmp_path / f"a_train_000000.{suffix}"
    (write_npy if suffix == "npy" else write_bin)(path, np.arange(40_000))
    os.utime(path, ns=(0, 0))  # an old file, so that a rewrite shows however coarse the clock of the disk
    loader = DataLoader(tmp_path, "train", B, 1024)
    take(loader, 1)
    loader.ahead.result()
    fault(path)
    take(loader, 1)  # had been read already
    with pytest.raises(UserError) as error:  # raised by the thread, delivered here
        loader.next_batch()
    assert all(word in str(error.value) for word in [*words, path.name, "--resume auto"]), error.value
    assert loader.state_dict()["row"] == 2 * B, "the position is still that of the last batch handed out"


# ---------------------------------------------------------------- memory, files, threads


@pytest.mark.slow
def test_reading_a_50_MB_shard_does_not_take_its_memory(tmp_path):
    write_npy(tmp_path / FIRST, np.arange(25_000_000) % 50257)
    process = psutil.Process()
    loader = DataLoader(tmp_path, "train", 16, 1024)
    take(loader, 2)
    before, files = process.memory_info().rss, process.num_fds()
    for _ in range(25_000_000 // (16 * 1024)):  # all of it
        loader.next_batch()
    assert loader.state_dict()["epoch"] == 1
    assert process.memory_info().rss - before < 25e6
    assert process.num_fds() <= files + 2


@pytest.mark.slow
def test_a_script_that_reads_ahead_ends_by_itself(data):
    script = f"import dataloader; dataloader.DataLoader({str(data)!r}, 'train', 3, 8).next_batch(); raise SystemExit(7)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=600, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (7, "")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_batches_equal_those_of_the_cpu(data):
    cpu, cuda = (DataLoader(data, "train", B, T, device=device) for device in ("cpu", "cuda"))
    for _ in range(30):
        x, y = cuda.next_batch()
        assert x.device.type == y.device.type == "cuda"
        want_x, want_y = cpu.next_batch()
        assert torch.equal(x.cpu(), want_x) and torch.equal(y.cpu(), want_y)
