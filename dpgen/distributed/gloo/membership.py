"""Agree through the store on the ranks that remain after a loss. Rank 0 leads, since it watches all leases.

A shrink is a store key. Every rank that notices the loss creates it and enters; the others see it and follow. Rank 0
waits until each member has entered or lets its lease expire, and publishes those that entered.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from dpgen.distributed.gloo.leases import Leases
from dpgen.distributed.group import StorePoll

_POLL_S = 0.05
_SHRINK = "dpgen/shrink"  # store key: each shrink, the ranks that entered it, and its members


class Membership:
    """The initial ranks of the current members, as one of them knows them.

    Args:
        rank: this rank's number when the job started.
        broken_lease_s: how long a lease lasts once the group is known to be broken, in seconds.
        on_wait: called at each turn of a wait; raises PeerFailed where waiting is in vain.

    Attributes:
        members: initial ranks, ascending.
        num_shrinks: how often the group has shrunk; the same on all members.
    """

    def __init__(
        self, store: Any, leases: Leases, rank: int, size: int, *, broken_lease_s: float, on_wait: Callable[[], None]
    ) -> None:
        self._store, self._leases, self._rank = store, leases, rank
        self._broken_lease_s, self._on_wait = broken_lease_s, on_wait
        self.members = list(range(size))
        self.num_shrinks = 0

    def is_shrinking(self) -> bool:
        """Return True if a peer has begun the next shrink."""
        is_begun: bool = self._store.check([f"{_SHRINK}/{self.num_shrinks + 1}"])
        return is_begun

    def shrink(self) -> list[int]:
        """Enter the next shrink and return its members, which may lack this rank. Collective.

        The caller sets `members` once it has used both lists.
        """
        self.num_shrinks += 1
        key = f"{_SHRINK}/{self.num_shrinks}"
        self._store.set(key, "1")
        self._store.append(f"{key}/entered", f"{self._rank} ")  # one value, which rank 0 reads by one request
        return self._publish_members(key) if self._rank == 0 else self._wait_for_members(key)

    def _publish_members(self, key: str) -> list[int]:
        """Wait on rank 0 for every rank that still renews its lease, and publish those that entered the shrink."""
        while True:
            entered = set(map(int, self._store.get(f"{key}/entered").split()))
            present = [member for member in self.members if member in entered]
            expired = self._leases.find_expired(self.members, self._broken_lease_s)
            if set(present) | set(expired) >= set(self.members):
                break
            self._on_wait()
            time.sleep(_POLL_S)
        self._store.set(f"{key}/members", json.dumps(present))
        return present

    def _wait_for_members(self, key: str) -> list[int]:
        poll = StorePoll(len(self.members))
        while not self._store.check([f"{key}/members"]):
            self._on_wait()
            poll.sleep()
        members: list[int] = json.loads(self._store.get(f"{key}/members"))
        return members
