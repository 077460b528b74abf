"""Record finished rows: add the text where the rank makes it, then append the result to the journal.

One row that can't be decoded or encoded becomes an error of its own, `decode_failed`: it would fail again in every
attempt, and end each of them.
"""

from __future__ import annotations

from dpgen.data.detokenize import Detokenizer
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
    """

    def __init__(
        self, journal: JournalWriter, detokenizer: Detokenizer | None = None, note: RowNote | None = None
    ) -> None:
        self._journal, self._detokenizer, self._note = journal, detokenizer, note or RowNote()

    def add(self, result: RowResult | UndecodedRow) -> RowResult:
        """Append a result to the journal and return it, decoded. Waits only where the disk is far behind.

        Returns:
            The result as the journal holds it: an error of type `decode_failed` where the row could not be decoded or
            encoded.

        Raises:
            DpgenError: the journal could not be written.
        """
        decoded = self._decode(result) if isinstance(result, UndecodedRow) else result
        try:
            self._journal.append(decoded)
        except DpgenError:
            raise
        except Exception as error:  # noqa: BLE001 - foreign values in the result, which JSON may not take
            decoded = _make_decode_error(decoded, "encoding the result for the journal", error)
            self._journal.append(decoded)
        return decoded

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
    return RowResult(
        result.row, result.num_prompt_tokens, error=RowError("decode_failed", f"{action} failed: {reason}")
    )
