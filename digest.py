"""Writes results/digest.md, and tables between markers in README.md and results/README.md, from the logs in results/.

    python digest.py

A table in a page stands between two lines, and is replaced by the rows of the named variants (all, if none is named):

    <!-- digest: equal no_moe,max_steps=2596 only_moe half_width -->
    <!-- end -->

The first word is a folder in results/, the second the baseline as in `python runlog.py --baseline`, and the others are
variants, with settings in the same form if one is not enough: half_width,n_exp=16. Folders that hold one learning rate
each make one table, a row per variant and warmup and a column per rate:

    <!-- digest: basin_* no_moe only_moe -->
    <!-- end -->
"""

import fnmatch
import re
from dataclasses import dataclass
from pathlib import Path

import compare
import runlog
import sweep
from lab import common
from lab.common import UserError, atomic_write

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
PAGES = (ROOT / "README.md", RESULTS / "README.md")
BASELINES = ("no_moe", "only_moe")  # of every folder that has them
MORE_BASELINES = {
    "equal": ("no_moe,max_steps=2596",),  # the FLOPs of top 2
    "methods": ("no_moe,n_embd=148", "dense_muon"),  # its FLOPs and active parameters; its optimizer
}
PUBLISHED_STEP = 25_250  # as far as the published MoE runs go
SHORT = ("variant", "label", "settings", "n", "failed", "val", "minus baseline [95 %]", "p (Holm)", "outcome")

HEAD = """# Digest of the logs

Made by `python digest.py` from the logs in this folder; a test fails if it is stale. compare.py has the rules.

val: the last validation loss in nats per token (per byte, if bytes are tokens), mean±standard deviation over the runs
that did not fail. minus baseline: the difference with its 95 % interval. outcome: works, mixed, no difference seen,
harms, breaks. FLOPs: spent, relative to the baseline. max_vio, drop_frac: in training, mean over layers; worst_vio,
val_drop: in validation, worst layer. A dash: not logged, or not defined.
"""


@dataclass
class Args:
    """No settings."""


def experiments():
    """{folder in results/: its Experiment}, of the folders with thinned logs."""
    folders = sorted({path.parent for path in RESULTS.glob("**/log_*.csv")})
    return {folder.relative_to(RESULTS).as_posix(): Experiment(folder) for folder in folders}


class Experiment:
    """The groups of a folder, and its tables: a page asks for rows of one more than once."""

    def __init__(self, folder):
        self.groups = compare.in_order(compare.group(runlog.load_runs(folder.glob("log_*.csv"))))
        self.tables = {}

    def compared(self, baseline):
        """The groups that compare with a baseline, their table, and what its effective speedups are."""
        if baseline not in self.tables:
            groups = comparable(self.groups, baseline)
            table = compare.add_differences(compare.summary_of(groups), groups, baseline)
            self.tables[baseline] = groups, *compare.add_speedups(table, groups, baseline)
        return self.tables[baseline]


def markdown(shown):
    """A DataFrame of text as a table; the variants in code type."""
    shown = shown.assign(variant=[f"`{name}`" for name in shown.variant])
    rows = [list(shown), ["---"] * len(shown.columns), *shown.values.tolist()]
    return "".join("| " + " | ".join(map(str, row)) + " |\n" for row in rows)


def comparable(groups, baseline):
    """The rows of a table: all groups against dense; else MoEs, and those that a baseline with settings tells apart.

    A baseline with settings is for one question, such as equal FLOPs: rows with other settings than those are left out.
    """
    base = groups[compare.find_baselines(groups, baseline)[0]]
    name, settings = compare.parse_spec(baseline)
    if name == "no_moe" and not settings:
        return groups
    moes = [runs for runs in groups if runs is base or not sweep.is_dense(runs[0].settings or {})]
    return [runs for runs in moes if not settings or set(compare.disagreement(runs, base)) <= settings.keys()]


def section(name, experiment):
    """The tables of one folder, one for each baseline; a single one without differences where there is none."""
    groups = experiment.groups
    names = {compare.variant(runs) for runs in groups}
    text = f"\n## {name}\n"
    baselines = [b for b in (*BASELINES, *MORE_BASELINES.get(name, ())) if b.partition(",")[0] in names]
    if len(names) < 2 or not baselines:
        return f"{text}\n{markdown(compare.cells(compare.summary_of(groups)))}"
    for baseline in baselines:
        _, table, fit = experiment.compared(baseline)
        words = [compare.least_difference(table), *([] if fit.startswith("no effective") else [fit])]
        notes = "".join(f"- {line}\n" for line in [*words, *compare.notes(table), compare.provenance(groups)])
        text += f"\nBaseline: `{baseline}`\n\n{markdown(compare.cells(table))}\n{notes}"
    return text


def published():
    """The tables of the published runs at one step, with the load-balance loss taken out of val."""
    runs = map(runlog.without_aux_loss, runlog.load_published(RESULTS / "published" / "curves.csv"))
    groups = compare.in_order(compare.group(runs))
    text = (
        f"\n## published, at step {PUBLISHED_STEP:,}\n\nIn mid-schedule. The published val contains the router losses. "
    )
    text += f"{runlog.PUBLISHED_AUX_LOSS} is subtracted for\nthe load-balance loss; the z-loss stays in.\n"
    for baseline in BASELINES if groups else ():
        table = compare.add_differences(compare.summary_of(groups, PUBLISHED_STEP), groups, baseline, PUBLISHED_STEP)
        notes = compare.least_difference(table)
        text += f"\nBaseline: `{baseline}`\n\n{markdown(compare.cells(table))}\n- {notes}\n"
    return text if groups else ""


def short_table(folders, line):
    """The table of a marker's words: folder, baseline, variants. p-values are corrected as in the digest's table."""
    name, baseline, *variants = line.split()
    if name not in folders:
        raise UserError(f"<!-- digest: {line} -->: no logs in results/{name}; there are {', '.join(folders)}")
    groups, table, _ = folders[name].compared(baseline)
    shown = compare.cells(table).assign(label=[label_of(name) for name in table.variant])
    found = {spec: compare.matching(groups, spec) for spec in variants}
    if absent := [spec for spec in variants if not found[spec]]:
        raise UserError(f"<!-- digest: {line} -->: no runs of {absent[0]} in this table")
    shown = shown.iloc[[i for rows in found.values() for i in rows]] if variants else shown
    shown = shown[[head for head in SHORT if head in shown and set(shown[head]) != {"-"}]]
    return markdown(shown)


def table_of_rates(folders, line):
    """The table of a marker's words: a pattern of folders, variants. The best rate of a row is in bold type."""
    pattern, *variants = line.split()
    groups = [runs for name in fnmatch.filter(folders, pattern) for runs in folders[name].groups]
    groups = [runs for runs in groups if compare.variant(runs) in variants]
    table = compare.summary_of(groups)
    if absent := [name for name in variants if name not in set(table.get("variant", ()))]:
        raise UserError(f"<!-- digest: {line} -->: no runs of {absent[0]} in results/{pattern}")
    for setting in ("warmup_steps", "max_lr"):
        table[setting] = [runs[0].settings[setting] for runs in groups]
    row = ["variant", "warmup_steps"]
    if (twice := table.duplicated([*row, "max_lr"])).any():
        raise UserError(f"<!-- digest: {line} -->: {table.variant[twice].iloc[0]} has two groups at one rate")
    table["best"] = table.val_mean.where(table[[*compare.FAILED]].sum(axis=1) == 0)
    table["best"] = table.best == table.groupby(row).best.transform("min")
    table["cell"] = [cell_of_rates(group) for group in table.itertuples()]
    shown = table.pivot(index=row, columns="max_lr", values="cell").fillna("-").reindex(variants, level="variant")
    shown = shown.rename(columns="{:g}".format).reset_index()
    shown.insert(1, "label", list(map(label_of, shown.variant)))
    return markdown(shown.rename(columns={"warmup_steps": "warmup"}))


def cell_of_rates(group):
    """Last val of a row of compare.summary(), or how many of its runs failed."""
    failed = [f"{n} of {group.runs} {state}" for state in compare.FAILED if (n := getattr(group, state))]
    val = compare.spread(group.val_mean, group.val_std, 3)
    return ", ".join(failed) or (f"**{val}**" if group.best else val)


def label_of(name):
    return sweep.VARIANTS[name].label if name in sweep.VARIANTS else "-"


def filled(text, folders):
    """The text of a page with every table between markers made anew; a pattern of folders asks for a table of rates."""
    marked = re.compile(r"(<!-- digest: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)

    def anew(found):
        table = table_of_rates if "*" in found[2] else short_table
        return f"{found[1]}\n{table(folders, found[2])}\n{found[3]}"

    return marked.sub(anew, text)


def pages(folders):
    """{path: the text that it should have}, of experiments()."""
    digest = HEAD + "".join(section(name, experiment) for name, experiment in folders.items()) + published()
    return {RESULTS / "digest.md": digest} | {page: filled(page.read_text("utf-8"), folders) for page in PAGES}


def main():
    common.parse(Args)
    for path, text in pages(experiments()).items():
        if not path.exists() or path.read_text("utf-8") != text:
            with atomic_write(path, "w") as f:
                f.write(text)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    common.run(main)
