"""lab/checkpoint.py: whole or absent, damage found, nothing executed, the same state again on any number of ranks."""

import copy
import dataclasses
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lab import checkpoint
from lab.checkpoint import BackgroundSaver, load, read, restore, save, step_of, step_path, tensors_of
from lab.common import UserError
from lab.devices import shard
from model import GPT, GPTConfig

SMALL = {"block_size": 16, "vocab_size": 61, "n_layer": 3, "n_head": 2, "n_embd": 16}
MOE = {"n_exp": 4, "top_k": 2, "use_noisy_top_k": True, "use_bias_balance": True, "train_capacity": float("inf")}
NEEDS = ("model", "optimizer", "step")
BOTH_FORMS = pytest.mark.parametrize("fsdp", [False, True])


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # processes are forked


def small_model(seed=0, **fields):
    return GPT(GPTConfig(**SMALL | fields), torch.Generator().manual_seed(seed))


def adamw(model, lr=1e-2, betas=(0.9, 0.95)):
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, foreach=False)


def train_step(model, optimizer, seed=0):
    idx = torch.randint(61, (2, 8), generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    model.train()(idx, idx).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def trained(seed=0, steps=1, **fields):
    model = small_model(seed, **fields)
    optimizer = adamw(model)
    for step in range(steps):
        train_step(model, optimizer, step)
    return model, optimizer


def write(folder, model, optimizer, step=1, fsdp=False, keep=9):
    """Path of a checkpoint, whole when this returns."""
    saver = BackgroundSaver(folder, keep)
    fields = {"step": step, "config": dataclasses.asdict(model.config), "settings": {"cap": float("inf"), "x": None}}
    assert saver.save(model, optimizer, fields, step, fsdp) is None and saver.wait() is None
    return step_path(folder, step).with_suffix("" if fsdp else ".pt")


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


def tensors(loaded):
    return {"model": loaded["model"], "optimizer": loaded["optimizer"]}


def fork(function, *args):
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


# -- the same state again


@BOTH_FORMS
@pytest.mark.parametrize("fields", [{}, MOE, MOE | {"freeze_router": True}])
def test_a_restored_run_continues_bit_for_bit(tmp_path, fields, fsdp):
    model, optimizer = trained(steps=2, **fields)
    path = write(tmp_path / "deep" / "run", model, optimizer, 2, fsdp)
    loaded = load(path, NEEDS)
    assert equal(tensors(loaded), tensors_of(model, optimizer)) and "lm_head.weight" not in loaded["model"]
    assert (loaded["step"], loaded["settings"]) == (2, {"cap": float("inf"), "x": None})
    other = small_model(seed=9, **fields)
    other_optimizer = adamw(other, lr=0.5, betas=(0.5, 0.6))
    restore(other, other_optimizer, load(path), path)
    assert other.lm_head.weight is other.transformer.wte.weight
    kept = [(group["lr"], group["betas"], group["weight_decay"]) for group in other_optimizer.param_groups]
    assert kept == [(0.5, (0.5, 0.6), 0.1), (0.5, (0.5, 0.6), 0.0)]
    for group in other_optimizer.param_groups:
        group |= {"lr": 1e-2, "betas": (0.9, 0.95)}
    for seed in (2, 3):
        train_step(model, optimizer, seed)
        train_step(other, other_optimizer, seed)
    assert equal(tensors_of(model, optimizer), tensors_of(other, other_optimizer))


@BOTH_FORMS
def test_a_state_of_another_model_is_refused_with_the_first_misfit(tmp_path, fsdp):
    path = write(tmp_path, *trained(), fsdp=fsdp)
    for fields, said in (
        ({"n_embd": 32}, r"transformer.h.0.attn.c_attn.bias has shape \(48,\), in this run \(96,\)"),
        ({"n_layer": 2}, r"transformer.h.2.attn.c_attn.bias has shape \(48,\), in this run None"),
        ({"n_layer": 4}, r"transformer.h.3.attn.c_attn.bias has shape None, in this run \(48,\)"),
    ):
        with pytest.raises(UserError, match=f"step_000001.* does not fit: {said}"):
            restore(*trained(steps=0, **fields), load(path), path)


def rank_of_two(rank, folder):
    """Restores each checkpoint of one process, on a plain and on a sharded model, and writes it again."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2)
    group = dist.new_group(backend="gloo")
    for fsdp in (False, True):
        for source in (folder / "step_000001.pt", folder / "step_000002"):
            model = small_model(seed=5 + rank, **MOE)
            if fsdp:
                shard(model)
            optimizer = adamw(model)
            given = (load(source), source) if rank == 0 else (None, None)
            restore(model, optimizer, *given)
            assert model.lm_head.weight is model.transformer.wte.weight
            saver = BackgroundSaver(folder / f"{source.stem}_{fsdp}", 3, group)
            saver.save(model, optimizer, {"step": 7}, 7, fsdp)
            train_step(model, optimizer)  # while the copies are written
            assert saver.wait() is None
            dist.barrier()
    with pytest.raises(UserError, match=r"does not fit: transformer.h.0.attn"):
        restore(*trained(n_embd=32), *given)
    dist.destroy_process_group()
    os._exit(0)  # a thread of gloo may otherwise abort a finished process


@pytest.mark.slow
def test_one_rank_two_ranks_plain_and_sharded_continue_from_each_other(tmp_path):
    model, optimizer = trained(**MOE)
    write(tmp_path, model, optimizer, 1)
    write(tmp_path, model, optimizer, 2, fsdp=True)
    ranks = [fork(rank_of_two, rank, tmp_path) for rank in range(2)]
    assert [process.join(300) or process.exitcode for process in ranks] == [0, 0]
    for source in ("step_000001", "step_000002"):
        assert len(list((tmp_path / f"{source}_True" / "step_000007").iterdir())) == 3  # two parts and the index
        for fsdp in (False, True):
            path, again = read(tmp_path / f"{source}_{fsdp}", NEEDS)
            other = trained(seed=3, **MOE)
            restore(*other, load(path), path)
            assert equal(tensors(again), tensors_of(model, optimizer)) and equal(tensors(again), tensors_of(*other))


# -- damage, and files of others


def damaged(data, rng):
    """The bytes cut off, with a run of zeros, or with a flipped bit."""
    data, start, kind = bytearray(data), rng.randrange(len(data)), rng.randrange(4)
    if kind == 0:
        return data[:start]
    if kind == 1:
        data[start : start + 300] = bytes(len(data[start : start + 300]))
    else:
        data[start] ^= 1 << rng.randrange(8)
    return bytes(data)


@pytest.mark.slow
@BOTH_FORMS
def test_damage_is_found_or_changes_nothing(tmp_path, fsdp):
    """Bytes that no checksum covers (padding, a date) may differ; what is loaded may not."""
    path, rng, found = write(tmp_path, *trained(n_layer=1), fsdp=fsdp), random.Random(0), 0
    good = load(path, NEEDS)
    files = sorted(path.iterdir()) if fsdp else [path]
    for number in range(120):
        file = files[number % len(files)]
        original = file.read_bytes()
        file.write_bytes(damaged(original, rng))
        try:
            assert equal(load(path, NEEDS), good), f"damage {number} of {file.name} was not found"
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            found += 1
        file.write_bytes(original)
    assert found > 90
    if fsdp:
        shutil.copy(files[1], path / "another.safetensors")
        with pytest.raises(UserError, match="is damaged"):
            load(path)
        (path / "another.safetensors").rename(files[1].with_name("renamed.safetensors"))
        files[1].unlink()
        with pytest.raises(UserError, match="is damaged"):
            load(path)


def test_a_damaged_newest_gives_way_to_the_one_before(tmp_path, capsys):
    paths = [step_path(tmp_path, step) for step in (1, 2, 3)]
    for step, path in enumerate(paths, 1):
        save({"step": step}, path)
    paths[2].write_bytes(paths[2].read_bytes()[:-9])
    path, state = read(tmp_path)
    assert path == paths[1] and state["step"] == 2 and f"skipped: {paths[2]}" in capsys.readouterr().err
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"has no checkpoint .* that loads"):
        read(tmp_path)


class Payload:
    """Runs code where it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_a_crafted_pickle_executes_nothing(tmp_path):
    """In a file of each kind, and in each place of a set where torch would unpickle one."""
    marker, path, file = tmp_path / "it_ran", write(tmp_path, *trained(), fsdp=True), tmp_path / "a.pt"
    for as_zip in (True, False):
        torch.save({"format": checkpoint.FORMAT, "model": Payload(marker)}, file, _use_new_zipfile_serialization=as_zip)
        with pytest.raises(UserError, match=r"a\.pt is no checkpoint of this project"):
            load(file)
        (path / ".metadata").write_bytes(pickle.dumps(Payload(marker)))
        assert load(path, NEEDS)["step"] == 1
        shutil.copy(path / "index.pt", tmp_path / "index.pt")
        shutil.copy(file, path / "index.pt")
        with pytest.raises(UserError, match=r"index\.pt is no checkpoint"):
            load(path)
        shutil.copy(tmp_path / "index.pt", path / "index.pt")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists(), "the payload of this test does not run"


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_foreign_files_and_other_formats_are_named(tmp_path):
    """With bit 4 of an entry's attributes torch returns memory never filled; a compressed entry may be a zip bomb."""
    for name, compression in (("some.zip", zipfile.ZIP_STORED), ("bomb.pt", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(tmp_path / name, "w", compression) as archive:
            archive.writestr("a/data.pkl", bytes(2**20))
    (tmp_path / "png").write_bytes(b"\x89PNG\r\n")
    torch.save(small_model().state_dict(), tmp_path / "bare.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save({"format": 2}, tmp_path / "older.pt")
    save({"step": 1, "model": {"w": torch.arange(6.0)}}, tmp_path / "good.pt")
    content = bytearray((tmp_path / "good.pt").read_bytes())
    content[content.rindex(b"PK\1\2", 0, content.rindex(b"/data/0")) + 38] ^= 0x10
    (tmp_path / "bit.pt").write_bytes(content)
    assert zipfile.ZipFile(tmp_path / "bit.pt").testzip() is None
    for name in ("some.zip", "bomb.pt", "png", "bare.pt", "tensor.pt", "older.pt", "bit.pt", "absent.pt"):
        with pytest.raises(UserError, match=f"{name} is no checkpoint of this project or damaged"):
            load(tmp_path / name)
    with pytest.raises(UserError, match=r"good\.pt has no config"):
        load(tmp_path / "good.pt", ("step", "config"))


# -- the thread that saves


def test_the_newest_is_by_number_and_whole(tmp_path):
    assert checkpoint.newest(tmp_path / "absent") is None
    for step in (999_999, 1_000_000, 5):
        save({}, step_path(tmp_path, step))
    for name in ("step_2000000.pt.tmp", "step_best.pt", "step_3.pt", "other.pt"):
        (tmp_path / name).touch()
    (tmp_path / "step_3000000").mkdir()  # a set without its index
    assert [step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [5, 999_999, 1_000_000]
    assert checkpoint.newest(tmp_path).name == "step_1000000.pt"


@BOTH_FORMS
def test_the_state_at_the_call_is_saved_and_training_does_not_wait(tmp_path, monkeypatch, fsdp):
    go, real = threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args: (go.wait(60), real(*args)))
    model, optimizer = trained()
    before, saver, fields = copy.deepcopy(tensors_of(model, optimizer)), BackgroundSaver(tmp_path, 2), {"step": 1, "x": [1]}
    saver.save(model, optimizer, fields, 1, fsdp)
    train_step(model, optimizer)
    fields["x"].append(2)
    assert not checkpoint.checkpoints(tmp_path)
    go.set()
    assert saver.wait() is None
    loaded = read(tmp_path, NEEDS)[1]
    assert equal(tensors(loaded), before) and loaded["x"] == [1]


@BOTH_FORMS
def test_the_newest_are_kept_and_leftovers_removed(tmp_path, fsdp):
    """A checkpoint damaged after the step that is written does not count: with keep=1 it displaces nothing."""
    model, optimizer = trained()
    for step in (1, 2, 3):
        write(tmp_path, model, optimizer, step, fsdp)
    step_path(tmp_path, 9).write_bytes(b"PK\3\4 cut off")
    (tmp_path / "step_000004.pt.tmp").touch()
    (tmp_path / "step_000005").mkdir()
    mine = ["notes.txt", "step_000001_hf", "step_1.bak", "step_backup"]
    for name in mine:
        (tmp_path / name).mkdir()
    kept = [write(tmp_path, model, optimizer, step, fsdp, keep=2) for step in (5, 6)]
    assert {path.name for path in tmp_path.iterdir()} == {*mine, "step_000009.pt", kept[0].name, kept[1].name}
    assert read(tmp_path)[0] == kept[1]
    assert write(tmp_path, model, optimizer, 9, fsdp, keep=1).exists() and read(tmp_path)[1]["step"] == 9


def test_what_would_not_load_again_is_an_error_and_older_ones_stay(tmp_path):
    model, optimizer = trained()
    old, saver = write(tmp_path, model, optimizer, 1), BackgroundSaver(tmp_path, 1)
    saver.save(model, optimizer, {"step": 2, "settings": {"path": Path("a")}}, 2)
    assert isinstance(saver.wait(), UserError) and saver.wait() is None
    assert read(tmp_path)[0] == old


def save_on_a_full_disk(folder, fsdp, out):
    """A limit on file size stands for the full disk: the same OSError at the same places."""
    (model, optimizer), saver = trained(), BackgroundSaver(folder, 1)
    for step, limit in ((1, -1), (2, 50_000), (3, 50_000), (4, -1), (5, 50_000)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
        saver.save(model, optimizer, {"step": step}, step, fsdp)
        out.put(repr(saver.wait()))


@BOTH_FORMS
def test_a_full_disk_is_reported_and_leaves_the_older_checkpoint_and_no_parts(tmp_path, fsdp):
    out = multiprocessing.get_context("fork").Queue()
    fork(save_on_a_full_disk, tmp_path, fsdp, out).join(60)
    full = "OSError(27, 'File too large')"
    assert [out.get(timeout=9) for _ in range(5)] == ["None", full, full, "None", full]
    assert [path.stem for path in tmp_path.iterdir()] == ["step_000004"]
    assert read(tmp_path, NEEDS)[1]["step"] == 4


def save_forever(folder, fsdp, step):
    (model, optimizer), saver = trained(), BackgroundSaver(folder, 2)
    while True:
        saver.save(model, optimizer, {"step": step}, step, fsdp)
        step += 1


@pytest.mark.slow
@BOTH_FORMS
def test_a_kill_at_any_moment_leaves_each_checkpoint_whole_or_absent(tmp_path, fsdp):
    rng, step = random.Random(0), 1
    for _ in range(10):
        process = fork(save_forever, tmp_path, fsdp, step)
        while not checkpoint.newest(tmp_path) or step_of(checkpoint.newest(tmp_path)) < step + 1:
            assert process.is_alive()
            time.sleep(0.005)
        time.sleep(rng.random() / 10)
        process.kill()
        process.join()
        for path in checkpoint.checkpoints(tmp_path):
            assert load(path, NEEDS)["step"] == step_of(path)
        step = step_of(checkpoint.newest(tmp_path)) + 1
    assert len(list(tmp_path.iterdir())) <= 4
