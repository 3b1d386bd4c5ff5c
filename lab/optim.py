"""Learning rate and optimizer: what moves the weights, how far per step, and which weights are decayed.

    cosine    linear warmup, then half a cosine from max_lr to min_lr at the end (GPT-2, nanoGPT)
    wsd       warmup, constant, then 1 - sqrt down to min_lr over the last decay_steps (2405.18392): one stable run can
              decay from several of its checkpoints, `--branch RUN --name NEW --max_steps N`

    adamw     AdamW for everything
    muon      Muon for the hidden matrices, AdamW for the rest. Keller Jordan's Muon (kellerjordan.github.io/posts/muon)
              for a matrix W with gradient G:
                  M = momentum M + (1 - momentum) G
                  U = NewtonSchulz((1 - momentum) G + momentum M)             Nesterov; singular values near 1
                  W = (1 - lr weight_decay) W - lr sqrt(max(1, outputs / inputs)) U
              The scale is the original one, torch.optim.Muon's adjust_lr_fn="original", so its rate is one of its own:
              0.02 is the author's. torch.optim.Muon takes 2-D alone; here the fused c_attn is three matrices, as the
              author recommends, and Experts (E, inputs, outputs) are E matrices, each with a norm of its own.
"""

import math

import torch
from torch.optim.adamw import adamw

from lab.common import UserError

DECAY_PART = 0.2  # of the run, for wsd without decay_steps

# ---------------------------------------------------------------------------------------------------------------------
# Learning rate


def learning_rate(step, args, hours=0.0):
    """Rate of the update numbered `step`, after `hours` of training.

    With max_minutes the run is over at that time, or at max_steps if that comes first; the schedule then follows
    whichever part is further done. Continuous in step and hours for every combination of warmup, decay and length.
    """
    min_lr = 0.1 * args.max_lr if args.min_lr is None else args.min_lr
    if step < args.warmup_steps:
        return args.max_lr * (step + 1) / args.warmup_steps
    # `at` of the `total` steps after the warmup are done; perhaps more by the clock, which counts from the end of the
    # warmup. The time of the warmup is taken to be its part of the steps so far.
    total = max(1, args.max_steps - args.warmup_steps)
    at = step - args.warmup_steps
    if args.max_minutes:
        by_clock = hours * 60 / args.max_minutes
        of_warmup = by_clock * args.warmup_steps / max(1, step)
        at = max(at, total * (by_clock - of_warmup) / max(1e-9, 1 - of_warmup))
    if args.schedule == "cosine":
        return min_lr + 0.5 * (1 + math.cos(math.pi * min(1.0, at / total))) * (args.max_lr - min_lr)
    decay_steps = min(total, args.decay_steps or max(1, round(DECAY_PART * args.max_steps)))
    done = min(1.0, max(0.0, (at - (total - decay_steps)) / decay_steps))
    return min_lr + (1 - math.sqrt(done)) * (args.max_lr - min_lr)


def is_over(step, args, hours):
    """Whether the run has reached max_steps, or max_minutes."""
    return step >= args.max_steps or (args.max_minutes is not None and hours * 60 >= args.max_minutes)


# ---------------------------------------------------------------------------------------------------------------------
# Groups of parameters


def parameter_groups(model, args):
    """Groups of parameters, each with its weight decay and `lr_scale`, the factor on the schedule's rate.

    Weights of products and embeddings are decayed; biases, the experts' too, and norms are not. Under Muon the hidden
    matrices, the weights of the blocks' products, have a rate of their own; a router's outputs are logits, not hidden.
    RuntimeError for a parameter in no group or in two.
    """
    groups = {}
    for name, p in model.named_parameters():
        decay, lr_scale, matrices = args.weight_decay, 1.0, 0
        if name.endswith("bias") or ".ln_" in name:
            decay = 0.0
        elif name.startswith("transformer.h.") and ".router." not in name and args.optimizer == "muon":
            lr_scale = args.muon_lr / args.max_lr
            matrices = 3 if ".c_attn." in name else 1
        key = decay, lr_scale, matrices
        groups.setdefault(key, {"params": [], "weight_decay": decay, "lr_scale": lr_scale, "matrices": matrices})
        groups[key]["params"].append(p)
    held = [id(p) for group in groups.values() for p in group["params"]]
    if sorted(held) != sorted(id(p) for p in model.parameters()):
        raise RuntimeError("the optimizer groups do not hold exactly the model's parameters")
    return list(groups.values())


def flops_per_step(model, args):
    """FLOPs of Muon's products in one step, 0 for AdamW: STEPS times 4 m^2 n + 2 m^3 for each matrix m x n, m <= n."""
    flops = 0
    for group in parameter_groups(model, args):
        for p in group["params"] if group["matrices"] else ():
            rows = p.shape[1] if p.dim() == 3 else p.shape[0] // group["matrices"]
            m, n = sorted((rows, p.shape[-1]))
            flops += STEPS * p.numel() * (4 * m + 2 * m * m / n)
    return flops


def build_optimizer(model, args):
    """AdamW, or Muon with AdamW, over exactly the model's parameters."""
    groups, betas = parameter_groups(model, args), (0.9, args.beta2)
    if args.optimizer == "muon":
        return Muon(groups, lr=args.max_lr, betas=betas, eps=1e-8)
    return torch.optim.AdamW(groups, lr=args.max_lr, betas=betas, eps=1e-8, fused=True)


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def clip_gradients(model, grad_clip):
    """Scale the gradients down to a norm of grad_clip; returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # under FSDP each rank holds a part


# ---------------------------------------------------------------------------------------------------------------------
# Muon. It computes on whole tensors: every rank of DDP makes the same update; FSDP's shards are not supported.

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x^3, x^5: steep at 0, singular values end in about 0.7 to 1.2
STEPS = 5
SMALLEST_NORM = 1e-7


def newton_schulz(x_NRC, dtype):
    """For each of N matrices (rows, columns) with SVD U S V^T about U V^T, computed in `dtype`; 0 for a matrix of 0."""
    a, b, c = COEFFICIENTS
    tall = x_NRC.shape[1] > x_NRC.shape[2]
    x = x_NRC.to(dtype).mT if tall else x_NRC.to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=SMALLEST_NORM)  # largest singular value at most 1
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for the groups with "matrices" above 0, AdamW for the others, as torch.optim.AdamW(fused=True).

    A Muon group holds weights of Linears, 2-D, and of Experts, 3-D; a 2-D one consists of "matrices" equal ones, one
    below the other. ns_dtype: type of the Newton-Schulz iteration (default: bfloat16 on CUDA, else the parameter's).
    """

    def __init__(self, groups, lr, momentum=0.95, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, ns_dtype=None):
        adamw_defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        # Of a "fused" group torch moves AdamW's step to the device of the parameter when a state is loaded.
        super().__init__(groups, {**adamw_defaults, "momentum": momentum, "matrices": 0, "fused": True})
        self.ns_dtype = ns_dtype
        if not any(group["matrices"] for group in self.param_groups):
            raise UserError("--optimizer muon needs hidden matrices and the model has none: use --optimizer adamw")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["matrices"]:
                for p in params:
                    self.update_matrix(p, group)
            elif params:
                self.update_others(params, group)
        return loss

    def update_matrix(self, p, group):
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
        update = p.grad.lerp(momentum, group["momentum"])
        update_NRC = update if p.dim() == 3 else update.unflatten(0, (group["matrices"], -1))
        update_NRC = newton_schulz(update_NRC, self.ns_dtype or (torch.bfloat16 if p.is_cuda else p.dtype))
        rows, columns = update_NRC.shape[1:]
        outputs, inputs = (columns, rows) if p.dim() == 3 else (rows, columns)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update_NRC.reshape(p.shape), alpha=-group["lr"] * max(1, outputs / inputs) ** 0.5)

    def update_others(self, params, group):
        for p in params:
            if not self.state[p]:
                step = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p].update(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        firsts, seconds, steps = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        adamw(
            params, [p.grad for p in params], firsts, seconds, [], steps, fused=True, amsgrad=False, maximize=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        )
