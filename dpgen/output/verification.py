"""Verify a run directory: every row once, as in the journal, next to the input row that it belongs to.

- Everything is read, nothing is changed.
- A note costs no row: a torn tail, a damaged record whose row has another result, or a check that was not possible.
- A problem leaves a row missing, wrong or unproven.
- Not checked at all: whether the model would generate these texts, and what other nodes' disks hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dpgen.config.loader import load
from dpgen.data.input_loading import load_input
from dpgen.data.input_rows import InputRows
from dpgen.errors import ConfigError, DpgenError, TransferStopped
from dpgen.formatting import format_count, format_ranges, format_rows
from dpgen.journal.format import parse_name
from dpgen.journal.reader import (
    JournalIndex,
    JournalReader,
    SegmentContents,
    index_other_results,
    list_segments,
    merge_segments,
    read_segment,
)
from dpgen.journal.run_dir import RunDir
from dpgen.journal.run_identity import describe_left_out, diff_input, find_other_settings, get_fingerprint_version
from dpgen.output.columns import DatasetFormat
from dpgen.output.dataset_check import DatasetCheck, DatasetFindings, ResultLookup
from dpgen.output.file_set import REWRITE_HINT
from dpgen.output.json_lines import JSONL_ENCODING
from dpgen.output.openai_batch.response_check import ResponseCheck
from dpgen.output.openai_batch.response_files import OPENAI_BATCH
from dpgen.output.result_stats import HASH_ENCODINGS, ResultStats
from dpgen.output.upload.result_upload import describe_unfinished_upload


@dataclass
class VerificationReport:
    """Report what a run directory holds; `verify --json` prints the fields under these names.

    Sets of rows are written as ranges: "0-41,57".

    Attributes:
        num_rows: rows of the input, from run.json; None if unknown.
        num_done: rows with a sound result in the journal.
        num_failed: rows whose result is an error.
        missing: rows without a sound result.
        doubled: rows with several results; harmless, since one counts.
        failed: error type → rows.
        damaged_segments: file name → what is damaged.
        torn_segments: file name → bytes that a crash cut short.
        num_dataset_rows: rows in RUN_DIR/dataset; None if the dataset was not read.
        input: "same" (rows after the run's aside), "differs" or "not checked".
        problems: one sentence each; any of them makes the result unsound.
        notes: one sentence each about things that cost no row, and about what could not be checked.
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
        """Return "sound" (complete and correct), "unfinished" (correct so far) or "not sound"."""
        if self.problems:
            return "not sound"
        return "sound" if self.is_finished else "unfinished"


def verify(path: Path, *, check_input: bool = True) -> VerificationReport:
    """Check a run directory, finished or not.

    Args:
        check_input: read the input that config.yaml names, if it can be reached, and compare it.

    Raises:
        DpgenError: a file can't be read at all (permissions, a broken disk).
    """
    run_dir = RunDir(str(path))
    report = VerificationReport(str(path), is_finished=run_dir.is_finished)
    identity = _read_identity(run_dir, report)
    index, others = _check_journal(run_dir, report)
    if identity:
        _note_other_settings(index, run_dir.read_metadata(), report)
    rows = _check_input(run_dir, identity, report) if check_input and identity else None
    _note_what_is_not_checked(run_dir, report, has_input=rows is not None, check_input=check_input)
    with JournalReader(index) as reader, JournalReader(others) as other_reader:
        results = ResultLookup(index, reader, other_reader)
        _count_failed(results, report)
        if run_dir.is_finished and identity and report.num_rows is not None:
            success = _read_success(run_dir, report)
            stats = ResultStats(success["hash_version"]) if success else ResultStats()
            dataset_format = DatasetFormat.from_identity(
                identity, success["jsonl_encoding"] if success else JSONL_ENCODING, run_dir.read_metadata()
            )
            findings = _check_dataset(run_dir, dataset_format, report.num_rows, results, rows, stats)
            report.num_dataset_rows = findings.num_rows
            report.problems += findings.problems
            report.notes += findings.notes
            if findings.problems and not report.missing and report.input != "differs":
                report.notes.append(f"no row is lost: {REWRITE_HINT}")
            _check_success(success, findings, report)
            if report.num_rows and report.num_failed == report.num_rows:
                report.notes.append("no row succeeded: every result is an error")
    return report


def _read_identity(run_dir: RunDir, report: VerificationReport) -> dict[str, Any]:
    """Return the run's identity from run.json; empty, with a problem in the report, if there is none."""
    try:
        metadata = run_dir.read_metadata()
    except DpgenError as error:
        report.problems.append(str(error))
        return {}
    identity = metadata.get("identity")
    num_rows = identity.get("input", {}).get("num_rows") if isinstance(identity, dict) else None
    if not isinstance(identity, dict) or not isinstance(num_rows, int):
        report.problems.append(
            "run.json describes no input, so no run wrote it"
            if metadata
            else "there is no run.json, so this is no run directory"
        )
        return {}
    report.num_rows = num_rows
    return identity


def _check_journal(run_dir: RunDir, report: VerificationReport) -> tuple[JournalIndex, JournalIndex]:
    """Read every byte of the journal, and return the index of its sound records, and of those that do not count."""
    segments = [read_segment(path, check=True) for path in list_segments(run_dir.journal)]
    index, others = merge_segments(segments), index_other_results(segments)
    report.num_segments, report.num_done = len(segments), len(index)
    report.doubled = format_ranges(_find_duplicate_rows(segments))
    for segment in segments:
        name = segment.path.name
        if segment.damage is not None:
            report.damaged_segments[name] = segment.damage
            report.notes.append(f"journal/{name} is damaged: {segment.damage}")
        if segment.torn_bytes:
            report.torn_segments[name] = segment.torn_bytes
    if report.num_rows is None:
        return index, others
    unknown = index.row[~_is_of_input(index.row, report.num_rows)]
    if len(unknown):
        report.num_done -= len(unknown)
        report.problems.append(f"the journal holds rows that the input does not have: {format_rows(unknown)}")
    missing = np.setdiff1d(np.arange(report.num_rows), index.row)
    report.missing = format_ranges(missing)
    if len(missing) and report.is_finished:
        report.problems.append(f"the journal lacks rows, so their results can't be proven: {format_rows(missing)}")
    return index, others


def _note_other_settings(index: JournalIndex, metadata: Mapping[str, Any], report: VerificationReport) -> None:
    """Note the rows that were generated with settings that run.resume=force has replaced since."""
    attempt_of_file = np.array([(parse_name(path.name) or (0,))[0] for path in index.files], np.int64)
    attempt_of_row = attempt_of_file[index.file]
    for attempts, differences in find_other_settings(metadata, np.unique(attempt_of_row).tolist()):
        report.notes.append(
            f"rows of attempt {format_ranges(np.array(attempts))}, which ran with other settings "
            f"({'; '.join(differences)}), were kept by run.resume=force: "
            f"{format_rows(index.row[np.isin(attempt_of_row, attempts)])}"
        )


def _find_duplicate_rows(segments: list[SegmentContents]) -> np.ndarray:
    rows = np.sort(np.concatenate([np.empty(0, np.int64), *(segment.frames.results.row for segment in segments)]))
    return np.unique(rows[1:][rows[1:] == rows[:-1]])


def _is_of_input(rows: np.ndarray, num_rows: int) -> np.ndarray:
    """Return for each row index, int64[n], whether the input has such a row, bool[n]."""
    is_of_input: np.ndarray = (rows >= 0) & (rows < num_rows)
    return is_of_input


def _count_failed(results: ResultLookup, report: VerificationReport) -> None:
    """Count the rows of the input whose result is an error."""
    failed = results.index.row[results.index.error]
    if report.num_rows is not None:
        failed = failed[_is_of_input(failed, report.num_rows)]
    rows_by_type: dict[str, list[int]] = {}
    for result in results.get_many(failed):
        assert result is not None and result.error is not None
        rows_by_type.setdefault(result.error.type, []).append(result.row)
    report.failed = {type: format_ranges(np.array(rows)) for type, rows in sorted(rows_by_type.items())}
    report.num_failed = sum(map(len, rows_by_type.values()))


def _check_input(run_dir: RunDir, identity: Mapping[str, Any], report: VerificationReport) -> InputRows | None:
    """Compare the input with run.json; return the input if it is the same, or has only grown at its end."""
    config_file, metadata = run_dir.path / "config.yaml", {"identity": identity}
    try:
        rows = load_input(load([str(config_file)], []).data)
        fingerprint = rows.fingerprint(version=get_fingerprint_version(metadata))
        differences = diff_input(rows, fingerprint, metadata)
    except (ConfigError, TransferStopped) as error:
        report.notes.append(f"the input was not checked: {error}")
        return None
    if differences and (reason := describe_left_out(rows.unreadable, fingerprint, metadata)) is not None:
        report.notes.append(f"the input was not checked: {reason}")
        return None
    report.input = "differs" if differences else "same"
    if differences:
        report.problems.append(f"the input has changed since the run: {'; '.join(differences)}")
        return None
    if report.num_rows is not None and report.num_rows < len(rows):
        report.notes.append(
            f"the input has grown to {format_count(len(rows), 'row')}: the first {report.num_rows:,} are this run's"
        )
    return rows


def _note_what_is_not_checked(
    run_dir: RunDir, report: VerificationReport, *, has_input: bool, check_input: bool
) -> None:
    if (upload := describe_unfinished_upload(run_dir)) is not None:
        report.notes.append(upload)
    if report.num_rows is None:
        report.notes.append("run.json is needed to check the input, the dataset, and which rows are missing: none was")
        return
    if not check_input:
        report.notes.append("the input was not checked, as --no-input asks")
    if run_dir.is_finished and not has_input:
        report.notes.append("the dataset's input columns were not checked: there is no input to compare with")
    if not run_dir.is_finished and run_dir.dataset.exists():
        report.notes.append("dataset/ was not checked: without _SUCCESS it counts as unfinished, and is written again")


def _read_success(run_dir: RunDir, report: VerificationReport) -> dict[str, Any] | None:
    """Return the fields of `_SUCCESS`; None, with a problem in the report, if it can't be checked."""
    try:
        # Older runs name no versions.
        content = {"hash_version": 1, "jsonl_encoding": 1, **json.loads(run_dir.success.read_bytes())}
        success = {name: content[name] for name in (*ResultStats().to_dict(), "jsonl_encoding")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        report.problems.append(f"_SUCCESS can't be read: {type(error).__name__}: {error}")
        return None
    for name, known in (("hash_version", HASH_ENCODINGS), ("jsonl_encoding", range(1, JSONL_ENCODING + 1))):
        version = success[name]
        if type(version) is not int or version not in known:
            report.problems.append(
                f"_SUCCESS: {name}={json.dumps(version)} is unknown, so the results can't be proven "
                f"(known versions: {', '.join(map(str, known))}). Use the dpgen version that wrote this run"
            )
            return None
    return success


def _check_dataset(
    run_dir: RunDir,
    dataset_format: DatasetFormat,
    num_rows: int,
    results: ResultLookup,
    rows: InputRows | None,
    stats: ResultStats,
) -> DatasetFindings:
    if dataset_format.file_format == OPENAI_BATCH:
        return ResponseCheck(run_dir.dataset, num_rows, results, rows, run_dir.read_metadata(), stats).run()
    return DatasetCheck(run_dir.dataset, dataset_format, num_rows, results, rows, stats).run()


def _check_success(success: dict[str, Any] | None, findings: DatasetFindings, report: VerificationReport) -> None:
    """Compare `_SUCCESS` with the journal, or at least with the number of rows."""
    if success is None:
        return
    expected: dict[str, Any] = {"num_rows": report.num_rows}
    if findings.stats is not None and not report.missing:
        expected = findings.stats.to_dict()
    else:
        report.notes.append("_SUCCESS: only num_rows was checked, since its hash is over every row in input order")
    for name, value in expected.items():
        if success[name] != value:
            report.problems.append(f"_SUCCESS: {name}={success[name]!r}, expected {value!r}")
