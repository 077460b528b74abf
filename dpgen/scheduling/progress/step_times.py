"""Measure what an engine's steps cost, by the number of its sequences, and how close a run came to its bound.

- Each report of an engine gives one sample: sequences that ran, and the time for each token that one of them gained.
- A line through the samples of all ranks, step + sequence x number of sequences, gives the costs of a step. Samples
  that lie close together say nothing about it. If they are of full engines, a step counts as so much for each sequence,
  which no schedule could beat with fewer; else there is no bound, nor with a few samples.
- The bound is that of `dpgen.scheduling.tail.bound` with these costs: what no schedule of these rows could beat if each
  step cost what steps cost on average in this run. It says nothing about whether the steps themselves could be faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dpgen.scheduling.tail.bound import StepCosts, compute_bound

_MIN_SAMPLES = 16  # over all ranks
_MIN_SPREAD = 2.0  # of the numbers of sequences: the largest over the smallest
_FULL_FRACTION = 0.9  # of the sequences that an engine runs at a time
BY_LONGEST_ROW = 0.9  # of the bound
_EXACT_LENGTHS, _MAX_QUANTILES = 256, 768  # of one rank: its longest rows, and quantiles of the others


@dataclass
class StepSamples:
    """Sums over the samples of one rank: of their number, of sequences, of times, of squares and of products."""

    num_samples: int = 0
    seqs: float = 0.0
    time_s: float = 0.0
    seqs_squared: float = 0.0
    seqs_by_time: float = 0.0
    min_seqs: float = float("inf")
    max_seqs: float = 0.0

    def add(self, seqs: float, time_s: float) -> None:
        """Count one sample."""
        self.num_samples += 1
        self.seqs += seqs
        self.time_s += time_s
        self.seqs_squared += seqs * seqs
        self.seqs_by_time += seqs * time_s
        self.min_seqs, self.max_seqs = min(self.min_seqs, seqs), max(self.max_seqs, seqs)


class StepMeter:
    """Sample the steps of one rank's engine.

    Attributes:
        samples: their sums.
    """

    def __init__(self) -> None:
        self.samples = StepSamples()
        self._last: tuple[float, int, int] | None = None
        self._last_elapsed_s = 0.0

    def record(self, now_s: float, num_generated_tokens: int, num_running: int, elapsed_s: float = 0.0) -> None:
        """Add the engine's report: tokens since the start of the attempt, and sequences that run now.

        Args:
            elapsed_s: since this life of the engine was ready. The time between two lives is no step's.
        """
        last, self._last = self._last, (now_s, num_generated_tokens, num_running)
        is_new_life, self._last_elapsed_s = elapsed_s < self._last_elapsed_s, elapsed_s
        if last is None or is_new_life:
            return
        took_s, num_tokens, seqs = now_s - last[0], num_generated_tokens - last[1], (num_running + last[2]) / 2
        if min(num_running, last[2]) > 0 and num_tokens > 0 and took_s > 0:
            self.samples.add(seqs, took_s * seqs / num_tokens)


@dataclass(frozen=True)
class RankSpeed:
    """Describe one rank's part of an attempt, to compute the bound of all.

    Attributes:
        samples: of its engine's steps.
        lengths, counts: generated tokens of its rows, and how many rows each stands for.
        max_num_seqs: sequences that its engine runs at a time, where engines joined or were lost the most.
    """

    samples: StepSamples = field(default_factory=StepSamples)
    lengths: Sequence[int] = ()
    counts: Sequence[float] = ()
    max_num_seqs: int = 0


def summarize_lengths(lengths: np.ndarray) -> tuple[list[int], list[float]]:
    """Return the longest lengths and quantiles of the others, and how many rows each of them stands for."""
    ordered = np.sort(lengths)[::-1]
    exact, others = ordered[:_EXACT_LENGTHS], ordered[_EXACT_LENGTHS:]
    chunks = np.array_split(others, min(len(others), _MAX_QUANTILES)) if len(others) else []
    means = [round(float(chunk.mean())) for chunk in chunks]
    return [*exact.tolist(), *means], [*(1.0 for _ in exact), *(float(len(chunk)) for chunk in chunks)]


@dataclass(frozen=True)
class RunEfficiency:
    """Compare the time that generating took with its bound; `run.json` holds the fields under these names.

    Attributes:
        bound_s: what no schedule of these rows could beat with such steps; `generation_s` at most, as costs are means.
        generation_s: from the first row to the last, over all ranks.
        longest_row_s: what the longest row takes in an engine without others; 0 where that is not known.
        step_s, seq_s: costs of a step, as measured; `step_s` is 0 where only full engines were.
        max_num_seqs: sequences that an engine runs at a time.
    """

    bound_s: float
    generation_s: float
    longest_row_s: float
    step_s: float
    seq_s: float
    max_num_seqs: int

    @property
    def is_longest_row(self) -> bool:
        """Return True if the bound is about what the longest row takes alone."""
        return self.longest_row_s >= BY_LONGEST_ROW * self.bound_s

    @property
    def fraction(self) -> float:
        """Return the bound over the time."""
        return self.bound_s / self.generation_s if self.generation_s else 1.0


def describe_step_costs(step_s: float, seq_s: float) -> str:
    """Return ``6 ms and 29 us a sequence``, or ``0.053 ms a sequence`` where only full engines were measured."""
    costs = f"{1e3 * step_s:.3g} ms and {1e6 * seq_s:.3g} us" if step_s else f"{1e3 * seq_s:.3g} ms"
    return f"{costs} a sequence"


def compute_longest_s(costs: StepCosts, num_tokens: int) -> float:
    """Return what a row of so many tokens takes in an engine without others; 0 where that is not known."""
    return (costs.step + costs.sequence) * num_tokens if costs.step else 0.0


def compute_efficiency(speeds: Sequence[RankSpeed], generation_s: float) -> RunEfficiency | None:
    """Return how close a run came to its bound; None where too little was measured to say.

    Args:
        speeds: of the ranks that generated.
    """
    costs = fit_step_costs(speeds)
    lengths = np.array([length for speed in speeds for length in speed.lengths], dtype=np.int64)
    counts = np.array([count for speed in speeds for count in speed.counts])
    if costs is None or not lengths.any() or generation_s <= 0:
        return None
    num_ranks = sum(speed.samples.num_samples > 0 for speed in speeds)
    bound_s = min(generation_s, compute_bound(lengths, costs, num_ranks, counts=counts))
    longest_s = compute_longest_s(costs, int(lengths.max()))
    return RunEfficiency(
        round(bound_s, 3), round(generation_s, 3), round(longest_s, 3), costs.step, costs.sequence, costs.max_num_seqs
    )


def fit_step_costs(speeds: Sequence[RankSpeed]) -> StepCosts | None:
    """Return the costs of a step in seconds, by least squares; None where samples are few, or alike and not full."""
    samples = [speed.samples for speed in speeds if speed.samples.num_samples]
    count = sum(sample.num_samples for sample in samples)
    if count < _MIN_SAMPLES:
        return None
    max_num_seqs = max(speed.max_num_seqs for speed in speeds)
    seqs, times = sum(sample.seqs for sample in samples) / count, sum(sample.time_s for sample in samples) / count
    squares = sum(sample.seqs_squared for sample in samples) / count
    products = sum(sample.seqs_by_time for sample in samples) / count
    if max(sample.max_seqs for sample in samples) < _MIN_SPREAD * min(sample.min_seqs for sample in samples):
        is_full = 0 < _FULL_FRACTION * max_num_seqs <= seqs
        return StepCosts(0.0, products / squares, max_num_seqs) if is_full else None
    sequence = (products - seqs * times) / max(squares - seqs * seqs, 1e-12)
    step = times - sequence * seqs
    if sequence < 0:
        step, sequence = times, 0.0
    elif step < 0:
        step, sequence = 0.0, products / squares
    return StepCosts(step, sequence, max_num_seqs) if max_num_seqs else None  # 0: every engine was abandoned
