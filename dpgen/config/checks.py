"""Check single values of the configuration, beyond their types and minimums.

Each function yields one line for each mistake: key=value, then what the value must be. vLLM checks the values of its
own fields later, before a model is loaded (`Backend.check_options`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dpgen.config.media.media_checks import MEDIA_COLUMN_KEYS
from dpgen.config.prompt import PROMPT_SOURCES
from dpgen.config.schema_source import find_wrong_schema
from dpgen.errors import ERROR_TYPES, ConfigError, suggest_name
from dpgen.lifecycle.shutdown import parse_time_limit

if TYPE_CHECKING:
    from dpgen.config.sections import DataConfig, OutputConfig, ParallelConfig, RunConfig

TRACKERS = ("prometheus", "tensorboard", "wandb")
# Fields of SamplingParams whose log-probabilities are in the result.
LOGPROB_FIELDS = ("logprobs", "logprob_token_ids", "prompt_logprobs")
# Of sampling.structured_outputs: what a text must follow. The other fields say how.
CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_JSON_LINES = re.compile(r"\.(jsonl|ndjson|json)(\.(gz|zst|bz2|xz|lz4))?(\?.*)?$", re.IGNORECASE)


def find_scheme(text: str) -> str | None:
    """Return the scheme of an address in lower case, e.g. "s3"; None for a path or a name."""
    match = _SCHEME.match(text)
    return match[1].lower() if match else None


def find_wrong_run_values(run: RunConfig) -> Iterator[str]:
    """Yield one line for each wrong value of `run`."""
    if not run.dir.strip():
        yield f"run.dir={run.dir!r}: must be the directory that the run lives in"
    elif find_scheme(run.dir) is not None:
        yield (
            f"run.dir={run.dir}: the run directory must be on a file system, where rows are synced and files renamed; "
            "an address may be given as output.to, where the result is uploaded to"
        )
    if run.seed is not None and not 0 <= run.seed < 2**63:
        yield f"run.seed={run.seed}: must be from 0 to 2**63 - 1, or null"
    errors = run.retry_errors
    if not isinstance(errors, bool) and not (
        isinstance(errors, list) and all(isinstance(name, str) for name in errors)
    ):
        yield f"run.retry_errors={errors!r}: must be true, false, or a list of error types"
    for name in errors if isinstance(errors, list) else ():
        if isinstance(name, str) and name not in ERROR_TYPES:
            yield f"run.retry_errors: there is no error type {name!r}{suggest_name(name, ERROR_TYPES, 'types')}"
    if run.time_limit is not None:
        try:
            parse_time_limit(run.time_limit)
        except ConfigError as error:
            yield from error.mistakes


def find_wrong_parallel_values(parallel: ParallelConfig) -> Iterator[str]:
    """Yield one line for each wrong value of `parallel`, and for engines that can't be several on a rank."""
    count = parallel.engines_per_rank
    if count == "auto":
        return
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        yield f"parallel.engines_per_rank={count!r}: must be auto, or a whole number of at least 1"
    elif count > 1 and (obstacle := find_one_engine_reason(parallel)) is not None:
        yield f"parallel.engines_per_rank={count}: must be auto or 1 {obstacle}"


def find_one_engine_reason(parallel: ParallelConfig) -> str | None:
    """Return which keys leave room for one engine on a rank, as "with KEY=VALUE, ..."; None if none does."""
    if parallel.launcher == "external":
        return "with parallel.launcher=external, where ranks share engines"
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if (size := getattr(parallel, name)) > 1:
            return f"with parallel.{name}={size}, where an engine has several GPUs"
    return None


def find_wrong_input(data: DataConfig, model: str) -> Iterator[str]:
    """Yield one line for each wrong value of `data` and `model`; see `PromptConfig` for the prompt's keys."""
    paths = data.path if isinstance(data.path, (list, tuple)) else [data.path]
    if not paths or not all(isinstance(path, str) and path.strip() for path in paths):
        yield f"data.path={data.path!r}: must be a path, a glob, a Hub name, or a list of paths"
    if data.select is not None:
        try:
            parse_range(data.select)
        except ConfigError as error:
            yield from error.mistakes
    if not model.strip():
        yield f"model={model!r}: must be a directory or a Hub name"
    elif find_scheme(model) is not None:
        yield f"model={model}: must be a directory or a Hub name; copy the model to a disk of each node"
    if data.cache_dir is not None and find_scheme(data.cache_dir) is not None:
        yield f"data.cache_dir={data.cache_dir}: must be a directory on a disk of each node"


def may_hold_requests(data: DataConfig) -> bool:
    """Return True if `data.path` names a batch file, by `data.format`; or may name one, until it is looked at."""
    if data.format != "auto":
        return data.format == "openai_batch"
    paths = data.path if isinstance(data.path, (list, tuple)) else [data.path]
    sources = (*PROMPT_SOURCES, "query_column", "document_column", "documents_column")
    has_source = any(getattr(data, name) is not None for name in sources)
    return not has_source and all(isinstance(path, str) and _JSON_LINES.search(path) for path in paths)


def find_keys_without_effect_on_requests(
    data: DataConfig, default: DataConfig, sampling: Mapping[str, Any]
) -> Iterator[str]:
    """Yield one line for each key that says of all rows what each line of a batch file says of itself.

    Args:
        default: `data` as it is where nothing is set.
    """
    names = [*PROMPT_SOURCES, "completion_column", "as_chat", "system_prompt", "system_prompt_column", "prefill_column"]
    names += ["chat_template_kwargs_column", "tools", "tools_column", "add_generation_prompt"]
    names += ["continue_final_message", "lora_column", "query_column", "document_column", "documents_column"]
    names += MEDIA_COLUMN_KEYS
    keys = [f"data.{name}" for name in names if getattr(data, name) != getattr(default, name)]
    keys += ["sampling.from_columns"] if sampling.get("from_columns") else []
    for key in keys:
        yield f"{key} has no effect: with data.format=openai_batch each line is a whole request; leave one of them out"


def find_wrong_output(output: OutputConfig) -> Iterator[str]:
    """Yield one line for each wrong value of `output`."""
    for name in output.track:
        if name not in TRACKERS:
            yield f"output.track: there is no {name!r}{suggest_name(name, TRACKERS, 'trackers')}"
    if output.to is not None and find_scheme(output.to) in ("http", "https"):
        yield (
            f"output.to={output.to}: a result is several files, and https:// can't list them; name a bucket or folder "
            "(s3://BUCKET/FOLDER)"
        )
    if output.to is not None and not output.to.strip():
        yield "output.to='': must be a folder, an address, or null"


def find_wrong_response_keys(output: OutputConfig, default: OutputConfig, data: DataConfig) -> Iterator[str]:
    """Yield one line for each key that does not go with response files, and one if the input has no requests.

    Args:
        default: `output` as it is where nothing is set.
    """
    if output.format != "openai_batch":
        return
    if not may_hold_requests(data):
        yield (
            "output.format=openai_batch answers the requests of a batch file, and the input is none "
            "(data.format=openai_batch): set output.format=parquet or jsonl"
        )
    names = ("token_ids", "explode", "messages", "parse", "embedding_dtype")
    keys = [f"output.{name}" for name in names if getattr(output, name) != getattr(default, name)]
    keys += ["data.columns"] if data.columns is not None else []
    for key in keys:
        yield f"{key} has no effect: with output.format=openai_batch each line is a response; leave one of them out"


def find_wrong_engine_keys(engine: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each field of EngineArgs that dpgen sets itself."""
    homes = {"model": "model", "seed": "run.seed", "enable_expert_parallel": "parallel.enable_expert_parallel"}
    homes |= {f"{kind}_parallel_size": f"parallel.{kind}_parallel_size" for kind in ("tensor", "pipeline")}
    for name, home in homes.items():
        if name in engine:
            yield f"engine.{name} is set by {home}: give it there"
    if "distributed_executor_backend" in engine:
        yield "engine.distributed_executor_backend can't be set: dpgen's own agrees on the KV cache's size"
    if "data_parallel_size" in engine:
        yield "engine.data_parallel_size can't be set: dpgen's ranks are the data-parallel ones"


def find_wrong_adapters(lora: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each adapter without a name or a place."""
    for name, place in lora.items():
        if not name.strip():
            yield f"lora={{{name!r}: {place}}}: an adapter needs a name"
        elif not isinstance(place, str) or not place.strip():
            yield f"lora.{name}={place!r}: must be the adapter's directory or Hub name"


def find_wrong_adapter_choice(lora: Mapping[str, str], column: str | None) -> Iterator[str]:
    """Yield a line if the configuration leaves open which rows use which adapter."""
    if column and not lora:
        yield "data.lora_column needs lora, the adapters by name: lora={NAME: PATH}"
    if column is None and len(lora) > 1:
        yield (
            f"lora holds {len(lora)} adapters ({', '.join(lora)}): data.lora_column must name the column that chooses "
            "one for each row"
        )


def find_wrong_sampling(sampling: Mapping[str, Any], by_rank: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield one line for each mistake in `sampling` and `sampling_by_rank` that shows without vLLM."""
    columns = sampling.get("from_columns")
    if columns is not None and not (isinstance(columns, Mapping) and all(isinstance(v, str) for v in columns.values())):
        yield f"sampling.from_columns={columns!r}: maps a sampling field to a column's name"
    if "seed" in sampling:
        yield (
            "sampling.seed would give every row the same samples: set run.seed, or sampling.from_columns={seed: COLUMN}"
        )
    yield from _find_wrong_texts("sampling", sampling)
    reasons = {
        "seed": "a row's own comes from run.seed, or sampling.from_columns={seed: COLUMN}",
        "from_columns": "sampling.from_columns holds for every row, over its entry",
        "n": "with it the result's columns would have two types; set sampling.n, for every row",
    }
    for index, entry in enumerate(by_rank):
        for name, reason in reasons.items():
            if name in entry:
                yield f"sampling_by_rank[{index}].{name} can't be set: {reason}"
        yield from _find_wrong_texts(f"sampling_by_rank[{index}]", entry)


def find_wrong_logprobs(
    engine: Mapping[str, Any], sampling: Mapping[str, Any], by_rank: Iterable[Mapping[str, Any]]
) -> Iterator[str]:
    """Yield one line for each number of log-probabilities that can't be kept."""
    limit = engine.get("max_logprobs")
    for section, entry in _iter_sampling_sections(sampling, by_rank):
        for name in ("logprobs", "prompt_logprobs"):
            count, key = entry.get(name), f"{section}.{name}"
            if count is None:
                continue
            if type(count) is not int or count < 0:
                every = ", not -1 for the whole vocabulary" if count == -1 else ""
                yield f"{key}={count!r}: must be how many of the most likely tokens to keep, from 0{every}; or null"
            elif isinstance(limit, int) and 0 <= limit < count:
                yield f"{key}={count}: engine.max_logprobs={limit} allows fewer; leave that out, or set it to {count}"


def find_wrong_output_schema(
    output: OutputConfig, sampling: Mapping[str, Any], by_rank: Iterable[Mapping[str, Any]]
) -> Iterator[str]:
    """Yield one line if `output.schema` is no schema, and for each section that gives another constraint."""
    schema = output.schema
    if schema is None:
        return
    yield from find_wrong_schema("output.schema", schema, may_be_any=False)
    for section, entry in _iter_sampling_sections(sampling, by_rank):
        given = entry.get("structured_outputs")
        for name in CONSTRAINTS:
            if isinstance(given, Mapping) and given.get(name) is not None:
                yield f"output.schema and {section}.structured_outputs.{name} are set: a text follows one of them"


def find_keys_without_effect_on_scores(sections: Mapping[str, Any], default: OutputConfig) -> Iterator[str]:
    """Yield one line for each key that is about generated texts, where given completions are scored.

    Args:
        sections: the fields of a `Config`, by name.
        default: `output` as it is where nothing is set.
    """
    entries = _iter_sampling_sections(sections["sampling"], sections["sampling_by_rank"])
    keys = [f"{section}.{name}" for section, entry in entries for name in entry if name != "prompt_logprobs"]
    names = ("token_ids", "explode", "messages", "reasoning", "tool_parser", "parse", "schema")
    keys += [f"output.{name}" for name in names if getattr(sections["output"], name) != getattr(default, name)]
    keys += ["check"] if sections["check"].is_used else []
    for key in keys:
        yield (
            f"{key} has no effect: data.completion_column scores given texts, and nothing is generated; leave one of "
            "them out"
        )


def _iter_sampling_sections(
    sampling: Mapping[str, Any], by_rank: Iterable[Mapping[str, Any]]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield `sampling` and the entries of `sampling_by_rank`, with their names."""
    yield "sampling", sampling
    yield from ((f"sampling_by_rank[{index}]", entry) for index, entry in enumerate(by_rank))


def _find_wrong_texts(section: str, entry: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each text of `stop` or `bad_words` that YAML reads as a number or a mapping."""
    for name in ("stop", "bad_words"):
        value = entry.get(name)
        for item in value if isinstance(value, (list, tuple)) else [] if value is None else [value]:
            if not isinstance(item, str):
                text = json.dumps(item).removeprefix("{").removesuffix("}").replace('"', "")
                form = f'["{text}"]' if isinstance(value, (list, tuple)) else f'"{text}"'
                yield f"{section}.{name}: YAML reads {item!r}, no text; quotes make it one: '{section}.{name}={form}'"


def parse_range(text: str) -> slice:
    """Return ``slice(10, 20)`` for ``'10:20'``; start and stop may be left out, a step may follow.

    Raises:
        ConfigError: not of that form, or a negative number.
    """
    match = re.fullmatch(r"\s*(\d*)\s*:\s*(\d*)\s*(?::\s*(\d*)\s*)?", text)
    if not match:
        raise ConfigError(f"data.select={text!r}: must look like 100:200, :200 or 0:1000:10")
    start, stop, step = (int(part) if part else None for part in match.groups())
    if step == 0:
        raise ConfigError(f"data.select={text!r}: its step must be at least 1")
    return slice(start, stop, step)
