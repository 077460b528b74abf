"""Plan the remaining rows: find, order and shard the rows, at the start of an attempt and at each reshard.

- All ranks plan together: `plan` makes the same collectives in the same order on every rank.
- A plan covers exactly the rows that no rank has finished or is running. So no row is lost or generated twice,
  although claims of the previous plan are dropped.
- Every plan has new cursors, named after the attempt, the group's shrinks and the plan. All cursors exist before any
  rank claims.
- Order and shards are the same on every rank: computed from the same rows, or from counts summed over all ranks.
- Prompts are read once, for the first order. Later plans select from that order, or sort its prompt groups. All ranks
  read again only where the order lacks a remaining row (a lost node's, of an earlier attempt), or a rank the order.
- Whoever reads prompts or journals keeps its lease and notices a failed peer, batch by batch: progress is a heartbeat.
- After a loss of ranks, the journals tell which of their rows are finished. A journal counts only if the first rank of
  a remaining node can read it.
- At the same times, the notes of dead ranks tell which rows they died on. A row that killed two is rejected; one that
  killed one is read for no order and comes last, so that it takes few others with it.
- Where engines share their work, rows that may have killed one in an earlier attempt are planned first and alone, for
  rank 0's engine: a death then says something about them. The next plan has the postponed rows.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpgen.config.schema import Config
from dpgen.data.input_rows import InputRows
from dpgen.data.prompts.columns import select_prompt_columns
from dpgen.distributed.engine_deaths import gather_engine_notes
from dpgen.distributed.group import RankGroup
from dpgen.distributed.layout import Layout
from dpgen.distributed.row_deaths import RowDeathJudge
from dpgen.engine.blame import judge_notes
from dpgen.errors import NoEngineLeft, RowRefused
from dpgen.formatting import format_count
from dpgen.journal.attempts import decode_attempt
from dpgen.journal.calls import decode_call
from dpgen.journal.engine_notes import BlameState
from dpgen.journal.reader import JournalIndex, JournalReader, index_journal
from dpgen.records import Request, RowError
from dpgen.scheduling.claims import ShardClaimer
from dpgen.scheduling.groups.prompt_groups import RankState
from dpgen.scheduling.order import RowOrder, order_by_measured_lengths
from dpgen.scheduling.order_config import OrderConfig
from dpgen.scheduling.progress.slow_rows import SlowRowFilter
from dpgen.scheduling.request_builder import RequestBuilder
from dpgen.scheduling.request_source import RequestSource
from dpgen.scheduling.retries.earlier_attempts import AttemptStore
from dpgen.scheduling.sources import ASSUMED_SEQS, SourceMaker

logger = logging.getLogger(__name__)

_NO_ENGINE_LEFT = (
    "no rank has a working engine left: each crashed repeatedly (see the engine errors above). "
    "Fix the cause, then rerun the same command to resume"
)


@dataclass(frozen=True)
class PlannerConfig:
    """Settings of a `ShardPlanner`.

    Attributes:
        order: settings of the order of rows.
        retry_errors: True to generate all failed rows of earlier attempts again, or the error types to retry.
        columns: input columns that generating reads; others may be large, or slow to decode.
        lockstep: engines step together, so no rank is faster than another.
        claims_rows: this process claims rows; False for one that follows another process's engine.
        has_shared_engine: an engine's death ends all ranks, and its rows are judged by the next attempt.
        render_timeout_s: seconds that rendering one prompt may take.
        has_attempts: rows may have been begun by earlier attempts, and have rejected completions in a journal, or
            finished calls of their programs.
        decode_attempt: as in `AttemptStore`.
        max_num_seqs: sequences that each engine is expected to run at a time.
        attempt: number of the attempt; part of every cursor's name, so that no two attempts share a cursor.
    """

    order: OrderConfig
    retry_errors: bool | list[str]
    columns: tuple[str, ...]
    lockstep: bool
    claims_rows: bool
    attempt: int
    has_shared_engine: bool = False
    render_timeout_s: float = 60.0
    has_attempts: bool = False
    decode_attempt: Callable[[bytes], Any] = decode_attempt
    max_num_seqs: int = ASSUMED_SEQS

    @classmethod
    def from_config(cls, config: Config, columns: Sequence[str], layout: Layout, attempt: int) -> PlannerConfig:
        """Return the settings of a run's planner.

        Args:
            columns: the input's columns.
        """
        read_columns = {*select_prompt_columns(config.prompt, columns), *config.sampling_columns.values()}
        if config.data.lora_column is not None:
            read_columns.add(config.data.lora_column)
        if config.program.is_used:
            read_columns.update(columns)
        return cls(
            order=OrderConfig.from_config(config, layout.num_engines),
            retry_errors=config.run.retry_errors,
            columns=tuple(sorted(read_columns)),
            lockstep=layout.lockstep,
            claims_rows=layout.is_group_leader,
            has_shared_engine=layout.has_shared_engine,
            attempt=attempt,
            render_timeout_s=config.data.render_timeout_s,
            has_attempts=config.check.is_used or config.program.is_used,
            decode_attempt=decode_call if config.program.is_used else decode_attempt,
            max_num_seqs=config.engine.get("max_num_seqs") or ASSUMED_SEQS,
        )


class ShardPlanner:
    """Plan one rank's part of the rows, together with all other ranks.

    Args:
        rows: the input.
        journal_dir: this rank's journal directory.
        group: the ranks; may have shrunk between two plans.
        builder: builds the requests of every source; its note also says which row is being read for the order.

    Attributes:
        order: rows of the last plan, in order.
        num_remaining_rows: number of these rows.
        num_postponed_rows: rows that another plan must follow for, once those of the last plan are finished.
        blame: what earlier attempts have found out about rows that may kill this rank's engine.
        num_inherited_rows: rows that only lost ranks have finished in this attempt; the same on every rank.
        has_completions: whether, as of the last plan, a journal holds a row that succeeded; the same on every rank.
        succeeded_row: one of those rows, with a short result; None if there is none. The same on every rank.
        earlier_attempts: rejected attempts at rows that have no result, or calls of their programs; the same on every
            rank.
    """

    def __init__(
        self, config: PlannerConfig, rows: InputRows, journal_dir: Path, group: RankGroup, builder: RequestBuilder
    ) -> None:
        self._config, self._rows, self._journal_dir = config, rows, journal_dir
        self._group, self._builder = group, builder
        self._num_shrinks, self._num_plans = -1, 0
        self._journaled = np.zeros(len(rows), dtype=bool)
        self._journaled_before: np.ndarray | None = None  # as the first plan found it
        self.has_completions = False
        self.succeeded_row: int | None = None
        self.num_remaining_rows = self.num_inherited_rows = self.num_postponed_rows = 0
        self.blame = BlameState()
        self.earlier_attempts = AttemptStore[Any](journal_dir, group, config.decode_attempt)
        self._tried_apart = np.zeros(len(rows), dtype=bool)
        self._tried_last: set[int] = set()
        self._has_recalled = False
        self.order = RowOrder(np.zeros(0, dtype=np.int64))
        # The last order that was computed from the prompts, and the plan that it was computed for.
        self._first_order: RowOrder | None = None
        self._first_order_plan = ""
        self._deaths = RowDeathJudge(group, journal_dir, builder.note.name, config.render_timeout_s)
        self._left_out = SlowRowFilter(config.order.prompt, config.render_timeout_s, group, builder.note)

    def plan(
        self, state: RankState | None = None, *, has_engine: bool = True, spread_first: bool = False
    ) -> RequestSource:
        """Shard the rows that no rank has finished or is running, and return this rank's source. Collective.

        Args:
            state: rows that this rank has finished or is running in this attempt; None before the first row.
            has_engine: False once this rank's engine was abandoned; its source is then empty.
            spread_first: put a few rows from all parts of the order first; see `RowOrder.spread_first`.

        Raises:
            NoEngineLeft: rows remain but no rank has an engine. Raised on every rank.
        """
        self._rescan_journal_if_group_changed()  # all-reduce: rows in any node's journal
        self._recall_blame()
        cursor_prefix = self._create_cursor()  # before the gather, so that all cursors exist after it
        own_rows = state or RankState()
        if self._config.has_attempts:
            for records in self._group.all_gather_object(list(own_rows.attempts)):
                self.earlier_attempts.add(records)
        peers = self._gather_peers(own_rows, can_claim=has_engine and self._config.claims_rows)
        rows = self._find_remaining_rows(own_rows)  # all-reduce: without rows finished or running anywhere
        if len(rows) and not peers.claiming_ranks:
            raise NoEngineLeft(_NO_ENGINE_LEFT)
        self.has_completions, self._left_out.errors = peers.has_completions, peers.rejected_rows
        self.succeeded_row, self._left_out.suspects = peers.succeeded_row, self._deaths.suspects
        tried = rows[self._tried_apart[rows]]
        self.num_postponed_rows = len(rows) - len(tried) if len(tried) else 0
        if len(tried):
            reason = f"of {format_count(len(tried), 'row')} apart from all others, since an engine died with them"
            order = RowOrder(tried, reason=reason)
            peers = dataclasses.replace(peers, claiming_ranks=peers.claiming_ranks[:1])
        else:
            order = self._order_rows(rows, own_rows, peers, cursor_prefix)  # the same on every rank
        order = order.spread_first() if spread_first else order
        last = self._deaths.suspects | self._tried_last
        self.order = order.put_last(last) if last else order
        if state is not None:
            logger.info(f"resharded {format_count(len(rows), 'remaining row')}: {self.order.description}")
        return self._build_source(self.order, peers, cursor_prefix)

    def build_succeeded_request(self) -> Request | None:
        """Return the request of `succeeded_row`, to generate it once more; None if there is none."""
        return None if self.succeeded_row is None else self.build_request(self.succeeded_row)

    def build_request(self, row: int) -> Request | None:
        """Return the request of a row once more; None if it is rejected now."""
        try:
            [columns] = self._rows.iter_rows(np.array([row]), self._config.columns)
            return self._builder.build(row, columns)
        except RowRefused:  # it needs more time to render than it did then
            return None

    def _rescan_journal_if_group_changed(self) -> None:
        """Read the journals at the first plan, and after each loss of ranks: only journals hold a lost rank's rows."""
        if self._num_shrinks == self._group.num_shrinks:
            return
        journaled, finished = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        if self._group.is_node_leader:
            index = index_journal(self._journal_dir, self._group.raise_if_peer_failed)
            self.has_completions |= not index.error.all()
            self.succeeded_row = _find_short_completion(index, len(self._rows))
            on_batch = self._group.raise_if_peer_failed
            journaled, finished = _select_journaled_rows(index, self._config.retry_errors, on_batch), index.row
        self._deaths.judge(finished)
        self._left_out.errors |= self._deaths.errors
        self._journaled = self._group.all_reduce_any(self._mask(journaled[journaled < len(self._rows)]))
        if self._config.has_attempts:
            self.earlier_attempts.read(self._journaled)
        if self._journaled_before is None:
            self._journaled_before = self._journaled
        self._num_shrinks, self._num_plans = self._group.num_shrinks, 0

    def _recall_blame(self) -> None:
        """Read how the last attempt's engines ended, before the first plan, and find the rows to try. Collective.

        A row to be tried alone needs a witness that the engine works. If no row has ever succeeded it comes last.
        """
        if not self._config.has_shared_engine or self._has_recalled:
            return
        self._has_recalled = True
        notes = gather_engine_notes(self._group, self._journal_dir)
        state = judge_notes(notes) if notes else BlameState()
        groups = [rest for group in state.groups if (rest := [row for row in group if self._remains(row)])]
        held = [(row, cause) for row, cause in state.held if self._remains(row)]
        alone = BlameState(groups=[group for group in groups if len(group) == 1], held=held)
        peers = self._group.all_gather_object([self.has_completions, dataclasses.asdict(alone)])
        alone = BlameState.from_json(peers[0][1])
        self.blame = dataclasses.replace(state, groups=groups, held=held) if self._group.rank == 0 else alone
        suspects = np.array([*chain.from_iterable(groups), *dict(held)], dtype=np.int64)
        self._tried_apart = self._group.all_reduce_any(self._mask(suspects))
        if not any(has_completions for has_completions, _ in peers):
            self._tried_last = {*chain.from_iterable(alone.groups), *dict(alone.held)}
            self._tried_apart[list(self._tried_last)] = False

    def _remains(self, row: int) -> bool:
        return row < len(self._journaled) and not self._journaled[row]

    def _create_cursor(self) -> str:
        """Create this rank's cursor, and return the prefix of all ranks' cursors."""
        self._num_plans += 1
        cursor_prefix = f"dpgen/cursor/{self._config.attempt}/{self._num_shrinks}/{self._num_plans}"
        self._group.checked_store.add(f"{cursor_prefix}/{self._group.rank}", 0)
        return cursor_prefix

    def _gather_peers(self, state: RankState, *, can_claim: bool) -> _Peers:
        rejected = [[row, error.type, error.message] for row, error in self._left_out.errors.items()]
        own = [
            *(can_claim, self._first_order_plan, len(state.running)),
            *(self.has_completions, rejected, self.succeeded_row),
        ]
        states = [_PeerState(*gathered) for gathered in self._group.all_gather_object(own)]
        return _Peers(
            claiming_ranks=[rank for rank, peer in enumerate(states) if peer.can_claim],
            have_same_first_order=len({peer.first_order_plan for peer in states}) == 1,
            num_running=sum(peer.num_running for peer in states),
            has_completions=any(peer.has_completions for peer in states),
            rejected_rows={row: RowError(*error) for peer in states for row, *error in peer.rejected_rows},
            succeeded_row=min((peer.succeeded_row for peer in states if peer.succeeded_row is not None), default=None),
        )

    def _find_remaining_rows(self, state: RankState) -> np.ndarray:
        """Return the rows to plan, int64, ascending."""
        begun = self._group.all_reduce_any(self._mask(state.finished, state.running))
        remaining = np.flatnonzero(~(self._journaled | begun))
        assert self._journaled_before is not None
        self.num_inherited_rows = int(np.count_nonzero(self._journaled & ~self._journaled_before & ~begun))
        self.num_remaining_rows = len(remaining)
        return remaining

    def _order_rows(self, rows: np.ndarray, state: RankState, peers: _Peers, plan: str) -> RowOrder:
        """Return the order of the rows to plan, the same on every rank. Collective."""
        first_order = self._first_order
        # If a peer died during an earlier plan, only some ranks may have finished its order.
        if first_order is not None and peers.have_same_first_order:
            if first_order.prompt_groups is not None:
                counts = self._group.all_reduce_sum(first_order.prompt_groups.count(state))
                adapter_groups = first_order.adapter_groups
                return order_by_measured_lengths(rows, first_order.prompt_groups, counts, adapter_groups)
            if (order := first_order.select(self._mask(rows))) is not None:
                return order
        self._first_order, self._first_order_plan = self._compute_order(rows), plan
        return self._first_order

    def _compute_order(self, rows: np.ndarray) -> RowOrder:
        """Read the prompts and return the order that they suggest, rejected rows and suspects last. Collective."""
        input_rows = self._rows.with_progress(self._group.raise_if_peer_failed)
        return self._left_out.order(self._config.order, input_rows, rows)

    def _build_source(self, order: RowOrder, peers: _Peers, cursor_prefix: str) -> RequestSource:
        ranks, rank = peers.claiming_ranks, self._group.rank
        maker = SourceMaker(
            order,
            self._config.order.work,
            len(ranks),
            num_running=peers.num_running,
            lockstep=self._config.lockstep,
            max_num_seqs=self._config.max_num_seqs,
        )
        claimer = None
        if rank in ranks:
            cursors = [f"{cursor_prefix}/{claiming_rank}" for claiming_rank in ranks]
            claimer = maker.make_claimer(ShardClaimer, self._group.checked_store, cursors, ranks.index(rank))
        # A rank opens few shards where all ranks are equally fast.
        open_shard = cache(lambda index: maker.shards.open(self._rows, order.rows, index, self._config.columns))
        builder = dataclasses.replace(self._builder, rejected_rows=self._left_out.errors)
        return maker.make_source(claimer, open_shard, builder)

    def _mask(self, *rows: np.ndarray) -> np.ndarray:
        mask = np.zeros(len(self._rows), dtype=bool)
        mask[np.concatenate(rows)] = True
        return mask


class _PeerState(NamedTuple):
    """State of one rank as a plan starts; see `_Peers`."""

    can_claim: bool
    first_order_plan: str
    num_running: int
    has_completions: bool
    rejected_rows: list[list[Any]]
    succeeded_row: int | None = None


@dataclass(frozen=True)
class _Peers:
    """State of all ranks as a plan starts, the same on every rank.

    Attributes:
        claiming_ranks: ranks that claim rows.
        have_same_first_order: every rank holds the order of the same earlier plan, or none does.
        num_running: rows that all ranks together are running.
        has_completions: some rank has found a row that succeeded in a journal.
        rejected_rows: rows that took some rank too long to render for an earlier order, or killed ranks.
        succeeded_row: a row that succeeded, in some rank's journal; None if there is none.
    """

    claiming_ranks: list[int]
    have_same_first_order: bool
    num_running: int
    has_completions: bool
    rejected_rows: dict[int, RowError]
    succeeded_row: int | None


def _find_short_completion(index: JournalIndex, num_rows: int) -> int | None:
    """Return the row that succeeded with the shortest result, among the input's rows; None if none did."""
    positions = np.flatnonzero(~index.error & (index.row < num_rows))
    return int(index.row[positions[index.length[positions].argmin()]]) if len(positions) else None


def _select_journaled_rows(
    index: JournalIndex, retry_errors: bool | list[str], on_batch: Callable[[], None]
) -> np.ndarray:
    """Return the rows in this node's journals, int64, without the failed ones that are to be generated again."""
    if len(index) and index.error.all():
        return index.row[:0]  # no row has ever succeeded, so the run starts over, whatever the errors were
    if not retry_errors:
        return index.row
    is_retried = index.error.copy()
    if isinstance(retry_errors, list):
        is_named: list[bool] = []
        with JournalReader(index) as reader:
            for batch in reader.iter_batches(np.flatnonzero(index.error)):
                is_named += [bool(result.error and result.error.type in retry_errors) for result in batch]
                on_batch()
        is_retried[index.error] = is_named
    journaled: np.ndarray = index.row[~is_retried]
    return journaled
