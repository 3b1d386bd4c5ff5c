"""Runs as one table: read from run folders and kept experiments, and kept small.

An experiment is kept in a folder: README.md (question, command, commit, caveats), experiment.json (what is the same in
all runs), runs.csv (a row per run), curves.parquet (run, step, stream, value; evaluations whole, the rest thinned).
"""

import json
import shlex
import sys
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd

from lab import runs
from lab.common import UserError, atomic_write

LOADS = ("max_vio", "worst_vio", "drop_frac", "val_drop")
NUMBERS = ("val", "best_val", "val_bpb", "hella", "best_hella", "hours", "tok_per_sec", "spikes", *LOADS)
FACTS = ("parameters", "active_parameters", "flops_per_token", "optimizer_flops", "commit", "machine")
MEASURED = ("run", "name", "state", "step", *NUMBERS, *FACTS)  # all other columns of a table are settings
POINTS = 40  # means that are kept of a stream that is logged at every step


def read(paths, at_step=None):
    """(table, curves) of folders: a row per run, and what is kept of the logs as rows of run, step, stream, value.

    With `at_step` runs are judged there: later values do not count, and a run without val at that step is unfinished.
    """
    tables, curves = [], []
    for folder in runs.find(paths):
        config, log = runs.read_config(folder), runs.read_log(folder)
        row = describe(config) | measure(log, config, at_step) | {"run": name_of(folder)}
        tables.append(pd.DataFrame([row]))
        curves.append(thin(log).assign(run=name_of(folder)))
    for folder in sorted({file.parent for path in paths for file in Path(path).rglob("experiment.json")}):
        table, curve = read_kept(folder)
        if at_step is not None:
            logs = dict(list(curve.groupby("run")))
            judged = pd.DataFrame([measure(logs[run], None, at_step) for run in table.run])
            table = table.drop(columns=judged.columns, errors="ignore").join(judged)
        tables.append(table)
        curves.append(curve)
    if not tables:
        raise UserError(f"no runs in {' '.join(map(str, paths))}")

    # one run that is named twice, such as its log and its kept copy, counts once
    table = pd.concat([table.dropna(axis=1, how="all") for table in tables], ignore_index=True)
    table = table.reindex(columns=list(dict.fromkeys([*MEASURED, *runs.SEEDS, *table])))
    again = table.assign(val=table.val.astype("float32")).duplicated(["run", "step", "val"])
    table = table[~again].reset_index(drop=True).fillna({"data_seed": 0})
    if table.run.duplicated().any():
        raise UserError(f"two runs are called {table.run[table.run.duplicated()].iloc[0]}: rename the folder of one")
    return table, pd.concat(curves, ignore_index=True).drop_duplicates(["run", "step", "stream"])


def name_of(folder):
    """logs/equal/no_moe_seed_1 is called equal/no_moe_seed_1."""
    return "/".join(Path(folder).resolve().parts[-2:])


def describe(config):
    """Settings and facts of a run, from its config.json."""
    facts = {name: config.get(name) for name in ("name", *FACTS, "data", "tokenizer")}
    facts["machine"] = f"{config['world_size']} x {config['device']}, threads {config['threads']}"
    # a batch or dtype changed on the way is another experiment than one that had it from the start
    changes = []
    for resumed in config["resumed"]:
        changes += [f"{name} at {resumed['step']}" for name in resumed["changed"] if name not in runs.UNCOUNTED]
    return runs.settings_of(config) | facts | {"changed": ", ".join(changes) or None}


def measure(log, config, at_step=None):
    """How a run ended and the numbers of its log; nan for those it does not have.

    val, hella: last; best_*: best. max_vio, drop_frac: median over the last quarter of the steps. worst_vio, val_drop:
    of the worst layer in the last validation. hours: of training until the last val, evaluation excluded.
    """
    if at_step is not None:
        log = log[log.step <= at_step]
    values, tail = log.groupby("stream").value, log[log.step >= 0.75 * log.step.max()]
    last, middle, late = values.last(), values.median(), tail.groupby("stream").value.median()
    step = log.step[log.stream == "val"].max()
    found = {"state": runs.state(config, log), "step": 0 if np.isnan(step) else int(step)}
    found |= last.reindex(["val", "val_bpb", "hella"]).to_dict()
    found |= middle.reindex(["tok_per_sec"]).to_dict() | late.reindex(["max_vio", "drop_frac"]).to_dict()
    found["best_val"], found["best_hella"] = values.min().get("val", np.nan), values.max().get("hella", np.nan)
    found["hours"] = log.value[(log.stream == "hours") & (log.step < step)].max()
    found["worst_vio"] = last[last.index.str.startswith("val_max_vio_")].max()
    found["val_drop"] = last[last.index.str.startswith("val_drop_frac_")].max()
    if config is not None:  # a kept log holds means over steps, which say nothing about spikes
        found["spikes"] = len(runs.spike_steps(log))
    if at_step is not None and found["state"] in ("ok", "unfinished"):
        found["state"] = "ok" if found["step"] == at_step else "unfinished"
    return found


def thin(log):
    """Evaluations, hours at them and events whole; means of train, max_vio, drop_frac; expert load at the last step."""
    is_load = log.stream.str.startswith("load_")
    at_val = log.step.isin(log.step[log.stream == "val"] - 1)
    parts = [log[log.stream.isin((*runs.EVALUATIONS, "diverged"))], log[(log.stream == "hours") & at_val]]
    parts.append(log[is_load & (log.step == log.step[is_load].max())])
    parts.append(pd.DataFrame({"step": runs.spike_steps(log), "stream": "spike", "value": 1.0}))
    for _, rows in log[log.stream.isin(("train", "max_vio", "drop_frac"))].groupby("stream"):
        part = np.arange(len(rows)) * POINTS // max(len(rows), POINTS)
        parts.append(rows.groupby(part).agg({"step": "last", "stream": "last", "value": "mean"}))
    return pd.concat([log[:0], *(part for part in parts if len(part))], ignore_index=True)


def keep(table, curves, folder):
    """Write an experiment into `folder`: the files named at the top, and a README.md to fill in where there is none."""
    folder, table = Path(folder), table.dropna(axis=1, how="all")
    if (folder / "runs.csv").exists() and not set(pd.read_csv(folder / "runs.csv").run) <= set(table.run):
        raise UserError(f"{folder} holds other runs: name it as a FOLDER too, or keep in another one")
    varying = ("run", "name", "state", "step", *NUMBERS, *runs.SEEDS)
    same = [name for name in table if name not in varying and table[name].map(as_text).nunique() == 1]
    commits, machines = sorted(set(table.commit.map(as_text))), sorted(set(table.machine.map(as_text)))
    facts = {"command": shlex.join(["python", *sys.argv]), "date": str(date.today()), "commits": commits}
    facts |= {"machines": machines, "same_in_all_runs": {name: table[name].iloc[0] for name in same}}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "runs.csv", "w") as f:
        table.drop(columns=same).to_csv(f, index=False, float_format="%.8g")
    with atomic_write(folder / "curves.parquet") as f:
        packing = {"use_dictionary": ["run", "step", "stream"], "use_byte_stream_split": ["value"]}  # less than half
        curves.astype({"step": "int32", "value": "float32"}).to_parquet(f, index=False, compression="zstd", **packing)
    with atomic_write(folder / "experiment.json", "w") as f:
        json.dump(facts, f, indent=1, default=lambda value: value.item())
    if not (folder / "README.md").exists():
        made = f"{len(table)} runs of {' '.join(dict.fromkeys(table.name))}, commit {', '.join(commits)}. Command:"
        text = f"# {folder.name}\n\nQuestion:\n\nAnswer:\n\n## How it was made\n\n{made}\n\n    python sweep.py\n\n"
        text += f"The table: `python compare.py {folder}`\n\n## Caveats\n\n-\n"
        (folder / "README.md").write_text(text, "utf-8")


def read_kept(folder):
    """(table, curves) of an experiment that keep() wrote."""
    table, curves = pd.read_csv(folder / "runs.csv"), pd.read_parquet(folder / "curves.parquet")
    facts = json.loads((folder / "experiment.json").read_text("utf-8"))
    return table.assign(**{name: [value] * len(table) for name, value in facts["same_in_all_runs"].items()}), curves


def as_text(value):
    """A setting as text: the same for 2 and 2.0, for None and absent."""
    if value is None or value != value:
        return "-"
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    return f"{value:.10g}" if is_number else str(value)
