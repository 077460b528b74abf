"""Build the parts of a rank's job that connect several wings; `dpgen.run` connects these."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from dpgen.config.schema import Config
from dpgen.data.input_rows import InputRows
from dpgen.data.time_limit import limit_render_time
from dpgen.distributed.gloo.leases import end_stuck_process, read_lease_timing
from dpgen.distributed.group import RankGroup
from dpgen.distributed.layout import Layout
from dpgen.engine.pool.engine_count import EngineCount
from dpgen.engine.pool.engine_pool import EnginePool
from dpgen.engine.pool.mps import find_mps
from dpgen.engine.starting.launch import TextPipeline
from dpgen.errors import EXIT_RESUMABLE
from dpgen.journal.row_notes import RowNote, compute_overdue_s
from dpgen.journal.row_watch import RowWatch
from dpgen.journal.run_dir import RunDir
from dpgen.journal.writer import JournalWriter
from dpgen.lifecycle.status_file import StatusFile
from dpgen.monitoring.efficiency import gather_efficiency
from dpgen.monitoring.run_report import summarize_run
from dpgen.monitoring.status.reporter import EngineView
from dpgen.output.columns import DatasetFormat
from dpgen.output.result import write_result
from dpgen.records import RankManifest, Request
from dpgen.scheduling.generation_loop import GenerationLoop, LoopConfig
from dpgen.scheduling.interfaces import FollowUps
from dpgen.scheduling.planner import PlannerConfig, ShardPlanner
from dpgen.scheduling.preparation import NoPreparer
from dpgen.scheduling.programs.event_loop import ProgramLoop
from dpgen.scheduling.programs.loading import load_program, pass_columns
from dpgen.scheduling.programs.runner import ProgramRunner, RunnerConfig
from dpgen.scheduling.programs.running import ProgramSpec
from dpgen.scheduling.progress.step_times import RankSpeed
from dpgen.scheduling.request_builder import RequestBuilder
from dpgen.scheduling.result_recorder import ResultRecorder
from dpgen.scheduling.retries.retry_tracker import RetryConfig, RetryTracker

logger = logging.getLogger(__name__)


def build_request_builder(
    config: Config, rows: InputRows, text: TextPipeline, text_needs: Mapping[str, Any], note: RowNote
) -> RequestBuilder:
    """Build what makes requests from rows.

    Args:
        text_needs: fields of SamplingParams that the work on text needs; the configuration's come first.
        note: tells the next attempt which row is being rendered.
    """
    needed = {name: value for name, value in text_needs.items() if name not in config.sampling}
    runs_program = config.program.is_used  # whose rows are no prompts
    render = pass_columns if runs_program else text.render
    preparer = NoPreparer() if runs_program or text.preparer is None else text.preparer
    return RequestBuilder.from_config(config, rows, render, base_sampling=needed, note=note, preparer=preparer)


def build_recorder(
    config: Config,
    journal: JournalWriter,
    text: TextPipeline,
    note: RowNote,
    planner: ShardPlanner,
    engine: EnginePool,
) -> ResultRecorder:
    """Build what decodes, parses, checks and journals results, and runs rows' programs."""
    retries: FollowUps | None = None
    if (program := load_program(config.program)) is not None:
        retries = _build_runner(config, program, journal, text, note, planner)
    elif text.checker is not None:
        retries = RetryTracker(
            RetryConfig.from_config(config),
            text.checker,
            journal.append_attempt,
            planner.earlier_attempts.find,
            lambda: engine.max_model_len,
        )
    return ResultRecorder(journal, text.detokenizer, note, text.parser, retries)


def build_planner_config(
    config: Config, columns: Sequence[str], layout: Layout, attempt: int, *, is_mixed: bool
) -> PlannerConfig:
    """Build the settings of the planner.

    Args:
        is_mixed: spread the rows at the front over the whole order, for a trial of settings.
    """
    settings = PlannerConfig.from_config(config, columns, layout, attempt)
    return replace(settings, order=replace(settings.order, is_mixed=True)) if is_mixed else settings


def build_loop_config(config: Config) -> LoopConfig:
    """Build the settings of the generation loop."""
    return LoopConfig(
        config.work.reserve_rows,
        config.sampling.get("n") or 1,
        config.run.max_leading_errors,
        reads_only=config.pooling is not None,
    )


def _build_runner(
    config: Config,
    program: ProgramSpec,
    journal: JournalWriter,
    text: TextPipeline,
    note: RowNote,
    planner: ShardPlanner,
) -> ProgramRunner:
    runner = ProgramRunner(
        RunnerConfig(config.run.seed, config.program.max_running, text.preparer or NoPreparer()),
        ProgramLoop(program, config.program.num_tool_threads),
        limit_render_time(text.render, config.data.render_timeout_s),
        note,
        journal.append_attempt,
        planner.earlier_attempts.find,
    )
    if text.parser is not None:
        text.parser.find_tools_of_call = runner.find_tools
    return runner


def make_canary_finder(
    config: Config, planner: ShardPlanner, text: TextPipeline, on_wait: Callable[[], None]
) -> Callable[[], Request | None]:
    """Return a function that makes the request of a row that has succeeded, to see whether an engine is well.

    Args:
        on_wait: called while the row's media are prepared.
    """

    def find() -> Request | None:
        request = planner.build_succeeded_request()
        if request is None or text.preparer is None or not text.preparer.needs(request):
            return request
        return text.preparer.prepare_now(request, on_wait)

    # A program's rows are no requests.
    return (lambda: None) if config.program.is_used else find


def build_engine_view(loop: GenerationLoop, engine: EnginePool, group: RankGroup) -> EngineView:
    """Build what the rank's status says of its engines."""
    return EngineView(
        lambda: loop.engine_stats,
        lambda: engine.num_deaths,
        group.get_wait_s,
        lambda: loop.latencies.counts,
        lambda: engine.num_ready,
    )


def watch_rows(config: Config, group: RankGroup, note: RowNote, status_file: StatusFile) -> RowWatch:
    """Return what times the row that the main thread works on, and ends this process if it never ends."""
    return RowWatch(
        note,
        overdue_s=compute_overdue_s(config.data.render_timeout_s),
        stuck_s=read_lease_timing(os.environ).stuck_s,
        add=group.store.add,
        end_process=lambda why: end_stuck_process(lambda: status_file.write_once(EXIT_RESUMABLE), why),
    )


def connect_engines(
    config: Config, engine: EnginePool, group: RankGroup, run_dir: RunDir, count_rows_left: Callable[[], int]
) -> None:
    """Tell a rank's engines how many rows are left, and whom to tell how many of them pay.

    Args:
        count_rows_left: of the whole run, about.
    """
    engine.growth.get_rows_left = lambda: count_rows_left() / group.size
    if group.rank == 0:
        engine.growth.on_decided = partial(_report_engine_count, config, run_dir)


def _report_engine_count(config: Config, run_dir: RunDir, count: EngineCount) -> None:
    """Log how many engines a rank runs and why, and keep it in run.json."""
    mps = find_mps(os.environ) if config.run.engine == "vllm" else None
    beside = "" if mps is None else f"; NVIDIA MPS runs ({mps}), and they use it"
    facts = {"number": count.number, "why": count.why, **count.facts, "uses_mps": mps is not None}
    run_dir.update_metadata(engines_per_rank=facts)
    given = config.parallel.engines_per_rank
    if count.number > 1 or (config.run.engine == "vllm" if given == "auto" else given > 1):
        shares_gpu = count.number > 1 or config.parallel.share_devices
        logger.info(f"{count.describe()}{beside if shares_gpu else ''}")


def report_run(
    config: Config,
    group: RankGroup,
    run_dir: RunDir,
    manifests: Sequence[RankManifest],
    measured: tuple[RankSpeed | None, float],
) -> None:
    """Log on rank 0 how the run went, and keep how near it came to its bound. Collective.

    Args:
        manifests: of all ranks; none on other ranks than 0.
        measured: this rank's speed, and for how many seconds it generated.
    """
    efficiency = gather_efficiency(group, config, *measured)
    if group.rank == 0:
        run_dir.update_metadata(efficiency=None if efficiency is None else vars(efficiency))
    for finding in summarize_run(manifests, efficiency):
        logger.info(finding)


def write_run_result(config: Config, rows: InputRows, run_dir: RunDir) -> None:
    """Write the final dataset and the marker of completion."""
    write_result(
        rows,
        run_dir,
        DatasetFormat.from_config(config, run_dir.read_metadata()),
        config.output.rows_per_file,
        allow_all_errors=config.run.allow_all_errors,
    )
