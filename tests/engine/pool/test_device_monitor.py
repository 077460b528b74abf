"""What NVIDIA's management library tells about a GPU, with a library that stands for it."""

from __future__ import annotations

from typing import Any

from dpgen.engine.pool.device_monitor import DeviceMonitor


class FakeLibrary:
    """Answer as NVML does: 0 for success, results through pointers."""

    def __init__(self, init_status: int = 0, busy_status: int = 0) -> None:
        self._init_status, self._busy_status, self.asked = init_status, busy_status, list[Any]()

    def nvmlInit_v2(self) -> int:
        return self._init_status

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        self.asked.append(index.value)
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: Any, handle: Any) -> int:
        self.asked.append(uuid.value)
        return 0 if uuid.value.startswith((b"GPU-", b"MIG-")) else 2

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        memory._obj.total, memory._obj.free = 80, 70
        return 0

    def nvmlDeviceGetUtilizationRates(self, handle: Any, rates: Any) -> int:
        rates._obj.gpu = 37
        return self._busy_status


def test_the_first_gpu_that_the_process_may_use_is_asked() -> None:
    library = FakeLibrary()
    for names in ("3,1", "GPU-12ab", "", "MIG-7"):
        monitor = DeviceMonitor({"CUDA_VISIBLE_DEVICES": names}, library)
        assert (monitor.memory_bytes, monitor.free_bytes, monitor.measure_busy()) == (80, 70, 0.37)
    assert library.asked == [3, b"GPU-12ab", 0, b"MIG-7"]


def test_where_nothing_tells_nothing_is_known() -> None:
    assert DeviceMonitor({}, FakeLibrary(busy_status=3)).measure_busy() is None, "a part of a GPU"
    for monitor in (
        DeviceMonitor({}, FakeLibrary(init_status=9)),
        DeviceMonitor({"CUDA_VISIBLE_DEVICES": "x"}, FakeLibrary()),
    ):
        assert (monitor.memory_bytes, monitor.free_bytes, monitor.measure_busy()) == (0, 0, None)
