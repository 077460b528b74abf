"""Record finished rows: add the text where the rank makes it, then append the result to the journal."""

from __future__ import annotations

from dpgen.data.detokenize import Detokenizer
from dpgen.journal.writer import JournalWriter
from dpgen.records import RowResult, UndecodedRow


class ResultRecorder:
    """Write one rank's results to its journal; the `ResultSink` of a real run.

    Args:
        journal: takes every result.
        detokenizer: makes the text of rows that the engine did not decode; None where the engine decodes all rows.
    """

    def __init__(self, journal: JournalWriter, detokenizer: Detokenizer | None = None) -> None:
        self._journal, self._detokenizer = journal, detokenizer

    def add(self, result: RowResult | UndecodedRow) -> RowResult:
        """Append a result to the journal and return it, decoded. Waits only where the disk is far behind.

        Raises:
            DpgenError: the journal could not be written.
        """
        if isinstance(result, UndecodedRow):
            assert self._detokenizer is not None, "only a rank with a detokenizer gets undecoded rows"
            result = self._detokenizer.decode_row(result)
        self._journal.append(result)
        return result

    def raise_if_failed(self) -> None:
        """Raise what has failed in the journal's thread.

        Raises:
            DpgenError: the journal could not be written.
        """
        self._journal.raise_if_failed()
