"""Run the programs of many rows on one event loop, in a thread of the rank process.

- The main thread puts rows and answers in, and takes messages out; neither thread ever waits for the other, but to end
  programs whose engine is gone.
- A program that keeps the loop for itself, which no await ends, is interrupted after a while.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from dpgen.errors import DpgenError
from dpgen.journal.calls import FinishedCall
from dpgen.records import RowResult
from dpgen.scheduling.programs.running import (
    Message,
    ProgramBlocked,
    ProgramEnded,
    ProgramSpec,
    RunningProgram,
    make_task,
)

logger = logging.getLogger(__name__)

_MIN_BLOCKED_S, _MAX_BLOCKED_S = 1.0, 60.0  # a quarter of the time limit, within these
_PING_INTERVAL_S = 1.0
_SETTLING_ROUNDS = 4  # of the loop, in which an answered program comes to its next call
_CANCEL_TIMEOUT_S = 5.0


class ProgramLoop:
    """Run programs, in a thread that the first of them starts.

    Args:
        num_tool_threads: functions that run at a time.

    Attributes:
        num_tools: functions that run now.
    """

    def __init__(self, spec: ProgramSpec, num_tool_threads: int) -> None:
        self.spec = spec
        self.num_tools = 0
        self._num_tool_threads = num_tool_threads
        self._loop = asyncio.new_event_loop()
        self._loop.set_task_factory(make_task)
        self._loop.set_exception_handler(lambda _, context: logger.debug(f"in a program: {context.get('message')}"))
        self._thread: threading.Thread | None = None
        self._programs: dict[int, RunningProgram] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._outbox: deque[Message] = deque()
        self._is_woken = self._is_closed = False
        self._num_posted = self._num_settled = 0
        self._settled = threading.Event()
        self._pinged_s: float | None = None
        self._next_ping_s = self._seen_s = 0.0
        self._seen_task: asyncio.Task[Any] | None = None  # that ran when the main thread last looked
        self._is_interrupted = False

    # ---- the main thread

    def begin(
        self, row: int, attempt: int, columns: Mapping[str, Any], known: Sequence[FinishedCall], seed: int
    ) -> None:
        """Begin the program of a row; see `RunningProgram`."""
        self._post(lambda: self._begin(row, attempt, columns, known, seed))

    def deliver(self, result: RowResult) -> None:
        """Answer the call whose id the result has; nothing happens if its program has ended."""
        self._post(lambda: self._deliver(result))

    def take_messages(self) -> list[Message]:
        """Return what programs have asked and reported since the last call."""
        messages = []
        while self._outbox:
            messages.append(self._outbox.popleft())
        return messages

    @property
    def is_settled(self) -> bool:
        """True once all that was put in has led to what it leads to: programs wait for calls, tools or time."""
        return self._num_settled == self._num_posted

    def wait_until_settled(self, timeout_s: float) -> None:
        """Wait for that, so that the calls which follow from answers reach an engine at once; not for long."""
        self._settled.clear()
        if not self.is_settled:
            self._settled.wait(timeout_s)

    def cancel_idle(self, kept: Collection[int] = ()) -> list[int]:
        """End the programs for which no function runs, without a result, and return their rows; see `drop` of runners.

        None end where the loop does not answer.

        Args:
            kept: rows whose programs go on.
        """
        if self._thread is None:
            return []
        future = asyncio.run_coroutine_threadsafe(self._cancel_idle(kept), self._loop)
        try:
            return future.result(_CANCEL_TIMEOUT_S)
        except FutureTimeout:
            future.cancel()
            return []

    def interrupt_if_blocked(self) -> None:
        """Interrupt a program that has kept the loop for itself for long; many that compute in turn are none.

        Raises:
            DpgenError: it can't be interrupted.
        """
        now = time.monotonic()
        limit_s = min(_MAX_BLOCKED_S, max(_MIN_BLOCKED_S, self.spec.timeout_s / 4))
        pinged_s = self._pinged_s  # the other thread may set it to None meanwhile
        if pinged_s is None:
            if self._thread is not None and now >= self._next_ping_s:
                self._pinged_s, self._next_ping_s = now, now + _PING_INTERVAL_S
                self._loop.call_soon_threadsafe(self._answer_ping)
            return
        # The loop runs no task twice before it answers: one that is seen again and again has kept the loop meanwhile.
        task = asyncio.current_task(self._loop)
        if task is not self._seen_task:
            self._seen_task, self._seen_s, self._is_interrupted = task, now, False
        blocked_s = now - max(pinged_s, self._seen_s)
        if blocked_s > limit_s + _MAX_BLOCKED_S:
            raise DpgenError(
                f"a program has blocked the event loop for {blocked_s:.0f} s, in code that can't be interrupted; one "
                f"of rows {sorted(self._programs)[:5]}...: call what takes long by llm.tool"
            )
        if blocked_s > limit_s and not self._is_interrupted:
            assert self._thread is not None and self._thread.ident is not None
            self._is_interrupted = True
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self._thread.ident), ctypes.py_object(ProgramBlocked)
            )

    def close(self) -> None:
        """End all programs. A function that runs is left behind, in its daemon thread."""
        self._is_closed = True
        if self._thread is None:
            self._loop.close()
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CANCEL_TIMEOUT_S)

    def _post(self, action: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run_thread, name="programs", daemon=True)
            self._thread.start()
        self._num_posted += 1
        self._inbox.append(action)
        if not self._is_woken:
            self._is_woken = True
            self._loop.call_soon_threadsafe(self._drain_inbox)

    # ---- the thread

    def _run_thread(self) -> None:
        asyncio.set_event_loop(self._loop)
        while not self._is_closed:
            try:
                self._loop.run_forever()
            except (SystemExit, KeyboardInterrupt, ProgramBlocked):
                continue  # a task has it as its exception already, or has just ended

    def _drain_inbox(self) -> None:
        self._is_woken = False
        num_done = 0
        while self._inbox:
            self._inbox.popleft()()
            num_done += 1
        self._loop.call_soon(self._settle, num_done, _SETTLING_ROUNDS)

    def _settle(self, num_done: int, num_rounds: int) -> None:
        if num_rounds:
            self._loop.call_soon(self._settle, num_done, num_rounds - 1)
        else:
            self._num_settled += num_done
            self._settled.set()

    def _begin(
        self, row: int, attempt: int, columns: Mapping[str, Any], known: Sequence[FinishedCall], seed: int
    ) -> None:
        program = self._programs[row] = RunningProgram(row, attempt, known, seed, self)
        program.begin(self._loop, columns)

    def _deliver(self, result: RowResult) -> None:
        if (program := self._programs.get(result.row)) is not None:
            program.deliver(result)

    async def _cancel_idle(self, kept: Collection[int]) -> list[int]:
        idle = [row for row, program in self._programs.items() if not program.num_tools and row not in kept]
        for row in idle:
            self._programs.pop(row).cancel()
        return idle

    def _answer_ping(self) -> None:
        self._pinged_s, self._seen_task, self._is_interrupted = None, None, False

    # ---- what programs use

    def send(self, message: Message) -> None:
        """Report to the main thread."""
        self._outbox.append(message)
        if isinstance(message, ProgramEnded):
            self._programs.pop(message.result.row, None)

    async def run_function(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what a function returns, or raise what it raises; it runs in a thread that no exit waits for."""
        if inspect.iscoroutinefunction(function):
            self.num_tools += 1
            try:
                return await function(*args, **kwargs)
            finally:
                self.num_tools -= 1
        if not hasattr(self, "_threads"):
            self._threads = asyncio.Semaphore(self._num_tool_threads)
        async with self._threads:
            future = self._loop.create_future()

            def run() -> None:
                try:
                    value = function(*args, **kwargs)
                except BaseException as error:  # noqa: BLE001 - foreign code; the program gets it
                    self._loop.call_soon_threadsafe(_set_if_waiting, future, None, error)
                else:
                    self._loop.call_soon_threadsafe(_set_if_waiting, future, value, None)

            threading.Thread(target=run, name="tool", daemon=True).start()
            self.num_tools += 1
            try:
                return await future
            finally:
                self.num_tools -= 1


def _set_if_waiting(future: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if isinstance(error, StopIteration):
        error = RuntimeError(f"it raised StopIteration: {error}")  # a future can't hold one
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
