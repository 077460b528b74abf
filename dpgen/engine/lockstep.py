"""Keep engine processes in lockstep: every process of a group takes the same requests before the same step.

- vLLM's external launcher runs one scheduler in each process, and relies on all of them seeing the same requests in
  the same order. The group's leader receives the requests from its rank, and broadcasts them between two steps.
- With mixtures of experts all groups step together. A group without work makes dummy steps; vLLM's own
  `has_unfinished_requests` agrees on that over all groups.
- No process ends alone: all leave in the round in which each was asked to shut down.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dpgen.distributed.layout import EngineWorld
from dpgen.records import Request

_NO_TIMEOUT = timedelta(days=20)  # the longest that gloo takes; the ranks notice a lost process, and end this one


class LockstepGroup:
    """Connect the processes of one engine world. Collective: all create it at the same point.

    Args:
        world: this process's place in it. torch.distributed is initialised from the environment, unless it is already.
    """

    def __init__(self, world: EngineWorld) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo", init_method="env://", timeout=_NO_TIMEOUT)
        self._world = world
        self._group = world.rank // world.group_size
        self._leader = self._group * world.group_size
        self._all = dist.new_group(backend="gloo", timeout=_NO_TIMEOUT)
        # torch.distributed wants every process to create every group.
        leaders = range(0, world.size, world.group_size)
        groups = [
            dist.new_group(list(range(leader, leader + world.group_size)), timeout=_NO_TIMEOUT, backend="gloo")
            for leader in leaders
        ]
        self._own_group: Any = groups[self._group]

    @property
    def is_leader(self) -> bool:
        """True for the process that receives its group's requests and reports its results."""
        return self._world.is_leader

    def exchange(self, requests: list[Request], stop_requested: bool) -> tuple[list[Request], bool]:
        """Exchange one round's requests. Collective.

        Args:
            requests: new requests; only the leader has any.

        Returns:
            the leader's requests, and True if every process was asked to shut down.
        """
        # Sums: processes not asked to shut down, then one flag per group whose leader has new requests.
        flags = torch.zeros(1 + self._world.num_groups, dtype=torch.int64)
        flags[0] = not stop_requested
        flags[1 + self._group] = bool(requests)
        dist.all_reduce(flags, group=self._all)
        if flags[1 + self._group] and self._world.group_size > 1:
            payload: list[Any] = [requests]
            dist.broadcast_object_list(payload, src=self._leader, group=self._own_group)
            [requests] = payload
        return requests, not flags[0]
