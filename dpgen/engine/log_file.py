"""Keep the output of one rank's engine in a file of the run directory, and show its warnings on the terminal.

- Every line of every engine life goes to the file.
- Lines of `min_level` or higher also go to the logger `dpgen.engine.output`, long ones cut.
- A line without a level stays in the file: Python warnings, tracebacks, progress bars.
- A file that cannot be written costs a warning, never the run.

Limits: a level is recognized in vLLM's text format and in the glog format of torch, not in formats that the user
configures (vLLM's `logging_config`).
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections import deque
from pathlib import Path
from typing import TextIO

from dpgen.log import ENGINE_OUTPUT

logger = logging.getLogger(__name__)

_MAX_EARLY_LINES = 10_000
_MAX_SHOWN_CHARS = 1_000
_ANSI_CODE = re.compile(r"\x1b\[[0-9;]*m")
# vLLM 0.32: "(Worker_TP0 pid=7) WARNING 11-26 15:34:45 [cpu.py:224] ...", after VLLM_LOGGING_PREFIX where that is set.
# Earlier versions name only their worker processes.
_VLLM_LEVEL = re.compile(r"\b(DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d \[")
_MAX_PREFIX_CHARS = 200  # a level that stands further to the right belongs to the message
# torch: "[rank0]:[W1126 15:34:45.343577260 utils.cpp:68] ..." from C++, without inner brackets from Python.
_GLOG_LEVEL = re.compile(r"(?:\[rank\d+\]:)?\[?([IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ ")
_GLOG_LEVELS = {"I": logging.INFO, "W": logging.WARNING, "E": logging.ERROR, "F": logging.CRITICAL}


class EngineLog:
    """Receive the output of one rank's engine, in all of its lives.

    Lines that come before `open`, while the run directory is not checked yet, are held back for the file.

    Args:
        min_level: lowest level of the lines for the terminal: "debug", "info", "warning" or "error".

    Attributes:
        path: the file; None before `open`, and where the file cannot be created.
    """

    def __init__(self, min_level: str) -> None:
        self.path: Path | None = None
        self._min_level = logging.getLevelNamesMapping()[min_level.upper()]
        self._output = logging.getLogger(ENGINE_OUTPUT)
        self._lock = threading.Lock()  # the main thread calls `open`, the thread that reads the engine calls `write`
        self._early: deque[str] | None = deque(maxlen=_MAX_EARLY_LINES)
        self._file: TextIO | None = None
        self._num_lives = 0

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

    def start_life(self, pid: int) -> None:
        """Mark in the file where the output of a new engine process begins."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        with self._lock:
            self._num_lives += 1
            self._keep(f"---- {now} dpgen: engine life {self._num_lives} of this attempt, pid {pid}")

    def write(self, line: str) -> None:
        """Write one line, without its line end, to the file and, by its level, to the terminal; remove colours."""
        line = _ANSI_CODE.sub("", line)
        with self._lock:
            self._keep(line)
        level = find_level(line)
        if level is not None and level >= self._min_level:
            self._output.log(max(level, logging.INFO), self._shorten(line))  # the logger `dpgen` starts at INFO

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


def find_level(line: str) -> int | None:
    """Return the level of a line that vLLM or torch has logged, as in `logging`; None for all other output."""
    match = _VLLM_LEVEL.search(line, 0, _MAX_PREFIX_CHARS)
    if match is not None:
        return logging.getLevelNamesMapping()[match[1]]
    match = _GLOG_LEVEL.match(line)
    return None if match is None else _GLOG_LEVELS[match[1]]
