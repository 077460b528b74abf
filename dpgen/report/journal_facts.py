"""Read what a run's journal tells about its rows: exact counts of all, and statistics of a sample.

- Every segment's index is read, and of each row whether it has a result and an error: two bits of information, a byte
  each. Results themselves are read for a sample of the rows.
- A damaged or unreadable part is left out and noted; `dpgen verify` finds out more.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dpgen.errors import DpgenError
from dpgen.formatting import format_count
from dpgen.journal.attempts import RejectedAttempt, decode_attempt
from dpgen.journal.reader import (
    DamagedRecord,
    JournalIndex,
    JournalReader,
    SegmentContents,
    list_segments,
    merge_segments,
    read_segment,
)
from dpgen.records import RowResult
from dpgen.report.row_sampler import RowSampler, hash_rows
from dpgen.report.time_budget import TimeBudget

MAX_RESULTS = 10_000
MAX_ERRORS = 5_000
MAX_ATTEMPTS = 5_000
MAX_SHOWN_ROWS = 8
MAX_SHOWN_ERRORS = 3  # of each type
_CHUNK_ROWS = 1_000
_MAX_ROWS = 1 << 33  # an index beyond is of no row, but of damage


@dataclass
class RowStatistics:
    """Hold what a sample of rows with a completion tells.

    Attributes:
        num_rows, num_completions: that were read.
        lengths, prompt_lengths: tokens, of each completion and each prompt.
        finish_reasons: completions by vLLM's value.
        copies: completions by the hash of their text, of those with a text.
        num_repeats_in_rows: completions whose text an earlier sample of the same row has.
        rows: a few of them, to look at.
    """

    num_rows: int = 0
    num_completions: int = 0
    lengths: list[int] = field(default_factory=list)
    prompt_lengths: list[int] = field(default_factory=list)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    copies: Counter[bytes] = field(default_factory=Counter)
    num_repeats_in_rows: int = 0
    rows: list[RowResult] = field(default_factory=list)
    texts: dict[bytes, str] = field(default_factory=dict)

    def add(self, result: RowResult) -> None:
        """Count a row."""
        self.num_rows += 1
        if result.num_prompt_tokens is not None:
            self.prompt_lengths.append(result.num_prompt_tokens)
        if len(self.rows) < MAX_SHOWN_ROWS:
            self.rows.append(result)
        in_row = set()
        for completion in result.completions:
            self.num_completions += 1
            self.lengths.append(completion.num_tokens)
            self.finish_reasons[completion.finish_reason or "none"] += 1
            if completion.text:
                text = completion.text.encode("utf-8", "surrogatepass")
                digest = hashlib.blake2b(text, digest_size=8).digest()
                self.num_repeats_in_rows += digest in in_row
                in_row.add(digest)
                self.copies[digest] += 1
                self.texts.setdefault(digest, completion.text[:200])

    def list_duplicates(self, most: int = 5) -> list[tuple[str, int]]:
        """Return the texts that occur most often among the completions, and how often, if more than once."""
        return [(self.texts[digest], number) for digest, number in self.copies.most_common(most) if number > 1]


@dataclass
class JournalFacts:
    """Hold what the journal tells.

    Attributes:
        num_done, num_errors: rows with a result, and those of them whose result is an error.
        num_repeated: results of rows that had one already: they were generated again.
        num_rejected: attempts that checks rejected, or that are continued.
        statistics: of rows with a completion.
        errors: by type, the rows of the sample and examples: row, message.
        rejections: samples that were rejected, of the sample, by check, and examples: row, reason.
        mean_rejected_tokens: of an attempt.
        num_errors_read, num_rejected_read: sizes of these samples.
        notes: what is missing, in sentences.
    """

    num_done: int = 0
    num_errors: int = 0
    num_repeated: int = 0
    num_rejected: int = 0
    statistics: RowStatistics = field(default_factory=RowStatistics)
    errors: dict[str, tuple[int, list[tuple[int, str]]]] = field(default_factory=dict)
    rejections: dict[str, tuple[int, list[tuple[int, str]]]] = field(default_factory=dict)
    mean_rejected_tokens: float = 0.0
    num_errors_read: int = 0
    num_rejected_read: int = 0
    notes: list[str] = field(default_factory=list)


class _RowMarks:
    """Remember of each row whether it has a result, and one that is no error: two bytes a row."""

    def __init__(self) -> None:
        self.is_done, self.has_succeeded = np.zeros(0, bool), np.zeros(0, bool)
        self.num_results = 0

    def add(self, rows: np.ndarray, is_error: np.ndarray) -> None:
        is_valid = (rows >= 0) & (rows < _MAX_ROWS)
        rows, is_error = rows[is_valid], is_error[is_valid]
        if not len(rows):
            return
        if (size := int(rows.max()) + 1) > len(self.is_done):
            size = max(size, min(2 * len(self.is_done), _MAX_ROWS))
            self.is_done, self.has_succeeded = _extend(self.is_done, size), _extend(self.has_succeeded, size)
        self.num_results += len(rows)
        self.is_done[rows] = True
        self.has_succeeded[rows[~is_error]] = True


def read_journal(journal_dir: Path, budget: TimeBudget) -> JournalFacts:
    """Return what the journal of a run tells; without an error, whatever is in the directory."""
    facts, marks = JournalFacts(), _RowMarks()
    samplers = RowSampler(MAX_RESULTS), RowSampler(MAX_ERRORS), RowSampler(MAX_ATTEMPTS)
    try:
        paths = list_segments(journal_dir)
    except OSError as error:
        facts.notes.append(f"The journal can't be listed: {error.strerror}.")
        return facts
    num_unread, damaged = _read_segments(paths, marks, samplers, budget)
    if num_unread:
        of = format_count(len(paths), "segment")
        facts.notes.append(
            f"{num_unread:,} of {of} of the journal were not read for lack of time; counts leave them out."
        )
    if damaged:
        facts.notes.append(f"{format_count(len(damaged), 'segment')} can't be read, the first: {damaged[0]}.")
    facts.num_done, num_succeeded = int(marks.is_done.sum()), int(marks.has_succeeded.sum())
    facts.num_errors = facts.num_done - num_succeeded
    facts.num_repeated, facts.num_rejected = marks.num_results - facts.num_done, samplers[2].num_seen
    num_damaged = _read_results(facts, samplers[0], budget)
    num_damaged += _read_errors(facts, samplers[1], marks.has_succeeded, budget)
    num_damaged += _read_attempts(facts, samplers[2], budget)
    if num_damaged:
        facts.notes.append(f"{format_count(num_damaged, 'record')} of those read are damaged: see dpgen verify.")
    return facts


def _read_segments(
    paths: Sequence[Path], marks: _RowMarks, samplers: tuple[RowSampler, ...], budget: TimeBudget
) -> tuple[int, list[str]]:
    """Return how many segments were left out for lack of time, and what is wrong with unreadable ones."""
    damaged: list[str] = []
    for number, path in enumerate(paths):
        if budget.is_spent:
            return len(paths) - number, damaged
        try:
            frames = read_segment(path).frames
        except (DpgenError, OSError) as error:
            damaged.append(f"{path.name}: {error}")
            continue
        results = frames.results
        marks.add(results.row, results.error)
        sampled = (results.select(~results.error), results.select(results.error), frames.attempts)
        for sampler, part in zip(samplers, sampled, strict=True):
            sampler.add(path, part)
    return 0, damaged


def _read_results(facts: JournalFacts, sampler: RowSampler, budget: TimeBudget) -> int:
    index, num_damaged = _make_index(sampler), 0
    for record in _iter_payloads(index, budget):
        num_damaged += record is None
        if record is not None:
            facts.statistics.add(record)
    num_succeeded = facts.num_done - facts.num_errors
    if facts.statistics.num_rows + num_damaged < num_succeeded:
        facts.notes.append(
            f"Lengths, finish reasons and duplicates are of a random sample: {facts.statistics.num_rows:,} of "
            f"{format_count(num_succeeded, 'row')}."
        )
    return num_damaged


def _read_errors(facts: JournalFacts, sampler: RowSampler, has_succeeded: np.ndarray, budget: TimeBudget) -> int:
    index, num_damaged = _make_index(sampler), 0
    keep = np.flatnonzero(~has_succeeded[np.clip(index.row, 0, max(0, len(has_succeeded) - 1))]) if len(index) else None
    for record in _iter_payloads(index, budget, keep):
        num_damaged += record is None
        if record is not None and record.error is not None:
            facts.num_errors_read += 1
            _add_example(facts.errors, record.error.type, record.row, record.error.message)
    if facts.num_errors_read + num_damaged < facts.num_errors:
        facts.notes.append(
            f"Errors by type are of a random sample: {facts.num_errors_read:,} of {facts.num_errors:,} rows with one."
        )
    return num_damaged


def _read_attempts(facts: JournalFacts, sampler: RowSampler, budget: TimeBudget) -> int:
    num_tokens = num_damaged = 0
    for path, frames in sampler.get_segments():
        if budget.is_spent:
            break
        index = JournalIndex(
            (path,), frames.row, np.zeros(len(frames), np.int32), frames.offset, frames.length, frames.error
        )
        with JournalReader(index) as reader:
            for position in range(len(index)):
                try:
                    attempt = decode_attempt(reader.payload(position))
                except (DpgenError, OSError, ValueError, KeyError, TypeError):
                    num_damaged += 1
                    continue
                facts.num_rejected_read += 1
                num_tokens += _count_rejected(facts, attempt)
    facts.mean_rejected_tokens = num_tokens / max(1, facts.num_rejected_read)
    return num_damaged


def _count_rejected(facts: JournalFacts, attempt: RejectedAttempt) -> int:
    """Return the tokens of the attempt's rejected samples, and count them by check."""
    num_tokens = 0
    for place, rejection in enumerate(attempt.rejections):
        if rejection is None:
            continue
        _add_example(facts.rejections, rejection.check, attempt.result.row, rejection.reason)
        if place < len(attempt.result.completions):
            num_tokens += attempt.result.completions[place].num_tokens
    return num_tokens


def _add_example(kinds: dict[str, tuple[int, list[tuple[int, str]]]], name: str, row: int, text: str) -> None:
    number, examples = kinds.get(name, (0, []))
    if len(examples) < MAX_SHOWN_ERRORS:
        examples = [*examples, (row, text)]
    kinds[name] = (number + 1, examples)


def _make_index(sampler: RowSampler) -> JournalIndex:
    return merge_segments([SegmentContents(path, frames) for path, frames in sampler.get_segments()])


def _iter_payloads(
    index: JournalIndex, budget: TimeBudget, keep: np.ndarray | None = None
) -> Iterator[RowResult | None]:
    """Yield the results of an index in random order until the time is spent; None for a damaged one."""
    positions = np.arange(len(index)) if keep is None else keep
    positions = positions[np.argsort(hash_rows(index.row[positions]))]
    with JournalReader(index) as reader:
        for start in range(0, len(positions), _CHUNK_ROWS):
            chunk = positions[start : start + _CHUNK_ROWS]
            try:
                yield from [result for batch in reader.iter_batches(chunk) for result in batch]
            except (DpgenError, OSError, ValueError, KeyError, TypeError):
                yield from (_read_one(reader, position) for position in chunk.tolist())
            if budget.is_spent:
                return


def _read_one(reader: JournalReader, position: int) -> RowResult | None:
    try:
        return reader.result(position)
    except (DamagedRecord, DpgenError, OSError, ValueError, KeyError, TypeError):
        return None


def _extend(values: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([values, np.zeros(size - len(values), bool)])
