"""Compare response files with the journal and the batch file, line by line.

- A line is compared as a whole with the one that would be written now, but for the texts of tokens beside
  log-probabilities: these need the tokenizer.
- Without the batch file, only ids, statuses and errors are compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dpgen.config.prompt import REQUEST_COLUMN
from dpgen.data.input_rows import InputRows
from dpgen.formatting import format_rows
from dpgen.journal.reader import BATCH_ROWS
from dpgen.output.dataset_check import DatasetFindings, ResultLookup
from dpgen.output.file_set import list_files
from dpgen.output.openai_batch.logprobs import hide_token_texts
from dpgen.output.openai_batch.response_files import FILE_SUFFIX
from dpgen.output.openai_batch.responses import ResponseBuilder, RunFacts
from dpgen.output.result_stats import ResultStats
from dpgen.records import RowResult

_NO_JSON = object()  # stands for a line that can't be read


class ResponseCheck:
    """Check the response files of a run; call `run` once.

    Args:
        num_rows: rows of the input.
        rows: the batch file; None to leave it out.
        metadata: the content of run.json.
        stats: collects the journal's results in the order of the lines.
    """

    def __init__(
        self,
        dataset_dir: Path,
        num_rows: int,
        results: ResultLookup,
        rows: InputRows | None,
        metadata: Mapping[str, Any],
        stats: ResultStats,
    ) -> None:
        self._dataset_dir, self._num_rows, self._results, self._rows = dataset_dir, num_rows, results, rows
        self._builder = ResponseBuilder(RunFacts.from_metadata(metadata))
        self._stats = stats
        self._unreadable: list[int] = []
        self._differing: list[int] = []
        self._has_logprobs = False
        self._findings = DatasetFindings()

    def run(self) -> DatasetFindings:
        """Read and compare all files."""
        findings = self._findings
        files, problem = list_files(self._dataset_dir, FILE_SUFFIX)
        findings.problems += [problem] if problem else []
        lines = self._iter_lines(files)
        while batch := list(islice(lines, BATCH_ROWS)):
            self._compare(batch)
        missing = np.arange(findings.num_rows, self._num_rows)
        for sentence, numbers in (
            ("lacks the responses to rows", missing),
            ("holds responses that are no JSON: rows", self._unreadable),
            ("holds responses that differ from the journal's: rows", self._differing),
        ):
            if len(numbers):
                findings.problems.append(f"the dataset {sentence}: {format_rows(np.asarray(numbers))}")
        if findings.num_rows > self._num_rows:
            findings.problems.append(f"the dataset holds {findings.num_rows - self._num_rows:,} responses too many")
        elif not len(missing):
            findings.stats = self._stats
        if self._rows is None:
            findings.notes.append("the bodies of responses were not checked, since they depend on the batch file")
        elif self._has_logprobs:
            findings.notes.append("texts of tokens beside log-probabilities were not checked: they need the tokenizer")
        return findings

    def _iter_lines(self, files: list[Path]) -> Iterator[Any]:
        for path in files:
            try:
                with path.open("rb") as file:
                    for line in file:
                        yield _read(line)
            except OSError as error:
                self._findings.problems.append(f"dataset/{path.name} can't be read: {error.strerror}")

    def _compare(self, lines: list[Any]) -> None:
        start = self._findings.num_rows
        self._findings.num_rows += len(lines)
        row_ids = np.arange(start, min(start + len(lines), self._num_rows))
        texts: Iterator[Any] = iter(())
        if self._rows is not None and not self._rows.is_empty:
            texts = (row[REQUEST_COLUMN] for row in self._rows.iter_rows(row_ids, [REQUEST_COLUMN]))
        for line, row, result in zip(lines, row_ids.tolist(), self._results.get_many(row_ids), strict=False):
            text = next(texts, None)
            if line is _NO_JSON:
                self._unreadable.append(row)
            if result is None:
                continue
            self._has_logprobs |= any(completion.logprobs is not None for completion in result.completions)
            if line is not _NO_JSON:
                result = self._find_source(line, text, result)
            self._stats.add(result)

    def _find_source(self, line: Any, text: str | None, result: RowResult) -> RowResult:
        """Return that result of a row which its response was made of; note the row if there is none.

        A rank that was cut off may have journaled the row again since, in a segment that comes before.
        """
        for candidate in (result, *self._results.get_others(result.row)):
            if self._is_response(line, text, candidate):
                return candidate
        self._differing.append(result.row)
        return result

    def _is_response(self, line: Any, text: str | None, result: RowResult) -> bool:
        expected = self._builder.build(text or "", result)
        if text is None:
            return bool(_select_without_input(line) == _select_without_input(expected))
        return bool(_to_comparable(line) == _to_comparable(expected))


def _read(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return _NO_JSON


def _select_without_input(line: Any) -> Any:
    """Return the parts of a response that don't depend on the line of the batch file."""
    if not isinstance(line, dict) or not isinstance(line.get("response"), dict):
        return line
    response = line["response"]
    return [line.get("id"), line.get("error"), response.get("status_code"), response.get("request_id")]


def _to_comparable(line: Any) -> Any:
    if not isinstance(line, dict) or not isinstance(line.get("response"), dict):
        return line
    body = line["response"].get("body")
    return line | {"response": line["response"] | {"body": hide_token_texts(body) if isinstance(body, dict) else body}}
