"""Ask NVIDIA's management library (NVML) about an engine's GPU: its memory, and how busy it is, without CUDA.

The library comes with the driver, and its C interface is stable; no Python package for it needs to be there.

Limits: of a part of a GPU (MIG) only the memory is known; of GPUs of other makers, and without the library, nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

_LIBRARY = "libnvidia-ml.so.1"


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class _Utilization(ctypes.Structure):
    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


class DeviceMonitor:
    """Read the numbers of the first GPU that a process may use.

    Args:
        environ: the process's environment; its CUDA_VISIBLE_DEVICES names the GPU.
        library: NVML, loaded; None to load it.
    """

    def __init__(self, environ: Mapping[str, str], library: Any = None) -> None:
        self._library, self._handle = library, ctypes.c_void_p()
        self._is_known = self._open((environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0].strip())

    @property
    def memory_bytes(self) -> int:
        """Memory of the device; 0 where unknown."""
        return int(self._read_memory().total)

    @property
    def free_bytes(self) -> int:
        """Memory of the device that nothing uses now; 0 where unknown."""
        return int(self._read_memory().free)

    def measure_busy(self) -> float | None:
        """Return the share of the last second, or less, in which the device ran kernels; None where unknown."""
        rates = _Utilization()
        if not self._is_known or self._library.nvmlDeviceGetUtilizationRates(self._handle, ctypes.byref(rates)):
            return None
        return int(rates.gpu) / 100

    def _open(self, name: str) -> bool:
        try:
            self._library = self._library or ctypes.CDLL(_LIBRARY)
        except OSError:
            return False
        handle = ctypes.byref(self._handle)
        if self._library.nvmlInit_v2():
            return False
        if name.isdigit():
            return not self._library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(name)), handle)
        return not self._library.nvmlDeviceGetHandleByUUID(ctypes.c_char_p(name.encode()), handle)

    def _read_memory(self) -> _Memory:
        memory = _Memory()
        if self._is_known:
            self._library.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(memory))
        return memory
