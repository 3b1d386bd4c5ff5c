"""Fast operators of the model: chunked cross-entropy, GELU, dispatch and combine, the experts, KV cache.

Each docstring begins with the value that is computed and names its plain reference in tests/test_kernels.py, which
checks outputs and all gradients.

Suffixes name shapes as in moe.py: T tokens, E experts, K choices per token, N = T*K pairs; here D is the width of the
input, F of the output, H the hidden width of an expert, V the vocabulary. A pair is one choice of one token; pair
n = k*T + t is choice k of token t.
"""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
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
    """Mean cross-entropy of the logits `h @ weight.T`, and its gradients, a chunk of rows at a time.

    The forward pass computes the gradients too: a chunk's softmax gives the gradient of its logits, both products of
    the backward pass follow, and the chunk is freed. The full logits (N, V) never exist, and nothing is computed twice.
    The weight is cast to the type of h here, so that its gradient is summed over chunks in the weight's own type.
    Own code: torch's fused loss has no chunks on the CPU. Reference: `full_cross_entropy`.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, chunk_rows):
        w = weight.to(h.dtype)
        count = (targets >= 0).sum()
        total = at_least_float32(h.new_zeros(()))
        grad_h, grad_w = [], torch.zeros_like(weight)
        for h_c, targets_c in zip(h.split(chunk_rows), targets.split(chunk_rows), strict=True):
            logits = at_least_float32(h_c @ w.t())
            logp = torch.log_softmax(logits, dim=-1)
            del logits
            index, valid = targets_c.clamp(min=0)[:, None], (targets_c >= 0).to(logp.dtype)[:, None]
            total = total - (logp.gather(1, index) * valid).sum()
            valid = valid / count
            if torch.compiler.is_compiling():  # a scatter would be a kernel of its own, with the gradient in float32
                hot = torch.arange(len(w), device=h.device) == index
                grad = (logp.exp() * valid - torch.where(hot, valid, 0.0)).to(h.dtype)
            else:
                grad = logp.exp_().mul_(valid).scatter_add_(1, index, -valid).to(h.dtype)
            grad_h.append(grad @ w)
            if grad.dtype == grad_w.dtype:
                grad_w.addmm_(grad.t(), h_c)
            else:
                grad_w += grad.t() @ h_c
            del logp, grad  # otherwise this chunk is held while the next one is computed
        ctx.save_for_backward(torch.cat(grad_h), grad_w)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grad_h, grad_w = ctx.saved_tensors
        return (grad_h * grad_loss).to(grad_h.dtype), grad_w * grad_loss, None, None


def linear_cross_entropy(h, weight, targets, reduction="mean"):
    """Cross-entropy of the logits `h @ weight.T` against targets; negative targets are ignored.

    h (N, D) in the compute type, weight (V, D), targets (N,) int64. Returns nats in float32: the mean over targets, a
    scalar, or with reduction="none" (N,), 0 where ignored. Reference: `full_cross_entropy`.
    """
    rows = chunk_rows(h, weight)
    if reduction == "mean" and torch.is_grad_enabled():
        return LinearCrossEntropy.apply(h, weight, targets, rows)
    w = weight.to(h.dtype)
    pairs = zip(h.split(rows), targets.split(rows), strict=True)
    losses = torch.cat([
        F.cross_entropy(at_least_float32(h_c @ w.t()), targets_c.clamp(min=-1), ignore_index=-1, reduction="none")
        for h_c, targets_c in pairs
    ])  # fmt: skip
    return losses if reduction == "none" else losses.sum() / (targets >= 0).sum()


def chunk_rows(h, weight):
    """Rows of h per chunk: chunks of nearly equal size; large ones of a multiple of 128 rows, for the matrix units."""
    n_rows = max(1, h.shape[0])  # a rank may have no row
    most = max(1, LOGITS_PER_CHUNK.get(h.device.type, 2**27) // weight.shape[0])
    unit = 128 if most >= 1024 else 1
    rows = math.ceil(n_rows / math.ceil(n_rows / (most - most % unit)))
    return math.ceil(rows / unit) * unit


# ---------------------------------------------------------------------------------------------------------------------
# GELU

PER_PART = 2**17  # elements whose passes stay in the cache


def gelu_forward(x):
    """GELU with tanh, as GPT-2 has it. Reference: torch's own.

    On the CPU as x * sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3), which is the same function: torch's tanh is slower
    than these passes.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    y, scale = torch.empty_like(x, memory_format=torch.contiguous_format), math.sqrt(8 / math.pi)
    for x_c, y_c in zip(x.reshape(-1).split(PER_PART), y.view(-1).split(PER_PART), strict=True):
        x_c = at_least_float32(x_c)
        two_u = torch.addcmul(x_c.new_full((), scale), x_c, x_c, value=0.044715 * scale).mul_(x_c)
        torch.mul(two_u.sigmoid_(), x_c, out=y_c)
    return y


def gelu_backward(grad, x):
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


class Gelu(torch.autograd.Function):
    """`gelu_forward` with its gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return gelu_forward(x)

    @staticmethod
    def backward(ctx, grad):
        return gelu_backward(grad, *ctx.saved_tensors)


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


def dispatch(x_TD, pair_N):
    """x (T, D) -> the token of each sorted row, (N, D). Reference: `dispatch_by_index`."""
    return x_TD.index_select(0, pair_N % x_TD.shape[0])


def sum_rows(y_ND, row_N, n_tokens):
    """Sorted rows (N, D) -> (T, D), the sum of the rows of each token: the gradient of `dispatch`.

    K gathers; the gradient of index_select itself would scatter with atomics on CUDA. Reference: `combine_by_loop`.
    """
    return sum(y_ND.index_select(0, row_T) for row_T in row_N.split(n_tokens))


def combine(y_ND, gate_TK, row_N):
    """Sorted rows (N, D), gates (T, K) -> (T, D), sum over k of gate times row. Reference: `combine_by_loop`."""
    gate_TK = gate_TK.to(y_ND.dtype)
    rows = row_N.split(gate_TK.shape[0])
    return sum(y_ND.index_select(0, row_T) * gate_TK[:, k, None] for k, row_T in enumerate(rows))


# ---------------------------------------------------------------------------------------------------------------------
# The experts on the CPU: one after another, each on its own sorted rows, so that what is between its products stays in
# the cache


def window_step(n_rows, dtype):
    """Multiple to which the number of rows of a product is rounded up: at most 8 sizes from one power of 2 to the next.

    oneDNN compiles a kernel for each new shape of a bfloat16 product, which takes longer than the product, and the row
    counts of experts rarely repeat. MKL's float32 products need no rounding: 1.
    """
    return max(64, 2 ** n_rows.bit_length() // 16) if dtype == torch.bfloat16 else 1


def row_windows(ends, dtype):
    """Windows (expert, low, start, end) of sorted rows, one product each: rows start:end are the expert's own.

    Each window is padded backwards to a rounded size, low:end. Windows come last to first, so the borrowed rows
    low:start are computed again, and overwritten, by the windows that own them. An expert with too few rows before it
    gets two windows; one without rows gets an empty window.
    """
    for e, (start, end) in reversed(list(enumerate(itertools.pairwise([0, *ends])))):
        step = window_step(end - start, dtype)
        rounded = math.ceil((end - start) / step) * step
        if rounded <= end:
            yield e, end - rounded, start, end
        else:
            full = end - (end - start) % step
            yield e, max(0, end - step), full, end
            if start < full:
                yield e, start, start, full


def linear(x, weight, bias, e, out):
    """out = x times weight[e], plus bias[e] unless bias is None."""
    if bias is None:
        torch.mm(x, weight[e], out=out)
    else:
        torch.addmm(bias[e], x, weight[e], out=out)


@torch.library.custom_op("moe::experts", mutates_args=())
def experts_loop(x_TD: Tensor, pair_N: Tensor, fc: Tensor, fc_bias: Tensor | None, proj: Tensor,
                 proj_bias: Tensor | None, ends_E: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Pre-activations (N, H) and outputs (N, D) of the experts on the sorted rows. Reference: `loop_over_experts`.

    For the CPU, and for float32 on CUDA, which F.grouped_mm does not support (the row counts then come to the host,
    which is slow). A custom operator, so that torch.compile sees one node of fixed shape.
    """
    a_NH, y_ND = x_TD.new_empty(len(pair_N), fc.shape[2]), x_TD.new_empty(len(pair_N), x_TD.shape[1])
    for e, low, _, end in row_windows(ends_E.tolist(), x_TD.dtype):
        if low < end:
            linear(dispatch(x_TD, pair_N[low:end]), fc, fc_bias, e, out=a_NH[low:end])
            linear(gelu_forward(a_NH[low:end]), proj, proj_bias, e, out=y_ND[low:end])
    return a_NH, y_ND


@experts_loop.register_fake
def _(x_TD, pair_N, fc, fc_bias, proj, proj_bias, ends_E):
    return x_TD.new_empty(len(pair_N), fc.shape[2]), x_TD.new_empty(len(pair_N), x_TD.shape[1])


@torch.library.custom_op("moe::experts_backward", mutates_args=())
def experts_backward_loop(
    grad_TD: Tensor, x_TD: Tensor, pair_N: Tensor, gate_N: Tensor, fc: Tensor, proj: Tensor, a_NH: Tensor,
    ends_E: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients by the windows of `experts_loop`: of the dispatched rows (N, D), of the gates (N,) without their part
    from proj_bias, of fc, fc_bias, proj and proj_bias."""
    grad_ND, grad_gate_N = grad_TD.new_empty(len(pair_N), x_TD.shape[1]), torch.empty_like(gate_N)
    grad_fc, grad_proj = fc.new_empty(fc.shape), proj.new_empty(proj.shape)
    grad_fc_bias, grad_proj_bias = fc.new_zeros(len(fc), fc.shape[2]), proj.new_zeros(len(proj), proj.shape[2])
    last = None
    for e, low, start, end in row_windows(ends_E.tolist(), x_TD.dtype):
        grad = dispatch(grad_TD, pair_N[low:end])
        grad_h = grad @ proj[e].t()  # before the gate
        h, gate = gelu_forward(a_NH[low:end]), gate_N[low:end, None].clone()
        gate[: start - low] = 0  # borrowed rows must not count in the gradients of weights
        grad.mul_(gate)
        beta, last = int(e == last), e  # the second window of an expert adds to the first
        grad_proj[e].addmm_(h.t(), grad, beta=beta)  # zero for an expert without rows
        torch.sum(h.mul_(grad_h), -1, dtype=gate.dtype, out=grad_gate_N[low:end])
        grad_a = gelu_backward(grad_h, a_NH[low:end]).mul_(gate)
        grad_fc[e].addmm_(dispatch(x_TD, pair_N[low:end]).t(), grad_a, beta=beta)
        torch.mm(grad_a, fc[e].t(), out=grad_ND[low:end])
        grad_proj_bias[e] += grad.sum(0)
        grad_fc_bias[e] += grad_a.sum(0)
    return grad_ND, grad_gate_N, grad_fc, grad_fc_bias, grad_proj, grad_proj_bias


@experts_backward_loop.register_fake
def _(grad_TD, x_TD, pair_N, gate_N, fc, proj, a_NH, ends_E):
    (E, D, H), new = fc.shape, fc.new_empty
    return new(len(pair_N), D), torch.empty_like(gate_N), new(E, D, H), new(E, H), new(E, H, D), new(E, D)


# ---------------------------------------------------------------------------------------------------------------------
# The experts on CUDA: grouped products of all sorted rows


def uses_grouped_mm(x):
    return x.is_cuda and x.dtype == torch.bfloat16


def expert_of_rows(ends_E, n_rows):
    """Expert of each sorted row, (N,)."""
    return torch.searchsorted(ends_E, torch.arange(n_rows, device=ends_E.device), right=True)


def grouped_linear(x_ND, weight_EDF, bias_EF, ends_E):
    """Rows x (N, D) sorted by expert, ends_E as in Plan -> (N, F): row times weight (D, F) plus bias (F) of its expert.

    Without gradients. Reference: `loop_over_experts`.
    """
    y_NF = F.grouped_mm(x_ND, weight_EDF, offs=ends_E)
    return y_NF if bias_EF is None else y_NF + bias_EF[expert_of_rows(ends_E, len(y_NF))]


def grouped_weight_grads(x_ND, grad_NF, ends_E):
    """Gradients of weight (E, D, F) and bias (E, F) of `grouped_linear` from that of its output (N, F).

    That of the bias is a product with a one-hot matrix; a gather's own would add N rows onto E with atomics.
    """
    expert_N, expert_E = expert_of_rows(ends_E, len(x_ND)), torch.arange(len(ends_E), device=ends_E.device)
    one_hot_EN = expert_N == expert_E[:, None]
    return F.grouped_mm(x_ND.t(), grad_NF, offs=ends_E), one_hot_EN.to(grad_NF.dtype) @ grad_NF


def experts_grouped(x_TD, pair_N, fc, fc_bias, proj, proj_bias, ends_E):
    """As `experts_loop`."""
    a_NH = grouped_linear(dispatch(x_TD, pair_N), fc, fc_bias, ends_E)
    return a_NH, grouped_linear(gelu_forward(a_NH), proj, proj_bias, ends_E)


def experts_backward_grouped(grad_TD, x_TD, pair_N, gate_N, fc, proj, a_NH, ends_E):
    """As `experts_backward_loop`."""
    gate_N1, grad_ND = gate_N[:, None].to(grad_TD.dtype), dispatch(grad_TD, pair_N)
    grad_NH = grouped_linear(grad_ND, proj.transpose(1, 2), None, ends_E)  # before the gate
    h_NH = gelu_forward(a_NH)
    grad_proj, grad_proj_bias = grouped_weight_grads(h_NH, grad_ND * gate_N1, ends_E)
    grad_gate_N = h_NH.mul_(grad_NH).sum(-1, dtype=gate_N.dtype)
    grad_NH = gelu_backward(grad_NH, a_NH).mul_(gate_N1)
    grad_fc, grad_fc_bias = grouped_weight_grads(dispatch(x_TD, pair_N), grad_NH, ends_E)
    grad_ND = grouped_linear(grad_NH, fc.transpose(1, 2), None, ends_E)
    return grad_ND, grad_gate_N, grad_fc, grad_fc_bias, grad_proj, grad_proj_bias


# ---------------------------------------------------------------------------------------------------------------------
# The experts with gradients


class ExpertMLPs(torch.autograd.Function):
    """x (T, D), chosen experts and gates (T, K) -> (T, D): sum over k of gate times the MLP of the chosen expert.

    Kept for backward are x and the pre-activations (N, H) alone: rows are gathered and GELU is computed again, and the
    gradient of a gate is the activation times its gradient, so no expert output is needed (2512.14080). Weights
    (E, D, H) and (E, H, D), biases (E, H) and (E, D) or None, all in the type of x. Reference: `experts_by_loop`.
    """

    @staticmethod
    def forward(ctx, x_TD, expert_TK, gate_TK, fc, fc_bias, proj, proj_bias, row_N, pair_N, ends_E):
        experts = experts_grouped if uses_grouped_mm(x_TD) else experts_loop
        a_NH, y_ND = experts(x_TD, pair_N, fc, fc_bias, proj, proj_bias, ends_E)
        ctx.save_for_backward(x_TD, expert_TK, gate_TK, fc, proj, proj_bias, a_NH, row_N, pair_N, ends_E)
        ctx.has_fc_bias = fc_bias is not None
        return combine(y_ND, gate_TK, row_N)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):
        x_TD, expert_TK, gate_TK, fc, proj, proj_bias, a_NH, row_N, pair_N, ends_E = ctx.saved_tensors
        experts_backward = experts_backward_grouped if uses_grouped_mm(x_TD) else experts_backward_loop
        grad_ND, grad_gate_N, grad_fc, grad_fc_bias, grad_proj, grad_proj_bias = experts_backward(
            grad_TD, x_TD, pair_N, gate_TK.t().reshape(-1)[pair_N], fc, proj, a_NH, ends_E
        )
        grad_gate_TK = grad_gate_N[row_N].view(gate_TK.shape[1], -1).t()
        if proj_bias is not None:
            grad_gate_TK = grad_gate_TK + (grad_TD @ proj_bias.t()).gather(1, expert_TK)
        return (
            sum_rows(grad_ND, row_N, len(x_TD)), None, grad_gate_TK, grad_fc, grad_fc_bias if ctx.has_fc_bias else None,
            grad_proj, None if proj_bias is None else grad_proj_bias, None, None, None,
        )  # fmt: skip


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
