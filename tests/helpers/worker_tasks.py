"""Tasks of worker processes that fail in the ways that real ones do; `dpgen.workers.worker` imports this by name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any


def start(*arguments: Any) -> tuple[Callable[[Any], Any], Any]:
    """Return a handler that answers with its task, or fails as the task says."""
    for argument in arguments:
        if argument == "refuse":
            raise ValueError("no such\nparser")
        if argument == "die":
            os._exit(3)
    return _handle, {"arguments": arguments, "pid": os.getpid()}


def _handle(task: Any) -> Any:
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "hang":
        time.sleep(600)
    if task == "raise":
        raise KeyError("row\n7")
    if task == "pid":
        return os.getpid()
    return task
