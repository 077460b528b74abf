"""Read CSV, TSV and plain text as columns of texts, just as they stand in the file.

A CSV file has no types. After all rows are read, a column of texts becomes numbers or truth values only where each of
its cells is one; an empty cell is null. `007`, `NA` and `null` stay texts, and so do numbers that a float can't hold.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from dpgen.data.reading.files import list_names
from dpgen.data.reading.invalid_text import InvalidValues, has_surrogate, set_aside_invalid
from dpgen.data.reading.source import BATCH_BYTES, UnreadableInput, check_encoding, iter_line_batches
from dpgen.formatting import format_count, suggest_conversion

_MAX_ROWS = 10_000
_WHOLE_NUMBER = r"^(0|-?[1-9][0-9]{0,18})$"
_LARGE_NUMBER = r"^(0|[1-9][0-9]{0,19})$"
_NUMBER = r"^-?(0|[1-9][0-9]{0,14})(\.[0-9]+)?([eE][+-]?[0-9]+)?$"
_MAYBE_INEXACT = r"[eE]|^.{16}"  # other numbers have up to 15 digits, which a float64 gives back
_TRUTH_VALUE = r"^([Tt]rue|TRUE|[Ff]alse|FALSE)$"
# Pattern → type, from the narrowest on.
_TYPES = {_WHOLE_NUMBER: pa.int64(), _LARGE_NUMBER: pa.uint64(), _NUMBER: pa.float64(), _TRUTH_VALUE: pa.bool_()}


class TextTableReader:
    """Read files of rows of texts one after the other.

    Args:
        separator: between the cells of a row; None for plain text, whose lines are the column `text`.

    Attributes:
        invalid: values with text that can't be encoded, by the row's number over all files.
        notes: one sentence each about rows and headers that are not as they should be.
    """

    def __init__(self, separator: str | None) -> None:
        self._separator = separator
        self.invalid: InvalidValues = {}
        self.notes: list[str] = []
        self._names: list[str] = []  # in the header of the first file that has one
        self._num_rows = 0
        self._possible: dict[str, dict[str, pa.DataType]] = {}  # column → pattern → type, as far as all cells match
        self._changed: dict[str, str] = {}  # column → a text that its number or truth value doesn't give back

    def iter_tables(self, file: str, stream: BinaryIO) -> Iterator[pa.Table]:
        """Yield a file's rows, all columns being texts.

        Raises:
            UnreadableInput: a row has too many cells, a quote is never closed, or the file is not UTF-8.
        """
        check_encoding(file, stream.peek(16))  # type: ignore[attr-defined]
        tables = _iter_lines(stream) if self._separator is None else self._iter_cells(file, stream, self._separator)
        for columns in tables:
            for name, values in columns.items():
                set_aside_invalid(values, name, self._num_rows, self.invalid)
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

    def _iter_cells(self, file: str, stream: BinaryIO, separator: str) -> Iterator[dict[str, list[Any]]]:
        text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
        records = _Records(file, text, separator)
        header = next((cells for cells in records if cells), None)
        if header is None:
            return
        names = self._check_header(file, records.line, header)
        part: list[list[str]] = []
        num_short, first_short, num_empty_lines, num_chars_before = 0, 0, 0, 0
        for cells in records:
            if not cells:
                num_empty_lines += 1
                continue
            if len(cells) != len(names):
                if len(cells) > len(names):
                    raise UnreadableInput(
                        f"{file}, line {records.line:,}: it has {format_count(len(cells), 'cell')}, and the header "
                        f"{format_count(len(names), 'name')}. Put cells that hold a separator between quotes"
                    )
                cells += [""] * (len(names) - len(cells))
                num_short, first_short = num_short + 1, first_short or records.line
            part.append(cells)
            if len(part) == _MAX_ROWS or records.num_chars - num_chars_before >= BATCH_BYTES:
                yield _to_columns(names, part)
                part, num_chars_before = [], records.num_chars
        yield _to_columns(names, part)
        if num_short:
            first = f"first: {file}, line {first_short:,}"
            self.notes.append(
                f"{format_count(num_short, 'row')} with fewer cells than the header, null there ({first})"
            )
        if num_empty_lines and len(names) == 1:
            self.notes.append(f"{format_count(num_empty_lines, 'empty line')} of {file} left out, which are no rows")

    def _check_header(self, file: str, line: int, header: list[str]) -> list[str]:
        """Return the names of a file's columns.

        Raises:
            UnreadableInput: they are not UTF-8, or have nothing in common with those of the files before.
        """
        if any(map(has_surrogate, header)):
            raise UnreadableInput(
                f"{file}, line {line}: the header is not UTF-8. Convert the file, e.g. {suggest_conversion()}"
            )
        names = _name_columns(header)
        if self._names and not set(self._names) & set(names):
            raise UnreadableInput(
                f"{file}, line {line}: the header names none of the columns of the files before "
                f"({list_names(self._names)}). Does it lack a header?"
            )
        self._names = self._names or names
        if renamed := [name for name, cell in zip(names, header, strict=True) if name != cell]:
            self.notes.append(
                f"the header of {file} repeats or lacks names, so columns are called {list_names(renamed)}"
            )
        return names


def _fits(cells: pa.ChunkedArray, type: pa.DataType) -> bool:
    try:
        cells.cast(type)
    except pa.ArrowInvalid:  # a whole number beyond 64 bits
        return False
    if not pa.types.is_floating(type):
        return True
    suspects = cells.filter(pc.match_substring_regex(cells, _MAYBE_INEXACT)).to_pylist()
    return all(Decimal(text) == Decimal(repr(float(text))) for text in suspects)


def _to_columns(names: list[str], rows: list[list[str]]) -> dict[str, list[Any]]:
    columns = zip(*rows, strict=True) if rows else ([] for _ in names)
    return {name: [cell or None for cell in cells] for name, cells in zip(names, columns, strict=True)}


def _parse(text: str, type: pa.DataType) -> str:
    """Return how the value of a cell is written."""
    if pa.types.is_floating(type):
        return repr(float(text))
    return str(text.lower() == "true") if pa.types.is_boolean(type) else str(int(text))


def _iter_lines(stream: BinaryIO) -> Iterator[dict[str, list[Any]]]:
    for batch in iter_line_batches(stream):
        text = batch.decode("utf-8", "surrogateescape")
        yield {"text": io.StringIO(text, newline=None).read().removesuffix("\n").split("\n")}


def _name_columns(cells: list[str]) -> list[str]:
    """Return a header's names, each once and none empty, as pandas and `datasets` make them."""
    names: dict[str, None] = {}
    for index, cell in enumerate(cells):
        name = base = cell or f"Unnamed: {index}"
        number = 0
        while name in names or (number and name in cells):
            number += 1
            name = f"{base}.{number}"
        names[name] = None
    return list(names)


class _Records:
    """Iterate over the records of a CSV file, and tell where each one is.

    Attributes:
        num_chars: of the lines read so far.
        line: the number of the line on which the last record began.
    """

    def __init__(self, file: str, text: io.TextIOWrapper, separator: str) -> None:
        csv.field_size_limit(sys.maxsize)
        self._file, self._text = file, text
        self._reader = csv.reader(self._iter_lines(), delimiter=separator, strict=True)
        self.num_chars, self.line = 0, 1

    def __iter__(self) -> Iterator[list[str]]:
        return self

    def __next__(self) -> list[str]:
        """Return the cells of the next record; none for an empty line.

        Raises:
            UnreadableInput: the quotes are not those of a CSV file.
        """
        self.line = self._reader.line_num + 1
        try:
            return next(self._reader)
        except csv.Error as error:
            reason = str(error)
            if "unexpected end" in reason:
                reason = "a quote is opened there and never closed"
            elif "expected after" in reason:
                reason = "text follows a closing quote: a quote inside of a quoted cell is written twice"
            raise UnreadableInput(f"{self._file}, line {self.line:,}: {reason}") from None

    def _iter_lines(self) -> Iterator[str]:
        for line in self._text:
            self.num_chars += len(line)
            yield line
