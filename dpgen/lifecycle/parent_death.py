"""End a process with its parent, so that a killed launcher or rank leaves no processes behind."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2)


def set_parent_death_signal(number: signal.Signals, parent: int | None = None) -> None:
    """Ask the kernel to send this process a signal when its parent (the thread that started it) ends.

    Args:
        parent: the parent's process id, if known; this process then exits with 1 if the parent has already died.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
    if parent is not None and os.getppid() != parent:
        sys.exit(1)
