"""GPT-2 and its Mixture-of-Experts variants: attention, blocks, the model. moe.py has the experts.

    out = GPT(GPTConfig(n_exp=8, use_aux_loss=True))(idx, targets)
    out.loss.backward()          # cross-entropy + weighted router losses;  out.ce_loss is the cross-entropy alone

The dense parts follow GPT-2 (tied embeddings, learned positions, pre-norm, GELU tanh) and have its parameter names, so
its checkpoints load. With n_exp > 1 the MLP of every `stride`-th block becomes a MoE layer (blocks 0, 2, 4, ...).

Shapes:  B sequences, S positions, D width, V vocabulary.
"""

import dataclasses
import math
import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import balance
from common import FiniteAboveZero, Fraction, Positive, Rate, find_bad_setting
from kernels import KVCache, compute_dtype, linear_cross_entropy, linear_cross_entropy_with_z_loss
from moe import GATES, MLP, ROUTER_LOSSES, Experts, MoE, MoESettings, Router  # noqa: F401 - all the model's names

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
            losses["aux_loss"] = balance.losses_in_step(self.so_far, losses["aux_loss"], idx.numel())
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
        """Move the selection biases, if there are any (balance.py).

        Once per step, with a router_table whose counts are summed over the micro-batches and ranks of the step.
        """
        config = self.config
        for (_, moe), row in zip(self.moe_layers(), table, strict=True):
            count_E, histogram = row[self.COUNTS :].split([config.n_exp, len(row) - self.COUNTS - config.n_exp])
            bias_E = moe.router.balance_bias if moe.router.biased else None
            if config.use_bias_balance:
                bias_E.copy_(balance.sign_step(bias_E, count_E, config.bias_balance_rate))
            elif config.use_quantile_balance:
                bias_E.copy_(balance.quantile_step(histogram.view(config.n_exp, -1), config.top_k))

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
