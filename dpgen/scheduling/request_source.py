"""Turn claims into requests: claim rows, read them, build their requests, in steps that never block for long.

- A claimed row leaves a source exactly once, as a request or as the result of a row that was rejected.
- At most one claim's rows are read ahead, and at most as many requests are built ahead as the engine runs sequences.
- Requests that workers prepare leave in the order in which they get ready.
- All ranks come to the same answer in `should_reshard`, since every input of the answer is a sum over all ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from dpgen.errors import RowRefused
from dpgen.records import Request, RequestId, RowResult, make_rejected_result
from dpgen.scheduling.claims import Claim
from dpgen.scheduling.groups.prompt_groups import LengthTracker
from dpgen.scheduling.request_builder import RequestBuilder
from dpgen.scheduling.tail.held_work import NO_LOAD, HeldWork, Load


class Claimer(Protocol):
    """Interface of a claimer, as a source uses it; see `ShardClaimer`."""

    num_remaining: int
    slowdown: float

    def refresh_own_remaining(self) -> int: ...

    @property
    def fair_claim_size(self) -> int: ...

    def should_yield(self, num_in_flight: int) -> bool: ...

    def claim(self, limit: int) -> Claim | None: ...


class ShardReader(Protocol):
    """Interface of a shard, as a source uses it; see `dpgen.data.input_rows.Shard`."""

    def read_positions(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (row index, column → value) for each row at positions start..stop."""


class RequestSource:
    """Provide one rank's requests, one after the other.

    Args:
        claimer: claims positions; None for a rank that gets no rows.
        open_shard: returns the shard with a given index.
        builder: builds the requests.
        fair_share: rows in flight or claimed on this rank, at most: its part if all ranks generated equally many.
        num_probes: probe rows over all ranks; their lengths estimate those of other rows.
        length_tracker: counts the measured prompt groups; None where no lengths are measured.

    Attributes:
        max_num_seqs: sequences that the engine runs at a time; the source holds back no more rows than that.
        held_work: tells when the next rows should be left to others; None where no lengths are expected.
        num_in_flight: rows that the engine has. num_in_flight_when_full: rows it had when it could take no more.
    """

    def __init__(
        self,
        claimer: Claimer | None,
        open_shard: Callable[[int], ShardReader],
        builder: RequestBuilder,
        *,
        fair_share: int = 1 << 30,
        num_probes: int = 0,
        length_tracker: LengthTracker | None = None,
    ) -> None:
        self._claimer, self._open_shard, self._builder = claimer, open_shard, builder
        self._claimed: deque[tuple[int, dict[str, Any]]] = deque()
        self._ready: deque[Request | RowResult] = deque()
        self._preparing = builder.preparer.open_queue()
        self._shards_exhausted = claimer is None
        self._num_probes, self._length_tracker = num_probes, length_tracker
        self.held_work: HeldWork | None = None
        self._num_unclaimed = 0 if length_tracker is None else length_tracker.num_rows
        self.fair_share = fair_share
        self.max_num_seqs, self.num_in_flight, self.num_in_flight_when_full = 1, 0, 0

    # ---- requests

    @property
    def is_exhausted(self) -> bool:
        """True once the source holds no row and will get none."""
        return self._shards_exhausted and not self._claimed and not self._ready and not len(self._preparing)

    @property
    def should_prefetch(self) -> bool:
        """True while fewer requests are built than may be held back, so that `prefetch` is worth a call."""
        # As many as the engine runs: rows of one length all finish at once.
        fair_size = 0 if self._claimer is None else self._claimer.fair_claim_size
        if not len(self._preparing):
            return len(self._ready) < min(self._max_claim_size, 1 + fair_size)
        limit = min(max(self.max_num_seqs, self._preparing.max_ahead), self._builder.max_rows_ahead)
        # What is claimed is this rank's already, and its workers wait for it.
        return self._num_built < (limit if self._claimed else min(limit, 1 + fair_size))

    def poll(self) -> None:
        """Take what workers have prepared, so that they get more, while the engine takes nothing."""
        self._preparing.poll()

    @property
    def num_preparing(self) -> int:
        """Number of requests that workers prepare, or have prepared."""
        return len(self._preparing)

    @property
    def _num_built(self) -> int:
        return len(self._ready) + len(self._preparing)

    @property
    def num_unrendered(self) -> int:
        """Rows that are claimed and not built yet: `prefetch` makes no claim for these."""
        return len(self._claimed)

    @property
    def max_waiting(self) -> int:
        """Rows that this rank may hold back, given what remains and how fast it is; see `fair_claim_size`."""
        if self._claimer is None:
            return 0
        # Few while lengths are being measured: a row that waits in the engine keeps its place in a reshard.
        is_measuring = self._length_tracker is not None and self._length_tracker.num_unmeasured > 0
        limit = 1 + self._max_claim_size // 8 if is_measuring else self._max_claim_size
        return min(self._claimer.fair_claim_size, limit)

    def prefetch(self) -> bool:
        """Build one more request ahead; return False if no row is available now."""
        if not self._claimed and not self._claim_more():
            return False
        row, columns = self._claimed.popleft()
        try:
            request = self._builder.build(row, columns)
        except RowRefused as error:
            self._ready.append(make_rejected_result(RequestId(row), error))
            return True
        if self._builder.preparer.needs(request):
            self._preparing.add(request)
        else:
            self._ready.append(request)
        return True

    def next_request(self) -> Request | RowResult | None:
        """Return the next request, or the result of a rejected row; None if no row is available now."""
        request = self._take_ready()
        if request is None and self.should_prefetch and self.prefetch():
            request = self._take_ready()
        if request is None:
            return None
        if self.held_work is not None:
            self.held_work.start(request.row)
        return request

    def close(self) -> None:
        """Have nothing more prepared: the rows that this source holds return to the plan, or to the next start."""
        self._preparing.close()

    def _take_ready(self) -> Request | RowResult | None:
        return self._ready.popleft() if self._ready else self._preparing.take()

    # ---- coordination with the other ranks

    def refresh_own_remaining(self) -> int:
        """Return the unclaimed positions of this rank's own shard, for the ranks to sum."""
        return 0 if self._claimer is None else self._claimer.refresh_own_remaining()

    @property
    def load(self) -> Load:
        """Return what this rank holds, to share with all ranks; see `HeldWork`."""
        return NO_LOAD if self.held_work is None else self.held_work.measure()

    @property
    def length_checks(self) -> tuple[int, int]:
        """Return how many expected lengths were checked, and how many were wrong, for the ranks to sum."""
        return (0, 0) if self.held_work is None else (self.held_work.num_checked, self.held_work.num_wrong)

    def update(
        self, num_unclaimed: int, slowdown: float, loads: Sequence[Load] = (), length_checks: tuple[int, int] = (0, 0)
    ) -> None:
        """Store the result of a sync of totals.

        Args:
            num_unclaimed: unclaimed positions over all shards.
            slowdown: the other ranks' mean tokens/s over this rank's; 1 where unknown.
            loads: of all ranks.
            length_checks: summed over all ranks.
        """
        self._num_unclaimed = num_unclaimed
        if self.held_work is not None:
            self.held_work.update(loads, *length_checks)
        if self._claimer is not None:
            self._claimer.num_remaining, self._claimer.slowdown = num_unclaimed, slowdown

    def stop_yielding(self) -> None:
        """Yield no rows until the next sync of totals: the last one is too old to rely on the other ranks."""
        if self._claimer is not None:
            self._claimer.slowdown = 1.0

    def advance(self, num_steps: float) -> None:
        """Count the engine's steps: tokens that each of its sequences has gained."""
        if self.held_work is not None:
            self.held_work.advance(num_steps)

    def release(self, row: int, num_tokens: int | None) -> None:
        """Note that a row is finished; `num_tokens` is None if it has failed."""
        if self.held_work is not None:
            self.held_work.release(row, num_tokens)

    def record_finished(self, row: int) -> None:
        """Count the row's prompt group as measured."""
        if self._length_tracker is not None:
            self._length_tracker.record_finished(row)

    @property
    def num_groups_measured(self) -> int:
        """Prompt groups that this rank has measured since the plan, for the ranks to sum."""
        return 0 if self._length_tracker is None else self._length_tracker.num_measured

    def should_reshard(self, num_groups_measured: int) -> bool:
        """Return True once the remaining rows should be sorted again, by measured lengths.

        That is when as many rows are claimed as there are probes, and half of the unmeasured groups are measured. A
        group that several ranks measure counts several times, so a reshard may come a little sooner.

        The answer is the same on all ranks, those without an engine included, since all ranks plan together.

        Args:
            num_groups_measured: summed over all ranks.
        """
        tracker = self._length_tracker
        if tracker is None or not tracker.num_unmeasured or not self._num_unclaimed:
            return False
        num_claimed = tracker.num_rows - self._num_unclaimed
        return num_claimed >= self._num_probes and 2 * num_groups_measured >= tracker.num_unmeasured

    @property
    def _max_claim_size(self) -> int:
        # Enough to refill the engine if all of its rows finish at once.
        return max(1, min(self.max_num_seqs, self._builder.max_rows_ahead))

    def _claim_more(self) -> bool:
        if self._shards_exhausted or self._claimer is None:
            return False
        num_in_flight = self.num_in_flight + len(self._claimed) + self._num_built
        if num_in_flight >= max(1, self.fair_share):  # a rank that holds nothing finds out if any row is left
            return False  # another rank can start the next row now, and this one could not
        if self._claimer.should_yield(max(self.num_in_flight_when_full, num_in_flight)):
            return False
        limit = self._max_claim_size
        if self.held_work is not None:
            limit = min(limit, self.held_work.count_affordable(self._claimer.num_remaining))
            if not limit:
                return False
        claim = self._claimer.claim(limit)
        if claim is None:
            self._shards_exhausted = True
            return False
        rows = list(self._open_shard(claim.shard).read_positions(claim.start, claim.stop))
        if self.held_work is not None:
            self.held_work.hold(claim, [row for row, _ in rows])
            self.fair_share = max(self.fair_share, len(rows))  # a block of long rows is to run at once
        self._claimed.extend(rows)
        return True
