"""Start a SLURM cluster of two nodes on this machine: munge, a controller and two slurmd."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from helpers.jobs import REPO, free_port, wait_for

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "taskset")

# Short times keep the tests short: a requeued job waits for `cred_expire` before it starts again. The time limits for
# this machine's own daemons are long: SLURM must not take a slurmd that answers late, on a busy machine, for a lost
# node and requeue its jobs.
_CONFIGURATION = """\
ClusterName=dpgen-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=8
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
MessageTimeout=60
BatchStartTimeout=120
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8
PartitionName=main Nodes=n0,n1 Default=YES PriorityTier=5
PartitionName=low Nodes=n0,n1 PriorityTier=1 PreemptMode=CANCEL GraceTime=30
PartitionName=high Nodes=n0,n1 PriorityTier=9
"""


def find_missing_requirement() -> str | None:
    """Return why a cluster can't be started here; None if it can."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"there is no {', '.join(absent)} here (Debian packages: munge, slurm-wlm)" if absent else None


class Cluster:
    """Start the daemons by `start` and end them by `stop`, each by its own id.

    Args:
        folder: receives all files of the daemons.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SRUN_", "SBATCH_"))}
        self.environment |= {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHONPATH": str(REPO),
            "HF_HUB_OFFLINE": "1",
            "DPGEN_PYTHON": sys.executable,
            "MASTER_ADDR": "127.0.0.1",  # both nodes are this host, and their names resolve to no address
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        (self.folder / "state").mkdir()
        for node in ("n0", "n1"):
            (self.folder / f"spool-{node}").mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o400)
        host = socket.gethostname().partition(".")[0]
        ports = [free_port() for _ in range(3)]
        (self.folder / "slurm.conf").write_text(_CONFIGURATION.format(host=host, folder=self.folder, ports=ports))
        files = {"socket": "munge.sock", "key-file": "munge.key", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        files["log-file"] = "munge.log"
        self._spawn("munged", "--foreground", "--force", *(f"--{k}={self.folder / v}" for k, v in files.items()))
        wait_for((self.folder / "munge.sock").exists)
        self._spawn("slurmctld", "-D")
        cores = sorted(os.sched_getaffinity(0))
        for index, node in enumerate(("n0", "n1")):
            # Each node has its own cores: two engines that both compute on all cores are ten times as slow.
            own = ",".join(map(str, cores[index::2] or cores))
            self._spawn("taskset", "--cpu-list", own, "slurmd", "-D", "-N", node)
        states = ("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T")
        wait_for(lambda: self.run(*states, check=False).split() == ["idle", "idle"])

    def stop(self) -> None:
        """End the jobs first, which the daemons must do, and then the daemons."""
        with contextlib.suppress(AssertionError, subprocess.CalledProcessError):
            jobs = self.run("squeue", "-h", "-o", "%A").split()
            if jobs:
                self.run("scancel", *jobs)
            wait_for(lambda: not self.run("squeue", "-h").strip(), timeout_s=60)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _spawn(self, *command: str) -> None:
        with (self.folder / f"{command[0]}-{len(self._daemons)}.out").open("wb") as output:
            self._daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
            )

    def run(
        self,
        *command: str,
        check: bool = True,
        folder: Path | None = None,
        text: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """Run a command of SLURM, and return its output."""
        done = subprocess.run(
            command,
            env={**self.environment, **(environment or {})},
            cwd=folder or self.folder,
            input=text,
            capture_output=True,
            text=True,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout


class SlurmJob:
    """One job, submitted from `folder`, which holds its logs."""

    def __init__(self, cluster: Cluster, folder: Path, job_id: str) -> None:
        self.cluster, self.folder, self.id = cluster, folder, job_id

    @staticmethod
    def submit(
        cluster: Cluster, folder: Path, script: str, *arguments: str, options: Sequence[str] = (), **environment: str
    ) -> SlurmJob:
        """Run `sbatch OPTIONS launch/SCRIPT ARGUMENTS` for two nodes."""
        command = ["sbatch", "--parsable", "--nodes=2", *options, str(REPO / "launch" / script), *arguments]
        return SlurmJob(cluster, folder, cluster.run(*command, folder=folder, environment=environment).strip())

    def describe(self) -> dict[str, str]:
        """Return the fields of `scontrol show job`."""
        shown = self.cluster.run("scontrol", "--oneliner", "show", "job", self.id)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def limit(self, seconds: int) -> None:
        """End the job's time in this many seconds; SLURM checks every 30 s, so the signal of --signal comes first."""
        self.cluster.run("scontrol", "update", f"JobId={self.id}", f"EndTime=now+{seconds}seconds")

    @property
    def state(self) -> str:
        return self.describe()["JobState"]

    @property
    def num_restarts(self) -> int:
        return int(self.describe()["Restarts"])

    def attempt(self, number: int) -> Path:
        """Return the directory with an attempt's logs."""
        return self.folder / f"dpgen-{self.id}" / f"attempt-{number}"

    @property
    def output(self) -> str:
        """All output of the job, for the report of a failed test."""
        logs = [self.folder / f"dpgen-{self.id}.log", *sorted((self.folder / f"dpgen-{self.id}").rglob("*.log"))]
        return "".join(f"--- {log.name}\n{log.read_text(errors='replace')}" for log in logs if log.exists())

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 240) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, f"not within {timeout_s} s; job {self.describe()}\n{self.output}"
            time.sleep(0.1)

    def wait(self, timeout_s: float = 240) -> str:
        """Return the final state."""
        unfinished = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"}
        self.wait_for(lambda: self.state not in unfinished, timeout_s)
        return self.state

    def rank_pid(self, rank: int) -> int:
        """Return the process id of one srun task."""
        wanted = {f"SLURM_JOB_ID={self.id}".encode(), f"SLURM_PROCID={rank}".encode()}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                is_rank = words[0] == sys.executable.encode() and words[2:5] == [b"-m", b"dpgen", b"run"]
                if is_rank and wanted <= set((entry / "environ").read_bytes().split(b"\0")):
                    return int(entry.name)
        raise AssertionError(f"job {self.id} has no rank {rank}")
