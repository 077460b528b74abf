"""Share the GPUs and cores of a node among its ranks."""

from __future__ import annotations

from collections.abc import Sequence

from dpgen.distributed.topology import Topology
from dpgen.errors import ConfigError
from dpgen.formatting import format_count


def assign_gpus(topology: Topology, visible: Sequence[str], gpus_per_rank: int, *, share: bool = False) -> list[str]:
    """Return the GPUs of this rank's engine, as CUDA_VISIBLE_DEVICES names them.

    Args:
        visible: the GPUs that this process may see, in order: indices or UUIDs.
        gpus_per_rank: tensor-parallel times pipeline-parallel size.
        share: let ranks share GPUs if there are fewer than they need.

    Raises:
        ConfigError: too few GPUs for the ranks of this node. The message gives the number of ranks that fit.
    """
    needed = gpus_per_rank * topology.local_size
    if len(visible) >= needed:
        first = topology.local_rank * gpus_per_rank
        return list(visible[first : first + gpus_per_rank])
    if _is_bound_by_launcher(topology, len(visible), gpus_per_rank):
        return list(visible)
    if share and len(visible) >= gpus_per_rank:
        slots = len(visible) // gpus_per_rank
        first = (topology.local_rank % slots) * gpus_per_rank
        return list(visible[first : first + gpus_per_rank])
    fit = len(visible) // gpus_per_rank
    advice = (
        f"start {format_count(fit, 'rank')} (torchrun --nproc-per-node {fit}), or set parallel.share_devices=true"
        if fit
        else f"one rank needs {gpus_per_rank} (parallel.tensor_parallel_size x parallel.pipeline_parallel_size)"
    )
    raise ConfigError(
        f"{format_count(needed, 'GPU')} needed for {format_count(topology.local_size, 'rank')} on {topology.node}, "
        f"{len(visible)} visible: {advice}"
    )


def count_sharing_ranks(topology: Topology, num_visible: int, gpus_per_rank: int) -> int:
    """Return how many ranks `assign_gpus` lets use this rank's GPUs, itself included, where ranks share them."""
    slots = num_visible // gpus_per_rank
    if slots >= topology.local_size or _is_bound_by_launcher(topology, num_visible, gpus_per_rank):
        return 1
    return len(range(topology.local_rank % slots, topology.local_size, slots))


def _is_bound_by_launcher(topology: Topology, num_visible: int, gpus_per_rank: int) -> bool:
    may_bind = topology.launcher in ("slurm", "mpi", "wrapper") or topology.has_own_gpus
    return may_bind and num_visible == gpus_per_rank


def assign_cores(affinities: Sequence[frozenset[int]], local_rank: int) -> list[int]:
    """Return the numbers of the CPU cores of this rank's engine, at least one.

    Ranks that the launcher gave the same cores divide them, and share single cores if there are fewer cores than ranks.
    A rank that the launcher bound to cores of its own keeps those.

    Args:
        affinities: the cores that each rank of this node may run on, by local rank.
    """
    own = affinities[local_rank]
    sharing_ranks = [rank for rank, cores in enumerate(affinities) if cores == own]
    cores, index = sorted(own), sharing_ranks.index(local_rank)
    if len(cores) < len(sharing_ranks):
        return [cores[index % len(cores)]]
    bounds = [len(cores) * i // len(sharing_ranks) for i in range(len(sharing_ranks) + 1)]
    return cores[bounds[index] : bounds[index + 1]]
