"""A row may render for so long only: Python code, regular expressions, code that catches everything."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dpgen.data.time_limit import RenderTimer, limit_render_time
from dpgen.errors import RenderTimeout


@pytest.fixture(autouse=True)
def no_timer_of_the_test_runner() -> Iterator[None]:
    """Keep the test runner's own timer out of the way, and check that none is left running."""
    delay_s, interval_s = signal.setitimer(signal.ITIMER_REAL, 0)
    yield
    assert signal.setitimer(signal.ITIMER_REAL, delay_s, interval_s) == (0.0, 0.0), "a timer is still running"


def loop_forever(row: str) -> str:
    while True:
        pass


def loop_for_long(row: str) -> None:
    started_s = time.monotonic()
    while time.monotonic() < started_s + 5:
        pass


def catch_everything_twice(row: str) -> str:
    for _ in range(2):
        try:
            loop_forever(row)
        except BaseException:  # noqa: BLE001 - as careless code in a tokenizer might
            continue
    return loop_forever(row)


def backtrack(row: str) -> str:
    return str(re.fullmatch(r"(a+)+b", "a" * 60))


@pytest.mark.parametrize("render", [loop_forever, catch_everything_twice, backtrack])
def test_a_call_that_does_not_return_is_interrupted(render: Callable[[str], str]) -> None:
    with pytest.raises(RenderTimeout) as caught:
        limit_render_time(render, 0.2)("row")
    assert (caught.value.type, str(caught.value)) == (
        "render_timeout",
        "rendering took longer than data.render_timeout_s=0.2",
    )


def test_many_calls_share_one_timer_and_each_has_the_whole_limit() -> None:
    def compute(row: float) -> float:
        started_s = time.thread_time()
        while time.thread_time() - started_s < row:
            pass
        return row

    with RenderTimer(0.4) as timer:
        limited = timer.limit(compute)
        assert [limited(0.1) for _ in range(8)] == [0.1] * 8
        with pytest.raises(RenderTimeout):
            limited(60.0)
        assert limited(0.1) == 0.1, "the calls after one that was interrupted have the whole limit again"


def test_calls_within_a_block_share_its_timer_wherever_they_were_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, looping = limit_render_time(str, 0.2), limit_render_time(loop_forever, 0.2)
    with RenderTimer(0.2):
        with RenderTimer(60.0):  # as rows are ordered again while others are generated
            assert measured(5) == "5"
        timers: list[object] = []
        setitimer = signal.setitimer
        monkeypatch.setattr(signal, "setitimer", lambda *args: timers.append(args) or setitimer(*args))
        assert [measured(row) for row in range(100)] == [str(row) for row in range(100)]
        assert not timers, "a row sets no timer"
        with pytest.raises(RenderTimeout):
            looping("row")
        assert limit_render_time(measured, 0.2)(6) == "6", "a limited call within a limited call"
        with pytest.raises(RenderTimeout, match=re.escape("data.render_timeout_s=0.1")):
            limit_render_time(loop_forever, 0.1)("row")
        assert timers, "another limit has its own timer"
        thread = threading.Thread(target=measured, args=[7])
        thread.start()
        thread.join()
        with pytest.raises(RenderTimeout):
            looping("row")


@pytest.mark.parametrize("limit", [limit_render_time, lambda render, limit_s: RenderTimer.running.limit(render)])
@pytest.mark.parametrize("use_timer", [lambda row: signal.alarm(0), lambda row: signal.alarm(60)])
def test_a_call_that_uses_the_timer_itself_leaves_the_next_ones_limited(limit: Any, use_timer: Any) -> None:
    with RenderTimer(0.2):
        limit(use_timer, 0.2)("row")
        for _ in range(2):
            with pytest.raises(RenderTimeout):
                limit(loop_for_long, 0.2)("row")
        assert limit(str, 0.2)(5) == "5"


def test_time_between_the_calls_does_not_count() -> None:
    with RenderTimer(0.1) as timer:
        time.sleep(0.5)
        assert timer.limit(str)(5) == "5"


def test_a_call_that_waits_is_interrupted_at_twice_the_limit() -> None:
    def wait(row: str) -> None:
        while True:
            time.sleep(0.01)

    with pytest.raises(RenderTimeout):
        limit_render_time(wait, 0.2)("row")


def test_a_process_that_was_stopped_blames_no_row() -> None:
    program = (
        "import os, signal, time; from dpgen.data.time_limit import limit_render_time\n"
        "def render(row):\n"
        "    print('rendering', flush=True); os.kill(os.getpid(), signal.SIGSTOP); return row\n"
        "print(limit_render_time(render, 0.2)('done'), flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "rendering\n"
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        time.sleep(1.0)  # the limit, several times
        process.send_signal(signal.SIGCONT)
        assert process.stdout.readline() == "done\n"


def test_an_error_of_the_call_is_raised_as_it_is() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        limit_render_time(int, 5.0)("x")


def test_another_timer_goes_on_afterwards() -> None:
    fired = threading.Event()
    previous = signal.signal(signal.SIGALRM, lambda number, frame: fired.set())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        assert limit_render_time(str, 60.0)(1) == "1"
        assert fired.wait(30)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_outside_the_main_thread_a_call_has_no_limit() -> None:
    results: list[str] = []

    def run() -> None:
        results.append(limit_render_time(lambda row: time.sleep(0.3) or row, 0.1)("row"))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert results == ["row"]
