"""Writes results/digest.md, and tables between markers in README.md and results/README.md, from the logs in results/.

    python digest.py

A table in a page stands between two lines, and is replaced by the rows of the named variants (all, where none is):

    <!-- digest: equal no_moe,max_steps=2596 only_moe half_width -->
    <!-- end -->

The first word is a folder in results/, the second the baseline as in `python runlog.py --baseline`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import common
import compare
import runlog
import sweep
from common import UserError, atomic_write

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
PAGES = (ROOT / "README.md", RESULTS / "README.md")
BASELINES = ("no_moe", "only_moe")  # of every folder that has them
MORE_BASELINES = {"equal": ("no_moe,max_steps=2596", "no_moe,n_embd=148")}  # FLOPs, active parameters of top 2
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
    """{folder in results/: its groups}, of the folders with thinned logs."""
    folders = sorted({path.parent for path in RESULTS.glob("**/log_*.csv")})
    return {folder.relative_to(RESULTS).as_posix(): groups_of(folder) for folder in folders}


def groups_of(folder):
    return compare.in_order(compare.group(runlog.load_runs(folder.glob("log_*.csv"))))


def markdown(shown):
    """A DataFrame of text as a table; the variants in code type."""
    shown = shown.assign(variant=[f"`{name}`" for name in shown.variant])
    rows = [list(shown), ["---"] * len(shown.columns), *shown.values.tolist()]
    return "".join("| " + " | ".join(map(str, row)) + " |\n" for row in rows)


def compared(groups, baseline):
    """The table of a folder's groups against a baseline, and what its effective speedups are."""
    table = compare.add_differences(compare.summary_of(groups), groups, baseline)
    return compare.add_speedups(table, groups, baseline)


def section(name, groups):
    """The tables of one folder, one for each baseline; a single one without differences where there is none."""
    names = {compare.variant(runs) for runs in groups}
    text = f"\n## {name}\n"
    baselines = [b for b in (*BASELINES, *MORE_BASELINES.get(name, ())) if b.partition(",")[0] in names]
    if len(names) < 2 or not baselines:
        return f"{text}\n{markdown(compare.cells(compare.summary_of(groups)))}"
    for baseline in baselines:
        table, fit = compared(groups, baseline)
        words = [compare.least_difference(table), *([] if fit.startswith("no effective") else [fit])]
        notes = "".join(f"- {line}\n" for line in [*words, *compare.notes(table)])
        text += f"\nBaseline: `{baseline}`\n\n{markdown(compare.cells(table))}\n{notes}"
    return text


def published():
    """The published runs at one step: counts and means, and no differences, because `val` has router losses in it."""
    runs = runlog.load_published(RESULTS / "published" / "curves.csv")
    table = compare.summary_of(compare.in_order(compare.group(runs)), PUBLISHED_STEP)
    text = f"\n## published, at step {PUBLISHED_STEP:,}\n\nHere val contains the router losses of a run.\n\n"
    return text + markdown(compare.cells(table)) if runs else ""


def short_table(folders, line):
    """The table of a marker's words: folder, baseline, variants."""
    name, baseline, *variants = line.split()
    if name not in folders:
        raise UserError(f"<!-- digest: {line} -->: no logs in results/{name}; there are {', '.join(folders)}")
    table, _ = compared(folders[name], baseline)
    shown = compare.cells(table).assign(label=[label_of(name) for name in table.variant])
    if absent := [v for v in variants if v not in set(table.variant)]:
        raise UserError(f"<!-- digest: {line} -->: no runs of {absent[0]} in results/{name}")
    shown = shown[table.variant.isin(variants or table.variant)]
    shown = shown[[head for head in SHORT if head in shown and set(shown[head]) != {"-"}]]
    return markdown(shown)


def label_of(name):
    return sweep.VARIANTS[name].label if name in sweep.VARIANTS else "-"


def filled(text, folders):
    """The text of a page with every table between markers made anew."""
    marked = re.compile(r"(<!-- digest: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
    return marked.sub(lambda m: f"{m[1]}\n{short_table(folders, m[2])}\n{m[3]}", text)


def pages():
    """{path: the text that it should have}"""
    folders = experiments()
    digest = HEAD + "".join(section(name, groups) for name, groups in folders.items()) + published()
    return {RESULTS / "digest.md": digest} | {page: filled(page.read_text("utf-8"), folders) for page in PAGES}


def main():
    common.parse(Args)
    for path, text in pages().items():
        if not path.exists() or path.read_text("utf-8") != text:
            with atomic_write(path, "w") as f:
                f.write(text)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    common.run(main)
