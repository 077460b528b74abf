"""Tell what a run is: everything that determines its results, so that two starts may share them or not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from dpgen.config.schema import Config
from dpgen.config.secrets import REMOVED, redact_secrets
from dpgen.config.sections import OutputConfig
from dpgen.errors import ConfigError

# Engine options that change the speed but not the results: a resumed run may change them. Every option that is not
# listed here counts as changing results.
_RESULT_NEUTRAL_ENGINE_KEYS = frozenset(
    [
        "max_num_seqs",
        "max_num_batched_tokens",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "enforce_eager",
        "max_logprobs",
        "block_size",
        "enable_prefix_caching",
        "enable_chunked_prefill",
        "swap_space",
        "cpu_offload_gb",
        "download_dir",
        "hf_token",
        "disable_log_stats",
        "disable_custom_all_reduce",
        "max_parallel_loading_workers",
        "distributed_executor_backend",
        "async_scheduling",
        "performance_mode",
        "num_gpu_blocks_override",
        "ray_workers_use_nsight",
        "use_tqdm_on_load",
        "mm_processor_cache_gb",
        "max_cudagraph_capture_size",
        "cudagraph_capture_sizes",
        "step_s",
        "processor_s",
        "kernel_s",
        "device_lock",
        "load_s",
        "load_lock",
        "load_error",
        "free_gib",
        "crash_on",
        "hang_on",
        "raise_on",
        "livelock_on",
        "livelock_after",
        "refuse_on",
        "max_faults",
        "fault_dir",
    ]
)

# Values of engine.load_format that load a model's own weights and differ in how fast they do. Any other value gives
# other weights (dummy: random ones) or may do so (a plugin's), so it is part of what a run is.
_SAME_WEIGHTS_LOAD_FORMATS = (
    None,
    "auto",
    "hf",
    "safetensors",
    "fastsafetensors",
    "instanttensor",
    "runai_streamer",
    "runai_streamer_sharded",
    "sharded_state",
    "tensorizer",
    "npcache",
    "pt",
    "mistral",
)

# Keys of an identity that run directories of older versions lack: the model's files, the text of a chat template that
# is a file, environment variables, the adapters' files, and the user's code. They are compared where both sides have
# them.
FOUND_KEYS = ("model_files", "chat_template_hash", "variables", "lora_files", "code")

# Keys of `check` that decide how long a check may take, and not what passes.
_NEUTRAL_CHECK_KEYS = ("timeout_s", "num_workers")

# Keys of `program` that decide how far a program may go, and not what it does.
_NEUTRAL_PROGRAM_KEYS = ("timeout_s", "max_calls", "max_running", "num_tool_threads")

# Engine options that dpgen sets for `lora`. With adapters they only change the speed.
_ADAPTER_OPTIONS = ("enable_lora", "max_loras", "max_lora_rank", "max_cpu_loras")


class Fingerprinted(Protocol):
    """Interface of the input rows, as this module uses it; see `dpgen.data.input_rows.InputRows`."""

    @property
    def key(self) -> str | None: ...

    def __len__(self) -> int: ...

    def fingerprint(self, num_rows: int | None, version: int | None) -> dict[str, Any]: ...


def get_num_rows(metadata: Mapping[str, Any]) -> int | None:
    """Return the number of input rows that a run.json names; None if it names none."""
    identity = metadata.get("identity")
    input = identity.get("input") if isinstance(identity, Mapping) else None
    num_rows = input.get("num_rows") if isinstance(input, Mapping) else None
    return num_rows if isinstance(num_rows, int) else None


def get_fingerprint_version(metadata: Mapping[str, Any]) -> int:
    """Return the version of the input's fingerprint in a run.json; 1 for those of older versions, which name none."""
    input = (metadata.get("identity") or {}).get("input") or {}
    return int(input.get("version", 1))


def find_fingerprint(rows: Fingerprinted, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the input's fingerprint, of the version that run.json has, and without hashing if the files are the same.

    Args:
        metadata: the content of run.json; empty for a new run.
    """
    hashed = metadata.get("hashed_files") or {}
    if rows.key is not None and hashed.get("key") == rows.key:
        return dict(hashed["fingerprint"])
    if get_num_rows(metadata) == len(rows) and get_fingerprint_version(metadata) == 1:
        with suppress(ConfigError):  # a newer `datasets` may fail on what the older version read
            fingerprint = rows.fingerprint(None, 1)
            if fingerprint == metadata["identity"]["input"]:
                return fingerprint
    return rows.fingerprint(None, None)


def diff_input(rows: Fingerprinted, fingerprint: Mapping[str, Any], metadata: Mapping[str, Any]) -> list[str]:
    """Return how an input differs from a run's, as `diff_identities` does; empty if it has only grown at its end.

    Args:
        fingerprint: of all rows, in the version of run.json.
        metadata: the content of run.json, which names an input.
    """
    stored, num_rows = metadata["identity"]["input"], get_num_rows(metadata)
    differences = diff_identities(stored, json.loads(json.dumps(fingerprint)), "input")
    if differences and num_rows is not None and num_rows < len(rows):
        first_rows = rows.fingerprint(num_rows, get_fingerprint_version(metadata))
        return differences if diff_identities(stored, json.loads(json.dumps(first_rows)), "input") else []
    return differences


def describe_left_out(
    unreadable: Mapping[str, str], fingerprint: Mapping[str, Any], metadata: Mapping[str, Any]
) -> str | None:
    """Return why an input that differs from a run's can't be compared: columns of the run are not read now.

    An older version may have read them, with values changed to fit one type. None where the input differs elsewhere.

    Args:
        unreadable: columns of the input that can't be read, each with the reason.
        fingerprint: of all rows.
        metadata: the content of run.json, which names an input.
    """
    stored, columns = metadata["identity"]["input"], fingerprint["columns"]
    left_out = [name for name in stored["columns"] if name not in columns and name in unreadable]
    kept = [name for name in stored["columns"] if name not in left_out]
    if not left_out or kept != columns or fingerprint["num_rows"] < stored["num_rows"]:
        return None
    reasons = [f"column {name}, which the run read, is left out: {unreadable[name]}" for name in left_out]
    return "; ".join(reasons)


def describe_hashed_files(rows: Fingerprinted, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `find_fingerprint` needs at the next start, for run.json."""
    return {"hashed_files": {"key": rows.key, "fingerprint": dict(fingerprint)}}


def select_result_options(engine: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `engine` that may change results."""
    options = {key: value for key, value in engine.items() if key not in _RESULT_NEUTRAL_ENGINE_KEYS}
    if options.get("load_format") in _SAME_WEIGHTS_LOAD_FORMATS:
        options.pop("load_format", None)
    return options


def compute_run_identity(
    config: Config,
    input_fingerprint: Mapping[str, Any],
    found: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return everything that determines the results, as JSON gives it back; equal for runs that may share results.

    Args:
        found: what the names in the configuration stand for on this machine now, by one of `FOUND_KEYS`.
    """
    identity: dict[str, Any] = {
        "input": dict(input_fingerprint),
        "prompt": dataclasses.asdict(config.prompt),
        "model": config.model,
        "engine": {"kind": config.run.engine, **select_result_options(config.engine)},
        "sampling": config.sampling,
        "seed": config.run.seed,
        "columns": config.data.columns,
        "output": {
            "format": config.output.format,
            "token_ids": config.output.token_ids,
            **_select_output_keys(config),
        },
    }
    identity |= found or {}
    if config.sampling_by_rank:  # older run directories lack the key, so an empty list must leave it out
        identity["sampling_by_rank"] = config.sampling_by_rank
    if config.lora:  # as above
        identity |= {"lora": config.lora, "lora_column": config.data.lora_column}
        identity["engine"] = {key: value for key, value in identity["engine"].items() if key not in _ADAPTER_OPTIONS}
    if config.pooling is not None:  # as above
        identity["pooling"] = dataclasses.asdict(config.pooling)
    if config.check.is_used:  # as above
        identity["check"] = {key: value for key, value in vars(config.check).items() if key not in _NEUTRAL_CHECK_KEYS}
    if config.program.is_used:  # as above
        program = vars(config.program).items()
        identity["program"] = {key: value for key, value in program if key not in _NEUTRAL_PROGRAM_KEYS}
    round_trip: dict[str, Any] = json.loads(json.dumps(redact_secrets(identity), default=str))
    return round_trip


def _select_output_keys(config: Config) -> dict[str, Any]:
    """Return the keys of `output` that change rows or columns; none at their default, as in older directories."""
    output, default = config.output, OutputConfig()
    names = ["explode", "messages", "reasoning", "tool_parser", "parse", "schema"]
    if output.reasoning != "keep":
        names.append("reasoning_parser")
    keys = {name: getattr(output, name) for name in names if getattr(output, name) != getattr(default, name)}
    return keys | {"logprobs": True} if config.keeps_logprobs else keys  # older versions dropped them


def diff_identities(before: Any, now: Any, path: str = "") -> list[str]:
    """Return the differences as ``key: before → now``, with configuration keys, or `input.*` for the data."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        if not path:  # older versions wrote fewer keys
            before = _drop_neutral_options(before)  # as of today: older versions knew fewer
            now = {key: value for key, value in now.items() if key in before or key not in FOUND_KEYS}
            before = {key: value for key, value in before.items() if key in now or key != "code"}
        # Code is compared under the same name: another name is a difference of its key, and some code has no file.
        keys = set(before) & set(now) if path == "code" else set(before) | set(now)
        differences = []
        for key in sorted(keys):
            differences += diff_identities(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        return differences
    # Other versions recognised other secrets: what one of them removed can't be compared.
    is_same = before in (now, REMOVED) or redact_secrets(before) == now
    return [] if is_same else [f"{_to_config_key(path)}: {_truncate_json(before)} → {_truncate_json(now)}"]


def diff_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences of two identities as `diff_identities` does, without those of the input."""
    return diff_identities({**before, "input": None}, {**now, "input": None})


def find_other_settings(metadata: Mapping[str, Any], attempts: Sequence[int]) -> list[tuple[list[int], list[str]]]:
    """Return which attempts had settings that run.resume=force has replaced, and how these differ from the run's now.

    Args:
        metadata: the content of run.json.
        attempts: those to look at.

    Returns:
        the attempts of the same settings, ascending, and the differences; settings that came back are none.
    """
    earlier, found, first = metadata.get("earlier_identities") or {}, [], 0
    for number in sorted(map(int, earlier)):
        group = sorted(attempt for attempt in attempts if first <= attempt < number)
        differences = diff_settings(earlier[str(number)], metadata["identity"]) if group else []
        if differences:
            found.append((group, differences))
        first = number
    return found


def _drop_neutral_options(identity: Mapping[str, Any]) -> Mapping[str, Any]:
    engine = identity.get("engine")
    return {**identity, "engine": select_result_options(engine)} if isinstance(engine, Mapping) else identity


def _to_config_key(path: str) -> str:
    """Return the configuration key behind a path in an identity, which is what the user can change."""
    renamed = {"seed": "run.seed", "columns": "data.columns", "engine.kind": "run.engine"}
    renamed |= {"lora_column": "data.lora_column"}
    renamed |= {"prompt.request_column": "data.format"}
    renamed |= {"chat_template_hash": "the text in the file data.chat_template"}
    renamed |= {"pooling.task": "task", "pooling.too_long": "data.too_long", "pooling": "task"}
    renamed |= {"output.logprobs": "log-probabilities in the result"}
    if path.startswith("model_files."):
        option, _, name = path.removeprefix("model_files.").partition(".")
        return f"{name} of {option if option == 'model' else f'engine.{option}'}"
    if path.startswith("lora_files."):
        adapter, _, name = path.removeprefix("lora_files.").partition(".")
        return f"{name} of lora.{adapter}"
    if path.startswith("code."):
        return f"the source of {path.removeprefix('code.')}"
    if path.startswith("variables."):
        return f"environment variable {path.removeprefix('variables.')}"
    if path not in renamed and path.startswith("pooling."):
        return f"output.{path.removeprefix('pooling.')}"
    return renamed.get(path, f"data.{path.removeprefix('prompt.')}" if path.startswith("prompt.") else path)


def _truncate_json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
