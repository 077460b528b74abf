"""A journal segment, byte by byte.

    segment  = header frame* [index trailer]
    header   = magic (16 bytes), the segment's random id (8)
    frame    = CRC-32 (of all that follows), payload length, row index, flags, payload
    index    = a frame whose flags say so, its row field the number of frames, its payload
               id, rows int64[n], lengths uint32[n], flags uint8[n]
    trailer  = mark (8 bytes), where the index begins, CRC-32 of those two

All little-endian. A segment without index and trailer is one that is being written, or whose writer died: its frames
are read one by one, up to the first that isn't sound. With them it is sealed: which rows it holds is known without
reading a payload. An index counts only if its checksum, its id and the sum of its lengths fit the segment.
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
_BODY = struct.Struct("<IqB")  # the same after its checksum
TRAILER = struct.Struct("<8sQI")  # mark, offset of the index, CRC-32 of those two
FLAG_ERROR = 1
_FLAG_INDEX = 0x80
_CRC_BYTES = 4
_MARK = b"\x89dpgenix"  # not ASCII, so no payload ends like it
_INDEX_ROW_BYTES = 8 + 4 + 1
_MAX_CANDIDATES = 100_000  # places tried as a frame's start in a damaged segment; random bytes hold few
_NAME = re.compile(r"attempt-(\d{4,})-rank-(\d{5,})-part-(\d{4,})\.journal")


def segment_name(attempt: int, rank: int, part: int) -> str:
    return f"attempt-{attempt:04d}-rank-{rank:05d}-part-{part:04d}.journal"


def parse_name(name: str) -> tuple[int, int, int] | None:
    """(attempt, rank, part); None if it is no segment's name."""
    match = _NAME.fullmatch(name)
    return None if match is None else (int(match[1]), int(match[2]), int(match[3]))


def encode_segment_header(segment_id: bytes) -> bytes:
    assert len(segment_id) == ID_BYTES
    return MAGIC + segment_id


def encode_frame(row: int, flags: int, payload: bytes) -> bytes:
    body = _BODY.pack(len(payload), row, flags) + payload
    return zlib.crc32(body).to_bytes(_CRC_BYTES, "little") + body


def decode_payload(found: bytes, row: int) -> bytes | None:
    """The payload of a frame read from where an index says that `row` has one; None if it isn't sound."""
    checksum, length, its_row, _ = FRAME_HEADER.unpack_from(found)
    if its_row != row or length != len(found) - FRAME_HEADER.size or zlib.crc32(found[_CRC_BYTES:]) != checksum:
        return None
    return found[FRAME_HEADER.size :]


def encode_index(segment_id: bytes, rows: array[int], lengths: array[int], flags: bytes | bytearray, end: int) -> bytes:
    """Index and trailer of a segment whose frames end at byte `end`."""
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
    """The frames of one segment, in the order they stand: arrays of one length.

    Attributes:
        row: int64. length: uint32, of the payload. error: bool.
        offset: int64: where the payload starts.
    """

    row: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    error: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    def select(self, keep: np.ndarray) -> Frames:
        return Frames(self.row[keep], self.offset[keep], self.length[keep], self.error[keep])


NO_FRAMES = Frames(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint32), np.empty(0, bool))


def _contiguous(row: np.ndarray, length: np.ndarray, flags: np.ndarray) -> Frames:
    """Frames that follow each other from the header on."""
    ends = HEADER_BYTES + np.cumsum(length + np.int64(FRAME_HEADER.size))
    return Frames(row, ends - length, length, (flags & FLAG_ERROR).astype(bool))


def index_offset(trailer: bytes, size: int) -> int | None:
    """Where the index of a segment of `size` bytes starts, from its last bytes; None if they are no trailer."""
    if len(trailer) != TRAILER.size:
        return None
    mark, offset, checksum = TRAILER.unpack(trailer)
    if mark != _MARK or checksum != zlib.crc32(trailer[:-_CRC_BYTES]):
        return None
    return int(offset) if HEADER_BYTES <= offset <= size - TRAILER.size - FRAME_HEADER.size else None


def read_index(found: bytes, start: int, segment_id: bytes) -> Frames | None:
    """The frames that an index lists; None unless it is sound, and of this segment.

    Args:
        found: the index's frame, all of it.
        start: where in the segment it begins.
    """
    checksum, length, count, flags = FRAME_HEADER.unpack_from(found)
    payload = memoryview(found)[FRAME_HEADER.size :]
    if (
        flags != _FLAG_INDEX
        or length != len(payload)
        or length != ID_BYTES + count * _INDEX_ROW_BYTES
        or payload[:ID_BYTES] != segment_id
        or zlib.crc32(memoryview(found)[_CRC_BYTES:]) != checksum
    ):
        return None
    rows = np.frombuffer(payload, "<i8", count, ID_BYTES)
    lengths = np.frombuffer(payload, "<u4", count, ID_BYTES + 8 * count)
    its_flags = np.frombuffer(payload, np.uint8, count, ID_BYTES + 12 * count)
    if HEADER_BYTES + int(lengths.sum(dtype=np.int64)) + count * FRAME_HEADER.size != start:
        return None
    return _contiguous(rows, lengths, its_flags)


def scan_frames(data: bytes) -> tuple[Frames, int]:
    """The frames of a segment up to the first that isn't sound (an index ends them, too), and where they end."""
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
    found = _contiguous(np.array(rows, np.int64), np.array(lengths, np.uint32), np.frombuffer(all_flags, np.uint8))
    return found, offset


def has_frame_after(data: bytes, offset: int) -> bool:
    """Whether a sound frame begins somewhere after `offset`: then what is unsound there was not torn off by a crash.

    Candidates are places where a row below 2**40 and known flags could stand; a crash leaves zeros, which are none.
    """
    raw = np.frombuffer(data, np.uint8)[offset + 1 :]
    count = len(raw) - FRAME_HEADER.size + 1
    if count <= 0:
        return False
    head = [raw[place : place + count] for place in range(FRAME_HEADER.size)]
    small_row = (head[13] | head[14] | head[15]) == 0
    known_flags = (head[16] & ~np.uint8(FLAG_ERROR | _FLAG_INDEX)) == 0
    summed = (head[0] | head[1] | head[2] | head[3]) != 0
    for start in np.flatnonzero(small_row & known_flags & summed)[:_MAX_CANDIDATES]:
        begin = offset + 1 + int(start)
        checksum, length, _, _ = FRAME_HEADER.unpack_from(data, begin)
        end = begin + FRAME_HEADER.size + length
        if end <= len(data) and zlib.crc32(memoryview(data)[begin + _CRC_BYTES : end]) == checksum:
            return True
    return False
