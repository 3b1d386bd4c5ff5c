"""The stream of batches against a list-based reference, exact resume, formats, fingerprints, damaged files."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lab.common import UserError
from lab.data import DataLoader, fingerprint

LENGTHS = (101, 57, 230, 40)  # of the training shards: 40 is shorter than some T below, as a remainder may be
B, T = 3, 8


def name_of(split, i):
    return f"text_{split}_{i:06d}.npy"


FIRST = name_of("train", 0)


def write_npy(path, tokens):
    np.save(path, np.asarray(tokens, np.uint16))


def write_bin(path, tokens):
    header = np.array([20240520, 1, len(tokens), *[0] * 253], np.int32)
    path.write_bytes(header.tobytes() + np.asarray(tokens, np.uint16).tobytes())


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
    """The stream as the docstring of lab/data.py describes it, with Python lists."""
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


@pytest.mark.parametrize(("B", "T", "seed"), [(1, 1, 0), (3, 8, 1337), (5, 7, 1), (2, 39, 2), (2, 56, 3), (11, 13, 4)])
def test_stream_is_the_reference(data, B, T, seed):
    want = reference_rows(LENGTHS, T, seed, epochs=4)
    n = len(want) // B
    assert n * B > 3 * len(want) // 4, "the stream must cross epochs"
    assert take(DataLoader(data, "train", B, T, data_seed=seed), n) == want[: n * B]


def test_ranks_share_what_one_process_reads(data, world_size=3):
    """N ranks with one micro-step each, or one process with N: the same rows. The state continues with another B."""
    alone = DataLoader(data, "train", B, T)
    ranks = [DataLoader(data, "train", B, T, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(20):  # several epochs
        shares = [take(rank, 1) for rank in ranks]
        assert [row for share in shares for row in share] == take(alone, world_size)
        assert len({rank.position for rank in ranks}) == 1 and ranks[0].state_dict() == alone.state_dict()
    other = DataLoader(data, "train", 2 * B, T)
    other.load_state_dict(ranks[-1].state_dict())
    assert take(other, 3) == take(alone, 6)


def test_rows_at_reads_in_file_order_and_leaves_the_stream_alone(data):
    corpus(data, (50, 30), split="val")
    val, starts = DataLoader(data, "val", 2, T), [0, 8, 16, 24, 32, 40, 50, 58, 66]
    assert val.file_rows == len(starts)  # (50 - 1) // 8 rows of the first shard, (30 - 1) // 8 of the second
    for first, count in ((3, 4), (0, 9), (8, 3), (10**9, 1)):
        x, y = val.rows_at(first, count)
        assert x[:, 0].tolist() == [starts[(first + i) % 9] for i in range(count)]
        assert torch.equal(y, x + 1)
    loader = DataLoader(data, "train", B, T)
    rows = take(loader, 2)
    loader.rows_at(1, 5)
    assert rows + take(loader, 2) == take(DataLoader(data, "train", B, T), 4)


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("change", "words"),
    [({"T": 9}, "T 8, now 9"), ({"data_seed": 5}, "data_seed 1337, now 5"), ({}, f"{FIRST} 101, now 99")],
)
def test_another_stream_is_refused_by_name(data, change, words):
    state = DataLoader(data, "train", B, T).state_dict()
    if not change:
        write_npy(data / FIRST, np.arange(99))
    loader = DataLoader(data, "train", B, **{"T": T} | change)
    with pytest.raises(UserError, match=words):
        loader.load_state_dict(state)
    assert loader.position == (0, 0)


def test_three_formats_give_the_same_tokens(tmp_path):
    tokens, rows = np.random.default_rng(0).integers(0, 50257, 500), []
    for kind in ("npy", "bin", "raw"):
        (tmp_path / kind).mkdir()
    write_npy(tmp_path / "npy/a_train_000000.npy", tokens)
    write_bin(tmp_path / "bin/a_train_000000.bin", tokens)
    (tmp_path / "raw/train.bin").write_bytes(tokens.astype(np.uint16).tobytes())
    for kind in ("npy", "bin", "raw"):
        loader = DataLoader(tmp_path / kind, "train", B, T)
        rows.append(take(loader, 30))
        assert loader.rows_at(0, B)[0].flatten().tolist() == tokens[: B * T].tolist()
    assert rows[0] == rows[1] == rows[2]


def test_a_shard_belongs_to_a_split_by_its_name(tmp_path):
    train, val = ["a_train_01.npy", "tiny_train.npy", "train_02.npy", "x_val_train_3.npy"], ["my_train_set_val_00.npy"]
    for name in train + val:
        write_npy(tmp_path / name, np.arange(100))
    for name in ("edu_train_9.npy.tmp", "constraint_000000.npy", "._edu_train_000001.npy", "train.txt", "strain.bin"):
        (tmp_path / name).write_bytes(b"?")
    assert list(DataLoader(tmp_path, "train", B, T).lengths) == train
    assert list(DataLoader(tmp_path, "val", B, T).lengths) == val


def list_shards(folder, **more):
    """Write the meta.json that lists the shards of `folder`."""
    shards = [{"file": path.name, "tokens": len(np.load(path)), **more} for path in sorted(folder.glob("*.npy"))]
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "bytes", "vocab_size": 257, "shards": shards}))


def test_the_tokenizer_is_that_of_meta_json_else_gpt2s_else_unknown(data):
    assert DataLoader(data, "train", B, T).tokenizer == "gpt2"
    (data / "meta.pkl").touch()  # nanoGPT's vocabulary of characters
    assert DataLoader(data, "train", B, T).tokenizer == "unknown"
    list_shards(data)
    assert "4 train shards, 428 tokens (bytes)" in DataLoader(data, "train", B, T, vocab_size=500).describe()


def test_fingerprint_is_that_of_the_tokens(data, tmp_path):
    """A shard made again in place shows in its pages, where no sha256 is known."""
    corpus(data, (50,), split="val")
    write_npy(data / FIRST, np.arange(10_000))
    seen = [fingerprint(data)]
    list_shards(data)
    assert fingerprint(data) == seen[0], "a meta.json without sha256 adds nothing"
    for place in (0, 5_000, 9_999):
        tokens = np.arange(10_000)
        tokens[place] = 7
        write_npy(data / FIRST, tokens)
        seen.append(fingerprint(data))
    for sha256 in ("aa", "bb"):
        list_shards(data, sha256=sha256)
        seen.append(fingerprint(data))
    (data / name_of("val", 0)).rename(data / name_of("val", 1))
    seen.append(fingerprint(data))
    assert len(set(seen)) == len(seen)
    assert fingerprint(data.rename(tmp_path / "moved")) == seen[-1]


def test_copies_of_a_shard_are_named(data, capsys):
    corpus(data, (50,), split="val")
    write_npy(data / FIRST, np.arange(300))
    fingerprint(data)
    assert not capsys.readouterr().err
    write_npy(data / name_of("train", 5), np.arange(300))
    fingerprint(data)
    assert f"{name_of('train', 5)} seems a copy of {FIRST}" in capsys.readouterr().err


def raw(dtype, header=()):
    data = np.array(header, np.int32).tobytes() + np.random.default_rng(0).integers(0, 50257, 500, dtype).tobytes()
    return lambda folder: (folder / "train.bin").write_bytes(data)


def meta(**content):
    return lambda folder: (folder / "meta.json").write_text(json.dumps(content))


class Trap:
    def __reduce__(self):
        return os._exit, (1,)  # unpickling it would end the test run here


BAD = {
    "no folder": (shutil.rmtree, {}, "no train shards in the folder"),
    "empty": (lambda folder: (folder / FIRST).write_bytes(b""), {}, "neither as .npy nor"),
    "cut": (lambda folder: os.truncate(folder / FIRST, 300), {}, FIRST),
    "int32": (lambda folder: np.save(folder / FIRST, np.arange(99, dtype=np.int32)), {}, "int32"),
    "pickle": (lambda folder: np.save(folder / FIRST, np.array([Trap()] * 99), allow_pickle=True), {}, FIRST),
    "raw uint32": (raw(np.uint32), {}, "its tokens are not uint16"),
    "raw with a header": (raw(np.uint16, [20240801, *[0] * 255]), {}, "or it has a header"),
    "less than a batch": (Path.iterdir, {"B": 20, "world_size": 3}, "428 train tokens, 51 rows .* needs 60"),
    "token": (Path.iterdir, {"vocab_size": 80}, "--vocab_size 80 is too small"),
    "meta vocabulary": (meta(vocab_size=50257), {"vocab_size": 500}, "pass --vocab_size 50257"),
    "meta without a file": (meta(shards=[{"tokens": 1}]), {}, "meta.json is damaged"),
    "meta of other lengths": (meta(shards=[{"file": FIRST, "tokens": 9}]), {}, "as meta.json lists"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_is_one_line_that_names_it(data, case):
    breaker, settings, words = BAD[case]
    breaker(data)
    with pytest.raises(UserError, match=words) as error:
        take(DataLoader(data, **{"split": "train", "B": B, "T": T} | settings), 40)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_damaged_shards_are_refused_or_read_as_tokens(shards, tmp_path):
    """Cuts, flipped bytes, zeros, exchanged files: never a traceback, and no token outside the vocabulary."""
    refused = 0
    for number in range(150):
        rng, folder = random.Random(number), tmp_path / str(number)
        shutil.copytree(shards, folder)
        path, other = rng.sample(sorted(folder.iterdir()), 2)
        whole, at = path.read_bytes(), rng.randrange(120)
        flipped = bytes([whole[at] ^ 1 << rng.randrange(8)])
        cut, zeros = whole[: rng.randrange(len(whole))], whole[:at] + bytes(20) + whole[at + 20 :]
        damages = [cut, whole[:at] + flipped + whole[at + 1 :], zeros, other.read_bytes()]
        path.write_bytes(damages[number % 4])
        try:
            fingerprint(folder)
            loaders = [DataLoader(folder, split, 4, 32, vocab_size=257) for split in ("train", "val")]
            assert all(x.max() < 257 for loader in loaders for x in loader.next_batch())
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 50


@pytest.mark.parametrize("truncated", [True, False])
def test_a_shard_that_changes_under_a_running_job_is_an_error(tmp_path, truncated):
    path = tmp_path / FIRST
    write_npy(path, np.arange(40_000))
    os.utime(path, ns=(0, 0))  # an old file, so that a rewrite shows however coarse the clock of the disk
    loader = DataLoader(tmp_path, "train", B, 1024)
    take(loader, 1)
    loader.ahead.result()
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if truncated else data)
    take(loader, 1)  # had been read already
    with pytest.raises(UserError, match=f"{FIRST} was changed while in use"):  # raised by the thread, delivered here
        loader.next_batch()
    assert loader.state_dict()["row"] == 2 * B, "the position is still that of the last batch handed out"
