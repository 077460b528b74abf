"""A rank's first engine, started before there is a job for it: the job takes it, or it ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from helpers.jobs import descendants, wait_for

from dpgen.config.loader import load
from dpgen.config.schema import Config
from dpgen.distributed.topology import Topology
from dpgen.engine.keeping.early_start import EarlyStart
from dpgen.engine.starting.engine_starter import find_placement
from dpgen.scheduling.programs.loading import load_program

Surroundings = tuple[dict[str, str], Sequence[int] | None]


def make_config(*arguments: str, prompts: str = "data.prompt_column=p") -> Config:
    return load([], ["run.dir=r", "run.engine=fake", "model=m", "data.path=d.jsonl", prompts, *arguments])


def make_topology(launcher: str) -> Topology:
    return Topology(0, 2, 0, 2, "node", launcher, source="the test")


def find_surroundings(*affinities: frozenset[int]) -> Surroundings:
    """Return what the job finds to be the engine's environment and cores, once all ranks have told theirs."""
    told = affinities or [frozenset(os.sched_getaffinity(0))] * 2
    return find_placement(make_config(), make_topology("torchrun"), told, None).find_surroundings(0, 1)


@pytest.fixture
def early() -> Iterator[EarlyStart]:
    early = EarlyStart()
    yield early
    early.end()


@pytest.fixture
def find_engines() -> Callable[[], list[int]]:
    """Return a function that finds the engines which this test has started, beside those that other tests keep."""
    kept = descendants(os.getpid(), b"dpgen.engine.server")
    return lambda: [pid for pid in descendants(os.getpid(), b"dpgen.engine.server") if pid not in kept]


def test_a_job_takes_the_process_once_if_it_would_start_the_same(early: EarlyStart) -> None:
    early.begin(make_config(), make_topology("torchrun"))
    surroundings = find_surroundings()
    server = early.take(*surroundings)
    assert server is not None and early.take(*surroundings) is None
    early.end()
    assert server.process.poll() is None, "it is the job's now"
    server.kill()


def test_a_job_of_programs_takes_it_though_its_modules_are_looked_for_in_the_working_directory(
    early: EarlyStart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "of_mine.py").write_text("async def answer(row, llm): return {}")
    config = make_config(prompts="program.function=of_mine:answer")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    early.begin(config, make_topology("torchrun"))
    load_program(config.program)
    server = early.take(*find_surroundings())
    assert server is not None
    server.kill()


def test_a_rank_that_its_launcher_has_bound_to_cores_of_its_own_takes_it(
    early: EarlyStart, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = sorted(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2 * len(own))
    early.begin(make_config(), make_topology("slurm"))
    server = early.take(*find_surroundings(frozenset(own), frozenset(core + len(own) for core in own)))
    assert server is not None
    server.kill()


def test_a_process_that_has_other_devices_than_the_job_gives_it_ends(
    early: EarlyStart, find_engines: Callable[[], list[int]]
) -> None:
    early.begin(make_config(), make_topology("torchrun"))
    wait_for(lambda: find_engines() != [])  # its command line shows a moment after it has started
    [engine] = find_engines()
    environment, cores = find_surroundings()
    assert early.take({**environment, "CUDA_VISIBLE_DEVICES": "1"}, cores) is None
    assert not Path(f"/proc/{engine}").exists()


@pytest.mark.parametrize(
    ("launcher", "arguments"),
    [("wrapper", []), ("torchrun", ["parallel.launcher=external", "parallel.tensor_parallel_size=2"])],
    ids=["no place on the node", "an engine of two ranks"],
)
def test_an_engine_whose_place_other_ranks_tell_starts_after_they_have_joined(
    early: EarlyStart, find_engines: Callable[[], list[int]], launcher: str, arguments: list[str]
) -> None:
    early.begin(make_config(*arguments), make_topology(launcher))
    assert not find_engines()
