"""Encode and decode a journal segment, byte by byte.

    segment  = header frame* [index trailer]
    header   = magic (16 bytes), the segment's random id (8)
    frame    = CRC-32 (of all that follows), payload length, row index, flags, payload
    index    = a frame with the index flag, its row field the number of frames, its payload
               id, rows int64[n], lengths uint32[n], flags uint8[n]
    trailer  = mark (8 bytes), offset of the index, CRC-32 of those two

- All numbers are little-endian.
- A segment without index and trailer is being written, or its writer died. Its frames are read one by one, up to the
  first unsound one.
- A segment with index and trailer is sealed: its rows are known without reading a payload. An index counts only if
  its checksum, its id and the sum of its lengths fit the segment.
"""

from __future__ import annotations

import re
import struct
import zlib
from array import array
from dataclasses import dataclass

import numpy as np

MAGIC = b"dpgen journal 2\n"
ID_BYTES = 8
HEADER_BYTES = len(MAGIC) + ID_BYTES
FRAME_HEADER = struct.Struct("<IIqB")  # CRC-32, payload length, row index, flags
_BODY = struct.Struct("<IqB")  # FRAME_HEADER without the CRC-32
TRAILER = struct.Struct("<8sQI")  # mark, offset of the index, CRC-32 of mark and offset
FLAG_ERROR = 1
FLAG_ATTEMPT = 2  # a rejected attempt at a row, which has no result by it
_FLAG_INDEX = 0x80
_CRC_BYTES = 4
_MARK = b"\x89dpgenix"  # not ASCII, so that no payload can end like a trailer
_INDEX_ROW_BYTES = 8 + 4 + 1
_MAX_CANDIDATES = 100_000  # offsets tried as a frame's start in a damaged segment; random bytes hold few candidates
FIRST_FOREIGN_RANK = 90_000
_NAME = re.compile(r"attempt-(\d{4,})-rank-(\d{5,})-part-(\d{4,})\.journal")


def segment_name(attempt: int, rank: int, part: int) -> str:
    """Return the file name of a segment; names sort by attempt, rank and part.

    Two run directories that were apart may hold segments of the same attempt, rank and part. Where they meet, the
    second one gets a rank from `FIRST_FOREIGN_RANK` on: its id, not its name, tells which segment it is.
    """
    return f"attempt-{attempt:04d}-rank-{rank:05d}-part-{part:04d}.journal"


def parse_name(name: str) -> tuple[int, int, int] | None:
    """Return (attempt, rank, part) of a segment's file name; None for any other name."""
    match = _NAME.fullmatch(name)
    return None if match is None else (int(match[1]), int(match[2]), int(match[3]))


def encode_segment_header(segment_id: bytes) -> bytes:
    """Return the bytes that a segment begins with."""
    assert len(segment_id) == ID_BYTES
    return MAGIC + segment_id


def decode_segment_id(header: bytes) -> bytes | None:
    """Return the id of the segment that begins with these bytes; None if they are no header, as in an empty file."""
    if len(header) < HEADER_BYTES or header[: len(MAGIC)] != MAGIC:
        return None
    return header[len(MAGIC) : HEADER_BYTES]


def encode_frame(row: int, flags: int, payload: bytes) -> bytes:
    """Return one frame: checksum, payload length, row, flags and payload."""
    body = _BODY.pack(len(payload), row, flags) + payload
    return zlib.crc32(body).to_bytes(_CRC_BYTES, "little") + body


def decode_payload(frame: bytes, row: int) -> bytes | None:
    """Return the payload of a frame read from the offset that an index gives for `row`; None if it is not sound."""
    checksum, length, frame_row, _ = FRAME_HEADER.unpack_from(frame)
    if frame_row != row or length != len(frame) - FRAME_HEADER.size or zlib.crc32(frame[_CRC_BYTES:]) != checksum:
        return None
    return frame[FRAME_HEADER.size :]


def encode_index(segment_id: bytes, rows: array[int], lengths: array[int], flags: bytes | bytearray, end: int) -> bytes:
    """Return index and trailer of a segment whose frames end at byte `end`."""
    payload = b"".join(
        [
            segment_id,
            np.asarray(rows).astype("<i8").tobytes(),
            np.asarray(lengths).astype("<u4").tobytes(),
            bytes(flags),
        ]
    )
    trailer = struct.pack("<8sQ", _MARK, end)
    return encode_frame(len(rows), _FLAG_INDEX, payload) + trailer + zlib.crc32(trailer).to_bytes(_CRC_BYTES, "little")


@dataclass(frozen=True, eq=False)
class Frames:
    """Describe the frames of one segment in file order, as arrays of one length.

    Attributes:
        row: int64[num_frames], row indices.
        offset: int64[num_frames], where in the file each payload starts.
        length: uint32[num_frames], bytes of each payload.
        error: bool[num_frames], True if the result is an error.
        attempt: bool[num_frames], True if the payload is a rejected attempt and no result; see
            `dpgen.journal.attempts`.
    """

    row: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    error: np.ndarray
    attempt: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    def select(self, keep: np.ndarray) -> Frames:
        return Frames(*(values[keep] for values in (self.row, self.offset, self.length, self.error, self.attempt)))

    @property
    def results(self) -> Frames:
        """Return the frames that are results."""
        return self.select(~self.attempt) if self.attempt.any() else self

    @property
    def attempts(self) -> Frames:
        """Return the frames that are rejected attempts."""
        return self.select(self.attempt)


NO_FRAMES = Frames(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint32), *[np.empty(0, bool)] * 2)


def index_offset(trailer: bytes, size: int) -> int | None:
    """Return where the index of a segment of `size` bytes starts, given its last bytes; None if they are no trailer."""
    if len(trailer) != TRAILER.size:
        return None
    mark, offset, checksum = TRAILER.unpack(trailer)
    if mark != _MARK or checksum != zlib.crc32(trailer[:-_CRC_BYTES]):
        return None
    return int(offset) if HEADER_BYTES <= offset <= size - TRAILER.size - FRAME_HEADER.size else None


def read_index(frame: bytes, start: int, segment_id: bytes) -> Frames | None:
    """Return the frames that an index lists; None unless the index is sound and belongs to this segment.

    Args:
        frame: the whole frame of the index.
        start: its offset in the segment.
    """
    checksum, length, count, flags = FRAME_HEADER.unpack_from(frame)
    payload = memoryview(frame)[FRAME_HEADER.size :]
    if (
        flags != _FLAG_INDEX
        or length != len(payload)
        or length != ID_BYTES + count * _INDEX_ROW_BYTES
        or payload[:ID_BYTES] != segment_id
        or zlib.crc32(memoryview(frame)[_CRC_BYTES:]) != checksum
    ):
        return None
    rows = np.frombuffer(payload, "<i8", count, ID_BYTES)
    lengths = np.frombuffer(payload, "<u4", count, ID_BYTES + 8 * count)
    row_flags = np.frombuffer(payload, np.uint8, count, ID_BYTES + 12 * count)
    if HEADER_BYTES + int(lengths.sum(dtype=np.int64)) + count * FRAME_HEADER.size != start:
        return None
    return _make_contiguous_frames(rows, lengths, row_flags)


def scan_frames(data: bytes) -> tuple[Frames, int]:
    """Return the frames of a segment up to the first unsound frame or the index, and the offset where they end."""
    if data[: len(MAGIC)] != MAGIC or len(data) < HEADER_BYTES:
        return NO_FRAMES, 0
    view, offset, size = memoryview(data), HEADER_BYTES, len(data)
    rows, lengths, all_flags = array("q"), array("I"), bytearray()
    while offset + FRAME_HEADER.size <= size:
        checksum, length, row, flags = FRAME_HEADER.unpack_from(data, offset)
        end = offset + FRAME_HEADER.size + length
        if end > size or zlib.crc32(view[offset + _CRC_BYTES : end]) != checksum or flags & _FLAG_INDEX:
            break
        rows.append(row)
        lengths.append(length)
        all_flags.append(flags)
        offset = end
    frames = _make_contiguous_frames(
        np.array(rows, np.int64), np.array(lengths, np.uint32), np.frombuffer(all_flags, np.uint8)
    )
    return frames, offset


def has_frame_after(data: bytes, offset: int) -> bool:
    """Return True if a sound frame starts after `offset`: then no crash tore the bytes at `offset` off.

    Candidates are offsets with a row index below 2**40 and known flags. A crash leaves zeros, which are no candidates.
    """
    raw = np.frombuffer(data, np.uint8)[offset + 1 :]
    count = len(raw) - FRAME_HEADER.size + 1
    if count <= 0:
        return False
    head = [raw[byte : byte + count] for byte in range(FRAME_HEADER.size)]
    has_small_row = (head[13] | head[14] | head[15]) == 0
    has_known_flags = (head[16] & ~np.uint8(FLAG_ERROR | FLAG_ATTEMPT | _FLAG_INDEX)) == 0
    has_checksum = (head[0] | head[1] | head[2] | head[3]) != 0
    for candidate in np.flatnonzero(has_small_row & has_known_flags & has_checksum)[:_MAX_CANDIDATES]:
        start = offset + 1 + int(candidate)
        checksum, length, _, _ = FRAME_HEADER.unpack_from(data, start)
        end = start + FRAME_HEADER.size + length
        if end <= len(data) and zlib.crc32(memoryview(data)[start + _CRC_BYTES : end]) == checksum:
            return True
    return False


def _make_contiguous_frames(row: np.ndarray, length: np.ndarray, flags: np.ndarray) -> Frames:
    """Return frames that follow each other without gaps after the header."""
    ends = HEADER_BYTES + np.cumsum(length + np.int64(FRAME_HEADER.size))
    is_error, is_attempt = (flags & FLAG_ERROR).astype(bool), (flags & FLAG_ATTEMPT).astype(bool)
    return Frames(row, ends - length, length, is_error, is_attempt)
