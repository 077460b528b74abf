"""How a run has ended, left in a small file for whoever started it.

A launcher's exit status can't tell: torchrun ends with 1 whatever its workers end with, srun with the worst of its
tasks', be it one that the others went on without. So where DPGEN_STATUS_FILE names a file, it holds one line when the
run is over: the exit status, and how many of the run's rows are done ("?" where they had not been counted yet). A run
that came to no word, because all its ranks were killed or none was started, leaves no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dpgen.errors import DpgenError

STATUS_FILE = "DPGEN_STATUS_FILE"


class StatusFile:
    """One rank's word on how the run has ended; rank 0 has the last one.

    Attributes:
        num_done: rows of the whole run that are done, as far as this rank knows; None before it has counted.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        path = environ.get(STATUS_FILE)
        self._path = Path(path) if path else None
        self._is_first = self._has_begun = False
        self.num_done: int | None = None

    def reset(self, is_rank_0: bool) -> None:
        """What an earlier attempt left is no longer true; only rank 0 (`is_first`) does something here.

        Raises:
            DpgenError: the file can't be written; better now than after a day.
        """
        self._is_first, self._has_begun = is_rank_0, True
        if self._path is None or not is_rank_0:
            return
        try:
            self._path.write_text("", encoding="utf-8")
            self._path.unlink()
        except OSError as error:
            raise DpgenError(f"{STATUS_FILE}={self._path} can't be written: {error.strerror}") from None

    def write(self, exit_status: int) -> None:
        """On rank 0: how the run has ended. Other ranks leave that to it, once it has begun."""
        if not self._has_begun:  # and a rank that fails before that ends all of them
            self.write_once(exit_status)
        if self._path is None or not self._is_first:
            return
        temporary = self._path.with_name(f"{self._path.name}.tmp")
        try:
            temporary.write_text(self._format(exit_status), encoding="utf-8")
            temporary.replace(self._path)
        except OSError:  # whoever reads it takes no word for a failure, which is the safe reading
            temporary.unlink(missing_ok=True)

    def write_once(self, exit_status: int) -> None:
        """On any rank: the same, where rank 0 is lost, or may not get to it; never instead of what it has told."""
        if self._path is None:
            return
        try:
            with self._path.open("x", encoding="utf-8") as file:
                file.write(self._format(exit_status))
        except OSError:
            return  # it is told already, or can't be, which is a failure to whoever reads it

    def _format(self, exit_status: int) -> str:
        return f"{exit_status} {'?' if self.num_done is None else self.num_done}\n"
