"""Name the paths of a run directory, keep its small files, and decide whether a run may resume in it.

    config.yaml   the resolved configuration, without secrets
    run.json      the run's identity, its attempt, the engine's limits, the ranks' manifests
    journal/      every finished row, in segments of one attempt of one rank each
    logs/         what each rank's engine printed
    status/       what each rank does now, and over time
    tuning/       what `dpgen tune` has measured
    input/        rows that a program gave to the Python API
    report.html   a page on the run, for people
    dataset/      the final rows, in input order
    _SUCCESS      counts and a hash of the results, written last
    upload.json   what output.to has of the result

- A run resumes only in a directory of the same identity: input, model and its files, prompt, sampling, seed, output
  format, and environment variables that change results.
- An input that has only grown at its end (a larger data.limit, one more file) is the same input: rows keep their index.
- Nothing is ever deleted that the journal can't rebuild.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dpgen.config.schema import Config, to_yaml
from dpgen.errors import ConfigError, DpgenError
from dpgen.journal.files import atomic_write_text
from dpgen.journal.reader import index_journal
from dpgen.journal.run_identity import diff_identities, get_num_rows

# "ranks" is of older versions. Hidden files (.lock, .dataset.tmp) are ignored.
_RUN_FILES = frozenset(
    [
        *("journal", "ranks", "config.yaml", "run.json", "dataset", "_SUCCESS", "logs", "status"),
        *("input", "upload.json", "report.html", "tuning"),
    ]
)


class RunDir:
    """Hold the paths of a run, and read and write its small files."""

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()
        self.journal = self.path / "journal"
        self.dataset = self.path / "dataset"
        self.logs = self.path / "logs"
        self.status = self.path / "status"
        self.input = self.path / "input"
        self.tuning = self.path / "tuning"
        self.report = self.path / "report.html"
        self.success = self.path / "_SUCCESS"
        self._run_json = self.path / "run.json"
        self._lock_fd: int | None = None

    @property
    def is_finished(self) -> bool:
        return self.success.exists()

    def read_success(self) -> dict[str, Any]:
        """Return the content of `_SUCCESS`; empty if it is not readable, which `dpgen verify` reports."""
        try:
            content = json.loads(self.success.read_bytes())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def mark_unfinished(self) -> None:
        """Remove `_SUCCESS`: from now on the journal or the dataset differ from the result that it describes.

        Raises:
            OSError: the file can't be removed.
        """
        self.success.unlink(missing_ok=True)

    def prepare_to_mark_unfinished(self) -> Callable[[], None]:
        """Return what removes the `_SUCCESS` of now, if there is one; see `mark_unfinished`.

        One that is written later stays: this rank may have been cut off while the others completed the result.
        """
        before = self._identify_success()

        def mark() -> None:
            if before is not None and self._identify_success() == before:
                self.mark_unfinished()

        return mark

    def _identify_success(self) -> tuple[int, int, int] | None:
        try:
            stat = self.success.stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size

    def lock(self) -> None:
        """Reserve the directory for this run until `unlock`, or the end of this process. Only rank 0 calls this.

        A second call changes nothing: a stage that takes the lock is repeated where ranks are lost in it.

        Raises:
            ConfigError: another live run holds the lock.
        """
        if self._lock_fd is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"run.dir={self.path} can't be used: {error.strerror}") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise ConfigError(
                f"run.dir={self.path} is in use by another live run: wait for that run, end it, or choose another "
                "directory"
            ) from None
        except OSError:  # the file system has no locks, so another run can't be detected
            os.close(fd)
            return
        self._lock_fd = fd

    def unlock(self) -> None:
        """Let another run of this process, or of another one, have the directory."""
        fd, self._lock_fd = self._lock_fd, None
        if fd is not None:
            os.close(fd)

    def create(self) -> None:
        """Create the directory unless it exists.

        Raises:
            ConfigError: the directory can't be created or is not writable.
        """
        try:
            self.journal.mkdir(parents=True, exist_ok=True)
            is_writable = os.access(self.journal, os.W_OK | os.X_OK)
        except OSError as error:
            raise ConfigError(f"run.dir={self.path} can't be created: {error.strerror}") from None
        if not is_writable:
            raise ConfigError(f"run.dir={self.path} is not writable: fix its permissions, or choose another directory")

    def check_resumable(
        self, identity: Mapping[str, Any], resume: str, prefixes: Mapping[int, Mapping[str, Any]] | None = None
    ) -> None:
        """Reject a directory that holds anything but this run.

        Args:
            identity: this run's, from `compute_run_identity`.
            prefixes: fingerprints of the input's first rows, by their number.
            resume: `run.resume`. "never" rejects any file, "force" accepts other settings (but not another input).

        Raises:
            ConfigError: the directory holds files of no run, or rows of another identity; names what differs.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ConfigError(f"run.dir={self.path} is a file: must be a directory")
        names = {path.name for path in self.path.iterdir() if not path.name.startswith(".")}
        # An empty journal is of a start that ended before it had written anything. Ranks that start write a status, and
        # the Python API saves the input before they start.
        has_journal = self.journal.is_dir() and any(self.journal.iterdir())
        if resume == "never" and (has_journal or names - {"journal", "status", "input"}):
            raise ConfigError(
                f"run.resume=never: run.dir={self.path} is not empty. Choose another directory (dpgen deletes nothing)"
            )
        metadata = self.read_metadata()
        if not metadata and len(index_journal(self.journal)) and resume != "force":
            raise ConfigError(
                f"run.dir={self.path} holds journals, but no run.json that says which run wrote them. "
                "Choose another directory, or resume anyway with run.resume=force"
            )
        if not metadata:
            if names - _RUN_FILES:
                raise ConfigError(
                    f"run.dir={self.path} holds files that no run wrote ({', '.join(sorted(names - _RUN_FILES)[:3])}). "
                    "Choose another directory"
                )
            return
        stored = metadata.get("identity", {})
        num_rows = get_num_rows(metadata)
        if num_rows is not None and stored["input"] == (prefixes or {}).get(num_rows):
            stored = {**stored, "input": identity["input"]}  # the input has only grown
        self._check_identity(diff_identities(stored, identity), resume)

    def read_metadata(self) -> dict[str, Any]:
        """Return the content of run.json; empty if there is none.

        Raises:
            ConfigError: there is a file in place of the directory.
            DpgenError: run.json can't be read or holds no JSON object.
        """
        try:
            metadata = json.loads(self._run_json.read_bytes())
        except FileNotFoundError:
            return {}
        except NotADirectoryError:
            what = "is a file" if self.path.exists() else "has a file above it"
            raise ConfigError(f"run.dir={self.path} {what}: must be a directory") from None
        except (OSError, ValueError) as error:
            raise DpgenError(f"{self._run_json} can't be read: {error}") from None
        if not isinstance(metadata, dict):
            raise DpgenError(f"{self._run_json} is damaged: must hold a JSON object")
        return metadata

    def update_metadata(self, **fields: Any) -> None:
        """Add or replace fields of run.json."""
        atomic_write_text(self._run_json, json.dumps({**self.read_metadata(), **fields}, indent=2) + "\n")

    def write_config(self, config: Config) -> None:
        """Write the resolved configuration, without secrets."""
        atomic_write_text(self.path / "config.yaml", to_yaml(config))

    def _check_identity(self, differences: list[str], resume: str) -> None:
        if not differences or not len(index_journal(self.journal)):
            return  # the same run, or one without a single finished row
        input_differences = [line for line in differences if line.startswith("input.")]
        if input_differences:
            raise ConfigError(
                f"run.dir={self.path} holds results of another input: {'; '.join(input_differences)}. Give it "
                "the rows that it began with, and new ones only after them (data.path, data.select, data.limit), or "
                "choose another directory"
            )
        if resume != "force":
            raise ConfigError(
                f"run.dir={self.path} holds results of other settings: {'; '.join(differences)}. "
                "Choose another directory, or resume anyway with run.resume=force"
            )
