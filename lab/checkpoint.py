"""Checkpoints: whole or absent on disk, read without executing anything; models from them and from Hugging Face.

    python checkpoint.py --checkpoint checkpoints/RUN --export_hf my_model    # a folder for Hugging Face transformers
    python checkpoint.py --checkpoint checkpoints/RUN/step_000100 --merge one.pt    # a sharded set as a single file

A checkpoint is `{run folder}/step_{step:06d}.pt`, a dict written by torch.save: format, model, optimizer, loader,
progress, step, args, config, tokenizer. It is fsynced under a temporary name and renamed, so it is whole when it
appears; later damage is found by its checksums, which torch.load does not verify. Loading is `weights_only`: a pickle
that asks for anything but tensors and plain values is refused.

A run with --fsdp writes a set instead, the folder `step_{step:06d}` (sharded.py): each rank its own part, then rank 0
the file index.pt, which is the rest of that dict. The set exists when the index does. Whatever reads a checkpoint reads
both forms, and a run of N ranks, sharded or not, continues on M from either.

Format 2: `model` and `optimizer` hold the state by parameter name. Format 1 numbers the optimizer's parameters in the
order of model.optimizer_groups; it still loads.

`init_from` puts the weights of a checkpoint, a run folder (its newest checkpoint), a Hugging Face folder (hf.py: GPT-2
or an exported MoE model), or a GPT-2 name into a new model, dense or MoE. A dense MLP is copied into every expert
(sparse upcycling, 2212.05055): with gates that sum to 1 and no token dropped, the MoE model computes the dense model's
function before its first step.
"""

import dataclasses
import math
import re
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import hf
from hf import config_of, export_hf
from lab import common
from lab.common import TEMP_SUFFIX, UserError, atomic_write
from lab.tokenizer import get_tokenizer
from model import GPT

FORMAT = 2
INDEX = "index.pt"  # in the folder of a sharded set

# ---------------------------------------------------------------------------------------------------------------------
# Writing


def step_path(folder, step):
    return Path(folder) / f"step_{step:06d}.pt"


def step_of(path):
    """Number of updates made before the checkpoint `path` was written."""
    return int(Path(path).stem.removeprefix("step_"))


def is_set(path):
    return (Path(path) / INDEX).exists()


def to_plain(value, copy=False, seen=None):
    """`value` with its tensors on the CPU, cloned when `copy`; TypeError for values that load() would refuse.

    Tied tensors stay one tensor: `seen` maps memory already met to its copy.
    """
    seen = {} if seen is None else seen
    if isinstance(value, torch.Tensor):
        value = value.detach()
        key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if key not in seen:
            seen[key] = value.to("cpu", copy=copy)
        return seen[key]
    if isinstance(value, dict):
        return {to_plain(k): to_plain(v, copy, seen) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(to_plain(v, copy, seen) for v in value)
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    raise TypeError(f"a checkpoint holds tensors and plain values, not a {type(value).__name__}: {value!r:.80}")


def save(state, path):
    """Write the dict `state` to `path`, whole or not at all. OSError when the disk is full or the folder read-only."""
    state = to_plain({"format": FORMAT, **state})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_write(path) as f:
            torch.save(state, f)
    except RuntimeError as error:
        raise common.os_error_behind(error) from None


class BackgroundSaver:
    """Writes checkpoints in another thread and keeps the newest `keep` whole ones of the folder.

    Training waits only while the previous checkpoint is still being written. `on_error(error)` is called, in the
    training thread, once for each that could not be written. Call wait() before the process ends. `group` is gloo's.
    """

    def __init__(self, keep, on_error, group=None):
        self.keep, self.on_error, self.group, self.checked = keep, on_error, group, {}
        self.pool, self.future, self.error, self.folder = ThreadPoolExecutor(max_workers=1), None, None, None

    def save(self, state, path):
        """Start to save `state`. Its tensors must not change any more: get_state() returns copies."""
        self.wait()
        self.future = self.pool.submit(self.write, to_plain(state), Path(path), Path(path).parent)

    def save_shards(self, model, optimizer, fields, path, background):
        """Start to save a set: the state of an FSDP run and the dict `fields`. Every rank calls it, and wait().

        background: copy this rank's part to the CPU and write the copy; else write the tensors themselves, and return
        when the set is whole.
        """
        import sharded

        folder = Path(path).with_suffix("")

        def write_index(index):
            self.write(fields | {"index": index | {"tied": sharded.tied_names(model)}}, folder / INDEX, folder.parent)

        self.wait()
        self.folder, fields = folder, to_plain(fields)
        if common.world()[0] == 0:
            remove(folder)  # a damaged set of this step; no rank writes before rank 0 has told it what
        tensors = sharded.tensors_of(model, optimizer, with_moments=bool(optimizer.state))
        self.future = sharded.write(tensors, folder, self.group, background, write_index)

    def write(self, state, path, folder):
        save(state, path)
        prune(folder, self.keep, self.checked)

    def wait(self):
        """Wait until the last checkpoint is on disk. Returns its OSError, or None."""
        if self.future:
            self.error, self.future = self.future.exception(), None
            if self.error and self.folder:
                import sharded

                self.error = sharded.first_os_error(self.error)
                if common.world()[0] == 0 and not is_set(self.folder):
                    remove(self.folder)  # parts that would fill the disk
            if self.error and not isinstance(self.error, OSError):
                raise self.error
            if self.error:
                self.on_error(self.error)
        return self.error


def checkpoints(folder):
    """Paths of the checkpoints in `folder`, files and sets, oldest first. Those not yet written whole are left out."""
    found = [path for path in Path(folder).glob("step_*") if re.fullmatch(r"step_\d{6,}(\.pt)?", path.name)]
    return sorted((path for path in found if path.suffix or is_set(path)), key=step_of)


def remove(path):
    """Remove a checkpoint, file or set, whole or not. Of a set the index goes first, with which it ceases to exist."""
    (path if path.suffix else path / INDEX).unlink(missing_ok=True)
    if not path.suffix:
        shutil.rmtree(path, ignore_errors=True)


def prune(folder, keep, checked=None):
    """Remove all but the newest `keep` whole checkpoints, and leftovers of killed writers. One writer per folder.

    A damaged one does not count: with keep=1 it must not displace the last good one. `checked` remembers the result of
    damage() for a file (path, size, time of change), so that each is read once.
    """
    checked = {} if checked is None else checked
    for leftover in Path(folder).glob("step_*"):
        ours = re.fullmatch(rf"step_\d{{6,}}(\.pt{re.escape(TEMP_SUFFIX)})?", leftover.name)  # others are the user's
        if ours and (ours[1] or (leftover.is_dir() and not is_set(leftover))):
            remove(leftover)
    whole = 0
    for path in reversed(checkpoints(folder)):
        if whole >= keep:
            remove(path)
            continue
        stat = (path / INDEX if path.is_dir() else path).stat()
        key = (path, stat.st_size, stat.st_mtime_ns)
        if key not in checked:
            checked[key] = damage(path)
        whole += checked[key] is None


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def damage(path):
    """Error of a checkpoint, file or set, or None. Reads all of it."""
    try:
        return None if is_set(path) and load_set(path) else zip_error(path)
    except UserError as error:
        return str(error)


def zip_error(path):
    """Error of the file, a path or open, as an archive that torch.save wrote, or None. Reads all of it.

    Verifies its checksums. torch.save neither compresses nor sets attributes. A compressed entry could be a zip bomb;
    one attribute bit makes torch's reader take an entry for a folder and return memory that it never filled.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type or entry.external_attr or entry.flag_bits & ~0x808:  # data descriptor, UTF-8
                    return f"attributes of {entry.filename} that torch.save never writes"
            bad = archive.testzip()
    except Exception as error:  # a damaged directory can cause any error in zipfile
        return f"{type(error).__name__}: {error}"
    return f"wrong checksum of {bad}" if bad else None


def load(path, needs=(), mmap=False):
    """The dict that save() wrote, on the CPU, with at least the fields `needs`.

    Of a set, `model` and `optimizer` are read, and made whole, only where `needs` names them. UserError, naming the
    file, for any other file. mmap: tensors are read from the file when used, for readers of the weights alone; the file
    must then stay in place.
    """
    if Path(path).name == INDEX:
        path = Path(path).parent
    state = load_set(path, needs) if is_set(path) else load_file(path, mmap)
    for name in needs:
        if not isinstance(state.get(name), int if name == "step" else dict):
            problem = f"its {name} is a {type(state[name]).__name__}" if name in state else f"it has no {name}"
            raise UserError(f"{path}: {problem}; use a checkpoint written by train_single_gpu.py")
    return state


def load_file(path, mmap=False):
    try:
        open(path, "rb").close()
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    if wrong := zip_error(path):
        raise UserError(f"{path} is not a checkpoint of this project or is damaged ({wrong}): use an older one")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception:  # an unpickling error, or any other that a foreign archive causes in torch
        raise UserError(f"{path} is not a checkpoint of this project: it holds more than tensors and values") from None
    number = state.get("format") if isinstance(state, dict) else None
    if type(number) is not int:
        raise UserError(f"{path} is not a checkpoint of this project: it has no format number")
    if number not in (1, FORMAT):
        age = "an older" if number < FORMAT else "a newer"
        raise UserError(f"{path} was written by {age} version: its format is {number}, this code reads 1 and 2")
    return state


def load_set(path, needs=()):
    """The dict of a sharded set; `model` and `optimizer` where `needs` names them, else `index` to read them by."""
    import sharded

    state = load_file(Path(path) / INDEX)
    index = state.get("index")
    if wrong := sharded.index_error(index) or sharded.chunk_error(path, index, zip_error):
        raise UserError(f"the sharded checkpoint {path} is damaged ({wrong}): use an older one")
    index["folder"] = str(path)
    readers = {"model": sharded.read_weights, "optimizer": sharded.read_moments}
    return state | {name: read(index) for name, read in readers.items() if name in needs}


def newest(folder):
    """Path of the newest checkpoint in `folder`, or None. Not opened: see load_newest()."""
    return next(reversed(checkpoints(folder)), None)


def load_newest(folder, needs=(), mmap=False):
    """(path, checkpoint) of the newest one that loads; (None, None) if the folder has none.

    Prints a warning for each newer one that does not. UserError, with the reason of the newest, when none loads.
    """
    paths, reasons = checkpoints(folder), []
    for path in reversed(paths):
        try:
            state = load(path, needs, mmap)
        except UserError as error:
            reasons.append(error)
            continue
        for reason in reasons:
            print(f"warning: checkpoint skipped: {reason}", file=sys.stderr)
        return path, state
    if reasons:
        remedy = "copy a whole one there, or move the folder away and start again"
        raise UserError(f"none of the {len(paths)} checkpoints in {folder} can be loaded: {remedy} ({reasons[0]})")
    return None, None


def read_checkpoint(path, needs=(), mmap=False):
    """(path, checkpoint) of a file or set, or of the newest in a run folder that loads. UserError if there is none."""
    if not Path(path).is_dir() or is_set(path):
        return Path(path), load(path, needs, mmap)
    found, state = load_newest(path, needs, mmap)
    if state is None:
        if (Path(path) / "config.json").exists():
            raise UserError(f"{path} is a model for --init_from, not a run: give the folder of a run")
        raise UserError(f"no checkpoint (step_*) and no config.json in the folder {path}")
    return found, state


# ---------------------------------------------------------------------------------------------------------------------
# State of model and optimizer, for plain, DDP and FSDP runs alike. `model` is the GPT itself, not a wrapper around it.
# torch.distributed.checkpoint is imported where it is used: that takes half a second, and only training needs it.


def get_state(model, optimizer):
    """{"model": ..., "optimizer": ...}: whole tensors by parameter name, copied to the CPU. Every rank calls it.

    Ranks above 0 get empty dicts. The state of an optimizer without a step is empty.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    moments = {"state": {}}  # asked for its state, torch would make such an optimizer take a step
    if optimizer.state:
        moments = get_optimizer_state_dict(model, optimizer, options=options)
    first_names = {}
    for name, p in model.named_parameters(remove_duplicate=False) if weights else ():
        weights[name] = weights[first_names.setdefault(p, name)]  # tied weights: one tensor again
    on_cpu = next(model.parameters()).device.type == "cpu"  # elsewhere they are copies already
    return to_plain({"model": weights, "optimizer": moments}, copy=on_cpu)


def set_state(model, optimizer, state, source):
    """Load `state`, as load() returned it, into a new model and optimizer. Every rank calls it.

    Rank 0's state counts; other ranks may pass None. The optimizer keeps its own settings (weight decay, betas, lr); on
    the CPU it takes over the tensors of `state`. Of a set, which all ranks must see, each reads its own part. UserError
    with the first misfit.
    """
    index = [state and state.get("index")]
    if dist.is_initialized():
        dist.broadcast_object_list(index, src=0)
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    set_shards(model, optimizer, index[0], source) if index[0] else set_whole(model, optimizer, state, source)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def set_shards(model, optimizer, index, source):
    import sharded

    with_moments = any(name.startswith("optimizer/") for name in index["tensors"])
    tensors = sharded.tensors_of(model, optimizer, with_moments)
    given = {name: torch.empty(entry["shape"], device="meta") for name, entry in index["tensors"].items()}
    if wrong := misfit(given, tensors):
        raise UserError(f"the state in {source} does not fit this run: {wrong}")
    sharded.read_into(tensors, index)


def set_whole(model, optimizer, state, source):
    from torch.distributed.checkpoint import state_dict as dcp

    fresh = dcp.get_optimizer_state_dict(model, optimizer)  # torch makes it with a step of lr 0 on gradients of 0
    many, weights, moments, agreed = dist.is_initialized(), {}, {}, [None, None]
    if not many or dist.get_rank() == 0:
        weights, moments = state["model"], by_name(state["optimizer"].get("state"), model, optimizer)
        wanted = {"model": model.state_dict(), "optimizer": {} if moments == {} else fresh["state"]}
        agreed = [misfit({"model": weights, "optimizer": moments}, wanted), moments == {}]
        weights, moments = dict(weights), {**fresh, "state": moments}
    if many:
        dist.broadcast_object_list(agreed, src=0)
    wrong, without_step = agreed
    if wrong:
        raise UserError(f"the state in {source} does not fit this run: {wrong}")
    options = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=many)
    if without_step:
        optimizer.state.clear()
    else:
        dcp.set_optimizer_state_dict(model, optimizer, moments, options=options)
    dcp.set_model_state_dict(model, weights, options=options)


def by_name(moments, model, optimizer):
    """Optimizer state by parameter name; format 1 has it by number, in the order of the optimizer's groups."""
    if not isinstance(moments, dict) or not all(type(key) is int for key in moments):
        return moments
    names = {p: name for name, p in model.named_parameters()}
    order = dict(enumerate(names[p] for group in optimizer.param_groups for p in group["params"]))
    return {order.get(number, f"parameter {number}"): value for number, value in moments.items()}


def misfit(given, wanted):
    """First difference in names or shapes between two nested dicts of tensors, or None."""
    if isinstance(wanted, torch.Tensor):
        if not isinstance(given, torch.Tensor):
            return "is not a tensor"
        same = given.shape == wanted.shape
        return None if same else f"has the shape {tuple(given.shape)}, not {tuple(wanted.shape)}"
    if not isinstance(given, dict):
        return f"is a {type(given).__name__}, not a dict"
    for name in {**wanted, **given}:
        if name not in given or name not in wanted:
            return f"{name} is {'missing' if name in wanted else 'unknown'}"
        if wrong := misfit(given[name], wanted[name]):
            return f"{name} {wrong}"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# A model from a checkpoint or from GPT-2's weights

FIXED_BY_WEIGHTS = ("n_layer", "n_head", "n_embd", "bias", "qk_norm")  # a model of other values computes something else
SHAPE = ("vocab_size", "n_layer", "n_head", "n_embd", "bias", "block_size")  # that of the weights, where not given


def load_model(path):
    """(GPT in eval mode, checkpoint dict) of a checkpoint file or a run folder."""
    path, state = read_checkpoint(path, ("config", "model"), mmap=True)
    return upcycle(state["config"], state["model"], {}, path, None).eval(), state


def init_from(source, overrides, generator=None):
    """GPT with the weights of `source`: a checkpoint file, a run folder, a Hugging Face folder or a GPT-2 name.

    `overrides`: GPTConfig fields that replace the source's (dropout, n_exp, ...); None keeps the source's value. A
    smaller block_size crops the positions, a larger vocab_size adds rows; a field that the weights fix cannot change.
    Weights that the source lacks, such as the router of an upcycled model, are drawn from `generator`.
    """
    name, fields, weights, _ = read_source(source)
    return upcycle(fields, weights, overrides, name, generator)


def from_pretrained(source, generator=None, **overrides):
    """init_from() with the overrides as keywords: from_pretrained("gpt2", block_size=512)."""
    return init_from(source, overrides, generator)


def tokenizer_of(source):
    """Name of the tokenizer that belongs to the weights of `source`."""
    if folder := hf.find_folder(source):
        return hf.tokenizer_name(folder)
    return str(read_checkpoint(source, mmap=True)[1].get("tokenizer", "gpt2"))


def read_source(source):
    """(name for messages, GPTConfig fields, weights, tokenizer name) of any source that init_from() takes."""
    if folder := hf.find_folder(source):
        return source, *hf.read_folder(folder)
    path, state = read_checkpoint(source, ("config", "model"), mmap=True)
    return path, state["config"], state["model"], str(state.get("tokenizer", "gpt2"))


def open_model(checkpoint, init_from, device):
    """(GPT in eval mode, tokenizer) of the flag, --checkpoint or --init_from, that is not empty.

    Both take a checkpoint file, a run folder, a Hugging Face folder or a GPT-2 name.
    """
    if bool(checkpoint) == bool(init_from):
        raise UserError("give one model: --checkpoint PATH or --init_from gpt2")
    name, fields, weights, tokenizer = read_source(checkpoint or init_from)
    model, tokenizer = upcycle(fields, weights, {}, name, None).to(device).eval(), get_tokenizer(tokenizer)
    if tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"{model.config.vocab_size} tokens, its tokenizer {tokenizer.name} {tokenizer.vocab_size}"
        raise UserError(f"{name} knows {sizes}: train with --vocab_size {tokenizer.vocab_size} or more")
    return model, tokenizer


@torch.no_grad()
def upcycle(fields, weights, overrides, source, generator):
    """GPT of the config `fields` with `overrides`, filled with `weights`, the rest drawn from `generator`."""
    old = config_of(fields, source)
    with torch.device("meta"):  # shapes without memory; no time and no global random number
        check_weights(weights, GPT(old).state_dict(), source)
    overrides = {name: value for name, value in overrides.items() if value is not None}
    for name in FIXED_BY_WEIGHTS:
        value = getattr(old, name)
        if overrides.get(name, value) != value:
            raise UserError(f"{name} {overrides[name]} does not fit {source}, whose {name} is {value}: leave it out")
    config = config_of({**dataclasses.asdict(old), **overrides}, source)
    weights = fit_moe(fit_embeddings(weights, config, source), config, source)
    with torch.device("meta"):
        model = GPT(config)
    wanted = model.state_dict()
    kept = {name: weights[name] for name in weights if name in wanted or ".router." not in name}
    new = {name for name in wanted.keys() - kept.keys() if ".router." in name or ".shared." in name}
    check_weights(kept, {name: w for name, w in wanted.items() if name not in new}, source)
    model.to_empty(device="cpu")
    model.lm_head.weight = model.transformer.wte.weight  # to_empty() unties
    for buffer in model.buffers():
        buffer.zero_()
    if new:
        model.init_weights(generator)
    if any(name.endswith(".w_g.weight") for name in new):
        tie_slices(model)
    for name in (name for name in new if ".shared.c_proj." in name):
        model.get_parameter(name).zero_()  # a new shared expert adds 0: the function stays the dense model's
    model.load_state_dict(kept, strict=False)
    return model


def check_weights(weights, wanted, source):
    if wrong := misfit(weights, wanted):
        raise UserError(f"the weights of {source} do not fit the model: {wrong}")


def fit_embeddings(weights, config, source):
    """Positions cropped to block_size; token rows added up to vocab_size.

    An added row is the mean of the others. Its logit is then the mean logit and its probability at most 1/V (Jensen);
    a row of zeros, with logit 0, would exceed GPT-2's own logits, which are far below 0.
    """
    wte, wpe = weights["transformer.wte.weight"], weights["transformer.wpe.weight"]
    if config.block_size > len(wpe):
        raise UserError(f"block_size {config.block_size} is more than the {len(wpe)} positions of {source}")
    if config.vocab_size < len(wte):
        raise UserError(f"vocab_size {config.vocab_size} is less than the {len(wte)} tokens of {source}")
    wte = torch.cat([wte, wte.float().mean(dim=0).to(wte.dtype).expand(config.vocab_size - len(wte), -1)])
    new = {"transformer.wte.weight": wte, "lm_head.weight": wte, "transformer.wpe.weight": wpe[: config.block_size]}
    return {**weights, **new}


def fit_moe(weights, config, source):
    """Each dense MLP in a layer that is MoE in `config`, copied into all experts (sparse upcycling).

    Narrow experts are m = hidden / hidden_of_expert slices of it: expert e has the hidden units of slice e % m. A token
    that chooses all m slices of a group, each with an m-th of its gate, gets the whole MLP when c_proj is m times as
    large; tie_slices() makes it choose so. What a gate multiplies is divided by gate_scale.
    """

    def spread(slices):
        """(m, ...) -> (E, ...): slice e % m for expert e, without a copy where m is 1."""
        return slices.expand(config.n_exp // m, *slices.shape).flatten(0, 1)

    weights = dict(weights)
    for layer in range(config.n_layer):
        mlp = f"transformer.h.{layer}.mlp."
        if not config.is_moe_layer(layer) or f"{mlp}c_fc.weight" not in weights:
            continue
        m = count_slices(config, source)
        c_fc, c_proj = (weights.pop(f"{mlp}{name}.weight").t() for name in ("c_fc", "c_proj"))
        weights[f"{mlp}experts.c_fc"] = spread(torch.stack(c_fc.chunk(m, dim=1)))
        c_proj = c_proj * (m / config.gate_scale)
        weights[f"{mlp}experts.c_proj"] = spread(torch.stack(c_proj.chunk(m)))
        if config.bias:
            fc_bias, proj_bias = (weights.pop(f"{mlp}{name}.bias") for name in ("c_fc", "c_proj"))
            weights[f"{mlp}experts.fc_bias"] = spread(fc_bias.view(m, 1, -1))
            weights[f"{mlp}experts.proj_bias"] = (proj_bias / config.gate_scale).expand(config.n_exp, 1, -1)
    return weights


def count_slices(config, source):
    """Number of experts that share one dense MLP; UserError, with the widths that do, where they cannot."""
    hidden, width, most, why = config.hidden, config.hidden_of_expert, 1, "m divides n_exp and top_k"
    if config.use_noisy_top_k:
        why = "m is 1, as noise would separate slices"
    elif config.gate == "softmax" or (config.gate == "sigmoid" and config.top_k == 1):
        why = "m is 1, as the weights of this gate do not sum to 1"
    else:
        most = math.gcd(config.n_exp, config.top_k, hidden)
    widths = [hidden // m for m in range(1, most + 1) if most % m == 0]
    if width in widths:
        return hidden // width
    raise UserError(
        f"--expert_hidden {width} does not split the MLPs of {source}, {hidden} wide, into m experts where {why}: "
        f"pass --expert_hidden {' or '.join(map(str, widths))}"
    )


def tie_slices(model):
    """Give the m slices of one MLP the same router row, so that a token chooses all of them or none."""
    m = model.config.hidden // model.config.hidden_of_expert
    for _, moe in model.moe_layers():
        rows = moe.router.w_g.weight
        rows.copy_(rows[::m].repeat_interleave(m, dim=0))


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@dataclass
class Args:
    checkpoint: str  # Checkpoint (step_*.pt, or the folder of a sharded one), or a run folder (its newest checkpoint)
    export_hf: str = ""  # Folder to write for Hugging Face transformers: new, empty or an earlier export
    merge: str = ""  # File to write: the whole checkpoint, optimizer included, as a single one


def main():
    args = common.parse(Args)
    if bool(args.export_hf) == bool(args.merge):
        raise UserError("give one thing to write: --export_hf FOLDER or --merge FILE.pt")
    return merge(args) if args.merge else export(args)


def export(args):
    model, state = load_model(args.checkpoint)
    export_hf(model, args.export_hf, state)
    kind = "load with trust_remote_code=True" if hf.has_own_class(model) else "GPT-2 layout"
    print(f"{args.export_hf}: {kind}, {model.num_params():,} parameters, step {state.get('step')}")


def merge(args):
    path, state = read_checkpoint(args.checkpoint, ("config", "model", "optimizer"))
    if Path(args.merge).exists():
        raise UserError(f"{args.merge} exists: remove it, or give another --merge")
    save({name: value for name, value in state.items() if name != "index"}, args.merge)
    print(f"{args.merge}: {path} as a single file, step {state.get('step')}")


if __name__ == "__main__":
    common.run(main)
