"""Keep the output of one rank's engine in a file of the run directory, and show its warnings on the terminal.

- Every line of every engine life goes to the file.
- Lines of `min_level` or higher also go to the logger `dpgen.engine.output`, long ones cut.
- A line without a level stays in the file: Python warnings, tracebacks, progress bars.
- From the level "warning" on, harmless warnings stay in the file as well (`output_lines`). Each other warning is shown
  once, by the first rank that claims it, and each error once in a life of the engine, without its traceback.
- Errors of an engine that starts are held back, since the start may be tried again. They are shown once it has
  succeeded, or has failed for good (`EngineLog.show_errors`), and stay in the file alone where it is tried again.
- A file that cannot be written costs a warning, never the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from dpgen.engine.output_lines import find_level, is_harmless, is_traceback, make_message_key
from dpgen.errors import DpgenError
from dpgen.log import ENGINE_OUTPUT

logger = logging.getLogger(__name__)

_MAX_EARLY_LINES = 10_000
_MAX_SHOWN_CHARS = 1_000
_MAX_SHOWN_MESSAGES = 1_000  # different ones
_ANSI_CODE = re.compile(r"\x1b\[[0-9;]*m")


class EngineLog:
    """Receive the output of one rank's engine, in all of its lives.

    Lines that come before `open`, while the run directory is not checked yet, are held back for the file.

    Args:
        min_level: lowest level of the lines for the terminal: "debug", "info", "warning" or "error".

    Attributes:
        path: the file; None before `open`, and where the file cannot be created or written.
    """

    def __init__(self, min_level: str) -> None:
        self.path: Path | None = None
        self._min_level = logging.getLevelNamesMapping()[min_level.upper()]
        self._output = logging.getLogger(ENGINE_OUTPUT)
        self._lock = threading.Lock()  # the main thread calls `open`, the thread that reads the engine calls `write`
        self._early: deque[str] | None = deque(maxlen=_MAX_EARLY_LINES)
        self._file: TextIO | None = None
        self._num_lives = 0
        self._claim: Callable[[str], bool] | None = None
        self._unclaimed: deque[tuple[str, str]] = deque(maxlen=_MAX_SHOWN_MESSAGES)  # (key, line) of warnings
        self._warnings: set[str] = set()  # keys of this rank's
        self._errors: set[str] = set()  # keys of this life's
        self._is_starting = False
        self._held: deque[tuple[int, str]] = deque(maxlen=_MAX_SHOWN_MESSAGES)  # (level, line) of errors
        self._siblings: dict[int, EngineLog] = {}

    def open(self, path: Path) -> None:
        """Append to this file from now on, starting with the lines held back so far."""
        with self._lock:
            early, self._early = self._early or (), None
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("a", encoding="utf-8", errors="replace", buffering=1)
            except OSError as error:
                logger.warning(f"cannot write {path} ({error.strerror}), engine output is not kept")
                return
            self.path = path
            for line in early:
                self._write_to_file(line)

    def get_sibling(self, index: int) -> EngineLog:
        """Return the log of the rank's engine of a number: this one for 0, and others in files beside it."""
        if index == 0:
            return self
        if index not in self._siblings:
            sibling = self._siblings[index] = EngineLog(logging.getLevelName(self._min_level))
            sibling._claim = self._claim
            if self.path is not None:
                sibling.open(self.path.with_name(self.path.name.replace(".engine.", f".engine-{index}.")))
        return self._siblings[index]

    def start_life(self, pid: int) -> None:
        """Mark in the file where the output of a new engine process begins."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        with self._lock:
            self._num_lives += 1
            self._errors.clear()
            self._held.clear()
            self._is_starting = True
            self._keep(f"---- {now} dpgen: engine life {self._num_lives} of this attempt, pid {pid}")

    def write(self, line: str) -> None:
        """Write one line, without its line end, to the file and, by its level, to the terminal; remove colours."""
        line = _ANSI_CODE.sub("", line)
        with self._lock:
            self._keep(line)
        level = find_level(line)
        if level is None or level < self._min_level:
            return
        if self._min_level < logging.WARNING:  # the user wants to see what vLLM logs
            self._show(max(level, logging.INFO), line)  # the logger `dpgen` starts at INFO
        elif level == logging.WARNING:
            self._add_warning(line)
        elif not is_traceback(line) and self._is_new(self._errors, make_message_key(line)):
            self._add_error(level, line)

    def show_errors(self) -> None:
        """Show the errors of a start: it has succeeded, or is not tried again."""
        with self._lock:
            self._is_starting = False
            held = list(self._held)
            self._held.clear()
        for level, line in held:
            self._show(level, line)

    def share(self, claim: Callable[[str], bool]) -> None:
        """Show a warning only if this rank is the first to have it: if `claim`, given the message's key, returns True.

        `claim` is only called by `show_claimed`.
        """
        self._claim = claim

    def show_claimed(self) -> None:
        """Show the warnings since the last call that no other rank has shown. Call it in the thread of the store."""
        while self._unclaimed and self._claim is not None:
            key, line = self._unclaimed.popleft()
            try:
                is_first = self._claim(hashlib.blake2b(key.encode(), digest_size=8).hexdigest())
            except DpgenError:  # the store or a peer is lost, which the caller's next step notices
                is_first = True
            if is_first:
                self._show(logging.WARNING, line)

    def _add_error(self, level: int, line: str) -> None:
        with self._lock:
            if self._is_starting:
                self._held.append((level, line))
                return
        self._show(level, line)

    def _add_warning(self, line: str) -> None:
        key = make_message_key(line)
        if is_harmless(line) or not self._is_new(self._warnings, key):
            return
        if self._claim is None:
            self._show(logging.WARNING, line)
        else:
            self._unclaimed.append((key, line))

    def _is_new(self, keys: set[str], key: str) -> bool:
        if key in keys or len(keys) >= _MAX_SHOWN_MESSAGES:
            return False
        keys.add(key)
        return True

    def _show(self, level: int, line: str) -> None:
        self._output.log(level, self._shorten(line))

    def _shorten(self, line: str) -> str:
        """Return the line as the terminal shows it: a dying vLLM prints its configuration in thousands of words."""
        if len(line) <= _MAX_SHOWN_CHARS or self.path is None:
            return line
        return f"{line[:_MAX_SHOWN_CHARS]}... ({len(line):,} characters, all in {self.path})"

    def _keep(self, line: str) -> None:
        if self._early is not None:
            self._early.append(line)
        else:
            self._write_to_file(line)

    def _write_to_file(self, line: str) -> None:
        if self._file is None:
            return
        try:
            self._file.write(line + "\n")
        except OSError as error:  # the disk is full
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
            logger.warning(f"cannot write {self.path} ({error.strerror}), later engine output is not kept")
            self.path = None  # it would not hold why the engine dies
