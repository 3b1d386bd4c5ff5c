"""Wrong inputs of every script, one per kind of mistake: exit code 2, a message that names the remedy, no traceback,
and nothing left behind."""

import contextlib
import importlib
import io
import json
import shlex
import sys

import pytest
import torch
from conftest import flags, tiny, write_shards

from lab import common

pytestmark = pytest.mark.slow
TRAIN = "train_single_gpu " + shlex.join(flags(tiny(data_root="words", n_embd=16)))

ROWS = [
    # the command line: tyro's own words
    (f"{TRAIN} --n_expp 3", "--n_exp"), (f"{TRAIN} stray", "stray"), (f"{TRAIN} --max_lr fast", "max_lr"),
    (f"{TRAIN} --gate relu", "relu"), (f"{TRAIN} --B", "--B"), ("fineweb --frobnicate", "frobnicate"),
    # a value outside its range, nan, a contradiction
    (f"{TRAIN} --B 0", "B must be at least 1"), (f"{TRAIN} --max_lr nan", "max_lr must be"),
    (f"{TRAIN} --beta2 1", "beta2 must be"), (f"{TRAIN} --grad_clip 0", "grad_clip must be above 0"),
    (f"{TRAIN} --n_exp 2 --top_k 3", "top_k 3 is more"), (f"{TRAIN} --n_embd 30 --n_head 4", "not divisible"),
    (f"{TRAIN} --total_batch_size 1000", "nearest is --total_batch_size 1024"), (f"{TRAIN} --fsdp", "torchrun"),
    (f"{TRAIN} --block_size 16", "lower it"), (f"{TRAIN} --use_bias_balance --use_quantile_balance", "choose one"),
    (f"{TRAIN} --vocab_size 100", "vocab_size"), (f"{TRAIN} --first_dense 2", "leaves no MoE layer"),
    # devices
    (f"{TRAIN} --device cuda:77", "--device cpu"), (f"{TRAIN} --device gpu", "--device cpu"),
    # data that is not there, damaged, or too short
    (f"{TRAIN} --data_root nowhere", "fineweb.py"), (f"{TRAIN} --data_root empty", "no train shards"),
    (f"{TRAIN} --data_root cut", "cut"), (f"{TRAIN} --T 7000 --B 1 --total_batch_size 7000", "--T"),
    # runs and checkpoints that are not there, of somebody else, or damaged
    (f"{TRAIN} --resume nowhere", "nowhere"), (f"{TRAIN} --resume empty", "config.json"),
    (f"{TRAIN} --init_from nowhere/at/all", "nowhere/at/all"), (f"{TRAIN} --init_from foreign.pt", "foreign.pt"),
    ("sample --checkpoint absent.pt", "absent.pt"), ("sample --checkpoint empty", "empty"),
    ("sample --checkpoint foreign.pt", "foreign.pt"), ("sample", "--checkpoint"),
    ("sample --temperature -1", "temperature"),
    ("hellaswag --checkpoint payload.pt", "payload.pt"), ("weights --checkpoint torn.pt --export_hf out", "torn.pt"),
    ("routes --checkpoint empty --out out", "empty"),
    # text
    ("fineweb --files nowhere.txt --out out", "nowhere.txt"), ("fineweb --files bad.jsonl --out out", "bad.jsonl"),
    ("fineweb --files a.txt --out words", "words"), ("fineweb --stdlib --files a.txt", "give one"),
    ("fineweb --files latin1.txt --out out", "iconv"), ("fineweb --stdlib --shard_size 0", "shard_size"),
    # sweeps and tables
    ("sweep --variants mooe", "mooe"), ("sweep --variants no_moe --n_expp 3", "n_exp"),
    ("compare nowhere", "nowhere"), ("doctor nowhere", "nowhere"), ("compare empty", "empty"),
]


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """A folder with everything that the rows name."""
    folder = tmp_path_factory.mktemp("wrong")
    write_shards(folder / "words")
    (folder / "empty").mkdir()
    write_shards(folder / "cut")
    data = (folder / "cut/words_train_000001.npy").read_bytes()
    (folder / "cut/words_train_000001.npy").write_bytes(data[:-99])
    torch.save({"weights": torch.zeros(3)}, folder / "foreign.pt")
    (folder / "torn.pt").write_bytes((folder / "foreign.pt").read_bytes()[:200])
    torch.save({"format": 3, "model": Payload()}, folder / "payload.pt")
    (folder / "latin1.txt").write_bytes("caf\xe9 ".encode("latin-1") * 99)
    (folder / "bad.jsonl").write_text('{"text": "one"}\nnot json\n')
    (folder / "a.txt").write_text(json.dumps("some text of some length") * 99)
    return folder


class Payload:
    """Unpickled, it would end the process with 99."""

    def __reduce__(self):
        return sys.exit, (99,)


@pytest.mark.parametrize("line, said", ROWS, ids=[line.replace(TRAIN, "train") for line, _ in ROWS])
def test_a_wrong_input_is_exit_code_2_and_names_the_remedy(line, said, wrong, monkeypatch):
    monkeypatch.chdir(wrong)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    script, *words = shlex.split(line)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
    before, module, errors = sorted(wrong.rglob("*")), importlib.import_module(script), io.StringIO()
    quiet = contextlib.redirect_stdout(io.StringIO())
    with quiet, contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as end:
        common.run(module.main)
    message = errors.getvalue()
    assert end.value.code == 2, message
    assert said in message and "Traceback" not in message, message
    assert sorted(wrong.rglob("*")) == before, "something is left behind"
