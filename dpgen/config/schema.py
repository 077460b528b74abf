"""Every key of the configuration: its default, its meaning, and what it may be.

A `Config` is frozen, and checked when it is made; `dpgen.config.loader` makes one. The fields carry their own help, so
that ``--help`` and the reference file can't drift from the code. Nothing heavy is imported.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dpgen.data.render import PromptConfig
from dpgen.errors import ConfigError, suggest_name
from dpgen.lifecycle.shutdown import parse_time_limit

MISSING = "???"  # OmegaConf's own mark of a value that must be given


def _option(help: str, default: Any = None, *, factory: Any = None) -> Any:
    if factory is not None:
        return field(default_factory=factory, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives and how it behaves."""

    dir: str = _option("the run folder: journal, result and report; required", MISSING)
    seed: int | None = _option(
        "seed of the run; a row's own seed comes from it, the row's index and the sample's; "
        "null leaves sampling unseeded (and not repeatable)",
        0,
    )
    resume: Literal["auto", "never", "force"] = _option(
        "a folder that holds an unfinished run: auto goes on with it if nothing that changes results differs, "
        "force goes on whatever differs but the input, never refuses any folder that is not empty",
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
        "of vLLM's own log lines (dpgen's are always shown)", "warning"
    )
    engine_timeout_s: float = _option(
        "seconds that an engine with work may say nothing before it counts as hung and is started again", 600.0
    )
    engine_start_timeout_s: float = _option(
        "the same while it starts: seconds for importing vLLM, and again for loading the model", 3600.0
    )
    max_engine_deaths: int = _option(
        "give an engine up after so many deaths in a row without a finished row between them; other ranks take "
        "its rows",
        8,
    )
    time_limit: str | None = _option("stop after so long, resumable: seconds, or 'H:MM:SS' (in quotes, for YAML)")
    stop_margin_s: float = _option("how long before SLURM's end time to stop", 60.0)
    progress_interval_s: float = _option("seconds between progress lines where there is no terminal", 30.0)
    max_leading_errors: int = _option(
        "stop the run if its first so many rows all fail, since then the fault is not in the rows; 0: never",
        100,
    )


@dataclass(frozen=True)
class DataConfig:
    """The rows, and how a row becomes a prompt."""

    path: Any = _option(
        "what to read: a file, glob, list of files, folder, save_to_disk folder, or Hub name; required",
        MISSING,
    )
    name: str | None = _option("the Hub dataset's configuration name")
    split: str | None = _option("the split; may be left out where there is only one")
    revision: str | None = _option("the Hub dataset's branch, tag or commit")
    prompt_column: str | None = _option("a text column that is the prompt, as LLM.generate takes it")
    messages_column: str | None = _option("a column of chat messages, as LLM.chat takes it")
    template: str | None = _option("a Jinja template over the columns that makes the prompt: 'Q: {{ question }}'")
    as_chat: bool = _option(
        "send the text of prompt_column or template as one user message through the chat template", False
    )
    system_prompt: str | None = _option("a system message put before the others (with messages_column or as_chat)")
    chat_template: str | None = _option("a chat template, or the path of one, instead of the model's own")
    chat_template_kwargs: dict[str, Any] = _option(
        "passed to the chat template, e.g. {enable_thinking: false}", factory=dict
    )
    add_generation_prompt: bool = _option("end a chat prompt with the assistant's opening", True)
    continue_final_message: bool = _option("leave the last chat message open, to be gone on with", False)
    select: str | None = _option("a range of rows, start:stop or start:stop:step, counted from 0")
    limit: int | None = _option("at most so many rows, after select")
    columns: list[str] | None = _option("the input columns kept in the result; all by default")


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks and devices are laid out."""

    tensor_parallel_size: int = _option("GPUs that one model copy is split over, within a rank", 1)
    pipeline_parallel_size: int = _option("pipeline stages of one model copy, within a rank", 1)
    launcher: Literal["internal", "external"] = _option(
        "who starts the processes of one model copy: internal, one process a rank, and vLLM starts workers below it; "
        "external, one process a GPU, and neighbours make an engine together (vLLM's external_launcher)",
        "internal",
    )
    enable_expert_parallel: bool = _option(
        "split a mixture of experts over GPUs: over those of a rank; with launcher=external over all ranks, whose "
        "engines then step together",
        False,
    )
    lock_step: bool = _option(
        "with launcher=external: all engines step together though no experts are split; it only costs", False
    )
    load_first: Literal["auto", "always", "never"] = _option(
        "whether the first rank of each node loads its model before the others do, so that one downloads it and fills "
        "vLLM's compile cache: auto where the weights or that cache are not there yet",
        "auto",
    )
    sync_kv_cache: bool = _option("give every rank the smallest rank's number of KV cache blocks", True)
    share_devices: bool = _option("let the ranks of a node share its GPUs where there are too few", False)


@dataclass(frozen=True)
class WorkConfig:
    """How rows are dealt to ranks and engines."""

    order: Literal["auto", "dataset", "longest_first", "prefix"] = _option(
        "which rows first: dataset, as they come; longest_first, by work.hint_column, or else the rows' own "
        "max_tokens, or else what rows with the same prompt turn out to take, or else their prompts' lengths; prefix, "
        "those whose prompts begin alike together, for vLLM's prefix cache; auto chooses from a look at the data, and "
        "says what and why",
        "auto",
    )
    hint_column: str | None = _option("a column of numbers that tell how long rows get: tokens to expect, or the like")
    steal: bool = _option("a rank that has run out, or is well ahead, helps the fullest other shard", True)
    claim_rows: int = _option(
        "the most rows a rank takes from a shard at a time, and no more than max_num_seqs; claims shrink "
        "towards the end",
        64,
    )
    reserve_rows: int = _option(
        "the most sequences kept waiting in the engine beyond max_num_seqs, so that it never runs short; they, too, "
        "get fewer towards the end",
        32,
    )


@dataclass(frozen=True)
class OutputConfig:
    """The final dataset."""

    format: Literal["parquet", "jsonl"] = _option("of RUN_DIR/dataset", "parquet")
    rows_per_file: int = _option("the most rows in one file of the result", 500_000)
    gather: Literal["auto", "always", "never"] = _option(
        "send rows to rank 0 through gather_object: auto does where a rank does not see rank 0's run folder",
        "auto",
    )
    gather_bytes: int = _option("the most bytes of rows that rank 0 takes in one gather_object round", 64 << 20)
    token_ids: bool = _option("add the column generated_token_ids", False)


@dataclass(frozen=True)
class Config:
    """A whole run; see the sections."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: str = _option("the model: a folder, or a Hub name; required", MISSING)
    engine: dict[str, Any] = _option(
        "any field of vLLM's EngineArgs, passed through, e.g. {max_model_len: 8192}", factory=dict
    )
    sampling: dict[str, Any] = _option(
        "any field of vLLM's SamplingParams, passed through, over the model's generation config; max_tokens is the "
        "rest of the context unless one of them gives it; sampling.from_columns takes fields from columns: "
        "{max_tokens: budget}",
        factory=dict,
    )
    sampling_by_rank: list[dict[str, Any]] = _option(
        "a list of further sampling sections, each over sampling and under sampling.from_columns, e.g. "
        "[{temperature: 0.2}, {temperature: 0.9}]; row i takes entry i modulo their number, whoever generates it: with "
        "as many ranks as entries, the entry of the rank in whose shard the row is on a first attempt",
        factory=list,
    )
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    work: WorkConfig = field(default_factory=WorkConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        _validate(self)

    @property
    def sampling_fields(self) -> dict[str, Any]:
        """The fields of SamplingParams that are the same for every row."""
        return {key: value for key, value in self.sampling.items() if key != "from_columns"}

    @property
    def sampling_columns(self) -> dict[str, str]:
        """Field of SamplingParams → the column that gives it, row by row."""
        return dict(self.sampling.get("from_columns") or {})

    @property
    def prompt(self) -> PromptConfig:
        """How a row becomes a prompt."""
        data = self.data
        return PromptConfig(
            prompt_column=data.prompt_column,
            messages_column=data.messages_column,
            template=data.template,
            as_chat=data.as_chat,
            system_prompt=data.system_prompt,
            chat_template=data.chat_template,
            chat_template_kwargs=data.chat_template_kwargs,
            add_generation_prompt=data.add_generation_prompt,
            continue_final_message=data.continue_final_message,
        )

    @property
    def gpus_per_rank(self) -> int:
        """GPUs that one launched process drives."""
        if self.parallel.launcher == "external":
            return 1
        return self.parallel.tensor_parallel_size * self.parallel.pipeline_parallel_size


def legal_keys() -> Iterator[tuple[str, Any, str]]:
    """Every legal key, in order, as (dotted name, default, help)."""
    for section in dataclasses.fields(Config):
        if "help" in section.metadata:
            yield section.name, _get_default(section), section.metadata["help"]
            continue
        for each in dataclasses.fields(section.default_factory):  # type: ignore[arg-type]
            yield f"{section.name}.{each.name}", _get_default(each), each.metadata["help"]


def describe_option(key: str) -> str:
    """The help of one key."""
    return next(help for name, _, help in legal_keys() if name == key)


def _get_default(each: dataclasses.Field[Any]) -> Any:
    return each.default_factory() if callable(each.default_factory) else each.default


def unknown_key_error(section: str, name: str, legal: Iterable[str]) -> ConfigError:
    """The error for a key of a passed-through section (`engine`, `sampling`, ...) that vLLM doesn't know."""
    full = f"{section}.{name}"
    return ConfigError(f"unknown key {full!r}{suggest_name(full, {f'{section}.{each}' for each in legal}, 'keys')}")


def _validate(config: Config) -> None:
    run, data, work, output = config.run, config.data, config.work, config.output
    _require_at_least("run.progress_interval_s", run.progress_interval_s, 0.1)
    _require_at_least("run.engine_timeout_s", run.engine_timeout_s, 1)
    _require_at_least("run.engine_start_timeout_s", run.engine_start_timeout_s, 1)
    _require_at_least("run.max_engine_deaths", run.max_engine_deaths, 1)
    _require_at_least("run.stop_margin_s", run.stop_margin_s, 0)
    _check_retry_errors(run.retry_errors)
    if run.time_limit is not None:
        parse_time_limit(run.time_limit)
    _require_at_least("run.max_leading_errors", run.max_leading_errors, 0)
    if run.seed is not None and not 0 <= run.seed < 2**63:
        raise ConfigError(f"run.seed is {run.seed}; it must be from 0 to 2**63 - 1, or null")
    _require_at_least("work.claim_rows", work.claim_rows, 1)
    _require_at_least("work.reserve_rows", work.reserve_rows, 0)
    _require_at_least("output.rows_per_file", output.rows_per_file, 1)
    _require_at_least("output.gather_bytes", output.gather_bytes, 1 << 16)
    _require_at_least("parallel.tensor_parallel_size", config.parallel.tensor_parallel_size, 1)
    _require_at_least("parallel.pipeline_parallel_size", config.parallel.pipeline_parallel_size, 1)
    if config.parallel.lock_step and config.parallel.launcher != "external":
        raise ConfigError("parallel.lock_step=true needs parallel.launcher=external: other engines never step together")
    if data.limit is not None:
        _require_at_least("data.limit", data.limit, 0)
    if data.select is not None:
        parse_range(data.select)
    _check_path(data.path)
    _ = config.prompt  # its own checks raise
    _check_passthrough(config)
    if not config.model.strip():
        raise ConfigError("model is empty; give a folder or a Hub name")
    if not run.dir.strip():
        raise ConfigError("run.dir is empty; give the folder that the run lives in")


def _check_retry_errors(value: Any) -> None:
    if not isinstance(value, bool) and not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
        raise ConfigError(f"run.retry_errors is {value!r}; it must be true, false, or a list of error types")


def _check_path(path: Any) -> None:
    paths = path if isinstance(path, (list, tuple)) else [path]
    if not paths or not all(isinstance(each, str) and each.strip() for each in paths):
        raise ConfigError(f"data.path is {path!r}; it must be a path, a glob, a Hub name, or a list of paths")


def _check_passthrough(config: Config) -> None:
    columns = config.sampling.get("from_columns")
    if columns is not None and not (isinstance(columns, Mapping) and all(isinstance(v, str) for v in columns.values())):
        raise ConfigError(f"sampling.from_columns is {columns!r}; it maps a sampling field to a column's name")
    twice = {"model": "model", "seed": "run.seed"}
    twice["enable_expert_parallel"] = "parallel.enable_expert_parallel"
    twice |= {f"{kind}_parallel_size": f"parallel.{kind}_parallel_size" for kind in ("tensor", "pipeline")}
    for name, home in twice.items():
        if name in config.engine:
            raise ConfigError(f"engine.{name} is set by {home}; give it there")
    if "distributed_executor_backend" in config.engine:
        raise ConfigError("engine.distributed_executor_backend can't be set: dpgen's own agrees on the KV cache's size")
    if "data_parallel_size" in config.engine:
        raise ConfigError("engine.data_parallel_size can't be set: dpgen's ranks are the data-parallel ones")
    if "seed" in config.sampling:
        raise ConfigError(
            "sampling.seed would give every row the same samples; set run.seed, or sampling.from_columns={seed: COLUMN}"
        )
    elsewhere = {
        "seed": "a row's own comes from run.seed, or sampling.from_columns={seed: COLUMN}",
        "from_columns": "sampling.from_columns holds for every row, over its entry",
        "n": "with it the result's columns would have two types; set sampling.n, for every row",
    }
    for index, entry in enumerate(config.sampling_by_rank):
        for name, reason in elsewhere.items():
            if name in entry:
                raise ConfigError(f"sampling_by_rank[{index}].{name} can't be set: {reason}")


def _require_at_least(name: str, value: float, least: float) -> None:
    if math.isnan(value) or value < least:
        raise ConfigError(f"{name} is {value}; it must be at least {least}")


def parse_range(text: str) -> slice:
    """``'10:20'`` → ``slice(10, 20)``; start and stop may be left out, a step may follow.

    Raises:
        ConfigError: not of that form, or a negative number.
    """
    match = re.fullmatch(r"\s*(\d*)\s*:\s*(\d*)\s*(?::\s*(\d*)\s*)?", text)
    if not match:
        raise ConfigError(f"data.select is {text!r}; it must look like 100:200, :200 or 0:1000:10")
    start, stop, step = (int(part) if part else None for part in match.groups())
    if step == 0:
        raise ConfigError(f"data.select is {text!r}; its step must be at least 1")
    return slice(start, stop, step)


_SECRET = re.compile(r"(^|_)(token|secret|password|passwd|api_?key|credentials?)$", re.IGNORECASE)


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, with what looks like a secret blanked out."""
    import yaml

    text: str = yaml.safe_dump(redact_secrets(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)
    return text


def redact_secrets(value: Any, key: str = "") -> Any:
    """A copy of nested dicts and lists in which the values of secret-looking keys are blanked out."""
    if isinstance(value, Mapping):
        return {str(k): redact_secrets(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_secrets(each, key) for each in value]
    if _SECRET.search(key) and isinstance(value, str):
        return "<removed>"
    return value
