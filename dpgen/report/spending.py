"""Compute where the ranks' time went, and how close the run came to the speed that its engines had with full batches.

- Time is split by what ranks did. The time in which they generated is split further by tokens: those in the result,
  those that checks rejected, and those that were lost with a rank or an engine and generated again.
- The bound is that of `dpgen.scheduling.tail.bound` with the costs of a step that the run measured. Where it measured
  none, it is only what all tokens take in full batches, at a speed measured in this run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import numpy as np

from dpgen.report.journal_facts import JournalFacts
from dpgen.report.timeline import Timeline
from dpgen.scheduling.progress.step_times import BY_LONGEST_ROW, compute_longest_s, describe_step_costs
from dpgen.scheduling.tail.bound import StepCosts, compute_bound

Purpose = Literal["start", "generate", "rejected", "lost", "tail", "idle", "end"]
PURPOSES: tuple[Purpose, ...] = ("generate", "rejected", "lost", "tail", "idle", "start", "end")
_MIN_LOST_FRACTION = 0.005  # of all tokens: numbers of two sources differ by what was on its way


@dataclass(frozen=True)
class Spending:
    """Say where the time of all ranks went.

    Attributes:
        seconds: of GPUs, or of ranks where no GPU was used, by purpose.
        unit: "GPU" or "rank".
        num_generated_tokens: by all engines in all attempts, as far as histories tell.
        num_rejected_tokens, num_lost_tokens: of these.
    """

    seconds: Mapping[Purpose, float]
    unit: str
    num_generated_tokens: int
    num_rejected_tokens: int
    num_lost_tokens: int

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Efficiency:
    """Compare a run with what its engines could have done.

    Attributes:
        bound_s: time that no schedule can beat with these engines.
        wall_s: time of all attempts, pauses between them left out.
        full_tokens_per_s: of all ranks together, with full batches.
        source: what the speed is measured by.
        limits: what took the difference, as a fraction of the time of all ranks, the largest first.
        is_longest_row: True if the bound is the longest completion alone.
    """

    bound_s: float
    wall_s: float
    full_tokens_per_s: float
    source: str
    limits: Sequence[tuple[str, float]]
    is_longest_row: bool

    @property
    def fraction(self) -> float:
        return min(1.0, self.bound_s / self.wall_s) if self.wall_s else 1.0


def compute_spending(
    timeline: Timeline, journal: JournalFacts, num_kept_tokens: float, gpus_per_rank: int, *, is_live: bool
) -> Spending | None:
    """Return where the time went; None where no rank's history is here.

    Args:
        num_kept_tokens: generated tokens of rows with a result.
        gpus_per_rank: 0 where no GPU is used.
        is_live: rows are in the engines, so that their tokens are not lost.
    """
    ranks = [rank for attempt in timeline.attempts for rank in attempt.ranks]
    scale = gpus_per_rank or 1
    by_kind = {kind: scale * sum(rank.sum_s(kind) for rank in ranks) for kind in ("start", "tail", "idle", "end")}
    generating_s = scale * sum(rank.sum_s("generate") for rank in ranks)
    if not ranks or not (generating_s + sum(by_kind.values())):
        return None
    num_generated = sum(attempt.num_generated_tokens for attempt in timeline.attempts)
    num_rejected = round(journal.mean_rejected_tokens * journal.num_rejected)
    num_lost = 0 if is_live else max(0, num_generated - num_rejected - round(num_kept_tokens))
    if num_lost < _MIN_LOST_FRACTION * num_generated:
        num_lost = 0
    total = max(1, num_generated)
    rejected_s = generating_s * min(1.0, num_rejected / total)
    lost_s = min(generating_s - rejected_s, generating_s * num_lost / total)
    seconds: dict[Purpose, float] = {
        "generate": generating_s - rejected_s - lost_s,
        "rejected": rejected_s,
        "lost": lost_s,
        **{kind: by_kind[kind] for kind in ("tail", "idle", "start", "end")},
    }
    return Spending(seconds, "GPU" if gpus_per_rank else "rank", num_generated, num_rejected, num_lost)


def compute_efficiency(
    timeline: Timeline,
    journal: JournalFacts,
    spending: Spending | None,
    metadata: Mapping[str, Any],
    num_kept_tokens: float,
) -> Efficiency | None:
    """Return how close the run came to its bound; None where nothing says how fast its engines were.

    Args:
        num_kept_tokens: generated tokens of rows with a result.
    """
    lengths = np.array(journal.statistics.lengths, dtype=np.int64)
    wall_s = timeline.length_s
    num_ranks = max((len(attempt.ranks) for attempt in timeline.attempts), default=0)
    measured = _measure_full_speed(timeline, metadata)
    if spending is None or measured is None or not len(lengths) or not wall_s:
        return None
    speed, source = measured
    bound_s, longest_s = num_kept_tokens / (speed * num_ranks), 0.0
    costs = _read_step_costs(metadata)
    if costs is not None:
        counts = np.full(len(lengths), num_kept_tokens / int(lengths.sum()))  # where the lengths are those of a sample
        bound_s = compute_bound(lengths, costs, num_ranks, counts=counts)
        longest_s = compute_longest_s(costs, int(lengths.max()))
        source = f"steps took {describe_step_costs(costs.step, costs.sequence)}"
    bound_s = min(bound_s, wall_s)
    limits = _find_limits(spending, bound_s / wall_s)
    return Efficiency(bound_s, wall_s, speed * num_ranks, source, limits, longest_s >= BY_LONGEST_ROW * bound_s)


def _read_step_costs(metadata: Mapping[str, Any]) -> StepCosts | None:
    """Return the costs of a step that the run measured; None if it measured none."""
    measured = metadata.get("efficiency")
    if not isinstance(measured, Mapping):
        return None
    step_s, seq_s, num_seqs = (measured.get(name) for name in ("step_s", "seq_s", "max_num_seqs"))
    if not (isinstance(step_s, float) and isinstance(seq_s, float) and isinstance(num_seqs, int) and num_seqs > 0):
        return None
    return StepCosts(step_s, seq_s, num_seqs)


def _measure_full_speed(timeline: Timeline, metadata: Mapping[str, Any]) -> tuple[float, str] | None:
    """Return the tokens/s of a rank with full batches, and how that is measured."""
    samples = [sample for attempt in timeline.attempts for rank in attempt.ranks for sample in rank.full_rates]
    if len(samples) >= 4:
        speeds = sorted(samples)[len(samples) // 2 :]  # a sample right after a restart is no measure
        source = "the upper half of the speeds that ranks reported while rows were left for all"
        return median(speed for speed, _ in speeds), source
    manifests = metadata.get("manifests")
    ranks = [rank for rank in manifests if isinstance(rank, Mapping)] if isinstance(manifests, list) else []
    means = [(rank.get("num_generated_tokens") or 0) / rank["busy_s"] for rank in ranks if rank.get("busy_s")]
    if not any(means):
        return None
    return max(means), "the fastest rank's mean, since the run was too short for samples"


_LIMITS: Mapping[Purpose, str] = {
    "start": "start-up",
    "rejected": "attempts that checks rejected",
    "lost": "tokens lost with ranks or engines, and generated again",
    "tail": "the tail, when no rows were left to claim",
    "idle": "waiting for other ranks",
    "end": "gathering and writing the result",
}


def _find_limits(spending: Spending, fraction: float) -> list[tuple[str, float]]:
    """Return what took time beyond the bound; what no purpose explains is speed below that of full batches."""
    limits = [(text, spending.seconds[purpose] / spending.total_s) for purpose, text in _LIMITS.items()]
    slower = 1 - fraction - sum(share for _, share in limits)
    limits.append(("batches that were not full, or slower steps", slower))
    return sorted([limit for limit in limits if limit[1] >= 0.005], key=lambda limit: -limit[1])
