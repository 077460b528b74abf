"""Being told to stop: by a signal, by `run.time_limit`, or by SLURM's end time.

While rows are generated the loop asks (`Stop.reason`) and ends in good order; elsewhere the signal raises at once.
A second signal ends the process on the spot: what was synced stays, and the engine dies with its rank. So does the
first one where nothing has begun yet (`exit_on_signal`).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from dpgen.errors import EXIT_RESUMABLE, ConfigError, Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SAME_SIGNAL_S = 1.0  # a launcher and a terminal may both pass on one Ctrl-C
_RESUME_HINT = "the same command goes on from here"


class ShutdownMonitor:
    """Whether, and why, the run is to stop.

    Args:
        deadline_s: when to stop, in seconds since the epoch; None for never.
        deadline_name: what set it, for the message.
        before_exit: called when a second signal ends the process on the spot.
    """

    def __init__(
        self,
        deadline_s: float | None = None,
        deadline_name: str = "",
        clock: Callable[[], float] = time.time,
        before_exit: Callable[[], None] = lambda: None,
    ) -> None:
        self._deadline_s, self._deadline_name, self._clock = deadline_s, deadline_name, clock
        self._before_exit = before_exit
        self._signal: signal.Signals | None = None
        self._first_signal_s = 0.0
        self._may_raise, self._is_over = True, False

    def install_handlers(self) -> None:
        """Takes SIGTERM, SIGINT and SIGUSR1 for this process."""
        for number in _SIGNALS:
            signal.signal(number, self._handle_signal)

    @property
    def reason(self) -> str | None:
        """Why to stop now; None to go on."""
        if self._signal is not None:
            return f"told to stop by {self._signal.name}; {_RESUME_HINT}"
        if self._deadline_s is not None and self._clock() >= self._deadline_s:
            return f"{self._deadline_name} is near; {_RESUME_HINT}"
        return None

    @contextmanager
    def defer_signals(self) -> Iterator[None]:
        """Within this block signals don't raise: whoever runs it asks for the reason, often."""
        self._may_raise = False
        try:
            yield
        finally:
            self._may_raise = True

    def ignore_signals(self) -> None:
        """From here on signals do nothing: the run is complete, and about to end."""
        self._is_over = True

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._is_over:
            return
        if self._signal is not None:
            if now - self._first_signal_s > _SAME_SIGNAL_S:
                self._before_exit()
                os._exit(EXIT_RESUMABLE)
            return
        self._signal, self._first_signal_s = signal.Signals(number), now
        if self._may_raise:
            raise Interrupted(self.reason)


def exit_on_signal(before_exit: Callable[[], None], say: Callable[[str], None]) -> None:
    """Until a `Stop` is installed, SIGTERM and SIGUSR1 end this process on the spot, resumable.

    For the time in which a rank imports torch and joins the others, maybe for minutes, in calls that no handler of
    Python's interrupts: so a thread listens, too. Without this a job that is stopped then leaves no word, which is
    what a failed run does.

    Args:
        before_exit: called first.
        say: takes the reason.
    """
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    ending = threading.Lock()

    def end(number: int, frame: FrameType | None) -> None:
        if ending.acquire(blocking=False):
            before_exit()
            say(f"told to stop by {signal.Signals(number).name} before the run had begun; {_RESUME_HINT}")
            os._exit(EXIT_RESUMABLE)

    def listen() -> None:
        while heard := os.read(read_fd, 1):
            if signal.getsignal(heard[0]) is end:  # else a Stop has taken over, or it is another signal
                end(heard[0], None)

    threading.Thread(target=listen, name="signals", daemon=True).start()
    signal.set_wakeup_fd(write_fd)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, end)


def find_deadline(
    time_limit: str | None, margin_s: float, environ: Mapping[str, str], started_s: float
) -> tuple[float | None, str]:
    """When to stop (seconds since the epoch), and what set that: the sooner of `run.time_limit` and SLURM's end.

    Args:
        time_limit: seconds, or H:MM:SS; None for no limit.
        margin_s: how long before SLURM's end to stop.
        started_s: when the run started.
    """
    found: list[tuple[float, str]] = []
    if time_limit is not None:
        found.append((started_s + parse_time_limit(time_limit), f"run.time_limit={time_limit}"))
    end = environ.get("SLURM_JOB_END_TIME", "")
    if end.isdigit():
        found.append((int(end) - margin_s, "SLURM's time limit"))
    return min(found) if found else (None, "")


def parse_time_limit(text: str) -> float:
    """``'90'`` or ``'0:01:30'`` → 90.0 seconds.

    Raises:
        ConfigError: neither of these.
    """
    parts = str(text).split(":")
    if not 1 <= len(parts) <= 3 or not all(part.strip().isdigit() for part in parts):
        raise ConfigError(f"run.time_limit is {text!r}; it must be seconds, or H:MM:SS in quotes")
    seconds = 0.0
    for part in parts:
        seconds = 60 * seconds + int(part)
    return seconds
