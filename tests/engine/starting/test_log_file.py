"""An engine's log file: it holds every line, and the terminal shows the lines that matter to a user."""

from __future__ import annotations

import logging
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from helpers.jobs import Launcher, find_engine_pids, make_numbered_rows, wait_for

from dpgen.engine.output_lines import find_level
from dpgen.engine.starting.log_file import EngineLog
from dpgen.errors import PeerFailed

# Printed by vLLM 0.32 (CPU) and torch 2.13, if not said otherwise.
REAL_LINES = [
    ("(MainProcess pid=26997) INFO 11-26 16:09:52 [model.py:733] Resolved architecture: Llama", logging.INFO),
    ("(MainProcess pid=26997) WARNING 11-26 16:09:52 [cpu.py:224] Triton is not installed.", logging.WARNING),
    ("(MainProcess pid=27440) DEBUG 11-26 16:10:07 [config/model.py:2217] chunked prefill.", logging.DEBUG),
    ("(Worker_TP0 pid=28586) ERROR 11-26 16:12:57 [multiproc_executor.py:7] cannot allocate", logging.ERROR),
    ("[host7] (MainProcess pid=28586) WARNING 11-26 16:12:57 [l.py:5] with VLLM_LOGGING_PREFIX", logging.WARNING),
    ("WARNING 11-26 16:12:57 [cpu.py:224] the form of vLLM 0.26 in the main process", logging.WARNING),
    ("(EngineCore_DP0 pid=7) ERROR 11-26 16:12:57 [core.py:7] the form of vLLM 0.26 in a worker", logging.ERROR),
    ("[W1126 16:09:53.343577260 utils.cpp:68] Warning: NUMA binding: Using MEMBIND policy", logging.WARNING),
    ("[rank0]:[E1126 16:09:53.343577260 ProcessGroupNCCL.cpp:607] Watchdog caught collective", logging.ERROR),
    ("W1126 16:09:53.343000 27440 torch/_dynamo/convert_frame.py:906] recompile_limit", logging.WARNING),
    ("/a/vllm/dispatcher.py:138: FutureWarning: `torch.distributed.reduce_op` is deprecated", None),
    ('  if hasattr(value, "__dict__"):', None),
    ("Traceback (most recent call last):", None),
    ("RuntimeError: no such device", None),
    ("Triton is installed, but doesn't include CPU backend. Disabling Triton.", None),
    ("\rLoading safetensors checkpoint shards: 100% Completed | 1/1 [00:00<00:00, 62.94it/s]", None),
    ("it printed a line of another: " + 200 * "." + " ERROR 11-26 16:12:57 [l.py:7] x", None),
    ("ERROR and WARNING are only words here", None),
]
COLOURED = (
    "\x1b[0;36m(Worker_TP0 pid=28460)\x1b[0;0m \x1b[31mERROR\x1b[0m \x1b[90m11-26 16:12:48\x1b[0m "
    "\x1b[90m[l.py:7]\x1b[0m cannot allocate"
)
PLAIN = "(Worker_TP0 pid=28460) ERROR 11-26 16:12:48 [l.py:7] cannot allocate"
INFO_LINE, WARNING_LINE, ERROR_LINE = (
    f"(MainProcess pid=1) {level} 11-26 16:12:57 [x.py:1] {level.lower()}" for level in ("INFO", "WARNING", "ERROR")
)
TRACEBACK = [
    "WorkerProc failed to start.",
    "Traceback (most recent call last):",
    '  File "vllm/v1/worker/gpu_worker.py", line 535, in init_device',
    "    self.requested_memory = request_memory(",
    "                            ^^^^^^^^^^^^^^^",
    "",
    "ValueError: Free memory on device cuda:0 (1/80 GiB) on startup is less than desired GPU memory utilization (0.9)",
]
DEBUG_LINE = "(MainProcess pid=1) DEBUG 11-26 16:12:57 [x.py:1] debug"


@pytest.mark.parametrize(("line", "level"), REAL_LINES)
def test_the_level_of_a_line_is_that_which_vllm_or_torch_gave_it(line: str, level: int | None) -> None:
    assert find_level(line) == level


@pytest.mark.parametrize(
    ("min_level", "shown"),
    [
        ("debug", [DEBUG_LINE, INFO_LINE, WARNING_LINE, ERROR_LINE]),
        ("info", [INFO_LINE, WARNING_LINE, ERROR_LINE]),
        ("warning", [WARNING_LINE, ERROR_LINE]),
        ("error", [ERROR_LINE]),
    ],
)
def test_lines_of_the_wanted_level_reach_the_terminal_and_all_lines_the_file(
    min_level: str, shown: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dpgen")  # as `setup_logging` sets it
    log, lines = EngineLog(min_level), [DEBUG_LINE, INFO_LINE, "Traceback", WARNING_LINE, ERROR_LINE]
    log.open(tmp_path / "logs" / "rank-0.engine.log")
    for line in lines:
        log.write(line)
    assert caplog.messages == shown
    assert {record.name for record in caplog.records} == {"dpgen.engine.output"}
    assert log.path is not None and log.path.read_text().splitlines() == lines


def test_the_terminal_shows_the_beginning_of_a_very_long_line_and_where_the_rest_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log, line = EngineLog("warning"), f"{ERROR_LINE} Dumping input data {'x=1, ' * 1000}"
    log.write(line)
    log.open(tmp_path / "log")
    log.write(f"{line} again")
    shown = f"{line[:1000]}... ({len(line) + 6:,} characters, all in {tmp_path / 'log'})"
    assert caplog.messages == [line, shown]
    assert log.path is not None and log.path.read_text().splitlines() == [line, f"{line} again"]


def test_a_warning_is_shown_once_whatever_its_numbers_and_an_error_once_in_a_life(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = EngineLog("warning")
    log.open(tmp_path / "log")
    slow = "(MainProcess pid={}) WARNING 11-26 16:12:{} [cache.py:5] {} blocks are too few"
    lines = [slow.format(7, 50, 12), slow.format(8, 51, 13), slow.format(8, 51, 13).replace("few", "many"), ERROR_LINE]
    for _ in range(2):
        log.start_life(7)
        log.show_errors()
        for line in lines + lines:
            log.write(line)
    assert caplog.messages == [lines[0], lines[2], ERROR_LINE, ERROR_LINE]
    assert (tmp_path / "log").read_text().count("blocks are too") == 12, "the file has all"


def test_errors_of_a_start_are_shown_unless_it_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = EngineLog("warning")
    log.open(tmp_path / "log")
    second_line, later_line = ERROR_LINE.replace("error", "another"), ERROR_LINE.replace("error", "while it generates")
    log.start_life(7)
    log.write(ERROR_LINE)
    log.start_life(8)  # the start is tried again
    log.write(second_line)
    assert caplog.messages == []
    log.show_errors()
    log.write(later_line)
    assert caplog.messages == [second_line, later_line]
    assert [line for line in (tmp_path / "log").read_text().splitlines() if not line.startswith("----")] == [
        *(ERROR_LINE, second_line, later_line)
    ]


def test_of_several_ranks_with_the_same_warning_one_shows_it_and_all_show_their_errors(
    caplog: pytest.LogCaptureFixture,
) -> None:
    counts: Counter[str] = Counter()

    def claim(key: str) -> bool:
        counts[key] += 1
        return counts[key] == 1

    logs = [EngineLog("warning") for _ in range(3)]
    for log in logs:
        log.share(claim)
        log.write(WARNING_LINE)
        log.write(ERROR_LINE)
    logs[2].write(WARNING_LINE.replace("warning", "only here"))
    assert caplog.messages == [ERROR_LINE] * 3, "warnings wait for the thread that may ask the store"
    for log in logs + logs:
        log.show_claimed()
    assert caplog.messages[3:] == [WARNING_LINE, WARNING_LINE.replace("warning", "only here")]


def test_a_warning_is_shown_where_the_store_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    def claim(key: str) -> bool:
        raise PeerFailed("rank 0 failed")

    log = EngineLog("warning")
    log.share(claim)
    log.write(WARNING_LINE)
    log.show_claimed()
    assert caplog.messages == [WARNING_LINE]


def test_of_a_logged_traceback_the_terminal_shows_what_failed_and_why(caplog: pytest.LogCaptureFixture) -> None:
    log, prefix = EngineLog("warning"), "(Worker_TP0 pid=7) ERROR 11-26 16:12:57 [multiproc_executor.py:871]"
    for text in TRACEBACK:
        log.write(f"{prefix} {text}")
    assert caplog.messages == [f"{prefix} {TRACEBACK[0]}", f"{prefix} {TRACEBACK[-1]}"]


def test_a_user_who_asks_for_more_gets_all_that_vllm_logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dpgen")
    log = EngineLog("info")
    log.share(lambda key: False)
    harmless = (
        "(MainProcess pid=1) WARNING 11-27 06:40:12 [cpu.py:224] Triton is not installed. triton-cpu is expected."
    )
    for line in (INFO_LINE, harmless, harmless):
        log.write(line)
    assert caplog.messages == [INFO_LINE, harmless, harmless]


def test_colours_are_removed_before_the_level_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = EngineLog("error")
    log.open(tmp_path / "log")
    log.write(COLOURED)
    assert caplog.messages == [PLAIN] and caplog.records[0].levelno == logging.ERROR
    assert (tmp_path / "log").read_text() == PLAIN + "\n"


def test_early_lines_are_held_back_until_the_file_is_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = EngineLog("warning")
    log.start_life(4711)
    for line in (INFO_LINE, WARNING_LINE):
        log.write(line)
    assert log.path is None and caplog.messages == [WARNING_LINE], "the terminal shows them immediately"
    log.open(tmp_path / "log")
    log.write("later")
    first, *others = (tmp_path / "log").read_text().splitlines()
    assert first.endswith("engine life 1 of this attempt, pid 4711")
    assert others == [INFO_LINE, WARNING_LINE, "later"]


def test_a_file_is_appended_to_over_lives_and_attempts(tmp_path: Path) -> None:
    for attempt in range(2):
        log = EngineLog("warning")
        log.open(tmp_path / "log")
        for life in (1, 2):
            log.start_life(100 * attempt + life)
            log.write(f"attempt {attempt}, life {life}")
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[1::2] == ["attempt 0, life 1", "attempt 0, life 2", "attempt 1, life 1", "attempt 1, life 2"]
    assert [line.rpartition("dpgen: ")[2] for line in lines[::2]] == [
        "engine life 1 of this attempt, pid 1",
        "engine life 2 of this attempt, pid 2",
        "engine life 1 of this attempt, pid 101",
        "engine life 2 of this attempt, pid 102",
    ]


def test_a_file_that_cannot_be_created_costs_a_warning_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "logs").write_text("a file where the folder belongs")
    log = EngineLog("warning")
    log.write("early")
    log.open(tmp_path / "logs" / "log")
    assert log.path is None, "no error may name a file that is not there"
    [warning] = caplog.records
    assert warning.levelno == logging.WARNING and "engine output is not kept" in warning.getMessage()
    log.write(ERROR_LINE)
    assert caplog.messages[1:] == [ERROR_LINE], "the terminal still shows errors"


def test_a_disk_that_fills_up_costs_a_warning_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = EngineLog("warning")
    log.open(tmp_path / "log")
    log.write("kept")

    class FullDisk:
        def write(self, text: str) -> NoReturn:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            return

    monkeypatch.setattr(log, "_file", FullDisk())
    for _ in range(3):
        log.write("lost")
    assert (tmp_path / "log").read_text() == "kept\n"
    [warning] = caplog.messages
    assert warning == f"cannot write {tmp_path / 'log'} (No space left on device), later engine output is not kept"
    assert log.path is None, "an error must not name a file that does not hold its cause"


@pytest.mark.slow
@pytest.mark.multi
def test_a_job_keeps_the_output_of_its_engine_and_names_the_file_after_a_crash(
    launcher: Launcher, write_config: Callable[..., str], tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(60), engine={"step_s": 0.02, "max_num_seqs": 4})
    job = launcher.dpgen("run", conf)
    wait_for(lambda: sum(path.stat().st_size for path in tmp_path.glob("run/journal/*.journal")) > 500)
    os.kill(find_engine_pids(job)[0], signal.SIGKILL)
    assert job.wait() == 0, job.output
    path = tmp_path / "run" / "logs" / "rank-0.engine.log"
    assert f"the engine process was killed by SIGKILL, restarting it, see {path}" in job.output, job.output
    lives = [line for line in path.read_text().splitlines() if "engine life" in line]
    assert [line.partition(" of this attempt")[0][-1] for line in lives] == ["1", "2"]
