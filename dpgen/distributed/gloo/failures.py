"""Announce to the other ranks why this one failed, through the store, and read what they announced.

The first rank to fail reports why; the others only exit. A rank that is lost announces nothing.
"""

from __future__ import annotations

import json
import time
from typing import Any

from dpgen.distributed.gloo.torch_world import summarize_error
from dpgen.distributed.group import PeerLost, StoreLost
from dpgen.errors import PeerFailed

_ANNOUNCEMENT_WAIT_S = 2.0
_POLL_S = 0.05
_FAILURE = "dpgen/failure"  # store key: the first failure, as JSON


class FailureBoard:
    """The failures that ranks announce, in the store.

    Args:
        rank: this rank's number when the job started.
    """

    def __init__(self, store: Any, rank: int) -> None:
        self._store, self._rank = store, rank

    def announce(self, message: str, exit_status: int) -> bool:
        """Announce that this rank failed; return True if it is the first, which reports why."""
        try:
            is_first: bool = self._store.add(f"{_FAILURE}/count", 1) == 1
            if is_first:
                failure = {"rank": self._rank, "message": message, "exit_status": exit_status}
                self._store.set(_FAILURE, json.dumps(failure))
        except RuntimeError:
            return True  # the store is gone, so no other rank can have reported the failure
        return is_first

    def read_exit_status(self) -> int | None:
        """Return the exit status of the failure announced first; None if there is none, or the store is gone."""
        try:
            if self._store.check([_FAILURE]):
                return int(json.loads(self._store.get(_FAILURE))["exit_status"])
        except RuntimeError:
            return None  # the store is gone, and the announcement with it
        return None

    def raise_if_announced(self) -> None:
        """Raise PeerFailed with the failure that was announced first."""
        if self._store.check([_FAILURE]):
            raise self.make_peer_error()

    def make_peer_error(self, lost: str | None = None) -> PeerFailed:
        """Return the failure that a peer announced, or the loss of a peer that announced none.

        Args:
            lost: the error by which this rank noticed the loss; None if a failure is known to be announced.
        """
        deadline_s = time.monotonic() + (_ANNOUNCEMENT_WAIT_S if lost else 0.0)
        try:
            while not self._store.check([_FAILURE]):
                if time.monotonic() >= deadline_s:
                    break
                time.sleep(_POLL_S)  # the announcement and the closed connection may arrive in either order
            else:
                failure = json.loads(self._store.get(_FAILURE))
                return PeerFailed(f"rank {failure['rank']} failed: {failure['message']}", int(failure["exit_status"]))
        except RuntimeError as error:
            return StoreLost(
                f"rank {self._rank} lost rank 0, which keeps the store ({summarize_error(error)}). "
                "Rerun the same command to resume"
            )
        return PeerLost(f"rank {self._rank} lost contact with another rank (killed or cut off: {lost})")
