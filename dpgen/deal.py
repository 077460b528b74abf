"""Dealing rows: what is still to do, split into shards, with a cursor each; anew when an engine or a rank is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from dpgen import journal
from dpgen.claims import Claims
from dpgen.collectives import Group
from dpgen.config import Config
from dpgen.errors import NoEngineLeft
from dpgen.feed import Feed, RenderPrompt
from dpgen.folder import RunFolder
from dpgen.row_template import template_columns
from dpgen.rows import Rows, Shard


class Dealer:
    """Makes every rank's `Feed`. All ranks deal together, each time.

    Args:
        group: the ranks; its size may have shrunk between two deals.
        attempt: names the cursors, so that no two attempts share one.
    """

    def __init__(self, config: Config, rows: Rows, folder: RunFolder, group: Group, attempt: int) -> None:
        self._config, self._rows, self._folder, self._group = config, rows, folder, group
        self._attempt, self._num_deals = attempt, 0
        self.num_todo = 0

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
        taking = [rank for rank, takes in enumerate(group.all_gather_object(takes_part)) if takes]
        if len(todo) and not taking:
            raise NoEngineLeft("every engine was given up; mend what killed them, then run the same command again")
        claims = None
        if takes_part:
            claims = Claims(
                group.counters,
                f"dpgen/cursor/{self._attempt}/{self._num_deals}",
                [len(range(shard, len(todo), len(taking))) for shard in range(len(taking))],
                taking.index(group.rank),
                steal=config.work.steal,
                max_rows=config.work.claim_rows,
            )
        return Feed(
            claims,
            self._shards(todo, len(taking)),
            render,
            run_seed=config.run.seed,
            sampling_columns=config.sampling_columns,
            sampling_by_rank=config.sampling_by_rank,
            fair_share=-(-len(todo) // max(1, len(taking))),
        )

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

    def _shards(self, todo: np.ndarray, num_shards: int) -> Callable[[int], Shard]:
        """Opens shards as they are asked for: most ranks need few besides their own."""
        opened: dict[int, Shard] = {}
        columns = _columns_read(self._config, self._rows.columns)

        def shard(index: int) -> Shard:
            if index not in opened:
                opened[index] = self._rows.shard(todo, num_shards, index, columns)
            return opened[index]

        return shard


def _columns_read(config: Config, columns: list[str]) -> list[str]:
    """The columns that generating reads: others may be large, or slow to decode."""
    if config.data.template is not None:
        named = template_columns(config.data.template) | set(config.sampling_columns.values())
        return [name for name in columns if name in named]
    source = config.data.prompt_column or config.data.messages_column
    assert source is not None
    return sorted({source, *config.sampling_columns.values()})
