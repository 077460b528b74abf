"""Count a rank's results as they are recorded: its rows and tokens, errors by type, and a few rows to look at."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from dpgen.monitoring.status.record import ErrorKind, RankCounts

if TYPE_CHECKING:
    from dpgen.records import RowResult

_MAX_ERROR_TYPES = 50  # types are few; the limit bounds the file
_MAX_MESSAGE_CHARS = 300
_MAX_TEXT_CHARS = 500
_OTHER = "other"


class SampleRow(NamedTuple):
    """Hold the beginning of a row's first answer.

    Attributes:
        text: of the answer; its reasoning if that is all there is.
        finish_reason: vLLM's value.
        num_tokens: of the whole answer.
    """

    row: int
    text: str
    finish_reason: str | None
    num_tokens: int


class ResultTally:
    """Count the results of one rank, in its main thread; another thread may read at any time.

    Attributes:
        num_samples: how many rows to keep as a sample; drawn at random, but the same for the same results.
    """

    def __init__(self, num_samples: int = 0) -> None:
        self.num_samples = num_samples
        self.counts = RankCounts()  # replaced as a whole, so a reader never sees a part of a change
        self._errors: dict[str, ErrorKind] = {}
        self._samples: list[SampleRow] = []
        self._num_candidates, self._random = 0, random.Random(0)

    def add_all(self, results: Sequence[RowResult]) -> None:
        """Count results."""
        if not results:
            return
        counts = self.counts
        self.counts = dataclasses.replace(
            counts,
            num_rows=counts.num_rows + len(results),
            num_errors=counts.num_errors + sum(result.error is not None for result in results),
            num_prompt_tokens=counts.num_prompt_tokens + sum(result.num_prompt_tokens or 0 for result in results),
            num_generated_tokens=counts.num_generated_tokens + sum(result.num_generated_tokens for result in results),
        )
        for result in results:
            if result.error is not None:
                self._add_error(result)
            elif (result.completions or result.pooled is not None) and self.num_samples:
                self._add_sample(result)

    def list_errors(self) -> tuple[ErrorKind, ...]:
        """Return the errors by type, the most frequent first."""
        return tuple(sorted(self._errors.values(), key=lambda kind: -kind.num_rows))

    @property
    def samples(self) -> list[SampleRow]:
        """Return the sample, by row."""
        return sorted(self._samples)

    def _add_error(self, result: RowResult) -> None:
        assert result.error is not None
        type = result.error.type
        if type not in self._errors and len(self._errors) >= _MAX_ERROR_TYPES:
            type = _OTHER
        kind = self._errors.get(type)
        if kind is None:
            kind = ErrorKind(type, 0, result.row, result.error.message[:_MAX_MESSAGE_CHARS])
        self._errors[type] = dataclasses.replace(kind, num_rows=kind.num_rows + 1)

    def _add_sample(self, result: RowResult) -> None:
        """Keep the row with the chance that each row has (Vitter's algorithm R)."""
        self._num_candidates += 1
        place = len(self._samples)
        if place == self.num_samples:
            place = self._random.randrange(self._num_candidates)
            if place >= self.num_samples:
                return
        if result.pooled is not None:
            self._samples[place : place + 1] = [SampleRow(result.row, result.pooled.describe(), None, 0)]
            return
        first = result.completions[0]
        text = (first.text or first.reasoning or first.parsed or "")[:_MAX_TEXT_CHARS]
        self._samples[place : place + 1] = [SampleRow(result.row, text, first.finish_reason, first.num_tokens)]
