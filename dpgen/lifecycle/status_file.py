"""Write how the run ended to a small file, for the process that started it.

- A launcher's exit status can't tell: torchrun exits with 1 whatever its workers exit with, and srun with the worst
  status of its tasks, even of a task that the other ranks continued without.
- So if DPGEN_STATUS_FILE names a file, the file holds one line after the run: the exit status, and the number of the
  run's rows that are done ("?" if they were not counted yet).
- A run whose ranks were all killed, or never started, leaves no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dpgen.errors import DpgenError

STATUS_FILE = "DPGEN_STATUS_FILE"


class StatusFile:
    """Write the status of the run from any rank; rank 0's replaces the others'.

    Attributes:
        num_done: rows of the whole run that are done, as far as this rank knows; None before it has counted.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        path = environ.get(STATUS_FILE)
        self._path = Path(path) if path else None
        self._is_rank_0 = self._is_reset = False
        self.num_done: int | None = None

    def reset(self, is_rank_0: bool) -> None:
        """Remove what an earlier attempt left, on rank 0. From now on, only rank 0 writes by `write`.

        Raises:
            DpgenError: the file can't be written, which is better known now than after a day.
        """
        self._is_rank_0, self._is_reset = is_rank_0, True
        if self._path is None or not is_rank_0:
            return
        try:
            self._path.write_text("", encoding="utf-8")
            self._path.unlink()
        except OSError as error:
            raise DpgenError(f"{STATUS_FILE}={self._path} can't be written: {error.strerror}") from None

    def write(self, exit_status: int) -> None:
        """Write how the run ended, on rank 0; on other ranks only before `reset`, when one failure ends all ranks."""
        if not self._is_reset:
            self.write_once(exit_status)
        if self._path is None or not self._is_rank_0:
            return
        temporary = self._path.with_name(f"{self._path.name}.tmp")
        try:
            temporary.write_text(self._format(exit_status), encoding="utf-8")
            temporary.replace(self._path)
        except OSError:  # the reader takes a missing file for a failure, which is safe
            temporary.unlink(missing_ok=True)

    def write_once(self, exit_status: int) -> None:
        """Write how the run ended, on any rank, unless a rank already has: for when rank 0 is lost or may not write."""
        if self._path is None:
            return
        try:
            with self._path.open("x", encoding="utf-8") as file:
                file.write(self._format(exit_status))
        except OSError:
            return  # the file exists, or can't be written, which the reader takes for a failure

    def _format(self, exit_status: int) -> str:
        return f"{exit_status} {'?' if self.num_done is None else self.num_done}\n"
