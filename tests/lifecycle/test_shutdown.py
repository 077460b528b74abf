"""Stopping by a signal or a deadline, within one process; tests/jobs/test_recovery.py stops whole jobs."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace as Namespace
from typing import Any

import numpy as np
import pytest
from helpers.clock import FakeClock
from helpers.jobs import REPO, wait_for

from dpgen.config.prompt import PromptConfig
from dpgen.data.prompts.render import PromptRenderer
from dpgen.errors import Interrupted
from dpgen.lifecycle.shutdown import ShutdownMonitor, SignalReceived, exit_on_signal, find_deadline
from dpgen.scheduling.groups.prefix_groups import group_by_prefix

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture
def restored_handlers() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("restored_handlers")
def test_a_signal_interrupts_a_run_until_it_is_complete() -> None:
    running, complete = ShutdownMonitor(), ShutdownMonitor()
    with pytest.raises(Interrupted, match=r"interrupted by SIGTERM\. Rerun the same command to resume"):
        with running.handle_signals():
            signal.raise_signal(signal.SIGTERM)
    complete.install_handlers()
    complete.ignore_signals()
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    assert complete.reason is None


@pytest.mark.usefixtures("restored_handlers")
def test_a_signal_while_a_prompt_is_rendered_interrupts_the_run_and_fails_no_row() -> None:
    def interrupt(row: object) -> str:
        signal.raise_signal(signal.SIGTERM)
        return "a prompt"

    renderer = PromptRenderer(PromptConfig(template="{{ question }}"), None)
    renderer._template = Namespace(render=interrupt)  # type: ignore[assignment]
    row = {"question": "?"}
    rows: Any = Namespace(iter_rows=lambda row_ids, columns: iter([row] * len(row_ids)))
    for use in (
        lambda: renderer.build_prompt(row),
        lambda: group_by_prefix(rows, np.arange(2), ["question"], lambda _, columns: renderer.build_prompt(columns)),
    ):
        with pytest.raises(Interrupted, match="interrupted by SIGTERM"), ShutdownMonitor().handle_signals():
            use()


@pytest.mark.usefixtures("restored_handlers")
def test_after_the_run_a_signal_raises_nothing() -> None:
    monitor = ShutdownMonitor()
    with pytest.raises(RuntimeError, match="disk full"), monitor.handle_signals():
        raise RuntimeError("disk full")
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.usefixtures("restored_handlers")
def test_a_deferred_signal_is_a_reason_to_stop_and_does_not_raise() -> None:
    monitor = ShutdownMonitor()
    monitor.install_handlers()
    with monitor.defer_signals():
        signal.raise_signal(signal.SIGUSR1)
        assert monitor.reason == "interrupted by SIGUSR1. Rerun the same command to resume"


@pytest.mark.usefixtures("restored_handlers")
@pytest.mark.parametrize("raises_in_block", [True, False])
def test_a_signal_while_an_error_ends_the_run_neither_interrupts_the_closing_nor_replaces_the_error(
    raises_in_block: bool,
) -> None:
    monitor, closed = ShutdownMonitor(), list[str]()
    monitor.install_handlers()

    def close_journal() -> None:
        signal.raise_signal(signal.SIGTERM)
        closed.append("journal")

    def run() -> None:
        with ExitStack() as stack:
            stack.callback(close_journal)
            stack.push(monitor.defer_signals_on_error)
            with monitor.defer_signals():
                if raises_in_block:
                    raise RuntimeError("disk full")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        run()
    assert closed == ["journal"]


def test_a_deadline_is_a_reason_to_stop_once_it_is_reached() -> None:
    clock = FakeClock(99.0)
    monitor = ShutdownMonitor(100.0, "run.time_limit=90", clock)
    assert monitor.reason is None
    clock.now_s = 100.0
    assert monitor.reason == "run.time_limit=90 is near. Rerun the same command to resume"


@pytest.mark.usefixtures("restored_handlers")
def test_the_deadline_interrupts_whatever_the_run_does() -> None:
    monitor = ShutdownMonitor(time.monotonic() + 0.1, "run.time_limit=90")
    monitor.install_handlers()
    with pytest.raises(SignalReceived, match=r"run\.time_limit=90 is near"):
        threading.Event().wait(60)  # as reading an input or loading a model does


@pytest.mark.usefixtures("restored_handlers")
def test_the_deadline_of_a_run_that_has_ended_interrupts_nothing() -> None:
    """A process may run one job after the other."""
    num_threads = threading.active_count()
    monitor = ShutdownMonitor(time.monotonic() + 0.1, "run.time_limit=90")
    with pytest.raises(KeyError), monitor.handle_signals():
        raise KeyError("the run fails")
    received: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: received.append(number))
    wait_for(lambda: threading.active_count() <= num_threads)
    assert received == []


@pytest.mark.usefixtures("restored_handlers")
def test_a_deadline_within_a_deferring_block_raises_only_after_it() -> None:
    monitor = ShutdownMonitor(time.monotonic() + 0.1, "run.time_limit=90")
    monitor.install_handlers()
    with monitor.defer_signals():
        wait_for(lambda: monitor.reason is not None)
        threading.Event().wait(0.2)  # the thread's signal arrives here and does not raise
    with pytest.raises(Interrupted, match=r"run\.time_limit=90 is near"):
        monitor.accept_signals()


@pytest.mark.usefixtures("restored_handlers")
def test_a_result_that_is_being_written_is_finished_despite_the_deadline(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dpgen")
    monitor = ShutdownMonitor(time.monotonic() + 0.1, "run.time_limit=90")
    monitor.ignore_deadline()
    monitor.install_handlers()
    wait_for(lambda: caplog.messages != [])
    assert caplog.messages == ["run.time_limit=90 is near, finishing the result, which is nearly complete"]
    assert monitor.reason is None


@pytest.mark.parametrize(
    ("time_limit", "end", "expected"),
    [
        (None, "", (None, "")),
        ("90", "", (1090.0, "run.time_limit=90")),
        ("0:01:30", "", (1090.0, "run.time_limit=0:01:30")),
        (None, "2000", (1880.0, "SLURM's time limit")),
        ("90", "2000", (1090.0, "run.time_limit=90")),
        ("1:00:00", "2000", (1880.0, "SLURM's time limit")),
        (None, "1001", (881.0, "SLURM's time limit")),
        (None, " ", (None, "")),
    ],
)
def test_the_earlier_of_both_limits_is_the_deadline(
    time_limit: str | None, end: str, expected: tuple[float | None, str]
) -> None:
    environ = {"SLURM_JOB_END_TIME": end} if end else {}
    # The monotonic clock began 900 s after the epoch.
    deadline_s, name = find_deadline(time_limit, 120.0, environ, monotonic_s=100.0, epoch_s=1000.0)
    assert (deadline_s and deadline_s + 900.0, name) == expected


@pytest.mark.parametrize(
    ("end", "reason"),
    [("999", "is in the past: a leftover of another job"), ("N/A", "is no time"), ("²", "is no time")],
)
def test_an_end_time_of_an_ended_slurm_job_is_ignored_and_named(
    end: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert find_deadline("90", 120.0, {"SLURM_JOB_END_TIME": end}, monotonic_s=100.0, epoch_s=1000.0) == (
        190.0,
        "run.time_limit=90",
    )
    assert caplog.messages[0].startswith(f"ignoring SLURM_JOB_END_TIME={end}, which {reason}")


@pytest.mark.usefixtures("restored_handlers")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_the_process_ignores_stays_ignored(number: signal.Signals) -> None:
    """A script's `dpgen run ... &` has Ctrl-C ignored."""
    signal.signal(number, signal.SIG_IGN)
    wakeup_fd = signal.set_wakeup_fd(-1)
    exit_on_signal(pytest.fail, None, [number])
    signal.raise_signal(number)
    os.close(signal.set_wakeup_fd(wakeup_fd))  # which ends the thread that reads it
    monitor = ShutdownMonitor()
    with monitor.handle_signals():
        signal.raise_signal(number)
    assert monitor.reason is None


@pytest.mark.usefixtures("restored_handlers")
def test_a_deadline_interrupts_a_process_that_ignores_the_signal_it_sends() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with pytest.raises(Interrupted, match="the limit is near"):
        with ShutdownMonitor(time.monotonic() + 0.05, "the limit").handle_signals():
            time.sleep(30)


# `before_exit` needs a lock that the interrupted main thread holds, as any store or log call may.
PROGRAM = """
import os, signal, sys, threading, time
from dpgen.lifecycle.shutdown import exit_on_signal

lock = threading.Lock()

def write_status(reason):
    with lock:
        print("status written", flush=True)

announce = lambda message: print(message, file=sys.stderr, flush=True)
exit_on_signal(write_status, announce if sys.argv[1] == "announced" else None, [signal.SIGTERM])
with lock:
    os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""


@pytest.mark.parametrize("argument", ["announced", "by torchrun"])
def test_before_the_run_a_signal_ends_the_process_resumable_whatever_lock_it_holds(argument: str) -> None:
    command = [sys.executable, "-c", PROGRAM, argument]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (75, "status written\n")
    line = "interrupted by SIGTERM before the run started. Rerun the same command to resume\n"
    assert done.stderr == (line if argument == "announced" else "")
