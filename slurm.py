"""A run of the sweep as a process of the trainer, and that process as a SLURM job by submitit.

partition=gpu,time=24:00:00,gpus=1,cpus=8,mem=64,account=lab        # --slurm: time as sbatch reads it, mem in GB
"""

import math
import os
import re
import signal
import subprocess
import sys
import time

from lab.common import UserError


def launch(command, log, env):
    """The trainer as a process, its output beside its log.

    It has a session of its own: the terminal's Ctrl-C and SLURM's SIGUSR2, both meant for the sweep, must not kill it
    before it has saved.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log.with_suffix(".out"), "ab") as out, open(log.with_suffix(".err"), "wb") as err:
        return subprocess.Popen(command, env=env, stdout=out, stderr=err, start_new_session=True)


class TrainJob:
    """The function that a node runs. submitit pickles it, and calls `checkpoint` on pre-emption and time-out."""

    def __init__(self, command, log):
        self.command, self.log = command, log

    def __call__(self):
        self.process = launch(self.command, self.log, os.environ)
        while self.process.poll() is None:
            time.sleep(0.2)
        return self.process.returncode

    def checkpoint(self):
        from submitit.helpers import DelayedSubmission

        self.process.send_signal(signal.SIGTERM)
        # Not process.wait(): this runs in a signal handler, perhaps within poll() above, which holds Popen's lock.
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(TrainJob(self.command, self.log))


def submit(jobs, options, cluster):
    """submitit's job for each sweep.Job."""
    import cloudpickle
    import submitit

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a node need not find this file
    folder, wanted = jobs[0].log.parent / "submitit", parameters(options, cluster)
    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster, **{f"{cluster}_max_num_timeout": 1000})
        executor.update_parameters(name="moe-sweep", **wanted)
        with executor.batch():
            return [executor.submit(TrainJob(job.command, job.log)) for job in jobs]
    except (RuntimeError, ValueError, NameError) as error:
        raise UserError(f"--slurm {options}: {error}") from None


def parameters(options, cluster):
    """submitit's parameters from `partition=gpu,time=12:00:00,account=lab`."""
    pairs = [option.partition("=") for option in options.split(",") if option]
    given = {name.strip(): value.strip() for name, _, value in pairs}
    if not given or "" in given.values():
        raise UserError(f"--slurm {options!r}: write it as partition=gpu,time=12:00:00,...")
    try:
        wanted = {
            "timeout_min": minutes_of(given.pop("time", "24:00:00")),
            "gpus_per_node": int(given.pop("gpus", 1)),
            "cpus_per_task": int(given.pop("cpus", 8)),
            "mem_gb": float(given.pop("mem", 64)),
        }
    except ValueError as error:
        raise UserError(f"--slurm {options!r}: {error}") from None
    if cluster == "local":
        return wanted
    if "partition" in given:
        wanted["slurm_partition"] = given.pop("partition")
    return wanted | {"slurm_additional_parameters": given}


def minutes_of(text):
    """A time limit as sbatch reads it, in minutes, rounded up. ValueError for any other text."""
    match = re.fullmatch(r"(?:([0-9]+)-)?([0-9]+)(?::([0-9]+))?(?::([0-9]+))?", text)
    if match:
        days, *numbers = (int(number or 0) for number in match.groups())
        if match[1] is None and match[4] is None:  # minutes, or minutes:seconds
            numbers = [0, *numbers[:2]]
        hours, minutes, seconds = numbers
        total = (days * 24 + hours) * 60 + minutes + math.ceil(seconds / 60)
    if not match or not total:
        forms = "minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes"
        raise ValueError(f"time {text!r} is none of {forms} and days-hours:minutes:seconds, above 0")
    return total


def exit_code(submitted):
    """Exit code of a submitit job; None while it runs, 1 for one that the cluster ended."""
    import submitit

    if not submitted.done():
        return None
    try:
        return submitted.result()
    except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError):
        return 1
