"""Limit the rows in an engine: always a few more than it runs, and fewer where its KV cache is short.

- Rows beyond those that the engine runs wait there, and no other rank can start these. So the reserve shrinks with the
  rows that remain to be claimed.
- A rank never has more rows in flight than its fair share.
- Where vLLM preempts sequences, no more are admitted than the KV cache held, until a quiet time allows more. Each
  engine has a KV cache of its own, so that this limit follows the number of engines.
- Pure arithmetic with the caller's clock: the same code admits rows to real engines and in virtual time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from dpgen.records import Request, RequestId, RowResult
from dpgen.scheduling.progress.throughput import LatencyHistogram
from dpgen.scheduling.request_source import RequestSource

# Rows rejected in one call, at most: a file of bad rows must not keep the loop from its other duties.
_MAX_REJECTED_PER_CALL = 50
# Preemptions between two updates, per running sequence. Above that the KV cache is too small for these sequences.
_PREEMPTION_THRESHOLD = 0.05
_RECOVERY_S = 5.0  # time without preemptions before the limit rises


class AdmissionController:
    """Decide how many rows one engine gets, and keep track of those it has.

    Counts sequences: a row has one for each sample.

    Args:
        reserve_rows: sequences kept waiting in the engine beyond those it runs, so that it never runs out.
        num_samples: sequences of a row that does not give a number of its own.
        reads_only: True if the model only reads prompts. Then a step may finish all sequences that it runs, and as many
            wait for the next one.

    Attributes:
        latencies: for how long the engine had each request that it has finished, waiting included.
    """

    def __init__(self, reserve_rows: int, num_samples: int = 1, *, reads_only: bool = False) -> None:
        self._reserve_rows, self._num_samples, self._reads_only = reserve_rows, num_samples, reads_only
        self._in_flight: dict[RequestId, tuple[float, int]] = {}  # (time of admission, sequences)
        self._num_seqs = 0
        self._seq_limit: int | None = None
        self._num_caches = 1
        self._num_preemptions = 0
        self._stable_since_s = 0.0
        self.latencies = LatencyHistogram()

    def __len__(self) -> int:
        return len(self._in_flight)

    def __iter__(self) -> Iterator[int]:
        """Iterate over the rows of the requests in flight, the oldest first."""
        return (id.row for id in self._in_flight)

    @property
    def num_seqs(self) -> int:
        """Sequences in flight."""
        return self._num_seqs

    @property
    def oldest_admitted_s(self) -> float | None:
        """Time at which the oldest row in flight was admitted; None if no row is in flight."""
        return next(iter(self._in_flight.values()))[0] if self._in_flight else None

    @property
    def seq_limit(self) -> int | None:
        """Sequences admitted at most because the KV cache is short; None where it is not."""
        return self._seq_limit

    def admit(
        self,
        source: RequestSource,
        max_num_seqs: int,
        now_s: float,
        take_next: Callable[[], Request | RowResult | None] | None = None,
        num_begun: Callable[[], int] = lambda: 0,
    ) -> tuple[list[Request], list[RowResult]]:
        """Take as many rows from `source` as the engine should get now; return their requests, and rejected rows.

        Args:
            max_num_seqs: sequences that the engine runs at a time; 0 where it can run none.
            take_next: returns the next request, or what `source` would return in its place. It asks `offer` before it
                takes a new row from `source`.
            num_begun: as for `offer`.
        """
        source.max_num_seqs = max_num_seqs
        requests: list[Request] = []
        rejected: list[RowResult] = []
        take_next = take_next or (lambda: source.next_request() if self.offer(source) else None)
        while len(rejected) < _MAX_REJECTED_PER_CALL and self._has_room(max_num_seqs, source):
            request = take_next()
            if request is None:
                break
            if isinstance(request, RowResult):
                rejected.append(request)
                continue
            num_seqs = request.sampling.get("n", self._num_samples)
            if request.pooling is not None:
                num_seqs = request.pooling.num_sequences
            self._in_flight[request.id] = (now_s, num_seqs if isinstance(num_seqs, int) else 1)
            self._num_seqs += self._in_flight[request.id][1]
            requests.append(request)
        may_begin = self.offer(source, num_begun())
        if max_num_seqs and not (may_begin and self._has_room(max_num_seqs, source)):
            source.num_in_flight_when_full = source.num_in_flight
        return requests, rejected

    def offer(self, source: RequestSource, num_begun: int = 0) -> bool:
        """Tell `source` how many rows this rank has in flight, and return True if another one may begin.

        No more than a fair share: the first rank that is ready must not take rows that the others could start.

        Args:
            num_begun: rows whose programs run; 0 where each request in the engine is a row.
        """
        source.num_in_flight = num_begun or len(self._in_flight)
        return source.num_in_flight < source.fair_share

    def release(self, ids: Iterable[RequestId], now_s: float | None = None) -> None:
        """Remove requests that the engine has finished.

        Args:
            now_s: when it finished them, for `latencies`; None to leave them out there.
        """
        for id in ids:
            admitted_s, num_seqs = self._in_flight.pop(id)
            self._num_seqs -= num_seqs
            if now_s is not None:
                self.latencies.record(now_s - admitted_s)

    def clear(self) -> None:
        """Remove all rows: the engine that had them is gone."""
        self._in_flight.clear()
        self._num_seqs = 0

    def scale_limit(self, num_caches: int) -> None:
        """Follow an engine that joins the others, or is lost, with its KV cache.

        Args:
            num_caches: engines that have one, or have rows that wait for theirs; 0 leaves the limit as it is.
        """
        if num_caches not in (0, self._num_caches):
            if self._seq_limit is not None:
                self._seq_limit = max(1, self._seq_limit * num_caches // self._num_caches)
            self._num_caches = num_caches

    def update_limit(self, num_running: int, num_preemptions: int, max_num_seqs: int, now_s: float) -> bool:
        """Adapt the limit to the engine's preemptions, about once a second; return True if the limit came down.

        vLLM computes a sequence again from its start after a preemption, which happens where the KV cache has too few
        blocks. When preemptions rise, the limit falls to the number of running sequences. It rises by a sixteenth
        after each 5 s without preemptions (an additive increase would take minutes at some hundred sequences).

        Args:
            num_running: sequences that the engine runs.
            num_preemptions: preemptions since the engine's start.
        """
        num_new = max(0, num_preemptions - self._num_preemptions)  # a smaller count comes from another engine
        self._num_preemptions = num_preemptions
        if num_new > max(1, _PREEMPTION_THRESHOLD * num_running):
            return self._lower_limit(num_running, max_num_seqs, now_s)
        if num_new:
            self._stable_since_s = now_s
        elif self._seq_limit is not None and now_s - self._stable_since_s > _RECOVERY_S:
            self._stable_since_s = now_s
            self._seq_limit += max(1, self._seq_limit // 16)
            if self._seq_limit >= max_num_seqs:
                self._seq_limit = None
        return False

    def _has_room(self, max_num_seqs: int, source: RequestSource) -> bool:
        if self._seq_limit is not None:  # no reserve: vLLM would start a waiting row once a few blocks are free
            return self._num_seqs < min(self._seq_limit, max_num_seqs)
        reserve = max(self._reserve_rows, max_num_seqs) if self._reads_only else self._reserve_rows
        return max_num_seqs > 0 and self._num_seqs < max_num_seqs + min(reserve, source.max_waiting)

    def _lower_limit(self, num_running: int, max_num_seqs: int, now_s: float) -> bool:
        self._stable_since_s = now_s
        limit = max(1, min(num_running, self._seq_limit or max_num_seqs))
        came_down = self._seq_limit is None or limit < self._seq_limit
        self._seq_limit = limit
        return came_down
