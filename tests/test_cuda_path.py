"""The code that runs on CUDA, checked without a GPU: shapes, types and waits on a fake cuda:0, numbers on the CPU."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import fake_cuda
import pytest
import torch
from torch.utils import cpp_extension

from lab import kernels
from model import GPT, GPTConfig, MoE

TESTS = Path(__file__).parent

# -- on fake tensors, in a process that believes in cuda:0


@pytest.fixture(scope="module")
def watched(tmp_path_factory, shards):
    """{"variants" or "faults": {name: what fake_cuda.py found}}."""
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


@pytest.mark.slow
def test_every_variant_is_one_graph_without_waiting_for_the_device(watched):
    """Steps, validation, HellaSwag and samples, with the operands that CUDA's kernels take."""
    found = watched["variants"]
    assert {name: variant["error"] for name, variant in found.items() if variant["error"]} == {}
    assert {name for name, variant in found.items() if variant["graphs"] != 1} == set()
    dense = {name for name, settings in fake_cuda.variants().items() if settings.get("n_exp") == 1}
    assert {name for name, variant in found.items() if not variant["grouped"]} == dense
    assert found.keys() == fake_cuda.variants().keys()


FAULTS = {
    "int64 offsets": "offsets torch.int64",
    "strided offsets": "offsets torch.int32 (2,)",
    "float32 operands": "grouped_mm in torch.float32",
    "expanded gradient": "strides (0, 1)",
    "transposed gradient": "strides (1, 128)",
    "odd width": "no multiple of 16 bytes",
    "loop over experts": "moe::experts: the host waits",
    "router in float32": "a product in float32",
    "item": "_local_scalar_dense: the host waits",
    "copy to the host": "a copy to the host",
    "upload": "1 uploads that block",
    "graph break": "graph_break",
    "batch not pinned": "2 uploads that block",
    "read after the update": "the host waits for the optimizer",
    "attention by cuDNN": "attention by cuDNN",
    "look at each token": "6 transfers to the host, at most 3",
    "checked draw": "multinomial: the host waits",
}


@pytest.mark.slow
def test_faults_are_found(watched):
    found = watched["faults"]
    assert found.keys() == FAULTS.keys()
    for name, words in FAULTS.items():
        assert words in (found[name]["error"] or ""), name


# -- on real tensors of the CPU that say they are on CUDA: the branch of CUDA is taken and computed

SETTINGS = {
    "top2": {"train_capacity": math.inf},
    "capacity": {"use_noisy_top_k": True, "use_aux_loss": True, "use_router_z_loss": True},
    "top1": {"top_k": 1, "gate": "softmax", "n_shared_exp": 1, "bias": False},
}


def on_cuda(patch):
    patch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    patch.setattr(kernels, "experts_loop", None)  # whoever calls it fails


def both_ways(monkeypatch, run):
    """run() on the branches of CPU and CUDA, each with the same random numbers."""
    results = []
    for cuda in (False, True):
        with monkeypatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
            if cuda:
                on_cuda(patch)
            torch.manual_seed(0)
            results.append(run())
    return results


def is_close(ours, expected, tolerance):
    return (ours.float() - expected.float()).norm() <= tolerance * expected.float().norm() + 1e-6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("loads", ["even", "two of eight"])
def test_experts_on_the_branch_of_cuda_are_those_of_the_cpu(loads, bias, monkeypatch):
    """Output and gradients of a MoE layer, also where experts have no rows."""
    config = GPTConfig(n_exp=8, n_embd=64, n_head=4, bias=bias, train_capacity=math.inf)
    x, grad = torch.randn(2, 4, 61, 64, generator=torch.Generator().manual_seed(1))
    if loads != "even":
        x[..., 0] = 9

    def run():
        layer, leaf = MoE(config), x.clone().requires_grad_()
        with torch.no_grad():
            for p in layer.parameters():
                p.normal_(std=0.05)
            layer.router.w_g.weight[:, 0] = torch.tensor([9.0, 8.0, *[0.0] * 6]) if loads != "even" else 0.0
        y, _ = layer(leaf)
        y.backward(grad)
        return [y.detach(), leaf.grad, *(p.grad for p in layer.parameters())], layer.count

    (cpu, count), (cuda, cuda_count) = both_ways(monkeypatch, run)
    assert torch.equal(count, cuda_count) and int((count == 0).sum()) == (0 if loads == "even" else 6)
    assert all(is_close(ours, expected, 0.02) for ours, expected in zip(cuda, cpu, strict=True))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_on_the_branch_of_cuda_is_that_of_the_cpu(name, monkeypatch):
    shape = {"n_layer": 2, "n_embd": 64, "n_head": 4, "block_size": 64, "vocab_size": 512, "n_exp": 8}
    idx, targets = torch.randint(512, (2, 2, 64), generator=torch.Generator().manual_seed(1))

    def run():
        model = GPT(GPTConfig(**shape | SETTINGS[name]), torch.Generator().manual_seed(0))
        loss = model(idx, targets).loss
        loss.backward()
        return loss.item(), {key: p.grad for key, p in model.named_parameters()}

    (loss, grads), (cuda_loss, cuda_grads) = both_ways(monkeypatch, run)
    assert cuda_loss == pytest.approx(loss, rel=1e-4)
    for key, expected in grads.items():
        assert cuda_grads[key].dtype == torch.float32 and cuda_grads[key].is_contiguous(), key
        # a router's gradient is a small difference of large numbers
        assert ".router." in key or is_close(cuda_grads[key], expected, 0.03), key
