"""Check what dpgen promises: after an attempt its exit statuses, and after a run every row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpgen.errors import EXIT_FAILED, EXIT_OK, EXIT_RESUMABLE
from dpgen.output.verification import verify
from helpers.chaos.attempt import Attempt, ChaosFailure
from helpers.chaos.faults import Fault
from helpers.jobs import load_result

_OWN_FAULT = "a fault in dpgen or a library"


def check_attempt(attempt: Attempt, faults: Sequence[Fault], *, is_complete: bool) -> None:
    """Check how the processes of an attempt have ended.

    Args:
        faults: those that have happened.
        is_complete: the run directory holds the final result.

    Raises:
        ChaosFailure: a status that no fault explains, a crash, an unexpected exception, or no result.
    """
    allowed = {EXIT_OK, EXIT_RESUMABLE} | ({EXIT_FAILED} if any(fault.may_fail for fault in faults) else set())
    statuses = attempt.read_exit_statuses()
    if unexplained := [status for status in statuses if status not in allowed]:
        raise ChaosFailure(
            f"a rank ended with status {unexplained[0]}, which no fault explains\n{attempt.describe_ranks()}"
        )
    if crashes := attempt.find_crashes():
        raise ChaosFailure("; ".join(crashes))
    if _OWN_FAULT in attempt.output:
        raise ChaosFailure("an unexpected exception")
    if is_complete:
        return
    if attempt.plan.launcher != "torchrun" and statuses and set(statuses) == {EXIT_OK}:
        raise ChaosFailure("all ranks ended with status 0 without a result")
    if not faults:
        raise ChaosFailure(f"an attempt in which no fault happened did not complete\n{attempt.describe_ranks()}")
    if len(faults) == 1 and faults[0].must_complete(attempt):
        kind = faults[0].kind
        raise ChaosFailure(f"an attempt with one fault, {kind}, did not complete\n{attempt.describe_ranks()}")


def check_result(run_dir: Path, expected: list[dict[str, Any]]) -> None:
    """Check that a complete run holds the rows of the undisturbed run, and that `dpgen verify` finds it sound.

    Raises:
        ChaosFailure: it does not.
    """
    rows = load_result(run_dir)
    ids = [row["row_id"] for row in rows]
    if ids != list(range(len(expected))):
        raise ChaosFailure(f"rows are lost, duplicated or out of order: {len(rows)} of {len(expected)} rows, ids {ids}")
    for row, expected_row in zip(rows, expected, strict=True):
        if row != expected_row:
            raise ChaosFailure(f"a row differs from the undisturbed run:\n  {row}\n  {expected_row}")
    report = verify(run_dir)
    if report.verdict != "sound" or report.missing or report.num_dataset_rows != len(expected):
        raise ChaosFailure(f"dpgen verify finds the run {report.verdict}: {report}")
