"""Which process this is: the launcher's environment, read once into a small frozen object.

Three launchers give one `Topology`: torchrun (and whatever else sets RANK and WORLD_SIZE), SLURM's srun, and a
process started by itself. What follows from it (which GPUs, which cores) is arithmetic on it, here too.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dpgen.distributed.ports import derive_job_ports
from dpgen.errors import ConfigError
from dpgen.formatting import format_count


@dataclass(frozen=True)
class Topology:
    """One data-parallel rank's place in the job.

    Attributes:
        dp_rank, dp_size: this rank, and how many there are.
        local_rank, local_size: the same among the ranks of this node.
        node: the name of this machine, for people.
        launcher: "torchrun", "slurm", "wrapper" (RANK and WORLD_SIZE, but nothing about the node), or "none".
        master_addr, master_port: where rank 0's store listens; "" and 0 in a world of one.
        beacon_ports: where nobody has given a port: those on one of which rank 0 tells the
            store's (`dpgen.distributed.store_discovery`);
            `master_port` is 0 then.
        restart: how often the launcher has restarted this job already.
        job: the name of this job and start of it, for a rank to know its own rank 0 by; "" where it needs none.
    """

    dp_rank: int = 0
    dp_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: str = ""
    launcher: str = "none"
    master_addr: str = ""
    master_port: int = 0
    discovery_ports: tuple[int, ...] = ()
    restart: int = 0
    job: str = ""

    def __post_init__(self) -> None:
        for name, rank, size in (
            ("rank", self.dp_rank, self.dp_size),
            ("local rank", self.local_rank, self.local_size),
        ):
            if not 0 <= rank < size:
                raise ConfigError(f"the launcher's environment gives {name} {rank} of {size}")

    @property
    def is_rank_0(self) -> bool:
        """Whether this rank speaks for the whole job."""
        return self.dp_rank == 0


def read_topology(environ: Mapping[str, str]) -> Topology:
    """Reads torchrun's variables, else srun's, else gives a world of one.

    Raises:
        ConfigError: a variable that is missing beside the others, or is no number.
    """
    node = socket.gethostname()
    if "RANK" in environ and "WORLD_SIZE" in environ:
        size = _read_int(environ, "WORLD_SIZE")
        if size > 1:
            for name in ("MASTER_ADDR", "MASTER_PORT"):
                if not environ.get(name):
                    raise ConfigError(f"RANK and WORLD_SIZE are set, but {name} is not; launch with torchrun or srun")
        # A wrapper around srun or mpirun often sets no more than these two; `fill_local_rank` then finds the rest.
        is_whole = "LOCAL_RANK" in environ and "LOCAL_WORLD_SIZE" in environ
        return Topology(
            dp_rank=_read_int(environ, "RANK"),
            dp_size=size,
            local_rank=_read_int(environ, "LOCAL_RANK", 0) if is_whole else 0,
            local_size=_read_int(environ, "LOCAL_WORLD_SIZE", 1) if is_whole else 1,
            node=node,
            launcher="torchrun" if is_whole else "wrapper",
            master_addr=environ.get("MASTER_ADDR", ""),
            master_port=_read_int(environ, "MASTER_PORT", 0),
            restart=_read_int(environ, "TORCHELASTIC_RESTART_COUNT", 0),
        )
    # SLURM_STEP_NUM_TASKS is set by srun alone: in a batch script SLURM_PROCID is there, too, but one process runs.
    if "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ:
        return _read_slurm_topology(environ, node)
    return Topology(node=node)


def fill_local_rank(topology: Topology, nodes: Sequence[str]) -> Topology:
    """The topology with its local rank and size found from the nodes of all ranks, where the launcher told neither."""
    if topology.launcher != "wrapper":
        return topology
    local = [rank for rank, node in enumerate(nodes) if node == nodes[topology.dp_rank]]
    return replace(topology, local_rank=local.index(topology.dp_rank), local_size=len(local))


def _read_slurm_topology(environ: Mapping[str, str], node: str) -> Topology:
    job, step = _read_int(environ, "SLURM_JOB_ID", 0), _read_int(environ, "SLURM_STEP_ID", 0)
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "1")
    restart = _read_int(environ, "SLURM_RESTART_COUNT", 0)
    port = _read_int(environ, "MASTER_PORT", 0)
    return Topology(
        dp_rank=_read_int(environ, "SLURM_PROCID"),
        dp_size=_read_int(environ, "SLURM_STEP_NUM_TASKS"),
        local_rank=_read_int(environ, "SLURM_LOCALID", 0),
        local_size=expand_tasks_per_node(per_node)[_read_int(environ, "SLURM_NODEID", 0)],
        node=environ.get("SLURMD_NODENAME", node),
        launcher="slurm",
        master_addr=environ.get("MASTER_ADDR") or first_host(nodes) or "127.0.0.1",
        master_port=port,
        discovery_ports=() if port else derive_job_ports(job, step),
        restart=restart,
        job=f"SLURM job {job}, step {step}, restart {restart}",
    )


def _read_int(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"the environment variable {name} is {text!r}; it must be a whole number") from None


def first_host(nodelist: str) -> str:
    """The first host of SLURM's compressed list: ``'gpu[03-07,12],login1'`` → ``'gpu03'``."""
    match = re.match(r"([^,\[]*)(?:\[([^\]]*)\])?([^,]*)", nodelist)
    if not match:
        return ""
    head, ranges, tail = match.groups()
    first = re.split(r"[,-]", ranges)[0] if ranges else ""
    return f"{head}{first}{tail}"


def expand_tasks_per_node(text: str) -> list[int]:
    """SLURM's compressed counts: ``'2(x3),1'`` → ``[2, 2, 2, 1]``."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not match:
            raise ConfigError(f"SLURM's tasks per node are {text!r}, which is not of the form 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def assign_gpus(topology: Topology, visible: Sequence[str], gpus_per_rank: int, *, share: bool = False) -> list[str]:
    """The GPUs, as CUDA_VISIBLE_DEVICES names them, that this rank's engine gets.

    Args:
        visible: the GPUs this process may see, in order: indices or UUIDs.
        gpus_per_rank: tensor-parallel times pipeline-parallel size.
        share: let ranks share GPUs where there are fewer than they need.

    Raises:
        ConfigError: too few GPUs for the ranks of this node; the right number of ranks is named.
    """
    needed = gpus_per_rank * topology.local_size
    if len(visible) >= needed:
        first = topology.local_rank * gpus_per_rank
        return list(visible[first : first + gpus_per_rank])
    bound_by_launcher = topology.launcher in ("slurm", "wrapper") and len(visible) == gpus_per_rank
    if bound_by_launcher:
        return list(visible)
    if share and len(visible) >= gpus_per_rank:
        slots = len(visible) // gpus_per_rank
        first = (topology.local_rank % slots) * gpus_per_rank
        return list(visible[first : first + gpus_per_rank])
    fit = len(visible) // gpus_per_rank
    advice = (
        f"start {fit} (torchrun --nproc-per-node {fit}), or set parallel.share_devices=true"
        if fit
        else f"one rank needs {gpus_per_rank} (parallel.tensor_parallel_size x parallel.pipeline_parallel_size)"
    )
    raise ConfigError(
        f"{format_count(topology.local_size, 'rank')} on {topology.node}: {format_count(needed, 'GPU')} needed, "
        f"{len(visible)} visible; {advice}"
    )


def assign_cores(affinities: Sequence[frozenset[int]], local_rank: int) -> list[int]:
    """The CPU cores that this rank's engine gets.

    Args:
        affinities: the cores each rank of this node may run on, by local rank. Where the launcher gave ranks the
            same cores they are divided; where it bound each to cores of its own, that stands.

    Returns:
        core numbers, at least one; ranks share cores where there are fewer cores than ranks.
    """
    mine = affinities[local_rank]
    sharers = [rank for rank, cores in enumerate(affinities) if cores == mine]
    cores, place = sorted(mine), sharers.index(local_rank)
    if len(cores) < len(sharers):
        return [cores[place % len(cores)]]
    bounds = [len(cores) * i // len(sharers) for i in range(len(sharers) + 1)]
    return cores[bounds[place] : bounds[place + 1]]
