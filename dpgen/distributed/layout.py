"""Which processes make one engine together, where each is one process a GPU (`parallel.launcher=external`).

Processes are numbered as vLLM numbers them: tensor-parallel neighbours first, then pipeline stages, then data-parallel
groups. The first process of a group leads it: it alone claims rows and journals results.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

from dpgen.config.schema import ParallelConfig
from dpgen.distributed.group import RankGroup
from dpgen.distributed.network import find_local_address_to
from dpgen.distributed.topology import Topology
from dpgen.errors import ConfigError


@dataclass(frozen=True)
class EngineWorld:
    """The torch.distributed world that an engine process joins with others; see `vllm`'s external launcher.

    Attributes:
        rank, size: this process in it.
        group_size: neighbours that make one engine: tensor-parallel times pipeline-parallel size.
        local_rank: this process among those of its node.
        address, port: where rank 0's store will listen.
    """

    rank: int
    size: int
    group_size: int
    local_rank: int
    address: str
    port: int

    @property
    def is_leader(self) -> bool:
        """Whether this process is the one that its group's requests come to, and results come from."""
        return self.rank % self.group_size == 0

    @property
    def num_groups(self) -> int:
        """Data-parallel groups in it: more than one where they step together."""
        return self.size // self.group_size

    def to_env(self) -> dict[str, str]:
        """The variables that torch.distributed and vLLM read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


@dataclass(frozen=True)
class Layout:
    """How the job's processes make engines.

    Attributes:
        num_engines: data-parallel groups in the job.
        group_size: processes that make one engine.
        leads: whether this process claims rows and journals results.
        lock_step: whether all engines step together while any has work, as mixtures of experts need it.
    """

    num_engines: int
    group_size: int = 1
    is_group_leader: bool = True
    lockstep: bool = False

    @property
    def has_shared_engine(self) -> bool:
        """Whether an engine is more than this process's own."""
        return self.group_size > 1 or self.lockstep


def build_layout(topology: Topology, parallel: ParallelConfig) -> Layout:
    """Lays the job's processes out.

    Raises:
        ConfigError: they can't form whole groups; the right numbers are named.
    """
    if parallel.launcher != "external":
        return Layout(topology.dp_size)
    size = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    if topology.dp_size % size:
        fit = topology.dp_size // size * size
        raise ConfigError(
            f"parallel.launcher=external needs {size} processes an engine (parallel.tensor_parallel_size x "
            f"parallel.pipeline_parallel_size), and {topology.dp_size} are here: start {fit or size} or {fit + size}"
        )
    return Layout(
        topology.dp_size // size,
        size,
        topology.dp_rank % size == 0,
        parallel.enable_expert_parallel or parallel.lock_step,
    )


def build_engine_world(topology: Topology, layout: Layout, group: RankGroup) -> EngineWorld | None:
    """The world of this process's engine; None where it is alone in it. Collective."""
    if not layout.has_shared_engine:
        return None
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]  # free now; the engines that take it start within seconds
    offers = group.all_gather_object((find_local_address_to((topology.master_addr, topology.master_port)), port))
    size = topology.dp_size if layout.lockstep else layout.group_size
    first = topology.dp_rank // size * size
    address, port = offers[first]
    return EngineWorld(
        rank=topology.dp_rank - first,
        size=size,
        group_size=layout.group_size,
        local_rank=topology.local_rank,
        address=address,
        port=port,
    )
