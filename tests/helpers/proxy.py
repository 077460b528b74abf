"""Forward TCP connections to a port of this machine until they are cut, as where a network between hosts fails."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any


class Proxy:
    """Forward connections to `target_port` on the loopback, from a free port, until the end of the block."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: list[socket.socket] = []
        self._is_cut = False
        self.port = int(self._listener.getsockname()[1])

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.cut()

    def cut(self) -> None:
        """Close all connections, and accept no more."""
        self._is_cut = True
        for connection in [self._listener, *self._connections]:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _serve(self) -> None:
        while not self._is_cut:
            with contextlib.suppress(OSError):
                client, _ = self._listener.accept()
                try:
                    target = socket.create_connection(("127.0.0.1", self._target_port))
                except OSError:
                    client.close()  # rank 0 does not listen yet: the client tries again
                    continue
                self._connections += [client, target]
                for source, sink in ((client, target), (target, client)):
                    threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    @staticmethod
    def _forward(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(1 << 16):
                sink.sendall(chunk)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
