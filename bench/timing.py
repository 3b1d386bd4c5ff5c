"""Interleaved timing, ratios within a round, peak memory, tables, JSON.

`args` is the Args of `python -m bench`. A stamp is a moment: a float on the CPU, an event in the stream on CUDA.
"""

import dataclasses
import functools
import itertools
import json
import os
import statistics
import time
from typing import NamedTuple

import numpy as np
import torch

from lab.common import atomic_write
from logger import describe_machine

# ---------------------------------------------------------------------------------------------------------------------
# Time and memory


def stamp(args):
    if args.device == "cpu":
        return time.process_time() if args.clock == "cpu" else time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # recorded in the stream: the host does not wait
    event.record()
    return event


def seconds_between(stamps):
    if isinstance(stamps[0], float):
        return [after - before for before, after in itertools.pairwise(stamps)]
    stamps[-1].synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(stamps)]


def interleave(args, runs, prepare=lambda round_number: None):
    """Time all runs in every round, on the same data: {name: [[seconds of each phase] of each round]}.

    runs: {name: run}; run(data, mark) gets data from prepare(round_number) and calls mark() at the end of each phase.
    """
    samples = {name: [] for name in runs}
    for i in range(args.warmup + args.rounds):
        data = prepare(i)
        # With --compile, compiling after the warm-up is an error.
        with torch.compiler.set_stance("fail_on_recompile" if args.compile and i >= args.warmup else "default"):
            seconds = {name: time_phases(args, functools.partial(run, data)) for name, run in runs.items()}
        if i >= args.warmup:
            for name in runs:
                samples[name].append(seconds[name])
    if args.profile:
        data = prepare(args.warmup + args.rounds)
        for name, run in runs.items():
            write_trace(args, name, functools.partial(run, data, lambda: None))
    return samples


def time_phases(args, run):
    stamps = [stamp(args)]
    run(lambda: stamps.append(stamp(args)))
    return seconds_between(stamps)


def median_ratio(samples, name, base, phase=None):
    """Median over rounds of seconds(name) / seconds(base) within a round, of all phases or of one.

    A machine that is slow for a while slows both.
    """
    pick = sum if phase is None else lambda seconds: seconds[phase]
    return statistics.median(pick(a) / pick(b) for a, b in zip(samples[name], samples[base], strict=True))


def median_seconds(samples, name, phase=None):
    """Median over rounds of the seconds of all phases, or of one."""
    return statistics.median(sum(seconds) if phase is None else seconds[phase] for seconds in samples[name])


def write_trace(args, name, run):
    activities = [torch.profiler.ProfilerActivity.CPU]
    if args.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        run()
    path = args.out_dir / f"trace_{args.bench}_{args.device}_{name.replace('@', '_')}.json"
    profile.export_chrome_trace(str(path))
    print(f"trace: {path}")


def peak_bytes(device, run):
    """Most bytes that tensors made by run() held at one time.

    On the CPU it is counted from allocations and frees; unlike the resident set, it does not depend on what the process
    did before. Scratch space inside kernels is not counted.
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
# Results


class Target(NamedTuple):
    name: str
    value: float
    relation: str
    limit: float

    def met(self):
        return self.value >= self.limit if self.relation == ">=" else self.value <= self.limit


def write_result(args, dtype, rows, samples, targets):
    """Print the table and the targets; write {bench}_{device}_{dtype}.json with every sample to --out_dir."""
    print(f"\n{args.bench}, {args.device}, {dtype}")
    print_table(rows)
    for target in targets:
        verdict = "met" if target.met() else "missed"
        print(f"target  {target.name}: {target.value:.3g} {target.relation} {target.limit:.3g}  {verdict}")
    machine = describe_machine(args.device) | {"load_average": os.getloadavg() if hasattr(os, "getloadavg") else None}
    result = {
        "bench": args.bench, "dtype": dtype, "machine": machine, "settings": dataclasses.asdict(args),
        "rows": rows, "targets": [target._asdict() | {"met": bool(target.met())} for target in targets],
        "samples_s": samples,
    }  # fmt: skip
    path = args.out_dir / f"{args.bench}_{args.device}_{dtype}.json"
    with atomic_write(path, "w") as f:
        json.dump(result, f, default=str, indent=1)
    print(path)


def format_value(value):
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def print_table(rows):
    columns = {name: [name, *(format_value(row.get(name, "")) for row in rows)] for name in rows[0]}
    widths = [max(map(len, column)) for column in columns.values()]
    for line in zip(*columns.values(), strict=True):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
