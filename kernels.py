"""What is fast and needs explaining: cross-entropy without the logits, dispatch and combine, the grouped linear layer.

model.py calls these and reads on without them. Each states what it computes; the plain reference it is tested against,
outputs and gradients, stands in tests/test_kernels.py under the name given.

Suffixes name shapes as in model.py: T tokens, E experts, K choices per token, N = T*K pairs, D width in, F width out.
"""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------
# Types


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))  # float64, in the tests, stays as it is


def compute_dtype(x):
    """The type in which matrix products of x run here: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


# ---------------------------------------------------------------------------------------------------------------------
# Cross-entropy without the logits

# In float32 32 MB, just below what glibc maps anew for every chunk, and 512 MB.
LOGITS_PER_CHUNK = {"cpu": 2**23 - 2**10, "cuda": 2**27}


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `h @ weight.T`, a chunk of rows at a time, gradients included.

    The gradient of a chunk's logits is known as soon as its softmax is, so both products of the backward pass are done
    at once and the chunk is thrown away: (N, V) never exists, nothing is computed twice. The float32 weight comes in
    and is cast here, so that its gradient is summed over chunks in float32.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, n_chunks):
        w = weight.to(h.dtype)
        count = (targets >= 0).sum()
        total = at_least_float32(h.new_zeros(()))
        grad_h, grad_w = [], torch.zeros_like(weight)
        for h_c, targets_c in zip(h.tensor_split(n_chunks), targets.tensor_split(n_chunks), strict=True):
            logp = torch.log_softmax(at_least_float32(h_c @ w.t()), dim=-1)
            index, valid = targets_c.clamp(min=0)[:, None], (targets_c >= 0).to(logp.dtype)[:, None]
            total = total - (logp.gather(1, index) * valid).sum()
            valid = valid / count
            grad = logp.exp_().mul_(valid).scatter_add_(1, index, -valid).to(h.dtype)
            grad_h.append(grad @ w)
            if grad.dtype == grad_w.dtype:
                grad_w.addmm_(grad.t(), h_c)
            else:
                grad_w += grad.t() @ h_c
            del logp, grad  # else this chunk is held while the next one is computed
        ctx.save_for_backward(torch.cat(grad_h), grad_w)
        return total / count

    @staticmethod
    def backward(ctx, grad_loss):
        grad_h, grad_w = ctx.saved_tensors
        return (grad_h * grad_loss).to(grad_h.dtype), grad_w * grad_loss, None, None


def linear_cross_entropy(h, weight, targets, reduction="mean"):
    """Cross-entropy of the logits `h @ weight.T` against targets, -1 ignored.

    h (N, D) in the compute type, weight (V, D), targets (N,) int64. Returns a float32 scalar, or (N,) for "none".
    """
    rows = max(1, LOGITS_PER_CHUNK.get(h.device.type, 2**27) // weight.shape[0])  # of a chunk, at most
    n_chunks = max(1, math.ceil(h.shape[0] / rows))
    if reduction == "mean" and torch.is_grad_enabled():
        return LinearCrossEntropy.apply(h, weight, targets, n_chunks)
    w = weight.to(h.dtype)
    pairs = zip(h.tensor_split(n_chunks), targets.tensor_split(n_chunks), strict=True)
    losses = [F.cross_entropy(at_least_float32(h_c @ w.t()), t, ignore_index=-1, reduction="none") for h_c, t in pairs]
    losses = torch.cat(losses)
    return losses if reduction == "none" else losses.sum() / (targets >= 0).sum()


# ---------------------------------------------------------------------------------------------------------------------
# Rows to experts and back


class Plan(NamedTuple):
    """Where each (token, choice) pair goes when the pairs stand sorted by expert."""

    row_N: torch.Tensor  # int64, pair n stands in this sorted row
    pair_N: torch.Tensor  # int64, the inverse: the pair in each sorted row
    place_N: torch.Tensor  # int64, how many pairs chose the same expert before pair n
    count_E: torch.Tensor  # int64, pairs of each expert
    ends_E: torch.Tensor  # int32, sorted rows of expert e are ends[e-1] to ends[e]


def sort_by_expert(expert_TK, n_exp):
    """Stable counting sort of the pairs by expert: no comparison, every shape known before the data is."""
    expert_N = expert_TK.t().reshape(-1)  # choice-major
    chosen_EN = expert_N == torch.arange(n_exp, device=expert_N.device)[:, None]
    running_EN = chosen_EN.cumsum(dim=1, dtype=torch.int32)
    count_E = running_EN[:, -1]
    ends_E = count_E.cumsum(dim=0, dtype=torch.int32)
    place_N = running_EN.gather(0, expert_N[None])[0].long() - 1
    row_N = place_N + (ends_E - count_E)[expert_N]
    pair_N = torch.empty_like(row_N).scatter_(0, row_N, torch.arange(row_N.numel(), device=row_N.device))
    return Plan(row_N, pair_N, place_N, count_E.long(), ends_E)


class Dispatch(torch.autograd.Function):
    """x_TD -> the rows of x that the sorted pairs name, (N, D). Backward gathers too: no scatter with atomics."""

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
    """Expert outputs in sorted rows (N, D) and gates (T, K) -> (T, D), each token's rows summed by gate."""

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
    """y_NF + bias_EF[expert of the row]. The bias gradient is a product with a one-hot matrix: a gather's own backward
    would be atomics of N rows onto E."""

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
    """Row counts of products are rounded up to a multiple of this, which leaves at most 8 sizes an octave.

    oneDNN compiles a kernel for each new shape of a bfloat16 product, 5 ms for a product of 0.5, and an expert's row
    count hardly ever repeats. MKL's float32 products need no care.
    """
    return max(64, 2 ** n_rows.bit_length() // 16) if dtype == torch.bfloat16 else 1


def row_windows(ends, dtype):
    """(expert, low, start, end) of products that cover all rows: rows low:end are multiplied for the sake of start:end.

    Experts come last to first, so that rows low:start, of experts before this one, are computed again after it. Where
    too few rows stand before, an expert has two windows. One without rows has an empty one.
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
    """Rows ends[e-1]:ends[e] of x times weight[e], plus bias[e]: one product an expert, the bias inside it.

    For CPU, where a launch costs nothing, and for float32 on CUDA, which F.grouped_mm does not take (there the
    row counts come to the host: right, not fast). A custom operator: torch.compile sees one node of fixed shape.
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
    """x with its first n rows zero: a copy where there are any."""
    return torch.cat([torch.zeros_like(x[:n]), x[n:]]) if n else x


@torch.library.custom_op("moe::grouped_linear_backward", mutates_args=())
def grouped_linear_loop_backward(
    grad_NF: torch.Tensor, x_ND: torch.Tensor, weight_EDF: torch.Tensor, ends_E: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_x, grad_w = torch.empty_like(x_ND), torch.empty_like(weight_EDF)
    grad_b = weight_EDF.new_empty(weight_EDF.shape[0], weight_EDF.shape[2])
    ends, last = ends_E.tolist(), None
    for e, low, start, end in row_windows(ends, x_ND.dtype):
        x, grad = x_ND[low:end], grad_NF[low:end]
        torch.mm(grad, weight_EDF[e].t(), out=grad_x[low:end])
        # Rows of other experts are no part of the weight gradient; zeros on the narrower side are the smaller copy.
        if x.shape[1] < grad.shape[1]:
            x = zero_first_rows(x, start - low)
        else:
            grad = zero_first_rows(grad, start - low)
        torch.addmm(grad_w[e], x.t(), grad, beta=int(e == last), out=grad_w[e])  # zeros for an expert without rows
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
    """The linear layer of each expert on its own rows; (N, F). Rows are sorted by expert, ends_E as in Plan."""
    if x_ND.is_cuda and x_ND.dtype == torch.bfloat16:
        y_NF = F.grouped_mm(x_ND, weight_EDF, offs=ends_E)
        return y_NF if bias_EF is None else AddExpertBias.apply(y_NF, bias_EF, ends_E)
    return grouped_linear_loop(x_ND, weight_EDF, bias_EF, ends_E)


# ---------------------------------------------------------------------------------------------------------------------
# Keys and values for sampling


class KVCache:
    """Keys and values of the tokens so far, (B, n_head, block_size, head width) per layer; `length` are filled."""

    def __init__(self, config, batch_size, device, dtype):
        shape = (batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.length = 0

    def append(self, layer, k, v):
        """Store k, v (B, n_head, S, head width) of the new tokens; return those of all tokens so far."""
        end = self.length + k.shape[2]
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
