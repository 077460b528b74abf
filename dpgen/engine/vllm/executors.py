"""Let the ranks agree on the size of the KV cache, in the executors that drive vLLM's devices."""

from __future__ import annotations

import os
from typing import ClassVar

from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher, UniProcExecutor

from dpgen.engine.messages import AgreeKvFn


class SyncKvMixin:
    """Agree on the KV cache size with the other ranks, between vLLM's measurement and its allocation.

    vLLM creates the executor from its class, so the function that asks the ranks is a class attribute.

    Attributes:
        has_agreed: True once the ranks have been asked; a model without a KV cache never asks.
        backend: vLLM's name of the executor that a subclass extends.
    """

    agree_kv: ClassVar[AgreeKvFn]
    has_agreed: ClassVar[bool] = False
    backend: ClassVar[str]

    def determine_available_memory(self) -> list[int]:
        measured: list[int] = super().determine_available_memory()  # type: ignore[misc]
        SyncKvMixin.has_agreed = True
        agreed = SyncKvMixin.agree_kv(min(measured))
        return [agreed] * len(measured)


class SyncKvUniProcExecutor(SyncKvMixin, UniProcExecutor):
    """Drive one device, with its worker in this process."""

    backend = "uni"


class SyncKvExternalExecutor(SyncKvMixin, ExecutorWithExternalLauncher):
    """Drive one of several devices; torchrun's other processes drive the others."""

    backend = "external_launcher"

    def _distributed_args(self) -> tuple[str, int, int]:
        # Not vLLM's "env://": on the CPU vLLM names shared memory after the end of this address, and two groups of one
        # node would then use the same memory.
        _, rank, local_rank = super()._distributed_args()
        return f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", rank, local_rank


class SyncKvMultiprocExecutor(SyncKvMixin, MultiprocExecutor):
    """Drive several devices, with a worker process for each."""

    backend = "mp"
