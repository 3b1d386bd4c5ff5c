"""Trains GPT-2 or one of its MoE variants: `Args`, then the loop.

    python train_single_gpu.py                                         # the published MoE run, one GPU (or mps, or CPU)
    python train_single_gpu.py --n_exp 1 --seed 42                     # its dense twin
    python train_single_gpu.py --use_noisy_top_k --use_aux_loss        # a variant
    python train_single_gpu.py --resume auto                           # go on after a kill, line for line
    torchrun --standalone --nproc_per_node=8 train_single_gpu.py       # the same global batch over 8 GPUs

What is logged at step s is measured after s updates, so the last evaluation is at max_steps. `val` and `hella` are of
the cross-entropy alone; the router losses have streams of their own (runlog.py has the format).

Randomness: the weights come from a generator seeded with `seed`; noise and dropout of the micro-batch numbered m of
step s from a generator seeded with (seed, s, m), whichever rank runs it; the order of the data from `data_seed`;
samples from a generator of their own. So the random state of a run is (seed, step): a resumed run, another number of
ranks and any amount of evaluation or sampling in between draw the same numbers.
"""

import contextlib
import dataclasses
import inspect
import json
import math
import os
import signal
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import common
import hellaswag
import runlog
import sample
from common import UserError, atomic_write, lock
from dataloader import DataLoader
from logger import Console, Log, describe_run, print_header
from model import GPT, MODEL_FIELDS, GPTConfig
from tokenizer import get_tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# Settings. Edit them here, or override them on the command line.


@dataclass
class Args:
    """Train GPT-2 or a Mixture-of-Experts variant of it. Every flag takes underscores or dashes."""

    name: str = ""  # of the run; empty: from the settings, e.g. moe_noisy_top_k_aux_loss
    run_id: str = ""  # tells runs of one name apart; empty: today, YYYYMMDD (with --resume auto: the newest there is)
    seed: int = 1337  # of the weights, router noise and dropout
    resume: str = ""  # "auto": the newest whole checkpoint of this run, if there is one; or a path
    init_from: str = "scratch"  # or a checkpoint, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a Hugging Face folder
    eval_only: bool = False  # print train and val loss of the model as it is, and stop

    # data
    data_root: str = "edu_fineweb10B"  # folder of token shards, made by fineweb.py
    data_seed: int = 1337  # of the order of the data: the same for every variant and seed
    total_batch_size: int = 524_288  # tokens a step, over micro-batches and ranks
    B: int = 16  # sequences a micro-batch
    T: int = 1024  # tokens a sequence

    # model
    block_size: int | None = None  # positions the model has (default: T, or those of --init_from)
    vocab_size: int = 50304  # the tokenizer's 50257, padded to a multiple of 64
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # width
    bias: bool = True  # biases in Linears, LayerNorms and experts
    dropout: float = 0.0  # 0 for pretraining, 0.1 and more for finetuning

    # mixture of experts
    n_exp: int = 8  # experts a MoE layer; 1 is the dense model
    top_k: int = 2  # experts a token
    stride: int = 2  # every stride-th block is a MoE layer, from block 0
    gate: Literal["topk_softmax", "softmax", "sigmoid"] = "topk_softmax"  # how the chosen experts are weighted
    n_shared_exp: int = 0  # experts that every token passes, beside the routed ones
    use_noisy_top_k: bool = False  # learned noise on the router logits, in training
    use_aux_loss: bool = False  # load-balance loss
    use_router_z_loss: bool = False  # penalty on large router logits
    use_bias_balance: bool = False  # balance by a bias on the selection, without a loss
    aux_loss_weight: float = 0.01  # of the load-balance loss
    router_z_loss_weight: float = 0.001  # of the router z-loss
    bias_balance_rate: float = 0.001  # move of the selection bias per step
    balance_scope: Literal["micro_batch", "global"] = "micro_batch"  # load in the balance loss; global: all ranks'
    train_capacity: float = 1.25  # capacity factor of an expert; inf drops nothing
    eval_capacity: float = 2.0  # the same in validation
    min_capacity: int = 4  # tokens an expert takes at least
    use_switch_tfm_init: bool = False  # truncated normal, std sqrt(scale / fan in), on the MoE layers
    switch_tfm_init_scale: float = 1.0  # its scale; the paper recommends 0.1
    router_use_full_prec: bool = False  # router in float32 under autocast

    # optimization
    max_steps: int = 190_730  # steps; 100B tokens at the default batch
    max_lr: float = 6e-4  # peak learning rate
    min_lr: float | None = None  # learning rate at max_steps (default: a tenth of max_lr)
    warmup_steps: int = 2000  # steps of linear warmup
    optimizer: Literal["adamw", "adafactor"] = "adamw"  # adafactor: little state, max_lr relative to a weight's size
    weight_decay: float = 0.1  # on weights, not on biases and norms
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    grad_clip: float = 1.0  # largest gradient norm; inf: no clipping
    on_nonfinite: Literal["stop", "skip"] = "stop"  # a non-finite loss or gradient ends the run, or drops the step

    # evaluation, samples, log
    val_loss_every: int = 250  # steps; 0: never
    val_loss_steps: int = 20  # micro-batches of B x T a validation, shared by the ranks
    hellaswag_every: int | None = None  # steps (default: with val); 0: never
    hellaswag_data: str = ""  # jsonl; empty: data/hellaswag, downloaded when missing
    hellaswag_limit: int | None = None  # examples (default: all 10,042)
    sample_from_model_every: int = 250  # steps; 0: never
    sample_prompt: str = "Hello, I'm a language model,"  # of the samples while training
    logs_dir: str = "logs"  # of log_{name}_{run_id}_seed_{seed}.txt
    progress: Literal["auto", "bar", "lines"] = "auto"  # auto: a bar in a terminal, a line a step elsewhere
    wandb: bool = False  # log to Weights & Biases too (WANDB_MODE=offline works)
    wandb_project: str = "moe-lab"  # its project

    # checkpoints
    save_checkpoint: bool = True  # write checkpoints
    save_checkpoint_every: int = 10_000  # steps; also at the end and on SIGTERM or SIGINT
    checkpoint_dir: str = "checkpoints"  # of {name}_{run_id}_seed_{seed}/step_{step}.pt
    keep_checkpoints: int = 3  # the newest so many; older ones are removed

    # machine
    device: str = "auto"  # cuda, mps, cpu; auto: the first of them there is
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: bfloat16 on cuda, else float32
    use_compile: bool = True  # torch.compile, on cuda
    compile_on_cpu: bool = False  # torch.compile elsewhere too (slow to start, needs a C++ compiler)
    fsdp: bool = False  # shard parameters, gradients and optimizer over the ranks (torchrun)
    dist_timeout: int = 600  # seconds after which ranks that wait for a dead one give up


POSITIVE = ("total_batch_size", "B", "T", "max_steps", "val_loss_steps", "save_checkpoint_every", "keep_checkpoints",
            "hellaswag_limit", "block_size", "dist_timeout")  # fmt: skip
NOT_NEGATIVE = ("seed", "data_seed", "warmup_steps", "val_loss_every", "sample_from_model_every", "hellaswag_every")
RATES = ("max_lr", "min_lr", "weight_decay", "bias_balance_rate")
# Of the settings that are not the model's, those without which a resumed run would not be the same run.
FIXED_FIELDS = (*MODEL_FIELDS, "seed", "data_seed", "T", "optimizer")


def check_args(args, world_size):
    """Everything that can be said to be wrong before anything is built."""
    for name in POSITIVE + NOT_NEGATIVE:
        value, least = getattr(args, name), 1 if name in POSITIVE else 0
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, not {value}")
    for name in RATES:
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"--{name} must be a finite number, 0 or more, not {value}")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise UserError(f"--{name} must lie in [0, 1), not {getattr(args, name)}")
    if not args.grad_clip > 0:
        raise UserError(f"--grad_clip must be above 0, not {args.grad_clip}; inf clips nothing")
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
    if args.fsdp and world_size == 1:
        raise UserError("--fsdp shards over ranks: start with torchrun --nproc_per_node=N, or leave it out")
    if args.fsdp and args.optimizer != "adamw":
        raise UserError(
            f"--fsdp works with --optimizer adamw, not {args.optimizer}, whose state has no parameter's shape"
        )
    model_config(args)


def model_config(args):
    """GPTConfig from the fields of Args that bear the same names."""
    settings = {name: getattr(args, name) for name in MODEL_FIELDS}
    try:
        return GPTConfig(**settings | {"block_size": args.block_size or args.T})
    except ValueError as error:
        raise UserError(f"--{error}") from None


def variant_name(args):
    """The published names, `no_moe` or `moe` and what is switched on, then the settings that are new here."""
    if args.n_exp == 1:
        return "no_moe"
    default = {field.name: field.default for field in dataclasses.fields(Args)}
    changed = {name for name in default if getattr(args, name) != default[name]}
    dropless = math.isinf(args.train_capacity)
    parts = {
        f"top_k_{args.top_k}": "top_k" in changed,
        "noisy_top_k": args.use_noisy_top_k,
        "aux_loss": args.use_aux_loss,
        "router_z_loss": args.use_router_z_loss,
        "switch_tfm_init": args.use_switch_tfm_init,
        "router_full_prec": args.router_use_full_prec,
        f"init_scale_{args.switch_tfm_init_scale:g}": args.use_switch_tfm_init and "switch_tfm_init_scale" in changed,
        f"gate_{args.gate}": "gate" in changed,
        "bias_balance": args.use_bias_balance,
        f"shared_{args.n_shared_exp}": "n_shared_exp" in changed,
        "dropless": dropless,
        f"capacity_{args.train_capacity:g}": "train_capacity" in changed and not dropless,
        f"n_exp_{args.n_exp}": "n_exp" in changed,
        f"stride_{args.stride}": "stride" in changed,
        "balance_global": args.balance_scope == "global",
    }
    return "_".join(["moe"] + [part for part, on in parts.items() if on])


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def gather_sum(value, machine):
    """Sum of a float64 tensor over the ranks."""
    if machine.world_size > 1:
        value = value.to(machine.device)
        dist.all_reduce(value)
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Model and optimizer


def build_model(args, machine):
    """The model on its device, from scratch or from --init_from."""
    generator = torch.Generator().manual_seed(args.seed)
    if args.init_from == "scratch":
        return GPT(model_config(args), generator).to(machine.device)
    if args.eval_only:  # as it is: no experts are made out of a dense model
        overrides = {}
    else:
        shape = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias")
        overrides = {name: getattr(args, name) for name in MODEL_FIELDS if name not in shape}
    model = checkpoint.init_from(args.init_from, overrides, generator, block_size=args.block_size)
    if model.config.block_size < args.T:
        have = f"the {model.config.block_size} positions of {args.init_from}"
        raise UserError(f"--T {args.T} is more than {have}: lower --T")
    return model.to(machine.device)


def parallelize(model, args, machine):
    """What is called in training: the model compiled and, over several ranks, wrapped. It shares its parameters."""
    if args.fsdp:
        import sharding  # here: a second to import, and few runs want it

        return sharding.shard(model)
    compiled = args.use_compile and (machine.device.type == "cuda" or args.compile_on_cpu)
    called = torch.compile(model) if compiled else model
    if machine.world_size > 1:  # buffers are statistics and the balance bias, which every rank computes alike
        known = inspect.signature(DistributedDataParallel).parameters
        no_sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch < 2.13
        called = DistributedDataParallel(called, gradient_as_bucket_view=True, **{no_sync: False})
    return called


def build_optimizer(model, args):
    groups = model.optimizer_groups(args.weight_decay)
    held = [p for group in groups for p in group["params"]]
    if {id(p) for p in held} != {id(p) for p in model.parameters()} or len(held) != len(list(model.parameters())):
        raise RuntimeError("the optimizer groups do not hold exactly the model's parameters")
    if args.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=args.max_lr)
    return torch.optim.AdamW(groups, lr=args.max_lr, betas=(args.beta1, args.beta2), eps=1e-8, fused=True)


def learning_rate(step, args):
    """Linear warmup, then a cosine from max_lr down to min_lr at max_steps."""
    min_lr = 0.1 * args.max_lr if args.min_lr is None else args.min_lr
    if step < args.warmup_steps:
        return args.max_lr * (step + 1) / args.warmup_steps
    progress = min(1.0, (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps))
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (args.max_lr - min_lr)


# ---------------------------------------------------------------------------------------------------------------------
# One step


class StepResult(NamedTuple):
    ce_loss: float  # nats per token, over the global batch
    losses: dict  # the router losses, unweighted, summed over MoE layers
    grad_norm: float  # before clipping
    stop: bool  # some rank was told to stop
    applied: bool  # the update was made: loss and gradient were finite
    router: list  # dicts, GPT.router_stats of the whole step


def seed_noise(seed, step, micro_batch):
    """Noise and dropout of a micro-batch depend on its number in the run alone, not on rank or on what ran before."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, micro_batch]).generate_state(1)[0]))


def train_step(called, model, optimizer, loader, args, machine, step, stop):
    """Forward and backward over the micro-batches of this rank, clip, update. One transfer to the host, at its end."""
    micro_steps = args.total_batch_size // (args.B * args.T * machine.world_size)
    losses = {}
    tables = []
    for i in range(micro_steps):
        x, y = loader.next_batch()
        last = i == micro_steps - 1
        if args.fsdp:
            called.set_requires_gradient_sync(last)
        elif machine.world_size > 1:
            called.require_backward_grad_sync = last  # what DDP's no_sync() sets
        seed_noise(args.seed, step, i * machine.world_size + machine.rank)
        with machine.autocast():
            out = called(x, y)
        (out.loss / micro_steps).backward()
        for name, value in {"ce_loss": out.ce_loss, **out.losses}.items():
            losses[name] = losses.get(name, 0.0) + value.detach() / micro_steps
        if model.moe_layers():
            tables.append(model.router_table())
    norm = clip_gradients(model, args.grad_clip)
    lr = learning_rate(step, args)
    for group in optimizer.param_groups:
        group["lr"] = lr
    losses, grad_norm, stop, table = collect(losses, norm, stop, tables, machine)
    applied = all(map(math.isfinite, losses.values())) and math.isfinite(grad_norm)
    if applied:
        optimizer.step()
        if args.use_bias_balance and tables:
            model.update_balance_bias(table)
    optimizer.zero_grad(set_to_none=True)
    ce_loss = losses.pop("ce_loss")
    return StepResult(ce_loss, losses, grad_norm, stop, applied, model.router_stats(table) if tables else [])


def clip_gradients(model, grad_clip):
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # under FSDP each rank holds a part


def collect(losses, norm, stop, tables, machine):
    """Mean losses and router table over the micro-batches of all ranks, brought to the host; whether any rank stops.

    Counts are summed, not averaged, and the largest logit is the largest of all.
    """
    means = torch.stack(list(losses.values()))
    table = torch.stack(tables).sum(0) if tables else means.new_zeros(0, 4)
    largest = torch.stack([t[:, GPT.MAX_LOGIT] for t in tables]).amax(0) if tables else means.new_zeros(0)
    n_tables = len(tables) * machine.world_size
    if machine.world_size > 1:
        sums = torch.cat([means, table.flatten()])
        most = torch.cat([largest, means.new_tensor([float(stop)])])
        dist.all_reduce(sums)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        means, table = sums[: len(means)] / machine.world_size, sums[len(means) :].view(table.shape)
        largest, stop = most[:-1], most[-1:].item() > 0
    if tables:
        table[:, : GPT.COUNTS] /= n_tables
        table[:, GPT.MAX_LOGIT] = largest
    *means, norm = torch.cat([means, norm.reshape(1)]).tolist()
    return dict(zip(losses, means, strict=True)), norm, stop, table


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and samples: neither touches the generator, the data position or the gradients of training


@torch.no_grad()
def mean_loss(model, loader, steps, machine):
    """Cross-entropy, nats per token, in eval mode, over the first `steps` batches of the loader's split."""
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)
    rank, world_size = machine.eval_share
    for i in range(rank, steps, world_size):
        x, y = loader.batch_at(i)
        with machine.autocast():
            total += torch.tensor([model(x, y).ce_loss.item(), 1.0], dtype=torch.float64)
    model.train(was_training)
    loss, batches = gather_sum(total, machine).tolist()
    return loss / batches


def print_samples(model, tokenizer, args, machine, step, say):
    """Four continuations of --sample_prompt, 32 tokens each."""
    generator = torch.Generator(machine.device).manual_seed(args.seed)
    prompt = torch.tensor([tokenizer.encode_ordinary(args.sample_prompt)] * 4, device=machine.device)
    with machine.autocast():
        rows = sample.generate(
            model, prompt, 32, top_k=50, generator=generator, eot=tokenizer.eot, vocab_size=tokenizer.vocab_size
        )
    for i, row in enumerate(rows.tolist()):
        text = row[: row.index(tokenizer.eot)] if tokenizer.eot in row else row
        say(f"step {step} sample {i}: {tokenizer.decode(text)!r}")


def load_hellaswag(args, tokenizer, machine, say):
    """The tokenised examples, or None: training goes on without the `hella` stream, and says so once."""
    if args.hellaswag_every == 0:
        return None
    if machine.world_size > 1 and not machine.is_main:
        dist.barrier()  # rank 0 downloads
    try:
        examples = hellaswag.load_examples(args.hellaswag_data or None, args.hellaswag_limit)
        return hellaswag.tokenize(examples, tokenizer)
    except UserError as error:
        if args.hellaswag_data:
            raise
        say(f"no HellaSwag in this run: {error}")
        return None
    finally:
        if machine.world_size > 1 and machine.is_main:
            dist.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# The run: names, resume, what is said about it


@dataclass
class Progress:
    """Where the run stands. Saved with every checkpoint."""

    step: int = 0  # updates done
    hours: float = 0.0  # of training steps alone
    skipped: int = 0  # steps dropped for a non-finite loss or gradient
    history: list = dataclasses.field(default_factory=list)  # the last train losses, for spikes


def choose_names(args):
    """Fill in name and run_id; return the log's path and the checkpoint folder.

    With `--resume auto` and no run_id, it is the newest run of this name and seed.
    """
    args.name = args.name or variant_name(args)
    if not args.run_id and args.resume == "auto":
        folders = sorted(Path(args.checkpoint_dir).glob(f"{args.name}_*_seed_{args.seed}"), key=os.path.getmtime)
        if folders:
            args.run_id = folders[-1].name.removeprefix(f"{args.name}_").removesuffix(f"_seed_{args.seed}")
    args.run_id = args.run_id or date.today().strftime("%Y%m%d")
    folder = Path(args.checkpoint_dir) / f"{args.name}_{args.run_id}_seed_{args.seed}"
    return runlog.log_path(args.logs_dir, args.name, args.run_id, args.seed), folder


def find_checkpoint(args, folder, log_path, machine):
    """The checkpoint to go on from, or None for a fresh start. A fresh start never writes over a run that is there."""
    if args.resume == "auto":
        return checkpoint.load_newest(folder)[1]
    if args.resume:
        state = checkpoint.load(args.resume)
        last = checkpoint.newest(folder)
        if last and int(last.stem[5:]) > state["step"]:  # else a later --resume auto would go back to it
            raise UserError(f"{last} is newer than {args.resume}: remove what is newer, or give another --run_id")
        return state
    for path in (log_path, checkpoint.newest(folder)) if machine.is_main else ():
        if path and path.exists() and path.stat().st_size:
            raise UserError(f"{path} holds a run of this name: pass --resume auto to go on, or another --run_id")
    return None


def check_settings(args, state, say):
    """Refuse what would make it another run; name the rest that differs."""
    then, now = state["args"], dataclasses.asdict(args)
    changed = [name for name in now if name != "resume" and name in then and then[name] != now[name]]
    for name in changed:
        if name in FIXED_FIELDS:
            values = f"the checkpoint was made with --{name} {then[name]}, not {now[name]}"
            raise UserError(f"{values}: pass --{name} {then[name]}, or start afresh with another --run_id")
    for name in changed:
        say(f"--{name} was {then[name]} in the checkpoint and is {now[name]} now")


class Stop:
    """Set by SIGTERM or SIGINT: the loop finishes its step, saves and ends. A second SIGINT ends at once."""

    def __init__(self):
        self.asked = False
        signal.signal(signal.SIGTERM, self)
        signal.signal(signal.SIGINT, self)

    def __call__(self, signum, frame):
        if self.asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def due(step, every, max_steps):
    return every > 0 and (step % every == 0 or step == max_steps)


def evaluate(model, val_loader, examples, tokenizer, args, machine, step, log, console):
    """Whatever is due at this step: val, hella, samples."""
    streams = {}
    if due(step, args.val_loss_every, args.max_steps):
        streams["val"] = mean_loss(model, val_loader, args.val_loss_steps, machine)
    hellaswag_every = args.val_loss_every if args.hellaswag_every is None else args.hellaswag_every
    if examples is not None and due(step, hellaswag_every, args.max_steps):
        rank, world_size = machine.eval_share
        result = hellaswag.evaluate(model, examples, machine.device, rank=rank, world_size=world_size)
        streams["hella"] = result.acc_norm
    if streams:
        log.write(step, streams)
        console.say(f"step {step:6d} | " + " | ".join(f"{name} {value:.4f}" for name, value in streams.items()))
    if due(step, args.sample_from_model_every, args.max_steps) and step > 0:
        print_samples(model, tokenizer, args, machine, step, console.say)


def step_streams(args, step, result, progress, tokens_per_second):
    """The log lines of one step."""
    streams = {"train": result.ce_loss}
    streams |= result.losses
    streams |= {"lr": learning_rate(step, args), "grad_norm": result.grad_norm}
    router = result.router
    if router:
        for stream, name in (("max_vio", "max_vio"), ("drop_frac", "drop_frac"), ("router_entropy", "entropy")):
            streams[stream] = sum(layer[name] for layer in router) / len(router)  # mean over the MoE layers
        streams["router_logit"] = max(layer["max_logit"] for layer in router)
    if router and due(step, args.val_loss_every, args.max_steps - 1):
        streams |= {f"load_{layer['layer']}_{e}": load for layer in router for e, load in enumerate(layer["load"])}
    if runlog.is_spike(progress.history, result.ce_loss):
        streams["spike"] = 1
    if not result.applied:
        streams["skipped"] = progress.skipped + 1
    return streams | {"tok_per_sec": tokens_per_second, "hours": progress.hours}


def report_divergence(args, step, result, position, log, log_path, console):
    """Say so in the log, and leave beside it what is needed to replay the step. The last checkpoint stays as it is."""
    log.write(step, {"train": result.ce_loss, "grad_norm": result.grad_norm, "diverged": 1})
    console.say(f"diverged at step {step}: loss {result.ce_loss}, gradient norm {result.grad_norm}")
    console.say("the last checkpoint is kept: lower --max_lr, or --resume auto --on_nonfinite skip drops such steps")
    if log.file:
        with atomic_write(log_path.with_suffix(".diverged.json"), "w") as f:
            json.dump({"step": step, "loader": position, "loss": str(result.ce_loss)}, f)


def record_step(args, step, result, progress, seconds):
    """Bring Progress up to date; return the log lines of the step."""
    tokens_per_second = args.total_batch_size / seconds
    progress.hours += seconds / 3600
    streams = step_streams(args, step, result, progress, tokens_per_second)
    progress.skipped += not result.applied
    if math.isfinite(result.ce_loss):
        progress.history = [*progress.history, result.ce_loss][-runlog.SPIKE_WINDOW :]
    progress.step = step + 1
    return streams, tokens_per_second


def train(args, machine, log_path, folder, console):
    """The run. Returns the exit code."""
    stop = Stop()
    state = find_checkpoint(args, folder, log_path, machine)
    if state is not None:
        check_settings(args, state, console.say)
    loader, val_loader = make_loaders(args, machine)
    tokenizer = get_tokenizer(loader.tokenizer)
    model = build_model(args, machine)
    called = parallelize(model, args, machine)
    optimizer = build_optimizer(model, args)
    progress = Progress()
    if state is not None:
        restore(state, model, optimizer, args, folder)
        loader.load_state_dict(state["loader"])
        progress = Progress(**state["progress"])
    del state
    examples = load_hellaswag(args, tokenizer, machine, console.say)
    about = describe_run(args, model, machine)
    print_header(args, about, loader.describe(), log_path, console.say)
    log = Log(args, machine, log_path, progress.step, about)
    saver = checkpoint.BackgroundSaver(args.keep_checkpoints)

    def save():
        if args.save_checkpoint:
            log.sync()  # a checkpoint must never be newer than the log that it continues
            state = run_state(args, model, optimizer, loader, tokenizer, progress)
            if machine.is_main:
                report_full_disk(saver.save(state, checkpoint.step_path(folder, progress.step)), console)

    console.start(progress.step)
    try:
        while True:
            step = progress.step
            if step and step % args.save_checkpoint_every == 0:
                save()
            evaluate(model, val_loader, examples, tokenizer, args, machine, step, log, console)
            if step >= args.max_steps:
                break
            position, began = loader.state_dict(), time.perf_counter()
            result = train_step(called, model, optimizer, loader, args, machine, step, stop.asked)
            if not result.applied and args.on_nonfinite == "stop":
                report_divergence(args, step, result, position, log, log_path, console)
                return 3
            seconds = time.perf_counter() - began
            streams, tokens_per_second = record_step(args, step, result, progress, seconds)
            log.write(step, streams)
            console.step(step, result, streams["lr"], seconds, tokens_per_second)
            if result.stop:
                save()
                console.say(f"stopped after {progress.step} steps; go on with --resume auto --run_id {args.run_id}")
                return 130
        save()
        return 0
    finally:
        report_full_disk(saver.wait(), console)
        console.close()
        log.close()


def restore(state, model, optimizer, args, source):
    if args.fsdp:
        import sharding

        sharding.fill(model, optimizer, state)
    else:
        checkpoint.fill(model, state["model"], source)
        optimizer.load_state_dict(state["optimizer"])


def run_state(args, model, optimizer, loader, tokenizer, progress):
    """All that a checkpoint holds. Under FSDP every rank takes part in gathering it."""
    weights = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if args.fsdp:
        import sharding

        weights = sharding.whole(weights)
    return weights | {
        "loader": loader.state_dict(),
        "progress": dataclasses.asdict(progress),
        "step": progress.step,
        "args": dataclasses.asdict(args),
        "config": dataclasses.asdict(model.config),
        "tokenizer": tokenizer.name,
    }


def report_full_disk(error, console):
    if error is not None:
        console.say(f"warning: a checkpoint could not be written ({error}); the run goes on, the older ones are kept")


def make_loaders(args, machine):
    """The training batches of this rank, and the validation split, whose batches the ranks share out."""
    common = {"B": args.B, "T": args.T, "vocab_size": args.vocab_size, "device": machine.device}
    ranks = {"rank": machine.rank, "world_size": machine.world_size}
    loader = DataLoader(args.data_root, "train", data_seed=args.data_seed, **ranks, **common)
    return loader, DataLoader(args.data_root, "val", **common)


def evaluate_only(args, machine):
    """Print train and val loss of the model as it is (nanoMoE's baselines)."""
    loader, val_loader = make_loaders(args, machine)
    model = build_model(args, machine)
    for split, batches in (("train", loader), ("val", val_loader)):
        loss = mean_loss(model, batches, args.val_loss_steps, machine)
        if machine.is_main:
            tokens = args.val_loss_steps * args.B * args.T
            print(f"{split} loss {loss:.4f} nats per token, perplexity {math.exp(loss):.2f} ({tokens:,} tokens)")
    return 0


def run(args):
    """What the command line does with these settings; returns the exit code."""
    check_args(args, common.world()[1])
    machine = common.set_up_machine(args.device, args.dtype, args.fsdp, args.dist_timeout)
    if args.eval_only:
        return evaluate_only(args, machine)
    log_path, folder = choose_names(args)
    remedy = "wait for it, or choose another --run_id or --logs_dir"
    with lock(log_path, remedy) if machine.is_main else contextlib.nullcontext():
        return train(args, machine, log_path, folder, Console(args, machine))


def main():
    try:
        code = run(common.parse(Args))
        gloo = dist.is_initialized() and dist.get_backend() == "gloo"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if gloo:
        common.exit_now(code)
    return code


if __name__ == "__main__":
    common.run(main)
