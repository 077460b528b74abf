"""Gather how fast the ranks' engines were, and report how close the run came to its bound."""

from __future__ import annotations

import dataclasses

from dpgen.config.schema import Config
from dpgen.distributed.group import RankGroup
from dpgen.formatting import format_duration
from dpgen.scheduling.progress.step_times import (
    RankSpeed,
    RunEfficiency,
    StepSamples,
    compute_efficiency,
    describe_step_costs,
)

_MIN_GENERATION_S = 10.0  # of a shorter run, what a step costs is not known well enough


def gather_efficiency(
    group: RankGroup, config: Config, speed: RankSpeed | None, generation_s: float
) -> RunEfficiency | None:
    """Return the run's efficiency on rank 0; None on the others, and where it can't be told. Collective.

    It can't where ranks were lost, whose rows are not known, nor where a row has several samples or calls.

    Args:
        speed: of this rank; None if it has not generated.
        generation_s: as rank 0 measured it.
    """
    gathered = group.gather_object(None if speed is None else dataclasses.asdict(speed))
    has_samples = (config.sampling.get("n") or 1) != 1 or "n" in config.sampling_columns
    if (
        config.program.is_used
        or gathered is None
        or group.num_shrinks
        or has_samples
        or generation_s < _MIN_GENERATION_S
    ):
        return None
    speeds = [RankSpeed(**{**fields, "samples": StepSamples(**fields["samples"])}) for fields in gathered if fields]
    return compute_efficiency(speeds, generation_s)


def describe_efficiency(efficiency: RunEfficiency) -> str:
    """Return ``efficiency 0.97 of the bound: with steps of 6 ms and 29 us a sequence, these rows take 24 s ...``."""
    costs = describe_step_costs(efficiency.step_s, efficiency.seq_s)
    text = (
        f"efficiency {efficiency.fraction:.2f} of the bound: with steps of {costs}, these rows take "
        f"{format_duration(efficiency.bound_s)} or more"
    )
    if efficiency.is_longest_row:
        text += f", since the longest row alone takes {format_duration(efficiency.longest_row_s)}"
    return text
