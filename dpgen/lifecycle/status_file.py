"""Write how the run ended to a small file, for the process that started it.

- A launcher's exit status can't tell: torchrun exits with 1 whatever its workers exit with, and srun with the worst
  status of its tasks, even of a task that the other ranks continued without.
- So if DPGEN_STATUS_FILE names a file, the file holds one line after the run: the exit status, and the number of the
  run's rows that are done ("?" if they were not counted yet).
- Once the ranks have joined, only rank 0 writes that file. A rank that lost rank 0 can't tell whether rank 0 died or
  only the connection to it: it writes NAME.rank-N, which counts if there is no NAME when all ranks have ended.
- A run whose ranks were all killed, or never started, leaves no file.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path

from dpgen.errors import DpgenError

STATUS_FILE = "DPGEN_STATUS_FILE"


class StatusFile:
    """Write the status of the run: on rank 0 as final, on other ranks for when rank 0 leaves none.

    Attributes:
        num_done: rows of the whole run that are done, as far as this rank knows; None before it has counted.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        path = environ.get(STATUS_FILE)
        self._path = Path(path) if path else None
        self._rank: int | None = None  # None until `reset`
        self.num_done: int | None = None

    def reset(self, rank: int) -> None:
        """Remove what an earlier attempt left, on rank 0. From now on, only rank 0's status is final.

        Raises:
            DpgenError: the file can't be written, which is better known now than after a day.
        """
        self._rank = rank
        if self._path is None or rank > 0:
            return
        try:
            self._path.write_text("", encoding="utf-8")
            for path in [self._path, *find_rank_statuses(self._path)]:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise DpgenError(f"{STATUS_FILE}={self._path} can't be written: {error.strerror}") from None

    def write(self, exit_status: int) -> None:
        """Write how the run ended, on rank 0; on other ranks only before `reset`, when one failure ends all ranks."""
        if self._rank is None:
            self.write_once(exit_status)
        if self._path is None or self._rank != 0:
            return
        temporary = self._path.with_name(f"{self._path.name}.tmp")
        try:
            temporary.write_text(self._format(exit_status), encoding="utf-8")
            temporary.replace(self._path)
        except OSError:  # the reader takes a missing file for a failure, which is safe
            temporary.unlink(missing_ok=True)

    def write_once(self, exit_status: int) -> None:
        """Write how the run ended as this rank sees it, unless it has been written: for when rank 0 may write nothing.

        After `reset`, a rank other than 0 writes a file of its own, which never stands for a run that continues.
        """
        if self._path is None:
            return
        path = self._path.with_name(f"{self._path.name}.rank-{self._rank}") if self._rank else self._path
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(self._format(exit_status))
        except OSError:
            return  # the file exists, or can't be written, which the reader takes for a failure

    def _format(self, exit_status: int) -> str:
        return f"{exit_status} {'?' if self.num_done is None else self.num_done}\n"


def find_rank_statuses(path: Path) -> list[Path]:
    """Return the files that ranks other than 0 wrote beside the status file at `path`."""
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.rank-*"))
