"""Read what a run has written: its journals so far, and the rows of its result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.jobs import Launcher, load_result


def count_journal_bytes(run_dir: Path) -> int:
    """Return the bytes of results that have reached the disk so far."""
    return sum(path.stat().st_size for path in run_dir.glob("journal/*.journal"))


def load_all_rows(run_dir: Path, count: int) -> list[dict[str, Any]]:
    """Return the rows of a finished run, after checking that each is there once, in order."""
    rows = load_result(run_dir)
    assert [row["row_id"] for row in rows] == list(range(count))
    return rows


def run_undisturbed(launcher: Launcher, conf: str, run_dir: Path) -> list[dict[str, Any]]:
    """Run a configuration of the fake engine at full speed, with nothing killed or stopped, and return its rows."""
    job = launcher.dpgen("run", conf, f"run.dir={run_dir}", "engine.step_s=0")
    assert job.wait() == 0, job.output
    return load_result(run_dir)
