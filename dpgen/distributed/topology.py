"""Read the launcher's environment once, into a small frozen `Topology`.

- torchrun (or any launcher that sets RANK and WORLD_SIZE), SLURM's srun, and a process started alone all give one.
- The GPUs and CPU cores of a rank are arithmetic on its topology, without processes; that is here, too.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dpgen.distributed.network import LOOPBACK
from dpgen.distributed.ports import derive_job_ports
from dpgen.errors import ConfigError
from dpgen.formatting import format_count


@dataclass(frozen=True)
class Topology:
    """Place one data-parallel rank in the job.

    Attributes:
        dp_rank, dp_size: this rank, and the number of ranks.
        local_rank, local_size: the same among the ranks of this node.
        node: the name of this machine, for people.
        launcher: "torchrun", "slurm", "wrapper" (RANK and WORLD_SIZE, but nothing about the node), or "none".
        master_addr, master_port: where rank 0's store listens; "" and 0 in a world of one.
        discovery_ports: the ports on which rank 0 may advertise the store's port
            (`dpgen.distributed.store_discovery`). Empty if the launcher gave a port; otherwise `master_port` is 0.
        restart: how often the launcher has restarted this job.
        job: a name of this start of the job, by which a rank recognizes its own rank 0; "" if no rank needs one.
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
                raise ConfigError(
                    f"the launcher's environment gives {name} {rank} of {size}: must be at least 0 and below {size}"
                )

    @property
    def is_rank_0(self) -> bool:
        """True on the rank that reports for the whole job."""
        return self.dp_rank == 0

    @property
    def is_on_one_node(self) -> bool:
        """True if all ranks are on this machine for certain, so that none has to be reachable from outside."""
        return self.local_size == self.dp_size or self.master_addr in ("localhost", LOOPBACK, "::1")


def read_topology(environ: Mapping[str, str]) -> Topology:
    """Return the topology from torchrun's variables, else from srun's, else a world of one.

    Raises:
        ConfigError: a variable is missing beside the others, is no integer, or gives a rank outside the world.
    """
    node = socket.gethostname()
    if "RANK" in environ and "WORLD_SIZE" in environ:
        size = _read_int(environ, "WORLD_SIZE")
        if size > 1:
            for name in ("MASTER_ADDR", "MASTER_PORT"):
                if not environ.get(name):
                    raise ConfigError(f"RANK and WORLD_SIZE are set, but {name} is not: launch with torchrun or srun")
        # A wrapper around srun or mpirun often sets only RANK and WORLD_SIZE; `fill_local_rank` finds the local ones.
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
    # Only srun sets SLURM_STEP_NUM_TASKS. A batch script has SLURM_PROCID, too, but runs as one process.
    if "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ:
        return _read_slurm_topology(environ, node)
    return Topology(node=node)


def fill_local_rank(topology: Topology, nodes: Sequence[str]) -> Topology:
    """Return the topology with local rank and size derived from all ranks' nodes, if the launcher gave neither."""
    if topology.launcher != "wrapper":
        return topology
    local = [rank for rank, node in enumerate(nodes) if node == nodes[topology.dp_rank]]
    return replace(topology, local_rank=local.index(topology.dp_rank), local_size=len(local))


def read_boot_id() -> str:
    """Return what tells this machine from others of the same name, as containers often are; "" if nothing does."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def name_nodes(machines: Sequence[Sequence[str]]) -> list[str]:
    """Return one name for each machine: its host name, with a number from the second machine of a name on.

    Args:
        machines: each rank's host name and boot id.
    """
    boot_ids: dict[str, list[str]] = {}
    names = []
    for host, boot_id in machines:
        known_ids = boot_ids.setdefault(host, [])
        if boot_id not in known_ids:
            known_ids.append(boot_id)
        number = known_ids.index(boot_id) + 1
        names.append(host if number == 1 else f"{host} ({number})")
    return names


def first_host(nodelist: str) -> str:
    """Return the first host of SLURM's compressed list, in SLURM's order: ``'gpu[03-07,12],login1'`` → ``'gpu03'``.

    Kept by hand, since `scontrol show hostnames` is not in every container and rejects suffixes (22.05), ClusterShell
    (1.10, LGPL) sorts the hosts, and python-hostlist (2.3) is GPL.
    """
    entry = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)  # up to the first comma outside brackets
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", entry[0]) if entry else ""


def expand_tasks_per_node(text: str) -> list[int]:
    """Return SLURM's compressed counts in full: ``'2(x3),1'`` → ``[2, 2, 2, 1]``.

    Raises:
        ConfigError: the text has another form.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not match:
            raise ConfigError(f"SLURM's tasks per node are {text!r}: must have the form 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


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
    is_bound_by_launcher = topology.launcher in ("slurm", "wrapper") and len(visible) == gpus_per_rank
    if is_bound_by_launcher:
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
        raise ConfigError(f"{name}={text!r}: must be an integer") from None
