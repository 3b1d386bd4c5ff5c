"""Keeping experts evenly used: what the load-balance loss counts, and balancing by a bias without a loss.

Load-balance loss, Switch (2101.03961) eq. 4 with K choices: E * sum_e f_e P_e, f_e the choices per token on expert e,
P_e its mean probability; K when balanced. P is of the softmax over all experts whatever the gate; DeepSeek-V3 has its
normalised sigmoid scores there. The scopes say over which tokens f and P are taken:

    micro_batch   both over the micro-batch, as published
    step          f over the micro-batches of the step so far and over all ranks: Qwen (2501.11873), algorithm 1
    sequence      both within each sequence: DeepSeek-V3 (2412.19437) eq. 17-20

Bias: b_E is added to the scores for the choice of experts only; gates are of the unbiased scores. It moves once per
step, by sums over the micro-batches and ranks of the step, so that N ranks move it as one does:

    sign          Wang 2024 (2408.15664), algorithm 1: by a fixed rate toward equal load
    quantile      J. Su; Kimi K3; torchtitan, Megatron: to the value with which each expert takes the fraction K / E of
                  the step's tokens. No rate and no weight.

Suffixes as in moe.py: T tokens, E experts, K choices per token, B sequences; M bins of a histogram.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

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


def margins(scores_TE, bias_E, top_k):
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
