"""Start-up as a user sees it: the time of each phase, and which ranks are waited for."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.clock import FakeClock
from helpers.jobs import Job, Launcher, WriteConfig, load_result, make_numbered_rows, read_run_json, wait_for

from dpgen.config.schema import Config
from dpgen.config.sections import DataConfig, RunConfig
from dpgen.engine.starting.caches import find_compile_cache, has_cold_caches
from dpgen.monitoring.startup import StartupTimer


def test_each_phase_lasts_from_the_end_of_the_one_before_it() -> None:
    clock = FakeClock(100.0)
    startup = StartupTimer(clock)
    for name, seconds in (("rendezvous", 2.0), ("input", 0.25), ("model", 61.0)):
        clock.now_s += seconds
        startup.mark(name)
    assert startup.describe() == "ready after 1 min 03 s: rendezvous 2.0 s, input 0.2 s, model 61.0 s"


def test_the_line_tells_work_from_waits_and_what_the_engine_did_meanwhile() -> None:
    clock = FakeClock(100.0)
    startup = StartupTimer(clock)
    marks = [("input", startup.mark), ("engine's options", startup.mark_wait), ("rows to do", startup.mark)]
    for name, mark in [*marks, ("model", startup.mark_wait)]:
        clock.now_s += 1.5
        mark(name)
    assert startup.describe([("imports", 3.0), ("model", 2.5)]) == (
        "ready after 6 s: input 1.5 s, rows to do 1.5 s, waited for engine's options 1.5 s, model 1.5 s "
        "(meanwhile the engine: imports 3.0 s, model 2.5 s)"
    )


# Opens the input only once the engine loads its model, and prints the ids of engines.
LATE_INPUT = """
import sys, threading
import dpgen.run
from dpgen.cli import main
from dpgen.engine.starting.log_file import EngineLog

is_loading, open_input = threading.Event(), dpgen.run.open_input
write, start_life = EngineLog.write, EngineLog.start_life

def watch(self, line):
    write(self, line)
    if line == "weights":
        is_loading.set()

def open_late(*arguments):
    print("LOADING BEFORE THE INPUT:", is_loading.wait(30), flush=True)
    return open_input(*arguments)

def print_pid(self, pid):
    print("ENGINE", pid, flush=True)
    start_life(self, pid)

EngineLog.write, EngineLog.start_life, dpgen.run.open_input = watch, print_pid, open_late
sys.exit(main(["run", *sys.argv[1:]]))
"""


def start_with_late_input(launcher: Launcher, *arguments: str) -> Job:
    return launcher.start([launcher.python, "-c", LATE_INPUT, *arguments])


def test_the_model_loads_while_the_input_is_read(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    job = start_with_late_input(launcher, write_config(make_numbered_rows(20), engine={"load_output": "weights"}))
    assert job.wait() == 0, job.output
    assert "LOADING BEFORE THE INPUT: True" in job.output
    assert "meanwhile the engine: imports" in job.output, "the line tells the engine's time from the rank's"
    assert len(load_result(tmp_path / "run")) == 20
    log = (tmp_path / "run" / "logs" / "rank-0.engine.log").read_text()
    assert "weights" in log, "what an engine prints before the run directory is checked is kept"


def test_a_wrong_input_ends_the_engine_that_loads_meanwhile(launcher: Launcher, write_config: WriteConfig) -> None:
    conf = write_config(make_numbered_rows(20), engine={"load_output": "weights", "kv_cache_memory_bytes": 1 << 20})
    job = start_with_late_input(launcher, conf, "data.prompt_column=promt")
    assert job.wait() == 2, job.output
    assert "LOADING BEFORE THE INPUT: True" in job.output
    assert job.output.count("'promt' is no column") == 1 and "Traceback" not in job.output
    [pid] = re.findall(r"ENGINE (\d+)", job.output)
    assert not os.path.exists(f"/proc/{pid}"), "no engine is left behind"


@contextlib.contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Keep a file locked."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.mark.multi
@pytest.mark.slow
def test_rank_0_logs_which_ranks_it_waits_for_while_they_load(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    with hold_lock(tmp_path / "loading"):
        jobs = launcher.start_like_srun(
            "run",
            write_config(make_numbered_rows(20)),
            rank_arguments=[[], [f"engine.load_lock={tmp_path / 'loading'}"]],
        )
        wait_for(lambda: "(loading the model)" in jobs[0].output or jobs[0].process.poll() is not None)
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].output
    assert jobs[0].output.count("waiting for 1 of 2 ranks: rank 1 (loading the model)") == 1, jobs[0].output
    phases = re.search(r"ready after .*model (\S+) s, other ranks' models (\S+) s", jobs[0].output)
    assert phases and float(phases[2]) > 8, jobs[0].output
    assert "loaded" not in jobs[1].output, "rank 0 logs for all ranks"


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize(("load_first", "one_by_one"), [("always", True), ("auto", False)])
def test_the_node_leader_loads_first_if_the_caches_are_to_be_filled(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, load_first: str, one_by_one: bool
) -> None:
    engine = {"load_output": "weights", "load_lock": str(tmp_path / "loading")}
    conf = write_config(make_numbered_rows(20), engine=engine, parallel={"load_first": load_first})

    def find_loading() -> list[str]:
        logs = sorted((tmp_path / "run" / "logs").glob("*.engine.log"))
        return [path.name for path in logs if "weights" in path.read_text()]

    with hold_lock(tmp_path / "loading"):  # whoever loads is not through before this ends
        job = launcher.dpgen("run", conf, ranks=3)
        waits_for_leader = "to fill the caches"
        wait_for(lambda: waits_for_leader in job.output or len(find_loading()) == 3 or job.process.poll() is not None)
        assert (waits_for_leader in job.output) == one_by_one, job.output
        assert find_loading() == [f"rank-{rank}.engine.log" for rank in range(1 if one_by_one else 3)]
    assert job.wait() == 0, job.output
    assert len(find_loading()) == 3


def test_caches_are_cold_without_the_model_s_files_or_compiled_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    environ = {"VLLM_CACHE_ROOT": str(tmp_path / "vllm")}

    def make_config(model: str, **engine: Any) -> Config:
        return Config(RunConfig(dir="x"), DataConfig(path="x", prompt_column="x"), model=model, engine=engine)

    assert has_cold_caches(make_config(str(tmp_path)), environ, 8)
    assert not has_cold_caches(make_config(str(tmp_path), enforce_eager=True), environ, 8)
    assert not has_cold_caches(make_config(str(tmp_path)), {**environ, "VLLM_DISABLE_COMPILE_CACHE": "1"}, 8)
    for options in ({"compilation_config": {"mode": 0}}, {"optimization_level": 0}):
        assert not has_cold_caches(make_config(str(tmp_path), **options), environ, 8), "nothing would ever be in it"
    assert has_cold_caches(make_config(str(tmp_path), compilation_config={"mode": 3}), environ, 8)
    assert has_cold_caches(make_config("nobody/nothing", enforce_eager=True), environ, 8)
    assert not has_cold_caches(make_config(str(tmp_path)), environ, 4), "with so many cores all compile at once"
    assert has_cold_caches(make_config("nobody/nothing"), environ, 4)
    (tmp_path / "vllm" / "torch_compile_cache" / "a1b2").mkdir(parents=True)
    assert not has_cold_caches(make_config(str(tmp_path)), environ, 8)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not has_cold_caches(make_config(str(tmp_path)), {"VLLM_CACHE_ROOT": "~/vllm"}, 8)
    assert not has_cold_caches(make_config(str(tmp_path)), {"XDG_CACHE_HOME": "~"}, 8)


def test_the_cache_of_a_user_without_a_home_is_where_vllm_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM leaves "~" as it is then: containers run as users that no file knows."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54_321)
    assert find_compile_cache({}) == Path("~/.cache/vllm/torch_compile_cache")


@pytest.mark.multi
@pytest.mark.slow
def test_without_sync_kv_cache_no_rank_waits_for_a_late_one(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(40), parallel={"sync_kv_cache": False})
    jobs = launcher.start_like_srun("run", conf, rank_arguments=[[], ["engine.load_s=40"]])

    def count_journaled_bytes() -> int:
        return sum(path.stat().st_size for path in (tmp_path / "run" / "journal").glob("*-rank-00000-*"))

    wait_for(lambda: "ready after" in jobs[0].output)
    wait_for(lambda: count_journaled_bytes() > 1000, 35)
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].output
    assert len(load_result(tmp_path / "run")) == 40
    rows_by_rank = [manifest["num_rows"] for manifest in read_run_json(tmp_path / "run")["manifests"]]
    assert rows_by_rank == [40, 0], "all rows were done when the late rank was ready"


@pytest.mark.multi
@pytest.mark.slow
def test_sixteen_ranks_on_one_machine(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    job = launcher.dpgen("run", write_config(make_numbered_rows(160), engine={"step_s": 0.01}), ranks=16)
    assert job.wait() == 0, job.output
    assert [row["row_id"] for row in load_result(tmp_path / "run")] == list(range(160))
    assert "160 rows over 16 ranks" in job.output and "ready after" in job.output
