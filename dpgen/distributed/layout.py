"""Compute which processes form one engine if there is one process per GPU (`parallel.launcher=external`).

- Processes are numbered as in vLLM: tensor-parallel neighbours first, then pipeline stages, then data-parallel groups.
- The first process of a group is its leader. Only the leader claims rows and journals results.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

from dpgen.config.sections import ParallelConfig
from dpgen.distributed.group import RankGroup
from dpgen.distributed.network import LOOPBACK, find_local_address_to
from dpgen.distributed.topology import Topology
from dpgen.errors import ConfigError


@dataclass(frozen=True)
class EngineWorld:
    """Place an engine process in the torch.distributed world that it joins; see vLLM's external launcher.

    Attributes:
        rank, size: this process, and the number of processes in that world.
        group_size: processes of one engine: tensor-parallel times pipeline-parallel size.
        local_rank: this process among those of its node.
        address, port: where the store of that world's rank 0 will listen; `LOOPBACK` if the world is on one node.
    """

    rank: int
    size: int
    group_size: int
    local_rank: int
    address: str
    port: int

    @property
    def is_leader(self) -> bool:
        """True on the process that receives its group's requests and returns their results."""
        return self.rank % self.group_size == 0

    @property
    def is_on_one_node(self) -> bool:
        """True if no process of the world has to be reachable from outside this machine."""
        return self.address == LOOPBACK

    @property
    def num_groups(self) -> int:
        """Data-parallel groups in this world: more than one only in lockstep."""
        return self.size // self.group_size

    def to_env(self) -> dict[str, str]:
        """Return the variables that torch.distributed and vLLM read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


@dataclass(frozen=True)
class Layout:
    """Map the job's processes to engines.

    Attributes:
        num_engines: data-parallel groups in the job.
        group_size: processes of one engine.
        is_group_leader: True if this process claims rows and journals results.
        lockstep: True if all engines step together while any has work, as mixtures of experts need.
    """

    num_engines: int
    group_size: int = 1
    is_group_leader: bool = True
    lockstep: bool = False

    @property
    def has_shared_engine(self) -> bool:
        """True if several processes share one engine, or engines step together."""
        return self.group_size > 1 or self.lockstep

    def num_ranks_of_engine(self, num_ranks: int) -> int:
        """Return how many processes step together, of `num_ranks` in the job: all of them in lockstep."""
        return num_ranks if self.lockstep else self.group_size


def build_layout(topology: Topology, parallel: ParallelConfig) -> Layout:
    """Return the layout of the job, seen from this process.

    Raises:
        ConfigError: the processes don't form whole groups. The message gives the numbers that do.
    """
    if parallel.launcher != "external":
        return Layout(topology.dp_size)
    size = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    if topology.dp_size % size:
        fit = topology.dp_size // size * size
        advice = " or ".join(map(str, sorted({fit or size, fit + size})))
        raise ConfigError(
            f"parallel.launcher=external needs {size} processes per engine (parallel.tensor_parallel_size x "
            f"parallel.pipeline_parallel_size), but the job has {topology.dp_size}: start {advice}"
        )
    return Layout(
        topology.dp_size // size,
        size,
        topology.dp_rank % size == 0,
        parallel.enable_expert_parallel or parallel.lock_step,
    )


def build_engine_world(topology: Topology, layout: Layout, group: RankGroup) -> EngineWorld | None:
    """Return the world of this process's engine; None if the process is alone in it. Collective."""
    if not layout.has_shared_engine:
        return None
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]  # free now, and the engines bind it within seconds
    offers = group.all_gather_object((find_local_address_to((topology.master_addr, topology.master_port)), port))
    size = layout.num_ranks_of_engine(topology.dp_size)
    first = topology.dp_rank // size * size
    address, port = offers[first]
    if len(set(group.nodes[first : first + size])) == 1:
        address = LOOPBACK
    return EngineWorld(
        rank=topology.dp_rank - first,
        size=size,
        group_size=layout.group_size,
        local_rank=topology.local_rank,
        address=address,
        port=port,
    )
