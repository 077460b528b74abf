"""Read an OpenAI batch file as its lines: the columns `custom_id` and `request`, the line as it stands.

- A line that is no valid request is a row like any other: it is rejected when its turn comes.
- Blank lines are no rows, as for `vllm run-batch`; line ends and blanks around a line are no part of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from dpgen.config.prompt import REQUEST_COLUMN
from dpgen.data.openai_batch.lines import CUSTOM_ID_COLUMN, parse_batch_line
from dpgen.data.reading.invalid_text import InvalidValues, set_aside_invalid
from dpgen.data.reading.source import check_encoding, iter_line_batches
from dpgen.formatting import format_count

_BLANKS = " \t\r\n"  # of JSON


class RequestLinesReader:
    """Read batch files one after the other.

    Attributes:
        invalid: values with text that can't be encoded, by the row's number over all files.
    """

    def __init__(self) -> None:
        self.invalid: InvalidValues = {}
        self._num_rows = self._num_malformed = 0
        self._first_malformed = ""
        self._id_hashes: list[np.ndarray] = []  # uint64[num_rows of a batch]; of a row without an id, 0

    def iter_tables(self, file: str, stream: BinaryIO) -> Iterator[pa.Table]:
        """Yield a file's lines.

        Raises:
            UnreadableInput: the file is not UTF-8 as a whole, but UTF-16 or another kind of file.
        """
        check_encoding(file, stream.peek(16))  # type: ignore[attr-defined]
        line_number = 0
        for batch in iter_line_batches(stream):
            requests: list[Any] = []
            ids: list[Any] = []
            for text in batch.decode("utf-8", "surrogateescape").removesuffix("\n").split("\n"):
                line_number += 1
                if not (text := text.strip(_BLANKS)):
                    continue
                line = parse_batch_line(text)
                requests.append(text)
                ids.append(line.custom_id)
                if line.error is not None:
                    self._num_malformed += 1
                    place = f"{file}, line {line_number:,}"
                    self._first_malformed = self._first_malformed or f"{place}: {line.error.message}"
            self._id_hashes.append(np.array([_hash(custom_id) for custom_id in ids], dtype=np.uint64))
            set_aside_invalid(requests, REQUEST_COLUMN, self._num_rows, self.invalid)
            self._num_rows += len(requests)
            columns = {CUSTOM_ID_COLUMN: pa.array(ids, pa.string()), REQUEST_COLUMN: pa.array(requests, pa.string())}
            yield pa.table(columns)

    @property
    def notes(self) -> list[str]:
        """Return one sentence each about lines that are no requests, and about ids that several lines have."""
        notes = []
        if self._num_malformed:
            lines = format_count(self._num_malformed, "line")
            notes.append(f"{lines} that can't be answered, each an error of its own (first: {self._first_malformed})")
        hashes = np.concatenate([np.zeros(0, np.uint64), *self._id_hashes])
        _, counts = np.unique(hashes[hashes != 0], return_counts=True)
        if num_repeated := int((counts > 1).sum()):
            ids = format_count(num_repeated, CUSTOM_ID_COLUMN)
            notes.append(f"{ids} on more than one line, and each of these lines is answered")
        return notes

    def choose_types(self) -> dict[str, pa.DataType]:
        """Return no types: all columns are texts."""
        return {}

    def describe_changes(self) -> dict[str, str]:
        """Return no changes: lines stay as they are."""
        return {}


def _hash(custom_id: str | None) -> int:
    if custom_id is None:
        return 0
    return int.from_bytes(hashlib.blake2b(custom_id.encode(), digest_size=8).digest(), "little")
