"""Time the row that a rank works on, from a thread: native code that never returns can't be interrupted.

- Once a row is overdue, the thread publishes it in the store, where ranks of other nodes find it, and notes the time.
- If the row then holds the rank for as long as a main thread may be stuck, the process ends, resumable: the other ranks
  continue without it, or the next start does. Either of them rejects the row at once (`row_notes.judge_rows`).
- The thread counts its own looks, not the time between them: a process that was stopped for an hour blames no row.

Limits: code that also keeps other Python threads from running keeps this one from running. Such a rank counts as lost,
and its row as a suspect.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from types import TracebackType

from dpgen.journal.row_notes import STAGES, RowNote, decode_word, get_overdue_key

_INTERVAL_S = 1.0


class RowWatch:
    """Watch one rank's note while the block runs.

    Args:
        overdue_s: from when on a row is overdue; see `row_notes.compute_overdue_s`.
        stuck_s: how long a row may hold the rank.
        add: adds to a counter of the store, where other nodes see the note's word while the row is overdue; may raise
            RuntimeError.
        end_process: ends this process, given why.
    """

    def __init__(
        self,
        note: RowNote,
        *,
        overdue_s: float,
        stuck_s: float,
        add: Callable[[str, int], int],
        end_process: Callable[[str], None],
    ) -> None:
        self._note, self._overdue_s, self._stuck_s = note, overdue_s, max(overdue_s, stuck_s)
        self._add, self._end_process = add, end_process
        self._word = self._published = 0
        self._elapsed_s = 0.0
        self._stopped = threading.Event()

    def __enter__(self) -> RowWatch:
        threading.Thread(target=self._run, name="row watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()

    def look(self) -> None:
        """Look at the note, as the thread does once a second."""
        word = self._note.read()
        if word != self._word:
            self._word, self._elapsed_s = word, 0.0
        elif word:
            self._elapsed_s += _INTERVAL_S
            self._note.record_time(word, self._elapsed_s)
        is_overdue = word != 0 and self._elapsed_s >= self._overdue_s
        self._publish(word if is_overdue else 0)
        if is_overdue and self._elapsed_s >= self._stuck_s:
            row, stage = decode_word(word)
            self._end_process(
                f"{STAGES[stage]} row {row} has taken {self._elapsed_s:.0f} s and can't be interrupted. The row is "
                "rejected by the ranks that continue, or when the same command resumes the run"
            )

    def _publish(self, word: int) -> None:
        if word != self._published:
            with contextlib.suppress(RuntimeError):  # the store is gone: the note is left
                self._add(get_overdue_key(self._note.name), word - self._published)
                self._published = word

    def _run(self) -> None:
        while not self._stopped.wait(_INTERVAL_S):
            self.look()
