"""Give tasks to worker processes, and collect the answers in any order.

- Nothing here waits, but `wait_until_ready`. A worker does its tasks in order, so a death or a hang is that of the
  first one without an answer. The others go to its successor.
- `submit` only queues a task. `poll` sends the queued ones, all those of a worker with one system call, and takes all
  answers of a worker with another: each costs the rank microseconds, and wakes a worker that would compete with the
  engine for the cores.
- A worker has a few tasks ahead, so that it need not wait until the rank looks again. They fit in its pipe.
- A worker that dies or hangs is replaced. One that can't start ends the run: it would fail for every task.
- Workers end with their rank, killed or not.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from dpgen.errors import DpgenError
from dpgen.workers.messages import MessageInbox, encode_message

_READY_WAIT_S = 0.2
_MAX_START_DEATHS = 2
_CLOSE_TIMEOUT_S = 5.0
_PIPE_TIMEOUT_S = 10
_MAX_AHEAD_BYTES = 64 << 10  # of the tasks that a worker has; a larger one is alone


class WorkerRefused(DpgenError):
    """Report that a worker rejected its arguments. Another one would, too."""


@dataclass(frozen=True)
class WorkerSpec:
    """Describe a pool's workers.

    Attributes:
        name: what the workers do, for messages: "the parser".
        factory: ``package.module:function``; each worker calls it once with `arguments`. It returns (handler, info):
            the handler answers each task, the info is what `WorkerPool.wait_until_ready` returns.
        arguments: picklable.
        environment: of the processes.
        num_workers: processes.
        timeout_s: seconds that a task may take.
        start_timeout_s: seconds that a worker may take to start.
        niceness: added to the rank's; above 0 the workers leave the cores to the engine where both want them.
        max_ahead: tasks that a worker has at a time, at most.
    """

    name: str
    factory: str
    arguments: tuple[Any, ...]
    environment: Mapping[str, str]
    num_workers: int = 1
    timeout_s: float = 60.0
    start_timeout_s: float = 600.0
    niceness: int = 0
    max_ahead: int = 8


@dataclass(frozen=True)
class Answer:
    """Hold the end of a task.

    Attributes:
        key: as submitted.
        value: what the handler returned.
        failure: why there is no value; None if there is one.
        has_timed_out: True if the worker took too long.
        signal: the signal that the worker died of, as the kernel's when memory runs out; None if it did not.
    """

    key: Hashable
    value: Any = None
    failure: str | None = None
    has_timed_out: bool = False
    signal: int | None = None


class WorkerPool:
    """Run tasks in worker processes.

    Args:
        log: takes each line that the workers print; called in threads.
        clock: seconds that only increase.
    """

    def __init__(
        self, spec: WorkerSpec, log: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._spec, self._log, self._clock = spec, log, clock
        self._waiting: deque[tuple[Hashable, bytes]] = deque()  # with their messages
        self._answers: list[Answer] = []  # that `poll` has not returned yet
        self._num_start_deaths = 0
        self._info: Any = None
        self._workers = [self._start_worker() for _ in range(spec.num_workers)]

    def wait_until_ready(self, on_wait: Callable[[], None]) -> Any:
        """Wait for all workers to start, and return the info of one of them.

        Args:
            on_wait: called again and again meanwhile.

        Raises:
            WorkerRefused: a worker rejected its arguments.
            DpgenError: workers died, or took too long, one after the other.
        """
        while not all(worker.is_ready for worker in self._workers):
            on_wait()
            wait([worker.pipe for worker in self._workers if not worker.is_ready], _READY_WAIT_S)
            self._update_workers()
        return self._info

    @property
    def pending_keys(self) -> list[Hashable]:
        """Keys of the tasks whose answers `poll` has not returned."""
        busy = [key for worker in self._workers for key, _ in worker.tasks]
        return [*busy, *(key for key, _ in self._waiting), *(answer.key for answer in self._answers)]

    @property
    def num_pending(self) -> int:
        """Number of these tasks."""
        return len(self._waiting) + len(self._answers) + sum(len(worker.tasks) for worker in self._workers)

    def submit(self, key: Hashable, task: Any) -> None:
        """Add a task; `poll` sends it, and returns its answer under the key."""
        self._waiting.append((key, encode_message(task)))

    def poll(self) -> list[Answer]:
        """Send tasks to the workers that have room, and return the answers that have arrived.

        Raises:
            DpgenError: a worker can't start.
        """
        self._update_workers()
        answers, self._answers = self._answers, []
        return answers

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.pipe.close()  # the worker ends at the end of its pipe, once it has finished its task
        for worker in self._workers:
            worker.end(_CLOSE_TIMEOUT_S if worker.is_ready and not worker.is_busy else 0.0)

    def _start_worker(self) -> _Worker:
        return _Worker(self._spec, self._log, self._clock())

    def _update_workers(self) -> None:
        """Take the answers that have arrived, replace workers that died or hang, and give out the tasks that wait."""
        now_s = self._clock()
        for index, worker in enumerate(self._workers):
            try:
                for succeeded, value in worker.inbox.take():
                    self._handle_message(worker, succeeded, value)
            except (EOFError, OSError):
                self._replace(index, f"{self._spec.name} process died ({worker.describe_end()})")
                continue
            limit_s = self._spec.timeout_s if worker.is_ready else self._spec.start_timeout_s
            if (worker.is_busy or not worker.is_ready) and now_s - worker.since_s > limit_s:
                self._replace(index, f"{self._spec.name} took longer than {limit_s:g} s", has_timed_out=True)
        self._assign_tasks()

    def _handle_message(self, worker: _Worker, succeeded: bool, value: Any) -> None:
        if not worker.is_ready:
            if not succeeded:
                raise WorkerRefused(f"{self._spec.name} can't start: {value}")
            worker.is_ready, self._info, self._num_start_deaths = True, value, 0
            return
        key, _ = worker.tasks.popleft()
        worker.since_s = self._clock()
        self._answers.append(Answer(key, value) if succeeded else Answer(key, failure=value))

    def _replace(self, index: int, reason: str, *, has_timed_out: bool = False) -> None:
        """Start another worker in place of one that died or hangs; the first of its tasks has failed."""
        worker = self._workers[index]
        worker.pipe.close()
        signal = None if has_timed_out else worker.signal
        worker.end(0.0)
        if not worker.is_ready:
            self._num_start_deaths += 1
            if self._num_start_deaths > _MAX_START_DEATHS:
                raise DpgenError(f"{reason} while it was starting, {self._num_start_deaths} times in a row")
        if worker.is_busy:
            key, _ = worker.tasks.popleft()
            self._answers.append(Answer(key, failure=reason, has_timed_out=has_timed_out, signal=signal))
            self._waiting.extendleft(reversed(worker.tasks))
        self._workers[index] = self._start_worker()

    def _assign_tasks(self) -> None:
        assigned: dict[int, list[bytes]] = {}
        while self._waiting:
            size = len(self._waiting[0][1])
            free = [index for index, worker in enumerate(self._workers) if worker.is_ready and worker.has_room(size)]
            if not free:
                break
            index = min(free, key=lambda index: len(self._workers[index].tasks))
            worker = self._workers[index]
            if not worker.is_busy:
                worker.since_s = self._clock()
            worker.tasks.append(self._waiting.popleft())
            assigned.setdefault(index, []).append(worker.tasks[-1][1])
        for index, messages in assigned.items():
            worker = self._workers[index]
            try:
                worker.pipe.sendall(b"".join(messages))
            except OSError:
                self._replace(index, f"{self._spec.name} process died ({worker.describe_end()})")


class _Worker:
    """Hold one worker process.

    Attributes:
        tasks: keys and pickled tasks without an answer, in the order in which it does them.
        since_s: time at which it was started, or came to the first of its tasks.
    """

    def __init__(self, spec: WorkerSpec, log: Callable[[str], None], now_s: float) -> None:
        ours, theirs = socket.socketpair()
        # A worker that was stopped must not stop its rank: a message that it doesn't take is its death.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _PIPE_TIMEOUT_S, 0))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "dpgen.workers.worker", str(theirs.fileno()), str(os.getpid())],
                env=dict(spec.environment),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the rank handles Ctrl-C
            )
        threading.Thread(target=self._read_lines, args=[log], daemon=True).start()
        self.pipe, self.inbox = ours, MessageInbox(ours)
        self.pipe.sendall(encode_message((spec.factory, spec.arguments, spec.niceness)))
        self.is_ready = False
        self.tasks: deque[tuple[Hashable, bytes]] = deque()
        self.since_s = now_s

        self._max_ahead = spec.max_ahead

    @property
    def is_busy(self) -> bool:
        return bool(self.tasks)

    @property
    def signal(self) -> int | None:
        """The signal that the process has died of; None if it has not."""
        status = self._process.poll()
        return -status if status is not None and status < 0 else None

    def has_room(self, num_bytes: int) -> bool:
        """Return True if a task of this size can be sent without waiting."""
        num_bytes += sum(len(data) for _, data in self.tasks)
        return not self.tasks or (len(self.tasks) < self._max_ahead and num_bytes <= _MAX_AHEAD_BYTES)

    def _read_lines(self, log: Callable[[str], None]) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            if line := raw.decode("utf-8", "replace").rstrip():
                log(line)

    def describe_end(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSE_TIMEOUT_S)
        status = self._process.returncode
        return "it runs without its pipe" if status is None else f"exit status {status}"

    def end(self, timeout_s: float) -> None:
        """End the process: wait for it, then kill it with its children."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        if self._process.poll() is None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_CLOSE_TIMEOUT_S)
