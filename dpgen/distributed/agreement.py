"""Agree on the job and on the input: all ranks do the same with the same rows.

- A difference is a `ConfigError` on every rank, before a model loads.
- The configurations are compared first, since the sections `parallel`, `work`, `run` and `output` also decide which
  collectives the ranks make.
- The contents are hashed once a node, by its first rank; the others load what that one has cached. A rank that finds
  other files than its node's first rank, or files that were replaced meanwhile, hashes them itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dpgen
from dpgen.config.environment import read_versions, select_result_variables
from dpgen.config.schema import Config
from dpgen.config.secrets import redact_secrets
from dpgen.config.sections import DataConfig
from dpgen.data.input_loading import load_input
from dpgen.data.input_rows import InputRows
from dpgen.data.model_identity import hash_chat_template, identify_adapters, identify_model
from dpgen.data.reading.files import check_run_dir_apart
from dpgen.data.storage.fetched_input import FetchedInput, fetch_input
from dpgen.data.storage.listing import decode_listing, encode_listing, find_addresses, list_addresses
from dpgen.distributed.group import RankGroup
from dpgen.errors import ConfigError
from dpgen.journal.code_identity import identify_code
from dpgen.journal.run_dir import RunDir
from dpgen.journal.run_identity import find_fingerprint, select_result_options

logger = logging.getLogger(__name__)

# Keys that ranks may set differently: places on a node's own disk and how a store is reached, whose contents are
# compared elsewhere or are this rank's own, and what only the terminal shows.
_LOCAL_KEYS = frozenset(
    [
        "run.dir",
        "run.log_level",
        "run.log_format",
        "run.progress_interval_s",
        "data.path",
        "data.storage_options",
        "data.cache_dir",
        "output.storage_options",
    ]
)


def check_same_job(config: Config, group: RankGroup) -> None:
    """Check that all ranks were started with the same job. Collective.

    Compares the configuration but for `_LOCAL_KEYS` and engine options that only change the speed, the versions of
    the packages, and the environment variables that may change results.

    Raises:
        ConfigError: a rank differs from rank 0. Names the rank and each differing key with both values.
    """
    values = _describe_job(config, os.environ)
    digests = {key: _hash_json(value) for key, value in values.items()}
    all_digests = group.all_gather_object(_hash_json(digests))
    if len(set(all_digests)) == 1:
        return
    # Only now are the values sent, without secrets: which of them differ shows in their hashes.
    shown = {key: json.dumps(redact_secrets(value, key.rpartition(".")[2])) for key, value in values.items()}
    jobs = group.all_gather_object({key: [digest, shown[key]] for key, digest in digests.items()})
    group.run_on_all_ranks(lambda: _raise_if_jobs_differ(jobs))


def fetch_agreed_input(data: DataConfig, group: RankGroup) -> FetchedInput:
    """Return the section `data` with files in place of addresses, fetched once a node. Collective.

    Rank 0 asks the stores for all ranks, so that every node fetches the same version of each object.

    Raises:
        ConfigError: a store refuses or has nothing of that name, an object has changed, or a disk is full.
        TransferStopped: a store broke off.
    """
    addresses = find_addresses(data.path)
    wanted = group.all_gather_object(addresses)
    if not any(wanted):
        return FetchedInput(data)
    group.enter_phase("fetching the input", is_slow=True)

    is_asked = group.rank == 0 or addresses != wanted[0]

    def list_wanted() -> dict[str, Any] | None:
        return encode_listing(list_addresses(addresses, data.storage_options, group.heartbeat)) if is_asked else None

    own = group.run_on_all_ranks(list_wanted)
    of_rank_0 = group.all_gather_object(own if group.rank == 0 else None)[0]
    listing = decode_listing(own if own is not None else of_rank_0)

    def fetch() -> FetchedInput:
        with group.node_leader_first():
            return fetch_input(data, listing, group.heartbeat)

    return group.run_on_all_ranks(fetch)


def open_input(
    data: DataConfig, group: RankGroup, run_dir: RunDir, check_columns: Callable[[InputRows], None]
) -> tuple[InputRows, dict[str, Any]]:
    """Load the input and return it with its fingerprint. Collective.

    The contents are not hashed again if run.json has the hash of the same files. A run directory of an older version
    keeps that version's fingerprint, if the input still has it.

    Args:
        check_columns: raises ConfigError where the configuration names a column that the input lacks. Not called for
            an empty input, whose columns may be unknown.

    Raises:
        ConfigError: the input can't be read, differs between ranks or nodes, or lacks a column.
    """

    check_run_dir_apart(data.path, run_dir.path)
    fetched = fetch_agreed_input(data, group)
    metadata = group.all_gather_object(group.run_on_all_ranks(run_dir.read_metadata))
    recorded: dict[str, Any] = next(filter(None, metadata), {})  # of rank 0, where it has any

    def load() -> tuple[InputRows, dict[str, Any] | None]:
        with group.node_leader_first():
            rows = load_input(data, fetched)
            read = rows.with_progress(group.heartbeat)
            return rows, find_fingerprint(read, recorded) if group.is_node_leader else None

    rows, fingerprint = group.run_on_all_ranks(load)
    key_of_leader = group.all_gather_object(rows.key)[group.nodes.index(group.nodes[group.rank])]

    def hash_other_files() -> dict[str, Any] | None:
        if fingerprint is None and rows.key != key_of_leader:
            return find_fingerprint(rows.with_progress(group.heartbeat), recorded)
        return fingerprint

    fingerprint = group.run_on_all_ranks(hash_other_files)
    fingerprints = [found for found in group.all_gather_object(fingerprint) if found is not None]
    sizes = group.all_gather_object(len(rows))

    def check() -> None:
        if any(num_rows != len(rows) for num_rows in sizes):
            counts = ", ".join(f"{num_rows:,}" for num_rows in sorted(set(sizes)))
            raise ConfigError(f"data.path={data.path}: ranks read different numbers of rows ({counts}). Is it growing?")
        if any(found != fingerprints[0] for found in fingerprints):
            raise ConfigError(
                f"data.path={data.path}: ranks or nodes hold different rows. Copy the same files to all nodes, and "
                "change none while a run starts"
            )
        if not rows.is_empty:
            check_columns(rows)

    group.run_on_all_ranks(check)
    return rows, fingerprints[0]


def find_what_names_stand_for(config: Config, group: RankGroup) -> dict[str, Any]:
    """Return what rank 0 finds where the configuration only has a name, and variables that it doesn't name. Collective.

    Returns:
        values by `dpgen.journal.run_dir.FOUND_KEYS`.

    Raises:
        ConfigError: a file of the model, or the chat template, can't be read.
    """

    def find() -> dict[str, Any] | None:
        if group.rank != 0:
            return None
        found: dict[str, Any] = {"variables": select_result_variables(os.environ)}
        code, without_file = identify_code(config)
        if code:  # older run directories lack the key
            found["code"] = code
        for name in without_file:
            logger.info(f"{name}: its source can't be found, so that a run does not notice if it changes")
        if config.run.engine == "fake":
            return found
        template = hash_chat_template(config.prompt)
        if config.lora:  # as above
            found["lora_files"] = identify_adapters(config.lora)
        return {**found, "model_files": identify_model(config.model, config.engine), "chat_template_hash": template}

    found: dict[str, Any] = group.all_gather_object(group.run_on_all_ranks(find))[0]
    return found


def _describe_job(config: Config, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return everything that must be the same on all ranks, by a name for the user."""
    values: dict[str, Any] = {}
    for section in dataclasses.fields(config):
        body = getattr(config, section.name)
        if section.name == "engine":
            body = select_result_options(body)
        elif dataclasses.is_dataclass(body) and not isinstance(body, type):
            body = dataclasses.asdict(body)
        if isinstance(body, Mapping):
            values |= {f"{section.name}.{key}": value for key, value in body.items()}
        else:
            values[section.name] = body
    values = {key: value for key, value in values.items() if key not in _LOCAL_KEYS}
    values |= {f"version of {package}": version for package, version in read_versions().items()}
    values["source files of dpgen"] = _hash_json(sorted(_list_source_files()))
    return values | {f"variable {name}": value for name, value in select_result_variables(environment).items()}


def _list_source_files() -> Iterable[tuple[str, int]]:
    """Yield name and size of dpgen's files: two checkouts may have the same version."""
    package = Path(dpgen.__file__).parent
    for path in package.rglob("*.py"):
        yield str(path.relative_to(package)), path.stat().st_size


def _raise_if_jobs_differ(jobs: Sequence[Mapping[str, Sequence[str]]]) -> None:
    """Raise ConfigError for the first rank whose job is not rank 0's."""
    unset = ("", "not set")
    for rank, job in enumerate(jobs):
        keys = [key for key in {**jobs[0], **job} if jobs[0].get(key, unset)[0] != job.get(key, unset)[0]]
        if not keys:
            continue
        others = sum(other != jobs[0] for other in jobs) - 1
        also = f" (so do {others:,} more)" if others > 1 else " (so does 1 more)" if others else ""
        raise ConfigError(
            *(
                f"rank {rank} differs from rank 0{also}: {key}: {jobs[0].get(key, unset)[1]} on rank 0, "
                f"{job.get(key, unset)[1]} on rank {rank}. Start all ranks with the same configuration, versions and "
                "environment"
                for key in keys
            )
        )


def _hash_json(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
