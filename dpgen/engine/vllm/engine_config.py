"""Make vLLM's configuration of a run's options, without loading the model."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import pydantic
import torch
import vllm
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext

from dpgen.engine.messages import EngineInfo, EngineSpec
from dpgen.engine.vllm.adapters import VllmAdapters
from dpgen.engine.vllm.default_options import apply_cpu_defaults
from dpgen.engine.vllm.pooling import add_pooler_task
from dpgen.engine.vllm.reasoning import find_engine_parser
from dpgen.engine.vllm.rejections import summarize_error


def create_engine_config(
    spec: EngineSpec, options: dict[str, Any], executor_backend: str, adapters: VllmAdapters
) -> tuple[VllmConfig, list[str]]:
    """Return vLLM's configuration, without loading the model, and notes for the log.

    Args:
        options: fields of EngineArgs, of vLLM's types; those that are set here are added.
        executor_backend: vLLM's name of the executor.

    Raises:
        Exception: vLLM rejects an option or the model; its errors have no common base.
    """
    notes = adapters.add_options(options)
    if current_platform.is_cpu():
        notes += apply_cpu_defaults(options, spec.local_size * spec.num_engines, samples=spec.pooling is None)
    if spec.world is not None:
        options["data_parallel_size"] = spec.world.num_groups
    if (parser := find_engine_parser(spec)) is not None:
        options["reasoning_parser"] = parser
    options.setdefault("disable_log_stats", True)
    options.setdefault("use_tqdm_on_load", False)  # in a log file a progress bar is one long line
    if spec.max_logprobs > EngineArgs.max_logprobs:
        options.setdefault("max_logprobs", spec.max_logprobs)
    if spec.pooling is not None:
        add_pooler_task(options, spec.pooling)
    args = EngineArgs(
        model=spec.model,
        tensor_parallel_size=spec.tensor_parallel_size,
        pipeline_parallel_size=spec.pipeline_parallel_size,
        enable_expert_parallel=spec.enable_expert_parallel,
        distributed_executor_backend=executor_backend,
        **options,
    )
    return args.create_engine_config(UsageContext.LLM_CLASS), notes


def describe_engine(config: VllmConfig) -> EngineInfo:
    """Return what the rank is told of a loaded engine."""
    return EngineInfo(
        max_num_seqs=config.scheduler_config.max_num_seqs,
        max_model_len=config.model_config.max_model_len,
        num_kv_blocks=config.cache_config.num_gpu_blocks or 0,
        kv_block_tokens=config.cache_config.block_size or 0,
        versions={
            **{"vllm": vllm.__version__, "torch": torch.__version__},
            "model runner": "V2" if config.use_v2_model_runner else "V1",
        },
        device=current_platform.device_type,
    )


def convert_types(options: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the options, with numbers, flags and texts as vLLM's types want them, and a line for each wrong one.

    vLLM itself would fail later and name no key, or take the text "no" for true.
    """
    types = {field.name: field.type for field in dataclasses.fields(EngineArgs)}
    converted, mistakes = dict(options), []
    for name, value in options.items():
        expected = types.get(name)
        kinds = set(typing.get_args(expected) or (expected,))
        if not kinds <= {int, float, bool, str, type(None)}:
            continue  # vLLM takes more than the type allows: names of enum members, dicts for its own objects
        try:
            converted[name] = pydantic.TypeAdapter[Any](expected).validate_python(value)  # type: ignore[arg-type]
        except pydantic.ValidationError as error:
            hint = "; put it in quotes" if str in kinds and isinstance(value, (int, float)) else ""
            mistakes.append(f"engine.{name}={value!r}: {summarize_error(error)}{hint}")
    return converted, mistakes
