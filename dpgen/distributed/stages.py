"""Run the stages of a job on all ranks, and survive the loss of ranks in any of them.

- A stage is a function that all ranks call, and that may be called again: its object remembers what this rank has done.
- When ranks are lost, the remaining ones may be at different stages. They agree on the earliest of these, and all
  repeat from there.
- A loss is survived where the launcher leaves the other ranks alone (`RankGroup.can_shrink`). Elsewhere it ends the
  run, resumable.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dpgen.distributed.group import AllRowsGathered, PeerLost, RankGroup
from dpgen.formatting import format_count

logger = logging.getLogger(__name__)

_MAX_FAILED_SHRINKS = 3  # rounds in a row in which the ranks did not connect, and none more was lost


@dataclass(frozen=True)
class Stage:
    """A part of the job that all ranks do together.

    Attributes:
        name: what a rank does in it, for the others that wait: "loading the model".
        run: does it. Collective.
        repeat_from: name of the stage from which to repeat if ranks are lost in this one; None for this one.
        is_slow: see `RankGroup.enter_phase`.
    """

    name: str
    run: Callable[[], None]
    repeat_from: str | None = None
    is_slow: bool = False


def run_stages(group: RankGroup, stages: Sequence[Stage], on_stage: Callable[[str], None] = lambda name: None) -> None:
    """Run the stages in order, and repeat some of them each time that ranks are lost. Collective.

    Returns early if rank 0 has reached the end and waits for no other rank.

    Args:
        on_stage: called with the name of each stage that begins.

    Raises:
        PeerLost: the launcher ends all ranks, or the remaining ones can't be connected.
    """
    names = [stage.name for stage in stages]
    index = 0
    while index < len(stages):
        stage = stages[index]
        try:
            on_stage(stage.name)
            group.enter_phase(stage.name, is_slow=stage.is_slow)
            stage.run()
            index += 1
        except PeerLost as lost:
            try:
                earliest = stages[_continue_without(group, lost, index)]
            except AllRowsGathered:
                return
            index = names.index(earliest.repeat_from or earliest.name)


def _continue_without(group: RankGroup, lost: PeerLost, index: int) -> int:
    """Remove the lost ranks from the group, and return the earliest stage at which a remaining rank is. Collective.

    Raises:
        PeerLost: the launcher ends all ranks, or they can't be connected: round after round fails and none is lost.
    """
    num_failed_rounds, size = 0, group.size
    while True:
        if not group.can_shrink:
            raise lost
        if num_failed_rounds >= _MAX_FAILED_SHRINKS:
            ranks = format_count(size, "remaining rank")
            raise PeerLost(f"{ranks} did not connect in {num_failed_rounds} rounds. Last error: {lost}")
        logger.warning(f"{lost}, continuing with the remaining ranks")
        try:
            group.shrink()
            indices: list[int] = group.all_gather_object(index)
            return min(indices)
        except PeerLost as another:  # lost while the group was shrinking
            lost = another
            is_smaller = group.size < size
            num_failed_rounds, size = 0 if is_smaller else num_failed_rounds + 1, group.size
