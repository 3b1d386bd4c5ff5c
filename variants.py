"""The one table of variants: name, label, look and settings. Add a row to compare a trick of your own.

A variant is its settings on top of the defaults in train_single_gpu.py and of the flags that a sweep gives to all runs.
"""

import math
from typing import NamedTuple


class Variant(NamedTuple):
    name: str  # of its runs: logs/{name}_seed_{seed}
    label: str
    colour: str  # colour-blind readers can tell them apart (sets of Paul Tol, Okabe and Ito)
    line: str  # line and marker together are unique within each table below, for print in grey
    marker: str
    settings: dict  # of train_single_gpu.Args


NOISY = {"use_noisy_top_k": True}
AUX = {"use_aux_loss": True}
Z = {"use_router_z_loss": True}
FULL_PREC = {"router_use_full_prec": True}
SWITCH_INIT = {"use_switch_tfm_init": True}
SWITCH_ROUTER = {"top_k": 1, "gate": "softmax"} | AUX
ALL_TRICKS = NOISY | AUX | Z | FULL_PREC | SWITCH_INIT
SMALL_INIT = ALL_TRICKS | {"switch_tfm_init_scale": 0.1}
ONE_SHARED = {"n_shared_exp": 1, "top_k": 1, "gate": "softmax"}  # as many active parameters as top 2
ISO = {"expert_hidden": "iso"}  # as many active parameters as dense, but for the router
QUARTER = AUX | ISO | {"n_exp": 16, "top_k": 4}
QUANTILE = {"use_quantile_balance": True}
SWITCH_MLP = {"mlp_init": "switch"}
MUON = {"optimizer": "muon"}

LADDER = (  # the published ablation: each adds one trick to the one before
    Variant("no_moe", "dense", "#000000", "-", "", {"n_exp": 1}),
    Variant("only_moe", "MoE, top 2", "#4477AA", "--", "o", {}),
    Variant("noisy_top_k", "+ router noise", "#EE6677", "-", "s", NOISY),
    Variant("aux_loss", "+ load-balance loss", "#228833", "--", "^", NOISY | AUX),
    Variant("z_loss", "+ router z-loss", "#CCBB44", "-.", "D", NOISY | AUX | Z),
    Variant("router_full_prec", "+ router in float32", "#66CCEE", "-", "v", NOISY | AUX | Z | FULL_PREC),
    Variant("switch_tfm_init", "+ Switch init: all tricks", "#AA3377", ":", "P", ALL_TRICKS),
    Variant("top1", "top 1, router without gradient", "#999933", "--", "x", {"top_k": 1}),
    Variant("top1_noisy", "top 1 without gradient, noise", "#DDAA33", "-.", "+", {"top_k": 1} | NOISY),
)
NEW = (
    Variant("top1_softmax", "top 1, softmax gate", "#332288", "-", "o", {"top_k": 1, "gate": "softmax"}),
    Variant("top1_softmax_aux", "top 1, softmax gate, balanced", "#661100", "--", "p", SWITCH_ROUTER),
    Variant("dropless", "dropless", "#44AA99", "--", "s", {"train_capacity": math.inf, "eval_capacity": math.inf}),
    Variant("aux_only", "load-balance loss alone", "#117733", ":", "^", AUX),
    Variant("z_only", "router z-loss alone", "#CC6677", "-.", "D", Z),
    Variant("switch_tfm_init_0.1", "all tricks, Switch init at 0.1", "#882255", "-", "P", SMALL_INIT),
    Variant("bias_balance", "bias balancing", "#EE7733", "--", "v", {"use_bias_balance": True}),
    Variant("shared_expert", "1 shared + 1 of 8", "#0077BB", "-.", "*", ONE_SHARED),
    Variant("sigmoid", "sigmoid gate", "#AA4499", ":", "X", {"gate": "sigmoid"}),
)
TRAINING = (  # optimizer, schedule, stability
    Variant("muon", "Muon", "#663333", "-", "o", MUON),
    Variant("dense_muon", "dense, Muon", "#222255", "--", "s", MUON | {"n_exp": 1}),
    Variant("wsd", "WSD schedule", "#225555", "-.", "^", {"schedule": "wsd"}),
    Variant("qk_norm", "QK norm", "#77AADD", ":", "D", {"qk_norm": True}),
)
METHODS = (  # of the experts
    Variant("half_width", "half width, balanced", "#E69F00", "-", "o", AUX | ISO),
    Variant("quarter_width", "top 4 of 16, quarter width, balanced", "#56B4E9", "--", "s", QUARTER),
    Variant("shared_half_width", "1 shared + 1 of 8, half width", "#009E73", "-.", "^", ISO | ONE_SHARED),
    Variant("first_dense", "first layer dense", "#0072B2", ":", "D", {"first_dense": 1}),
    Variant("step_balance", "balance over the step", "#D55E00", "-", "v", AUX | {"balance_scope": "step"}),
    Variant("sequence_balance", "balance per sequence", "#CC79A7", "--", "P", AUX | {"balance_scope": "sequence"}),
    Variant("quantile_balance", "quantile balancing", "#CC3311", "-.", "*", QUANTILE),
    Variant("sigmoid_quantile", "sigmoid gate, quantile bias", "#33BBEE", ":", "X", QUANTILE | {"gate": "sigmoid"}),
    Variant("frozen_router", "frozen router", "#555555", "-", "x", {"freeze_router": True}),
    Variant("switch_only", "Switch init alone", "#EE99AA", "-.", "P", SWITCH_INIT),
    Variant("switch_mlp", "Switch init of all MLPs", "#DDCC77", "-", "D", SWITCH_MLP),
    Variant("dense_switch_mlp", "dense, Switch init of MLPs", "#AAAA00", "--", "v", SWITCH_MLP | {"n_exp": 1}),
)
VARIANTS = {variant.name: variant for variant in LADDER + NEW + TRAINING + METHODS}
