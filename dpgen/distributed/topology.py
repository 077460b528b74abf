"""Read the launcher's environment once, into a small frozen `Topology`.

- torchrun (or any launcher that sets RANK and WORLD_SIZE), SLURM's srun, mpirun, and a process started alone all give
  one. Where several have left their variables, the innermost launcher's count.
- Errors name the variables: they may be leftovers of another job.
- The GPUs and CPU cores of a rank are arithmetic on its topology, without processes; that is here, too.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dpgen.distributed.network import LOOPBACK
from dpgen.distributed.ports import derive_job_ports
from dpgen.errors import ConfigError
from dpgen.formatting import format_count


@dataclass(frozen=True)
class _MpiVariables:
    """Name the variables of one kind of mpirun.

    Attributes:
        is_set_by_srun: srun sets them too, beside its own.
    """

    rank: str
    size: str
    local_rank: str
    local_size: str
    is_set_by_srun: bool = False

    @classmethod
    def of_prefix(cls, prefix: str) -> _MpiVariables:
        rank, size, local_rank, local_size = (
            f"{prefix}_COMM_WORLD_{suffix}" for suffix in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
        )
        return cls(rank, size, local_rank, local_size)


# Open MPI, MVAPICH, IBM's jsrun, horovodrun, MPICH and Intel MPI. PMIx gives no size, so a rank of it is rejected where
# nothing else gives one.
_MPI_VARIABLES = (
    *map(_MpiVariables.of_prefix, ("OMPI", "MV2", "MVP")),
    _MpiVariables("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE"),
    _MpiVariables("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    _MpiVariables("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", is_set_by_srun=True),
    _MpiVariables("PMIX_RANK", "PMIX_SIZE", "PMIX_LOCAL_RANK", "PMIX_LOCAL_SIZE", is_set_by_srun=True),
)


@dataclass(frozen=True)
class Topology:
    """Place one data-parallel rank in the job.

    Attributes:
        dp_rank, dp_size: this rank, and the number of ranks.
        local_rank, local_size: the same among the ranks of this node.
        node: the name of this machine, for people.
        launcher: "torchrun", "slurm", "mpi", "wrapper" (rank and size, but nothing about the node), or "none".
        master_addr, master_port: where rank 0's store listens; "" and 0 in a world of one.
        discovery_ports: the ports on which rank 0 may advertise the store's port
            (`dpgen.distributed.store_discovery`). Empty if the launcher gave a port; otherwise `master_port` is 0.
        restart: how often the launcher has restarted this job.
        job: a name of this start of the job, by which a rank recognizes its own rank 0; "" if no rank needs one.
        has_own_gpus: True if torchrun lets this rank see GPUs that no other rank of its node sees.
        source: the variables that rank, size and address come from, with their values, for messages.
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
    has_own_gpus: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        for name, rank, size in (
            ("rank", self.dp_rank, self.dp_size),
            ("local rank", self.local_rank, self.local_size),
        ):
            if not 0 <= rank < size:
                raise ConfigError(
                    f"the launcher's environment gives {name} {rank} of {size}: must be at least 0 and below {size} "
                    f"({self.source})"
                )
        if self.local_size > self.dp_size:
            raise ConfigError(
                f"the launcher's environment gives {format_count(self.local_size, 'rank')} on this node, of "
                f"{self.dp_size} in all: unset the variables that another job has left ({self.source})"
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
    """Return the topology from torchrun's variables, else from mpirun's or srun's, else a world of one.

    Raises:
        ConfigError: a variable is missing beside the others, is no integer, or contradicts the others; names it.
    """
    environ = {name: value.strip() for name, value in environ.items() if value.strip()}  # a blank one is not set
    node = socket.gethostname()
    num_given = ("RANK" in environ) + ("WORLD_SIZE" in environ)
    # Only srun sets SLURM_STEP_NUM_TASKS. A batch script has SLURM_PROCID, too, but runs as one process.
    is_step = "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ
    mpi = _find_mpi_variables(environ, is_step)
    if num_given == 2:
        _reject_copies(environ, "RANK", "WORLD_SIZE", is_step)
        return _read_torchrun_topology(environ, node)
    if mpi is not None:
        _reject_copies(environ, mpi.rank, mpi.size, is_step)
        return _read_mpi_topology(environ, node, mpi)
    if is_step:
        return _read_slurm_topology(environ, node)
    if num_given:
        _raise_if_half_given(environ, "RANK", "WORLD_SIZE")
    return Topology(node=node)


def fill_local_rank(topology: Topology, nodes: Sequence[str], given: Sequence[tuple[int, str]]) -> Topology:
    """Return the topology with what only all ranks together tell: local rank and size, and whose GPUs are its own.

    The place among the node's ranks counts where the launcher gave none, or gave each rank of the node LOCAL_RANK=0 and
    other GPUs (torchrun --virtual-local-rank).

    Args:
        nodes: the node of each rank.
        given: each rank's local rank, as its launcher gave it, and CUDA_VISIBLE_DEVICES; "" if that is not set.
    """
    local = [rank for rank, node in enumerate(nodes) if node == nodes[topology.dp_rank]]
    if topology.launcher == "torchrun":
        gpus = [gpu.strip() for rank in local for gpu in given[rank][1].split(",")]
        has_own_gpus = len(local) > 1 and "" not in gpus and len(set(gpus)) == len(gpus)
        topology = replace(topology, has_own_gpus=has_own_gpus)
        is_virtual = topology.local_size > 1 and not any(given[rank][0] for rank in local)
        if not is_virtual:
            return topology
    elif topology.launcher != "wrapper":
        return topology
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


def expand_tasks_per_node(text: str, name: str = "SLURM_STEP_TASKS_PER_NODE") -> list[int]:
    """Return SLURM's compressed counts in full: ``'2(x3),1'`` → ``[2, 2, 2, 1]``.

    Args:
        name: the variable that holds the text, for the error.

    Raises:
        ConfigError: the text has another form.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part.strip())
        if not match:
            raise ConfigError(f"{name}={text!r}: must be SLURM's tasks per node, in the form 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _find_mpi_variables(environ: Mapping[str, str], is_step: bool) -> _MpiVariables | None:
    """Return the variables of the mpirun that started this process; None if srun did, or none.

    Raises:
        ConfigError: a rank without a number of ranks, or the reverse.
    """
    for names in _MPI_VARIABLES:
        given = [name for name in (names.rank, names.size) if name in environ]
        if not given:
            continue
        of_srun = {names.rank: "SLURM_PROCID", names.size: "SLURM_STEP_NUM_TASKS"}
        if is_step and names.is_set_by_srun and all(environ[name] == environ[of_srun[name]] for name in given):
            continue
        if len(given) == 2:
            return names
        _raise_if_half_given(environ, names.rank, names.size)
    return None


def _raise_if_half_given(environ: Mapping[str, str], rank: str, size: str) -> None:
    given, missing = (rank, size) if rank in environ else (size, rank)
    if (given, environ[given]) != (size, "1"):
        raise ConfigError(
            f"{given}={environ[given]} is set, but {missing} is not: launch with torchrun, srun or mpirun, or unset "
            f"{given} for a single process"
        )


def _reject_copies(environ: Mapping[str, str], rank: str, size: str, is_step: bool) -> None:
    """Reject a world of one in each of several processes: all would generate every row.

    Under torchrun, srun or mpirun start one torchrun on each node.
    """
    if environ[size] != "1" or "TORCHELASTIC_RUN_ID" in environ:
        return
    outer = [names.size for names in _MPI_VARIABLES if names.size in environ]
    for name in [*outer, *(["SLURM_STEP_NUM_TASKS"] if is_step else [])]:
        if name != size and environ[name] != "1":
            raise ConfigError(
                f"{size}=1 contradicts {name}={environ[name]}. Unset {rank} and {size} if they are leftovers, or "
                f"{name} for a single process"
            )


def _read_torchrun_topology(environ: Mapping[str, str], node: str) -> Topology:
    size = _read_int(environ, "WORLD_SIZE")
    if size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in environ:
                raise ConfigError(f"RANK and WORLD_SIZE are set, but {name} is not: launch with torchrun or srun")
    # A wrapper around srun or mpirun often sets only RANK and WORLD_SIZE; `fill_local_rank` finds the local ones.
    is_whole = "LOCAL_RANK" in environ and "LOCAL_WORLD_SIZE" in environ
    names = ("RANK", "WORLD_SIZE", *(("LOCAL_RANK", "LOCAL_WORLD_SIZE") if is_whole else ()))
    return Topology(
        dp_rank=_read_int(environ, "RANK"),
        dp_size=size,
        local_rank=_read_int(environ, "LOCAL_RANK", 0) if is_whole else 0,
        local_size=_read_int(environ, "LOCAL_WORLD_SIZE", 1) if is_whole else 1,
        node=node,
        launcher="torchrun" if is_whole else "wrapper",
        master_addr=_read_address(environ, "") if size > 1 else "",
        master_port=_read_port(environ, is_needed=size > 1),
        restart=_read_int(environ, "TORCHELASTIC_RESTART_COUNT", 0),
        source=_describe(environ, *names, "MASTER_ADDR", "MASTER_PORT"),
    )


def _read_mpi_topology(environ: Mapping[str, str], node: str, names: _MpiVariables) -> Topology:
    size = _read_int(environ, names.size)
    has_local = names.local_rank in environ and names.local_size in environ
    local_size = _read_int(environ, names.local_size) if has_local else 1
    # The ranks' common name, of which they derive ports; only some versions of mpirun give one.
    namespace = environ.get("PMIX_NAMESPACE", "")
    address = _read_address(environ, LOOPBACK if local_size == size else "")
    port = _read_port(environ, is_needed=False)
    if size > 1 and not (address and (port or namespace)):
        missing = "MASTER_ADDR" if not address else "MASTER_PORT"
        raise ConfigError(
            f"{names.size}={size} gives {size} ranks, but {missing} is not set: set MASTER_ADDR to the host of rank 0 "
            "and MASTER_PORT to a free port there on all ranks (mpirun -x NAME=VALUE, or -genv NAME VALUE), or launch "
            "with torchrun or srun"
        )
    local = (names.local_rank, names.local_size) if has_local else ()
    return Topology(
        dp_rank=_read_int(environ, names.rank),
        dp_size=size,
        local_rank=_read_int(environ, names.local_rank) if has_local else 0,
        local_size=local_size,
        node=node,
        launcher="mpi" if has_local else "wrapper",
        master_addr=address,
        master_port=port,
        discovery_ports=() if port or size == 1 else derive_job_ports(zlib.crc32(namespace.encode()), 0),
        job=f"MPI job {namespace}" if namespace else "",
        source=_describe(environ, names.rank, names.size, *local, "MASTER_ADDR", "MASTER_PORT", "PMIX_NAMESPACE"),
    )


def _read_slurm_topology(environ: Mapping[str, str], node: str) -> Topology:
    job, step = _read_int(environ, "SLURM_JOB_ID", 0), _read_int(environ, "SLURM_STEP_ID", 0)
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    restart = _read_int(environ, "SLURM_RESTART_COUNT", 0)
    port = _read_port(environ, is_needed=False)
    return Topology(
        dp_rank=_read_int(environ, "SLURM_PROCID"),
        dp_size=_read_int(environ, "SLURM_STEP_NUM_TASKS"),
        local_rank=_read_int(environ, "SLURM_LOCALID", 0),
        local_size=_count_slurm_tasks_here(environ),
        node=environ.get("SLURMD_NODENAME", node),
        launcher="slurm",
        master_addr=_read_address(environ, first_host(nodes) or LOOPBACK),
        master_port=port,
        discovery_ports=() if port else derive_job_ports(job, step),
        restart=restart,
        job=f"SLURM job {job}, step {step}, restart {restart}",
        source=_describe(
            environ,
            *("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
            *("MASTER_ADDR" if "MASTER_ADDR" in environ else "SLURM_STEP_NODELIST", "MASTER_PORT"),
        ),
    )


def _count_slurm_tasks_here(environ: Mapping[str, str]) -> int:
    """Return the number of the step's tasks on this node.

    Raises:
        ConfigError: this node is not among those that the counts are for.
    """
    name = "SLURM_STEP_TASKS_PER_NODE" if "SLURM_STEP_TASKS_PER_NODE" in environ else "SLURM_TASKS_PER_NODE"
    text = environ.get(name, "1")
    counts, index = expand_tasks_per_node(text, name), _read_int(environ, "SLURM_NODEID", 0)
    if not 0 <= index < len(counts):
        given = f"{name}={text}" if name in environ else "SLURM_STEP_TASKS_PER_NODE is not set, which"
        raise ConfigError(
            f"SLURM_NODEID={index} is the number of this node, but {given} is for {format_count(len(counts), 'node')}: "
            "start the ranks with srun, or unset the variables that another job has left"
        )
    return counts[index]


def _describe(environ: Mapping[str, str], *names: str) -> str:
    return ", ".join(f"{name}={environ[name]}" for name in names if name in environ)


def _read_address(environ: Mapping[str, str], default: str) -> str:
    """Return MASTER_ADDR; an address of IPv6 without its brackets.

    Raises:
        ConfigError: it can be no host's name or address, or is the address of any host.
    """
    if "MASTER_ADDR" not in environ:
        return default
    text = environ["MASTER_ADDR"]
    address = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        ipaddress.ip_address(address)
        is_address = True
    except ValueError:
        is_address = False
    if address in ("0.0.0.0", "::") or not (is_address or re.fullmatch(r"[\w.-]+", address)):
        raise ConfigError(
            f"MASTER_ADDR={text!r}: must be the name or address of rank 0's host alone, which all ranks can reach; its "
            "port is MASTER_PORT"
        )
    return address


def _read_port(environ: Mapping[str, str], *, is_needed: bool) -> int:
    """Return MASTER_PORT; 0 where it is not set, or is 0 and not needed."""
    port = _read_int(environ, "MASTER_PORT", 0)
    if not is_needed <= port < 65536:
        raise ConfigError(f"MASTER_PORT={port}: must be from 1 to 65535")
    return port


def _read_int(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    if not re.fullmatch("[-+]?[0-9]{1,18}", text):  # int() takes 1_0, and digits of other scripts
        raise ConfigError(f"{name}={text!r}: must be an integer")
    return int(text)
