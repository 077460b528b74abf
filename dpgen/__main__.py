"""Run dpgen as `python -m dpgen`, as `torchrun -m dpgen`, and as the console script `dpgen`."""

from __future__ import annotations

import os
import sys

from dpgen.cli import main as run_command
from dpgen.log import flush_logging

_STATUS_OF_SIGPIPE = 128 + 13  # what a shell reports of other programs in this place


def main() -> None:
    """End the process with the command's exit status.

    By `os._exit`: everything that must last is synced and closed by now, and the interpreter's own shutdown runs into
    native threads (of torch, gloo, Arrow) that may abort it ("terminate called without an active exception"). A
    complete run must not end with a failure's status.
    """
    try:
        status = run_command(sys.argv[1:])
    except BrokenPipeError:  # the reader of the output has exited, as with `| head`
        os._exit(_STATUS_OF_SIGPIPE)
    try:
        if flush_logging():  # otherwise stderr is not read, and flushing it would block
            sys.stderr.flush()
        sys.stdout.flush()
    finally:  # a flush raises if the reader has exited
        os._exit(status)


if __name__ == "__main__":
    main()
