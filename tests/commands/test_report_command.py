"""The command line of `dpgen report`; tests/report tests what the page holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.reported_run import make_eventful_run

from dpgen.cli import main
from dpgen.monitoring.status.record import identify_process


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: RUN_DIR"),
        (["no/such/directory"], "RUN_DIR=no/such/directory: there is no such directory"),
        (["."], "RUN_DIR=.: holds no run"),
        (["run", "-o", "no/report.html"], "--output=no/report.html: there is no directory no"),
        (["run", "-o", "run"], "--output=run: is a directory"),
    ],
)
def test_wrong_usage_ends_with_status_2_and_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_eventful_run(tmp_path / "run")
    assert main(["report", *arguments]) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1 and not output.out, output


def test_the_page_is_written_into_the_run_directory_or_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_eventful_run(tmp_path / "run")
    assert main(["report", str(run.path)]) == 0
    assert capsys.readouterr().out == f"{run.path / 'report.html'}\n"
    assert main(["report", str(run.path), "-o", str(tmp_path / "elsewhere.html")]) == 0
    assert (tmp_path / "elsewhere.html").stat().st_size > 10_000
    assert {path.name for path in run.path.iterdir()} == {"run.json", "config.yaml", "journal", "status", "report.html"}


def test_a_live_run_has_a_report_that_says_so(tmp_path: Path) -> None:
    run = make_eventful_run(tmp_path / "run", num_ranks=1)
    run.write_record(0, num_ranks=1, attempt=2, state="live", phase="generating", process=identify_process())
    assert main(["report", str(run.path)]) == 0
    page = (run.path / "report.html").read_text()
    assert ">live<" in page and "lost and generated again" not in page
