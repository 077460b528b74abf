"""Declare every key of the configuration: its default, help and limits.

- A `Config` is frozen and checked when it is made; `dpgen.config.loader` makes one from files and arguments.
- Each field carries its help, so `--help` and conf/reference.yaml can't drift from the code (tests compare them).
- Importing this module loads nothing heavy: no torch, vLLM, datasets, transformers, omegaconf or yaml.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dpgen.config import checks
from dpgen.config.prompt import PromptConfig
from dpgen.config.secrets import redact_secrets
from dpgen.config.text_files import escape_file_name
from dpgen.errors import ConfigError

_MAX_NUMBER = 2**63  # libraries hold sizes in 64 bits
_MAX_SECONDS = 1e9  # 30 years; a timer of the system takes no more
MISSING = "???"  # OmegaConf's mark of a value that must be given


def _option(help: str, default: Any = None, *, factory: Any = None, minimum: float | None = None) -> Any:
    metadata = {"help": help, "minimum": minimum}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunConfig:
    """Hold `run.*`: where the run lives and how it behaves."""

    dir: str = _option("the run directory: journal, result and report; required", MISSING)
    seed: int | None = _option(
        "seed of the run; the seed of a row is derived from it, the row's index and the sample's index; "
        "null leaves sampling unseeded (and not reproducible)",
        0,
    )
    resume: Literal["auto", "never", "force"] = _option(
        "if the run directory holds an unfinished run: auto resumes it if nothing that changes results differs, "
        "force resumes it whatever differs but the input, never rejects any directory that is not empty (but a job "
        "that torchrun --max-restarts or SLURM restarts resumes its own run)",
        "auto",
    )
    retry_errors: Any = _option(
        "generate failed rows again: true, or the error types to retry, e.g. [poison_row]; also in a finished run",
        False,
    )
    engine: Literal["vllm", "fake"] = _option(
        "what generates: vllm, or fake, a stand-in without a model to try a configuration with", "vllm"
    )
    log_level: Literal["debug", "info", "warning", "error"] = _option(
        "the lowest level of the engine's log lines that are shown on the terminal; all of the engine's lines are in "
        "RUN_DIR/logs/rank-N.engine.log",
        "warning",
    )
    log_format: Literal["text", "json"] = _option(
        "of dpgen's log lines: text for people, json for one JSON object a line", "text"
    )
    engine_timeout_s: float = _option(
        "restart an engine that has work but makes no progress for this many seconds, since it hangs",
        600.0,
        minimum=1,
    )
    engine_start_timeout_s: float = _option(
        "the same while it starts: seconds for importing vLLM, and again for loading the model", 3600.0, minimum=1
    )
    max_engine_deaths: int = _option(
        "abandon an engine after this many deaths in a row without a finished row between them; other ranks take "
        "its rows",
        8,
        minimum=1,
    )
    time_limit: str | None = _option("stop after this time, resumable: seconds, or 'H:MM:SS' (in quotes, for YAML)")
    stop_margin_s: float = _option("seconds before SLURM's end time at which the run stops", 60.0, minimum=0)
    progress_interval_s: float = _option("seconds between progress lines where there is no terminal", 30.0, minimum=0.1)
    max_leading_errors: int = _option(
        "stop the run if its first rows all fail, this many of them and a few from the rest of the order, since then "
        "the fault is not in the rows; 0: never; without effect once a row of the run has succeeded",
        100,
        minimum=0,
    )
    allow_all_errors: bool = _option("end with status 0 also if no row of the run has succeeded", False)


@dataclass(frozen=True)
class DataConfig:
    """Hold `data.*`: the rows, and how a row becomes a prompt."""

    path: Any = _option(
        "what to read: a file, glob, list of files, directory, save_to_disk directory, or Hub name; required",
        MISSING,
    )
    name: str | None = _option("the Hub dataset's configuration name")
    split: str | None = _option("the split; may be left out where there is only one")
    revision: str | None = _option("the Hub dataset's branch, tag or commit")
    prompt_column: str | None = _option("a text column that is the prompt, as LLM.generate takes it")
    messages_column: str | None = _option("a column of chat messages, as LLM.chat takes it")
    template: str | None = _option(
        "a Jinja template over the columns that makes the prompt: 'Q: {{ question }}'; {{ row['my col'] }} where a "
        "column's name is no variable; or its file, relative to the working directory: '@prompts/solve.jinja'"
    )
    token_ids_column: str | None = _option("a column of lists of token ids that are the prompt")
    completion_column: str | None = _option(
        "a text column with a given completion of each prompt: its log-probability is computed, nothing is generated"
    )
    as_chat: bool = _option(
        "send the text of prompt_column or template as one user message through the chat template", False
    )
    system_prompt: str | None = _option(
        "a system message put before the others (with messages_column or as_chat), or its file: '@prompts/system.txt'"
    )
    system_prompt_column: str | None = _option("a text column that is the system message; a null keeps system_prompt")
    prefill_column: str | None = _option(
        "a text column that begins the assistant's answer; the model continues it, and generated_text holds only what "
        "it adds; null or empty: none"
    )
    chat_template: Any = _option(
        "a chat template, or the path of one, instead of the model's own; {name: tool_use} takes one of the "
        "tokenizer's by its name"
    )
    chat_template_kwargs: dict[str, Any] = _option(
        "passed to the chat template, e.g. {enable_thinking: false}", factory=dict
    )
    chat_template_kwargs_column: str | None = _option(
        "a column of objects, or of JSON text, laid over chat_template_kwargs row by row"
    )
    tools: Any = _option(
        "functions for the chat template: a list, in OpenAI's form or {name: ..., parameters: ...} alone, or JSON text "
        "of one, or its file: '@tools.json'"
    )
    tools_column: str | None = _option(
        "a column of the same, as lists or JSON text; a null keeps tools, an empty list is none"
    )
    add_generation_prompt: bool = _option("end a chat prompt with the opening of the assistant's answer", True)
    continue_final_message: bool = _option("leave the last chat message open, for the model to continue", False)
    lora_column: str | None = _option(
        "a column that names the row's adapter in lora; null: the model without an adapter; with more adapters than "
        "engine.max_loras (4 unless given) the rows of each run together, unless work.order=dataset"
    )
    render_timeout_s: float = _option(
        "reject a row, as render_timeout, whose prompt takes longer than this many seconds to render", 60.0, minimum=0.1
    )
    select: str | None = _option("a range of rows, start:stop or start:stop:step, counted from 0")
    limit: int | None = _option("the maximum number of rows, after select; a run resumes with a larger one", minimum=0)
    columns: list[str] | None = _option("the input columns kept in the result; all by default")


@dataclass(frozen=True)
class ParallelConfig:
    """Hold `parallel.*`: how ranks and devices are laid out."""

    tensor_parallel_size: int = _option("GPUs that one model copy is split over, within a rank", 1, minimum=1)
    pipeline_parallel_size: int = _option("pipeline stages of one model copy, within a rank", 1, minimum=1)
    launcher: Literal["internal", "external"] = _option(
        "who starts the processes of one model copy: internal, one process a rank, and vLLM starts workers below it; "
        "external, one process a GPU, and neighbouring ranks make an engine together (vLLM's external_launcher)",
        "internal",
    )
    enable_expert_parallel: bool = _option(
        "split a mixture of experts over GPUs: over those of a rank; with launcher=external over all ranks, whose "
        "engines then step together",
        False,
    )
    lock_step: bool = _option(
        "with launcher=external: all engines step together although no experts are split; this only costs time", False
    )
    load_first: Literal["auto", "always", "never"] = _option(
        "whether the first rank of each node loads its model before the others do, so that one rank downloads it and "
        "fills vLLM's compile cache: auto where the weights or that cache are not there yet",
        "auto",
    )
    sync_kv_cache: bool = _option("give every rank the smallest rank's number of KV cache blocks", True)
    share_devices: bool = _option("let the ranks of a node share its GPUs where there are too few", False)


@dataclass(frozen=True)
class WorkConfig:
    """Hold `work.*`: in which order rows run, and how ranks claim them."""

    order: Literal["auto", "dataset", "longest_first", "prefix"] = _option(
        "which rows run first: dataset, in input order; longest_first, by work.hint_column, or else by the rows' own "
        "max_tokens, or else by measured lengths of rows with the same prompt, or else by prompt lengths; prefix, "
        "rows that share a prompt prefix together, for vLLM's prefix cache; auto chooses from a sample of the data, "
        "and logs the choice",
        "auto",
    )
    hint_column: str | None = _option(
        "a column of numbers that estimate how long rows get, e.g. expected output tokens"
    )
    steal: bool = _option(
        "a rank that has run out of rows, or is well ahead, steals rows from the fullest other shard", True
    )
    claim_rows: int = _option(
        "the maximum number of rows that a rank claims from a shard at a time, and no more than max_num_seqs; claims "
        "shrink towards the end",
        64,
        minimum=1,
    )
    reserve_rows: int = _option(
        "the maximum number of sequences that wait in the engine beyond max_num_seqs, so that it never runs short; "
        "fewer wait towards the end",
        32,
        minimum=0,
    )


@dataclass(frozen=True)
class OutputConfig:
    """Hold `output.*`: the final dataset."""

    format: Literal["parquet", "jsonl"] = _option(
        "of RUN_DIR/dataset; jsonl can't hold bytes, durations, maps, NaN and infinities, and holds dates, times and "
        "decimals as text",
        "parquet",
    )
    rows_per_file: int = _option("the maximum number of rows in one file of the result", 500_000, minimum=1)
    gather: Literal["auto", "always", "never"] = _option(
        "send rows to rank 0 through gather_object: auto does where a rank does not see rank 0's run directory",
        "auto",
    )
    gather_bytes: int = _option(
        "the maximum bytes of rows that rank 0 receives in one gather_object round", 64 << 20, minimum=1 << 16
    )
    token_ids: bool = _option("add the column generated_token_ids", False)
    explode: bool = _option("write each sample as a row of its own, with its number in a column sample_id", False)
    reasoning: Literal["keep", "split", "strip"] = _option(
        "what a model thinks before it answers: keep it in generated_text, split it off into a column reasoning, or "
        "strip it",
        "keep",
    )
    reasoning_parser: str = _option(
        "vLLM's reasoning parser that finds it, e.g. qwen3 or deepseek_r1; auto chooses by the model's type", "auto"
    )
    tool_parser: str | None = _option(
        "vLLM's tool parser, e.g. hermes: takes tool calls out of generated_text, into a column tool_calls of "
        "{id, name, arguments}"
    )
    messages: bool = _option(
        "add the column messages: the conversation with the model's turn, ready for fine-tuning; one a row, hence with "
        "output.explode where a row has several samples",
        False,
    )
    parse: Literal["text", "json"] = _option(
        "how generated_text is read: as text; or as json, into a column parsed with its value as JSON text (a Markdown "
        "fence around it is no error)",
        "text",
    )


@dataclass(frozen=True)
class Config:
    """Hold the configuration of a whole run, section by section.

    Raises:
        ConfigError: values that are wrong or contradict each other; all of them at once.
    """

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: str = _option("the model: a directory, or a Hub name; required", MISSING)
    engine: dict[str, Any] = _option(
        "any field of vLLM's EngineArgs, passed through, e.g. {max_model_len: 8192}", factory=dict
    )
    lora: dict[str, str] = _option(
        "LoRA adapters of the model, by name: {math: adapters/math}, each a directory or a Hub name; their ranks come "
        "from their own configurations; one alone is used for all rows, unless data.lora_column is set; several need "
        "data.lora_column",
        factory=dict,
    )
    sampling: dict[str, Any] = _option(
        "any field of vLLM's SamplingParams, passed through, over the model's generation config; max_tokens is the "
        "rest of the context unless one of them gives it; sampling.from_columns takes fields from columns: "
        "{max_tokens: budget}; logprobs: k and prompt_logprobs: k add columns of log-probabilities",
        factory=dict,
    )
    sampling_by_rank: list[dict[str, Any]] = _option(
        "a list of further sampling sections, each over sampling and under sampling.from_columns, e.g. "
        "[{temperature: 0.2}, {temperature: 0.9}]; row i takes entry i modulo their number, whichever rank generates "
        "it: with as many ranks as entries, the entry of the rank in whose shard the row is on a first attempt",
        factory=list,
    )
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    work: WorkConfig = field(default_factory=WorkConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        _validate(self)

    @property
    def sampling_fields(self) -> dict[str, Any]:
        """Return the fields of SamplingParams that are the same for every row."""
        return {key: value for key, value in self.sampling.items() if key != "from_columns"}

    @property
    def sampling_columns(self) -> dict[str, str]:
        """Return the column that gives a field of SamplingParams row by row, by the field's name."""
        return dict(self.sampling.get("from_columns") or {})

    @property
    def has_samples(self) -> bool:
        """Return True if rows may have several samples."""
        return self.sampling.get("n", 1) != 1 or "n" in self.sampling_columns

    @property
    def keeps_logprobs(self) -> bool:
        """Return True if any row may have log-probabilities of its prompt or its generated tokens."""
        sections = [self.sampling, self.sampling_columns, *self.sampling_by_rank]
        return any(section.get(name) is not None for section in sections for name in checks.LOGPROB_FIELDS)

    @property
    def reads_prefix_cache(self) -> bool:
        """Return True if vLLM may reuse the cache of an earlier prompt: it does not for prompts' log-probabilities."""
        scores_prompts = self.data.completion_column is not None or self.sampling.get("prompt_logprobs") is not None
        return bool(self.engine.get("enable_prefix_caching", True)) and not scores_prompts

    @property
    def prompt(self) -> PromptConfig:
        """Return the keys of `data` that decide how a row becomes a prompt.

        Raises:
            ConfigError: these keys contradict each other.
        """
        return PromptConfig(**{key.name: getattr(self.data, key.name) for key in dataclasses.fields(PromptConfig)})

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
    for key, option in iter_options():
        section, _, name = key.partition(".")
        value = getattr(sections[section], name) if name else sections[section]
        minimum = option.metadata["minimum"]
        if minimum is not None and value is not None and (math.isnan(value) or value < minimum):
            yield f"{key}={value}: must be at least {minimum}"
        limit = _MAX_SECONDS if key.endswith("_s") else _MAX_NUMBER
        if isinstance(value, (int, float)) and value >= limit and key != "run.seed":
            yield f"{key}={value}: must be below {limit:g}"
        if value == "" and option.type == "str | None" and key != "data.system_prompt":  # an empty variable of a shell
            yield f"{key}='': must be a text, or null for none"
    yield from checks.find_wrong_run_values(sections["run"])
    yield from checks.find_wrong_input(sections["data"], sections["model"])
    yield from checks.find_wrong_engine_keys(sections["engine"])
    yield from checks.find_wrong_adapters(sections["lora"])
    yield from checks.find_wrong_sampling(sections["sampling"], sections["sampling_by_rank"])
    yield from checks.find_wrong_logprobs(sections["engine"], sections["sampling"], sections["sampling_by_rank"])
    if sections["data"].completion_column is not None:
        yield from checks.find_keys_without_effect_on_scores(sections, OutputConfig())


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML, without values that look like secrets."""
    from dpgen.config import yaml12

    sections = dataclasses.asdict(config)
    sections["data"] = {key: escape_file_name(key, value) for key, value in sections["data"].items()}
    return yaml12.dump(redact_secrets(sections))


def iter_options() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yield every legal key in order, as (dotted name, its field)."""
    for section in dataclasses.fields(Config):
        if "help" in section.metadata:
            yield section.name, section
            continue
        for option in dataclasses.fields(section.default_factory):  # type: ignore[arg-type]
            yield f"{section.name}.{option.name}", option


def _validate(config: Config) -> None:
    mistakes = list(find_wrong_values(vars(config)))
    if config.parallel.lock_step and config.parallel.launcher != "external":
        mistakes.append("parallel.lock_step=true needs parallel.launcher=external: other engines never step together")
    if config.output.messages and not config.output.explode and config.has_samples:
        mistakes.append("output.messages=true makes one conversation a row: set output.explode=true where n is not 1")
    if config.output.reasoning == "keep" and config.output.reasoning_parser != "auto":
        mistakes.append("output.reasoning_parser has no effect: set output.reasoning=split or strip")
    mistakes += checks.find_wrong_adapter_choice(config.lora, config.data.lora_column)
    try:
        if not config.prompt.is_chat and config.output.messages:
            mistakes.append("output.messages=true needs a chat: set data.messages_column, or data.as_chat=true")
    except ConfigError as error:
        mistakes += error.mistakes
    if mistakes:
        raise ConfigError(*mistakes)
