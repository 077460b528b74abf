"""Give a process that was started without stdin, stdout or stderr a stand-in for each."""

from __future__ import annotations

import os
import sys


def fill_closed_streams() -> None:
    """Open /dev/null in place of each standard stream that is closed, as by `2>&-` in a shell; call it first of all.

    Python has None for it, and its number would go to the next file or socket, which would get what libraries and
    children write to the stream.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            fd = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is the stream's
            os.set_inheritable(fd, True)
            setattr(sys, name, os.fdopen(fd, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False))
