"""The status of a run, from files that its ranks have written: live, dead, stopped, failed, finished, starting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.status_files import ELSEWHERE, HERE, StatusFiles

from dpgen.monitoring.status.history import History
from dpgen.monitoring.status.page import format_ranks, format_run
from dpgen.monitoring.status.record import ErrorKind
from dpgen.monitoring.status.run_status import EXIT_STATUSES, RunStatus, select_progress, watch_until_known

RUN = {"num_rows": 1000, "num_done": 400, "num_errors": 3, "num_unclaimed": 500, "num_prompt_tokens": 100}


@pytest.fixture
def files(tmp_path: Path) -> StatusFiles:
    return StatusFiles(tmp_path / "run")


def show(status: RunStatus) -> str:
    return "\n".join([*format_run(status), *format_ranks(status.ranks)])


# ---- on the ranks' own host


def test_ranks_whose_processes_run_are_live(files: StatusFiles) -> None:
    for rank in range(2):
        files.write(rank, 2, run=RUN, counts={"tokens_per_s": 100, "num_rows": 200})
    status = files.watcher.read()
    assert (status.state, status.exit_status, status.num_ranks) == ("live", 0, 2)
    assert (status.num_rows, status.num_done, status.num_errors) == (1000, 400, 3)
    assert [view.state for view in status.ranks] == ["live", "live"]


@pytest.mark.parametrize("case", ["gone", "pid taken by another process", "zombie"])
def test_ranks_that_were_killed_are_dead_at_the_first_look(case: str, files: StatusFiles) -> None:
    files.write(0, is_running=False, run=RUN)
    if case != "gone":
        files.processes[100] = (8, "S") if case.startswith("pid") else (7, "Z")
    status = files.watcher.read()
    assert (status.state, status.exit_status) == ("dead", 1)
    assert "died without a word: rank 0 on here (pid 100, generating)" in show(status)
    assert "rerun the same command to resume" in show(status)


def test_one_lost_rank_is_named_while_the_others_go_on(files: StatusFiles) -> None:
    files.write(0, 2, run=RUN)
    files.write(1, 2, is_running=False, run=RUN)
    status = files.watcher.read()
    assert status.state == "live" and [view.state for view in status.ranks] == ["live", "dead"]
    assert "died without a word: rank 1 on here" in show(status)


# ---- from another host, whose clock may be hours off (`StatusFiles` dates these records in the year 2128)


def test_a_rank_of_another_host_is_live_once_it_has_written_again(files: StatusFiles) -> None:
    record = files.write(0, machine=ELSEWHERE, run=RUN)
    assert files.watcher.read().state == "checking"
    files.clock.now_s += 1
    assert files.watcher.read().state == "checking", "the same file, read again, shows nothing"
    files.rewrite(record)
    assert files.watcher.read().state == "live"


def test_a_rank_of_another_host_that_writes_nothing_for_its_own_intervals_is_dead(files: StatusFiles) -> None:
    record = files.write(0, machine=ELSEWHERE, interval_s=20.0, run=RUN)
    assert files.watcher.read().state == "checking"
    files.clock.now_s += 61
    assert files.watcher.read().state == "checking", "a thousand ranks write every 20 s"
    files.clock.now_s += 4
    assert files.watcher.read().state == "dead"
    files.rewrite(record)
    assert files.watcher.read().state == "live", "its disk had hung"


def test_the_command_waits_until_each_rank_is_known(files: StatusFiles) -> None:
    records = [files.write(rank, 3, machine=ELSEWHERE, run=RUN) for rank in range(3)]
    slept_s = []

    def sleep(seconds: float) -> None:
        slept_s.append(seconds)
        files.clock.now_s += seconds
        records[:2] = map(files.rewrite, records[:2])  # rank 2 was killed

    status = watch_until_known(files.watcher, sleep)
    assert [view.state for view in status.ranks] == ["live", "live", "dead"] and status.state == "live"
    assert 10 <= sum(slept_s) <= 11, "three intervals of 2 s, and 4 s"


def test_a_process_id_of_another_host_or_container_says_nothing(files: StatusFiles) -> None:
    files.write(0, machine=ELSEWHERE, run=RUN)
    files.processes[100] = (7, "S")
    assert files.watcher.read().state == "checking"


# ---- how runs end


def test_a_run_that_was_interrupted_is_stopped_and_resumable(files: StatusFiles) -> None:
    for rank in range(2):
        files.write(rank, 2, state="stopped", reason="interrupted by SIGTERM. Rerun ...", is_running=False, run=RUN)
    status = files.watcher.read()
    assert (status.state, status.exit_status) == ("stopped", 75)
    assert "interrupted by SIGTERM" in show(status) and "400 of 1,000 done (40 %)" in show(status)


def test_a_failed_run_gives_the_reason_of_the_rank_that_failed(files: StatusFiles) -> None:
    files.write(0, 3, state="failed", reason=None, is_running=False)  # it only followed
    files.write(1, 3, state="failed", reason="the disk is \x1b[31mfull", is_running=False)
    files.write(2, 3, state="stopped", reason="interrupted by SIGTERM", is_running=False)
    status = files.watcher.read()
    assert (status.state, status.exit_status) == ("failed", 1)
    assert r"reason    the disk is \x1b[31mfull" in show(status), "escaped"


def test_a_rank_that_was_killed_is_named_when_its_launcher_has_stopped_the_others(files: StatusFiles) -> None:
    files.write(0, 2, state="stopped", reason="interrupted by SIGTERM", is_running=False)
    files.write(1, 2, is_running=False)
    status = files.watcher.read()
    assert status.state == "stopped" and "died without a word: rank 1" in show(status)


def test_a_finished_run_shows_the_counts_of_its_result(files: StatusFiles) -> None:
    error = ErrorKind("prompt_too_long", 2, 17, "the prompt has 9,000 tokens")
    files.write(0, state="finished", is_running=False, run=RUN, errors=(error,))
    success = {"num_rows": 1000, "num_errors": 5, "errors": {"empty_prompt": 2, "prompt_too_long": 3}}
    (files.run_dir / "_SUCCESS").write_text(json.dumps(success))
    status = files.watcher.read()
    assert (status.state, status.exit_status, status.num_done) == ("finished", 0, 1000)
    assert "errors    prompt_too_long: 3 rows, e.g. row 17: the prompt has 9,000 tokens" in show(status)
    assert "errors    empty_prompt: 2 rows\n" in show(status), "of an earlier attempt, whose example is not known"


def test_a_finished_run_that_retries_its_errors_is_live(files: StatusFiles) -> None:
    (files.run_dir / "_SUCCESS").write_text("{}")
    files.write(0, run=RUN)
    assert files.watcher.read().state == "live"


# ---- attempts


def test_files_of_an_earlier_larger_attempt_do_not_count(files: StatusFiles) -> None:
    for rank in range(4):
        files.write(rank, 4, is_running=False, run=RUN)
    files.attempt = 2
    files.write_run_json(attempt=2)
    files.write(0, 1, run={**RUN, "num_done": 600})
    status = files.watcher.read()
    assert (status.state, status.attempt, len(status.ranks), status.num_done) == ("live", 2, 1, 600)


def test_ranks_that_are_starting_show_before_an_attempt_begins_and_who_is_missing(files: StatusFiles) -> None:
    files.write(0, 4, state="stopped", is_running=False)
    for rank in (0, 2):
        files.write(rank, 4, attempt=None, phase="joining the other ranks", phase_s=70.0)
    status = files.watcher.read()
    assert (status.state, status.exit_status, status.attempt) == ("starting", 0, 1)
    assert "waits for rank 1 (not there yet), rank 3 (not there yet)" in show(status)
    assert [view.state for view in status.ranks] == ["live", "missing", "live", "missing"]


def test_a_start_that_died_leaves_the_earlier_attempt_as_it_ended(files: StatusFiles) -> None:
    files.write(0, state="stopped", is_running=False)
    files.write(0, attempt=None, is_running=False)
    assert files.watcher.read().state == "stopped"


def test_a_first_start_that_died_is_dead(tmp_path: Path) -> None:
    files = StatusFiles(tmp_path / "run")
    (files.run_dir / "run.json").unlink()
    assert not files.watcher.has_run
    files.write(0, 2, attempt=None, is_running=False)
    assert files.watcher.has_run
    assert files.watcher.read().state == "dead"


def test_ranks_that_load_are_starting(files: StatusFiles) -> None:
    files.write(0, phase="loading the model", run={"num_rows": 1000})
    assert files.watcher.read().state == "starting"


def test_a_directory_without_status_files_is_unknown_and_counted_by_its_journal(files: StatusFiles) -> None:
    status = files.watcher.read()
    assert (status.state, status.exit_status, status.num_done) == ("unknown", 1, 0)
    (files.run_dir / "_SUCCESS").write_text('{"num_rows": 7, "errors": {}}')
    assert (files.watcher.read().state, files.watcher.read().num_done) == ("finished", 7)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"state": "live"}', b'{"rank": 0, "state": "odd"}', b"\xff"])
def test_a_damaged_file_counts_as_none(content: bytes, files: StatusFiles) -> None:
    files.write(1, 2, run=RUN)
    (files.run_dir / "status" / "rank-0.json").write_bytes(content)
    status = files.watcher.read()
    assert status.state == "live" and [view.state for view in status.ranks] == ["missing", "live"]


def test_fields_of_a_newer_version_are_ignored_and_missing_ones_have_defaults(files: StatusFiles) -> None:
    record = files.write(0, run=RUN)
    path = files.run_dir / "status" / record.path_name
    content = json.loads(path.read_text())
    del content["wait_s"], content["counts"]["num_waiting"]
    content["new"] = content["counts"]["new"] = content["run"]["new"] = [1]
    path.write_text(json.dumps(content))
    assert files.watcher.read().state == "live"


# ---- what the whole shows


def test_a_node_that_sees_its_own_ranks_only_shows_the_sums_over_all(files: StatusFiles) -> None:
    for rank in (2, 3):
        files.write(rank, 4, run=RUN, counts={"num_rows": 100})
    status = files.watcher.read()
    assert (status.num_done, status.num_ranks) == (400, 4)
    assert [view.state for view in status.ranks] == ["missing", "missing", "live", "live"]


def test_stragglers_are_named_the_slowest_first_while_rows_are_unclaimed(files: StatusFiles) -> None:
    for rank, rate in enumerate([100, 40, 110, 20, 105, 95]):
        files.write(rank, 6, machine=HERE, run=RUN, counts={"tokens_per_s": rate})
    text = show(files.watcher.read())
    assert "slow      rank 3 on here: 20 tokens/s, 20 % of the other ranks' median" in text
    assert text.index("rank 3 on here: 20") < text.index("rank 1 on here: 40"), text
    assert "rank 5 on here: 95" not in text
    files.write(0, 6, run={**RUN, "num_unclaimed": 0}, counts={"tokens_per_s": 100})
    assert not files.watcher.read().stragglers, "engines run out of rows"


def test_errors_of_all_ranks_are_merged_by_type_with_an_example_that_is_escaped(files: StatusFiles) -> None:
    files.write(0, 2, run=RUN, errors=(ErrorKind("bad_sampling", 1, 90, "n=0"),))
    kinds = (ErrorKind("wrong_type", 5, 30, "prompt is\n\x1b]0;owned\x07"), ErrorKind("bad_sampling", 3, 20, "n=-1"))
    files.write(1, 2, run=RUN, errors=kinds)
    text = show(files.watcher.read())
    assert r"errors    wrong_type: 5 rows, e.g. row 30: prompt is\n\x1b]0;owned\x07" in text
    assert "errors    bad_sampling: 4 rows, e.g. row 20: n=-1" in text


def test_a_rank_that_keeps_the_others_waiting_is_named(files: StatusFiles) -> None:
    for rank in (0, 2):
        files.write(rank, 3, phase="loading the model", phase_s=100.0, wait_s=60.0)
    files.write(1, 3, phase="loading the model", phase_s=130.0)
    assert "waits for rank 1 on here (loading the model, 2 min 10 s)" in show(files.watcher.read())


def test_short_waits_name_nobody(files: StatusFiles) -> None:
    files.write(0, 2, phase="planning", wait_s=1.0)
    files.write(1, 2, phase="planning")
    assert not files.watcher.read().waits_for


def test_the_ranks_with_the_last_rows_are_named(files: StatusFiles) -> None:
    end = {**RUN, "num_unclaimed": 0, "num_done": 995}
    files.write(0, 2, run=end, wait_s=50.0)
    files.write(1, 2, run=end, counts={"num_running": 4, "num_waiting": 1})
    assert "waits for rank 1 on here (generating, 5 sequences left)" in show(files.watcher.read())


def test_the_time_left_has_a_range_from_how_the_rows_have_come(files: StatusFiles) -> None:
    history = History(files.run_dir / "status" / "rank-0.history.jsonl")
    history.append([{"attempt": 1, "elapsed_s": 40.0, "phase": "generating", "is_change": True, "run_num_done": 300}])
    for seconds in range(10, 101, 10):
        sample = {"attempt": 1, "elapsed_s": 40.0 + seconds, "phase": "generating", "run_num_done": 300 + seconds}
        history.append([sample])
    files.write(0, elapsed_s=141.0, run={**RUN, "num_done": 401})
    status = files.watcher.read()
    assert status.time_left is not None and round(status.time_left.expected_s) == 599, "one row a second"
    assert status.time_left.low_s < 599 < status.time_left.high_s and status.rows_per_s == 1.0
    assert "time left 9 min 59 s (" in show(status)


def test_progress_counts_from_when_generating_last_began() -> None:
    def sample(elapsed_s: float, num_done: int, phase: str = "generating", **fields: object) -> dict[str, object]:
        return {"attempt": 2, "elapsed_s": elapsed_s, "phase": phase, "run_num_done": num_done, **fields}

    samples = [
        {**sample(1, 5), "attempt": 1},
        sample(10, 50, is_change=True),
        sample(15, 60),
        sample(16, 60, "planning", is_change=True),  # a rank was lost
        sample(17, 60, "loading the model", is_change=True, step="model"),
        sample(30, 60, is_change=True),
        sample(35, 70),
    ]
    assert select_progress(samples, 2) == [(30.0, 60), (35.0, 70)]


def test_each_state_has_an_exit_status() -> None:
    assert {state for state, status in EXIT_STATUSES.items() if status == 75} == {"stopped"}
    assert {state for state, status in EXIT_STATUSES.items() if status == 1} == {"failed", "dead", "unknown"}
