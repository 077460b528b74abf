"""Look at the files of a model and its adapters, and at the cache of compiled code, before an engine starts."""

from __future__ import annotations

import os

from dpgen.config.schema import Config
from dpgen.data.hub import check_cache
from dpgen.distributed.layout import EngineWorld
from dpgen.engine.adapters import check_adapters
from dpgen.engine.starting.caches import find_compile_cache, keeps_compiled_code
from dpgen.engine.starting.model_damage import check_model_files, measure_weights


def expand_model_path(config: Config) -> str:
    """Return `model` with `~` in full."""
    return os.path.expanduser(config.model)


def check_files(config: Config) -> None:
    """Raise ConfigError if files of the model or an adapter are not there or not whole."""
    if config.run.engine == "vllm":
        check_model_files(expand_model_path(config), config.engine)
        check_adapters(config.lora, expand_model_path(config))


def check_model_on_node(config: Config, *, is_node_leader: bool) -> None:
    """Check the model's and the adapters' files, and the caches that loading fills, once on each node."""
    if config.run.engine != "vllm" or not is_node_leader:
        return
    check_files(config)
    if keeps_compiled_code(config.engine, os.environ):
        check_cache(find_compile_cache(os.environ), "vLLM's cache of compiled code", "VLLM_CACHE_ROOT")


def measure_weights_per_device(config: Config, world: EngineWorld | None) -> int:
    """Return the least that the weights take on each device; 0 if that is not known."""
    if config.run.engine != "vllm" or world is not None:
        return 0
    return measure_weights(expand_model_path(config), config.engine) // config.gpus_per_rank
