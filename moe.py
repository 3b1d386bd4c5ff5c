"""The mixture of experts: settings, gates, router losses, router, experts. What a new trick changes is in this file.

    y, losses = MoE(config)(x)      # x (B, S, D) -> y (B, S, D) and {name: scalar} of the router losses that are on

    router    logits = x W_g, top k of E experts per token: Shazeer 2017 (1701.06538) eq. 3-5, Switch (2101.03961)
    losses    load balance: Switch eq. 4-6 with k choices; router z-loss: ST-MoE (2202.08906) eq. 5
    dispatch  sort the (token, choice) pairs by expert, run the experts as grouped matrix products on the sorted rows,
              combine by gate. No tensor of tokens x experts x capacity exists: memory and time are linear in tokens.
    capacity  a mask on the pairs, so dropless (capacity `inf`) and capacity share one path.

A new router loss is a switch and a weight in MoESettings, a formula, and a row of ROUTER_LOSSES; a new gate is a row of
GATES; each then gets a row in the table of variants (sweep.py). docs/add_a_trick.md shows one from beginning to end.

Shapes:  T tokens (B*S), E experts, K choices per token, N = T*K pairs, D width, F hidden width.
A suffix names the shape: x_TD is (T, D). Pairs are numbered choice-major, n = k*T + t: all first choices, then all
second choices, which is the order in which capacity is given out.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import balance
from common import AboveZero, FiniteAboveZero, NotNegative, Positive, Rate
from kernels import ExpertMLPs, Gelu, at_least_float32, compute_dtype, sort_by_expert

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
    """Switch eq. 4 with k choices: E * sum_e f_e P_e, gradient through P alone; k when balanced (balance.py)."""
    return balance.SCOPES[moe.config.balance_scope](moe, routing, plan, n_sequences)


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
    balance_scope: Literal[tuple(balance.SCOPES)] = "micro_batch"  # Tokens over which the load-balance loss counts
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

        With bias balancing (balance.py) the bias moves the choice only: the gate is of the unbiased score.
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
            self.register_buffer("margins", torch.zeros(config.n_exp, balance.BINS), persistent=False)

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

        With balance_scope step the load-balance loss is still a pair of vectors in training (balance.py).
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
            margins_TE = balance.margins(routing.scores_TE, self.router.balance_bias, self.config.top_k)
            self.margins.copy_(balance.histogram(margins_TE))
