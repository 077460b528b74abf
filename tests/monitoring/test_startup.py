"""Start-up as a user sees it: what took how long, and whom one waits for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import Launcher, load_result, make_numbered_rows, wait_for

from dpgen.config.schema import Config, DataConfig, RunConfig
from dpgen.engine.launch import has_cold_caches
from dpgen.monitoring.startup import PeriodicLog, StartupTimer


class FakeClock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_phases_add_up() -> None:
    watch = FakeClock()
    phases = StartupTimer(watch)
    for name, seconds in (("ranks meet", 2.0), ("input", 0.25), ("model", 61.0)):
        watch.now_s += seconds
        phases.mark(name)
    assert str(phases) == "ready after 1 min 03 s: ranks meet 2.0 s, input 0.2 s, model 61.0 s"


def test_a_short_wait_is_not_worth_a_line() -> None:
    watch, said = FakeClock(), list[str]()
    waiting = PeriodicLog(said.append, lambda: f"waiting at {watch.now_s:.0f}", watch)
    for _ in range(50):
        waiting()
        watch.now_s += 1
    assert said == ["waiting at 110", "waiting at 140"]


@pytest.mark.multi
@pytest.mark.slow
def test_a_rank_that_loads_for_long_is_waited_for_aloud(
    launcher: Launcher, write_config: Callable[..., str], tmp_path: Path
) -> None:
    jobs = launcher.start_like_srun("run", write_config(make_numbered_rows(20)), each=[[], ["engine.load_s=13"]])
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].output
    assert jobs[0].output.count("this rank's model is loaded, 1 of 2 are") == 1, jobs[0].output
    phases = re.search(r"ready after .*model (\S+) s, other ranks' models (\S+) s", jobs[0].output)
    assert phases and float(phases[2]) > 8 > float(phases[1]), jobs[0].output
    assert "loaded" not in jobs[1].output, "rank 0 says it for all"


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize(("load_first", "one_by_one"), [("always", True), ("auto", False)])
def test_one_rank_of_a_node_fills_the_caches_while_the_others_wait(
    launcher: Launcher, write_config: Callable[..., str], load_first: str, one_by_one: bool
) -> None:
    conf = write_config(make_numbered_rows(20), engine={"load_s": 3.0}, parallel={"load_first": load_first})
    job = launcher.dpgen("run", conf, ranks=3)
    assert job.wait() == 0, job.output
    phases = re.search(r"ready after .*model (\S+) s, other ranks' models (\S+) s", job.output)
    assert phases and (float(phases[1]) + float(phases[2]) >= 6.0) == one_by_one, job.output


def test_a_model_or_a_compile_cache_that_is_not_there_is_cold(tmp_path: Path) -> None:
    environ = {"VLLM_CACHE_ROOT": str(tmp_path / "vllm")}

    def config(model: str, **engine: Any) -> Config:
        return Config(RunConfig(dir="x"), DataConfig(path="x", prompt_column="x"), model, engine)

    assert has_cold_caches(config(str(tmp_path)), environ)
    assert not has_cold_caches(config(str(tmp_path), enforce_eager=True), environ)
    assert has_cold_caches(config("nobody/nothing", enforce_eager=True), environ)
    (tmp_path / "vllm" / "torch_compile_cache" / "a1b2").mkdir(parents=True)
    assert not has_cold_caches(config(str(tmp_path)), environ)


@pytest.mark.multi
@pytest.mark.slow
def test_without_the_agreement_on_the_kv_cache_a_late_rank_holds_nobody(
    launcher: Launcher, write_config: Callable[..., str], tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(40), parallel={"sync_kv_cache": False})
    jobs = launcher.start_like_srun("run", conf, each=[[], ["engine.load_s=20"]])

    def journaled() -> int:
        return sum(path.stat().st_size for path in (tmp_path / "run" / "journal").glob("*-rank-00000-*"))

    wait_for(lambda: "ready after" in jobs[0].output)
    wait_for(lambda: journaled() > 1000, 15)
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].output
    assert len(load_result(tmp_path / "run")) == 40
    by_rank = [each["num_rows"] for each in json.loads((tmp_path / "run" / "run.json").read_text())["manifests"]]
    assert by_rank == [40, 0], "the other one came when all was done"


@pytest.mark.multi
@pytest.mark.slow
def test_thirty_two_ranks_on_one_machine(launcher: Launcher, write_config: Callable[..., str], tmp_path: Path) -> None:
    job = launcher.dpgen("run", write_config(make_numbered_rows(320), engine={"step_s": 0.01}), ranks=32)
    assert job.wait() == 0, job.output
    assert [row["row_id"] for row in load_result(tmp_path / "run")] == list(range(320))
    assert "320 rows over 32 ranks" in job.output and "ready after" in job.output
