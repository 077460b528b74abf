"""Show what the trials have measured: a table, the best settings as YAML, and the command that uses them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpgen.formatting import format_count, format_duration
from dpgen.tuning.search import Search
from dpgen.tuning.space import CHANGES_HELP, MAX_NUM_SEQS, find_changes
from dpgen.tuning.trial import Measurement, TrialResult

AS_CONFIGURED = "as configured"
MARK = "# Written by dpgen tune"


@dataclass(frozen=True)
class Row:
    """Hold one line of the table: one number of sequences in one trial, or a trial that found nothing.

    Attributes:
        overrides: configuration key → value, where it differs from the configuration.
        better: over the first line's tokens/s, as a fraction; None for that line, and where nothing was measured.
        job_s, gpu_hours: for the whole job, start-up included; None if unknown. The latter are 0 without GPUs.
    """

    trial: int
    overrides: Mapping[str, Any]
    tokens_per_s: float | None
    half_width: float
    better: float | None
    job_s: float | None
    gpu_hours: float | None
    is_best: bool
    note: str = ""

    @property
    def changes(self) -> str:
        """Return what the settings change; "-" for those of the configuration."""
        return find_changes(self.overrides) if self.overrides else "-"


def list_rows(search: Search, base_limit: int | None, num_gpus: int) -> list[Row]:
    """Return the lines of the table, in the order of the trials.

    Args:
        base_limit: sequences of each engine as the job is configured; None for the engine's default.
        num_gpus: of the job; 0 where it uses none.
    """
    base = find_base_stage(search, base_limit)
    rows = []
    for result in search.results:
        own = {key: value for key, value in result.overrides.items() if key != MAX_NUM_SEQS}
        if result.error is not None or not result.stages:
            note = f"failed: {result.error}" if result.error is not None else result.reason
            rows.append(Row(result.number, dict(result.overrides), None, 0.0, None, 0.0, 0.0, False, note))
        for stage in result.stages:
            is_base_limit = stage.max_num_seqs == (base_limit or _get_default_limit(search))
            overrides = own if is_base_limit else {**own, MAX_NUM_SEQS: stage.max_num_seqs}
            generating_s = search.estimate_job_s(stage.tokens_per_s)
            job_s = generating_s + result.start_s if generating_s else None
            rows.append(
                Row(
                    result.number,
                    overrides,
                    stage.tokens_per_s,
                    stage.half_width,
                    None if base is None or stage is base else stage.tokens_per_s / base.tokens_per_s - 1,
                    job_s,
                    None if job_s is None else job_s * num_gpus / 3600,
                    search.best is not None and stage is search.best.stage,
                    _describe_stage(stage),
                )
            )
    return rows


def find_base_stage(search: Search, base_limit: int | None) -> Measurement | None:
    """Return what was measured of the job as it is configured, or else the first that was measured."""
    limit = base_limit or _get_default_limit(search)
    stages = [
        stage
        for result in search.results
        for stage in result.stages
        if not {*result.overrides} - {MAX_NUM_SEQS} and stage.max_num_seqs == limit
    ]
    return next(iter([*stages, *(stage for result in search.results for stage in result.stages)]), None)


def format_table(rows: Sequence[Row], *, has_gpus: bool) -> Iterator[str]:
    """Yield the table's lines, its head first."""
    unit = "GPU-hours" if has_gpus else "time"
    head = ("trial", "settings", "tokens/s", "better", unit, "changes")
    lines = [head, *(_format_row(row, has_gpus=has_gpus) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line, row in zip(lines, [None, *rows], strict=True):
        cells = [
            text.ljust(width) if column in (1, 5) else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        mark = "*" if row is not None and row.is_best else " "
        note = f"  {row.note}" if row is not None and row.note else ""
        yield f"{mark} {'  '.join(cells).rstrip()}{note}"


def format_end(search: Search, rows: Sequence[Row]) -> Iterator[str]:
    """Yield what follows the table: the legend, and what tuning cost."""
    used = {row.changes for row in rows}
    for name, meaning in CHANGES_HELP:
        if name in used:
            yield f"  {name}: {meaning}"
    num_rows = sum(result.num_rows for result in search.results)
    yield (
        f"{format_count(len(search.results), 'trial')} took {format_duration(search.spent_s)}, and generated "
        f"{format_count(num_rows, 'row')}, which are done. Stopped because {search.reason}"
    )


def format_settings(overrides: Mapping[str, Any]) -> str:
    """Return settings as ``engine.max_num_seqs=512 parallel.tensor_parallel_size=2``."""
    return " ".join(f"{key}={_format_value(value)}" for key, value in overrides.items()) or AS_CONFIGURED


def to_overlay(search: Search, comments: Sequence[str], before: Mapping[str, Any] | None = None) -> str:
    """Return the best settings as YAML, to be given after the job's own configuration.

    Args:
        before: sections and keys of the overlay that was a part of that configuration, and that this one replaces.
    """
    from dpgen.config.yaml import yaml12

    assert search.best is not None
    sections = dict(before or {})
    for key, value in search.best.overrides.items():
        section, _, name = key.partition(".")
        sections.pop(key, None)  # written with a dot
        sections[section] = {**(sections.get(section) or {}), name: value}
    return "".join(f"{line}\n" for line in (MARK, *(f"# {comment}" for comment in comments))) + yaml12.dump(sections)


def make_command(arguments: Sequence[str], overlay: str, overrides: Mapping[str, Any], num_ranks: int) -> str:
    """Return the command that runs the job with the overlay.

    Args:
        arguments: YAML files and key=value of the job. Given on the command line, a key would win over the overlay:
            the overlay's keys are left out, and stand again after a whole section (``engine={...}``).
        overrides: what the overlay sets.
    """
    from dpgen.config.loader import split_arguments

    files, given = split_arguments(arguments)
    files = [path for path in files if not is_same_file(path, overlay)]
    values = [value for value in given if value.partition("=")[0] not in overrides]
    sections = {value.partition("=")[0] for value in values}
    values += [f"{key}={_format_value(value)}" for key, value in overrides.items() if key.partition(".")[0] in sections]
    launcher = f"torchrun --nproc-per-node {num_ranks} -m dpgen" if num_ranks > 1 else "dpgen"
    return f"{launcher} run {shlex.join([*files, overlay, *values])}"


def is_same_file(path: str, other: str) -> bool:
    """Return True if both paths are of one file, whether it is there or not."""
    return os.path.realpath(os.path.expanduser(path)) == os.path.realpath(os.path.expanduser(other))


def _format_row(row: Row, *, has_gpus: bool) -> tuple[str, ...]:
    settings = format_settings(row.overrides)
    if row.tokens_per_s is None:
        return str(row.trial), settings, "-", "-", "-", row.changes
    better = "-" if row.better is None else f"{100 * row.better:+.1f} %"
    if row.job_s is None or row.gpu_hours is None:
        cost = "unknown"
    else:
        cost = f"{row.gpu_hours:,.2f}" if has_gpus else format_duration(row.job_s)
    return str(row.trial), settings, f"{row.tokens_per_s:,.0f} ± {row.half_width:,.0f}", better, cost, row.changes


def _format_value(value: Any) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value)


def _describe_stage(stage: Measurement) -> str:
    if stage.is_loser:
        return "stopped early: surely slower"
    return "" if stage.is_settled else "measured before the engines had settled"


def _get_default_limit(search: Search) -> int:
    """Return what an engine runs by itself: that of the first start that left it the choice."""

    def chooses(result: TrialResult) -> bool:
        return MAX_NUM_SEQS not in result.overrides

    return next((result.engine_max_num_seqs for result in search.results if chooses(result)), 0)
