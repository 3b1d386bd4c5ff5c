"""A sweep on a real SLURM of one node, started here: a job of higher priority pre-empts the run, which is requeued.

make test-slurm      # Debian, Ubuntu: apt-get install slurm-wlm; skipped where it is not installed
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY_RUN, flags, lines

import runlog

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
MISSING = [name for name in NEEDED if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}: apt-get install slurm-wlm"),
]
# One CPU: two jobs cannot run at once. preempt_send_user_signal: pre-emption sends the signal that submitit waits for.
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=600
NodeName={host} NodeAddr=127.0.0.1 CPUs=1 RealMemory=8000
PartitionName=low Nodes={host} Default=YES PriorityTier=1 GraceTime=600
PartitionName=high Nodes={host} PriorityTier=9 PreemptMode=OFF
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_for(condition, processes=()):
    """Until the condition holds; ten minutes at most, and not beyond the end of one of the processes."""
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end and all(process.poll() is None for process in processes)
        time.sleep(0.2)


def said_by(*command):
    return subprocess.run(command, capture_output=True, text=True).stdout


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """munged, slurmctld and slurmd in tmp_path; SLURM's commands find them by SLURM_CONF."""
    folder, host = tmp_path / "slurm", socket.gethostname().split(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    conf, ports = folder / "slurm.conf", (free_port(), free_port())
    conf.write_text(CONF.format(host=host, user=getpass.getuser(), ports=ports, folder=folder))
    monkeypatch.setenv("SLURM_CONF", str(conf))
    monkeypatch.setenv("PATH", os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munge_files = [f"--{flag}={folder}/munge.{suffix}" for flag, suffix in files.items()]
    commands = [["munged", "--foreground", "--force", *munge_files], ["slurmctld", "-D"], ["slurmd", "-D", "-N", host]]
    running = []
    try:
        for command in commands:
            with open(folder / f"{command[0]}.out", "w") as out:
                running.append(subprocess.Popen(command, stdout=out, stderr=out))
            wait_for((folder / "munge.socket").exists, running)
        wait_for(lambda: "idle" in said_by("sinfo", "-h", "-o", "%T"), running)
        yield folder
    finally:
        subprocess.run(["scancel", "--user", getpass.getuser()], capture_output=True)
        for process in reversed(running):
            process.send_signal(signal.SIGTERM)
            process.wait(600)


def start(folder, shards, *more):
    """The sweep of one small run, as a process in `folder`."""
    settings = TINY_RUN | {"data_root": shards, "max_steps": 600, "save_checkpoint_every": 200}
    del settings["run_id"]
    folder.mkdir()
    words = ["--variants", "only_moe", "--seeds", "1", *more, "--", *flags(settings)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, ROOT / "sweep.py", *words], cwd=folder, **pipes)


def test_a_preempted_run_is_requeued_and_its_log_is_that_of_the_run_left_alone(cluster, shards, tmp_path):
    options = "partition=low,time=60,gpus=0,cpus=1,mem=2"
    sweep = start(tmp_path / "here", shards, "--slurm", options)

    def last_step():
        logs = list((tmp_path / "here").rglob("log_*.txt"))
        return runlog.read(logs[0]).get("train", ([0],))[0][-1] if logs else 0

    wait_for(lambda: last_step() >= 20, [sweep])
    urgent = subprocess.Popen(["srun", "-p", "high", "-n", "1", "true"])
    assert urgent.wait(600) == 0, "the job of higher priority waited in vain"
    before = last_step()
    assert before < 599, "the run ended before it was pre-empted"
    said = sweep.communicate(timeout=600)[0]
    assert sweep.returncode == 0 and "1 done" in said, said
    (out,) = (tmp_path / "here").rglob("*_log.out")
    assert "Requeued job" in out.read_text()
    alone = start(tmp_path / "alone", shards)
    assert "1 done" in alone.communicate(timeout=600)[0]
    logs = [next((tmp_path / name).rglob("log_*.txt")) for name in ("here", "alone")]
    assert lines(logs[0]) == lines(logs[1])
