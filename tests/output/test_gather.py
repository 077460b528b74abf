"""Test that gathering keeps every segment once, whatever the segments are called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dpgen.distributed.group import SingleRankGroup
from dpgen.errors import DpgenError
from dpgen.journal.files import FileSystem
from dpgen.journal.reader import index_journal, list_segments
from dpgen.journal.writer import JournalWriter
from dpgen.output.gather import gather_segments
from dpgen.records import Completion, RowResult


def write_segment(journal_dir: Path, rows: range) -> Path:
    """Write the segment of attempt 1, rank 0: its name is the same in every directory."""
    journal_dir.mkdir()
    journal = JournalWriter(journal_dir, 1, 0)
    for row in rows:
        journal.append(RowResult(row, 3, (Completion(f"text {row}", "stop", 2),)))
    journal.close()
    return journal.path


def read_all(journal_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in journal_dir.iterdir()}


@pytest.mark.parametrize("num_foreign", [5, 200], ids=["shorter", "longer"])
def test_another_segment_of_the_same_name_is_kept_beside_the_first(tmp_path: Path, num_foreign: int) -> None:
    home, foreign = tmp_path / "home", write_segment(tmp_path / "foreign", range(100, 100 + num_foreign))
    own = write_segment(home, range(50))
    before = own.read_bytes()
    gather_segments(SingleRankGroup(), home, [foreign], 1 << 16)
    assert own.read_bytes() == before, "a journaled row was overwritten"
    assert index_journal(home).row.tolist() == [*range(50), *range(100, 100 + num_foreign)]
    files = read_all(home)
    assert sorted(files.values()) == sorted([before, foreign.read_bytes()])
    gather_segments(SingleRankGroup(), home, [foreign], 1 << 16)
    assert read_all(home) == files, "gathering again adds nothing"


def test_a_segment_that_has_grown_since_it_was_gathered_is_replaced(tmp_path: Path) -> None:
    home, foreign = tmp_path / "home", write_segment(tmp_path / "foreign", range(100, 130))
    write_segment(home, range(50))
    whole = foreign.read_bytes()
    foreign.write_bytes(whole[:300])  # as its writer had left it by then
    gather_segments(SingleRankGroup(), home, [foreign], 1 << 16)
    foreign.write_bytes(whole)
    gather_segments(SingleRankGroup(), home, [foreign], 1 << 16)
    assert index_journal(home).row.tolist() == [*range(50), *range(100, 130)]
    assert len(list_segments(home)) == 2


def test_two_senders_of_one_name_do_not_mix_their_bytes(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    first, second = (write_segment(tmp_path / str(start), range(start, start + 40)) for start in (0, 40))

    class TwoSenders(SingleRankGroup):
        def gather_object(self, value: Any, senders: Sequence[int] | None = None) -> list[Any] | None:
            name, offset, data = value
            return [None, value, (name, offset, second.read_bytes()[offset : offset + len(data)])]

    gather_segments(TwoSenders(), home, [first], 1 << 9)
    assert index_journal(home).row.tolist() == list(range(80))


def test_a_piece_that_an_interrupted_gather_left_is_no_segment(tmp_path: Path) -> None:
    home, foreign = tmp_path / "home", write_segment(tmp_path / "foreign", range(30))
    home.mkdir()
    (home / ".attempt-0001-rank-00007-part-0000.journal.from-3.part").write_bytes(foreign.read_bytes()[:100])
    gather_segments(SingleRankGroup(), home, [foreign], 1 << 16)
    assert [path.name for path in home.iterdir()] == [foreign.name]


def test_a_segment_is_gathered_in_rounds_of_as_many_bytes_as_rank_0_may_receive(tmp_path: Path) -> None:
    home, foreign = tmp_path / "home", write_segment(tmp_path / "foreign", range(30))
    home.mkdir()
    num_bytes = foreign.stat().st_size
    assert gather_segments(SingleRankGroup(), home, [foreign], num_bytes) == 1
    assert gather_segments(SingleRankGroup(), home, [foreign], num_bytes - 1) == 2
    assert gather_segments(SingleRankGroup(), home, [], num_bytes) == 0
    assert read_all(home) == read_all(foreign.parent)


class SomeSenders(SingleRankGroup):
    """Rank 1 of eight ranks, of which some have something to send: so many chunks, where a chunk is a byte count.

    Attributes:
        rounds: the senders of each round, None for all ranks, and the bytes of this rank's chunk.
    """

    rank, size = 1, 8

    def __init__(self, num_rounds_of_others: list[int]) -> None:
        super().__init__()
        self.nodes = [""] * self.size
        self.num_rounds_of_others = num_rounds_of_others
        self.rounds: list[tuple[list[int] | None, int]] = []

    def all_gather_object(self, value: Any) -> list[Any]:
        if not isinstance(value, bool):
            return [value] * self.size
        others = [num_rounds > len(self.rounds) for num_rounds in self.num_rounds_of_others]
        return ([False, value, *others] + [False] * self.size)[: self.size]

    def gather_object(self, value: Any, senders: Sequence[int] | None = None) -> list[Any] | None:
        self.rounds.append((None if senders is None else list(senders), len(value[2]) if value else 0))
        return None


def test_a_round_is_divided_by_the_ranks_that_still_send_where_these_are_few(tmp_path: Path) -> None:
    foreign = write_segment(tmp_path / "foreign", range(500))
    num_bytes = foreign.stat().st_size
    gather_bytes = num_bytes // 3
    group = SomeSenders([1, 1, 1, 2])
    num_rounds = gather_segments(group, foreign.parent, [foreign], gather_bytes)
    sizes = [size for _, size in group.rounds]
    assert group.rounds[0] == (None, gather_bytes // 8), "most ranks send, and gather_object pads all to the largest"
    assert group.rounds[1] == ([1, 5], gather_bytes // 2)
    assert {tuple(senders or ()) for senders, _ in group.rounds[2:]} == {(1,)}
    assert max(sizes) == gather_bytes, "a last sender may use all of it"
    assert sum(sizes) == num_bytes
    assert num_rounds == len(group.rounds) == 5, "an eighth of the bytes each time would be 24 rounds"


def test_a_segment_of_a_third_sender_gets_a_name_of_its_own(tmp_path: Path) -> None:
    home = tmp_path / "home"
    write_segment(home, range(10))
    for start in (10, 20, 30):
        foreign = write_segment(tmp_path / str(start), range(start, start + 10))
        gather_segments(SingleRankGroup(), home, [foreign], 1 << 16)
    assert index_journal(home).row.tolist() == list(range(40))
    assert len(list_segments(home)) == 4


def fail_with(error: OSError) -> Any:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("method", ["sync_path", "replace", "sync_directory"])
def test_a_full_disk_is_named_with_the_journal_whatever_it_interrupts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    home, foreign = tmp_path / "home", write_segment(tmp_path / "foreign", range(30))
    home.mkdir()
    monkeypatch.setattr(FileSystem, method, fail_with(OSError(28, "No space left on device")))
    with pytest.raises(DpgenError, match=f"the journal {home} can't be written: No space left on device"):
        gather_segments(SingleRankGroup(), home, [foreign], 1 << 16)


def test_a_file_in_the_way_of_what_is_received_is_named(tmp_path: Path) -> None:
    home, foreign = tmp_path / "home", write_segment(tmp_path / "foreign", range(30))
    home.mkdir()
    part = home / f".{foreign.name}.from-0.part"
    part.mkdir()
    with pytest.raises(DpgenError, match=f"the journal {home} can't be written: "):
        gather_segments(SingleRankGroup(), home, [foreign], 1 << 16)  # what an earlier gather left is removed first


def test_a_segment_that_cannot_be_read_or_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, foreign = tmp_path / "home", write_segment(tmp_path / "foreign", range(30))
    with pytest.raises(DpgenError, match=f"the journal {home}/.{foreign.name}.from-0.part can't be written: No such"):
        gather_segments(SingleRankGroup(), home, [foreign], 1 << 16)
    home.mkdir()
    monkeypatch.setattr("dpgen.output.gather.repair_segment", lambda path: [])
    foreign.unlink()
    with pytest.raises(DpgenError, match=f"the journal {foreign} can't be read: No such file or directory"):
        gather_segments(SingleRankGroup(), home, [foreign], 1 << 16)
