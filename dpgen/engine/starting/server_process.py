"""Start an engine's process, on its devices and cores and outside the launcher's world, and end it.

- It imports what its kind of engine needs, and then waits for its spec. Nothing else is decided by then.
- The engine and all its child processes form one process group, and end with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection

KILL_TIMEOUT_S = 30.0  # the kernel frees a GPU's memory meanwhile
# An encoder's step takes some hundred megabytes for a moment. glibc gives them back to the kernel after the step, which
# then faults each page in and zeroes it again. So freed memory stays in the process, in huge pages where the machine
# has them: fewer faults, and fewer misses of the processor's table of pages.
_CPU_MALLOC = "glibc.malloc.trim_threshold=2147483648:glibc.malloc.mmap_max=0:glibc.malloc.hugetlb=1"
_MALLOC_PREFIXES = ("GLIBC_TUNABLES", "MALLOC_", "LD_PRELOAD")  # by which a user chooses
# These variables describe the launcher's world, which belongs to the rank process; vLLM would read them and join it.
LAUNCHER_PREFIXES = (
    "TORCHELASTIC_",
    "TORCH_NCCL_",
    "PET_",
    "GROUP_",
    "ROLE_",
    "SLURM_",
    "PMI_",
    "PMIX_",
    "OMPI_",
    "MV2_COMM_WORLD_",
    "MVP_COMM_WORLD_",
    "MPI_LOCAL",
)
LAUNCHER_NAMES = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NODE_RANK",
}


class ServerProcess:
    """Start the process of one engine.

    Args:
        kind: `run.engine`.
        environment: all its environment variables; see `build_engine_env`.
        cores: CPU cores that it may run on; None for all cores of this process.

    Attributes:
        process: with the pipe of its output, which nobody reads yet.
        pipe: this side's end of the pipe for messages.
    """

    def __init__(self, kind: str, environment: Mapping[str, str], cores: Sequence[int] | None) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "dpgen.engine.server", str(theirs.fileno()), str(os.getpid()), kind],
                env=dict(environment),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the rank handles Ctrl-C; and the group's id ends the whole process tree
            )
        if cores is not None:
            os.sched_setaffinity(self.process.pid, cores)
        self.pipe = Connection(ours.detach())

    def kill(self, timeout_s: float = KILL_TIMEOUT_S) -> None:
        """End the process and its tree immediately; safe to call twice.

        Raises:
            subprocess.TimeoutExpired: the process is still there.
        """
        with contextlib.suppress(ProcessLookupError):  # the process tree is gone already
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout_s)


def select_own_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that don't describe the launcher's world, for processes that aren't in it."""
    return {
        name: value
        for name, value in environ.items()
        if name not in LAUNCHER_NAMES and not name.startswith(LAUNCHER_PREFIXES)
    }


def build_engine_env(
    environ: Mapping[str, str],
    *,
    gpus: Sequence[str] | None,
    num_cores: int,
    log_level: str,
    is_on_one_node: bool = True,
    keeps_memory: bool = False,
) -> dict[str, str]:
    """Return the engine process's environment: the rank's, without the launcher's world, with its share of devices.

    Args:
        gpus: entries of CUDA_VISIBLE_DEVICES; None for an engine on the CPU.
        num_cores: threads of an engine on the CPU.
        log_level: `run.log_level`. vLLM logs at INFO at least, since all lines go to the engine's log file; `EngineLog`
            decides what the terminal shows.
        is_on_one_node: whether all of its processes, workers included, are on this machine.
        keeps_memory: keep the memory that an engine on the CPU frees, unless the user has chosen how it is allocated.
    """
    env = select_own_environment(environ)
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # vLLM's subprocess client hangs for good when the engine is killed
    env["VLLM_LOGGING_LEVEL"] = "DEBUG" if log_level == "debug" else "INFO"
    env["PYTHONUNBUFFERED"] = "1"
    # The engine imports the rank's packages, not modules from the working directory (hence -P above, too).
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    if log_level in ("warning", "error"):
        env.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch's C++ warnings mean nothing to a user
    if is_on_one_node:  # the engine's own connections then need not be reachable from outside
        env["GLOO_SOCKET_IFNAME"] = "lo"  # the rank's, which may reach other nodes, is another
        env.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if gpus is not None:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    else:
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # the rank sets the affinity, and vLLM would override it
        env["OMP_NUM_THREADS"] = str(num_cores)
        if keeps_memory and not any(name.startswith(_MALLOC_PREFIXES) for name in env):
            env["GLIBC_TUNABLES"] = _CPU_MALLOC
    return env
