"""Run dpgen as `python -m dpgen`, as `torchrun -m dpgen`, and as the console script `dpgen`."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

_STATUS_OF_SIGINT, _STATUS_OF_SIGPIPE = 128 + 2, 128 + 13  # what a shell reports of other programs in this place
_EXIT_RESUMABLE = 75  # as in `dpgen.errors`, which is not imported yet
_RESUMABLE_COMMANDS = ("run", "run-batch", "tune")


def main() -> None:
    """End the process with the command's exit status.

    By `os._exit`: everything that must last is synced and closed by now, and the interpreter's own shutdown runs into
    native threads (of torch, gloo, Arrow) that may abort it ("terminate called without an active exception"). A
    complete run must not end with a failure's status. Ctrl-C ends a command that leaves nothing to resume by the signal
    itself, as other programs: a shell ends the loop that it runs in.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # otherwise the shell has it ignored
        signal.signal(signal.SIGINT, _end_on_ctrl_c)
    from dpgen.lifecycle.standard_streams import fill_closed_streams

    fill_closed_streams()
    from dpgen.cli import main as run_command
    from dpgen.log import flush_logging

    try:
        status = run_command(sys.argv[1:])
    except KeyboardInterrupt:
        status = _get_status_of_ctrl_c()
    except BrokenPipeError:  # the reader of the output has exited, as with `| head`
        os._exit(_STATUS_OF_SIGPIPE)
    try:
        if flush_logging():  # otherwise stderr is not read, and flushing it would block
            sys.stderr.flush()
        sys.stdout.flush()
    finally:  # a flush raises if the reader has exited
        _exit(status)


def _end_on_ctrl_c(number: int, frame: FrameType | None) -> None:
    """End the process while it imports its command: a library may make some other error of KeyboardInterrupt."""
    _exit(_get_status_of_ctrl_c())


def _exit(status: int) -> NoReturn:
    if status == _STATUS_OF_SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status)


def _get_status_of_ctrl_c() -> int:
    return _EXIT_RESUMABLE if sys.argv[1:2] and sys.argv[1] in _RESUMABLE_COMMANDS else _STATUS_OF_SIGINT


if __name__ == "__main__":
    main()
