"""Bring the result home: gather manifests and segments, then let rank 0 write the final dataset."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dpgen.config.sections import OutputConfig, RunConfig
from dpgen.data.input_rows import InputRows
from dpgen.distributed.attempt import shares_run_dir
from dpgen.distributed.group import RankGroup
from dpgen.errors import DpgenError, NoRowSucceeded
from dpgen.formatting import format_count
from dpgen.journal.format import parse_name
from dpgen.journal.reader import index_journal, list_segments
from dpgen.journal.run_dir import RunDir
from dpgen.journal.run_identity import diff_identities
from dpgen.journal.writer import JournalWriter
from dpgen.output.columns import DatasetFormat
from dpgen.output.dataset_writer import write_dataset
from dpgen.output.file_set import find_lost_files
from dpgen.output.gather import gather_segments
from dpgen.output.openai_batch.response_files import FILE_SUFFIX, OPENAI_BATCH
from dpgen.records import RankManifest

logger = logging.getLogger(__name__)


def is_already_complete(
    config: RunConfig, group: RankGroup, run_dir: RunDir, identity: Mapping[str, Any], resume: str
) -> bool:
    """Return True if rank 0's run directory holds this run's result, and nothing is to be retried. Collective.

    A result whose files were removed does not count: it is written again from the journal.

    Args:
        resume: `run.resume`, as the job's restarts leave it.

    Raises:
        DpgenError: the result is there, and no row has succeeded; or it is gone, and the journal lacks rows of it.
    """
    wants_more = bool(config.retry_errors) or resume == "never"

    def look() -> bool:
        if group.rank > 0 or wants_more or not run_dir.is_finished:
            return False
        is_same = not diff_identities(run_dir.read_metadata().get("identity"), identity)
        return is_same and not _must_write_again(run_dir, identity)

    is_complete: bool = group.all_gather_object(group.run_on_all_ranks(look))[0]
    if is_complete:
        logger.info(f"{run_dir.path} holds this run's finished result already, nothing to do")

        def check() -> None:
            if group.rank == 0 and not config.allow_all_errors:
                raise_if_no_row_succeeded(run_dir.read_success(), run_dir)

        group.run_on_all_ranks(check)
    return is_complete


def _must_write_again(run_dir: RunDir, identity: Mapping[str, Any]) -> bool:
    """Return True if files of a finished result were removed, and the journal holds all its rows."""
    file_format = identity["output"]["format"]
    problem = find_lost_files(run_dir.dataset, FILE_SUFFIX if file_format == OPENAI_BATCH else file_format)
    if problem is None:
        return False
    num_rows = identity["input"]["num_rows"]
    num_missing = num_rows - len(index_journal(run_dir.journal))
    if num_missing > 0:
        raise DpgenError(
            f"{run_dir.path}: {problem}, and the journal lacks {num_missing:,} of {format_count(num_rows, 'row')}, so "
            "the finished result can't be written again from it. Put the files back; or remove "
            f"{run_dir.success}, and the same command generates the missing rows"
        )
    logger.warning(f"{run_dir.path}: {problem}, writing the finished result again from the journal")
    return True


def gather_results(
    group: RankGroup, run_dir: RunDir, journal: JournalWriter, manifest: RankManifest, config: OutputConfig
) -> list[RankManifest] | None:
    """Gather every rank's manifest, and its rows where rank 0 doesn't see them. Collective.

    Args:
        journal: this rank's, sealed.

    Returns:
        the manifests, by rank, on rank 0; None on the others.
    """
    is_shared = shares_run_dir(group, run_dir.path)
    manifest = replace(
        manifest,
        rank=group.rank,
        sees_rank_0=is_shared,
        num_rows=journal.num_rows,
        num_bytes=journal.num_bytes,
    )
    gathered = group.gather_object(asdict(manifest))
    manifests = None if gathered is None else [RankManifest(**fields) for fields in gathered]
    is_sender = not is_shared if config.gather == "auto" else config.gather == "always"
    senders = {(journal.attempt, rank) for rank in group.all_gather_object(journal.rank)}
    segments = []
    if is_sender and group.rank > 0:
        stored = list_segments(run_dir.journal) if group.is_node_leader and not is_shared else []
        segments = sorted({*_select_orphans(stored, senders), *journal.paths})
    num_rounds = gather_segments(group, run_dir.journal, segments, config.gather_bytes)
    if num_rounds:
        logger.info(f"gathered rows to rank 0 in {format_count(num_rounds, 'round')}")

    def record() -> None:
        if manifests is not None:
            run_dir.update_metadata(manifests=[vars(rank) for rank in manifests], gather_rounds=num_rounds)

    group.run_on_all_ranks(record)
    return manifests


def _select_orphans(stored: Sequence[Path], senders: Collection[tuple[int, int]]) -> list[Path]:
    """Return the segments that no rank sends as its own: a node's first rank sends them.

    They are of earlier attempts, or of ranks that were lost in this one: their rows count as done.

    Args:
        senders: attempt and rank in the names of the living ranks' segments.
    """
    keys = {path: parse_name(path.name) for path in stored}
    return [path for path, key in keys.items() if key is not None and key[:2] not in senders]


def write_result(
    rows: InputRows, run_dir: RunDir, dataset_format: DatasetFormat, rows_per_file: int, *, allow_all_errors: bool
) -> None:
    """Write RUN_DIR/dataset and _SUCCESS. Only rank 0 calls this.

    Args:
        rows_per_file: the maximum number of rows in one file.
        allow_all_errors: count a result without any completion as a success.

    Raises:
        DpgenError: a row has no result, or the disk refuses; or the result is written, and no row has succeeded.
    """
    summary = write_dataset(rows, run_dir, dataset_format, rows_per_file)
    _log_summary(summary, run_dir)
    if not allow_all_errors:
        raise_if_no_row_succeeded(summary, run_dir)


def raise_if_no_row_succeeded(summary: Mapping[str, Any], run_dir: RunDir) -> None:
    """Raise NoRowSucceeded if every row of a result has an error; an empty result is a success.

    Args:
        summary: as `write_dataset` returns it, or the content of `_SUCCESS`.
    """
    num_rows, errors = summary.get("num_rows", 0), summary.get("errors")
    if not num_rows or not errors or sum(errors.values()) < num_rows:
        return
    type, number = max(errors.items(), key=lambda item: item[1])
    example = summary.get("most_frequent_error")
    reason = f"{number:,} of them {type}" if len(errors) > 1 else type
    if example:
        reason += f" (first: {example})"
    problem = "the only row has an error" if num_rows == 1 else f"all {num_rows:,} rows have an error"
    raise NoRowSucceeded(
        f"no row succeeded: {problem}, {reason}. The result is in {run_dir.dataset}. Fix the cause and generate the "
        "rows again with run.retry_errors=true, and with run.resume=force if a setting changes, or in another run.dir "
        "if the input changes; or accept this result with run.allow_all_errors=true"
    )


def _log_summary(summary: dict[str, Any], run_dir: RunDir) -> None:
    if summary["num_errors"]:
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in summary["errors"].items())
        logger.info(f"rows with an error: {kinds} (first: {summary['first_error']})")
    num_rows = format_count(summary["num_rows"], "row")
    logger.info(f"done: {num_rows}, {summary['num_errors']:,} with an error, in {run_dir.dataset}")
