"""Convert input files to one Arrow file, and describe what was read.

Runs in the rank's process, or as `python -m dpgen.data.reading.conversion` in a process of its own, which may crash.
"""

from __future__ import annotations

import json
import lzma
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from dpgen.data.openai_batch.lines import FORMAT as BATCH_FORMAT
from dpgen.data.openai_batch.reader import RequestLinesReader
from dpgen.data.reading.arrow_spool import ArrowSpool
from dpgen.data.reading.columnar import ColumnarReader
from dpgen.data.reading.csv_and_text import TextTableReader
from dpgen.data.reading.files import list_names
from dpgen.data.reading.json_lines import JsonReader
from dpgen.data.reading.json_types import JSON, fits_json, join_types, makes_decimals
from dpgen.data.reading.python_values import get_item_type
from dpgen.data.reading.source import UnreadableColumns, UnreadableInput, find_disguise, open_file
from dpgen.formatting import format_count
from dpgen.lifecycle.parent_death import set_parent_death_signal

ARROW_FILE = "rows.arrow"
PLACE_FILE = "place"  # what is being read, for the message if the reader crashes
_SEPARATORS = {"csv": ",", "tsv": "\t", "text": None}
MIXED_NUMBERS = "whole numbers among decimals are read as decimals"


@dataclass
class InputDescription:
    """Describe what was read.

    Attributes:
        num_rows: of each file.
        changed: column → how its values differ from what the files say.
        unreadable: column → why it was left out.
        notes: one sentence each about what is not as it should be.
        invalid: row → column → value as JSON text, where a text can't be encoded.
    """

    num_rows: list[int] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    invalid: dict[int, dict[str, str]] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> InputDescription:
        content = json.loads(text)
        return cls(**{**content, "invalid": {int(row): values for row, values in content["invalid"].items()}})


def convert(kind: str, files: Sequence[str], folder: Path, may_crash: bool) -> InputDescription:
    """Write the rows of files of one kind to FOLDER/rows.arrow, and return what was read.

    Args:
        kind: "json", "csv", "tsv", "text", "parquet", "arrow" or "openai_batch".
        may_crash: True if a parser may be used that could crash this process.

    Raises:
        UnreadableInput: names the file, the place in it, and the way out.
        OSError: the folder can't be written.
    """
    unreadable: dict[str, str] = {}
    while True:
        try:
            return _convert(kind, files, folder, may_crash, unreadable)
        except UnreadableColumns as error:
            unreadable |= error.reasons


def _convert(
    kind: str, files: Sequence[str], folder: Path, may_crash: bool, unreadable: dict[str, str]
) -> InputDescription:
    def report_place(place: str) -> None:
        if may_crash:
            (folder / PLACE_FILE).write_bytes(os.fsencode(place))

    description = InputDescription(unreadable=dict(unreadable))
    reader: Any
    if kind == "json":
        reader = JsonReader(report_place, uses_arrow=may_crash)
    elif kind in _SEPARATORS:
        reader = TextTableReader(_SEPARATORS[kind])
    elif kind == BATCH_FORMAT:
        reader = RequestLinesReader()
    else:
        reader = ColumnarReader(kind, report_place, frozenset(unreadable))
    joiner = _JsonJoiner() if kind == "json" else _ColumnJoiner()
    spool = ArrowSpool(folder, joiner)
    columns: dict[str, set[str]] = {}  # of each file with rows
    for file in files:
        report_place(file)
        num_before = spool.num_rows
        for table in _iter_tables(reader, kind, file):
            spool.add(table)
            if table.num_rows:
                columns.setdefault(file, set()).update(table.column_names)
        description.num_rows.append(spool.num_rows - num_before)
    types = reader.choose_types() if kind in _SEPARATORS else {}
    schema = spool.finish(folder / ARROW_FILE, types)
    if unreadable and not schema.names:
        raise UnreadableInput(f"no column can be read: {'; '.join(unreadable.values())}")
    if kind == "json":
        description.changed = dict.fromkeys(reader.mixed_columns, MIXED_NUMBERS) | joiner.changed
    else:
        description.changed = _merge(_describe_lacking(columns), reader.describe_changes(), joiner.changed)
    description.notes, description.invalid = [*_describe_names(files), *reader.notes], reader.invalid
    return description


def _describe_names(files: Sequence[str]) -> Iterator[str]:
    """Yield what the files' names tell and their rows don't: files read twice, and values in folders' names."""
    counts = Counter(map(os.path.realpath, files))
    if repeated := [file for file, count in counts.items() if count > 1]:
        yield f"read more than once: {list_names(repeated)}"
    parts = [set(Path(file).parent.parts) for file in files]
    values = set().union(*parts) - set(parts[0]).intersection(*parts)
    if values := {part for part in values if re.fullmatch(r"[A-Za-z_]\w*=.*", part)}:
        yield f"the names of folders are no columns: {list_names(sorted(values))}"


def _describe_lacking(columns: dict[str, set[str]]) -> dict[str, str]:
    """Return column → which files lack it, where others have it."""
    lacking: dict[str, list[str]] = {}
    for name in sorted(set().union(*columns.values())):
        if files := [file for file, names in columns.items() if name not in names]:
            lacking[name] = files
    return {
        name: f"null in {format_count(len(files), 'file')} without it ({list_names(files)})"
        for name, files in lacking.items()
    }


def _merge(*changes: dict[str, str]) -> dict[str, str]:
    """Return column → all that changes in it."""
    names = dict.fromkeys(name for some in changes for name in some)
    return {name: ", ".join(some[name] for some in changes if name in some) for name in names}


def _iter_tables(reader: Any, kind: str, file: str) -> Iterator[pa.Table]:
    try:
        if kind in ("parquet", "arrow"):
            yield from reader.iter_tables(file)
            return
        with open_file(file) as stream:
            yield from reader.iter_tables(file, stream)
    except (OSError, EOFError, lzma.LZMAError, pa.ArrowException, MemoryError) as error:
        lines = str(error).strip().splitlines()
        reason = find_disguise(file) or (lines[0] if lines else type(error).__name__)
        raise UnreadableInput(f"{file}: {reason}") from None


class _JsonJoiner:
    """Join the types of a column of two batches of JSON values.

    Attributes:
        changed: columns whose whole numbers become decimals.
    """

    def __init__(self) -> None:
        self.changed: dict[str, str] = {}

    def join(self, name: str, one: pa.DataType, other: pa.DataType) -> pa.DataType:
        joined = join_types(one, other)
        if makes_decimals(one, joined) or makes_decimals(other, joined):
            self.changed[name] = MIXED_NUMBERS
        return joined

    def join_misfits(self, name: str, one: pa.DataType, other: pa.DataType) -> pa.DataType:
        return JSON


class _ColumnJoiner:
    """Join the types of a column of two Parquet or Arrow files. Where a value would become another one, raise.

    Attributes:
        changed: column → how values of the same worth look in the joined type.
    """

    def __init__(self) -> None:
        self.changed: dict[str, str] = {}

    def join(self, name: str, one: pa.DataType, other: pa.DataType) -> pa.DataType:
        if one.equals(other):
            return one
        if isinstance(one, pa.JsonType) or isinstance(other, pa.JsonType):
            return self.join_misfits(name, one, other)
        try:
            schemas = [pa.schema([(name, type)]) for type in (one, other)]
            joined = pa.unify_schemas(schemas, promote_options="permissive").field(name).type
            changes = [*_iter_changes(one, joined), *_iter_changes(other, joined)]
        except (pa.ArrowTypeError, pa.ArrowInvalid, KeyError):  # the last where an object has two keys of one name
            raise _make_join_error(name, one, other) from None
        if changes:
            self.changed[name] = changes[0]
        return joined

    def join_misfits(self, name: str, one: pa.DataType, other: pa.DataType) -> pa.DataType:
        """Return JSON, which holds integers of 64 bits with a sign and those without one."""
        if not (fits_json(one) and fits_json(other)):
            raise _make_join_error(name, one, other)
        return JSON


def _make_join_error(name: str, one: pa.DataType, other: pa.DataType) -> UnreadableColumns:
    return UnreadableColumns({name: f"it is {one} in one file and {other} in another"})


def _iter_changes(before: pa.DataType, after: pa.DataType) -> Iterator[str]:
    """Yield how values look in a wider type, where their text is another one.

    Raises:
        pyarrow.ArrowTypeError: they become other values, such as a decimal a float, or a text bytes.
    """
    if before.equals(after) or pa.types.is_null(before):
        return
    item_type = get_item_type(before)
    if item_type is not None:
        yield from _iter_changes(item_type, get_item_type(after))
    elif pa.types.is_struct(before):
        if lacking := [field.name for field in after if before.get_field_index(field.name) < 0]:
            yield f"null for the keys that objects of some files lack ({list_names(lacking)})"
        for field in before:
            yield from _iter_changes(field.type, after.field(field.name).type)
    elif not any(is_kind(before) and is_kind(after) for is_kind in _KINDS):
        raise pa.ArrowTypeError(f"{before} becomes {after}")
    elif pa.types.is_decimal(before) and before.scale != after.scale:
        yield f"decimals are read with {format_count(after.scale, 'digit')} after the point, as some files have them"


def _is_text(type: pa.DataType) -> bool:
    return bool(pa.types.is_string(type) or pa.types.is_large_string(type))


def _is_binary(type: pa.DataType) -> bool:
    is_kind = pa.types
    return bool(is_kind.is_binary(type) or is_kind.is_large_binary(type) or is_kind.is_fixed_size_binary(type))


def _is_span_of_python(type: pa.DataType) -> bool:
    """Return True for durations of `datetime.timedelta`; pandas' own, in nanoseconds, are written in another way."""
    return bool(pa.types.is_duration(type) and type.unit != "ns")


def _is_time_of_python(type: pa.DataType) -> bool:
    """Return True for times of day that `to_python_values` does not turn into texts."""
    return bool(pa.types.is_time(type) and type.unit != "ns")


# Within each of them, a wider type holds the same values.
_KINDS = (
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_date,
    pa.types.is_timestamp,
    _is_time_of_python,
    _is_span_of_python,
    _is_text,
    _is_binary,
)


def main(run: Callable[..., InputDescription] = convert) -> int:
    """Convert what a JSON object on stdin asks for; print the description, or the error, as a JSON object."""
    request = json.loads(sys.stdin.read())
    set_parent_death_signal(signal.SIGKILL, request["parent"])
    try:
        description = run(request["kind"], request["files"], Path(request["folder"]), may_crash=True)
    except UnreadableInput as error:
        print(json.dumps({"unreadable": str(error)}))
    except OSError as error:
        print(json.dumps({"errno": error.errno, "strerror": error.strerror or str(error)}))
    else:
        print(json.dumps({"description": description.to_json()}))
    sys.stdout.flush()
    os._exit(0)  # Arrow's threads may take long to end


if __name__ == "__main__":
    main()
