"""Fast operators of the model: chunked cross-entropy, GELU, dispatch, grouped products, combine, KV cache.

Each docstring begins with the value that is computed; tests/test_kernels.py has a plain reference for each, which
checks outputs and all gradients. docs/speed.md has what was tried and dropped.

Suffixes name shapes as in model.py: T tokens, E experts, K choices per token, N = T*K pairs; here D is the width of the
input, F of the output, V the vocabulary. A pair is one choice of one token; pair n = k*T + t is choice k of token t.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# ---------------------------------------------------------------------------------------------------------------------
# Types


def at_least_float32(x):
    """x as float32, or float64 where it is that (in tests)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def compute_dtype(x):
    """The type of matrix products of x here: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


# ---------------------------------------------------------------------------------------------------------------------
# Cross-entropy, a chunk of the logits at a time

# CPU: just under 32 MB in float32, from where glibc maps new memory for every allocation. CUDA: 2 GB.
LOGITS_PER_CHUNK = {"cpu": 2**23 - 2**10, "cuda": 2**29}


def chunk_loss(h, weight, targets, count):
    """(Sum of the losses of a chunk of rows, gradient of its logits in the type of h) of the mean over `count` targets.

    h (rows, D) and weight (V, D) in the compute type. Compiled by itself on CUDA: a graph of all chunks would hold all
    gradients at once.
    """
    logits = at_least_float32(h @ weight.t())
    logp = torch.log_softmax(logits, dim=-1)
    del logits
    index, valid = targets.clamp(min=0)[:, None], (targets >= 0).to(logp.dtype)[:, None]
    loss = -(logp.gather(1, index) * valid).sum()
    valid = valid / count
    return loss, logp.exp_().mul_(valid).scatter_add_(1, index, -valid).to(h.dtype)


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the logits `h @ weight.T`, and its gradients, a chunk of rows at a time.

    The forward pass computes the gradients too: a chunk's softmax gives the gradient of its logits, both products of
    the backward pass follow, and the chunk is freed. The full logits (N, V) never exist, and nothing is computed twice.
    The weight is cast to the type of h here, so that its gradient is summed over chunks in the weight's own type.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, rows, chunk_loss):
        w = weight.to(h.dtype)
        count = (targets >= 0).sum()
        total = at_least_float32(h.new_zeros(()))
        grad_h, grad_w = [], torch.zeros_like(weight)
        for h_c, targets_c in zip(h.split(rows), targets.split(rows), strict=True):
            loss, grad = chunk_loss(h_c, w, targets_c, count)
            total = total + loss
            grad_h.append(grad @ w)
            if grad.dtype == grad_w.dtype:
                grad_w.addmm_(grad.t(), h_c)
            else:
                grad_w += grad.t() @ h_c
            del grad  # otherwise it is held while the next one is computed
        ctx.save_for_backward(torch.cat(grad_h), grad_w)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grad_h, grad_w = ctx.saved_tensors
        return (grad_h * grad_loss).to(grad_h.dtype), grad_w * grad_loss, None, None, None


def linear_cross_entropy(h, weight, targets, reduction="mean", chunk_loss=chunk_loss):
    """Cross-entropy of the logits `h @ weight.T` against targets; negative targets are ignored.

    h (N, D) in the compute type, weight (V, D), targets (N,) int64. Returns nats in float32: the mean over targets, a
    scalar, or with reduction="none" (N,), 0 where ignored.
    """
    # Chunks of nearly equal size; large ones of a multiple of 128 rows, for the matrix units.
    n_rows = max(1, h.shape[0])  # a rank may have no row
    most = max(1, LOGITS_PER_CHUNK.get(h.device.type, 2**27) // weight.shape[0])
    unit = 128 if most >= 1024 else 1
    rows = math.ceil(n_rows / math.ceil(n_rows / (most - most % unit)))
    rows = math.ceil(rows / unit) * unit
    if reduction == "mean" and torch.is_grad_enabled():
        return LinearCrossEntropy.apply(h, weight, targets, rows, chunk_loss)
    w, losses = weight.to(h.dtype), []
    for h_c, targets_c in zip(h.split(rows), targets.split(rows), strict=True):
        logits = at_least_float32(h_c @ w.t())
        losses.append(F.cross_entropy(logits, targets_c.clamp(min=-1), ignore_index=-1, reduction="none"))
    losses = torch.cat(losses)
    return losses if reduction == "none" else losses.sum() / (targets >= 0).sum()


# ---------------------------------------------------------------------------------------------------------------------
# GELU

PER_PART = 2**17  # elements whose passes stay in the cache


class Gelu(torch.autograd.Function):
    """GELU with tanh, as GPT-2 has it.

    On the CPU forward is x * sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3), which is the same function: torch's tanh
    is slower than these passes.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.gelu(x, approximate="tanh")
        y, scale = torch.empty_like(x, memory_format=torch.contiguous_format), math.sqrt(8 / math.pi)
        for x_c, y_c in zip(x.reshape(-1).split(PER_PART), y.view(-1).split(PER_PART), strict=True):
            x_c = at_least_float32(x_c)
            two_u = torch.addcmul(x_c.new_full((), scale), x_c, x_c, value=0.044715 * scale).mul_(x_c)
            torch.mul(two_u.sigmoid_(), x_c, out=y_c)
        return y

    @staticmethod
    def backward(ctx, grad):
        return torch.ops.aten.gelu_backward(grad, *ctx.saved_tensors, approximate="tanh")


# ---------------------------------------------------------------------------------------------------------------------
# Experts: sort the pairs, dispatch, grouped products, combine


class Plan(NamedTuple):
    """The pairs sorted by expert: row_N and pair_N map pairs to sorted rows and back."""

    row_N: torch.Tensor  # int64, sorted row of each pair
    pair_N: torch.Tensor  # int64, pair in each sorted row: the inverse of row_N
    place_N: torch.Tensor  # int64, number of earlier pairs with the same expert
    expert_N: torch.Tensor  # int64, expert of each sorted row
    count_E: torch.Tensor  # int64, pairs per expert
    ends_E: torch.Tensor  # int32, expert e has the sorted rows ends[e-1] to ends[e]


def sort_by_expert(expert_TK, n_exp):
    """Plan of a stable sort of the pairs by expert, from the chosen experts (T, K).

    A counting sort: every shape is known without the data, so torch.compile sees one graph and the host never waits.
    """
    expert_N = expert_TK.t().reshape(-1)
    chosen_EN = expert_N == torch.arange(n_exp, device=expert_N.device)[:, None]
    running_EN = chosen_EN.cumsum(dim=1, dtype=torch.int32)
    count_E = running_EN[:, -1]
    ends_E = count_E.cumsum(dim=0, dtype=torch.int32)
    place_N = running_EN.gather(0, expert_N[None])[0].long() - 1
    row_N = place_N + (ends_E - count_E)[expert_N]
    pair_N = torch.empty_like(row_N).scatter_(0, row_N, torch.arange(row_N.numel(), device=row_N.device))
    return Plan(row_N, pair_N, place_N, expert_N[pair_N], count_E.long(), ends_E)


class Gather(torch.autograd.Function):
    """x (M, D), index_N -> x[index_N], in which each row of x stands N / M times; back_N says where, first uses first.

    Its gradient gathers too: that of index_select itself would add with atomics on CUDA.
    """

    @staticmethod
    def forward(ctx, x, index_N, back_N):
        ctx.save_for_backward(back_N)
        ctx.rows = len(x)
        return x.index_select(0, index_N)

    @staticmethod
    def backward(ctx, grad):
        (back_N,) = ctx.saved_tensors
        return sum(grad.index_select(0, part) for part in back_N.split(ctx.rows)), None, None


def dispatch(x_TD, plan):
    """x (T, D) -> the token of each sorted row, (N, D)."""
    return Gather.apply(x_TD, plan.pair_N % len(x_TD), plan.row_N)


def combine(y_ND, gate_TK, plan):
    """Sorted rows (N, D), gates (T, K) -> (T, D), sum over k of gate times row."""
    gate_TK = gate_TK.to(y_ND.dtype)
    rows = Gather.apply(y_ND, plan.row_N, plan.pair_N).split(len(gate_TK))
    return sum(rows[k] * gate_TK[:, k, None] for k in range(len(rows)))


class AddBias(torch.autograd.Function):
    """y (N, F), bias (E, F), expert_N -> y + bias[expert_N]. The bias's gradient is a product with a one-hot matrix:
    that of an index would add N rows onto E with atomics on CUDA."""

    @staticmethod
    def forward(ctx, y_NF, bias_EF, expert_N):
        ctx.save_for_backward(expert_N)
        ctx.n_exp = len(bias_EF)
        return y_NF + bias_EF[expert_N]

    @staticmethod
    def backward(ctx, grad_NF):
        (expert_N,) = ctx.saved_tensors
        one_hot_EN = expert_N == torch.arange(ctx.n_exp, device=expert_N.device)[:, None]
        return grad_NF, one_hot_EN.to(grad_NF.dtype) @ grad_NF, None


def grouped_linear(x_ND, weight_EDF, bias_EF, plan):
    """Rows x (N, D) sorted by expert -> (N, F): row times weight (D, F) plus bias (F) of its expert.

    By F.grouped_mm, which is one kernel for bfloat16 on Hopper and newer, and a loop in C++ elsewhere. It knows no
    float64 and needs rows of whole 16 bytes; the loop is for those.
    """
    widths = weight_EDF.shape[1:]
    if x_ND.dtype != torch.float64 and all(width * x_ND.element_size() % 16 == 0 for width in widths):
        y_NF = F.grouped_mm(x_ND, weight_EDF, offs=plan.ends_E)
    else:
        parts = x_ND.split(plan.count_E.tolist())
        y_NF = torch.cat([part @ weight for part, weight in zip(parts, weight_EDF, strict=True)])
    return y_NF if bias_EF is None else AddBias.apply(y_NF, bias_EF, plan.expert_N)


# ---------------------------------------------------------------------------------------------------------------------
# Keys and values, for sampling


class KVCache:
    """Keys and values of the tokens so far, (B, n_head, block_size, head width) per layer, filled up to `length`."""

    def __init__(self, config, batch_size, device, dtype):
        shape = (batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.length = 0

    def append(self, layer, k, v):
        """Store k, v (B, n_head, S, head width) of S new tokens; return those of all tokens so far."""
        end = self.length + k.shape[2]
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
