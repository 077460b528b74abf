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
from dpgen.data.reading.json_types import join_types, makes_decimals
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
            (folder / PLACE_FILE).write_text(place)

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
    join_json = _JoinJson()
    spool = ArrowSpool(folder, join_json if kind == "json" else _join_columns)
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
        description.changed = dict.fromkeys([*reader.mixed_columns, *join_json.mixed_columns], MIXED_NUMBERS)
    else:
        description.changed = _describe_lacking(columns) | reader.describe_changes()
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


class _JoinJson:
    """Join the types of a column of two batches of JSON values, and note the columns that become decimals."""

    def __init__(self) -> None:
        self.mixed_columns: dict[str, None] = {}

    def __call__(self, name: str, one: pa.DataType, other: pa.DataType) -> pa.DataType:
        joined = join_types(one, other)
        if makes_decimals(one, joined) or makes_decimals(other, joined):
            self.mixed_columns[name] = None
        return joined


def _join_columns(name: str, one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Join the types of a column of two Parquet or Arrow files; numbers never become decimals or texts."""
    try:
        schemas = [pa.schema([(name, type)]) for type in (one, other)]
        joined = pa.unify_schemas(schemas, promote_options="permissive").field(name).type
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        joined = None
    is_binary = [type for type in (one, other) if _is_binary(type)]
    if joined is None or len(is_binary) == 1 or makes_decimals(one, joined) or makes_decimals(other, joined):
        raise UnreadableColumns({name: f"it is {one} in one file and {other} in another"})
    return joined


def _is_binary(type: pa.DataType) -> bool:
    is_kind = pa.types
    return bool(is_kind.is_binary(type) or is_kind.is_large_binary(type) or is_kind.is_fixed_size_binary(type))


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
