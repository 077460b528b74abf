"""What becomes of a SLURM job when its step has ended: `python -m dpgen.requeue LOG_DIR STEP_STATUS`.

Called at the end of the sbatch scripts. The job requeues itself only if the run said that it can go on (status 75 in
LOG_DIR/status, see `dpgen.lifecycle.status_file`), nobody has cancelled it, and going on has helped: not after several
attempts in a row in which no row was done, since what stops those is no time limit. A run that left no word has failed.
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

MAX_REQUEUES = 100
MAX_ATTEMPTS_WITHOUT_PROGRESS = 3


@dataclass(frozen=True)
class AttemptStatus:
    """What a run has left in its status file; `num_done` is None where it had not counted yet."""

    exit_status: int
    num_done: int | None


def read_status(log_dir: Path) -> AttemptStatus | None:
    """The word of one attempt; None where it left none."""
    try:
        status, num_done = (log_dir / "status").read_text(encoding="utf-8").split()
        return AttemptStatus(int(status), None if num_done == "?" else int(num_done))
    except (OSError, ValueError):
        return None


def read_history(log_dir: Path) -> list[AttemptStatus | None]:
    """The words of all attempts up to `log_dir`'s, in order; attempts are its neighbours ``attempt-N``."""
    last = int(log_dir.name.rpartition("-")[2])
    return [read_status(log_dir.with_name(f"attempt-{number}")) for number in range(last + 1)]


def count_attempts_without_progress(history: Sequence[AttemptStatus | None]) -> int:
    """How many attempts, up to the last one, were stopped without one more row done than before.

    An attempt that SLURM ended without a word (a lost node, a hard preemption) counts neither way.
    """
    best, fruitless = 0, 0
    for status in history:
        if status is None:
            continue
        if status.num_done is not None and status.num_done > best:
            best, fruitless = status.num_done, 0
        else:
            fruitless += 1
    return fruitless


def find_reason_not_to_requeue(
    history: Sequence[AttemptStatus | None], job: Mapping[str, str], max_requeues: int, max_fruitless: int
) -> str:
    """Why the job, whose last attempt can go on, is not to be requeued by itself; "" if it is.

    Args:
        job: what SLURM says of it, by SLURM's names.
    """
    state, reason = job.get("JobState", "unknown"), job.get("Reason", "unknown")
    # While a job is being ended its state is COMPLETING, by whomever. After a time limit it may be requeued even so;
    # what was cancelled stays cancelled, and what SLURM preempts or takes from a lost node it requeues itself.
    if state != "RUNNING" and reason != "TimeLimit":
        return f"SLURM is ending the job (state {state}, reason {reason})"
    if count_attempts_without_progress(history) >= max_fruitless:
        return (
            f"{max_fruitless} attempts in a row have ended without a new row, so waiting does not help: see their "
            "logs, or ask for more time"
        )
    if len(history) > max_requeues:
        return f"it has been requeued {max_requeues} times (DPGEN_MAX_REQUEUES)"
    return ""


def query_job(job_id: str) -> dict[str, str]:
    """What `scontrol show job` says, as a mapping; empty where it says nothing."""
    try:
        shown = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", job_id], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(re.findall(r"(\w+)=(\S*)", shown.stdout.partition("\n")[0]))


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Says what became of the run, and requeues the job if it can go on; the job's exit status."""
    log_dir, step_status = Path(arguments[0]), int(arguments[1])
    history = read_history(log_dir)
    status = history[-1]
    if status is not None and status.exit_status == EXIT_OK:
        print("dpgen: the run is complete")
        return EXIT_OK
    if status is None or status.exit_status != EXIT_RESUMABLE:
        print(f"dpgen: the run failed, so it is not requeued; see {log_dir}")
        return status.exit_status if status else step_status or EXIT_FAILED
    job_id = environ["SLURM_JOB_ID"]
    done = "the rows done have not been counted" if status.num_done is None else f"{status.num_done:,} rows are done"
    reason = find_reason_not_to_requeue(
        history,
        query_job(job_id),
        int(environ.get("DPGEN_MAX_REQUEUES") or MAX_REQUEUES),
        int(environ.get("DPGEN_MAX_FRUITLESS") or MAX_ATTEMPTS_WITHOUT_PROGRESS),
    )
    if reason:
        print(f"dpgen: stopped; {done}. Not requeued: {reason}. The same sbatch command goes on from here")
        return EXIT_RESUMABLE
    print(f"dpgen: stopped; {done}. Requeueing job {job_id}", flush=True)
    requeued = subprocess.run(["scontrol", "requeue", job_id])
    if requeued.returncode != 0:
        print(f"dpgen: SLURM does not requeue job {job_id}; the same sbatch command goes on from here")
    return EXIT_RESUMABLE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
