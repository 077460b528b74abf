"""Name the paths of a run directory, keep its small files, and decide whether a run may resume in it.

    config.yaml   the resolved configuration, without secrets
    run.json      the run's identity, its attempt, the engine's limits, the ranks' manifests
    journal/      every finished row, in segments of one attempt of one rank each
    logs/         what each rank's engine printed
    dataset/      the final rows, in input order
    _SUCCESS      counts and a hash of the results, written last

- A run resumes only in a directory of the same identity: input, model and its files, prompt, sampling, seed, output
  format, and environment variables that change results.
- An input that has only grown at its end (a larger data.limit, one more file) is the same input: rows keep their index.
- Nothing is ever deleted that the journal can't rebuild.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from dpgen.config.schema import Config, OutputConfig, to_yaml
from dpgen.config.secrets import REMOVED, redact_secrets
from dpgen.errors import ConfigError, DpgenError
from dpgen.journal.files import atomic_write_text
from dpgen.journal.reader import index_journal

# Engine options that change the speed but not the results: a resumed run may change them. Every option that is not
# listed here counts as changing results.
_RESULT_NEUTRAL_ENGINE_KEYS = frozenset(
    [
        "max_num_seqs",
        "max_num_batched_tokens",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "enforce_eager",
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
        "num_gpu_blocks_override",
        "ray_workers_use_nsight",
        "use_tqdm_on_load",
        "max_cudagraph_capture_size",
        "cudagraph_capture_sizes",
        "step_s",
        "load_s",
        "load_error",
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
# is a file, environment variables, and the adapters' files. They are compared where both sides have them.
FOUND_KEYS = ("model_files", "chat_template_hash", "variables", "lora_files")

# Engine options that dpgen sets for `lora`. With adapters they only change the speed.
_ADAPTER_OPTIONS = ("enable_lora", "max_loras", "max_lora_rank", "max_cpu_loras")

# "ranks" is of older versions. Hidden files (.lock, .dataset.tmp) are ignored.
_RUN_FILES = frozenset(["journal", "ranks", "config.yaml", "run.json", "dataset", "_SUCCESS", "logs"])


class Fingerprinted(Protocol):
    """Interface of the input rows, as this module uses it; see `dpgen.data.input_rows.InputRows`."""

    @property
    def key(self) -> str | None: ...

    def __len__(self) -> int: ...

    def fingerprint(self, num_rows: int | None, version: int | None) -> dict[str, Any]: ...


class RunDir:
    """Hold the paths of a run, and read and write its small files."""

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()
        self.journal = self.path / "journal"
        self.dataset = self.path / "dataset"
        self.logs = self.path / "logs"
        self.success = self.path / "_SUCCESS"
        self._run_json = self.path / "run.json"

    @property
    def is_finished(self) -> bool:
        return self.success.exists()

    def read_success(self) -> dict[str, Any]:
        """Return the content of `_SUCCESS`; empty if it is not readable, which `dpgen verify` reports."""
        try:
            content = json.loads(self.success.read_bytes())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def mark_unfinished(self) -> None:
        """Remove `_SUCCESS`: from now on the journal or the dataset differ from the result that it describes.

        Raises:
            OSError: the file can't be removed.
        """
        self.success.unlink(missing_ok=True)

    def prepare_to_mark_unfinished(self) -> Callable[[], None]:
        """Return what removes the `_SUCCESS` of now, if there is one; see `mark_unfinished`.

        One that is written later stays: this rank may have been cut off while the others completed the result.
        """
        before = self._identify_success()

        def mark() -> None:
            if before is not None and self._identify_success() == before:
                self.mark_unfinished()

        return mark

    def _identify_success(self) -> tuple[int, int, int] | None:
        try:
            stat = self.success.stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size

    def lock(self) -> None:
        """Reserve the directory for this run until this process ends. Only rank 0 calls this.

        Raises:
            ConfigError: another live run holds the lock.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"run.dir={self.path} can't be used: {error.strerror}") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise ConfigError(
                f"run.dir={self.path} is in use by another live run: wait for that run, end it, or choose another "
                "directory"
            ) from None
        except OSError:  # the file system has no locks, so another run can't be detected
            os.close(fd)
            return
        self._lock_fd = fd

    def create(self) -> None:
        """Create the directory unless it exists.

        Raises:
            ConfigError: the directory can't be created or is not writable.
        """
        try:
            self.journal.mkdir(parents=True, exist_ok=True)
            is_writable = os.access(self.journal, os.W_OK | os.X_OK)
        except OSError as error:
            raise ConfigError(f"run.dir={self.path} can't be created: {error.strerror}") from None
        if not is_writable:
            raise ConfigError(f"run.dir={self.path} is not writable: fix its permissions, or choose another directory")

    def check_resumable(
        self, identity: Mapping[str, Any], resume: str, prefixes: Mapping[int, Mapping[str, Any]] | None = None
    ) -> None:
        """Reject a directory that holds anything but this run.

        Args:
            identity: this run's, from `compute_run_identity`.
            prefixes: fingerprints of the input's first rows, by their number.
            resume: `run.resume`. "never" rejects any file, "force" accepts other settings (but not another input).

        Raises:
            ConfigError: the directory holds files of no run, or rows of another identity; names what differs.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ConfigError(f"run.dir={self.path} is a file: must be a directory")
        names = {path.name for path in self.path.iterdir() if not path.name.startswith(".")}
        # An empty journal is of a start that ended before it had written anything.
        if resume == "never" and (names - {"journal"} or (self.journal.is_dir() and any(self.journal.iterdir()))):
            raise ConfigError(
                f"run.resume=never: run.dir={self.path} is not empty. Choose another directory (dpgen deletes nothing)"
            )
        metadata = self.read_metadata()
        if not metadata and len(index_journal(self.journal)) and resume != "force":
            raise ConfigError(
                f"run.dir={self.path} holds journals, but no run.json that says which run wrote them. "
                "Choose another directory, or resume anyway with run.resume=force"
            )
        if not metadata:
            if names - _RUN_FILES:
                raise ConfigError(
                    f"run.dir={self.path} holds files that no run wrote ({', '.join(sorted(names - _RUN_FILES)[:3])}). "
                    "Choose another directory"
                )
            return
        stored = metadata.get("identity", {})
        num_rows = get_num_rows(metadata)
        if num_rows is not None and stored["input"] == (prefixes or {}).get(num_rows):
            stored = {**stored, "input": identity["input"]}  # the input has only grown
        self._check_identity(diff_identities(stored, identity), resume)

    def read_metadata(self) -> dict[str, Any]:
        """Return the content of run.json; empty if there is none.

        Raises:
            ConfigError: there is a file in place of the directory.
            DpgenError: run.json can't be read or holds no JSON object.
        """
        try:
            metadata = json.loads(self._run_json.read_bytes())
        except FileNotFoundError:
            return {}
        except NotADirectoryError:
            what = "is a file" if self.path.exists() else "has a file above it"
            raise ConfigError(f"run.dir={self.path} {what}: must be a directory") from None
        except (OSError, ValueError) as error:
            raise DpgenError(f"{self._run_json} can't be read: {error}") from None
        if not isinstance(metadata, dict):
            raise DpgenError(f"{self._run_json} is damaged: must hold a JSON object")
        return metadata

    def update_metadata(self, **fields: Any) -> None:
        """Add or replace fields of run.json."""
        atomic_write_text(self._run_json, json.dumps({**self.read_metadata(), **fields}, indent=2) + "\n")

    def write_config(self, config: Config) -> None:
        """Write the resolved configuration, without secrets."""
        atomic_write_text(self.path / "config.yaml", to_yaml(config))

    def _check_identity(self, differences: list[str], resume: str) -> None:
        if not differences or not len(index_journal(self.journal)):
            return  # the same run, or one without a single finished row
        input_differences = [line for line in differences if line.startswith("input.")]
        if input_differences:
            raise ConfigError(
                f"run.dir={self.path} holds results of another input: {'; '.join(input_differences)}. "
                "Choose another directory"
            )
        if resume != "force":
            raise ConfigError(
                f"run.dir={self.path} holds results of other settings: {'; '.join(differences)}. "
                "Choose another directory, or resume anyway with run.resume=force"
            )


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
    round_trip: dict[str, Any] = json.loads(json.dumps(redact_secrets(identity), default=str))
    return round_trip


def _select_output_keys(config: Config) -> dict[str, Any]:
    """Return the keys of `output` that change rows or columns; none at their default, as in older directories."""
    output, default = config.output, OutputConfig()
    names = ["explode", "messages", "reasoning", "tool_parser", "parse"]
    if output.reasoning != "keep":
        names.append("reasoning_parser")
    return {name: getattr(output, name) for name in names if getattr(output, name) != getattr(default, name)}


def diff_identities(before: Any, now: Any, path: str = "") -> list[str]:
    """Return the differences as ``key: before → now``, with configuration keys, or `input.*` for the data."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        if not path:  # older versions wrote fewer keys
            now = {key: value for key, value in now.items() if key in before or key not in FOUND_KEYS}
        differences = []
        for key in sorted(set(before) | set(now)):
            differences += diff_identities(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        return differences
    # Other versions recognised other secrets: what one of them removed can't be compared.
    is_same = before in (now, REMOVED) or redact_secrets(before) == now
    return [] if is_same else [f"{_to_config_key(path)}: {_truncate_json(before)} → {_truncate_json(now)}"]


def _to_config_key(path: str) -> str:
    """Return the configuration key behind a path in an identity, which is what the user can change."""
    renamed = {"seed": "run.seed", "columns": "data.columns", "engine.kind": "run.engine"}
    renamed |= {"lora_column": "data.lora_column"}
    renamed |= {"chat_template_hash": "the text in the file data.chat_template"}
    if path.startswith("model_files."):
        option, _, name = path.removeprefix("model_files.").partition(".")
        return f"{name} of {option if option == 'model' else f'engine.{option}'}"
    if path.startswith("lora_files."):
        adapter, _, name = path.removeprefix("lora_files.").partition(".")
        return f"{name} of lora.{adapter}"
    if path.startswith("variables."):
        return f"environment variable {path.removeprefix('variables.')}"
    return renamed.get(path, f"data.{path.removeprefix('prompt.')}" if path.startswith("prompt.") else path)


def _truncate_json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
