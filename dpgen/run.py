"""Run the main job: config → topology → rows → claim → engine → journal → gather → dataset.

`run` reads as this line. Each stage is a function or an object of its own wing; this module connects them.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

from dpgen.config.schema import Config
from dpgen.data.input_rows import InputRows
from dpgen.data.time_limit import RenderTimer
from dpgen.distributed.agreement import check_same_job, find_what_names_stand_for, open_input
from dpgen.distributed.attempt import begin_attempt, looks_resumable, read_job_start, warn_of_other_settings
from dpgen.distributed.engine_deaths import note_engine
from dpgen.distributed.group import RankGroup
from dpgen.distributed.layout import Layout, build_layout
from dpgen.distributed.stages import Stage, run_stages
from dpgen.distributed.topology import Topology
from dpgen.engine.keeping.keeper import Keepers
from dpgen.engine.pool.engine_pool import EnginePool
from dpgen.engine.starting.caches import has_cold_caches
from dpgen.engine.starting.launch import (
    TextPipeline,
    build_text_pipeline,
    check_engine_options,
    prepare_engine,
)
from dpgen.engine.starting.loading import ModelLoader
from dpgen.engine.starting.log_file import EngineLog
from dpgen.engine.starting.media_workers import add_media_preparer
from dpgen.errors import EXIT_RESUMABLE, DpgenError
from dpgen.journal.engine_notes import remove_engine_notes
from dpgen.journal.row_notes import RowNote, open_note
from dpgen.journal.run_dir import RunDir
from dpgen.journal.run_identity import compute_run_identity, describe_hashed_files
from dpgen.journal.writer import JournalWriter
from dpgen.lifecycle.shutdown import ShutdownMonitor, watch_for_shutdown
from dpgen.lifecycle.status_file import StatusFile
from dpgen.monitoring.run_monitor import RunMonitor
from dpgen.monitoring.run_report import describe_generation, describe_plan
from dpgen.monitoring.startup import StartupTimer
from dpgen.monitoring.status.reporter import RankReporter
from dpgen.monitoring.trackers import check_trackers
from dpgen.output.column_check import check_columns, check_result, list_used_columns
from dpgen.output.result import gather_results, is_already_complete
from dpgen.records import RankManifest
from dpgen.run_parts import (
    build_engine_view,
    build_loop_config,
    build_planner_config,
    build_recorder,
    build_request_builder,
    connect_engines,
    make_canary_finder,
    report_run,
    watch_rows,
    write_run_result,
)
from dpgen.scheduling.generation_loop import GenerationLoop
from dpgen.scheduling.interfaces import Engine
from dpgen.scheduling.planner import ShardPlanner
from dpgen.scheduling.programs.loading import load_program
from dpgen.scheduling.progress.totals import Totals
from dpgen.scheduling.request_source import RequestSource
from dpgen.tuning.probe import TrialProbe

logger = logging.getLogger(__name__)


class Reports(NamedTuple):
    """Where a run reports what it does.

    Attributes:
        status_file: its `num_done` is kept current.
        startup: each phase of the start-up is marked in it.
        reporter: is kept informed.
    """

    status_file: StatusFile
    startup: StartupTimer
    reporter: RankReporter


def run(
    config: Config,
    topology: Topology,
    group: RankGroup,
    reports: Reports,
    keepers: Keepers,
    trial: TrialProbe | None = None,
) -> None:
    """Generate every row of `config.data` that has no result yet, and write the final dataset. Collective.

    Args:
        keepers: may have processes of an earlier job, or an early start, and get them back.
        trial: measures the engines on some of the rows, and ends the run; None for the whole run.

    Raises:
        ConfigError: something in the configuration or the input is wrong. What the configuration itself says is
            checked before a model loads; an engine that loads while the input is read ends with the run.
        Interrupted: a signal, a time limit or the trial stopped the run. The same command resumes it.
        DpgenError: anything else that a user can mend; see its subclasses.
    """
    shutdown = watch_for_shutdown(
        config.run.time_limit, config.run.stop_margin_s, lambda: reports.status_file.write_once(EXIT_RESUMABLE)
    )
    if config.parallel.launcher == "external":
        group.can_shrink = False  # a lost rank was a part of other ranks' engines
    with shutdown.handle_signals(), ExitStack() as stack:
        job = _Job(config, topology, group, (stack, shutdown), reports, keepers)
        job.trial = trial
        stages = [
            Stage("reading the input", job.begin, is_slow=True),
            Stage("planning", job.plan, is_slow=True),
            Stage("loading the model", job.load, repeat_from="planning"),
            Stage("generating", job.generate, repeat_from="planning"),
            Stage("gathering the result", job.gather, repeat_from="planning"),
        ]
        run_stages(group, stages, reports.reporter.enter_phase)
        reports.reporter.enter_phase("writing the result")
        group.enter_phase("writing the result", is_slow=True)
        job.write()


class _Job:
    """Connect the stages of one attempt; each public method is one of them.

    After a loss of ranks a stage is called again. What this rank has done before is kept here.

    Args:
        guards: a stack that ends what the stages have started, and the monitor that says when to stop.
    """

    _layout: Layout
    _rows: InputRows
    _attempt: int
    _text_needs: Mapping[str, Any]
    _note: RowNote
    _journal: JournalWriter
    _planner: ShardPlanner
    _source: RequestSource
    _loader: ModelLoader
    _loop: GenerationLoop
    _monitor: RunMonitor
    trial: TrialProbe | None = None

    def __init__(
        self,
        config: Config,
        topology: Topology,
        group: RankGroup,
        guards: tuple[ExitStack, ShutdownMonitor],
        reports: Reports,
        keepers: Keepers,
    ) -> None:
        self._config, self._topology, self._group = config, topology, group
        self._keeper, self._worker_keeper = keepers.engines, keepers.media_workers
        self._stack, self._shutdown = guards
        self._status_file, self._startup, self._reporter = reports
        self._run_dir = RunDir(config.run.dir)
        self._stack.callback(self._run_dir.unlock)
        self._engine_log = EngineLog(config.run.log_level)
        self._started_engine: EnginePool | None = None
        self._loaded_text: TextPipeline | None = None
        self._is_complete = False  # an earlier attempt has written the result
        self._has_planned = self._needs_engine = False
        self._generation_s = 0.0
        self._num_before = 0  # rows that earlier attempts have finished

    @property
    def _engine(self) -> EnginePool:
        assert self._started_engine is not None
        return self._started_engine

    @property
    def _text(self) -> TextPipeline:
        assert self._loaded_text is not None
        return self._loaded_text

    # ---- begin

    def begin(self) -> None:
        """Check the job, open the input, start the engine, and begin an attempt on the run directory."""
        config, group, startup = self._config, self._group, self._startup
        check_same_job(config, group)
        self._layout = group.run_on_all_ranks(lambda: build_layout(self._topology, config.parallel))
        group.run_on_all_ranks(lambda: load_program(config.program))
        self._start_engine()  # vLLM is imported beside what follows
        group.run_on_all_ranks(lambda: check_trackers(config.output.track) if group.rank == 0 else None)
        found = find_what_names_stand_for(config, group)
        start = read_job_start(config, group, self._run_dir)
        self._begin_loading(looks_resumable(config, group, self._run_dir, found, start))
        self._rows, fingerprint = open_input(
            config.data, group, self._run_dir, lambda rows: check_columns(config, rows)
        )
        for level, note in group.run_on_all_ranks(lambda: check_result(config, self._rows) if group.rank == 0 else []):
            logger.log(level, note)
        identity = compute_run_identity(config, fingerprint, found)
        startup.mark("input")
        self._is_complete = is_already_complete(config.run, group, self._run_dir, identity, start.resume)
        if self._is_complete:
            return
        self._loaded_text = group.run_on_all_ranks(self._load_text)
        startup.mark("tokenizer")
        self._text_needs = group.run_on_all_ranks(lambda: self._text.wait_until_ready(group.raise_if_peer_failed))
        check_engine_options(self._engine, config.parallel, group)
        startup.mark_wait("engine's options")
        self._attempt = begin_attempt(config, group, self._run_dir, identity, start, self._rows.fingerprint)
        self._reporter.begin_attempt(self._attempt)
        if group.rank == 0:
            self._run_dir.update_metadata(**describe_hashed_files(self._rows, fingerprint))
        used_columns = [] if self._rows.is_empty else list_used_columns(config, self._rows.columns)
        logger.info(self._rows.describe(used_columns))
        self._engine_log.open(self._run_dir.logs / f"rank-{self._topology.dp_rank}.engine.log")
        self._begin_journal()
        self._planner = self._make_planner()
        self._loop = self._make_loop()
        self._monitor = self._make_monitor()

    def _start_engine(self) -> None:
        start = prepare_engine(self._config, self._topology, self._layout, self._group, self._engine_log, self._keeper)
        if self._started_engine is None:
            self._started_engine = start()
            self._stack.callback(self._keeper.take_back, self._engine)

    def _begin_loading(self, is_wanted: bool) -> None:
        """Let the engine load its model, once it has checked its options, beside what follows."""
        self._loader = ModelLoader(self._config.parallel, self._layout, self._group, self._startup.mark_wait)
        is_cold = has_cold_caches(self._config, os.environ, self._topology.local_size)
        self._loader.begin(self._engine, is_cold=is_cold, is_wanted=is_wanted)

    def _load_text(self) -> TextPipeline:
        if self._loaded_text is None:
            text = build_text_pipeline(self._config, self._engine_log, self._rows)
            log, claims_rows = self._engine_log, self._layout.is_group_leader
            self._loaded_text = add_media_preparer(
                text, self._config, self._topology, log, self._worker_keeper, claims_rows=claims_rows
            )
            self._stack.callback(self._loaded_text.close)
        return self._loaded_text

    def _begin_journal(self) -> None:
        self._note = open_note(self._run_dir.journal, self._attempt, self._topology.dp_rank)
        self._stack.callback(self._note.close)
        self._stack.enter_context(watch_rows(self._config, self._group, self._note, self._status_file))
        self._journal = JournalWriter(self._run_dir.journal, self._attempt, self._topology.dp_rank)
        self._journal.before_first_write = self._run_dir.prepare_to_mark_unfinished()
        self._stack.callback(self._journal.close)
        self._stack.push(self._shutdown.defer_signals_on_error)

    def _make_planner(self) -> ShardPlanner:
        config, rows = self._config, self._rows
        settings = build_planner_config(config, rows.columns, self._layout, self._attempt, is_mixed=bool(self.trial))
        builder = build_request_builder(config, rows, self._text, self._text_needs, self._note)
        return ShardPlanner(settings, rows, self._run_dir.journal, self._group, builder)

    def _make_loop(self) -> GenerationLoop:
        config = self._config
        results = build_recorder(config, self._journal, self._text, self._note, self._planner, self._engine)
        self._stack.callback(results.close)
        results.on_recorded = self._reporter.tally.add_all
        loop_config = build_loop_config(config)
        engine: Engine = self._engine
        stop_reason: Callable[[], str | None] = lambda: self._shutdown.reason  # noqa: E731 - asked again and again
        if self.trial is not None:
            engine, loop_config, stop_reason = self.trial.adapt(engine, self._group, loop_config, stop_reason)
        return GenerationLoop(self._planner, engine, results, self._group, loop_config, stop_reason)

    def _make_monitor(self) -> RunMonitor:
        loop, engine, group = self._loop, self._engine, self._group
        self._reporter.logs_failure = group.is_node_leader
        self._reporter.reads_only = self._config.pooling is not None
        self._reporter.view = build_engine_view(loop, engine, group)
        return RunMonitor(self._config, self._run_dir, len(self._rows), self._reporter, is_rank_0=group.rank == 0)

    # ---- plan

    def plan(self) -> None:
        """Shard the remaining rows over the ranks: all of them at first, then those that nobody has begun."""
        self._shutdown.accept_signals()
        if self._is_complete:
            return
        state = self._loop.get_state() if self._has_planned else None
        self._source = self._planner.plan(state, has_engine=not self._engine.is_abandoned)
        num_remaining = self._planner.num_remaining_rows
        if not self._has_planned:
            self._has_planned = True
            self._report_plan(num_remaining)
        self._needs_engine = any(self._group.all_gather_object(self._needs_engine or num_remaining > 0))

    def _report_plan(self, num_remaining: int) -> None:
        """Log what is left to do, and in which order."""
        num_rows = len(self._rows)
        self._status_file.num_done = self._num_before = num_rows - num_remaining
        self._reporter.count_rows(num_rows, self._num_before)
        num_ranks = self._layout.num_engines if self._layout.has_shared_engine else self._group.size
        logger.info(describe_plan(self._attempt, num_rows, num_remaining, num_ranks))
        if self._group.rank == 0:
            warn_of_other_settings(self._run_dir, self._attempt, self._num_before)
        if num_remaining:
            self._startup.mark("rows to do")
            logger.info(str(self._planner.order))

    # ---- load

    def load(self) -> None:
        """Load the model on all ranks: the min-KV-cache all-reduce."""
        if not self._needs_engine:
            return
        is_first = self._group.rank == 0 and not self._engine.is_ready
        connect_engines(self._config, self._engine, self._group, self._run_dir, self._count_rows_left)
        loaded = self._loader.load(self._engine, self._text.engine_text_config)
        find_canary = make_canary_finder(self._config, self._planner, self._text, self._group.heartbeat)
        self._engine.recall(self._planner.blame, find_canary)
        if loaded is not None:
            self._text.describe_model(loaded.info)
        if is_first and loaded is not None:
            engine = {**dataclasses.asdict(loaded.info), "kv_cache_bytes": loaded.agreed_kv_bytes}
            self._run_dir.update_metadata(engine=engine)
        if is_first:
            logger.info(self._startup.describe(self._engine.start_phases))

    def _count_rows_left(self) -> int:
        return len(self._rows) - (self._status_file.num_done or 0)

    # ---- generate

    def generate(self) -> None:
        """Generate until no rank has unfinished work: the unfinished-work all-reduce. Rank 0 shows the progress."""
        if not self._needs_engine:
            return
        monitor, trial, started_s = self._monitor, self.trial, time.monotonic()

        def on_progress(totals: Totals) -> None:
            self._status_file.num_done = self._num_before + totals.num_rows
            monitor.update(totals)
            if trial is not None:
                trial.update(totals)

        if trial is not None:
            trial.begin(self._planner.num_remaining_rows)
        monitor.begin(self._num_before)
        try:
            with self._shutdown.defer_signals(), RenderTimer(self._config.data.render_timeout_s):
                totals = self._loop.run(self._source, on_progress)
                while self._planner.num_postponed_rows:  # suspects have been tried apart from all others
                    self._source = self._planner.plan(self._loop.get_state())
                    totals = self._loop.run(self._source, on_progress)
        except DpgenError:
            self._note_engine()
            raise
        finally:
            monitor.end()
        self._generation_s = time.monotonic() - started_s
        logger.info(describe_generation(totals, self._generation_s))

    def _note_engine(self) -> None:
        """Note for the next attempt how this rank's engine ended, where engines share their work."""
        if self._layout.has_shared_engine:
            death, blame = self._engine.final_death, self._engine.save_blame()
            note_engine(self._group, self._layout, self._run_dir.journal, self._attempt, death, blame)

    # ---- gather, write

    def gather(self) -> None:
        """Gather rows and manifests on rank 0. Until it has all of them, this rank's engine may be needed again."""
        if not self._is_complete:
            manifest = RankManifest(self._group.rank, self._group.nodes[self._group.rank])
            if self._needs_engine:
                manifest = self._loop.fill_manifest(manifest)
            self._journal.seal()
            manifests = gather_results(self._group, self._run_dir, self._journal, manifest, self._config.output)
            speed = self._loop.measure_speed() if self._needs_engine else None
            report_run(self._config, self._group, self._run_dir, manifests or [], (speed, self._generation_s))
            if self._group.is_node_leader:
                remove_engine_notes(self._run_dir.journal)
        self._group.reach_milestone("gathered")

    def write(self) -> None:
        """Write the final dataset on rank 0; the other ranks wait for it, whatever becomes of each other."""
        self._shutdown.ignore_deadline()
        if not self._is_complete:
            if self._keeper.has_one_job:
                self._engine.stop()  # the engine frees the model's memory while the result is written
            self._journal.close()
            self._monitor.log_rows(self._planner.build_request, self._text.decode)
            if self._group.rank == 0:
                write_run_result(self._config, self._rows.with_progress(self._group.heartbeat), self._run_dir)
        self._group.reach_milestone("complete")
        self._shutdown.ignore_signals()
        if not self._is_complete and self._keeper.has_one_job:
            self._engine.close()
