"""Share this machine's GPUs among tests that run at the same time, and hold memory on one as other programs do.

- Each GPU has slots. A test takes one slot on each of its GPUs, or all slots if it measures memory.
- One test at a time waits for slots, the others wait for that one, so a test that needs many GPUs gets its turn.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

from dpgen.engine.starting.visible_gpus import list_visible_gpus
from helpers.locks import try_lock

NUM_SLOTS = 12  # engines of small models take about a GiB each
NUM_TOKENS = 100  # of each row of `write_job`
# For the demo's model on a GPU that other tests use as well; the KV cache holds more tokens than all sequences have.
GPU_ENGINE = {
    "dtype": "bfloat16",
    "max_model_len": 128,
    "max_num_seqs": 128,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
}
_HOLD_MEMORY = """
import sys, torch
total_bytes = torch.cuda.mem_get_info()[1]
held = torch.empty(int(float(sys.argv[1]) * total_bytes), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


def list_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    return list_visible_gpus(os.environ, os.listdir("/dev"))


def find_obstacle() -> str | None:
    """Return why no test can use a GPU here; None if tests can."""
    if not list_gpus():
        return "no GPU is visible"
    try:
        version("vllm")
    except PackageNotFoundError:
        return "vLLM's build for GPUs is not installed (bash launch/install.sh gpu --dev)"
    return None


@contextlib.contextmanager
def reserve_gpus(
    gpus: Sequence[str], count: int, *, whole: bool = False, folder: Path | None = None
) -> Iterator[list[str]]:
    """Wait until `count` of the GPUs have free slots, and hold these against all other tests; yield the GPUs in order.

    Args:
        whole: take all slots, so that no other test uses the GPUs.
        folder: where the lock files are; None for one that all tests of this user share.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"dpgen-gpu-slots-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    with contextlib.ExitStack() as slots:
        with (folder / "queue").open("w") as queue:
            fcntl.flock(queue, fcntl.LOCK_EX)
            while (taken := _try_take(folder, gpus, count, NUM_SLOTS if whole else 1)) is None:
                time.sleep(0.2)
        for files in taken.values():
            for file in files:
                slots.callback(file.close)
        yield [gpu for gpu in gpus if gpu in taken]


def _try_take(folder: Path, gpus: Sequence[str], count: int, num_slots: int) -> dict[str, list[IO[str]]] | None:
    """Return locked slots of the GPUs that have the most free ones; None if too few are free."""
    free: dict[str, list[IO[str]]] = {gpu: [] for gpu in gpus}
    for gpu in gpus:
        for slot in range(NUM_SLOTS):
            file = (folder / f"{gpu}-{slot}").open("w")
            if try_lock(file):
                free[gpu].append(file)
            else:
                file.close()
    best = sorted(gpus, key=lambda gpu: -len(free[gpu]))[:count]
    is_enough = all(len(free[gpu]) >= num_slots for gpu in best)
    taken = {gpu: free[gpu][:num_slots] for gpu in best} if is_enough else {}
    for gpu, files in free.items():
        for file in files[len(taken.get(gpu, ())) :]:
            file.close()
    return taken or None


@contextlib.contextmanager
def hold_memory(gpu: str, fraction: float) -> Iterator[None]:
    """Hold a fraction of a GPU's memory in another process."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD_MEMORY, str(fraction)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            assert process.stdout.readline() == "held\n", f"{fraction:.0%} of the memory of GPU {gpu} is not free"
            yield
        finally:
            process.stdin.close()


def find_noise(output: str) -> list[str]:
    """Return the lines of a run's output that are not dpgen's own: an engine's, and those without dpgen's prefix."""
    own = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [A-Z]+ \[rank \d+\] |\s|$")
    return [line for line in output.splitlines() if not own.match(line)]
