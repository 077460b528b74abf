"""What a user sees while it runs: one bar on a terminal, a line now and then where there is none."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from helpers.jobs import Launcher

from dpgen.config.schema import RunConfig
from dpgen.formatting import describe_type, format_count, format_duration
from dpgen.monitoring.progress import ProgressDisplay
from dpgen.scheduling.generation_loop import Totals

WriteConfig = Callable[..., str]

# Five seconds of work on 80 rows of 10 tokens for one rank, half of it for two.
SLOW = {"step_s": 0.05, "max_num_seqs": 8}


def some_bad(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"row number {index}" if index % 20 else None} for index in range(count)]


@pytest.mark.multi
def test_a_terminal_shows_one_bar_over_all_ranks(launcher: Launcher, write_config: WriteConfig) -> None:
    conf = write_config(some_bad(80), engine=SLOW, sampling={"max_tokens": 10})
    job = launcher.dpgen("run", conf, ranks=2, terminal=True)
    assert job.wait() == 0, job.output
    # 45%|████▌     | 36/80 [00:01<00:01, 30.90row/s, 309 tokens/s, 4 errors]
    bar = r"%\|.*?\| (\d+)/80 \[\d\d:\d\d<(\d\d:\d\d|\?), [^\]]*?([\d,]+) tokens/s, (\d+) errors?\]"
    shown = re.findall(bar, job.output)
    done = [int(rows) for rows, *_ in shown]
    assert done == sorted(done) and done[-1] == 80, f"one bar, over the rows of all ranks: {job.output}"
    midway = [(left, tokens) for rows, left, tokens, _ in shown if 4 < int(rows) < 80]
    assert any(left != "?" and tokens != "0" for left, tokens in midway), job.output
    assert shown[-1][-1] == "4", "the errors of all ranks"
    assert "of 80 rows (" not in job.output, "where there is a bar there are no lines"


@pytest.mark.multi
def test_where_there_is_no_terminal_there_are_lines_and_no_bar(launcher: Launcher, write_config: WriteConfig) -> None:
    conf = write_config(some_bad(80), engine=SLOW, sampling={"max_tokens": 10}, run={"progress_interval_s": 1})
    job = launcher.dpgen("run", conf)
    assert job.wait() == 0, job.output
    line = r"^\[rank 0\] (\d+) of 80 rows \((\d+) %\), [\d,]+ tokens/s, \d+ errors?, (?:\d+ s left|time left unknown)$"
    shown = re.findall(line, job.output, re.MULTILINE)
    assert len(shown) >= 2, job.output
    done = [int(rows) for rows, _ in shown]
    assert done == sorted(done) and all(0 < rows <= 80 for rows in done)
    assert [int(share) for _, share in shown] == [round(100 * rows / 80) for rows in done]
    assert "\r" not in job.output and "|" not in job.output, "no bar"


@pytest.mark.parametrize(
    ("interval_s", "expected_s"), [(RunConfig().progress_interval_s, [30, 60, 90]), (10.0, list(range(10, 100, 10)))]
)
def test_lines_come_at_the_interval(interval_s: float, expected_s: list[int]) -> None:
    now_s = 0.0
    lines: list[str] = []
    progress = ProgressDisplay(1000, 400, lines.append, interval_s, clock=lambda: now_s)
    said_at_s = []
    for second in range(1, 100):
        now_s = float(second)
        before = len(lines)
        progress.update(Totals(num_rows=5 * second, num_errors=1, num_generated_tokens=100 * second))
        said_at_s += [second] * (len(lines) - before)
    assert said_at_s == expected_s
    last = expected_s[-1]
    left = format_duration((600 - 5 * last) / 5)
    assert lines[-1] == f"{400 + 5 * last} of 1,000 rows ({40 + last / 2:.0f} %), 100 tokens/s, 1 error, {left} left"


def test_words() -> None:
    assert [format_count(number, "row") for number in (0, 1, 2, 12_000)] == ["0 rows", "1 row", "2 rows", "12,000 rows"]
    assert list(map(describe_type, [None, 1, "x", [], {}])) == ["null", "an int", "a str", "a list", "a dict"]
    assert list(map(format_duration, [0.4, 59, 200, 5 * 3600 + 420, 51 * 3600])) == [
        *("0 s", "59 s", "3 min 20 s", "5 h 07 min", "2 d 03 h")
    ]
