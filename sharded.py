"""Sharded checkpoints: a folder into which each rank writes its own part, through torch.distributed.checkpoint (DCP).

    step_000100/__0_0.distcp, __1_0.distcp, ...    the parts: tensors one after the other, each as torch.save writes it
    step_000100/index.pt                           written last: without it the set does not exist

The index is a checkpoint file (checkpoint.py) without tensors. It says of each tensor its type, shape and chunks. DCP
has a file `.metadata` for that, and unpickles it when it reads a set. A pickle can execute anything, so this project
writes and reads the index instead, and DCP never sees a file that it would unpickle: tensors are read `weights_only`.

Tensors are named by their path: model/transformer.wte.weight, optimizer/transformer.wte.weight/exp_avg.
"""

import errno
import io
import itertools
import math
import os
import warnings
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as form
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from lab.common import UserError, os_error_behind

# ---------------------------------------------------------------------------------------------------------------------
# Writing


def tensors_of(model, optimizer, with_moments):
    """{name: tensor}, this rank's part of the state, not copied; a tied weight once.

    with_moments: an optimizer without a state gets one, by a step of lr 0 on gradients of 0.
    """
    tied = tied_names(model)
    tensors = {f"model/{name}": value for name, value in get_model_state_dict(model).items() if name not in tied}
    moments = get_optimizer_state_dict(model, optimizer)["state"] if with_moments else {}
    for name, of_parameter in moments.items():
        tensors |= {f"optimizer/{name}/{moment}": value for moment, value in of_parameter.items()}
    return tensors


def tied_names(model):
    """{name of a weight that is another one too: the first name of that}."""
    firsts = {}
    pairs = [(name, firsts.setdefault(p, name)) for name, p in model.named_parameters(remove_duplicate=False)]
    return {name: first for name, first in pairs if name != first}


class Writer(dcp.FileSystemWriter):
    """DCP's writer, which calls `finish_set(index)` on rank 0 when all ranks have written their parts."""

    def __init__(self, folder, finish_set):
        super().__init__(folder)
        self.finish_set = finish_set

    def write_data(self, plan, planner):
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise os_error_behind(error) from None

    def finish(self, metadata, results):
        index = index_of(metadata, {result.index: result.storage_data for part in results for result in part})
        for name in {chunk[2] for entry in index["tensors"].values() for chunk in entry["chunks"]}:
            if not (self.path / name).exists():
                raise OSError(errno.ENOENT, "part of another rank is missing: the ranks share no disk", str(name))
        self.finish_set(index)


def write(tensors, folder, group, background, finish_set):
    """Write this rank's part of {name: tensor}; every rank calls it. Returns a Future of the whole set.

    background: the tensors are copied to the CPU, then written in another thread. `group`: gloo, of all ranks, and of
    no other use. `finish_set(index)` is called on rank 0, in that thread; it must write the index.
    """
    writer = Writer(folder, finish_set)
    if background:
        return dcp.async_save(tensors, storage_writer=writer, process_group=group)
    future = Future()
    try:
        future.set_result(dcp.save(tensors, storage_writer=writer, process_group=group))
    except CheckpointException as error:
        future.set_exception(error)
    return future


def first_os_error(error):
    """The OSError of the first rank that could not write its part; `error` itself where there is none."""
    failures = getattr(error, "failures", {})  # of a CheckpointException: {rank: (error, traceback)}
    return next((failure for failure, _ in failures.values() if isinstance(failure, OSError)), error)


def index_of(metadata, places):
    """{"tensors": {name: {"dtype", "shape", "chunks": [(offsets, sizes, file, start, length)]}}} of DCP's own form."""
    index = {}
    for name, tensor in metadata.state_dict_metadata.items():
        chunks = []
        for chunk in tensor.chunks:
            place = places[form.MetadataIndex(name, chunk.offsets)]
            chunks.append((tuple(chunk.offsets), tuple(chunk.sizes), place.relative_path, place.offset, place.length))
        dtype = str(tensor.properties.dtype).removeprefix("torch.")
        index[name] = {"dtype": dtype, "shape": tuple(tensor.size), "chunks": chunks}
    return {"tensors": index}


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class Reader(dcp.FileSystemReader):
    """DCP's reader, with an index in the place of the pickle."""

    def __init__(self, folder, index):
        super().__init__(folder)
        self.index = index  # of the tensors

    def read_metadata(self, *args, **kwargs):
        tensors, places = {}, {}
        for name, entry in self.index.items():
            chunks = [form.ChunkStorageMetadata(torch.Size(at), torch.Size(size)) for at, size, *_ in entry["chunks"]]
            properties = form.TensorProperties(dtype=getattr(torch, entry["dtype"]))
            tensors[name] = form.TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
            for offsets, _, *place in entry["chunks"]:
                places[form.MetadataIndex(name, offsets)] = _StorageInfo(*place)
        return form.Metadata(tensors, storage_data=places, storage_meta=form.StorageMeta())


def read_into(tensors, index):
    """Fill {name: tensor}, whole or sharded in any way, from the set; this rank reads its own part. No rank waits.

    UserError when it cannot be read.
    """
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it is a single process
            dcp.load(tensors, storage_reader=Reader(index["folder"], index["tensors"]), no_dist=True)
    except (Exception, CheckpointException) as error:  # any, of a foreign file
        failures = [
            failure for failure, _ in getattr(error, "failures", {}).values()
        ]  # what a CheckpointException holds
        failure = failures[0] if failures else error
        reason = failure.strerror if isinstance(failure, OSError) else type(failure).__name__
        raise UserError(f"cannot read the sharded checkpoint {index['folder']} ({reason}): use an older one") from None


def read_whole(index, prefix):
    """{name without the prefix: tensor} of the tensors below `prefix`, on the CPU."""
    entries = {name: entry for name, entry in index["tensors"].items() if name.startswith(prefix)}
    whole = {name: torch.zeros(e["shape"], dtype=getattr(torch, e["dtype"])) for name, e in entries.items()}
    read_into(whole, index)
    return {name.removeprefix(prefix): value for name, value in whole.items()}


def read_weights(index):
    """The `model` of a checkpoint, tied weights included."""
    weights = read_whole(index, "model/")
    return weights | {name: weights[first] for name, first in index["tied"].items()}


def read_moments(index):
    """The `optimizer` of a checkpoint."""
    state = {}
    for name, value in read_whole(index, "optimizer/").items():
        parameter, moment = name.rsplit("/", 1)
        state.setdefault(parameter, {})[moment] = value
    return {"state": state}


def index_error(index):
    """What is wrong with the index, or None. Its shapes decide how much memory is taken, so its chunks must add up."""
    try:
        for name, entry in index["tensors"].items():
            size, shape, chunks = getattr(torch, entry["dtype"]).itemsize, entry["shape"], entry["chunks"]
            if sum(math.prod(chunk[1]) for chunk in chunks) != math.prod(shape):
                return f"the chunks of {name} do not make its shape"
            for offsets, sizes, file, start, length in chunks:
                inside = all(0 <= at <= at + n <= most for at, n, most in zip(offsets, sizes, shape, strict=True))
                if not inside or start < 0 or length < size * math.prod(sizes) or Path(file).name != file:
                    return f"a chunk of {name} cannot be"
        unknown = [first for first in index["tied"].values() if f"model/{first}" not in index["tensors"]]
        return f"{unknown[0]} is missing" if unknown else None
    except Exception as error:  # any, where it is no index
        return f"{type(error).__name__}: {error}"


def chunk_error(folder, index, zip_error):
    """First error of a chunk, or None: `zip_error(file)` of each. Reads all parts."""
    places = sorted({tuple(chunk[2:]) for entry in index["tensors"].values() for chunk in entry["chunks"]})
    for name, group in itertools.groupby(places, key=lambda place: place[0]):
        try:
            with open(Path(folder) / name, "rb") as file:
                for _, start, length in group:
                    if wrong := zip_error(Slice(file, start, length)):
                        return f"{name}: {wrong}"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


class Slice(io.RawIOBase):
    """Bytes start : start + length of an open file, as a file."""

    def __init__(self, file, start, length):
        self.file, self.start, self.length, self.place = file, start, length, 0

    def readable(self):
        return True

    seekable = readable

    def seek(self, offset, whence=os.SEEK_SET):
        self.place = offset + (0, self.place, self.length)[whence]
        return self.place

    def tell(self):
        return self.place

    def readinto(self, buffer):
        self.file.seek(self.start + self.place)
        wanted = max(0, min(len(buffer), self.length - self.place))
        n = self.file.readinto(memoryview(buffer)[:wanted])
        self.place += n
        return n
