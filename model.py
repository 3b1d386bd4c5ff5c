"""GPT-2 and its Mixture-of-Experts variants, from the router to the whole model. What a new trick changes is here.

    out = GPT(GPTConfig(n_exp=8, use_aux_loss=True))(idx, targets)
    out.loss.backward()          # cross-entropy + weighted router losses;  out.ce_loss is the cross-entropy alone

The dense parts follow GPT-2 (tied embeddings, learned positions, pre-norm, GELU tanh) and have its parameter names, so
its checkpoints load. With n_exp > 1 the MLP of every `stride`-th block becomes a MoE layer (blocks 0, 2, 4, ...).

    router    logits = x W_g, top k of E experts per token: Shazeer 2017 (1701.06538) eq. 3-5, Switch (2101.03961)
    losses    load balance: Switch eq. 4-6 with k choices; router z-loss: ST-MoE (2202.08906) eq. 5
    dispatch  sort the (token, choice) pairs by expert, run the experts as grouped matrix products on the sorted rows,
              combine by gate. No tensor of tokens x experts x capacity exists: memory and time are linear in tokens.
    capacity  a mask on the pairs, so dropless (capacity `inf`) and capacity share one path

A new router loss is a formula, a row of ROUTER_LOSSES, and a switch and a weight in GPTConfig; a new gate is a row of
GATES. Each then gets a row in variants.py. docs/add_a_trick.md shows one from beginning to end.

Shapes:  B sequences, S positions, D width, V vocabulary; T tokens (B*S), E experts, K choices per token, N = T*K pairs,
F hidden width, M bins of a histogram, L MoE layers. A suffix names the shape: x_TD is (T, D). Pairs are numbered
choice-major, n = k*T + t: all first choices, then all second ones, which is the order in which capacity is given out.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from lab.common import AboveZero, FiniteAboveZero, Fraction, NotNegative, Positive, Rate, check_ranges
from lab.kernels import (
    Gelu,
    KVCache,
    at_least_float32,
    combine,
    compute_dtype,
    dispatch,
    grouped_linear,
    linear_cross_entropy,
    sort_by_expert,
)

# ---------------------------------------------------------------------------------------------------------------------
# Gates: by which score experts are ranked, and how the chosen ones are weighted


class Gate(NamedTuple):
    score: Callable  # (logits_TE, probs_TE) -> (T, E), by which a selection bias ranks
    weigh: Callable  # (logits_TK, scores_TK), those of the chosen experts -> (T, K)
    sums_to_1: Callable  # top_k -> whether the weights of a token sum to 1


def normalised(scores_TK):
    """Scores over their sum: of the chosen experts, for K > 1, DeepSeek-V3 (2412.19437) eq. 13."""
    return scores_TK / scores_TK.sum(-1, keepdim=True) if scores_TK.shape[1] > 1 else scores_TK


GATES = {
    # Shazeer eq. 3, Mixtral: softmax over the selected; the constant 1, without gradient, at K = 1
    "topk_softmax": Gate(
        score=lambda logits_TE, probs_TE: probs_TE,
        weigh=lambda logits_TK, scores_TK: torch.softmax(logits_TK, -1),
        sums_to_1=lambda top_k: True,
    ),
    # Switch, ST-MoE: the entries of the softmax over all experts, as they are
    "softmax": Gate(
        score=lambda logits_TE, probs_TE: probs_TE,
        weigh=lambda logits_TK, scores_TK: scores_TK,
        sums_to_1=lambda top_k: False,
    ),
    "sigmoid": Gate(
        score=lambda logits_TE, probs_TE: torch.sigmoid(logits_TE),
        weigh=lambda logits_TK, scores_TK: normalised(scores_TK),
        sums_to_1=lambda top_k: top_k > 1,
    ),
}

# ---------------------------------------------------------------------------------------------------------------------
# Router losses: functions of what the router decided and of the sorted pairs, per MoE layer


def load_balance_loss(moe, routing, plan, n_sequences):
    """Switch eq. 4 with K choices: E * sum_e f_e P_e, f_e the choices per token on expert e, P_e its mean probability.
    K when balanced; gradient through P alone. P is of the gate's scores; those of sigmoid are divided by their sum.

    balance_scope says over which tokens f and P are taken:
        micro_batch   both over the micro-batch, as published
        step          f over the micro-batches of the step so far and over all ranks: Qwen (2501.11873), algorithm 1
        sequence      both within each sequence: DeepSeek-V3 (2412.19437) eq. 17-20
    """
    probs_TE, n_exp = routing.probs_TE, moe.config.n_exp
    if moe.config.gate == "sigmoid":  # as DeepSeek-V3, Megatron and OLMo-core do
        probs_TE = normalised(routing.scores_TE)
    count_E = plan.count_E.to(probs_TE.dtype)
    if moe.config.balance_scope == "sequence":
        chosen_TE = torch.zeros_like(probs_TE).scatter_(1, routing.expert_TK, 1.0)
        f_BE, P_BE = (x.view(n_sequences, -1, n_exp).mean(dim=1) for x in (chosen_TE, probs_TE))
        return n_exp * (f_BE * P_BE).sum(dim=1).mean()
    if moe.config.balance_scope == "step" and moe.training:  # in evaluation ranks may run different numbers of forwards
        f_E = load_in_step(moe.so_far, count_E, len(probs_TE))
    else:
        f_E = count_E / len(probs_TE)
    return n_exp * (f_E * probs_TE.mean(dim=0)).sum()


# Opaque to torch.compile, which would otherwise recompute the sum in backward from `so_far`, changed by then.
@torch.library.custom_op("moe::load_in_step", mutates_args=("so_far",))
def load_in_step(so_far: torch.Tensor, count_E: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """f_E, choices per token, of the step so far on all ranks, after adding this micro-batch to `so_far` (E + 1), which
    holds choices per expert, then tokens."""
    new = F.pad(count_E, (0, 1), value=n_tokens).to(so_far.dtype)
    if dist.is_initialized():
        dist.all_reduce(new)
    so_far.add_(new)
    return so_far[:-1].to(count_E.dtype) / so_far[-1]


@load_in_step.register_fake
def _(so_far, count_E, n_tokens):
    return torch.empty_like(count_E)


def router_z_loss(moe, routing, plan, n_sequences):
    """ST-MoE eq. 5: mean over tokens of logsumexp(logits)^2."""
    return torch.logsumexp(routing.logits_TE, dim=-1).square().mean()


class RouterLoss(NamedTuple):
    switch: str  # the setting that turns it on
    weight: str  # the setting of its weight in the loss
    formula: Callable  # (MoE, Routing, Plan, number of sequences) -> scalar


ROUTER_LOSSES = {
    "aux_loss": RouterLoss("use_aux_loss", "aux_loss_weight", load_balance_loss),
    "z_loss": RouterLoss("use_router_z_loss", "router_z_loss_weight", router_z_loss),
}

# ---------------------------------------------------------------------------------------------------------------------
# Balancing by a bias, without a loss: b_E is added to the scores for the choice of experts only, gates are of the
# unbiased scores. It moves once per step, by sums over the micro-batches and ranks of the step.

BINS = 4000  # of a histogram of margins over [-LARGEST, LARGEST]; 1,000 are too coarse for many or peaked experts
LARGEST = 1.0


def sign_step(bias_E, count_E, rate):
    """Wang 2024 (2408.15664), algorithm 1: the bias after a step with `count_E` choices per expert."""
    return bias_E + rate * torch.sign(count_E.mean() - count_E)


def margins_of(scores_TE, bias_E, top_k):
    """r_TE = alpha_T - s_TE: the bias above which token t chooses expert e while alpha_T stays.

    alpha_T is the (K+1)-th largest biased score of the token: the largest that is not chosen.
    """
    biased_TE = scores_TE + bias_E
    if top_k == biased_TE.shape[1]:  # every expert is chosen whatever the bias
        return torch.zeros_like(biased_TE)
    alpha_T = biased_TE.topk(top_k + 1, dim=-1).values[:, -1:]
    return alpha_T - scores_TE


def histogram(margins_TE):
    """Counts (E, M), float32, of each expert's margins in equal bins; those beyond the ends fall into the last bins."""
    bins_TE = ((margins_TE / LARGEST + 1) / 2 * BINS).long().clamp(0, BINS - 1)
    counts_EM = torch.zeros(margins_TE.shape[1], BINS, device=margins_TE.device)
    return counts_EM.scatter_add_(1, bins_TE.t(), torch.ones_like(bins_TE.t(), dtype=torch.float32))


def quantile_step(counts_EM, top_k):
    """Quantile balancing (J. Su; Kimi K3): from the histogram of a step's margins the bias with which each expert takes
    the fraction K / E of the step's tokens, mean-centred. No rate and no weight.

    Within a bin the margins count as evenly spread.
    """
    wanted_E1 = counts_EM.sum(1, keepdim=True) * top_k / counts_EM.shape[0]
    running_EM = counts_EM.cumsum(1)
    bin_E1 = (running_EM < wanted_E1).sum(1, keepdim=True).clamp(max=BINS - 1)
    inside_E1 = counts_EM.gather(1, bin_E1)
    before_E1 = running_EM.gather(1, bin_E1) - inside_E1
    place_E1 = bin_E1 + ((wanted_E1 - before_E1) / inside_E1.clamp(min=1)).clamp(0, 1)
    bias_E = (place_E1[:, 0] / BINS * 2 - 1) * LARGEST
    return bias_E - bias_E.mean()


# ---------------------------------------------------------------------------------------------------------------------
# Settings


@dataclass
class GPTConfig:
    """Settings of the model. ValueError, naming the field, for values that no model can have."""

    # shape
    block_size: Positive = 1024  # Positions
    vocab_size: Positive = 50304  # Vocabulary size: GPT-2's 50257 padded to a multiple of 64
    n_layer: Positive = 12  # Transformer blocks
    n_head: Positive = 12  # Attention heads per block
    n_embd: Positive = 768  # Width of the residual stream
    dropout: Fraction = 0.0  # Dropout rate: 0 for pretraining, 0.1 and more for finetuning
    bias: bool = True  # Biases in Linears, LayerNorms and experts, as in GPT-2
    qk_norm: bool = False  # RMS norm of queries and keys per head
    mlp_init: Literal["gpt2", "switch"] = "gpt2"  # Initialisation of all MLPs, dense and experts

    # mixture of experts (no effect with n_exp 1)
    n_exp: Positive = 1  # Experts per MoE layer; 1 is the dense model
    top_k: Positive = 2  # Experts per token
    stride: Positive = 2  # Every stride-th block is a MoE layer, from block 0, or first_dense
    first_dense: NotNegative = 0  # Leading blocks that stay dense
    expert_hidden: Positive | Literal["iso"] | None = None  # Width of an expert (default 4 n_embd; iso: dense FLOPs)
    n_shared_exp: NotNegative = 0  # Experts that every token passes, beside the routed ones
    gate: Literal[tuple(GATES)] = "topk_softmax"  # Weights of the chosen experts
    use_noisy_top_k: bool = False  # Learned noise on the router logits, in training
    router_use_full_prec: bool = False  # Router in float32 under autocast
    freeze_router: bool = False  # Router stays as drawn: the control that any trick must beat
    use_aux_loss: bool = False  # Load-balance loss
    aux_loss_weight: Rate = 0.01  # Weight of the load-balance loss
    balance_scope: Literal["micro_batch", "step", "sequence"] = "micro_batch"  # Tokens that aux_loss counts
    use_router_z_loss: bool = False  # Penalty on large router logits
    router_z_loss_weight: Rate = 0.001  # Weight of the router z-loss
    use_bias_balance: bool = False  # Balance by a bias on the selection that moves by a fixed rate, without a loss
    bias_balance_rate: Rate = 0.001  # Change of the selection bias per step
    use_quantile_balance: bool = False  # Balance by a bias from the quantiles of the step's scores, without a loss
    use_switch_tfm_init: bool = False  # MoE layers drawn from a truncated normal, std sqrt(scale / fan in)
    switch_tfm_init_scale: FiniteAboveZero = 1.0  # Scale of Switch's initialisation; the paper recommends 0.1
    train_capacity: AboveZero = 1.25  # Capacity factor of an expert in training; inf drops nothing
    eval_capacity: AboveZero = 2.0  # Capacity factor in validation
    min_capacity: Positive = 4  # Smallest capacity of an expert, tokens

    def __post_init__(self):
        check_ranges(self)
        parts = self.top_k + self.n_shared_exp
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.n_exp == 1:
            return
        if self.top_k > self.n_exp:
            raise ValueError(f"top_k {self.top_k} is more than n_exp {self.n_exp}: a token cannot pick an expert twice")
        if self.first_dense >= self.n_layer:
            raise ValueError(f"first_dense {self.first_dense} of n_layer {self.n_layer} leaves no MoE layer: lower it")
        if self.use_bias_balance and self.use_quantile_balance:
            raise ValueError("use_bias_balance and use_quantile_balance move the same bias: choose one")
        if self.expert_hidden == "iso" and self.hidden % parts:
            raise ValueError(f"expert_hidden iso is {self.hidden} / (top_k + n_shared_exp), which must be whole")

    @property
    def hidden(self):
        """Hidden width of the dense MLP."""
        return 4 * self.n_embd

    @property
    def hidden_of_expert(self):
        """Hidden width of an expert; "iso" gives a MoE layer the FLOPs of the dense one."""
        if self.expert_hidden == "iso":
            return self.hidden // (self.top_k + self.n_shared_exp)
        return self.expert_hidden or self.hidden

    def is_moe_layer(self, layer):
        return self.n_exp > 1 and layer >= self.first_dense and (layer - self.first_dense) % self.stride == 0


# ---------------------------------------------------------------------------------------------------------------------
# Route, sort, grouped products, combine


class MLP(nn.Module):
    def __init__(self, config, n_hidden, dropout):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, n_hidden, bias=config.bias)
        self.c_proj = nn.Linear(n_hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(Gelu.apply(self.c_fc(x))))


class Routing(NamedTuple):
    expert_TK: torch.Tensor  # int64, the chosen experts, best first
    gate_TK: torch.Tensor  # float32, their weights
    clean_TE: torch.Tensor  # float32, logits without noise
    logits_TE: torch.Tensor  # float32, with the noise that was added
    probs_TE: torch.Tensor  # float32, softmax over all experts
    scores_TE: torch.Tensor  # float32, those that the gate ranks by


class Router(nn.Module):
    """Chooses top_k experts for each token. A subclass may override `choose`."""

    def __init__(self, config):
        super().__init__()
        self.w_g = nn.Linear(config.n_embd, config.n_exp, bias=False)
        if config.use_noisy_top_k:
            self.w_noise = nn.Linear(config.n_embd, config.n_exp, bias=False)
        self.biased = config.use_bias_balance or config.use_quantile_balance
        if self.biased:
            self.register_buffer("balance_bias", torch.zeros(config.n_exp))
        self.requires_grad_(not config.freeze_router)
        self.config = config

    def product(self, x_TD, linear):
        """x_TD @ linear (T, E) as float32. Under autocast the product is bf16 unless router_use_full_prec."""
        if not self.config.router_use_full_prec:
            return at_least_float32(linear(x_TD))
        # Both are needed: autocast would make the product bf16, and input or weight may arrive in bf16.
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(at_least_float32(x_TD), at_least_float32(linear.weight))

    def logits(self, x_TD):
        """Router logits (T, E), float32, without and with noise.

        Shazeer eq. 4, in training: H(x) = x W_g + N(0, 1) * softplus(x W_noise).
        """
        clean_TE = self.product(x_TD, self.w_g)
        if not (self.config.use_noisy_top_k and self.training):
            return clean_TE, clean_TE
        noise_TE = torch.randn_like(clean_TE) * F.softplus(self.product(x_TD, self.w_noise))
        return clean_TE, clean_TE + noise_TE

    def choose(self, logits_TE, scores_TE):
        """Indices (T, K) of the chosen experts, best first. A balancing bias moves the choice only, not the gate."""
        ranked_TE = scores_TE + self.balance_bias if self.biased else logits_TE
        return ranked_TE.topk(self.config.top_k, dim=-1).indices

    def forward(self, x_TD):
        clean_TE, logits_TE = self.logits(x_TD)
        probs_TE = torch.softmax(logits_TE, dim=-1)
        gate = GATES[self.config.gate]
        scores_TE = gate.score(logits_TE, probs_TE)
        expert_TK = self.choose(logits_TE, scores_TE)
        gate_TK = gate.weigh(logits_TE.gather(1, expert_TK), scores_TE.gather(1, expert_TK))
        return Routing(expert_TK, gate_TK, clean_TE, logits_TE, probs_TE, scores_TE)


class Experts(nn.Module):
    """E two-layer MLPs as stacked tensors, (E, D, F) and (E, F, D)."""

    def __init__(self, config):
        super().__init__()
        E, D, H = config.n_exp, config.n_embd, config.hidden_of_expert
        self.c_fc = nn.Parameter(torch.empty(E, D, H))
        self.c_proj = nn.Parameter(torch.empty(E, H, D))
        self.fc_bias = nn.Parameter(torch.empty(E, 1, H)) if config.bias else None
        self.proj_bias = nn.Parameter(torch.empty(E, 1, D)) if config.bias else None

    def forward(self, x_TD, gate_TK, plan):
        """x (T, D) in the compute type -> (T, D), the chosen experts' outputs weighted by the gates."""
        fc, proj = self.c_fc.to(x_TD.dtype), self.c_proj.to(x_TD.dtype)
        fc_bias = proj_bias = None
        if self.fc_bias is not None:
            fc_bias, proj_bias = self.fc_bias.to(x_TD.dtype).squeeze(1), self.proj_bias.to(x_TD.dtype).squeeze(1)
        h_NF = Gelu.apply(grouped_linear(dispatch(x_TD, plan), fc, fc_bias, plan))
        return combine(grouped_linear(h_NF, proj, proj_bias, plan), gate_TK, plan)


class MoE(nn.Module):
    """Router and experts in the place of an MLP. A subclass may override `mix`."""

    # Statistics of a forward, see record(). All but the largest logit are means over the tokens.
    STATS = ("drop_frac", "entropy", "max_logit", "logit_var", "noise_var")

    def __init__(self, config):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        shared_hidden = config.n_shared_exp * config.hidden_of_expert  # all shared experts are one MLP
        self.shared = MLP(config, shared_hidden, dropout=0.0) if config.n_shared_exp else None
        self.dropout = nn.Dropout(config.dropout)
        self.config = config
        # Of the last forward, for the log; on the device until RouterStats reads them.
        self.register_buffer("count", torch.zeros(config.n_exp), persistent=False)  # choices per expert
        self.register_buffer("stats", torch.zeros(len(self.STATS)), persistent=False)
        if config.use_quantile_balance:  # histogram of margins per expert
            self.register_buffer("margins", torch.zeros(config.n_exp, BINS), persistent=False)
        if config.balance_scope == "step":  # choices per expert and tokens, of the step so far on all ranks
            self.register_buffer("so_far", torch.zeros(config.n_exp + 1, dtype=torch.int64), persistent=False)

    def capacity(self, n_tokens):
        """Most pairs that an expert takes, Switch eq. 3 with k choices; None where no pair can be dropped."""
        factor = self.config.train_capacity if self.training else self.config.eval_capacity
        wanted = self.config.top_k * factor * n_tokens / self.config.n_exp
        if wanted >= n_tokens:  # a token chooses an expert at most once
            return None
        capacity = math.floor(wanted)
        capacity = max(self.config.min_capacity, capacity + capacity % 2)
        return capacity if capacity < n_tokens else None

    def mix(self, x_TD, routing, plan, capacity):
        """Each token's experts, weighted by its gates: (T, D), in the compute type, as x is.

        Pairs beyond an expert's capacity count as 0.
        """
        gate_TK = routing.gate_TK
        if capacity is not None:
            kept_TK = (plan.place_N < capacity).view(self.config.top_k, -1).t()
            gate_TK = gate_TK * kept_TK
        return self.experts(x_TD, gate_TK, plan)

    def forward(self, x, dropless=False):
        """x (B, S, D) -> output (B, S, D) and {name: scalar} of the router losses that are on."""
        # Route: in float32 with router_use_full_prec, else in the compute type.
        x_TD = x.reshape(-1, x.shape[-1])
        rounded_TD = x_TD.to(compute_dtype(x_TD))  # one copy for all products
        routing = self.router(x_TD if self.config.router_use_full_prec else rounded_TD)

        # Sort the pairs by expert, run the experts, combine.
        plan = sort_by_expert(routing.expert_TK, self.config.n_exp)
        capacity = None if dropless else self.capacity(x_TD.shape[0])
        y_TD = self.mix(rounded_TD, routing, plan, capacity)
        if self.shared is not None:
            y_TD = y_TD + self.shared(rounded_TD)

        # Statistics and losses. Sampling and HellaSwag, which are dropless, log nothing of the router.
        if not dropless:
            self.record(routing, plan, capacity)
        losses = {}
        for name, loss in ROUTER_LOSSES.items():
            if getattr(self.config, loss.switch):
                losses[name] = loss.formula(self, routing, plan, x.shape[0])
        return self.dropout(y_TD).view(x.shape), losses

    @torch.no_grad()
    def record(self, routing, plan, capacity):
        """Choices per expert; dropped fraction, entropy, largest |logit|, variances of clean logits and of noise.

        Variances are over the experts, mean over the tokens: a part that all experts share moves no choice.
        """
        logits_TE, clean_TE, none = routing.logits_TE, routing.clean_TE, self.stats.new_zeros(())
        dropped = none if capacity is None else (plan.place_N >= capacity).float().mean()
        entropy = -(routing.probs_TE * torch.log_softmax(logits_TE, dim=-1)).sum(-1).mean()
        noise_var = none if logits_TE is clean_TE else (logits_TE - clean_TE).var(-1).mean()
        self.count.copy_(plan.count_E)
        self.stats.copy_(torch.stack([dropped, entropy, logits_TE.abs().max(), clean_TE.var(-1).mean(), noise_var]))
        if self.config.use_quantile_balance and self.training:
            margins_TE = margins_of(routing.scores_TE, self.router.balance_bias, self.config.top_k)
            self.margins.copy_(histogram(margins_TE))


class RouterStats:
    """What the routers did in several micro-batches: sums on the device, then one all-reduce and one transfer."""

    def __init__(self, model):
        self.layers, self.config, self.n_forwards = model.moe_layers(), model.config, 0
        device, n_layers = model.lm_head.weight.device, len(self.layers)
        width = len(MoE.STATS) + self.config.n_exp * (1 + BINS * self.config.use_quantile_balance)
        self.sums_L = torch.zeros(n_layers, width, device=device)  # a row: STATS, choices per expert, histogram
        self.largest_L = torch.full((n_layers,), -math.inf, device=device)

    def add(self):
        """Add the last forward, which was not dropless."""
        self.n_forwards += 1
        for i, (_, moe) in enumerate(self.layers):
            histogram = [moe.margins.flatten()] if self.config.use_quantile_balance else []
            self.sums_L[i] += torch.cat([moe.stats, moe.count, *histogram])
            self.largest_L[i] = torch.maximum(self.largest_L[i], moe.stats[2])

    def reduce(self, others, rank=0, world_size=1):
        """Sums over the ranks, on the host: (list of the sums of the 1-D tensor `others`, a dict per MoE layer).

        Of a layer: load (fraction of choices per expert), max_vio (Wang 2024: max load / mean load - 1), drop_frac (of
        choices), entropy (nats), max_logit (largest |logit|), logit_std and noise_std (over the experts).
        """
        # The largest of all ranks by a sum: each rank fills its own row. Forwards are summed too: they may differ.
        largest_RL = self.largest_L.new_zeros(world_size, len(self.layers))
        largest_RL[rank] = self.largest_L
        forwards = others.new_full((1,), self.n_forwards)
        sums = torch.cat([others, forwards, self.sums_L.flatten(), largest_RL.flatten()])
        if world_size > 1:
            dist.all_reduce(sums)
        others, forwards, table, largest = sums.split([len(others), 1, self.sums_L.numel(), largest_RL.numel()])
        self.sums_L = table.view(self.sums_L.shape)

        n_stats = len(MoE.STATS)
        means = self.sums_L[:, : n_stats + self.config.n_exp] / forwards
        means[:, 2] = largest.view(world_size, -1).amax(0)
        host = torch.cat([others, means.flatten()]).tolist()
        others, rows = host[: len(others)], iter(host[len(others) :])
        stats = []
        for layer, _ in self.layers:
            found = {name: next(rows) for name in MoE.STATS}
            load = [next(rows) for _ in range(self.config.n_exp)]
            load = [count / max(1e-9, sum(load)) for count in load]
            found |= {"layer": layer, "load": load, "max_vio": max(load) * len(load) - 1}
            found["logit_std"], found["noise_std"] = found.pop("logit_var") ** 0.5, found.pop("noise_var") ** 0.5
            stats.append(found)
        return others, stats

    @torch.no_grad()
    def move_biases(self):
        """Move the selection biases, if there are any. Once per step, after reduce()."""
        n_stats, n_exp = len(MoE.STATS), self.config.n_exp
        for (_, moe), row in zip(self.layers, self.sums_L, strict=True):
            if self.config.use_bias_balance:
                count_E, bias_E = row[n_stats : n_stats + n_exp], moe.router.balance_bias
                bias_E.copy_(sign_step(bias_E, count_E, self.config.bias_balance_rate))
            elif self.config.use_quantile_balance:
                histogram_EM = row[n_stats + n_exp :].view(n_exp, BINS)
                moe.router.balance_bias.copy_(quantile_step(histogram_EM, self.config.top_k))


# ---------------------------------------------------------------------------------------------------------------------
# The transformer


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout, self.qk_norm, self.layer = config.n_head, config.dropout, config.qk_norm, layer

    def forward(self, x, attn_mask=None, cache=None):
        B, S, D = x.shape
        heads = [part.view(B, S, self.n_head, D // self.n_head) for part in self.c_attn(x).split(D, dim=2)]
        q, k, v = (part.transpose(1, 2) for part in heads)  # (B, n_head, S, head width)
        if self.qk_norm:  # without weights (2302.05442 has them); float32 under CUDA's autocast, hence the cast
            q, k = (F.rms_norm(part, part.shape[-1:]).to(v.dtype) for part in (q, k))
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        dtype = q.dtype
        # On the CPU the bf16 backward has a fixed cost per head: short rows are faster in float32.
        if x.device.type == "cpu" and dtype == torch.bfloat16 and k.shape[2] <= 128 and torch.is_grad_enabled():
            q, k, v = q.float(), k.float(), v.float()
        dropout = self.dropout if self.training else 0.0
        causal = attn_mask is None and k.shape[2] == S
        with torch.autocast(x.device.type, enabled=False):
            y = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p=dropout, is_causal=causal)
        return self.resid_dropout(self.c_proj(y.to(dtype).transpose(1, 2).reshape(B, S, D)))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.is_moe = config.is_moe_layer(layer)
        self.mlp = MoE(config) if self.is_moe else MLP(config, config.hidden, config.dropout)

    def forward(self, x, attn_mask=None, cache=None, dropless=False):
        """x (B, S, D) -> (B, S, D) and the router losses of this layer, {} for a dense one."""
        x = x + self.attn(self.ln_1(x), attn_mask, cache)
        if not self.is_moe:
            return x + self.mlp(self.ln_2(x)), {}
        y, losses = self.mlp(self.ln_2(x), dropless)
        return x + y, losses


class Output(NamedTuple):
    loss: torch.Tensor | None  # scalar, the optimised one: ce_loss + weighted router losses
    ce_loss: torch.Tensor | None  # scalar, nats per token; (B, S) with reduction="none"
    losses: dict  # {name: scalar} of the router losses that are on, unweighted, summed over MoE layers
    logits: torch.Tensor | None  # (B, S, V) when there are no targets, else None

    @property
    def aux_loss(self):
        return self.losses.get("aux_loss", torch.zeros(()))

    @property
    def z_loss(self):
        return self.losses.get("z_loss", torch.zeros(()))


class GPT(nn.Module):
    """`GPT(config)` draws its weights from `generator`, or from torch's default one."""

    cross_entropy = staticmethod(linear_cross_entropy)

    def __init__(self, config: GPTConfig, generator: torch.Generator | None = None):
        super().__init__()
        if config.n_exp > 1 and config.top_k == 1 and config.gate == "topk_softmax":
            warnings.warn(
                "top_k=1 with gate='topk_softmax' gives the router no gradient from the cross-entropy (a softmax over "
                "one logit is 1), as in the published top-1 runs; set gate='softmax' for a top-1 router that learns",
                stacklevel=2,
            )
        self.config = config
        with torch.random.fork_rng(devices=[]):  # torch's modules draw weights when made; init_weights draws again
            self.transformer = nn.ModuleDict({
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            })
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        if not self.lm_head.weight.is_meta:
            self.init_weights(generator)

    @torch.no_grad()
    def init_weights(self, generator=None):
        """GPT-2's initialisation; Switch's (page 10) for the weights that switch_init_scale() names."""
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)  # two residual additions per block
        normal = (
            "wte.weight", "wpe.weight", "c_attn.weight", "c_fc.weight", "experts.c_fc", "w_g.weight", "w_noise.weight",
        )
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif ".ln_" in name:
                nn.init.ones_(p)
            elif self.switch_init_scale(name):
                fan_in = p.shape[-2] if ".experts." in name else p.shape[-1]  # Experts keep (in, out), Linear (out, in)
                std = math.sqrt(self.switch_init_scale(name) / fan_in)
                nn.init.trunc_normal_(p, std=std, a=-2 * std, b=2 * std, generator=generator)
            elif name.endswith(("c_proj.weight", "experts.c_proj")):
                nn.init.normal_(p, std=residual_std, generator=generator)
            elif name.endswith(normal):
                nn.init.normal_(p, std=0.02, generator=generator)
            else:
                raise RuntimeError(f"no initialisation for {name}")

    def switch_init_scale(self, name):
        """Scale of Switch's initialisation for this weight; None where GPT-2's is due.

        mlp_init: every MLP, dense and experts alike. use_switch_tfm_init: routers and experts, as the paper does.
        """
        if self.config.mlp_init == "switch" and ".mlp." in name and ".router." not in name:
            return 1.0
        if self.config.use_switch_tfm_init and (".router." in name or ".experts." in name):
            return self.config.switch_tfm_init_scale
        return None

    def forward(self, idx, targets=None, reduction="mean", dropless=False):
        """idx, targets int64 (B, S), target -1 ignored -> Output. `dropless` lifts the capacity, as sampling does."""
        h, losses = self.run_blocks(idx, dropless=dropless)
        if targets is None:
            return Output(None, None, losses, self.lm_head(h))
        h = h.to(compute_dtype(h)).flatten(0, 1)
        ce = self.cross_entropy(h, self.lm_head.weight, targets.flatten(), reduction)
        loss = ce if reduction == "mean" else ce.sum() / (targets >= 0).sum()
        for name, value in losses.items():
            loss = loss + getattr(self.config, ROUTER_LOSSES[name].weight) * value
        return Output(loss, ce if reduction == "mean" else ce.view(targets.shape), losses, None)

    def hidden_states(self, idx, positions=None, attn_mask=None, cache=None, dropless=False):
        """Final hidden states (B, S, D), the input of lm_head.

        positions int64 (S,) or (B, S), default 0, 1, ... after those in the cache; attn_mask bool, True = attend,
        broadcastable to (B, n_head, S, all S so far), default causal; cache from new_cache(), idx then new tokens only.
        """
        return self.run_blocks(idx, positions, attn_mask, cache, dropless)[0]

    def run_blocks(self, idx, positions=None, attn_mask=None, cache=None, dropless=False):
        S, seen = idx.shape[1], 0 if cache is None else cache.length
        if positions is None:
            if seen + S > self.config.block_size:
                raise ValueError(f"{seen + S} tokens are more than block_size {self.config.block_size}")
            positions = torch.arange(seen, seen + S, device=idx.device)
        if attn_mask is None and seen and S > 1:  # causal, the new tokens standing last
            attn_mask = torch.ones(S, seen + S, dtype=torch.bool, device=idx.device).tril(seen)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        losses = {}
        for block in self.transformer.h:
            x, of_layer = block(x, attn_mask, cache, dropless)
            for name, value in of_layer.items():
                losses[name] = losses.get(name, 0) + value
        if cache is not None:
            cache.length += S
        return self.transformer.ln_f(x), losses

    def new_cache(self, batch_size):
        """An empty KVCache for `batch_size` sequences, in the type the attention runs in."""
        weight = self.lm_head.weight
        return KVCache(self.config, batch_size, weight.device, compute_dtype(weight))

    def moe_layers(self):
        """(layer number, MoE) of each MoE layer."""
        return [(layer, block.mlp) for layer, block in enumerate(self.transformer.h) if block.is_moe]

    def start_step(self):
        """Forget what the micro-batches of the last step have counted (balance_scope step)."""
        if self.config.balance_scope == "step":
            for _, moe in self.moe_layers():
                moe.so_far.zero_()

    def num_params(self):
        """Parameters without the position embeddings, as nanoGPT counts; the tied output projection counts once."""
        return sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()

    def num_active_params(self):
        """Those of them that one token uses: top_k of the n_exp experts."""
        experts = sum(p.numel() for _, moe in self.moe_layers() for p in moe.experts.parameters())
        return self.num_params() - experts + experts * self.config.top_k // self.config.n_exp

    def estimate_flops_per_token(self, T):
        """Training FLOPs per token, forward and backward, at sequence length T: PaLM (2204.02311) appendix B."""
        return 6 * self.num_active_params() + 12 * self.config.n_layer * self.config.n_embd * T
