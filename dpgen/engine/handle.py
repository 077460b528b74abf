"""Declare an engine's process as its supervisor uses it, and the function that starts one."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

from dpgen.engine.messages import EngineSpec, EngineTextConfig, Event
from dpgen.records import Request


class EngineHandle(Protocol):
    """Interface of one engine process, as the supervisor uses it; see `dpgen.engine.process.EngineProcess`."""

    @property
    def log_path(self) -> Path | None: ...

    @property
    def pipe(self) -> Connection: ...

    def load_model(self, kv_bytes: int | None = None) -> None: ...

    def set_kv_bytes(self, num_bytes: int) -> None: ...

    def set_text_config(self, text_config: EngineTextConfig) -> None: ...

    def submit(self, requests: list[Request]) -> None: ...

    def poll(self, timeout_s: float) -> list[Event]: ...

    def show_errors(self) -> None: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...

    def kill(self) -> None: ...


class StartEngine(Protocol):
    """Start a process for the engine of a number."""

    def __call__(self, spec: EngineSpec, index: int = 0) -> EngineHandle: ...
