"""Baselines as published (one-hot dispatch, one example at a time, ...) and routers of known load.

bench times the fast code against the baselines; tests use them as references.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from lab.tokenizer import get_tokenizer
from model import MoE, Router


def replace(old, new_class):
    """A `new_class` with the settings, weights and mode of `old`, to put in its place: a MoE layer or a router.

    moe.router = replace(moe.router, TurnRouter)
    """
    new = new_class(old.config).to(next(old.parameters()))
    new.load_state_dict(old.state_dict())
    return new.train(old.training)


class OneHotMoE(MoE):
    """MoE with tokens sent to the experts' slots, and back, by (T, E * C) matrices, as published; C is the capacity.

    With top 2 and capacity 1.25 these hold T * E * C = 2.5 T**2 numbers: memory and time per token grow with T.
    """

    def mix(self, x_TD, routing, plan, capacity):
        n_tokens, n_exp, experts = len(x_TD), self.config.n_exp, self.experts
        capacity = capacity or n_tokens
        choices_NE = F.one_hot(routing.expert_TK.t().reshape(-1), n_exp)
        place_N = (choices_NE * (choices_NE.cumsum(0) - 1)).sum(1)
        slots_NC = F.one_hot(place_N.clamp(max=capacity - 1), capacity) * (place_N < capacity)[:, None]
        gates_NE = choices_NE * routing.gate_TK.t().reshape(-1, 1)
        pairs = zip(gates_NE.split(n_tokens), slots_NC.split(n_tokens), strict=True)
        combine_TEC = sum(gates_TE[:, :, None] * slots_TC[:, None] for gates_TE, slots_TC in pairs)
        dispatch_TEC = (combine_TEC > 0).to(x_TD.dtype)
        x_ECD = (dispatch_TEC.flatten(1).t() @ x_TD).view(n_exp, capacity, -1)
        h_ECF = F.gelu(batched_linear(x_ECD, experts.c_fc, experts.fc_bias), approximate="tanh")
        y_ECD = batched_linear(h_ECF, experts.c_proj, experts.proj_bias)
        return combine_TEC.flatten(1).to(y_ECD.dtype) @ y_ECD.flatten(0, 1)


def batched_linear(x_ECD, weight_EDF, bias_E1F):
    y_ECF = x_ECD @ weight_EDF.to(x_ECD.dtype)
    return y_ECF if bias_E1F is None else y_ECF + bias_E1F.to(x_ECD.dtype)


class TurnRouter(Router):
    """Experts in turn, whatever the logits: every expert gets the same number of pairs."""

    def choose(self, logits_TE, scores_TE):
        n_tokens, n_exp = logits_TE.shape
        pairs = torch.arange(n_tokens * self.config.top_k, device=logits_TE.device)
        return pairs.view(n_tokens, self.config.top_k) % n_exp


class HalfRouter(Router):
    """Expert 0 is the first choice of every second token and never chosen by the others."""

    def choose(self, logits_TE, scores_TE):
        even_T = torch.arange(len(logits_TE), device=logits_TE.device) % 2 == 0
        forced_T = torch.where(even_T, math.inf, -math.inf)
        return torch.cat([forced_T[:, None], logits_TE[:, 1:]], dim=1).topk(self.config.top_k, dim=-1).indices


def encode_document(name, text):
    """Tokens of one document as uint16, made as published: list, array, check of the range, cast."""
    tokenizer = get_tokenizer(name)
    encoding = tokenizer.plain if name == "gpt2" else tokenizer  # tiktoken's own encoder
    ids = np.array([tokenizer.eot, *encoding.encode_ordinary(text)])
    if not ((ids >= 0) & (ids < 2**16)).all():
        raise ValueError("a token does not fit uint16")
    return ids.astype(np.uint16)


def one_by_one(model, example, device):
    """The ending predicted for one HellaSwag example, as published: four padded rows, the logits of all positions, the
    smallest mean loss."""
    rows = [example.context + ending for ending in example.endings]
    width = max(map(len, rows))
    tokens = torch.tensor([(*row, *[0] * (width - len(row))) for row in rows], device=device)
    place = torch.arange(1, width, device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    scored = (place >= len(example.context)) & (place < lengths[:, None])
    logits = model(tokens, dropless=True).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2).float(), tokens[:, 1:], reduction="none")
    return int(((losses * scored).sum(1) / scored.sum(1)).argmin())


@torch.no_grad()
def from_prefix(model, prompt, new_tokens, dropless=True):
    """Greedy text as in nanoGPT and nanoMoE: the whole prefix computed for every token, logits of its last position."""
    idx = prompt
    for _ in range(new_tokens):
        tokens = model.lm_head(model.hidden_states(idx, dropless=dropless)[:, -1]).argmax(-1)
        idx = torch.cat([idx, tokens[:, None]], dim=1)
        yield tokens
