"""Text -> shards: every source and format, order, resuming, and bad input."""

import dataclasses
import gzip
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

import fineweb
import textfiles
from lab.common import UserError, lock
from lab.data import DataLoader
from lab.tokenizer import get_tokenizer

SCRIPT = Path(fineweb.__file__)
DATASETS_HOME = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def command(*flags):
    return [sys.executable, str(SCRIPT), *map(str, flags)]


def run(*flags, **options):
    env = {**os.environ, **options.pop("env", {})}
    return subprocess.run(command(*flags), capture_output=True, text=True, timeout=600, env=env, **options)


def build(monkeypatch, *flags):
    """Run the script within this process, which is faster."""
    monkeypatch.setattr(sys, "argv", ["fineweb.py", *map(str, flags)])
    fineweb.main()


def refused(monkeypatch, *flags):
    """The message of the refusal; the folder --out must be unchanged."""
    out = Path(flags[flags.index("--out") + 1]) if "--out" in flags else None
    before = sorted(out.rglob("*")) if out and out.exists() else None
    with pytest.raises(UserError) as caught:
        build(monkeypatch, *flags)
    if out and not out.is_file():
        assert (sorted(out.rglob("*")) if out.exists() else None) == before
    return str(caught.value)


def meta(out):
    return json.loads((out / "meta.json").read_text())


def tokens(out):
    """All tokens in order, after checking meta.json against every shard."""
    about = meta(out)
    arrays = [np.load(out / shard["file"]) for shard in about["shards"]]
    for shard, array in zip(about["shards"], arrays, strict=True):
        assert array.dtype == np.uint16 and array.ndim == 1 and len(array) == shard["tokens"]
        assert hashlib.sha256((out / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
    together = np.concatenate(arrays)
    assert about["complete"] is True and "resume" not in about and about["tokens"] == len(together)
    assert about["documents"] == np.count_nonzero(together == about["eot"])
    assert sorted(p.name for p in out.iterdir()) == sorted(["meta.json", *(s["file"] for s in about["shards"])])
    return together


def expected(texts, name="gpt2"):
    tokenizer = get_tokenizer(name)
    return np.concatenate([[tokenizer.eot, *tokenizer.encode_ordinary(text)] for text in texts]).astype(np.uint16)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def prose(count, seed=0):
    """Documents of made-up words, none of them empty."""
    draw = random.Random(seed)
    words = ["the", "cat", " sat", "it's", "\n\n", "漢字", "42", "Émile", "<|endoftext|>", "   ", "def f():\n  pass\n"]
    return [" ".join(draw.choices(words, k=draw.randrange(20, 200))) + f" {i}" for i in range(count)]


def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def fineweb_table(texts):
    """FineWeb-Edu's columns."""
    n = len(texts)
    return pa.table(
        {
            "text": texts,
            "id": [f"<urn:uuid:{i}>" for i in range(n)],
            "dump": ["CC-MAIN-2013-20"] * n,
            "url": [f"http://example.org/{i}" for i in range(n)],
            "file_path": ["s3://commoncrawl/x"] * n,
            "language": ["en"] * n,
            "language_score": [0.97] * n,
            "token_count": [len(text) // 4 for text in texts],
        }
    )


def write_parquet(path, texts, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(fineweb_table(texts), path, row_group_size=50, **options)
    return path


# Formats


@pytest.mark.slow
@pytest.mark.parametrize(("given", "expected"), [
    ({}, ("HuggingFaceFW/fineweb-edu", "sample-10BT", "edu_fineweb10B")),
    ({"dataset": "HuggingFaceFW/fineweb-edu"}, ("HuggingFaceFW/fineweb-edu", "sample-10BT", "edu_fineweb10B")),
    ({"config": "sample-100BT"}, ("HuggingFaceFW/fineweb-edu", "sample-100BT", "data/fineweb-edu")),
    ({"dataset": "Skylion007/openwebtext"}, ("Skylion007/openwebtext", None, "data/openwebtext")),
])  # fmt: skip
def test_the_configuration_and_folder_of_a_data_set(given, expected):
    args = fineweb.check_args(fineweb.Args(**given))
    assert (args.dataset, args.config, args.out) == expected


def test_every_format_gives_the_same_tokens(tmp_path, monkeypatch):
    texts = prose(120)
    write_jsonl(tmp_path / "a.jsonl", texts)
    write_parquet(tmp_path / "b.parquet", texts)
    plain = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(plain))
    # Two frames, as parallel compressors write them.
    packer = zstandard.ZstdCompressor()
    (tmp_path / "d.jsonl.zst").write_bytes(packer.compress(plain[:5000]) + packer.compress(plain[5000:]))
    (tmp_path / "e.jsonl").write_bytes(b"\xef\xbb\xbf" + plain)  # a byte order mark
    for path in sorted(tmp_path.iterdir()):
        out = tmp_path / f"out_{path.name}"
        build(monkeypatch, "--files", path, "--out", out, "--workers", 1)
        assert np.array_equal(tokens(out), expected(texts)), path


def test_folders_are_read_in_sorted_order(tmp_path, monkeypatch):
    for name in ("b/z.txt", "b/a.md", "a.py", "c.txt.gz", "skipped.csv", ".hidden/x.txt", "__pycache__/x.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        data = f"this is {name}\r\n".encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    (tmp_path / "b/empty.txt").touch()
    build(monkeypatch, "--files", tmp_path, "--out", tmp_path / "out", "--workers", 1)
    order = ["a.py", "b/a.md", "b/z.txt", "c.txt.gz"]
    assert np.array_equal(tokens(tmp_path / "out"), expected([f"this is {name}\r\n" for name in order]))
    assert meta(tmp_path / "out")["documents"] == 4  # an empty file is no document


def test_column_blank_lines_and_null(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n\n{"body": null}\n{"body": ""}\n{"body": "two", "x": 1}')
    build(monkeypatch, "--files", tmp_path / "a.jsonl", "--column", "body", "--out", tmp_path / "out", "--workers", 1)
    assert np.array_equal(tokens(tmp_path / "out"), expected(["one", "two"]))


def test_bytes_tokenizer(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("to be\n漢 <|endoftext|>", encoding="utf-8")
    build(monkeypatch, "--files", tmp_path / "a.txt", "--tokenizer", "bytes", "--out", tmp_path / "out")
    assert tokens(tmp_path / "out").tolist() == [256, *"to be\n漢 <|endoftext|>".encode()]
    assert meta(tmp_path / "out")["vocab_size"] == 257


def test_long_texts_are_cut_without_changing_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb, "PIECE", 1000)
    texts = ["".join(prose(20)), "x" * 1500 + " " + "word  \n" * 1000, "漢 \n\n 字" * 500]
    for index, text in enumerate(texts):
        (tmp_path / f"{index}.txt").write_text(text, encoding="utf-8")
    pieces = [list(fineweb.split_text([text])) for text in texts]
    assert all(len(piece) > 2 and max(len(text) for _, text in piece) <= 1000 for piece in pieces)
    assert [[first for first, _ in piece].count(True) for piece in pieces] == [1, 1, 1]
    build(monkeypatch, "--files", tmp_path, "--out", tmp_path / "out", "--workers", 1)
    got, want = tokens(tmp_path / "out"), expected(texts)
    # Only the 1500 letters without a space are cut where they stand, which costs at most a token or two there.
    assert get_tokenizer("gpt2").decode(got) == get_tokenizer("gpt2").decode(want)
    assert np.array_equal(got[: len(expected(texts[:1]))], expected(texts[:1]))
    assert np.array_equal(got[-len(expected(texts[2:])) :], expected(texts[2:]))


def test_chunks_of_a_file_make_no_difference():
    text = "".join(prose(300)) * 20
    assert len(text) > fineweb.PIECE
    whole = list(fineweb.split_text([text]))
    assert whole == list(fineweb.split_text(text[i : i + 77_777] for i in range(0, len(text), 77_777)))
    assert "".join(piece for _, piece in whole) == text


@pytest.mark.slow
def test_a_long_document_takes_linear_time(tmp_path):
    """32 MB as one line take as long as in 32 lines. Copying the rest at each block would take 15 times longer."""
    word, paths = "some words and " * 70_000, {"one": tmp_path / "one.jsonl", "many": tmp_path / "many.jsonl"}
    write_jsonl(paths["one"], [word * 32])
    write_jsonl(paths["many"], [word] * 32)

    def seconds(path):
        began = time.process_time()
        pieces = [piece for chunks in textfiles.read_jsonl(path, "text") for piece in fineweb.split_text(chunks)]
        assert sum(len(text) for _, text in pieces) == 32 * len(word)
        return time.process_time() - began

    assert min(seconds(paths["one"]) for _ in range(3)) < 4 * min(seconds(paths["many"]) for _ in range(3))


def test_lines_across_blocks(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    for size in (1, 2, 3, 7):
        monkeypatch.setattr(textfiles, "BLOCK", size)
        for data in (b"", b"\n", b"ab\ncde\n\nf", b"abcdefgh\n", b"\n\nab"):
            path.write_bytes(data)
            assert list(textfiles.read_lines(path)) == data.removesuffix(b"\n").split(b"\n") * bool(data)


def test_a_small_zst_that_unpacks_to_much_comes_in_small_blocks(tmp_path):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(bytes(100 << 20)))
    assert path.stat().st_size < 10_000
    sizes = [len(block) for block in textfiles.read_blocks(path)]
    assert sum(sizes) == 100 << 20 and max(sizes) < 34 << 20


def test_character_across_blocks(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * ((1 << 20) - 1) + "漢".encode())
    assert "".join(textfiles.read_text(path)).endswith("a漢")


# Shards


@pytest.mark.slow
def test_shard_sizes_and_val_fraction(tmp_path, monkeypatch):
    texts = prose(400)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    flags = ("--files", path, "--workers", 1)
    build(monkeypatch, *flags, "--out", tmp_path / "whole", "--shard_size", 10_000, "--val_fraction", 0)
    whole = meta(tmp_path / "whole")["shards"]
    assert [s["tokens"] for s in whole[:-1]] == [10_000] * (len(whole) - 1) and 0 < whole[-1]["tokens"] <= 10_000
    assert [s["file"] for s in whole[:3]] == [f"shard_{n}.npy" for n in ("val_000000", "train_000001", "train_000002")]
    assert np.array_equal(tokens(tmp_path / "whole"), expected(texts))

    for fraction in (None, 0.1, 0.3):
        out = tmp_path / f"part_{fraction}"
        build(monkeypatch, *flags, "--out", out, *(("--val_fraction", fraction) if fraction else ()))
        about = meta(out)
        assert len(about["shards"]) == 2
        assert about["shards"][0]["tokens"] / about["tokens"] == pytest.approx(fraction or 0.05, rel=0.05)
        assert np.array_equal(tokens(out), expected(texts))

    build(monkeypatch, *flags, "--out", tmp_path / "most", "--shard_size", 1000, "--val_fraction", 0.5)
    assert meta(tmp_path / "most")["shards"][0]["tokens"] == 1000  # never more than a shard


@pytest.mark.slow
def test_max_tokens(tmp_path, monkeypatch):
    texts = prose(300)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    for most, size in ((12_345, 5_000), (10_000, 5_000), (12_345, 100_000)):
        out = tmp_path / f"{most}_{size}"
        build(monkeypatch, "--files", path, "--out", out, "--max_tokens", most, "--shard_size", size, "--workers", 2)
        assert np.array_equal(tokens(out), expected(texts)[:most])


def test_one_document_makes_val_and_train(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("".join(prose(50)), encoding="utf-8")
    build(monkeypatch, "--files", tmp_path / "a.txt", "--out", tmp_path / "out", "--val_fraction", 0.1)
    val, train = (shard["tokens"] for shard in meta(tmp_path / "out")["shards"])
    assert val / (val + train) == pytest.approx(0.1, rel=0.01)


@pytest.mark.slow
def test_workers_make_no_difference(tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb, "PIECE", 20_000)  # so that there are many batches; the workers are forked
    path = write_jsonl(tmp_path / "a.jsonl", prose(1000))
    for workers in (1, 2, 3):
        out = tmp_path / str(workers)
        build(monkeypatch, "--files", path, "--out", out, "--workers", workers, "--shard_size", 30_000)
    assert len(contents(tmp_path / "1")) > 5
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")


@pytest.mark.slow
@pytest.mark.parametrize("platform, method", [("linux", "fork"), ("darwin", "spawn")])
def test_tokenize_in_order(platform, method, monkeypatch):
    """Workers are forked on Linux alone."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    asked, get_context = [], multiprocessing.get_context
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(multiprocessing, "get_context", lambda name: asked.append(name) or get_context(name))
    texts = prose(2000)
    parts = list(fineweb.tokenize(iter(texts), "gpt2", workers=2))
    assert asked[0] == method and all(part.dtype == np.uint16 for part in parts)
    assert np.array_equal(np.concatenate(parts), expected(texts))


def test_few_batches_wait():
    """However fast the source, only a few batches are read ahead: memory stays bounded."""
    ahead = []
    batches = ((i, [(True, "x")]) for i in range(100) if ahead.append(i) is None)
    stream = fineweb.encode_batches(batches, "bytes", 2)
    next(stream)
    assert len(ahead) <= 6
    stream.close()


@pytest.fixture(scope="module")
def stdlib_shards(tmp_path_factory):
    out = tmp_path_factory.mktemp("stdlib") / "out"
    flags = ("--stdlib", "--tokenizer", "bytes", "--shard_size", 200_000, "--max_tokens", 10_000_000)
    done = run(*flags, "--out", out)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return out, flags


def test_two_at_once_are_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("some text " * 100)
    with lock(tmp_path / "out", ""):
        message = refused(monkeypatch, "--files", tmp_path / "a.txt", "--tokenizer", "bytes", "--out", tmp_path / "out")
    assert "is being written by process" in message and "another --out" in message


@pytest.mark.slow
def test_stdlib(stdlib_shards):
    out, _ = stdlib_shards
    data = tokens(out)
    first = sorted(p for p in Path(os.__file__).parent.glob("*.py") if p.stat().st_size)[0]
    text = first.read_bytes()
    assert data[0] == 256 and bytes(data[1 : 1 + len(text)].astype(np.uint8)) == text
    assert len(data) == 10_000_000 and meta(out)["source"]["kind"] == "stdlib"


def test_the_command_printed_trains_on_the_shards(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("some text " * 100)
    out = tmp_path / "two words"
    flags = ("--files", tmp_path / "a.txt", "--out", out)
    for tokenizer, vocab_size in (("bytes", 257), ("gpt2", None)):
        for _ in range(2):  # a complete folder prints it too
            build(monkeypatch, *flags, "--tokenizer", tokenizer)
            words = shlex.split(capsys.readouterr().out.split("train with: ")[1])
        assert words[:4] == ["python", "train_single_gpu.py", "--data_root", str(out)]
        assert words[4:] == (["--vocab_size", str(vocab_size)] if vocab_size else [])
        DataLoader(words[3], "train", 2, 8, **({"vocab_size": vocab_size} if vocab_size else {}))
        shutil.rmtree(out)


@pytest.mark.slow
def test_names_that_are_not_utf8(tmp_path):
    """Also where stdout takes nothing but UTF-8."""
    source, out = os.fsencode(tmp_path) + b"/caf\xe9.txt", os.fsencode(tmp_path) + b"/out\xff"
    Path(os.fsdecode(source)).write_text("some text " * 100)
    words = [*map(os.fsencode, command("--tokenizer", "bytes", "--workers", 1)), b"--files", source, b"--out", out]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=600, env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    )
    assert done.returncode == 0 and not done.stderr and "out\\udcff: 2 shards" in done.stdout, done.stderr
    assert len(tokens(Path(os.fsdecode(out)))) == 1001


# Resuming


def wait_for(condition, process, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "finished before it was killed: make the test's text longer"
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.slow
def test_killed_and_started_again(tmp_path, stdlib_shards):
    """Killed or interrupted after some more shards each time; the result is that of a whole run, byte for byte."""
    whole, flags = stdlib_shards
    out = tmp_path / "out"
    children = []
    for shards, how in ((1, signal.SIGKILL), (20, signal.SIGINT), (21, signal.SIGINT), (40, signal.SIGKILL)):
        process = subprocess.Popen(
            command(*flags, "--out", out, "--workers", 2), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        wait_for(lambda want=shards: len(list(out.glob("*.npy"))) >= want, process)
        children += child_ids(process.pid)
        process.send_signal(how)
        _, stderr = process.communicate(timeout=600)
        assert process.returncode == (130 if how == signal.SIGINT else -how) and not stderr
        assert meta(out)["complete"] is False
    end = time.monotonic() + 600
    while any(map(alive, children)):  # no worker outlives its parent
        assert time.monotonic() < end
        time.sleep(0.05)
    done = run(*flags, "--out", out, "--workers", 3)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(whole)


def child_ids(pid):
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class Stop(Exception):
    pass


def stop_after(monkeypatch, shards):
    """Let the script die right after it wrote that many shards, before meta.json lists the last."""
    write_npy = fineweb.write_npy
    left = [shards]

    def write_and_die(out, index, tokens):
        entry = write_npy(out, index, tokens)
        left[0] -= 1
        if not left[0]:
            raise Stop
        return entry

    monkeypatch.setattr(fineweb, "write_npy", write_and_die)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text", "dataset"])
def test_resume_at_every_shard(tmp_path, monkeypatch, kind):
    """Also where a shard ends within a document, exactly at one, and after the last shard of all."""
    monkeypatch.setattr(fineweb, "PIECE", 3000)
    texts = prose(150)
    if kind == "dataset":
        for part in range(3):
            write_parquet(tmp_path / f"data/train-{part}.parquet", texts[part * 50 : part * 50 + 50])
        flags = ("--dataset", tmp_path / "data", "--max_tokens", 20_000)
    elif kind == "parquet":
        flags = ("--files", write_parquet(tmp_path / "a.parquet", texts))
    elif kind == "jsonl":
        flags = ("--files", write_jsonl(tmp_path / "a.jsonl", texts))
    else:
        (tmp_path / "a.txt").write_text("".join(texts), encoding="utf-8")
        flags = ("--files", tmp_path / "a.txt")
    flags = (*flags, "--workers", 1, "--shard_size", 2500, "--val_fraction", 0.1)
    build(monkeypatch, *flags, "--out", tmp_path / "whole")
    count = len(meta(tmp_path / "whole")["shards"])
    assert count > 6
    for every in (1, 2, 3):  # shards that each attempt gets done
        out = tmp_path / f"again_{every}"
        for _ in range(2 * count):
            with monkeypatch.context() as patch:
                stop_after(patch, every + 1)
                try:
                    build(patch, *flags, "--out", out)
                    break
                except Stop:
                    continue
        assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_finished_folder_is_left_alone(tmp_path, stdlib_shards):
    out, flags = stdlib_shards
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    done = run(*flags, "--out", out, "--workers", 1)
    assert done.returncode == 0 and "is complete" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.mark.slow
def test_other_settings_are_refused(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", prose(50))
    flags = ("--files", path, "--out", tmp_path / "out", "--shard_size", 5000)
    build(monkeypatch, *flags)
    assert "tokenizer gpt2, not bytes" in refused(monkeypatch, *flags, "--tokenizer", "bytes")
    assert "shard_size 5000, not 4000" in refused(monkeypatch, *flags[:-1], 4000)
    assert "max_tokens" in refused(monkeypatch, *flags, "--max_tokens", 3000)
    assert "val_fraction" in refused(monkeypatch, *flags, "--val_fraction", 0.2)
    assert "kind files, not stdlib" in refused(monkeypatch, "--stdlib", *flags[2:])
    path.write_text(path.read_text() + '{"text": "more"}\n')
    assert "other text" in refused(monkeypatch, *flags)
    assert "--out" in refused(monkeypatch, *flags)


def test_damaged_or_foreign_folders_are_refused(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", prose(50))
    out = tmp_path / "out"
    flags = ("--files", path, "--out", out)
    build(monkeypatch, *flags)
    train = out / "shard_train_000001.npy"
    train.rename(tmp_path / "kept")
    assert f"{train}: No such file" in refused(monkeypatch, *flags)
    (tmp_path / "kept").rename(train)
    whole = train.read_bytes()
    train.write_bytes(whole[:-2])
    assert f"{train}: not a whole .npy file" in refused(monkeypatch, *flags)
    train.write_bytes(whole)
    for text, says in (("{", "not a readable meta.json"), ("[]", "not a readable"), ("{}", "not written by fineweb")):
        (out / "meta.json").write_text(text)
        assert says in refused(monkeypatch, *flags)
    (out / "meta.json").unlink()
    assert "unknown origin" in refused(monkeypatch, *flags)


# Data sets


@pytest.mark.slow
def test_local_dataset(tmp_path, stdlib_shards):
    """`datasets` itself, streaming parquet files with FineWeb's columns."""
    texts = prose(300)
    for part in range(3):
        write_parquet(tmp_path / f"edu/train-{part}.parquet", texts[part * 100 : part * 100 + 100])
    flags = ("--dataset", tmp_path / "edu", "--max_tokens", 30_000, "--shard_size", 10_000, "--workers", 2)
    done = run(*flags, "--out", tmp_path / "out", env=DATASETS_HOME)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert np.array_equal(tokens(tmp_path / "out"), expected(texts)[:30_000])
    assert [s["tokens"] for s in meta(tmp_path / "out")["shards"]] == [10_000] * 3
    source = {"kind": "dataset", "dataset": str(tmp_path / "edu"), "config": None, "split": "train", "column": "text"}
    assert meta(tmp_path / "out")["source"] == source


@pytest.mark.slow
def test_bad_datasets(tmp_path, monkeypatch):
    write_parquet(tmp_path / "edu/train-0.parquet", prose(10))
    flags = ("--dataset", tmp_path / "edu", "--out", tmp_path / "out", "--workers", 1)
    assert "--column is one of: text, id" in refused(monkeypatch, *flags, "--column", "content")
    assert "not text" in refused(monkeypatch, *flags, "--column", "token_count")
    assert "zzz" in refused(monkeypatch, *flags, "--split", "zzz")
    assert "ccc" in refused(monkeypatch, *flags, "--config", "ccc")
    assert "leave nothing to train on" in refused(monkeypatch, *flags)
    assert "needs --max_tokens" in refused(monkeypatch, *flags, "--val_fraction", 0.1)
    (tmp_path / "edu/train-0.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    assert "edu" in refused(monkeypatch, *flags)


OFFLINE, UNREACHABLE = {"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, env",
    [((), OFFLINE), (("--dataset", "nobody/nothing"), UNREACHABLE), (("--pretokenized", "a/b"), UNREACHABLE)],
)
def test_no_network(tmp_path, flags, env):
    done = run(*flags, "--out", tmp_path / "out", env={**env, "HF_HOME": str(tmp_path / "hf")})
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "--files" in done.stderr and "--stdlib" in done.stderr
    assert not (tmp_path / "out").exists()


def bin_shard(path, values):
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, len(values)
    path.write_bytes(header.tobytes() + np.array(values, dtype=np.uint16).tobytes())


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """A repository of ready shards; only the two calls that need the network are replaced."""
    import huggingface_hub

    repository = tmp_path / "hub"
    repository.mkdir()
    names = ["finewebedu_val_000000.bin", *(f"finewebedu_train_{i:06d}.bin" for i in range(1, 6))]
    for i, name in enumerate(names):
        bin_shard(repository / name, [50256, i, i, 50256, 7])
    entries = [dataclasses.make_dataclass("E", ["rfilename"])(n) for n in (*reversed(names), "README.md")]
    info = dataclasses.make_dataclass("I", ["siblings", "sha"])(entries, "abc")
    fetched = []

    def download(repo, name, *, repo_type, revision, local_dir):
        assert (repo, repo_type, revision) == ("kjj0/finewebedu10B-gpt2", "dataset", "abc")
        fetched.append(name)
        (Path(local_dir) / name).write_bytes((repository / name).read_bytes())

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return repository, names, fetched


def test_pretokenized(tmp_path, monkeypatch, fake_hub):
    repository, names, fetched = fake_hub
    flags = ("--pretokenized", "kjj0/finewebedu10B-gpt2", "--out", tmp_path / "out", "--max_tokens", 250_000_000)
    build(monkeypatch, *flags)
    assert fetched == names[:3]  # 1 val + 2 train at 100M each
    assert all((tmp_path / "out" / name).read_bytes() == (repository / name).read_bytes() for name in fetched)
    about = meta(tmp_path / "out")
    assert (about["tokens"], about["documents"], about["complete"]) == (15, 6, True)
    assert about["shards"][1]["sha256"] == hashlib.sha256((repository / names[1]).read_bytes()).hexdigest()
    build(monkeypatch, *flags)
    assert len(fetched) == 3  # complete: nothing is fetched again


def test_pretokenized_all_and_damaged(tmp_path, monkeypatch, fake_hub):
    repository, names, fetched = fake_hub
    flags = ("--pretokenized", "kjj0/finewebedu10B-gpt2", "--out", tmp_path / "out")
    build(monkeypatch, *flags)
    assert fetched == names
    (repository / names[2]).write_bytes(b"not a shard")
    with pytest.raises(UserError, match=f"{names[2]}: begins neither"):
        build(monkeypatch, *flags[:-1], tmp_path / "other")


# Bad input


def bad_files(tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", prose(40)).read_bytes()
    packed = {"cut.jsonl.gz": gzip.compress(good), "cut.jsonl.zst": zstandard.compress(good)}
    write_parquet(tmp_path / "good.parquet", prose(40))
    parquet = (tmp_path / "good.parquet").read_bytes()
    yield from ((name, data[:-20], "cannot be read") for name, data in packed.items())
    yield "bad.txt.gz", b"not gzip at all", "cannot be read"
    yield "bad.txt.zst", b"not zstd at all", "cannot be read"
    yield "crc.txt.gz", gzip.compress(b"x" * 1000)[:-8] + bytes(8), "cannot be read"
    yield "empty.txt.gz", b"", "cannot be read: the file is empty"
    yield "empty.txt.zst", b"", "cannot be read: the file is empty"
    yield "empty.txt", b"", "there is no text"
    yield "tiny.txt", b"hi", "the text has 2 tokens"
    yield "empty.jsonl", b"\n\n", "there is no text"
    yield "latin.txt", b"caf\xe9 au lait", "latin.txt is not UTF-8: byte 3"
    yield "late.txt", b"x" * ((1 << 20) + 5) + b"\xff", f"byte {(1 << 20) + 5}"
    yield "half.txt", "漢".encode()[:2], "half.txt is not UTF-8: byte 0"
    yield "latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "byte 24 (line 2)"
    yield "marked.jsonl", b"\xef\xbb\xbf" + b'{"text": "\xe9"}\n', "byte 13 (line 1)"
    yield "broken.jsonl", b'{"text": "a"}\n{"text": \n', "broken.jsonl line 2 is not JSON"
    yield "list.jsonl", b"[1, 2]\n", "line 1 is not a JSON object"
    yield "column.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2: no column 'text'; --column is one of: body"
    yield "number.jsonl", b'{"text": 5}\n', "holds int, not text"
    yield "bad.parquet", b"not parquet", "cannot be read"
    yield "empty.parquet", b"", "cannot be read"
    yield "holes.parquet", parquet[:100] + bytes(400) + parquet[500:], "holes.parquet"
    yield "good.parquet.gz", gzip.compress(parquet), "not one of"
    yield "data.csv", b"text\na\n", "not one of"


def test_bad_files(tmp_path, monkeypatch):
    """Good text comes first, so that a shard could have been written when the bad file is reached."""
    good = tmp_path / "good.txt"
    good.write_text("".join(prose(20)), encoding="utf-8")
    for name, data, says in list(bad_files(tmp_path)):
        (tmp_path / name).write_bytes(data)
        alone = "no text" in says or "tokens" in says
        first = () if alone else (good,)
        flags = ("--files", *first, tmp_path / name, "--out", tmp_path / "out", "--shard_size", 100, "--workers", 1)
        message = refused(monkeypatch, *flags)
        assert says in message and (alone or name in message), (name, message)


def test_parquet_that_is_not_utf8(tmp_path, monkeypatch):
    raw = pa.array([b"fine", b"caf\xe9"], type=pa.binary())
    pq.write_table(pa.table({"text": raw.view(pa.string())}), tmp_path / "a.parquet")
    assert "byte 3 of row 1" in refused(monkeypatch, "--files", tmp_path / "a.parquet", "--out", tmp_path / "out")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "b.parquet")
    assert "one of: body" in refused(monkeypatch, "--files", tmp_path / "b.parquet", "--out", tmp_path / "out")


@pytest.mark.slow
def test_disk_full(tmp_path, monkeypatch):
    """A limit on file size stands in for the full disk: it fails in the same place, a write, with an OSError."""
    path = write_jsonl(tmp_path / "a.jsonl", prose(400))
    flags = ("--files", path, "--out", tmp_path / "out", "--shard_size", 20_000, "--workers", 1)
    limit = (20_000, resource.RLIM_INFINITY)
    done = run(*flags, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "start again" in done.stderr, done.stderr
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"meta.json", "shard_val_000000.npy"}  # the val shard is small enough, and whole
    build(monkeypatch, *flags)
    build(monkeypatch, *flags[:3], tmp_path / "whole", *flags[4:])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
