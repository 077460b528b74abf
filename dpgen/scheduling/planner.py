"""Dealing rows: what is still to do, split into shards, with a cursor each; anew when an engine or a rank is lost."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from dpgen.config.schema import Config
from dpgen.data.input_rows import Rows, Shard
from dpgen.data.render import prompt_text
from dpgen.distributed.group import Group
from dpgen.errors import NoEngineLeft
from dpgen.formatting import counted
from dpgen.journal.reader import Reader, scan
from dpgen.journal.run_dir import RunFolder
from dpgen.scheduling.claims import Claims
from dpgen.scheduling.order import Order, Split, order_learnt, order_rows
from dpgen.scheduling.prompt_groups import Hand
from dpgen.scheduling.request_source import Feed, RenderPrompt


class Dealer:
    """Makes every rank's `Feed`. All ranks deal together, each time.

    Attributes:
        num_todo, order: of the last deal.

    Args:
        group: the ranks; its size may have shrunk between two deals.
        attempt: names the cursors, so that no two attempts share one.
        render: a row's prompt; see `Feed`.
        claims_rows: whether this process claims rows; those that follow another's engine don't.
        in_lock_step: whether the engines step together, none faster than another.
        tell: prints what one rank says for all.
    """

    def __init__(
        self,
        config: Config,
        rows: Rows,
        folder: RunFolder,
        group: Group,
        attempt: int,
        render: RenderPrompt,
        *,
        claims_rows: bool = True,
        in_lock_step: bool = False,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._config, self._rows, self._folder, self._group = config, rows, folder, group
        self._render, self._tell = render, tell
        self._claims_rows, self._in_lock_step = claims_rows, in_lock_step
        self._attempt, self._epoch, self._num_deals = attempt, -1, 0
        self._journaled = np.zeros(len(rows), dtype=bool)
        self.num_todo = 0
        self.order = Order(np.zeros(0, dtype=np.int64))

    def deal(self, hand: Hand | None = None, can_generate: bool = True) -> Feed:
        """A feed over what no rank has finished or holds.

        Args:
            hand: what this rank has finished in this attempt, and does now; None where it has just begun.
            can_generate: whether this rank has an engine; one that hasn't gets an empty feed.

        Raises:
            NoEngineLeft: rows are left, and no rank can generate; on all ranks.
        """
        config, group = self._config, self._group
        hand, takes_part = hand or Hand(), can_generate and self._claims_rows
        is_first = self._epoch < 0
        if self._epoch != group.epoch:  # at first, and when a rank was lost: its journal is all that it has left
            found = self._finished() if group.leads_node else np.zeros(0, dtype=np.int64)
            self._journaled = group.union(self._mask(found[found < len(self._rows)]))
            self._epoch, self._num_deals = group.epoch, 0
        self._num_deals += 1
        cursors = f"dpgen/cursor/{self._attempt}/{self._epoch}/{self._num_deals}"
        group.counters.add(f"{cursors}/{group.rank}", 0)  # it is there once all have come together, below
        # A deal that a loss has cut short may have come further on one rank than on another: they compare notes.
        ranks = group.all_gather_object((takes_part, self.order.siblings is not None, len(hand.running)))
        taking = [rank for rank, (takes, _, _) in enumerate(ranks) if takes]
        todo = np.flatnonzero(~(self._journaled | group.union(self._mask(hand.finished, hand.running))))
        self.num_todo = len(todo)
        if len(todo) and not taking:
            raise NoEngineLeft("every engine was given up; mend what killed them, then run the same command again")
        siblings = self.order.siblings
        if siblings is None or not all(knows_siblings for _, knows_siblings, _ in ranks):
            self.order = group.agree(lambda: order_rows(config, self._rows, todo, prompt_text(config.prompt)))
        else:
            self.order = order_learnt(todo, siblings, group.total(siblings.count(hand)))
        if not is_first:
            self._tell(f"dealt anew: {counted(len(todo), 'row')} to begin; {self.order}")
        split = self.order.split(max(1, len(taking)), config.work.claim_rows)
        claims = None
        if takes_part:
            claims = Claims(
                group.counters,
                [f"{cursors}/{rank}" for rank in taking],
                split.sizes,
                taking.index(group.rank),
                steal=config.work.steal,
                max_size=config.work.claim_rows if split.groups is None else 1,
                evens_out=split.groups is None and not self._in_lock_step,
            )
        return Feed(
            claims,
            cache(lambda shard: self._open(split, shard)),  # few of them, where all ranks go equally fast
            self._render,
            run_seed=config.run.seed,
            sampling_columns=config.sampling_columns,
            sampling_by_rank=config.sampling_by_rank,
            # With what is in hand already, which counts against it.
            fair_share=-(-(len(todo) + sum(num_running for _, _, num_running in ranks)) // max(1, len(taking))),
            num_leaders=self.order.num_leaders,
            lessons=self.order.lessons(),
        )

    def _open(self, split: Split, shard: int) -> Shard:
        # The columns that generating reads: others may be large, or slow to decode.
        columns = {*self._config.prompt.columns(self._rows.columns), *self._config.sampling_columns.values()}
        if split.groups is None:
            return self._rows.shard(self.order.rows, len(split.sizes), shard, sorted(columns))
        return self._rows.shard_in_pieces(*split.groups[shard], sorted(columns))

    def _mask(self, *rows: np.ndarray) -> np.ndarray:
        mask = np.zeros(len(self._rows), dtype=bool)
        mask[np.concatenate(rows)] = True
        return mask

    def _finished(self) -> np.ndarray:
        """Rows that this node's journals hold, without the failed ones that are to be tried again."""
        index, retry = scan(self._folder.journal), self._config.run.retry_errors
        if len(index) and index.error.all():
            return index.row[:0]  # nothing has ever come out: such a run starts over, whatever was wrong with it
        if not retry:
            return index.row
        again = index.error.copy()
        if isinstance(retry, list):
            with Reader(index) as reader:
                for entry in np.flatnonzero(index.error):
                    error = reader.result(int(entry)).error
                    again[entry] = error is not None and error.type in retry
        kept: np.ndarray = index.row[~again]
        return kept
