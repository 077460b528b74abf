"""Start the processes of one rank's engines on the rank's devices and cores, and plan how many there are to be."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from dpgen.config.schema import Config
from dpgen.data.model_facts import estimate_model_size, find_context_limit, load_model_config
from dpgen.distributed.devices import assign_cores, assign_gpus, count_sharing_ranks
from dpgen.distributed.layout import EngineWorld
from dpgen.distributed.topology import Topology
from dpgen.engine.messages import EngineSpec
from dpgen.engine.pool.engine_count import EngineCount, estimate_engine_bytes, plan_engine_count
from dpgen.engine.process import EngineProcess
from dpgen.engine.starting.log_file import EngineLog
from dpgen.engine.starting.model_damage import find_small_file
from dpgen.engine.starting.server_process import ServerProcess, build_engine_env
from dpgen.engine.starting.visible_gpus import list_visible_gpus


@dataclass(frozen=True)
class Placement:
    """Hold one rank's share of its node's devices.

    Attributes:
        gpus: entries of CUDA_VISIBLE_DEVICES; None for engines on the CPU.
        cores: of the rank; engines on the CPU divide them.
        num_sharing: ranks that share these GPUs.
        world: as of `EngineSpec`.
        is_bound_to_gpu: True if the launcher lets the process see one GPU.
        log_level: `run.log_level`.
    """

    gpus: Sequence[str] | None
    cores: Sequence[int]
    num_sharing: int
    world: EngineWorld | None
    is_bound_to_gpu: bool
    log_level: str

    def find_surroundings(self, index: int, num_engines: int) -> tuple[dict[str, str], Sequence[int] | None]:
        """Return the environment variables and the cores of the process of the engine of a number."""
        cores = None if self.gpus else divide_cores(self.cores, index, num_engines)
        env = build_engine_env(
            os.environ,
            gpus=self.gpus,
            num_cores=len(cores or ()),
            log_level=self.log_level,
            is_on_one_node=self.world is None or self.world.is_on_one_node,
            keeps_memory=True,
        )
        if self.world is not None:
            env |= self.world.to_env()
            if self.is_bound_to_gpu:
                env["LOCAL_RANK"] = "0"
        return env, cores


@dataclass(frozen=True)
class EngineStarter:
    """Start engines of one rank.

    Attributes:
        placement: where they run.
        log: receives the lines of the first engine; others have files beside it.
        take_early: returns a process that was started early with this environment and these cores, if there is one.
    """

    placement: Placement
    log: EngineLog
    take_early: Callable[[Mapping[str, str], Sequence[int] | None], ServerProcess | None] = lambda env, cores: None

    def __call__(self, spec: EngineSpec, index: int = 0) -> EngineProcess:
        """Start the process of the engine of a number, from 0 to `spec.num_engines` - 1."""
        env, cores = self.placement.find_surroundings(index, spec.num_engines)
        server = (self.take_early(env, cores) if index == 0 else None) or ServerProcess(spec.kind, env, cores)
        spec = dataclasses.replace(spec, num_sharing=self.placement.num_sharing)
        return EngineProcess(spec, server, self.log.get_sibling(index))


def find_placement(
    config: Config,
    topology: Topology,
    affinities: Sequence[frozenset[int]],
    world: EngineWorld | None,
    *,
    is_quiet: bool = False,
) -> Placement:
    """Return this rank's share of its node's devices.

    Args:
        affinities: the cores that each rank of this node may run on, by local rank.
        is_quiet: log nothing.

    Raises:
        ConfigError: the node has too few GPUs for its ranks, or CUDA_VISIBLE_DEVICES is wrong.
    """
    visible, size = list[str](), config.gpus_per_rank
    if config.run.engine == "vllm":
        visible = list_visible_gpus(os.environ, os.listdir("/dev"), is_quiet=is_quiet)
    gpus = assign_gpus(topology, visible, size, share=config.parallel.share_devices) if visible else None
    if gpus and world is not None:
        gpus = visible  # the neighbours' GPUs too: vLLM takes that of its LOCAL_RANK, and reaches the others directly
    cores = assign_cores(affinities, min(topology.local_rank, len(affinities) - 1))
    num_sharing = count_sharing_ranks(topology, len(visible), size) if gpus and world is None else 1
    return Placement(gpus, cores, num_sharing, world, len(visible) == 1, config.run.log_level)


def divide_cores(cores: Sequence[int], index: int, num_engines: int) -> Sequence[int]:
    """Return an engine's part of its rank's cores; engines share single cores if there are fewer cores than engines."""
    if len(cores) < num_engines:
        return [cores[index % len(cores)]]
    return cores[len(cores) * index // num_engines : len(cores) * (index + 1) // num_engines]


def plan_engines(config: Config, weight_bytes: int, placement: Placement) -> tuple[EngineCount, int]:
    """Return how many engines this rank is to have, or at most, and the memory that each of several should have.

    Args:
        weight_bytes: of each device, as measured; 0 if not known.
    """
    size_bytes, kv_bytes, max_len = float(weight_bytes), 0.0, 0
    if config.run.engine == "vllm" and placement.gpus and config.parallel.engines_per_rank != 1:
        model_config = _read_model_config(os.path.expanduser(config.model), config.engine)
        if (size := estimate_model_size(config.model, model_config, config.engine)) is not None:
            size_bytes, kv_bytes = size_bytes or size.weight_bytes, size.kv_bytes
            limit = find_context_limit(model_config, config.engine)
            max_len = 0 if limit is None or config.engine.get("max_model_len") == -1 else limit.num_tokens
    count = plan_engine_count(
        config, size_bytes, len(placement.cores), on_gpu=bool(placement.gpus), num_sharing=placement.num_sharing
    )
    return count, estimate_engine_bytes(size_bytes, kv_bytes, config.engine, max_len) if size_bytes else 0


def _read_model_config(model: str, options: Mapping[str, Any]) -> Any:
    """Return the model's configuration; from a file on the disk without transformers, which takes seconds to import."""
    path = find_small_file(model, "config.json", options)
    if path is None or options.get("hf_config_path") or callable(options.get("hf_overrides")):
        return load_model_config(model, options)
    try:
        values = {**json.loads(path.read_bytes()), **(options.get("hf_overrides") or {})}
        values |= values.get("text_config") or {}
    except (OSError, ValueError, TypeError):
        return None
    config = SimpleNamespace(**values)
    config.dtype = values.get("dtype") or values.get("torch_dtype")
    config.model_type = values.get("model_type")
    config.get_text_config = lambda: config
    return config
