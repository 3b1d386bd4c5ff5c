"""checkpoint.py: files whole or refused, state of model and optimizer, GPT-2 weights in and out."""

import copy
import dataclasses
import io
import json
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import Forked

from lab import checkpoint
from lab.common import UserError
from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
SMALL = {"block_size": 16, "vocab_size": 61, "n_layer": 3, "n_head": 2, "n_embd": 16}
MOE = {"n_exp": 4, "top_k": 2, "use_noisy_top_k": True, "use_bias_balance": True, "train_capacity": float("inf")}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def small_model(seed=0, **fields):
    return GPT(GPTConfig(**{**SMALL, **fields}), torch.Generator().manual_seed(seed))


def adamw(model, **settings):
    return torch.optim.AdamW(model.optimizer_groups(0.1), **{"lr": 1e-2, **settings})


def adafactor(model, **settings):
    return torch.optim.Adafactor(model.optimizer_groups(0.1), **{"lr": 1e-2, **settings})


def train_step(model, optimizer, seed=0):
    idx = torch.randint(61, (2, 8), generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    model.train()(idx, idx).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def small_state(step=0, **fields):
    """The state that a trainer saves, after one real step, so that the optimizer's is not empty."""
    model = small_model(**fields)
    optimizer = adamw(model)
    train_step(model, optimizer)
    return {
        **checkpoint.get_state(model, optimizer),
        "loader": {"position": 7, "shards": ["a", "b"]},
        "progress": {"step": step},
        "step": step,
        "args": {"train_capacity": float("inf"), "resume": "", "block_size": None},
        "config": dataclasses.asdict(model.config),
        "tokenizer": "bytes",
        "rng": torch.get_rng_state(),
    }


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def logits(model, idx):
    with torch.no_grad():
        return model.eval()(idx, dropless=True).logits


# -- files


def test_save_and_load_round_trip(tmp_path):
    state = small_state(step=12, **MOE)
    path = checkpoint.step_path(tmp_path / "deep" / "run", 12)
    checkpoint.save(state, path)
    assert path.name == "step_000012.pt"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    for mmap in (False, True):
        loaded = checkpoint.load(path, mmap=mmap)
        assert loaded.pop("format") == checkpoint.FORMAT
        assert equal(loaded, state)


def test_tied_weights_are_stored_once(tmp_path):
    big = torch.randn(1000, 100)
    for name, tensors in (("one", {"a": big}), ("tied", {"a": big, "b": big})):
        checkpoint.save({"model": checkpoint.to_plain(tensors, copy=True)}, tmp_path / name)
    assert (tmp_path / "tied").stat().st_size < (tmp_path / "one").stat().st_size + 1000


@pytest.mark.parametrize("value", [Path("a"), {1, 2}, torch.float32, GPTConfig(), torch.nn.Linear(1, 1)])
def test_values_that_load_refuses_are_not_saved(tmp_path, value):
    with pytest.raises(TypeError, match="plain values"):
        checkpoint.save({"args": {"x": [value]}}, tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_flipped_bytes_are_found(tmp_path):
    """A flip anywhere is an error, or (in padding, in a date) changes nothing that is loaded."""
    path = tmp_path / "step_000001.pt"
    checkpoint.save(small_state(**MOE), path)
    good, original = checkpoint.load(path), path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        tensor = max(archive.infolist(), key=lambda info: info.file_size)
    # zip header, name and alignment take less than 200 bytes before the data, so this lies inside it
    places = [tensor.header_offset + 200 + i for i in range(0, tensor.file_size - 200, 97)]
    rng = random.Random(0)
    anywhere = [rng.randrange(len(original)) for _ in range(150)] + list(range(40)) + list(range(-60, 0))
    found = {True: 0, False: 0}
    for inside, offsets in ((True, places), (False, anywhere)):
        for offset in offsets:
            damaged = bytearray(original)
            damaged[offset] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            try:
                assert equal(checkpoint.load(path), good), f"the flip at {offset} was not found"
            except UserError as error:
                assert str(path) in str(error)
                found[inside] += 1
    assert found[True] == len(places)
    assert found[False] > 50


@pytest.mark.parametrize("keep", [0, 1, 3, 30, 1000, -1, -30])
def test_truncated_files_are_found(tmp_path, keep):
    path = tmp_path / "step_000001.pt"
    checkpoint.save(small_state(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"step_000001\.pt"):
        checkpoint.load(path)


class Explosive:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_crafted_pickle_executes_nothing(tmp_path, as_zip):
    marker = tmp_path / "it_ran"
    torch.save({"format": 1, "model": Explosive(str(marker))}, tmp_path / "a.pt", _use_new_zipfile_serialization=as_zip)
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        checkpoint.load(tmp_path / "a.pt")
    assert not marker.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)  # written above: shows that unpickling would have run it
    assert marker.exists(), "the payload of this test does not run"


@pytest.mark.parametrize(
    "name, content", [("text", b"hello"), ("pickle", pickle.dumps({"format": 1})), ("png", b"\x89PNG\r\n")]
)
def test_foreign_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is not a checkpoint of this project"):
        checkpoint.load(tmp_path / name)


def test_foreign_archives_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.writestr("a.txt", "hello")
    torch.save(small_model().state_dict(), tmp_path / "bare.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    for name in ("some.zip", "bare.pt", "tensor.pt"):
        with pytest.raises(UserError, match=f"{name} is not a checkpoint of this project"):
            checkpoint.load(tmp_path / name)


def test_other_formats_and_missing_files_are_named(tmp_path):
    for number, age in ((0, "older"), (checkpoint.FORMAT + 1, "newer")):
        torch.save({"format": number}, tmp_path / "a.pt")
        with pytest.raises(UserError, match=f"a.pt was written by an? {age} version"):
            checkpoint.load(tmp_path / "a.pt")
    for value in (True, 1.0, "1", None):
        torch.save({"format": value}, tmp_path / "a.pt")
        with pytest.raises(UserError, match="no format number"):
            checkpoint.load(tmp_path / "a.pt")
    for path in (tmp_path / "absent.pt", tmp_path):
        with pytest.raises(UserError, match=f"cannot read the checkpoint {path}"):
            checkpoint.load(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["args", "optimizer", "progress", "loader", "config", "step"])
def test_a_checkpoint_without_a_needed_field_is_refused(tmp_path, name):
    needs = ("model", "optimizer", "args", "progress", "loader", "config", "step")
    state, path = small_state(), tmp_path / "step_000001.pt"
    checkpoint.save(state, path)
    assert checkpoint.load(path, needs)["step"] == 0
    for change, said in (({}, f"it has no {name}"), ({name: 3.5}, f"its {name} is a float")):
        checkpoint.save({k: v for k, v in state.items() if k != name} | change, path)
        with pytest.raises(UserError, match=f"step_000001.pt: {said}; use a checkpoint"):
            checkpoint.load(path, needs)
        with pytest.raises(UserError, match=r"none of the 1 checkpoints .* can be loaded: copy a whole one there"):
            checkpoint.read_checkpoint(tmp_path, needs)


DIRECTORY_ENTRY, EXTERNAL_ATTRIBUTES = b"PK\1\2", 38


def test_attributes_that_torch_never_writes_are_refused(tmp_path):
    """With bit 4 of the external attributes torch takes the entry for a folder: its tensor is memory never filled."""
    path = tmp_path / "step_000001.pt"
    checkpoint.save({"model": {"w": torch.arange(6.0)}}, path)
    content = bytearray(path.read_bytes())
    entry = content.rindex(DIRECTORY_ENTRY, 0, content.rindex(b"/data/0"))
    content[entry + EXTERNAL_ATTRIBUTES] ^= 0x10
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    with pytest.raises(UserError, match=r"is damaged \(attributes of .*data/0 that torch"):
        checkpoint.load(path)


def test_a_compressed_archive_is_refused_before_it_is_decompressed(tmp_path):
    """16 MB of zeros; the first byte of the compressed data is wrong, so reading it would be another error."""
    path = tmp_path / "step_000001.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(2**24))
    content = bytearray(path.read_bytes())
    content[30 + len("a/data.pkl")] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"attributes of a/data\.pkl that torch\.save never writes"):
        checkpoint.load(path)


def test_newest_is_by_number_and_ignores_half_written_files(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "absent") is None
    for step in (999_999, 1_000_000, 5):
        checkpoint.save({"step": step}, checkpoint.step_path(tmp_path, step))
    for name in ("step_2000000.pt.tmp", "step_best.pt", "step_3.pt", "other.pt"):
        (tmp_path / name).write_bytes(b"")
    assert checkpoint.newest(tmp_path).name == "step_1000000.pt"
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [5, 999_999, 1_000_000]
    assert checkpoint.load_newest(tmp_path)[1]["step"] == 1_000_000


def test_a_damaged_newest_gives_way_to_the_one_before(tmp_path, capsys):
    assert checkpoint.load_newest(tmp_path) == (None, None)
    paths = [checkpoint.step_path(tmp_path, step) for step in (1, 2, 3)]
    for step, path in enumerate(paths, 1):
        checkpoint.save({"step": step}, path)
    paths[2].write_bytes(paths[2].read_bytes()[:-9])
    found, state = checkpoint.load_newest(tmp_path)
    assert (found, state["step"]) == (paths[1], 2)
    assert str(paths[2]) in capsys.readouterr().err
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 3 checkpoints in .* copy a whole one there, or move the folder"):
        checkpoint.load_newest(tmp_path)


def test_a_run_folder_stands_for_its_newest_checkpoint(tmp_path):
    for step in (1, 2):
        checkpoint.save({"step": step}, checkpoint.step_path(tmp_path, step))
    assert checkpoint.read_checkpoint(tmp_path) == (tmp_path / "step_000002.pt", {"format": 2, "step": 2})
    assert checkpoint.read_checkpoint(tmp_path / "step_000001.pt")[1]["step"] == 1


def test_prune_keeps_the_newest_whole_ones(tmp_path):
    paths = [checkpoint.step_path(tmp_path, step) for step in range(1, 7)]
    for path in paths:
        checkpoint.save({"step": 0}, path)
    paths[5].write_bytes(b"PK\3\4 cut off")
    (tmp_path / "step_000004.pt.tmp").write_bytes(b"")
    (tmp_path / "step_000001").mkdir()  # a set without its index
    mine = ["notes.txt", "step_000001_hf", "step_1.bak", "step_backup"]
    for name in mine:
        (tmp_path / name).mkdir()
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*mine, *(p.name for p in paths[3:])])
    assert checkpoint.load_newest(tmp_path)[0] == paths[4]


def test_prune_reads_each_file_once(tmp_path, monkeypatch):
    real, read = checkpoint.zip_error, []
    monkeypatch.setattr(checkpoint, "zip_error", lambda path: read.append(path.name) or real(path))
    checked = {}
    for step in (1, 2, 3, 3):  # the last one written again
        checkpoint.save({"step": step, "time": len(read)}, checkpoint.step_path(tmp_path, step))
        checkpoint.prune(tmp_path, 2, checked)
    assert read == [f"step_00000{step}.pt" for step in (1, 2, 3, 3)]
    assert len(checkpoint.checkpoints(tmp_path)) == 2


# -- the thread that saves


def test_the_background_saver_saves_the_state_at_the_call(tmp_path, monkeypatch):
    """A CPU model, whose state_dict shares memory with the weights that training changes in place."""
    go, real = threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args: (go.wait(600), real(*args)))
    errors = []
    saver = checkpoint.BackgroundSaver(keep=2, on_error=errors.append)
    model = small_model()
    optimizer = adamw(model)
    train_step(model, optimizer)
    before = copy.deepcopy(checkpoint.get_state(model, optimizer))
    saver.save(checkpoint.get_state(model, optimizer), checkpoint.step_path(tmp_path, 1))
    train_step(model, optimizer)
    assert not list(tmp_path.iterdir())
    go.set()
    assert saver.wait() is None
    saved = checkpoint.load(checkpoint.step_path(tmp_path, 1))
    assert equal({name: saved[name] for name in before}, before)
    assert not equal(checkpoint.get_state(model, optimizer), before)
    for step in (2, 3):
        saver.save(checkpoint.get_state(model, optimizer), checkpoint.step_path(tmp_path, step))
    assert saver.wait() is None and errors == []
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step_000002.pt", "step_000003.pt"]


FULL_DISK = """
import resource, sys, torch, checkpoint
path = lambda step: checkpoint.step_path(sys.argv[1], step)
checkpoint.save({"step": 1}, path(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
big = {"model": {"w": torch.zeros(1_000_000)}}
try:
    checkpoint.save(big, path(2))
except OSError as error:
    print("direct", error.errno)
saver = checkpoint.BackgroundSaver(3, lambda error: print("on_error", error.errno))
saver.save(big, path(3))
print(saver.wait().errno, saver.wait().errno)
saver.save(big, path(4))
saver.save({"step": 5}, path(5))
print(saver.wait())
saver.save({"step": 6}, path(6))  # the process ends without waiting
"""


@pytest.mark.slow
def test_a_full_disk_is_an_oserror_and_leaves_the_older_checkpoint(tmp_path):
    """A limit on file size stands for the full disk: the same OSError at the same places."""
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert result.stdout.split() == ["direct", "27", *["on_error", "27"], *["27", "27"], "on_error", "27", "None"], (
        result.stderr
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step_00000{step}.pt" for step in (1, 5, 6)]
    assert checkpoint.load_newest(tmp_path)[1]["step"] == 6


# -- state of model and optimizer


@pytest.mark.parametrize("make", [adamw, adafactor])
@pytest.mark.parametrize("fields", [{}, MOE])
def test_a_restored_run_continues_bit_for_bit(tmp_path, make, fields):
    model = small_model(**fields)
    optimizer = make(model)
    for seed in range(3):
        train_step(model, optimizer, seed)
    checkpoint.save(checkpoint.get_state(model, optimizer), tmp_path / "a.pt")
    other = small_model(seed=9, **fields)
    other_optimizer = make(other)
    checkpoint.set_state(other, other_optimizer, checkpoint.load(tmp_path / "a.pt"), "a.pt")
    assert other.lm_head.weight is other.transformer.wte.weight
    states = [checkpoint.get_state(model, optimizer), checkpoint.get_state(other, other_optimizer)]
    assert equal(*states)
    assert states[0]["model"]["lm_head.weight"] is states[0]["model"]["transformer.wte.weight"]
    assert states[0]["optimizer"]["state"].keys() == {name for name, _ in model.named_parameters()}
    for seed in range(3, 6):
        train_step(model, optimizer, seed)
        train_step(other, other_optimizer, seed)
    assert equal(checkpoint.get_state(model, optimizer), checkpoint.get_state(other, other_optimizer))


def test_the_optimizer_keeps_its_own_settings():
    state = small_state()
    model = small_model()
    optimizer = torch.optim.AdamW(model.optimizer_groups(0.9), lr=0.5, betas=(0.5, 0.6), eps=1e-7)
    checkpoint.set_state(model, optimizer, state, "x")
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.9, 0.0)
    assert all((g["lr"], g["betas"], g["eps"]) == (0.5, (0.5, 0.6), 1e-7) for g in optimizer.param_groups)
    assert optimizer.state[model.lm_head.weight]["step"] == 1


def test_an_optimizer_without_a_step_stays_without_one():
    """torch's own functions would give it a state at step 1: the run would differ from one that never saved."""
    model = small_model()
    optimizer = adamw(model)
    state = checkpoint.get_state(model, optimizer)
    assert state["optimizer"] == {"state": {}} and not optimizer.state
    other = small_model(seed=3)
    other_optimizer = adamw(other)
    checkpoint.set_state(other, other_optimizer, state, "x")
    assert not other_optimizer.state
    for pair in ((model, optimizer), (other, other_optimizer)):
        train_step(*pair)
    assert equal(checkpoint.get_state(model, optimizer), checkpoint.get_state(other, other_optimizer))


def test_format_1_still_loads_and_resumes(tmp_path):
    """The optimizer's state by number, in the order of its groups, as torch's own state_dict has it."""
    model = small_model(**MOE)
    optimizer = adamw(model)
    train_step(model, optimizer)
    old = {"format": 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**old, "config": dataclasses.asdict(model.config)}, tmp_path / "step_000001.pt")
    other = small_model(seed=2, **MOE)
    other_optimizer = adamw(other)
    checkpoint.set_state(other, other_optimizer, checkpoint.load(tmp_path / "step_000001.pt"), "x")
    assert equal(checkpoint.get_state(model, optimizer), checkpoint.get_state(other, other_optimizer))
    assert equal(dict(checkpoint.load_model(tmp_path)[0].state_dict()), dict(model.state_dict()))


def test_frozen_parameters_have_no_optimizer_state():
    states = []
    for _ in range(2):
        model = small_model(**MOE)
        for _, moe in model.moe_layers():
            moe.router.w_g.weight.requires_grad_(False)
        optimizer = adamw(model)
        if states:
            checkpoint.set_state(model, optimizer, states[0], "x")
        else:
            train_step(model, optimizer)
        states.append(checkpoint.get_state(model, optimizer))
    assert equal(*states)
    assert not [name for name in states[1]["optimizer"]["state"] if "w_g" in name]


def without(state, *path):
    """A deep copy of `state` without one entry."""
    state = copy.deepcopy(state)
    part = state
    for name in path[:-1]:
        part = part[name]
    del part[path[-1]]
    return state


def test_a_state_of_another_run_is_refused_with_the_first_misfit():
    state, wte = small_state(), "transformer.wte.weight"
    adafactor_model = small_model()
    other = adafactor(adafactor_model)
    train_step(adafactor_model, other)
    for given, said in (
        (small_state(n_embd=32), r"model transformer.wte.weight has the shape \(61, 32\), not \(61, 16\)"),
        (small_state(n_layer=2), "model transformer.h.2.ln_1.weight is missing"),
        (small_state(n_layer=4), "model transformer.h.3.ln_1.weight is unknown"),
        (without(state, "model", wte), f"model {wte} is missing"),
        (without(state, "optimizer", "state", wte), f"optimizer {wte} is missing"),
        (without(state, "optimizer", "state", wte, "exp_avg"), f"optimizer {wte} exp_avg is missing"),
        (without(state, "optimizer", "state"), "optimizer is a NoneType, not a dict"),
        (checkpoint.get_state(adafactor_model, other), "optimizer .* is missing"),
        ({**state, "model": {**state["model"], wte: 3}}, f"model {wte} is not a tensor"),
    ):
        model = small_model()
        with pytest.raises(UserError, match=f"the state in some.pt does not fit this run: {said}"):
            checkpoint.set_state(model, adamw(model), given, "some.pt")


RANKS = """
import copy, sys; sys.path[:0] = sys.argv[1:3]
import torch, torch.distributed as dist, checkpoint, common
from lab.common import UserError
from test_checkpoint import MOE, adafactor, adamw, equal, small_model, train_step

torch.set_num_threads(1)
rank, world_size = common.world()
dist.init_process_group("gloo", init_method=sys.argv[5], rank=rank, world_size=world_size)
reference = checkpoint.load(sys.argv[3])
for make, sharded in ((adamw, False), (adafactor, False), (adamw, True)):
    model = small_model(seed=5 + rank, **MOE)
    if sharded:
        common.shard(model)
    optimizer = make(model, foreach=False)
    wanted = {name: reference[make.__name__][name] for name in ("model", "optimizer")}
    checkpoint.set_state(model, optimizer, copy.deepcopy(wanted) if rank == 0 else None, "a")
    assert model.lm_head.weight is model.transformer.wte.weight
    state = checkpoint.get_state(model, optimizer)
    if rank:
        assert state == {"model": {}, "optimizer": {}}
        continue
    wanted["optimizer"] = {"state": wanted["optimizer"]["state"]}
    state["optimizer"] = {"state": state["optimizer"]["state"]}
    assert equal(state, wanted), make
    assert all(value.device.type == "cpu" and type(value) is torch.Tensor for value in state["model"].values())
saver = checkpoint.BackgroundSaver(3, print, dist.new_group(backend="gloo"))
for step, background in ((1, False), (2, True)):
    folder = checkpoint.step_path(sys.argv[4], step).with_suffix("")
    saver.save_shards(model, optimizer, {"step": step}, folder, background)  # of the sharded model
    if background:
        train_step(model, optimizer)
    saver.wait()
    dist.barrier()
    for sharded in (True, False):
        other = small_model(seed=7, **MOE)
        if sharded:
            common.shard(other)
        other_optimizer = adamw(other, foreach=False)
        checkpoint.set_state(other, other_optimizer, checkpoint.load(folder) if rank == 0 else None, "a")
        state = checkpoint.get_state(other, other_optimizer)
        assert rank or equal(state["model"], reference["adamw"]["model"])
        assert rank or equal(state["optimizer"]["state"], reference["adamw"]["optimizer"]["state"])
        train_step(other, other_optimizer)
model = small_model(**MOE)
try:
    checkpoint.set_state(model, adamw(model), {"model": {}, "optimizer": {}} if rank == 0 else None, "a")
except UserError as error:
    print(f"rank {rank}: {error}")
dist.destroy_process_group()
common.exit_now(0)
"""


@pytest.mark.slow
def test_ranks_and_shards_take_the_state_of_rank_0_and_give_it_back(tmp_path):
    states = {}
    for make in (adamw, adafactor):
        model = small_model(**MOE)
        optimizer = make(model)
        train_step(model, optimizer)
        states[make.__name__] = checkpoint.get_state(model, optimizer)
    checkpoint.save(states, tmp_path / "a.pt")
    (tmp_path / "ranks.py").write_text(RANKS)
    words = (tmp_path / "ranks.py", ROOT, ROOT / "tests", tmp_path / "a.pt", tmp_path, (tmp_path / "meeting").as_uri())
    ranks = [Forked(*words, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    for i, rank in enumerate(ranks):
        out, errors = rank.communicate()
        assert rank.poll() == 0, errors[-3000:]
        assert out == f"rank {i}: the state in a does not fit this run: model transformer.wte.weight is missing\n"
    for step in (1, 2):  # written by two ranks, read by one process
        state = checkpoint.load(tmp_path / f"step_00000{step}", ("model", "optimizer"))
        assert {path.name for path in (tmp_path / f"step_00000{step}").iterdir()} == {
            "__0_0.distcp", "__1_0.distcp", "index.pt"
        }  # fmt: skip
        assert equal(state["model"], dict(states["adamw"]["model"]))
        assert equal(state["optimizer"]["state"], states["adamw"]["optimizer"]["state"])


# -- sharded sets


def write_set(path, background=False, keep=9, **fields):
    """A set of one process, whose parts are whole tensors; the test of several ranks is below."""
    model = small_model(**fields)
    optimizer = adamw(model)
    train_step(model, optimizer)
    errors = []
    saver = checkpoint.BackgroundSaver(keep, errors.append)
    rest = {"config": dataclasses.asdict(model.config), "step": checkpoint.step_of(path), "tokenizer": "bytes"}
    saver.save_shards(model, optimizer, rest, path, background)
    assert saver.wait() is None and errors == []
    return model, optimizer


@pytest.mark.slow
def test_a_set_is_read_as_a_file_is(tmp_path):
    path = tmp_path / "step_000007"
    model, optimizer = write_set(path, **MOE)
    assert sorted(p.name for p in path.iterdir()) == ["__0_0.distcp", "index.pt"]
    whole, idx = checkpoint.get_state(model, optimizer), torch.arange(24).view(2, 12)
    for source in (path, path / "index.pt", tmp_path):
        opened, found = checkpoint.load_model(source)
        assert (found["step"], opened.config) == (7, model.config) and torch.equal(
            logits(opened, idx), logits(model, idx)
        )
        assert checkpoint.tokenizer_of(source) == "bytes"
    state = checkpoint.load(path, ("model", "optimizer"))
    assert equal(state["model"], dict(whole["model"])) and equal(
        state["optimizer"]["state"], whole["optimizer"]["state"]
    )
    assert state["model"]["lm_head.weight"] is state["model"]["transformer.wte.weight"]
    upcycled = checkpoint.init_from(tmp_path, {"dropout": 0.5})
    assert torch.equal(logits(upcycled, idx), logits(model, idx))


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_a_set_holds_the_state_at_the_call_and_a_run_continues_from_it(tmp_path, background):
    model = small_model(**MOE)
    optimizer = adamw(model)
    for seed in range(2):
        train_step(model, optimizer, seed)
    before = copy.deepcopy(checkpoint.get_state(model, optimizer))
    saver = checkpoint.BackgroundSaver(3, pytest.fail)
    saver.save_shards(model, optimizer, {"step": 2}, tmp_path / "step_000002", background)
    train_step(model, optimizer, 2)
    saver.wait()
    other = small_model(seed=4, **MOE)
    other_optimizer = adamw(other, lr=0.5)
    checkpoint.set_state(other, other_optimizer, checkpoint.load(tmp_path / "step_000002"), "x")
    restored = checkpoint.get_state(other, other_optimizer)
    assert equal(restored["model"], before["model"])
    assert equal(restored["optimizer"]["state"], before["optimizer"]["state"])
    assert all(group["lr"] == 0.5 for group in other_optimizer.param_groups) and not any(
        p.grad is not None for p in other.parameters()
    )
    other_optimizer.param_groups[0]["lr"] = other_optimizer.param_groups[1]["lr"] = 1e-2
    train_step(other, other_optimizer, 2)
    assert equal(checkpoint.get_state(other, other_optimizer)["model"], checkpoint.get_state(model, optimizer)["model"])


def test_a_set_before_the_first_step_gives_no_moments(tmp_path):
    model = small_model()
    optimizer = adamw(model)
    saver = checkpoint.BackgroundSaver(3, pytest.fail)
    saver.save_shards(model, optimizer, {"step": 0}, tmp_path / "step_000000", False)
    assert not optimizer.state
    checkpoint.set_state(model, optimizer, checkpoint.load(tmp_path / "step_000000"), "x")
    assert not optimizer.state


def test_a_set_without_index_does_not_exist_and_the_next_save_removes_it(tmp_path):
    write_set(tmp_path / "step_000001")
    shutil.copytree(tmp_path / "step_000001", tmp_path / "step_000002", ignore=shutil.ignore_patterns("index.pt"))
    checkpoint.save({"step": 3}, tmp_path / "step_000003.pt")
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step_000001", "step_000003.pt"]
    write_set(tmp_path / "step_000004", keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000003.pt", "step_000004"]
    assert checkpoint.newest(tmp_path) == tmp_path / "step_000004"


@pytest.mark.slow
def test_a_damaged_set_gives_way_and_is_written_again(tmp_path, capsys):
    """Each part of the file, and the part that is not there at all."""
    for step in (1, 2):
        write_set(tmp_path / f"step_00000{step}")
    part = tmp_path / "step_000002" / "__0_0.distcp"
    original = part.read_bytes()
    for damaged in (original[:-9], original[:5000] + bytes([original[5000] ^ 1]) + original[5001:], b"", None):
        part.unlink() if damaged is None else part.write_bytes(damaged)
        path, state = checkpoint.load_newest(tmp_path, ("model", "config"))
        assert (path.name, state["step"]) == ("step_000001", 1)
        assert "step_000002 is damaged (__0_0.distcp: " in capsys.readouterr().err
        with pytest.raises(UserError, match=r"step_000002 is damaged \(__0_0.distcp: .*\): use an older one"):
            checkpoint.load_model(tmp_path / "step_000002")
    checkpoint.prune(tmp_path, 1)
    assert (tmp_path / "step_000001").exists(), "the damaged set displaced the last good one"
    write_set(tmp_path / "step_000002", keep=1)
    assert checkpoint.load_newest(tmp_path, ("model",))[0].name == "step_000002"
    assert not (tmp_path / "step_000001").exists()


@pytest.mark.slow
def test_flipped_bytes_of_a_set_are_found(tmp_path):
    path = tmp_path / "step_000001"
    write_set(path, n_layer=1)
    good, part = checkpoint.load(path, ("model", "optimizer")), path / "__0_0.distcp"
    original, rng, found = part.read_bytes(), random.Random(0), 0
    for offset in [rng.randrange(len(original)) for _ in range(40)]:
        damaged = bytearray(original)
        damaged[offset] ^= 1 << rng.randrange(8)
        part.write_bytes(damaged)
        try:
            assert equal(checkpoint.load(path, ("model", "optimizer")), good), f"the flip at {offset} was not found"
        except UserError as error:
            found += str(path) in str(error)
    assert found > 20


@pytest.mark.slow
def test_a_crafted_set_executes_nothing(tmp_path):
    """A pickle in each place where torch's own reader would unpickle one: .metadata, a part, the index."""
    marker, path = tmp_path / "it_ran", tmp_path / "step_000001"
    model, optimizer = write_set(path)
    crafted = io.BytesIO()
    torch.save(Explosive(str(marker)), crafted)
    (path / ".metadata").write_bytes(pickle.dumps(Explosive(str(marker))))
    assert checkpoint.load(path, ("model", "optimizer"))["step"] == 1
    index = checkpoint.load(path)
    entry = index["index"]["tensors"]["model/transformer.ln_f.bias"]
    offsets, sizes, name, *_ = entry["chunks"][0]
    part, content = path / name, crafted.getvalue()
    part.write_bytes(part.read_bytes() + content)
    entry["chunks"] = [(offsets, sizes, name, part.stat().st_size - len(content), len(content))]
    checkpoint.save(index, path / "index.pt")
    for read in (
        lambda: checkpoint.load(path, ("model",)),
        lambda: checkpoint.set_state(model, optimizer, checkpoint.load(path), "x"),
    ):
        with pytest.raises(UserError, match="cannot read the sharded checkpoint"):
            read()
    torch.save({"format": 2, "index": Explosive(str(marker))}, path / "index.pt")
    with pytest.raises(UserError, match=r"index.pt is not a checkpoint of this project"):
        checkpoint.load(path)
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("change", [
    {"shape": (2**40,)}, {"shape": (-16,)}, {"dtype": "load"}, {"dtype": 3}, {"chunks": []},
    {"chunks": 5}, {"chunks": [((0,), (16,), "../part", 0, 2000)]}, {"chunks": [((0,), (16,), "part", -5, 2000)]},
    {"chunks": [((0,), (16,), "part", 0, 10)]}, {"chunks": [((8,), (16,), "part", 0, 2000)]},
    {"chunks": [((0, 0), (16, 1), "part", 0, 2000)]}, {"chunks": [((0,), (16,), "part", 0, 2**70)]},
])  # fmt: skip
def test_an_index_that_cannot_be_is_refused(tmp_path, change):
    path = tmp_path / "step_000001"
    write_set(path, n_layer=1)
    state = checkpoint.load(path)
    state["index"]["tensors"]["model/transformer.ln_f.bias"] |= change
    checkpoint.save(state, path / "index.pt")
    with pytest.raises(UserError, match=r"the sharded checkpoint .*step_000001"):
        checkpoint.load(path, ("model",))
    for index in ({}, {"tensors": {}}, {"tensors": {}, "tied": {"a": "b"}}, {"tensors": 3, "tied": {}}):
        checkpoint.save(state | {"index": index}, path / "index.pt")
        with pytest.raises(UserError, match="is damaged"):
            checkpoint.load(path)


def test_a_set_of_another_model_is_refused(tmp_path):
    write_set(tmp_path / "step_000001")
    state = checkpoint.load(tmp_path / "step_000001")
    for fields, said in (
        ({"n_embd": 32}, r"model/transformer.wte.weight has the shape \(61, 16\), not \(61, 32\)"),
        ({"n_layer": 4}, "model/transformer.h.3.ln_1.weight is missing"),
    ):
        model = small_model(**fields)
        with pytest.raises(UserError, match=f"the state in some run does not fit this run: {said}"):
            checkpoint.set_state(model, adamw(model), state, "some run")


@pytest.mark.slow
def test_merge_writes_a_set_as_one_file(tmp_path, monkeypatch, capsys):
    model, optimizer = write_set(tmp_path / "run" / "step_000001", **MOE)
    words = ["checkpoint.py", "--checkpoint", str(tmp_path / "run"), "--merge", str(tmp_path / "one.pt")]
    monkeypatch.setattr(sys, "argv", words)
    checkpoint.main()
    assert "one.pt: " in capsys.readouterr().out
    merged, state = checkpoint.load(tmp_path / "one.pt"), checkpoint.get_state(model, optimizer)
    assert merged.keys() == {"format", "config", "step", "tokenizer", "model", "optimizer"}
    assert equal(merged["model"], state["model"]) and equal(merged["optimizer"]["state"], state["optimizer"]["state"])
    for change, said in (([], "one.pt exists"), (["--export_hf", "x"], "give one thing to write")):
        monkeypatch.setattr(sys, "argv", words + change)
        with pytest.raises(UserError, match=said):
            checkpoint.main()


FULL_DISK_FOR_A_SET = """
import resource, sys, pathlib, checkpoint
from test_checkpoint import adamw, small_model, train_step
folder, model = pathlib.Path(sys.argv[1]), small_model()
optimizer = adamw(model)
train_step(model, optimizer)
saver = checkpoint.BackgroundSaver(3, lambda error: print("on_error", error.errno))
for step, limit, background in ((1, -1, True), (2, 50_000, False), (3, 50_000, True), (4, -1, True)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
    saver.save_shards(model, optimizer, {"step": step}, folder / f"step_00000{step}", background)
    print(saver.wait())
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_older_set_and_no_parts(tmp_path):
    (tmp_path / "full.py").write_text(FULL_DISK_FOR_A_SET)
    out, errors = Forked(tmp_path / "full.py", tmp_path / "run").communicate()
    full = ["on_error 27", "[Errno 27] File too large"]
    assert out.splitlines() == ["None", *full, *full, "None"], errors[-3000:]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["step_000001", "step_000004"]
    assert checkpoint.load_newest(tmp_path / "run", ("model",))[1]["step"] == 4


# -- a model from a checkpoint


@pytest.mark.parametrize("fields", [{}, MOE, {**MOE, "n_shared_exp": 1, "gate": "sigmoid", "bias": False}])
def test_load_model_gives_the_model_that_was_saved(tmp_path, fields):
    model = small_model(seed=3, **fields)
    state = {"model": model.state_dict(), "config": dataclasses.asdict(model.config), "step": 5}
    checkpoint.save(state, checkpoint.step_path(tmp_path, 5))
    before = torch.get_rng_state()
    for path in (tmp_path, str(tmp_path / "step_000005.pt")):
        loaded, found = checkpoint.load_model(path)
        assert (found["step"], loaded.config, loaded.training) == (5, model.config, False)
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        idx = torch.arange(24).view(2, 12)
        assert torch.equal(logits(loaded, idx), logits(model, idx))
        assert loaded.router_stats() == model.router_stats()
    assert torch.equal(torch.get_rng_state(), before)


MISFITS = [
    {"config": {**SMALL, "n_embd": 24}}, {"config": {**SMALL, "n_layer": 0}}, {"config": {"wings": 2}},
    {"config": None}, {"model": None}, {"model": {"a": torch.zeros(1)}}, {"config": {**SMALL, "n_embd": 16.0}},
    {"config": {**SMALL, "n_embd": None}}, {"config": {**SMALL, "n_embd": 2**20}},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("change", MISFITS)
def test_a_state_that_does_not_fit_is_named(tmp_path, change):
    path = tmp_path / "step_000001.pt"
    checkpoint.save({**small_state(), **change}, path)
    for source, named in ((path, "step_000001"), (tmp_path, "step_000001|none of the 1 checkpoints")):
        with pytest.raises(UserError, match=named):
            checkpoint.load_model(source)
        with pytest.raises(UserError, match=named):
            checkpoint.init_from(source, {"n_exp": 2})


def test_a_folder_without_checkpoints_is_named(tmp_path):
    with pytest.raises(UserError, match=f"no checkpoint .* in the folder {tmp_path}"):
        checkpoint.load_model(tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(UserError, match=f"{tmp_path} is a model for --init_from, not a run"):
        checkpoint.load_model(tmp_path)


# -- GPT-2 weights

SHAPES = [{"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 67},
          {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 24, "vocab_size": 130}]  # fmt: skip


def random_gpt2(folder, **shape):
    """A folder as transformers writes it, with every tensor random (biases and norms too), and its model."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()
    for p in model.parameters():
        p.data.normal_(std=0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_gpt2_folders_read_as_transformers_reads_them(tmp_path, shape):
    theirs = random_gpt2(tmp_path, **shape)
    ours = checkpoint.from_pretrained(str(tmp_path))
    idx = torch.randint(shape["vocab_size"], (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(idx).logits
    assert ours.config.vocab_size == shape["vocab_size"] and ours.config.block_size == shape["n_positions"]
    assert (logits(ours, idx) - expected).abs().max() < 1e-5 * expected.abs().max()

    cropped = checkpoint.from_pretrained(tmp_path, block_size=20, dropout=0.1, n_exp=None)
    assert cropped.config.block_size == 20 and cropped.config.dropout == 0.1
    assert torch.equal(logits(cropped, idx), logits(ours, idx))
    with pytest.raises(UserError, match="block_size 99 is more than"):
        checkpoint.from_pretrained(tmp_path, block_size=99)


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_exported_folder_loads_in_transformers_and_here(tmp_path, shape, bias):
    transformers = pytest.importorskip("transformers")
    fields = {"block_size" if name == "n_positions" else name: value for name, value in shape.items()}
    model = GPT(GPTConfig(**fields, bias=bias))
    for p in model.parameters():
        p.data.normal_(std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    checkpoint.export_hf(model, tmp_path / "out")
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    idx = torch.randint(shape["vocab_size"], (3, 20), generator=torch.Generator().manual_seed(1))
    expected = logits(model, idx)
    with torch.no_grad():
        assert (theirs.eval()(idx).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    again = checkpoint.from_pretrained(tmp_path / "out")
    assert (logits(again, idx) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_both_key_styles_and_old_mask_buffers_are_read(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    random_gpt2(tmp_path / "new", **SHAPES[0])
    weights = safetensors.load_file(tmp_path / "new" / "model.safetensors")
    old = {key.removeprefix("transformer."): tensor for key, tensor in weights.items()}
    for layer in range(2):
        old[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32)
        old[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    os.mkdir(tmp_path / "old")
    (tmp_path / "old" / "config.json").write_text((tmp_path / "new" / "config.json").read_text())
    safetensors.save_file(old, tmp_path / "old" / "model.safetensors")
    idx = torch.arange(20)[None]
    assert torch.equal(*(logits(checkpoint.from_pretrained(tmp_path / name), idx) for name in ("old", "new")))


def test_added_token_rows_are_means_and_never_the_likeliest(tmp_path):
    random_gpt2(tmp_path, **SHAPES[0])
    ours, padded = checkpoint.from_pretrained(tmp_path), checkpoint.from_pretrained(tmp_path, vocab_size=128)
    idx = torch.arange(20)[None]
    plain, with_rows = logits(ours, idx), logits(padded, idx)
    torch.testing.assert_close(with_rows[..., :67], plain, rtol=0, atol=1e-5)
    assert (with_rows[..., 67:].amax(-1) < plain.amax(-1)).all()
    probability = torch.softmax(with_rows, -1)[..., 67:]
    assert (probability < 1 / 67).all()
    with pytest.raises(UserError, match="vocab_size 50 is less than the 67 tokens"):
        checkpoint.from_pretrained(tmp_path, vocab_size=50)


@pytest.mark.parametrize("change, said", [
    ({"activation_function": "relu"}, "activation_function is 'relu'"),
    ({"model_type": "gpt_neo"}, "model_type is 'gpt_neo'"),
    ({"n_inner": 7}, "n_inner is 7"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ({"auto_map": {"AutoModelForCausalLM": "mine.Model"}}, "auto_map is"),
    ({"n_head": 3}, "n_embd 16 is not divisible"),
    ({"n_layer": 4}, "do not fit the model: transformer.h.2.* is missing"),
    ({"n_layer": 1}, "do not fit the model: transformer.h.1.* is unknown"),
    ({"n_embd": 32}, "do not fit the model: transformer.wte.weight has the shape"),
    ({"n_embd": 16.0}, "config.json: no such model: n_embd must be int, not 16.0"),
    ({"n_embd": None}, "config.json: no such model: n_embd has no value"),
    ({"vocab_size": True}, "config.json: no such model: vocab_size must be int"),
    ({"n_positions": -1}, "config.json: no such model: block_size must be at least 1"),
])  # fmt: skip
def test_other_architectures_are_refused(tmp_path, change, said):
    random_gpt2(tmp_path, **SHAPES[0])
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, **change}))
    with pytest.raises(UserError, match=said):
        checkpoint.from_pretrained(tmp_path)


def test_folders_without_weights_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no folder gpt3 .* or one of gpt2, gpt2-medium"):
        checkpoint.from_pretrained("gpt3")
    with pytest.raises(UserError, match=r"no checkpoint \(step_\*\) and no config\.json in the folder"):
        checkpoint.from_pretrained(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json"):
            checkpoint.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no model\.safetensors .* pickled"):
        checkpoint.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not this")
    with pytest.raises(UserError, match=r"cannot read .*model\.safetensors"):
        checkpoint.from_pretrained(tmp_path)


@pytest.mark.slow
def test_without_a_network_the_remedy_is_printed(tmp_path):
    code = "import common, checkpoint; common.run(lambda: checkpoint.from_pretrained('gpt2'))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600,
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert result.returncode == 2
    assert "cannot download gpt2" in result.stderr and "--local-dir gpt2" in result.stderr
    assert len(result.stderr.splitlines()) == 1


# -- upcycling

UPCYCLED = [
    {"top_k": 2}, {"top_k": 1}, {"gate": "sigmoid", "top_k": 3}, {"use_bias_balance": True, "stride": 1},
    {"use_noisy_top_k": True, "n_shared_exp": 2}, {"use_switch_tfm_init": True, "router_use_full_prec": True},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:top_k=1")
@pytest.mark.parametrize("fields", UPCYCLED)
@pytest.mark.parametrize("source", ["gpt2", "checkpoint"])
def test_an_upcycled_model_computes_the_dense_function(tmp_path, source, fields):
    if source == "gpt2":
        random_gpt2(tmp_path, **SHAPES[0])
        dense = checkpoint.from_pretrained(tmp_path)
    else:
        checkpoint.save(small_state(bias=False), tmp_path / "step_000001.pt")
        dense = checkpoint.load_model(tmp_path)[0]
    before = torch.get_rng_state()
    model = checkpoint.init_from(str(tmp_path), {"n_exp": 4, **fields}, torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(model.moe_layers()) == math.ceil(model.config.n_layer / model.config.stride)
    idx = torch.arange(32).view(2, 16)
    expected = logits(dense, idx)
    torch.testing.assert_close(logits(model, idx), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert all(moe.router.w_g.weight.std() > 0.005 for _, moe in model.moe_layers())
    same = checkpoint.init_from(str(tmp_path), {"n_exp": 4, **fields}, torch.Generator().manual_seed(5))
    assert equal(dict(model.state_dict()), dict(same.state_dict()))


@pytest.mark.slow
def test_init_from_a_checkpoint_keeps_and_changes(tmp_path):
    checkpoint.save(small_state(**MOE), tmp_path / "step_000001.pt")
    old = checkpoint.load_model(tmp_path)[0]
    overrides = {"dropout": 0.2, "use_noisy_top_k": False, "block_size": 12, "n_head": 2, "n_layer": None}
    new = checkpoint.init_from(tmp_path / "step_000001.pt", overrides)
    assert (new.config.dropout, new.config.block_size, new.config.n_exp) == (0.2, 12, 4)
    idx = torch.arange(24).view(2, 12)
    assert torch.equal(logits(new, idx), logits(old, idx))
    for overrides, said in (
        ({"n_exp": 8}, "do not fit"), ({"n_exp": 1}, "mlp.c_fc.weight is missing"), ({"top_k": 9}, "top_k 9"),
        ({"n_head": 4}, "n_head 4 does not fit .*step_000001.pt, whose n_head is 2"), ({"bias": False}, "bias False"),
        ({"n_layer": 2}, "n_layer 2 does not fit .*, whose n_layer is 3: leave it out"),
        ({"vocab_size": 50}, "vocab_size 50 is less than the 61 tokens of .*step_000001.pt"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            checkpoint.init_from(tmp_path, overrides)
    with pytest.raises(UserError, match=r"no folder nowhere and no such file: give a checkpoint .* gpt2-xl"):
        checkpoint.init_from("nowhere", {})
    grown = checkpoint.init_from(tmp_path, {"vocab_size": 99})
    assert torch.equal(logits(grown, idx)[..., :61], logits(old, idx))


# -- the model of a script


@pytest.mark.slow
def test_both_flags_take_every_kind_of_source(tmp_path, monkeypatch):
    model = small_model(vocab_size=50304)
    state = {"model": model.state_dict(), "config": dataclasses.asdict(model.config), "tokenizer": "gpt2"}
    checkpoint.save(state, tmp_path / "run" / "step_000009.pt")
    checkpoint.export_hf(model, tmp_path / "hf")
    checkpoint.export_hf(model, tmp_path / "gpt2")  # a folder of that name comes before the download
    monkeypatch.chdir(tmp_path)
    idx = torch.arange(12)[None]
    for source in ("run", "run/step_000009.pt", "hf", "gpt2"):
        for flags in ((source, ""), ("", source)):
            opened, tokenizer = checkpoint.open_model(*flags, "cpu")
            assert tokenizer.name == checkpoint.tokenizer_of(source) == "gpt2" and not opened.training
            assert torch.equal(logits(opened, idx), logits(model, idx))
    checkpoint.save({**state, "tokenizer": "bytes"}, tmp_path / "run" / "step_000010.pt")
    assert checkpoint.tokenizer_of("run") == "bytes"
    for flags in (("", ""), ("run", "gpt2")):
        with pytest.raises(UserError, match="give one model"):
            checkpoint.open_model(*flags, "cpu")
