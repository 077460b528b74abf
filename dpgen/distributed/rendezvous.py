"""A number for each gathering of ranks, which all of them know and no other gathering has.

torchrun keeps one store for as long as it lives, its restarts included, and tells its workers nothing that is the same
on all nodes and new at each restart: TORCHELASTIC_RESTART_COUNT goes up only on nodes that saw a worker of their own
fail, not where others were seen waiting first (torch 2.13, elastic/agent/server/api.py, `_invoke_run`). So rank 0
counts the gatherings and greets each rank by a token; what ranks of earlier gatherings left has other tokens, and
nobody answers for it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any

from dpgen.errors import DpgenError
from dpgen.monitoring.startup import PeriodicLog

_POLL_S = 0.02


def join_rendezvous(
    store: Any, rank: int, size: int, timeout_s: float, say: Callable[[str], None] = lambda line: None
) -> int:
    """Waits until all ranks have come; the gathering's number, the same on all.

    Args:
        store: a torch.distributed.Store, that earlier gatherings may have used, too.
        say: takes a line now and then, from rank 0, on who is still awaited.

    Raises:
        DpgenError: not all came in time.
        RuntimeError: the store is gone, or rank 0 did not come in time.
    """
    if rank > 0:
        token = uuid.uuid4().hex
        store.set(f"dpgen/came/{rank}", token)
        round_id = int(store.get(f"dpgen/greeting/{token}"))  # blocks, by the store's own time-out
        store.set(f"dpgen/answer/{round_id}/{token}", "1")
        return round_id
    round_id = int(store.add("dpgen/gatherings", 1))
    deadline_s = time.monotonic() + timeout_s
    acknowledged: dict[int, str] = {}
    pending_ranks = set(range(1, size))

    def missing() -> str:
        shown = ", ".join(str(other) for other in sorted(pending_ranks)[:10])
        return f"{shown}{', ...' if len(pending_ranks) > 10 else ''}"

    waiting = PeriodicLog(say, lambda: f"waiting for {len(pending_ranks)} of {size} ranks to come: {missing()}")
    while pending_ranks:
        for other in sorted(pending_ranks):
            if not store.check([f"dpgen/came/{other}"]):
                continue
            token = store.get(f"dpgen/came/{other}").decode()
            if acknowledged.get(other) != token:  # a later one than a former rank had left
                acknowledged[other] = token
                store.set(f"dpgen/greeting/{token}", str(round_id))
            elif store.check([f"dpgen/answer/{round_id}/{token}"]):
                pending_ranks.remove(other)
        if pending_ranks and time.monotonic() > deadline_s:
            raise DpgenError(
                f"{len(pending_ranks)} of {size} ranks have not come within {timeout_s:.0f} s: {missing()}"
            )
        waiting()
        time.sleep(_POLL_S if pending_ranks else 0)
    return round_id
