"""Run one attempt: start its ranks, let its faults act, wait for its end, and note what became of each process.

- Whoever stops a process (SIGSTOP) and never continues it leaves it to dpgen and the launcher. Where only stopped
  processes are left, an operator would end the job, and so does this runner.
- Every process of an attempt carries the attempt's folder in its environment, so leftovers are found.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

from helpers.chaos.plan import FOLDER_VARIABLE, PHASES, AttemptPlan
from helpers.jobs import REPO, Job, Launcher

_TICK_S = 0.05
_LEFTOVER_S = 30.0
_PROGRAM = ("-m", "helpers.chaos.rank")
_CRASH = re.compile(r"Signal \d+ \((SIGSEGV|SIGABRT|SIGBUS|SIGILL|SIGFPE)\)")


class ChaosFailure(Exception):
    """Report that dpgen did not keep a promise."""


class ActingFault(Protocol):
    """Interface of a fault, as an attempt uses it; see `helpers.chaos.faults.Fault`."""

    def act(self, attempt: Attempt) -> Iterator[bool]: ...


class Attempt:
    """Run one attempt of a run.

    Attributes:
        plan: how it is started.
        stopped: ids of processes that are stopped now.
        signalled: ids of processes that have got a signal from a fault or from this runner.
        was_ended: True if only stopped processes were left, so that this runner ended them.
        seconds: from the start to the end.
    """

    def __init__(self, plan: AttemptPlan, faults: Sequence[ActingFault], launcher: Launcher, conf: str) -> None:
        self.plan, self._faults, self._launcher, self._conf = plan, faults, launcher, conf
        self.jobs: list[Job] = []
        self.stopped: set[int] = set()
        self.signalled: set[int] = set()
        self.was_ended = False
        self.seconds = 0.0

    def run(self) -> None:
        """Start the ranks, and return when no process of the attempt is left.

        Raises:
            ChaosFailure: the attempt hangs, or leaves a process.
        """
        self.plan.write()
        started_s = time.monotonic()
        try:
            self._start()
            self._await_end([fault.act(self) for fault in self._faults], started_s + self.plan.limits.bound_s)
            self._await_leftovers()
        except ChaosFailure as error:
            raise ChaosFailure(f"{error}\n{self.describe_ranks()}") from None  # while its processes still exist
        finally:
            self.seconds = time.monotonic() - started_s
            for pid in find_marked(self.plan.folder):
                send(pid, signal.SIGKILL)
            for job in self.jobs:
                job.end()

    @property
    def output(self) -> str:
        return "\n".join(job.output for job in self.jobs)

    # ---- what the ranks have noted

    def get_phase(self, rank: int) -> str | None:
        """Return the phase that a rank has begun; None before its start."""
        return self._read(f"phase-{rank}")

    def has_begun(self, rank: int, phase: str) -> bool:
        current = self.get_phase(rank)
        return current is not None and PHASES.index(current) >= PHASES.index(phase)

    def get_rank_pid(self, rank: int) -> int | None:
        """Return the id of a rank's process if it is alive."""
        text = self._read(f"pid-{rank}")
        return int(text) if text and is_alive(int(text)) else None

    def find_engine_pids(self, rank: int) -> list[int]:
        pid = self.get_rank_pid(rank)
        children = [] if pid is None else find_children(pid)
        return [child for child in children if "dpgen.engine.server" in read_command(child) and is_alive(child)]

    def has_fault(self, name: str) -> bool:
        """Return True if a fault of this name has happened."""
        return (self.plan.folder / f"fault-{name}").exists()

    def describe_ranks(self) -> str:
        """Return one line for each rank: its phase, how its processes ended, and its error, which stderr may lack."""
        lines = []
        for rank in range(self.plan.num_ranks):
            statuses = [path.read_text() for path in sorted(self.plan.folder.glob(f"exit-{rank}-*"))]
            pid = self.get_rank_pid(rank)
            facts = [f"last seen {self.get_phase(rank)}", f"exit statuses {', '.join(statuses) or 'none'}"]
            if pid is not None:
                facts.append(f"process {pid} is still in state {read_state(pid)}")
            if error := self._read(f"error-{rank}"):
                facts.append(error)
            lines.append(f"rank {rank}: {'; '.join(facts)}")
        return "\n".join(lines)

    def read_exit_statuses(self) -> list[int]:
        """Return the statuses of all rank processes that ended by themselves."""
        return [int(path.read_text()) for path in sorted(self.plan.folder.glob("exit-*"))]

    def find_crashes(self) -> list[str]:
        """Return one line for each rank that died of a signal which no fault has sent. SIGKILL is always a fault's."""
        if self.plan.launcher == "torchrun":
            return [f"a rank ended by {name}" for name in _CRASH.findall(self.output)]
        return [
            f"rank {rank} ended by signal {-job.process.returncode}"
            for rank, job in enumerate(self.jobs)
            if job.process.returncode < 0
            and job.process.returncode != -signal.SIGKILL
            and job.process.pid not in self.signalled
        ]

    # ---- what faults do

    def signal(self, pid: int, number: signal.Signals) -> None:
        """Send a signal, and remember which processes are stopped or may end by it."""
        if not send(pid, number):
            return
        self.signalled.add(pid)
        if number == signal.SIGSTOP:
            self.stopped.add(pid)
        elif number in (signal.SIGCONT, signal.SIGKILL):
            self.stopped.discard(pid)

    # ---- start and end

    def _start(self) -> None:
        plan = self.plan
        environment = {
            FOLDER_VARIABLE: str(plan.folder),
            "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}",
            "DPGEN_LEASE_S": f"{plan.limits.lease_s:.1f}",
            "DPGEN_STATUS_FILE": str(plan.folder / "status"),
            "HF_DATASETS_CACHE": str(self._launcher.folder / "datasets-cache"),
        }
        words = ["run", self._conf, f"run.dir={plan.run_dir}", *plan.arguments]
        if plan.launcher == "srun":
            self.jobs = self._launcher.start_like_srun(
                *words,
                rank_arguments=[[] for _ in plan.ranks],
                program=_PROGRAM,
                **environment,
            )
            return
        options = ["--max-restarts", str(plan.max_restarts)]
        if _has_shutdown_timeout():
            options += ["--shutdown-timeout", "3"]
        torchrun = options if plan.launcher == "torchrun" else []
        self.jobs = [
            self._launcher.dpgen(*words, ranks=plan.num_ranks, torchrun=torchrun, program=_PROGRAM, **environment)
        ]

    def _await_end(self, acts: list[Iterator[bool]], deadline_s: float) -> None:
        while True:
            will_continue = [next(act, False) for act in acts]  # a fault yields True while it will send SIGCONT
            running = [job.process.pid for job in self.jobs if job.process.poll() is None]
            ranks = [pid for rank in range(self.plan.num_ranks) if (pid := self.get_rank_pid(rank)) is not None]
            self.note_own_stops(ranks)
            if not running and not ranks:
                return
            # torchrun waits for a stopped rank for ever once its other ranks have ended.
            if not set(ranks or running) - self.stopped and not any(will_continue):
                self.was_ended = True
                for pid in [*running, *ranks]:
                    self.signal(pid, signal.SIGKILL)
            if time.monotonic() > deadline_s:
                raise ChaosFailure(f"the attempt still ran after {self.plan.limits.bound_s:.0f} s")
            time.sleep(_TICK_S)

    def note_own_stops(self, ranks: list[int]) -> None:
        """Note the ranks that stopped themselves, as an event of their plan; also after a fault has continued them."""
        for pid in ranks:
            if pid not in self.stopped and read_state(pid) == "T":
                self.stopped.add(pid)
                self.signalled.add(pid)

    def _await_leftovers(self) -> None:
        deadline_s = time.monotonic() + _LEFTOVER_S
        while left := find_marked(self.plan.folder):
            for pid in left:  # an engine whose rank has ended gets SIGKILL from the kernel, stopped or not
                if pid in self.stopped and pid not in self._all_engines():
                    self.signal(pid, signal.SIGKILL)
            if time.monotonic() > deadline_s:
                lines = [f"{pid} {read_command(pid)}" for pid in left]
                raise ChaosFailure("processes are left over:\n" + "\n".join(lines))
            time.sleep(_TICK_S)

    def _all_engines(self) -> set[int]:
        return {pid for pid in self.stopped if "dpgen.engine.server" in read_command(pid)}

    def _read(self, name: str) -> str | None:
        try:
            return (self.plan.folder / name).read_text()
        except FileNotFoundError:
            return None


def send(pid: int, number: signal.Signals) -> bool:
    """Send a signal; return False if the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def read_state(pid: int) -> str:
    """Return the state of a process, as one letter of proc(5); "" if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    return read_state(pid) not in ("", "Z", "X")


def read_command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def find_children(pid: int) -> list[int]:
    """Return the ids of the processes that the threads of a process have started."""
    children = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread or the process has ended meanwhile
            children += [int(child) for child in path.read_text().split()]
    return children


def find_marked(folder: Path) -> list[int]:
    """Return the ids of the processes of one attempt that are alive."""
    mark = f"{FOLDER_VARIABLE}={folder}\0".encode()
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes() and is_alive(int(entry.name)):
                    pids.append(int(entry.name))
    return pids


def wait_s(seconds: float, *, will_continue: bool = False) -> Iterator[bool]:
    """Yield until the time is over."""
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        yield will_continue


def wait_until(condition: Callable[[], bool]) -> Iterator[bool]:
    """Yield until the condition holds, for ever if it never does."""
    while not condition():
        yield False


@cache
def _has_shutdown_timeout() -> bool:
    """Return True if torchrun has the option (torch 2.13); without it, a stopped rank holds torchrun for 30 s."""
    from torch.distributed.run import get_args_parser

    return "--shutdown-timeout" in get_args_parser().format_help()
