"""Record finished rows: add the text where the rank makes it, have it parsed and checked, then journal the result.

One row that can't be decoded or encoded becomes an error of its own, `decode_failed`: it would fail again in every
attempt, and end each of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from dpgen.data.detokenize import Detokenizer
from dpgen.engine.parsing.completion_parser import CompletionParser
from dpgen.errors import DpgenError
from dpgen.journal.row_notes import DECODING, RowNote
from dpgen.journal.writer import JournalWriter
from dpgen.records import Request, RowError, RowResult, UndecodedRow
from dpgen.scheduling.interfaces import FollowUps
from dpgen.scheduling.retries.retry_tracker import RetryCounts


class ResultRecorder:
    """Write one rank's results to its journal; the `ResultSink` of a real run.

    Args:
        journal: takes every result.
        detokenizer: makes the text of rows that the engine did not decode; None where the engine decodes all rows.
        note: says which row is being decoded, should this process die.
        parser: parses completions in worker processes; None where texts stay as they are.
        retries: checks completions and has them generated again, or runs rows' programs; None where each row is one
            request.

    Attributes:
        on_recorded: is called with the results that `take_recorded` returns.
    """

    def __init__(
        self,
        journal: JournalWriter,
        detokenizer: Detokenizer | None = None,
        note: RowNote | None = None,
        parser: CompletionParser | None = None,
        retries: FollowUps | None = None,
    ) -> None:
        self._journal, self._detokenizer, self._note = journal, detokenizer, note or RowNote()
        self._parser, self._retries = parser, retries
        self._recorded: list[RowResult] = []
        self.on_recorded: Callable[[Sequence[RowResult]], None] = lambda _: None

    # ---- requests

    def begin(self, request: Request) -> Request | None:
        """Return the request that a row begins with, its own or `take_retry`'s; None if it is recorded already."""
        if self._retries is None:
            return request
        begun = self._retries.begin(request)
        if isinstance(begun, RowResult):
            self._append(begun)
            return None
        return begun or self._retries.take_retry()

    @property
    def can_begin(self) -> bool:
        """True if another row may begin now."""
        return self._retries is None or self._retries.can_begin

    @property
    def num_begun(self) -> int:
        """Number of rows that have begun and may have no request in the engine: those whose programs run."""
        return 0 if self._retries is None else self._retries.num_begun

    def prepare(self) -> bool:
        """Prepare a request ahead; return False if none waits to be."""
        return self._retries is not None and self._retries.prepare()

    @property
    def num_preparing(self) -> int:
        """Number of calls of rows' programs that workers prepare, or have prepared."""
        return 0 if self._retries is None else self._retries.num_preparing

    @property
    def has_retries(self) -> bool:
        """True while rows wait to be generated again, or calls of their programs wait."""
        return self._retries is not None and self._retries.has_retries

    def take_retry(self) -> Request | None:
        """Return the next request for a row, or a sample, that failed its checks; None if there is none."""
        return None if self._retries is None else self._retries.take_retry()

    def drop_retries(self) -> list[bytes]:
        """Forget the rows that need an engine, since there is none, and return the records of their attempts."""
        parsing = () if self._parser is None else self._parser.pending_ids
        return [] if self._retries is None else self._retries.drop(parsing)

    @property
    def retry_counts(self) -> RetryCounts:
        """What checks have cost this rank."""
        return RetryCounts(Counter(), 0) if self._retries is None else self._retries.counts

    @property
    def num_calls(self) -> int:
        """Number of calls of rows' programs that have finished."""
        return 0 if self._retries is None else self._retries.num_calls

    # ---- results

    @property
    def pending_rows(self) -> Sequence[int]:
        """Rows that are not recorded yet, since they are being parsed or checked, or are generated again."""
        parsing = [] if self._parser is None else [id.row for id in self._parser.pending_ids]
        return parsing if self._retries is None else [*parsing, *self._retries.pending_rows]

    @property
    def has_pending(self) -> bool:
        """True while there are `pending_rows`."""
        is_parsing = self._parser is not None and len(self._parser) > 0
        return is_parsing or (self._retries is not None and len(self._retries.pending_rows) > 0)

    @property
    def num_processing(self) -> int:
        """Number of results that are being parsed or checked."""
        num_checking = 0 if self._retries is None else self._retries.num_checking
        return num_checking + (0 if self._parser is None else len(self._parser))

    def add(self, result: RowResult | UndecodedRow) -> None:
        """Take a finished row; `take_recorded` returns it once the journal has it.

        Waits only where the disk is far behind.

        Raises:
            DpgenError: the journal could not be written.
        """
        if self._retries is not None:
            result = self._retries.join_pieces(result)
        decoded = self._decode(result) if isinstance(result, UndecodedRow) else result
        if self._parser is not None and decoded.completions:
            if self._retries is not None:
                self._retries.keep_texts(decoded)
            self._parser.submit(decoded)
        else:
            self._check(decoded)

    def take_recorded(self) -> list[RowResult]:
        """Return the rows recorded since the last call, as the journal holds them.

        A row that could not be decoded or encoded is an error of type `decode_failed`.

        Raises:
            DpgenError: the journal could not be written, or parsing can't go on.
        """
        for result in () if self._parser is None else self._parser.poll():
            self._check(result)
        for result in () if self._retries is None else self._retries.poll():
            self._append(result)
        recorded, self._recorded = self._recorded, []
        self.on_recorded(recorded)
        return recorded

    def _check(self, result: RowResult) -> None:
        final = result if self._retries is None else self._retries.submit(result)
        if final is not None:
            self._append(final)

    def _append(self, result: RowResult) -> None:
        try:
            self._journal.append(result)
        except DpgenError:
            raise
        except Exception as error:  # noqa: BLE001 - foreign values in the result, which JSON may not take
            result = _make_decode_error(result, "encoding the result for the journal", error)
            self._journal.append(result)
        self._recorded.append(result)

    def close(self) -> None:
        """End what runs beside this thread; the journal's owner closes that."""
        if self._retries is not None:
            self._retries.close()

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
