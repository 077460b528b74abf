"""Progress as a user sees it: one bar on a terminal, else log lines. No run waits for its terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import pytest
from helpers.clock import FakeClock
from helpers.jobs import REPO, Launcher, WriteConfig, load_result, wait_for

from dpgen.config.sections import RunConfig
from dpgen.formatting import describe_type, format_count, format_duration
from dpgen.monitoring.progress import ProgressDisplay
from dpgen.monitoring.progress_bar import TerminalBar, can_draw
from dpgen.scheduling.progress.totals import Totals

# Five seconds of work on 80 rows of 10 tokens for one rank, half of it for two.
SLOW = {"step_s": 0.05, "max_num_seqs": 8}
BAR = re.compile(
    r"(\d+) % [━╸╺ ]+ (\d+)/80 rows\s+([\d.]+ rows/s, ([\d,]+) tokens/s, (\d+) errors?, (.*?), )?\d+ s elapsed"
)


def write_slow_config(write_config: WriteConfig, engine: Mapping[str, Any] = SLOW, **run: Any) -> str:
    """Write a configuration over 80 rows, of which four have no prompt."""
    rows = [{"prompt": f"row number {index}" if index % 20 else None} for index in range(80)]
    return write_config(rows, engine=engine, sampling={"max_tokens": 10}, run=run)


def remove_control_codes(output: str) -> str:
    """Return everything that was ever drawn, one below the other."""
    return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", output).replace("\r", "")


def read_all(terminal: int) -> str:
    """Return what has been written to a terminal, which hands it out in pieces."""
    os.set_blocking(terminal, False)
    output = b""
    with contextlib.suppress(BlockingIOError):
        while piece := os.read(terminal, 1 << 16):
            output += piece
    return output.decode()


def render_screen(output: str) -> list[str]:
    """Return the lines that a terminal shows at the end: only the control codes that rich's live display uses."""
    lines, row, column = [""], 0, 0
    for code, number, letter, text in re.findall(r"(\x1b\[\??(\d*)[\d;]*([a-zA-Z])|[\r\n])|([^\x1b\r\n]+)", output):
        if text:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
        elif code == "\r":
            column = 0
        elif code == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif letter == "A":
            row -= int(number or 1)
        elif letter == "K":
            lines[row] = ""
    return [line.rstrip() for line in lines]


@contextlib.contextmanager
def open_terminal() -> Iterator[int]:
    """Make a new terminal this process's stderr, and give the end that shows what is written there."""
    test_end, process_end = pty.openpty()
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(OSError), open(process_end, "w") as stderr:
        patch.setenv("TERM", "xterm")
        patch.setattr(sys, "stderr", stderr)
        try:
            yield test_end
        finally:
            os.close(test_end)  # a thread that is stuck in writing ends with an error, and frees rich's lock
            wait_for(lambda: all(thread.name != "progress" for thread in threading.enumerate()))


# ---- on a terminal


@pytest.mark.slow
@pytest.mark.multi
def test_a_terminal_shows_one_bar_over_all_ranks(launcher: Launcher, write_config: WriteConfig) -> None:
    conf = write_slow_config(write_config)
    job = launcher.dpgen("run", conf, ranks=2, terminal=True)
    assert job.wait() == 0, job.output
    output = remove_control_codes(job.output)
    drawn = [match.groups() for match in BAR.finditer(output)]
    num_done = [int(rows) for _, rows, *_ in drawn]
    assert num_done == sorted(num_done) and num_done[-1] == 80, f"one bar, over the rows of all ranks: {output}"
    assert all(int(percent) == round(100 * int(rows) / 80) for percent, rows, *_ in drawn)
    midway = [(left, tokens) for _, rows, _, tokens, _, left in drawn if 4 < int(rows) < 80]
    assert any(re.fullmatch(r"\d+ s left", left) and tokens != "0" for left, tokens in midway), output
    assert drawn[-1][4] == "4", "the errors of all ranks"
    assert "of 80 rows (" not in output, "where there is a bar there are no lines"


@pytest.mark.slow
@pytest.mark.multi
def test_log_lines_appear_above_the_bar(launcher: Launcher, write_config: WriteConfig) -> None:
    conf = write_slow_config(write_config, {**SLOW, "crash_on": "row number 50"})
    job = launcher.dpgen("run", conf, terminal=True)
    assert job.wait() == 0, job.output
    screen = render_screen(job.output)
    [bar] = [number for number, line in enumerate(screen) if "/80 rows" in line]
    assert screen[bar].startswith("100 % ") and "5 errors" in screen[bar + 1], "the last state stays"
    above, below = screen[:bar], screen[bar + 2 :]
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert any(re.match(rf"{stamp} WARNING \[rank 0\] ", line) for line in above), "the engine's deaths"
    assert not any("rows/s" in line for line in above), "no trace of earlier states"
    assert any(re.match(rf"{stamp} INFO \[rank 0\] done: 80 rows", line) for line in below)
    assert "\x1b[?25h" in job.output, "the cursor is shown again"


@pytest.mark.slow
@pytest.mark.multi
def test_a_terminal_that_can_t_redraw_gets_lines(launcher: Launcher, write_config: WriteConfig) -> None:
    conf = write_slow_config(write_config, progress_interval_s=1)
    job = launcher.dpgen("run", conf, terminal=True, TERM="dumb")
    assert job.wait() == 0, job.output
    assert len(re.findall(r" of 80 rows \(\d+ %\), ", job.output)) >= 2
    assert "\x1b" not in job.output and "━" not in job.output


@pytest.mark.multi
@pytest.mark.parametrize("event", [pytest.param("closed", marks=pytest.mark.slow), "never read"])
def test_a_run_completes_when_its_terminal_goes_away(
    event: str, launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_slow_config(write_config)
    test_end, process_end = pty.openpty()
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPO), "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "dpgen", "run", conf],
        cwd=REPO,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=process_end,
        stderr=process_end,
        start_new_session=True,
    )
    try:
        os.close(process_end)
        if event == "closed":
            seen = b""
            while b"/80 rows" not in seen:
                seen += os.read(test_end, 1 << 16)
            os.close(test_end)
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()
        if event != "closed":
            os.close(test_end)
    assert len(load_result(tmp_path / "run")) == 80


def test_a_terminal_that_takes_nothing_does_not_block() -> None:
    """A terminal takes nothing after Ctrl-S, or behind a connection that hangs."""
    with open_terminal():
        assert can_draw()
        original = sys.stderr
        bar = TerminalBar(1000, 0)
        wait_for(lambda: sys.stderr is not original)
        writer = threading.Thread(target=fill_terminal, args=(sys.stderr,), daemon=True)
        writer.start()  # fills the terminal's buffer, and holds rich's lock from then on
        time.sleep(0.5)
        assert writer.is_alive()
        started_s = time.monotonic()
        for number in range(1000):
            bar.show(number, "text")
        bar.close()
        assert time.monotonic() - started_s < 60, "nothing waits for the terminal, which takes nothing ever"
        assert sys.stderr is original, "nothing may wait for rich's lock from now on"


def fill_terminal(stderr: TextIO) -> None:
    with contextlib.suppress(OSError):
        stderr.write("x" * 100_000 + "\n")


def test_the_bar_never_goes_back() -> None:
    with open_terminal() as terminal:
        bar = TerminalBar(1000, 400)
        bar.show(700, "text")
        bar.show(650, "a rank is lost, and its rows with it")
        bar.close()
        screen = render_screen(read_all(terminal))
    assert next(line for line in screen if "rows" in line).endswith(" 700/1,000 rows"), screen


def test_a_line_for_each_rank_stands_below_the_bar() -> None:
    with open_terminal() as terminal:
        bar = TerminalBar(1000, 400)
        bar.show(700, "text", [f"rank {rank}: 1,200 tokens/s {'and more ' * 30}" for rank in range(3)])
        bar.close()
        screen = render_screen(read_all(terminal))
    [bar_row] = [row for row, line in enumerate(screen) if " 700/1,000 rows" in line]
    ranks = [line for line in screen[bar_row:] if line.startswith("rank ")]
    assert [line.partition(" and")[0] for line in ranks] == [f"rank {rank}: 1,200 tokens/s" for rank in range(3)]
    assert len({len(line) for line in ranks}) == 1, "cut off where the terminal ends"


# ---- without a terminal


@pytest.mark.multi
def test_without_a_terminal_there_are_lines_and_no_bar(launcher: Launcher, write_config: WriteConfig) -> None:
    conf = write_slow_config(write_config, progress_interval_s=1)
    job = launcher.dpgen("run", conf)
    assert job.wait() == 0, job.output
    line = r" INFO \[rank 0\] (\d+) of 80 rows \((\d+) %\), [\d,]+ tokens/s, \d+ errors?, "
    shown = re.findall(rf"{line}(?:\d+ s left|time left unknown)$", job.output, re.MULTILINE)
    assert len(shown) >= 2, job.output
    num_done = [int(rows) for rows, _ in shown]
    assert num_done == sorted(num_done) and all(0 < rows <= 80 for rows in num_done)
    assert [int(percent) for _, percent in shown] == [round(100 * rows / 80) for rows in num_done]
    assert "\r" not in job.output and "━" not in job.output, "no bar"


def test_without_a_terminal_rich_is_not_imported() -> None:
    code = (
        "import sys; from dpgen.monitoring.progress import ProgressDisplay; "
        "ProgressDisplay(10, 0, 30.0).open_bar(); sys.exit('rich' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=REPO, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("interval_s", "expected_s"), [(RunConfig().progress_interval_s, [30, 60, 90]), (10.0, list(range(10, 100, 10)))]
)
def test_lines_come_at_the_interval(interval_s: float, expected_s: list[int], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = FakeClock(0.0)
    progress = ProgressDisplay(1000, 400, interval_s, clock=clock)
    logged_at_s = []
    for second in range(1, 100):
        clock.now_s = float(second)
        num_before = len(caplog.messages)
        progress.update(Totals(num_rows=5 * second, num_errors=1, num_generated_tokens=100 * second))
        logged_at_s += [second] * (len(caplog.messages) - num_before)
    assert logged_at_s == expected_s
    last_s = expected_s[-1]
    left = format_duration((600 - 5 * last_s) / 5)
    assert caplog.messages[-1] == (
        f"{400 + 5 * last_s} of 1,000 rows ({40 + last_s / 2:.0f} %), 100 tokens/s, 1 error, {left} left"
    )


def test_a_straggler_is_named_while_rows_are_unclaimed() -> None:
    progress = ProgressDisplay(1000, 0, 30.0, clock=FakeClock(0.0))
    rates = (100, 40, 110)
    named = progress.format_line(Totals(num_rows=10, num_unclaimed=500, rates=rates), 1.0)
    assert "rank 1 is slow (38 % of the other ranks' median)" in named
    assert "slow" not in progress.format_line(Totals(num_rows=990, rates=rates), 99.0), "engines run out of rows"


def test_numbers_are_formatted_for_people() -> None:
    assert [format_count(number, "row") for number in (0, 1, 2, 12_000)] == ["0 rows", "1 row", "2 rows", "12,000 rows"]
    assert list(map(describe_type, [None, 1, "x", [], {}])) == ["null", "an int", "a str", "a list", "a dict"]
    assert list(map(format_duration, [0.4, 59, 200, 5 * 3600 + 420, 51 * 3600])) == [
        *("0 s", "59 s", "3 min 20 s", "5 h 07 min", "2 d 03 h")
    ]


def test_finished_calls_of_programs_are_counted_beside_rows() -> None:
    progress = ProgressDisplay(1000, 0, 30.0, clock=FakeClock(0.0))
    assert ", 2,300 calls, " in progress.format_line(Totals(num_rows=10, num_calls=2300), 1.0)
    assert "call" not in progress.format_line(Totals(num_rows=10), 2.0)
