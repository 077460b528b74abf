"""Make the claimers and the request sources of one plan, in a real run and in a simulated one.

- The planner makes one claimer and one source per plan, over the c10d store and real shards.
- The simulator makes those of all ranks, over an `InMemoryStore`, with shards and a claimer class of its own.
- Pure logic over a `CounterStore`: no rank, process or clock. The cursors belong to the caller, who creates all of
  them before any claimer makes its first claim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from dpgen.config.sections import WorkConfig
from dpgen.distributed.group import CounterStore
from dpgen.scheduling.claims import Claim, ClaimPolicy, ShardClaimer
from dpgen.scheduling.order import RowOrder
from dpgen.scheduling.request_builder import RequestBuilder
from dpgen.scheduling.request_source import Claimer, RequestSource, ShardReader
from dpgen.scheduling.tail.bound import StepCosts
from dpgen.scheduling.tail.heads import HeadPlan, plan_heads
from dpgen.scheduling.tail.held_work import HeldWork

ASSUMED_SEQS = 256  # sequences of an engine that has not said how many it runs
# Microseconds of a step of a model of 8 billion parameters on an H100, as `dpgen simulate --calibrate` measured it with
# `ASSUMED_SEQS`. Only their ratios matter: a full step takes about twice as long as an empty one, and long rows slow it
# down further. Where a full step takes no longer, to assume so costs next to nothing.
_STEP_US, _SEQ_US, _CONTEXT_US = 6000.0, 11.0, 0.052

_MIN_LENGTH_RATIO = 2.0  # the longest row over the median, from which on the end is worth a plan

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
        max_num_seqs: sequences that each engine is expected to run at a time.

    Attributes:
        shards: the order's shards, one per claimer.
    """

    def __init__(
        self,
        order: RowOrder,
        work: WorkConfig,
        num_claimers: int,
        *,
        num_running: int = 0,
        lockstep: bool = False,
        max_num_seqs: int = ASSUMED_SEQS,
    ) -> None:
        self._order, self._num_claimers = order, max(1, num_claimers)
        has_groups = order.groups is not None
        self._policy = ClaimPolicy(
            steal=work.steal,
            max_size=1 if has_groups else work.claim_rows,
            adaptive=not has_groups and not lockstep,
        )
        self._costs = _assume_costs(max_num_seqs)
        self._heads = self._plan_heads()
        self.shards = order.shard(self._num_claimers, work.claim_rows, self._heads.ends if self._heads else ())
        num_others = self._num_claimers - self.shards.num_heads
        num_rows = len(order.rows) - int(self.shards.head_starts[-1]) + num_running
        self._fair_share = -(-num_rows // num_others)  # rounded up

    def make_claimer(self, claimer_type: type[C], store: CounterStore, cursors: Sequence[str], index: int) -> C:
        """Make the claimer whose own shard is number `index`.

        Args:
            claimer_type: `ShardClaimer`, or a subclass.
            cursors: one key per shard; all exist in `store` before any claimer makes its first claim.
        """
        return claimer_type(store, cursors, self.shards.sizes, index, self._policy, self.shards.num_heads)

    def make_source(
        self, claimer: Claimer | None, open_shard: Callable[[int], ShardReader], builder: RequestBuilder
    ) -> RequestSource:
        """Make a source of requests; it is exhausted from the start if `claimer` is None.

        Args:
            open_shard: returns the shard with a given index; called for every claim, so cache what is costly.
        """
        source = RequestSource(
            claimer,
            open_shard,
            builder,
            fair_share=self._fair_share,
            num_probes=self._order.num_probes,
            length_tracker=self._order.make_tracker(),
        )
        if claimer is not None:  # else others would leave rows to this rank, which takes none
            source.held_work = self._make_held_work()
        return source

    def _plan_heads(self) -> HeadPlan | None:
        lengths = self._order.lengths
        if lengths is None or self._num_claimers < 2 or not (self._policy.steal and self._policy.adaptive):
            return None
        if not len(lengths) or lengths[0] < _MIN_LENGTH_RATIO * lengths[len(lengths) // 2]:
            return None  # rows of about one length end together, whoever takes them
        plan = plan_heads(lengths, self._costs, self._num_claimers)
        if plan.ends and plan.ends[-1] == len(lengths):
            return None  # so few rows need no plan: ranks without a block would have none
        return plan

    def _make_held_work(self) -> HeldWork | None:
        if self._heads is None or self._order.lengths is None:
            return None
        lengths, num_head_rows = self._order.lengths, int(self.shards.head_starts[-1])

        def find_lengths(claim: Claim) -> np.ndarray:
            if claim.shard == len(self.shards.sizes):
                return lengths[self.shards.head_starts[claim.start] : self.shards.head_starts[claim.stop]]
            return self.shards.take(lengths, claim.shard)[claim.start : claim.stop]

        return HeldWork(find_lengths, lengths[num_head_rows:], self._costs, self._heads.end, self._num_claimers)


def _assume_costs(max_num_seqs: int) -> StepCosts:
    scale = ASSUMED_SEQS / max_num_seqs
    return StepCosts(_STEP_US, scale * _SEQ_US, max_num_seqs, scale * _CONTEXT_US)
