"""Run a short series of random faults; `python tests/chaos.py --faults 1000` runs a long one."""

from __future__ import annotations

import importlib
import json
import os
import signal
from pathlib import Path

import pytest
from helpers.chaos.attempt import Attempt, read_state
from helpers.chaos.faults import KINDS
from helpers.chaos.plan import AttemptPlan, Limits, RankPlan
from helpers.chaos.rank import HOOKS, MEETING_HOOK
from helpers.chaos.series import make_schedule
from helpers.jobs import REPO, Launcher, free_port, wait_for

NUM_FAULTS = len(KINDS)  # on the fake engine: each kind once


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize(
    ("engine", "faults", "workers", "kinds"),
    [
        pytest.param("fake", NUM_FAULTS, 3, ",".join(KINDS), id="fake"),
        pytest.param("vllm", 3, 1, "kill_engine,kill_rank_0,stop_engine", marks=pytest.mark.vllm),
    ],
)
def test_random_faults_lose_duplicate_and_change_no_row(
    launcher: Launcher, tmp_path: Path, engine: str, faults: int, workers: int, kinds: str
) -> None:
    arguments = ["--engine", engine, "--faults", str(faults), "--workers", str(workers), "--kinds", kinds]
    job = launcher.start([launcher.python, str(REPO / "tests" / "chaos.py"), *arguments])
    assert job.wait(1500) == 0, job.output
    assert json.loads(job.output.strip().splitlines()[-1])["num_faults"] == faults


def test_a_short_series_has_every_kind_of_fault() -> None:
    assert set(make_schedule(list(KINDS), "fake", NUM_FAULTS, seed=0)) == set(KINDS)


@pytest.mark.parametrize(("module", "path"), [*HOOKS.values(), MEETING_HOOK])
def test_each_phase_begins_with_a_function_that_exists(module: str, path: str) -> None:
    owner = importlib.import_module(module)
    for name in path.split("."):
        owner = getattr(owner, name)
    assert callable(owner)


def test_a_rank_that_stops_itself_after_a_pause_is_not_waited_for(launcher: Launcher, tmp_path: Path) -> None:
    plan = AttemptPlan(tmp_path, tmp_path / "run", "srun", Limits.for_engine("fake"))
    attempt, pid = Attempt(plan, [], launcher, ""), launcher.start(["sleep", "300"]).process.pid
    attempt.signal(pid, signal.SIGSTOP)
    attempt.signal(pid, signal.SIGCONT)
    os.kill(pid, signal.SIGSTOP)  # as an event of its plan does
    wait_for(lambda: read_state(pid) == "T")
    attempt.note_own_stops([pid])
    assert attempt.stopped == {pid}


def test_a_failure_tells_how_each_rank_ended_though_its_stderr_is_lost(launcher: Launcher, tmp_path: Path) -> None:
    plan = AttemptPlan(tmp_path, tmp_path / "run", "srun", Limits.for_engine("fake"), ranks=[RankPlan(), RankPlan()])
    for name, text in {"phase-0": "meeting", "exit-0-17": "75", "error-0": "JoinFailed: the port is taken"}.items():
        (tmp_path / name).write_text(text)
    assert Attempt(plan, [], launcher, "").describe_ranks().splitlines() == [
        "rank 0: last seen meeting; exit statuses 75; JoinFailed: the port is taken",
        "rank 1: last seen None; exit statuses none",
    ]


def test_a_free_port_is_none_that_an_outgoing_connection_can_take() -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert not first <= free_port() <= last
