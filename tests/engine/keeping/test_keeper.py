"""One engine process for several jobs: the model is loaded once, and each job has its own sampling and rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dpgen.config.loader import load
from dpgen.distributed.group import SingleRankGroup
from dpgen.distributed.layout import build_layout
from dpgen.distributed.topology import read_topology
from dpgen.engine.keeping.keeper import EngineKeeper
from dpgen.engine.messages import EngineSpec, EngineStats, RowsFinished
from dpgen.engine.pool.engine_count import EngineCount
from dpgen.engine.pool.engine_pool import EnginePool
from dpgen.engine.process import EngineProcess
from dpgen.engine.starting.launch import prepare_engine
from dpgen.engine.starting.limits import EngineLimits
from dpgen.engine.starting.log_file import EngineLog
from dpgen.engine.starting.server_process import ServerProcess, build_engine_env
from dpgen.errors import ConfigError
from dpgen.records import Request, RequestId, RowResult

ONE = EngineCount(1, "the test has one")
SPEC = EngineSpec("fake", "none", {"kv_cache_memory_bytes": 1 << 16})


class Rank:
    """Give jobs to the engine as a rank does, one after the other."""

    def __init__(self, log: Path) -> None:
        self.keeper, self.pids, self._log = EngineKeeper(), list[int](), log

    def start(self, spec: EngineSpec, index: int = 0) -> EngineProcess:
        env = build_engine_env({}, gpus=None, num_cores=1, log_level="warning")
        process = EngineProcess(spec, ServerProcess(spec.kind, env, None), EngineLog("warning"))
        self.pids.append(process.pid)
        return process

    def begin(self, spec: EngineSpec, num_bytes: int = 1 << 15) -> EnginePool:
        """Return the engine of a job, with its options checked and its model loaded."""
        log = EngineLog("warning")
        log.open(self._log)
        start, limits = self.keeper.wrap_start(self.start, log), EngineLimits(60, 60, 8, 0.1)
        engine = EnginePool(start, spec, limits, ONE)
        engine.start_s = self.keeper.start_s
        engine.load_model(lambda measured: min(measured, num_bytes), lambda: None)
        return engine


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Rank]:
    rank = Rank(tmp_path / "engine.log")
    yield rank
    rank.keeper.close()


def finish(engine: EnginePool, is_done: Callable[[list[RowResult], list[EngineStats]], bool]) -> list[RowResult]:
    results: list[RowResult] = []
    stats: list[EngineStats] = []
    while not is_done(results, stats):
        for event in engine.poll(1.0):
            if isinstance(event, RowsFinished):
                results += event.results
            elif isinstance(event, EngineStats):
                stats.append(event)
    return results


def submit(engine: EnginePool, count: int) -> None:
    engine.submit([Request(RequestId(row), [65 + row], sampling={"seed": 0}) for row in range(count)])


def test_a_second_job_uses_the_loaded_engine_with_its_own_sampling(rank: Rank) -> None:
    texts = []
    for max_tokens in (3, 7):
        spec = dataclasses.replace(SPEC, sampling={"max_tokens": max_tokens})
        engine = rank.begin(spec)
        submit(engine, 2)
        results = finish(engine, lambda results, _: len(results) == 2)
        assert [result.num_generated_tokens for result in results] == [max_tokens] * 2
        texts.append([result.completions[0].text.split()[0] for result in results])
        rank.keeper.take_back(engine)
    assert len(rank.pids) == 1 and texts[0] == texts[1]


def test_a_kept_engine_tells_the_next_job_what_memory_its_engines_divide(rank: Rank) -> None:
    for spec in (dataclasses.replace(SPEC, memory_fraction=0.4), SPEC):
        engine = rank.begin(spec)
        assert engine.supervisors[0].memory.spec.memory_fraction == 0.4
        submit(engine, 1)
        finish(engine, lambda results, _: len(results) == 1)
        rank.keeper.take_back(engine)
    assert len(rank.pids) == 1


@pytest.mark.slow
def test_a_kept_engine_is_known_to_take_as_long_to_start_as_it_took(rank: Rank) -> None:
    spec = dataclasses.replace(SPEC, options={**SPEC.options, "load_s": 6.0})
    for _ in range(2):
        engine = rank.begin(spec)
        assert engine.growth.start_s > 6
        rank.keeper.take_back(engine)
    assert len(rank.pids) == 1


def test_rows_in_flight_of_an_interrupted_job_never_reach_the_next(rank: Rank) -> None:
    slow = dataclasses.replace(SPEC, options={**SPEC.options, "step_s": 0.01}, sampling={"max_tokens": 20})
    engine = rank.begin(slow)
    submit(engine, 8)
    finish(engine, lambda _, stats: bool(stats))
    rank.keeper.take_back(engine)
    engine = rank.begin(dataclasses.replace(slow, sampling={"max_tokens": 2}))
    submit(engine, 1)
    [result] = finish(engine, lambda results, _: bool(results))
    assert (result.row, result.num_generated_tokens) == (0, 2)
    rank.keeper.take_back(engine)
    assert len(rank.pids) == 1


def test_wrong_sampling_of_a_job_costs_that_job_alone(rank: Rank) -> None:
    rank.keeper.take_back(rank.begin(SPEC))
    log = EngineLog("warning")
    wrong = dataclasses.replace(SPEC, sampling={"temprature": 1})
    engine = EnginePool(rank.keeper.wrap_start(rank.start, log), wrong, EngineLimits(60, 60, 8, 0.1), ONE)
    with pytest.raises(ConfigError, match=r"temprature.*temperature"):
        engine.check_options(lambda: None)
    rank.keeper.take_back(engine)
    rank.keeper.take_back(rank.begin(SPEC))
    assert len(rank.pids) == 1, "the engine is loaded only once"


def test_an_engine_that_was_killed_between_two_jobs_is_replaced(rank: Rank) -> None:
    engine = rank.begin(SPEC)
    rank.keeper.take_back(engine)
    engine.kill()
    engine = rank.begin(SPEC)
    submit(engine, 1)
    assert finish(engine, lambda results, _: bool(results))
    rank.keeper.take_back(engine)
    assert len(rank.pids) == 2


@pytest.mark.parametrize("sampling", [{}, {"temprature": 1}])
def test_a_job_that_ends_while_its_input_is_read_leaves_the_engine_to_the_next(
    rank: Rank, sampling: dict[str, int]
) -> None:
    rank.keeper.take_back(rank.begin(SPEC))
    spec = dataclasses.replace(SPEC, sampling=sampling)
    start = rank.keeper.wrap_start(rank.start, EngineLog("warning"))
    engine = EnginePool(start, spec, EngineLimits(60, 60, 8, 0.1), ONE)
    engine.begin_loading()  # and then the input is wrong
    rank.keeper.take_back(engine)
    engine = rank.begin(SPEC)
    submit(engine, 1)
    assert finish(engine, lambda results, _: bool(results))
    rank.keeper.take_back(engine)
    assert len(rank.pids) == 1, "the engine is loaded only once"


def test_all_engines_of_a_rank_are_kept(rank: Rank) -> None:
    pids = []
    for _ in range(2):
        spec = dataclasses.replace(SPEC, num_engines=2)
        limits, log = EngineLimits(60, 60, 8, 0.1), EngineLog("warning")
        count = rank.keeper.count or EngineCount(2, "the test has two")
        pool = EnginePool(rank.keeper.wrap_start(rank.start, log), spec, limits, count)
        pool.load_model(lambda measured: measured, lambda: None)
        while pool.num_ready < 2:
            pool.poll(1.0)
        submit(pool, 30)
        results: list[RowResult] = []
        while len(results) < 30:
            results += finish(pool, lambda results, _: bool(results))
        assert sorted(result.row for result in results) == list(range(30))
        pids.append(list(rank.pids))
        rank.keeper.take_back(pool)
    assert len(pids[0]) == 2 and pids[1] == pids[0], "the second job starts none"
    assert rank.keeper.max_engines == 2, "the next job divides the memory as this one"


def test_the_next_job_may_have_as_many_engines_as_the_memory_was_divided_for(tmp_path: Path) -> None:
    config = load([], [f"run.dir={tmp_path}", "model=m", "data.path=d", "data.prompt_column=p", "run.engine=fake"])
    topology, keeper = read_topology({}), EngineKeeper()
    keeper.count, keeper.max_engines = EngineCount(1, "measured", facts={"step_ms": 8}), 4
    layout = build_layout(topology, config.parallel)
    pool = prepare_engine(config, topology, layout, SingleRankGroup(), EngineLog("warning"), keeper)()
    try:
        pool.check_options(lambda: None)
        assert (pool.growth.count.number, pool.growth.max_engines) == (1, 4)
    finally:
        pool.kill()
