"""Run one worker process: build the handler, then answer one task after the other until the pipe ends.

`dpgen.workers.pool` starts it as ``python -m dpgen.workers.worker FD PARENT``: its end of the pipe, and the rank's
process id. Everything on the pipe comes from the rank, or goes to it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

from dpgen.lifecycle.parent_death import set_parent_death_signal
from dpgen.workers.messages import encode_message, read_message


def main() -> None:
    """Serve the rank whose pipe and process id the command line names."""
    set_parent_death_signal(signal.SIGKILL, int(sys.argv[2]))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # a batch system signals every process; the rank decides when it ends
    pipe = socket.socket(fileno=int(sys.argv[1]))
    with contextlib.suppress(EOFError, ConnectionError):  # the rank has closed the pool, or is gone
        _serve(pipe)
    os._exit(0)  # Python's own teardown of heavy modules would take longer than a second


def _serve(pipe: socket.socket) -> None:
    stream = pipe.makefile("rb")
    factory, arguments, niceness = read_message(stream)
    os.nice(niceness)
    try:
        handle, info = load_function(factory)(*arguments)
    except Exception as error:  # noqa: BLE001 - the process boundary: everything becomes a message to the rank
        traceback.print_exc()
        pipe.sendall(encode_message((False, _describe(error))))
        return
    pipe.sendall(encode_message((True, info)))
    while True:
        pipe.sendall(encode_message(_answer(handle, read_message(stream))))


def _answer(handle: Callable[[Any], Any], task: Any) -> tuple[bool, Any]:
    try:
        return True, handle(task)
    except Exception as error:  # noqa: BLE001 - foreign code: one bad task costs one task
        return False, _describe(error)


def load_function(name: str) -> Callable[..., Any]:
    """Return the function that ``package.module:name`` names."""
    module, _, attribute = name.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return function


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")


if __name__ == "__main__":
    main()
