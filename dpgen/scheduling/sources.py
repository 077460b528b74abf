"""Make the claimers and the request sources of one plan, in a real run and in a simulated one.

- The planner makes one claimer and one source per plan, over the c10d store and real shards.
- The simulator makes those of all ranks, over an `InMemoryStore`, with shards and a claimer class of its own.
- Pure logic over a `CounterStore`: no rank, process or clock. The cursors belong to the caller, who creates all of
  them before any claimer makes its first claim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from dpgen.config.sections import WorkConfig
from dpgen.distributed.group import CounterStore
from dpgen.scheduling.claims import ClaimPolicy, ShardClaimer
from dpgen.scheduling.order import RowOrder
from dpgen.scheduling.request_builder import RequestBuilder
from dpgen.scheduling.request_source import Claimer, RequestSource, ShardReader

C = TypeVar("C", bound=ShardClaimer)


class SourceMaker:
    """Make claimers and request sources over the rows of one order.

    Example:
        store, cursors = InMemoryStore(), [f"cursor/{rank}" for rank in range(num_ranks)]
        for cursor in cursors:
            store.add(cursor, 0)
        maker = SourceMaker(order, work, num_ranks)
        for rank in range(num_ranks):
            claimer = maker.make_claimer(ShardClaimer, store, cursors, rank)
            source = maker.make_source(claimer, open_shard, builder)

    Args:
        order: the rows of the plan.
        work: `claim_rows` and `steal` apply here.
        num_claimers: ranks that claim rows, and so the number of shards; 0 makes sources without claimers only.
        num_running: rows that all ranks are running already; they count towards each rank's fair share.
        lockstep: engines step together, so no rank is slower than another.

    Attributes:
        shards: the order's shards, one per claimer.
    """

    def __init__(
        self, order: RowOrder, work: WorkConfig, num_claimers: int, *, num_running: int = 0, lockstep: bool = False
    ) -> None:
        self._order = order
        self.shards = order.shard(max(1, num_claimers), work.claim_rows)
        has_groups = self.shards.groups is not None
        self._policy = ClaimPolicy(
            steal=work.steal,
            max_size=1 if has_groups else work.claim_rows,
            adaptive=not has_groups and not lockstep,
        )
        self._fair_share = -(-(len(order.rows) + num_running) // max(1, num_claimers))  # rounded up

    def make_claimer(self, claimer_type: type[C], store: CounterStore, cursors: Sequence[str], index: int) -> C:
        """Make the claimer whose own shard is number `index`.

        Args:
            claimer_type: `ShardClaimer`, or a subclass.
            cursors: one key per shard; all exist in `store` before any claimer makes its first claim.
        """
        return claimer_type(store, cursors, self.shards.sizes, index, self._policy)

    def make_source(
        self, claimer: Claimer | None, open_shard: Callable[[int], ShardReader], builder: RequestBuilder
    ) -> RequestSource:
        """Make a source of requests; it is exhausted from the start if `claimer` is None.

        Args:
            open_shard: returns the shard with a given index; called for every claim, so cache what is costly.
        """
        return RequestSource(
            claimer,
            open_shard,
            builder,
            fair_share=self._fair_share,
            num_probes=self._order.num_probes,
            length_tracker=self._order.make_tracker(),
        )
