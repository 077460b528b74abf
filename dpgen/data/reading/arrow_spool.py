"""Write tables, whose types may widen from one to the next, into one Arrow file of one schema.

Tables are written as they come. Where a later table widens a column's type, the earlier ones are rewritten at the end,
from the disk, a batch at a time: memory holds one batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from dpgen.data.reading.json_types import convert_array
from dpgen.data.reading.source import BATCH_BYTES


class TypeJoiner(Protocol):
    """Interface of what chooses the type for a column's values of two types, given the column's name."""

    def join(self, name: str, one: pa.DataType, other: pa.DataType) -> pa.DataType:
        """Return a type that should hold the values of both."""
        ...

    def join_misfits(self, name: str, one: pa.DataType, other: pa.DataType) -> pa.DataType:
        """Return a type that holds them all, where a value of type `one` did not fit in type `other`."""
        ...


class ArrowSpool:
    """Collect tables in a folder; `finish` makes one Arrow file of them.

    Args:
        joiner: may raise where there is no such type; so do `add` and `finish` then.
    """

    def __init__(self, folder: Path, joiner: TypeJoiner) -> None:
        self._folder, self._joiner = folder, joiner
        self._schema: pa.Schema | None = None
        self._segments: list[tuple[Path, pa.Schema]] = []
        self._writer: pa.RecordBatchStreamWriter | None = None
        self.num_rows = 0

    def add(self, table: pa.Table) -> None:
        """Append the rows of a table."""
        schema = self._widen(table.schema)
        while True:
            try:
                table = _conform(table, schema)
                break
            except _Misfit as misfit:
                schema = self._join_misfits(schema, misfit)
        if self._writer is None or not schema.equals(self._schema, check_metadata=True):
            self._open_segment(schema)
        self.num_rows += table.num_rows
        _write(self._writer, table)

    def finish(self, path: Path, types: Mapping[str, pa.DataType]) -> pa.Schema:
        """Write all rows to `path`, and return their schema.

        Args:
            types: column → its final type, where this is not the type that the tables came with.
        """
        self._close_segment()
        schema = pa.schema([]) if self._schema is None else self._schema
        if types:  # all at once: a change of one field copies the schema
            fields = [pa.field(field.name, types[field.name]) if field.name in types else field for field in schema]
            schema = pa.schema(fields, metadata=schema.metadata)
        if len(self._segments) == 1 and self._segments[0][1].equals(schema, check_metadata=True):
            os.rename(self._segments[0][0], path)
            return schema
        while True:
            try:
                self._rewrite(path, schema)
                return schema
            except _Misfit as misfit:
                schema = self._join_misfits(schema, misfit)

    def _widen(self, new: pa.Schema) -> pa.Schema:
        if self._schema is None:
            return new
        fields = {field.name: field for field in self._schema}
        for field in new:
            old = fields.get(field.name)
            type = field.type if old is None else self._joiner.join(field.name, old.type, field.type)
            fields[field.name] = old if old is not None and old.type.equals(type) else pa.field(field.name, type)
        schema = pa.schema(list(fields.values()), metadata=self._schema.metadata)
        # The metadata holds the types of `datasets`, which are no longer those of the schema.
        return schema if schema.equals(self._schema) else schema.remove_metadata()

    def _join_misfits(self, schema: pa.Schema, misfit: _Misfit) -> pa.Schema:
        type = self._joiner.join_misfits(misfit.column, misfit.type, schema.field(misfit.column).type)
        return schema.set(schema.get_field_index(misfit.column), pa.field(misfit.column, type))

    def _open_segment(self, schema: pa.Schema) -> None:
        self._close_segment()
        path = self._folder / f"segment-{len(self._segments)}.arrow"
        self._segments.append((path, schema))
        self._schema = schema
        self._writer = pa.ipc.new_stream(str(path), schema)

    def _close_segment(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _rewrite(self, path: Path, schema: pa.Schema) -> None:
        with pa.ipc.new_stream(str(path), schema) as writer:
            for table in self._read_segments():
                _write(writer, _conform(table, schema))
        for segment, _ in self._segments:
            with suppress(OSError):
                segment.unlink()

    def _read_segments(self) -> Iterator[pa.Table]:
        for path, _ in self._segments:
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
                for batch in reader:
                    yield pa.Table.from_batches([batch])


class _Misfit(Exception):
    def __init__(self, column: str, type: pa.DataType) -> None:
        self.column, self.type = column, type


def _conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return a table with the columns and types of a schema; a column that it lacks is null."""
    if table.schema.equals(schema, check_metadata=True):
        return table
    given = dict(zip(table.column_names, table.columns, strict=True))
    columns = []
    for field in schema:
        column = given.get(field.name)
        if column is None:
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        try:
            columns.append(column if column.type.equals(field.type) else convert_array(column, field.type))
        except (pa.ArrowInvalid, OverflowError):
            raise _Misfit(field.name, column.type) from None
    return pa.table(columns, schema=schema)


def _write(writer: pa.RecordBatchStreamWriter, table: pa.Table) -> None:
    """Write a table in batches of bounded bytes, so that a reader of one needs little memory."""
    for batch in table.to_batches():
        num_parts = min(max(1, -(-batch.nbytes // BATCH_BYTES)), max(1, batch.num_rows))
        num_rows = -(-batch.num_rows // num_parts)
        for start in range(0, batch.num_rows, max(1, num_rows)):
            writer.write_batch(batch.slice(start, num_rows))
