"""Hash the contents of rows, whatever the files, batches and chunks they come in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpgen.data.reading.columnar import to_known_type

VERSION = 2  # of `hash_rows`; version 1 is `hash_rows_of_version_1`, and named in no run.json


def hash_rows(tables: Iterable[pa.Table]) -> str:
    """Return a hash of the rows of tables of one schema.

    Each column has streams of its own: which values are null, the lengths of texts and lists, and the contents. So the
    hash doesn't depend on where a table ends, and nothing is copied for it.
    """
    streams: dict[str, hashlib.blake2b] = {}
    for table in tables:
        for name, column in zip(table.column_names, table.columns, strict=True):
            for chunk in to_known_type(column).chunks:
                for path, content in _iter_parts(name, chunk):
                    streams.setdefault(path, hashlib.blake2b(digest_size=16)).update(content)
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(streams):
        digest.update(path.encode() + b"\0" + streams[path].digest())
    return digest.hexdigest()


def hash_rows_of_version_1(tables: Iterable[pa.Table], num_rows: int) -> str:
    """Return the hash that older versions wrote to run.json.

    Args:
        tables: of 10,000 rows each.
        num_rows: of the first rows only.
    """
    digest = hashlib.blake2b(digest_size=16)
    num_hashed = 0
    for table in tables:
        if num_hashed >= num_rows:
            break
        digest.update(_to_bytes_of_version_1(table.slice(0, num_rows - num_hashed)))
        num_hashed += table.num_rows
    return digest.hexdigest()


def _iter_parts(path: str, array: pa.Array) -> Iterator[tuple[str, memoryview | bytes]]:
    """Yield the contents of an array, by the name of their stream."""
    type = array.type
    if isinstance(array, pa.ExtensionArray):
        yield from _iter_parts(path, array.storage)
        return
    yield f"{path} null", _to_bytes(array.is_null())
    if array.null_count:
        array = array.drop_null()
    if pa.types.is_struct(type):
        for field, child in zip(type, array.flatten(), strict=True):
            yield from _iter_parts(f"{path}.{field.name}", child)
    elif pa.types.is_nested(type):
        yield f"{path} length", _to_bytes(pc.list_value_length(array))
        yield from _iter_parts(f"{path}[]", array.flatten())
    elif pa.types.is_boolean(type):
        yield f"{path} bool", _to_bytes(array)
    elif pa.types.is_string(type) or pa.types.is_large_string(type) or _is_binary(type):
        yield f"{path} length", _to_bytes(pc.binary_length(array).cast(pa.int64()))
        yield f"{path} bytes", _get_text_bytes(array)
    elif pa.types.is_null(type):
        return
    else:
        width = type.bit_width // 8
        buffer = array.buffers()[1]
        content = memoryview(buffer or b"")[array.offset * width : (array.offset + len(array)) * width]
        yield f"{path} {type}", content


def _is_binary(type: pa.DataType) -> bool:
    return bool(pa.types.is_binary(type) or pa.types.is_large_binary(type))


def _to_bytes(array: pa.Array) -> bytes:
    return np.ascontiguousarray(array.to_numpy(zero_copy_only=False)).tobytes()


def _get_text_bytes(array: pa.Array) -> memoryview:
    if not len(array):
        return memoryview(b"")
    is_large = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    _, offsets, content = array.buffers()
    offset_type = np.int64 if is_large else np.int32
    positions = np.frombuffer(offsets, offset_type)[array.offset : array.offset + len(array) + 1]
    return memoryview(content or b"")[int(positions[0]) : int(positions[-1])]


def _to_bytes_of_version_1(table: pa.Table) -> bytes:
    """Return a table's content as bytes that depend neither on its Arrow chunks nor on the rows around it."""
    sink = pa.BufferOutputStream()
    # Taken, not sliced: a slice's bitmaps end with bits of the rows that follow, e.g. those beyond `data.limit`.
    bare = table.take(np.arange(table.num_rows)).combine_chunks().replace_schema_metadata(None)
    with pa.ipc.new_stream(sink, bare.schema) as writer:
        writer.write_table(bare)
    return bytes(sink.getvalue())
