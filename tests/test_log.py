"""Logging: who may log what, in which form, and that it neither blocks nor ends a run."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time

import pytest
from helpers.clock import FakeClock
from helpers.jobs import REPO

from dpgen import log
from dpgen.log import ENGINE_OUTPUT, LogFormat, PeriodicLog, flush_logging, setup_logging, write_to_stderr

logger = logging.getLogger("dpgen.test")


@pytest.fixture(autouse=True)
def logger_of_dpgen(restore_logging: None) -> logging.Logger:
    """The logger `dpgen`, propagating: otherwise pytest adds its own handler, which raises at a wrong log call."""
    dpgen = logging.getLogger("dpgen")
    dpgen.propagate = True
    return dpgen


class BrokenStream(io.StringIO):
    """Raise as a full disk does while `is_broken`."""

    is_broken = True

    def write(self, text: str) -> int:
        if self.is_broken:
            raise OSError(28, "No space left on device")
        return super().write(text)


class StuckStream(io.StringIO):
    """Take nothing, as a pipe does that is full and not read."""

    def __init__(self) -> None:
        super().__init__()
        self.is_read = threading.Event()
        self.has_writer = threading.Event()

    def write(self, text: str) -> int:
        self.has_writer.set()
        self.is_read.wait(60)
        return super().write(text)


def count_log_threads() -> int:
    return sum(thread.name == "log" for thread in threading.enumerate())


def log_everything(rank: int, log_format: LogFormat = "text") -> str:
    """Return the output of one rank for a line of each level and a line of an engine."""
    stream = io.StringIO()
    setup_logging(rank, log_format, stream)
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logger.log(level, "logged at %s", logging.getLevelName(level))
    logging.getLogger(ENGINE_OUTPUT).warning("a line of vLLM's")
    assert flush_logging()
    return stream.getvalue()


# ---- which lines, in which form


def test_rank_0_logs_news_and_every_rank_logs_warnings() -> None:
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(
        rf"{stamp} INFO \[rank 0\] logged at INFO\n"
        rf"{stamp} WARNING \[rank 0\] logged at WARNING\n"
        rf"{stamp} ERROR \[rank 0\] logged at ERROR\n"
        rf"{stamp} WARNING \[rank 0 engine\] a line of vLLM's\n",
        log_everything(0),
    )
    assert re.fullmatch(
        rf"{stamp} WARNING \[rank 3\] logged at WARNING\n"
        rf"{stamp} ERROR \[rank 3\] logged at ERROR\n"
        rf"{stamp} WARNING \[rank 3 engine\] a line of vLLM's\n",
        log_everything(3),
    )


def test_json_is_one_object_a_line_with_the_same_keys() -> None:
    records = [json.loads(line) for line in log_everything(3, "json").splitlines()]
    assert [list(record) for record in records] == [["time", "level", "rank", "logger", "message"]] * 3
    assert abs(records[0].pop("time") - time.time()) < 60
    assert records[0] == {"level": "WARNING", "rank": 3, "logger": "dpgen.test", "message": "logged at WARNING"}
    assert records[2]["logger"] == ENGINE_OUTPUT


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_traceback_is_part_of_its_line(log_format: LogFormat) -> None:
    stream = io.StringIO()
    setup_logging(1, log_format, stream)
    try:
        raise ValueError("the cause")
    except ValueError as error:
        logger.error("it failed", exc_info=error)
    assert flush_logging()
    text = stream.getvalue()
    if log_format == "json":
        assert text.count("\n") == 1, "a traceback must not break the rule of one object a line"
        text = json.loads(text)["message"]
    assert re.search(r"it failed\nTraceback .*\n(.*\n)*ValueError: the cause", text)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_log_call_with_wrong_arguments_still_leaves_its_line(log_format: LogFormat) -> None:
    stream = io.StringIO()
    setup_logging(0, log_format, stream)
    logger.info("%d rows", "many")
    logger.info("the next line")
    assert flush_logging()
    first, second = stream.getvalue().splitlines()
    assert "%d rows" in first and "many" in first
    assert "the next line" in second


def test_lines_go_to_the_stderr_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A progress bar replaces `sys.stderr` while it is drawn."""
    setup_logging(0)
    streams = [io.StringIO(), io.StringIO()]
    for number, stream in enumerate(streams):
        monkeypatch.setattr(sys, "stderr", stream)
        logger.info(f"line {number}")
        assert flush_logging()
    assert [stream.getvalue().split("] ")[1] for stream in streams] == ["line 0\n", "line 1\n"]


def test_other_loggers_are_left_alone(logger_of_dpgen: logging.Logger) -> None:
    root = logging.getLogger()
    before = list(root.handlers), root.level
    setup_logging(0, stream=io.StringIO())
    assert (list(root.handlers), root.level) == before
    assert not logger_of_dpgen.propagate, "an application that configures the root must not get each line twice"


def test_the_closing_error_comes_after_all_lines_and_as_it_stands() -> None:
    stream = io.StringIO()
    setup_logging(5, stream=stream)
    for number in range(100):
        logger.warning(f"line {number}")
    write_to_stderr("dpgen: error: the cause")
    lines = stream.getvalue().splitlines()
    assert lines[-2].endswith("line 99") and lines[-1] == "dpgen: error: the cause"


def test_the_closing_error_is_written_without_any_setup_too(capsys: pytest.CaptureFixture[str]) -> None:
    write_to_stderr("dpgen: error: the cause")
    assert capsys.readouterr().err == "dpgen: error: the cause\n"


# ---- logging neither blocks nor ends a run


def test_a_second_setup_replaces_the_handler_and_ends_its_thread(logger_of_dpgen: logging.Logger) -> None:
    num_handlers, num_threads = len(logger_of_dpgen.handlers), count_log_threads()
    first, second = io.StringIO(), io.StringIO()
    setup_logging(0, stream=first)
    logger.info("to the first")
    for _ in range(3):
        setup_logging(0, "json", second)
    logger.info("to the second")
    assert flush_logging()
    assert first.getvalue().endswith("to the first\n"), "a line that waited is written before the thread ends"
    assert json.loads(second.getvalue())["message"] == "to the second"
    assert len(logger_of_dpgen.handlers) == num_handlers + 1
    deadline_s = time.monotonic() + 10
    while count_log_threads() > num_threads + 1:
        assert time.monotonic() < deadline_s, "the thread of a replaced handler must end"
        time.sleep(0.01)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_stream_that_raises_costs_lines_and_not_the_run(log_format: LogFormat) -> None:
    stream = BrokenStream()
    setup_logging(0, log_format, stream)
    for number in range(3):
        logger.info(f"lost {number}")
    assert flush_logging(), "a lost line must not delay the others"
    stream.is_broken = False
    logger.info("written again")
    assert flush_logging()
    dropped, written = stream.getvalue().splitlines()
    assert "dropped 3 log lines" in dropped and "WARNING" in dropped
    assert "written again" in written
    if log_format == "json":
        assert json.loads(dropped)["level"] == "WARNING" and json.loads(written)


def test_a_closed_stream_costs_lines_and_not_the_run() -> None:
    stream = io.StringIO()
    setup_logging(0, stream=stream)
    stream.close()
    logger.info("lost")
    assert flush_logging()


def test_a_reader_that_never_reads_does_not_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_FLUSH_TIMEOUT_S", 0.2)
    stream = StuckStream()
    setup_logging(0, stream=stream)
    started_s = time.monotonic()
    logger.info("the line that is stuck")
    assert stream.has_writer.wait(10)
    for number in range(log._MAX_QUEUED_LINES + 5):
        logger.info(f"line {number}")
    assert not flush_logging()
    write_to_stderr("dpgen: error: the cause")
    setup_logging(0, stream=io.StringIO())  # ends the handler, whose thread is stuck
    assert time.monotonic() - started_s < 50, "nothing waits for a reader, who would come after a minute"
    stream.is_read.set()


def test_dropped_lines_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_MAX_QUEUED_LINES", 4)
    stream = StuckStream()
    setup_logging(0, stream=stream)
    logger.info("the line that is stuck")
    assert stream.has_writer.wait(10)
    for number in range(10):
        logger.info(f"line {number}")
    stream.is_read.set()
    assert flush_logging()
    lines = [line.partition("] ")[2] for line in stream.getvalue().splitlines()]
    assert lines[0] == "the line that is stuck"
    assert lines[1].startswith("dropped 6 log lines")
    assert lines[2:] == [f"line {number}" for number in range(4)], "the newest lines are the ones to drop"


FILL_STDERR = """
import logging, sys
import dpgen.__main__, dpgen.cli
from dpgen.log import setup_logging

def run_command(argv):
    setup_logging(0)
    for _ in range(3000):
        logging.getLogger("dpgen").info("x" * 100)
    return 75

dpgen.cli.main = run_command
dpgen.__main__.main()
"""


def test_a_process_whose_stderr_is_not_read_ends_with_its_status() -> None:
    read_fd, write_fd = os.pipe()
    try:
        done = subprocess.run([sys.executable, "-c", FILL_STDERR], cwd=REPO, stderr=write_fd, timeout=60)
        assert done.returncode == 75
    finally:
        os.close(read_fd)
        os.close(write_fd)


def test_a_process_whose_stderr_is_closed_ends_with_its_status() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    try:
        done = subprocess.run([sys.executable, "-c", FILL_STDERR], cwd=REPO, stderr=write_fd, timeout=60)
        assert done.returncode == 75
    finally:
        os.close(write_fd)


# ---- lines while a rank waits


def test_a_long_wait_is_logged_after_10_s_and_then_every_30_s(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = FakeClock(100.0)
    periodic_log = PeriodicLog(logging.getLogger("test"), lambda: f"waiting at {clock.now_s:.0f}", clock)
    for _ in range(50):
        periodic_log()
        clock.now_s += 1
    assert caplog.messages == ["waiting at 110", "waiting at 140"]


def test_a_long_wait_of_all_ranks_is_a_warning_at_growing_intervals(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock(100.0)
    message = lambda: f"waiting at {clock.now_s:.0f}"  # noqa: E731
    periodic_log = PeriodicLog(logging.getLogger("test"), message, clock, on_all_ranks=True)
    for _ in range(300):
        periodic_log()
        clock.now_s += 1
    assert caplog.messages == ["waiting at 110", "waiting at 140", "waiting at 200", "waiting at 320"]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
