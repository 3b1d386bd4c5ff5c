"""Checks before a run builds anything: settings that contradict each other, models that the machine cannot train.

A UserError names the flag and the value to pass instead. The range of a single setting stands beside its field; what
only the model's own settings decide is refused by GPTConfig (model.py, moe.py).
"""

import math

import torch

import identity
from lab import common
from lab.common import UserError
from model import MODEL_FIELDS, ROUTER_LOSSES, GPTConfig

# ---------------------------------------------------------------------------------------------------------------------
# Settings


def check_args(args, world_size):
    """UserError for settings that contradict each other."""
    common.check_settings(args)
    check_batch(args, world_size)
    check_optimization(args, world_size)
    if args.name:
        identity.run_stem(args.name, "0", args.seed)
    if args.run_id:
        identity.run_stem("name", args.run_id, args.seed)
    if args.init_from == "scratch":  # else the shape is that of the source: check_model() follows when it is read
        model_config(args)


def check_batch(args, world_size):
    per_micro_step = args.B * args.T * world_size
    if args.total_batch_size % per_micro_step:
        nearest = max(1, round(args.total_batch_size / per_micro_step)) * per_micro_step
        ranks = f" x {world_size} ranks" if world_size > 1 else ""
        raise UserError(
            f"--total_batch_size {args.total_batch_size} is not a multiple of --B {args.B} x --T {args.T}{ranks}"
            f" = {per_micro_step}; the nearest is --total_batch_size {nearest}"
        )
    if args.block_size is not None and args.block_size < args.T:
        raise UserError(f"--T {args.T} is more than --block_size {args.block_size}: lower --T")


def check_optimization(args, world_size):
    if args.min_lr is not None and args.min_lr > args.max_lr:
        raise UserError(f"--min_lr {args.min_lr} is above --max_lr {args.max_lr}: lower it")
    if args.decay_steps and args.schedule != "wsd":
        raise UserError(f"--decay_steps {args.decay_steps} belongs to --schedule wsd: pass that, or leave it out")
    if args.decay_steps and args.decay_steps > args.max_steps:
        raise UserError(f"--decay_steps {args.decay_steps} is more than --max_steps {args.max_steps}: lower it")
    if args.decay_steps and args.max_minutes:
        raise UserError("--decay_steps counts steps, and --max_minutes sets the end by the clock: leave one out")
    if args.fsdp and world_size == 1:
        raise UserError("--fsdp shards over ranks: start with torchrun --nproc_per_node=N, or leave it out")
    if args.fsdp and args.optimizer != "adamw":
        raise UserError(f"--fsdp needs --optimizer adamw: {args.optimizer} needs whole parameters")
    if args.muon_lr != identity.PUBLISHED["muon_lr"] and args.optimizer != "muon":
        raise UserError(f"--muon_lr {args.muon_lr} belongs to --optimizer muon: pass that, or leave it out")
    if args.optimizer == "muon" and not args.max_lr:
        raise UserError("--optimizer muon needs a --max_lr above 0: the schedule is relative to it")


def model_config(args):
    """GPTConfig from the fields of Args that bear the same names."""
    settings = {name: getattr(args, name) for name in MODEL_FIELDS}
    try:
        return GPTConfig(**settings | {"block_size": args.block_size or args.T})
    except ValueError as error:
        raise UserError(f"--{error}") from None


# A setting of a part, and the switch of that part; sweeps give it to variants with and without.
PART_OF = {loss.weight: loss.switch for loss in ROUTER_LOSSES.values()} | {
    "balance_scope": "use_aux_loss", "bias_balance_rate": "use_bias_balance",
    "switch_tfm_init_scale": "use_switch_tfm_init",
}  # fmt: skip


def notes(args):
    """Settings that are allowed and surely not meant."""
    if args.warmup_steps >= args.max_steps:
        yield f"--warmup_steps {args.warmup_steps} is not below --max_steps {args.max_steps}: --max_lr is never reached"
    ignored = identity.ignored_settings(args)
    if ignored:
        yield f"{', '.join(f'--{name}' for name in ignored)}: no effect on a dense model (--n_exp 1)"
    for name, switch in PART_OF.items() if args.n_exp > 1 else ():
        if not getattr(args, switch) and getattr(args, name) != identity.neutral(args, name):
            yield f"--{name}: no effect without --{switch}"
    if args.recompute == "experts" and args.n_exp == 1:
        yield "--recompute experts: no effect on a dense model (--n_exp 1)"


# ---------------------------------------------------------------------------------------------------------------------
# The model and the machine


def check_model(config, args, machine):
    """UserError for a model that these settings, or this machine, cannot train; `config` is that of the model."""
    if config.block_size < args.T:
        raise UserError(f"--T {args.T} is more than the {config.block_size} positions of the model: lower --T")
    check_widths(config, machine)
    if not args.eval_only:
        check_memory(args, config, machine)


def check_widths(config, machine):
    """Grouped products in bfloat16 on CUDA read rows of whole 16 bytes."""
    if machine.device.type == "cuda" and machine.dtype == torch.bfloat16 and config.n_exp > 1:
        for name, width in (("n_embd", config.n_embd), ("expert_hidden", config.hidden_of_expert)):
            if width % 8:
                raise UserError(f"--{name} {width} is not a multiple of 8, which CUDA needs in bfloat16: round it")


def count_params(config):
    """(parameters, those of them in hidden matrices) of a GPT of this config, without building it."""
    D, L, E, bias = config.n_embd, config.n_layer, config.n_exp, int(config.bias)
    n_moe = count_moe_layers(config)
    widths = (L - n_moe) * config.hidden + n_moe * (E * config.hidden_of_expert + config.hidden_of_shared)
    n_mlps = L - n_moe + n_moe * (E + bool(config.n_shared_exp))
    matrices = L * 4 * D * D + 2 * D * widths
    biases_and_norms = bias * (widths + n_mlps * D + L * 4 * D) + (2 * L + 1) * D * (1 + bias)
    routers = n_moe * D * E * (1 + config.use_noisy_top_k)
    embeddings = (config.vocab_size + config.block_size) * D
    return matrices + biases_and_norms + routers + embeddings, matrices


def count_moe_layers(config):
    return math.ceil(max(0, config.n_layer - config.first_dense) / config.stride) if config.n_exp > 1 else 0


def needed_bytes(args, config, machine):
    """{part: bytes} that training needs at least: activations count the tensors that backward surely needs."""
    width = 2 if machine.dtype == torch.bfloat16 else 4
    share = machine.world_size if args.fsdp else 1
    params, matrices = (4 * count // share for count in count_params(config))
    moments = {"adamw": 2 * params, "muon": 2 * params - matrices, "adafactor": 0}  # Muon keeps one per hidden matrix
    n_moe = count_moe_layers(config)
    hidden = 2 * ((config.n_layer - n_moe) * config.hidden + n_moe * config.hidden_of_shared)
    if args.recompute != "experts":
        hidden += n_moe * config.top_k * config.hidden_of_expert  # routed experts compute GELU again
    per_token = config.n_layer * 8 * config.n_embd + hidden
    if args.recompute == "blocks":
        per_token = config.n_layer * config.n_embd
    return {
        "parameters": params,
        "gradients": params,
        "optimizer": moments[args.optimizer],
        "activations": width * args.B * args.T * per_token,
    }


def check_memory(args, config, machine):
    """UserError, with the numbers, where the run cannot fit into the memory that is free."""
    needed, free = needed_bytes(args, config, machine), common.free_memory(machine.device)
    if sum(needed.values()) > free:
        parts = ", ".join(f"{part} {size / 1e9:,.1f}" for part, size in needed.items())
        remedy = "lower --B, or choose --recompute blocks, a smaller model, or --optimizer adafactor"
        needs = f"the run needs at least {sum(needed.values()) / 1e9:,.1f} GB ({parts})"
        raise UserError(f"{needs}, {free / 1e9:,.1f} GB are free: {remedy}")
