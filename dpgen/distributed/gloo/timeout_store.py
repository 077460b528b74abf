"""Give c10d's store a timeout on every call: a host that lost its power closes no connection and answers nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_TIMEOUT_S = 60.0


class TimeoutStore:
    """Make the calls of a torch.distributed Store that dpgen needs, each abandoned after `limit_s`.

    TCPStore's own timeout covers waiting for a key, not waiting for a response: if the host is dead, the call lasts
    until TCP gives up, a quarter of an hour with Linux's defaults. So a thread makes the calls, and the caller waits
    for the thread. After one abandoned call, every other call fails immediately.

    Raises:
        RuntimeError: from any call, as the store itself does: no response in time, or the store's own error.
    """

    def __init__(self, store: Any, limit_s: float = _TIMEOUT_S) -> None:
        self._store, self._limit_s = store, limit_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._is_lost = False

    def add(self, key: str, amount: int) -> int:
        return int(self._call(lambda: self._store.add(key, amount)))

    def get_many(self, keys: Sequence[str]) -> list[int]:
        """Return the counters of these keys, all of which must exist."""
        return [int(value) for value in self._call(lambda: self._store.multi_get(list(keys)))]

    def check(self, keys: list[str]) -> bool:
        return bool(self._call(lambda: self._store.check(keys)))

    def set(self, key: str, value: str) -> None:
        self._call(lambda: self._store.set(key, value))

    def set_many(self, values: Mapping[str, str]) -> None:
        """Set these keys in one request."""
        self._call(lambda: self._store.multi_set(list(values), list(values.values())))

    def append(self, key: str, value: str) -> None:
        """Append to the value of a key, from an empty one."""
        self._call(lambda: self._store.append(key, value))

    def get(self, key: str) -> bytes:
        """Return the value of a key, which must exist."""
        value: bytes = self._call(lambda: self._store.get(key))
        return value

    def _call(self, call: Callable[[], Any]) -> Any:
        if not self._is_lost:
            try:
                return self._thread.submit(call).result(self._limit_s)
            except TimeoutError:
                self._is_lost = True
        raise RuntimeError(f"the store has not answered for {self._limit_s:.0f} s")
