"""Hugging Face folders, in and out: config.json, model.safetensors, GPT-2's tokenizer files, a model card.

    export_hf(model, folder, state)                  # state: the checkpoint, for the tokenizer and the card
    fields, weights, tokenizer = read_folder(folder) # GPTConfig fields, state dict of GPT, name of the tokenizer

A dense model is written in GPT-2's own layout, for transformers' GPT2LMHeadModel. A model that is no GPT-2 (with MoE
layers or qk_norm) brings its class along:
modeling_moe_gpt2.py is copied into the folder, config.json names it (`auto_map`), and
AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True) gives the logits of our dropless model. Its
config.json holds the GPTConfig too (`gpt_config`), from which the folder is read back. No code of a folder is run here.
"""

import contextlib
import dataclasses
import json
import math
import os
import tempfile
import urllib.request
from pathlib import Path

import safetensors.torch
import torch

import runlog
from identity import read_record
from lab import data as dataloader
from lab.common import UserError, atomic_write
from lab.tokenizer import ByteTokenizer, GPT2Tokenizer, gpt2_files
from model import GPT, MODEL_FIELDS, GPTConfig

# ---------------------------------------------------------------------------------------------------------------------
# Finding a folder

HUB_FILES = ("config.json", "model.safetensors")
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def find_folder(source):
    """Path of the Hugging Face folder that `source` is or names; None for a checkpoint or a run folder."""
    path = Path(source)
    if path.exists():
        return path if (path / "config.json").is_file() else None
    if str(source) in GPT2_NAMES:
        return download_gpt2(source)
    raise UserError(
        f"no folder {source} and no such file: give a checkpoint (step_*.pt), a run folder, a Hugging Face folder or "
        f"one of {', '.join(GPT2_NAMES)}"
    )


def download_gpt2(name):
    """Folder of the Hub's config.json and model.safetensors, downloaded unless they are in its cache."""
    import huggingface_hub as hub  # slow to import, needed by few runs

    repo = f"openai-community/{name}"

    def fetch(**options):
        paths = [hub.hf_hub_download(repo, file, **options) for file in HUB_FILES]
        return Path(paths[0]).parent

    with contextlib.suppress(OSError):
        return fetch(local_files_only=True)
    try:
        # Without a network the library retries for half a minute; this request fails at once.
        if not hub.constants.HF_HUB_OFFLINE:
            urllib.request.urlopen(hub.constants.ENDPOINT, timeout=10).close()
        return fetch()
    except Exception as error:  # OSError, or an error of the Hub's HTTP library, which depends on the version
        raise UserError(
            f"cannot download {name} ({type(error).__name__}): on a machine with a network run `hf download {repo} "
            f"{' '.join(HUB_FILES)} --local-dir {name}`, copy that folder here and give its path"
        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# Reading

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # Conv1D: (in, out)
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers of old files, not weights

# Settings of config.json that model.py computes; a field left out means GPT-2's value, the first one here.
GPT2_SETTINGS = {
    "model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    "tie_word_embeddings": (True,), "auto_map": (None,),
}  # fmt: skip

MOE_CODE = Path(__file__).with_name("lab") / "modeling_moe_gpt2.py"
MOE_TYPE = "moe_gpt2"
AUTO_MAP = {
    "AutoConfig": f"{MOE_CODE.stem}.MoEGPT2Config",
    "AutoModelForCausalLM": f"{MOE_CODE.stem}.MoEGPT2ForCausalLM",
}


def read_folder(folder):
    """(GPTConfig fields as a dict, weights as a state dict of GPT, name of the tokenizer)."""
    settings, source = read_settings(folder), f"{folder}/config.json"
    is_moe = settings.get("model_type") == MOE_TYPE
    fields = moe_fields(settings, source) if is_moe else gpt2_fields(settings, source)
    return fields, read_weights(folder, () if is_moe else TRANSPOSED), tokenizer_name(folder)


def tokenizer_name(folder):
    """Name of the tokenizer that belongs to the weights; GPT-2's where config.json does not tell."""
    return str(read_settings(folder).get("tokenizer") or "gpt2")


def read_settings(folder):
    """config.json as a dict."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder}/config.json does not describe a model: {error}") from None
    return settings


def config_of(fields, source):
    """GPTConfig of the dict `fields`; UserError, naming `source`, for values that no model can have."""
    try:
        return GPTConfig(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: no such model: {error}") from None


def gpt2_fields(settings, source):
    """GPTConfig fields, as a dict, of GPT-2's config.json; UserError for a model that is not GPT-2."""
    shape = {"n_positions": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}
    fields = {name: settings.get(name, value) for name, value in shape.items()}
    config = config_of({"block_size": fields.pop("n_positions"), **fields}, source)
    for name, values in {**GPT2_SETTINGS, "n_inner": (None, config.hidden)}.items():
        if settings.get(name, values[0]) not in values:
            raise UserError(f"{source}: {name} is {settings[name]!r}; this model has {values[0]!r}")
    return dataclasses.asdict(config)


def moe_fields(settings, source):
    """GPTConfig fields, as a dict, of an exported MoE model; UserError for other code or edited settings."""
    code = settings.get("auto_map")
    code = code.get("AutoModelForCausalLM") if isinstance(code, dict) else None
    if (
        str(code).split("--")[-1] != AUTO_MAP["AutoModelForCausalLM"]
    ):  # the Hub's name of the repository stands before --
        raise UserError(f"{source}: its auto_map names {code}; only {AUTO_MAP['AutoModelForCausalLM']} is read here")
    fields = settings.get("gpt_config")
    if not isinstance(fields, dict):
        raise UserError(f"{source} has no gpt_config: export the model again with checkpoint.py --export_hf")
    config = config_of({name: math.inf if value == "inf" else value for name, value in fields.items()}, source)
    with torch.device("meta"):
        wanted = moe_settings(GPT(config))
    for name, value in wanted.items():
        if settings.get(name, value) != value:
            raise UserError(f"{source}: {name} is {settings[name]!r}, by its gpt_config {value!r}: make them agree")
    return dataclasses.asdict(config)


def read_weights(folder, transposed):
    """The folder's weights as a state dict of GPT. Keys may begin with `transformer.` or not."""
    files = sorted(folder.glob("model*.safetensors"))  # large models have several
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
                turn = key.endswith(transposed) and tensor.dim() == 2
                weights[f"transformer.{key}"] = tensor.t() if turn else tensor
    if "transformer.wte.weight" in weights:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return weights


# ---------------------------------------------------------------------------------------------------------------------
# Writing

# Every setting of GPTConfig is in one of these two lists, or is refused unless it has its default.
EXPORTED = (
    "block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias", "dropout", "qk_norm", "n_exp", "top_k", "stride",
    "first_dense", "expert_hidden", "n_shared_exp", "shared_expert_hidden", "gate", "gate_scale", "use_noisy_top_k",
    "noise_scale", "router_use_full_prec", "use_bias_balance", "use_quantile_balance",
)  # fmt: skip
TRAINING_ONLY = (
    "mlp_init", "mlp_init_scale", "use_switch_tfm_init", "switch_tfm_init_scale", "freeze_router",
    "output_z_loss_weight", "use_aux_loss", "use_router_z_loss", "z_loss_on", "aux_loss_weight",
    "router_z_loss_weight", "balance_scope", "bias_balance_rate", "train_capacity", "eval_capacity", "min_capacity",
)  # fmt: skip
TOKENIZERS = {"gpt2": GPT2Tokenizer, "bytes": ByteTokenizer}
TOKENIZER_FILES = {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}  # as transformers names them, as here
FILES = (*HUB_FILES, *TOKENIZER_FILES, "tokenizer_config.json", "generation_config.json", "README.md", MOE_CODE.name)


def export_hf(model, folder, state=None):
    """Write `model` as a folder that transformers' AutoModelForCausalLM loads; a GPT-2 needs no trust_remote_code.

    state: the checkpoint (a dict), for the tokenizer and the model card. A dense model without biases gets zeros for
    them. The folder must be new, empty or an earlier export; it holds all files or is not changed.
    """
    folder, state = Path(folder), state or {}
    check_exportable(model.config)
    check_target(folder)
    own, tokenizer = has_own_class(model), state.get("tokenizer")
    files = tokenizer_files(model.config.block_size) if tokenizer == "gpt2" else {}
    if own:
        files[MOE_CODE.name] = MOE_CODE.read_bytes()
    files["README.md"] = model_card(model, folder.name, state, "vocab.json" in files).encode()
    weights = model_weights(model) if own else gpt2_layout(model)
    files["model.safetensors"] = safetensors.torch.save(weights, metadata={"format": "pt"})
    ends, generation = special_tokens(tokenizer, model.config.vocab_size)
    settings = moe_settings(model) | moe_extras(model) if own else gpt2_settings(model)
    files["config.json"] = to_json({**settings, **ends, "dtype": "float32", "tokenizer": tokenizer})
    files["generation_config.json"] = to_json(generation)
    try:
        write_folder(folder, files)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None


def has_own_class(model):
    """Whether `model` is exported with modeling_moe_gpt2.py: GPT-2's class does not compute it."""
    return bool(model.moe_layers()) or model.config.qk_norm


def check_exportable(config):
    """UserError for a setting that no exported model has."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in EXPORTED + TRAINING_ONLY and value != field.default:
            raise UserError(
                f"{field.name} {value} cannot be exported: {MOE_CODE.name} computes models with {field.default}"
            )


def check_target(folder):
    """UserError unless `folder` is new, empty or an earlier export."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"cannot write {folder}: it is not a folder")
    names = {path.name for path in folder.iterdir()}
    if names and not (names <= {*FILES} and "config.json" in names and "tokenizer" in read_settings(folder)):
        raise UserError(f"{folder} is not empty and not an earlier export: give a new folder")


def write_folder(folder, files):
    """Write {name: bytes} as the whole content of `folder`: all of it, or on an error nothing."""
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}_", dir=folder.parent) as temp:
        new = Path(temp, "new")
        new.mkdir()
        for name, content in files.items():
            with atomic_write(new / name) as f:
                f.write(content)
        if folder.exists():
            os.replace(folder, Path(temp, "old"))
        os.replace(new, folder)


def to_json(settings):
    return (json.dumps(settings, indent=2) + "\n").encode()


def special_tokens(tokenizer, vocab_size):
    """Begin and end of text for config.json, and generation_config.json; both {} where the end of text is unknown.

    As in sample.py the padding of the vocabulary is never generated.
    """
    known = TOKENIZERS.get(tokenizer)
    eot = known.eot if known else 50256 if vocab_size > 50256 else None
    if eot is None:
        return {}, {}
    ends, padding = (
        {"bos_token_id": eot, "eos_token_id": eot},
        range(known.vocab_size if known else vocab_size, vocab_size),
    )
    return ends, {**ends, "pad_token_id": eot, **({"suppress_tokens": [*padding]} if padding else {})}


def tokenizer_files(block_size):
    """{name: bytes} of GPT-2's tokenizer files; {} without the package that has them."""
    files, found = {}, gpt2_files()
    for name, ours in TOKENIZER_FILES.items() if found else ():
        files[name] = found[ours].read_bytes()
        files["tokenizer_config.json"] = to_json({"tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size})
    return files


def gpt2_settings(model):
    """config.json of a dense model."""
    config = model.config
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
        "vocab_size": config.vocab_size, "n_positions": config.block_size,
        "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd,
        "n_inner": model.transformer.h[0].mlp.c_fc.out_features,
        "embd_pdrop": config.dropout, "attn_pdrop": config.dropout, "resid_pdrop": config.dropout,
    }  # fmt: skip


def gpt2_layout(model):
    """State dict of transformers' GPT2LMHeadModel, on the CPU, float32; the tied output projection is left out."""
    weights = model_weights(model)
    for key in list(weights):
        if key.endswith(TRANSPOSED):
            weights[key] = weights[key].t().contiguous()
        if not model.config.bias and (".ln_" in key or key.endswith(TRANSPOSED)):
            weights[key.removesuffix("weight") + "bias"] = torch.zeros(weights[key].shape[-1])
    return weights


def model_weights(model):
    """The model's state dict, on the CPU, float32; the tied output projection is left out."""
    weights = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    return {name: weight.detach().float().cpu().contiguous() for name, weight in weights.items()}


def moe_settings(model):
    """Settings of modeling_moe_gpt2.py in config.json: all that decides the function, widths from the tensors."""
    config, layers = model.config, model.moe_layers()
    dense = [block.mlp.c_fc.out_features for block in model.transformer.h if not block.is_moe]
    settings = {
        "vocab_size": config.vocab_size, "n_positions": config.block_size,
        "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "bias": config.bias,
        "n_inner": dense[0] if dense else None, "dropout": config.dropout, "qk_norm": config.qk_norm,
        "moe_layers": [layer for layer, _ in layers],
    }  # fmt: skip
    for _, moe in layers[:1]:
        settings |= {
            "num_experts": config.n_exp, "num_experts_per_tok": config.top_k,
            "expert_hidden": moe.experts.c_fc.shape[-1],
            "shared_hidden": moe.shared.c_fc.out_features if moe.shared is not None else 0,
            "gate": config.gate, "gate_scale": config.gate_scale,
            "balance_bias": "balance_bias" in moe.router.state_dict(),
            "router_noise": config.use_noisy_top_k, "noise_scale": config.noise_scale,
            "router_float32": config.router_use_full_prec,
        }  # fmt: skip
    return settings


def moe_extras(model):
    """The rest of that config.json: the class, and all settings of GPTConfig to read it back."""
    fields = {k: "inf" if v == math.inf else v for k, v in dataclasses.asdict(model.config).items()}  # JSON has no inf
    return {
        "architectures": [AUTO_MAP["AutoModelForCausalLM"].split(".")[1]], "model_type": MOE_TYPE,
        "auto_map": AUTO_MAP, "gpt_config": fields,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The model card

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2{tag}]
---

# {name}

{what} {total:,} parameters without the position embeddings, {active:,} of them active per token; context of
{block_size:,} tokens. Weights in float32.

    from transformers import {classes}

    model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
    {tokenizer}

## Losses

{losses}

## Data

{data}

## Settings

{settings}
"""
WITHOUT_TOKENIZER = {
    "gpt2": 'tokenizer = AutoTokenizer.from_pretrained("openai-community/gpt2")',
    "bytes": "# No tokenizer files: a token is a byte of UTF-8, list(text.encode()); 256 ends a text.",
    None: "# No tokenizer files: the tokenizer is not known.",
}


def model_card(model, name, state, has_tokenizer):
    """README.md of the folder: how to load it, and from the checkpoint `state` its losses, data and settings."""
    config, layers = model.config, [layer for layer, _ in model.moe_layers()]
    what = "A GPT-2 with QK norm." if config.qk_norm else "A GPT-2."
    if layers:
        what = (
            f"A GPT-2 of {config.n_layer} layers with Mixture of Experts in layers {', '.join(map(str, layers))}: "
            f"{config.top_k} of {config.n_exp} experts per token, no token dropped."
        )
    trust = ", trust_remote_code=True" if has_own_class(model) else ""
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})'
    if not has_tokenizer:
        tokenizer = WITHOUT_TOKENIZER.get(state.get("tokenizer"), WITHOUT_TOKENIZER[None])
    return CARD.format(
        name=name, what=what, tag=", mixture-of-experts" if layers else "",
        total=model.num_params(), active=model.num_active_params(), block_size=config.block_size,
        trust=trust, tokenizer=tokenizer,
        classes="AutoModelForCausalLM" + ", AutoTokenizer" * ("AutoTokenizer" in tokenizer),
        losses=table(("loss", "step", "value"), losses_of(state)),
        data=table(("data", ""), data_of(state)), settings=table(("setting", "value"), settings_of(config, state)),
    )  # fmt: skip


def table(head, rows):
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows] if rows else []
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) or "Not recorded."


def losses_of(state):
    """Rows (stream, step, value): the last of each loss in the run's log, if that is here, up to the checkpoint."""
    args, step = state.get("args", {}), state.get("step", 0)
    history = state.get("progress", {}).get("history")
    rows = (
        [(f"train, mean of the last {len(history)} steps", step, f"{sum(history) / len(history):.4f}")]
        if history
        else []
    )
    if not {"logs_dir", "name", "run_id", "seed"} <= args.keys():
        return rows
    path = runlog.log_path(args["logs_dir"], args["name"], args["run_id"], args["seed"])
    ours = read_record(path).get("identity") == state.get("record", {}).get("identity")  # not a later run of that name
    streams = runlog.up_to(runlog.read(path), step) if ours and path.exists() else {}
    names = {"val": "validation, nats per token", "hella": "HellaSwag acc_norm"}
    last = {name: [column[-1] for column in streams[name]] for name in names if name in streams}
    return rows + [(names[name], at, f"{value:.4f}") for name, (at, value) in last.items()]


def data_of(state):
    """Rows (name, value) about the training data."""
    args, settings = state.get("args", {}), state.get("record", {}).get("settings", {})
    rows = [("tokenizer", state.get("tokenizer"))]
    if "data_root" in args:
        rows.append(("shards", Path(args["data_root"]).name))
        source = source_of(args["data_root"], settings.get("data"))
        rows += [("source", json.dumps(source) if isinstance(source, dict) else source)] if source else []
    if "data" in settings:
        rows.append(("fingerprint of the shards", settings["data"]))
    if "total_batch_size" in args:
        rows.append(("tokens seen", f"{state.get('step', 0) * args['total_batch_size']:,}"))
    return [row for row in rows if row[1] is not None]


def source_of(data_root, data):
    """Where the text of the shards came from, or None; `data` is the fingerprint that they had."""
    try:
        same = data is None or dataloader.fingerprint(data_root) == data
    except UserError:  # they are not here any more
        return None
    return dataloader.read_meta(data_root).get("source") if same else None


def settings_of(config, state):
    """Rows (name, value) of all settings of the model, then of the training."""
    record, unused = state.get("record", {}), GPTConfig.moe_fields() if config.n_exp == 1 else ()
    settings = {name: getattr(config, name) for name in MODEL_FIELDS if name not in unused}
    settings |= {"steps": state["step"]} if "step" in state else {}
    settings |= {
        name: value for name, value in record.get("settings", {}).items() if name not in (*MODEL_FIELDS, "data")
    }
    settings |= {name: record[name] for name in ("dtype", "world_size", "commit", "torch") if name in record}
    for name in ("init_from", "hellaswag_data"):  # paths of this machine
        settings |= {name: Path(settings[name]).name} if settings.get(name) else {}
    return list(settings.items())
