"""Turn the store's errors into PeerFailed; see `RankGroup.checked_store`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from dpgen.distributed.gloo.timeout_store import TimeoutStore


class CheckedStore:
    """Count in the store, with the failure that a peer announced where the store is gone.

    Args:
        translate_errors: turns low-level errors within its block.
    """

    def __init__(self, store: TimeoutStore, translate_errors: Callable[[], AbstractContextManager[None]]) -> None:
        self._store, self._translate_errors = store, translate_errors

    def add(self, key: str, amount: int) -> int:
        """Add atomically, from 0, and return the sum."""
        with self._translate_errors():
            return self._store.add(key, amount)

    def get_many(self, keys: Sequence[str]) -> list[int]:
        """Return the counters of these keys, all of which must exist."""
        with self._translate_errors():
            return self._store.get_many(keys)
