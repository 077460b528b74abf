"""Collect what a run directory tells about its run; every part may be missing, of an older version, or damaged."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpgen.config.loader import load
from dpgen.config.schema import Config
from dpgen.config.secrets import redact_secrets, redact_text
from dpgen.config.yaml import yaml12
from dpgen.config.yaml.yaml_source import read_file
from dpgen.errors import DpgenError
from dpgen.journal.run_dir import RunDir
from dpgen.journal.run_identity import get_num_rows
from dpgen.monitoring.status.record import RankRecord, read_records
from dpgen.monitoring.status.run_status import RunState, RunStatus, RunWatcher, watch_until_known
from dpgen.report.journal_facts import JournalFacts, read_journal
from dpgen.report.prompts import read_prompts
from dpgen.report.spending import Efficiency, Spending, compute_efficiency, compute_spending
from dpgen.report.time_budget import TimeBudget
from dpgen.report.timeline import Timeline, read_timeline

_MAX_CONFIG_CHARS = 40_000
_MAX_PARSED_CHARS = 200_000  # YAML takes a second for that
_LIVE = ("starting", "live", "checking")


@dataclass(frozen=True)
class RunEnding:
    """Say how the run ended, where the caller is the run itself and knows."""

    state: RunState
    reason: str | None = None


@dataclass
class ReportFacts:
    """Hold all that the page shows.

    Attributes:
        metadata: the content of run.json; empty if there is none.
        success: the content of `_SUCCESS`; empty if there is none.
        status: as `dpgen status` has it; None where it can't be read.
        outcome: see `RunEnding`.
        latencies: requests by how long the engine had them, over the ranks of the newest attempt.
        config_text: the resolved configuration, without secrets; "" if it is not here.
        command: repeats the run; "" where the configuration is not here.
        prompts: of the rows that are shown, by row, as far as they are at hand.
        notes: what is missing, in sentences.
    """

    path: Path
    metadata: Mapping[str, Any] = field(default_factory=dict)
    success: Mapping[str, Any] = field(default_factory=dict)
    status: RunStatus | None = None
    outcome: RunEnding | None = None
    journal: JournalFacts = field(default_factory=JournalFacts)
    timeline: Timeline = field(default_factory=lambda: Timeline([], []))
    spending: Spending | None = None
    efficiency: Efficiency | None = None
    latencies: list[int] = field(default_factory=list)
    config_text: str = ""
    command: str = ""
    prompts: Mapping[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def state(self) -> RunState:
        if self.outcome is not None:
            return self.outcome.state
        return "unknown" if self.status is None else self.status.state

    @property
    def reason(self) -> str | None:
        known = self.outcome.reason if self.outcome is not None else None
        return known or (None if self.status is None else self.status.reason)

    @property
    def num_rows(self) -> int | None:
        """Return the rows of the input; None if not known."""
        number = get_num_rows(self.metadata) if isinstance(self.metadata.get("identity"), Mapping) else None
        return number if number is not None or self.status is None else self.status.num_rows

    @property
    def num_generated_tokens(self) -> float:
        """Return the generated tokens of rows with a result; estimated by the sample unless the run is finished."""
        recorded = self.success.get("num_generated_tokens")
        if isinstance(recorded, int) and self.state == "finished":
            return recorded
        statistics = self.journal.statistics
        num_succeeded = self.journal.num_done - self.journal.num_errors
        return sum(statistics.lengths) / max(1, statistics.num_rows) * num_succeeded


def has_run(path: Path) -> bool:
    """Return True if the directory holds a run, or the beginning of one."""
    return RunWatcher(path).has_run


def collect_facts(
    path: Path, budget: TimeBudget, outcome: RunEnding | None = None, sleep: Callable[[float], None] | None = None
) -> ReportFacts:
    """Return what the directory tells, without an error.

    Args:
        outcome: how the run ended, if the caller is the run; None to judge by its files.
        sleep: waits, where it takes a few seconds to see whether the ranks live; None not to wait.
    """
    run_dir = RunDir(str(path))
    facts = ReportFacts(path, outcome=outcome)
    facts.metadata, facts.success = _read_metadata(run_dir, facts.notes), run_dir.read_success()
    facts.status = _read_status(path, facts.notes, sleep)
    facts.timeline = read_timeline(run_dir.status, budget, is_over=facts.state not in _LIVE)
    facts.journal = read_journal(run_dir.journal, budget)
    config = _read_config(run_dir, facts)
    gpus_per_rank = 0 if config is None or _uses_no_gpu(config, facts.metadata) else config.gpus_per_rank
    is_live = facts.state in _LIVE
    facts.spending = compute_spending(
        facts.timeline, facts.journal, facts.num_generated_tokens, gpus_per_rank, is_live=is_live
    )
    facts.efficiency = compute_efficiency(
        facts.timeline, facts.journal, facts.spending, facts.metadata, facts.num_generated_tokens
    )
    facts.latencies = _sum_latencies(read_records(run_dir.status))
    if not budget.is_spent and config is not None:
        facts.prompts = read_prompts(run_dir, config, [result.row for result in facts.journal.statistics.rows])
    facts.notes += [*_find_missing(facts), *facts.timeline.notes, *facts.journal.notes]
    return facts


def _read_metadata(run_dir: RunDir, notes: list[str]) -> Mapping[str, Any]:
    try:
        metadata = run_dir.read_metadata()
    except DpgenError as error:
        notes.append(f"{error}.")
        return {}
    return metadata


def _read_status(path: Path, notes: list[str], sleep: Callable[[float], None] | None) -> RunStatus | None:
    watcher = RunWatcher(path)
    try:
        return watcher.read() if sleep is None else watch_until_known(watcher, sleep)
    except Exception as error:  # noqa: BLE001 - the boundary to files that may hold anything
        notes.append(f"The status can't be read: {error}.")
        return None


def _read_config(run_dir: RunDir, facts: ReportFacts) -> Config | None:
    """Return the configuration, and keep its text and the command for the page."""
    path = run_dir.path / "config.yaml"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    is_small = len(text) <= _MAX_PARSED_CHARS
    try:
        text = yaml12.dump(redact_secrets(read_file(str(path)).value)) if is_small else redact_text(text)
    except Exception:  # noqa: BLE001 - the boundary to a file that a person may have changed
        text = redact_text(text)
    is_cut = len(text) > _MAX_CONFIG_CHARS
    facts.config_text = text[:_MAX_CONFIG_CHARS] + ("\n# ... the rest is in config.yaml" if is_cut else "")
    facts.command = _make_command(path, facts)
    try:
        return load([str(path)], []) if is_small else None
    except Exception:  # noqa: BLE001 - of another version, or files that it names are gone
        return None


def _make_command(path: Path, facts: ReportFacts) -> str:
    """Return the command that runs the same configuration again, into another directory."""
    num_ranks = facts.metadata.get("dp_size")
    num_ranks = num_ranks if isinstance(num_ranks, int) and num_ranks > 0 else 1
    hosts = {view.host for view in facts.status.ranks if view.host} if facts.status is not None else set()
    arguments = f"run {shlex.quote(str(path))} run.dir={shlex.quote(str(path.parent) + '-again')}"
    if num_ranks == 1:
        return f"dpgen {arguments}"
    if len(hosts) > 1:
        return f"srun -n {num_ranks} python -m dpgen {arguments}"
    return f"torchrun --standalone --nproc-per-node {num_ranks} -m dpgen {arguments}"


def _uses_no_gpu(config: Config, metadata: Mapping[str, Any]) -> bool:
    engine = metadata.get("engine")
    device = engine.get("device") if isinstance(engine, Mapping) else None
    return config.run.engine == "fake" or device in ("cpu", "none")


def _sum_latencies(records: list[RankRecord]) -> list[int]:
    newest = max((record.attempt for record in records if record.attempt is not None), default=None)
    columns = [record.latencies for record in records if record.attempt == newest and newest is not None]
    length = max(map(len, columns), default=0)
    return [sum(counts[bin] for counts in columns if bin < len(counts)) for bin in range(length)]


def _find_missing(facts: ReportFacts) -> Iterator[str]:
    if not facts.metadata:
        yield "There is no run.json, so the number of rows and the versions are not known."
    if not facts.timeline.attempts:
        yield (
            "No rank's history is here (RUN_DIR/status), as of an older version of dpgen or of a run whose ranks ended "
            "at once: the throughput, the timeline and the use of time are missing."
        )
    elif (num_ranks := facts.status.num_ranks if facts.status else 0) > len(facts.timeline.attempts[-1].ranks):
        yield (
            f"The histories of {len(facts.timeline.attempts[-1].ranks):,} of {num_ranks:,} ranks are here; those of "
            "other nodes are where these keep the run directory."
        )
    if not facts.config_text:
        yield "There is no config.yaml, so the configuration is missing."
    if not facts.journal.num_done:
        yield "No row has a result."


def to_json(value: Any) -> str:
    """Return a value as JSON for a person."""
    return json.dumps(redact_secrets(value), ensure_ascii=False, default=str)
