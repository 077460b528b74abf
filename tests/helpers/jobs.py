"""Jobs as users start them: input, launcher processes, and their results.

Every process is started, awaited and ended by its own id.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import random
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
TIMEOUT_S = 400
# For tests in which ranks wait until a lost rank's lease expires. One test in test_recovery.py waits the real minute.
SHORT_LEASE = {"DPGEN_LEASE_S": "24"}
# Of all jobs: no network, and engines that are quick to start again.
JOB_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DPGEN_START_RETRY_S": "0.5"}
_MIN_FREE_PORT = 10_000  # services have lower ones
_MAX_PORT_TRIES = 100

WriteConfig = Callable[..., str]


class Job:
    """One launcher process (torchrun, or python) and its output, to a file or to a terminal."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path, terminal: bool, cwd: Path
    ) -> None:
        self.log = log
        self._file = log.open("wb", buffering=0)
        self._watcher: threading.Thread | None = None
        screen = self._open_terminal() if terminal else None
        self.process = subprocess.Popen(
            list(command),
            cwd=cwd,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=self._file if screen is None else screen,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        if screen is not None:
            os.close(screen)

    @property
    def output(self) -> str:
        """Output so far of the launcher and its children."""
        return self.log.read_bytes().decode(errors="replace")  # a terminal's carriage returns included

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Return the exit status. After the time limit, end the job and fail the test with the job's output."""
        try:
            status = self.process.wait(timeout_s)
            if self._watcher is not None:
                self._watcher.join()
            return status
        except subprocess.TimeoutExpired:
            self.end()
            pytest.fail(f"the job still ran after {timeout_s} s; its output:\n{self.output}")

    def end(self) -> None:
        """Kill the launcher and its children; each engine ends with its rank."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self._watcher is not None:
            self._watcher.join()
        self._file.close()

    def _open_terminal(self) -> int:
        """Return the process's end of a terminal of 24 lines by 160 columns; its output goes to the log."""
        test_end, process_end = pty.openpty()
        fcntl.ioctl(process_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0))

        def watch() -> None:
            with contextlib.suppress(OSError):  # a terminal raises it once the last process has closed its end
                while output := os.read(test_end, 1 << 16):
                    self._file.write(output)
            os.close(test_end)

        self._watcher = threading.Thread(target=watch, daemon=True)
        self._watcher.start()
        return process_end


class Launcher:
    """Start jobs, and remember them so that a test can end those that still run.

    Attributes:
        engine_slot: slot of the running test if it has a real engine, and the core that its one-process jobs run on.
            Two engines that compute on all cores are several times as slow: their threads wait for each other.
    """

    engine_slot: ClassVar[int | None] = None

    def __init__(self, folder: Path, cwd: Path = REPO) -> None:
        self.folder, self.cwd = folder, cwd
        self.python = sys.executable
        self.jobs: list[Job] = []

    def start(self, command: Sequence[str], terminal: bool = False, **environment: str) -> Job:
        """Start a command in `cwd` (the repository), without the variables of a launcher around the tests."""
        variables = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC_"))}
        variables |= {"PYTHONPATH": str(REPO), **JOB_ENVIRONMENT, **environment}
        job = Job(command, variables, self.folder / f"job-{len(self.jobs)}.log", terminal, self.cwd)
        if self.engine_slot is not None and command[0] == self.python and "torch.distributed.run" not in command:
            os.sched_setaffinity(job.process.pid, self.choose_cores())
        self.jobs.append(job)
        return job

    @classmethod
    def choose_cores(cls) -> set[int]:
        """Return the core of a one-process job if the test has an engine slot, else all cores."""
        cores = sorted(os.sched_getaffinity(0))
        return set(cores) if cls.engine_slot is None else {cores[cls.engine_slot % len(cores)]}

    def dpgen(
        self,
        *arguments: str,
        ranks: int = 1,
        torchrun: Sequence[str] = (),
        program: Sequence[str] = ("-m", "dpgen"),
        terminal: bool = False,
        **environment: str,
    ) -> Job:
        """Start `python -m dpgen ARGUMENTS` for one rank, `torchrun ... -m dpgen ARGUMENTS` for more."""
        command = [sys.executable]
        if ranks > 1 or torchrun:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *torchrun]
        return self.start([*command, *program, *arguments], terminal, **environment)

    def start_like_srun(
        self,
        *arguments: str,
        rank_arguments: Sequence[Sequence[str]],
        rank_environments: Mapping[int, Mapping[str, str]] | None = None,
        rank_programs: Mapping[int, Sequence[str]] | None = None,
        program: Sequence[str] = ("-m", "dpgen"),
        **environment: str,
    ) -> list[Job]:
        """Start one process per rank, with the variables that srun sets and a free MASTER_PORT.

        Args:
            arguments: for every rank.
            rank_arguments: one list per rank, for that rank alone.
            rank_environments: variables for single ranks, by rank.
            rank_programs: what python runs instead of `program`, by rank.
            program: what python runs.
            environment: overrides the variables of srun; MASTER_PORT="" unsets the port.
        """
        num_ranks = len(rank_arguments)
        shared = {
            "SLURM_STEP_NUM_TASKS": str(num_ranks),
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_STEP_TASKS_PER_NODE": str(num_ranks),
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_ID": "0",
            "MASTER_PORT": str(free_port()),
            **environment,
        }
        return [
            self.start(
                [sys.executable, *(rank_programs or {}).get(rank, program), *arguments, *rank_arguments[rank]],
                **{
                    "SLURM_PROCID": str(rank),
                    "SLURM_LOCALID": str(rank),
                    **shared,
                    **(rank_environments or {}).get(rank, {}),
                },
            )
            for rank in range(num_ranks)
        ]


def free_port() -> int:
    """Return a TCP port that was free a moment ago, and that the kernel gives to nobody who asks for any port.

    Rank 0 takes it only seconds later. Meanwhile jobs beside it open hundreds of connections.
    """
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    candidates = [*range(_MIN_FREE_PORT, first), *range(last + 1, 1 << 16)]
    for port in [*random.sample(candidates, min(_MAX_PORT_TRIES, len(candidates))), 0]:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise AssertionError("no port is free")


def write_into(folder: Path, rows: Sequence[Mapping[str, Any]], name: str = "conf.yaml", **sections: Any) -> str:
    """Write rows and a configuration for the fake engine over them, changed by section, and return its path."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    conf: dict[str, Any] = {
        "run": {"dir": str(folder / "run"), "engine": "fake", "report": False},  # half a second in each of many jobs
        "model": "none",
        "data": {"path": str(data), "prompt_column": "prompt"},
    }
    for section, body in sections.items():
        conf[section] = {**conf.get(section, {}), **body} if isinstance(body, dict) else body
    path = folder / name
    path.write_text(yaml.safe_dump(conf))
    return str(path)


# Runs `dpgen run` with each list of arguments, one after the other in one process: starting a process takes longer
# than rejecting its arguments. Reports the exit status and stderr of each.
EACH_IN_TURN = """
import contextlib, io, json, sys
from dpgen.cli import main

for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        status = main(["run", *arguments])
    print("REPORT " + json.dumps([status, stderr.getvalue()]), flush=True)
"""


def run_each_command(launcher: Launcher, program: str, commands: list[list[str]]) -> list[Any]:
    """Return the program's report on each of the commands: the JSON after "REPORT " in its output."""
    job = launcher.start([launcher.python, "-c", program, json.dumps(commands)])
    assert job.wait() == 0, job.output
    lines = [line for line in job.output.splitlines() if line.startswith("REPORT ")]
    assert len(lines) == len(commands), job.output
    return [json.loads(line.removeprefix("REPORT ")) for line in lines]


def make_numbered_rows(count: int) -> list[dict[str, Any]]:
    """Return `count` rows whose prompts differ."""
    return [{"prompt": f"row number {index}"} for index in range(count)]


def load_result(run_dir: Path) -> list[dict[str, Any]]:
    """Load the rows of the final dataset as a user does."""
    import datasets

    datasets.disable_progress_bars()
    cache = run_dir.parent / "hf-cache"
    return list(datasets.load_dataset(str(run_dir / "dataset"), split="train", cache_dir=str(cache)))


def read_run_json(run_dir: Path) -> dict[str, Any]:
    run: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    return run


def list_engine_lines(output: str) -> list[str]:
    """Return the lines of engines in a rank's output, but for what older versions say where there is no GPU.

    vLLM's CPU build before 0.32 misreads an installed Triton, and torch's build for CUDA misses its driver.
    """
    noise = ("Triton is installed, but", "No CUDA runtime is found")
    lines = [line for line in output.splitlines() if " engine] " in line]
    return [line for line in lines if not any(text in line for text in noise)]


def find_engine_pids(job: Job) -> list[int]:
    """Return the ids of engine processes that the job's ranks have started and that still run."""
    return descendants(job.process.pid, b"dpgen.engine.server")


def descendants(ancestor: int, words: bytes) -> list[int]:
    """Return the ids of processes below `ancestor` whose command line (words separated by NUL) contains `words`."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if words in (entry / "cmdline").read_bytes() and _is_below(entry.name, ancestor):
                    pids.append(int(entry.name))
    return sorted(pids)


def wait_for(condition: Callable[[], bool], timeout_s: float = 180.0) -> None:
    """Wait until the condition holds; fail the test if it does not in time."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"the condition did not hold within {timeout_s} s"
        time.sleep(0.05)


def _is_below(pid: str, ancestor: int) -> bool:
    while int(pid) > 1:
        stat = Path(f"/proc/{pid}/stat").read_text()
        pid = stat.rpartition(")")[2].split()[1]
        if int(pid) == ancestor:
            return True
    return False
