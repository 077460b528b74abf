"""Decide whether a SLURM job requeues itself after its step: `python -m dpgen.requeue LOG_DIR STEP_STATUS`.

Called at the end of the sbatch scripts. The job requeues itself only if

- the run can be resumed: status 75 in LOG_DIR/status (`dpgen.lifecycle.status_file`), or without that file in those of
  ranks that lost rank 0. A run without a status failed;
- SLURM is not ending the job for another reason than its time limit, such as `scancel`;
- resuming helps: not after several attempts in a row without a new row, since those were not stopped by a time limit.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpgen.errors import EXIT_FAILED, EXIT_OK, EXIT_RESUMABLE
from dpgen.formatting import format_count
from dpgen.lifecycle.status_file import find_rank_statuses

MAX_REQUEUES = 100
MAX_ATTEMPTS_WITHOUT_PROGRESS = 3


@dataclass(frozen=True)
class AttemptStatus:
    """The status file of one attempt; `num_done` is None if the rows were not counted yet."""

    exit_status: int
    num_done: int | None


def read_status(log_dir: Path) -> AttemptStatus | None:
    """Return the status of one attempt, whose step has ended; None if it left none.

    Rank 0's is final. Without it, rank 0 is dead, and the ranks that lost it say how the run ended.
    """
    final = _read_file(log_dir / "status")
    if final is not None:
        return final
    statuses = [status for path in find_rank_statuses(log_dir / "status") if (status := _read_file(path)) is not None]
    if not statuses:
        return None
    failed = [status.exit_status for status in statuses if status.exit_status != EXIT_RESUMABLE]
    counts = [status.num_done for status in statuses if status.num_done is not None]
    return AttemptStatus(failed[0] if failed else EXIT_RESUMABLE, max(counts, default=None))


def read_history(log_dir: Path) -> list[AttemptStatus | None]:
    """Return the statuses of all attempts up to that of `log_dir`, in order, from its neighbours ``attempt-N``."""
    last = int(log_dir.name.rpartition("-")[2])
    return [read_status(log_dir.with_name(f"attempt-{number}")) for number in range(last + 1)]


def count_attempts_without_progress(history: Sequence[AttemptStatus | None]) -> int:
    """Return how many of the last attempts in a row ended with no more rows done than before.

    An attempt without a status (a lost node, a hard preemption) counts neither way.
    """
    max_done, num_attempts = 0, 0
    for status in history:
        if status is None:
            continue
        if status.num_done is not None and status.num_done > max_done:
            max_done, num_attempts = status.num_done, 0
        else:
            num_attempts += 1
    return num_attempts


def find_reason_not_to_requeue(
    history: Sequence[AttemptStatus | None], job: Mapping[str, str], max_requeues: int, max_without_progress: int
) -> str:
    """Return why the job must not requeue itself though its last attempt can be resumed; "" if it may.

    Args:
        job: SLURM's description of the job, by SLURM's names.
    """
    state, reason = job.get("JobState", "unknown"), job.get("Reason", "unknown")
    # A job that is being ended has the state COMPLETING, whatever the cause. Only after a time limit may it requeue
    # itself: cancelled jobs stay cancelled, and SLURM itself requeues jobs that it preempts or whose node it loses.
    if state != "RUNNING" and reason != "TimeLimit":
        return f"SLURM is ending the job (state {state}, reason {reason})"
    if count_attempts_without_progress(history) >= max_without_progress:
        return f"{max_without_progress} attempts in a row ended without a new row: see their logs, or ask for more time"
    if len(history) > max_requeues:
        return f"the job was requeued {max_requeues} times (DPGEN_MAX_REQUEUES)"
    return ""


def query_job(job_id: str) -> dict[str, str]:
    """Return the fields of `scontrol show job`; none if it fails or takes over a minute."""
    try:
        shown = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", job_id], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(re.findall(r"(\w+)=(\S*)", shown.stdout.partition("\n")[0]))


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Print how the attempt ended, requeue the job if it may be, and return the job's exit status."""
    log_dir, step_status = Path(arguments[0]), int(arguments[1])
    history = read_history(log_dir)
    status = history[-1]
    if status is not None and status.exit_status == EXIT_OK:
        print("dpgen: the run is complete")
        return EXIT_OK
    if status is None or status.exit_status != EXIT_RESUMABLE:
        print(f"dpgen: the run failed and is not requeued: see {log_dir}")
        return status.exit_status if status else step_status or EXIT_FAILED
    job_id = environ["SLURM_JOB_ID"]
    done = "number of done rows unknown" if status.num_done is None else f"{format_count(status.num_done, 'row')} done"
    reason = find_reason_not_to_requeue(
        history,
        query_job(job_id),
        int(environ.get("DPGEN_MAX_REQUEUES") or MAX_REQUEUES),
        int(environ.get("DPGEN_MAX_FRUITLESS") or MAX_ATTEMPTS_WITHOUT_PROGRESS),
    )
    if reason:
        print(f"dpgen: stopped, {done}. Not requeued: {reason}. Rerun the same sbatch command to resume")
        return EXIT_RESUMABLE
    print(f"dpgen: stopped, {done}. Requeueing job {job_id}", flush=True)
    requeued = subprocess.run(["scontrol", "requeue", job_id])
    if requeued.returncode != 0:
        print(f"dpgen: SLURM refused to requeue job {job_id}. Rerun the same sbatch command to resume")
    return EXIT_RESUMABLE


def _read_file(path: Path) -> AttemptStatus | None:
    try:
        status, num_done = path.read_text(encoding="utf-8").split()
        return AttemptStatus(int(status), None if num_done == "?" else int(num_done))
    except (OSError, ValueError):
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
