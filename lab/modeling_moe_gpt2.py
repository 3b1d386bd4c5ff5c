"""GPT-2 with Mixture-of-Experts layers for Hugging Face transformers, in one file that exported folders carry along.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

It computes the function of the trained model, with the same parameter names. Routing is dropless: no expert has a
capacity, so the logits of a token depend on the earlier tokens of its own row alone, and a cache is exact. The loss is
the cross-entropy alone; router losses and the updates of the selection bias belong to the trainer. transformers 5.22+.

Shapes:  B rows, S positions, D width; T = B*S tokens, E experts, K choices per token, N = T*K pairs, H hidden width.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple


class MoEGPT2Config(PreTrainedConfig):
    model_type = "moe_gpt2"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012  (transformers' own form)
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd", "n_positions": "block_size", "max_position_embeddings": "block_size",
        "num_attention_heads": "n_head", "num_hidden_layers": "n_layer", "num_experts": "n_exp",
    }

    vocab_size: int = 50304
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float | int = 0.0
    bias: bool = True
    qk_norm: bool = False  # RMS norm of queries and keys per head, without weights
    n_exp: int = 8  # experts per MoE layer; 1: all layers are dense
    num_experts_per_tok: int = 2  # top_k would be a setting of generate()
    stride: int = 2  # every stride-th layer is a MoE layer, from first_dense on
    first_dense: int = 0
    expert_hidden: int | None = None  # hidden width of an expert; None: 4 * n_embd
    n_shared_exp: int = 0  # experts that every token passes, beside the routed ones
    gate: str = "topk_softmax"  # or softmax, sigmoid
    use_noisy_top_k: bool = False  # learned noise on the router logits, in training
    router_use_full_prec: bool = False  # router in float32 whatever the type of the model
    use_bias_balance: bool = False  # either: a bias on the scores decides the selection and leaves the gates alone
    use_quantile_balance: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = True


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout, self.qk_norm, self.layer = config.n_head, config.dropout, config.qk_norm, layer

    def forward(self, x, mask, cache):
        B, S, D = x.shape
        q, k, v = self.c_attn(x).view(B, S, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (B, n_head, S, head width)
        if self.qk_norm:
            q, k = (F.rms_norm(part, part.shape[-1:]) for part in (q, k))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None and S > 1)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, S, D)))


class MLP(nn.Module):
    def __init__(self, config, hidden, dropout):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, hidden, bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Router(nn.Module):
    """Chooses num_experts_per_tok experts for each token and weights them."""

    def __init__(self, config):
        super().__init__()
        if config.gate not in ("topk_softmax", "softmax", "sigmoid"):
            raise ValueError(f"gate {config.gate!r} is not one of topk_softmax, softmax, sigmoid")
        self.w_g = nn.Linear(config.n_embd, config.n_exp, bias=False)
        self.w_noise = nn.Linear(config.n_embd, config.n_exp, bias=False) if config.use_noisy_top_k else None
        biased = config.use_bias_balance or config.use_quantile_balance
        self.register_buffer("balance_bias", torch.zeros(config.n_exp) if biased else None)
        self.config = config

    def product(self, x_TD, linear):
        """x_TD @ linear (T, E), float32."""
        if not self.config.router_use_full_prec:
            return linear(x_TD).float()
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.float(), linear.weight.float())

    def forward(self, x_TD):
        """Chosen experts, best first, and their gates, (T, K) each."""
        logits_TE, gate = self.product(x_TD, self.w_g), self.config.gate
        if self.w_noise is not None and self.training:
            noise_TE = torch.randn_like(logits_TE) * F.softplus(self.product(x_TD, self.w_noise))
            logits_TE = logits_TE + noise_TE
        score_TE = logits_TE.sigmoid() if gate == "sigmoid" else logits_TE.softmax(dim=-1)
        ranked_TE = logits_TE if self.balance_bias is None else score_TE + self.balance_bias
        expert_TK = ranked_TE.topk(self.config.num_experts_per_tok, dim=-1).indices
        if gate == "topk_softmax":
            gate_TK = logits_TE.gather(1, expert_TK).softmax(dim=-1)
        else:
            gate_TK = score_TE.gather(1, expert_TK)
            if gate == "sigmoid" and expert_TK.shape[1] > 1:
                gate_TK = gate_TK / gate_TK.sum(dim=-1, keepdim=True)
        return expert_TK, gate_TK


class Experts(nn.Module):
    """E two-layer MLPs as stacked tensors, (E, D, H) and (E, H, D)."""

    def __init__(self, config):
        super().__init__()
        E, D, H = config.n_exp, config.n_embd, config.expert_hidden or 4 * config.n_embd
        self.c_fc = nn.Parameter(torch.empty(E, D, H))
        self.c_proj = nn.Parameter(torch.empty(E, H, D))
        self.fc_bias = nn.Parameter(torch.empty(E, 1, H)) if config.bias else None
        self.proj_bias = nn.Parameter(torch.empty(E, 1, D)) if config.bias else None

    def expert(self, e, x):
        """The MLP of expert e on the rows x."""
        h = x @ self.c_fc[e] if self.fc_bias is None else x @ self.c_fc[e] + self.fc_bias[e]
        y = F.gelu(h, approximate="tanh") @ self.c_proj[e]
        return y if self.proj_bias is None else y + self.proj_bias[e]

    def forward(self, x_TD, expert_TK):
        """Output of each token's experts, (T, K, D)."""
        (T, K), expert_N = expert_TK.shape, expert_TK.flatten()
        order_N = expert_N.argsort(stable=True)  # pairs sorted by expert
        counts = expert_N.bincount(minlength=len(self.c_fc)).tolist()
        rows = x_TD[order_N // K].split(counts)
        y_ND = torch.cat([self.expert(e, x) for e, x in enumerate(rows)])
        return y_ND[order_N.argsort()].view(T, K, -1)


class MoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        shared_hidden = config.n_shared_exp * (config.expert_hidden or 4 * config.n_embd)
        self.shared = MLP(config, shared_hidden, dropout=0.0) if shared_hidden else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x_TD = x.reshape(-1, x.shape[-1])
        expert_TK, gate_TK = self.router(x_TD)
        y_TKD = self.experts(x_TD, expert_TK)
        y_TD = (y_TKD * gate_TK[:, :, None].to(y_TKD.dtype)).sum(dim=1)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return self.dropout(y_TD).view(x.shape)


class Block(GradientCheckpointingLayer):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        after_dense = layer - config.first_dense
        is_moe = config.n_exp > 1 and after_dense >= 0 and after_dense % config.stride == 0
        self.mlp = MoE(config) if is_moe else MLP(config, 4 * config.n_embd, config.dropout)

    def forward(self, x, mask, past_key_values=None):
        x = x + self.attn(self.ln_1(x), mask, past_key_values)
        return x + self.mlp(self.ln_2(x))


class MoEGPT2ForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = MoEGPT2Config
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012
    _no_split_modules = ["Block"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["balance_bias"]  # noqa: RUF012
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # the Trainer then gives num_items_in_batch

    def __init__(self, config):
        super().__init__(config)
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
        self.post_init()
        if config.router_use_full_prec:
            self._keep_in_fp32_modules_strict |= {"w_g", "w_noise"}

    def get_input_embeddings(self):
        return self.transformer["wte"]

    def set_input_embeddings(self, embeddings):
        self.transformer["wte"] = embeddings

    def _init_weights(self, module):
        """Weights of a new model, or those that a file lacks."""
        super()._init_weights(module)  # Linear, Embedding, LayerNorm
        if isinstance(module, Experts):
            for name, p in module.named_parameters():
                nn.init.zeros_(p) if name.endswith("bias") else nn.init.normal_(p, std=0.02)
        elif isinstance(module, Router) and module.balance_bias is not None:
            nn.init.zeros_(module.balance_bias)

    @can_return_tuple
    def forward(
        self, input_ids=None, past_key_values=None, attention_mask=None, position_ids=None, inputs_embeds=None,
        labels=None, use_cache=None, output_hidden_states=None, logits_to_keep=0, num_items_in_batch=None, cache=None,
    ):
        """As transformers' GPT2LMHeadModel: labels (B, S) are shifted here and -100 is ignored; without position_ids
        the positions are 0, 1, ... after those in the cache, whatever the attention_mask (generate() gives both).
        `cache` is past_key_values from transformers 5.24 on. Unknown arguments are errors, as GPT-2's are not."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.transformer["wte"](input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            if seen + x.shape[1] > self.config.block_size:
                raise ValueError(f"{seen + x.shape[1]} tokens are more than the {self.config.block_size} positions")
            position_ids = torch.arange(x.shape[1], device=x.device)[None] + seen
        mask = create_causal_mask(self.config, x, attention_mask, cache, position_ids)
        x = self.transformer["drop"](x + self.transformer["wpe"](position_ids))
        states = [x]
        for block in self.transformer["h"]:
            x = block(x, mask, past_key_values=cache)
            states.append(x)
        states[-1] = x = self.transformer["ln_f"](x)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch)
        all_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return CausalLMOutputWithPast(loss, logits, cache if use_cache else None, tuple(states) if all_states else None)
