"""Dealing rows: what is still to do, split into shards, with a cursor each; anew when an engine or a rank is lost."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np

from dpgen import journal
from dpgen.claims import Claims
from dpgen.collectives import Group
from dpgen.config import Config
from dpgen.errors import NoEngineLeft
from dpgen.feed import Feed, RenderPrompt
from dpgen.folder import RunFolder
from dpgen.order import Order, Split, order_rows
from dpgen.render import prompt_text
from dpgen.rows import Rows, Shard


class Dealer:
    """Makes every rank's `Feed`. All ranks deal together, each time.

    Attributes:
        num_todo, order: of the last deal.

    Args:
        group: the ranks; its size may have shrunk between two deals.
        attempt: names the cursors, so that no two attempts share one.
    """

    def __init__(self, config: Config, rows: Rows, folder: RunFolder, group: Group, attempt: int) -> None:
        self._config, self._rows, self._folder, self._group = config, rows, folder, group
        self._attempt, self._num_deals = attempt, 0
        self.num_todo = 0
        self.order = Order(np.zeros(0, dtype=np.int64))

    def deal(self, render: RenderPrompt, held: Iterable[int] = (), takes_part: bool = True) -> Feed:
        """A feed over what no rank has finished or holds.

        Args:
            held: rows that this rank has finished in this attempt, or has in hand and will finish.
            takes_part: whether this rank can generate; one that can't gets an empty feed.

        Raises:
            NoEngineLeft: rows are left, and no rank can generate; on all ranks.
        """
        todo = self._todo(held)
        self.num_todo = len(todo)
        self._num_deals += 1
        config, group = self._config, self._group
        cursors = f"dpgen/cursor/{self._attempt}/{self._num_deals}"
        group.counters.add(f"{cursors}/{group.rank}", 0)  # it is there once all have come together, below
        taking = [rank for rank, takes in enumerate(group.all_gather_object(takes_part)) if takes]
        if len(todo) and not taking:
            raise NoEngineLeft("every engine was given up; mend what killed them, then run the same command again")
        self.order = group.agree(lambda: order_rows(config, self._rows, todo, prompt_text(config.prompt)))
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
            )
        return Feed(
            claims,
            cache(lambda shard: self._open(split, shard)),  # most ranks need few besides their own
            render,
            run_seed=config.run.seed,
            sampling_columns=config.sampling_columns,
            sampling_by_rank=config.sampling_by_rank,
            fair_share=-(-len(todo) // max(1, len(taking))),
        )

    def _open(self, split: Split, shard: int) -> Shard:
        # The columns that generating reads: others may be large, or slow to decode.
        columns = {*self._config.prompt.columns(self._rows.columns), *self._config.sampling_columns.values()}
        if split.groups is None:
            return self._rows.shard(self.order.rows, len(split.sizes), shard, sorted(columns))
        return self._rows.shard_in_pieces(*split.groups[shard], sorted(columns))

    def _todo(self, held: Iterable[int]) -> np.ndarray:
        """Indices of the rows to generate, in order of work: what no node's journal holds, and no rank has in hand."""
        done = np.zeros(len(self._rows), dtype=bool)
        done[np.fromiter(held, dtype=np.int64)] = True
        if self._group.leads_node:
            found = self._finished()
            done[found[found < len(self._rows)]] = True
        return np.flatnonzero(~self._group.union(done))

    def _finished(self) -> np.ndarray:
        """Rows that this node's journals hold, without the failed ones that are to be tried again."""
        index, retry = journal.scan(self._folder.journal), self._config.run.retry_errors
        if len(index) and index.error.all():
            return index.row[:0]  # nothing has ever come out: such a run starts over, whatever was wrong with it
        if not retry:
            return index.row
        again = index.error.copy()
        if isinstance(retry, list):
            with journal.Reader(index) as reader:
                for entry in np.flatnonzero(index.error):
                    error = reader.result(int(entry)).error
                    again[entry] = error is not None and error.type in retry
        kept: np.ndarray = index.row[~again]
        return kept
