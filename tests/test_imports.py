"""Imports run downwards, scripts -> model.py -> lab/, and the code stays small.

    python tests/test_imports.py      # as `make lint` does: exit code 1 and one line per fault
"""

import ast
import graphlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES_OF_ALL, MAX_LINES_OF_A_FILE = 6_500, 700  # of code: without tests, docs and notebook


def modules(root):
    """{name: path} of the project's own modules, such as "model" and "lab.data"."""
    found = {path.stem: path for path in root.glob("*.py")}
    found |= {f"lab.{path.stem}": path for path in (root / "lab").glob("*.py")}
    return found


def imports_in(tree, names):
    """The modules of `names` that a syntax tree imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & names


def faults(root):
    """One line for each import that is a circle, points out of lab/, or hides in a function, and for each excess."""
    found, graph = [], {}
    files = modules(root)
    for name, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        graph[name] = imports_in(tree, files.keys())

        # lab/ is what a reader may take on trust: it knows nothing of the scripts or of model.py
        upwards = {other for other in graph[name] if not other.startswith("lab.")}
        if name.startswith("lab.") and upwards:
            found.append(f"{path}: imports {', '.join(sorted(upwards))} from above lab/")

        # only slow third-party imports may wait until a function is called
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                for other in sorted(imports_in(node, files.keys())):
                    found.append(f"{path}:{node.lineno}: {node.name}() imports {other}: import it at the top")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f"imports in a circle: {' -> '.join(reversed(error.args[1]))}")

    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files.values()}
    long = [path for path in lines if lines[path] > MAX_LINES_OF_A_FILE]
    found += [f"{path}: {lines[path]} lines, at most {MAX_LINES_OF_A_FILE}" for path in long]
    if sum(lines.values()) > MAX_LINES_OF_ALL:
        found.append(f"{sum(lines.values())} lines of code in all, at most {MAX_LINES_OF_ALL}")
    return found


def test_imports_run_downwards_and_the_code_is_small():
    assert faults(ROOT) == []


if __name__ == "__main__":
    sys.exit("\n".join(faults(ROOT)) or 0)
