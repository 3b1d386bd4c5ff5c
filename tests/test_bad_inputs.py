"""Wrong inputs of every script: each is one line that names the remedy, exit code 2, and leaves no file behind."""

import contextlib
import dataclasses
import io
import json
import math
import os
import shlex
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, flags, write_shards

import demo
import fineweb
import hellaswag
import routes
import runlog
import sample
import sweep
import train_single_gpu
from bench import __main__ as bench
from lab import checkpoint, common
from model import GPT, GPTConfig

SHAPE = {"block_size": 16, "vocab_size": 257, "n_layer": 2, "n_head": 2, "n_embd": 8, "n_exp": 4}
TINY = shlex.join(flags(TINY_RUN | {"data_root": "words", "name": "x"}))

TRAIN = [
    ("--n_expp 3", "did you mean --n-exp"), ("--learning_rate 1", "did you mean --max_lr"), ("stray", "stray"),
    ("--max_lr fast", "--max-lr"), ("--gate relu", "relu"), ("--B", "--B"), ("--use_noisy_top_k yes", "yes"),
    ("--use_aux_loss=True", "switches are --flag and --no_flag"), ("--B 1.5", "--B"), ("--B 0", "--B must be at least"),
    ("--seed x", "--seed"), ("--min_lr x", "--min-lr"), ("--bias x", "Unrecognized options: x"),
    ("--T -1", "--T must be"), ("--total_batch_size 1000", "nearest is --total_batch_size 1024"),
    ("--total_batch_size 0", "total_batch_size must"), ("--n_exp 2 --top_k 3", "top_k 3"),
    ("--n_exp 0", "--n_exp must be"), ("--top_k 0", "--top_k must be"), ("--n_embd 30 --n_head 4", "not divisible"),
    ("--n_embd 0", "--n_embd must"), ("--n_layer 0", "--n_layer must"),
    ("--n_embd 100000000 --n_head 1", "GB are free"), ("--vocab_size 100000000000", "GB are free"),
    ("--n_exp 100000000", "GB are free"), ("--n_layer 100000000", "GB are free"),
    ("--vocab_size 100", "vocab_size 257"), ("--max_lr -1", "--max_lr must be"), ("--max_lr nan", "--max_lr must be"),
    ("--min_lr inf", "--min_lr must be"), ("--min_lr 1", "above --max_lr"),
    ("--train_capacity 0", "--train_capacity must"), ("--block_size 16", "lower --T"),
    ("--eval_capacity -1", "--eval_capacity must"), ("--min_capacity 0", "--min_capacity must"),
    ("--weight_decay nan", "--weight_decay must"), ("--max_steps 0", "--max_steps must"), ("--beta1 1", "--beta1 must"),
    ("--beta2 -0.1", "--beta2 must"), ("--grad_clip 0", "--grad_clip must"), ("--dropout 1.5", "--dropout must"),
    ("--val_loss_every -1", "--val_loss_every"), ("--hellaswag_every -5", "--hellaswag_every"), ("--seed -1", "--seed"),
    ("--seed 9223372036854775808", "--seed must"), ("--data_seed -1", "--data_seed"),
    ("--warmup_steps -1", "at least 0"), ("--stride 0", "--stride must"),
    ("--first_dense 2", "leaves no MoE layer: lower it"), ("--gate_scale 0", "gate_scale"),
    ("--expert_hidden wide", "expert-hidden"), ("--expert_hidden iso --top_k 3", "make it a whole number"),
    ("--use_bias_balance --use_quantile_balance", "choose one"), ("--n_shared_exp -1", "--n_shared_exp must"),
    ("--switch_tfm_init_scale 0", "switch_tfm_init_scale must"), ("--router_z_loss_weight -1", "weight must"),
    ("--aux_loss_weight inf", "--aux_loss_weight must"), ("--noise_scale -1", "--noise_scale must"),
    ("--decay_steps 5", "belongs to --schedule wsd"), ("--schedule wsd --decay_steps 99", "lower it"),
    ("--schedule wsd --decay_steps 5 --max_minutes 1", "leave one out"), ("--max_minutes 0", "--max_minutes must"),
    ("--muon_lr 0.1", "belongs to --optimizer muon"), ("--optimizer muon --max_lr 0", "a --max_lr above 0"),
    ("--optimizer sgd", "sgd"), ("--dtype float16", "float16"), ("--keep_checkpoints 0", "keep_checkpoints must"),
    ("--save_checkpoint_every 0", "save_checkpoint_every must"), ("--fsdp", "torchrun"), ("--progress loud", "loud"),
    ("--device cuda:77", "try --device auto"), ("--device gpu", "try --device auto"),
    ("--device meta", "--device auto"), ("--name a/b", "--name 'a/b' may hold only"),
    ("--run_id a_b", "--run_id 'a_b' may hold"), ("--run_id 'a b'", "--run_id 'a b' may hold"),
    ("--data_root nowhere", "python fineweb.py"), ("--data_root empty", "no train shards in empty"),
    ("--data_root file", "cannot read the folder file"), ("--data_root cut", "run its fineweb.py command again"),
    ("--data_root pickled", "Python objects"), ("--data_root meta", "not a readable meta.json"),
    ("--data_root deep", "RecursionError"), ("--data_root words --T 7000 --B 1 --total_batch_size 7000", "smaller --T"),
    ("--resume nowhere.pt", "no such file or folder; auto"), ("--resume foreign.pt", "is not a checkpoint"),
    ("--resume run", "copy a whole one there"), ("--resume empty", "no checkpoint"), ("--resume autoo", "auto takes"),
    ("--init_from nowhere/at/all", "give a checkpoint"), ("--init_from foreign.pt", "is not a checkpoint"),
    ("--init_from hf_torn", "config.json does not describe a model"),
    ("--init_from dense --n_layer 3 --T 16", "leave it out"),
    ("--init_from gpt2like --n_embd 8", "make shards with fineweb.py --tokenizer gpt2"),
    ("--init_from empty", "no checkpoint"), ("--init_from dense --n_embd 8", "more than the 16 positions"),
    ("--init_from run --n_embd 8 --n_exp 2 --T 8", "do not fit"),
    ("--hellaswag_data no.jsonl --hellaswag_every 5", "--hellaswag_data FILE"),
    ("--hellaswag_data bad.jsonl --hellaswag_every 5", "bad.jsonl line 1 is not a HellaSwag example"),
    ("--logs_dir file", "choose another --logs_dir"), ("--checkpoint_dir file", "choose another"),
    ("--eval_only --init_from nowhere", "give a checkpoint"), ("--eval_only --resume empty", "no checkpoint"),
]  # fmt: skip

FINEWEB = [
    ("--stdlib --files x", "two sources: give one"), ("--dataset a/b --stdlib", "two sources"),
    ("--pretokenized a/b --dataset c/d", "two sources"), ("--stdlib --column body", "leave it out"),
    ("--stdlib --split train", "--split has no meaning"), ("--stdlib --config x", "--config has no meaning"),
    ("--pretokenized a/b --tokenizer bytes", "leave it out"), ("--pretokenized a/b --workers 2", "leave it out"),
    ("--stdlib --shard_size 0", "--shard_size must"), ("--stdlib --shard_size 1", "at least 2"),
    ("--stdlib --shard_size many", "many"), ("--stdlib --shard_size 1000000000000000", "pass a smaller one"),
    ("--stdlib --shard_size 1" + 30 * "0", "pass a smaller one"), ("--stdlib --max_tokens -1", "--max_tokens must"),
    ("--stdlib --max_tokens 3", "at least 4"), ("--stdlib --workers 0", "--workers must"),
    ("--stdlib --val_fraction 1.5", "--val_fraction must"), ("--stdlib --val_fraction nan", "--val_fraction must"),
    ("--stdlib --val_fraction -0.1", "--val_fraction must"), ("--stdlib --tokenizer gpt3", "gpt3"),
    ("--stdlib --shard_sise 5", "did you mean"), ("--files nowhere.txt", "no such file"), ("--files", "is empty"),
    ("--files ''", "--files is empty"), ("--dataset ''", "--dataset is empty"), ("--files a.txt a.txt", "give it once"),
    ("--files empty", "no .txt"), ("--files texts/b.txt texts", "twice: give it once"),
    ("--files latin1.txt", "latin1.txt is not UTF-8: byte 3"), ("--files blank.txt", "no text"),
    ("--files tiny.txt", "use more text"), ("--files foreign.pt", "not one of .txt"),
    ("--files bad.txt.gz", "cannot be read"), ("--files bad.txt.zst", "cannot be read"),
    ("--files bad.parquet", "cannot be read"), ("--files torn.jsonl", "line 2 is not"),
    ("--files list.jsonl", "line 1 is not a JSON object"), ("--files column.jsonl", "--column is one of: body"),
    ("--files number.jsonl", "choose another --column"), ("--files deep.jsonl", "line 1 is not JSON"),
    ("--files a.txt --out file", "is a file: choose another"), ("--files a.txt --out file/below", "cannot write into"),
    ("--files a.txt --out cut", "unknown origin (no meta.json): choose another --out"),
    ("--files a.txt --out words", "choose another folder"), ("--files a.txt --out meta", "meta.json"),
    ("--dataset edu --val_fraction 0.1", "needs --max_tokens"), ("--frobnicate", "see fineweb.py --help"),
    ("--files a.txt --val_fraction 0 --tokenizer bytes", "leave nothing to train on"),
]  # fmt: skip

OF_A_MODEL = [  # sample.py and hellaswag.py
    ("", "give one model: --checkpoint PATH or --init_from"), ("--checkpoint run --init_from gpt2", "give one model"),
    ("--checkpoint absent.pt", "absent.pt"), ("--checkpoint empty", "no checkpoint"),
    ("--init_from gpt9", "no folder gpt9"), ("--checkpoint foreign.pt", "is not a checkpoint of this project"),
    ("--checkpoint torn.pt", "use an older one"), ("--checkpoint newer.pt", "written by a newer version"),
    ("--checkpoint bare.pt", "no format number"), ("--checkpoint payload.pt", "more than tensors and values"),
    ("--checkpoint alien.pt", "use gpt2 or bytes"), ("--checkpoint narrow.pt", "train with --vocab_size 50257"),
    ("--checkpoint wide.pt", "do not fit the model"), ("--checkpoint half.pt", "it has no model; use a checkpoint"),
    ("--checkpoint odd.pt", "no such model"), ("--init_from hf_torn", "does not describe a model"),
    ("--init_from hf_list", "does not describe a model"), ("--init_from hf_deep", "does not describe a model"),
    ("--init_from hf_other", "model_type is 'llama'"), ("--init_from hf_bare", "no model.safetensors"),
    ("--init_from hf_bad", "cannot read"), ("--checkpoint run --device abacus", "try --device auto"),
    ("--checkpoint run --seeed 1", "--help"),
]  # fmt: skip

SAMPLE = [
    ("--prompt a --prompt_file b", "give one prompt"), ("--prompt_file absent.txt", "cannot read --prompt_file"),
    ("--prompt_file latin1.txt", "is not UTF-8"), ("--prompt_file empty", "cannot read --prompt_file"),
    ("--temperature -0.1", "temperature must"), ("--temperature nan", "temperature must"),
    ("--temperature warm", "warm"), ("--temperature inf", "temperature must"), ("--top_k 0", "top_k must"),
    ("--top_k -5", "top_k must"), ("--top_p 0", "top_p must"), ("--top_p 1.01", "top_p must"),
    ("--top_p nan", "top_p must"), ("--num_samples 0", "num_samples must"),
    ("--num_samples " + 400 * "9", "MiB are free: set --num_samples to"),
    ("--max_new_tokens -1", "max_new_tokens must"), ("--seed -1", "seed must"),
]  # fmt: skip

HELLASWAG = [
    ("--data bad.jsonl", "bad.jsonl line 1 is not a HellaSwag example"), ("--data blank.txt", "with --data FILE"),
    ("--data absent.jsonl", "with --data FILE"), ("--data empty", "with --data FILE"), ("--limit 0", "--limit must"),
    ("--batch_tokens 0", "--batch_tokens must"), ("--out no/such/out.json", "--out no/such/out.json: its folder"),
    ("--out file/out.json", "cannot be written to"), ("--out .", "name a file"), (f"--out {os.devnull}", "name a file"),
    ("--checkpoint nan.pt --data rows.jsonl", "use an earlier checkpoint"),
]  # fmt: skip

SWEEP = [
    ("--variants moe", "no variant 'moe'; there are"), ("--variants", "names no variant"), ("--seeds", "at least one"),
    ("--jobs 0", "--jobs must"), ("--gpus -1", "--gpus"),
    ("--variants noisy_top_k only_moe -- --use_noisy_top_k", "leave out one, or the flag"),
    ("--jobs 1 --gpus 0", "leave out one of them"), ("--gpus 99", "is not available"), ("--run_id a_b", "--run_id"),
    ("--tok_per_sec -5", "--tok_per_sec must"), ("--cluster local", "give --slurm too"), ("--cluster pbs", "pbs"),
    ("--frobnicate", "see sweep.py --help"), ("--max_steps 5", "put it after `--`"),
    ("--no-use-compile", "put it after `--`"), ("--seeds x", "--seeds"), ("--dry_run yes", "yes"),
    ("--slurm partition", "write it as partition=gpu"), ("--slurm partition=a,time=soon", "time 'soon' is none of"),
    ("--slurm mem=much", "mem"), ("--slurm gpus=two", "two"), ("-- --B 0", "--B must be at least 1"),
    ("-- --max_step 5", "did you mean --max-steps"), ("-- --run_id x", "pass --run_id before"),
    ("-- --seed=5", "pass --seeds before"), ("-- --resume auto", "leave it out"),
    ("--data_per_seed -- --data_seed 5", "pass --seeds before"),
    ("-- --total_batch_size 9", "nearest"), ("-- --data_root nowhere", "python fineweb.py"),
]  # fmt: skip

RUNLOG = [
    ("", "no logs given"), ("absent.txt", "no such log: absent.txt"), ("empty", "no log_*.txt"),
    ("file", "not named like"),
    ("odd/log_moe_a_seed_1.txt", "line 2: '1 train' is not `step stream value`: fix or remove"),
    ("odd/log_moe_b_seed_1.txt", "does not hold the settings of a run: restore it"),
    ("odd/log_moe_c_seed_1.txt", "cannot be read"), ("odd/log_moe_d_seed_1.txt", "is not `step stream value`"),
    ("odd/log_moe_e_seed_1.txt", "restore it, or remove it"), ("logs --at_step -1", "--at_step must"),
    ("logs --baseline absent", "absent: no such runs"), ("logs --baseline moe,max_steps=9", "give settings as"),
    ("logs --at_step 5 --thin y", "leave out"), ("logs --baseline moe --thin y", "leave out"),
    ("logs --thin file", "choose another --thin"), ("logs --thin file/deep", "choose another --thin"),
    ("--published absent --out curves.csv", "unpack the published logs there"), ("logs --best", "--help"),
    ("--published logs --out file/deep/curves.csv", "file"), ("--published odd --out curves.csv", "fix or remove"),
]  # fmt: skip

EXPORT = [
    ("", "--checkpoint"), ("--checkpoint run", "give one thing to write"),
    ("--checkpoint absent --export_hf out", "absent"),
    ("--checkpoint empty --export_hf out", "no checkpoint"),
    ("--checkpoint foreign.pt --export_hf out", "not a checkpoint"),
    ("--checkpoint torn.pt --export_hf out", "use an older one"),
    ("--checkpoint nan.pt --export_hf file", "not a folder"),
    ("--checkpoint hf_bad/model.safetensors --export_hf out", "is not a checkpoint"),
    ("--checkpoint run --export_hf run", "give a new folder"), ("--checkpoint wide.pt --export_hf out", "do not fit"),
    ("--checkpoint odd.pt --export_hf out", "no such model"), ("--checkpoint run --export_hf file/out", "file"),
    ("--checkpoint payload.pt --export_hf out", "more than tensors"),
    ("--checkpoint run --export out", "did you mean --export-hf"),
]  # fmt: skip

ROUTES = [
    ("--checkpoint dense --out out", "train one with --n_exp 2 or more"), ("--checkpoint absent --out out", "absent"),
    ("--checkpoint foreign.pt --out out", "is not a checkpoint"), ("--checkpoint newer.pt --out out", "newer version"),
    ("--checkpoint run --against dense --out out", "dense is a dense model"), ("--checkpoint run", "--out"),
    ("--checkpoint run --against more --out out", "choose two models of one shape"),
    ("--checkpoint run --text latin1.txt --out out", "is not UTF-8"),
    ("--checkpoint run --text empty --out out", "1 to 50"), ("--checkpoint run --text many --out out", "give 1 to 50"),
    ("--checkpoint run --against moe_gpt2 --out out", "tokenizer gpt2: choose two models"),
    ("--checkpoint run --text blank.txt --out out", "give one that is not empty"),
    ("--checkpoint run --text absent.txt --out out", "cannot be read"),
    ("--checkpoint run --out file", "another --out"),
    ("--checkpoint run --out out --max_tokens 0", "--max_tokens must"), ("--out out", "--checkpoint"),
    ("--checkpoint run --out out --device abacus", "try --device auto"), ("--checkpoint run --out out -x", "--help"),
    ("--checkpoint nan.pt --text a.txt --out out", "use an earlier checkpoint"),
]  # fmt: skip

DEMO = [("--steps 0", "--steps must"), ("--seed -1", "--seed must"), ("--bogus", "demo.py --help"), ("3", "3")]

BENCH = [
    ("", "bench"), ("sort", "sort"), ("step --tokens 100", "not a positive multiple of --T"),
    ("gpu --minutes 0", "--minutes must be above 0"), ("gpu --parts steps", "--parts"),
    ("gpu --tokens 100", "--tokens 100 is not a positive multiple of --T 64"),
    ("step --tokens 0", "--tokens 0"), ("step --tokens", "--tokens: step needs a size"),
    ("scale --tokens 256", "needs two sizes"), ("step --T 0", "--T must"),
    ("step --n_head 5", "is not divisible by n_head 5"), ("step --n_exp 1", "--n_exp must"),
    ("step --threads 0", "--threads"), ("step --rounds 0", "--rounds must"),
    ("step --compile --warmup 0", "pass --warmup 1"), ("step --variants dens", "no 'dens'"),
    ("step --variants", "needs at least one of"),
    ("step --imbalanced --uniform_routing", "exclude each other: pass one"),
    ("step --vs no/such/model.py", "give the path of a model.py"), ("step --vs empty.py", "has no GPT and GPTConfig"),
    ("scale --vs empty.py", "is timed by step alone"), ("scale --recompute blocks", "is timed by step alone"),
    ("moe --optimizer muon", "is timed by step alone"),
    ("tokenize --megabytes nan", "--megabytes must"), ("tokenize --megabytes 0", "--megabytes must"),
    ("tokenize --tokenizer words", "use gpt2 or bytes"), ("loader --shard_tokens 1000", "must be at least"),
    ("hellaswag --vocab_size 300", "must be at least 50257"), ("sample --T 32 --new_tokens 30", "must lie in 4 to"),
    ("step --out_dir file", "name another folder"), ("step --seed -1", "--seed must"), ("step --dtype int8", "int8"),
]  # fmt: skip

TABLE = [  # (script, flags before those of the row, flags of the row, a part of the message)
    (script, base, words, said)
    for scripts, base, rows in (
        ([train_single_gpu], TINY, TRAIN), ([fineweb], "--out out", FINEWEB), ([sample, hellaswag], "", OF_A_MODEL),
        ([sample], "--checkpoint run", SAMPLE), ([hellaswag], "--checkpoint run", HELLASWAG), ([runlog], "", RUNLOG),
        ([sweep], "--variants no_moe --seeds 1", SWEEP), ([checkpoint], "", EXPORT), ([routes], "", ROUTES),
        ([demo], "", DEMO), ([bench], "--device cpu --out_dir out", BENCH),
    )
    for script in scripts
    for words, said in rows
]  # fmt: skip


class Payload:
    def __reduce__(self):
        return open, ("it_ran", "w")


def write_checkpoints(folder):
    model = GPT(GPTConfig(**SHAPE), torch.Generator().manual_seed(1))
    config = dataclasses.asdict(model.config)
    state = {"model": model.state_dict(), "config": config, "tokenizer": "bytes"}
    checkpoint.save(state, folder / "run/step_000001.pt")
    for name, tokenizer, change in (
        ("dense", "bytes", {"n_exp": 1}), ("more", "bytes", {"n_exp": 8}), ("moe_gpt2", "gpt2", {"vocab_size": 50257}),
        ("gpt2like", "gpt2", {"n_exp": 1, "block_size": 48}),
    ):  # fmt: skip
        other = GPT(GPTConfig(**SHAPE | change))
        changed = {"model": other.state_dict(), "config": dataclasses.asdict(other.config), "tokenizer": tokenizer}
        checkpoint.save(changed, folder / name / "step_000001.pt")
    nan = {name: torch.full_like(tensor, torch.nan) for name, tensor in state["model"].items()}
    for name, change in {
        "nan": {"model": nan},
        "alien": {"tokenizer": "klingon"},
        "narrow": {"tokenizer": "gpt2"},
        "wide": {"config": config | {"n_embd": 16}},
        "odd": {"config": config | {"n_embd": "x"}},
    }.items():
        checkpoint.save({**state, **change}, folder / f"{name}.pt")  # fmt: skip
    checkpoint.save({"config": config}, folder / "half.pt")
    torch.save({"format": 99}, folder / "newer.pt")
    torch.save(state["model"], folder / "bare.pt")
    torch.save({"format": 2, "model": Payload()}, folder / "payload.pt")
    (folder / "torn.pt").write_bytes((folder / "nan.pt").read_bytes()[:-30])
    (folder / "foreign.pt").write_bytes(b"hello")


def write_shard_folders(folder):
    write_shards(folder / "words")
    for name in ("cut", "pickled", "meta", "deep"):
        (folder / name).mkdir()
        for split in ("train", "val"):
            np.save(folder / name / f"a_{split}_000000.npy", np.zeros(9000, np.uint16))
    shard = folder / "cut/a_train_000000.npy"
    shard.write_bytes(shard.read_bytes()[:-9])
    np.save(folder / "pickled/a_train_000000.npy", np.array([Payload()]), allow_pickle=True)
    (folder / "meta/meta.json").write_text('{"tokenizer": 5}')
    (folder / "deep/meta.json").write_text("[" * 100_000)


def write_logs(folder):
    good, settings = "0 val 5.5\n1 train 5.0\n2 val 5.0\n", {"settings": {"max_steps": 2, "init_from": "scratch"}}
    for name, text, record in (
        ("logs/log_moe_a_seed_1", good, json.dumps(settings)), ("odd/log_moe_a_seed_1", "0 val 5\n1 train\n", None),
        ("odd/log_moe_b_seed_1", good, '{"settings": 5}'), ("odd/log_moe_c_seed_1", good, "{"),
        ("odd/log_moe_d_seed_1", "1 \xff\n", None), ("odd/log_moe_e_seed_1", good, "[" * 100_000),
    ):  # fmt: skip
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".txt").write_text(text, encoding="latin-1")
        if record:
            path.with_suffix(".json").write_text(record)


def write_texts(folder):
    row = json.dumps({"ctx": "the router", "label": 1, "endings": ["sends", "a token", "drops", "none"]})
    for name, content in {
        "file": b"x", "a.txt": b"the router sends a token\n" * 9, "texts/b.txt": b"the router",
        "blank.txt": b"", "tiny.txt": b"hi", "empty.py": b"",
        "latin1.txt": b"caf\xe9", "bad.txt.gz": b"no gzip", "bad.txt.zst": b"no zstd", "bad.parquet": b"no parquet",
        "torn.jsonl": b'{"text": "a"}\n{"text":\n', "list.jsonl": b"[1]\n", "column.jsonl": b'{"body": "b"}\n',
        "number.jsonl": b'{"text": 5}\n', "deep.jsonl": b"[" * 100_000, "bad.jsonl": b'{"ctx": "a"}\n',
        "rows.jsonl": f"{row}\n".encode(), "hf_torn/config.json": b"{", "hf_list/config.json": b"[]",
        "hf_deep/config.json": b"[" * 100_000, "hf_other/config.json": b'{"model_type": "llama"}',
        "hf_bare/config.json": b"{}", "hf_bad/config.json": b"{}", "hf_bad/model.safetensors": b"not this",
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "many").mkdir()
    for i in range(51):
        (folder / "many" / f"{i}.txt").write_text("x")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one of every kind of good and damaged file that the table names."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "empty").mkdir()
    for write in (write_texts, write_checkpoints, write_shard_folders, write_logs):
        write(folder)
    return folder


def run(script, words):
    """(exit code, stderr) of the script in this process."""
    said = io.StringIO()
    sys.argv = [os.path.basename(script.__file__), *shlex.split(words)]
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(said):
        try:
            common.run(script.main)
        except SystemExit as ended:
            return ended.code, said.getvalue()


@pytest.fixture
def this_process(monkeypatch, folder):
    """Puts back what a script changes in its process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(demo, "OUT", folder / "demo")
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def listing(folder):
    """{path: content} of all files but locks, which stay, in their folder, and are no obstacle."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_there_are_200():
    assert len({row[:3] for row in TABLE}) == len(TABLE) >= 200


@pytest.mark.slow
@pytest.mark.parametrize("script, base, words, said", TABLE, ids=[f"{row[0].__name__} {row[2]:.60}" for row in TABLE])
def test_a_wrong_input_is_one_line_and_exit_code_2(folder, this_process, script, base, words, said):
    if "are free" in said and common.free_memory(torch.device("cpu")) == math.inf:
        pytest.skip("this system does not tell how much memory it has")
    before = listing(folder)
    code, error = run(script, f"{base} {words}")
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and said in error, error
    assert listing(folder) == before
