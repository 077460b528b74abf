"""Rendezvous: give each start of the job a round number that all its ranks agree on.

- torchrun keeps one store across restarts, and none of its variables is both new at each restart and equal on all
  nodes: TORCHELASTIC_RESTART_COUNT increases only on nodes that saw a worker of their own fail, not on nodes that saw
  other nodes waiting first (torch 2.13, elastic/agent/server/api.py, `_invoke_run`).
- So every rank publishes a random token, rank 0 replies to the token with the round number, and the rank confirms.
- Tokens left over from an earlier round are never confirmed.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Collection
from typing import Any

from dpgen.errors import JoinFailed
from dpgen.log import PeriodicLog, log_while_waiting

logger = logging.getLogger(__name__)

_POLL_S = 0.02
_MAX_POLL_S = 1.0
_MAX_LISTED_RANKS = 10


def join_rendezvous(store: Any, rank: int, size: int, timeout_s: float, source: str = "") -> int:
    """Wait until all ranks have arrived, and return the number of this round, from 1. Collective.

    Args:
        store: a store whose calls are bounded in time, which earlier rounds may have used.
        source: the variables that rank and size come from, for messages.

    Raises:
        JoinFailed: some ranks did not arrive in time (on rank 0), or rank 0 did not (on other ranks).
        RuntimeError: the store is gone, or does not answer.
    """
    given = f" ({source})" if source else ""
    return _lead(store, size, timeout_s, given) if rank == 0 else _follow(store, rank, timeout_s, given)


def _follow(store: Any, rank: int, timeout_s: float, given: str) -> int:
    token = uuid.uuid4().hex
    store.set(f"dpgen/arrived/{rank}", token)
    deadline_s, poll_s = time.monotonic() + timeout_s, _POLL_S
    # Rank 0 answers each rank at once, so one that waits here waits for rank 0 alone.
    with log_while_waiting(logger, lambda: f"waiting for rank 0 to start: it has not answered rank {rank}{given}"):
        while not store.check([f"dpgen/ack/{token}"]):
            if time.monotonic() > deadline_s:
                raise JoinFailed(
                    f"rank 0 did not answer rank {rank} within {timeout_s:,.0f} s. Check that it was started{given}"
                )
            time.sleep(poll_s)
            poll_s = min(_MAX_POLL_S, 1.5 * poll_s)  # the longer it takes, the less it is asked for
    round_id = int(store.get(f"dpgen/ack/{token}"))
    store.set(f"dpgen/confirm/{round_id}/{token}", "1")
    return round_id


def _lead(store: Any, size: int, timeout_s: float, given: str) -> int:
    round_id = int(store.add("dpgen/rounds", 1))
    deadline_s = time.monotonic() + timeout_s
    acknowledged: dict[int, str] = {}  # rank → the token that it was last replied to
    pending_ranks = set(range(1, size))
    log_waiting = PeriodicLog(
        logger,
        lambda: (
            f"waiting for {len(pending_ranks):,} of {size:,} ranks to start (missing: {_format_ranks(pending_ranks)})"
            f"{given}"
        ),
    )
    while pending_ranks:
        for rank in sorted(pending_ranks):
            if not store.check([f"dpgen/arrived/{rank}"]):
                continue
            token = store.get(f"dpgen/arrived/{rank}").decode()
            if acknowledged.get(rank) != token:  # a token of an earlier round may have been here first
                acknowledged[rank] = token
                store.set(f"dpgen/ack/{token}", str(round_id))
            elif store.check([f"dpgen/confirm/{round_id}/{token}"]):
                pending_ranks.remove(rank)
        if pending_ranks and time.monotonic() > deadline_s:
            raise JoinFailed(
                f"{len(pending_ranks):,} of {size:,} ranks did not start within {timeout_s:,.0f} s (missing: "
                f"{_format_ranks(pending_ranks)}). Check that each was started and can reach rank 0{given}"
            )
        log_waiting()
        time.sleep(_POLL_S if pending_ranks else 0)
    return round_id


def _format_ranks(ranks: Collection[int]) -> str:
    listed = ", ".join(map(str, sorted(ranks)[:_MAX_LISTED_RANKS]))
    return f"{listed}{', ...' if len(ranks) > _MAX_LISTED_RANKS else ''}"
