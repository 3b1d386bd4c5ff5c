"""What bench.py measures and reports with: turns, ratios within a round, peak memory, tables, JSON.

`args` is bench.Args. A stamp is a moment: a float on the CPU, an event in the stream on CUDA.
"""

import dataclasses
import functools
import itertools
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import atomic_write

# ---------------------------------------------------------------------------------------------------------------------
# Time and memory


def stamp(args):
    if args.device == "cpu":
        return time.process_time() if args.clock == "cpu" else time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # recorded in the stream: measuring makes the host wait for nothing
    event.record()
    return event


def seconds_between(stamps):
    if isinstance(stamps[0], float):
        return [after - before for before, after in itertools.pairwise(stamps)]
    stamps[-1].synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(stamps)]


def take_turns(args, variants, prepare=lambda round_number: None):
    """{name: [seconds of each phase] per round}. All variants in each round, on the same data.

    variants: {name: run}, run(data, mark) with data from prepare(round_number), calls mark() at the end of each phase.
    """
    samples = {name: [] for name in variants}
    torch.compiler.set_stance("default")
    for i in range(args.warmup + args.rounds):
        if args.compile and i == args.warmup:
            torch.compiler.set_stance("fail_on_recompile")  # what still compiles after the warm-up is an error
        data = prepare(i)
        for name, run in variants.items():
            stamps = [stamp(args)]
            run(data, lambda stamps=stamps: stamps.append(stamp(args)))
            seconds = seconds_between(stamps)
            if i >= args.warmup:
                samples[name].append(seconds)
    if args.profile:
        data = prepare(args.warmup + args.rounds)
        for name, run in variants.items():
            write_trace(args, name, functools.partial(run, data, lambda: None))
    return samples


def median_ratio(samples, name, base, phase=None):
    """Median over rounds of the ratio within a round: what slows the machine for a while slows both."""
    pick = sum if phase is None else lambda seconds: seconds[phase]
    return statistics.median(pick(a) / pick(b) for a, b in zip(samples[name], samples[base], strict=True))


def median_seconds(samples, name, phase=None):
    return statistics.median(sum(seconds) if phase is None else seconds[phase] for seconds in samples[name])


def write_trace(args, name, run):
    activities = [torch.profiler.ProfilerActivity.CPU]
    if args.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        run()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    path = args.out_dir / f"trace_{args.bench}_{args.device}_{name.replace('@', '_')}.json"
    profile.export_chrome_trace(str(path))
    print(f"trace: {path}")


def peak_bytes(device, run):
    """Most memory that tensors made by run() held at one time.

    On the CPU the sum of what the allocator was asked for, which, unlike the resident set, does not depend on what the
    process did before. Scratch space inside kernels is not in it.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(max(np.cumsum([0, *(event.nbytes() for event in events)])))


# ---------------------------------------------------------------------------------------------------------------------
# Report


class Target(NamedTuple):
    name: str
    value: float
    relation: str
    limit: float

    def met(self):
        return self.value >= self.limit if self.relation == ">=" else self.value <= self.limit


def report(args, dtype, rows, samples, targets):
    print(f"\n{args.bench}, {args.device}, {dtype}")
    print_table(rows)
    for target in targets:
        verdict = "met" if target.met() else "missed"
        print(f"target  {target.name}: {target.value:.3g} {target.relation} {target.limit:.3g}  {verdict}")
    result = {
        "bench": args.bench, "dtype": dtype, "machine": describe_machine(args), "settings": dataclasses.asdict(args),
        "rows": rows, "targets": [target._asdict() | {"met": bool(target.met())} for target in targets],
        "samples_s": samples,
    }  # fmt: skip
    args.out_dir.mkdir(parents=True, exist_ok=True)
    path = args.out_dir / f"{args.bench}_{args.device}_{dtype}.json"
    with atomic_write(path, "w") as f:
        json.dump(result, f, default=str, indent=1)
    print(path)


def print_table(rows):
    def text(value):
        if not isinstance(value, float):
            return str(value)
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"

    columns = {name: [name, *(text(row.get(name, "")) for row in rows)] for name in rows[0]}
    widths = [max(map(len, column)) for column in columns.values()]
    for line in zip(*columns.values(), strict=True):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def describe_machine(args):
    """What a number means nothing without."""
    if args.device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        names = [line.split(":")[1].strip() for line in read_lines("/proc/cpuinfo") if line.startswith("model name")]
        name = names[0] if names else platform.processor()
    return {
        "name": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load_average": os.getloadavg(),
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
        "commit": git("rev-parse", "HEAD"), "changed_files": git("status", "--porcelain", "--untracked-files=no"),
    }  # fmt: skip


def read_lines(path):
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def git(*words):
    done = subprocess.run(["git", *words], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
