"""Read values of columns that hold media: what `datasets` stores for one, bytes, paths, URLs, and lists of these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpgen.data.media.parts import MediaKind, MediaPart
from dpgen.errors import RowRefused
from dpgen.formatting import describe_type

_STRUCT_KEYS = ("bytes", "path", "url")


def read_media(kind: MediaKind, column: str, value: Any) -> list[MediaPart]:
    """Return the media of a column's value, in order; a null, and an empty text, is none.

    Args:
        column: for messages.

    Raises:
        RowRefused: `wrong_type`.
    """
    if not isinstance(value, list | tuple):
        medium = read_medium(kind, column, value)
        return [] if medium is None else [medium]
    found = [read_medium(kind, f"{column}, item {index}", item) for index, item in enumerate(value)]
    return [medium for medium in found if medium is not None]


def read_medium(kind: MediaKind, where: str, value: Any) -> MediaPart | None:
    """Return the medium that a value stands for: ``{bytes, path}``, bytes, or a path or URL; None for none.

    Raises:
        RowRefused: `wrong_type`.
    """
    if isinstance(value, Mapping):
        data, source = value.get("bytes"), value.get("path") or value.get("url")
        if data is None and source is None and (unknown := [key for key in value if key not in _STRUCT_KEYS]):
            hint = "; decoded media can't be read, cast the column to its feature" if "array" in unknown else ""
            keys = ", ".join(map(str, unknown))
            raise RowRefused("wrong_type", f"{where} is an object with the keys {keys}, not bytes and path{hint}")
    else:
        is_bytes = isinstance(value, bytes | bytearray | memoryview)
        data, source = (value, None) if is_bytes else (None, value)
    if source is not None and not isinstance(source, str):
        raise RowRefused("wrong_type", f"{where} is {describe_type(source)}, neither {kind} bytes nor a path or URL")
    if data is not None and not isinstance(data, bytes | bytearray | memoryview):
        raise RowRefused("wrong_type", f"{where}: its bytes are {describe_type(data)}")
    if data is None:
        return MediaPart(kind, where, source=source) if source and source.strip() else None
    return MediaPart(kind, where, bytes(data), source or None)
