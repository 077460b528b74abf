"""Record finished rows: add the text where the rank makes it, have it parsed, then append the result to the journal.

One row that can't be decoded or encoded becomes an error of its own, `decode_failed`: it would fail again in every
attempt, and end each of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from dpgen.data.detokenize import Detokenizer
from dpgen.engine.parsing.completion_parser import CompletionParser
from dpgen.errors import DpgenError
from dpgen.journal.row_notes import DECODING, RowNote
from dpgen.journal.writer import JournalWriter
from dpgen.records import RowError, RowResult, UndecodedRow


class ResultRecorder:
    """Write one rank's results to its journal; the `ResultSink` of a real run.

    Args:
        journal: takes every result.
        detokenizer: makes the text of rows that the engine did not decode; None where the engine decodes all rows.
        note: says which row is being decoded, should this process die.
        parser: parses completions in worker processes; None where texts stay as they are.
    """

    def __init__(
        self,
        journal: JournalWriter,
        detokenizer: Detokenizer | None = None,
        note: RowNote | None = None,
        parser: CompletionParser | None = None,
    ) -> None:
        self._journal, self._detokenizer, self._note = journal, detokenizer, note or RowNote()
        self._parser = parser
        self._recorded: list[RowResult] = []

    @property
    def pending_rows(self) -> Sequence[int]:
        """Rows that were added and are not recorded yet, since they are being parsed."""
        return () if self._parser is None else self._parser.pending_rows

    def add(self, result: RowResult | UndecodedRow) -> None:
        """Take a finished row; `take_recorded` returns it once the journal has it.

        Waits only where the disk is far behind.

        Raises:
            DpgenError: the journal could not be written.
        """
        decoded = self._decode(result) if isinstance(result, UndecodedRow) else result
        if self._parser is not None and decoded.completions:
            self._parser.submit(decoded)
        else:
            self._append(decoded)

    def take_recorded(self) -> list[RowResult]:
        """Return the rows recorded since the last call, as the journal holds them.

        A row that could not be decoded or encoded is an error of type `decode_failed`.

        Raises:
            DpgenError: the journal could not be written, or parsing can't go on.
        """
        for result in () if self._parser is None else self._parser.poll():
            self._append(result)
        recorded, self._recorded = self._recorded, []
        return recorded

    def _append(self, result: RowResult) -> None:
        try:
            self._journal.append(result)
        except DpgenError:
            raise
        except Exception as error:  # noqa: BLE001 - foreign values in the result, which JSON may not take
            result = _make_decode_error(result, "encoding the result for the journal", error)
            self._journal.append(result)
        self._recorded.append(result)

    def raise_if_failed(self) -> None:
        """Raise what has failed in the journal's thread.

        Raises:
            DpgenError: the journal could not be written.
        """
        self._journal.raise_if_failed()

    def _decode(self, undecoded: UndecodedRow) -> RowResult:
        assert self._detokenizer is not None, "only a rank with a detokenizer gets undecoded rows"
        try:
            return self._note.run(DECODING, undecoded.result.row, self._detokenizer.decode_row, undecoded)
        except Exception as error:  # noqa: BLE001 - foreign code: the tokenizers library raises no narrower class
            return _make_decode_error(undecoded.result, "decoding the generated tokens", error)


def _make_decode_error(result: RowResult, action: str, error: Exception) -> RowResult:
    """Return the error that takes the place of a result; its tokens are lost with its text."""
    reason = " ".join(str(error).split()) or type(error).__name__
    why = RowError("decode_failed", f"{action} failed: {reason}")
    return RowResult(result.row, result.num_prompt_tokens, error=why).with_id(result.id)
