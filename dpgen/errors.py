"""Exceptions with a message for the user: the wrong key or place, its value, and the next step.

    Exception
    ├── DpgenError                  1   base class; shown without a traceback
    │   ├── ConfigError             2   wrong usage, configuration or input
    │   ├── Interrupted            75   stopped by a signal or a time limit
    │   ├── LockstepEngineLost     75   one of several engines that step together died
    │   ├── NoEngineLeft           75   no rank has a working engine
    │   ├── EngineError          1,75   an engine did not start, died, or broke its protocol; 75 if it may start later
    │   │   └── EngineStuck         1   an engine process can't be ended, and holds its GPU
    │   ├── PeerFailed              *   another rank failed: its exit status
    │   │   ├── PeerLost           75   a rank vanished (`dpgen.distributed.group`)
    │   │   └── StoreLost          75   the host of the store vanished (`dpgen.distributed.group`)
    │   ├── HostLimitReached       75   a rank's host has no file or port left (`dpgen.distributed.group`)
    │   ├── TransferStopped        75   an upload, or a download of the input, broke off
    │   ├── RanksLost              75   the rank processes of a Python program ended without a word (`dpgen.api`)
    │   ├── NoRowSucceeded          1   the result is written, and every row of it has an error
    │   ├── RowsLost                1   a journal write failed (`dpgen.journal.segment`)
    │   └── DamagedRecord           1   a journal record is corrupt (`dpgen.journal.reader`)
    └── RowRefused                  -   one row is rejected; it becomes a result with a typed error
        └── RenderTimeout           -   rendering the row took too long

The number is the exit status. It belongs to the error, so `__main__` needs no table:
0 done, 2 wrong usage or configuration, 75 stopped but resumable, 1 anything else.
"""

from __future__ import annotations

import difflib
import re
import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: "the user is invited to retry"

_MAX_LISTED = 20
_MIN_SIMILARITY = 0.65  # of two names, from 0 to 1; below it a name is rather another one than misspelt
# Texts of vLLM 0.26 to 0.33, torch and cuBLAS, in lower case.
# "Free memory on device cuda:0 (68.77/139.8 GiB) on startup is less than desired GPU memory utilization (0.9, ...". On
# the CPU "Available memory on node 0 (...", and in two places: at the start, and for the KV cache.
_FREE_MEMORY = re.compile(
    r"memory on (?:device )?(\S+|node \S+) \((\d+(?:\.\d+)?)/(\d+(?:\.\d+)?) gib\) on (startup|kv cache allocation) is "
    r"less than"
)
_NO_ROOM_FOR_CACHE = "no available memory for the cache"
_OUT_OF_MEMORY_ANYWHERE = (_NO_ROOM_FOR_CACHE, "alloc_failed")
_OUT_OF_MEMORY = ("out of memory", "outofmemory", *_OUT_OF_MEMORY_ANYWHERE)
# In output that is only searched: harmless lines speak of "out of memory" too.
_OUT_OF_MEMORY_IN_OUTPUT = ("cuda out of memory", "hip out of memory", "outofmemoryerror", *_OUT_OF_MEMORY_ANYWHERE)
_PORT_IN_USE = ("address already in use", "eaddrinuse")
_CONTEXT_TOO_LONG = "larger than the available kv cache memory"


# What a row's error can be. Users filter by these words, and `run.retry_errors` names them.
ERROR_TYPES = (
    *("wrong_type", "empty_prompt", "empty_completion", "template_failed", "chat_template_failed", "invalid_text"),
    *(
        "unsupported_content",
        "tokenizer_failed",
        "render_timeout",
        "render_crashed",
        "prompt_too_long",
        "out_of_vocabulary",
        "bad_sampling",
    ),
    *("bad_tools", "bad_template_kwargs", "unknown_adapter", "engine_refused", "poison_row", "decode_failed"),
    *("media_missing", "media_invalid", "media_too_large", "media_not_allowed", "media_fetch_failed", "media_mismatch"),
    *("bad_request", "unsupported_request", "unknown_model", "check_failed", "not_finite"),
    *("program_failed", "program_timeout", "program_too_many_calls", "program_bad_result", "tool_failed"),
)


class DpgenError(Exception):
    """Base class of errors whose message is written for the user; shown without a traceback.

    Attributes:
        exit_status: of the process that the error ends; `EXIT_RESUMABLE` if the same call, or command, may go on.
        run_dir: the run directory, where the Python API raises the error; None elsewhere, and if nothing is kept there.
    """

    exit_status = EXIT_FAILED
    run_dir: Path | None = None

    @property
    def is_resumable(self) -> bool:
        """Return True if finished rows are kept, and the same call, or command, generates the others."""
        return self.exit_status == EXIT_RESUMABLE


class ConfigError(DpgenError):
    """Report wrong usage, configuration or input, before a model is loaded.

    Args:
        mistakes: one line each, with the line of a file and a caret below where that helps. Several are shown one after
            the other, below a headline with their number.
    """

    exit_status = EXIT_USAGE

    def __init__(self, *mistakes: str) -> None:
        super().__init__(*mistakes)
        self.mistakes = mistakes

    def __str__(self) -> str:
        if len(self.mistakes) == 1:
            return self.mistakes[0]
        lines = [line for mistake in self.mistakes for line in mistake.splitlines()]
        return "\n  ".join([f"{len(self.mistakes)} mistakes in the configuration:", *lines])


class Interrupted(DpgenError):
    """Report a run that was interrupted; the same command resumes it."""

    exit_status = EXIT_RESUMABLE


class PeerFailed(DpgenError):
    """End this rank because another rank failed and has reported why."""

    def __init__(self, message: str, exit_status: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class TransferStopped(DpgenError):
    """Report an upload or a download that broke off; the same command continues it."""

    exit_status = EXIT_RESUMABLE


class LockstepEngineLost(DpgenError):
    """Report the death of one of several engines that step together: none continues until all are restarted."""

    exit_status = EXIT_RESUMABLE

    def __init__(self, cause: str) -> None:
        super().__init__(
            f"{cause}; engines that step together (parallel.launcher=external) can't continue without one: run the "
            "same command again to resume (torchrun --max-restarts does so by itself)"
        )


class JoinFailed(DpgenError):
    """Report ranks that did not all come together. The same command may succeed: a node may have died meanwhile."""

    exit_status = EXIT_RESUMABLE


@dataclass(frozen=True)
class FreeMemory:
    """Describe a device whose free memory was too little for an engine.

    Attributes:
        device: "cuda:0", or "node 0" of the CPUs.
        free_gib, total_gib: in GiB.
        is_at_start: False for the KV cache alone, of a size that was given.
    """

    device: str
    free_gib: float
    total_gib: float
    is_at_start: bool

    @property
    def fraction(self) -> float:
        """Return the largest `gpu_memory_utilization` that fits, at two decimals, with a hundredth to spare."""
        percent = int(100 * self.free_gib / self.total_gib) - 1 if self.total_gib else 0
        return max(0, percent) / 100

    @property
    def advice(self) -> str:
        """Return what to write in the configuration; "" if no value helps."""
        if not self.is_at_start:
            return f"set engine.kv_cache_memory_bytes to less than {int(self.free_gib * 2**30)}"
        return f"set engine.gpu_memory_utilization={self.fraction:g} or lower" if self.fraction else ""

    def __str__(self) -> str:
        return f"only {self.free_gib:.1f} of {self.total_gib:.1f} GiB are free on {self.device}"


class EngineError(DpgenError):
    """Report an engine that did not start, died, or broke its protocol.

    Args:
        cause: what happened, in the first line; further lines are details.
        signal: the signal that ended the process; None where the engine reported the error itself.
        log_path: the file with the engine's output; None where that is not kept.
        last_lines: the end of that output, where it may explain the death; shown to the user.
        output: more of that output, searched for the cause and not shown. With several devices the engine itself
            reports only that a worker failed.

    Attributes:
        advice: what the user can do; by itself what the engine's text tells.
    """

    def __init__(
        self,
        cause: str,
        *,
        signal: signal.Signals | None = None,
        log_path: Path | None = None,
        last_lines: Sequence[str] = (),
        output: Sequence[str] = (),
    ) -> None:
        super().__init__(cause)
        self.cause, self.signal, self.log_path, self.last_lines = cause, signal, log_path, list(last_lines)
        self.free_memory = _find_free_memory("\n".join([cause, *last_lines, *output]).lower())
        self.advice = "" if self.free_memory is None else self.free_memory.advice
        self._reported, self._output = "\n".join([cause, *last_lines]).lower(), "\n".join(output).lower()
        if self.is_context_too_long:
            self.advice = "set a smaller engine.max_model_len"
        if signal is not None or self.is_out_of_memory or self._is_port_in_use:
            self.exit_status = EXIT_RESUMABLE

    def __str__(self) -> str:
        return self.describe()

    @property
    def first_line(self) -> str:
        """Return what happened, without the log file: the same text on every rank."""
        return self.cause.splitlines()[0] if self.cause else ""

    @property
    def is_external_kill(self) -> bool:
        """Return True if the engine was killed from outside: by an operator, a batch system, or the kernel when memory
        ran out.
        """
        return self.signal in (signal.SIGKILL, signal.SIGTERM)

    @property
    def is_out_of_memory(self) -> bool:
        """Return True if the engine reported that it ran out of memory; one that the kernel killed reports nothing."""
        return (
            self.free_memory is not None
            or any(text in self._reported for text in _OUT_OF_MEMORY)
            or any(text in self._output for text in _OUT_OF_MEMORY_IN_OUTPUT)
        )

    @property
    def has_no_room_for_cache(self) -> bool:
        """Return True if the weights and one step leave no memory for the KV cache."""
        return any(_NO_ROOM_FOR_CACHE in text for text in (self._reported, self._output))

    @property
    def _is_port_in_use(self) -> bool:
        return any(text in self._reported or text in self._output for text in _PORT_IN_USE)

    @property
    def is_context_too_long(self) -> bool:
        """Return True if the KV cache can't hold one sequence of max_model_len; fewer sequences would not help."""
        return _CONTEXT_TOO_LONG in self._reported or _CONTEXT_TOO_LONG in self._output

    def summarize(self, action: str = "") -> str:
        """Return what happened, what dpgen does about it, and the log file, in one line."""
        is_start = self.free_memory is not None and self.free_memory.is_at_start
        what = f"the engine did not start: {self.free_memory}" if is_start else self.first_line
        parts = [what, action or self.advice, f"see {self.log_path}" if self.log_path else ""]
        return ", ".join(part for part in parts if part)

    def describe(self, action: str = "") -> str:
        """Return the line of `summarize`, and below it the rest of the cause and the engine's last lines."""
        lines = [self.summarize(action), *self.cause.splitlines()[1:]]
        if self.last_lines:
            lines[-1] += ", its last lines:"
        return "\n".join([*lines, *(f"    {line}" for line in self.last_lines)])


def _find_free_memory(text: str) -> FreeMemory | None:
    """Return the device with the smallest free share of those that a text in lower case tells of."""
    found = [
        FreeMemory(device, float(free), float(total), moment == "startup")
        for device, free, total, moment in _FREE_MEMORY.findall(text)
    ]
    return min(found, key=lambda memory: memory.fraction, default=None)


class EngineHung(EngineError):
    """Report an engine that has taken too long: it may be a file system or a device that hangs, for now."""

    exit_status = EXIT_RESUMABLE


class EngineStuck(EngineError):
    """Report an engine process that SIGKILL does not end; its devices stay occupied."""


class NoEngineLeft(DpgenError):
    """Report that every rank's engine was abandoned; finished rows stay, and the same command resumes the run."""

    exit_status = EXIT_RESUMABLE


class RanksLost(DpgenError):
    """Report rank processes that ended without saying why: killed, often because memory ran out."""

    exit_status = EXIT_RESUMABLE


class NoRowSucceeded(DpgenError):
    """Report a result in which every row has an error. It is written all the same."""


class RowRefused(Exception):
    """Reject one row, which then becomes a result with a typed error.

    Args:
        type: a stable snake_case word to filter by, e.g. ``prompt_too_long``.
        message: the reason, for a person.
    """

    def __init__(self, type: str, message: str) -> None:
        super().__init__(message)
        self.type = type
        self.message = message


class RenderTimeout(RowRefused):
    """Reject one row because rendering its prompt took too long."""

    def __init__(self, message: str) -> None:
        super().__init__("render_timeout", message)


def find_nearest_name(name: str, legal: Collection[str]) -> str | None:
    """Return the legal name that is closest to a wrong one, or None if none is close.

    Dotted names also match by their last part, and those of the same section by that alone: a section's name that both
    have says nothing about the rest.
    """
    names = sorted(legal)
    written = {legal_name.lower(): legal_name for legal_name in names}
    if same := written.get(name.lower().replace("-", "_")):
        return same
    section, _, last = name.rpartition(".")
    if same_last_part := [legal_name for legal_name in names if legal_name.rpartition(".")[2] == last]:
        return same_last_part[0]
    same_section = {
        legal_name.rpartition(".")[2]: legal_name for legal_name in names if legal_name.rpartition(".")[0] == section
    }
    if close := difflib.get_close_matches(last, same_section, n=1, cutoff=_MIN_SIMILARITY):
        return same_section[close[0]]
    others = [legal_name for legal_name in names if legal_name not in same_section.values()]
    close = difflib.get_close_matches(name, others, n=1, cutoff=_MIN_SIMILARITY)
    return close[0] if close else None


def suggest_name(name: str, legal: Collection[str], what: str) -> str:
    """Return the end of a sentence about a wrong name: the nearest legal name, and all of them where they are few.

    Args:
        legal: the legal names, in the order in which they are listed.
        what: the plural noun for them: "keys", "columns".
    """
    nearest = find_nearest_name(name, legal)
    hint = f"; did you mean {nearest!r}?" if nearest else ""
    if len(legal) <= _MAX_LISTED:
        hint += f"{'' if nearest else ';'} {what}: {', '.join(legal)}"
    return hint
