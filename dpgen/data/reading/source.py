"""Open input files, compressed or not, and read them in batches of whole lines."""

from __future__ import annotations

import io
import lzma
import os
import re
from collections.abc import Iterator
from typing import BinaryIO, cast

import pyarrow as pa

BATCH_BYTES = 16 << 20  # read at a time; a longer line is read whole
_BUFFER_BYTES = 128 << 10  # more than is looked at before reading; a batch is read past the buffer, not through it
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}  # Arrow's names
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# Which of a text's first four bytes are zero → its encoding, where no mark says it.
_WIDE_ENCODINGS: dict[tuple[bool, ...], str] = {
    (False, True, False, True): "UTF-16LE",
    (True, False, True, False): "UTF-16BE",
    (False, True, True, True): "UTF-32LE",
    (True, True, True, False): "UTF-32BE",
}
# First bytes → what a file is then, whatever its name says.
_SIGNATURES = {
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"\xfd7zXZ\0": ".xz",
    b"\x04\x22\x4d\x18": ".lz4",
    b"PK\3\4": ".zip",
    b"ARROW1\0\0": ".arrow",
    b"PAR1\x15": ".parquet",
} | {f"BZh{level}1AY&SY".encode(): ".bz2" for level in range(1, 10)}


class UnreadableInput(Exception):
    """A file that can't be read; the message names the file, the line or row group, and the way out."""


class UnreadableColumns(Exception):
    """Columns that can't be read where others can.

    Attributes:
        reasons: column → why, with the file.
    """

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons


def open_file(path: str) -> BinaryIO:
    """Open a file for reading, decompressed as its suffix says.

    Raises:
        OSError: it can't be opened.
        UnreadableInput: it is empty, though compressed.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix in (*_COMPRESSIONS, ".xz") and not os.path.getsize(path):
        raise UnreadableInput(f"{path} has 0 bytes, and the smallest {suffix} file has more. Was it cut short?")
    if suffix == ".xz":
        return cast(BinaryIO, io.BufferedReader(lzma.open(path), BATCH_BYTES))
    if suffix not in _COMPRESSIONS:
        return open(path, "rb", buffering=_BUFFER_BYTES)
    stream = pa.input_stream(pa.OSFile(os.fsencode(path)), compression=_COMPRESSIONS[suffix])
    return cast(BinaryIO, io.BufferedReader(stream, BATCH_BYTES))


def find_disguise(path: str) -> str | None:
    """Return what a file is, where its first bytes show that it isn't what its suffix says; None if they don't."""
    with open(path, "rb") as stream:
        head = stream.read(64)
    if head.startswith(_LFS_POINTER):
        return "it is a pointer of Git LFS, not the data: run `git lfs pull`"
    suffix = os.path.splitext(path)[1].lower()
    actual = next((name for signature, name in _SIGNATURES.items() if head.startswith(signature)), None)
    if actual not in (None, suffix):
        advice = "unpack it" if actual == ".zip" else f"let its name end in {actual}"
        return f"its content is that of a {actual} file: {advice}"
    if suffix in (*_COMPRESSIONS, ".xz") and actual is None and re.match(rb"(?!BZh)[ -~\s]{2}", head):
        return f"it is not compressed: let its name not end in {suffix}"
    return None


def iter_line_batches(stream: BinaryIO) -> Iterator[bytes]:
    """Yield a file's lines, some 16 MB of them at a time, without a byte order mark."""
    is_first = True
    while True:
        batch = bytearray(BATCH_BYTES + _BUFFER_BYTES)  # room for the rest of a line, which then moves no batch
        num_bytes = stream.readinto(memoryview(batch)[:BATCH_BYTES])  # type: ignore[attr-defined]
        if not num_bytes:
            return
        rest = b"" if batch[num_bytes - 1] == ord("\n") else stream.readline()
        batch[num_bytes:] = rest
        if is_first:
            batch, is_first = batch.removeprefix(b"\xef\xbb\xbf"), False
        yield batch  # type: ignore[misc]  # not copied to bytes only for its type: nobody changes or hashes it


def check_encoding(file: str, head: bytes) -> None:
    """Check that a text file's first bytes look like UTF-8.

    Raises:
        UnreadableInput: it is UTF-16 or UTF-32, or another kind of file.
    """
    if (disguise := find_disguise(file)) is not None:
        raise UnreadableInput(f"{file}: {disguise}")
    encodings = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
    encoding = next((name for mark, name in encodings.items() if head.startswith(mark)), None)
    if encoding is None:
        encoding = _WIDE_ENCODINGS.get(tuple(byte == 0 for byte in head[:4]))
    if encoding is not None:
        raise UnreadableInput(f"{file}, line 1: {encoding}, not UTF-8. Convert it: iconv -f {encoding} -t UTF-8")
