"""Real vLLM: its engine in this process, asked one step at a time. Home of `vllm`; runs in the engine process only.

Used of vLLM, alike in 0.26 to 0.32: `EngineArgs`, `LLMEngine.from_vllm_config`, `add_request`, `step`, custom
executor classes. `LLM.generate` is not used: it raises on the first bad prompt, and it drains between calls.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Callable
from typing import Any, ClassVar

import psutil
import pydantic
import torch
import vllm
from vllm import envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs.engine import tokens_input
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher, UniProcExecutor

from dpgen.config.schema import unknown_key_error
from dpgen.engine.messages import AgreeKvFn, EngineInfo, EngineSpec, EngineStats, EngineTextConfig, UndecodedRow
from dpgen.errors import ConfigError, RowRefused
from dpgen.records import Completion, Request, RowError, RowResult

# Fields of SamplingParams that belong to dpgen: how results come back, and vLLM's own bookkeeping.
_RESERVED_SAMPLING_FIELDS = {"output_kind", "skip_clone", "output_text_buffer_length", "stream_interval"}


class VllmBackend:
    """See `Backend`."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._params = pydantic.TypeAdapter(SamplingParams)
        self._config: VllmConfig | None = None
        self._engine: LLMEngine | None = None
        self._sampling: dict[str, Any] = {}
        self._render: Callable[[Any], list[int]] | None = None
        self._leaves_text = False
        self._undecoded: dict[int, SamplingParams] = {}  # rows whose text the rank makes
        self._num_finished_tokens = self._num_cached_tokens = 0
        self._preemptions: dict[str, int] = {}  # running sequences that were set back, and how often
        self._num_preemptions = 0

    def check_options(self) -> tuple[str, ...]:
        self._check_names()
        options, notes = dict(self._spec.options), []
        if current_platform.is_cpu():
            notes = _apply_cpu_defaults(options, self._spec.local_size)
        if self._spec.world is not None:
            options["data_parallel_size"] = self._spec.world.num_groups
        options.setdefault("disable_log_stats", True)
        options.setdefault("use_tqdm_on_load", envs.VLLM_LOGGING_LEVEL in ("INFO", "DEBUG"))
        try:
            args = EngineArgs(
                model=self._spec.model,
                tensor_parallel_size=self._spec.tensor_parallel_size,
                pipeline_parallel_size=self._spec.pipeline_parallel_size,
                enable_expert_parallel=self._spec.enable_expert_parallel,
                distributed_executor_backend=self._executor.backend,
                **options,
            )
            self._config = args.create_engine_config(UsageContext.LLM_CLASS)
        except Exception as error:  # noqa: BLE001 - its errors have no common base
            raise ConfigError(f"vLLM refuses the model or an engine.* key: {_summarize_error(error)}") from None
        self._sampling = self._default_sampling()
        entries = {f"sampling_by_rank[{index}]": entry for index, entry in enumerate(self._spec.sampling_by_rank)}
        for section, entry in {"sampling": {}, **entries}.items():
            try:
                self._params.validate_python({**self._sampling, **entry})
            except Exception as error:  # noqa: BLE001 - its errors have no common base
                raise ConfigError(f"vLLM refuses a {section}.* key: {_summarize_error(error)}") from None
        return tuple(notes)

    def load(self, agree_kv: AgreeKvFn, text: EngineTextConfig) -> EngineInfo:
        assert self._config is not None
        self._leaves_text = text.skip_detokenize
        _SyncKvMixin.agree_kv = agree_kv
        # By its constructor, which takes the executor's class: in its configuration vLLM wants one of its own names,
        # for pipelines and external launchers at least.
        self._engine = LLMEngine(
            vllm_config=self._config,
            executor_class=self._executor,
            log_stats=False,
            usage_context=UsageContext.LLM_CLASS,
        )
        if text.prompt_settings is not None:
            from dpgen.engine.vllm_render import VllmRenderer

            self._render = VllmRenderer(self._engine, text.prompt_settings).render
        config = self._engine.vllm_config
        return EngineInfo(
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_model_len=config.model_config.max_model_len,
            num_kv_blocks=config.cache_config.num_gpu_blocks or 0,
            kv_block_tokens=config.cache_config.block_size or 0,
            versions={"vllm": vllm.__version__, "torch": torch.__version__},
            device=current_platform.device_type,
        )

    def add_request(self, request: Request) -> None:
        assert self._engine is not None
        params = self._build_params(request)
        token_ids = request.prompt_token_ids
        if token_ids is None:
            assert self._render is not None
            token_ids = self._render(request.prompt)
        params.skip_clone = True  # they are this row's alone; copying them takes longer than all else here
        # Without stop strings nobody needs the text before the end. vLLM alone knows how to space special tokens.
        is_spaced = params.skip_special_tokens or params.spaces_between_special_tokens
        if self._leaves_text and params.detokenize and not params.stop and is_spaced:
            params.detokenize = False
            self._undecoded[request.row] = params
        try:
            self._engine.add_request(str(request.row), tokens_input(token_ids), params)
        except Exception as error:  # noqa: BLE001 - foreign code over a row's own values: one bad row costs one row
            self._undecoded.pop(request.row, None)
            self._engine.abort_request([str(request.row)])  # it may have got halfway in
            raise RowRefused(
                _classify_rejection(error, len(token_ids), self._max_model_len), _summarize_error(error)
            ) from None

    def step(self) -> list[RowResult | UndecodedRow]:
        assert self._engine is not None
        outputs = self._engine.step()
        return [self._to_result(output) for output in outputs if isinstance(output, RequestOutput) and output.finished]

    def has_unfinished_requests(self) -> bool:
        return self._engine is not None and self._engine.has_unfinished_requests()

    def stats(self) -> EngineStats:
        assert self._engine is not None
        states = self._engine.output_processor.request_states.values()
        num_running_tokens = sum(s.detokenizer.num_output_tokens() for s in states if s.detokenizer is not None)
        scheduler = self._engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]
        num_running, num_waiting = scheduler.get_request_counts()
        # vLLM counts them for its own log only; what a sequence still met after our last look at it goes uncounted.
        before, self._preemptions = self._preemptions, {}
        for name, request in scheduler.requests.items():
            if request.num_preemptions:
                self._preemptions[name] = request.num_preemptions
                self._num_preemptions += request.num_preemptions - before.get(name, 0)
        return EngineStats(
            self._num_finished_tokens + num_running_tokens,
            num_running,
            num_waiting,
            self._num_preemptions,
            self._num_cached_tokens,
        )

    def close(self) -> None:
        assert self._config is not None
        # With one device, and caches nowhere else, all of it is in this process and ends with it; vLLM's own way there
        # looks through all of the heap for a second.
        caches_elsewhere = self._config.kv_transfer_config or self._config.ec_transfer_config
        if self._engine is not None and (self._executor is not SyncKvUniProcExecutor or caches_elsewhere):
            self._engine.engine_core.shutdown()

    @property
    def _executor(self) -> Any:  # a class; to mypy vLLM's are of any type
        if self._spec.world is not None:
            return SyncKvExternalExecutor
        num_devices = self._spec.tensor_parallel_size * self._spec.pipeline_parallel_size
        return SyncKvUniProcExecutor if num_devices == 1 else SyncKvMultiprocExecutor

    @property
    def _max_model_len(self) -> int:
        assert self._engine is not None
        return int(self._engine.vllm_config.model_config.max_model_len)

    def _check_names(self) -> None:
        engine_fields = {each.name for each in dataclasses.fields(EngineArgs)}
        for name in self._spec.options:
            if name not in engine_fields:
                raise unknown_key_error("engine", name, engine_fields)
        _check_types(self._spec.options)
        sampling_fields = {
            f for f in SamplingParams.__struct_fields__ if not f.startswith("_")
        } - _RESERVED_SAMPLING_FIELDS
        for section, name in self._spec.sampling_names():
            if name not in sampling_fields:
                raise unknown_key_error(section, name, sampling_fields)

    def _default_sampling(self) -> dict[str, Any]:
        """The model's generation config, as `LLM.get_default_sampling_params` takes it, under the run's sampling."""
        assert self._config is not None
        defaults = {"max_tokens": None, **self._config.model_config.get_diff_sampling_param()}
        return {**defaults, **self._spec.sampling, "output_kind": RequestOutputKind.FINAL_ONLY}

    def _build_params(self, request: Request) -> SamplingParams:
        try:
            params = self._params.validate_python({**self._sampling, **request.sampling})
        except Exception as error:  # noqa: BLE001 - as in `add`
            raise RowRefused("bad_sampling", _summarize_error(error)) from None
        assert isinstance(params, SamplingParams)
        return params

    def _to_result(self, output: RequestOutput) -> RowResult | UndecodedRow:
        row = int(output.request_id)
        num_prompt_tokens = len(output.prompt_token_ids or ())
        self._num_cached_tokens += output.num_cached_tokens or 0
        outputs = sorted(output.outputs, key=lambda each: each.index)
        self._num_finished_tokens += sum(len(each.token_ids) for each in outputs)
        undecoded = self._undecoded.pop(row, None)
        if any(each.finish_reason in ("error", "abort") for each in outputs):
            return RowResult(
                row, num_prompt_tokens, error=RowError("engine_refused", "vLLM gave the row up while it ran")
            )
        completions = tuple(
            Completion(
                each.text,
                each.finish_reason,
                len(each.token_ids),
                list(each.token_ids) if self._spec.token_ids else None,
            )
            for each in outputs
        )
        result = RowResult(row, num_prompt_tokens, completions)
        if undecoded is None:
            return result
        # What ends a row (its last token, since it has no stop strings) is no part of its text.
        shows_stop = undecoded.include_stop_str_in_output
        ids = [list(o.token_ids[:-1] if o.finish_reason == "stop" and not shows_stop else o.token_ids) for o in outputs]
        return UndecodedRow(result, tuple(ids), undecoded.skip_special_tokens)


class _SyncKvMixin:
    """Asks the ranks how large the KV cache is to be, at the point where vLLM has measured what is free.

    vLLM makes the executor itself, from its class: the question goes through a class attribute.

    Attributes:
        backend: vLLM's name for the executor that it adds to.
    """

    agree_kv: ClassVar[AgreeKvFn]
    backend: ClassVar[str]

    def determine_available_memory(self) -> list[int]:
        measured: list[int] = super().determine_available_memory()  # type: ignore[misc]
        agreed = _SyncKvMixin.agree_kv(min(measured))
        return [agreed] * len(measured)


class SyncKvUniProcExecutor(_SyncKvMixin, UniProcExecutor):
    """One device, its worker in this process."""

    backend = "uni"


class SyncKvExternalExecutor(_SyncKvMixin, ExecutorWithExternalLauncher):
    """One device of several that torchrun's processes drive, a worker in each."""

    backend = "external_launcher"

    def _distributed_args(self) -> tuple[str, int, int]:
        # Not "env://" as vLLM has it: on the CPU it names shared memory after the end of this, and two groups of one
        # node would share it.
        _, rank, local_rank = super()._distributed_args()
        return f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", rank, local_rank


class SyncKvMultiprocExecutor(_SyncKvMixin, MultiprocExecutor):
    """Several devices, a worker process each."""

    backend = "mp"


def _check_types(options: dict[str, Any]) -> None:
    """Refuses what is no number or flag where one belongs; vLLM would trip over it deep inside, naming no key."""
    types = {each.name: each.type for each in dataclasses.fields(EngineArgs)}
    for name, value in options.items():
        expected = types[name]
        if not set(typing.get_args(expected) or (expected,)) <= {int, float, bool, type(None)}:
            continue  # vLLM takes more than the type says: names of enum members, dicts for its own objects
        try:
            pydantic.TypeAdapter[Any](expected).validate_python(value)  # type: ignore[arg-type]
        except pydantic.ValidationError as error:
            raise ConfigError(f"engine.{name}={value!r}: {_summarize_error(error)}") from None


def _apply_cpu_defaults(options: dict[str, Any], local_size: int) -> list[str]:
    """Steps around what vLLM can't do on the CPU, unless the user asked for it; gives a note for each step."""
    notes = []
    if "enable_chunked_prefill" not in options:
        options["enable_chunked_prefill"] = False
        notes.append("no chunked prefill, which crashes seeded sampling there")
    if "kv_cache_memory_bytes" not in options and "gpu_memory_utilization" not in options:
        num_bytes = min(4 << 30, psutil.virtual_memory().available // (4 * local_size))
        options["kv_cache_memory_bytes"] = num_bytes
        notes.append(f"a KV cache of {num_bytes >> 20} MiB, since its default asks for more memory than is free")
    return [f"vLLM on the CPU: {'; '.join(notes)}"] if notes else []


def _classify_rejection(error: Exception, num_prompt_tokens: int, max_model_len: int) -> str:
    """The error type of a row that `add_request` refused; vLLM itself tells only by its message."""
    if num_prompt_tokens == 0:
        return "empty_prompt"
    if num_prompt_tokens >= max_model_len:
        return "prompt_too_long"
    if "out of vocabulary" in str(error).lower():
        return "out_of_vocabulary"
    return "bad_sampling"


def _summarize_error(error: Exception) -> str:
    """An error of vLLM or pydantic in one line."""
    if isinstance(error, pydantic.ValidationError):
        parts = []
        for each in error.errors(include_url=False, include_context=False):
            place = [str(p) for p in each["loc"] if "[" not in str(p)]
            if each["type"] != "is_instance_of":
                parts.append(f"{'.'.join(place)}: {each['msg']}" if place else str(each["msg"]))
        if parts:
            return "; ".join(parts)
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
