"""The code that runs on CUDA, checked without a GPU: shapes, types, strides and waits on a fake cuda:0."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

TESTS = Path(__file__).parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def watched(tmp_path_factory, shards):
    """{"variants" or "faults": {name: what fake_cuda.py found}}, of one process that believes in cuda:0."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the library is preloaded as on Linux")
    if torch.version.cuda or torch.version.hip:
        pytest.skip("needs torch without CUDA: --index-url https://download.pytorch.org/whl/cpu (requirements.txt)")
    library, compiler = tmp_path_factory.mktemp("library") / "fake_cuda.so", cpp_extension.get_cxx_compiler()
    flags = ["-std=c++20", "-shared", "-fPIC", *(f"-I{path}" for path in cpp_extension.include_paths())]
    links = [flag for path in cpp_extension.library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    build = [compiler, *flags, str(TESTS / "fake_cuda.cpp"), "-o", str(library), *links, "-lc10", "-ltorch_cpu"]
    try:
        built = subprocess.run(build, capture_output=True, text=True, timeout=600)
    except FileNotFoundError:
        pytest.skip(f"no C++ compiler {compiler}: apt install g++, or set CXX")
    assert built.returncode == 0, built.stderr[-3000:]
    command = [sys.executable, str(TESTS / "fake_cuda.py"), str(shards)]
    env = os.environ | {"LD_PRELOAD": str(library)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {"variants": {}, "faults": {}}
    for line in map(json.loads, done.stdout.splitlines()):
        found[line.pop("kind")][line.pop("name")] = line
    return found


def test_the_loop_compiles_once_and_waits_for_the_device_once_per_step(watched):
    """A graph per kind of block and one of the loss, over steps, validation, HellaSwag and samples, with the operands
    that CUDA's kernels take; experts in grouped products."""
    found = watched["variants"]
    assert {name: run["error"] for name, run in found.items() if run["error"]} == {}
    assert {name: run["graphs"] for name, run in found.items()} == {name: 2 + (name != "dense") for name in found}
    assert {name for name, run in found.items() if not run["grouped"]} == {"dense"}


def test_faults_are_found(watched):
    said = {
        "int64 offsets": "offsets torch.int64", "transposed gradient": "strides (1, 128)",
        "router in float32": "a product in float32", "item": "_local_scalar_dense: the host waits",
        "graph break": "graph_break", "batch not pinned": "uploads that block",
        "read after the update": "the host waits for the optimizer", "attention by cuDNN": "attention by cuDNN",
    }
    assert watched["faults"].keys() == said.keys()
    for name, words in said.items():
        assert words in (watched["faults"][name]["error"] or ""), name
