"""Measure the processor time of a run's processes by what they do, while its rows are generated."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_INTERVAL_S = 0.5
# What the command line of a process ends with, or holds.
_ROLES = {"dpgen.engine.server": "engine", "dpgen.workers.worker": "workers", "dpgen": "rank"}
_EDGE = 0.1  # of the journal's bytes, at each end: what is not generation, and half full batches
Sample = tuple[int, dict[str, float]]  # bytes of the journal, and seconds by role


class ProcessorMeter:
    """Sample the processes of a run that this process has started; `measure_by_role` says what a result has cost.

    Args:
        run_dir: of the run, whose journal tells how far it is.
    """

    def __init__(self, run_dir: Path) -> None:
        self._journal, self._samples = run_dir / "journal", list[Sample]()
        self._seconds: dict[int, tuple[str, float]] = {}  # of each process, dead ones included

    @contextmanager
    def running(self) -> Iterator[None]:
        """Sample during the block."""
        is_over = threading.Event()

        def sample_often() -> None:
            while not is_over.wait(_INTERVAL_S):
                self._sample()

        thread = threading.Thread(target=sample_often, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def measure_by_role(self, num_results: int) -> dict[str, float]:
        """Return milliseconds of each role for each result in the journal, taken from the middle of the run."""
        num_bytes = self._samples[-1][0]
        inner = [sample for sample in self._samples if _EDGE * num_bytes <= sample[0] <= (1 - _EDGE) * num_bytes]
        (first_bytes, first), (last_bytes, last) = inner[0], inner[-1]
        num_inner = num_results * (last_bytes - first_bytes) / num_bytes
        return {role: round(1e3 * (last[role] - first.get(role, 0.0)) / num_inner, 3) for role in sorted(last)}

    def _find_processes(self) -> list[psutil.Process]:
        """Return the processes of this run; others may be measured at the same time."""
        run_dir = str(self._journal.parent)
        found = list[psutil.Process]()
        for started in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if any(run_dir in argument for argument in started.cmdline()):
                    found += started.children(recursive=True)
        return found

    def _sample(self) -> None:
        for process in self._find_processes():
            try:
                role = self._seconds[process.pid][0] if process.pid in self._seconds else _find_role(process)
                times = process.cpu_times()
            except psutil.Error:  # it has ended
                continue
            if role is not None:
                self._seconds[process.pid] = (role, times.user + times.system)
        seconds = dict[str, float]()
        for role, value in self._seconds.values():
            seconds[role] = seconds.get(role, 0.0) + value
        num_bytes = sum(path.stat().st_size for path in self._journal.glob("**/*") if path.is_file())
        self._samples.append((num_bytes, seconds))


def _find_role(process: psutil.Process) -> str | None:
    words = process.cmdline()
    if "torch.distributed.run" in words:
        return None
    return next((role for name, role in _ROLES.items() if name in words), None)
