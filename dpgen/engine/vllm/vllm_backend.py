"""Run vLLM's engine inside the engine process, one step at a time. The only module that drives `vllm`.

- The same parts of vLLM 0.26 to 0.33 are used: `EngineArgs`, `LLMEngine`, `add_request`, `step`, custom executor
  classes. `versions` lists what changed.
- `LLM.generate` is not used: it raises on the first bad prompt, and its batch drains between calls.
- An error that vLLM raises over one row's own values rejects that row; all other rows are generated.
- The ranks agree on the KV cache size between vLLM's measurement and its allocation (`executors`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pydantic
import vllm
from vllm.config import VllmConfig
from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.llm_engine import LLMEngine

from dpgen.config.tools import parse_json_text
from dpgen.data.hub import explain_hub_error
from dpgen.data.openai_batch.lines import BAD_REQUEST
from dpgen.data.prompts.token_ids import reject_unknown_ids
from dpgen.data.tokenizer import TokenizerConfig
from dpgen.engine.messages import AgreeKvFn, EngineInfo, EngineSpec, EngineStats, EngineTextConfig, RequestParsers
from dpgen.engine.parsing.request_parsers import ParserMaker, find_parser_class
from dpgen.engine.pool.device_monitor import DeviceMonitor
from dpgen.engine.vllm.adapters import VllmAdapters
from dpgen.engine.vllm.default_options import share_memory
from dpgen.engine.vllm.engine_config import convert_types, create_engine_config, describe_engine
from dpgen.engine.vllm.executors import (
    SyncKvExternalExecutor,
    SyncKvMixin,
    SyncKvMultiprocExecutor,
    SyncKvUniProcExecutor,
)
from dpgen.engine.vllm.hooks.hot_path import install_hooks
from dpgen.engine.vllm.media.features import make_engine_prompt, send_media_whole
from dpgen.engine.vllm.media.requirements import explain_failed_import, find_missing_processor, require_media
from dpgen.engine.vllm.pooling import VllmPooling, find_wrong_model
from dpgen.engine.vllm.reasoning import ReasoningState, make_core_request
from dpgen.engine.vllm.rejections import SamplingLimits, classify_rejection, summarize_error
from dpgen.engine.vllm.results import RunningRow, format_id, read_result
from dpgen.engine.vllm.sampling_check import check_params, list_vllm_fields, name_constraint
from dpgen.engine.vllm.versions import takes_hooks
from dpgen.errors import ConfigError, DpgenError, RowRefused
from dpgen.records import PooledKind, Request, RowResult, UndecodedRow

if TYPE_CHECKING:
    from dpgen.engine.vllm.server_requests import RequestConverter


class VllmBackend:
    """Implement `Backend` with vLLM's `LLMEngine`."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._params = pydantic.TypeAdapter(SamplingParams)
        self._fields = list_vllm_fields()
        self._config: VllmConfig | None = None
        self._engine: LLMEngine | None = None
        self._hooks: tuple[Any, ...] = ()  # in what vLLM does for each token
        self._adapters = VllmAdapters(spec.adapters)
        self._sampling: dict[str, Any] = {}
        self._limits = SamplingLimits(None, self._adapters)
        self._converter: RequestConverter | None = None
        self._render: Callable[[Any], list[int]] | None = None
        self._num_ids: int | None = None  # of the vocabulary; None where the rank knows it
        self._skip_detokenize = False
        self._rows: dict[str, RunningRow] = {}  # by vLLM's id of the request
        self._num_finished_tokens = self._num_cached_tokens = 0
        self._num_finished_prompt_tokens = 0
        self._pooling: VllmPooling | None = None
        self._preemptions: dict[str, int] = {}  # preemptions of each running sequence that was preempted
        self._num_preemptions = 0
        self._device = DeviceMonitor(os.environ)
        self.num_engines, self.max_num_seqs, self.memory_fraction = spec.num_engines, 0, spec.memory_fraction

    def check_options(self) -> tuple[str, ...]:
        unknown = list(self._fields.find_unknown(self._spec))
        options, wrong_types = convert_types(self._spec.options)
        mistakes, notes = [*unknown, *wrong_types], list[str]()
        if not mistakes:
            try:
                on_cpu = current_platform.is_cpu()
                spec, shared = share_memory(options, self._spec, self._device, on_cpu=on_cpu)
                self.num_engines, self.memory_fraction = spec.num_engines, spec.memory_fraction
                self._config, notes = create_engine_config(spec, options, self._executor.backend, self._adapters)
                self.max_num_seqs = self._config.scheduler_config.max_num_seqs
                notes += shared
                mistakes += self._adapters.find_rejected(self._config.lora_config)
                mistakes += find_wrong_model(self._spec, self._config.model_config)
                mistakes += find_missing_processor(self._spec, self._config.model_config)
            except ConfigError as error:
                mistakes += error.mistakes
            except Exception as error:  # noqa: BLE001 - vLLM's errors have no common base
                reason = explain_hub_error(self._spec.model, error) or explain_failed_import(error)
                reason = reason or summarize_error(error)
                mistakes.append(f"vLLM rejects the model or an engine.* key: {reason}")
        if not unknown:
            mistakes += self._find_wrong_sampling()
        if mistakes:
            raise ConfigError(*mistakes)
        return tuple(notes)

    def load(self, agree_kv: AgreeKvFn) -> EngineInfo:
        assert self._config is not None
        SyncKvMixin.agree_kv, SyncKvMixin.has_agreed = agree_kv, False
        send_media_whole(self._config)
        # The constructor takes our executor class. The configuration takes only vLLM's own names, at least for
        # pipelines and external launchers.
        self._engine = LLMEngine(
            vllm_config=self._config,
            executor_class=self._executor,
            log_stats=False,
            usage_context=UsageContext.LLM_CLASS,
        )
        if not SyncKvMixin.has_agreed:
            agree_kv(0)  # a model without a KV cache, as encoders are: the other ranks wait for a number all the same
        self._adapters.load_all(self._engine)
        self._hooks = install_hooks(self._engine) if takes_hooks(vllm.__version__) else ()
        return describe_engine(self._engine.vllm_config)

    @property
    def pooled(self) -> PooledKind | None:
        return None if self._pooling is None else self._pooling.kind

    def begin_job(self, spec: EngineSpec) -> tuple[str, ...]:
        assert self._engine is not None
        self._engine.abort_request(list(self._rows))
        if self._pooling is not None:
            self._pooling.abort()
        self._spec, self._rows, self._preemptions, self._num_preemptions = spec, {}, {}, 0
        self._num_finished_tokens = self._num_cached_tokens = self._num_finished_prompt_tokens = 0
        if mistakes := list(self._fields.find_unknown(self._spec)) or list(self._find_wrong_sampling()):
            raise ConfigError(*mistakes)
        return ()

    def prepare_job(self, text_config: EngineTextConfig) -> None:
        parsers, prompt_config = text_config.parsers, text_config.prompt_config
        self._skip_detokenize = text_config.skip_detokenize
        generates_answers = self._spec.reads_requests and self._spec.pooling is None
        self._converter = self._make_converter(parsers) if generates_answers else None
        if self._spec.pooling is not None:
            assert self._engine is not None
            self._pooling = VllmPooling(self._engine, self._spec.pooling)
        self._render = self._num_ids = None
        if prompt_config is not None:
            from dpgen.engine.vllm.vllm_render import VllmRenderer, count_vocabulary

            self._render = VllmRenderer(self._engine, prompt_config).render
            self._num_ids = count_vocabulary(self._engine)

    def add_request(self, request: Request) -> None:
        assert self._engine is not None
        if self._pooling is not None:
            self._add_pooling(self._pooling, request)
            return
        params, token_ids, reasoning = self._prepare(request)
        params.skip_clone = True  # no other row shares them, and a copy takes longer than all else here
        # Only stop strings need the text before the row's end. Only vLLM can leave out spaces between special tokens.
        has_plain_spacing = params.skip_special_tokens or params.spaces_between_special_tokens
        is_scored = request.num_completion_tokens > 0
        is_decoded_by_rank = self._skip_detokenize and params.detokenize and not params.stop and has_plain_spacing
        is_decoded_by_rank = is_decoded_by_rank and token_ids is request.prompt_token_ids
        params.detokenize = params.detokenize and not (is_decoded_by_rank or is_scored)
        params.flat_logprobs = True  # no object for each log-probability
        name, source = format_id(request.id), request.server_request
        self._rows[name] = RunningRow(
            request.id,
            params,
            is_decoded_by_rank,
            request.num_completion_tokens,
            keeps_token_ids=self._spec.token_ids or bool(source and source.body.get("return_token_ids")),
            keeps_prompt=not is_scored or self._sampling.get("prompt_logprobs") is not None,
            keeps_stop_reason=source is not None,
        )
        try:
            adapter = self._adapters.get_request(request.adapter)
            prompt: Any = make_engine_prompt(request, token_ids)
            if reasoning is not None:
                prompt = make_core_request(self._engine, name, prompt, params, adapter, reasoning)
            self._engine.add_request(name, prompt, params, lora_request=adapter)
        except Exception as error:  # noqa: BLE001 - foreign code over a row's own values: one bad row costs one row
            del self._rows[name]
            self._engine.abort_request([name])  # vLLM may have added a part of it
            default = "bad_sampling" if request.media is None else "unsupported_content"
            default = "engine_refused" if isinstance(error, DpgenError) else default  # this host's fault, not the row's
            error_type = classify_rejection(error, len(token_ids), self._max_model_len, default)
            raise RowRefused(error_type, summarize_error(error)) from None

    def step(self) -> list[RowResult | UndecodedRow]:
        assert self._engine is not None
        outputs = self._engine.step()
        if self._pooling is not None:
            results = [self._read_pooling(output) for output in outputs if isinstance(output, PoolingRequestOutput)]
            return [result for result in results if result is not None]
        return [self._to_result(output) for output in outputs if isinstance(output, RequestOutput) and output.finished]

    def has_unfinished_requests(self) -> bool:
        return self._engine is not None and self._engine.has_unfinished_requests()

    def stats(self) -> EngineStats:
        assert self._engine is not None
        states = self._engine.output_processor.request_states.values()
        num_running_tokens = sum(s.detokenizer.num_output_tokens() for s in states if s.detokenizer is not None)
        scheduler = self._engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]
        num_running, num_waiting = scheduler.get_request_counts()
        self._count_preemptions(scheduler.requests)
        return EngineStats(
            self._num_finished_tokens + num_running_tokens,
            num_running,
            num_waiting,
            self._num_preemptions,
            self._num_cached_tokens,
            self._num_finished_prompt_tokens
            + self._num_finished_tokens
            + sum(request.num_computed_tokens for request in scheduler.requests.values()),
            round(scheduler.kv_cache_manager.usage, 4),
            device_busy=self._device.measure_busy(),
        )

    def close(self) -> None:
        assert self._config is not None
        # With one device and no external cache, everything is in this process and ends with it. vLLM's own shutdown
        # would scan the heap for a second.
        has_external_cache = self._config.kv_transfer_config or self._config.ec_transfer_config
        if self._engine is not None and (self._executor is not SyncKvUniProcExecutor or has_external_cache):
            self._engine.engine_core.shutdown()

    @property
    def _executor(self) -> Any:  # a class; mypy takes vLLM's for Any
        if self._spec.world is not None:
            return SyncKvExternalExecutor
        num_devices = self._spec.tensor_parallel_size * self._spec.pipeline_parallel_size
        return SyncKvUniProcExecutor if num_devices == 1 else SyncKvMultiprocExecutor

    @property
    def _max_model_len(self) -> int:
        assert self._engine is not None
        return int(self._engine.vllm_config.model_config.max_model_len)

    def _count_preemptions(self, requests: dict[str, Any]) -> None:
        """Add preemptions since the last call; those of a sequence between this call and its end stay uncounted.

        vLLM itself counts them only for its own log.
        """
        before, self._preemptions = self._preemptions, {}
        for name, request in requests.items():
            if request.num_preemptions:
                self._preemptions[name] = request.num_preemptions
                self._num_preemptions += request.num_preemptions - before.get(name, 0)

    def _find_wrong_sampling(self) -> Iterator[str]:
        """Yield one line for each sampling section that vLLM rejects."""
        if self._spec.pooling is not None:
            return
        self._sampling, self._limits = self._build_default_sampling(), SamplingLimits(self._config, self._adapters)
        for section, entry in self._spec.iter_sampling_sections():
            given = entry.get("structured_outputs")
            name = name_constraint(section, given, is_output_schema=self._spec.has_output_schema)
            others = {**self._sampling, **entry, "structured_outputs": None}
            mistakes = list(self._find_rejected(f"a {section}.* key", others))
            if given is not None:
                mistakes += self._find_rejected(name, {"structured_outputs": given})
            yield from mistakes
            if mistakes and section == "sampling":
                return  # each entry stands over it, and would be rejected too

    def _find_rejected(self, name: str, fields: dict[str, Any]) -> Iterator[str]:
        """Yield a line if vLLM rejects fields of sampling.

        Args:
            name: of their key, for the line.
        """
        try:
            params = self._params.validate_python(fields)
            self._limits.apply(params)
            if self._config is not None:
                check_params(params, self._config)
        except Exception as error:  # noqa: BLE001 - vLLM's errors have no common base
            yield f"vLLM rejects {name}: {summarize_error(error)}"

    def _build_default_sampling(self) -> dict[str, Any]:
        """Return the run's sampling over the model's generation config (as in `LLM.get_default_sampling_params`)."""
        of_model = {} if self._config is None else self._config.model_config.get_diff_sampling_param()
        return {**of_model, **self._spec.sampling, "output_kind": RequestOutputKind.FINAL_ONLY}

    def _prepare(self, request: Request) -> tuple[SamplingParams, list[int], ReasoningState | None]:
        """Return a row's sampling parameters, its prompt, and the state of its reasoning.

        Raises:
            RowRefused: vLLM rejects one of them.
        """
        token_ids = self._find_token_ids(request)
        if request.server_request is None:
            return self._build_params(request), token_ids, None
        assert self._converter is not None
        converted = self._converter.convert(request, token_ids)
        try:
            self._limits.apply(converted.params)
        except ValueError as error:
            raise RowRefused(BAD_REQUEST, str(error)) from None
        return converted

    def _make_converter(self, parsers: RequestParsers) -> RequestConverter:
        """Return the converter of requests, given the run's parsers.

        Raises:
            ConfigError: vLLM has no such parser, or can't use it with this model.
        """
        from dpgen.engine.vllm.server_requests import RequestConverter  # of vLLM's server, whose modules move

        assert self._engine is not None
        model, tokenizer = self._engine.vllm_config.model_config, self._engine.renderer.tokenizer
        config = TokenizerConfig.from_engine(self._spec.model, self._spec.options)
        try:
            parser_class = find_parser_class(parsers, config, tokenizer)
        except Exception as error:  # noqa: BLE001 - vLLM's errors have no common base
            raise ConfigError(f"vLLM rejects a parser in output.*: {summarize_error(error)}") from None
        maker = None if parser_class is None else ParserMaker(parser_class, tokenizer, parsers.template_kwargs, model)
        return RequestConverter(model, tokenizer, self._spec.sampling, self._spec.retry_sampling, maker)

    def _build_params(self, request: Request) -> SamplingParams:
        fields = self._spec.resolve_sampling(self._sampling, request)
        if request.num_completion_tokens:
            fields["prompt_logprobs"] = fields.get("prompt_logprobs") or 0
        try:
            fields["structured_outputs"] = parse_json_text(fields.get("structured_outputs"))
            own = {**request.sampling, "structured_outputs": fields["structured_outputs"]}
            if (unknown := self._fields.find_unknown_of_request(own)) is not None:
                raise ValueError(unknown)
            params = self._params.validate_python(fields)
            assert isinstance(params, SamplingParams)
            self._limits.apply(params)
        except Exception as error:  # noqa: BLE001 - as in `add_request`
            raise RowRefused("bad_sampling", summarize_error(error)) from None
        return params

    def _add_pooling(self, pooling: VllmPooling, request: Request) -> None:
        token_ids = self._find_token_ids(request)
        try:
            pooling.add(format_id(request.id), request, token_ids, self._adapters.get_request(request.adapter))
        except RowRefused:
            raise
        except Exception as error:  # noqa: BLE001 - as in `add_request`
            longest = max(request.pooling.lengths, default=len(token_ids)) if request.pooling else len(token_ids)
            error_type = classify_rejection(error, longest, self._max_model_len + 1, default="bad_request")
            raise RowRefused(error_type, summarize_error(error)) from None

    def _read_pooling(self, output: PoolingRequestOutput[Any]) -> RowResult | None:
        assert self._pooling is not None
        self._num_cached_tokens += output.num_cached_tokens or 0
        self._num_finished_prompt_tokens += len(output.prompt_token_ids or ())
        return self._pooling.read(output)

    def _find_token_ids(self, request: Request) -> list[int]:
        """Return a row's prompt.

        Raises:
            RowRefused: it has none, or not of this vocabulary; or it has no media for the model's encoder.
        """
        assert self._config is not None
        require_media(request, self._config.model_config)
        token_ids = request.prompt_token_ids
        if token_ids is None:
            assert self._render is not None
            return self._render(request.prompt)
        if self._num_ids is not None and request.media is None:  # vLLM knows the tokens that stand for media
            reject_unknown_ids(token_ids, self._num_ids)
        return token_ids

    def _to_result(self, output: RequestOutput) -> RowResult | UndecodedRow:
        self._num_cached_tokens += output.num_cached_tokens or 0
        self._num_finished_prompt_tokens += len(output.prompt_token_ids or ()) * max(1, len(output.outputs))
        self._num_finished_tokens += sum(len(sample.token_ids) for sample in output.outputs)
        return read_result(output, self._rows.pop(output.request_id))
