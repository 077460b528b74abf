"""Declare every kind of fault: what it changes before the start of an attempt, and what it does while the ranks run.

- `KINDS` names them. A kind is a class, or one class with other arguments.
- `Fault.completes_under` is the place for stricter expectations: an attempt whose only fault it is must then complete.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterator
from random import Random
from typing import ClassVar

from helpers.chaos.attempt import Attempt, wait_s, wait_until
from helpers.chaos.plan import PHASES, AttemptPlan, Event

LAUNCHERS = ("alone", "srun", "torchrun")
# Phases in which the ranks of an srun job continue without a lost one, other than rank 0, and complete the run.
SURVIVED_PHASES = ("planning", "loading", "generating", "gathering", "writing")
_JUMP_S = 7200.0
_TIME_LIMIT_S = 1800


class Fault:
    """One fault of one attempt.

    Attributes:
        kind: its name in `KINDS`.
        launchers, engines, min_ranks: where it can happen.
        is_of_run: it changes the input, and so belongs to all attempts of a run.
        may_fail: a rank may end with status 1.
        place: what it changes, where no second fault of the attempt can change the same; None: anything goes.
        completes_under: launchers under which an attempt with this fault alone completes.
    """

    launchers: tuple[str, ...] = LAUNCHERS
    engines: tuple[str, ...] = ("fake", "vllm")
    min_ranks = 1
    is_of_run: ClassVar[bool] = False
    may_fail = False
    place: ClassVar[str | None] = None
    completes_under: tuple[str, ...] = ()

    def __init__(self, kind: str, random: Random) -> None:
        self.kind, self.random = kind, random

    def prepare(self, plan: AttemptPlan) -> None:
        """Change the plan of the attempt."""

    def act(self, attempt: Attempt) -> Iterator[bool]:
        """Do something to the attempt's processes. Yield False to wait, True to wait before a SIGCONT."""
        return iter(())

    def has_happened(self, attempt: Attempt) -> bool:
        """Return True if the fault has taken effect."""
        return attempt.has_fault(self.kind)

    def must_complete(self, attempt: Attempt) -> bool:
        """Return True if the attempt, whose only fault this is, must complete."""
        return attempt.plan.launcher in self.completes_under


# ---- signals from outside


class SignalFault(Fault):
    """Send signals to one process at some time of the attempt.

    Args:
        target: "engine", "any rank", "rank" (not rank 0), "rank 0" or "launcher".
        number: the signal.
        pause_s: send SIGCONT after a time within these bounds; None: never.
    """

    def __init__(
        self,
        kind: str,
        random: Random,
        *,
        target: str,
        number: signal.Signals,
        pause_s: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(kind, random)
        self._target, self._number = target, number
        self._pause_s = None if pause_s is None else random.uniform(*pause_s)
        if target == "launcher":
            self.launchers = ("torchrun",)
        self.min_ranks = 2 if target in ("rank", "launcher") else 1
        is_engine_killed = target == "engine" and number == signal.SIGKILL
        self.completes_under = LAUNCHERS if is_engine_killed else ()
        self._has_happened = False
        # Mostly while rows are generated; the delay often reaches into a later phase.
        self._phase = random.choice([*PHASES[: PHASES.index("gathering")], "generating", "generating", "generating"])
        self._delay_s = random.choice([0.0, random.uniform(0, 0.3), random.uniform(0, 2)])

    def act(self, attempt: Attempt) -> Iterator[bool]:
        rank = self._choose_rank(attempt)
        yield from wait_until(lambda: attempt.has_begun(rank, self._phase))
        yield from wait_s(self._delay_s)
        yield from wait_until(lambda: bool(self._find_victims(attempt, rank)))
        pid = self.random.choice(self._find_victims(attempt, rank) or [0])
        if not pid:
            return
        attempt.signal(pid, self._number)
        self._has_happened = True
        self.may_fail = self._ends_a_start(attempt, rank)
        if self._pause_s is not None:
            yield from wait_s(self._pause_s, will_continue=True)
            attempt.signal(pid, signal.SIGCONT)

    def has_happened(self, attempt: Attempt) -> bool:
        return self._has_happened

    def _ends_a_start(self, attempt: Attempt, rank: int) -> bool:
        """Return True if a start may fail now that is not tried again.

        A start of an engine that takes too long is one. Another is a meeting that lacks a rank: the others give up.
        """
        if self._target == "engine":
            return self._number == signal.SIGSTOP and not attempt.has_begun(rank, "generating")
        return not attempt.has_begun(rank, "input")

    def _choose_rank(self, attempt: Attempt) -> int:
        num_ranks = attempt.plan.num_ranks
        if self._target == "rank":
            return self.random.randrange(1, num_ranks)
        return 0 if self._target == "rank 0" else self.random.randrange(num_ranks)

    def _find_victims(self, attempt: Attempt, rank: int) -> list[int]:
        if self._target == "launcher":
            return [job.process.pid for job in attempt.jobs if job.process.poll() is None]
        if self._target == "engine":
            return attempt.find_engine_pids(rank)
        pid = attempt.get_rank_pid(rank)
        return [] if pid is None else [pid]


class RepeatedKill(SignalFault):
    """Kill an engine, and its successor as soon as that has rows."""

    def __init__(self, kind: str, random: Random) -> None:
        super().__init__(kind, random, target="engine", number=signal.SIGKILL)

    def act(self, attempt: Attempt) -> Iterator[bool]:
        rank = self._choose_rank(attempt)
        yield from wait_until(lambda: attempt.has_begun(rank, "generating"))
        for _ in range(2):
            yield from wait_until(lambda: bool(attempt.find_engine_pids(rank)))
            yield from wait_s(self.random.uniform(0.2, 0.8))
            for pid in attempt.find_engine_pids(rank):
                attempt.signal(pid, signal.SIGKILL)
                yield from wait_until(lambda pid=pid: pid not in attempt.find_engine_pids(rank))
        self._has_happened = True


# ---- events within a rank process


class EventFault(Fault):
    """Let a rank kill itself, or stop itself for good, at a moment of a phase.

    Args:
        phase: of the rank.
    """

    def __init__(self, kind: str, random: Random, *, phase: str) -> None:
        super().__init__(kind, random)
        is_meeting = phase == "meeting"
        self.min_ranks = 2 if is_meeting else 1
        self.launchers = ("srun", "torchrun") if is_meeting else LAUNCHERS
        self.may_fail = is_meeting  # the others give up waiting for it
        self._phase, self._rank = phase, 0
        self._delay_s = random.choice([0.0, 0.0, random.uniform(0.001, 0.3)])

    def prepare(self, plan: AttemptPlan) -> None:
        action = self.random.choice(["kill", "kill", "stop"])
        self._rank = self.random.randrange(plan.num_ranks)
        plan.ranks[self._rank].events.append(Event(self.kind, self._phase, self._delay_s, action))

    def must_complete(self, attempt: Attempt) -> bool:
        is_exact = self._delay_s == 0  # otherwise the next phase may have begun
        is_survived = self._phase in SURVIVED_PHASES and attempt.plan.launcher == "srun"
        return is_exact and is_survived and self._rank > 0


class FullDisk(Fault):
    """Let no file of a rank grow any more, while rows are journaled or the result is written."""

    may_fail = True

    def prepare(self, plan: AttemptPlan) -> None:
        phase = self.random.choice(["generating", "generating", "gathering", "writing"])
        rank = self.random.randrange(plan.num_ranks) if phase == "generating" else 0
        num_bytes = self.random.choice([600, 3000])
        plan.ranks[rank].events.append(Event(self.kind, phase, 0.0, "full-disk", num_bytes))


class ClockJump(Fault):
    """Let the wall clock of one rank, or of all, jump by two hours, while a time limit of half an hour holds."""

    place = "clock"

    def __init__(self, kind: str, random: Random, *, jump_s: float) -> None:
        super().__init__(kind, random)
        self._jump_s = jump_s

    def prepare(self, plan: AttemptPlan) -> None:
        plan.arguments.append(f"run.time_limit={_TIME_LIMIT_S}")
        after_s = self.random.uniform(1, 5)
        ranks = plan.ranks if self.random.random() < 0.5 else [self.random.choice(plan.ranks)]
        for rank in ranks:
            rank.clock_jump = (after_s, self._jump_s)

    def has_happened(self, attempt: Attempt) -> bool:
        return attempt.has_fault("clock")


class UnwritableStderr(Fault):
    """Let nothing be written to the stderr of one rank, or of all."""

    place = "stderr"
    completes_under = LAUNCHERS

    def __init__(self, kind: str, random: Random, *, how: str) -> None:
        super().__init__(kind, random)
        self._how = how

    def prepare(self, plan: AttemptPlan) -> None:
        for rank in plan.ranks if self.random.random() < 0.5 else [self.random.choice(plan.ranks)]:
            rank.stderr = self._how

    def has_happened(self, attempt: Attempt) -> bool:
        return attempt.has_fault("stderr") and attempt.has_begun(0, "planning")


# ---- engines


class EngineFault(Fault):
    """Let the engine of one rank be faulty by itself; `KINDS` gives the options of the fake engine.

    Args:
        options: of that rank's engine.
        max_faults: how often, over all its lives; None: always.
        chance_of_all: that the engines of all ranks are faulty, together as often, and not one of them alone.
    """

    engines = ("fake",)
    place = "engine"  # a second one's fault_dir would replace the first one's

    def __init__(
        self,
        kind: str,
        random: Random,
        *,
        options: Callable[[Random], str],
        max_faults: tuple[int, int] | None = None,
        chance_of_all: float = 0.0,
        completes: bool = True,
    ) -> None:
        super().__init__(kind, random)
        self._options, self._hits_all = options, random.random() < chance_of_all
        self.completes_under = LAUNCHERS if completes else ()
        self._max_faults = None if max_faults is None else random.randint(*max_faults)

    def prepare(self, plan: AttemptPlan) -> None:
        fault_dir = plan.folder / self.kind
        fault_dir.mkdir()
        arguments = [f"engine.{self._options(self.random)}", f"engine.fault_dir={fault_dir}"]
        if self._max_faults is not None:
            arguments.append(f"engine.max_faults={self._max_faults}")
        for rank in plan.ranks if self._hits_all else [self.random.choice(plan.ranks)]:
            rank.arguments += arguments

    def has_happened(self, attempt: Attempt) -> bool:
        num_faults = len(list((attempt.plan.folder / self.kind).iterdir()))
        return num_faults >= (self._max_faults or 1)


class PermanentStartFailure(EngineFault):
    """Let the engine of one rank fail at each start."""

    may_fail = True

    def __init__(self, kind: str, random: Random) -> None:
        super().__init__(kind, random, options=lambda random: "load_error=never", completes=False)


# ---- the run directory and the input


class UnsharedRunDirs(Fault):
    """Give each rank a host name and a run directory of its own, as on nodes without a shared disk."""

    launchers = ("srun", "torchrun")
    min_ranks = 2
    completes_under = ("srun", "torchrun")

    def prepare(self, plan: AttemptPlan) -> None:
        for number, rank in enumerate(plan.ranks):
            rank.host = f"node{number}"
            if number:
                rank.arguments.append(f"run.dir={plan.run_dir.with_name(f'run-of-node{number}')}")

    def has_happened(self, attempt: Attempt) -> bool:
        return attempt.has_begun(0, "planning")


class HangingRender(Fault):
    """Let the input hold a row whose prompt never gets rendered."""

    is_of_run = True
    completes_under = LAUNCHERS

    def has_happened(self, attempt: Attempt) -> bool:
        return attempt.has_begun(0, "gathering")


def _signal(target: str, number: signal.Signals, pause_s: tuple[float, float] | None = None) -> Callable[..., Fault]:
    return functools.partial(SignalFault, target=target, number=number, pause_s=pause_s)


_SHORT_PAUSE_S = (0.5, 3.0)
_ANY_PAUSE_S = (0.5, 14.0)  # shorter and longer than a lease

KINDS: dict[str, Callable[[str, Random], Fault]] = {
    "kill_engine": _signal("engine", signal.SIGKILL),
    "kill_engine_twice": RepeatedKill,
    "kill_rank": _signal("rank", signal.SIGKILL),
    "kill_rank_0": _signal("rank 0", signal.SIGKILL),
    "kill_launcher": _signal("launcher", signal.SIGKILL),
    "stop_engine": _signal("engine", signal.SIGSTOP),
    "stop_rank": _signal("rank", signal.SIGSTOP),
    "stop_rank_0": _signal("rank 0", signal.SIGSTOP),
    "stop_launcher": _signal("launcher", signal.SIGSTOP),
    "pause_engine": _signal("engine", signal.SIGSTOP, _ANY_PAUSE_S),
    "pause_rank": _signal("rank", signal.SIGSTOP, _ANY_PAUSE_S),
    "pause_rank_0": _signal("rank 0", signal.SIGSTOP, _ANY_PAUSE_S),
    "pause_launcher": _signal("launcher", signal.SIGSTOP, _SHORT_PAUSE_S),
    "sigterm_rank": _signal("any rank", signal.SIGTERM),
    "sigusr1_rank": _signal("any rank", signal.SIGUSR1),
    **{f"lose_while_{phase}": functools.partial(EventFault, phase=phase) for phase in PHASES if phase != "starting"},
    "full_disk": FullDisk,
    "clock_forward": functools.partial(ClockJump, jump_s=_JUMP_S),
    "clock_back": functools.partial(ClockJump, jump_s=-_JUMP_S),
    "full_stderr": functools.partial(UnwritableStderr, how="full"),
    "unread_stderr": functools.partial(UnwritableStderr, how="unread"),
    "livelock": functools.partial(
        EngineFault, options=lambda random: f"livelock_after={random.randrange(20)}", max_faults=(1, 2)
    ),
    "sick_engine": functools.partial(EngineFault, options=lambda random: "raise_on=What", completes=False),
    "crash_on_one_row_twice": functools.partial(
        EngineFault,
        options=lambda random: f"crash_on=number {random.randrange(100)}.",
        max_faults=(2, 2),
        chance_of_all=1.0,  # any rank may get the row
    ),
    "transient_start_failure": functools.partial(
        EngineFault, options=lambda random: "load_error=not yet", max_faults=(1, 2), chance_of_all=0.5
    ),
    "permanent_start_failure": PermanentStartFailure,
    "unshared_run_dirs": UnsharedRunDirs,
    "hanging_render": HangingRender,
}


def make_fault(kind: str, random: Random) -> Fault:
    """Return a fault of this kind, with random details."""
    return KINDS[kind](kind, random)
