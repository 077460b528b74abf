"""Share memory between a rank, its workers and its engine, without names in the file system.

- The rank owns each buffer: a file in memory that ends with its last file descriptor and its last mapping. So nothing
  is left over, whoever is killed, and the size of /dev/shm is no limit.
- Others get the address, and open the file through /proc. A number of a file descriptor may be used again: the inode
  tells the files apart.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

from dpgen.errors import DpgenError

_ALIGNMENT = 64  # of each part, as the processor's vector instructions and torch like it
_WORD_BYTES = 8
_GONE = (errno.ENOENT, errno.ENXIO)  # the file descriptor is closed, or a socket has its number
Buffer = bytes | bytearray | memoryview


class BufferAddress(NamedTuple):
    """Name a buffer for another process of the same user on the same host.

    Attributes:
        pid: of the process that owns it.
        fd: its file descriptor there.
        inode: of the file.
    """

    pid: int
    fd: int
    inode: int

    def write(self, parts: Sequence[Buffer]) -> int:
        """Replace the buffer's contents, and return the number of bytes that they take.

        Raises:
            DpgenError: there is no such buffer any more.
        """
        fd = self._open()
        try:
            return _write(fd, parts)
        finally:
            os.close(fd)

    def read(self) -> list[memoryview]:
        """Return the parts of the contents, without copying them.

        The views may be written to, which changes no other process's. They keep the memory as long as they live.

        Raises:
            DpgenError: there is no such buffer any more.
        """
        fd = self._open()
        try:
            view = memoryview(mmap.mmap(fd, 0, access=mmap.ACCESS_COPY))
        finally:
            os.close(fd)
        words = view[: len(view) // _WORD_BYTES * _WORD_BYTES].cast("Q")
        starts, _ = _place(words[1 : 1 + words[0]])
        return [view[start : start + size] for start, size in zip(starts, words[1 : 1 + words[0]], strict=True)]

    def _open(self) -> int:
        try:
            fd = os.open(f"/proc/{self.pid}/fd/{self.fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in _GONE:
                raise DpgenError(f"the memory of process {self.pid} for media is gone") from None
            hint = " (see `ulimit -Hn`)" if error.errno == errno.EMFILE else ""
            reason = f"the memory of process {self.pid} for media can't be opened: {error.strerror}{hint}"
            raise DpgenError(reason) from None
        if os.fstat(fd).st_ino != self.inode:
            os.close(fd)
            raise DpgenError(f"the memory of process {self.pid} for media is gone")
        return fd


class CopiedBuffer(NamedTuple):
    """Hold a copy of a buffer's contents, for an engine on another host."""

    parts: list[memoryview]

    def read(self) -> list[memoryview]:
        """Return the parts of the contents."""
        return self.parts


class BufferMeter:
    """Count the buffers of one owner that are not freed, and their bytes; from any thread."""

    def __init__(self) -> None:
        self.num_buffers = self.num_bytes = 0
        self._lock = threading.RLock()  # a buffer may be freed while another one is counted
        self._buffers = weakref.WeakSet[MediaBuffer]()

    def add(self, num_buffers: int, num_bytes: int) -> None:
        """Add to the counts."""
        with self._lock:
            self.num_buffers += num_buffers
            self.num_bytes += num_bytes

    def watch(self, buffer: MediaBuffer) -> None:
        """Let `free_all` free a buffer."""
        with self._lock:
            self._buffers.add(buffer)

    def free_all(self) -> None:
        """Free all buffers, whoever still has them: objects of a job that has ended may live on."""
        with self._lock:
            for buffer in list(self._buffers):
                buffer.free()


class MediaBuffer:
    """Own a buffer; it is freed with this object, or before, once no other process uses it. Pickled, it is its address.

    Args:
        meter: counts this buffer until it is freed.
    """

    def __init__(self, meter: BufferMeter | None = None) -> None:
        self._fd = os.memfd_create("dpgen-media", os.MFD_CLOEXEC)
        self._meter, self._num_counted = meter or BufferMeter(), 0
        self._meter.add(1, 0)
        self._meter.watch(self)
        self.address = BufferAddress(os.getpid(), self._fd, os.fstat(self._fd).st_ino)

    @property
    def num_bytes(self) -> int:
        return os.fstat(self._fd).st_size

    def write(self, parts: Sequence[Buffer]) -> int:
        """Replace the contents, as `BufferAddress.write`."""
        return _write(self._fd, parts)

    def count(self, num_bytes: int) -> None:
        """Let the meter count as many bytes as the contents have now."""
        self._meter.add(0, num_bytes - self._num_counted)
        self._num_counted = num_bytes

    def leave_meter(self) -> None:
        """Let the meter count this buffer no more: nothing is to wait until it is freed."""
        if hasattr(self, "_num_counted"):
            self._meter.add(-1, -self._num_counted)
            del self._num_counted

    def free(self) -> None:
        """Free the buffer; safe to call twice."""
        if hasattr(self, "_fd"):
            os.close(self._fd)
            del self._fd
        self.leave_meter()

    def __reduce__(self) -> tuple[Any, ...]:
        return BufferAddress, tuple(self.address)

    def __del__(self) -> None:
        self.free()


def _place(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Return where each part begins, and where the last one ends."""
    starts, end = [], _WORD_BYTES * (1 + len(sizes))
    for size in sizes:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        starts.append(start)
        end = start + size
    return starts, end


def _write(fd: int, parts: Sequence[Buffer]) -> int:
    views = [memoryview(part).cast("B") for part in parts]
    sizes = [len(view) for view in views]
    starts, end = _place(sizes)
    os.ftruncate(fd, 0)
    os.ftruncate(fd, end)
    head = b"".join(number.to_bytes(_WORD_BYTES, "little") for number in (len(sizes), *sizes))
    for start, view in zip((0, *starts), (memoryview(head), *views), strict=True):
        written = 0
        while written < len(view):  # one call writes 2 GiB at most
            written += os.pwrite(fd, view[written:], start + written)
    return end
