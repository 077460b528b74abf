"""Begin an attempt: check and lock the run directory, number the attempt, and record what it is.

An attempt is one start of the job on a run directory. Its number is part of the names of the segments that it writes,
so that no attempt ever appends to another one's. It follows from run.json, which every node's first rank writes before
any segment is made; and from the segments' names, where run.json is lost or not of this node's attempts. Segments alone
would not do: those without rows are removed. run.json also names the versions that each attempt ran with, and the
settings that run.resume=force has replaced.

A run directory's small files have one writer: rank 0, and where rank 0 doesn't see the directory, the first rank of
that node.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpgen.config.environment import read_versions
from dpgen.config.schema import Config
from dpgen.distributed.group import RankGroup
from dpgen.distributed.topology import read_boot_id
from dpgen.errors import ConfigError, DpgenError
from dpgen.formatting import format_ranges
from dpgen.journal.reader import last_attempt, list_attempts
from dpgen.journal.row_notes import remove_notes
from dpgen.journal.run_dir import RunDir
from dpgen.journal.run_identity import (
    compute_run_identity,
    diff_identities,
    diff_settings,
    find_other_settings,
    get_fingerprint_version,
    get_num_rows,
)
from dpgen.lifecycle.restart import describe_start, is_restart, merge_starts

logger = logging.getLogger(__name__)

_PROCESS_ID = uuid.uuid4().hex


@dataclass(frozen=True)
class JobStart:
    """Describe this start of the job.

    Attributes:
        resume: `run.resume`; "auto" for "never" if the same job, restarted, has begun this run.
        description: what tells the job's starts apart, for run.json.
    """

    resume: str
    description: Mapping[str, Any]


def read_job_start(config: Config, group: RankGroup, run_dir: RunDir) -> JobStart:
    """Return this start of the job, and how it treats what the run directory holds. Collective.

    With run.resume=never, a restart (torchrun --max-restarts, a requeued SLURM job) resumes what its job has begun.
    """
    starts = group.all_gather_object(describe_start(os.environ, f"{socket.gethostname()} {read_boot_id()}"))
    description, resume = {**merge_starts(starts), "process": _PROCESS_ID}, config.run.resume
    before = group.run_on_all_ranks(lambda: run_dir.read_metadata().get("start") if group.rank == 0 else None)
    is_own = isinstance(before, Mapping) and before.get("process") == _PROCESS_ID  # begun before ranks were lost
    if group.all_gather_object(resume == "never" and (is_own or is_restart(before, description)))[0]:
        resume = "auto"
    return JobStart(resume, description)


def looks_resumable(
    config: Config, group: RankGroup, run_dir: RunDir, found: Mapping[str, Any], start: JobStart
) -> bool:
    """Return True if rank 0's run directory lets this job generate, as far as is known without the input. Collective.

    The directory of an earlier attempt is then reserved for this run. Where it returns False, `begin_attempt` says why.

    Args:
        found: what the configuration's names stand for, as in `compute_run_identity`.
        start: from `read_job_start`.

    Raises:
        ConfigError: another run is at work there.
    """

    def look() -> bool:
        if group.rank != 0 or run_dir.is_finished:
            return False
        metadata = run_dir.read_metadata()
        input_then = (metadata.get("identity") or {}).get("input") or {}
        try:
            run_dir.check_resumable(compute_run_identity(config, input_then, found), start.resume)
        except ConfigError:
            return False
        if metadata:
            run_dir.lock()
        return True

    return bool(group.all_gather_object(group.run_on_all_ranks(look))[0])


def begin_attempt(
    config: Config,
    group: RankGroup,
    run_dir: RunDir,
    identity: Mapping[str, Any],
    start: JobStart,
    fingerprint: Callable[[int, int | None], Mapping[str, Any]] | None = None,
) -> int:
    """Return the number of this attempt: one more than the highest that any rank's run directory knows. Collective.

    Args:
        start: from `read_job_start`.
        identity: what decides the results; see `dpgen.journal.run_identity.compute_run_identity`.
        fingerprint: returns the fingerprint of the input's first rows, given their number and the fingerprint's
            version, so that a run whose input has grown at its end resumes; None to accept only the same input.

    Raises:
        ConfigError: the directory can't be used, holds something else, or another run is at work there.
    """

    prefixes = _hash_earlier_inputs(group, run_dir, identity["input"]["num_rows"], fingerprint)

    def check() -> None:
        run_dir.check_resumable(identity, start.resume, prefixes)
        if group.rank == 0:
            run_dir.lock()

    def create() -> None:
        with group.node_leader_first():
            run_dir.create()

    group.run_on_all_ranks(check)
    group.run_on_all_ranks(create)
    is_shared = shares_run_dir(group, run_dir.path)
    # At a thousand ranks and after many attempts, a listing by every rank is a load on a shared disk.
    is_reader = group.is_node_leader or not is_shared
    found = group.run_on_all_ranks(lambda: _find_last_attempt(run_dir) if is_reader else 0)
    attempt: int = 1 + max(group.all_gather_object(found))

    def record_elsewhere() -> None:
        # A directory that rank 0 doesn't see needs to know what it holds, too. The first rank of its node writes that.
        with group.node_leader_first():
            metadata = {} if is_shared else run_dir.read_metadata()
            if not is_shared and metadata.get("identity") != identity:
                remove_notes(run_dir.journal)
            if not is_shared and (metadata.get("identity"), metadata.get("attempt")) != (identity, attempt):
                run_dir.update_metadata(identity=identity, attempt=attempt)

    group.run_on_all_ranks(lambda: _record(config, group, run_dir, identity, start, attempt))
    group.run_on_all_ranks(record_elsewhere)
    return attempt


def warn_of_other_settings(run_dir: RunDir, attempt: int, num_done: int) -> None:
    """Warn if this attempt replaces settings with which the rows were generated that run.resume=force keeps.

    Args:
        num_done: rows of the run that are not generated again.
    """
    metadata = run_dir.read_metadata()
    if not num_done or str(attempt) not in metadata.get("earlier_identities", {}):
        return
    for attempts, differences in find_other_settings(metadata, list_attempts(run_dir.journal)):
        logger.warning(
            f"attempt {format_ranges(np.array(attempts))} ran with other settings ({'; '.join(differences)}), and "
            f"run.resume=force keeps its rows: {num_done:,} are done. Choose another run.dir to generate all rows anew"
        )


def shares_run_dir(group: RankGroup, run_dir: Path) -> bool:
    """Return True if this rank's run directory is rank 0's. Collective.

    Rank 0 creates a file with a random name, and every other rank looks for the file. The file is removed at the end.

    Raises:
        DpgenError: rank 0 can't create the file.
    """
    name: str = group.all_gather_object(f".rank-0-{uuid.uuid4().hex}" if group.rank == 0 else None)[0]
    marker = run_dir / name

    def create() -> None:
        if group.rank == 0:
            marker.touch()

    def remove() -> None:
        if group.rank == 0:
            marker.unlink(missing_ok=True)

    group.run_on_all_ranks(lambda: _translate_errors(create, run_dir))  # no rank looks before the file exists
    is_shared = marker.exists()
    group.all_gather_object(None)  # a barrier: rank 0 removes the file after every rank has looked
    group.run_on_all_ranks(lambda: _translate_errors(remove, run_dir))
    return is_shared


def _record(
    config: Config, group: RankGroup, run_dir: RunDir, identity: Mapping[str, Any], start: JobStart, attempt: int
) -> None:
    """Write on rank 0 what this attempt is."""
    if group.rank > 0:
        return
    metadata = run_dir.read_metadata()
    # If failed rows are retried, the result stays finished until the first of them is journaled. With other settings
    # (run.resume=force), it is no result of what run.json describes from now on.
    before = metadata.get("identity")
    if diff_identities(before, identity):
        _translate_errors(run_dir.mark_unfinished, run_dir.path)
        remove_notes(run_dir.journal)
    run_dir.write_config(config)
    versions = _record_versions(metadata.get("versions"), attempt)
    fields = {"attempt": attempt, "dp_size": group.size, "versions": versions, "start": start.description}
    if before and diff_settings(before, identity) and list_attempts(run_dir.journal):
        fields["earlier_identities"] = {**(metadata.get("earlier_identities") or {}), str(attempt): before}
    fields["created"] = metadata.get("created", int(time.time()))  # when the run began, whatever the attempt
    run_dir.update_metadata(identity=identity, **fields)


def _find_last_attempt(run_dir: RunDir) -> int:
    """Return the highest attempt that a run directory knows; 0 if it knows none."""
    recorded = run_dir.read_metadata().get("attempt")
    return max(recorded if isinstance(recorded, int) else 0, last_attempt(run_dir.journal))


def _hash_earlier_inputs(
    group: RankGroup,
    run_dir: RunDir,
    num_rows: int,
    fingerprint: Callable[[int, int | None], Mapping[str, Any]] | None,
) -> dict[int, Mapping[str, Any]]:
    """Return the fingerprint of the input's first rows for each smaller input that a run directory names. Collective.

    Rank 0 hashes for all ranks, which have the same rows. If no input has grown, nothing is hashed.
    """

    def read_size() -> tuple[int, int | None] | None:
        metadata = run_dir.read_metadata()
        size = get_num_rows(metadata)
        return None if size is None else (size, get_fingerprint_version(metadata))

    stored = group.all_gather_object(group.run_on_all_ranks(read_size))
    sizes = sorted({tuple(size) for size in stored if size is not None and size[0] < num_rows})
    if not sizes or fingerprint is None:
        return {}
    fingerprints = group.all_gather_object([fingerprint(*size) for size in sizes] if group.rank == 0 else None)[0]
    return {size: prefix for (size, _), prefix in zip(sizes, fingerprints, strict=True)}


def _translate_errors(action: Callable[[], None], run_dir: Path) -> None:
    try:
        action()
    except OSError as error:
        raise DpgenError(
            f"run.dir={run_dir} can't be written: {error.strerror}. No synced row is lost: free space or fix the disk, "
            "then rerun the same command to resume"
        ) from None


def _record_versions(recorded: Any, attempt: int) -> dict[str, Any]:
    """Return the versions of all attempts, this one's included, and warn if an earlier attempt ran with others.

    Args:
        recorded: attempt (as text) → package → version, from run.json; None in directories of older versions.
    """
    attempts: dict[str, Any] = dict(recorded) if isinstance(recorded, Mapping) else {}
    versions = read_versions()
    for earlier in sorted(attempts, key=int, reverse=True):
        before = attempts[earlier]
        changes = [
            f"{name} {before.get(name)} → {versions.get(name)}"
            for name in sorted({*before, *versions})
            if before.get(name) != versions.get(name)
        ]
        if changes:
            logger.warning(
                f"attempt {earlier} ran with other versions ({', '.join(changes)}), so its rows may differ from what "
                "this attempt generates, keeping them"
            )
            break
    return {**attempts, str(attempt): versions}
