"""Prepare what prepares a rank's media: how many worker processes, their environment, and what they run."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dpgen.config.schema import Config
from dpgen.data.media.policy import MediaPolicy
from dpgen.data.prompts.chat_template import load_chat_template
from dpgen.distributed.network import raise_open_file_limit
from dpgen.distributed.topology import Topology
from dpgen.engine.media.preparer import TASKS_AHEAD, MediaPreparer, PreparationLimits, Workers
from dpgen.engine.messages import EngineSpec
from dpgen.engine.starting.cores import count_own_cores
from dpgen.engine.starting.launch import TextPipeline, build_engine_spec
from dpgen.engine.starting.log_file import EngineLog
from dpgen.engine.starting.server_process import build_engine_env
from dpgen.formatting import format_count
from dpgen.workers.keeper import WorkerKeeper
from dpgen.workers.pool import WorkerPool, WorkerSpec

logger = logging.getLogger(__name__)

_MAX_WORKERS = 8
_NUM_OTHERS = 2  # cores for the rank and its engine
_MAX_BUFFERS = 1 << 16
_OTHER_FILES = 256  # file descriptors for all else
# Options that concern the engine alone: some read files of other models, or want devices, and jobs that differ in
# nothing else share their workers.
_ENGINE_OPTIONS = {
    *("speculative_config", "kv_transfer_config", "ec_transfer_config", "compilation_config", "attention_config"),
    *("kernel_config", "eplb_config", "enable_eplb", "all2all_backend", "reasoning_parser", "pooler_config"),
    *("max_num_seqs", "max_num_batched_tokens", "max_cudagraph_capture_size", "performance_mode"),
    *("enable_prefix_caching", "gpu_memory_utilization", "kv_cache_memory_bytes", "kv_offloading_size"),
}
_NICENESS = 5  # the engine's thread goes first


def add_media_preparer(
    text: TextPipeline,
    config: Config,
    topology: Topology,
    log: EngineLog,
    keeper: WorkerKeeper | None = None,
    *,
    claims_rows: bool = True,
) -> TextPipeline:
    """Return the text pipeline with what prepares media, whose workers start now if columns of media are named.

    Args:
        log: takes what the workers print.
        keeper: may have the workers of an earlier job; None to end them with the job.
        claims_rows: as of `PlannerConfig`; without rows there is nothing to prepare.
    """
    if config.pooling is not None:
        return text
    spec = build_engine_spec(config, topology, None)
    preparer = build_media_preparer(config, spec, topology.local_size, log.write, keeper)
    if claims_rows and config.prompt.has_media_columns:
        preparer.start()
    return replace(text, preparer=preparer)


def build_media_preparer(
    config: Config,
    spec: EngineSpec,
    local_size: int,
    log: Callable[[str], None],
    keeper: WorkerKeeper | None = None,
) -> MediaPreparer:
    """Build what prepares a rank's media; its workers start with the first row that has any.

    Args:
        spec: of this rank's engine.
        local_size: ranks on this node.
        log: takes each line that the workers print.
        keeper: as of `add_media_preparer`.
    """
    num_workers = count_workers(config.data.media_workers, local_size)
    data = config.data
    limits = PreparationLimits(num_workers, data.max_prepared_bytes, data.max_held_bytes, _find_max_buffers())

    def start() -> Workers:
        logger.info(f"preparing media in {format_count(num_workers, 'worker')}")
        workers = _describe_workers(config, spec, num_workers)
        return WorkerPool(workers, log) if keeper is None else keeper.take(workers, log)

    policy, is_required = MediaPolicy.from_config(config.data), config.prompt.has_media_columns
    return MediaPreparer(start, limits, policy, is_required=is_required)


def count_workers(wanted: int | str, local_size: int) -> int:
    """Return the number of a rank's workers.

    Args:
        wanted: `data.media_workers`: a number, or "auto" for one on each core that rank and engine leave, 8 at most.
        local_size: ranks on this node.
    """
    if wanted != "auto":
        return int(wanted)
    return max(1, min(_MAX_WORKERS, count_own_cores(local_size) - _NUM_OTHERS))


def _find_max_buffers() -> int:
    """Let this process have as many open files as it may, and return how many of them may be buffers."""
    raise_open_file_limit(_MAX_BUFFERS)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_free = _MAX_BUFFERS if soft == resource.RLIM_INFINITY else soft - len(os.listdir("/proc/self/fd"))
    return max(16, min(_MAX_BUFFERS, num_free - _OTHER_FILES))


def _describe_workers(config: Config, spec: EngineSpec, num_workers: int) -> WorkerSpec:
    options = {name: value for name, value in spec.options.items() if name not in _ENGINE_OPTIONS}
    arguments: tuple[Any, ...] = (options,)
    factory = "dpgen.engine.media.fake_handler:start"
    if config.run.engine != "fake":
        factory = "dpgen.engine.vllm.media.processing:start"
        # The template's text: kept workers must not go on with a file as it was.
        template = load_chat_template(config.prompt)
        prompt = config.prompt if template is None else replace(config.prompt, chat_template=template)
        arguments = (EngineSpec(spec.kind, spec.model, options), prompt, num_workers)
    environment = build_engine_env(os.environ, gpus=None, num_cores=1, log_level=config.run.log_level)
    environment |= dict.fromkeys(("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment["TOKENIZERS_PARALLELISM"] = "false"
    return WorkerSpec(
        "preparing media",
        factory,
        arguments,
        environment,
        num_workers=num_workers,
        timeout_s=config.data.render_timeout_s,
        niceness=_NICENESS,
        max_ahead=TASKS_AHEAD,
    )
