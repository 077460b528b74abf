"""Dealing rows: what is still to do, split into shards, with a cursor each; anew when an engine or a rank is lost."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from dpgen.config.schema import Config
from dpgen.data.input_rows import InputRows, Shard
from dpgen.data.render import make_prompt_text_fn
from dpgen.distributed.group import RankGroup
from dpgen.errors import NoEngineLeft
from dpgen.formatting import format_count
from dpgen.journal.reader import JournalReader, index_journal
from dpgen.journal.run_dir import RunDir
from dpgen.scheduling.claims import ShardClaimer
from dpgen.scheduling.order import RowOrder, ShardSpec, order_by_measured_lengths, order_rows
from dpgen.scheduling.prompt_groups import RankState
from dpgen.scheduling.request_source import RenderFn, RequestSource


class ShardPlanner:
    """Makes every rank's `RequestSource`. All ranks deal together, each time.

    Attributes:
        num_todo, order: of the last deal.

    Args:
        group: the ranks; its size may have shrunk between two deals.
        attempt: names the cursors, so that no two attempts share one.
        render: a row's prompt; see `RequestSource`.
        claims_rows: whether this process claims rows; those that follow another's engine don't.
        in_lock_step: whether the engines step together, none faster than another.
        tell: prints what one rank says for all.
    """

    def __init__(
        self,
        config: Config,
        rows: InputRows,
        folder: RunDir,
        group: RankGroup,
        attempt: int,
        render: RenderFn,
        *,
        claims_rows: bool = True,
        in_lockstep: bool = False,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._config, self._rows, self._folder, self._group = config, rows, folder, group
        self._render, self._tell = render, tell
        self._claims_rows, self._in_lockstep = claims_rows, in_lockstep
        self._attempt, self._epoch, self._num_plans = attempt, -1, 0
        self._journaled = np.zeros(len(rows), dtype=bool)
        self.num_remaining_rows = 0
        self.order = RowOrder(np.zeros(0, dtype=np.int64))

    def plan(self, state: RankState | None = None, can_generate: bool = True) -> RequestSource:
        """A feed over what no rank has finished or holds.

        Args:
            hand: what this rank has finished in this attempt, and does now; None where it has just begun.
            can_generate: whether this rank has an engine; one that hasn't gets an empty feed.

        Raises:
            NoEngineLeft: rows are left, and no rank can generate; on all ranks.
        """
        config, group = self._config, self._group
        state, can_claim = state or RankState(), can_generate and self._claims_rows
        is_first = self._epoch < 0
        if self._epoch != group.num_shrinks:  # at first, and when a rank was lost: its journal is all that it has left
            found = self._scan_journaled_rows() if group.is_node_leader else np.zeros(0, dtype=np.int64)
            self._journaled = group.all_reduce_any(self._mask(found[found < len(self._rows)]))
            self._epoch, self._num_plans = group.num_shrinks, 0
        self._num_plans += 1
        cursor_prefix = f"dpgen/cursor/{self._attempt}/{self._epoch}/{self._num_plans}"
        group.checked_store.add(f"{cursor_prefix}/{group.rank}", 0)  # it is there once all have come together, below
        # A deal that a loss has cut short may have come further on one rank than on another: they compare notes.
        ranks = group.all_gather_object((can_claim, self.order.prompt_groups is not None, len(state.running)))
        claiming_ranks = [rank for rank, (takes, _, _) in enumerate(ranks) if takes]
        todo = np.flatnonzero(~(self._journaled | group.all_reduce_any(self._mask(state.finished, state.running))))
        self.num_remaining_rows = len(todo)
        if len(todo) and not claiming_ranks:
            raise NoEngineLeft("every engine was given up; mend what killed them, then run the same command again")
        siblings = self.order.prompt_groups
        if siblings is None or not all(knows_siblings for _, knows_siblings, _ in ranks):
            self.order = group.run_on_all_ranks(
                lambda: order_rows(config, self._rows, todo, make_prompt_text_fn(config.prompt))
            )
        else:
            self.order = order_by_measured_lengths(todo, siblings, group.all_reduce_sum(siblings.count(state)))
        if not is_first:
            self._tell(f"dealt anew: {format_count(len(todo), 'row')} to begin; {self.order}")
        split = self.order.shard(max(1, len(claiming_ranks)), config.work.claim_rows)
        claims = None
        if can_claim:
            claims = ShardClaimer(
                group.checked_store,
                [f"{cursor_prefix}/{rank}" for rank in claiming_ranks],
                split.sizes,
                claiming_ranks.index(group.rank),
                steal=config.work.steal,
                max_size=config.work.claim_rows if split.groups is None else 1,
                adaptive=split.groups is None and not self._in_lockstep,
            )
        return RequestSource(
            claims,
            cache(lambda shard: self._open_shard(split, shard)),  # few of them, where all ranks go equally fast
            self._render,
            run_seed=config.run.seed,
            sampling_columns=config.sampling_columns,
            sampling_by_rank=config.sampling_by_rank,
            # With what is in hand already, which counts against it.
            fair_share=-(-(len(todo) + sum(num_running for _, _, num_running in ranks)) // max(1, len(claiming_ranks))),
            num_probes=self.order.num_probes,
            length_tracker=self.order.make_tracker(),
        )

    def _open_shard(self, split: ShardSpec, shard: int) -> Shard:
        # The columns that generating reads: others may be large, or slow to decode.
        columns = {*self._config.prompt.columns(self._rows.columns), *self._config.sampling_columns.values()}
        if split.groups is None:
            return self._rows.shard(self.order.rows, len(split.sizes), shard, sorted(columns))
        return self._rows.shard_in_chunks(*split.groups[shard], sorted(columns))

    def _mask(self, *rows: np.ndarray) -> np.ndarray:
        mask = np.zeros(len(self._rows), dtype=bool)
        mask[np.concatenate(rows)] = True
        return mask

    def _scan_journaled_rows(self) -> np.ndarray:
        """Rows that this node's journals hold, without the failed ones that are to be tried again."""
        index, retry = index_journal(self._folder.journal), self._config.run.retry_errors
        if len(index) and index.error.all():
            return index.row[:0]  # nothing has ever come out: such a run starts over, whatever was wrong with it
        if not retry:
            return index.row
        again = index.error.copy()
        if isinstance(retry, list):
            with JournalReader(index) as reader:
                for entry in np.flatnonzero(index.error):
                    error = reader.result(int(entry)).error
                    again[entry] = error is not None and error.type in retry
        kept: np.ndarray = index.row[~again]
        return kept
