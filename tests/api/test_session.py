"""Generate from a Python program, with real ranks and the fake engine."""

from __future__ import annotations

import contextlib
import doctest
import json
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from helpers.jobs import REPO, Launcher, descendants, load_result, make_numbered_rows, wait_for, write_into
from helpers.results import count_journal_bytes
from helpers.tiny_vision import make_image

import dpgen
from dpgen.journal.reader import list_segments, read_segment

ROWS = make_numbered_rows(24)
KEYWORDS: Mapping[str, Any] = {"model": "none", "prompt_column": "prompt"}
FAKE: Mapping[str, Any] = {**KEYWORDS, "run": {"engine": "fake"}, "quiet": True}
SLOW = {"step_s": 0.05, "max_num_seqs": 2}

PROGRAM = """
import sys, json
import dpgen

rows = [{"prompt": f"row number {index}"} for index in range(24)]
engine = {"step_s": 0.05, "max_num_seqs": 2} if "slow" in sys.argv else {}
"""


FindRanks = Callable[[], list[int]]


@pytest.fixture
def find_ranks() -> FindRanks:
    """List the rank processes that this test has started; one that other tests share may run beside them."""
    before = descendants(os.getpid(), b"dpgen.api.worker")
    return lambda: [pid for pid in descendants(os.getpid(), b"dpgen.api.worker") if pid not in before]


def count_results(run_dir: Path) -> np.ndarray:
    """Return how often the journal has each row."""
    segments = [read_segment(path) for path in list_segments(run_dir / "journal")]
    return np.bincount(np.concatenate([segment.frames.results.row for segment in segments]))


def write_program(folder: Path, body: str) -> str:
    path = folder / "program.py"
    path.write_text(PROGRAM + body)
    return str(path)


GENERATE = """
try:
    result = dpgen.generate(rows, model="none", prompt_column="prompt", run_dir=sys.argv[1], engine=engine,
                            run={"engine": "fake"}, sampling={"max_tokens": 4})
except dpgen.DpgenError as error:
    print("CAUGHT", type(error).__name__, error.is_resumable, error.run_dir, error, flush=True)
else:
    print("RESULT", result["generated_text"][:], flush=True)
"""


@pytest.mark.slow
def test_a_call_gives_what_the_command_gives_and_disturbs_nothing(
    launcher: Launcher, tmp_path: Path, find_ranks: FindRanks
) -> None:
    conf = write_into(tmp_path, ROWS, sampling={"max_tokens": 4})
    assert launcher.dpgen("run", conf).wait() == 0
    expected = load_result(tmp_path / "run")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    environment, loggers = dict(os.environ), list(logging.getLogger("dpgen").handlers)
    results: list[Any] = []
    thread = threading.Thread(
        target=lambda: results.append(dpgen.generate(ROWS, **FAKE, sampling={"max_tokens": 4}))  # not the main thread
    )
    thread.start()
    thread.join()
    assert results[0].to_list() == expected
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    assert environment == dict(os.environ) and loggers == logging.getLogger("dpgen").handlers
    assert not find_ranks(), "no rank is left"


@pytest.mark.slow
def test_a_run_directory_is_resumed_by_the_same_rows_and_refused_to_others(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = dpgen.generate(ROWS, **FAKE, run_dir=run_dir)
    assert first is not None
    inputs = sorted((run_dir / "input").iterdir())
    with pytest.raises(dpgen.ConfigError, match="holds results of another input") as caught:
        dpgen.generate([{"prompt": "other"}] * 24, **FAKE, run_dir=run_dir)
    assert caught.value.run_dir == run_dir and sorted((run_dir / "input").iterdir()) == inputs
    grown = dpgen.generate([*ROWS, {"prompt": "one more"}], **FAKE, run_dir=run_dir)
    assert grown is not None and grown.to_list()[:24] == first.to_list() and len(grown) == 25
    assert count_results(run_dir).tolist() == [1] * 25, "no finished row is generated again"
    assert dpgen.load_result(run_dir).to_list() == grown.to_list()
    next((run_dir / "dataset").glob("train-*")).unlink()
    with pytest.raises(dpgen.DpgenError, match=r"0 files .* the run's own command writes it again from the journal"):
        dpgen.load_result(run_dir)


@pytest.mark.slow
def test_a_run_directory_of_an_older_version_is_resumed(tmp_path: Path) -> None:
    rows = [{"prompt": f"row {index}", "about": {"ab"[index % 2]: index}} for index in range(4)]
    older = datasets.Dataset.from_list(rows)  # saved without the description that a program's rows have now
    dpgen.generate(older, **FAKE, run_dir=tmp_path / "run")
    inputs = sorted((tmp_path / "run" / "input").iterdir())
    again = dpgen.generate(rows, **FAKE, run_dir=tmp_path / "run")
    assert again is not None and len(again) == 4
    assert sorted((tmp_path / "run" / "input").iterdir()) == inputs
    assert count_results(tmp_path / "run").tolist() == [1] * 4, "no finished row is generated again"


@pytest.mark.slow
def test_a_wrong_input_is_a_config_error_and_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with dpgen.Session(**FAKE) as session:
        with pytest.raises(dpgen.ConfigError, match="'row_id' has the name of a result column"):
            session.generate([{"prompt": "a", "row_id": 3}])
        with pytest.raises(dpgen.ConfigError, match="prompt"):
            session.generate([{"text": "a"}])
        with pytest.raises(dpgen.ConfigError, match="temprature"):
            session.generate(ROWS, sampling={"temprature": 1})
        with pytest.raises(dpgen.NoRowSucceeded) as failed:
            session.generate([{"prompt": "too long " * 100}])
        assert failed.value.run_dir is not None and failed.value.run_dir.is_dir(), "its errors can be read"
        for file_format in ("jsonl", "parquet"):
            empty = session.generate({"prompt": []}, output={"format": file_format})
            assert empty is not None and len(empty) == 0
        assert "generated_text" in empty.column_names
        assert [path for path in tmp_path.iterdir() if path.name.startswith("dpgen-run-")] == [failed.value.run_dir]
    assert [path.name for path in tmp_path.iterdir()] == [failed.value.run_dir.name]


@pytest.mark.slow
def test_a_stream_gives_each_row_once_and_loses_nothing_where_it_is_broken_off(
    tmp_path: Path, find_ranks: FindRanks
) -> None:
    keywords = {**FAKE, "run_dir": tmp_path / "run", "sampling": {"max_tokens": 4}}
    seen = []
    for row in dpgen.stream(ROWS, **keywords, engine=SLOW):
        seen.append(row["row_id"])
        if len(seen) == 5:
            break
    assert not find_ranks(), "breaking off ends the ranks"
    rows = list(dpgen.stream(ROWS, **keywords))
    assert sorted(row["row_id"] for row in rows) == list(range(24))
    assert set(seen) <= {row["row_id"] for row in rows[:23]}, "finished rows come first"
    assert count_results(tmp_path / "run").tolist() == [1] * 24
    again = list(dpgen.stream(ROWS, **keywords))
    by_id = {row["row_id"]: row for row in rows}
    assert len(again) == 24 and all(by_id[row["row_id"]] == row for row in again)
    assert [by_id[index] for index in range(24)] == dpgen.load_result(tmp_path / "run").to_list()


@pytest.mark.slow
def test_rows_of_a_list_are_prompted_and_returned_as_those_of_a_file(tmp_path: Path) -> None:
    values = [{"a": 1}, {"b": [2, "x"]}, "text"]
    rows = [{"q": "a", "x": values[0]}, {"q": "b", "x": values[1]}, {"q": "c", "x": values[2]}, {"q": "\ud800"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = "{{ q }} {{ x | tojson }} {{ 'has b' if x.b is defined }}"
    keywords = {"model": "none", "template": template, "run": {"engine": "fake"}, "quiet": True}
    expected = dpgen.generate(tmp_path / "in.jsonl", **keywords)
    result = dpgen.generate(rows, **keywords)
    assert result is not None and expected is not None
    assert result["x"][:] == [*values, None] and result.to_list() == expected.to_list()
    assert result["error"][3]["type"] == "invalid_text" and result["error"][:3] == [None] * 3
    streamed = sorted(dpgen.stream(rows, **keywords), key=lambda row: row["row_id"])
    assert streamed == result.to_list()


@pytest.mark.slow
def test_ctrl_c_is_no_end_of_a_stream_though_all_rows_are_generated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stream = dpgen.stream(ROWS, **FAKE)
    first = next(stream)
    [folder] = [path for path in tmp_path.iterdir() if path.name.startswith("dpgen-run-")]
    wait_for(lambda: (folder / "_SUCCESS").exists())
    with pytest.raises(dpgen.Interrupted) as caught:
        stream.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert caught.value.run_dir == folder
    rows = list(dpgen.stream(ROWS, **FAKE, run_dir=folder))
    assert len(rows) == 24 and first in rows


@pytest.mark.slow
def test_relative_paths_count_from_where_the_program_is_at_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dpgen.Session(**FAKE) as session:
        for name, number in (("one", 2), ("two", 3)):
            (tmp_path / name).mkdir()
            monkeypatch.chdir(tmp_path / name)
            Path("rows.jsonl").write_text("".join(f'{{"prompt": "{name} {row}"}}\n' for row in range(number)))
            result = session.generate("rows.jsonl", run_dir="out")
            assert result is not None and result["prompt"][:] == [f"{name} {row}" for row in range(number)]
            assert (tmp_path / name / "out" / "_SUCCESS").exists()


@pytest.mark.slow
def test_calls_leave_no_pipe_open(find_ranks: FindRanks) -> None:
    def count_pipes() -> int:
        targets = []
        for link in Path(f"/proc/{find_ranks()[0]}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                targets.append(os.readlink(link))
        return sum(target.startswith("pipe:") for target in targets)

    with dpgen.Session(**FAKE) as session:
        session.generate(ROWS[:2])
        num_pipes = count_pipes()
        for _ in range(20):
            session.generate(ROWS[:2])
        assert count_pipes() < num_pipes + 10, "those of the last calls may still be there"


@pytest.mark.slow
def test_a_session_goes_on_after_its_ranks_have_died_and_after_a_call_that_could_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, find_ranks: FindRanks
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with dpgen.Session(**FAKE) as session:
        assert session.generate(ROWS[:2]) is not None
        [rank] = find_ranks()
        os.kill(rank, signal.SIGKILL)
        os.waitid(os.P_PID, rank, os.WEXITED | os.WNOWAIT)  # its command is gone a moment before it has ended
        assert session.generate(ROWS[:3]) is not None
    with dpgen.Session(**FAKE) as session:
        with monkeypatch.context() as patched:
            patched.setattr("dpgen.api.processes.sys.executable", str(tmp_path / "nowhere"))
            with pytest.raises(OSError, match="nowhere"):
                session.generate(ROWS[:2])
        assert session.generate(ROWS[:2]) is not None
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("dpgen-")], "nothing temporary stays"


@pytest.mark.slow
def test_leaving_a_session_stops_a_stream_that_is_held(tmp_path: Path, find_ranks: FindRanks) -> None:
    with dpgen.Session(**FAKE, engine=SLOW) as session:
        stream = session.stream(ROWS, run_dir=tmp_path / "run")
        next(stream)
    assert not find_ranks()
    status = json.loads((tmp_path / "run" / "status" / "rank-0.json").read_text())
    assert status["state"] == "stopped", "interrupted, and not killed"


@pytest.mark.slow
def test_a_session_loads_its_engine_once(tmp_path: Path) -> None:
    results = []
    with dpgen.Session(**FAKE) as session:
        for name, max_tokens in (("a", 3), ("b", 6)):
            sampling = {"max_tokens": max_tokens}
            results.append(session.generate(ROWS, run_dir=tmp_path / name, sampling=sampling))
        stream = session.stream(ROWS[:3], run_dir=tmp_path / "c")
        next(stream)
        with pytest.raises(dpgen.ConfigError, match="this Session is in use"):
            session.generate(ROWS)
        assert len(list(stream)) == 2
        changes: list[dict[str, Any]] = [{"model": "other"}, {"engine": {"step_s": 1}}, {"run": {"engine": "vllm"}}]
        for keywords in changes:
            with pytest.raises(dpgen.ConfigError, match="can't change between calls"):
                session.generate(ROWS, **keywords)
    assert [result["num_generated_tokens"][0] for result in results if result is not None] == [3, 6]
    logs = [(tmp_path / name / "logs" / "rank-0.engine.log").read_text() for name in "abc"]
    assert len({tuple(re.findall(r"pid (\d+)", log)) for log in logs}) == 1, "each log names the same process, once"
    assert (tmp_path / "a" / "_SUCCESS").exists() and (tmp_path / "b" / "_SUCCESS").exists()


@pytest.mark.slow
def test_a_session_keeps_the_workers_that_prepare_images_and_they_end_with_it(
    find_ranks: FindRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    rows = [{"prompt": f"number {number}", "image": make_image(number)} for number in range(6)]

    def find_workers() -> list[int]:
        return [pid for rank in find_ranks() for pid in descendants(rank, b"dpgen.workers.worker")]

    data = {"images_column": "image", "media_workers": 1}
    with dpgen.Session(**FAKE, data=data, engine={"max_num_seqs": 2}) as session:
        found = []
        for number in range(4):
            result = session.generate(rows, sampling={"max_tokens": 1 + number})
            assert result is not None and not any(result["error"]), result["error"][:]
            found += find_workers()
            if number == 2:
                os.kill(found[-1], signal.SIGKILL)
        assert len(found) == 4 and len(set(found)) == 2 and found[0] == found[2], "one, and another once it was killed"
        [rank] = find_ranks()
        os.kill(rank, signal.SIGKILL)
        wait_for(lambda: not Path(f"/proc/{found[-1]}").exists())
        assert session.generate(rows) is not None
        found = find_workers()
    assert not any(Path(f"/proc/{pid}").exists() for pid in found)


@pytest.mark.slow
def test_ctrl_c_stops_a_call_resumable(launcher: Launcher, tmp_path: Path) -> None:
    program, run_dir = write_program(tmp_path, GENERATE), tmp_path / "run"
    job = launcher.start([launcher.python, program, str(run_dir), "slow"])
    wait_for(lambda: count_journal_bytes(run_dir) > 0)
    os.kill(job.process.pid, signal.SIGINT)
    assert job.wait() == 0, job.output
    assert f"CAUGHT Interrupted True {run_dir} interrupted by SIGINT" in job.output
    assert f"run_dir='{run_dir}'" in job.output, "the message says how to go on"
    job = launcher.start([launcher.python, program, str(run_dir)])
    assert job.wait() == 0 and "RESULT" in job.output, job.output
    assert count_results(run_dir).tolist() == [1] * 24


@pytest.mark.slow
def test_a_killed_program_takes_its_ranks_along_and_the_same_call_goes_on(launcher: Launcher, tmp_path: Path) -> None:
    program, run_dir = write_program(tmp_path, GENERATE), tmp_path / "run"
    (tmp_path / "tmp").mkdir()
    job = launcher.start([launcher.python, program, str(run_dir), "slow"], TMPDIR=str(tmp_path / "tmp"))
    wait_for(lambda: count_journal_bytes(run_dir) > 0)
    ranks = descendants(job.process.pid, b"dpgen.api.worker")
    assert len(ranks) == 1
    job.process.kill()
    killed_s = time.monotonic()
    wait_for(lambda: not Path(f"/proc/{ranks[0]}").exists())
    assert time.monotonic() - killed_s < 40, "a rank that still waits for its program's next job holds the GPU"
    assert "Traceback" not in job.output and not list((tmp_path / "tmp").glob("dpgen-ranks-*"))
    job = launcher.start([launcher.python, program, str(run_dir)])
    assert job.wait() == 0 and "RESULT" in job.output, job.output
    assert count_results(run_dir).tolist() == [1] * 24


IDLE = """
import time

with dpgen.Session(model="none", prompt_column="prompt", run={"engine": "fake"}, num_gpus=2) as session:
    session.generate(rows)
    print("IDLE", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.multi
def test_ranks_without_a_job_end_with_their_killed_program_and_leave_no_folder(
    launcher: Launcher, tmp_path: Path
) -> None:
    (tmp_path / "tmp").mkdir()
    job = launcher.start([launcher.python, write_program(tmp_path, IDLE)], TMPDIR=str(tmp_path / "tmp"))
    wait_for(lambda: "IDLE" in job.output)
    ranks = descendants(job.process.pid, b"dpgen.api.worker")
    assert len(list((tmp_path / "tmp").glob("dpgen-ranks-*"))) == 1
    job.process.kill()
    wait_for(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks))
    assert not list((tmp_path / "tmp").glob("dpgen-ranks-*"))


@pytest.mark.slow
def test_a_killed_rank_is_an_error_that_says_so(launcher: Launcher, tmp_path: Path) -> None:
    program, run_dir = write_program(tmp_path, GENERATE), tmp_path / "run"
    job = launcher.start([launcher.python, program, str(run_dir), "slow"])
    wait_for(lambda: count_journal_bytes(run_dir) > 0)
    os.kill(descendants(job.process.pid, b"dpgen.api.worker")[0], signal.SIGKILL)
    assert job.wait() == 0, job.output
    assert f"CAUGHT RanksLost True {run_dir} the rank process ended without a word (killed by SIGKILL)" in job.output


TORCHRUN = """
import os
import torch
import torch.distributed as dist

dist.init_process_group("gloo")  # the program's own
rank = dist.get_rank()
result = dpgen.generate(rows, model="none", prompt_column="prompt", run={"engine": "fake"}, result_on="all",
                        sampling={"max_tokens": 4})
print(f"RESULT {result['generated_text'][:]}\\n", end="", flush=True)
with dpgen.Session(model="none", prompt_column="prompt", run={"engine": "fake"}) as session:
    for count in (5, 7):
        result = session.generate(rows[:count])
        assert (result is None) == (rank > 0) and (rank or len(result) == count)
    try:
        session.generate(rows[: 5 + rank])
    except dpgen.DpgenError as error:
        print(f"CAUGHT {type(error).__name__} {error}\\n", end="", flush=True)  # one write: ranks share the pipe
    streamed = sorted(row["row_id"] for row in session.stream(rows))
    assert streamed == ([] if rank else list(range(24))), streamed
total = torch.ones(1)
dist.all_reduce(total)
assert total.item() == 2
print("DONE\\n", end="", flush=True)
dist.destroy_process_group()  # torch aborts at times where a program leaves that to its end
"""


@pytest.mark.slow
@pytest.mark.multi
def test_under_torchrun_every_rank_calls_beside_its_own_process_group(launcher: Launcher, tmp_path: Path) -> None:
    program = write_program(tmp_path, TORCHRUN)
    job = launcher.dpgen(ranks=2, program=[program])
    assert job.wait() == 0, job.output
    results = [line for line in job.output.splitlines() if line.startswith("RESULT ")]
    assert len(results) == 2 and results[0] == results[1], "result_on=all: every rank has it"
    assert job.output.count("CAUGHT ConfigError") == 2, job.output
    assert "different datasets: that of rank 1 is not that of rank 0" in job.output
    assert job.output.count("DONE") == 2


@pytest.mark.slow
@pytest.mark.multi
def test_num_gpus_starts_the_ranks(tmp_path: Path, find_ranks: FindRanks) -> None:
    alone = dpgen.generate(ROWS, **FAKE)
    with dpgen.Session(**FAKE, num_gpus=2) as session:
        first = session.generate(ROWS, run_dir=tmp_path / "run")
        with pytest.raises(dpgen.ConfigError, match="'row_id'"):
            session.generate([{"prompt": "a", "row_id": 3}])
        second = session.generate(ROWS[:4])
    assert alone is not None and first is not None and second is not None
    assert first.to_list() == alone.to_list() and second.to_list() == alone.to_list()[:4]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["dp_size"] == 2
    assert not find_ranks()


@pytest.mark.parametrize("text", ["Say hello", "What is 1/2 + 1/3?", "... and then?"])
def test_a_list_of_texts_is_no_list_of_files(text: str) -> None:
    words = re.escape(f"dataset[0] is the text {text!r}, and names no file: a row is a dict of columns")
    with pytest.raises(dpgen.ConfigError, match=words):
        dpgen.generate([text, "1 + 1?"], **FAKE)


@pytest.mark.parametrize("texts", [["hi"], ["cats", "dogs"], ["Why?"]])
def test_a_list_of_words_is_no_list_of_files(texts: list[str]) -> None:
    with pytest.raises(dpgen.ConfigError, match=re.escape(f"dataset[0] is the text {texts[0]!r}")):
        dpgen.generate(texts, **FAKE)


def test_a_list_with_a_pattern_of_files_is_one_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    monkeypatch.chdir(tmp_path)
    result = dpgen.generate(["rows*"], **FAKE)
    assert result is not None and result["prompt"][:] == ["a"]


@pytest.mark.parametrize("path", ["my answers.jsonl", "../my answers", "~/my answers"])
def test_a_list_with_a_file_that_is_not_there_names_it(path: str) -> None:
    with pytest.raises(dpgen.ConfigError, match=f"data.path: no such file or directory: {re.escape(path)}"):
        dpgen.generate([path, "more.jsonl"], **FAKE)


def test_num_gpus_is_rejected_where_it_has_no_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(dpgen.ConfigError, match="num_gpus=3: must be a multiple of the 2 GPUs"):
        dpgen.generate(ROWS, **FAKE, num_gpus=3, parallel={"tensor_parallel_size": 2})
    for wrong in (0, 4 / 2, "2", True):
        with pytest.raises(dpgen.ConfigError, match=f"num_gpus={wrong!r}: must be a whole number of at least 1"):
            dpgen.generate(ROWS, **FAKE, num_gpus=wrong)  # type: ignore[arg-type]
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(dpgen.ConfigError, match="the launcher has started the ranks already"):
        dpgen.generate(ROWS, **FAKE, num_gpus=2)


@pytest.mark.slow
def test_each_example_in_a_docstring_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(dpgen.__file__).parents[1])
    for number, name in enumerate(["generate", "stream", "Session", "load_config", "load_result"]):
        target = getattr(dpgen, name)
        tests = doctest.DocTestFinder(recurse=False).find(target, name, globs={"folder": tmp_path / str(number)})
        assert [bool(test.examples) for test in tests] == [True], f"{name} has no example"
        assert doctest.DocTestRunner().run(tests[0]).failed == 0


@pytest.mark.slow
@pytest.mark.multi
def test_the_program_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [program] = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)
    program = program.replace('model="Qwen/Qwen2.5-7B-Instruct"', 'model="none", run={"engine": "fake"}, quiet=True')
    rows = [{"question": "What is 1 + 1?", "messages": [{"role": "user", "content": "hello"}]}] * 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"dataset": rows}
    exec(program.replace("num_gpus=8", "num_gpus=2"), names)
    assert [names[name].num_rows for name in ("rows", "cold", "warm")] == [3, 3, 3]
    assert len(capsys.readouterr().out.splitlines()) == 3, "one line for each row of the stream"
    assert count_results(tmp_path / "runs" / "a").tolist() == [1, 1, 1]
