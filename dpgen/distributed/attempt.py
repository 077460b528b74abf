"""Begin an attempt: check and lock the run directory, number the attempt, and record what it is.

An attempt is one start of the job on a run directory. Its number is part of the names of the segments that it writes,
so that no attempt ever appends to another one's. run.json names the versions that each attempt ran with.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from dpgen.config.schema import Config
from dpgen.distributed.environment import read_versions
from dpgen.distributed.group import RankGroup
from dpgen.journal.reader import last_attempt
from dpgen.journal.run_dir import RunDir

logger = logging.getLogger(__name__)


def begin_attempt(config: Config, group: RankGroup, run_dir: RunDir, identity: Mapping[str, Any]) -> int:
    """Return the number of this attempt: one more than the highest that any rank's run directory knows. Collective.

    Args:
        identity: what decides the results; see `dpgen.journal.run_dir.compute_run_identity`.

    Raises:
        ConfigError: the directory can't be used, holds something else, or another run is at work there.
    """

    def check() -> None:
        run_dir.check_resumable(identity, config.run.resume)
        if group.rank == 0:
            run_dir.lock()

    def create() -> int:
        with group.node_leader_first():
            run_dir.create()
        return last_attempt(run_dir.journal)

    group.run_on_all_ranks(check)
    attempt: int = 1 + max(group.all_gather_object(group.run_on_all_ranks(create)))

    def record() -> None:
        if group.rank == 0:
            run_dir.success.unlink(missing_ok=True)  # failed rows of a finished run are retried: it is unfinished
            run_dir.write_config(config)
            versions = _record_versions(run_dir.read_metadata().get("versions"), attempt)
            run_dir.update_metadata(identity=identity, attempt=attempt, dp_size=group.size, versions=versions)

    def record_elsewhere() -> None:
        if not run_dir.read_metadata():  # rank 0 doesn't see this directory, which needs to know what it holds
            run_dir.update_metadata(identity=identity)

    group.run_on_all_ranks(record)
    group.run_on_all_ranks(record_elsewhere)
    return attempt


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
