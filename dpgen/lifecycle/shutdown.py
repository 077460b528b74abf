"""Stop a run by a signal, by `run.time_limit`, or before SLURM's end time.

- While rows are generated, the loop asks for the reason to stop (`ShutdownMonitor.reason`) and ends in good order.
  Elsewhere the signal, or the deadline, raises `SignalReceived` immediately. That is no Exception: templates,
  tokenizers and libraries catch those, and the run would continue. `handle_signals` makes it `Interrupted` at the run's
  boundary. A result that is being written is finished despite the deadline.
- A second signal ends the process immediately: synced rows stay, and the engine ends with its rank. So does the first
  one while the ranks are still joining (`exit_on_signal`).
- A signal that the process ignores stays ignored, as Ctrl-C does in what a script runs in the background.
- A signal handler never logs, since the interrupted thread may hold the lock of logging; it uses `os.write`.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

from dpgen.errors import EXIT_RESUMABLE, ConfigError, Interrupted

logger = logging.getLogger(__name__)

_NUMBER = re.compile("[0-9]+")
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SAME_SIGNAL_S = 1.0  # a launcher and a terminal may both pass on one Ctrl-C
_EXIT_WAIT_S = 1.0
_MAX_SLEEP_S = 60.0
_RESUME_HINT = "Rerun the same command to resume"


class SignalReceived(BaseException):
    """Unwind the code that a signal has interrupted, through handlers of Exception; the message is the reason."""


class ShutdownMonitor:
    """Tell the run when to stop, and why.

    Args:
        deadline_s: when to stop, in seconds of `clock`; None for never.
        deadline_name: what set the deadline, for the message.
        before_exit: called in the signal handler when a second signal ends the process; must not log.
    """

    def __init__(
        self,
        deadline_s: float | None = None,
        deadline_name: str = "",
        clock: Callable[[], float] = time.monotonic,
        before_exit: Callable[[], None] = lambda: None,
    ) -> None:
        self._deadline_s, self._deadline_name, self._clock = deadline_s, deadline_name, clock
        self._before_exit = before_exit
        self._signal: signal.Signals | None = None
        self._first_signal_s = 0.0
        self._may_raise, self._is_over, self._has_ended = True, False, False
        self._has_deadline = deadline_s is not None
        self._is_deadline_due = False

    def install_handlers(self) -> None:
        """Handle SIGTERM, SIGINT and SIGUSR1 in this process, and watch the deadline."""
        for number in _SIGNALS:
            is_needed = number == signal.SIGUSR1 and self._deadline_s is not None  # the deadline sends it
            if is_needed or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle_signal)
        if self._deadline_s is not None:
            threading.Thread(target=self._watch_deadline, args=[self._deadline_s], name="deadline", daemon=True).start()

    @property
    def reason(self) -> str | None:
        """The reason to stop now; None to continue."""
        if self._signal is not None:
            return f"interrupted by {self._signal.name}. {_RESUME_HINT}"
        if self._has_deadline and self._deadline_s is not None and self._clock() >= self._deadline_s:
            return f"{self._deadline_name} is near. {_RESUME_HINT}"
        return None

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handle signals from now on; raise Interrupted from the block where one has interrupted it.

        After the block they are handled, and raise nothing.
        """
        try:
            self.install_handlers()
            yield
        except SignalReceived as received:
            raise Interrupted(str(received)) from None
        finally:
            self._may_raise = False
            self._has_ended = True  # a process may run another job, which has a deadline of its own

    @contextmanager
    def defer_signals(self) -> Iterator[None]:
        """Let signals not raise within the block, whose code checks `reason` often instead.

        They don't raise after it either if the block raised: see `defer_signals_on_error`.
        """
        self._may_raise = False
        yield
        self._may_raise = True

    def accept_signals(self) -> None:
        """Let signals and the deadline raise again, and raise if one of them has come meanwhile.

        Raises:
            Interrupted: there is a reason to stop.
        """
        self._may_raise, self._has_deadline = True, self._deadline_s is not None
        if (reason := self.reason) is not None:
            raise Interrupted(reason)

    def ignore_deadline(self) -> None:
        """Ignore the deadline from now on: what follows takes less time than doing it again later."""
        self._has_deadline = False

    def defer_signals_on_error(self, error_type: type[BaseException] | None, *_: object) -> None:
        """Let signals not raise any more if an error is ending the run; an exit of a context manager.

        A launcher sends SIGTERM just then. It must neither interrupt the closing of the journal nor replace the error.
        """
        if error_type is not None:
            self._may_raise = False

    def ignore_signals(self) -> None:
        """Ignore signals from now on: the run is complete, and the process is about to end."""
        self._is_over = True

    def _watch_deadline(self, deadline_s: float) -> None:
        """Interrupt the main thread at the deadline, also in a call that blocks."""
        while (remaining_s := deadline_s - self._clock()) > 0:
            time.sleep(min(remaining_s, _MAX_SLEEP_S))
        if self._is_over or self._has_ended:
            return
        if not self._has_deadline:
            logger.info(f"{self._deadline_name} is near, finishing the result, which is nearly complete")
            return
        self._is_deadline_due = True
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._is_over:
            return
        if self._is_deadline_due and number == signal.SIGUSR1:
            self._is_deadline_due = False
            if self._may_raise and self.reason is not None:
                raise SignalReceived(self.reason)
            return
        if self._signal is not None:
            if now - self._first_signal_s > _SAME_SIGNAL_S:
                self._before_exit()
                os._exit(EXIT_RESUMABLE)
            return
        self._signal, self._first_signal_s = signal.Signals(number), now
        if self._may_raise:
            raise SignalReceived(self.reason)


def watch_for_shutdown(time_limit: str | None, margin_s: float, before_exit: Callable[[], None]) -> ShutdownMonitor:
    """Return the monitor of a run that begins now in this process's environment; see `find_deadline`."""
    now_s, epoch_s = time.monotonic(), time.time()
    deadline = find_deadline(time_limit, margin_s, os.environ, monotonic_s=now_s, epoch_s=epoch_s)
    return ShutdownMonitor(*deadline, before_exit=before_exit)


def exit_on_signal(
    before_exit: Callable[[str], None],
    announce: Callable[[str], None] | None,
    signals: Sequence[int],
) -> None:
    """End this process, resumable, on these signals, until a `ShutdownMonitor` installs its handlers.

    Meant for the time in which a rank imports torch and joins the others. That may take minutes in calls that no Python
    handler interrupts, so a thread receives the signal. Without it, a job that is stopped then would leave no status,
    as a failed run does.

    Args:
        before_exit: called first, in that thread, with the reason.
        announce: writes the reason, in that thread; None under torchrun, which reports its signals itself.
    """
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    handled: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        handled.append(number)
        # The thread ends the process meanwhile. The main thread may hold a lock that ending needs, so it waits briefly.
        time.sleep(_EXIT_WAIT_S)

    def wait_for_signal() -> None:
        while received := os.read(read_fd, 1):
            number = received[0]
            # Otherwise the signal is another one, or a ShutdownMonitor has taken over.
            if number in handled or signal.getsignal(number) is handle:
                reason = f"interrupted by {signal.Signals(number).name} before the run started. {_RESUME_HINT}"
                before_exit(reason)
                if announce is not None:
                    announce(reason)
                os._exit(EXIT_RESUMABLE)
        os.close(read_fd)  # the caller has closed the other end: this process begins another run

    threading.Thread(target=wait_for_signal, name="signals", daemon=True).start()
    signal.set_wakeup_fd(write_fd)
    for number in signals:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handle)


def find_deadline(
    time_limit: str | None, margin_s: float, environ: Mapping[str, str], *, monotonic_s: float, epoch_s: float
) -> tuple[float | None, str]:
    """Return the deadline in monotonic seconds, and what set it; (None, "") for no deadline.

    The earlier of `run.time_limit` and SLURM's end time counts. A clock that is set later changes neither. An end time
    in the past is a leftover of another job, in a shell that has outlived it, and is ignored.

    Args:
        time_limit: seconds, or H:MM:SS; None for no limit.
        margin_s: how long before SLURM's end to stop.
        monotonic_s, epoch_s: now, by the monotonic clock and in seconds since the epoch.
    """
    deadlines: list[tuple[float, str]] = []
    if time_limit is not None:
        deadlines.append((monotonic_s + parse_time_limit(time_limit), f"run.time_limit={time_limit}"))
    end = environ.get("SLURM_JOB_END_TIME", "").strip()
    if _NUMBER.fullmatch(end) and int(end) > epoch_s:
        deadlines.append((monotonic_s + int(end) - margin_s - epoch_s, "SLURM's time limit"))
    elif end:
        what = "is in the past: a leftover of another job" if _NUMBER.fullmatch(end) else "is no time"
        logger.info(f"ignoring SLURM_JOB_END_TIME={end}, which {what}. Only run.time_limit limits this run's time")
    return min(deadlines) if deadlines else (None, "")


def parse_time_limit(text: str) -> float:
    """Return the seconds of ``'90'`` or ``'0:01:30'``: 90.0.

    Raises:
        ConfigError: the text has neither form.
    """
    parts = str(text).split(":")
    if not 1 <= len(parts) <= 3 or not all(_NUMBER.fullmatch(part.strip()) for part in parts):
        raise ConfigError(f"run.time_limit={text!r}: must be seconds, or H:MM:SS in quotes")
    seconds = 0.0
    for part in parts:
        seconds = 60 * seconds + int(part)
    return seconds
