"""`python -m dpgen`, `torchrun -m dpgen`, and the console script `dpgen`."""

from __future__ import annotations

import os
import sys

from dpgen.cli import main as _main


def main() -> None:
    """Ends the process with the command's exit status.

    By `os._exit`: everything that must last is synced and closed by now, and the interpreter's own way out runs into
    native threads (of torch, gloo, Arrow) that may abort it ("terminate called without an active exception"). A
    finished run must not end with a failure's status.
    """
    status = _main(sys.argv[1:])
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # a flush fails where whoever read our output has left, as `| head` does
        os._exit(status)


if __name__ == "__main__":
    main()
