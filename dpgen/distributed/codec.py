"""Encode the values that ranks send each other, as JSON and raw bytes: decoding a stranger's bytes runs no code.

- Values are None, bool, int, float, str, bytes, lists, and dicts with str keys, nested as needed. A tuple arrives as a
  list. Other types, numbers of numpy included, are the sender's TypeError.
- A message is `_MAGIC`, the length of its head, the head, then all bytes values one after the other.
- The head is JSON in which each object stands for a dict, ``{"d": [[key, value], ...]}``, or for bytes,
  ``{"b": length}``.
"""

from __future__ import annotations

import io
import json
import struct
from typing import Any

from dpgen.errors import DpgenError

_MAGIC = b"dpgen\x00\x01"  # the last byte is the version of this encoding
_PREFIX = struct.Struct(f"<{len(_MAGIC)}sQ")  # magic, length of the head
_SCALARS = {type(None), bool, int, float, str}


class ForeignMessage(DpgenError):
    """Report bytes that came as a rank's message, but were not written by `encode`."""

    def __init__(self) -> None:
        super().__init__(
            "received a message that this version of dpgen did not write, and dropped it unread: a stranger or "
            "another version of dpgen is connected to this job's ports. Start all ranks with the same version, in a "
            "trusted network"
        )


def encode(value: Any) -> bytes:
    """Return the value as bytes for `decode`.

    Raises:
        TypeError: the value is or contains something of another type than those listed above.
    """
    blobs: list[bytes] = []
    head = json.dumps(_to_json(value, blobs), separators=(",", ":")).encode("ascii")
    return b"".join((_PREFIX.pack(_MAGIC, len(head)), head, *blobs))


def decode(data: bytes) -> Any:
    """Return the value from the bytes of `encode`, with lists for tuples.

    Raises:
        ForeignMessage: `encode` did not write these bytes.
    """
    file = io.BytesIO(data)
    try:
        magic, length = _PREFIX.unpack(file.read(_PREFIX.size))
        if magic != _MAGIC:
            raise ForeignMessage
        head = _read_exactly(file, length)
        # Objects are parsed in the order in which they were encoded, so bytes values are read one after the other.
        value = json.loads(head, object_hook=lambda entry: _from_json(entry, file))
        if file.read(1):
            raise ForeignMessage
        return value
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, struct.error):
        raise ForeignMessage from None


def _to_json(value: Any, blobs: list[bytes]) -> Any:
    """Return what stands for the value in the head, and append its bytes values to `blobs`."""
    if type(value) in _SCALARS:
        return value
    if isinstance(value, (list, tuple)):
        if _SCALARS.issuperset(map(type, value)):  # most long lists: a prompt's tokens
            return value
        return [_to_json(entry, blobs) for entry in value]
    if isinstance(value, dict):
        for key in value:
            if type(key) is not str:
                raise TypeError(f"can't send a dict with a key of type {type(key).__name__} to other ranks")
        return {"d": [[key, _to_json(entry, blobs)] for key, entry in value.items()]}
    if isinstance(value, bytes):
        blobs.append(value)
        return {"b": len(value)}
    raise TypeError(f"can't send a value of type {type(value).__name__} to other ranks")


def _from_json(entry: dict[str, Any], file: io.BytesIO) -> Any:
    """Return the dict or bytes value that an object of the head stands for."""
    if "d" in entry:
        return dict(entry["d"])
    return _read_exactly(file, entry["b"])


def _read_exactly(file: io.BytesIO, length: int) -> bytes:
    data = file.read(length)
    if length < 0 or len(data) != length:
        raise ForeignMessage
    return data
