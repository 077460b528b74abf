"""Whether a run folder holds what it should: every row once, as the journal has it, beside the input row it belongs to.

Reads everything and changes nothing. What costs no row (a torn tail, a damaged record that stands elsewhere, too) is a
note; what leaves a row missing, wrong or unproven is a problem.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dpgen.config.loader import load
from dpgen.data.input_rows import InputRows, load_input
from dpgen.errors import ConfigError, DpgenError
from dpgen.formatting import format_count
from dpgen.journal.reader import (
    JournalIndex,
    JournalReader,
    SegmentContents,
    list_segments,
    merge_segments,
    read_segment,
)
from dpgen.journal.run_dir import RunDir, diff_identities
from dpgen.output.dataset_writer import replace_nan_with_null, result_columns
from dpgen.output.result_stats import ResultStats
from dpgen.records import RowResult

_BATCH_ROWS = 2_000


@dataclass
class VerificationReport:
    """What was found. Sets of rows are written as ranges: "0-41,57".

    Attributes:
        num_rows: rows of the input, as run.json has it; None if it can't be known.
        num_done: rows with a sound result in the journal.
        missing, doubled: rows with none, and with several (that is no fault: one counts).
        failed: error type → rows.
        damaged_segments, torn_segments: file name → what is wrong, and how many bytes a crash cut short.
        num_dataset_rows: rows in RUN_DIR/dataset; None if it was not read.
        input: "same", "differs", or "not checked".
        problems: each a sentence; with any of them the result is not sound.
        notes: what is worth knowing, but costs no row.
    """

    run_dir: str
    is_finished: bool = False
    num_rows: int | None = None
    num_done: int = 0
    num_failed: int = 0
    missing: str = ""
    doubled: str = ""
    failed: dict[str, str] = field(default_factory=dict)
    num_segments: int = 0
    damaged_segments: dict[str, str] = field(default_factory=dict)
    torn_segments: dict[str, int] = field(default_factory=dict)
    num_dataset_rows: int | None = None
    input: str = "not checked"
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """ "sound": complete and as it should be; "unfinished": nothing is wrong so far; "not sound"."""
        if self.problems:
            return "not sound"
        return "sound" if self.is_finished else "unfinished"


def verify(path: Path, *, check_input: bool = True) -> VerificationReport:
    """Checks a run folder, finished or not.

    Args:
        check_input: read the input that config.yaml names, where it can be reached, and compare.

    Raises:
        DpgenError: something in the folder can't be read at all (permissions, a broken disk).
    """
    folder = RunDir(str(path))
    report = VerificationReport(str(path), is_finished=folder.is_finished)
    identity = _read_identity(folder, report)
    index = _check_journal(folder, report)
    rows = _check_input(folder, identity, report) if check_input and identity else None
    with JournalReader(index) as reader:
        results = _ResultLookup(index, reader)
        _count_failed(results, report)
        if folder.is_finished and identity and report.num_rows is not None:
            stats = _DatasetCheck(folder, identity, results, rows, report).run()
            _check_success(folder, stats, report)
    return report


def _read_identity(folder: RunDir, report: VerificationReport) -> dict[str, Any]:
    """What run.json says the run is; empty, and a problem, where it says nothing."""
    try:
        found = folder.read_metadata()
    except DpgenError as error:
        report.problems.append(str(error))
        return {}
    identity = found.get("identity")
    num_rows = identity.get("input", {}).get("num_rows") if isinstance(identity, dict) else None
    if not isinstance(identity, dict) or not isinstance(num_rows, int):
        report.problems.append(
            "run.json says nothing of an input; it is no run's"
            if found
            else "there is no run.json: this is no run's folder"
        )
        return {}
    report.num_rows = num_rows
    return identity


def _check_journal(folder: RunDir, report: VerificationReport) -> JournalIndex:
    """Reads every byte of the journal; the index of its sound records."""
    found = [read_segment(path, check=True) for path in list_segments(folder.journal)]
    index = merge_segments(found)
    report.num_segments, report.num_done = len(found), len(index)
    report.doubled = format_ranges(_find_duplicate_rows(found))
    for each in found:
        if each.damage is not None:
            report.damaged_segments[each.path.name] = each.damage
            report.notes.append(f"journal/{each.path.name} is damaged: {each.damage}")
        if each.torn_bytes:
            report.torn_segments[each.path.name] = each.torn_bytes
    if report.num_rows is None:
        return index
    unknown = index.row[(index.row < 0) | (index.row >= report.num_rows)]
    if len(unknown):
        report.num_done -= len(unknown)
        report.problems.append(f"the journal holds rows that the input has not: {_format_rows(unknown)}")
    missing = np.setdiff1d(np.arange(report.num_rows), index.row)
    report.missing = format_ranges(missing)
    if len(missing) and report.is_finished:
        report.problems.append(f"the journal lacks rows, so their results can't be proven: {_format_rows(missing)}")
    return index


def _find_duplicate_rows(found: list[SegmentContents]) -> np.ndarray:
    rows = np.sort(np.concatenate([np.empty(0, np.int64), *(each.frames.row for each in found)]))
    return np.unique(rows[1:][rows[1:] == rows[:-1]])


class _ResultLookup:
    """The journal's results, by row."""

    def __init__(self, index: JournalIndex, reader: JournalReader) -> None:
        self.index = index
        self._reader = reader

    def get_many(self, rows: Iterable[int]) -> Iterator[RowResult | None]:
        """The results of rows; None where the journal has none."""
        wanted = np.fromiter(rows, np.int64)
        places = np.searchsorted(self.index.row, wanted)
        for row, place in zip(wanted, places, strict=True):
            is_there = place < len(self.index) and self.index.row[place] == row
            yield self._reader.result(int(place)) if is_there else None


def _count_failed(results: _ResultLookup, report: VerificationReport) -> None:
    by_type: dict[str, list[int]] = {}
    for result in results.get_many(results.index.row[results.index.error]):
        assert result is not None and result.error is not None
        by_type.setdefault(result.error.type, []).append(result.row)
    report.failed = {kind: format_ranges(np.array(rows)) for kind, rows in sorted(by_type.items())}
    report.num_failed = sum(map(len, by_type.values()))


def _check_input(folder: RunDir, identity: Mapping[str, Any], report: VerificationReport) -> InputRows | None:
    """Whether the input is still what run.json says; the input, if it is."""
    config_file = folder.path / "config.yaml"
    try:
        rows = load_input(load([str(config_file)], []).data)
        now = rows.fingerprint()
    except ConfigError as error:
        report.notes.append(f"the input was not checked: {error}")
        return None
    differing = diff_identities(identity["input"], json.loads(json.dumps(now)), "input")
    report.input = "differs" if differing else "same"
    if differing:
        report.problems.append(f"the input is not the one that was run: {'; '.join(differing)}")
    return None if differing else rows


class _DatasetCheck:
    """RUN_DIR/dataset against the journal and the input."""

    def __init__(
        self,
        folder: RunDir,
        identity: Mapping[str, Any],
        results: _ResultLookup,
        rows: InputRows | None,
        report: VerificationReport,
    ) -> None:
        self._folder, self._results, self._rows, self._report = folder.dataset, results, rows, report
        sampling, output = identity.get("sampling") or {}, identity.get("output") or {}
        self._has_samples = sampling.get("n", 1) != 1 or "n" in (sampling.get("from_columns") or {})
        self._token_ids = bool(output.get("token_ids"))
        self._format = str(output.get("format", "parquet"))
        self._kept = identity.get("columns")
        assert report.num_rows is not None
        self._seen = np.zeros(report.num_rows, np.int64)
        self._last_row = -1
        self._differing: dict[str, list[int]] = {}
        self._tally: ResultStats | None = ResultStats()

    def run(self) -> ResultStats | None:
        """Reads all of it; the tally of the journal's results, if every row came once and in order."""
        problems = self._report.problems
        files = sorted(self._folder.glob(f"train-*.{self._format}")) if self._folder.is_dir() else []
        expected = int(files[0].stem.rpartition("-")[2]) if files and files[0].stem[-5:].isdigit() else None
        if len(files) != expected:
            problems.append(f"dataset/ holds {format_count(len(files), 'file')}, of {expected or 'an unknown number'}")
        self._report.num_dataset_rows = 0
        for path in files:
            try:
                for batch in _batches(path):
                    self._check_batch(path, batch)
            except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's own are OSError or ValueError
                problems.append(f"dataset/{path.name} can't be read: {_first_line(error)}")
        for what, wrong in (("lacks", self._seen == 0), ("holds more than once", self._seen > 1)):
            if wrong.any():
                problems.append(f"the dataset {what} rows: {_format_rows(np.flatnonzero(wrong))}")
        for column, rows in self._differing.items():
            problems.append(f"the dataset's {column}: {_format_rows(np.array(rows))}")
        return self._tally if (self._seen == 1).all() else None

    def _check_batch(self, path: Path, batch: dict[str, list[Any]]) -> None:
        report = self._report
        assert report.num_rows is not None and report.num_dataset_rows is not None
        ids = np.array(batch["row_id"], np.int64)
        if not len(ids):
            return
        report.num_dataset_rows += len(ids)
        if ((ids < 0) | (ids >= report.num_rows)).any():
            raise ValueError("it holds a row_id that the input has not")
        np.add.at(self._seen, ids, 1)
        if (np.diff(ids, prepend=self._last_row) <= 0).any():
            report.problems.append(f"dataset/{path.name} is not in input order")
            self._tally = None
        self._last_row = int(ids[-1])
        self._compare_results(ids, batch)
        if self._rows is not None and not self._rows.is_empty:
            self._compare_input(self._rows, ids, batch)

    def _compare_results(self, ids: np.ndarray, batch: dict[str, list[Any]]) -> None:
        found = list(self._results.get_many(ids))
        if self._tally is not None:
            for result in found:
                self._tally.add(result if result is not None else RowResult(-1))
        known = [place for place, result in enumerate(found) if result is not None]
        results = [result for result in found if result is not None]
        for name, values in result_columns(results, self._has_samples, self._token_ids).items():
            actual = batch[name]
            self._compare(f"{name} differs from the journal's", ids, known, values.to_pylist(), actual)

    def _compare_input(self, rows: InputRows, ids: np.ndarray, batch: dict[str, list[Any]]) -> None:
        places = list(range(len(ids)))
        kept = rows.columns if self._kept is None else self._kept
        table = rows.dataset.select_columns(list(kept)).with_format("arrow")[ids.tolist()]
        for name in kept:
            wanted = table[name].to_pylist()
            if self._format == "jsonl":
                wanted = replace_nan_with_null(wanted)
            self._compare(f"{name} differs from the input's", ids, places, wanted, batch[name])

    def _compare(self, what: str, ids: np.ndarray, places: list[int], wanted: list[Any], actual: list[Any]) -> None:
        """Notes the rows in which two columns differ: `wanted`, and `actual` at `places`."""
        found = [actual[place] for place in places]
        if _canonical_json(wanted) == _canonical_json(found):
            return
        for place, one, other in zip(places, wanted, found, strict=True):
            if _canonical_json(one) != _canonical_json(other):
                self._differing.setdefault(what, []).append(int(ids[place]))


def _batches(path: Path) -> Iterator[dict[str, list[Any]]]:
    """The rows of one file of the dataset, as columns, some at a time."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH_ROWS):
                yield batch.to_pydict()
        return
    with path.open(encoding="utf-8") as lines:
        rows: list[dict[str, Any]] = []
        for line in lines:
            rows.append(json.loads(line))
            if len(rows) == _BATCH_ROWS:
                yield {name: [row[name] for row in rows] for name in rows[0]}
                rows = []
        if rows:
            yield {name: [row[name] for row in rows] for name in rows[0]}


def _check_success(folder: RunDir, stats: ResultStats | None, report: VerificationReport) -> None:
    """`_SUCCESS` against the journal, or at least against the number of rows."""
    try:
        said = json.loads(folder.success.read_bytes())
        given = {name: said[name] for name in ResultStats().to_dict()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        report.problems.append(f"_SUCCESS can't be read: {type(error).__name__}: {error}")
        return
    facts: dict[str, Any] = {"num_rows": report.num_rows}
    if stats is not None and not report.missing:
        facts = stats.to_dict()
    for name, value in facts.items():
        if given[name] != value:
            report.problems.append(f"_SUCCESS says {name} is {given[name]!r}; it is {value!r}")


def format_ranges(rows: np.ndarray) -> str:
    """Row indices, ascending, as "0-41,57"; empty for none."""
    if not len(rows):
        return ""
    starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)
    ends = np.append(starts[1:], len(rows)) - 1
    pairs = zip(rows[starts].tolist(), rows[ends].tolist(), strict=True)
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in pairs)


def _format_rows(rows: np.ndarray) -> str:
    text = format_ranges(np.unique(rows))
    return f"{len(rows):,} ({truncate_ranges(text)})"


def truncate_ranges(text: str, most: int = 60) -> str:
    """Ranges cut to what fits a line."""
    return text if len(text) <= most else text[: text.rindex(",", 0, most)] + ", ..."


def _canonical_json(value: Any) -> str:
    """A value in a form in which equal ones are equal: NaN too, and what JSON has no word for."""
    return json.dumps(value, default=str)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
