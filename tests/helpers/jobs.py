"""What the tests share: inputs, and processes that are started, awaited and ended by their own ids."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
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
TIMEOUT_S = 240
# For tests in which the others wait for a lost rank's lease: the real one, of a minute, is waited for in test_recovery.
SHORT_LEASE = {"DPGEN_LEASE_S": "24"}


class Job:
    """One launcher process (torchrun, or python) and what it printed, to a file or to a terminal."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, terminal: bool) -> None:
        self.log = log
        self._file = log.open("wb", buffering=0)
        self._watcher: threading.Thread | None = None
        screen = self._open_terminal() if terminal else None
        self.process = subprocess.Popen(
            list(command),
            cwd=REPO,
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
        return self.log.read_bytes().decode(errors="replace")  # a terminal's carriage returns included

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """The exit status; on a time-out the job is ended and its output shown."""
        try:
            status = self.process.wait(timeout_s)
            if self._watcher is not None:
                self._watcher.join()
            return status
        except subprocess.TimeoutExpired:
            self.end()
            pytest.fail(f"still running after {timeout_s} s; it printed:\n{self.output}")

    def end(self) -> None:
        """Ends the launcher and its children (each engine ends with its rank)."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self._watcher is not None:
            self._watcher.join()
        self._file.close()

    def _open_terminal(self) -> int:
        """A terminal of 24 lines by 160 columns for the process; what it shows goes to the log."""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0))

        def watch() -> None:
            with contextlib.suppress(OSError):  # how a terminal says that the last process has left it
                while shown := os.read(ours, 1 << 16):
                    self._file.write(shown)
            os.close(ours)

        self._watcher = threading.Thread(target=watch, daemon=True)
        self._watcher.start()
        return theirs


class Launcher:
    """Starts jobs and ends whatever a test left running.

    Attributes:
        place: a real engine's among those of other tests: it is the number of the core that a job of one process gets.
            Two engines that both compute on all cores are several times as slow: their threads wait for each other.
    """

    place: ClassVar[int | None] = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = sys.executable
        self.jobs: list[Job] = []

    def start(self, command: Sequence[str], terminal: bool = False, **environment: str) -> Job:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC_"))}
        kept |= {"PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
        job = Job(command, kept, self.folder / f"job-{len(self.jobs)}.log", terminal)
        if self.place is not None and command[0] == self.python and "torch.distributed.run" not in command:
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(job.process.pid, {cores[self.place % len(cores)]})
        self.jobs.append(job)
        return job

    def dpgen(
        self,
        *arguments: str,
        ranks: int = 1,
        torchrun: Sequence[str] = (),
        program: Sequence[str] = ("-m", "dpgen"),
        terminal: bool = False,
        **environment: str,
    ) -> Job:
        """`python -m dpgen ARGUMENTS` for one rank, `torchrun ... -m dpgen ARGUMENTS` for more."""
        command = [sys.executable]
        if ranks > 1 or torchrun:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *torchrun]
        return self.start([*command, *program, *arguments], terminal, **environment)

    def start_like_srun(self, *arguments: str, each: Sequence[Sequence[str]], **environment: str) -> list[Job]:
        """One process a rank, with arguments of its own, the variables that srun sets, and a free port.

        Args:
            environment: over those; MASTER_PORT="" for none.
        """
        ranks = len(each)
        shared = {
            "SLURM_STEP_NUM_TASKS": str(ranks),
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_STEP_TASKS_PER_NODE": str(ranks),
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_ID": "0",
            "MASTER_PORT": str(free_port()),
            **environment,
        }
        return [
            self.start(
                [sys.executable, "-m", "dpgen", *arguments, *each[rank]],
                SLURM_PROCID=str(rank),
                SLURM_LOCALID=str(rank),
                **shared,
            )
            for rank in range(ranks)
        ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_into(folder: Path, rows: Sequence[Mapping[str, Any]], name: str = "conf.yaml", **sections: Any) -> str:
    """The same in any folder."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    conf: dict[str, Any] = {
        "run": {"dir": str(folder / "run"), "engine": "fake"},
        "model": "none",
        "data": {"path": str(data), "prompt_column": "prompt"},
    }
    for section, body in sections.items():
        conf[section] = {**conf.get(section, {}), **body} if isinstance(body, dict) else body
    path = folder / name
    path.write_text(yaml.safe_dump(conf))
    return str(path)


# A user's command, one after the other in one process, since starting it takes longer than refusing what it is given.
EACH_IN_TURN = """
import contextlib, io, json, sys
from dpgen.cli import main

for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as told:
        status = main(["run", *words])
    print("TOLD " + json.dumps([status, told.getvalue()]), flush=True)
"""


def run_each_command(launcher: Launcher, program: str, commands: list[list[str]]) -> list[Any]:
    """What a program told of each of the commands."""
    job = launcher.start([launcher.python, "-c", program, json.dumps(commands)])
    assert job.wait() == 0, job.output
    found = [json.loads(line[5:]) for line in job.output.splitlines() if line.startswith("TOLD ")]
    assert len(found) == len(commands), job.output
    return found


def make_numbered_rows(count: int) -> list[dict[str, Any]]:
    """So many rows with a prompt of their own each."""
    return [{"prompt": f"row number {index}"} for index in range(count)]


def load_result(run_dir: Path) -> list[dict[str, Any]]:
    """The final dataset's rows, as a user loads them."""
    import datasets

    datasets.disable_progress_bars()
    cache = run_dir.parent / "hf-cache"
    return list(datasets.load_dataset(str(run_dir / "dataset"), split="train", cache_dir=str(cache)))


def find_engine_pids(job: Job) -> list[int]:
    """Ids of engine processes that the job's ranks have started and that still run."""
    return descendants(job.process.pid, b"dpgen.engine.server")


def descendants(ancestor: int, words: bytes) -> list[int]:
    """Ids of the processes below `ancestor` whose command line (its words separated by NUL) holds `words`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if words in (entry / "cmdline").read_bytes() and _ancestor(entry.name, ancestor):
                    found.append(int(entry.name))
    return sorted(found)


def _ancestor(pid: str, ancestor: int) -> bool:
    while int(pid) > 1:
        stat = Path(f"/proc/{pid}/stat").read_text()
        pid = stat.rpartition(")")[2].split()[1]
        if int(pid) == ancestor:
            return True
    return False


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Returns once the condition holds; fails the test if it doesn't in time."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.05)
