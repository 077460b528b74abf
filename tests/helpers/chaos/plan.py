"""Describe one attempt before it starts: its launcher and ranks, and what goes wrong in each rank process.

The runner writes the plan into the attempt's folder, and each rank process reads its part (`helpers.chaos.rank`). The
rank processes write back into the same folder: their process ids, phases and exit statuses, and which faults happened.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

FOLDER_VARIABLE = "DPGEN_CHAOS_FOLDER"  # also marks every process of an attempt

# The phases of a rank, in order. Each begins when the rank calls the function named in `helpers.chaos.rank`.
PHASES = ("starting", "meeting", "input", "planning", "loading", "generating", "gathering", "writing")


@dataclass(frozen=True)
class Event:
    """Something that a rank process does to itself.

    Attributes:
        name: of the fault; once it has happened, it does not happen again to a restarted rank.
        phase: in which phase.
        delay_s: this long after the phase began.
        action: "kill", "stop" (SIGSTOP), or "full-disk" (no file of this process grows beyond `max_file_bytes`).
    """

    name: str
    phase: str
    delay_s: float = 0.0
    action: str = "kill"
    max_file_bytes: int = 0


@dataclass
class RankPlan:
    """What is special about one rank.

    Attributes:
        arguments: of its command line, beside those of all ranks.
        host: the host name that it sees; None for this machine's.
        stderr: "full" (a full disk) or "unread" (a full pipe that nobody reads); None as it is.
        clock_jump: seconds after its start, and seconds by which its wall clock jumps then; None for no jump.
    """

    arguments: list[str] = field(default_factory=list)
    host: str | None = None
    stderr: str | None = None
    clock_jump: tuple[float, float] | None = None
    events: list[Event] = field(default_factory=list)


@dataclass(frozen=True)
class Limits:
    """Hold the time limits of an attempt in seconds: short ones, and longer ones on a busy machine.

    Attributes:
        join_s: until all ranks have met.
        bound_s: an attempt that takes longer hangs.
    """

    lease_s: float
    engine_timeout_s: float
    engine_start_timeout_s: float
    join_s: float
    bound_s: float

    @classmethod
    def for_engine(cls, engine: str) -> Limits:
        load = os.getloadavg()[0] / len(os.sched_getaffinity(0))
        factor = min(6.0, max(1.0, load / 4))
        if engine == "vllm":
            return cls(8 * factor, 20 * factor, 90 * factor, 30 * factor, 500 * factor)
        return cls(8 * factor, 3 * factor, 15 * factor, 20 * factor, 150 * factor)


@dataclass
class AttemptPlan:
    """Say how one attempt is started.

    Attributes:
        folder: of the attempt's notes; not the run directory.
        launcher: "alone", "srun" (a lost rank leaves the others alone) or "torchrun".
        max_restarts: of torchrun.
        arguments: of all ranks.
        ranks: one entry a rank.
    """

    folder: Path
    run_dir: Path
    launcher: str
    limits: Limits
    max_restarts: int = 0
    arguments: list[str] = field(default_factory=list)
    ranks: list[RankPlan] = field(default_factory=list)

    @property
    def num_ranks(self) -> int:
        return len(self.ranks)

    def write(self) -> None:
        """Write what the rank processes read."""
        ranks = [dataclasses.asdict(rank) for rank in self.ranks]
        content = {"runner_pid": os.getpid(), "join_s": self.limits.join_s, "ranks": ranks}
        (self.folder / "plan.json").write_text(json.dumps(content))
