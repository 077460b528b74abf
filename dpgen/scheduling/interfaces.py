"""Define what the generation loop asks of its planner, its engine and its recorder, and what that asks in turn."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from dpgen.engine.messages import Event
from dpgen.records import Request, RequestId, RowResult, UndecodedRow
from dpgen.scheduling.groups.prompt_groups import RankState
from dpgen.scheduling.order import RowOrder
from dpgen.scheduling.request_source import RequestSource
from dpgen.scheduling.retries.retry_tracker import RetryCounts


class Planner(Protocol):
    """Interface of a planner, as the loop uses it; see `ShardPlanner`."""

    @property
    def order(self) -> RowOrder: ...

    @property
    def num_remaining_rows(self) -> int: ...

    @property
    def num_inherited_rows(self) -> int: ...

    @property
    def has_completions(self) -> bool: ...

    def plan(
        self, state: RankState | None = None, *, has_engine: bool = True, spread_first: bool = False
    ) -> RequestSource: ...


class Engine(Protocol):
    """Interface of a loaded engine, as the loop uses it; see `dpgen.engine.supervisor.EngineSupervisor`."""

    @property
    def max_num_seqs(self) -> int: ...

    @property
    def is_abandoned(self) -> bool: ...

    def submit(self, requests: list[Request]) -> None: ...

    def poll(self, timeout_s: float) -> list[Event]: ...


class ResultSink(Protocol):
    """Interface of a recorder of results, as the loop uses it; see `ResultRecorder`, in `result_recorder`."""

    @property
    def pending_rows(self) -> Sequence[int]: ...

    @property
    def has_pending(self) -> bool: ...

    @property
    def num_processing(self) -> int: ...

    @property
    def num_preparing(self) -> int: ...

    @property
    def can_begin(self) -> bool: ...

    @property
    def num_begun(self) -> int: ...

    @property
    def has_retries(self) -> bool: ...

    @property
    def retry_counts(self) -> RetryCounts: ...

    @property
    def num_calls(self) -> int: ...

    def begin(self, request: Request) -> Request | None: ...

    def take_retry(self) -> Request | None: ...

    def prepare(self) -> bool: ...

    def drop_retries(self) -> list[bytes]: ...

    def add(self, result: RowResult | UndecodedRow) -> None: ...

    def take_recorded(self) -> list[RowResult]: ...

    def raise_if_failed(self) -> None: ...


class FollowUps(Protocol):
    """Interface of what decides which requests follow from a row; see `RetryTracker` and `ProgramRunner`."""

    counts: RetryCounts
    num_calls: int

    @property
    def num_preparing(self) -> int: ...

    @property
    def can_begin(self) -> bool: ...

    @property
    def num_begun(self) -> int: ...

    def begin(self, request: Request) -> Request | RowResult | None: ...

    @property
    def has_retries(self) -> bool: ...

    def take_retry(self) -> Request | None: ...

    def prepare(self) -> bool: ...

    @property
    def pending_rows(self) -> Collection[int]: ...

    @property
    def num_checking(self) -> int: ...

    def drop(self, parsing: Collection[RequestId]) -> list[bytes]: ...

    def join_pieces(self, result: RowResult | UndecodedRow) -> RowResult | UndecodedRow: ...

    def keep_texts(self, result: RowResult) -> None: ...

    def submit(self, result: RowResult) -> RowResult | None: ...

    def poll(self) -> list[RowResult]: ...

    def close(self) -> None: ...
