"""Declare the whole configuration: its sections (see `sections`), the keys beside them, and what must fit together.

- A `Config` is frozen and checked when it is made; `dpgen.config.loader` makes one from files and arguments.
- Importing this module loads nothing heavy: no torch, vLLM, datasets, transformers, omegaconf or yaml.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dpgen.config import checks, completion_checks, program
from dpgen.config.completion_checks import CheckConfig
from dpgen.config.media.media_checks import find_wrong_media_use, find_wrong_media_values
from dpgen.config.pooling.pooling_config import (
    GENERATE,
    PoolingConfig,
    find_wrong_task_input,
    find_wrong_task_keys,
    has_misplaced_pair,
)
from dpgen.config.program import ProgramConfig
from dpgen.config.prompt import CALL_COLUMN, REQUEST_COLUMN, PromptConfig
from dpgen.config.secrets import redact_secrets
from dpgen.config.sections import (
    MISSING,
    DataConfig,
    OutputConfig,
    ParallelConfig,
    RunConfig,
    WorkConfig,
    option,
)
from dpgen.config.text_files import escape_file_name
from dpgen.config.vllm.engine_numbers import find_wrong_engine_numbers, read_engine_numbers
from dpgen.errors import ConfigError

_MAX_NUMBER = 2**63  # libraries hold sizes in 64 bits
_MAX_SECONDS = 1e9  # 30 years; a timer of the system takes no more


@dataclass(frozen=True)
class Config:
    """Hold the configuration of a whole run, section by section.

    Raises:
        ConfigError: values that are wrong or contradict each other; all of them at once.
    """

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: str = option("the model: a directory, or a Hub name; required", MISSING)
    task: Literal["generate", "embed", "classify", "score", "reward"] = option(
        "what the model makes of a row: generate, text; embed, a vector (column embedding); classify, its classes' "
        "probabilities (probs) and the likeliest class (label); score, how well the texts of a pair go together "
        "(score), by a cross-encoder or as the cosine of embeddings; reward, a reward model's number (reward)",
        "generate",
    )
    engine: dict[str, Any] = option(
        "any field of vLLM's EngineArgs, passed through, e.g. {max_model_len: 8192}", factory=dict
    )
    lora: dict[str, str] = option(
        "LoRA adapters of the model, by name: {math: adapters/math}, each a directory or a Hub name; their ranks come "
        "from their own configurations; one alone is used for all rows, unless data.lora_column is set; several need "
        "data.lora_column, or a batch file, whose lines name the model or one of them",
        factory=dict,
    )
    sampling: dict[str, Any] = option(
        "any field of vLLM's SamplingParams, passed through, over the model's generation config; max_tokens is the "
        "rest of the context unless one of them gives it; sampling.from_columns takes fields from columns: "
        "{max_tokens: budget}; logprobs: k and prompt_logprobs: k add columns of log-probabilities",
        factory=dict,
    )
    sampling_by_rank: list[dict[str, Any]] = option(
        "a list of further sampling sections, each over sampling and under sampling.from_columns, e.g. "
        "[{temperature: 0.2}, {temperature: 0.9}]; row i takes entry i modulo their number, whichever rank generates "
        "it: with as many ranks as entries, the entry of the rank in whose shard the row is on a first attempt",
        factory=list,
    )
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    work: WorkConfig = field(default_factory=WorkConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    check: CheckConfig = field(default_factory=CheckConfig)
    program: ProgramConfig = field(default_factory=ProgramConfig)

    def __post_init__(self) -> None:
        if self.program.is_used and self.data.format == "auto":  # its rows are no requests, whatever they look like
            object.__setattr__(self, "data", dataclasses.replace(self.data, format="rows"))
        object.__setattr__(self, "engine", read_engine_numbers(self.engine))
        _validate(self)

    @property
    def sampling_fields(self) -> dict[str, Any]:
        """Return the fields of SamplingParams that are the same for every row."""
        fields = {key: value for key, value in self.sampling.items() if key != "from_columns"}
        if self.output.schema is not None:
            fields["structured_outputs"] = {**(fields.get("structured_outputs") or {}), "json": self.output.schema}
        return fields

    @property
    def sampling_columns(self) -> dict[str, str]:
        """Return the column that gives a field of SamplingParams row by row, by the field's name."""
        return dict(self.sampling.get("from_columns") or {})

    @property
    def has_samples(self) -> bool:
        """Return True if rows may have several samples."""
        may_have = self.sampling.get("n", 1) != 1 or "n" in self.sampling_columns or self.reads_requests
        return self.task == GENERATE and may_have

    @property
    def keeps_logprobs(self) -> bool:
        """Return True if any row may have log-probabilities of its prompt or its generated tokens."""
        sections = [self.sampling, self.sampling_columns, *self.sampling_by_rank]
        is_asked_for = any(section.get(name) is not None for section in sections for name in checks.LOGPROB_FIELDS)
        return self.task == GENERATE and (self.reads_requests or is_asked_for)

    @property
    def reads_requests(self) -> bool:
        """Return True if the input is a batch file, or if only its content tells; see `data.format`."""
        return checks.may_hold_requests(self.data)

    @property
    def reads_prefix_cache(self) -> bool:
        """Return True if vLLM may reuse the cache of an earlier prompt: it does not for prompts' log-probabilities."""
        scores_prompts = self.data.completion_column is not None or self.sampling.get("prompt_logprobs") is not None
        return bool(self.engine.get("enable_prefix_caching", True)) and not scores_prompts

    @property
    def pooling(self) -> PoolingConfig | None:
        """Return the keys of a task that pools hidden states; None where text is generated."""
        if self.task == GENERATE:
            return None
        output = self.output
        return PoolingConfig(
            self.task,
            self.data.too_long,
            output.embedding_dtype,
            output.dimensions,
            output.normalize,
            output.reward_per,
        )

    @property
    def prompt(self) -> PromptConfig:
        """Return the keys of `data` that decide how a row becomes a prompt.

        Raises:
            ConfigError: these keys contradict each other.
        """
        internal = ("request_column", "call_column")
        names = [key.name for key in dataclasses.fields(PromptConfig) if key.name not in internal]
        request_column = REQUEST_COLUMN if self.reads_requests else None
        call_column = CALL_COLUMN if self.program.is_used else None
        of_data = {name: getattr(self.data, name) for name in names}
        return PromptConfig(**of_data, request_column=request_column, call_column=call_column)

    @property
    def gpus_per_rank(self) -> int:
        """Return the number of GPUs that one launched process drives."""
        if self.parallel.launcher == "external":
            return 1
        return self.parallel.tensor_parallel_size * self.parallel.pipeline_parallel_size


def find_wrong_values(sections: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each value that is wrong by itself, whatever the other keys say.

    Args:
        sections: the fields of a `Config`, by name.
    """
    for key, declared in iter_options():
        section, _, name = key.partition(".")
        value = getattr(sections[section], name) if name else sections[section]
        minimum = declared.metadata["minimum"]
        if minimum is not None and value is not None and (math.isnan(value) or value < minimum):
            yield f"{key}={value}: must be at least {minimum}"
        limit = _MAX_SECONDS if key.endswith("_s") else _MAX_NUMBER
        if isinstance(value, (int, float)) and value >= limit and key != "run.seed":
            yield f"{key}={value}: must be below {limit:g}"
        if (
            value == "" and declared.type == "str | None" and key != "data.system_prompt"
        ):  # an empty variable of a shell
            yield f"{key}='': must be a text, or null for none"
    yield from checks.find_wrong_run_values(sections["run"])
    yield from checks.find_wrong_input(sections["data"], sections["model"])
    yield from find_wrong_media_values(sections["data"])
    yield from checks.find_wrong_output(sections["output"])
    yield from checks.find_wrong_engine_keys(sections["engine"])
    yield from find_wrong_engine_numbers(sections["engine"])
    yield from checks.find_wrong_parallel_values(sections["parallel"])
    yield from checks.find_wrong_adapters(sections["lora"])
    yield from checks.find_wrong_sampling(sections["sampling"], sections["sampling_by_rank"])
    yield from checks.find_wrong_logprobs(sections["engine"], sections["sampling"], sections["sampling_by_rank"])
    yield from checks.find_wrong_output_schema(sections["output"], sections["sampling"], sections["sampling_by_rank"])
    yield from completion_checks.find_wrong_check_values(sections["check"], CheckConfig())
    yield from program.find_wrong_program_values(sections["program"], ProgramConfig())
    if sections["program"].is_used:
        yield from program.find_keys_without_effect_on_programs(sections, DataConfig(), OutputConfig())
    yield from find_wrong_task_keys(sections["task"], sections, DataConfig(), OutputConfig())
    if sections["data"].completion_column is not None and sections["task"] == GENERATE:
        yield from checks.find_keys_without_effect_on_scores(sections, OutputConfig())


def to_sections(config: Config) -> dict[str, Any]:
    """Return the resolved configuration as a file would hold it, without values that look like secrets."""
    sections = dataclasses.asdict(config)
    sections["data"] = {key: escape_file_name(key, value) for key, value in sections["data"].items()}
    redacted: dict[str, Any] = redact_secrets(sections)
    return redacted


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML, without values that look like secrets."""
    from dpgen.config.yaml import yaml12

    return yaml12.dump(to_sections(config))


def iter_options() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yield every legal key in order, as (dotted name, its field)."""
    for section in dataclasses.fields(Config):
        if "help" in section.metadata:
            yield section.name, section
            continue
        for declared in dataclasses.fields(section.default_factory):  # type: ignore[arg-type]
            yield f"{section.name}.{declared.name}", declared


def _validate(config: Config) -> None:
    mistakes = list(find_wrong_values(vars(config)))
    if config.parallel.lock_step and config.parallel.launcher != "external":
        mistakes.append("parallel.lock_step=true needs parallel.launcher=external: other engines never step together")
    if config.output.messages and not config.output.explode and config.has_samples:
        mistakes.append("output.messages=true makes one conversation a row: set output.explode=true where n is not 1")
    if config.output.reasoning == "keep" and config.output.reasoning_parser != "auto":
        mistakes.append("output.reasoning_parser has no effect: set output.reasoning=split or strip")
    if config.check.continue_truncated:
        sections = [config.sampling_fields, config.sampling_columns, *config.sampling_by_rank]
        if any(section.get("structured_outputs") is not None for section in sections):
            mistakes.append(
                "check.continue_truncated=true can't continue a text of output.schema or structured_outputs, whose "
                "grammar would begin anew: raise sampling.max_tokens, or check.retry_sampling.max_tokens"
            )
    if not config.reads_requests:
        mistakes += checks.find_wrong_adapter_choice(config.lora, config.data.lora_column)
    mistakes += checks.find_wrong_response_keys(config.output, OutputConfig(), config.data)
    if config.data.format == "openai_batch":
        mistakes += checks.find_keys_without_effect_on_requests(config.data, DataConfig(), config.sampling)
    try:
        is_batch = config.data.format == "openai_batch"
        mistakes += find_wrong_task_input(config.task, config.prompt, is_batch=is_batch)
        mistakes += find_wrong_media_use(config.prompt, config.task)
        if not config.prompt.is_chat and config.output.messages and not config.program.is_used:
            mistakes.append("output.messages=true needs a chat: set data.messages_column, or data.as_chat=true")
    except ConfigError as error:
        if not has_misplaced_pair(config.task, config.data):  # one mistake, which the lines above name
            mistakes += error.mistakes
    if mistakes:
        raise ConfigError(*mistakes)
