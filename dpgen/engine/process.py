"""The rank's side of its engine: a child process, a pipe, and certainty about whether it lives."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection

from dpgen.engine.messages import EngineFailed, EngineSpec, EngineTextConfig, Event, LoadModel, SetKvBytes, Shutdown
from dpgen.errors import EngineError
from dpgen.records import Request

_TAIL_LINES = 10
_CLOSE_TIMEOUT_S = 10.0
# The launcher's world belongs to the rank process. vLLM reads the same names and would join it.
_LAUNCHER_PREFIXES = (
    "TORCHELASTIC_",
    "TORCH_NCCL_",
    "PET_",
    "GROUP_",
    "ROLE_",
    "SLURM_",
    "PMI_",
    "PMIX_",
    "OMPI_",
)
_LAUNCHER_NAMES = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NODE_RANK",
}


class EngineProcess:
    """One engine process; `poll` gives what it says.

    Args:
        spec: what to make.
        environment: its whole environment; see `build_engine_env`.
        cores: the CPU cores it may run on; None for all of this process's.
        say: takes each line that it, or vLLM in it, prints.
    """

    def __init__(
        self,
        spec: EngineSpec,
        environment: Mapping[str, str],
        cores: Sequence[int] | None,
        say: Callable[[str], None],
    ) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "dpgen.engine.server", str(theirs.fileno()), str(os.getpid())],
                env=dict(environment),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is the rank's to handle, and the whole tree ends by its group
            )
        if cores is not None:
            os.sched_setaffinity(self._process.pid, cores)
        self._pipe: Connection = Connection(ours.detach())
        self._last_lines: deque[str] = deque(maxlen=_TAIL_LINES)
        self._log_thread = threading.Thread(target=self._read_lines, args=(say,), daemon=True)
        self._log_thread.start()
        # Sending has a thread of its own: if both sides filled the pipe at once, each would wait for the other to
        # read. A failed send is noticed by the reader, as the end of the pipe.
        self._outbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, daemon=True)
        self._sender.start()
        self._outbox.put(spec)
        self._failure: str | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    def load_model(self, text: EngineTextConfig, kv_bytes: int | None = None) -> None:
        """Has the model loaded (see `Load`); `Ready` will come, after `KvBytesMeasured` unless `kv_bytes` is given."""
        self._outbox.put(LoadModel(text, kv_bytes))

    def set_kv_bytes(self, num_bytes: int) -> None:
        """Answers `KvBytesMeasured`."""
        self._outbox.put(SetKvBytes(num_bytes))

    def submit(self, requests: list[Request]) -> None:
        """Puts rows into the engine's queue."""
        self._outbox.put(requests)

    def poll(self, timeout_s: float) -> list[Event]:
        """What the engine has said, waiting up to `timeout_s` for a first word.

        Raises:
            EngineError: it died, or said that it can't go on.
        """
        events: list[Event] = []
        if self._failure is not None:
            timeout_s = 0
        try:
            while self._pipe.poll(0 if events else timeout_s):
                event = self._pipe.recv()
                if isinstance(event, EngineFailed):
                    self._failure = event.message
                    break
                events.append(event)
        except (EOFError, OSError):
            if not events:  # what it said before it died is still good
                raise self._make_death_error() from None
        if not events and self._failure is not None:  # what it finished before it failed came first
            self.kill()
            raise EngineError(f"the engine failed: {self._failure}")
        if not events and self._process.poll() is not None:  # a worker of its may still hold the pipe open
            raise self._make_death_error()
        return events

    def stop(self) -> None:
        """Has the engine end, in good order, once it hears of it; `close` waits for that."""
        self._outbox.put(Shutdown())

    def close(self) -> None:
        """Ends the engine, in good order if it listens, and its whole process tree in any case."""
        self.stop()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it is deaf; `kill` sees to the rest
            self._process.wait(timeout=_CLOSE_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """Ends the engine and its whole process tree at once; safe to call twice."""
        with contextlib.suppress(ProcessLookupError):  # the tree is gone already
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._outbox.put(None)
        self._log_thread.join(timeout=1)
        self._sender.join(timeout=1)
        self._pipe.close()

    def _send_all(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the engine is gone, or the pipe was closed here
            while (message := self._outbox.get()) is not None:
                self._pipe.send(message)

    def _make_death_error(self) -> EngineError:
        self.kill()
        status = self._process.returncode
        number = signal.Signals(-status) if status < 0 else None
        how = f"was ended by {number.name}" if number else f"exited with status {status}"
        said = "".join(f"\n    {line}" for line in self._last_lines)
        message = f"the engine process {how}"
        if said and number not in (signal.SIGKILL, signal.SIGTERM):  # of those its own lines know nothing
            message += f"; its last lines:{said}"
        return EngineError(message, signal=number)

    def _read_lines(self, say: Callable[[str], None]) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            line = raw.decode("utf-8", "replace").rstrip()
            if line:
                self._last_lines.append(line)
                with contextlib.suppress(OSError):  # nobody reads ours any more; go on reading, or the engine blocks
                    say(line)


def build_engine_env(
    environ: Mapping[str, str], *, gpus: Sequence[str] | None, num_cores: int, log_level: str
) -> dict[str, str]:
    """The engine process's environment: the rank's, without the launcher's world, with its share of devices.

    Args:
        gpus: what CUDA_VISIBLE_DEVICES is to name; None where the engine runs on the CPU.
        num_cores: threads for an engine on the CPU.
        log_level: of vLLM's own lines.
    """
    kept = {
        name: value
        for name, value in environ.items()
        if name not in _LAUNCHER_NAMES and not name.startswith(_LAUNCHER_PREFIXES)
    }
    kept["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its subprocess client hangs for good when the engine is killed
    kept["VLLM_LOGGING_LEVEL"] = log_level.upper()
    kept["PYTHONUNBUFFERED"] = "1"
    # The engine imports what its rank does, not what lies in the working directory (hence -P above, too).
    kept["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    if log_level in ("warning", "error"):  # the libraries' chatter that vLLM's level doesn't govern
        kept.setdefault("PYTHONWARNINGS", "ignore")
        kept.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if gpus is not None:
        kept["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    else:
        kept["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # the affinity is set from outside, and vLLM's would override it
        kept["OMP_NUM_THREADS"] = str(num_cores)
    return kept
