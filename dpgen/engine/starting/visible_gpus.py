"""List the GPUs that this process may use, by CUDA_VISIBLE_DEVICES or by their device files, without loading CUDA."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping

from dpgen.errors import ConfigError
from dpgen.formatting import format_count

logger = logging.getLogger(__name__)

# Files in /dev of machines with GPUs: NVIDIA's, also under WSL and on Jetson, and AMD's, which read the variable, too.
_GPU_FILES = ("nvidia", "dxg", "nvhost", "nvmap", "kfd")
_NO_GPU = ("", "nodevfiles", "none", "void")
_GPU_UUID = re.compile("GPU-[0-9A-Fa-f-]+|MIG-[0-9A-Fa-f-]+|MIG-GPU-[0-9A-Fa-f-]+/[0-9]+/[0-9]+")


def parse_visible_gpus(text: str) -> list[str]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES names, as CUDA reads it: indices or UUIDs, in order.

    "", "-1" and "NoDevFiles" (of batch systems) hide all GPUs, and a negative index hides those after it.

    Raises:
        ConfigError: CUDA would see none, or fewer than are named: a GPU is named twice, or an entry names none.
    """
    entries = [entry.strip() for entry in text.split(",")]
    if len(entries) > 1 and not entries[-1]:
        entries.pop()  # "0,1,"
    if len(entries) == 1 and entries[0].lower() in _NO_GPU:
        return []
    gpus: list[str] = []
    for entry in entries:
        if re.fullmatch("-[0-9]+", entry):
            break
        if re.fullmatch("[0-9]+", entry):
            name = str(int(entry))
        elif _GPU_UUID.fullmatch(entry):
            name = entry
        else:
            raise ConfigError(
                f"CUDA_VISIBLE_DEVICES={text!r}: {repr(entry) if entry else 'a blank entry'} names no GPU, and CUDA "
                "would stop there: must be indices or UUIDs (GPU-..., MIG-...), separated by commas; unset it to use "
                "all GPUs"
            )
        if name in gpus:
            raise ConfigError(f"CUDA_VISIBLE_DEVICES={text!r}: names {entry} twice, and CUDA would see no GPU at all")
        gpus.append(name)
    return gpus


def list_visible_gpus(
    environ: Mapping[str, str], device_files: Collection[str], *, is_quiet: bool = False
) -> list[str]:
    """Return the GPUs that this process may use, as CUDA names them, without loading CUDA here.

    Args:
        device_files: names in /dev.
        is_quiet: log nothing.

    Raises:
        ConfigError: CUDA_VISIBLE_DEVICES names GPUs that CUDA would not see.
    """
    num_gpus = sum(re.fullmatch("nvidia[0-9]+", name) is not None for name in device_files)
    text = environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return [str(index) for index in range(num_gpus)]
    gpus = parse_visible_gpus(text)
    if not any(name.startswith(_GPU_FILES) for name in device_files):
        gpus = []  # the variable is a leftover: this machine has no GPU
    beyond = [gpu for gpu in gpus if gpu.isdigit() and int(gpu) >= num_gpus > 0]
    if beyond:
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={text!r}: this machine has {format_count(num_gpus, 'GPU')}, numbered from 0, and "
            f"CUDA would not see {beyond[0]}"
        )
    if not gpus and not is_quiet and text.strip() not in ("", "-1"):
        logger.info(f"CUDA_VISIBLE_DEVICES={text!r}: no GPU is visible")
    return gpus
