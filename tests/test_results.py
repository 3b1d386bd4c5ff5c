"""The table of results/README.md is what its logs say."""

import re
from pathlib import Path

import runlog
import sweep

RESULTS = Path(__file__).resolve().parents[1] / "results"


def measured(folder):
    """{variant: the cells of its row} of the runs in `folder`."""
    runs = runlog.load_runs(folder)
    names = {run.name: sweep.variant_of(run).name for run in runs}
    cells = {}
    for row in runlog.summary(runs).itertuples():
        val = f"{row.val_mean:.3f} ± {row.val_std:.3f}"
        cells[names[row.variant]] = [val, f"{row.diverged} of {row.runs}", f"{row.spikes:.1f}", f"{row.max_vio:.2f}"]
    return cells


def test_table_of_the_cpu_runs():
    want = measured(RESULTS / "cpu_small")
    rows = re.findall(r"^\| `(\S+)` \|(.*)\|$", (RESULTS / "README.md").read_text(), re.MULTILINE)
    told = {
        name: [cell.strip().replace("-", "nan") for cell in rest.split("|")][1:5]
        for name, rest in rows
        if name in sweep.VARIANTS
    }
    assert told == want
