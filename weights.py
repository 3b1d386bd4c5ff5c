"""Weights in and out: checkpoints, GPT-2, folders of Hugging Face transformers; a dense model made into a MoE.

    python weights.py --checkpoint logs/RUN --export_hf my_model           # a folder for transformers
    python weights.py --checkpoint logs/RUN/step_000100 --merge one.pt     # a sharded checkpoint as a single file

    model, tokenizer = open_model("gpt2", "cpu")
    model = from_pretrained("gpt2", n_exp=8, dropout=0.1)

A source is a checkpoint, a run folder (its newest checkpoint), a Hugging Face folder (GPT-2, or what export_hf wrote),
gpt2, gpt2-medium, gpt2-large or gpt2-xl. No code of a folder is executed here, and no pickle.
"""

import dataclasses
import importlib
import json
import math
import tempfile
from pathlib import Path

from lab import common  # before torch
from lab.common import UserError

# isort: split
import safetensors.torch
import torch

from lab import checkpoint
from lab.tokenizer import get_tokenizer, gpt2_files
from model import GATES, GPT, GPTConfig

SHAPE = ("vocab_size", "n_layer", "n_head", "n_embd", "bias", "block_size")  # of the weights, where not given

# ---------------------------------------------------------------------------------------------------------------------
# Sources


def open_model(source, device):
    """(GPT in eval mode, tokenizer) of a source."""
    name, fields, weights, tokenizer = read_source(source)
    model, tokenizer = build(name, fields, weights).to(device).eval(), get_tokenizer(tokenizer)
    if tokenizer is None or tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"{name} was trained on {model.config.vocab_size} tokens of a tokenizer that is not known here")
    return model, tokenizer


def from_pretrained(source, generator=None, **overrides):
    """GPT with the weights of a source; what they lack, such as a router, is drawn from `generator`. `overrides`:
    GPTConfig fields, such as a smaller block_size, a larger vocab_size, n_exp; None keeps the source's value."""
    name, fields, weights, _ = read_source(source)
    return build(name, fields, weights, generator, **overrides)


def read_source(source):
    """(name for messages, GPTConfig fields, weights, tokenizer name) of a source."""
    path, names = Path(source), ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    if not path.exists() and str(source) in names:
        path = download_gpt2(source)
    if not path.exists():
        raise UserError(f"no {source}: give a checkpoint, a run or Hugging Face folder, or one of {', '.join(names)}")
    settings = {}
    if (path / "config.json").is_file():
        try:
            settings = dict(json.loads((path / "config.json").read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}/config.json does not describe a model: {error}") from None
    if "model_type" not in settings:  # the config.json of a run, or none
        path, state = checkpoint.read(path, ("config", "model", "tokenizer"))
        return path, state["config"], state["model"], state["tokenizer"]
    is_ours = settings["model_type"] == "moe_gpt2"
    fields = moe_fields(settings) if is_ours else gpt2_fields(settings, source)
    return source, fields, read_weights(path, () if is_ours else TURNED), settings.get("tokenizer", "gpt2")


def download_gpt2(name):
    """Folder of OpenAI's weights, from the Hub or its cache."""
    import huggingface_hub  # slow to import, needed by few runs

    repo, files = f"openai-community/{name}", ["config.json", "model.safetensors"]
    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=files))
    except Exception as error:  # OSError, or one of the Hub's own HTTP library
        command = f"hf download {repo} {' '.join(files)} --local-dir {name}"
        raise UserError(
            f"cannot download {name} ({type(error).__name__}): run `{command}` where there is a network, copy that here"
        ) from None


TURNED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # Conv1D: (in, out)
MASKS = (".attn.bias", ".attn.masked_bias")  # in old files, no weights
GPT2_SETTINGS = {  # what model.py computes; a setting left out means the first value
    "model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    "tie_word_embeddings": (True,), "auto_map": (None,),
}


def gpt2_fields(settings, source):
    """GPTConfig fields of GPT-2's config.json; UserError for a model that computes something else."""
    shape = {"n_positions": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}
    fields = {name: settings.get(name, value) for name, value in shape.items()}
    known = {**GPT2_SETTINGS, "n_inner": (None, 4 * fields["n_embd"])}
    for name, values in known.items():
        if settings.get(name, values[0]) not in values:
            raise UserError(f"{source}: its {name} is {settings[name]!r}, the model here has {values[0]!r}")
    return {"block_size": fields.pop("n_positions"), **fields}


def moe_fields(settings):
    """GPTConfig fields of what export_hf wrote: under their own names, but for top_k, which generate() claims."""
    fields = {"top_k": settings.get("num_experts_per_tok")}
    for name in [field.name for field in dataclasses.fields(GPTConfig) if field.name in settings]:
        fields[name] = math.inf if isinstance(settings[name], dict) else settings[name]  # JSON has no inf
    return fields


def read_weights(folder, turned):
    """State dict of GPT from model.safetensors, or the files that its index names; others are leftovers."""
    index, files, weights = folder / "model.safetensors.index.json", ["model.safetensors"], {}
    try:
        if index.exists():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        found = [pair for file in files for pair in safetensors.torch.load_file(folder / file).items()]
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read {', '.join(files)} in {folder} ({error}); pickled weights are not read") from None
    for key, tensor in found:
        name = key if key == "lm_head.weight" else f"transformer.{key.removeprefix('transformer.')}"
        if name in weights:
            raise UserError(f"{folder} holds {name} twice")
        if not key.endswith(MASKS):
            weights[name] = tensor.t() if key.endswith(turned) else tensor
    head = weights.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, weights.get("transformer.wte.weight", head[:0])):
        raise UserError(f"{folder} has an output projection of its own; here it is tied to the embedding")
    return weights


# ---------------------------------------------------------------------------------------------------------------------
# A model from weights


@torch.no_grad()
def build(source, fields, weights, generator=None, **overrides):
    """GPT of the config `fields` with `overrides`, filled with `weights`, the rest drawn from `generator`."""
    overrides = {name: value for name, value in overrides.items() if value is not None}
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    try:
        old = GPTConfig(**fields)
        config = dataclasses.replace(old, **overrides)
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: no such model: {error}") from None
    for name in ("n_layer", "n_head", "n_embd", "bias", "qk_norm"):  # with another value it computes something else
        if getattr(config, name) != getattr(old, name):
            raise UserError(f"{name} {overrides[name]}: that of {source} is {getattr(old, name)}: leave it out")
    try:
        weights = fit(weights, config, source)
        model = GPT(config, generator)
        own = model.state_dict()
        # A router and shared experts may be new. A router's weights that the model does not have are left out.
        new = {name: own[name] for name in own if name not in weights and (".router." in name or ".shared." in name)}
        for name in [name for name in new if ".shared.c_proj." in name]:
            own[name].zero_()  # a new shared expert adds 0
        model.load_state_dict(new | {name: weights[name] for name in weights if name in own or ".router." not in name})
    except (KeyError, RuntimeError) as error:  # load_state_dict's list of missing, unexpected and misshapen weights
        raise UserError(f"the weights of {source} do not fit: {' '.join(str(error).split()[:40])}") from None
    return model


def fit(weights, config, source):
    """Crop the positions, add rows of tokens, copy dense MLPs into all experts (sparse upcycling, 2212.05055): with no
    token dropped the MoE then computes the dense function. An added row is the mean of the others, so that its
    probability is at most 1/V (Jensen); one of zeros, with logit 0, would exceed GPT-2's logits, far below 0."""
    weights = dict(weights)
    wte, wpe = weights["transformer.wte.weight"], weights["transformer.wpe.weight"]
    if config.block_size > len(wpe):
        raise UserError(f"block_size {config.block_size} is more than the {len(wpe)} positions of {source}")
    if config.vocab_size < len(wte):
        raise UserError(f"vocab_size {config.vocab_size} is less than the {len(wte)} tokens of {source}")
    mean = wte.float().mean(dim=0).to(wte.dtype)
    weights["transformer.wte.weight"] = torch.cat([wte, mean.expand(config.vocab_size - len(wte), -1)])
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    weights["transformer.wpe.weight"] = wpe[: config.block_size]
    for layer in range(config.n_layer):
        mlp = f"transformer.h.{layer}.mlp."
        if not config.is_moe_layer(layer) or f"{mlp}c_fc.weight" not in weights:
            continue
        if config.hidden_of_expert != config.hidden:
            raise UserError(f"expert_hidden {config.expert_hidden}: MLPs of {source} are copied whole, leave it out")
        if not GATES[config.gate].sums_to_1(config.top_k):
            raise UserError(f"gate {config.gate}, top_k {config.top_k}: weights must sum to 1, not to scale the MLPs")
        fc, proj = (weights.pop(f"{mlp}{name}.weight").t() for name in ("c_fc", "c_proj"))
        weights[f"{mlp}experts.c_fc"] = fc.expand(config.n_exp, -1, -1)
        weights[f"{mlp}experts.c_proj"] = proj.expand(config.n_exp, -1, -1)
        if config.bias:
            fc_bias, proj_bias = (weights.pop(f"{mlp}{name}.bias") for name in ("c_fc", "c_proj"))
            weights[f"{mlp}experts.fc_bias"] = fc_bias.expand(config.n_exp, 1, -1)
            weights[f"{mlp}experts.proj_bias"] = proj_bias.expand(config.n_exp, 1, -1)
    return weights


# ---------------------------------------------------------------------------------------------------------------------
# Export

CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A GPT-2 with {n_moe} MoE layers: {total:,} parameters, {active:,} of them active per token. {note}
Load it by `AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)`. Tokenizer: {tokenizer}.
Settings: `{settings}`
"""


def export_hf(model, folder, tokenizer_name, note=""):
    """Write `model` as a new folder for transformers: config, weights, tokenizer, card. It gets its name once
    transformers computes the same logits from it; else UserError, and nothing is left."""
    folder = Path(folder).resolve()
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty: give a new folder")
    card = CARD.format(
        name=folder.name, n_moe=len(model.moe_layers()), total=model.num_params(), active=model.num_active_params(),
        note=note, tokenizer=tokenizer_name, settings=json.dumps(dataclasses.asdict(model.config)),
    )
    try:
        theirs = to_transformers(model, tokenizer_name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}_", dir=folder.parent) as temp:
            new = Path(temp, "new")
            theirs.save_pretrained(new)
            if tokenizer_name != "unknown":
                write_tokenizer(new, tokenizer_name, model.config.block_size)
            (new / "README.md").write_text(card, encoding="utf-8")
            check_export(model, new)
            new.replace(folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}") from None
    except (ValueError, RuntimeError) as error:  # an unknown gate or weight, other logits
        reason = " ".join(str(error).split()[:40])
        raise UserError(f"not exported: {reason}: add what is new to lab/modeling_moe_gpt2.py") from None


def to_transformers(model, tokenizer_name):
    """`model` in transformers: GPT2LMHeadModel if it is a GPT-2, else the class of lab/modeling_moe_gpt2.py."""
    import transformers  # slow to import, needed here alone

    transformers.utils.logging.disable_progress_bar()
    config, weights, tokenizer, end, padding = model.config, model.state_dict(), get_tokenizer(tokenizer_name), None, []
    if tokenizer:
        end = tokenizer.eot
        padding = list(range(end + 1, config.vocab_size))  # of the vocabulary: never generated
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
    settings = {"tokenizer": tokenizer_name, **ends}
    if not model.moe_layers() and not config.qk_norm:
        settings |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout)
        settings |= {name: getattr(config, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=config.block_size, **settings))
        for name in [name for name in weights if name.endswith(TURNED)]:
            weights[name] = weights[name].t()
        if not config.bias:
            zeros = {name: torch.zeros_like(value) for name, value in theirs.state_dict().items() if "bias" in name}
            weights = {**zeros, **weights}
    else:
        code = importlib.import_module("lab.modeling_moe_gpt2")  # imports transformers
        code.MoEGPT2Config.register_for_auto_class()
        code.MoEGPT2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
        settings |= dataclasses.asdict(config)
        settings["num_experts_per_tok"] = settings.pop("top_k")
        if config.expert_hidden == "iso":
            settings["expert_hidden"] = config.hidden_of_expert
        theirs = code.MoEGPT2ForCausalLM(code.MoEGPT2Config(**settings))
    theirs.load_state_dict(weights)
    theirs.generation_config = transformers.GenerationConfig(**ends, suppress_tokens=padding or None)
    return theirs


def write_tokenizer(folder, name, block_size):
    """Files of a byte-pair encoding with GPT-2's characters for the bytes; that of plain bytes merges nothing."""
    from transformers import GPT2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    encoder, merges = (gpt2_files()[file].read_text(encoding="utf-8") for file in ("encoder.json", "vocab.bpe"))
    vocab, end = json.loads(encoder), get_tokenizer(name).eot
    if name == "bytes":
        vocab = {character: byte for byte, character in bytes_to_unicode().items()}
    vocab = {token: number for token, number in vocab.items() if number < end} | {"<|endoftext|>": end}
    merges = merges.splitlines()[: end - 255]  # a line of the version, then a merge for each token but the bytes
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    pairs = [tuple(merge.split()) for merge in merges[1:]]
    GPT2Tokenizer(vocab, pairs, model_max_length=block_size).save_pretrained(folder)  # tokenizer.json


@torch.no_grad()
def check_export(model, folder):
    """ValueError unless transformers computes from `folder` what `model` does, and no later token moves a logit."""
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    idx = torch.randint(model.config.vocab_size, (6, min(64, model.config.block_size)), generator=seeded(0))
    ours, found = logits_of(model)(idx), theirs(idx).logits
    wrong = (found - ours).abs().amax(dim=(1, 2)) > 1e-4 * ours.abs().max()
    if wrong.view(3, 2).any(dim=1).all():  # rounding may send a token to another expert, once in many rows
        raise ValueError("transformers computes other logits")
    moved = leak(lambda idx: theirs(idx).logits, idx.shape[1], model.config.vocab_size)
    if moved > 1e-4:
        raise ValueError(f"a later token or another row moves a logit, by {moved:.1e} of the largest")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def logits_of(model):
    """A function from idx (B, S) to the logits (B, S, V) of a GPT in evaluation, float32 on the CPU; dropless."""

    @torch.no_grad()
    def call(idx):
        was_training = model.training
        logits = model.eval()(idx.to(model.lm_head.weight.device), dropless=True).logits
        model.train(was_training)
        return logits.float().cpu()

    return call


def leak(call, n, vocab_size):
    """How far the logits of half a text of n tokens move when what follows it and the other row of the batch change,
    as a part of the largest logit; of rounding about 1e-6. `call`: a function from idx (B, S) to logits (B, S, V). The
    least of three texts counts, for rounding may send a token to another expert."""
    moved = []
    for seed in range(3):
        idx, other = (torch.randint(vocab_size, (2, n), generator=seeded(seed + i)) for i in (0, 100))
        other[0, : n // 2] = idx[0, : n // 2]
        before, after = call(idx), call(other)
        moved.append(((after - before)[0, : n // 2].abs().max() / before.abs().max()).item())
    return min(moved)


@dataclasses.dataclass
class Args:
    checkpoint: str  # Run folder, checkpoint, Hugging Face folder or gpt2, gpt2-medium, -large, -xl
    export_hf: str = ""  # New folder to write for Hugging Face transformers
    merge: str = ""  # File to write: a sharded checkpoint, optimizer included, as a single file


def main():
    args = common.parse(Args)
    if args.merge:
        path, state = checkpoint.read(args.checkpoint, checkpoint.PARTS)
        checkpoint.save(state, args.merge)
        print(f"{args.merge}: {path} as a single file")
    if args.export_hf:
        name, fields, weights, tokenizer = read_source(args.checkpoint)
        export_hf(build(name, fields, weights), args.export_hf, tokenizer, f"From {'/'.join(Path(name).parts[-2:])}.")
        print(f"{args.export_hf}: transformers computes the same logits from it as {name}")


if __name__ == "__main__":
    common.run(main)
