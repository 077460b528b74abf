"""How many rows an engine holds: always a few more than it runs, and fewer where its KV cache is short.

Pure arithmetic with the caller's clock: the same code admits rows to real engines and in virtual time.
"""

from __future__ import annotations

from collections.abc import Iterator

from dpgen.records import Request, RowResult
from dpgen.scheduling.request_source import RequestSource

_MAX_REJECTED_PER_CALL = (
    50  # rows that could not be rendered, in one go: a file of bad rows keeps nobody from other duties
)
_PREEMPTION_THRESHOLD = 0.05  # of the running sequences preempted between two looks: the KV cache is too small for them
_RECOVERY_S = 5.0  # without preemptions, before one more is tried than fitted


class AdmissionController:
    """What one engine has in hand, and whether it may have more. It counts sequences: a row has one for each sample.

    Rows that wait in an engine are rows that nobody else can start. So its reserve, beyond what it runs, shrinks
    with what is left to claim.

    Args:
        reserve_rows: sequences kept waiting in the engine beyond those it runs, so that it never runs short.
        num_samples: a row's sequences, where the row itself doesn't say.
    """

    def __init__(self, reserve_rows: int, num_samples: int = 1) -> None:
        self._reserve_rows, self._num_samples = reserve_rows, num_samples
        self._in_flight: dict[int, tuple[float, int]] = {}  # row → when it was admitted, its sequences; oldest first
        self._num_seqs = 0
        self._seq_limit: int | None = None  # sequences that the KV cache has room for, where it is short
        self._num_preemptions = 0
        self._stable_since_s = 0.0

    def __len__(self) -> int:
        return len(self._in_flight)

    def __iter__(self) -> Iterator[int]:
        """The rows in hand."""
        return iter(self._in_flight)

    @property
    def oldest_admitted_s(self) -> float | None:
        """When the row that has been in hand for longest was admitted."""
        return next(iter(self._in_flight.values()))[0] if self._in_flight else None

    @property
    def seq_limit(self) -> int | None:
        """How many sequences are admitted at most because the KV cache is short; None where it isn't."""
        return self._seq_limit

    def admit(self, feed: RequestSource, max_num_seqs: int, now_s: float) -> tuple[list[Request], list[RowResult]]:
        """Takes as many rows as the engine should be given now: requests for it, and rows that could not be rendered.

        Args:
            max_num_seqs: sequences that the engine runs at a time; 0 where it can't run any.
        """
        feed.max_num_seqs, feed.num_in_flight = max_num_seqs, len(self._in_flight)
        requests: list[Request] = []
        refused: list[RowResult] = []
        while len(refused) < _MAX_REJECTED_PER_CALL and self._has_room(max_num_seqs, feed):
            row = feed.next_request()
            if row is None:
                break
            if isinstance(row, RowResult):
                refused.append(row)
                continue
            num_seqs = row.sampling.get("n", self._num_samples)
            self._in_flight[row.row] = (now_s, num_seqs if isinstance(num_seqs, int) else 1)
            self._num_seqs += self._in_flight[row.row][1]
            requests.append(row)
            feed.num_in_flight = len(self._in_flight)
        if max_num_seqs and not self._has_room(max_num_seqs, feed):
            feed.num_in_flight_when_full = len(self._in_flight)
        return requests, refused

    def _has_room(self, max_num_seqs: int, feed: RequestSource) -> bool:
        # No more than a fair share: the first rank to be ready must not take what the others could start.
        if len(self._in_flight) >= feed.fair_share:
            return False
        if self._seq_limit is not None:  # without a reserve: vLLM would start it as soon as a few blocks are free
            return self._num_seqs < min(self._seq_limit, max_num_seqs)
        return max_num_seqs > 0 and self._num_seqs < max_num_seqs + min(self._reserve_rows, feed.max_waiting)

    def release(self, row: int) -> None:
        """Notes that a row is through."""
        self._num_seqs -= self._in_flight.pop(row)[1]

    def clear(self) -> None:
        """Notes that the engine has nothing any more."""
        self._in_flight.clear()
        self._num_seqs = 0

    def update_limit(self, num_running: int, num_preemptions: int, max_num_seqs: int, now_s: float) -> bool:
        """Takes what the engine said of its KV cache, about once a second; whether this brought the number down.

        A sequence that vLLM preempts for want of KV blocks is computed again from its start. When preemptions climb
        no more sequences are admitted than ran, and from then on one sixteenth more whenever that was calm for a while
        (additive increase would take minutes at some hundred sequences).

        Args:
            num_running: sequences that ran.
            num_preemptions: since the engine's start.
        """
        num_new = max(0, num_preemptions - self._num_preemptions)  # fewer than before: it is another engine
        self._num_preemptions = num_preemptions
        if num_new > max(1, _PREEMPTION_THRESHOLD * num_running):
            self._stable_since_s = now_s
            fitting = max(1, min(num_running, self._seq_limit or max_num_seqs))
            came_down = self._seq_limit is None or fitting < self._seq_limit
            self._seq_limit = fitting
            return came_down
        if num_new:
            self._stable_since_s = now_s
        elif self._seq_limit is not None and now_s - self._stable_since_s > _RECOVERY_S:
            self._stable_since_s = now_s
            self._seq_limit += max(1, self._seq_limit // 16)
            if self._seq_limit >= max_num_seqs:
                self._seq_limit = None
        return False
