"""Convert input files to one Arrow file, and describe what was read.

Runs in the rank's process, or as `python -m dpgen.data.reading.conversion` in a process of its own, which may crash.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from dpgen.data.reading.arrow_spool import ArrowSpool
from dpgen.data.reading.columnar import ColumnarReader
from dpgen.data.reading.csv_and_text import TextTableReader
from dpgen.data.reading.json_lines import JsonReader
from dpgen.data.reading.json_types import join_types, makes_decimals
from dpgen.data.reading.source import UnreadableColumns, UnreadableInput, open_file
from dpgen.lifecycle.parent_death import set_parent_death_signal

ARROW_FILE = "rows.arrow"
PLACE_FILE = "place"  # what is being read, for the message if the reader crashes
_SEPARATORS = {"csv": ",", "tsv": "\t", "text": None}
_MIXED = "whole numbers among decimals are read as decimals"


@dataclass
class InputDescription:
    """Describe what was read.

    Attributes:
        num_rows: of each file.
        changed: column → how its values differ from what the files say.
        unreadable: column → why it was left out.
        invalid: row → column → value as JSON text, where a text can't be encoded.
    """

    num_rows: list[int] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
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
        kind: "json", "csv", "tsv", "text", "parquet" or "arrow".
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
    else:
        reader = ColumnarReader(kind, report_place, frozenset(unreadable))
    join_json = _JoinJson()
    spool = ArrowSpool(folder, join_json if kind == "json" else _join_columns)
    for file in files:
        report_place(file)
        num_before = spool.num_rows
        for table in _iter_tables(reader, kind, file):
            spool.add(table)
        description.num_rows.append(spool.num_rows - num_before)
    types = reader.choose_types() if kind in _SEPARATORS else {}
    spool.finish(folder / ARROW_FILE, types)
    if kind == "json":
        description.changed = dict.fromkeys([*reader.mixed_columns, *join_json.mixed_columns], _MIXED)
    elif kind in _SEPARATORS:
        description.changed = reader.describe_changes()
    description.invalid = reader.invalid
    return description


def _iter_tables(reader: Any, kind: str, file: str) -> Iterator[pa.Table]:
    try:
        if kind in ("parquet", "arrow"):
            yield from reader.iter_tables(file)
            return
        with open_file(file) as stream:
            yield from reader.iter_tables(file, stream)
    except (OSError, EOFError, pa.ArrowException, MemoryError) as error:
        lines = str(error).strip().splitlines()
        raise UnreadableInput(f"{file}: {lines[0] if lines else type(error).__name__}") from None


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
    if joined is None or makes_decimals(one, joined) or makes_decimals(other, joined):
        raise UnreadableColumns({name: f"it is {one} in one file and {other} in another"})
    return joined


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
