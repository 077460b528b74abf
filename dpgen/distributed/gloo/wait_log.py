"""Log for whom a rank waits: the ranks that have not started the same collective, and what they do instead.

- Collectives have numbers, which are the same on all ranks, since all ranks make them in one order.
- A rank that has waited for 5 s notes its collective's number in the store. Whoever has not noted it keeps the others
  waiting. So nothing is sent where nobody waits for long.
- Rank 0 logs the line, 10 s after it began to wait, then every 30 s. If rank 0 is the one that is waited for, the first
  rank to find that out warns.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from dpgen.formatting import format_count
from dpgen.log import NoticeTimer

logger = logging.getLogger(__name__)

_NOTE_AFTER_S = 5.0
_SEEN_WAITING_S = 3.0  # a rank that waits is seen waiting more often
_MAX_LISTED_RANKS = 5
_PHASE = "dpgen/phase"  # store key: what each rank does, in words
_WAITING = "dpgen/waiting"  # store key: each rank's note of a collective
_COLLECTIVES_PER_EPOCH = 10**12  # a note is one number, the epoch's before the collective's
_WARNING = "dpgen/waiting_for_rank_0"  # store key: how many ranks were about to warn of a collective


class WaitLog:
    """Log the waits of one rank.

    Args:
        rank: this rank's number when the job started.
        list_members: returns these numbers of the group's current ranks.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        list_members: Callable[[], list[int]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._rank, self._list_members, self._clock = store, rank, list_members, clock
        self._epoch = self._num_started = 0
        self._last_wait_s = (0.0, 0.0)  # when this rank began to wait, and when it was seen waiting

    def begin_epoch(self, epoch: int) -> None:
        """Number the collectives from 1 again, since the group is new or has shrunk."""
        self._epoch, self._num_started = epoch, 0
        if self._rank == 0:  # before the first collective, so no rank has noted one of this epoch
            self._store.set_many({_make_key(member): "0" for member in self._list_members()})

    def set_phase(self, name: str) -> None:
        """Tell the other ranks what this rank does from now on, e.g. "loading the model"."""
        self._store.set(f"{_PHASE}/{self._rank}", name)

    def get_phase(self, member: int) -> str:
        """Return what a rank does, as far as it has told."""
        key = f"{_PHASE}/{member}"
        return str(self._store.get(key).decode()) if self._store.check([key]) else "starting"

    @property
    def wait_s(self) -> float:
        """Return for how many seconds this rank has waited by now; 0 if it does not wait. Any thread may ask."""
        start_s, seen_s = self._last_wait_s
        return seen_s - start_s if self._clock() - seen_s < _SEEN_WAITING_S else 0.0

    def start(self) -> Callable[[], None]:
        """Number the next collective, and return what to call at each turn of the wait for it."""
        self._num_started += 1
        number = self._num_started
        start_s = self._clock()
        timer, has_noted = NoticeTimer(self._clock), False

        def on_wait() -> None:
            nonlocal has_noted
            now_s = self._clock()
            self._last_wait_s = (start_s, now_s)
            if not has_noted and now_s >= start_s + _NOTE_AFTER_S:
                has_noted = True
                self._store.set(_make_key(self._rank), str(self._make_note(number)))
            if timer.is_due():
                self._log(number)

        return on_wait

    def _log(self, number: int) -> None:
        if self._rank == 0:
            members = self._list_members()
            missing = self._find_missing([member for member in members if member != 0], number)
            if missing:
                listed = [f"rank {member} ({self.get_phase(member)})" for member in missing[:_MAX_LISTED_RANKS]]
                names = ", ".join(listed + ["..."] * (len(missing) > _MAX_LISTED_RANKS))
                logger.info(f"waiting for {len(missing):,} of {format_count(len(members), 'rank')}: {names}")
        elif self._find_missing([0], number) and self._store.add(f"{_WARNING}/{self._epoch}.{number}", 1) == 1:
            logger.warning(f"waiting for rank 0 ({self.get_phase(0)})")

    def _find_missing(self, members: list[int], number: int) -> list[int]:
        """Return the members that have not noted this collective or a later one; one request for all of them."""
        notes = self._store.get_many([_make_key(member) for member in members])
        return [member for member, note in zip(members, notes, strict=True) if note < self._make_note(number)]

    def _make_note(self, number: int) -> int:
        return self._epoch * _COLLECTIVES_PER_EPOCH + number


def _make_key(member: int) -> str:
    return f"{_WAITING}/{member}"
