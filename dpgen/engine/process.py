"""Exchange messages with one engine process, and end it: the rank's side of the pipe.

- Neither side ever blocks the other: sending has a thread of its own, and so has reading the engine's output.
- A death is noticed at the next `poll`: by the end of the pipe, an `EngineFailed` message, or the exit status.
- Messages sent before the death are delivered first.
- `dpgen.engine.starting.server_process` starts it.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from pathlib import Path

from dpgen.engine.messages import (
    BeginJob,
    EngineFailed,
    EngineReady,
    EngineSpec,
    EngineTextConfig,
    Event,
    LoadModel,
    OptionsChecked,
    SetKvBytes,
    SetTextConfig,
    Shutdown,
)
from dpgen.engine.output_lines import find_root_cause, split_progress
from dpgen.engine.starting.log_file import EngineLog
from dpgen.engine.starting.server_process import KILL_TIMEOUT_S, ServerProcess
from dpgen.errors import EngineError, EngineStuck
from dpgen.records import Request

logger = logging.getLogger(__name__)

_MAX_LAST_LINES = 10  # shown to the user
_MAX_SEARCHED_LINES = 200  # a worker's error, below which the engine prints tracebacks of its own
_CLOSE_TIMEOUT_S = 10.0


class EngineProcess:
    """Run one engine in a process that has been started; `poll` returns its messages.

    Args:
        spec: the engine to start.
        server: its process, which has no spec yet.
        log: receives each line that the process, or vLLM in it, prints.
        kill_timeout_s: seconds that the process may take to end after SIGKILL.

    Attributes:
        is_loaded: True once it has loaded the model.
        pipe: to wait for its messages beside those of other engines; only this object reads it.
    """

    def __init__(
        self,
        spec: EngineSpec,
        server: ServerProcess,
        log: EngineLog,
        kill_timeout_s: float = KILL_TIMEOUT_S,
    ) -> None:
        self._kill_timeout_s, self._is_stuck = kill_timeout_s, False
        self._num_checks_pending = 1  # `OptionsChecked` of each job; what comes before the last is of an earlier job
        self.is_loaded = False
        self._server, self._process = server, server.process
        self.pipe: Connection = server.pipe
        self._log = log
        log.start_life(self._process.pid)
        self._output: deque[str] = deque(maxlen=_MAX_SEARCHED_LINES)
        self._log_thread = threading.Thread(target=self._read_lines, daemon=True)
        self._log_thread.start()
        # A thread sends: if both sides filled the pipe at once, each would wait for the other to read. `poll` notices
        # a failed send, as the end of the pipe.
        self._outbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, daemon=True)
        self._sender.start()
        self._outbox.put(spec)
        self._failure: str | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """True until the process ends, or reports that it cannot continue."""
        return self._failure is None and self._process.poll() is None

    @property
    def log_path(self) -> Path | None:
        """File with the engine's output; None where it is not kept."""
        return self._log.path

    def begin_job(self, spec: EngineSpec, log: EngineLog) -> None:
        """Request `BeginJob` of a loaded engine. `OptionsChecked` follows; what it sends before is of the last job.

        Args:
            log: receives the engine's lines from now on.
        """
        self._log = log
        self._num_checks_pending += 1
        log.start_life(self.pid)
        self._outbox.put(BeginJob(spec))

    def load_model(self, kv_bytes: int | None = None) -> None:
        """Request `LoadModel`. `KvBytesMeasured` follows unless `kv_bytes` is given."""
        self._outbox.put(LoadModel(kv_bytes))

    def set_kv_bytes(self, num_bytes: int) -> None:
        """Answer `KvBytesMeasured`."""
        self._outbox.put(SetKvBytes(num_bytes))

    def set_text_config(self, text_config: EngineTextConfig) -> None:
        """Send what the engine needs once it has loaded the model. `EngineReady` follows."""
        self._outbox.put(SetTextConfig(text_config))

    def submit(self, requests: list[Request]) -> None:
        """Add rows to the engine's queue."""
        self._outbox.put(requests)

    def poll(self, timeout_s: float) -> list[Event]:
        """Return the engine's messages, after waiting up to `timeout_s` for the first.

        Raises:
            EngineError: the engine died, or reported that it cannot continue.
        """
        events: list[Event] = []
        self._log.show_claimed()
        if self._failure is not None:
            timeout_s = 0
        try:
            while self.pipe.poll(0 if events else timeout_s):
                event = self.pipe.recv()
                if isinstance(event, EngineFailed):
                    self._failure = event.message
                    break
                self._num_checks_pending -= isinstance(event, OptionsChecked)
                if isinstance(event, EngineReady):
                    self.is_loaded = True
                    self.show_errors()
                if not self._num_checks_pending:
                    events.append(event)
        except (EOFError, OSError):
            if not events and self._failure is None:  # messages sent before the death are delivered first
                raise self._make_death_error() from None
        if not events and self._failure is not None:  # rows finished before the failure are delivered first
            raise self._make_failure_error(self._failure)
        if not events and self._process.poll() is not None:  # a worker of the dead engine may hold the pipe open
            raise self._make_death_error()
        return events

    def show_errors(self) -> None:
        """Show the errors that it has logged while it started, since it is ready, or is not started again."""
        self._log.show_errors()

    def stop(self) -> None:
        """Ask the engine to shut down; `close` waits for the end."""
        self._outbox.put(Shutdown())

    def close(self) -> None:
        """End the engine and its process tree: by a request first, by force after ten seconds."""
        self.stop()
        with contextlib.suppress(subprocess.TimeoutExpired):  # the engine hangs; `kill` ends it
            self._process.wait(timeout=_CLOSE_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """End the engine and its process tree immediately; safe to call twice.

        Raises:
            EngineStuck: the process is still there: a driver that hangs holds it in the kernel.
        """
        try:
            self._server.kill(0 if self._is_stuck else self._kill_timeout_s)
        except subprocess.TimeoutExpired:
            self._is_stuck = True  # the next call does not wait again
            cause = f"the engine process {self.pid} can't be ended (it runs {self._kill_timeout_s:g} s after SIGKILL)"
            raise EngineStuck(cause, log_path=self.log_path) from None
        self._outbox.put(None)
        self._log_thread.join(timeout=1)
        self._log.show_claimed()
        self._sender.join(timeout=1)
        self.pipe.close()

    def _send_all(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the engine is gone, or `kill` has closed the pipe
            while (message := self._outbox.get()) is not None:
                self.pipe.send(message)
                del message  # rows' media are freed once they are finished, also if nothing more is sent

    def _make_failure_error(self, message: str) -> EngineError:
        self.kill()
        # The traceback is in the log file. Without one, its end is all that the user gets.
        last_lines = [] if self.log_path is not None else self._last_lines
        output = list(self._output)
        cause = f"the engine failed: {find_root_cause(message, output)}"
        return EngineError(cause, log_path=self.log_path, last_lines=last_lines, output=output)

    def _make_death_error(self) -> EngineError:
        self.kill()
        status = self._process.returncode
        number = signal.Signals(-status) if status < 0 else None
        how = f"was killed by {number.name}" if number else f"exited with status {status}"
        # Nothing that the engine printed explains a kill from outside.
        last_lines = [] if number in (signal.SIGKILL, signal.SIGTERM) else self._last_lines
        cause, output = f"the engine process {how}", list(self._output) if last_lines else []
        return EngineError(cause, signal=number, log_path=self.log_path, last_lines=last_lines, output=output)

    @property
    def _last_lines(self) -> list[str]:
        return list(self._output)[-_MAX_LAST_LINES:]

    def _read_lines(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            for line in split_progress(raw.decode("utf-8", "replace").rstrip()):
                self._output.append(line)
                self._log.write(line)


def wait_for_any(pipes: Iterable[Connection | None], timeout_s: float) -> None:
    """Wait up to `timeout_s` for a message in one of the pipes; None stands for an engine that has none now."""
    if awaited := [pipe for pipe in pipes if pipe is not None]:
        wait(awaited, timeout_s)
    else:
        time.sleep(timeout_s)


def warn_if_stuck(end: Callable[[], None]) -> None:
    """End a process, and go on with a warning if it can't be ended."""
    try:
        end()
    except EngineStuck as error:
        logger.warning(error.summarize("leaving it to the kernel"))
