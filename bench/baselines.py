"""The usual ways, as in the published systems, to compare with: bench.py times them, tests check against them."""

import numpy as np
import torch
import torch.nn.functional as F

from kernels import compute_dtype
from tokenizer import get_tokenizer


def one_hot_moe(self, x, dropless=False):
    """MoE.forward with tokens sent to the experts' slots, and back, by (T, E * C) matrices; C is the capacity.

    These hold T * E * C = 2.5 T**2 numbers: memory and time a token grow with T.
    """
    x_TD = x.reshape(-1, x.shape[-1])
    routing, experts = self.router(x_TD), self.experts
    capacity = self.capacity(len(x_TD)) or len(x_TD)
    choices_NE = F.one_hot(routing.expert_TK.t().reshape(-1), self.config.n_exp)  # choice-major, as capacity is given
    place_N = (choices_NE * (choices_NE.cumsum(0) - 1)).sum(1)
    slots_NC = F.one_hot(place_N.clamp(max=capacity - 1), capacity) * (place_N < capacity)[:, None]
    gates_NE = choices_NE * routing.gate_TK.t().reshape(-1, 1)
    pairs = zip(gates_NE.split(len(x_TD)), slots_NC.split(len(x_TD)), strict=True)
    combine_TEC = sum(gates_TE[:, :, None] * slots_TC[:, None] for gates_TE, slots_TC in pairs)
    x_TD = x_TD.to(compute_dtype(x_TD))
    dispatch_TEC = (combine_TEC > 0).to(x_TD.dtype)
    x_ECD = (dispatch_TEC.flatten(1).t() @ x_TD).view(self.config.n_exp, capacity, -1)
    h_ECF = F.gelu(batched_linear(x_ECD, experts.c_fc, experts.fc_bias), approximate="tanh")
    y_ECD = batched_linear(h_ECF, experts.c_proj, experts.proj_bias)
    y_TD = combine_TEC.flatten(1).to(y_ECD.dtype) @ y_ECD.flatten(0, 1)
    zero = torch.zeros((), device=x.device)
    return y_TD.view(x.shape), zero, zero


def batched_linear(x_ECD, weight_EDF, bias_E1F):
    y_ECF = x_ECD @ weight_EDF.to(x_ECD.dtype)
    return y_ECF if bias_E1F is None else y_ECF + bias_E1F.to(x_ECD.dtype)


def encode_document(name, text):
    """One document the way the published preparation does: a list of ints, an array, a check of the range, uint16."""
    tokenizer = get_tokenizer(name)
    encoding = tokenizer.plain if name == "gpt2" else tokenizer  # tiktoken's own, not ours
    ids = np.array([tokenizer.eot, *encoding.encode_ordinary(text)])
    if not ((ids >= 0) & (ids < 2**16)).all():
        raise ValueError("a token does not fit uint16")
    return ids.astype(np.uint16)


def one_by_one(model, example, device):
    """An example the published way: four padded rows, the logits of all positions, the mean loss of each ending."""
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
def from_prefix(model, prompt, new_tokens):
    """nanoGPT's and nanoMoE's way; the output projection at the last position alone, as theirs."""
    idx = prompt
    for _ in range(new_tokens):
        tokens = model.lm_head(model.hidden_states(idx, dropless=True)[:, -1]).argmax(-1)
        idx = torch.cat([idx, tokens[:, None]], dim=1)
        yield tokens
