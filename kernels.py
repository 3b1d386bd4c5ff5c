"""Fast operators of the model: chunked cross-entropy, dispatch and combine, the linear layer of each expert, KV cache.

Each docstring begins with the value that is computed and names its plain reference in tests/test_kernels.py, which
checks outputs and all gradients.

Suffixes name shapes as in moe.py: T tokens, E experts, K choices per token, N = T*K pairs; here D is the width of the
input, F of the output, V the vocabulary. A pair is one choice of one token; pair n = k*T + t is choice k of token t.
"""

import itertools
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

# CPU: just under 32 MB in float32, from where glibc maps new memory for every allocation. CUDA: 512 MB.
LOGITS_PER_CHUNK = {"cpu": 2**23 - 2**10, "cuda": 2**27}


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the logits `h @ weight.T`, and its gradients, a chunk of rows at a time; with z_weight also
    the mean squared logsumexp, so weighted. Returns (their sum, cross-entropy, mean squared logsumexp).

    The forward pass computes the gradients too: a chunk's softmax gives the gradient of its logits, both products of
    the backward pass follow, and the chunk is freed. The full logits (N, V) never exist, and nothing is computed twice.
    The weight is cast to the type of h here, so that its gradient is summed over chunks in the weight's own type.
    Own code: torch's fused loss has no chunks on the CPU. Reference: `full_cross_entropy`.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, n_chunks, z_weight):
        w = weight.to(h.dtype)
        count = (targets >= 0).sum()
        total = z_total = at_least_float32(h.new_zeros(()))
        grad_h, grad_w = [], torch.zeros_like(weight)
        for h_c, targets_c in zip(h.tensor_split(n_chunks), targets.tensor_split(n_chunks), strict=True):
            logits = at_least_float32(h_c @ w.t())
            first = logits[:, :1].clone() if z_weight else None
            logp = torch.log_softmax(logits, dim=-1)
            del logits
            index, valid = targets_c.clamp(min=0)[:, None], (targets_c >= 0).to(logp.dtype)[:, None]
            total = total - (logp.gather(1, index) * valid).sum()
            scale = valid = valid / count
            if z_weight:
                logsumexp = first - logp[:, :1]
                z_total = z_total + (logsumexp.square() * valid).sum()
                scale = valid * (1 + 2 * z_weight * logsumexp)
            grad = logp.exp_().mul_(scale).scatter_add_(1, index, -valid).to(h.dtype)
            grad_h.append(grad @ w)
            if grad.dtype == grad_w.dtype:
                grad_w.addmm_(grad.t(), h_c)
            else:
                grad_w += grad.t() @ h_c
            del logp, grad  # otherwise this chunk is held while the next one is computed
        ctx.save_for_backward(torch.cat(grad_h), grad_w)
        ce = total / count
        loss = ce + z_weight * z_total if z_weight else ce.clone()
        ctx.mark_non_differentiable(ce, z_total)
        return loss, ce, z_total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        grad_h, grad_w = ctx.saved_tensors
        return (grad_h * grad_loss).to(grad_h.dtype), grad_w * grad_loss, None, None, None


def linear_cross_entropy(h, weight, targets, reduction="mean"):
    """Cross-entropy of the logits `h @ weight.T` against targets; negative targets are ignored.

    h (N, D) in the compute type, weight (V, D), targets (N,) int64. Returns nats in float32: the mean over targets, a
    scalar, or with reduction="none" (N,), 0 where ignored. Reference: `full_cross_entropy`.
    """
    n_chunks = count_chunks(h, weight)
    if reduction == "mean" and torch.is_grad_enabled():
        return LinearCrossEntropy.apply(h, weight, targets, n_chunks, 0.0)[0]
    w = weight.to(h.dtype)
    pairs = zip(h.tensor_split(n_chunks), targets.tensor_split(n_chunks), strict=True)
    losses = torch.cat([
        F.cross_entropy(at_least_float32(h_c @ w.t()), targets_c.clamp(min=-1), ignore_index=-1, reduction="none")
        for h_c, targets_c in pairs
    ])  # fmt: skip
    return losses if reduction == "none" else losses.sum() / (targets >= 0).sum()


def linear_cross_entropy_with_z_loss(h, weight, targets, z_weight):
    """(cross-entropy + z_weight * z-loss, cross-entropy, z-loss), scalars; the gradient goes through the first alone.

    The z-loss is the mean squared logsumexp of the logits. Reference: `full_z_loss`.
    """
    return LinearCrossEntropy.apply(h, weight, targets, count_chunks(h, weight), z_weight)


def count_chunks(h, weight):
    rows = max(1, LOGITS_PER_CHUNK.get(h.device.type, 2**27) // weight.shape[0])  # most rows per chunk
    return max(1, math.ceil(h.shape[0] / rows))


# ---------------------------------------------------------------------------------------------------------------------
# Dispatch to experts and combine


class Plan(NamedTuple):
    """The pairs sorted by expert: row_N and pair_N map pairs to sorted rows and back."""

    row_N: torch.Tensor  # int64, sorted row of each pair
    pair_N: torch.Tensor  # int64, pair in each sorted row: the inverse of row_N
    place_N: torch.Tensor  # int64, number of earlier pairs with the same expert
    count_E: torch.Tensor  # int64, pairs per expert
    ends_E: torch.Tensor  # int32, expert e has the sorted rows ends[e-1] to ends[e]


def sort_by_expert(expert_TK, n_exp):
    """Plan of a stable sort of the pairs by expert, from the chosen experts (T, K).

    A counting sort: every shape is known without the data, so torch.compile sees one graph and the host never waits.
    Reference: `sort_with_python`.
    """
    expert_N = expert_TK.t().reshape(-1)
    chosen_EN = expert_N == torch.arange(n_exp, device=expert_N.device)[:, None]
    running_EN = chosen_EN.cumsum(dim=1, dtype=torch.int32)
    count_E = running_EN[:, -1]
    ends_E = count_E.cumsum(dim=0, dtype=torch.int32)
    place_N = running_EN.gather(0, expert_N[None])[0].long() - 1
    row_N = place_N + (ends_E - count_E)[expert_N]
    pair_N = torch.empty_like(row_N).scatter_(0, row_N, torch.arange(row_N.numel(), device=row_N.device))
    return Plan(row_N, pair_N, place_N, count_E.long(), ends_E)


class Dispatch(torch.autograd.Function):
    """x (T, D) -> the token of each sorted row, (N, D). Reference: `dispatch_by_index`.

    Backward sums K gathered rows per token; index_select's own would scatter with atomics on CUDA.
    """

    @staticmethod
    def forward(ctx, x_TD, row_N, pair_N):
        ctx.save_for_backward(row_N)
        ctx.n_tokens = x_TD.shape[0]
        return x_TD.index_select(0, pair_N % x_TD.shape[0])

    @staticmethod
    def backward(ctx, grad_ND):
        (row_N,) = ctx.saved_tensors
        return sum(grad_ND.index_select(0, row_T) for row_T in row_N.split(ctx.n_tokens)), None, None


class Combine(torch.autograd.Function):
    """Expert outputs in sorted rows (N, D), gates (T, K) -> (T, D), sum over k of gate times row.

    Forward and backward gather, as in Dispatch. Reference: `combine_by_loop`.
    """

    @staticmethod
    def forward(ctx, y_ND, gate_TK, row_N, pair_N):
        ctx.save_for_backward(y_ND, gate_TK, row_N, pair_N)
        gate_TK = gate_TK.to(y_ND.dtype)
        rows = row_N.split(gate_TK.shape[0])
        return sum(y_ND.index_select(0, row_T) * gate_TK[:, k, None] for k, row_T in enumerate(rows))

    @staticmethod
    def backward(ctx, grad_TD):
        y_ND, gate_TK, row_N, pair_N = ctx.saved_tensors
        gate_N = gate_TK.t().reshape(-1)[pair_N].to(y_ND.dtype)  # in sorted order
        grad_ND = grad_TD.index_select(0, pair_N % gate_TK.shape[0])
        grad_gate_N = (y_ND * grad_ND).sum(-1, dtype=gate_TK.dtype)
        grad_gate_TK = grad_gate_N[row_N].view(gate_TK.shape[1], -1).t()
        grad_y_ND = grad_ND * gate_N[:, None]
        return grad_y_ND, grad_gate_TK, None, None


# ---------------------------------------------------------------------------------------------------------------------
# The linear layer of each expert on its own rows


class AddExpertBias(torch.autograd.Function):
    """y (N, F) plus the bias (E, F) of each row's expert. Reference: `loop_over_experts`.

    The gradient of the bias is a product with a one-hot matrix; a gather's own would add N rows onto E with atomics.
    """

    @staticmethod
    def forward(ctx, y_NF, bias_EF, ends_E):
        expert_N = torch.searchsorted(ends_E, torch.arange(y_NF.shape[0], device=y_NF.device), right=True)
        ctx.save_for_backward(expert_N)
        ctx.n_exp, ctx.bias_dtype = bias_EF.shape[0], bias_EF.dtype
        return y_NF + bias_EF[expert_N].to(y_NF.dtype)

    @staticmethod
    def backward(ctx, grad_NF):
        (expert_N,) = ctx.saved_tensors
        one_hot_EN = expert_N == torch.arange(ctx.n_exp, device=expert_N.device)[:, None]
        return grad_NF, (one_hot_EN.to(grad_NF.dtype) @ grad_NF).to(ctx.bias_dtype), None


def window_step(n_rows, dtype):
    """Multiple to which the number of rows of a product is rounded up: at most 8 sizes from one power of 2 to the next.

    oneDNN compiles a kernel for each new shape of a bfloat16 product, which takes longer than the product, and the row
    counts of experts rarely repeat. MKL's float32 products need no rounding: 1.
    """
    return max(64, 2 ** n_rows.bit_length() // 16) if dtype == torch.bfloat16 else 1


def row_windows(ends, dtype):
    """Windows (expert, low, start, end) of sorted rows, one product each: rows start:end are the expert's own.

    Each window is padded backwards to a rounded size, low:end. Experts come last to first, so the borrowed rows
    low:start are computed again, and overwritten, by the experts that own them. An expert with too few rows before it
    gets two windows; one without rows gets an empty window.
    """
    for e, (start, end) in reversed(list(enumerate(itertools.pairwise([0, *ends])))):
        step = window_step(end - start, dtype)
        rounded = math.ceil((end - start) / step) * step
        if rounded > end:
            full = end - (end - start) % step
            if start < full:
                yield e, start, start, full
            start, rounded = full, step
        yield e, max(0, end - rounded), start, end


@torch.library.custom_op("moe::grouped_linear", mutates_args=())
def grouped_linear_loop(x_ND: torch.Tensor, weight_EDF: torch.Tensor, bias_EF: torch.Tensor | None,
                        ends_E: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """Rows ends[e-1]:ends[e] of x times weight[e], plus bias[e]: one product per expert and window.

    For the CPU, and for float32 on CUDA, which F.grouped_mm does not support (the row counts then come to the host,
    which is slow). A custom operator, so that torch.compile sees one node of fixed shape. Reference:
    `loop_over_experts`.
    """
    y_NF = x_ND.new_empty(x_ND.shape[0], weight_EDF.shape[2])
    for e, low, _, end in row_windows(ends_E.tolist(), x_ND.dtype):
        if bias_EF is None:
            torch.mm(x_ND[low:end], weight_EDF[e], out=y_NF[low:end])
        else:
            torch.addmm(bias_EF[e], x_ND[low:end], weight_EDF[e], out=y_NF[low:end])
    return y_NF


@grouped_linear_loop.register_fake
def _(x_ND, weight_EDF, bias_EF, ends_E):
    return x_ND.new_empty(x_ND.shape[0], weight_EDF.shape[2])


def zero_first_rows(x, n):
    """x with its first n rows set to zero; a copy unless n is 0."""
    return torch.cat([torch.zeros_like(x[:n]), x[n:]]) if n else x


@torch.library.custom_op("moe::grouped_linear_backward", mutates_args=())
def grouped_linear_loop_backward(
    grad_NF: torch.Tensor, x_ND: torch.Tensor, weight_EDF: torch.Tensor, ends_E: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias from that of the output (N, F), by the same windows."""
    grad_x, grad_w = torch.empty_like(x_ND), torch.empty_like(weight_EDF)
    grad_b = weight_EDF.new_empty(weight_EDF.shape[0], weight_EDF.shape[2])
    ends, last = ends_E.tolist(), None
    for e, low, start, end in row_windows(ends, x_ND.dtype):
        x, grad = x_ND[low:end], grad_NF[low:end]
        torch.mm(grad, weight_EDF[e].t(), out=grad_x[low:end])
        # Borrowed rows must not count in the weight gradient: zero them on the narrower side, the smaller copy.
        if x.shape[1] < grad.shape[1]:
            x = zero_first_rows(x, start - low)
        else:
            grad = zero_first_rows(grad, start - low)
        torch.addmm(grad_w[e], x.t(), grad, beta=int(e == last), out=grad_w[e])  # zero for an expert without rows
        last = e
    for e, (start, end) in enumerate(itertools.pairwise([0, *ends])):
        torch.sum(grad_NF[start:end], dim=0, out=grad_b[e])
    return grad_x, grad_w, grad_b


@grouped_linear_loop_backward.register_fake
def _(grad_NF, x_ND, weight_EDF, ends_E):
    grad_b = weight_EDF.new_empty(weight_EDF.shape[0], weight_EDF.shape[2])
    return torch.empty_like(x_ND), torch.empty_like(weight_EDF), grad_b


def _save_for_backward(ctx, inputs, output):
    x_ND, weight_EDF, bias_EF, ends_E = inputs
    ctx.has_bias = bias_EF is not None
    ctx.save_for_backward(x_ND, weight_EDF, ends_E)


def _grouped_linear_grads(ctx, grad_NF):
    grad_x, grad_w, grad_b = grouped_linear_loop_backward(grad_NF.contiguous(), *ctx.saved_tensors)
    return grad_x, grad_w, grad_b if ctx.has_bias else None, None


grouped_linear_loop.register_autograd(_grouped_linear_grads, setup_context=_save_for_backward)


def grouped_linear(x_ND, weight_EDF, bias_EF, ends_E):
    """Rows x (N, D) sorted by expert, ends_E as in Plan -> (N, F): row times weight (D, F) plus bias (F) of its expert.

    Reference: `loop_over_experts`.
    """
    if x_ND.is_cuda and x_ND.dtype == torch.bfloat16:
        y_NF = F.grouped_mm(x_ND, weight_EDF, offs=ends_E)
        return y_NF if bias_EF is None else AddExpertBias.apply(y_NF, bias_EF, ends_E)
    return grouped_linear_loop(x_ND, weight_EDF, bias_EF, ends_E)


# ---------------------------------------------------------------------------------------------------------------------
# Keys and values, for sampling


class KVCache:
    """Keys and values of the tokens so far, (B, n_head, block_size, head width) per layer, filled up to `length`.

    Reference: the whole sequence computed again, in tests/test_sample.py.
    """

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
