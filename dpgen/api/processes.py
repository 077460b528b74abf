"""Start the rank processes of a program, give them jobs, and end them.

- Under torchrun or srun each process of the program has one rank below it, in the launcher's world. Elsewhere there is
  one rank, or as many as are asked for, started by torchrun on this machine.
- Ranks are in a session of their own, so that Ctrl-C reaches the program alone, which then interrupts them.
- Nothing of this process changes: no signal handler, no environment variable, no torch.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dpgen.api.jobs import Outcome, RankJob, read_outcomes, write_job
from dpgen.engine.starting.server_process import select_own_environment
from dpgen.errors import DpgenError, Interrupted, RanksLost
from dpgen.lifecycle.status_file import STATUS_FILE

_POLL_S = 0.02
_CLOSE_S = 30.0  # for engines to end
_PEER_S = 5.0  # how long a rank that knows the cause may take to say so
_MAX_LAST_LINES = 10
_WORKER = "dpgen.api.worker"
# Of the program's own launcher, for the program's own errors; a run of dpgen has its own files.
_NOT_INHERITED = ("TORCHELASTIC_ERROR_FILE", STATUS_FILE)


class RankProcesses:
    """Hold the rank processes below this one.

    Args:
        num_ranks: how many to start on this machine; None for one, in the launcher's world if there is one.
        is_quiet: keep what they print off stderr.
        is_shown: returns True for a line that goes to stderr all the same.
    """

    def __init__(
        self, num_ranks: int | None, *, is_quiet: bool, is_shown: Callable[[str], bool] = lambda line: False
    ) -> None:
        self._num_ranks, self._is_quiet, self._is_shown = num_ranks, is_quiet, is_shown
        self._folder = Path(tempfile.mkdtemp(prefix="dpgen-ranks-"))
        self._num_jobs = 0
        self._lines: deque[str] = deque(maxlen=_MAX_LAST_LINES)
        self._reader: threading.Thread | None = None
        self._was_interrupted, self._failed_s = False, 0.0
        has_screen = not is_quiet and _is_terminal()
        try:
            self._process = subprocess.Popen(
                _build_command(num_ranks, self._folder),
                env=_build_environment(os.environ, is_own_world=num_ranks is not None),
                stdin=subprocess.PIPE,
                stdout=None if has_screen else subprocess.PIPE,
                stderr=None if has_screen else subprocess.STDOUT,
                start_new_session=True,
            )
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        if not has_screen:
            self._reader = threading.Thread(target=self._forward_lines, name="dpgen-ranks", daemon=True)
            self._reader.start()

    @property
    def is_alive(self) -> bool:
        """Return True while these processes take jobs."""
        return self._process.poll() is None and not self._was_interrupted_early

    @property
    def was_interrupted(self) -> bool:
        """Return True if the last job was to stop, whether it had ended by then or not."""
        return self._was_interrupted

    @property
    def _was_interrupted_early(self) -> bool:
        return self._was_interrupted and not read_outcomes(self._folder, self._num_jobs - 1)

    def submit(self, job: RankJob) -> None:
        """Give the ranks a job; one at a time."""
        self._was_interrupted, self._failed_s = False, 0.0
        write_job(self._folder, self._num_jobs, job)
        self._num_jobs += 1

    def poll(self) -> Outcome | None:
        """Return how the job ended; None while it goes on."""
        has_ended = self._process.poll() is not None
        outcomes = read_outcomes(self._folder, self._num_jobs - 1)
        errors = [outcome for outcome in outcomes if outcome.error_type is not None]
        if any(outcome.error_type is None and outcome.rank == 0 for outcome in outcomes) or (
            outcomes and self._num_ranks is None and not errors
        ):
            return outcomes[0]
        if errors and self._failed_s == 0.0:
            self._failed_s = time.monotonic()
        knows_why = [outcome for outcome in errors if not outcome.is_reported_by_peer]
        is_final = has_ended or len(outcomes) == (self._num_ranks or 1) or time.monotonic() > self._failed_s + _PEER_S
        if errors and (knows_why or is_final):
            return (knows_why or errors)[0]
        return Outcome.of_error(0, self._describe_end()) if has_ended else None

    def wait(self, on_wait: Callable[[], None] = lambda: None) -> Outcome:
        """Return how the job ends. Ctrl-C interrupts it, resumable; a second one ends the ranks immediately."""
        while True:
            try:
                while (outcome := self.poll()) is None:
                    on_wait()
                    time.sleep(_POLL_S)
                return outcome
            except KeyboardInterrupt:
                if self._was_interrupted:
                    self.kill()
                    return Outcome.of_error(0, Interrupted("interrupted twice, so the ranks were ended immediately"))
                self.interrupt()

    def interrupt(self) -> None:
        """Ask the ranks to stop their job, resumable; `wait` waits for it."""
        self._was_interrupted = True
        with contextlib.suppress(OSError):
            (self._folder / f"interrupt-{self._num_jobs - 1}").touch()
        pids = [path.read_text() for path in self._folder.glob("pid-*")]
        for pid in pids or [str(self._process.pid)]:
            if self._process.poll() is None and pid.isdecimal():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGINT)

    def close(self) -> None:
        """End the ranks and their engines; safe to call twice."""
        if self._process.poll() is None:
            if self._num_jobs and self.poll() is None:
                self.interrupt()  # resumable; the ranks see "close" once the job has ended
            (self._folder / "close").touch()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_CLOSE_S)
        self.kill()

    def kill(self) -> None:
        """End the ranks immediately; the kernel ends each engine with its rank. Synced rows stay."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for path in self._folder.glob("pid-*"):  # torchrun's workers have sessions of their own
            _kill_worker(path)
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._reader is not None:
            self._reader.join(timeout=1)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _forward_lines(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for raw in lines:
                line = raw.decode("utf-8", "replace")
                self._lines.append(line.rstrip())
                if not self._is_quiet or self._is_shown(line):
                    with contextlib.suppress(AttributeError, OSError, ValueError):  # the program has closed it, or none
                        sys.stderr.write(line)
                        sys.stderr.flush()

    def _describe_end(self) -> DpgenError:
        if self._was_interrupted:
            return Interrupted("interrupted before the run started")
        status = self._process.returncode
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        what = "the rank process" if self._num_ranks is None else "the rank processes"
        lines = "".join(f"\n    {line}" for line in self._lines)
        return RanksLost(
            f"{what} ended without a word ({how}). Finished rows are kept{lines and ', its last lines:'}{lines}"
        )


def _kill_worker(pid_file: Path) -> None:
    """End a worker, if the process of its id is still one."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        if _WORKER.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)


def _build_command(num_ranks: int | None, folder: Path) -> Sequence[str]:
    if num_ranks is None:
        return [sys.executable, "-P", "-m", _WORKER, str(folder)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return [sys.executable, "-P", *launcher, "-m", _WORKER, str(folder)]


def _build_environment(environ: Mapping[str, str], *, is_own_world: bool) -> dict[str, str]:
    """Return the environment of ranks.

    Args:
        is_own_world: they are started here, and not by the launcher whose variables this process has.
    """
    variables = select_own_environment(environ) if is_own_world else environ
    env = {name: value for name, value in variables.items() if name not in _NOT_INHERITED}
    if is_own_world:
        env.setdefault("OMP_NUM_THREADS", "1")  # as torchrun sets it, with a warning
    # Ranks import what the program can import.
    env["PYTHONPATH"] = os.pathsep.join(str(path) or os.getcwd() for path in sys.path)
    env["PYTHONSAFEPATH"] = "1"
    return env


def _is_terminal() -> bool:
    """Return True if stderr is a terminal, and not a notebook's or a test's stand-in."""
    try:
        return sys.stderr.fileno() == 2 and os.isatty(2)
    except (AttributeError, OSError, ValueError):
        return False
