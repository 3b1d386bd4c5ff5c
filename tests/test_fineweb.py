"""Text -> shards: the tokenizers, every kind of file, order, sizes, resuming after a kill, wrong input."""

import contextlib
import gzip
import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import zstandard
from conftest import ROOT, run_script

import fineweb
from lab.common import UserError
from lab.tokenizer import get_tokenizer, token_bytes

PROSE = (Path(__file__).parent / "data/prose_200kB.txt").read_text("utf-8")
ODD = "ab1ſ \n\t'  s'll don't\r\n\x0b\x85\xa0\u1680\u200a\u3000é漢ẓ̂😀=._-\u200b\ufeff\x00<|endoftext|>"


def build(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["fineweb.py", *map(str, words)])
    fineweb.main()


def read(out):
    """(tokens in order, meta.json), after checking meta.json against every shard."""
    meta = json.loads((out / "meta.json").read_text())
    arrays = [np.load(out / shard["file"]) for shard in meta["shards"]]
    for shard, array in zip(meta["shards"], arrays, strict=True):
        assert array.dtype == np.uint16 and array.ndim == 1 and len(array) == shard["tokens"]
        assert hashlib.sha256((out / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
    tokens = np.concatenate(arrays)
    assert meta["complete"] and meta["tokens"] == len(tokens) and list(tokens).count(meta["eot"]) == meta["documents"]
    assert {path.name for path in out.iterdir()} == {"meta.json", *(shard["file"] for shard in meta["shards"])}
    return tokens.tolist(), meta


def expected(texts, name="gpt2"):
    tokenizer = get_tokenizer(name)
    return [token for text in texts for token in (tokenizer.eot, *tokenizer.encode_ordinary(text))]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def prose(count, seed=0):
    """Documents of made-up words, none of them empty."""
    draw = random.Random(seed)
    words = ["the", "cat", " sat", "it's", "\n\n", "漢字", "42", "Émile", "<|endoftext|>", "   ", "def f():\n  pass\n"]
    return [" ".join(draw.choices(words, k=draw.randrange(20, 200))) + f" {i}" for i in range(count)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["gpt2", "gpt2:4096", "bytes"])
def test_round_trip_of_any_text(name):
    tokenizer, lengths = get_tokenizer(name), token_bytes(name)
    assert lengths.shape == (tokenizer.vocab_size,) and lengths[tokenizer.eot] == 0
    for text in (PROSE[:20_000], ODD, "".join(map(chr, range(256))), "", " "):
        ids = tokenizer.encode_ordinary(text)
        assert tokenizer.decode(ids) == text and tokenizer.decode_bytes(ids) == text.encode()
        assert all(token < tokenizer.eot for token in ids) and lengths[ids].sum() == len(text.encode())
    assert tokenizer.decode(tokenizer.encode_ordinary("a\ud83d b")) == "a\ufffd b"  # a lone surrogate
    assert tokenizer.decode([65, 50303]).endswith("\ufffd")  # of the padding, which an untrained model samples
    assert token_bytes(name, 300).tolist() == [*lengths[:300], *[0] * (300 - len(lengths))]


def test_names_of_tokenizers():
    assert get_tokenizer("gpt2").encode_ordinary("Hello world") == [15496, 995]
    assert [get_tokenizer(name).eot for name in ("gpt2", "gpt2:257", "gpt2:4096", "bytes")] == [50256, 256, 4095, 256]
    assert get_tokenizer("unknown") is None and token_bytes("unknown", 9).tolist() == [0] * 9
    for name in ("gpt4", "gpt2:256", "gpt2:50258"):
        with pytest.raises(UserError, match="use gpt2, gpt2:N"):
            get_tokenizer(name)


@pytest.mark.slow
def test_every_kind_of_file_gives_the_same_tokens(tmp_path, monkeypatch):
    texts = prose(40)
    plain = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(42), "text": [*texts, None, ""]}), tmp_path / "b[1].parquet")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(plain))
    packer = zstandard.ZstdCompressor()  # two frames, as parallel compressors write them
    (tmp_path / "d.jsonl.zst").write_bytes(packer.compress(plain[:5000]) + packer.compress(plain[5000:]))
    (tmp_path / "e.jsonl").write_bytes(b"\xef\xbb\xbf" + plain + b'\n{"text": null}\n{"text": "", "new": [1]}\n')
    paths = sorted(tmp_path.iterdir())
    for number, given in enumerate([*([path] for path in paths), paths[::-1]]):
        build(monkeypatch, "--files", *given, "--out", tmp_path / "out" / str(number), "--workers", 1)
        assert read(tmp_path / "out" / str(number))[0] == expected(texts) * len(given), given


def test_folders_are_read_in_sorted_order(tmp_path, monkeypatch, capsys):
    """Hidden files and other kinds are left out, a byte-order mark is dropped, \\r\\n stays and is noted once."""
    for name in ("b/z.txt", "b/a.md", "a.py", "c.txt.gz", "skipped.csv", ".hidden/x.txt", "__pycache__/x.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        data = b"\xef\xbb\xbf" + f"this is {name}\r\n".encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    build(monkeypatch, "--files", tmp_path, "--out", tmp_path / "out", "--workers", 1)
    tokens, meta = read(tmp_path / "out")
    assert tokens == expected([f"this is {name}\r\n" for name in ("a.py", "b/a.md", "b/z.txt", "c.txt.gz")])
    assert meta["documents"] == 4 and capsys.readouterr().out.count("4 lines end in \\r\\n") == 1


@pytest.mark.slow
def test_long_texts_are_cut_without_changing_tokens(tmp_path, monkeypatch):
    texts = [PROSE * 4, PROSE * 2 + " " * 300_000 + "x" + "\n" * 300_000, "漢 \n\n 字" * 100_000]
    for number, text in enumerate(texts):
        assert 1 < len(text) / fineweb.SIZE <= len(fineweb.PIECES.findall(text))
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8", newline="")
    build(monkeypatch, "--files", tmp_path, "--out", tmp_path / "out", "--workers", 2)
    assert read(tmp_path / "out")[0] == expected(texts)


def test_sizes_of_shards(tmp_path, monkeypatch):
    path, total = write_jsonl(tmp_path / "a.jsonl", prose(200)), len(expected(prose(200)))
    whole = [5000] * (total // 5000) + [total % 5000]
    for flag, value, sizes in (("--val_fraction", 0, whole), ("--max_tokens", 12_345, [617, 5000, 5000, 1728])):
        build(monkeypatch, "--files", path, "--out", tmp_path / flag, "--workers", 1, "--shard_size", 5000, flag, value)
        tokens, meta = read(tmp_path / flag)
        assert tokens == expected(prose(200))[: sum(sizes)] and [shard["tokens"] for shard in meta["shards"]] == sizes
    build(monkeypatch, "--files", path, "--out", tmp_path / "out", "--workers", 1, "--val_fraction", 0.3)
    assert read(tmp_path / "out")[1]["shards"][0]["tokens"] == pytest.approx(0.3 * total, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["files", "dataset"])
def test_continue_after_every_shard(tmp_path, monkeypatch, kind):
    """Stopped before meta.json lists the new shard, within a document or at its end: the bytes are those of one run."""
    monkeypatch.setattr(fineweb, "SIZE", 3000)  # of a batch
    (tmp_path / "set").mkdir()
    for name, text in (("a", prose(30)), ("b", ["".join(prose(30, seed=1))])):
        write_jsonl(tmp_path / f"set/{name}.jsonl", text)
    flags = (f"--{kind}", tmp_path / "set", "--workers", 1, "--shard_size", 1100, "--max_tokens", 9000)
    build(monkeypatch, *flags, "--out", tmp_path / "whole")
    dump, stopped = json.dump, set()

    def stop(meta, *args, **options):
        if len(meta["shards"]) not in stopped:
            stopped.add(len(meta["shards"]))
            raise KeyboardInterrupt
        dump(meta, *args, **options)

    monkeypatch.setattr(json, "dump", stop)
    for _ in contents(tmp_path / "whole"):
        with contextlib.suppress(KeyboardInterrupt):
            build(monkeypatch, *flags, "--out", tmp_path / "again")
    assert len(stopped) > 6 and contents(tmp_path / "again") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_killed_and_started_again_with_other_workers(tmp_path):
    (tmp_path / "a.txt").write_text(PROSE * 10, encoding="utf-8")
    flags = ("--files", tmp_path / "a.txt", "--tokenizer", "bytes", "--shard_size", 30_000, "--out")
    run_script("fineweb.py", *flags, tmp_path / "whole", "--workers", 3, check=0)
    command = [sys.executable, ROOT / "fineweb.py", *map(str, flags), tmp_path / "out", "--workers", "2"]
    for count, how in ((1, signal.SIGKILL), (20, signal.SIGINT), (40, signal.SIGKILL)):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        while len(list(tmp_path.glob("out/*.npy"))) < count:
            assert process.poll() is None, "it ended before it was killed: use more text"
            time.sleep(0.002)
        process.send_signal(how)
        stderr = process.communicate()[1]  # ends when the workers have ended too: they share the pipe
        assert process.returncode == (130 if how == signal.SIGINT else -how) and not stderr
    run_script("fineweb.py", *flags, tmp_path / "out", "--workers", 1, check=0)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_stdlib_and_the_next_command(tmp_path):
    flags = ("--stdlib", "--tokenizer", "gpt2:4096", "--max_tokens", 9000, "--out", tmp_path / "two words")
    done = run_script("fineweb.py", *flags, check=0)
    assert f"train_single_gpu.py --data_root '{tmp_path / 'two words'}' --vocab_size 4096" in done.stdout
    assert len(read(tmp_path / "two words")[0]) == 9000


def test_ready_shards(tmp_path, monkeypatch):
    def download(repository, repo_type, allow_patterns, local_dir):
        assert allow_patterns == ["*_val_*.bin", "*_train_000001.bin", "*_train_000002.bin"]
        shard = np.array([20240520, 1, 2, *[0] * 253, 50256 + (7 << 16)], np.int32)  # a header, then two tokens
        for name in ("x_val_000000.bin", "x_train_000001.bin", "x_train_000002.bin"):
            shard.tofile(local_dir / name)

    monkeypatch.setattr(fineweb.huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(fineweb.huggingface_hub.HfApi, "dataset_info", lambda *args, **options: None)
    build(monkeypatch, "--pretokenized", "a/b", "--out", tmp_path, "--max_tokens", 250_000_000)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert (meta["tokenizer"], meta["tokens"], meta["documents"], meta["complete"]) == ("gpt2", 6, 3, True)


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "cut.txt.zst", "latin.txt", "no.jsonl", "number.jsonl", "a.csv"])
def test_wrong_files_are_named_before_anything_is_written(tmp_path, monkeypatch, name):
    data = {"cut.jsonl.gz": gzip.compress(b'{"text": "a"}')[:-9], "cut.txt.zst": zstandard.compress(b"a" * 99)[:-5]}
    data |= {"latin.txt": b"caf\xe9", "no.jsonl": b'{"body": "b"}', "number.jsonl": b'{"text": 5}', "a.csv": b"a"}
    (tmp_path / "good.txt").write_text("good text " * 99)
    (tmp_path / name).write_bytes(data[name])
    with pytest.raises(UserError, match=name):
        build(monkeypatch, "--files", tmp_path / "good.txt", tmp_path / name, "--out", tmp_path / "out", "--workers", 1)
    assert not list(tmp_path.glob("out/*.npy"))


def test_other_settings_and_other_text_are_refused(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", prose(5))
    flags = ("--files", path, "--out", tmp_path / "out", "--workers", 1, "--tokenizer")
    build(monkeypatch, *flags, "bytes")
    for *more, words in (("bytes", "--max_tokens", 99, "settings"), ("gpt2", "tokenizer"), ("gpt2", "--stdlib", "two")):
        with pytest.raises(UserError, match=words):
            build(monkeypatch, *flags, *more)
    path.write_text(path.read_text() + '{"text": "more"}\n')
    with pytest.raises(UserError, match="other source"):
        build(monkeypatch, *flags, "bytes")


@pytest.mark.slow
def test_without_a_network_it_says_what_to_do_and_leaves_nothing(tmp_path):
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    done = run_script("fineweb.py", "--out", tmp_path / "out", env=env, check=2)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "--files, --stdlib" in done.stderr
    assert not (tmp_path / "out").exists()
