"""dpgen: generate with an LLM over a whole dataset, data-parallel, launched by torchrun or srun.

    import dpgen

    rows = dpgen.generate(dataset, model="Qwen/Qwen2.5-7B-Instruct", messages_column="messages", run_dir="runs/a")

Each name is loaded when it is first used, so `import dpgen` takes no time and loads no other package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpgen.api.calls import load_result
    from dpgen.api.session import Session, generate, stream
    from dpgen.api.settings import load_config
    from dpgen.config.completion_checks import CheckConfig
    from dpgen.config.program import ProgramConfig
    from dpgen.config.schema import Config
    from dpgen.config.sections import (
        DataConfig,
        OutputConfig,
        ParallelConfig,
        RunConfig,
        WorkConfig,
    )
    from dpgen.errors import (
        ConfigError,
        DpgenError,
        EngineError,
        Interrupted,
        JoinFailed,
        NoEngineLeft,
        NoRowSucceeded,
        PeerFailed,
        RanksLost,
    )

__all__ = [
    "CheckConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DpgenError",
    "EngineError",
    "Interrupted",
    "JoinFailed",
    "NoEngineLeft",
    "NoRowSucceeded",
    "OutputConfig",
    "ParallelConfig",
    "PeerFailed",
    "ProgramConfig",
    "RanksLost",
    "RunConfig",
    "Session",
    "WorkConfig",
    "generate",
    "load_config",
    "load_result",
    "stream",
]

_HOMES = {
    "dpgen.api.calls": ("load_result",),
    "dpgen.api.session": ("Session", "generate", "stream"),
    "dpgen.api.settings": ("load_config",),
    "dpgen.config.completion_checks": ("CheckConfig",),
    "dpgen.config.program": ("ProgramConfig",),
    "dpgen.config.schema": ("Config",),
    "dpgen.config.sections": ("DataConfig", "OutputConfig", "ParallelConfig", "RunConfig", "WorkConfig"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'dpgen' has no attribute {name!r}")
    from importlib import import_module

    home = next((module for module, names in _HOMES.items() if name in names), "dpgen.errors")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
