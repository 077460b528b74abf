"""Tests of the memory that a rank shares with its workers and its engine."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import socket

import pytest

from dpgen.engine.media.buffers import BufferAddress, BufferMeter, MediaBuffer
from dpgen.errors import DpgenError


def _is_open(inode: int) -> bool:
    """Return True if a file descriptor of this process is open for a file."""
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.stat(f"/proc/self/fd/{fd}").st_ino == inode:
                return True
    return False


def test_what_is_written_is_read_by_address_and_aligned() -> None:
    buffer, parts = MediaBuffer(), [b"head", b"", bytes(range(200)), b"x" * 70]
    num_bytes = buffer.address.write(parts)
    read = pickle.loads(pickle.dumps(buffer)).read()
    assert [bytes(part) for part in read] == parts
    assert num_bytes == buffer.num_bytes
    before = read[2].tobytes()
    read[2][0] = 9
    assert buffer.address.read()[2].tobytes() == before, "a reader's writing must not change what others read"


def test_memory_is_written_anew_by_a_worker() -> None:
    buffer = MediaBuffer()
    buffer.write([b"the prompt" * 100])
    buffer.address.write([b"pixels"])
    assert [bytes(part) for part in buffer.address.read()] == [b"pixels"]


def test_a_dropped_buffer_leaves_nothing_open_and_its_address_is_no_other_buffer() -> None:
    buffer = MediaBuffer()
    buffer.write([b"one"])
    address, view = buffer.address, buffer.address.read()
    del buffer
    gc.collect()
    assert bytes(view[0]) == b"one", "the engine still has what it maps"
    del view
    gc.collect()
    assert not _is_open(address.inode)
    with pytest.raises(DpgenError, match="is gone"):
        address.read()
    others, ends = [MediaBuffer() for _ in range(8)], socket.socketpair()
    for fd in (others[0].address.fd, ends[0].fileno()):  # another file has the number now
        with pytest.raises(DpgenError, match="is gone"):
            address._replace(fd=fd).read()
    for end in ends:
        end.close()


def test_a_meter_frees_its_buffers_also_those_that_somebody_still_has_and_counts_each_once() -> None:
    meter = BufferMeter()
    kept, aside = [MediaBuffer(meter), MediaBuffer(meter)], MediaBuffer(meter)
    for buffer in (*kept, aside):
        buffer.count(buffer.write([b"pixels"]))
    aside.leave_meter()
    assert (meter.num_buffers, meter.num_bytes) == (2, 2 * kept[0].num_bytes)
    inodes = [buffer.address.inode for buffer in (*kept, aside)]
    del kept[1]
    gc.collect()
    assert meter.num_buffers == 1
    meter.free_all()
    assert not any(map(_is_open, inodes)) and (meter.num_buffers, meter.num_bytes) == (0, 0)
    del kept, aside
    gc.collect()
    assert (meter.num_buffers, meter.num_bytes) == (0, 0)


def test_a_buffer_of_a_process_that_has_ended_is_an_error() -> None:
    with pytest.raises(DpgenError, match="is gone"):
        BufferAddress(2**22 + 1, 3, 1).read()
