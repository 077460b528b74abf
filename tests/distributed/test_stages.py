"""Stages of a job that are repeated after ranks were lost; tests/jobs/test_losses.py has real ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from dpgen.distributed.group import AllRowsGathered, PeerLost, SingleRankGroup
from dpgen.distributed.stages import Stage, run_stages


class ShrinkingGroup(SingleRankGroup):
    """Shrink as often as is wanted.

    Args:
        errors: what the first shrinks raise.
        peer_stages: the stages at which another rank is after each shrink that succeeds; the same as here if none is
            left.
    """

    can_shrink = True

    def __init__(self, errors: Sequence[Exception] = (), peer_stages: Sequence[int] = ()) -> None:
        super().__init__()
        self._errors, self._peer_stages = list(errors), list(peer_stages)
        self.num_shrink_calls = 0
        self.phases: list[str] = []
        self.slow_phases: list[str] = []

    def enter_phase(self, name: str, *, is_slow: bool = False) -> None:
        self.phases.append(name)
        if is_slow:
            self.slow_phases.append(name)

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value, self._peer_stages.pop(0) if self._peer_stages else value]

    def shrink(self) -> None:
        self.num_shrink_calls += 1
        if self._errors:
            raise self._errors.pop(0)


def make_stages(calls: list[str], losses: dict[str, int]) -> list[Stage]:
    """Return four stages, which lose a rank as often as `losses` says, by name."""

    def make(name: str) -> Callable[[], None]:
        def run() -> None:
            calls.append(name)
            losses[name] = losses.get(name, 0) - 1
            if losses[name] >= 0:
                raise PeerLost("lost rank 3")

        return run

    return [
        Stage("input", make("input"), is_slow=True),
        Stage("plan", make("plan")),
        Stage("load", make("load"), repeat_from="plan"),
        Stage("generate", make("generate"), repeat_from="plan"),
    ]


@pytest.mark.parametrize(
    ("losses", "peer_stages", "expected"),
    [
        ({}, [], "input plan load generate"),
        ({"input": 1}, [], "input input plan load generate"),
        ({"load": 1}, [], "input plan load plan load generate"),
        ({"generate": 2}, [], "input plan load generate plan load generate plan load generate"),
        ({"generate": 1}, [2], "input plan load generate plan load generate"),
        ({"load": 1}, [0], "input plan load input plan load generate"),
    ],
)
def test_a_loss_repeats_from_the_earliest_stage_of_any_rank(
    losses: dict[str, int], peer_stages: list[int], expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    group, calls = ShrinkingGroup(peer_stages=peer_stages), list[str]()
    run_stages(group, make_stages(calls, dict(losses)))
    assert " ".join(calls) == expected
    assert group.phases == calls, "the other ranks know what this one does"
    assert set(group.slow_phases) == {"input"}, "in any other stage a rank that says nothing is lost soon"
    assert caplog.messages == ["lost rank 3, continuing with the remaining ranks"] * sum(losses.values())


def test_ranks_that_cannot_connect_though_no_other_is_lost_end_resumable_after_three_rounds() -> None:
    group = ShrinkingGroup([PeerLost("connecting timed out")] * 10)
    with pytest.raises(PeerLost, match=r"1 remaining rank did not connect in 3 rounds\. Last error: conn") as raised:
        run_stages(group, make_stages([], {"load": 1}))
    assert raised.value.exit_status == 75
    assert group.num_shrink_calls == 3


def test_a_rank_that_is_lost_while_the_group_shrinks_is_removed_as_well(caplog: pytest.LogCaptureFixture) -> None:
    group, calls = ShrinkingGroup([PeerLost("lost another rank while connecting")]), list[str]()
    run_stages(group, make_stages(calls, {"plan": 1}))
    assert group.num_shrink_calls == 2
    assert caplog.messages == [
        "lost rank 3, continuing with the remaining ranks",
        "lost another rank while connecting, continuing with the remaining ranks",
    ]
    assert calls[-1] == "generate"


def test_a_lost_rank_ends_the_job_where_the_launcher_ends_all_ranks(caplog: pytest.LogCaptureFixture) -> None:
    group = ShrinkingGroup()
    group.can_shrink = False
    with pytest.raises(PeerLost, match="lost rank 3"):
        run_stages(group, make_stages([], {"load": 1}))
    assert not caplog.messages, "no rank continues"


def test_a_rank_that_shrinks_while_rank_0_has_all_rows_is_through() -> None:
    calls: list[str] = []
    run_stages(ShrinkingGroup([AllRowsGathered()]), make_stages(calls, {"generate": 1}))
    assert calls == ["input", "plan", "load", "generate"]
