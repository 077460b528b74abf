"""Open the store, connect the ranks by gloo, and forget a world whose ranks are lost: the setup of torch.distributed.

- torch.distributed has one world in a process. `connect_world` makes it, and `forget_world` lets another be made.
- A timeout is for connecting only: connected ranks wait for each other however long it takes.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from dpgen.distributed.network import Address

_NO_TIMEOUT = timedelta(days=20)  # gloo counts milliseconds in a signed 32-bit integer: 24.8 days at most
# Process groups whose collectives never end, kept until the process ends: destroying them would wait for those.
_LEAKED_GROUPS: list[Any] = []


def open_store(address: Address, *, num_ranks: int | None, is_host: bool, connect_s: float, answer_s: float) -> Any:
    """Return a TCPStore at `address`, of which one process is the host.

    Args:
        num_ranks: None if the store is torchrun's.
        connect_s: how long to wait for the host.
        answer_s: how long to wait for keys.
    """
    store = dist.TCPStore(  # type: ignore[attr-defined]
        *address,
        num_ranks,
        is_master=is_host,
        timeout=timedelta(seconds=connect_s),
        wait_for_workers=False,
        multi_tenant=True,
    )
    store.set_timeout(timedelta(seconds=answer_s))
    return store


def add_prefix(store: Any, prefix: str) -> Any:
    """Return the store with all its keys below a prefix."""
    return c10d.PrefixStore(prefix, store)


def connect_world(base: Any, store: Any, rank: int, size: int, timeout_s: float) -> None:
    """Connect this rank to all others by gloo. Collective.

    Args:
        base: the TCPStore.
        store: `base` under a prefix that no other world has.

    Raises:
        RuntimeError: not all ranks connected in time.
    """
    timeout = timedelta(seconds=timeout_s)
    base.set_timeout(timeout)  # ranks find each other through the store, within its timeout
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    c10d._set_pg_timeout(_NO_TIMEOUT)  # from now on slow ranks are waited for
    base.set_timeout(_NO_TIMEOUT)


def forget_world() -> None:
    """Make torch.distributed forget its world, so that `connect_world` may be called again.

    Destroying the world instead would wait for collectives that never end, and torch 2.13 has no public way to forget
    it.
    """
    world = c10d._world
    _LEAKED_GROUPS.append(world.default_pg)
    for table in (
        world.pg_map,
        world.pg_names,
        world.pg_group_ranks,
        world.pg_backend_config,
        world.pg_to_tag,
        world.tags_to_pg,
        world.pg_coalesce_state,
    ):
        table.clear()
    c10d._update_default_pg(None)


def summarize_error(error: Exception) -> str:
    """Return the first line of a library's error, without its place in the source, its advice and its jokes."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.rpartition("] ")[2].partition(". This is typically")[0]
