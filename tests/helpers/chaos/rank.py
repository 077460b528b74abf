"""Run one rank, as `python -m dpgen` does, with the faults of its `RankPlan`: `python -m helpers.chaos.rank run ...`.

- A phase begins when dpgen calls the function that `HOOKS` names. Then the rank notes its phase in the folder of the
  attempt, and carries out the plan's events.
- It notes its process id at the start, and its exit status at the end. A rank without a status was killed.
- It notes the error that ends it, since nobody may be able to read its stderr.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.chaos.plan import FOLDER_VARIABLE, Event, RankPlan

# Phase → module and function whose call begins it.
HOOKS = {
    "input": ("dpgen.run", "open_input"),
    "planning": ("dpgen.run", "ShardPlanner.plan"),
    "loading": ("dpgen.run", "ModelLoader.load"),
    "generating": ("dpgen.run", "GenerationLoop.run"),
    "gathering": ("dpgen.run", "_Job.gather"),
    "writing": ("dpgen.run", "_Job.write"),
}
MEETING_HOOK = ("dpgen.distributed.gloo.rank_group", "join_rendezvous")  # imports torch: only where ranks meet


class RankFaults:
    """Carry out the plan of one rank.

    Args:
        folder: the attempt's.
    """

    def __init__(self, folder: Path, rank: int, plan: RankPlan) -> None:
        self._folder, self._rank, self._plan = folder, rank, plan

    def begin_phase(self, phase: str) -> None:
        """Note the phase, and carry out its events, now or after their delay."""
        write_note(self._folder / f"phase-{self._rank}", phase)
        for event in self._plan.events:
            if event.phase != phase:
                continue
            if event.delay_s == 0:
                self._carry_out(event)
                continue
            timer = threading.Timer(event.delay_s, self._carry_out, [event])
            timer.daemon = True
            timer.start()

    def _carry_out(self, event: Event) -> None:
        if not note_fault(self._folder, event.name):
            return
        if event.action == "full-disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (event.max_file_bytes, resource.RLIM_INFINITY))
        else:
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[event.action])


def hook(target: tuple[str, str], before: Callable[[], None]) -> None:
    """Call `before` ahead of each call of a function, given as its module and its name there."""
    module, path = target
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        before()
        return original(*args, **kwargs)

    setattr(owner, name, call)


def note_fault(folder: Path, name: str) -> bool:
    """Note that a fault happens now; return False if it has happened before."""
    try:
        (folder / f"fault-{name}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def write_note(path: Path, text: str) -> None:
    """Write a small file in one step, so that no reader finds it empty."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.replace(path)


def main() -> None:
    folder = Path(os.environ[FOLDER_VARIABLE])
    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
    write_note(folder / f"pid-{rank}", str(os.getpid()))
    content = json.loads((folder / "plan.json").read_text())
    body = content["ranks"][rank]
    plan = RankPlan(**{**body, "events": [Event(**event) for event in body["events"]]})
    faults = RankFaults(folder, rank, plan)
    faults.begin_phase("starting")
    threading.Thread(target=_end_with_runner, args=(content["runner_pid"],), daemon=True).start()
    _note_exit(folder, rank)
    if plan.host is not None:
        _set_host(plan.host)
    if plan.stderr is not None:
        _fill_stderr(plan.stderr)
        note_fault(folder, "stderr")
    if plan.clock_jump is not None:
        _shift_clock(folder, *plan.clock_jump)
    for phase, target in HOOKS.items():
        hook(target, lambda phase=phase: faults.begin_phase(phase))
    _note_error(folder, rank)
    hook(("dpgen.rank_process", "_join_ranks"), lambda: _prepare_meeting(faults, content["join_s"]))
    sys.argv += plan.arguments
    from dpgen.__main__ import main as run_dpgen

    run_dpgen()


def _end_with_runner(pid: int) -> None:
    """End this rank when the runner is gone, for example since its test timed out."""
    while Path(f"/proc/{pid}").exists():
        time.sleep(2)
    os.kill(os.getpid(), signal.SIGKILL)


def _prepare_meeting(faults: RankFaults, join_s: float) -> None:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as dpgen does, before torch is imported
    os.environ["DPGEN_JOIN_TIMEOUT_S"] = str(join_s)
    hook(MEETING_HOOK, lambda: faults.begin_phase("meeting"))


def _note_exit(folder: Path, rank: int) -> None:
    exit_now = os._exit

    def note_and_exit(status: int) -> None:
        write_note(folder / f"exit-{rank}-{os.getpid()}", str(status))
        exit_now(status)

    os._exit = note_and_exit  # type: ignore[assignment]


def _note_error(folder: Path, rank: int) -> None:
    command: Any = importlib.import_module("dpgen.rank_process")
    report = command._report_failure

    def note_and_report(*arguments: Any) -> int:
        error = next(argument for argument in arguments if isinstance(argument, Exception))
        write_note(folder / f"error-{rank}", f"{type(error).__name__}: {error}")
        status: int = report(*arguments)
        return status

    command._report_failure = note_and_report


def _set_host(name: str) -> None:
    os.environ["SLURMD_NODENAME"] = name
    socket.gethostname = lambda: name


def _fill_stderr(kind: str) -> None:
    if kind == "full":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        _, descriptor = os.pipe()  # this process keeps the end that is never read
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, 4096)
        os.write(descriptor, b"\n" * 4096)
    os.dup2(descriptor, 2)


def _shift_clock(folder: Path, after_s: float, shift_s: float) -> None:
    """Let `time.time()` jump once in this process."""
    now, due_s = time.time, time.monotonic() + after_s
    noted: list[bool] = []

    def shifted() -> float:
        if time.monotonic() < due_s:
            return now()
        if not noted:
            noted.append(note_fault(folder, "clock"))
        return now() + shift_s

    time.time = shifted


if __name__ == "__main__":
    main()
