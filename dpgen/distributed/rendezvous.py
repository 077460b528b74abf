"""Rendezvous: give each start of the job a round number that all its ranks agree on, once all of them have arrived.

- torchrun keeps one store across restarts, and none of its variables is both new at each restart and equal on all
  nodes: TORCHELASTIC_RESTART_COUNT increases only on nodes that saw a worker of their own fail, not on nodes that saw
  other nodes waiting first (torch 2.13, elastic/agent/server/api.py, `_invoke_run`).
- So every rank publishes a random token, rank 0 replies to the token with the round number, and the rank confirms.
- Tokens left over from an earlier round are never confirmed.
- Ranks append to one value of the store, so rank 0 reads what all of them say by one request, not by one for each.
- Rank 0 ends the round for all ranks: when all have confirmed, when the time is up, or when a rank leaves
  (`Departure`). Rank 0 then keeps the store for a moment, so that the others learn why.

Limits: a rank that ends before it has a round number tells nobody.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from typing import Any

from dpgen.distributed.group import StorePoll
from dpgen.errors import EXIT_RESUMABLE, ConfigError, JoinFailed, PeerFailed
from dpgen.log import PeriodicLog, log_while_waiting

logger = logging.getLogger(__name__)

_POLL_S = 0.02
_MAX_LISTED_RANKS = 10
_EXTRA_S = 60.0  # how much longer than rank 0's own limit the others wait for its word
_TELL_S = 5.0  # how long rank 0 keeps the store of a round that failed
_ANNOUNCE_S = 1.0
_LEAVE_S = 2.0  # how long a rank that leaves tries to say so
_ARRIVED = "dpgen/arrived"  # store key: which ranks have arrived, with their tokens
_CONFIRMED = "dpgen/confirm"  # store key: below it, which ranks have seen the number of a round


def read_join_timeout(environ: Mapping[str, str]) -> float:
    """Return the seconds for which a rank waits until all ranks have started: DPGEN_JOIN_TIMEOUT_S.

    Raises:
        ConfigError: it is no number of seconds.
    """
    text = environ.get("DPGEN_JOIN_TIMEOUT_S") or "1800"  # a batch system may start the ranks one by one
    try:
        limit_s = float(text)
    except ValueError:
        limit_s = 0.0
    if not 0 < limit_s < math.inf:
        raise ConfigError(f"DPGEN_JOIN_TIMEOUT_S={text}: must be a number of seconds, more than 0")
    return limit_s


class Departure:
    """Tell the ranks that are joining that this one leaves. Any thread may do so."""

    def __init__(self) -> None:
        self._announce: Callable[[str], None] | None = None

    def prepare(self, open_store: Callable[[], Any], rank: int, round_id: int) -> None:
        """Allow `announce`, since the rank has joined this round.

        Args:
            open_store: opens another connection to the store, as the main thread may be waiting in its own.
        """

        def announce(reason: str) -> None:
            message = f"rank {rank} left while the ranks joined: {reason}"
            if rank > 0:
                open_store().set(f"dpgen/leaving/{round_id}", message)
                return
            open_store().set(f"dpgen/joined/{round_id}", message)
            time.sleep(_ANNOUNCE_S)  # the store may end with this process: up to a thousand ranks ask that often

        self._announce = announce

    def announce(self, reason: str) -> None:
        """Tell the other ranks; return within seconds, whether they can be told or not."""
        if self._announce is not None:
            thread = threading.Thread(target=_try, args=(self._announce, reason), name="departure", daemon=True)
            thread.start()
            thread.join(_LEAVE_S)


def join_rendezvous(
    store: Any,
    rank: int,
    size: int,
    timeout_s: float,
    source: str = "",
    on_round: Callable[[int], None] = lambda round_id: None,
) -> int:
    """Wait until all ranks have arrived, and return the number of this round, from 1. Collective.

    Args:
        store: a store whose calls are bounded in time, which earlier rounds may have used.
        source: the variables that rank and size come from, for messages.
        on_round: called with the number as soon as this rank has it.

    Raises:
        JoinFailed: some ranks did not arrive in time, or one left (on rank 0), or rank 0 did not arrive (on others).
        PeerFailed: rank 0 reports why the ranks can't join.
        RuntimeError: the store is gone, or does not answer.
    """
    given = f" ({source})" if source else ""
    if rank == 0:
        on_round(round_id := int(store.add("dpgen/rounds", 1)))
        _lead(store, round_id, size, timeout_s, given)
    else:
        on_round(round_id := _follow(store, rank, size, timeout_s, given))
        _wait_for_all(store, round_id, size, timeout_s)
    return round_id


def _follow(store: Any, rank: int, size: int, timeout_s: float, given: str) -> int:
    """Return the number of the round, once rank 0 has given it."""
    token = uuid.uuid4().hex
    store.append(_ARRIVED, f"{rank} {token}\n")
    deadline_s, poll = time.monotonic() + timeout_s, StorePoll(size)
    # Rank 0 answers each rank at once, so one that waits here waits for rank 0 alone.
    with log_while_waiting(logger, lambda: f"waiting for rank 0 to start: it has not answered rank {rank}{given}"):
        while not store.check([f"dpgen/ack/{token}"]):
            if time.monotonic() > deadline_s:
                raise JoinFailed(
                    f"rank 0 did not answer rank {rank} within {timeout_s:,g} s. Check that it was started{given}"
                )
            poll.sleep()
    round_id = int(store.get(f"dpgen/ack/{token}"))
    store.append(f"{_CONFIRMED}/{round_id}", f"{rank} {token}\n")
    return round_id


def _wait_for_all(store: Any, round_id: int, size: int, timeout_s: float) -> None:
    """Return once rank 0 says that all ranks have arrived; it also logs which are missing."""
    key, deadline_s, poll = f"dpgen/joined/{round_id}", time.monotonic() + timeout_s + _EXTRA_S, StorePoll(size)
    while not store.check([key]):
        if time.monotonic() > deadline_s:
            raise JoinFailed(
                f"rank 0 has not answered for {timeout_s + _EXTRA_S:,.0f} s, while it waited for other ranks to start"
            )
        poll.sleep()
    if problem := store.get(key).decode():
        store.add(f"dpgen/told/{round_id}", 1)
        raise PeerFailed(problem, EXIT_RESUMABLE)


def _lead(store: Any, round_id: int, size: int, timeout_s: float, given: str) -> None:
    """Answer all ranks, and end the round.

    Raises:
        JoinFailed: some did not arrive in time, or one left.
    """
    problem, num_waiting = _answer_all(store, round_id, size, timeout_s, given)
    store.set(f"dpgen/joined/{round_id}", problem)
    if problem:
        deadline_s = time.monotonic() + _TELL_S
        while store.add(f"dpgen/told/{round_id}", 0) < num_waiting and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        raise JoinFailed(problem)


def _answer_all(store: Any, round_id: int, size: int, timeout_s: float, given: str) -> tuple[str, int]:
    """Return why the ranks can't join, or "" once all have arrived; and how many ranks wait for that word."""
    deadline_s = time.monotonic() + timeout_s
    acknowledged: dict[int, str] = {}  # rank → the token that it was last replied to
    confirmed: set[str] = set()
    arrivals, confirmations = _Entries(store, _ARRIVED), _Entries(store, f"{_CONFIRMED}/{round_id}")
    pending_ranks = set(range(1, size))
    log_waiting = PeriodicLog(
        logger,
        lambda: (
            f"waiting for {len(pending_ranks):,} of {size:,} ranks to start (missing: {_format_ranks(pending_ranks)})"
            f"{given}"
        ),
    )
    while pending_ranks:
        # The last token of a rank: one of an earlier round may have been there first.
        arrived = {rank: token for rank, token in arrivals.read_new() if rank in pending_ranks}
        if arrived:
            acknowledged |= arrived
            store.set_many({f"dpgen/ack/{token}": str(round_id) for token in arrived.values()})
        confirmed.update(token for _, token in confirmations.read_new())
        pending_ranks = {rank for rank in pending_ranks if acknowledged.get(rank) not in confirmed}
        num_waiting = size - 1 - len(pending_ranks)
        if store.check([f"dpgen/leaving/{round_id}"]):
            return store.get(f"dpgen/leaving/{round_id}").decode(), num_waiting - 1
        if pending_ranks and time.monotonic() > deadline_s:
            return (
                f"{len(pending_ranks):,} of {size:,} ranks did not start within {timeout_s:,g} s "
                f"(DPGEN_JOIN_TIMEOUT_S; missing: {_format_ranks(pending_ranks)}). Check that each was started and can "
                f"reach rank 0{given}"
            ), num_waiting
        log_waiting()
        time.sleep(_POLL_S if pending_ranks else 0)
    return "", size - 1


def _try(action: Callable[[str], None], argument: str) -> None:
    with contextlib.suppress(RuntimeError):  # the store is gone, and with it whoever waited
        action(argument)


class _Entries:
    """Read what ranks append to a value of the store, each entry once: a rank's number and its token."""

    def __init__(self, store: Any, key: str) -> None:
        self._store, self._key, self._num_bytes = store, key, 0

    def read_new(self) -> list[tuple[int, str]]:
        if not self._store.check([self._key]):
            return []
        value: bytes = self._store.get(self._key)
        lines = value[self._num_bytes :].decode().splitlines()
        self._num_bytes = len(value)
        return [(int(rank), token) for rank, _, token in (line.partition(" ") for line in lines)]


def _format_ranks(ranks: Collection[int]) -> str:
    listed = ", ".join(map(str, sorted(ranks)[:_MAX_LISTED_RANKS]))
    return f"{listed}{', ...' if len(ranks) > _MAX_LISTED_RANKS else ''}"
