"""Repeat runs with random faults until enough faults have happened: each kind once at first, then any."""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from helpers.chaos.attempt import Attempt, ChaosFailure
from helpers.chaos.checker import check_attempt, check_result
from helpers.chaos.faults import KINDS, Fault, make_fault
from helpers.chaos.inputs import STEP_S, Inputs
from helpers.chaos.plan import AttemptPlan, Limits, RankPlan
from helpers.jobs import Launcher

_MAX_TRIES = 6  # of a fault that does not get to happen, for example since another one ends the attempt first
_TAIL_LINES = 60
# What is chosen from, more often what costs less: a rank alone starts in a second of processor time, two ranks in five,
# torchrun in two more.
_LAUNCHERS = ("alone", "alone", "alone", "alone", "srun", "srun", "torchrun")
_NUM_RANKS = {"srun": (2, 2, 2, 2, 2, 3, 4), "torchrun": (2, 2, 2, 3)}
_NUM_FAULTS = (1, 2, 2, 3, 3)  # of one attempt


@dataclass
class SeriesResult:
    """Count what has happened.

    Attributes:
        faults: kind → how often it happened.
        launchers: launcher and number of ranks → attempts.
        num_ended: attempts of which only stopped processes were left, which the runner ended.
        skipped: kinds that did not get to happen, try after try.
        failure: what dpgen did wrong, with the place of the files; "" if nothing.
    """

    faults: Counter[str] = field(default_factory=Counter)
    launchers: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    num_runs: int = 0
    num_attempts: int = 0
    num_ended: int = 0
    longest_attempt_s: float = 0.0
    failure: str = ""


class Series:
    """Run one series of faults.

    Args:
        folder: receives all files.
        engine: "fake" or "vllm".
        schedule: kinds of faults, in the order in which they are tried.
        seed: of all random choices, though not of the machine's timing.
    """

    def __init__(self, folder: Path, engine: str, num_rows: int, schedule: Sequence[str], seed: int) -> None:
        self._folder, self._engine = folder, engine
        self._random = Random(seed)
        folder.mkdir(parents=True)
        self._launcher = Launcher(folder)
        self._inputs = Inputs(folder, engine, num_rows, self._random, self._launcher)
        self._queue = list(schedule)
        self._tries: Counter[str] = Counter()
        self.result = SeriesResult()

    def run(self) -> SeriesResult:
        """Let all faults of the schedule happen, over as many runs as needed, and check each run's result."""
        try:
            while self._queue:
                self._run_once()
        except ChaosFailure as error:
            self.result.failure = f"{error}\nfiles: {self._folder}"
            print(f"FAILED: {self.result.failure}", file=sys.stderr, flush=True)
        return self.result

    def _run_once(self) -> None:
        self.result.num_runs += 1
        run_dir = self._folder / f"chaos-{self.result.num_runs}" / "run"
        faults_of_run = self._take_faults_of_run()
        hangs = bool(faults_of_run)
        num_faults = self._random.randint(1, 8)
        num_disturbed = 0
        while not (run_dir / "_SUCCESS").exists():
            num_left = num_faults - num_disturbed
            faults = self._take_faults(num_left) if num_left > 0 else []
            num_disturbed += len(faults)
            self._run_attempt(run_dir, [*faults_of_run, *faults], hangs=hangs)
        try:
            check_result(run_dir, self._inputs.get_expected(hangs))
        except ChaosFailure as error:
            raise ChaosFailure(f"run {self.result.num_runs}: {error}") from None
        shutil.rmtree(run_dir.parent)
        for fault in faults_of_run:
            self.result.faults[fault.kind] += 1

    def _run_attempt(self, run_dir: Path, faults: list[Fault], *, hangs: bool) -> None:
        self.result.num_attempts += 1
        folder = self._folder / f"attempt-{self.result.num_attempts}"
        plan = self._make_plan(run_dir, folder, faults)
        conf = self._inputs.write_config(hangs)
        attempt = Attempt(plan, faults, self._launcher, conf)
        place = f"{plan.launcher} {plan.num_ranks}"
        self.result.launchers[place] += 1
        try:
            attempt.run()
            happened = [fault for fault in faults if fault.has_happened(attempt)]
            check_attempt(attempt, happened, is_complete=(run_dir / "_SUCCESS").exists())
        except ChaosFailure as error:
            kinds = ", ".join(fault.kind for fault in faults) or "no fault"
            tail = "\n".join(attempt.output.splitlines()[-_TAIL_LINES:])
            raise ChaosFailure(
                f"attempt {self.result.num_attempts} ({place}, {kinds}): {error}\nits output ends:\n{tail}"
            ) from None
        self._count(attempt, [fault for fault in faults if not fault.is_of_run], happened)
        for job in attempt.jobs:
            job.log.unlink()
        shutil.rmtree(folder)

    def _count(self, attempt: Attempt, faults: list[Fault], happened: list[Fault]) -> None:
        self.result.num_ended += attempt.was_ended
        self.result.longest_attempt_s = max(self.result.longest_attempt_s, attempt.seconds)
        for fault in faults:
            if fault in happened:
                self.result.faults[fault.kind] += 1
                self._tries[fault.kind] = 0
                continue
            self._tries[fault.kind] += 1
            if self._tries[fault.kind] < _MAX_TRIES:
                self._queue.insert(0, fault.kind)
            else:
                self.result.skipped[fault.kind] += 1
                self._tries[fault.kind] = 0
                self._queue += [self._random.choice(self._queue or list(self.result.faults))]
        names = ", ".join(f"{fault.kind}{'' if fault in happened else ' (not yet)'}" for fault in faults)
        print(
            f"{self._folder.name}: attempt {self.result.num_attempts} ({attempt.plan.launcher} "
            f"{attempt.plan.num_ranks}, {attempt.seconds:.0f} s): {names or 'no fault'}, "
            f"statuses {attempt.read_exit_statuses()}, {len(self._queue)} faults to go",
            file=sys.stderr,
            flush=True,
        )

    # ---- random choices

    def _take_faults_of_run(self) -> list[Fault]:
        """Take at most one of the next faults that belong to a whole run."""
        for index, kind in enumerate(self._queue[:6]):
            fault = make_fault(kind, self._random)
            if fault.is_of_run:
                del self._queue[index]
                return [fault]
        return []

    def _take_faults(self, max_faults: int) -> list[Fault]:
        """Take the next faults, one to three, as far as one launcher can have them all."""
        faults: list[Fault] = []
        number = min(max_faults, self._random.choice(_NUM_FAULTS))
        index = 0
        while index < min(len(self._queue), 8) and len(faults) < number:
            fault = make_fault(self._queue[index], self._random)
            is_possible = bool(_find_launchers([*faults, fault])) and not fault.is_of_run
            # What did not get to happen is tried alone.
            is_alone = not faults or self._tries[fault.kind] == 0
            is_free = fault.place is None or all(fault.place != other.place for other in faults)
            if is_possible and is_alone and is_free and all(fault.kind != other.kind for other in faults):
                faults.append(fault)
                del self._queue[index]
                if self._tries[fault.kind] > 1:
                    break
            else:
                index += 1
        return faults

    def _make_plan(self, run_dir: Path, folder: Path, faults: list[Fault]) -> AttemptPlan:
        launcher, num_ranks = self._choose_launcher(faults)
        folder.mkdir()
        limits = Limits.for_engine(self._engine)
        plan = AttemptPlan(folder, run_dir, launcher, limits, ranks=[RankPlan() for _ in range(num_ranks)])
        plan.max_restarts = self._random.choice([0, 0, 1])
        plan.arguments = [
            f"run.engine_timeout_s={limits.engine_timeout_s:.1f}",
            f"run.engine_start_timeout_s={limits.engine_start_timeout_s:.1f}",
        ]
        is_disturbed = any(not fault.is_of_run for fault in faults)
        if self._engine == "fake" and is_disturbed:
            plan.arguments += [f"engine.step_s={STEP_S}", "engine.load_s=0.5"]
        for fault in faults:
            fault.prepare(plan)
        return plan

    def _choose_launcher(self, faults: list[Fault]) -> tuple[str, int]:
        launchers = _find_launchers(faults)
        if not any(not fault.is_of_run for fault in faults):
            launchers = [name for name in launchers if name == "alone"] or launchers  # the cheapest
        launcher = self._random.choice(launchers)
        if launcher == "alone":
            return launcher, 1
        return launcher, 2 if self._engine == "vllm" else self._random.choice(_NUM_RANKS[launcher])


def _find_launchers(faults: Sequence[Fault]) -> list[str]:
    """Return the launchers under which all these faults can happen."""
    needs_ranks = any(fault.min_ranks > 1 for fault in faults)
    names = [name for name in _LAUNCHERS if not (needs_ranks and name == "alone")]
    return [name for name in names if all(name in fault.launchers for fault in faults)]


def make_schedule(kinds: Sequence[str], engine: str, num_faults: int, seed: int) -> list[str]:
    """Return a list of kinds: each kind that the engine can have once, in random order, then random ones."""
    random = Random(seed)
    possible = [kind for kind in kinds if engine in make_fault(kind, random).engines]
    schedule: list[str] = []
    first = random.sample(possible, len(possible))
    while len(schedule) < num_faults:
        schedule.append(first.pop() if first else random.choice(possible))
    return schedule


def run_series(
    folder: Path, engine: str, num_rows: int, schedule: Sequence[str], seed: int
) -> tuple[SeriesResult, float]:
    """Run one series, and return its result and its seconds; for a process pool."""
    started_s = time.monotonic()
    series = Series(folder, engine, num_rows, schedule, seed)
    return series.run(), time.monotonic() - started_s


def list_kinds(text: str | None) -> list[str]:
    """Return the kinds that a comma-separated list names; all of them for None.

    Raises:
        ValueError: a kind is unknown.
    """
    kinds = list(KINDS) if text is None else text.split(",")
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ValueError(f"unknown kinds: {', '.join(unknown)}; kinds: {', '.join(KINDS)}")
    return kinds
