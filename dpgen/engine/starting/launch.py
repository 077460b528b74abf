"""Prepare this rank's engine: its spec, its devices and environment, and the work on text around it.

- Takes the whole `Config`, and gives each collaborator the part that it needs.
- Never loads CUDA.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dpgen.config.schema import Config
from dpgen.config.sections import ParallelConfig
from dpgen.data.detokenize import Detokenizer, fast_tokenizer
from dpgen.data.input_rows import InputRows
from dpgen.data.media.parts import find_media
from dpgen.data.prompts.chat_template import check_chat_without_tokenizer
from dpgen.data.prompts.pooling import PoolingContext
from dpgen.data.prompts.render import (
    Prompt,
    PromptRenderer,
    RenderedPrompt,
    RenderFn,
    add_server_requests,
    describe_own_kwargs,
)
from dpgen.data.prompts.row_texts import find_completion
from dpgen.data.tokenizer import TokenizerConfig, find_reason_to_tokenize_in_engine, load_tokenizer
from dpgen.distributed.group import RankGroup
from dpgen.distributed.layout import EngineWorld, Layout, build_engine_world
from dpgen.distributed.topology import Topology
from dpgen.engine.adapters import find_adapter_folders
from dpgen.engine.checking.completion_checker import CompletionChecker, start_completion_checker
from dpgen.engine.keeping.keeper import EngineKeeper
from dpgen.engine.media.preparer import MediaPreparer
from dpgen.engine.messages import EngineInfo, EngineSpec, EngineTextConfig, RequestParsers
from dpgen.engine.parsing.completion_parser import CompletionParser, ToolFinder, start_completion_parser
from dpgen.engine.pool.engine_pool import EnginePool
from dpgen.engine.starting.engine_starter import EngineStarter, find_placement, plan_engines
from dpgen.engine.starting.limits import EngineLimits
from dpgen.engine.starting.log_file import EngineLog
from dpgen.engine.starting.model_files import check_model_on_node, expand_model_path, measure_weights_per_device
from dpgen.engine.starting.pooling_text import (
    make_fake_pooling_renderer,
    make_pooling_renderer,
    wrap_untokenized_prompts,
)
from dpgen.errors import ConfigError

logger = logging.getLogger(__name__)

_WARNINGS = "dpgen/engine_warnings"  # store key: below it, for each warning, the number of ranks that have it


def build_engine_spec(config: Config, topology: Topology, world: EngineWorld | None) -> EngineSpec:
    """Return the spec of this rank's engine.

    Raises:
        ConfigError: an adapter's folder is not there.
    """
    return EngineSpec(
        kind=config.run.engine,
        model=expand_model_path(config),
        options=dict(config.engine),
        sampling=config.sampling_fields,
        sampling_columns=tuple(config.sampling_columns),
        sampling_by_rank=tuple(config.sampling_by_rank),
        tensor_parallel_size=config.parallel.tensor_parallel_size,
        pipeline_parallel_size=config.parallel.pipeline_parallel_size,
        local_size=topology.local_size,
        enable_expert_parallel=config.parallel.enable_expert_parallel,
        world=world,
        # Of responses, those have token ids whose requests ask for them.
        token_ids=config.output.token_ids
        or config.check.continue_truncated
        or (config.keeps_logprobs and config.output.format != "openai_batch"),
        retry_sampling=dict(config.check.retry_sampling),
        adapters=find_adapter_folders(config.lora) if config.run.engine == "vllm" else dict(config.lora),
        has_output_schema=config.output.schema is not None,
        reads_requests=config.reads_requests,
        weight_bytes=measure_weights_per_device(config, world),
        reasoning_parser=config.output.reasoning_parser_or_none,
        pooling=config.pooling,
        takes_media=config.prompt.has_media_columns,
    )


def make_engine_factory(
    config: Config, topology: Topology, group: RankGroup, world: EngineWorld | None, log: EngineLog
) -> EngineStarter:
    """Return a function that starts an engine on this rank's share of its node's devices. Collective.

    Raises:
        ConfigError: files of the model or an adapter are not there or not whole, or the node has too few GPUs for its
            ranks.
    """
    group.run_on_all_ranks(lambda: check_model_on_node(config, is_node_leader=group.is_node_leader))
    affinities = [frozenset(cores) for cores in group.all_gather_object(sorted(os.sched_getaffinity(0)))]
    node = group.nodes[group.rank]
    on_node = [cores for rank, cores in enumerate(affinities) if group.nodes[rank] == node]
    placement = group.run_on_all_ranks(lambda: find_placement(config, topology, on_node, world))
    log.share(lambda key: group.checked_store.add(f"{_WARNINGS}/{key}", 1) == 1)
    return EngineStarter(placement, log)


def prepare_engine(
    config: Config,
    topology: Topology,
    layout: Layout,
    group: RankGroup,
    log: EngineLog,
    keeper: EngineKeeper,
) -> Callable[[], EnginePool]:
    """Return a function that starts this rank's engines: the first one's process. Collective.

    The process checks its options, and then waits to load the model.

    Args:
        keeper: may have an engine with the model, or one that imports vLLM.

    Raises:
        ConfigError: see `make_engine_factory`.
    """
    world = build_engine_world(topology, layout, group)
    starter = make_engine_factory(config, topology, group, world, log)
    start = keeper.wrap_start(replace(starter, take_early=keeper.early.take), log)
    spec = group.run_on_all_ranks(lambda: build_engine_spec(config, topology, world))
    count, engine_bytes, max_engines = keeper.count, 0, keeper.max_engines
    if count is None:
        count, engine_bytes = plan_engines(config, spec.weight_bytes, starter.placement)
        max_engines = count.number
    spec = replace(
        spec,
        num_sharing=starter.placement.num_sharing,
        num_engines=max_engines,
        is_num_engines_auto=count.is_auto,
        is_measured=count.is_auto,
        engine_bytes=engine_bytes,
    )
    limits = EngineLimits.from_config(config.run)

    def start_engines() -> EnginePool:
        pool = EnginePool(start, spec, limits, count, can_restart=world is None)
        pool.start_s = keeper.start_s
        return pool

    return start_engines


def check_engine_options(engine: EnginePool, config: ParallelConfig, group: RankGroup) -> None:
    """Check the engine's options before a model loads. Collective.

    Raises:
        ConfigError: vLLM rejects one.
    """
    if config.lock_step and not config.enable_expert_parallel:
        logger.info("parallel.lock_step=true: engines wait for each other at every step, which only costs time here")
    for note in group.run_on_all_ranks(lambda: engine.check_options(group.raise_if_peer_failed)):
        logger.info(note)


@dataclass(frozen=True)
class TextPipeline:
    """Divide the work on text between the rank and its engine.

    Attributes:
        render: makes a row's prompt: token ids, or the text or messages that the engine tokenizes.
        detokenizer: makes the text of finished rows; None where the engine does so.
        engine_text_config: the engine's part.
        parser: parses the texts of finished rows; None where they stay as they are.
        checker: checks these texts; None where all pass.
        decode: returns the text of any token ids, special tokens included; None where only the engine can.
        tokenizer: of transformers; None where the engine, or the fake engine, has another.
        engine_reason: why the engine tokenizes; None where the rank does.
        pooling_context: what the rank has to know of a pooling model, once that is loaded; None to generate text.
        preparer: prepares requests with media; None where no process may be started, and for pooling models.
    """

    render: RenderFn
    detokenizer: Detokenizer | None = None
    engine_text_config: EngineTextConfig = field(default_factory=EngineTextConfig)
    parser: CompletionParser | None = None
    checker: CompletionChecker | None = None
    decode: Callable[[Sequence[int]], str] | None = None
    tokenizer: Any = None
    engine_reason: str | None = None
    pooling_context: PoolingContext | None = None
    preparer: MediaPreparer | None = None

    def wait_until_ready(self, on_wait: Callable[[], None]) -> Mapping[str, Any]:
        """Wait for the parser and the checks, and return the fields of SamplingParams that the parser needs.

        Raises:
            ConfigError: vLLM has no such parser, or it doesn't fit the model; or a check can't be made.
        """
        if self.checker is not None:
            self.checker.wait_until_ready(on_wait)
        return {} if self.parser is None else self.parser.wait_until_ready(on_wait).sampling

    def describe_model(self, info: EngineInfo) -> None:
        """Take what rendering needs to know of the loaded model."""
        if self.pooling_context is not None and info.pooled is not None:
            self.pooling_context.max_model_len = info.max_model_len
            self.pooling_context.score_type = info.pooled.score_type
            self.pooling_context.uses_separator = info.pooled.uses_separator

    def close(self) -> None:
        """End the processes of the parser, the checks and the media."""
        for workers in (self.parser, self.checker, self.preparer):
            if workers is not None:
                workers.close()


def build_text_pipeline(config: Config, log: EngineLog, rows: InputRows) -> TextPipeline:
    """Load the tokenizer, decide which process tokenizes and which one detokenizes, and start the parser and checks.

    Args:
        log: takes what the parser's and the checks' processes print.
        rows: the input, of which parsers need the tools that each row offered, and checks the rows.

    Raises:
        ConfigError: see `load_text_steps`.
    """
    steps = load_text_steps(config, rows)
    if steps.engine_reason and not config.data.token_ids_column:
        logger.info(f"prompts are tokenized in the engine process: {steps.engine_reason}")
    tokenizer = None if config.run.engine == "fake" else _find_tokenizer(config)
    tools, check, output = ToolFinder(config.prompt, rows), config.check, config.output
    parser = start_completion_parser(output, check, tokenizer, tools, log.write)
    return replace(steps, parser=parser, checker=start_completion_checker(check, output, rows, log.write))


def load_text_steps(config: Config, rows: InputRows) -> TextPipeline:
    """Return the text pipeline without a parser and checks: it starts no process.

    Raises:
        ConfigError: the tokenizer cannot be loaded, or prompts are chats and there is no chat template.
    """
    prompt, has_added_nulls = config.prompt, rows.has_added_nulls
    output, pooling = config.output, config.pooling
    parsers = RequestParsers(output.tool_parser, output.reasoning_parser_or_none, prompt.chat_template_kwargs)
    if config.run.engine == "fake":
        return _build_fake_text_pipeline(config, has_added_nulls)
    tokenizer_config, has_token_ids = _find_tokenizer(config), prompt.token_ids_column is not None
    needs_no_tokenizer = has_token_ids and bool(config.engine.get("skip_tokenizer_init"))
    reason = "" if needs_no_tokenizer else find_reason_to_tokenize_in_engine(tokenizer_config)
    if reason is not None:
        is_continued = config.check.continue_truncated and not has_token_ids
        if prompt.completion_column is not None or is_continued:
            key = "check.continue_truncated" if is_continued else "data.completion_column"
            raise ConfigError(f"{key} needs a tokenizer that transformers can load{reason and f': {reason}'}")
        untokenized = PromptRenderer(prompt, None, has_added_nulls=has_added_nulls)
        render: RenderFn = untokenized.render_untokenized
        if pooling is not None:
            render = wrap_untokenized_prompts(render, pooling, prompt, reason)
        return TextPipeline(
            add_server_requests(render, prompt),
            engine_text_config=EngineTextConfig(prompt_config=prompt, parsers=parsers),
            engine_reason=reason,
        )
    tokenizer = load_tokenizer(tokenizer_config)
    renderer = PromptRenderer(prompt, tokenizer, has_added_nulls=has_added_nulls)
    if pooling is not None:
        context = PoolingContext()
        pooling_renderer = make_pooling_renderer(config, tokenizer, renderer, context)
        return TextPipeline(
            pooling_renderer.render, decode=tokenizer.decode, tokenizer=tokenizer, pooling_context=context
        )
    fast = fast_tokenizer(tokenizer)
    return TextPipeline(
        add_server_requests(renderer.render, prompt),
        None if fast is None else Detokenizer(fast),
        EngineTextConfig(skip_detokenize=fast is not None, parsers=parsers),
        decode=tokenizer.decode,
        tokenizer=tokenizer,
    )


def _find_tokenizer(config: Config) -> TokenizerConfig:
    return TokenizerConfig.from_engine(expand_model_path(config), config.engine)


def _build_fake_text_pipeline(config: Config, has_added_nulls: bool) -> TextPipeline:
    from dpgen.engine.fake_backend import FakeTokenizer, decode

    prompt_config = config.prompt
    if prompt_config.is_chat and (note := check_chat_without_tokenizer(prompt_config, config.model)):
        logger.info(f"run.engine=fake: {note}")
    fake, renderer = FakeTokenizer(), PromptRenderer(prompt_config, None, has_added_nulls=has_added_nulls)

    def tokenize(prompt: Prompt) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        if isinstance(prompt, str):
            return fake.encode(prompt)
        assert isinstance(prompt, dict), "prompts with media are left to workers"
        return fake.encode(f"{describe_own_kwargs(prompt_config, prompt)}{prompt['messages']}")

    if config.pooling is not None:
        context = PoolingContext()
        render_pooled = make_fake_pooling_renderer(config, tokenize, renderer, context).render
        return TextPipeline(render_pooled, decode=decode, pooling_context=context)

    def render(row: Mapping[str, Any]) -> RenderedPrompt:
        given = find_completion(row, prompt_config)
        completion = [] if given is None else fake.encode(given)
        prompt = renderer.build_prompt(row)
        if find_media(prompt):
            return RenderedPrompt(None, prompt)
        return RenderedPrompt(tokenize(prompt) + completion, num_completion_tokens=len(completion))

    return TextPipeline(add_server_requests(render, prompt_config), decode=decode)
