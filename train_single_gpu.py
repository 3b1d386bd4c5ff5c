"""Trains GPT-2 or one of its Mixture-of-Experts variants: `Args`, then the run in the order in which it happens.

    python train_single_gpu.py --n_exp 1                               # dense GPT-2 124M on one GPU (or mps, or CPU)
    python train_single_gpu.py --use_aux_loss                          # MoE, top 2 of 8, with a load-balance loss
    python train_single_gpu.py --resume logs/RUN                       # continue a killed run: no other flag is needed
    torchrun --standalone --nproc_per_node=8 train_single_gpu.py       # the same global batch over 8 GPUs
    python train_single_gpu.py --eval_only --init_from gpt2            # train and val loss of GPT-2's weights

A value logged at step s is measured after s updates, so the last evaluation is at max_steps. `val` and `hella` are of
the cross-entropy alone; the router losses have streams of their own (docs/measuring.md).

Randomness: weights come from a generator seeded with `seed`; noise and dropout of micro-batch m of step s from one
seeded with (seed, s, m), whichever rank runs it; the order of the data from `data_seed`; samples from a generator of
their own. So the random state of a run is (seed, step): resuming, another number of ranks and any amount of evaluation
in between draw the same numbers. On CUDA compiled code draws noise and dropout per graph, so other numbers than eager.
"""

import argparse
import contextlib
import dataclasses
import math
import time
from datetime import timedelta
from pathlib import Path
from typing import Literal

from lab import common  # before torch
from lab.common import AboveZero, FiniteAboveZero, Fraction, NotNegative, Positive, Rate, Seed, UserError

# isort: split
import numpy as np
import torch
import torch.distributed as dist

import hellaswag
import sample
import weights
from lab import checkpoint, devices, logger, optim, runs
from lab.data import DataLoader, fingerprint
from lab.tokenizer import get_tokenizer, token_bytes
from model import GPT, GPTConfig, RouterStats

# ---------------------------------------------------------------------------------------------------------------------
# Settings. Edit them here, with or without their type, or override them on the command line.


@common.settings
class Args(GPTConfig):
    """Settings of a training run, and every setting of the model (GPTConfig in model.py). To change one of the model's,
    write it here: `top_k = 1`. Of the mixture of experts there are

    n_exp top_k stride first_dense expert_hidden n_shared_exp gate use_noisy_top_k router_use_full_prec
    freeze_router use_aux_loss aux_loss_weight balance_scope use_router_z_loss router_z_loss_weight use_bias_balance
    bias_balance_rate use_quantile_balance use_switch_tfm_init switch_tfm_init_scale train_capacity eval_capacity
    min_capacity
    """

    n_exp: Positive = 8  # Experts per MoE layer; 1 is the dense model
    block_size: Positive | None = None  # Positions of the model (default: T, or those of init_from)

    # the run
    name: str = ""  # Name of the run (default: moe or no_moe, and the time of the start)
    seed: Seed = 1337  # Seed for weights, router noise and dropout
    resume: str = ""  # Folder of the run to continue; auto: that of this name and seed, if it has a checkpoint
    branch: str = ""  # Run folder or checkpoint from whose settings and state a new run goes on
    init_from: str = "scratch"  # Weights: a run folder, checkpoint, Hugging Face folder, gpt2, gpt2-medium, -large, -xl
    eval_only: bool = False  # Print train and val loss of the model as it is, and stop
    logs_dir: str = "logs"  # Folder of the run folders {name}_seed_{seed}
    tracker: str = ""  # Log to this module too: wandb, trackio, swanlab

    # data
    data_root: str = "edu_fineweb10B"  # Folder of token shards, made by fineweb.py
    data_seed: Seed = 1337  # Seed for the order of the data: the same for every variant and seed
    total_batch_size: Positive = 524_288  # Tokens per step, over micro-batches and ranks
    B: Positive = 16  # Sequences per micro-batch
    T: Positive = 1024  # Tokens per sequence

    # optimization
    max_steps: Positive = 190_730  # Steps: 100B tokens at the default batch
    stop_after: Positive | None = None  # Steps after which to stop, without a change to the schedule (default: none)
    max_minutes: FiniteAboveZero | None = None  # Minutes of training at which a run ends, and its schedule
    max_lr: Rate = 6e-4  # Peak learning rate
    min_lr: Rate | None = None  # Learning rate at max_steps (default: a tenth of max_lr)
    warmup_steps: NotNegative = 2000  # Steps of linear warmup
    schedule: Literal["cosine", "wsd"] = "cosine"  # Learning rate after the warmup; wsd: constant, then 1 - sqrt
    decay_steps: Positive | None = None  # Steps of the decay of wsd (default: a fifth of max_steps)
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: hidden matrices
    muon_lr: FiniteAboveZero = 0.02  # Peak learning rate of Muon's matrices; all other weights have max_lr
    weight_decay: Rate = 0.1  # Decay of weights, not of biases and norms
    beta2: Fraction = 0.95  # Second moment of AdamW; the first is 0.9
    grad_clip: AboveZero = 1.0  # Largest gradient norm; inf does not clip

    # evaluation and samples
    val_loss_every: NotNegative = 250  # Steps between validations; 0: never
    val_tokens: Positive = 327_680  # Tokens per validation, the first of the val split, whatever B, T and ranks are
    hellaswag_every: NotNegative | None = None  # Steps between HellaSwag runs (default: with val); 0: never
    hellaswag_data: str = ""  # HellaSwag jsonl (default: data/hellaswag, downloaded when missing)
    hellaswag_limit: Positive | None = None  # Examples (default: all 10,042; 200 on a CPU)
    sample_from_model_every: NotNegative = 250  # Steps between samples; 0: never

    # checkpoints
    save_checkpoint: bool = True  # Write checkpoints
    save_checkpoint_every: Positive = 10_000  # Steps between checkpoints; also at the end and when stopped
    checkpoint_dir: str = ""  # Folder of {name}_seed_{seed} (default: the run's folder)
    keep_checkpoints: Positive = 3  # Newest checkpoints to keep

    # machine
    device: str = "auto"  # cuda, mps or cpu (default: the first available)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # Matrix products; auto: bfloat16 on CUDA that computes it
    use_compile: bool = True  # torch.compile, on CUDA
    activation_memory_budget: Fraction | None = None  # Part of activations that compiled blocks keep (default: all)
    recompute: Literal["none", "blocks"] = "none"  # Compute blocks again in backward, compiled or not
    fsdp: bool = False  # Shard parameters, gradients and optimizer over the ranks (torchrun)
    dist_timeout: Positive = 600  # Seconds until ranks that wait for a dead one stop

    def __post_init__(self):
        """Refuse values that no run can have, and settings that contradict each other."""
        common.check_ranges(self)
        if self.init_from == "scratch":
            self.model_config()
        per_micro_step = self.B * self.T * devices.world()[1]
        if self.total_batch_size % per_micro_step:
            nearest = max(1, round(self.total_batch_size / per_micro_step)) * per_micro_step
            raise ValueError(
                f"total_batch_size {self.total_batch_size} is not a multiple of B x T x ranks = {per_micro_step}; "
                f"the nearest is --total_batch_size {nearest}"
            )
        if self.block_size is not None and self.block_size < self.T:
            raise ValueError(f"T {self.T} is more than block_size {self.block_size}: lower it")
        if self.fsdp and (devices.world()[1] == 1 or self.optimizer != "adamw"):
            raise ValueError("fsdp shards AdamW over ranks: start with torchrun --nproc_per_node=N, --optimizer adamw")
        counted = self.use_aux_loss and self.balance_scope == "step"
        if self.recompute == "blocks" and counted:
            raise ValueError("recompute blocks would count each micro-batch twice in balance_scope step: leave one out")
        if self.activation_memory_budget is not None and (counted or self.use_noisy_top_k or self.dropout):
            raise ValueError("activation_memory_budget is not for use_noisy_top_k, dropout and balance_scope step: the "
                             "compiler would draw and count again in backward; leave it out")
        if self.optimizer == "muon" and not self.max_lr:
            raise ValueError("max_lr must be above 0 for muon: the schedule is relative to it")

    def model_config(self):
        """The model's settings alone."""
        names = [field.name for field in dataclasses.fields(GPTConfig)]
        return GPTConfig(**{name: getattr(self, name) for name in names} | {"block_size": self.block_size or self.T})


# ---------------------------------------------------------------------------------------------------------------------
# The run


def train(args, machine, run):
    """Train to max_steps. Returns the exit code."""
    stop = common.Stop(agreed=machine.world_size == 1)  # SIGTERM, SIGINT, SIGHUP: finish the step, save, leave

    # Data first: without it nothing is made. Then the run's folder, which may hold a checkpoint to continue from.
    train_loader, val_loader = (make_loader(args, split, machine) for split in ("train", "val"))
    args.name, resumed = devices.from_rank_0(machine, run.open)
    run.locate()
    raw_model = build_model(args, machine, resumed, train_loader)
    model = devices.parallelize(raw_model, args, machine)  # compiled, DDP or FSDP; shares raw_model's weights
    optimizer = optim.build_optimizer(raw_model, args)  # of the parameters as FSDP has cut them
    step, hours, best = 0, 0.0, math.inf
    if resumed:
        checkpoint.restore(raw_model, optimizer, run.state, run.path)
        train_loader.load_state_dict(resumed["loader"])
        step, hours, best, run.state = resumed["step"], resumed["hours"], resumed["best"], None
    tokenizer, examples = load_evaluations(args, machine, run, train_loader)
    devices.from_rank_0(machine, start, run, args, machine, raw_model, train_loader, val_loader, step)
    group = None  # of the threads that write sharded checkpoints
    if args.fsdp:
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=args.dist_timeout))
    saver = checkpoint.BackgroundSaver(run.checkpoints, args.keep_checkpoints, group)
    compiled = devices.is_compiled(args, machine)
    grad_accum = args.total_batch_size // (args.B * args.T * machine.world_size)
    first_step, clock = step, hours  # clock: the hours of rank 0, one step behind

    while True:
        last = optim.is_over(step, args, clock) or (args.stop_after and step >= args.stop_after)

        # Evaluation, on raw_model because shapes vary. It draws nothing from the generators of training.
        streams = {}
        with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
            if due(step, args.val_loss_every, last):
                streams |= validate(raw_model, val_loader, args, machine, stop)
                if last and raw_model.moe_layers() and math.isfinite(args.eval_capacity):  # what capacity lets leak
                    streams |= validate(raw_model, val_loader, args, machine, stop, dropless=True)
            if examples and due(step, args.hellaswag_every, last) and not stop.now:
                streams |= hellaswag.evaluate(raw_model, examples, machine)
            best = min(best, streams.get("val", math.inf))
            if streams and not stop.now:
                run.log(step, streams)
                shown = [f"{name} {streams[name]:.4f}" for name in runs.EVALUATIONS if name in streams]
                run.say(f"step {step:6d} | {' | '.join(shown)}")
            if step and tokenizer and due(step, args.sample_from_model_every, last) and not stop.now:
                say_samples(run, raw_model, tokenizer, args, machine, step)

        # Checkpoint. Evaluation comes first and is repeated on resume, so that a resumed log equals one left alone.
        if step > first_step and (last or stop.now or step % args.save_checkpoint_every == 0):
            save(saver, run, raw_model, optimizer, train_loader, step, hours, best)
        if last or stop.now:
            return finish(saver, run, step, best, done=not stop.now)

        # One step: gradients of grad_accum micro-batches. Losses and statistics stay on the device.
        began, stats, losses = time.perf_counter(), RouterStats(raw_model), {}
        raw_model.start_step()
        for i in range(grad_accum):
            x, y = train_loader.next_batch()
            seed_noise(machine.device, args.seed, step, i * machine.world_size + machine.rank)
            sync_gradients(model, args, machine, i == grad_accum - 1)
            with machine.autocast():
                out = model(x, y)
            (out.loss / grad_accum).backward()
            for name, value in {"train": out.ce_loss, **out.losses}.items():
                losses[name] = losses.get(name, 0.0) + value.detach() / grad_accum
            stats.add()
        grad_norm = optim.clip_gradients(raw_model, args.grad_clip)

        # One all-reduce and one transfer. Clock and norm are rank 0's, so that all ranks decide alike.
        mine = float(stop.requested or run.lost), hours * machine.is_main
        mine = [torch.full((), value, device=machine.device) for value in mine]  # torch.tensor would wait for the GPU
        sums = torch.stack([*losses.values(), grad_norm * machine.is_main, *mine])
        sums, routers = stats.reduce(sums, machine.rank, machine.world_size)
        *sums, grad_norm, stops, clock = sums
        streams = {name: total / machine.world_size for name, total in zip(losses, sums, strict=True)}
        if not all(map(math.isfinite, [*sums, grad_norm])):  # the last checkpoint stays as it is
            run.log(step, {"train": streams["train"], "grad_norm": grad_norm, "diverged": 1})
            run.say(f"diverged at step {step}: loss {streams['train']}, gradient norm {grad_norm}; lower --max_lr, or "
                    f"raise --warmup_steps. The last checkpoint in {run.checkpoints} is kept.")
            saver.wait()
            return common.DIVERGED
        lr = optim.learning_rate(step, args, clock)
        optim.set_learning_rate(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        stats.move_biases()

        seconds = time.perf_counter() - began
        if step > first_step or not compiled:  # the first step of a compiled model compiles it
            hours += seconds / 3600
        log_step(run, raw_model, step, streams | {"lr": lr, "grad_norm": grad_norm}, routers, seconds, hours)
        step += 1
        if stops:  # of some rank: all leave now
            stop.requested = stop.agreed = True


def due(step, every, last):
    """Whether something that happens every so many steps is due now; all of it is at the end."""
    return every > 0 and (step % every == 0 or last)


def seed_noise(device, seed, step, micro_batch):
    """Noise and dropout of a micro-batch depend on its number in the run, not on its rank or on what ran before."""
    # torch.manual_seed seeds every device, which takes milliseconds where there is none but the CPU
    set_seed = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
    set_seed(int(np.random.SeedSequence([seed, step, micro_batch]).generate_state(1)[0]))


def sync_gradients(model, args, machine, last):
    """Reduce gradients over the ranks in the last micro-batch of a step only."""
    if args.fsdp:
        model.set_requires_gradient_sync(last)
    elif machine.world_size > 1:
        model.require_backward_grad_sync = last  # DDP's no_sync() sets the same


# ---------------------------------------------------------------------------------------------------------------------
# Before the loop: data, model, what is about to run


def make_loader(args, split, machine):
    """Training batches of this rank, in an order by data_seed; or the val split, whose rows the ranks share out."""
    ranks = {"rank": machine.rank, "world_size": machine.world_size} if split == "train" else {}
    return DataLoader(args.data_root, split, args.B, args.T, args.data_seed, vocab_size=args.vocab_size,
                      device=machine.device, **ranks)


def build_model(args, machine, resumed, loader):
    """The bare model on its device: from scratch, from --init_from, or empty where a checkpoint follows."""
    generator = torch.Generator().manual_seed(args.seed)
    if resumed:
        model = GPT(GPTConfig(**resumed["config"]), generator)
    elif args.init_from == "scratch":
        model = GPT(args.model_config(), generator)
    else:
        # The shape is that of the weights where it is at its default; a dense model that is only evaluated stays dense.
        given = {field.name: getattr(args, field.name) for field in dataclasses.fields(GPTConfig)}
        of_weights = given if args.eval_only else weights.SHAPE
        changed = {k: v for k, v in given.items() if k not in of_weights or v != getattr(Args, k)}
        name, config, tensors, theirs = weights.read_source(args.init_from)
        if theirs != loader.tokenizer:
            raise UserError(f"{args.init_from} has {theirs} tokens, {args.data_root} has {loader.tokenizer} tokens")
        model = weights.build(name, config, tensors, generator, **changed)
    if model.config.block_size < args.T:
        raise UserError(f"--T {args.T} is more than the {model.config.block_size} positions of the model: lower --T")
    model = model.to(machine.device)
    if not resumed and machine.is_main:
        moved = weights.leak(weights.logits_of(model), min(64, args.T), model.config.vocab_size)
        if moved > 1e-3:
            print(f"warning: a later token or another row moves a logit by {moved:.1e} of the largest: this model sees "
                  "what it is to predict, and its losses are too good to be true")
    return model


def load_evaluations(args, machine, run, loader):
    """(tokenizer, HellaSwag's examples or None). Without a network a run goes on without HellaSwag, and says so."""
    tokenizer = get_tokenizer(loader.tokenizer)
    if args.hellaswag_every is None:
        args.hellaswag_every = args.val_loss_every
    if args.hellaswag_limit is None and machine.device.type == "cpu":
        args.hellaswag_limit = 200
    if not args.hellaswag_every or tokenizer is None:
        return tokenizer, None
    try:
        examples = devices.from_rank_0(machine, hellaswag.load_examples, args.hellaswag_data, args.hellaswag_limit)
    except UserError as error:
        if args.hellaswag_data:
            raise
        run.say(f"no HellaSwag in this run: {error}")
        return tokenizer, None
    return tokenizer, hellaswag.tokenize(examples, tokenizer)


def start(run, args, machine, model, train_loader, val_loader, step):
    """Rank 0: say what is about to run and how much it will cost; write config.json, open the log."""
    flops, of_optimizer = model.estimate_flops_per_token(args.T), optim.flops_per_step(model, args)
    here = logger.describe_machine(machine.device)
    end = min(args.max_steps, args.stop_after or args.max_steps)
    micro_batches = args.total_batch_size // (args.B * args.T)
    run.say(f"{run.folder}: {model.num_params():,} parameters, {model.num_active_params():,} active per token")
    run.say(f"{end:,} steps of {args.total_batch_size:,} tokens, {micro_batches} micro-batches of {args.B} x {args.T}; "
            f"{end * (args.total_batch_size * flops + of_optimizer):.3g} FLOPs; data: {train_loader.describe()}")
    run.say(f"{here['device']}, {machine.dtype}, {machine.world_size} process(es), torch {here['torch']}")
    if machine.device.type == "cpu":
        days = (end - step) * args.total_batch_size * flops / devices.matmul_rate() / 86400
        run.say(f"on this CPU at least {24 * days:,.1f} hours" if days > 0.1 else f"about {1440 * days:,.1f} minutes")
        if days > 1:
            run.say("warning: for a run of minutes: --n_layer 4 --n_embd 128 --T 64 --total_batch_size 1024 "
                    "--max_steps 2000")
    pairs = None
    if not run.resumed:
        texts = []
        for loader in (train_loader, val_loader):
            x, _ = loader.rows_at(0, min(loader.file_rows, 4_000_000 // args.T))
            texts.append(x.cpu().numpy().ravel())
        pairs = runs.pair_loss(*texts, args.vocab_size)
    run.start(step, {
        "model": dataclasses.asdict(model.config), "data": fingerprint(args.data_root),
        "tokenizer": train_loader.tokenizer, "parameters": model.num_params(),
        "active_parameters": model.num_active_params(), "flops_per_token": flops,
        "optimizer_flops": of_optimizer, "tokens_per_step": args.total_batch_size, "pair_loss": pairs, **here,
        "dtype": str(machine.dtype).removeprefix("torch."), "world_size": machine.world_size,
    })


# ---------------------------------------------------------------------------------------------------------------------
# Evaluations: functions that return {stream: value} and leave no trace in the training


@torch.no_grad()
def validate(model, loader, args, machine, stop, dropless=False):
    """Cross-entropy over the first val_tokens of the loader's split, in eval mode: nats per token and bits per byte of
    text, and per MoE layer the load. The ranks share the micro-batches out. {} where a single process is to stop."""
    was_training, stats = model.training, RouterStats(model)
    model.eval()
    n_rows = min(max(1, args.val_tokens // args.T), loader.file_rows)
    rank, world_size = machine.eval_share
    (lengths,) = loader.to_device(token_bytes(loader.tokenizer, loader.vocab_size))  # 0: not known
    dtype = torch.float32 if machine.device.type == "mps" else torch.float64
    sums = torch.zeros(2, dtype=dtype, device=machine.device)
    for first in range(rank * args.B, n_rows, world_size * args.B):
        if stop.now:
            model.train(was_training)
            return {}
        x, y = loader.rows_at(first, min(args.B, n_rows - first))
        with machine.autocast():
            loss = model(x, y, dropless=dropless).ce_loss
        stats.add()
        sums += torch.stack([loss * y.numel(), lengths[y].sum()]).to(sums)
    model.train(was_training)
    (loss, n_bytes), routers = stats.reduce(sums, rank, world_size)
    tokens = n_rows * args.T
    if dropless:  # nothing is logged of its routers
        return {"val_dropless": loss / tokens}
    streams = {"val": loss / tokens}
    if n_bytes:
        streams["val_bpb"] = loss / math.log(2) / n_bytes
    for layer in routers:
        streams |= {f"val_{name}_{layer['layer']}": layer[name] for name in ("max_vio", "drop_frac", "logit_std")}
    return streams


def say_samples(run, model, tokenizer, args, machine, step):
    try:
        texts = sample.continue_prompt(model, tokenizer, "Hello, I'm a language model,", 4, 32, args.seed, machine)
    except sample.BrokenModel as error:  # the next step says that the run diverged
        texts = [f"none: {error}"]
    for i, text in enumerate(texts):
        run.say(f"step {step} sample {i}: {text!r}")


# ---------------------------------------------------------------------------------------------------------------------
# Log, checkpoints, the end


def log_step(run, model, step, streams, routers, seconds, hours):
    """Log and show one update; the load of each expert where a validation is due."""
    args, rate = run.args, run.args.total_batch_size / seconds
    if routers:
        for stream, name in (("max_vio", "max_vio"), ("drop_frac", "drop_frac"), ("router_entropy", "entropy")):
            streams[stream] = sum(layer[name] for layer in routers) / len(routers)  # mean over the MoE layers
        streams["router_logit"] = max(layer["max_logit"] for layer in routers)
    if routers and args.val_loss_every and (step % args.val_loss_every == 0 or step + 1 == args.max_steps):
        for layer in routers:
            names = ["max_vio", "drop_frac", "logit_std"] + ["noise_std"] * args.use_noisy_top_k
            streams |= {f"{name}_{layer['layer']}": layer[name] for name in names}
            streams |= {f"load_{layer['layer']}_{e}": load for e, load in enumerate(layer["load"])}
    run.log(step, streams | {"tok_per_sec": rate, "hours": hours})

    text = f"lr {streams['lr']:.3e} | norm {streams['grad_norm']:.3f} | {1e3 * seconds:.0f} ms | {rate:,.0f} tok/s"
    if routers:
        text += f" | max_vio {streams['max_vio']:.2f} | dropped {streams['drop_frac']:.1%}"
    peak = devices.peak_flops(model.lm_head.weight.device)
    if peak:
        text += f" | mfu {model.estimate_flops_per_token(args.T) * rate / peak / devices.world()[1]:.1%}"
    run.show_step(step, streams, text)


def save(saver, run, model, optimizer, loader, step, hours, best):
    """Write a checkpoint in the background. Every rank calls it."""
    if not run.args.save_checkpoint:
        return
    run.sync()  # a checkpoint must never be newer than the log that it continues
    fields = {
        "loader": loader.state_dict(), "step": step, "hours": hours, "best": best,
        "settings": dataclasses.asdict(run.args), "config": dataclasses.asdict(model.config),
        "tokenizer": loader.tokenizer,
    }
    warn(run, saver.save(model, optimizer, fields, step, fsdp=run.args.fsdp))


def warn(run, error):
    """Say that a checkpoint could not be written, if so."""
    if error:
        run.say(f"warning: a checkpoint could not be written ({error}); training continues, older ones are kept")


def finish(saver, run, step, best, done):
    """Wait for the last checkpoint; say how it went and what to do next. Returns the exit code."""
    error = saver.wait()
    if error:
        raise UserError(f"no checkpoint could be written to {run.checkpoints} ({error}): free space, then --resume")
    last = run.last
    parts = [f"{name} {last[name]:.4f}" for name in runs.EVALUATIONS if name in last]
    parts += [f"best val {best:.4f}"] * math.isfinite(best) + [f"{60 * last.get('hours', 0):.1f} minutes"]
    if "drop_frac" in last:
        parts.append(f"max_vio {last['max_vio']:.2f}, dropped {last['drop_frac']:.1%}")
    run.say(f"{'done' if done else 'stopped'} after {step} steps: {', '.join(parts)}")
    if done:
        run.say(f"next: python sample.py --checkpoint {run.checkpoints}\n      python compare.py {run.folder.parent}\n"
                f"      python routes.py --checkpoint {run.checkpoints} --out routes")
    elif run.args.save_checkpoint:
        run.say(f"continue: python train_single_gpu.py --resume {run.folder}")
    return common.DONE if done else common.INTERRUPTED


# ---------------------------------------------------------------------------------------------------------------------
# The script


def read_args(argv=None):
    """Args from the command line; on --resume FOLDER and --branch the defaults are the settings of that run."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--resume", default="")
    first.add_argument("--branch", default="")
    found = first.parse_known_args(argv)[0]
    source = found.branch if found.resume in ("", "auto") else found.resume
    if not source:
        return common.parse(Args, argv)
    is_checkpoint = Path(source).exists() and not Path(source, "config.json").exists()
    config = runs.read_config(Path(source).parent if is_checkpoint else source)
    known = {field.name for field in dataclasses.fields(Args)}
    settings = {name: value for name, value in runs.settings_of(config).items() if name in known}
    settings |= {"resume": found.resume, "branch": found.branch, "eval_only": False}
    settings["fsdp"] &= devices.world()[1] > 1  # a run of several ranks continues on one
    if found.branch:
        settings["name"] = ""
    return common.parse(Args, argv, Args(**settings))


def evaluate_only(args, machine, run):
    """Print train and val loss of the model as it is: --init_from, or the run that --resume names."""
    loaders = [make_loader(args, split, machine) for split in ("train", "val")]
    if args.resume:
        model = weights.from_pretrained(args.resume).to(machine.device)
    else:
        model = build_model(args, machine, None, loaders[0])
        if args.init_from == "scratch":
            run.say("note: an untrained model; --init_from names one that is trained")
    for loader in loaders:
        found = validate(model, loader, args, machine, common.Stop())
        bits = f", {found['val_bpb']:.4f} bits per byte" if "val_bpb" in found else ""
        run.say(f"{loader.split} loss {found['val']:.4f} nats per token{bits}, perplexity {math.exp(found['val']):.2f}")
    return common.DONE


def run(args):
    """Train, or evaluate, with these settings; returns the exit code."""
    machine = devices.set_up_machine(args)
    this = logger.Run(args, machine.is_main)
    try:
        return evaluate_only(args, machine, this) if args.eval_only else train(args, machine, this)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"out of memory ({reason}): lower --B, or pass --recompute blocks") from None
    finally:
        this.close()


def main():
    try:
        return run(read_args())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    common.run(main)
