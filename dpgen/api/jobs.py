"""Exchange jobs and outcomes between a program and its rank processes: files in a private folder of this machine.

    job-N         a `RankJob`, pickled: by the program, for all of its ranks
    outcome-N-R   an `Outcome` as JSON, empty for success, which a full disk takes: by rank R
    pid-R         the process id of rank R
    close         asks the ranks to end

Each file appears as a whole. A rank also ends when its stdin does, since then the program has ended.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dpgen import errors
from dpgen.config.schema import Config
from dpgen.errors import ConfigError, DpgenError, EngineError, PeerFailed
from dpgen.tuning.trial import TrialPlan

ResultOn = Literal["rank0", "all"]


@dataclass(frozen=True)
class RankJob:
    """Describe one call, for the ranks.

    Attributes:
        config: what to run; or why the program could not prepare its call, for the other ranks.
        digest: stands for the dataset of the program, which is the same on all ranks; "" for `data.path`.
        result_on: which ranks need RUN_DIR/dataset.
        trial: measure the engines on some of the rows, and end; None for the whole run.
        directory: the program's working directory, from which relative paths count; made by this process.
    """

    config: Config | DpgenError
    digest: str
    result_on: ResultOn
    trial: TrialPlan | None = None
    directory: str = field(default_factory=os.getcwd)


@dataclass(frozen=True)
class Outcome:
    """Report how a job ended on one rank.

    Attributes:
        rank: of all ranks.
        error_type: the name of the error's class; None for success.
        messages: of the error.
        exit_status: of the error.
    """

    rank: int
    error_type: str | None = None
    messages: tuple[str, ...] = ()
    exit_status: int = 0

    @classmethod
    def of_error(cls, rank: int, error: DpgenError) -> Outcome:
        """Return the outcome of a job that an error has ended."""
        messages = error.mistakes if isinstance(error, ConfigError) else (str(error),)
        return cls(rank, type(error).__name__, messages, error.exit_status)

    @property
    def is_reported_by_peer(self) -> bool:
        """Return True if another rank knows more about the error."""
        return self.error_type == PeerFailed.__name__

    def to_error(self, hint: str = "") -> DpgenError:
        """Return the error, of the nearest class that a program can catch.

        Args:
            hint: follows the message.
        """
        found = getattr(errors, self.error_type or "", DpgenError)
        text = "\n".join(self.messages) + hint
        if found is ConfigError or (self.is_reported_by_peer and self.exit_status == errors.EXIT_USAGE):
            return ConfigError(*self.messages[:-1], self.messages[-1] + hint)
        kind = found if isinstance(found, type) and issubclass(found, DpgenError) else DpgenError
        error: DpgenError = kind.__new__(kind)
        if issubclass(kind, EngineError):
            EngineError.__init__(error, text)  # type: ignore[arg-type]
        else:
            Exception.__init__(error, text)
        error.exit_status = self.exit_status
        return error


def write_job(folder: Path, number: int, job: RankJob) -> None:
    """Give the ranks their next job; the folder is private, since the configuration may hold secrets."""
    _write_whole(folder / f"job-{number}", pickle.dumps(job))


def read_job(folder: Path, number: int) -> RankJob | None:
    """Return a job, or None if there is none yet."""
    try:
        job = pickle.loads((folder / f"job-{number}").read_bytes())
    except FileNotFoundError:
        return None
    assert isinstance(job, RankJob)
    return job


def write_outcome(folder: Path, number: int, outcome: Outcome) -> None:
    """Report how a job ended.

    Raises:
        OSError: the file of an error can't be written, or the folder is gone.
    """
    path = folder / f"outcome-{number}-{outcome.rank}"
    content = b"" if outcome == Outcome(outcome.rank) else json.dumps(dataclasses.asdict(outcome)).encode()
    _write_whole(path, content)


def read_outcomes(folder: Path, number: int) -> list[Outcome]:
    """Return the outcomes of a job so far, by rank."""
    outcomes = []
    for path in folder.glob(f"outcome-{number}-*"):
        if path.suffix != ".tmp":
            outcomes.append(_read_outcome(path))
    return sorted(outcomes, key=lambda outcome: outcome.rank)


def _read_outcome(path: Path) -> Outcome:
    content = path.read_bytes()
    if not content:
        return Outcome(int(path.name.rpartition("-")[2]))
    fields: dict[str, Any] = json.loads(content)
    return Outcome(**{**fields, "messages": tuple(fields["messages"])})


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
