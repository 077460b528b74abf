"""Tests of requests that workers prepare on their way to the engine: none is lost, and none is waited for in vain."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from dpgen.data.prompts.render import RenderedPrompt
from dpgen.errors import RowRefused
from dpgen.records import Request, RequestId, RowResult, make_rejected_result
from dpgen.scheduling.claims import Claim
from dpgen.scheduling.request_builder import RequestBuilder
from dpgen.scheduling.request_source import RequestSource

NUM_ROWS = 12


class ScriptedPreparer:
    """Prepare rows with an odd number once the test says so; it is its only queue, too."""

    max_ahead = 4

    def __init__(self) -> None:
        self.open: deque[Request] = deque()
        self.ready: deque[Request | RowResult] = deque()

    def __len__(self) -> int:
        return len(self.open) + len(self.ready)

    @property
    def has_ready(self) -> bool:
        return bool(self.ready)

    def poll(self) -> None:
        return

    def needs(self, request: Request) -> bool:
        return request.row % 2 == 1 and request.media is None

    def open_queue(self) -> ScriptedPreparer:
        return self

    def add(self, request: Request) -> None:
        self.open.append(request)

    def take(self) -> Request | RowResult | None:
        return self.ready.popleft() if self.ready else None

    def close(self) -> None:
        self.open.clear()
        self.ready.clear()

    def finish(self) -> None:
        self.ready.append(replace(self.open.popleft(), media="memory"))

    def reject(self) -> None:
        error = RowRefused("media_invalid", "broken")
        self.ready.append(make_rejected_result(self.open.popleft().id, error))


class OneShard:
    """Claim all rows of one shard, four at a time, and read them."""

    num_remaining, slowdown, fair_claim_size = NUM_ROWS, 1.0, 3

    def __init__(self) -> None:
        self.start = 0
        self.limits: list[int] = []

    def refresh_own_remaining(self) -> int:
        return NUM_ROWS - self.start

    def should_yield(self, num_in_flight: int) -> bool:
        return False

    def claim(self, limit: int) -> Claim | None:
        self.limits.append(limit)
        if self.start == NUM_ROWS:
            return None
        self.start += 4
        return Claim(0, self.start - 4, self.start)

    def read_positions(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from ((row, {"row": row}) for row in range(start, stop))


def make_source(preparer: ScriptedPreparer, max_num_seqs: int = 2) -> RequestSource:
    builder = RequestBuilder(lambda columns: RenderedPrompt([columns["row"]]), None, {}, preparer=preparer)
    shard = OneShard()
    source = RequestSource(shard, lambda index: shard, builder)
    source.max_num_seqs = max_num_seqs
    return source


def prefetch(source: RequestSource) -> int:
    number = 0
    while source.should_prefetch and source.prefetch():
        number += 1
    return number


def test_every_row_leaves_once_in_whatever_order_they_get_ready() -> None:
    preparer = ScriptedPreparer()
    source = make_source(preparer)
    rows, results = [], []
    while not source.is_exhausted:
        prefetch(source)
        request = source.next_request()
        if isinstance(request, RowResult):
            results.append(request.row)
        elif request is not None:
            assert (request.media is not None) == (request.row % 2 == 1)
            rows.append(request.row)
        elif preparer.open:
            preparer.open.rotate(1)  # the last one first
            (preparer.reject if preparer.open[0].row == 5 else preparer.finish)()
    assert sorted(rows + results) == list(range(NUM_ROWS))
    assert results == [5]
    assert rows != sorted(rows)


def test_a_row_that_is_being_prepared_keeps_the_source_from_being_exhausted() -> None:
    preparer = ScriptedPreparer()
    source = make_source(preparer)
    while (request := source.next_request()) is not None or prefetch(source):
        assert request is None or request.row % 2 == 0
    assert len(preparer.open) == source.num_preparing > 0
    assert not source.is_exhausted
    while preparer.open:
        preparer.finish()
    assert source.next_request() is not None


def test_the_workers_get_the_rows_that_are_claimed_beyond_what_may_be_held_back() -> None:
    preparer = ScriptedPreparer()
    source = make_source(preparer, max_num_seqs=1)
    assert source.next_request() is not None  # a text
    assert source.next_request() is None
    prefetch(source)
    assert len(preparer.open) >= 2, "the engine runs one row, and a rank with one worker keeps more than one ahead"
    assert source.num_preparing <= max(preparer.max_ahead, 4)


def test_a_source_without_anything_to_prepare_builds_as_many_ahead_as_before() -> None:
    class Nothing(ScriptedPreparer):
        max_ahead = 0

        def needs(self, request: Request) -> bool:
            return False

    source = make_source(Nothing(), max_num_seqs=2)
    assert prefetch(source) == 2
    assert source.next_request() == Request(RequestId(0), [0])


def test_few_large_rows_are_read_ahead() -> None:
    shard = OneShard()
    builder = RequestBuilder(lambda columns: RenderedPrompt([1]), None, {}, max_rows_ahead=3)
    source = RequestSource(shard, lambda index: shard, builder)
    source.max_num_seqs = 100
    assert prefetch(source) == 3
    assert shard.limits == [3]


def test_a_source_that_is_closed_has_nothing_more_prepared() -> None:
    preparer = ScriptedPreparer()
    source = make_source(preparer)
    prefetch(source)
    assert preparer.open
    source.close()
    assert not preparer.open and not preparer.ready
