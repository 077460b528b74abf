"""Define what a rank writes about itself: RUN_DIR/status/rank-N.json, and starting-rank-N.json before its attempt.

    status/starting-rank-3.json     while the job has not begun an attempt on the directory: it joins, reads its input
    status/rank-3.json              the rank now, in the newest attempt that it was part of
    status/rank-3.history.jsonl     the rank over time; see `history`

- A file is replaced in one step, so a reader sees an old one or a new one. A file that a power cut has damaged counts
  as none.
- A record of another version of dpgen is read as far as its fields are known.
- Times of different hosts are never compared. `sequence` grows with each write, which shows from any host that the
  writer lives; `machine`, `pid` and `process_start` identify the process on its own host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

GENERATING = "generating"  # the phase in which a rank has rows in its engine
RankState = Literal["live", "finished", "stopped", "failed"]

_NAME = re.compile(r"(starting-)?rank-(\d{1,9})\.json")


@dataclass(frozen=True)
class ProcessIdentity:
    """Identify a process among those of all hosts.

    Attributes:
        host: its name, for people.
        machine: the boot of the host, and the process namespace there: the same where process ids mean the same.
        pid: the process id.
        process_start: when the process started, in clock ticks since the boot; the same pid may come again.
    """

    host: str = ""
    machine: str = ""
    pid: int = 0
    process_start: int = 0


@dataclass(frozen=True)
class ErrorKind:
    """Count this attempt's errors of one type on one rank, with the first of them as an example."""

    type: str
    num_rows: int
    row: int
    message: str


@dataclass(frozen=True)
class RankCounts:
    """Hold a rank's numbers since the start of its attempt.

    Attributes:
        num_rows: rows finished here, those with an error included.
        num_prompt_tokens, num_cached_tokens: of finished rows, and how many of them the prefix cache had.
        num_generated_tokens: of all rows, those still running included.
        num_running, num_waiting: sequences in the engine now.
        kv_cache_usage: fraction of the KV cache in use now; None where the engine does not say.
        tokens_per_s: generated tokens/s over the last seconds, prompt tokens/s of a model that only reads; None while
            nothing is generated.
        num_engines: engines of this rank that have loaded the model; its other numbers are their sums.
    """

    num_rows: int = 0
    num_errors: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_engine_restarts: int = 0
    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float | None = None
    tokens_per_s: int | None = None
    num_engines: int = 0


@dataclass(frozen=True)
class RunCounts:
    """Hold the whole run's numbers as one rank knows them: sums over all ranks, also where it can't see their files.

    Attributes:
        num_rows: rows of the input.
        num_done: rows with a result, of all attempts.
        num_errors, num_prompt_tokens, num_cached_tokens, num_generated_tokens, num_preemptions: of this attempt.
        num_calls: finished calls of rows' programs, of this attempt.
        num_unclaimed: rows, or chunks of rows, that no rank has claimed.
        tokens_per_s: as of `RankCounts`.
    """

    num_rows: int = 0
    num_done: int = 0
    num_errors: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_unclaimed: int = 0
    tokens_per_s: int | None = None
    num_calls: int = 0


@dataclass(frozen=True)
class RankRecord:
    """Hold what a rank says about itself.

    Attributes:
        rank, num_ranks: as the job started.
        attempt: None before the job has begun one.
        sequence: number of this write.
        time: seconds since the epoch, by the rank's clock.
        elapsed_s: seconds since the rank's process began to report.
        interval_s: seconds between two writes.
        state: "live" until the rank ends in good order.
        reason: why it ended; None for a rank that only follows another one.
        phase, phase_s: what the rank does, and for how many seconds.
        wait_s: for how many seconds the rank has waited for other ranks; 0 if it does not wait.
        run: None before the input is counted.
        latencies: requests by how long the engine had them; `LatencyHistogram`, in
            `dpgen.scheduling.progress.throughput`, says which bin is which.
    """

    rank: int
    num_ranks: int
    attempt: int | None = None
    process: ProcessIdentity = field(default_factory=ProcessIdentity)
    sequence: int = 0
    time: float = 0.0
    elapsed_s: float = 0.0
    interval_s: float = 2.0
    state: RankState = "live"
    reason: str | None = None
    phase: str = "starting"
    phase_s: float = 0.0
    wait_s: float = 0.0
    counts: RankCounts = field(default_factory=RankCounts)
    errors: tuple[ErrorKind, ...] = ()
    run: RunCounts | None = None
    latencies: tuple[int, ...] = ()

    @property
    def path_name(self) -> str:
        return make_record_name(self.rank, has_begun=self.attempt is not None)


def make_record_name(rank: int, *, has_begun: bool) -> str:
    """Return the name of a rank's file, before or after its job has begun an attempt."""
    return f"{'' if has_begun else 'starting-'}rank-{rank}.json"


def identify_process() -> ProcessIdentity:
    """Return the identity of this process."""
    pid = os.getpid()
    return ProcessIdentity(socket.gethostname(), read_machine(), pid, (read_process(pid) or (0, ""))[0])


def read_machine() -> str:
    """Return what tells this host's boot and process namespace from all others; "" where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def read_process(pid: int) -> tuple[int, str] | None:
    """Return when a process of this host started, in clock ticks, and its state ("Z" once it has ended).

    None if there is no such process, or this user may not see it.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return int(fields[19]), fields[0]
    except (OSError, ValueError, IndexError):
        return None


def write_record(directory: Path, record: RankRecord) -> None:
    """Replace the rank's file in one step.

    Raises:
        OSError: a system call fails.
    """
    replace_file(directory / record.path_name, json.dumps(dataclasses.asdict(record)) + "\n")


def replace_file(path: Path, text: str) -> None:
    """Give a file new content in one step, without waiting until that is on the disk.

    Raises:
        OSError: a system call fails.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def read_records(directory: Path) -> list[RankRecord]:
    """Return the records of a status directory, by rank; those that can't be read are left out."""
    return sorted(_iter_records(directory), key=lambda record: (record.rank, record.attempt is None))


def _iter_records(directory: Path) -> Iterator[RankRecord]:
    try:
        names = os.listdir(directory)
    except OSError:
        return
    for name in filter(_NAME.fullmatch, names):
        try:
            yield decode_record(json.loads((directory / name).read_bytes()))
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            continue  # damaged, or replaced by a rank that ends just now


def decode_record(content: Any) -> RankRecord:
    """Return the record that a file's JSON holds; unknown fields are ignored, missing ones have their defaults.

    Raises:
        ValueError, TypeError, KeyError: the JSON is no record.
    """
    if not isinstance(content, Mapping) or content.get("state") not in get_args(RankState):
        raise ValueError("no record of a rank")
    fields = _select_fields(RankRecord, content)
    fields["process"] = ProcessIdentity(**_select_fields(ProcessIdentity, content.get("process") or {}))
    fields["counts"] = RankCounts(**_select_fields(RankCounts, content.get("counts") or {}))
    fields["errors"] = tuple(ErrorKind(**_select_fields(ErrorKind, kind)) for kind in content.get("errors") or ())
    run = content.get("run")
    fields["run"] = None if run is None else RunCounts(**_select_fields(RunCounts, run))
    fields["latencies"] = tuple(int(count) for count in content.get("latencies") or ())
    return RankRecord(**fields)


def _select_fields(record_type: type, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that a dataclass knows.

    Raises:
        TypeError: a field has another type than the dataclass says, as far as its default tells.
    """
    fields = {}
    for known in dataclasses.fields(record_type):
        if known.name in content:
            value, default = content[known.name], known.default
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if isinstance(default, (int, float)) and not is_number:
                raise TypeError(f"{known.name} must be a number")
            if isinstance(default, str) and not isinstance(value, str):
                raise TypeError(f"{known.name} must be a text")
            fields[known.name] = value
    return fields
