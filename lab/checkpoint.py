"""Checkpoints: whole or absent on disk, read without executing anything.

`step_{step:06d}.pt` is a dict written by torch.save: format, model {name: tensor} with a tied weight once, optimizer
{"name/moment": tensor}, loader (place in the data), step, hours, settings, config, tokenizer. It is fsynced under
another name and renamed, so it is whole when it appears; damage is found by checksums; loading is `weights_only`.

With --fsdp it is a set, the folder `step_{step:06d}`: each rank writes its part as safetensors through
torch.distributed.checkpoint (DCP), then rank 0 `index.pt`, the rest of that dict and the sha256 of each part. The set
exists when the index does. N ranks, sharded or not, continue on M from either form.
"""

import hashlib
import re
import shutil
import sys
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from lab.common import UserError, atomic_write
from lab.devices import world

FORMAT, INDEX, PARTS = 3, "index.pt", ("model", "optimizer")
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable")  # DCP in a single process


def step_path(folder, step):
    return Path(folder) / f"step_{step:06d}.pt"


def step_of(path):
    return int(Path(path).stem.removeprefix("step_"))


def is_set(path):
    return Path(path, INDEX).is_file()


def checkpoints(folder):
    """Paths of the checkpoints in `folder`, files and sets, oldest first, without those not yet written whole."""
    found = [path for path in Path(folder).glob("step_*") if re.fullmatch(r"step_\d{6,}(\.pt)?", path.name)]
    return sorted((path for path in found if path.suffix or is_set(path)), key=step_of)


def newest(folder):
    """Path of the newest checkpoint in `folder`, or None. It is not opened: read() finds the newest that loads."""
    return next(reversed(checkpoints(folder)), None)


def read(path, needs=()):
    """(path, checkpoint) of a file or set, or of the newest in a run folder that loads; UserError if there is none."""
    path = Path(path)
    if path.is_file() or is_set(path):
        return path, load(path, needs)
    for found in reversed(checkpoints(path)):
        try:
            return found, load(found, needs)
        except UserError as error:
            print(f"warning: checkpoint skipped: {error}", file=sys.stderr)
    raise UserError(f"{path} has no checkpoint (step_*) that loads")


def load(path, needs=()):
    """The dict that was saved, on the CPU. `model` and `optimizer` of a set are read only where `needs` names them."""
    state = load_file(Path(path, INDEX) if is_set(path) else path)
    if is_set(path):
        if wrong := sorted(sha256_of_parts(path).items() ^ state.get("parts", {}).items()):
            raise UserError(f"the sharded checkpoint {path} is damaged ({wrong[0][0]}): use an older one")
        if tensors := {part: value for part, value in empty_tensors(path, "cpu").items() if part in needs}:
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(path), no_dist=True)
            state |= tensors
    if missing := [name for name in needs if name not in state]:
        raise UserError(f"{path} has no {missing[0]}: use a checkpoint written by train_single_gpu.py")
    return state


def load_file(path):
    """The dict in a file, its tensors mapped: read when they are used. UserError for any file but those of save()."""
    try:
        # torch.save never compresses (a zip bomb) and sets no attributes (one bit makes torch return unfilled memory)
        with zipfile.ZipFile(path) as archive:
            odd = [e for e in archive.infolist() if e.compress_type or e.external_attr or e.flag_bits & ~0x808]
            if wrong := odd[0].filename if odd else archive.testzip():  # checks the checksums, which torch does not
                raise ValueError(f"wrong checksum or attributes of {wrong}")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']}, not {FORMAT}")
    except Exception as error:  # any error in zipfile or torch, where the file is damaged or of something else
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} is no checkpoint of this project or damaged ({reason}): use another one") from None
    return state


def tensors_of(model, optimizer):
    """{"model": {name: tensor}, "optimizer": {"name/moment": tensor}}: themselves, under FSDP this rank's part."""
    weights = model.state_dict()  # first: FSDP cuts what an evaluation has left whole
    names, moments = {p: name for name, p in model.named_parameters()}, {}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(names.values())
    for p, of_parameter in optimizer.state.items():
        moments |= {f"{names[p]}/{moment}": value for moment, value in of_parameter.items()}
    return {"model": {name: value for name, value in weights.items() if name not in tied}, "optimizer": moments}


def empty_tensors(folder, device):  # of a set, as tensors_of() names them, not yet read
    tensors = {part: {} for part in PARTS}
    for key, entry in HuggingFaceStorageReader(folder).read_metadata().state_dict_metadata.items():
        part, name = key.split(".", 1)  # as DCP flattens that dict
        tensors[part][name] = torch.empty(entry.size, dtype=entry.properties.dtype, device=device)
    return tensors


def shapes_of(tensors):
    return {(part, name): tuple(value.shape) for part in PARTS for name, value in tensors[part].items()}


def sha256_of_parts(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).glob("*.safetensors")}


@torch.no_grad()
def restore(model, optimizer, state, path):
    """Fill the GPT `model`, after FSDP, and its optimizer, which keeps its lr, betas and weight decay. Every rank calls
    it; the `state` and `path` that rank 0 has read count. Of a set each rank reads its own part."""
    (rank, world_size), device = world(), next(model.parameters()).device
    known = [path, rank == 0 and shapes_of(empty_tensors(path, "meta") if is_set(path) else state)]
    if world_size > 1:
        dist.broadcast_object_list(known, src=0)
    path, there = known
    get_optimizer_state_dict(model, optimizer)  # makes a new one's moments, by a step of lr 0 on gradients of 0
    tensors = tensors_of(model, optimizer)
    here = shapes_of(tensors)
    for key in sorted(there.keys() | here.keys()):
        if there.get(key) != here.get(key):
            raise UserError(f"{path} does not fit: {key[1]} has shape {there.get(key)}, in this run {here.get(key)}")
    if is_set(path):
        return dcp.load(tensors, storage_reader=HuggingFaceStorageReader(path), no_dist=True)
    for part, name in here:
        mine = tensors[part][name]
        value = state[part][name].to(device) if rank == 0 else torch.empty(mine.shape, dtype=mine.dtype, device=device)
        if isinstance(mine, DTensor):
            value = distribute_tensor(value, mine.device_mesh, mine.placements)  # rank 0 scatters its own
        elif world_size > 1:
            dist.broadcast(value, src=0)
        mine.copy_(value)


def save(state, path):
    """Write the dict `state`, tensors and plain values alone, whole or not at all. OSError where the disk is full."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_write(path) as f:
            torch.save({"format": FORMAT, **state}, f)
    except RuntimeError as error:  # torch's words for a failed write, with the OSError behind them
        raise error.__context__ or error from None


class BackgroundSaver:
    """Writes checkpoints into `folder` in another thread; keeps the newest `keep`. Every rank calls save and wait.
    Training waits only while the checkpoint before is being written. `group`: gloo, for FSDP, of no other use."""

    def __init__(self, folder, keep, group=None):
        self.folder, self.keep, self.group = Path(folder), keep, group
        self.pool, self.future, self.is_main = ThreadPoolExecutor(max_workers=1), None, world()[0] == 0

    def save(self, model, optimizer, fields, step, fsdp=False):
        """Start to write the state as it is now, and the dict `fields`. Returns wait() of the write before."""
        error, path = self.wait(), step_path(self.folder, step)
        index = path.with_suffix("") / INDEX
        if self.is_main:
            index.unlink(missing_ok=True)  # of a damaged set of this step
            self.remove_leftovers()
        if self.is_main or fsdp:
            copier = DefaultStager(StagingOptions(False, False, False, False))
            copies = copier.stage({**tensors_of(model, optimizer), **fields})
            self.future = self.pool.submit(self.write, copies, index if fsdp else path)
        return error

    def write(self, state, path):
        """Write and read back; then remove older ones, all but keep - 1. Later ones stay and do not count: they are
        damaged, or the run would have been resumed from them."""
        if path.name == INDEX:
            tensors = {part: state.pop(part) for part in PARTS}
            writer = HuggingFaceStorageWriter(str(path.parent), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=self.group)  # ends when all ranks have written
            if not self.is_main:
                return
            if shapes_of(empty_tensors(path.parent, "meta")) != shapes_of(tensors):
                raise OSError(f"{path.parent} lacks parts of other ranks: give all ranks one disk")
            state["parts"] = sha256_of_parts(path.parent)
        save(state, path)
        load_file(path)
        older = [found for found in checkpoints(self.folder) if step_of(found) < state["step"]]
        for found in older[::-1][self.keep - 1 :]:
            Path(found, INDEX).unlink() if is_set(found) else found.unlink()
        self.remove_leftovers()

    def wait(self):
        """Wait until the last checkpoint is on disk. Returns the error that kept it from there, or None."""
        error, self.future = self.future and self.future.exception(), None
        if error and self.is_main:
            self.remove_leftovers()
        failures = getattr(error, "failures", {})  # DCP's: {rank: (error, traceback)}
        return next((failure for failure, _ in failures.values()), error)

    def remove_leftovers(self):
        """Remove what killed or failed writers left behind, and sets whose index was removed."""
        for path in self.folder.glob("step_*"):
            if re.fullmatch(r"step_\d{6,}\.pt\.tmp", path.name):
                path.unlink()
            elif re.fullmatch(r"step_\d{6,}", path.name) and not is_set(path):
                shutil.rmtree(path)
