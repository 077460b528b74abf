"""Engine processes that step together: every process of a group takes the same requests before the same step.

vLLM's external launcher runs one scheduler in each process and trusts that all of them see the same requests in the
same order. The group's leader has them from its rank, and passes them on between two steps; where mixtures of experts
tie the groups to each other, all groups go round together, and one without work makes dummy steps (vLLM's own
`has_unfinished_requests` agrees on that).
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dpgen.distributed.layout import EngineWorld
from dpgen.records import Request

_NO_TIMEOUT = timedelta(days=20)  # gloo's longest; the ranks notice a lost process, and end this one


class LockstepGroup:
    """The processes of one world, as one of them sees it. Collective: all make it, at the same point.

    Args:
        world: this process's place. torch.distributed is initialised if it isn't yet, from the environment.
    """

    def __init__(self, world: EngineWorld) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo", init_method="env://", timeout=_NO_TIMEOUT)
        self._world = world
        self._group = world.rank // world.group_size
        self._leader = self._group * world.group_size
        self._all = dist.new_group(backend="gloo", timeout=_NO_TIMEOUT)
        # Every process takes part in the making of every group.
        firsts = range(0, world.size, world.group_size)
        groups = [
            dist.new_group(list(range(first, first + world.group_size)), timeout=_NO_TIMEOUT, backend="gloo")
            for first in firsts
        ]
        self._own_group: Any = groups[self._group]

    @property
    def is_leader(self) -> bool:
        return self._world.is_leader

    def exchange(self, requests: list[Request], stop_requested: bool) -> tuple[list[Request], bool]:
        """One round: what the group's leader has for it, and whether all processes were told to stop.

        Args:
            requests: new ones; only the leader has any.
        """
        # Who was not told to stop, and which group's leader has something to pass on.
        flags = torch.zeros(1 + self._world.num_groups, dtype=torch.int64)
        flags[0] = not stop_requested
        flags[1 + self._group] = bool(requests)
        dist.all_reduce(flags, group=self._all)
        if flags[1 + self._group] and self._world.group_size > 1:
            passed: list[Any] = [requests]
            dist.broadcast_object_list(passed, src=self._leader, group=self._own_group)
            [requests] = passed
        return requests, not flags[0]
