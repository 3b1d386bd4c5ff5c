"""`gpu`: what a first run on a GPU should tell, by one command and in a given time.

    make gpu                                                    # python -m bench gpu --minutes 9
    python -m bench gpu --data hellaswag_val.jsonl --data_root edu_fineweb10B --minutes 30
    python -m bench gpu --parts step --minutes 9                # one part again; the others keep their files
    python -m bench gpu --device cpu --minutes 3                # the same, small

    machine   versions, missing packages, rates of matrix products and copies
    correct   loss and gradients of every variant against the CPU (correct.py)
    step      the parts of the layer; steps of all variants and sizes without compiling, then compiled, in order of
              interest, as far as the time goes
    data      HellaSwag, text, loader
    train     dense and MoE, trained for the same minutes on --data_root (default: shards of Python's own library)

Each part is a process of its own, so that a device error or a lack of memory ends that part alone. A part may use its
share of --minutes and all that earlier parts left. Each section is written when it is done ({out_dir}/1_machine.json,
...), report.json and report.md after each part. Needs no network.
"""

import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import torch

import hellaswag
import runlog
import sweep
import train_single_gpu
from bench import correct, pipeline, steps
from bench.moe import bench_moe
from bench.report import failures, print_report, write_report
from bench.timing import Target, interleave, median_seconds
from lab import common
from lab.common import UserError, atomic_write
from lab.tokenizer import GPT2Tokenizer, get_tokenizer
from logger import describe_machine

ROOT = Path(__file__).resolve().parents[1]
SHARES = {"machine": 20, "correct": 60, "step": 240, "data": 40, "train": 180}  # of --minutes, in this order
SMALL = {"T": 64, "n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 512, "one_hot_max_tokens": 8192}  # on the CPU
BATCHES = (16, 32, 64)  # sequences per micro-batch of `step`
MORE_COMPILED = ("narrow", "top2_capacity", "noisy_aux_z", "top1")  # where time is left after dense and top2
SETTINGS = {  # of the run of `train`: short steps, so that a minute has many
    "cuda": {"B": 16, "total_batch_size": 131_072, "warmup_steps": 20, "val_loss_every": 25, "val_loss_steps": 4},
    "cpu": {"B": 8, "total_batch_size": 1024, "warmup_steps": 10, "val_loss_every": 20, "val_loss_steps": 2,
            "max_lr": 4e-3, "max_steps": 40},
}  # fmt: skip
RUNS = {"dense": {"n_exp": 1}, "MoE": {"n_exp": 8, "use_aux_loss": True}}

# ---------------------------------------------------------------------------------------------------------------------
# Order and budget. This process never touches CUDA, so that it can fork.


def run(args):
    """Measure all parts. Returns the exit code: 1 where a section failed or a check is wrong."""
    began, elapsed = time.monotonic(), 0
    parts = [part for part in SHARES if part in args.parts]
    for part in parts:  # of an earlier measurement
        path_of(args, part).unlink(missing_ok=True)
    for part in parts:
        elapsed += SHARES[part]
        run_part(args, part, began + 60 * args.minutes * elapsed / sum(SHARES[part] for part in parts))
        report = write_report(args, {part: path_of(args, part) for part in SHARES})
    print_report(report)
    print(f"{args.out_dir}/report.md: {time.monotonic() - began:.0f} s")
    return int(any(failures(report)))


def fill_defaults(args):
    """Settings that depend on the device, which a process of its own looks at."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        args.device, name = pool.apply(find_device, (args.device,))
    args.out_dir = args.out_dir or Path("results/gpu", re.sub(r"\W+", "_", name).strip("_").lower())
    defaults = {"T": 1024, "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50304, "one_hot_max_tokens": 16384}
    defaults = (SMALL if args.device == "cpu" else defaults) | {"rounds": 5, "warmup": 3}
    for field, value in defaults.items():
        if getattr(args, field) is None:
            setattr(args, field, value)
    args.tokens = tuple(sorted(set(args.tokens or (B * args.T for B in BATCHES))))
    args.tokenizer = "gpt2" if args.vocab_size >= GPT2Tokenizer.vocab_size else "bytes"
    if args.dtype == "both":
        args.dtype = "bfloat16" if args.device == "cuda" else "float32"


def find_device(name):
    device = "cuda" if common.choose_device(name).type == "cuda" else "cpu"
    return device, describe_machine(device)["device"]


def run_part(args, part, end):
    """One part in a process of its own, until `end` at the latest; the file of the part says how it ended."""
    began = time.monotonic()
    save_part(args, part, {"status": "start", "seconds": 0.0, "sections": {}})
    process = multiprocessing.get_context("fork").Process(target=measure_part, args=(args, part, end))
    process.start()
    try:
        process.join(max(0.0, end - began))
    finally:
        late = process.is_alive()
        if late:
            kill_group(process)
    found = json.loads(path_of(args, part).read_text())
    if late or process.exitcode:
        ended = "stopped at its time limit" if late else f"died with exit code {process.exitcode}"
        found["status"] = f"{ended}: {found['status']}"
    save_part(args, part, found | {"seconds": time.monotonic() - began})


def kill_group(process):
    """End a part and the processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # where it had no group yet
    process.join()


def measure_part(args, part, end):
    """In the process of the part: its sections in order, each written when it is done."""
    os.setsid()
    threading.Thread(target=end_with_parent, daemon=True).start()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cpu":
        common.keep_freed_memory()
    found = {"status": "start", "seconds": 0.0, "sections": {}}
    for name, function in PARTS[part](args, end):
        save_part(args, part, found | {"status": name})
        found["sections"][name] = measure_section(found["sections"], name, function, end)
        print(f"{part}: {name}: {found['sections'][name]['status']}", flush=True)
    save_part(args, part, found | {"status": "done"})


def end_with_parent():
    """A part whose parent is killed does not keep the device."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os.killpg(0, signal.SIGKILL)


def measure_section(sections, name, function, end):
    """{status, seconds, rows, samples, targets}. One that surely takes longer than the time left is not started.

    Sections whose names begin with the same word take about the same time.
    """
    began, kind = time.monotonic(), name.split()[0]
    needed = max((s["seconds"] for other, s in sections.items() if other.split()[0] == kind), default=0.0)
    if began + needed >= end:
        return {"status": "not run, no time left", "seconds": 0.0, "rows": []}
    found = {"status": "done", "rows": []}
    try:
        rows, samples, targets = function()
        targets = [target._asdict() | {"met": bool(target.met())} for target in targets]
        found = {"status": "done", "rows": rows, "samples_s": samples, "targets": targets}
    except UserError as error:
        found["status"] = f"not run: {error}"
    except torch.OutOfMemoryError as error:
        found["status"] = f"out of memory: {str(error).splitlines()[0]}"
    except Exception as error:  # recorded; the sections after it still run
        found["status"] = "failed: " + (f"{type(error).__name__}: {error}".splitlines() or [""])[0][:300]
        found["traceback"] = traceback.format_exc()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return found | {"seconds": time.monotonic() - began}


def path_of(args, part):
    return args.out_dir / f"{list(SHARES).index(part) + 1}_{part}.json"


def save_part(args, part, found):
    with atomic_write(path_of(args, part), "w") as f:
        json.dump(found, f, default=str, indent=1)


# ---------------------------------------------------------------------------------------------------------------------
# The parts: functions of (args, end) that give (name of a section, function -> rows, samples, targets) in turn


def machine(args, end):
    yield "versions", lambda: (versions(args.device), {}, [])
    for dtype in ("bfloat16", "float32"):
        yield f"rates {dtype}", functools.partial(rates, args, dtype)


def versions(device):
    """Rows (fact, value): machine, device, versions of the packages that requirements.txt names."""
    facts = describe_machine(device) | {"cuda": torch.version.cuda}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {"cudnn": torch.backends.cudnn.version(), "triton": installed("triton"),
                  "capability": f"{properties.major}.{properties.minor}",
                  "processors": properties.multi_processor_count,
                  "memory_GB": properties.total_memory / 1e9}  # fmt: skip
    if device == "cuda" and shutil.which("nvidia-smi"):
        fields = "driver_version,clocks.max.sm,power.limit"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        facts[fields] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    names = re.findall(r"^([\w.-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    facts |= {name: installed(name) for name in names if name != "torch"}
    return [{"fact": fact, "value": value} for fact, value in facts.items()]


def installed(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def rates(args, dtype):
    """TFLOP/s of a square product, GB/s (read and written) of a copy that no cache holds."""
    flops, matmul = steps.matmul_run(args, dtype)
    source = torch.zeros(2**30 if args.device == "cuda" else 2**25, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    copy = lambda data, mark: (target.copy_(source), mark())  # noqa: E731
    samples = interleave(args, {"matmul": matmul, "copy": copy})
    row = {"dtype": dtype, "TFLOP/s": flops / median_seconds(samples, "matmul") / 1e12}
    return [row | {"copy GB/s": 2 * source.nbytes / median_seconds(samples, "copy") / 1e9}], samples, []


def correct_part(args, end):
    def section(check, *arguments):
        return lambda: (check(*arguments), {}, [])

    yield "experts", section(correct.check_experts, args.device)
    yield "grouped product", section(correct.check_grouped_mm, args.device)
    yield "choices", section(correct.check_choices, "only_moe", args.device)
    on_cpu = args.device == "cpu"
    for name in list(sweep.VARIANTS)[:: 12 if on_cpu else 1]:
        yield f"variant {name}", section(correct.check_variant, name, args.device)
    for name in correct.COMPILED[: len(correct.COMPILED) if args.compile or not on_cpu else 0]:
        yield f"compiled {name}", section(correct.check_variant, name, args.device, True)


def step(args, end):
    args = dataclasses.replace(args, bench="step")
    small, large = args.tokens[0], args.tokens[-1]
    eager = [name for name in steps.VARIANTS if name != "one_hot"]

    def section(tokens, names, **settings):
        return functools.partial(time_cells, dataclasses.replace(args, **settings), tokens, names)

    yield "layer", lambda: bench_moe(dataclasses.replace(args, tokens=(small,)), args.dtype)
    for tokens in args.tokens:
        yield f"eager {tokens}", section(tokens, eager)
    if small <= args.one_hot_max_tokens:
        yield f"one-hot {small}", section(small, ("dense", "top2_capacity", "one_hot"))
    yield f"imbalanced {small}", section(small, ("dense", "top2"), imbalanced=True)
    if args.device == "cuda" or args.compile:
        for tokens in dict.fromkeys((small, large)):
            yield f"compiled {tokens}", section(tokens, ("dense", "top2"), compile=True)
        for name in MORE_COMPILED:
            yield f"{name} compiled {small}", section(small, ("dense", name), compile=True)


def time_cells(args, tokens, names):
    with torch._dynamo.config.patch(recompile_limit=256):
        rows, samples = steps.time_steps(args, args.dtype, [(name, tokens) for name in names])
    return rows, samples, steps.step_targets(args, rows, samples) if args.compile else []


def data(args, end):
    args = dataclasses.replace(args, rounds=1, warmup=1)
    long = dataclasses.replace(args, T=max(1024, args.T))  # bytes as tokens, on the CPU, make long examples
    yield "HellaSwag", functools.partial(need_hellaswag, long, all_of_hellaswag)
    few = dataclasses.replace(long, bench="hellaswag", examples=min(args.examples, 100))
    yield "one by one", functools.partial(need_hellaswag, few, pipeline.bench_hellaswag)
    texts = dataclasses.replace(args, bench="sample", new_tokens=min(64, args.T - 8))
    yield "samples", lambda: (*pipeline.bench_sample(texts, args.dtype)[:2], [])  # its targets are of longer texts
    needed = (pipeline.LOADER_BATCHES + 1) * pipeline.LOADER_B * args.T + 1
    loader = dataclasses.replace(args, bench="loader", shard_tokens=max(needed, 10**7 if args.device == "cuda" else 0))
    yield "loader", lambda: pipeline.bench_loader(loader, "uint16")


def need_hellaswag(args, function):
    if not args.data and not hellaswag.PATH.exists():
        raise UserError(f"no {hellaswag.PATH}: give the HellaSwag jsonl with --data FILE")
    return function(args, args.dtype)


def all_of_hellaswag(args, dtype):
    """Seconds of all examples of the file (CPU: --examples), dense, random weights."""
    limit = args.examples if args.device == "cpu" else None
    examples = hellaswag.tokenize(hellaswag.load_examples(args.data or None, limit), get_tokenizer(args.tokenizer))
    model, rows = steps.build_model(args, "dense").eval(), []
    for name in ("first run", "second run"):  # the first loads and plans kernels
        result = hellaswag.evaluate(model, examples, args.device)
        rows.append({"run": name, "examples": result.n, "s": result.seconds, "examples/s": result.n / result.seconds})
    targets = [Target("seconds of HellaSwag", rows[-1]["s"], "<=", 4)] if result.n > 10_000 else []
    return rows, {}, targets


def train(args, end):
    with tempfile.TemporaryDirectory() as folder:
        if not args.data_root:
            yield "shards", lambda: (make_shards(args, folder), {}, [])
        seconds = (end - time.monotonic()) / len(RUNS) - 2
        for name in RUNS:
            yield f"run {name}", functools.partial(train_one, args, name, args.data_root or folder, seconds)


def make_shards(args, folder):
    """Shards of Python's own library."""
    words = [sys.executable, "fineweb.py", "--stdlib", "--tokenizer", args.tokenizer, "--out", folder]
    words += ["--max_tokens", str(20_000_000 if args.device == "cuda" else 200_000)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(done.stderr.strip())
    return [{"shards": done.stdout.splitlines()[0].partition(": ")[2]}]


def train_one(args, name, root, seconds):
    """Rows of val by step, tokens and hours of one run of the trainer, which takes so many seconds.

    Its schedule follows the clock of training, which leaves out compiling: so every run has the same. SIGTERM, which it
    answers after a step, ends one that compiled for too long.
    """
    fixed = 45 if args.device == "cuda" else 2  # compiling, validating
    settings = {"name": name.lower(), "run_id": "gpu", "data_root": root, "logs_dir": str(args.out_dir),
                "max_minutes": max(seconds / 4, seconds - fixed) / 60, "hellaswag_every": 0,
                "sample_from_model_every": 0, "save_checkpoint": False, "progress": "lines"}  # fmt: skip
    settings |= {name: getattr(args, name) for name in ("device", "T", "vocab_size", "n_layer", "n_head", "n_embd")}
    run_args = train_single_gpu.Args(**settings | SETTINGS[args.device] | RUNS[name])
    log = runlog.log_path(run_args.logs_dir, run_args.name, run_args.run_id, run_args.seed)
    for path in (log, log.with_suffix(".json")):  # of an earlier measurement
        path.unlink(missing_ok=True)
    timer = threading.Timer(max(0.1, seconds), os.kill, (os.getpid(), signal.SIGTERM))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the trainer sets its own
    timer.start()
    try:
        with open(os.devnull, "w") as out, contextlib.redirect_stdout(out):
            train_single_gpu.run(run_args)
    except KeyboardInterrupt:
        raise UserError("no time for a step: give more --minutes") from None
    finally:
        timer.cancel()
        Path(f"{log}.lock").unlink(missing_ok=True)
    streams = runlog.read(log)
    if "hours" not in streams:
        raise UserError("no time for a step: give more --minutes")
    hours, speed = (dict(zip(*streams[stream], strict=True)) for stream in ("hours", "tok_per_sec"))
    rows = [
        {"run": name, "step": int(at), "tokens": int(at) * run_args.total_batch_size, "val": value,
         "hours": hours.get(at - 1, 0.0), "tok/s": speed.get(at - 1, math.nan)}
        for at, value in zip(*streams["val"], strict=True)
    ]  # fmt: skip
    return rows, {}, []


PARTS = {"machine": machine, "correct": correct_part, "step": step, "data": data, "train": train}
