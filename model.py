"""GPT-2 and its Mixture-of-Experts variants: settings, router, experts, attention, the model.

    out = GPT(GPTConfig(n_exp=8, use_aux_loss=True))(idx, targets)
    out.loss.backward()          # cross-entropy + weighted router losses;  out.ce_loss is the cross-entropy alone
"""

import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lab.common import AboveZero, FiniteAboveZero, Fraction, NotNegative, Positive, Rate, find_bad_setting
from lab.kernels import (
    ExpertMLPs,
    Gelu,
    KVCache,
    at_least_float32,
    compute_dtype,
    linear_cross_entropy,
    linear_cross_entropy_with_z_loss,
    sort_by_expert,
)

# ---------------------------------------------------------------------------------------------------------------------
# What the load-balance loss counts. (MoE, Routing, Plan, number of sequences) -> scalar, gradient through P alone; in
# training with the scope step it is (2, E), load and P, of which losses_in_step() makes the scalar after the last layer


def balance_in_micro_batch(moe, routing, plan, n_sequences):
    f_E, P_E = plan.count_E / routing.logits_TE.shape[0], routing.probs_TE.mean(dim=0)
    return moe.config.n_exp * (f_E * P_E).sum()


def balance_in_step(moe, routing, plan, n_sequences):
    if not moe.training:  # only in training do all ranks run the same number of forwards
        return balance_in_micro_batch(moe, routing, plan, n_sequences)
    P_E = routing.probs_TE.mean(dim=0)
    return torch.stack([plan.count_E.to(P_E.dtype), P_E])


def losses_in_step(so_far, of_layers, n_tokens):
    """The load-balance loss of each of the L MoE layers, by one all-reduce for all of them.

    so_far (L, E + 1): choices per expert, then tokens, of the step so far on all ranks; this micro-batch is added.
    of_layers: the values of balance_in_step for the micro-batch of this rank, which has n_tokens.
    """
    count_LE, P_LE = torch.stack(of_layers).unbind(1)
    f_LE = load_in_step(so_far, count_LE.detach(), n_tokens)
    return [len(f_E) * (f_E * P_E).sum() for f_E, P_E in zip(f_LE, P_LE, strict=True)]


# Opaque to torch.compile, which would otherwise recompute the sum in backward from `so_far`, changed by then.
@torch.library.custom_op("moe::load_in_step", mutates_args=("so_far",))
def load_in_step(so_far: torch.Tensor, count_LE: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """f_LE, choices per token, of the step so far on all ranks, after adding this micro-batch to `so_far`."""
    new = F.pad(count_LE, (0, 1), value=n_tokens).to(so_far.dtype)
    if dist.is_initialized():
        dist.all_reduce(new)
    so_far.add_(new)
    return (so_far[:, :-1] / so_far[:, -1:]).to(count_LE.dtype)


@load_in_step.register_fake
def _(so_far, count_LE, n_tokens):
    return torch.empty_like(count_LE, memory_format=torch.contiguous_format)


def balance_in_sequence(moe, routing, plan, n_sequences):
    chosen_TE = torch.zeros_like(routing.probs_TE).scatter_(1, routing.expert_TK, 1.0)
    f_BE, P_BE = (x.view(n_sequences, -1, x.shape[1]).mean(dim=1) for x in (chosen_TE, routing.probs_TE))
    return moe.config.n_exp * (f_BE * P_BE).sum(dim=1).mean()


SCOPES = {"micro_batch": balance_in_micro_batch, "step": balance_in_step, "sequence": balance_in_sequence}

# ---------------------------------------------------------------------------------------------------------------------
# The bias after a step

BINS = 4000  # of a histogram of margins over [-LARGEST, LARGEST]; 1,000 are too coarse for many or peaked experts
LARGEST = 1.0


def sign_step(bias_E, count_E, rate):
    """The bias after a step with `count_E` choices per expert."""
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
    """The bias from the histogram of a step's margins: the (K/E)-quantile of each expert, mean-centred.

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
# Gates: by which score experts are ranked, and how the chosen ones are weighted


class Gate(NamedTuple):
    score: Callable  # (logits_TE, probs_TE) -> (T, E)
    weigh: Callable  # (logits_TK, scores_TK), those of the chosen experts -> (T, K)


GATES = {
    # Shazeer eq. 3, Mixtral: softmax over the selected; the constant 1, without gradient, at K = 1
    "topk_softmax": Gate(
        lambda logits_TE, probs_TE: probs_TE, lambda logits_TK, scores_TK: torch.softmax(logits_TK, -1)
    ),
    # Switch, ST-MoE: the entries of the softmax over all experts, as they are
    "softmax": Gate(lambda logits_TE, probs_TE: probs_TE, lambda logits_TK, scores_TK: scores_TK),
    # DeepSeek-V3 (2412.19437) eq. 13: normalised over the selection for K > 1
    "sigmoid": Gate(
        lambda logits_TE, probs_TE: torch.sigmoid(logits_TE),
        lambda logits_TK, scores_TK: (
            scores_TK / scores_TK.sum(-1, keepdim=True) if scores_TK.shape[1] > 1 else scores_TK
        ),
    ),
}

# ---------------------------------------------------------------------------------------------------------------------
# Router losses: functions of what the router decided and of the sorted pairs, per MoE layer


def load_balance_loss(moe, routing, plan, n_sequences):
    """Switch eq. 4 with k choices: E * sum_e f_e P_e, gradient through P alone; k when balanced."""
    return SCOPES[moe.config.balance_scope](moe, routing, plan, n_sequences)


def router_z_loss(moe, routing, plan, n_sequences):
    """ST-MoE eq. 5: mean over tokens of logsumexp(logits)^2, over all logits or over the selected ones."""
    logits = routing.logits_TE
    if moe.config.z_loss_on == "selected":
        logits = logits.gather(1, routing.expert_TK)
    return torch.logsumexp(logits, dim=-1).square().mean()


class RouterLoss(NamedTuple):
    switch: str  # the setting that turns it on
    weight: str  # the setting of its weight in the loss
    formula: Callable  # (MoE, Routing, Plan, number of sequences) -> scalar


ROUTER_LOSSES = {
    "aux_loss": RouterLoss("use_aux_loss", "aux_loss_weight", load_balance_loss),
    "z_loss": RouterLoss("use_router_z_loss", "router_z_loss_weight", router_z_loss),
}

# ---------------------------------------------------------------------------------------------------------------------
# Settings


ExpertWidth = Positive | Literal["iso"] | None


@dataclass(kw_only=True)  # the positional arguments of GPTConfig stay GPT-2's
class MoESettings:
    """Settings of the MoE layers; a part of GPTConfig, which has n_embd, n_layer and the checks of single values."""

    # mixture of experts (no effect with --n_exp 1)
    n_exp: Positive = 1  # Experts per MoE layer; 1 is the dense model
    top_k: Positive = 2  # Experts per token
    stride: Positive = 2  # Every stride-th block is a MoE layer, from block 0, or first_dense
    first_dense: NotNegative = 0  # Leading blocks that stay dense
    expert_hidden: ExpertWidth = None  # Hidden width of an expert (default: 4 x n_embd; iso: the FLOPs of a dense MLP)
    shared_expert_hidden: Positive | None = None  # Hidden width of a shared expert (default: that of the others)
    use_noisy_top_k: bool = False  # Learned noise on the router logits, in training
    use_aux_loss: bool = False  # Load-balance loss
    use_router_z_loss: bool = False  # Penalty on large router logits
    use_switch_tfm_init: bool = False  # MoE layers drawn from a truncated normal, std sqrt(scale / fan in)
    router_use_full_prec: bool = False  # Router in float32 under autocast
    switch_tfm_init_scale: FiniteAboveZero = 1.0  # Scale of that initialisation; the paper recommends 0.1
    gate: Literal[tuple(GATES)] = "topk_softmax"  # Weights of the chosen experts
    gate_scale: FiniteAboveZero = 1.0  # Factor on those weights
    noise_scale: Rate = 1.0  # Factor on the router noise
    freeze_router: bool = False  # Router stays as drawn: the control that any trick must beat
    z_loss_on: Literal["all", "selected"] = "all"  # Logits in the router z-loss
    use_bias_balance: bool = False  # Balance by a bias on the selection that moves by a fixed rate, without a loss
    use_quantile_balance: bool = False  # Balance by a bias from the quantiles of the step's scores, without a loss
    bias_balance_rate: Rate = 0.001  # Change of the selection bias per step
    n_shared_exp: NotNegative = 0  # Experts that every token passes, beside the routed ones
    aux_loss_weight: Rate = 0.01  # Weight of the load-balance loss
    router_z_loss_weight: Rate = 0.001  # Weight of the router z-loss
    balance_scope: Literal[tuple(SCOPES)] = "micro_batch"  # Tokens over which the load-balance loss counts
    train_capacity: AboveZero = 1.25  # Capacity factor of an expert in training; inf drops nothing
    eval_capacity: AboveZero = 2.0  # Capacity factor in validation
    min_capacity: Positive = 4  # Smallest capacity of an expert, tokens

    def check_experts(self):
        """Refuse what no MoE layer can have, and settings of a part that is off."""
        if self.top_k > self.n_exp:
            raise ValueError(f"top_k {self.top_k} is more than n_exp {self.n_exp}: a token cannot pick an expert twice")
        if self.first_dense >= self.n_layer:
            raise ValueError(f"first_dense {self.first_dense} of n_layer {self.n_layer} leaves no MoE layer: lower it")
        if self.use_bias_balance and self.use_quantile_balance:
            raise ValueError("use_bias_balance and use_quantile_balance move the same bias: choose one")
        parts = self.top_k + self.n_shared_exp
        if self.expert_hidden == "iso" and (self.hidden % parts or self.shared_expert_hidden):
            of = f"4 n_embd / (top_k + n_shared_exp) = {self.hidden} / {parts}, of shared experts too"
            raise ValueError(f"expert_hidden iso is {of}: make it a whole number without shared_expert_hidden")
        for name, off, part in (
            ("z_loss_on", "all", "use_router_z_loss"), ("noise_scale", 1.0, "use_noisy_top_k"),
            ("shared_expert_hidden", None, "n_shared_exp"),
        ):  # fmt: skip
            if getattr(self, name) != off and not getattr(self, part):
                raise ValueError(f"{name} {getattr(self, name)} has no effect without {part}: set that too")

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

    @property
    def hidden_of_shared(self):
        """Hidden width of all shared experts together."""
        return self.n_shared_exp * (self.shared_expert_hidden or self.hidden_of_expert)

    def is_moe_layer(self, layer: int) -> bool:
        return self.n_exp > 1 and layer >= self.first_dense and (layer - self.first_dense) % self.stride == 0

    @staticmethod
    def moe_fields():
        """The settings that have no effect in a dense model: all of these but n_exp."""
        return tuple(field.name for field in dataclasses.fields(MoESettings) if field.name != "n_exp")


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
        return clean_TE, clean_TE + self.config.noise_scale * noise_TE

    def choose(self, logits_TE, scores_TE):
        """Indices (T, K) of the chosen experts, best first.

        With bias balancing the bias moves the choice only: the gate is of the unbiased score.
        """
        ranked_TE = scores_TE + self.balance_bias if self.biased else logits_TE
        return ranked_TE.topk(self.config.top_k, dim=-1).indices

    def forward(self, x_TD):
        clean_TE, logits_TE = self.logits(x_TD)
        probs_TE = torch.softmax(logits_TE, dim=-1)
        gate = GATES[self.config.gate]
        scores_TE = gate.score(logits_TE, probs_TE)
        expert_TK = self.choose(logits_TE, scores_TE)
        gate_TK = gate.weigh(logits_TE.gather(1, expert_TK), scores_TE.gather(1, expert_TK))
        return Routing(expert_TK, self.config.gate_scale * gate_TK, clean_TE, logits_TE, probs_TE, scores_TE)


class Experts(nn.Module):
    """E two-layer MLPs as stacked tensors, (E, D, F) and (E, F, D)."""

    def __init__(self, config):
        super().__init__()
        E, D, H = config.n_exp, config.n_embd, config.hidden_of_expert
        self.c_fc = nn.Parameter(torch.empty(E, D, H))
        self.c_proj = nn.Parameter(torch.empty(E, H, D))
        self.fc_bias = nn.Parameter(torch.empty(E, 1, H)) if config.bias else None
        self.proj_bias = nn.Parameter(torch.empty(E, 1, D)) if config.bias else None

    def forward(self, x_TD, expert_TK, gate_TK, plan):
        """x (T, D) in the compute type -> (T, D), the chosen experts' outputs weighted by the gates."""
        fc, proj, fc_bias, proj_bias = (
            p if p is None else p.to(x_TD.dtype) for p in (self.c_fc, self.c_proj, self.fc_bias, self.proj_bias)
        )
        fc_bias, proj_bias = (b if b is None else b.squeeze(1) for b in (fc_bias, proj_bias))
        return ExpertMLPs.apply(
            x_TD, expert_TK, gate_TK, fc, fc_bias, proj, proj_bias, plan.row_N, plan.pair_N, plan.ends_E
        )


class MoE(nn.Module):
    """Router and experts in the place of an MLP. A subclass may override `mix`."""

    MAX_LOGIT, COUNTS = 2, 5  # columns of router_table: the largest |logit|, the first of the counts

    def __init__(self, config):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared = MLP(config, config.hidden_of_shared, dropout=0.0) if config.n_shared_exp else None
        self.dropout = nn.Dropout(config.dropout)
        self.config = config
        # Statistics of the last forward, for the log: they stay on the device until GPT.router_stats() reads them.
        self.register_buffer("count", torch.zeros(config.n_exp), persistent=False)  # choices per expert
        self.register_buffer("stats", torch.zeros(self.COUNTS), persistent=False)  # see record()
        if config.use_quantile_balance:  # histogram of margins per expert
            self.register_buffer("margins", torch.zeros(config.n_exp, BINS), persistent=False)

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
        return self.experts(x_TD, routing.expert_TK, gate_TK, plan)

    def forward(self, x, dropless=False):
        """x (B, S, D) -> output (B, S, D) and {name: scalar} of the router losses that are on.

        With balance_scope step the load-balance loss is still a pair of vectors in training.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        rounded_TD = x_TD.to(compute_dtype(x_TD))  # one copy for all products
        routing = self.router(x_TD if self.config.router_use_full_prec else rounded_TD)
        plan = sort_by_expert(routing.expert_TK, self.config.n_exp)
        capacity = None if dropless else self.capacity(x_TD.shape[0])
        y_TD = self.mix(rounded_TD, routing, plan, capacity)
        if self.shared is not None:
            y_TD = y_TD + self.shared(rounded_TD)
        if not dropless:  # sampling and HellaSwag log nothing of the router
            self.record(routing, plan, capacity)
        losses = {
            name: loss.formula(self, routing, plan, x.shape[0])
            for name, loss in ROUTER_LOSSES.items()
            if getattr(self.config, loss.switch)
        }
        return self.dropout(y_TD).view(x.shape), losses

    @torch.no_grad()
    def record(self, routing, plan, capacity):
        """Choices per expert; dropped fraction, entropy, largest |logit|, variances of clean logits and of noise.

        Variances are over the experts, mean over the tokens: a part that all experts share moves no choice.
        """
        logits_TE, clean_TE, none = routing.logits_TE, routing.clean_TE, self.stats.new_zeros(())
        dropped = none if capacity is None else (plan.place_N >= capacity).float().mean()
        entropy = -(routing.probs_TE * torch.log_softmax(logits_TE, dim=-1)).sum(-1).mean()
        noise_variance = none if logits_TE is clean_TE else (logits_TE - clean_TE).var(-1).mean()
        self.count.copy_(plan.count_E)
        self.stats.copy_(
            torch.stack([dropped, entropy, logits_TE.abs().max(), clean_TE.var(-1).mean(), noise_variance])
        )
        if self.config.use_quantile_balance and self.training:
            margins_TE = margins_of(routing.scores_TE, self.router.balance_bias, self.config.top_k)
            self.margins.copy_(histogram(margins_TE))

# ---------------------------------------------------------------------------------------------------------------------
# Settings and output


MLP_INITS = ("gpt2", "switch", "switch_fc")


@dataclass
class GPTConfig(MoESettings):
    """Settings of the model, those of its experts (moe.py) included.

    Raises ValueError, naming the field, for values that no model can have.
    """

    # shape
    block_size: Positive = 1024  # Positions
    vocab_size: Positive = 50304  # Vocabulary size: GPT-2's 50257 padded to a multiple of 64
    n_layer: Positive = 12  # Transformer blocks
    n_head: Positive = 12  # Attention heads per block
    n_embd: Positive = 768  # Width
    dropout: Fraction = 0.0  # Dropout rate: 0 for pretraining, 0.1 and more for finetuning
    bias: bool = True  # Biases in Linears, LayerNorms and experts, as in GPT-2
    mlp_init: Literal[MLP_INITS] = "gpt2"  # All MLPs, dense and experts; switch_fc: their first product alone
    mlp_init_scale: FiniteAboveZero = 1.0  # Scale of mlp_init switch and switch_fc; the paper recommends 0.1
    qk_norm: bool = False  # RMS norm of queries and keys per head
    output_z_loss_weight: Rate = 0.0  # Weight of the mean squared logsumexp of the output logits

    def __post_init__(self):
        if self.balance_scope == "global":
            raise ValueError("balance_scope global is called step now, and counts over the micro-batches of a step too")
        if bad := find_bad_setting(self):
            raise ValueError(f"{bad[0]} {bad[1]}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.mlp_init == "gpt2" and self.mlp_init_scale != 1.0:
            raise ValueError("mlp_init_scale is the scale of mlp_init switch: set that too")
        if self.n_exp > 1:
            self.check_experts()
        elif width := self.expert_hidden or self.shared_expert_hidden:
            name = "expert_hidden" if self.expert_hidden else "shared_expert_hidden"
            raise ValueError(f"{name} {width} needs experts: set n_exp too, or leave it out")


MODEL_FIELDS = tuple(field.name for field in dataclasses.fields(GPTConfig))


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


# ---------------------------------------------------------------------------------------------------------------------
# Attention


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout, self.qk_norm, self.layer = config.n_head, config.dropout, config.qk_norm, layer

    def forward(self, x, attn_mask=None, cache=None):
        B, S, D = x.shape
        q, k, v = (
            part.view(B, S, self.n_head, D // self.n_head).transpose(1, 2)  # (B, n_head, S, head width)
            for part in self.c_attn(x).split(D, dim=2)
        )
        if self.qk_norm:  # without weights (2302.05442 has them)
            q, k = (F.rms_norm(part, part.shape[-1:]).to(v.dtype) for part in (q, k))  # float32 under CUDA's autocast
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        dtype = q.dtype
        # On the CPU the bf16 backward has a fixed cost per head: short rows are faster in float32.
        if x.device.type == "cpu" and dtype == torch.bfloat16 and k.shape[2] <= 128 and torch.is_grad_enabled():
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast(x.device.type, enabled=False):
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask, dropout_p=self.dropout if self.training else 0.0,
                is_causal=attn_mask is None and k.shape[2] == S,
            )  # fmt: skip
        return self.resid_dropout(self.c_proj(y.to(dtype).transpose(1, 2).reshape(B, S, D)))


# ---------------------------------------------------------------------------------------------------------------------
# The transformer


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


class GPT(nn.Module):
    """`GPT(config)` draws its weights from `generator`, or from torch's default one."""

    cross_entropy = staticmethod(linear_cross_entropy)
    cross_entropy_with_z_loss = staticmethod(linear_cross_entropy_with_z_loss)

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
            self.build(config)
        if not self.lm_head.weight.is_meta:
            self.init_weights(generator)

    def build(self, config):
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        if config.balance_scope == "step":  # per MoE layer, of the step so far on all ranks: choices per expert, tokens
            counts = torch.zeros(len(self.moe_layers()), config.n_exp + 1, dtype=torch.int64)
            self.register_buffer("so_far", counts, persistent=False)

    @torch.no_grad()
    def init_weights(self, generator=None):
        """GPT-2's initialisation; Switch's (page 10) for the weights that switch_init_scale() names."""
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)  # two residual additions a block
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
            elif name.endswith(("wte.weight", "wpe.weight", "c_attn.weight", "c_fc.weight", "experts.c_fc",
                                "w_g.weight", "w_noise.weight")):  # fmt: skip
                nn.init.normal_(p, std=0.02, generator=generator)
            else:
                raise RuntimeError(f"no initialisation for {name}")

    def switch_init_scale(self, name):
        """Scale of Switch's initialisation for this weight; None where GPT-2's is due.

        mlp_init: every MLP, dense and experts alike; with switch_fc their first product alone, as the published code
        does, which overwrites the residual projections. use_switch_tfm_init: routers and experts, as the paper does.
        """
        config = self.config
        of_mlp = ".mlp." in name and ".router." not in name
        if of_mlp and (config.mlp_init == "switch" or (config.mlp_init == "switch_fc" and ".c_fc" in name)):
            return config.mlp_init_scale
        if config.use_switch_tfm_init and (".router." in name or ".experts." in name):
            return config.switch_tfm_init_scale
        return None

    def forward(self, idx, targets=None, reduction="mean", dropless=False):
        """idx, targets int64 (B, S), target -1 ignored -> Output. `dropless` lifts the capacity, as sampling does."""
        h, losses = self.run_blocks(idx, dropless=dropless)
        if targets is None:
            return Output(None, None, losses, self.lm_head(h))
        h = h.to(compute_dtype(h))
        h, weight, z_weight = h.flatten(0, 1), self.lm_head.weight, self.config.output_z_loss_weight
        if z_weight and reduction == "mean" and torch.is_grad_enabled():
            loss, ce, z_loss = self.cross_entropy_with_z_loss(h, weight, targets.flatten(), z_weight)
        else:
            ce = self.cross_entropy(h, weight, targets.flatten(), reduction)
            loss = ce if reduction == "mean" else ce.sum() / (targets >= 0).sum()
        for name, value in losses.items():
            loss = loss + getattr(self.config, ROUTER_LOSSES[name].weight) * value
        if z_weight and reduction == "mean" and torch.is_grad_enabled():
            losses = losses | {"output_z_loss": z_loss}
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
                losses.setdefault(name, []).append(value)
        if cache is not None:
            cache.length += S
        if "aux_loss" in losses and self.config.balance_scope == "step" and self.training:
            losses["aux_loss"] = losses_in_step(self.so_far, losses["aux_loss"], idx.numel())
        return self.transformer.ln_f(x), {name: sum(of_layers) for name, of_layers in losses.items()}

    def new_cache(self, batch_size):
        """An empty KVCache for `batch_size` sequences, in the type the attention runs in."""
        weight = self.lm_head.weight
        return KVCache(self.config, batch_size, weight.device, compute_dtype(weight))

    # -- for the training loop

    def recompute(self, part):
        """Backward computes this part of the model again, with the same random numbers, instead of keeping what forward
        made there: "experts" (the routed ones, from dispatch to combine), "blocks", or "none"."""
        for block in self.transformer.h:
            if part == "blocks":
                block.forward = computed_again(block.forward)
            elif part == "experts" and block.is_moe:
                block.mlp.mix = computed_again(block.mlp.mix)

    def moe_layers(self):
        """(layer number, MoE) of each MoE layer."""
        return [(layer, block.mlp) for layer, block in enumerate(self.transformer.h) if block.is_moe]

    MAX_LOGIT, COUNTS = MoE.MAX_LOGIT, MoE.COUNTS  # columns of router_table

    def router_table(self):
        """Of the last forward, dropless ones apart, on the device: a row per MoE layer (the statistics of MoE.record,
        then the choices per expert and, with quantile balancing, the histograms of margins), float32."""
        layers = [moe for _, moe in self.moe_layers()]
        histograms = [[moe.margins.flatten()] if self.config.use_quantile_balance else [] for moe in layers]
        return torch.stack(
            [torch.cat([moe.stats, moe.count, *more]) for moe, more in zip(layers, histograms, strict=True)]
        )

    def router_stats(self, table=None):
        """A dict per MoE layer, of the last forward or of a table: layer, load (fraction of choices per expert, sums
        to 1), drop_frac (of choices), entropy (nats, mean over tokens, of the softmax over all experts), max_logit
        (largest |logit|), logit_std and noise_std (over experts, of clean logits and noise), max_vio (Wang 2024: max
        load / mean load - 1). Waits for the device."""
        layers = [layer for layer, _ in self.moe_layers()]
        if not layers:
            return []
        stats = []
        table = (self.router_table() if table is None else table)[:, : self.COUNTS + self.config.n_exp]
        for layer, row in zip(layers, table.tolist(), strict=True):
            (drop, entropy, logit, *variances), counts = row[: self.COUNTS], row[self.COUNTS :]
            load = [count / max(1, sum(counts)) for count in counts]
            logit_std, noise_std = (variance**0.5 for variance in variances)
            stats.append({"layer": layer, "load": load, "drop_frac": drop, "entropy": entropy, "max_logit": logit,
                          "logit_std": logit_std, "noise_std": noise_std,
                          "max_vio": max(load) * len(load) - 1})  # fmt: skip
        return stats

    @torch.no_grad()
    def update_balance_bias(self, table):
        """Move the selection biases, if there are any.

        Once per step, with a router_table whose counts are summed over the micro-batches and ranks of the step.
        """
        config = self.config
        for (_, moe), row in zip(self.moe_layers(), table, strict=True):
            count_E, histogram = row[self.COUNTS :].split([config.n_exp, len(row) - self.COUNTS - config.n_exp])
            bias_E = moe.router.balance_bias if moe.router.biased else None
            if config.use_bias_balance:
                bias_E.copy_(sign_step(bias_E, count_E, config.bias_balance_rate))
            elif config.use_quantile_balance:
                bias_E.copy_(quantile_step(histogram.view(config.n_exp, -1), config.top_k))

    def start_step(self):
        """Forget what the micro-batches of the last step have counted; a skipped step leaves nothing behind."""
        if self.config.balance_scope == "step":
            self.so_far.zero_()

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

    def optimizer_groups(self, weight_decay, router_weight_decay=None, router_lr_scale=1.0):
        """Groups of parameters: weights of products and embeddings are decayed, biases (the experts' too) and norms are
        not; the router's weights are a group of their own where they differ in decay or rate."""
        apart = (router_weight_decay, router_lr_scale) != (None, 1.0)
        params = {"decayed": [], "plain": [], "router": []}
        for name, p in self.named_parameters():
            plain = name.endswith("bias") or ".ln_" in name
            params["plain" if plain else "router" if apart and ".router." in name else "decayed"].append(p)
        router_decay = weight_decay if router_weight_decay is None else router_weight_decay
        groups = [
            {"params": params["decayed"], "weight_decay": weight_decay, "lr_scale": 1.0},
            {"params": params["plain"], "weight_decay": 0.0, "lr_scale": 1.0},
            {"params": params["router"], "weight_decay": router_decay, "lr_scale": router_lr_scale},
        ]
        return [group for group in groups if group["params"]]


def computed_again(function):
    """`function`, with torch's activation checkpointing where there are gradients."""

    def call(*args):
        again = torch.is_grad_enabled()
        return checkpoint(function, *args, use_reentrant=False) if again else function(*args)

    return call
