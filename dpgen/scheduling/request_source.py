"""From claims to requests: claim rows, read them, render their prompts, in small steps that never block for long."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from dpgen.data.input_rows import Shard
from dpgen.errors import RowRefused
from dpgen.records import Request, RowResult, derive_row_seed, make_rejected_result
from dpgen.scheduling.claims import Claim
from dpgen.scheduling.prompt_groups import LengthTracker


class Claimer(Protocol):
    """What gives claims."""

    num_remaining: int
    slowdown: float

    def refresh_own_remaining(self) -> int: ...

    @property
    def fair_claim_size(self) -> int: ...

    def should_yield(self, num_in_flight: int) -> bool: ...

    def claim(self, limit: int) -> Claim | None: ...


RenderFn = Callable[[Mapping[str, Any]], tuple[list[int] | None, Any]]


class RequestSource:
    """The rows of this rank, one request after the other.

    Args:
        claims: which rows; None for no row at all.
        shard: gives the shard of a number, to read from.
        render: a row's (prompt token ids, None), or (None, prompt) where the engine's tokenizer must do it.
        run_seed: what the rows' own seeds come from; None for none.
        sampling_columns: field of SamplingParams → column.
        sampling_by_rank: fields of SamplingParams, of which row i takes entry i modulo their number. In dataset order
            shards are strided, so as many ranks start with an entry each; a row that moves to another keeps its own.
        fair_share: rows that this rank would do if all ranks did the same number.
        num_leaders: how many rows, of all ranks', go first to tell how long the others get.
        lessons: what they tell; None for nothing.

    Attributes:
        max_num_seqs: sequences that the engine runs at a time: a rank needs to hold no more than that back.
        num_held, num_held_when_full: rows that the engine has, and had when it could take no more.
    """

    def __init__(
        self,
        claims: Claimer | None,
        shard: Callable[[int], Shard],
        render: RenderFn,
        *,
        run_seed: int | None,
        sampling_columns: Mapping[str, str],
        sampling_by_rank: Sequence[Mapping[str, Any]] = (),
        fair_share: int = 1 << 30,
        num_probes: int = 0,
        length_tracker: LengthTracker | None = None,
    ) -> None:
        self._claims, self._shard, self._render = claims, shard, render
        self._run_seed, self._sampling_columns = run_seed, sampling_columns
        self._sampling_by_rank = sampling_by_rank
        self._claimed: deque[tuple[int, dict[str, Any]]] = deque()
        self._ready: deque[Request | RowResult] = deque()
        self._shards_exhausted = claims is None
        self.fair_share = fair_share
        self._num_leaders, self._lessons = num_probes, length_tracker
        self._num_unclaimed = 0 if length_tracker is None else length_tracker.num_rows
        self.max_num_seqs, self.num_in_flight, self.num_in_flight_when_full = 1, 0, 0

    @property
    def should_prefetch(self) -> bool:
        """Whether `prepare` should be called when there is time: fewer rows are ready than may be held back."""
        # As many as the engine runs: rows of one length are all finished at once.
        fair_size = 0 if self._claims is None else self._claims.fair_claim_size
        return len(self._ready) < min(self.max_num_seqs, 1 + fair_size)

    @property
    def num_unrendered(self) -> int:
        """Rows that are claimed and not rendered yet: so many can be prepared without another claim."""
        return len(self._claimed)

    def refresh_own_remaining(self) -> int:
        """What nobody has claimed of this rank's own shard; for the ranks to sum."""
        return 0 if self._claims is None else self._claims.refresh_own_remaining()

    def update(self, num_unclaimed: int, slowness: float) -> None:
        """Takes what the ranks have agreed on.

        Args:
            num_unclaimed: what nobody has claimed, over all shards.
            slowness: how many times as long as the other ranks this one takes.
        """
        self._num_unclaimed = num_unclaimed
        if self._claims is not None:
            self._claims.num_remaining, self._claims.slowdown = num_unclaimed, slowness

    def stop_yielding(self) -> None:
        """Leaves nothing to others any more: nothing is heard of them."""
        if self._claims is not None:
            self._claims.slowdown = 1.0

    def record_finished(self, row: int) -> None:
        """Notes that a row is through, and what it tells of others."""
        if self._lessons is not None:
            self._lessons.record_finished(row)

    @property
    def num_groups_measured(self) -> int:
        """Of how many groups this rank has learnt since the deal; for the ranks to sum."""
        return 0 if self._lessons is None else self._lessons.num_measured

    def should_reshard(self, num_learnt: int) -> bool:
        """Whether it is time to deal what is left anew.

        That is when as many rows have begun as there are leaders, and half of what is open was learnt. A group that
        several ranks learn of counts several times: the deal then comes a little sooner.

        All ranks come to the same answer, those without an engine included: they deal together.

        Args:
            num_learnt: the ranks' sum.
        """
        if self._lessons is None or not self._lessons.num_unmeasured or not self._num_unclaimed:
            return False
        num_begun = self._lessons.num_rows - self._num_unclaimed
        return num_begun >= self._num_leaders and 2 * num_learnt >= self._lessons.num_unmeasured

    @property
    def max_waiting(self) -> int:
        """How many rows this rank may hold back, given what is left and how fast they go; see `ShardClaimer.fair_size`."""
        if self._claims is None:
            return 0
        # While there is much to learn few: what is held back keeps its place when the others are dealt anew.
        learns = self._lessons is not None and self._lessons.num_unmeasured > 0
        return min(self._claims.fair_claim_size, 1 + self._max_claim_size // 8 if learns else self._max_claim_size)

    @property
    def _max_claim_size(self) -> int:
        """Rows that keep an engine busy until there are more: as many as it runs, if they are all through at once."""
        return max(1, self.max_num_seqs)

    @property
    def is_exhausted(self) -> bool:
        """Whether there is no row left to take and none will come."""
        return self._shards_exhausted and not self._claimed and not self._ready

    def prefetch(self) -> bool:
        """Renders one more row ahead; False if there is none to render now."""
        if not self._claimed and not self._claim_more():
            return False
        row, columns = self._claimed.popleft()
        try:
            self._ready.append(self._build_request(row, columns))
        except RowRefused as why:
            self._ready.append(make_rejected_result(row, why))
        return True

    def next_request(self) -> Request | RowResult | None:
        """The next request, or the result of a row that could not be rendered; None if there is none now."""
        if not self._ready and not self.prefetch():
            return None
        return self._ready.popleft()

    def _claim_more(self) -> bool:
        if self._shards_exhausted or self._claims is None:
            return False
        num_in_flight = self.num_in_flight + len(self._claimed) + len(self._ready)
        if self._claims.should_yield(max(self.num_in_flight_when_full, num_in_flight)):
            return False
        claim = self._claims.claim(self._max_claim_size)
        if claim is None:
            self._shards_exhausted = True
            return False
        self._claimed.extend(self._shard(claim.shard).read_positions(claim.start, claim.stop))
        return True

    def _build_request(self, row: int, columns: Mapping[str, Any]) -> Request:
        entries = self._sampling_by_rank
        sampling: dict[str, Any] = dict(entries[row % len(entries)]) if entries else {}
        if self._run_seed is not None:
            sampling["seed"] = derive_row_seed(self._run_seed, row)
        for name, column in self._sampling_columns.items():
            if columns[column] is not None:  # a null leaves the value of the run or the entry
                sampling[name] = columns[column]
        token_ids, prompt = self._render(columns)
        return Request(row, token_ids, prompt, sampling)
