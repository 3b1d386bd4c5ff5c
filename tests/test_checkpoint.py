"""lab/checkpoint.py: whole or absent, damage found, nothing executed, the same state again on any number of ranks."""

import copy
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

MOE = {"n_exp": 4, "use_noisy_top_k": True, "use_bias_balance": True, "train_capacity": float("inf")}
BOTH = ("model", "optimizer")
BOTH_FORMS = pytest.mark.parametrize("fsdp", [False, True])


def train_step(model, optimizer, seed):
    idx = torch.randint(61, (2, 8), generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    model.train()(idx, idx).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def trained(seed=0, steps=1, lr=1e-2, before=lambda model: model, **fields):
    shape = {"block_size": 16, "vocab_size": 61, "n_layer": 3, "n_head": 2, "n_embd": 16}
    model = before(GPT(GPTConfig(**shape | fields), torch.Generator().manual_seed(seed)))
    params = [[p for p in model.parameters() if (p.dim() == 1) == flat] for flat in (False, True)]
    groups = [{"params": params[0], "weight_decay": 0.1}, {"params": params[1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), foreach=False)
    for step in range(steps):
        train_step(model, optimizer, step)
    return model, optimizer


def write(folder, model, optimizer, step=1, fsdp=False, keep=9):
    """Path of a checkpoint, whole when this returns."""
    saver, fields = BackgroundSaver(folder, keep), {"step": step, "settings": {"cap": float("inf"), "x": None}}
    assert saver.save(model, optimizer, fields, step, fsdp) is None and saver.wait() is None
    return step_path(folder, step).with_suffix("" if fsdp else ".pt")


def equal(a, b):
    """Whether model and optimizer of two checkpoints, or of tensors_of(), are the same to the last bit."""
    pairs = [(a[part], b[part]) for part in BOTH]
    return all(x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x) for x, y in pairs)


def fork(function, *args):
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


@BOTH_FORMS
@pytest.mark.parametrize("fields", [{}, MOE, MOE | {"freeze_router": True}])
def test_a_restored_run_continues_bit_for_bit(tmp_path, fields, fsdp):
    model, optimizer = trained(steps=2, **fields)
    path = write(tmp_path / "deep" / "run", model, optimizer, 2, fsdp)
    loaded = load(path, BOTH)
    assert equal(loaded, tensors_of(model, optimizer)) and "lm_head.weight" not in loaded["model"]
    assert (loaded["step"], loaded["settings"]) == (2, {"cap": float("inf"), "x": None})
    other, other_optimizer = trained(seed=9, steps=0, lr=0.5, **fields)
    restore(other, other_optimizer, load(path), path)
    assert other.lm_head.weight is other.transformer.wte.weight
    for group, decay in zip(other_optimizer.param_groups, (0.1, 0.0), strict=True):
        assert (group["lr"], group["weight_decay"]) == (0.5, decay)  # the optimizer keeps its own
        group["lr"] = 1e-2
    for seed in (2, 3):
        train_step(model, optimizer, seed)
        train_step(other, other_optimizer, seed)
    assert equal(tensors_of(model, optimizer), tensors_of(other, other_optimizer))


@BOTH_FORMS
def test_a_state_of_another_model_is_refused_with_the_first_misfit(tmp_path, fsdp):
    path = write(tmp_path, *trained(), fsdp=fsdp)
    for fields, said in (
        ({"n_embd": 32}, r"h.0.attn.c_attn.bias has shape \(48,\), in this run \(96,\)"),
        ({"n_layer": 2}, r"h.2.attn.c_attn.bias has shape \(48,\), in this run None"),
        ({"n_layer": 4}, r"h.3.attn.c_attn.bias has shape None, in this run \(48,\)"),
    ):
        with pytest.raises(UserError, match=f"step_000001.* does not fit: transformer.{said}"):
            restore(*trained(steps=0, **fields), load(path), path)


def rank_of_two(rank, folder):
    """Restores each checkpoint of one process, on a plain and on a sharded model, and writes it again."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2)
    for fsdp in (False, True):
        for source in (folder / "step_000001.pt", folder / "step_000002"):
            model, optimizer = trained(5 + rank, 0, before=shard if fsdp else lambda model: model, **MOE)
            given = (load(source), source) if rank == 0 else (None, None)
            restore(model, optimizer, *given)
            with torch.no_grad():
                model.eval()(torch.zeros(2, 8, dtype=torch.int64))  # FSDP leaves some parameters whole
            saver = BackgroundSaver(folder / f"{source.stem}_{fsdp}", 3, dist.new_group(backend="gloo"))
            saver.save(model, optimizer, {"step": 7}, 7, fsdp)
            train_step(model, optimizer, 0)  # while the copies are written
            assert saver.wait() is None and model.lm_head.weight is model.transformer.wte.weight
    with pytest.raises(UserError, match=r"does not fit: transformer.h.0.attn"):
        restore(*trained(n_embd=32), *given)
    dist.destroy_process_group()
    os._exit(0)  # a thread of gloo may otherwise abort a finished process


@pytest.mark.slow
def test_one_rank_two_ranks_plain_and_sharded_continue_from_each_other(tmp_path):
    wanted = trained(**MOE)
    write(tmp_path, *wanted, 1), write(tmp_path, *wanted, 2, fsdp=True)
    ranks = [fork(rank_of_two, rank, tmp_path) for rank in range(2)]
    assert [process.join(300) or process.exitcode for process in ranks] == [0, 0]
    for folder in tmp_path.glob("step_*_*e"):
        path, again = read(folder, BOTH)
        assert len(list(path.glob("*"))) == (3 if folder.name.endswith("True") else 0)  # two parts and the index
        other = trained(seed=3, **MOE)
        restore(*other, load(path), path)
        assert equal(again, tensors_of(*wanted)) and equal(again, tensors_of(*other))


def damaged(data, rng):
    """The bytes cut off, or with a run of zeros or of flipped bits."""
    start, length = rng.randrange(len(data)), rng.choice((1, 1, 300))
    flipped = bytes(byte ^ 4 for byte in data[start : start + length])
    return rng.choice((data[:start], data[:start] + flipped + data[start + length :]))


@pytest.mark.slow
@BOTH_FORMS
def test_damage_is_found_or_changes_nothing(tmp_path, fsdp):
    """Bytes that no checksum covers (padding, a date) may differ; what is loaded may not."""
    path, rng, found = write(tmp_path, *trained(n_layer=1), fsdp=fsdp), random.Random(0), 0
    good = load(path, BOTH)
    files = sorted(path.iterdir()) if fsdp else [path]
    for number in range(120):
        file = files[number % len(files)]
        original = file.read_bytes()
        file.write_bytes(damaged(original, rng))
        try:
            assert equal(load(path, BOTH), good), f"damage {number} of {file.name} was not found"
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            found += 1
        file.write_bytes(original)
    assert found > 90
    if fsdp:
        files[1].rename(path / "other.safetensors")
        with pytest.raises(UserError, match=r"is damaged \(other"):
            load(path)


def test_the_newest_is_by_number_and_a_damaged_one_gives_way(tmp_path, capsys):
    paths = [step_path(tmp_path, step) for step in (5, 999_999, 1_000_000)]
    for path in paths:
        save({"step": step_of(path)}, path)
    for name in ("step_2000000.pt.tmp", "step_best.pt", "other.pt"):
        (tmp_path / name).touch()
    (tmp_path / "step_3000000").mkdir()  # a set without its index
    assert checkpoint.checkpoints(tmp_path) == paths and checkpoint.newest(tmp_path) == paths[2]
    paths[2].write_bytes(paths[2].read_bytes()[:-9])
    path, state = read(tmp_path)
    assert path == paths[1] and state["step"] == 999_999 and f"skipped: {paths[2]}" in capsys.readouterr().err
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"has no checkpoint .* that loads"):
        read(tmp_path)


class Payload:
    def __reduce__(self):
        return exec, (f"open({self.marker!r}, 'w')",)


def test_a_crafted_pickle_executes_nothing(tmp_path):
    """In a file of each kind, and in each place of a set where torch would unpickle one."""
    marker, path, file = tmp_path / "it_ran", write(tmp_path, *trained(), fsdp=True), tmp_path / "a.pt"
    Payload.marker, payload = str(marker), Payload()
    (path / ".metadata").write_bytes(pickle.dumps(payload))
    assert load(path, BOTH)["step"] == 1
    for as_zip in (True, False):
        torch.save({"format": checkpoint.FORMAT, "model": payload}, file, _use_new_zipfile_serialization=as_zip)
        shutil.copy(file, path / "index.pt")
        for source in (file, path):
            with pytest.raises(UserError, match=r"(a|index)\.pt is no checkpoint of this project"):
                load(source)
    assert not marker.exists()
    pickle.loads(pickle.dumps(payload))
    assert marker.exists(), "the payload of this test does not run"


def test_foreign_files_and_other_formats_are_named(tmp_path):
    """With bit 4 of an entry's attributes torch returns memory never filled; a compressed entry may be a zip bomb."""
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(2**20))
    for name, state in (("bare.pt", {"a": torch.zeros(3)}), ("list.pt", [1]), ("older.pt", {"format": 2})):
        torch.save(state, tmp_path / name)
    save({"step": 1, "model": {"w": torch.arange(6.0)}}, tmp_path / "good.pt")
    content = bytearray((tmp_path / "good.pt").read_bytes())
    content[content.rindex(b"PK\1\2", 0, content.rindex(b"/data/0")) + 38] ^= 0x10
    (tmp_path / "bit.pt").write_bytes(content)
    for name in ("bomb.pt", "bare.pt", "list.pt", "older.pt", "bit.pt", "absent.pt"):
        with pytest.raises(UserError, match=f"{name} is no checkpoint of this project or damaged"):
            load(tmp_path / name)
    with pytest.raises(UserError, match=r"good\.pt has no config"):
        load(tmp_path / "good.pt", ("step", "config"))


@BOTH_FORMS
def test_the_state_at_the_call_is_saved_and_training_does_not_wait(tmp_path, monkeypatch, fsdp):
    go, real = threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args: (go.wait(60), real(*args)))
    run, saver, fields = trained(), BackgroundSaver(tmp_path, 2), {"step": 1, "x": [1]}
    before = copy.deepcopy(tensors_of(*run))
    saver.save(*run, fields, 1, fsdp)
    train_step(*run, 0)
    fields["x"].append(2)
    assert not checkpoint.checkpoints(tmp_path)
    go.set()
    assert saver.wait() is None
    loaded = read(tmp_path, BOTH)[1]
    assert equal(loaded, before) and loaded["x"] == [1]


@BOTH_FORMS
def test_the_newest_are_kept_and_leftovers_removed(tmp_path, fsdp):
    """A checkpoint damaged after the step that is written does not count: with keep=1 it displaces nothing."""
    run = trained()
    for step in (1, 2, 3):
        write(tmp_path, *run, step, fsdp)
    step_path(tmp_path, 9).write_bytes(b"PK\3\4 cut off")
    (tmp_path / "step_000004.pt.tmp").touch()
    mine = ["notes.txt", "step_000001_hf", "step_1.bak", "step_backup"]
    for name in [*mine, "step_000005"]:
        (tmp_path / name).mkdir()
    kept = [write(tmp_path, *run, step, fsdp, keep=2) for step in (5, 6)]
    assert {path.name for path in tmp_path.iterdir()} == {*mine, "step_000009.pt", kept[0].name, kept[1].name}
    assert read(tmp_path)[0] == kept[1]
    assert write(tmp_path, *run, 9, fsdp, keep=1).exists() and read(tmp_path)[1]["step"] == 9


def test_what_would_not_load_again_is_an_error_and_older_ones_stay(tmp_path):
    run, saver = trained(), BackgroundSaver(tmp_path, 1)
    old = write(tmp_path, *run)
    saver.save(*run, {"step": 2, "settings": {"path": Path("a")}}, 2)
    assert isinstance(saver.wait(), UserError) and read(tmp_path)[0] == old


def save_on_a_full_disk(folder, fsdp, out):
    """A limit on file size stands for the full disk: the same OSError at the same places."""
    run, saver = trained(), BackgroundSaver(folder, 1)
    for step, limit in ((1, -1), (2, 50_000), (3, 50_000), (4, -1), (5, 50_000)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
        saver.save(*run, {"step": step}, step, fsdp)
        out.put(repr(saver.wait()))


@BOTH_FORMS
def test_a_full_disk_is_reported_and_leaves_the_older_checkpoint_and_no_parts(tmp_path, fsdp):
    out, full = multiprocessing.get_context("fork").Queue(), "OSError(27, 'File too large')"
    fork(save_on_a_full_disk, tmp_path, fsdp, out)
    assert [out.get(timeout=60) for _ in range(5)] == ["None", full, full, "None", full]
    assert [path.stem for path in tmp_path.iterdir()] == ["step_000004"] and read(tmp_path, BOTH)[1]["step"] == 4


def save_forever(folder, fsdp, step):
    run, saver = trained(), BackgroundSaver(folder, 2)
    while True:
        saver.save(*run, {"step": step}, step, fsdp)
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
        assert all(load(path, BOTH)["step"] == step_of(path) for path in checkpoint.checkpoints(tmp_path))
        step = step_of(checkpoint.newest(tmp_path)) + 1
    assert len(list(tmp_path.iterdir())) <= 4
