"""Read JSON lines, and JSON files that hold one list, as tables of the values that `json.loads` returns.

- Most lines go through Arrow's own parser, a batch at a time. Where its values may differ from those of `json.loads`
  (numbers beyond 64 bits, texts that look like dates, objects with different keys, text that is not UTF-8), the batch
  is parsed again, line by line.
- Arrow's parser can crash the process on lines that hold no object, so it never gets them; `dpgen.data.reading.cache`
  calls it in a process of its own.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from dpgen.data.reading.invalid_text import InvalidValues, take_invalid
from dpgen.data.reading.json_types import TypeInference, build_array
from dpgen.data.reading.source import UnreadableInput, check_encoding, iter_line_batches
from dpgen.formatting import describe_type

_BLOCK_BYTES = 4 << 20  # a block of 1 MB takes a fifth more processor time
_SAMPLE_BYTES = 64 << 10  # by which lines count as long or short
_LONG_LINE_BYTES = 1 << 10
_EXACT_FLOAT = 1 << 53
_MAX_ARROW_DEPTH = 20
_MAX_MISSES = 3
_MAX_ODDITIES = 10
_LIST_ROWS = 1_000  # rows of a JSON list that become one table
_SPACE = re.compile(r"\s*")
_LARGE_NUMBER = re.compile(r"[0-9][eE]\+?[0-9]{3}|[0-9]{309}")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_INT_IN_LIST = re.compile(rb"[\[,]\s*-?\d+\s*[,\]]")


class JsonReader:
    """Read files of JSON lines one after the other.

    Args:
        report_place: called with the file and line before they are parsed.
        uses_arrow: False to parse line by line, with nothing that could crash.

    Attributes:
        invalid: values with text that can't be encoded, by the row's number over all files.
        mixed_columns: columns in which whole numbers and decimals shared a place, and all became decimals.
        notes: one sentence each about values that JSON's readers take differently.
    """

    def __init__(self, report_place: Callable[[str], None], uses_arrow: bool = True) -> None:
        self._report_place = report_place
        self._num_misses = 0 if uses_arrow else _MAX_MISSES  # batches in a row that had to be parsed again
        self.invalid: InvalidValues = {}
        self.mixed_columns: dict[str, None] = {}
        self._where = ""  # the place of what is parsed
        self._oddities: dict[str, str] = {}  # what was odd → where it was first
        self._decoder = json.JSONDecoder(object_pairs_hook=self._make_object)
        # Slower, so only for lines that may hold a number beyond a float64's range.
        self._range_decoder = json.JSONDecoder(object_pairs_hook=self._make_object, parse_float=self._parse_float)
        self._num_rows = 0
        self._text_fields: dict[str, pa.DataType] = {}  # columns of texts that Arrow would take for dates

    @property
    def notes(self) -> list[str]:
        return [f"{oddity} (first: {where})" for oddity, where in self._oddities.items()]

    def iter_tables(self, file: str, stream: BinaryIO) -> Iterator[pa.Table]:
        """Yield the rows of a file, blank lines left out.

        Raises:
            UnreadableInput: a line holds no object; names the file and the line.
        """
        if _starts_with_list(file, stream):
            yield from self._iter_list(file, stream.read())
            return
        first_line = 1
        for batch in iter_line_batches(stream):
            self._report_place(f"{file}, line {first_line:,} or a later one")
            table = self._parse_fast(batch) if self._num_misses < _MAX_MISSES else None
            self._num_misses = 0 if table is not None else self._num_misses + 1
            if table is None:
                try:
                    table = self._parse_exactly(file, batch, first_line)
                except UnreadableInput:
                    if first_line > 1 or not _is_cut(batch):
                        raise
                    objects = self._parse_spread_out(file, batch + stream.read())
                    if objects is None:
                        raise
                    yield from self._iter_objects(objects, may_be_invalid=True)
                    return
            self._num_rows += table.num_rows
            yield table
            # In a table of Arrow's parser, each line is a row.
            first_line += table.num_rows if self._num_misses == 0 else batch.count(b"\n")

    # ---- Arrow's parser

    def _parse_fast(self, batch: bytes) -> pa.Table | None:
        """Return a batch's rows; None where the values may differ from those of `json.loads`."""
        longest, num_lines = _measure_lines(batch)
        if not longest:
            return None
        try:
            table = _parse_with_arrow(batch, longest, self._text_fields)
            if dates := {field.name: field.type for field in table.schema if _holds_dates(field.type)}:
                names = table.column_names
                self._text_fields |= {name: _without_dates(type) for name, type in dates.items()}
                table = _parse_with_arrow(batch, longest, self._text_fields).select(names)
            table.validate(full=True)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError):
            return None
        if table.num_rows != num_lines or not table.num_columns or any("\0" in name for name in table.column_names):
            return None
        may_hold_whole = cache(lambda key: _may_hold_whole_number(key, batch))
        is_exact = all(
            _is_exact(chunk, name, (lambda _: False) if name in self.mixed_columns else may_hold_whole, 0)
            for name in table.column_names
            for chunk in table[name].chunks
        )
        return table if is_exact else None

    # ---- Python's parser

    def _parse_exactly(self, file: str, batch: bytes, first_line: int) -> pa.Table:
        rows: list[dict[str, Any]] = []
        for number, line in enumerate(batch.split(b"\n"), first_line):
            if line.strip():
                rows.append(self._parse_line(line, f"{file}, line {number:,}"))
        return self._build_table(rows, _may_be_invalid(batch))

    def _iter_list(self, file: str, content: bytes) -> Iterator[pa.Table]:
        """Yield the rows of a file that is one list: of objects, or of strings, which get the column `text`."""
        items, may_be_invalid = self._load(content, file), _may_be_invalid(content)
        rows = [{"text": item} if isinstance(item, str) else item for item in items]
        for index, row in enumerate(rows):
            if not isinstance(row, dict):
                raise UnreadableInput(f"{file}: item {index} of the list is {describe_type(row)}, not an object")
        yield from self._iter_objects(rows, may_be_invalid)

    def _iter_objects(self, rows: Sequence[dict[str, Any]], may_be_invalid: bool) -> Iterator[pa.Table]:
        remaining = iter(rows)
        while part := list(islice(remaining, _LIST_ROWS)):
            table = self._build_table(part, may_be_invalid)
            self._num_rows += table.num_rows
            yield table

    def _build_table(self, rows: list[dict[str, Any]], may_be_invalid: bool) -> pa.Table:
        for index, row in enumerate(rows if may_be_invalid else ()):
            if invalid := take_invalid(row):
                self.invalid[self._num_rows + index] = invalid
        columns: dict[str, Any] = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            if "\0" in name:
                raise UnreadableInput(f"the key {name!r} holds a zero character, which no column's name can: rename it")
            values = [row.get(name) for row in rows]
            inference = TypeInference()
            columns[name] = build_array(values, inference.infer(values))
            if inference.mixes_numbers:
                self.mixed_columns[name] = None
        if rows and not columns:
            raise UnreadableInput("the input's objects are empty: there is no column")
        return pa.table(columns)

    # ---- values

    def _parse_line(self, line: bytes, where: str) -> dict[str, Any]:
        value = self._load(line, where)
        if not isinstance(value, dict):
            raise UnreadableInput(f'{where} is {describe_type(value)}, not an object like {{"question": ...}}')
        return value

    def _load(self, content: bytes, where: str) -> Any:
        text = content.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
        self._where = where
        try:
            return self._choose_decoder(text).decode(text)
        except RecursionError:
            raise UnreadableInput(f"{where} is nested too deep") from None
        except ValueError as error:
            raise UnreadableInput(f"{where} is not valid JSON: {_describe(error)}. Mend or remove it") from None

    def _parse_spread_out(self, file: str, content: bytes) -> list[dict[str, Any]] | None:
        """Return the objects of a file whose objects are spread over several lines; None if it holds anything else.

        A single object of lists of the same length, or of objects with the same keys, is a table by columns, as pandas
        writes it.
        """
        objects: list[Any] = []
        position, self._where = 0, file
        text = content.decode("utf-8", "surrogateescape").strip()
        decoder = self._choose_decoder(text)
        try:
            while position < len(text):
                value, end = decoder.raw_decode(text, position)
                objects.append(value)
                position = end + len(_SPACE.match(text, end)[0])  # type: ignore[index]
        except (ValueError, RecursionError):
            return None
        if not all(isinstance(value, dict) for value in objects):
            return None
        rows = _turn_columns(objects[0]) if len(objects) == 1 else objects
        if not rows or rows[0] is not objects[0]:
            self._note("one object over several lines is a table by columns; if it is one row, write it on one line")
        return rows

    def _choose_decoder(self, text: str) -> json.JSONDecoder:
        return self._decoder if _LARGE_NUMBER.search(text) is None else self._range_decoder

    def _make_object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for name in value if names.count(name) > 1)
            self._note(f"an object repeats the key {repeated!r}, whose last value counts")
        return value

    def _parse_float(self, text: str) -> float:
        value = float(text)
        if math.isinf(value):
            self._note("a number beyond a float's range is read as an infinity")
        return value

    def _note(self, oddity: str) -> None:
        if len(self._oddities) < _MAX_ODDITIES:
            self._oddities.setdefault(oddity, self._where)


def _starts_with_list(file: str, stream: BinaryIO) -> bool:
    head = stream.peek(1 << 16)  # type: ignore[attr-defined]
    check_encoding(file, head)
    return head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[") and not _is_line_of_list(head)


def _is_line_of_list(head: bytes) -> bool:
    """Return True if a first line is a whole list and others follow: lines of lists, which are no rows."""
    line, _, rest = head.partition(b"\n")
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return bool(rest.strip())


def _may_be_invalid(content: bytes) -> bool:
    """Return True if a text may hold a character that no encoding can hold."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return _SURROGATE_ESCAPE.search(content) is not None


def _is_cut(batch: bytes) -> bool:
    """Return True if the first line is the beginning of an object that goes on in the next one."""
    line = batch.lstrip().partition(b"\n")[0].decode("utf-8", "surrogateescape").rstrip()
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line)
    except (ValueError, RecursionError):
        return False
    return False


def _describe(error: ValueError) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno:,} column {error.colno}"
    return f"{error.msg} ({place})"


def _turn_columns(table: dict[str, Any]) -> list[dict[str, Any]]:
    columns = list(table.values())
    if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return [dict(zip(table, values, strict=True)) for values in zip(*columns, strict=True)]
    if columns and all(
        isinstance(column, dict) and column and column.keys() == columns[0].keys() for column in columns
    ):
        return [{name: column[key] for name, column in table.items()} for key in columns[0]]
    return [table]


def _measure_lines(batch: bytes) -> tuple[int, int]:
    """Return the bytes of the longest line, 0 unless each line starts like an object, and the number of lines."""
    if batch.count(b"\n", 0, _SAMPLE_BYTES) * _LONG_LINE_BYTES < _SAMPLE_BYTES:
        return _measure_long_lines(batch)
    content = np.frombuffer(batch, np.uint8)
    ends = np.flatnonzero(content == ord("\n")) + 1
    starts = np.concatenate([[0], ends])
    starts = starts[starts < len(batch)]
    if (content[starts] != ord("{")).any():
        return 0, len(starts)
    return int(np.diff(starts, append=len(batch)).max()), len(starts)


def _measure_long_lines(batch: bytes) -> tuple[int, int]:
    """Return what `_measure_lines` does, with a step for each line: five times as fast where they are long."""
    longest = num_lines = start = 0
    while start < len(batch):
        num_lines += 1
        if batch[start] != ord("{"):
            return 0, num_lines
        end = batch.find(b"\n", start) + 1 or len(batch)
        longest, start = max(longest, end - start), end
    return longest, num_lines


def _parse_with_arrow(batch: bytes, longest: int, text_fields: dict[str, pa.DataType]) -> pa.Table:
    import pyarrow.json as pj

    # Smaller blocks than the batch are parsed in several threads; none may be shorter than a line.
    options = pj.ReadOptions(block_size=max(_BLOCK_BYTES, longest + 1))
    schema = pa.schema(list(text_fields.items())) if text_fields else None
    return pj.read_json(pa.BufferReader(batch), options, pj.ParseOptions(explicit_schema=schema))


def _holds_dates(type: pa.DataType) -> bool:
    return pa.types.is_timestamp(type) or any(_holds_dates(type.field(index).type) for index in range(type.num_fields))


def _without_dates(type: pa.DataType) -> pa.DataType:
    if pa.types.is_timestamp(type):
        return pa.string()
    if pa.types.is_struct(type):
        return pa.struct([(field.name, _without_dates(field.type)) for field in type])
    return pa.list_(_without_dates(type.value_type)) if pa.types.is_list(type) else type


def _is_exact(array: pa.Array, key: str, may_hold_whole: Callable[[str], bool], depth: int) -> bool:
    """Return True if an array that Arrow parsed has the values of `json.loads`, and keys that all objects have.

    Args:
        key: the key before the values; empty for values of a list.
        may_hold_whole: returns True if there may be whole numbers after a key, which became decimals unnoticed.
    """
    if depth > _MAX_ARROW_DEPTH:
        return False
    if pa.types.is_float64(array.type):
        values = array.drop_null().to_numpy(zero_copy_only=False)
        if not (np.abs(values) < _EXACT_FLOAT).all():  # a NaN is no smaller
            return False
        return not (values == np.floor(values)).any() or not may_hold_whole(key)
    if pa.types.is_struct(array.type):
        if not array.type.num_fields or any("\0" in field.name for field in array.type):
            return False
        children = zip(array.type, array.flatten(), strict=True)
        return all(
            child.null_count == array.null_count and _is_exact(child, field.name, may_hold_whole, depth + 1)
            for field, child in children
        )
    return not pa.types.is_list(array.type) or _is_exact(array.flatten(), "", may_hold_whole, depth + 1)


def _may_hold_whole_number(key: str, batch: bytes) -> bool:
    if not key:
        return _INT_IN_LIST.search(batch) is not None
    pattern = re.compile(re.escape(json.dumps(key).encode()) + rb"\s*:\s*-?\d+\s*[,}]")
    return not key.isascii() or pattern.search(batch) is not None
