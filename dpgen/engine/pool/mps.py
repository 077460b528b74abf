"""Find NVIDIA's Multi-Process Service, with which engines of one GPU run their kernels at the same time.

Its clients find its daemon by themselves, in the directory that the environment names. dpgen starts no daemon.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_DEFAULT_DIRECTORY = "/tmp/nvidia-mps"
_PID_FILE = "nvidia-cuda-mps-control.pid"


def find_mps(environ: Mapping[str, str]) -> Path | None:
    """Return the directory of the daemon that CUDA programs started in this environment use; None if none runs."""
    directory = Path(environ.get("CUDA_MPS_PIPE_DIRECTORY") or _DEFAULT_DIRECTORY)
    try:
        (directory / "control").stat()
    except OSError:
        return None  # there is none, or it is closed to this user's programs
    try:
        os.kill(int((directory / _PID_FILE).read_text()), 0)
    except ProcessLookupError:
        return None  # a daemon that was killed leaves its files
    except (OSError, ValueError):
        pass  # of another user, in another namespace, or of a version without the file: the control's pipe tells
    return directory
