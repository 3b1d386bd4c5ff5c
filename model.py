"""GPT-2 and its Mixture-of-Experts variants: the whole model in one file.

    out = GPT(GPTConfig(n_exp=8, use_noisy_top_k=True))(idx, targets)
    out.loss.backward()          # cross-entropy + weighted router losses;  out.ce_loss is the cross-entropy alone

Dense parts follow GPT-2 (tied embeddings, learned positions, pre-norm, GELU tanh); names of parameters are GPT-2's,
so outside checkpoints load. With n_exp > 1 the MLP of every `stride`-th block becomes a MoE layer (0, 2, 4, ...):

    router    logits = x W_g, top k of E experts a token: Shazeer 2017 (1701.06538) eq. 3-5, Switch (2101.03961)
    losses    load balance: Switch eq. 4-6 with k choices; router z-loss: ST-MoE (2202.08906) eq. 5
    dispatch  sort the (token, choice) pairs by expert, run the experts as grouped matrix products on sorted rows,
              combine by gate. No tensor of tokens x experts x capacity exists: memory and time are linear in tokens.
    capacity  a mask on the pairs, so dropless (capacity `inf`) and capacity share one path.

Shapes:  B sequences, S positions, V vocabulary; in the MoE code
         T tokens (B*S), E experts, K choices a token, N = T*K pairs, D width, F = 4 D hidden.
A suffix names the shape: x_TD is (T, D). Pairs are numbered choice-major, n = k*T + t: all first choices, then all
second choices, which is the order in which capacity is given out.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from kernels import Combine, Dispatch, at_least_float32, compute_dtype, grouped_linear, linear_cross_entropy

# ---------------------------------------------------------------------------------------------------------------------
# Configuration and output


@dataclass
class GPTConfig:
    """Shape of the model. Raises ValueError, naming the field, for values that no model can have."""

    block_size: int = 1024
    vocab_size: int = 50304  # 50257 padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linears, LayerNorms and experts, as GPT-2
    n_exp: int = 1  # 1 is the dense model
    top_k: int = 2
    stride: int = 2  # block i is MoE when i % stride == 0
    gate: Literal["topk_softmax", "softmax", "sigmoid"] = "topk_softmax"
    use_noisy_top_k: bool = False
    use_aux_loss: bool = False
    use_router_z_loss: bool = False
    use_bias_balance: bool = False
    n_shared_exp: int = 0  # dense experts that every token passes, beside the routed ones
    aux_loss_weight: float = 0.01
    router_z_loss_weight: float = 0.001
    train_capacity: float = 1.25  # inf: dropless
    eval_capacity: float = 2.0
    min_capacity: int = 4
    use_switch_tfm_init: bool = False
    switch_tfm_init_scale: float = 1.0
    router_use_full_prec: bool = False
    balance_scope: Literal["micro_batch", "global"] = "micro_batch"  # of the load in the balance loss

    def __post_init__(self):
        shape = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        for name in (*shape, "n_exp", "top_k", "stride", "min_capacity"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.n_exp > 1 and self.top_k > self.n_exp:
            raise ValueError(f"top_k {self.top_k} is more than n_exp {self.n_exp}: a token cannot pick an expert twice")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")
        if self.n_shared_exp < 0:
            raise ValueError(f"n_shared_exp must not be negative, it is {self.n_shared_exp}")
        for name in ("train_capacity", "eval_capacity", "switch_tfm_init_scale"):
            if not getattr(self, name) > 0:  # `not >` also catches nan
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("aux_loss_weight", "router_z_loss_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number, 0 or more, not {getattr(self, name)}")

    def is_moe_layer(self, layer: int) -> bool:
        return self.n_exp > 1 and layer % self.stride == 0


class Output(NamedTuple):
    loss: torch.Tensor | None  # scalar, what is optimised: ce_loss + weighted router losses
    ce_loss: torch.Tensor | None  # scalar, nats per token; (B, S) with reduction="none"
    aux_loss: torch.Tensor  # scalar, unweighted, summed over MoE layers; 0 where unused
    z_loss: torch.Tensor  # likewise
    logits: torch.Tensor | None  # (B, S, V) when there are no targets, else None


# ---------------------------------------------------------------------------------------------------------------------
# Attention and the dense MLP


class KVCache:
    """Keys and values of the tokens seen so far, (B, n_head, block_size, head width) a layer; `length` are filled."""

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


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer

    def forward(self, x, attn_mask=None, cache=None):
        B, S, D = x.shape
        q, k, v = (
            part.view(B, S, self.n_head, D // self.n_head).transpose(1, 2)  # (B, n_head, S, head width)
            for part in self.c_attn(x).split(D, dim=2)
        )
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        # On the CPU the backward in bf16 costs 0.45 ms a head, however short: short rows are faster in float32.
        if x.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= 128 and torch.is_grad_enabled():
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast(x.device.type, enabled=False):
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask, dropout_p=self.dropout if self.training else 0.0,
                is_causal=attn_mask is None and k.shape[2] == S,
            )  # fmt: skip
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, S, D)))


class MLP(nn.Module):
    def __init__(self, config, n_hidden):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, n_hidden, bias=config.bias)
        self.c_proj = nn.Linear(n_hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


# ---------------------------------------------------------------------------------------------------------------------
# Mixture of experts: route, sort, grouped products, combine


class Routing(NamedTuple):
    expert_TK: torch.Tensor  # int64, the chosen experts, best first
    gate_TK: torch.Tensor  # float32, their weights
    logits_TE: torch.Tensor  # float32, with the noise that was added
    probs_TE: torch.Tensor  # float32, softmax over all experts


class Router(nn.Module):
    """Chooses top_k experts for each token."""

    def __init__(self, config):
        super().__init__()
        self.w_g = nn.Linear(config.n_embd, config.n_exp, bias=False)
        if config.use_noisy_top_k:
            self.w_noise = nn.Linear(config.n_embd, config.n_exp, bias=False)
        if config.use_bias_balance:
            self.register_buffer("balance_bias", torch.zeros(config.n_exp))
        self.top_k, self.gate = config.top_k, config.gate
        self.noisy, self.balanced = config.use_noisy_top_k, config.use_bias_balance
        self.full_prec = config.router_use_full_prec

    def logits(self, x_TD):
        """Router logits (T, E) as float32. Under autocast the products are bf16 unless router_use_full_prec."""
        if not self.full_prec:
            return self.noisy_logits(self.w_g(x_TD), self.w_noise(x_TD) if self.noisy else None)
        # Both are needed: autocast would make the product bf16, and the input arrives in bf16 or the weight may be.
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = at_least_float32(x_TD)
            clean = F.linear(x_TD, at_least_float32(self.w_g.weight))
            scale = F.linear(x_TD, at_least_float32(self.w_noise.weight)) if self.noisy else None
            return self.noisy_logits(clean, scale)

    def noisy_logits(self, clean_TE, scale_TE):
        """Shazeer eq. 4, in training only: H(x) = x W_g + N(0, 1) * softplus(x W_noise)."""
        clean_TE = at_least_float32(clean_TE)
        if not (self.noisy and self.training):
            return clean_TE
        return clean_TE + torch.randn_like(clean_TE) * F.softplus(at_least_float32(scale_TE))

    def select(self, logits_TE, scores_TE):
        """Indices (T, K) of the chosen experts, best first.

        With bias balancing (Wang 2024, 2408.15664) the bias moves the choice only: the gate is of the unbiased score.
        """
        ranked = scores_TE + self.balance_bias if self.balanced else logits_TE
        return ranked.topk(self.top_k, dim=-1).indices

    def forward(self, x_TD):
        logits_TE = self.logits(x_TD)
        probs_TE = torch.softmax(logits_TE, dim=-1)
        scores_TE = torch.sigmoid(logits_TE) if self.gate == "sigmoid" else probs_TE
        expert_TK = self.select(logits_TE, scores_TE)
        if self.gate == "topk_softmax":  # Shazeer eq. 3, Mixtral: softmax over the selected; a constant 1 at K = 1
            gate_TK = torch.softmax(logits_TE.gather(1, expert_TK), dim=-1)
        else:  # Switch, ST-MoE: the selected entries as they are
            gate_TK = scores_TE.gather(1, expert_TK)
        if self.gate == "sigmoid" and self.top_k > 1:  # DeepSeek-V3 (2412.19437) eq. 13: normalised over the selected
            gate_TK = gate_TK / gate_TK.sum(dim=-1, keepdim=True)
        return Routing(expert_TK, gate_TK, logits_TE, probs_TE)


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


class Experts(nn.Module):
    """E two-layer MLPs as stacked tensors, (E, D, F) and (E, F, D)."""

    def __init__(self, config):
        super().__init__()
        E, D, H = config.n_exp, config.n_embd, 4 * config.n_embd
        self.c_fc = nn.Parameter(torch.empty(E, D, H))
        self.c_proj = nn.Parameter(torch.empty(E, H, D))
        self.fc_bias = nn.Parameter(torch.empty(E, 1, H)) if config.bias else None
        self.proj_bias = nn.Parameter(torch.empty(E, 1, D)) if config.bias else None

    def forward(self, x_ND, ends_E):
        dtype, bias_dtype = x_ND.dtype, torch.float32 if x_ND.is_cuda else x_ND.dtype
        fc_bias, proj_bias = (b if b is None else b.squeeze(1).to(bias_dtype) for b in (self.fc_bias, self.proj_bias))
        h_NF = F.gelu(grouped_linear(x_ND, self.c_fc.to(dtype), fc_bias, ends_E), approximate="tanh")
        return grouped_linear(h_NF, self.c_proj.to(dtype), proj_bias, ends_E)


class MoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared = MLP(config, 4 * config.n_embd * config.n_shared_exp) if config.n_shared_exp else None
        self.dropout = nn.Dropout(config.dropout)
        self.config = config
        # What the last forward did, for the log: kept on the device, read by GPT.router_stats().
        self.register_buffer("load", torch.zeros(config.n_exp), persistent=False)
        self.register_buffer("stats", torch.zeros(3), persistent=False)  # dropped fraction, entropy, largest |logit|
        if config.use_bias_balance:  # choices since the last update of the bias, over micro-batches
            self.register_buffer("count", torch.zeros(config.n_exp), persistent=False)

    def capacity(self, n_tokens):
        """Most pairs an expert takes, Switch eq. 3 with k choices; None where no pair can be dropped."""
        factor = self.config.train_capacity if self.training else self.config.eval_capacity
        if math.isinf(factor):
            return None
        capacity = math.floor(self.config.top_k * factor * n_tokens / self.config.n_exp)
        capacity = max(self.config.min_capacity, capacity + capacity % 2)
        return capacity if capacity < n_tokens else None  # a token chooses an expert at most once

    def forward(self, x, dropless=False):
        """x (B, S, D) -> output (B, S, D), load-balance loss and z-loss, scalars, 0 where unused."""
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.router(x_TD)
        plan = sort_by_expert(routing.expert_TK, self.config.n_exp)
        capacity = None if dropless else self.capacity(x_TD.shape[0])
        gate_TK = routing.gate_TK
        if capacity is not None:
            kept_TK = (plan.place_N < capacity).view(self.config.top_k, -1).t()
            gate_TK = gate_TK * kept_TK
        x_ND = Dispatch.apply(x_TD.to(compute_dtype(x_TD)), plan.row_N, plan.pair_N)
        y_TD = Combine.apply(self.experts(x_ND, plan.ends_E), gate_TK, plan.row_N, plan.pair_N)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        self.record(routing, plan, capacity)
        return self.dropout(y_TD).view(x.shape), *self.losses(routing, plan)

    def losses(self, routing, plan):
        aux = z = routing.logits_TE.new_zeros(())
        if self.config.use_aux_loss:  # Switch eq. 4: E * sum_e f_e P_e, gradient through P alone
            f_E = plan.count_E / routing.logits_TE.shape[0]  # choices on expert e per token, sums to K
            # In training alone: there all ranks run the same number of forwards.
            if self.config.balance_scope == "global" and self.training and dist.is_initialized():
                dist.all_reduce(f_E)
                f_E = f_E / dist.get_world_size()
            aux = self.config.n_exp * (f_E * routing.probs_TE.mean(dim=0)).sum()
        if self.config.use_router_z_loss:  # ST-MoE eq. 5
            z = torch.logsumexp(routing.logits_TE, dim=-1).square().mean()
        return aux, z

    @torch.no_grad()
    def record(self, routing, plan, capacity):
        dropped = plan.place_N >= capacity if capacity is not None else torch.zeros_like(plan.place_N)
        entropy = -(routing.probs_TE * torch.log_softmax(routing.logits_TE, dim=-1)).sum(-1).mean()
        self.load.copy_(plan.count_E / plan.row_N.numel())
        self.stats.copy_(torch.stack([dropped.float().mean(), entropy, routing.logits_TE.abs().max()]))
        if self.config.use_bias_balance and self.training:
            self.count.add_(plan.count_E)


# ---------------------------------------------------------------------------------------------------------------------
# The transformer


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.is_moe = config.is_moe_layer(layer)
        self.mlp = MoE(config) if self.is_moe else MLP(config, 4 * config.n_embd)

    def forward(self, x, attn_mask=None, cache=None, dropless=False):
        x = x + self.attn(self.ln_1(x), attn_mask, cache)
        if not self.is_moe:
            return x + self.mlp(self.ln_2(x)), 0.0, 0.0
        y, aux_loss, z_loss = self.mlp(self.ln_2(x), dropless)
        return x + y, aux_loss, z_loss


class GPT(nn.Module):
    """`GPT(config)` draws its weights from `generator`, or from torch's default one."""

    def __init__(self, config: GPTConfig, generator: torch.Generator | None = None):
        super().__init__()
        if config.n_exp > 1 and config.top_k == 1 and config.gate == "topk_softmax":
            warnings.warn(
                "top_k=1 with gate='topk_softmax' gives the router no gradient from the cross-entropy (a softmax over "
                "one logit is 1): the published top-1 runs; set gate='softmax' for a top-1 router that learns",
                stacklevel=2,
            )
        self.config = config
        with torch.random.fork_rng(devices=[]):  # torch's modules draw weights when made; init_weights draws again
            self.build(config)
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

    @torch.no_grad()
    def init_weights(self, generator=None):
        """GPT-2's initialisation; Switch's (page 10) on the MoE layers under use_switch_tfm_init."""
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)  # two residual additions a block
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif ".ln_" in name:
                nn.init.ones_(p)
            elif self.config.use_switch_tfm_init and (".router." in name or ".experts." in name):
                fan_in = p.shape[-1] if ".router." in name else p.shape[-2]  # Linear keeps (out, in), Experts (in, out)
                std = math.sqrt(self.config.switch_tfm_init_scale / fan_in)
                nn.init.trunc_normal_(p, std=std, a=-2 * std, b=2 * std, generator=generator)
            elif name.endswith(("c_proj.weight", "experts.c_proj")):
                nn.init.normal_(p, std=residual_std, generator=generator)
            elif name.endswith(("wte.weight", "wpe.weight", "c_attn.weight", "c_fc.weight", "experts.c_fc",
                                "w_g.weight", "w_noise.weight")):  # fmt: skip
                nn.init.normal_(p, std=0.02, generator=generator)
            else:
                raise RuntimeError(f"no initialisation for {name}")

    def forward(self, idx, targets=None, reduction="mean", dropless=False):
        """idx, targets int64 (B, S), target -1 ignored -> Output. `dropless` lifts the capacity, as evaluation does."""
        h, aux_loss, z_loss = self.run_blocks(idx, dropless=dropless)
        if targets is None:
            return Output(None, None, aux_loss, z_loss, self.lm_head(h))
        h = h.to(compute_dtype(h))
        ce = linear_cross_entropy(h.flatten(0, 1), self.lm_head.weight, targets.flatten(), reduction)
        mean = ce if reduction == "mean" else ce.sum() / (targets >= 0).sum()
        loss = mean + self.config.aux_loss_weight * aux_loss + self.config.router_z_loss_weight * z_loss
        return Output(loss, ce if reduction == "mean" else ce.view(targets.shape), aux_loss, z_loss, None)

    def hidden_states(self, idx, positions=None, attn_mask=None, cache=None, dropless=False):
        """Final hidden states (B, S, D), the input of lm_head.

        positions int64 (S,) or (B, S), default 0, 1, ... after what the cache holds; attn_mask bool, True = attend,
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
        aux_loss = z_loss = torch.zeros((), device=idx.device)
        for block in self.transformer.h:
            x, aux, z = block(x, attn_mask, cache, dropless)
            aux_loss, z_loss = aux_loss + aux, z_loss + z
        if cache is not None:
            cache.length += S
        return self.transformer.ln_f(x), aux_loss, z_loss

    def new_cache(self, batch_size):
        """An empty KVCache for `batch_size` sequences, in the type the attention runs in."""
        weight = self.lm_head.weight
        return KVCache(self.config, batch_size, weight.device, compute_dtype(weight))

    # -- what a training loop asks of a model

    def moe_layers(self):
        """(layer number, MoE) of each MoE layer."""
        return [(layer, block.mlp) for layer, block in enumerate(self.transformer.h) if block.is_moe]

    MAX_LOGIT = 2  # column of router_table

    def router_table(self):
        """Of the last forward, on the device: a row per MoE layer, (dropped fraction, entropy, largest |logit|, load
        of each expert)."""
        return torch.stack([torch.cat([moe.stats, moe.load]) for _, moe in self.moe_layers()])

    def router_stats(self, table=None):
        """A dict per MoE layer, of the last forward or of a table: layer, load (fraction of choices on each expert,
        sums to 1), drop_frac (of choices), entropy (nats, mean over tokens, of the softmax over all experts),
        max_logit (largest |logit|), max_vio (Wang 2024: max load / mean load - 1). Waits for the device."""
        layers = [layer for layer, _ in self.moe_layers()]
        if not layers:
            return []
        rows = (self.router_table() if table is None else table).tolist()
        return [
            {"layer": layer, "load": load, "drop_frac": drop, "entropy": entropy, "max_logit": logit,
             "max_vio": max(load) * len(load) - 1}
            for layer, (drop, entropy, logit, *load) in zip(layers, rows, strict=True)
        ]  # fmt: skip

    @torch.no_grad()
    def update_balance_bias(self, rate):
        """Move each expert's selection bias by +-rate toward equal load (Wang 2024, algorithm 1). Once a step."""
        for _, moe in self.moe_layers():
            moe.router.balance_bias.add_(rate * torch.sign(moe.count.mean() - moe.count))
            moe.count.zero_()

    def num_params(self):
        """Parameters without the position embeddings, as nanoGPT counts; the tied output projection counts once."""
        return sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()

    def num_active_params(self):
        """Those of them that one token uses: top_k of the n_exp experts."""
        experts = sum(p.numel() for _, moe in self.moe_layers() for p in moe.experts.parameters())
        return self.num_params() - experts + experts * self.config.top_k // self.config.n_exp

    def estimate_flops_per_token(self, T):
        """Training FLOPs a token, forward and backward, at sequence length T: PaLM (2204.02311) appendix B."""
        return 6 * self.num_active_params() + 12 * self.config.n_layer * self.config.n_embd * T

    def optimizer_groups(self, weight_decay):
        """Two groups: weights of products and embeddings are decayed, biases (an expert's too) and norms are not."""
        decayed = {n: p for n, p in self.named_parameters() if not (n.endswith("bias") or ".ln_" in n)}
        plain = {n: p for n, p in self.named_parameters() if n not in decayed}
        return [
            {"params": list(decayed.values()), "weight_decay": weight_decay},
            {"params": list(plain.values()), "weight_decay": 0.0},
        ]
