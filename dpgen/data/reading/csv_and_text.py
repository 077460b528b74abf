"""Read CSV, TSV and plain text as columns of texts, just as they stand in the file.

A CSV file has no types. After all rows are read, a column of texts becomes numbers or truth values only where each of
its cells is one; an empty cell is null. `007`, `NA` and `null` stay texts.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from dpgen.data.reading.invalid_text import InvalidValues, escape, has_surrogate
from dpgen.data.reading.source import BATCH_BYTES, UnreadableInput, check_encoding, iter_line_batches

_FIRST_ROWS, _MAX_ROWS = 100, 10_000
_WHOLE_NUMBER = r"^(0|-?[1-9][0-9]{0,18})$"
_LARGE_NUMBER = r"^(0|[1-9][0-9]{0,19})$"
_NUMBER = r"^-?(0|[1-9][0-9]{0,14})(\.[0-9]+)?([eE][+-]?[0-9]+)?$"  # up to 15 digits are exact as a float64
_TRUTH_VALUE = r"^([Tt]rue|TRUE|[Ff]alse|FALSE)$"
# Pattern → type, from the narrowest on.
_TYPES = {_WHOLE_NUMBER: pa.int64(), _LARGE_NUMBER: pa.uint64(), _NUMBER: pa.float64(), _TRUTH_VALUE: pa.bool_()}


class TextTableReader:
    """Read files of rows of texts one after the other.

    Args:
        separator: between the cells of a row; None for plain text, whose lines are the column `text`.

    Attributes:
        invalid: values with text that can't be encoded, by the row's number over all files.
    """

    def __init__(self, separator: str | None) -> None:
        self._separator = separator
        self.invalid: InvalidValues = {}
        self._num_rows = 0
        self._possible: dict[str, dict[str, pa.DataType]] = {}  # column → pattern → type, as far as all cells match
        self._changed: dict[str, str] = {}  # column → a text that its number or truth value doesn't give back

    def iter_tables(self, file: str, stream: BinaryIO) -> Iterator[pa.Table]:
        """Yield a file's rows, all columns being texts.

        Raises:
            UnreadableInput: a row has too many cells, or the file is not UTF-8.
        """
        check_encoding(file, stream.peek(16))  # type: ignore[attr-defined]
        tables = _iter_lines(stream) if self._separator is None else _iter_cells(file, stream, self._separator)
        for columns in tables:
            for name, values in columns.items():
                self._take_invalid(name, values)
            table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
            if self._separator is not None:
                for name in table.column_names:
                    self._narrow(name, table[name])
            self._num_rows += table.num_rows
            yield table

    def choose_types(self) -> dict[str, pa.DataType]:
        """Return the types, other than text, that hold every value of a column."""
        return {name: next(iter(possible.values())) for name, possible in self._possible.items() if possible}

    def describe_changes(self) -> dict[str, str]:
        """Return what changes in which column, where a number is not written as its value would be."""
        types = self.choose_types()
        return {
            name: f"{text} is read as {_parse(text, types[name])}"
            for name, text in self._changed.items()
            if name in types and _parse(text, types[name]) != text
        }

    def _narrow(self, name: str, column: pa.ChunkedArray) -> None:
        cells = column.drop_null()
        if not len(cells):
            return
        possible = self._possible.setdefault(name, dict(_TYPES))
        for pattern, type in list(possible.items()):
            if not pc.all(pc.match_substring_regex(cells, pattern)).as_py() or not _fits(cells, type):
                del possible[pattern]
        lossy = possible.get(_NUMBER) or possible.get(_TRUTH_VALUE)
        if name not in self._changed and lossy is not None:
            # A whole number among decimals, 0.50, or true: noted once, if the column has this type in the end.
            if pa.types.is_boolean(lossy):
                differing = cells.filter(pc.invert(pc.is_in(cells, pa.array(["True", "False"]))))
            else:  # Arrow writes 1.0 as 1
                is_same = pc.equal(cells.cast(lossy).cast(pa.string()), cells)
                differing = cells.filter(pc.or_(pc.invert(is_same), pc.match_substring_regex(cells, "^-?[0-9]+$")))
            if (
                text := next((text for text in differing.to_pylist() if _parse(text, lossy) != text), None)
            ) is not None:
                self._changed[name] = text

    def _take_invalid(self, name: str, values: list[Any]) -> None:
        for index, value in enumerate(values):
            if value is not None and not value.isascii() and has_surrogate(value):
                self.invalid.setdefault(self._num_rows + index, {})[name] = json.dumps(value)
                values[index] = escape(value)


def _fits(cells: pa.ChunkedArray, type: pa.DataType) -> bool:
    try:
        cells.cast(type)
    except pa.ArrowInvalid:  # a whole number beyond 64 bits
        return False
    return True


def _parse(text: str, type: pa.DataType) -> str:
    """Return how the value of a cell is written."""
    if pa.types.is_floating(type):
        return repr(float(text))
    return str(text.lower() == "true") if pa.types.is_boolean(type) else str(int(text))


def _iter_lines(stream: BinaryIO) -> Iterator[dict[str, list[Any]]]:
    for batch in iter_line_batches(stream):
        text = batch.decode("utf-8", "surrogateescape")
        yield {"text": io.StringIO(text, newline=None).read().removesuffix("\n").split("\n")}


def _iter_cells(file: str, stream: BinaryIO, separator: str) -> Iterator[dict[str, list[Any]]]:
    import pandas as pd

    options = {"dtype": object, "keep_default_na": False, "na_filter": False, "encoding_errors": "surrogateescape"}
    try:
        with pd.read_csv(stream, sep=separator, iterator=True, **options) as reader:
            num_rows = _FIRST_ROWS
            while True:
                frame = reader.get_chunk(num_rows)
                if not isinstance(frame.index, pd.RangeIndex):
                    raise UnreadableInput(f"{file}: the rows have more cells than the header has names")
                columns = {str(name): [cell or None for cell in frame[name]] for name in frame.columns}
                num_bytes = sum(len(cell) for cells in columns.values() for cell in cells if cell is not None)
                yield columns
                num_rows = max(1, min(_MAX_ROWS, 4 * num_rows, num_rows * BATCH_BYTES // max(1, num_bytes)))
    except (StopIteration, pd.errors.EmptyDataError):
        return
    except pd.errors.ParserError as error:
        raise UnreadableInput(
            f"{file}: {str(error).strip().removeprefix('Error tokenizing data. C error: ')}"
        ) from None
