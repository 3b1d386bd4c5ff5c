"""Which run is this? The settings that decide its numbers, its name, and what may be resumed.

A run has an identity: a hash of every setting that counts. It stands in the JSON beside the log and in every
checkpoint, and whatever finds a run by its name compares it, so that a number always belongs to the settings it is
filed under. A setting of the trainer counts and is fixed unless it is marked:

    B: Changeable[int] = 16         # counts, and may change when the run is resumed; the JSON says from which step on
    logs_dir: Uncounted[str] = ""   # cannot change a number: where to log, how often to save, progress, devices

Names and hashes hold what differs from the published values below, never from the defaults in train_single_gpu.Args,
which users edit.
"""

import functools
import hashlib
import json
import os
import re
from datetime import date
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

from lab import common
from lab.common import UserError, check_writable, hints, lock, metadata
from lab.data import fingerprint

# ---------------------------------------------------------------------------------------------------------------------
# The settings that count

T = TypeVar("T")


class Role(NamedTuple):
    """How a setting counts. Without a role it counts and is fixed."""

    counts: bool  # it can change a number in the log
    fixed: bool  # a resumed run must have the same value


SEEDS = ("seed", "data_seed")  # the settings in which the runs of a group differ
Uncounted = Annotated[T, Role(counts=False, fixed=False)]
Changeable = Annotated[T, Role(counts=True, fixed=False)]

# The values of build-gpt2-moe, and neutral values of the settings that are new here. A setting that is missing counts
# when it is not at its default: a new trick, off by default, leaves names and identities of all other runs as they are.
# Add it here before its default changes.
PUBLISHED = {
    "block_size": None, "vocab_size": 50304, "n_layer": 12, "n_head": 12, "n_embd": 768, "bias": True, "dropout": 0.0,
    "n_exp": 8, "top_k": 2, "stride": 2, "use_noisy_top_k": False, "use_aux_loss": False, "use_router_z_loss": False,
    "use_switch_tfm_init": False, "router_use_full_prec": False, "switch_tfm_init_scale": 1.0, "gate": "topk_softmax",
    "use_bias_balance": False, "bias_balance_rate": 0.001, "n_shared_exp": 0, "aux_loss_weight": 0.01,
    "router_z_loss_weight": 0.001, "balance_scope": "micro_batch", "train_capacity": 1.25, "eval_capacity": 2.0,
    "min_capacity": 4, "seed": 1337, "init_from": "scratch", "data_seed": 1337, "total_batch_size": 524_288, "B": 16,
    "T": 1024, "max_steps": 190_730, "max_lr": 6e-4, "min_lr": None, "warmup_steps": 2000, "optimizer": "adamw",
    "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0, "on_nonfinite": "stop", "val_loss_every": 250,
    "val_loss_steps": 20, "hellaswag_every": None, "hellaswag_limit": None, "hellaswag_data": "", "dtype": "bfloat16",
    "mlp_init": "gpt2", "mlp_init_scale": 1.0, "qk_norm": False, "output_z_loss_weight": 0.0, "first_dense": 0,
    "expert_hidden": None, "shared_expert_hidden": None, "gate_scale": 1.0, "noise_scale": 1.0, "freeze_router": False,
    "z_loss_on": "all", "use_quantile_balance": False, "schedule": "cosine", "decay_steps": None, "max_minutes": None,
    "router_lr_scale": 1.0, "router_weight_decay": None, "muon_lr": 0.02,
}  # fmt: skip


@functools.cache
def role(hint):
    return next(iter(metadata(hint, Role)), Role(counts=True, fixed=True))


def counted_settings(args):
    """{name: value} of the settings of train_single_gpu.Args that count; without those that a dense model ignores."""
    of_moe = args.moe_fields() if args.n_exp == 1 else ()
    counted = [name for name, hint in hints(type(args)).items() if role(hint).counts and name not in of_moe]
    return {
        name: getattr(args, name) for name in counted if name in PUBLISHED or getattr(args, name) != neutral(args, name)
    }


def neutral(args, name):
    """The published value of a setting, or the default of one that the published table does not have."""
    return PUBLISHED[name] if name in PUBLISHED else getattr(type(args), name)


def ignored_settings(args):
    """The settings of the mixture of experts that were given for a dense model."""
    return [name for name in args.moe_fields() if args.n_exp == 1 and getattr(args, name) != neutral(args, name)]


def settings_of(args):
    """The counted settings and the data: all that decides the numbers of a run with these args."""
    settings = counted_settings(args) | {"data": fingerprint(args.data_root)}
    if settings["block_size"] == settings["T"]:
        settings["block_size"] = None  # the default
    return settings


def unpublished(settings):
    """Those whose value is not the published one."""
    return {name: value for name, value in settings.items() if value != PUBLISHED.get(name)}


def identity(settings, without=()):
    """12 hex digits that two runs share only if their settings, from settings_of(), are equal.

    `without=SEEDS` gives the identity of a group: runs that differ in their seeds alone.
    """
    counted = {name: value for name, value in unpublished(settings).items() if name not in without}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:12]


def differences(a, b):
    """{name: (value in a, value in b)} of the settings that differ; "auto" agrees with every value."""
    pairs = {name: (a.get(name, PUBLISHED.get(name)), b.get(name, PUBLISHED.get(name))) for name in {**a, **b}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and "auto" not in pair}


def describe(pairs):
    """`--max_lr 0.0006 there, 0.01 here` for a message; the first three differences."""
    words = [f"--{name} {there} there, {here} here" for name, (there, here) in list(pairs.items())[:3]]
    return "; ".join(words) + (f"; and {len(pairs) - 3} more" if len(pairs) > 3 else "")


# ---------------------------------------------------------------------------------------------------------------------
# Names

ALIASES = {"router_use_full_prec": "router_full_prec", "switch_tfm_init_scale": "init_scale", "n_shared_exp": "shared",
           "train_capacity": "capacity"}  # fmt: skip
UNNAMED = ("seed", "vocab_size")  # the seed has its own place in a file name, the vocabulary follows from the data
LONGEST_NAME = 100  # characters; file systems allow 255 for the whole file name


def run_name(args):
    """`no_moe`, or `moe` and the published tricks that are on, then every other fixed setting that is not published.

    A switch gives its name, any other setting name and value: moe_top_k_1_aux_loss_n_layer_4_max_lr_0.004.
    """
    settings, of_args = unpublished(counted_settings(args)), hints(type(args))
    moe_fields = [*args.moe_fields(), "n_exp"]
    order = [*moe_fields, *(name for name in of_args if name not in (*moe_fields, *UNNAMED))]
    named = {name: settings[name] for name in order if name in settings and role(of_args[name]).fixed}
    if args.n_exp == 1:
        del named["n_exp"]
    name = "_".join(["moe" if args.n_exp > 1 else "no_moe", *(name_part(*pair) for pair in named.items())])
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 7]}-{identity(named)[:6]}"


def name_part(name, value):
    stem = ALIASES.get(name, name.removeprefix("use_"))
    if value is True:
        return stem
    text = f"{value:g}" if isinstance(value, float) else Path(str(value)).name
    return f"{stem}_{re.sub(r'[^A-Za-z0-9.+-]+', '-', text)}"


def run_stem(name, run_id, seed):
    """What a run's log and checkpoint folder are called. UserError for parts that could not be told apart again."""
    if not re.fullmatch(r"[A-Za-z0-9_.+-]+", str(name)) or str(name).startswith("."):
        raise UserError(f"--name {name!r} may hold only letters, digits and _ . + -: choose another --name")
    if not re.fullmatch(r"[A-Za-z0-9.+-]+", str(run_id)):
        raise UserError(f"--run_id {run_id!r} may hold only letters, digits and . + - (no underscore): change it")
    return f"{name}_{run_id}_seed_{seed}"


def parse_stem(stem):
    """(name, run_id, seed) of a run_stem(), or None."""
    match = re.fullmatch(r"(.+)_([^_]+)_seed_(\d+)", stem)
    return match and (match[1], match[2], int(match[3]))


def choose_names(args):
    """Fill in name and run_id; return the run_stem.

    With `--resume auto` and no run_id, the run is the newest one of this name and seed that has a checkpoint. (Without
    any, the newest; a start that was refused leaves a folder too.)
    """
    args.name = args.name or run_name(args)
    if not args.run_id and args.resume == "auto":
        folders = Path(args.checkpoint_dir).glob(f"*_seed_{args.seed}")
        folders = sorted(folders, key=lambda folder: (any(folder.glob("step_*")), os.path.getmtime(folder)))
        parts = [parse_stem(folder.name) for folder in folders if folder.is_dir()]
        args.run_id = next((run_id for name, run_id, _ in filter(None, reversed(parts)) if name == args.name), "")
    args.run_id = args.run_id or date.today().strftime("%Y%m%d")
    return run_stem(args.name, args.run_id, args.seed)


def agree_on_names(args, machine):
    """choose_names() for all ranks, by rank 0, which sees the folders of checkpoints."""
    common.together(lambda: machine.is_main and choose_names(args), machine)
    args.name, args.run_id = common.from_rank_0((args.name, args.run_id), machine)
    return run_stem(args.name, args.run_id, args.seed)


# ---------------------------------------------------------------------------------------------------------------------
# What is there already, and what may be resumed

NEEDED = ("args", "config", "loader", "progress", "step", "record")  # in a checkpoint to resume, beside the tensors
# Fixed in a run, yet free in one that branches off another run's checkpoint.
MAY_BRANCH = ("seed", "max_lr", "min_lr", "warmup_steps", "schedule", "decay_steps", "router_lr_scale",
              "router_weight_decay", "muon_lr", "init_from", "parent")  # fmt: skip


def hold(args, paths, locks):
    """Lock the log and the checkpoints of the run, each against any other run that would write it.

    The lock of the checkpoints lies in their folder, so that `checkpoints/NAME*` matches folders alone.
    """
    check_writable(args.logs_dir, "--logs_dir")
    for path in paths if args.save_checkpoint or args.resume else paths[:1]:
        locks.enter_context(lock(path, "wait for it, or choose another --run_id"))


def read_record(log_path):
    """The JSON beside a log, {} where there is none. UserError when it is damaged."""
    path = Path(log_path).with_suffix(".json")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it, or remove it") from None
    if not isinstance(record, dict):
        raise UserError(f"{path} does not hold the settings of a run: restore it, or remove it")
    return record


def compare_with_log(log_path, settings):
    """{name: (in the log, here)} of the settings that differ; {} for a log without settings."""
    return differences(read_record(log_path).get("settings", settings), settings)


def refuse_existing(log_path, newest_checkpoint, settings):
    """UserError where a fresh start would write over a run of the same name."""
    there = next(
        (path for path in (log_path, newest_checkpoint) if path and path.exists() and path.stat().st_size), None
    )
    if there is None:
        return
    pairs = compare_with_log(log_path, settings)
    if pairs:
        raise UserError(f"{there} holds another run ({describe(pairs)}): pass another --run_id or --name")
    raise UserError(f"{there} holds this run: pass --resume auto to continue it, or another --run_id")


def set_aside(log_path, folder, settings):
    """`--resume auto` without a checkpoint: keep the log of this run under another name, refuse that of another one.

    Returns the new name, or None where there is no log.
    """
    if not log_path.exists() or not log_path.stat().st_size:
        return None
    if pairs := compare_with_log(log_path, settings):
        raise UserError(f"{log_path} holds another run ({describe(pairs)}): pass another --run_id or --name")
    kept = next(path for i in range(1, 10**6) if not (path := Path(f"{log_path}.{i}")).exists())
    os.replace(log_path, kept)
    return kept


NUMBER = (int, float)
FORM = {  # of the parts of a checkpoint that a resumed run reads before it builds anything
    "args": {"name": str, "run_id": str, "seed": int},
    "record": {
        "settings": dict, "changes": [{"step": int, "settings": dict}], "identity": str, "device": str, "dtype": str,
        "world_size": int, "torch": str, "flops_per_token": NUMBER, "params_total": int, "params_active": int,
    },
}  # fmt: skip
PROGRESS = {"step": int, "hours": NUMBER, "clock": NUMBER, "skipped": int, "skipped_in_a_row": int,
            "history": [NUMBER], "unlogged": dict}  # fmt: skip


def fits(value, form):
    """Whether nested dicts and lists hold the types of `form`; other keys are ignored."""
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(item, form[0]) for item in value)
    if isinstance(form, dict):
        return isinstance(value, dict) and all(key in value and fits(value[key], form[key]) for key in form)
    return isinstance(value, form)


def check_form(state, path):
    """`state`; UserError, naming `path`, for a checkpoint that load() took but train_single_gpu.py did not write."""
    progress = state["progress"]
    if not fits(state, FORM) or not all(key in PROGRESS and fits(progress[key], PROGRESS[key]) for key in progress):
        raise UserError(f"{path} does not hold the record and progress of a run: use an older checkpoint")
    return state


def find_state(args, folder, log_path, say):
    """The checkpoint to continue from, or None for a fresh start, which never writes over a run that is there."""
    from lab import checkpoint  # here: it imports torch, which runlog.py does without

    if not args.resume:
        refuse_existing(log_path, checkpoint.newest(folder), settings_of(args))
        return None
    if args.resume == "auto":
        path, state = checkpoint.load_newest(folder, needs=(*NEEDED, "model", "optimizer"))
        if state is None:
            kept = set_aside(log_path, folder, settings_of(args))
            say(f"no checkpoint in {folder}: starting at step 0" + (f"; the old log is kept as {kept}" if kept else ""))
        return state and check_form(state, path)
    if not Path(args.resume).exists():
        raise UserError(f"--resume {args.resume}: no such file or folder; auto takes the newest checkpoint of this run")
    state = check_form(checkpoint.read_checkpoint(args.resume, needs=(*NEEDED, "model", "optimizer"))[1], args.resume)
    last = checkpoint.newest(folder)
    if last and checkpoint.step_of(last) > state["step"]:  # else a later --resume auto would take it
        raise UserError(f"{last} is newer than {args.resume}: remove the newer ones, or give another --run_id")
    return state


def settle(args, state, stem, log_path, say):
    """(settings of the run, changes): of one that starts, continues, or branches off another run's checkpoint.

    Changes are those made on resume, [{"step": the first with the new values, "settings": {name: value}}].
    Refuses a setting that would make it another run; names the ones that changed. log_path is of the rank that writes.
    """
    if state is None:
        return settings_of(args), []
    record = state["record"]
    continues = run_stem(*(state["args"][name] for name in ("name", "run_id", "seed"))) == stem
    parent = record["settings"].get("parent") if continues else f"{parent_identity(record, args)}@{state['step']}"
    if (
        parent and args.decay_steps and args.max_steps == type(args).max_steps
    ):  # a branch that decays from where it began
        args.max_steps = int(parent.split("@")[1]) + args.decay_steps
    now = settings_of(args) | ({"parent": parent} if parent else {})
    then = record["settings"] | {
        name: value for change in record["changes"] for name, value in change["settings"].items()
    }
    if continues and log_path:
        check_tied(log_path, state)
    pairs = differences(then, now)
    check_fixed(args, pairs, continues)
    for name, (there, here) in pairs.items():
        say(f"--{name} was {there} in the checkpoint and is {here} now")
    if not continues:
        say(f"a new run, from step {state['step']} of {state['args']['name']} {state['args']['run_id']}")
        return now, []
    change = [{"step": state["step"], "settings": {name: here for name, (_, here) in pairs.items()}}] if pairs else []
    return record["settings"], record["changes"] + change


def parent_identity(record, args):
    """The identity of the run of `record`, without the seeds that its branch has too: branches of other seeds, each of
    its own parent, are one group."""
    settings = record["settings"]
    return identity(settings, without=[name for name in SEEDS if settings.get(name) == getattr(args, name)])


def check_fixed(args, pairs, continues):
    """UserError for the first difference that is not allowed in a run that continues, or branches off."""
    for name, (there, here) in pairs.items():
        if role(hints(type(args)).get(name)).fixed and (continues or name not in MAY_BRANCH):
            if name == "data":
                was = f"the checkpoint was trained on other shards than those in {args.data_root}"
                raise UserError(f"{was}: pass the --data_root it was trained on, or start without --resume")
            was = f"the checkpoint was made with --{name} {there}, not {here}"
            branch = " branch off with --resume PATH and" if name in MAY_BRANCH else " start another run with"
            raise UserError(f"{was}: pass --{name} {there}, or{branch} another --run_id")


def check_tied(log_path, state):
    """UserError unless the log is that of the checkpoint, and reaches as far."""
    record = read_record(log_path)
    remedy = "pass the --logs_dir of that run, or --resume PATH with another --run_id to branch off"
    if record.get("identity", state["record"]["identity"]) != state["record"]["identity"]:
        raise UserError(f"{log_path} is the log of another run than the checkpoint at step {state['step']}: {remedy}")
    last = last_step(log_path)
    if last < state["step"] - 1 - len(state["progress"]["unlogged"]):
        has = f"ends at step {last}" if last >= 0 else "is not there"
        raise UserError(f"the checkpoint at step {state['step']} continues {log_path}, which {has}: {remedy}")


def last_step(log_path):
    """The last step whose train loss the log holds, -1 without one; damaged lines are passed over."""
    if not Path(log_path).exists():
        return -1
    lines = [line.split() for line in Path(log_path).read_bytes().splitlines()]
    trained = [line for line in lines if len(line) == 3 and line[1] == b"train" and line[0].isdigit()]
    return max((int(line[0]) for line in trained), default=-1)
