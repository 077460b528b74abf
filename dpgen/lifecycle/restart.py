"""Recognize a restart: a start of the job by the same torchrun, or by the same SLURM job after a requeue.

- torchrun gives no variable that only its own restarts share: its run id is "none" unless the user sets one, and its
  restart count rises on some nodes only. So the process itself counts, by its id and the time of its start.
- A SLURM job keeps its id when it is requeued, and its restart count rises. Two steps of one start have the same count.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_RUN_ID = "TORCHELASTIC_RUN_ID"


def describe_start(environ: Mapping[str, str], machine: str) -> dict[str, Any]:
    """Return what tells this start of this rank from others, as JSON holds it.

    Args:
        machine: names this machine, among all that may see the run directory.
    """
    restart = environ.get("SLURM_RESTART_COUNT", "")
    return {
        "torchrun": f"{machine} {agent}" if _RUN_ID in environ and (agent := _find_torchrun(os.getpid())) else None,
        "slurm_job": environ.get("SLURM_JOB_ID"),
        "slurm_restart": int(restart) if restart.isdecimal() else 0,
    }


def merge_starts(starts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one description of a job's start from those of its ranks, by rank."""
    return {**starts[0], "torchrun": sorted({start["torchrun"] for start in starts if start["torchrun"]})}


def is_restart(before: Any, now: Mapping[str, Any]) -> bool:
    """Return True if two starts, as `merge_starts` returns them, are of the same job, the second after the first.

    Args:
        before: from run.json; None in directories of older versions.
    """
    if not isinstance(before, Mapping):
        return False
    if set(before.get("torchrun") or ()) & set(now["torchrun"]):
        return True
    is_same_job = now["slurm_job"] is not None and before.get("slurm_job") == now["slurm_job"]
    return is_same_job and int(before.get("slurm_restart") or 0) < now["slurm_restart"]


def _find_torchrun(pid: int) -> str | None:
    """Return id and start time of the torchrun that a process was started by, perhaps through a script of its own.

    It is the nearest ancestor without the variable that it sets for its workers.
    """
    try:
        while pid > 1:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if not any(variable.startswith(f"{_RUN_ID}=".encode()) for variable in variables):
                return f"{pid} {fields[19]}"
            pid = int(fields[1])
    except OSError:  # an ancestor of another user, or no /proc
        return None
    return None
