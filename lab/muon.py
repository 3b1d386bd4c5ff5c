"""Muon for the hidden matrices, AdamW for all other parameters, in one optimizer.

    groups = muon_groups(model, model.optimizer_groups(weight_decay), lr_scale=muon_lr / max_lr)
    optimizer = Muon(groups, lr=max_lr, betas=(0.9, 0.95), eps=1e-8)

Keller Jordan's Muon (https://kellerjordan.github.io/posts/muon), for a matrix W with gradient G:

    M = momentum M + (1 - momentum) G
    U = NewtonSchulz((1 - momentum) G + momentum M)                       Nesterov; singular values near 1
    W = (1 - lr weight_decay) W - lr sqrt(max(1, outputs / inputs)) U

The scale is the original one, as in torch.optim.Muon with adjust_lr_fn="original" (not Moonlight's 2502.16982, which
fits the rate of AdamW), so the rate is one of its own: 0.02 is the author's. torch.optim.Muon takes 2-D alone; here

    Linear   (outputs, inputs), one matrix; the fused c_attn is three, queries, keys and values each orthogonalised
             alone, as the author recommends
    Experts  (E, inputs, outputs), E matrices: a norm, an iteration and a scale per expert, as for a Linear

Both parts compute on whole tensors: every rank of DDP makes the same update; FSDP's shards are not supported.
"""

import torch
from torch.optim.adamw import adamw

from lab.common import UserError

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
    """Muon for the groups with "muon": True, AdamW for the others, computed as torch.optim.AdamW(fused=True) does.

    A Muon group holds weights of Linears, 2-D, and of Experts, 3-D; a 2-D one consists of "stacked" (default 1) equal
    matrices, one below the other. ns_dtype: type of the Newton-Schulz iteration (default: bfloat16 on CUDA, elsewhere
    that of the parameter).
    """

    def __init__(self, groups, lr, momentum=0.95, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, ns_dtype=None):
        adamw_defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        # Of a "fused" group torch moves AdamW's step to the device of the parameter when a state is loaded.
        super().__init__(groups, {**adamw_defaults, "momentum": momentum, "muon": False, "stacked": 1, "fused": True})
        self.ns_dtype = ns_dtype
        for p in (p for group in self.param_groups if group["muon"] for p in group["params"]):
            if p.dim() not in (2, 3):
                raise ValueError(f"Muon takes matrices, 2-D or 3-D, not the shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
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
        update_NRC = update if p.dim() == 3 else update.unflatten(0, (group["stacked"], -1))
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
        )  # fmt: skip


def muon_groups(model, groups, lr_scale=1.0):
    """`groups` of a GPT's parameters, each split into its hidden matrices, for Muon, and the rest, for AdamW.

    Every group keeps its settings; the hidden matrices' "lr_scale", the factor on the schedule's rate, is multiplied
    by `lr_scale`. UserError for a model without hidden matrices.
    """
    names, split = {p: name for name, p in model.named_parameters()}, []
    for group in groups:
        parts = {"adamw": [], "matrix": [], "c_attn": []}
        for p in group["params"]:
            parts[kind_of(names[p], p)].append(p)
        muon = {**group, "muon": True, "lr_scale": lr_scale * group.get("lr_scale", 1.0)}
        split.append({"lr_scale": 1.0, **group, "params": parts["adamw"]})
        split.append({**muon, "params": parts["matrix"]})
        split.append({**muon, "params": parts["c_attn"], "stacked": 3})
    split = [group for group in split if group["params"]]
    if not any("muon" in group for group in split):
        raise UserError("--optimizer muon needs hidden matrices and the model has none: use --optimizer adamw")
    return split


def kind_of(name, p):
    """Hidden matrices are the weights of the blocks' products; a router's outputs are logits, not hidden."""
    if not name.startswith("transformer.h.") or ".router." in name or ".ln_" in name or name.endswith("bias"):
        return "adamw"
    if p.dim() not in (2, 3):
        raise RuntimeError(f"neither Muon nor AdamW is chosen for {name}, shape {tuple(p.shape)}")
    return "c_attn" if ".c_attn." in name else "matrix"
