"""The run folder: where everything of a run lies, and whether a run may go on in it.

config.yaml   resolved, secrets removed      run.json    what the run is, and what it found out
journal/      each rank attempt's own        dataset/    the final rows, in input order
_SUCCESS      written last
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpgen.config.schema import Config, redact_secrets, to_yaml
from dpgen.errors import ConfigError, DpgenError
from dpgen.journal.files import atomic_write_text
from dpgen.journal.reader import index_journal

# Engine options that change how fast rows come, not what they are: a resumed run may differ in them. Whatever
# isn't named here counts as changing results.
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
        "load_format",
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
        "refuse_on",
    ]
)


class RunDir:
    """The paths of a run, and the reading and writing of its small files."""

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()
        self.journal = self.path / "journal"
        self.dataset = self.path / "dataset"
        self.success = self.path / "_SUCCESS"
        self._run_json = self.path / "run.json"

    @property
    def is_finished(self) -> bool:
        return self.success.exists()

    def lock(self) -> None:
        """Takes the folder for this run, for as long as this process lives; rank 0 does it.

        Raises:
            ConfigError: another run that is alive has it.
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
            raise ConfigError(f"run.dir={self.path}: another run is at work there; wait for it, or end it") from None
        except OSError:  # a file system without locks: then nobody can tell
            os.close(fd)
            return
        self._lock_fd = fd

    def create(self) -> None:
        """Makes the folder, where it isn't there.

        Raises:
            ConfigError: it can't be made or written to.
        """
        try:
            self.journal.mkdir(parents=True, exist_ok=True)
            writable = os.access(self.journal, os.W_OK | os.X_OK)
        except OSError as error:
            raise ConfigError(f"run.dir={self.path} can't be made: {error.strerror}") from None
        if not writable:
            raise ConfigError(f"run.dir={self.path} can't be written to")

    def check_resumable(self, identity: Mapping[str, Any], resume: str) -> None:
        """Refuses a folder that holds something else than this run.

        Raises:
            ConfigError: a run of another identity (what differs is named), a folder of other files, or any files at
                all where `resume` is "never".
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ConfigError(f"run.dir={self.path} is a file; name a folder")
        known = {"journal", "ranks", "config.yaml", "run.json", "dataset", "_SUCCESS", ".dataset.tmp"}
        found = {each.name for each in self.path.iterdir() if not each.name.startswith(".")}
        if resume == "never" and found:
            raise ConfigError(
                f"run.resume=never, and run.dir={self.path} is not empty; name another folder (nothing is deleted)"
            )
        before = self.read_metadata()
        if not before and len(index_journal(self.journal)) and resume != "force":
            raise ConfigError(
                f"run.dir={self.path} holds journals, but no run.json says what they are; name another folder"
            )
        if not before:
            if found - known:
                raise ConfigError(
                    f"run.dir={self.path} holds files that are no run's ({', '.join(sorted(found - known)[:3])}); "
                    "name another folder"
                )
            return
        differing = diff_identities(before.get("identity", {}), identity)
        if not differing or not len(index_journal(self.journal)):
            return  # the same run, or one that has not come to a single row
        other_input = [each for each in differing if each.startswith("input.")]
        if other_input:
            raise ConfigError(
                f"run.dir={self.path} holds results of another input: {'; '.join(other_input)}. Name another folder"
            )
        if resume != "force":
            raise ConfigError(
                f"run.dir={self.path} holds a run that would give other results: {'; '.join(differing)}. "
                "Name another folder, or go on regardless with run.resume=force"
            )

    def read_metadata(self) -> dict[str, Any]:
        """What run.json holds; empty where there is none.

        Raises:
            DpgenError: it is damaged.
        """
        try:
            found = json.loads(self._run_json.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise DpgenError(f"{self._run_json} can't be read: {error}") from None
        if not isinstance(found, dict):
            raise DpgenError(f"{self._run_json} is damaged: it does not hold an object")
        return found

    def update_metadata(self, **facts: Any) -> None:
        """Adds facts to run.json."""
        atomic_write_text(self._run_json, json.dumps({**self.read_metadata(), **facts}, indent=2) + "\n")

    def write_config(self, config: Config) -> None:
        """Writes the resolved configuration, without secrets."""
        atomic_write_text(self.path / "config.yaml", to_yaml(config))


def compute_run_identity(config: Config, input_fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides what the results are, for comparing runs; as JSON gives it back."""
    engine = {key: value for key, value in config.engine.items() if key not in _RESULT_NEUTRAL_ENGINE_KEYS}
    identity: dict[str, Any] = {
        "input": dict(input_fingerprint),
        "prompt": dataclasses.asdict(config.prompt),
        "model": config.model,
        "engine": {"kind": config.run.engine, **engine},
        "sampling": config.sampling,
        "seed": config.run.seed,
        "columns": config.data.columns,
        "output": {"format": config.output.format, "token_ids": config.output.token_ids},
    }
    if config.sampling_by_rank:  # run folders of before it are the same without it
        identity["sampling_by_rank"] = config.sampling_by_rank
    round_trip: dict[str, Any] = json.loads(json.dumps(redact_secrets(identity), default=str))
    return round_trip


def diff_identities(before: Any, now: Any, path: str = "") -> list[str]:
    """Where two identities differ, as ``key: before → now``; keys are the configuration's, `input.*` the data's."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        found = []
        for key in sorted(set(before) | set(now)):
            found += diff_identities(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        return found
    return [] if before == now else [f"{_to_config_key(path)}: {_truncate_json(before)} → {_truncate_json(now)}"]


def _to_config_key(path: str) -> str:
    """The configuration key that a place in an identity stands for: what the user can change."""
    named = {"seed": "run.seed", "columns": "data.columns", "engine.kind": "run.engine"}
    return named.get(path, f"data.{path.removeprefix('prompt.')}" if path.startswith("prompt.") else path)


def _truncate_json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
