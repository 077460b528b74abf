"""Open input files, compressed or not, and read them in batches of whole lines."""

from __future__ import annotations

import io
import lzma
import os
from collections.abc import Iterator
from typing import BinaryIO, cast

import pyarrow as pa

BATCH_BYTES = 16 << 20  # read at a time; a longer line is read whole
_BUFFER_BYTES = 128 << 10  # more than is looked at before reading; a batch is read past the buffer, not through it
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}  # Arrow's names
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


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
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".xz":
        return cast(BinaryIO, io.BufferedReader(lzma.open(path), BATCH_BYTES))
    if suffix not in _COMPRESSIONS:
        return open(path, "rb", buffering=_BUFFER_BYTES)
    stream = pa.input_stream(path, compression=_COMPRESSIONS[suffix])
    return cast(BinaryIO, io.BufferedReader(stream, BATCH_BYTES))


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
        UnreadableInput: it is UTF-16 or UTF-32, or a pointer of Git LFS.
    """
    if head.startswith(_LFS_POINTER):
        raise UnreadableInput(f"{file} is a pointer of Git LFS, not the data: run `git lfs pull`")
    encodings = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
    encoding = next((name for mark, name in encodings.items() if head.startswith(mark)), None)
    if encoding is None and b"\0" in head[:4]:
        encoding = "UTF-16" if head[:4].count(b"\0") == 2 else "UTF-32"
    if encoding is not None:
        raise UnreadableInput(f"{file}, line 1: {encoding}, not UTF-8. Convert it: iconv -f {encoding} -t UTF-8")
