"""What can go wrong, as types: each says what was wrong, where, and what to do next.

The exit status belongs to the type, so that `__main__` needs no table:
0 done · 2 wrong usage or configuration · 75 stopped but resumable · 1 anything else.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Collection

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: "the user is invited to retry"


class DpgenError(Exception):
    """An error whose message is written for the user; it is shown without a traceback."""

    exit_status = EXIT_FAILED


class ConfigError(DpgenError):
    """Wrong usage, configuration or input; found before a model is loaded."""

    exit_status = EXIT_USAGE


class Interrupted(DpgenError):
    """The run was told to stop; the same command goes on where it stopped."""

    exit_status = EXIT_RESUMABLE


class PeerFailed(DpgenError):
    """Another rank failed and has said why; this rank ends without adding to it."""

    def __init__(self, message: str, exit_status: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class LockstepEngineLost(DpgenError):
    """Engines that step together have lost one of them: none can go on, until all are started anew."""

    exit_status = EXIT_RESUMABLE

    def __init__(self, cause: str) -> None:
        super().__init__(
            f"{cause}; engines that step together (parallel.launcher=external) can't go on without one: run the same "
            "command again (torchrun --max-restarts does so by itself)"
        )


class EngineError(DpgenError):
    """An engine could not be started, died, or broke its protocol.

    Args:
        signal: what ended the process, where it ended without a word of its own.
    """

    def __init__(self, message: str, *, signal: signal.Signals | None = None) -> None:
        super().__init__(message)
        self.signal = signal

    @property
    def is_external_kill(self) -> bool:
        """Whether somebody else ended the engine: an operator, a batch system, the kernel when memory ran out."""
        return self.signal in (signal.SIGKILL, signal.SIGTERM)

    @property
    def first_line(self) -> str:
        """What happened, without the lines that the engine printed last."""
        return str(self).splitlines()[0]

    @property
    def is_out_of_memory(self) -> bool:
        """Whether the engine said that it ran out of memory; one that the kernel killed says nothing."""
        text = str(self).lower()
        return "out of memory" in text or "outofmemory" in text or "no available memory for the cache" in text


class NoEngineLeft(DpgenError):
    """Every rank's engine was given up; what is finished stays, and the same command goes on from it."""

    exit_status = EXIT_RESUMABLE


class RowRefused(Exception):
    """One row cannot be generated; it becomes a result with a typed error.

    Args:
        type: a stable snake_case word to filter by, e.g. ``prompt_too_long``.
        message: what was wrong with this row, for a person.
    """

    def __init__(self, type: str, message: str) -> None:
        super().__init__(message)
        self.type = type
        self.message = message


_MAX_LISTED = 20


def suggest_name(name: str, legal: Collection[str], what: str) -> str:
    """The end of a sentence about a name that is not legal: the closest legal one, and all where they are few.

    Args:
        legal: the names that are legal; dotted ones are also found by their last part alone.
        what: they are, for a person: "keys", "columns".
    """
    names = sorted(legal)
    same_end = [each for each in names if each.rpartition(".")[2] == name.rpartition(".")[2]]
    close = same_end or difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    if len(names) <= _MAX_LISTED:
        hint += f"{'' if close else ';'} {what}: {', '.join(legal)}"
    return hint
