"""Write RUN_DIR/report.html: for `dpgen report`, and at the end of a run, which it can neither fail nor hold up."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path

from dpgen.config.secrets import redact_text
from dpgen.errors import DpgenError
from dpgen.journal.files import atomic_write_text
from dpgen.journal.run_dir import RunDir
from dpgen.report.facts import RunEnding, collect_facts
from dpgen.report.page import render_page
from dpgen.report.time_budget import TimeBudget

logger = logging.getLogger(__name__)

_READ_S = 8.0  # of a finished run; the page is rendered within a second
_TIMEOUT_S = 20.0


def write_report(
    run_dir: Path, target: Path, outcome: RunEnding | None = None, budget: TimeBudget | None = None,
    sleep: Callable[[float], None] | None = None,
) -> None:  # fmt: skip
    """Write the report on a run, in one step.

    Args:
        target: the file.
        outcome, sleep: see `collect_facts`.
        budget: for reading; None for no limit.

    Raises:
        DpgenError: the file can't be written.
    """
    page = render_page(collect_facts(run_dir, budget or TimeBudget(), outcome, sleep))
    atomic_write_text(target, page)


def write_final_report(run_dir: str, outcome: RunEnding, timeout_s: float = _TIMEOUT_S) -> None:
    """Write the report of a run that ends; what fails, or takes too long, is one warning.

    Args:
        timeout_s: until the run ends without its report: its disk hangs, or its journal is slow to read.
    """
    paths = RunDir(run_dir)
    failures: list[str] = []

    def write() -> None:
        try:
            budget = TimeBudget(min(_READ_S, timeout_s / 2))
            write_report(paths.path, paths.report, outcome, budget)
        except DpgenError as error:
            failures.append(str(error))
        except Exception as error:  # noqa: BLE001 - the boundary to files that may hold anything
            failures.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=write, name="report", daemon=True)
    thread.start()
    with contextlib.suppress(KeyboardInterrupt):
        thread.join(timeout_s)
    if thread.is_alive():
        failures.append(f"this takes longer than {timeout_s:g} s")
    if failures:
        logger.warning(f"the report is not written: {redact_text(failures[0])}. 'dpgen report {run_dir}' tries again")
    else:
        logger.info(f"report: {paths.report}")
