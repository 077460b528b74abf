"""Whole runs leave a report, however they end."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.jobs import Launcher, WriteConfig

ROWS = [{"prompt": f"question {row}"} for row in range(40)]


def test_a_finished_run_names_its_report_at_last(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    conf = write_config(ROWS, run={"report": True}, engine={"refuse_on": "question 7"})
    job = launcher.dpgen("run", conf)
    assert job.wait() == 0, job.output
    page = (tmp_path / "run" / "report.html").read_text()
    assert job.output.splitlines()[-1].endswith(f"report: {tmp_path / 'run' / 'report.html'}")
    assert ">finished<" in page and "question 7" in page and "Latency of requests" in page

    again = launcher.dpgen("run", conf, "run.report=false")
    assert again.wait() == 0 and (tmp_path / "run" / "report.html").read_text() == page
    assert "report:" not in again.output


@pytest.mark.parametrize(
    ("engine", "run", "status", "state"),
    [
        ({"step_s": 0.2}, {"time_limit": "4", "stop_margin_s": 0}, 75, "stopped, resumable"),
        ({"crash_on": "question"}, {"max_engine_deaths": 1}, None, "Why it ended"),
    ],
)
def test_a_run_that_ends_early_leaves_a_report_that_says_why(
    engine: dict[str, object],
    run: dict[str, object],
    status: int | None,
    state: str,
    launcher: Launcher,
    write_config: WriteConfig,
    tmp_path: Path,
) -> None:
    job = launcher.dpgen("run", write_config(ROWS, run={"report": True, **run}, engine=engine))
    assert job.wait() in ({status} if status is not None else {1, 75}), job.output
    page = (tmp_path / "run" / "report.html").read_text()
    assert state in page and "Why it ended" in page


def test_a_start_that_is_rejected_leaves_the_report_as_it_is(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(ROWS, run={"report": True})
    job = launcher.dpgen("run", conf)
    assert job.wait() == 0, job.output
    before = (tmp_path / "run" / "report.html").stat().st_mtime_ns
    other = launcher.dpgen("run", conf, "sampling.max_tokens=3")
    assert other.wait() == 2, other.output
    assert (tmp_path / "run" / "report.html").stat().st_mtime_ns == before
