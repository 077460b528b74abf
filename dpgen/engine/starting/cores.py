"""Count the cores that a rank has for itself."""

from __future__ import annotations

import os


def count_own_cores(local_size: int) -> int:
    """Return how many cores this rank has: those that it is bound to, or else its part of the node's.

    Args:
        local_size: ranks on this node.
    """
    num_cores, num_all = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    return num_cores // local_size if num_cores > num_all // local_size else num_cores
