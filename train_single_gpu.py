"""Trains GPT-2 or one of its Mixture-of-Experts variants: `Args`, then the loop.

    python train_single_gpu.py --n_exp 1                               # dense GPT-2 124M on one GPU (or mps, or CPU)
    python train_single_gpu.py --use_aux_loss                          # MoE, top 2 of 8, with a load-balance loss
    python train_single_gpu.py --use_aux_loss --resume auto            # continue a killed run
    torchrun --standalone --nproc_per_node=8 train_single_gpu.py       # the same global batch over 8 GPUs
    python train_single_gpu.py --eval_only --init_from gpt2            # train and val loss of GPT-2's weights

A value logged at step s is measured after s updates, so the last evaluation is at max_steps. `val` and `hella` are of
the cross-entropy alone; the router losses have streams of their own (runlog.py has the format).

Randomness: weights come from a generator seeded with `seed`; noise and dropout of micro-batch m of step s from one
seeded with (seed, s, m), whichever rank runs it; the order of the data from `data_seed`; samples from a generator of
their own. So the random state of a run is (seed, step): resuming, another number of ranks and any amount of evaluation
or sampling in between draw the same numbers. On CUDA sums by atomics may differ in the last digits, and compiled code
draws noise and dropout per graph: others with --use_compile off, --recompute blocks, or several ranks for one.
"""

import contextlib
import dataclasses
import math
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple

from lab import common  # before torch
from lab.common import AboveZero, FiniteAboveZero, Fraction, NotNegative, Positive, Rate, Seed, UserError

# isort: split
import numpy as np
import torch
import torch.distributed as dist

import hellaswag
import identity
import logger
import runlog
import sample
from checks import check_args, check_model, model_config
from identity import Changeable, Uncounted
from lab import checkpoint, optim
from lab.data import DataLoader
from lab.tokenizer import get_tokenizer, token_bytes
from model import GPT, MODEL_FIELDS, GPTConfig

# ---------------------------------------------------------------------------------------------------------------------
# Settings. Edit them here, or override them on the command line.


@dataclass
class Args(GPTConfig):
    """Settings of a training run: those below, and every setting of the model (GPTConfig in model.py
    and MoESettings in moe.py).

    To change a default of the model or of its mixture of experts (top_k, stride, gate, use_aux_loss, use_noisy_top_k,
    train_capacity, ...), write the field here with its new value, as n_exp does. `Changeable` settings may change when
    a run is resumed; `Uncounted` ones cannot change its numbers; all others make it another run (identity.py).
    """

    n_exp: Positive = 8  # Experts per MoE layer; 1 is the dense model
    block_size: Positive | None = None  # Positions of the model (default: T, or those of --init_from)

    # the run
    name: Uncounted[str] = ""  # Name of the run (default: from its settings, e.g. moe_aux_loss)
    run_id: Uncounted[str] = ""  # Tells runs of one name apart (default: today, YYYYMMDD)
    seed: Seed = 1337  # Seed for weights, router noise and dropout
    resume: Uncounted[str] = ""  # auto: continue from the newest checkpoint of this run; or the path of a checkpoint
    init_from: str = "scratch"  # Or a checkpoint, a Hugging Face folder, gpt2, gpt2-medium, gpt2-large, gpt2-xl
    eval_only: Uncounted[bool] = False  # Print train and val loss of the model as it is, and stop

    # data
    data_root: Uncounted[str] = "edu_fineweb10B"  # Folder of token shards, made by fineweb.py
    data_seed: Seed = 1337  # Seed for the order of the data: the same for every variant and seed
    total_batch_size: Changeable[Positive] = 524_288  # Tokens per step, over micro-batches and ranks
    B: Changeable[Positive] = 16  # Sequences per micro-batch
    T: Positive = 1024  # Tokens per sequence

    # optimization
    max_steps: Changeable[Positive] = 190_730  # Steps: 100B tokens at the default batch
    max_lr: Rate = 6e-4  # Peak learning rate
    min_lr: Rate | None = None  # Learning rate at max_steps (default: a tenth of max_lr)
    warmup_steps: NotNegative = 2000  # Steps of linear warmup
    schedule: Literal["cosine", "wsd"] = "cosine"  # Learning rate after the warmup; wsd: constant, then 1 - sqrt
    decay_steps: Positive | None = None  # Steps of the decay of wsd (default: a fifth of max_steps)
    max_minutes: Changeable[FiniteAboveZero | None] = None  # Minutes of training at which a run ends; sets the schedule
    optimizer: Literal["adamw", "muon", "adafactor"] = "adamw"  # muon: hidden matrices; adafactor: rates by weight size
    muon_lr: FiniteAboveZero = 0.02  # Peak learning rate of Muon's matrices; all other weights have max_lr
    router_lr_scale: FiniteAboveZero = 1.0  # Factor on the router's learning rate
    router_weight_decay: Rate | None = None  # Decay of the router's weights (default: weight_decay)
    weight_decay: Changeable[Rate] = 0.1  # Decay of weights, not of biases and norms
    beta1: Changeable[Fraction] = 0.9  # First moment of AdamW
    beta2: Changeable[Fraction] = 0.95  # Second moment of AdamW
    grad_clip: Changeable[AboveZero] = 1.0  # Largest gradient norm; inf does not clip
    on_nonfinite: Changeable[Literal["stop", "skip"]] = "stop"  # A non-finite step ends the run, or is skipped

    # evaluation, samples, log
    val_loss_every: Changeable[NotNegative] = 250  # Steps between validations; 0: never
    val_loss_steps: Changeable[Positive] = 20  # Micro-batches of B x T per validation, shared by the ranks
    hellaswag_every: Changeable[NotNegative | None] = None  # Steps between HellaSwag runs (default: with val); 0: never
    hellaswag_data: Changeable[str] = ""  # HellaSwag jsonl (default: data/hellaswag, downloaded when missing)
    hellaswag_limit: Changeable[Positive | None] = None  # Examples (default: all 10,042; 200 on a CPU)
    sample_from_model_every: Uncounted[NotNegative] = 250  # Steps between samples; 0: never
    sample_prompt: Uncounted[str] = "Hello, I'm a language model,"  # Prompt of the samples; may be empty
    logs_dir: Uncounted[str] = "logs"  # Folder of log_{name}_{run_id}_seed_{seed}.txt
    progress: Uncounted[Literal["auto", "bar", "lines"]] = "auto"  # auto: a bar in a terminal, else a line per step
    wandb: Uncounted[bool] = False  # Log to Weights & Biases too (WANDB_MODE=offline works)
    wandb_project: Uncounted[str] = "moe-lab"  # Weights & Biases project

    # checkpoints
    save_checkpoint: Uncounted[bool] = True  # Write checkpoints
    save_checkpoint_every: Uncounted[Positive] = 10_000  # Steps between checkpoints; also at the end and when stopped
    save_checkpoint_minutes: Uncounted[Rate] = 30.0  # Minutes after which one is due all the same; 0: never
    checkpoint_dir: Uncounted[str] = "checkpoints"  # Folder of {name}_{run_id}_seed_{seed}/step_{step}.pt
    keep_checkpoints: Uncounted[Positive] = 3  # Newest checkpoints to keep

    # machine
    device: Uncounted[str] = "auto"  # cuda, mps or cpu (default: the first available)
    dtype: Changeable[Literal["auto", "float32", "bfloat16"]] = "auto"  # Matrix products; auto: bfloat16 on cuda
    use_compile: Uncounted[bool] = True  # torch.compile, on cuda
    compile_on_cpu: Uncounted[bool] = False  # torch.compile elsewhere too (slow to start, needs a C++ compiler)
    recompute: Uncounted[Literal["none", "experts", "blocks"]] = "none"  # Activations computed again in backward
    fsdp: Uncounted[bool] = False  # Shard parameters, gradients and optimizer over the ranks (torchrun)
    dist_timeout: Uncounted[Positive] = 600  # Seconds until ranks that wait for a dead one stop

    def __post_init__(self):
        """Checked by check_args() in checks.py, which names flags."""


# ---------------------------------------------------------------------------------------------------------------------
# The loop


@dataclass
class Run:
    """All that a run holds, made once by set_up()."""

    args: Args
    machine: common.Machine
    raw_model: GPT  # the bare model
    model: torch.nn.Module  # the trained one: compiled and, over several ranks, wrapped; it shares raw_model's tensors
    optimizer: torch.optim.Optimizer
    loader: DataLoader
    val_loader: DataLoader
    tokenizer: object
    examples: list | None  # HellaSwag's, tokenised
    progress: "Progress"
    record: dict  # settings, identity and machine: the JSON beside the log, and in every checkpoint
    log: logger.Log
    console: logger.Console
    saver: checkpoint.BackgroundSaver
    folder: Path  # of the checkpoints
    stop: common.Stop
    first_step: int  # at which this process started or resumed
    compiled: bool
    saved_at: float = dataclasses.field(default_factory=time.monotonic)  # time of the last checkpoint


@dataclass
class Progress:
    """How far the run is. Saved with every checkpoint."""

    step: int = 0  # updates done
    hours: float = 0.0  # of training steps alone
    clock: float = 0.0  # the hours that the ranks have agreed on, one step behind
    skipped: int = 0  # steps dropped for a non-finite loss or gradient
    skipped_in_a_row: int = 0
    history: list = dataclasses.field(default_factory=list)  # the last train losses, for spikes
    unlogged: dict = dataclasses.field(default_factory=dict)  # {step: streams} that a full disk kept out of the log


MOST_SKIPPED_IN_A_ROW = 20  # more of them is a broken model, not a bad batch


def train(run):
    """Train to max_steps. Returns the exit code."""
    args, progress, late = run.args, run.progress, False
    while True:
        step = progress.step
        if step > run.first_step and (step % args.save_checkpoint_every == 0 or late):
            save(run)
        with torch.compiler.set_stance("force_eager") if run.compiled else contextlib.nullcontext():
            evaluate(run)  # blocks are compiled for the shapes of training
        if run.stop.requested and run.machine.world_size == 1:  # evaluation was cut short: it is due again on resume
            return interrupt(run)
        if optim.is_over(step, args, progress.clock):
            return finish(run)
        position, began = run.loader.state_dict(), time.perf_counter()
        result = train_step(run)
        if result is None:  # told to stop within the step: nothing of it is kept
            run.loader.load_state_dict(position)
            return interrupt(run)
        if not result.applied and (args.on_nonfinite == "stop" or progress.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW):
            logger.report_divergence(run, result, position)
            return common.DIVERGED
        lr = optim.learning_rate(step, args, progress.clock)
        logger.record_step(run, result, lr, time.perf_counter() - began)
        progress.clock, late = result.clock, result.late
        if result.stop:
            return interrupt(run)


class StepResult(NamedTuple):
    ce_loss: float  # nats per token, over the global batch
    losses: dict  # {name: value} of the router losses, unweighted, summed over MoE layers
    grad_norm: float  # before clipping
    stop: bool  # some rank was told to stop
    late: bool  # --save_checkpoint_minutes have passed since the last checkpoint
    clock: float  # hours of training before this step, the longest of all ranks
    applied: bool  # the update was made: loss and gradient were finite
    router: list  # dicts, GPT.router_stats of the whole step


def train_step(run):
    """Forward and backward over this rank's micro-batches, clip, update. The host reads from the device after the
    gradients alone: the update still runs while it prepares the next step.

    None where a single process was told to stop between micro-batches.
    """
    args, machine, raw_model, step = run.args, run.machine, run.raw_model, run.progress.step
    micro_steps = args.total_batch_size // (args.B * args.T * machine.world_size)
    losses, tables = {}, []
    raw_model.start_step()
    for i in range(micro_steps):
        if i and run.stop.requested and machine.world_size == 1:
            run.optimizer.zero_grad(set_to_none=True)
            return None
        x, y = run.loader.next_batch()
        sync_gradients(run, last=i == micro_steps - 1)
        seed_noise(machine.device, args.seed, step, i * machine.world_size + machine.rank)
        with machine.autocast():
            out = run.model(x, y)
        (out.loss / micro_steps).backward()
        for name, value in {"ce_loss": out.ce_loss, **out.losses}.items():
            losses[name] = losses.get(name, 0.0) + value.detach() / micro_steps
        if raw_model.moe_layers():
            tables.append(raw_model.router_table())
    norm = optim.clip_gradients(raw_model, args.grad_clip)
    optim.set_learning_rate(run.optimizer, optim.learning_rate(step, args, run.progress.clock))
    flags = [run.stop.requested or run.log.error is not None, is_late(run), run.progress.hours]
    losses, grad_norm, (stop, late, clock), table = collect(losses, norm, flags, tables, machine)
    router = raw_model.router_stats(table)
    applied = all(map(math.isfinite, losses.values())) and math.isfinite(grad_norm)
    if applied:
        run.optimizer.step()
        raw_model.update_balance_bias(table)
    run.optimizer.zero_grad(set_to_none=True)
    return StepResult(losses.pop("ce_loss"), losses, grad_norm, stop > 0, late > 0, clock, applied, router)


def seed_noise(device, seed, step, micro_batch):
    """Noise and dropout of a micro-batch depend on its number in the run, not on its rank or on what ran before."""
    # torch.manual_seed seeds every device, which takes milliseconds where there is none but the CPU
    set_seed = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
    set_seed(int(np.random.SeedSequence([seed, step, micro_batch]).generate_state(1)[0]))


def sync_gradients(run, last):
    """Reduce gradients over the ranks in the last micro-batch of a step only."""
    if run.args.fsdp:
        run.model.set_requires_gradient_sync(last)
    elif run.machine.world_size > 1:
        run.model.require_backward_grad_sync = last  # DDP's no_sync() sets the same


def collect(losses, norm, flags, tables, machine):
    """Mean losses and router table over the micro-batches of all ranks, brought to the host; the largest of each flag.

    Counts of choices are summed, and the largest logit is the largest of all.
    """
    means = torch.stack(list(losses.values()))
    table = torch.stack(tables).sum(0) if tables else means.new_zeros(0, GPT.COUNTS)
    most = torch.stack([t[:, GPT.MAX_LOGIT] for t in tables]).amax(0) if tables else means.new_zeros(0)
    if machine.world_size > 1:
        sums = torch.cat([means, table.flatten()])
        most = torch.cat([most, means.new_tensor(flags, dtype=most.dtype)])
        dist.all_reduce(sums)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        means, table = sums[: len(means)] / machine.world_size, sums[len(means) :].view(table.shape)
        most, flags = most[: -len(flags)], most[-len(flags) :].tolist()
    table[:, : GPT.COUNTS] /= max(1, len(tables) * machine.world_size)
    table[:, GPT.MAX_LOGIT] = most
    *means, norm = torch.cat([means, norm.reshape(1)]).tolist()
    return dict(zip(losses, means, strict=True)), norm, flags, table


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and samples: neither touches the generator, the data position or the gradients of training


def due(run, every):
    """Whether something that happens every so many steps is due now; all of it is at the end."""
    step = run.progress.step
    return every > 0 and (step % every == 0 or optim.is_over(step, run.args, run.progress.clock))


def evaluate(run):
    """Validation, HellaSwag and samples, as far as they are due at this step."""
    args, machine, model, step, streams = run.args, run.machine, run.raw_model, run.progress.step, {}
    if due(run, args.val_loss_every):
        found = validate(model, run.val_loader, args.val_loss_steps, machine, run.console, run.stop)
        streams |= logger.val_streams(found) if found else {}
    every = args.val_loss_every if args.hellaswag_every is None else args.hellaswag_every
    if run.examples is not None and due(run, every):
        rank, world_size = machine.eval_share
        bar = run.console.as_bar and machine.is_main
        result = hellaswag.evaluate(model, run.examples, machine.device, rank=rank, world_size=world_size, progress=bar)
        streams |= {"hella": result.acc_norm, "hella_bpb": result.bpb}
    if streams:
        run.log.write(step, streams)
        shown = [f"{name} {streams[name]:.4f}" for name in runlog.WHOLE if name in streams]
        run.console.say(f"step {step:6d} | " + " | ".join(shown))
    if due(run, args.sample_from_model_every) and step > 0:
        try:
            texts = sample.continue_prompt(model, run.tokenizer, args.sample_prompt, 4, 32, args.seed, machine)
        except sample.BrokenModel as error:  # the next step says that the run diverged, or is skipped
            texts = [f"none: {error}"]
        for i, text in enumerate(texts):
            run.console.say(f"step {step} sample {i}: {text!r}")


class Validation(NamedTuple):
    loss: float  # cross-entropy, nats per token
    bpb: float  # the same in bits per byte of text; nan without any text
    router: list  # dicts, GPT.router_stats of all batches; max_logit is a mean here


@torch.no_grad()
def validate(model, loader, steps, machine, console, stop=None):
    """Validation, in eval mode, over the first `steps` batches of the loader's split. One transfer to the host.

    None where a single process was told to stop.
    """
    was_training = model.training
    model.eval()
    layers, columns = len(model.moe_layers()), GPT.COUNTS + model.config.n_exp
    lengths = torch.tensor(token_bytes(loader.tokenizer, loader.vocab_size), dtype=torch.float32, device=machine.device)
    rows, (rank, world_size) = [], machine.eval_share
    for i in console.bar_over(range(rank, steps, world_size), loader.split):
        if stop and stop.requested and machine.world_size == 1:
            model.train(was_training)
            return None
        x, y = loader.batch_at(i)
        with machine.autocast():
            loss = model(x, y).ce_loss
        table = [model.router_table()[:, :columns].flatten()] if layers else []
        rows.append(torch.cat([torch.stack([loss, lengths[y].sum(), torch.ones_like(loss)]), *table]))
    model.train(was_training)
    sums = torch.zeros(3 + layers * columns, dtype=torch.float64)
    sums += torch.stack(rows).cpu().double().sum(0) if rows else 0
    if machine.world_size > 1:
        sums = sums.to(machine.device)
        dist.all_reduce(sums)
    (loss, n_bytes, batches), table = sums[:3].tolist(), sums[3:].view(layers, columns)
    table[:, : GPT.COUNTS] /= batches
    bits = loss / math.log(2) * loader.B * loader.T
    return Validation(loss / batches, bits / n_bytes if n_bytes else math.nan, model.router_stats(table))


# ---------------------------------------------------------------------------------------------------------------------
# Saving and ending


def is_late(run):
    """Whether --save_checkpoint_minutes have passed since the last checkpoint."""
    minutes = run.args.save_checkpoint_minutes
    return minutes > 0 and time.monotonic() - run.saved_at > 60 * minutes


def save(run):
    """Write a checkpoint in the background. Every rank calls it."""
    run.saved_at = time.monotonic()
    if not run.args.save_checkpoint:
        return
    run.log.sync()  # a checkpoint must never be newer than the log that it continues
    fields = {
        "loader": run.loader.state_dict(),
        "progress": dataclasses.asdict(run.progress),
        "step": run.progress.step,
        "args": dataclasses.asdict(run.args),
        "config": dataclasses.asdict(run.raw_model.config),
        "tokenizer": run.tokenizer.name,
        "record": run.record,
    }
    path, on_cpu = checkpoint.step_path(run.folder, run.progress.step), run.machine.device.type == "cpu"
    if run.args.fsdp:  # on the CPU a copy to write from would take the memory of training
        run.saver.save_shards(run.raw_model, run.optimizer, fields, path, background=not on_cpu)
        return
    state = checkpoint.get_state(run.raw_model, run.optimizer)
    if run.machine.is_main:
        run.saver.save(state | fields, path)


def last_save(run):
    """The last checkpoint, waited for. UserError when it could not be written."""
    if run.progress.step > run.first_step:  # a run that was finished already keeps its checkpoint
        save(run)
    if (error := run.saver.wait()) and run.args.save_checkpoint:
        with common.same_on_every_rank():
            problem = f"the last checkpoint could not be written to {run.folder} ({error})"
            raise UserError(f"{problem}: free space, run again")
    if run.log.error:
        raise run.log.error


def finish(run):
    last_save(run)
    run.console.say(f"done: {run.progress.step} steps, log in {run.log.path}")
    if run.args.save_checkpoint:
        run.console.say(f"checkpoint in {run.folder}; text from it: python sample.py --checkpoint {run.folder}")
    return common.DONE


def interrupt(run):
    last_save(run)
    kept = f"continue with --resume auto --run_id {run.args.run_id}" if run.args.save_checkpoint else "nothing is saved"
    run.console.say(f"stopped after {run.progress.step} steps; {kept}")
    return common.INTERRUPTED


# ---------------------------------------------------------------------------------------------------------------------
# Setting up: names and identity, what to resume


def set_up(args, machine, stem, log_path, folder, console):
    """Build everything a run needs; on several ranks every step ends with all of them agreeing."""
    stop, is_main = common.Stop(), machine.is_main
    state = common.together(
        lambda: identity.find_state(args, folder, log_path, console.say) if is_main else None, machine
    )
    brief = common.from_rank_0(state and {name: state[name] for name in identity.NEEDED}, machine)
    settings, changes = common.together(
        lambda: identity.settle(args, brief, stem, is_main and log_path, console.say), machine
    )
    raw_model = common.together(lambda: build_model(args, machine, brief), machine)
    source = args.init_from if args.init_from != "scratch" and not brief else None
    loader, val_loader = common.together(lambda: make_loaders(args, machine, raw_model, source), machine)
    tokenizer = get_tokenizer(loader.tokenizer)
    model = common.parallelize(raw_model, args, machine)
    optimizer = optim.build_optimizer(raw_model, args)
    progress = Progress(**brief["progress"]) if brief else Progress()
    if brief:
        common.together(lambda: checkpoint.set_state(raw_model, optimizer, state, folder), machine)
        common.together(lambda: loader.load_state_dict(brief["loader"]), machine)
    state = None
    examples = hellaswag.load_for_training(
        args.hellaswag_data, args.hellaswag_limit, tokenizer, args.hellaswag_every, machine, console.say
    )
    record = logger.describe_run(args, settings, raw_model, machine)
    if brief and settings == brief["record"]["settings"]:  # the same run: as it began, and what has changed since
        record = brief["record"] | {"changes": changes}
    if args.save_checkpoint:
        common.together(lambda: is_main and common.check_writable(folder, "--checkpoint_dir"), machine)
        common.together(lambda: args.fsdp and common.check_shared(folder), machine)
    log = common.together(lambda: logger.Log(args, machine, log_path, record, progress), machine)
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=args.dist_timeout)) if args.fsdp else None
    saver = checkpoint.BackgroundSaver(args.keep_checkpoints, console.warn_of_disk, group)
    run = Run(args, machine, raw_model, model, optimizer, loader, val_loader, tokenizer, examples, progress, record,
              log, console, saver, folder, stop, progress.step, common.is_compiled(args, machine))  # fmt: skip
    logger.print_header(run)
    return run


# ---------------------------------------------------------------------------------------------------------------------
# Model and data


def build_model(args, machine, state):
    """The bare model on its device: from scratch, from --init_from, or empty where a checkpoint follows."""
    generator, weights = torch.Generator().manual_seed(args.seed), None
    if state is not None:
        config = checkpoint.config_of(state["config"], "the checkpoint")
    elif args.init_from == "scratch":
        config = model_config(args)
    else:
        source, fields, weights, _ = checkpoint.read_source(args.init_from)
        # as it is where it is only evaluated: a dense model is not made into a MoE
        given = {} if args.eval_only else {name: getattr(args, name) for name in MODEL_FIELDS}
        shape = [name for name in checkpoint.SHAPE if given.get(name) == getattr(Args, name)]
        given = {name: value for name, value in given.items() if value is not None and name not in shape}
        config = checkpoint.config_of(fields | given, source)
    check_model(config, args, machine)
    model = GPT(config, generator) if weights is None else checkpoint.upcycle(fields, weights, given, source, generator)
    for name in checkpoint.SHAPE:  # as it is, for the record
        setattr(args, name, getattr(model.config, name))
    return model.to(machine.device)


def make_loaders(args, machine, model, source=None):
    """The training batches of this rank, and the validation split, whose batches the ranks share out. UserError for
    tokens of another tokenizer than those of `source`, whose weights the model has."""
    common_args = {"B": args.B, "T": args.T, "vocab_size": model.config.vocab_size, "device": machine.device}
    ranks = {"rank": machine.rank, "world_size": machine.world_size}
    loader = DataLoader(args.data_root, "train", data_seed=args.data_seed, **ranks, **common_args)
    theirs = checkpoint.tokenizer_of(source) if source else loader.tokenizer
    if theirs != loader.tokenizer:
        have = f"{source} was trained on {theirs} tokens, {args.data_root} holds {loader.tokenizer} tokens"
        raise UserError(f"{have}: make shards with fineweb.py --tokenizer {theirs}")
    return loader, DataLoader(args.data_root, "val", **common_args)


# ---------------------------------------------------------------------------------------------------------------------
# The script


def evaluate_only(args, machine):
    """Print train and val loss of the model as it is: --init_from, or the run that --resume names."""
    console = logger.Console(args, machine)
    source = None if args.init_from == "scratch" else args.init_from
    if args.resume:
        source = args.resume if args.resume != "auto" else Path(args.checkpoint_dir) / identity.choose_names(args)
        model = checkpoint.load_model(source)[0].to(machine.device)
        check_model(model.config, args, machine)
    else:
        model = build_model(args, machine, None)
    for loader in make_loaders(args, machine, model, source):
        loss, bpb, _ = validate(model, loader, args.val_loss_steps, machine, console)
        tokens = loader.tokens_in(args.val_loss_steps)
        measures = f"{loss:.4f} nats per token, {bpb:.4f} bits per byte, perplexity {math.exp(loss):.2f}"
        console.say(f"{loader.split} loss {measures} ({tokens:,} tokens)")
    return common.DONE


def run(args):
    """Train, or evaluate, with these settings; returns the exit code."""
    with common.same_on_every_rank():
        check_args(args, common.world()[1])
        machine = common.set_up_machine(args.device, args.dtype, args.fsdp, args.dist_timeout)
        args.dtype = str(machine.dtype).removeprefix("torch.")
        if args.hellaswag_limit is None and machine.device.type == "cpu":
            args.hellaswag_limit = 200
    if args.eval_only:
        return evaluate_only(args, machine)
    stem = identity.agree_on_names(args, machine)
    log_path = runlog.log_path(args.logs_dir, args.name, args.run_id, args.seed)
    folder = Path(args.checkpoint_dir) / stem
    with contextlib.ExitStack() as locks:
        common.together(lambda: machine.is_main and identity.hold(args, [log_path, folder / "writer"], locks), machine)
        run = set_up(args, machine, stem, log_path, folder, logger.Console(args, machine))
        try:
            return train(run)
        finally:
            run.saver.wait()
            run.console.close()
            run.log.close()


def main():
    with common.same_on_every_rank():
        args = common.parse(Args)
    try:
        code = run(args)
        gloo = dist.is_initialized() and dist.get_backend() == "gloo"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if gloo:
        common.exit_now(code)
    return code


if __name__ == "__main__":
    common.run(main)
