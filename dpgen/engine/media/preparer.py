"""Have workers prepare requests with media, ahead of admission: the rank's side.

- Nothing waits, but `prepare_now`. Queues take requests in, and give them back, prepared, as they get ready.
- Requests that are ready for admission take at most `max_prepared_bytes`, as far as sizes can be foreseen: those of the
  last ones tell. Buffers that are not freed, those of requests in the engine included, take at most `max_held_bytes`:
  while they do, none is prepared, so none is admitted. One request is prepared whatever its size, if it is alone.
  The witness that each engine has of its health (`dpgen.engine.blame`) is not counted: it stays to the end.
- Each request that is not finished holds a buffer, hence a file descriptor: workers get no more than the process may
  have.
- A request keeps its buffer until it is dropped. It is prepared once, whatever follows from it.
- A worker's death or hang costs one row. A death by a signal, which the kernel sends when memory runs out, has a second
  try.
- Where workers can't start, the run ends if its rows are known to have media. Else each row that has some is an error,
  and the others are generated.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from dpgen.data.media.parts import find_media
from dpgen.data.media.policy import MediaPolicy
from dpgen.engine.media.buffers import BufferMeter, MediaBuffer
from dpgen.engine.media.handling import PreparedAnswer, RejectedAnswer, encode_prompt
from dpgen.errors import ConfigError, RowRefused
from dpgen.records import Request, RowResult, make_rejected_result
from dpgen.workers.pool import Answer, WorkerRefused

logger = logging.getLogger(__name__)

TASKS_AHEAD = 4  # of a worker: the rank looks for answers every 40 ms
_POLL_S = 0.002
_WAIT_S = 0.01
_SIZES_REMEMBERED = 32
_MAX_LARGE = 4  # requests above the limit, one after the other, from which on such are expected
_CRASHED, _TIMED_OUT, _UNSUPPORTED = "render_crashed", "render_timeout", "unsupported_content"


class Workers(Protocol):
    """Interface of a pool of workers; see `WorkerPool`."""

    def submit(self, key: int, task: object) -> None: ...

    def poll(self) -> list[Answer]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class PreparationLimits:
    """Bound what is prepared ahead.

    Attributes:
        num_workers: processes.
        max_prepared_bytes: of the requests that are ready for admission.
        max_held_bytes: of all buffers: of requests that workers have, that are ready, and that are not finished.
        max_buffers: of the requests that are prepared and not finished.
    """

    num_workers: int = 1
    max_prepared_bytes: int = 1 << 30
    max_held_bytes: int = 1 << 40
    max_buffers: int = 512


class MediaQueue:
    """Hold requests of one owner while they are prepared, and until they are admitted.

    Attributes:
        max_ahead: requests that are worth holding here, so that no worker runs out of work.
        ready_bytes: of the requests that are ready.
    """

    def __init__(self, preparer: MediaPreparer) -> None:
        self._preparer = preparer
        self._ready: deque[Request | RowResult] = deque()
        self._num_open = 0  # not ready
        self.max_ahead = preparer.max_pending
        self.ready_bytes = 0
        self._is_closed = False

    def __len__(self) -> int:
        """Return the number of requests that are being prepared, or ready."""
        return self._num_open + len(self._ready)

    @property
    def has_ready(self) -> bool:
        """True if `take` would return a request."""
        if not self._ready:
            self.poll()
        return bool(self._ready)

    def poll(self) -> None:
        """Take what the workers have prepared, and give them more; to be called while nothing is taken, too."""
        if self._num_open:
            self._preparer.poll()

    def add(self, request: Request) -> None:
        """Add a request that needs to be prepared."""
        self.expect()
        self._preparer.submit(self, request)

    def expect(self) -> None:
        """Count a request that `put` will bring."""
        self._num_open += 1

    def take(self) -> Request | RowResult | None:
        """Return a request that is prepared, or the result of one that can't be; None if none is ready."""
        if not self.has_ready:
            return None
        request = self._ready.popleft()
        if isinstance(request, Request):
            self.ready_bytes -= request.media.num_bytes
            self.poll()  # there is room for another one now
        return request

    def put(self, request: Request | RowResult) -> None:
        """Take what has become of a request that was added."""
        if self._is_closed:
            return
        self._num_open -= 1
        self._ready.append(request)
        if isinstance(request, Request):
            self.ready_bytes += request.media.num_bytes

    def close(self) -> None:
        """Drop all requests, also those that workers have. None is added after that."""
        self._is_closed = True
        self._ready.clear()
        self._num_open = self.ready_bytes = 0
        self._preparer.forget(self)


@dataclass
class _Pending:
    queue: MediaQueue
    request: Request
    buffer: MediaBuffer
    num_deaths: int = 0


class MediaPreparer:
    """Prepare requests whose prompts hold media.

    Args:
        start_workers: starts the pool; called once, when it is first needed.
        policy: what may be loaded.
        clock: seconds that only increase.
        is_required: False if rows may well do without.
    """

    def __init__(
        self,
        start_workers: Callable[[], Workers],
        limits: PreparationLimits,
        policy: MediaPolicy,
        clock: Callable[[], float] = time.monotonic,
        *,
        is_required: bool = True,
    ) -> None:
        self._start_workers, self._limits, self._clock = start_workers, limits, clock
        self._policy, self._is_required = policy, is_required
        self._refusal: RowRefused | None = None
        self._workers: Workers | None = None
        self._queues = set[MediaQueue]()
        self._waiting = deque[tuple[MediaQueue, Request]]()
        self._pending: dict[int, _Pending] = {}
        self._buffers = BufferMeter()
        self._num_submitted = 0
        self._sizes: deque[int] = deque([0], maxlen=_SIZES_REMEMBERED)
        self._num_large = 0  # of the last requests, those above the limit
        self._polled_s = float("-inf")

    @property
    def max_pending(self) -> int:
        """Requests that the workers have at a time, at most."""
        return self._limits.num_workers * TASKS_AHEAD

    def start(self) -> None:
        """Start the workers, if they are not; they get ready in the background."""
        if self._workers is None:
            self._workers = self._start_workers()

    def needs(self, request: Request) -> bool:
        """Return True if a request has to be prepared before the engine can take it."""
        is_open = request.prompt_token_ids is None and request.media is None
        return is_open and bool(find_media(request.prompt))

    def open_queue(self) -> MediaQueue:
        """Return a queue for requests of one owner."""
        queue = MediaQueue(self)
        self._queues.add(queue)
        return queue

    def submit(self, queue: MediaQueue, request: Request) -> None:
        """Prepare a request of a queue, once there is room."""
        if self._refusal is not None:
            queue.put(make_rejected_result(request.id, self._refusal))
            return
        self.start()
        self._waiting.append((queue, request))
        self._send_waiting()

    def forget(self, queue: MediaQueue) -> None:
        """Prepare no further request of a queue, and give its room to others."""
        self._queues.discard(queue)
        self._waiting = deque(entry for entry in self._waiting if entry[0] is not queue)

    def poll(self) -> None:
        """Put what is ready in its queue, and send the workers what there is room for.

        Raises:
            ConfigError: the workers can't be started with this configuration.
            DpgenError: they died while they were starting, again and again.
        """
        now_s = self._clock()
        if self._workers is None or self._refusal is not None or now_s < self._polled_s + _POLL_S:
            return
        self._polled_s = now_s
        try:
            answers = self._workers.poll()
        except WorkerRefused as error:
            if self._is_required:
                raise ConfigError(str(error)) from None
            self._refuse(str(error))
            return
        for answer in answers:
            self._handle(answer)
        if self._send_waiting():
            self._polled_s = float("-inf")  # the next poll sends them

    def prepare_now(self, request: Request, on_wait: Callable[[], None]) -> Request | None:
        """Wait until a request is prepared, whatever room there is, and return it; None if it is rejected.

        Args:
            on_wait: called again and again meanwhile.
        """
        if self._refusal is not None:
            return None
        self.start()
        queue = self.open_queue()
        queue.expect()
        self._send(queue, request)
        while (prepared := queue.take()) is None:
            on_wait()
            time.sleep(_WAIT_S)
        queue.close()
        return prepared if isinstance(prepared, Request) else None

    def close(self) -> None:
        """End the workers, and free all buffers."""
        if self._workers is not None:
            self._workers.close()
        self._buffers.free_all()

    def _refuse(self, reason: str) -> None:
        """Let this request, and each that follows, be its row's error."""
        logger.warning(
            f"rows with images, audio or video fail: {reason}. The others are generated. Once that is mended, "
            f"run.retry_errors=[{_UNSUPPORTED}] generates these"
        )
        self._refusal = RowRefused(_UNSUPPORTED, reason)
        pending, self._pending = self._pending, {}
        waiting, self._waiting = self._waiting, deque()
        for queue, request in [*((entry.queue, entry.request) for entry in pending.values()), *waiting]:
            queue.put(make_rejected_result(request.id, self._refusal))

    def _send_waiting(self) -> bool:
        """Give the workers what waits, as far as there is room; return True if there was."""
        has_sent = False
        while self._waiting and self._has_room():
            self._send(*self._waiting.popleft())
            has_sent = True
        return has_sent

    def _send(self, queue: MediaQueue, request: Request, num_deaths: int = 0) -> None:
        assert self._workers is not None
        self._num_submitted += 1
        key = self._num_submitted
        buffer = MediaBuffer(self._buffers)
        buffer.count(buffer.write(encode_prompt(request.prompt, self._policy)))
        self._pending[key] = _Pending(queue, request, buffer, num_deaths)
        self._workers.submit(key, buffer.address)

    def _has_room(self) -> bool:
        limits, num_pending = self._limits, len(self._pending)
        ready_bytes = sum(queue.ready_bytes for queue in self._queues)
        if num_pending >= self.max_pending or self._buffers.num_buffers >= limits.max_buffers:
            return False
        if not self._buffers.num_buffers:
            return True
        # The largest one counts: too little is held for a while at most, where too much ends the process.
        if self._buffers.num_bytes + max(self._sizes) * (num_pending + 1) > limits.max_held_bytes:
            return False
        if not num_pending and not ready_bytes:
            return True
        mean_bytes = sum(self._sizes) / len(self._sizes)
        return ready_bytes + mean_bytes * (num_pending + 1) <= limits.max_prepared_bytes

    def _handle(self, answer: Answer) -> None:
        assert isinstance(answer.key, int)
        pending = self._pending.pop(answer.key)
        if answer.signal is not None and not pending.num_deaths:
            self._send(pending.queue, pending.request, num_deaths=1)
            return
        if isinstance(answer.value, PreparedAnswer):
            self._record_size(answer.value.num_bytes)
            pending.buffer.count(answer.value.num_bytes)
        pending.queue.put(_finish(pending, answer))

    def _record_size(self, num_bytes: int) -> None:
        """Keep the size of a request; one above the limit says nothing about the others, but several in a row do."""
        limit = self._limits.max_held_bytes
        is_large, is_first = num_bytes > limit, not 0 < self._sizes[0] <= limit
        self._num_large = self._num_large + 1 if is_large else 0
        if is_first or self._num_large >= _MAX_LARGE:
            self._sizes.clear()
        elif is_large:
            return
        self._sizes.append(num_bytes)


def _finish(pending: _Pending, answer: Answer) -> Request | RowResult:
    request, value = pending.request, answer.value
    if isinstance(value, PreparedAnswer):
        return replace(request, prompt_token_ids=value.token_ids.tolist(), prompt=None, media=pending.buffer)
    if isinstance(value, RejectedAnswer):
        return make_rejected_result(request.id, RowRefused(value.type, value.message))
    error_type = _TIMED_OUT if answer.has_timed_out else _CRASHED
    hint = " (data.render_timeout_s)" if answer.has_timed_out else ""
    return make_rejected_result(request.id, RowRefused(error_type, f"preparing its media: {answer.failure}{hint}"))
