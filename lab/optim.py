"""Learning rate and optimizer: what moves the weights, how far per step, and which weights are decayed.

    cosine    linear warmup, then half a cosine from max_lr to min_lr at the end (GPT-2, nanoGPT)
    wsd       warmup, constant, then 1 - sqrt down to min_lr over the last decay_steps (2405.18392): one stable run can
              decay from several of its checkpoints, `--resume PATH --decay_steps N --run_id NAME`

With --max_minutes the end is a time of training, and the schedule follows the clock instead of the steps.
"""

import math

import torch

from lab.muon import Muon, muon_groups

DECAY_PART = 0.2  # of the run, for wsd without --decay_steps


def decay_steps(args):
    return args.decay_steps or max(1, round(DECAY_PART * args.max_steps))


def learning_rate(step, args, hours=0.0):
    """The rate of the update numbered `step`; `hours` of training so far count with --max_minutes alone."""
    min_lr = 0.1 * args.max_lr if args.min_lr is None else args.min_lr
    if step < args.warmup_steps:
        return args.max_lr * (step + 1) / args.warmup_steps
    if args.schedule == "wsd":
        start = args.max_steps - decay_steps(args)
        done = (hours * 60 / args.max_minutes - (1 - DECAY_PART)) / DECAY_PART if args.max_minutes else None
        done = (step - start) / decay_steps(args) if done is None else done
        return min_lr + (1 - math.sqrt(min(1.0, max(0.0, done)))) * (args.max_lr - min_lr)
    done = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    done = hours * 60 / args.max_minutes if args.max_minutes else done
    return min_lr + 0.5 * (1 + math.cos(math.pi * min(1.0, done))) * (args.max_lr - min_lr)


def is_over(step, args, hours):
    """Whether the run has reached --max_steps, or --max_minutes."""
    return step >= args.max_steps or (args.max_minutes is not None and hours * 60 >= args.max_minutes)


def build_optimizer(model, args):
    """The optimizer over exactly the model's parameters. A group's rate is the schedule's times its "lr_scale"."""
    groups = model.optimizer_groups(args.weight_decay, args.router_weight_decay, args.router_lr_scale)
    held = [p for group in groups for p in group["params"]]
    if {id(p) for p in held} != {id(p) for p in model.parameters()} or len(held) != len(list(model.parameters())):
        raise RuntimeError("the optimizer groups do not hold exactly the model's parameters")
    if args.optimizer == "muon":
        groups = muon_groups(model, groups, args.muon_lr / args.max_lr)
        return Muon(groups, lr=args.max_lr, betas=(args.beta1, args.beta2), eps=1e-8)
    if args.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=args.max_lr)
    return torch.optim.AdamW(groups, lr=args.max_lr, betas=(args.beta1, args.beta2), eps=1e-8, fused=True)


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def clip_gradients(model, grad_clip):
    """Scale the gradients down to a norm of grad_clip; returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # under FSDP each rank holds a part
