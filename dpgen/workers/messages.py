"""Send Python objects over a stream socket, several at once: each is pickled, after the number of its bytes."""

from __future__ import annotations

import pickle
import socket
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

_SIZE = struct.Struct("<Q")
_READ_BYTES = 64 << 10  # malloc maps pages for 128 KiB and more, which takes five times as long as to read an answer


def encode_message(value: Any) -> bytes:
    """Return the bytes of one message. Those of several are sent one after the other."""
    data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    return _SIZE.pack(len(data)) + data


def read_message(stream: BinaryIO) -> Any:
    """Wait for the next message, and return it.

    Args:
        stream: buffered.

    Raises:
        EOFError: there is none any more.
    """
    [size] = _SIZE.unpack(_read_exactly(stream, _SIZE.size))
    return pickle.loads(_read_exactly(stream, size))


def _read_exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


class MessageInbox:
    """Take the messages that have arrived on a socket, without waiting."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._buffer = connection, bytearray()

    def take(self) -> Iterator[Any]:
        """Yield the messages that have arrived as a whole.

        Raises:
            EOFError: the other side has closed its end; its messages came before.
            OSError: as from the socket.
        """
        is_open = self._fill_buffer()
        start = 0
        while len(self._buffer) - start >= _SIZE.size:
            [size] = _SIZE.unpack_from(self._buffer, start)
            end = start + _SIZE.size + size
            if end > len(self._buffer):
                break
            message = pickle.loads(memoryview(self._buffer)[start + _SIZE.size : end])
            start = end
            yield message
        del self._buffer[:start]
        if not is_open:
            raise EOFError

    def _fill_buffer(self) -> bool:
        """Read what has arrived; return False at the end of the stream."""
        while True:
            try:
                data = self._connection.recv(_READ_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return True
            self._buffer += data
            if len(data) < _READ_BYTES:
                return bool(data)
