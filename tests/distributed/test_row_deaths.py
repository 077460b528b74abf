"""Rows that ranks died on, as all ranks agree on them."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from dpgen.distributed.group import SingleRankGroup
from dpgen.distributed.row_deaths import RowDeathJudge
from dpgen.journal.row_notes import RENDERING, RowDeath, get_overdue_key, open_note

OWN = ".note-attempt-0001-rank-00000"
LOST = ".note-attempt-0001-rank-00001"


class PairGroup(SingleRankGroup):
    """Be rank 0 of a group whose rank 1 may be lost, on a node of its own.

    Attributes:
        has_peer: False once rank 1 is lost.
        peer_deaths: deaths that the other node reports.
    """

    has_peer = True
    peer_deaths: tuple[RowDeath, ...] = ()

    def all_gather_object(self, value: object) -> list[object]:
        if isinstance(value, str):
            return [value, LOST] if self.has_peer else [value]
        return [value, [list(death) for death in self.peer_deaths]]


def judge(judge: RowDeathJudge) -> dict[int, str]:
    judge.judge(np.array([1, 2]))
    return {row: error.type for row, error in judge.errors.items()}


def test_a_row_that_hung_a_rank_on_another_node_is_rejected_once_the_rank_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    group = PairGroup()
    rows = RowDeathJudge(group, tmp_path, OWN, 60.0)
    group.store.add(get_overdue_key(LOST), 7 * 4 + RENDERING)
    assert judge(rows) == {}, "the rank lives, and may return"
    group.has_peer = False
    caplog.set_level(logging.INFO, "dpgen")
    assert judge(rows) == {7: "render_timeout"}
    assert caplog.messages == [
        "row 7: rendering took longer than data.render_timeout_s=60 and could not be interrupted, "
        "recording error render_timeout"
    ]


def test_deaths_on_nodes_that_do_not_share_a_directory_count_together(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    group = PairGroup()
    rows = RowDeathJudge(group, tmp_path, OWN, 60.0)
    group.peer_deaths = (RowDeath(1, 1, 7, RENDERING),)
    assert judge(rows) == {} and rows.suspects == {7}
    assert caplog.messages == ["row 7: a process died while it worked on this row, leaving it to the end"]
    group.peer_deaths = (RowDeath(1, 1, 7, RENDERING), RowDeath(1, 3, 7, RENDERING))
    assert judge(rows) == {7: "render_crashed"} and rows.suspects == set()


@pytest.mark.parametrize(("row", "suspects"), [(1, set()), (3, {3})])
def test_a_row_with_a_result_is_of_no_more_interest(tmp_path: Path, row: int, suspects: set[int]) -> None:
    note = open_note(tmp_path, 1, 1)
    content = note.run(RENDERING, row, Path.read_bytes, tmp_path / note.name)
    (tmp_path / note.name).write_bytes(content)
    rows = RowDeathJudge(SingleRankGroup(), tmp_path, OWN, 60.0)
    assert judge(rows) == {} and rows.suspects == suspects
