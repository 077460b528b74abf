"""From claims to requests: claim rows, read them, render their prompts, in small steps that never block for long."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from dpgen.data.input_rows import Shard
from dpgen.errors import RowRefused
from dpgen.records import Request, RowResult, refused, seed_of_row
from dpgen.scheduling.claims import Claim
from dpgen.scheduling.prompt_groups import Lessons


class Claimant(Protocol):
    """What gives claims."""

    num_left: int
    slowness: float

    def look_here(self) -> int: ...

    @property
    def fair_size(self) -> int: ...

    def are_for_others(self, num_in_hand: int) -> bool: ...

    def take(self, most: int) -> Claim | None: ...


RenderPrompt = Callable[[Mapping[str, Any]], tuple[list[int] | None, Any]]


class Feed:
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
        claims: Claimant | None,
        shard: Callable[[int], Shard],
        render: RenderPrompt,
        *,
        run_seed: int | None,
        sampling_columns: Mapping[str, str],
        sampling_by_rank: Sequence[Mapping[str, Any]] = (),
        fair_share: int = 1 << 30,
        num_leaders: int = 0,
        lessons: Lessons | None = None,
    ) -> None:
        self._claims, self._shard, self._render = claims, shard, render
        self._run_seed, self._sampling_columns = run_seed, sampling_columns
        self._sampling_by_rank = sampling_by_rank
        self._read: deque[tuple[int, dict[str, Any]]] = deque()
        self._ready: deque[Request | RowResult] = deque()
        self._exhausted = claims is None
        self.fair_share = fair_share
        self._num_leaders, self._lessons = num_leaders, lessons
        self._num_unclaimed = 0 if lessons is None else lessons.num_rows
        self.max_num_seqs, self.num_held, self.num_held_when_full = 1, 0, 0

    @property
    def wants_more(self) -> bool:
        """Whether `prepare` should be called when there is time: fewer rows are ready than may be held back."""
        # As many as the engine runs: rows of one length are all finished at once.
        fair_size = 0 if self._claims is None else self._claims.fair_size
        return len(self._ready) < min(self.max_num_seqs, 1 + fair_size)

    @property
    def num_unrendered(self) -> int:
        """Rows that are claimed and not rendered yet: so many can be prepared without another claim."""
        return len(self._read)

    def look_here(self) -> int:
        """What nobody has claimed of this rank's own shard; for the ranks to sum."""
        return 0 if self._claims is None else self._claims.look_here()

    def heed(self, num_unclaimed: int, slowness: float) -> None:
        """Takes what the ranks have agreed on.

        Args:
            num_unclaimed: what nobody has claimed, over all shards.
            slowness: how many times as long as the other ranks this one takes.
        """
        self._num_unclaimed = num_unclaimed
        if self._claims is not None:
            self._claims.num_left, self._claims.slowness = num_unclaimed, slowness

    def go_by_itself(self) -> None:
        """Leaves nothing to others any more: nothing is heard of them."""
        if self._claims is not None:
            self._claims.slowness = 1.0

    def finish(self, row: int) -> None:
        """Notes that a row is through, and what it tells of others."""
        if self._lessons is not None:
            self._lessons.finish(row)

    @property
    def num_learnt(self) -> int:
        """Of how many groups this rank has learnt since the deal; for the ranks to sum."""
        return 0 if self._lessons is None else self._lessons.num_learnt

    def has_learnt(self, num_learnt: int) -> bool:
        """Whether it is time to deal what is left anew.

        That is when as many rows have begun as there are leaders, and half of what is open was learnt. A group that
        several ranks learn of counts several times: the deal then comes a little sooner.

        All ranks come to the same answer, those without an engine included: they deal together.

        Args:
            num_learnt: the ranks' sum.
        """
        if self._lessons is None or not self._lessons.num_open or not self._num_unclaimed:
            return False
        num_begun = self._lessons.num_rows - self._num_unclaimed
        return num_begun >= self._num_leaders and 2 * num_learnt >= self._lessons.num_open

    @property
    def fair_size(self) -> int:
        """How many rows this rank may hold back, given what is left and how fast they go; see `Claims.fair_size`."""
        if self._claims is None:
            return 0
        # While there is much to learn few: what is held back keeps its place when the others are dealt anew.
        learns = self._lessons is not None and self._lessons.num_open > 0
        return min(self._claims.fair_size, 1 + self._enough // 8 if learns else self._enough)

    @property
    def _enough(self) -> int:
        """Rows that keep an engine busy until there are more: as many as it runs, if they are all through at once."""
        return max(1, self.max_num_seqs)

    @property
    def is_empty(self) -> bool:
        """Whether there is no row left to take and none will come."""
        return self._exhausted and not self._read and not self._ready

    def prepare(self) -> bool:
        """Renders one more row ahead; False if there is none to render now."""
        if not self._read and not self._claim():
            return False
        row, columns = self._read.popleft()
        try:
            self._ready.append(self._request(row, columns))
        except RowRefused as why:
            self._ready.append(refused(row, why))
        return True

    def take(self) -> Request | RowResult | None:
        """The next request, or the result of a row that could not be rendered; None if there is none now."""
        if not self._ready and not self.prepare():
            return None
        return self._ready.popleft()

    def _claim(self) -> bool:
        if self._exhausted or self._claims is None:
            return False
        num_in_hand = self.num_held + len(self._read) + len(self._ready)
        if self._claims.are_for_others(max(self.num_held_when_full, num_in_hand)):
            return False
        claim = self._claims.take(self._enough)
        if claim is None:
            self._exhausted = True
            return False
        self._read.extend(self._shard(claim.shard).read(claim.start, claim.stop))
        return True

    def _request(self, row: int, columns: Mapping[str, Any]) -> Request:
        entries = self._sampling_by_rank
        sampling: dict[str, Any] = dict(entries[row % len(entries)]) if entries else {}
        if self._run_seed is not None:
            sampling["seed"] = seed_of_row(self._run_seed, row)
        for name, column in self._sampling_columns.items():
            if columns[column] is not None:  # a null leaves the value of the run or the entry
                sampling[name] = columns[column]
        token_ids, prompt = self._render(columns)
        return Request(row, token_ids, prompt, sampling)
