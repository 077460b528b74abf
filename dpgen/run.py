"""Run the main job: config → topology → rows → claim → engine → journal → gather → dataset.

`run` reads as this line. Each stage is a function or an object of its own wing; this module connects them.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from dpgen.config.schema import Config
from dpgen.data.input_rows import InputRows
from dpgen.data.render import check_prompt_columns, select_prompt_columns
from dpgen.data.time_limit import limit_render_time
from dpgen.distributed.agreement import check_same_job, open_input
from dpgen.distributed.attempt import begin_attempt
from dpgen.distributed.group import RankGroup
from dpgen.distributed.layout import Layout, build_layout
from dpgen.distributed.topology import Topology
from dpgen.engine.launch import TextPipeline, build_text_pipeline, has_cold_caches, start_engine
from dpgen.engine.loading import ModelLoader
from dpgen.engine.log_file import EngineLog
from dpgen.engine.supervisor import EngineSupervisor
from dpgen.errors import EXIT_RESUMABLE, ConfigError, suggest_name
from dpgen.formatting import format_count, format_duration
from dpgen.journal.run_dir import RunDir, compute_run_identity, diff_identities
from dpgen.journal.writer import JournalWriter
from dpgen.lifecycle.shutdown import ShutdownMonitor, find_deadline
from dpgen.lifecycle.status_file import StatusFile
from dpgen.monitoring.progress import ProgressDisplay
from dpgen.monitoring.run_report import summarize_run
from dpgen.monitoring.startup import StartupTimer
from dpgen.output.dataset_writer import check_output_columns
from dpgen.output.result import ResultConfig, gather_results, write_result
from dpgen.records import RankManifest
from dpgen.scheduling.generation_loop import GenerationLoop, LoopConfig
from dpgen.scheduling.order import OrderConfig
from dpgen.scheduling.planner import PlannerConfig, ShardPlanner
from dpgen.scheduling.request_source import RequestBuilder, RequestSource
from dpgen.scheduling.result_recorder import ResultRecorder
from dpgen.scheduling.totals import Totals

logger = logging.getLogger(__name__)


def run(config: Config, topology: Topology, group: RankGroup, status_file: StatusFile, startup: StartupTimer) -> None:
    """Generate every row of `config.data` that has no result yet, and write the final dataset. Collective.

    Keeps `status_file.num_done` current, and marks each phase of the start-up in `startup`.

    Raises:
        ConfigError: something in the configuration or the input is wrong. No model was loaded.
        Interrupted: a signal or a time limit stopped the run. The same command resumes it.
        DpgenError: anything else that a user can mend; see its subclasses.
    """
    shutdown = _watch_for_shutdown(config, status_file)
    check_same_job(config, group)
    with ExitStack() as stack:
        layout = group.run_on_all_ranks(lambda: build_layout(topology, config.parallel))
        engine_log = EngineLog(config.run.log_level)
        engine = start_engine(config, topology, layout, group, engine_log)  # vLLM is imported beside what follows
        stack.callback(engine.kill)
        rows, fingerprint = open_input(config.data, group, lambda columns: _check_columns(config, columns))
        run_dir, identity = RunDir(config.run.dir), compute_run_identity(config, fingerprint)
        startup.mark("input")
        if _is_already_complete(config, group, run_dir, identity):
            return
        text = group.run_on_all_ranks(lambda: build_text_pipeline(config))
        startup.mark("tokenizer")
        _check_engine_options(engine, config, group)
        startup.mark("engine's options")
        attempt = begin_attempt(config, group, run_dir, identity, rows.fingerprint)
        engine_log.open(run_dir.logs / f"rank-{topology.dp_rank}.engine.log")
        journal = JournalWriter(run_dir.journal, attempt, topology.dp_rank)
        journal.before_first_write = run_dir.mark_unfinished
        stack.callback(journal.close)
        stack.push(shutdown.defer_signals_on_error)

        job = _Job(config, group, layout, rows, run_dir, attempt)
        planner = job.make_planner(text)
        source = planner.plan()
        job.report_plan(planner, status_file)
        manifest = RankManifest(group.rank, group.nodes[group.rank])
        if planner.num_remaining_rows:
            startup.mark("rows to do")
            job.load_model(engine, text, startup)
            loop = job.make_loop(planner, engine, ResultRecorder(journal, text.detokenizer), shutdown)
            with shutdown.defer_signals():
                job.generate(loop, source, status_file)
            manifest = loop.fill_manifest(manifest)
        engine.stop()  # the engine frees the model's memory while the result is written
        journal.close()
        job.write(journal, manifest)
        shutdown.ignore_signals()
        engine.close()


@dataclass(frozen=True)
class _Job:
    """Connect the stages of one attempt; each method is one of them.

    Attributes:
        rows: the input.
        attempt: number of this attempt.
    """

    config: Config
    group: RankGroup
    layout: Layout
    rows: InputRows
    run_dir: RunDir
    attempt: int

    def make_planner(self, text: TextPipeline) -> ShardPlanner:
        config = self.config
        columns = {*select_prompt_columns(config.prompt, self.rows.columns), *config.sampling_columns.values()}
        planner_config = PlannerConfig(
            order=OrderConfig(
                config.work,
                config.prompt,
                config.sampling_columns.get("max_tokens"),
                bool(config.engine.get("enable_prefix_caching", True)),
            ),
            retry_errors=config.run.retry_errors,
            columns=tuple(sorted(columns)),
            lockstep=self.layout.lockstep,
            claims_rows=self.layout.is_group_leader,
            attempt=self.attempt,
            render_timeout_s=config.data.render_timeout_s,
        )
        render = limit_render_time(text.render, config.data.render_timeout_s)
        builder = RequestBuilder(render, config.run.seed, config.sampling_columns, config.sampling_by_rank)
        return ShardPlanner(planner_config, self.rows, self.run_dir.journal, self.group, builder)

    def report_plan(self, planner: ShardPlanner, status_file: StatusFile) -> None:
        """Log what is left to do, and in which order."""
        num_rows, num_remaining = len(self.rows), planner.num_remaining_rows
        status_file.num_done = num_done = num_rows - num_remaining
        ranks = format_count(self.layout.num_engines, "rank")
        if self.attempt == 1:
            logger.info(f"{format_count(num_rows, 'row')} over {ranks}")
        else:
            logger.info(
                f"attempt {self.attempt}: {num_done:,} of {num_rows:,} rows are done, "
                f"{num_remaining:,} remain over {ranks}"
            )
        if num_remaining:
            logger.info(str(planner.order))

    def load_model(self, engine: EngineSupervisor, text: TextPipeline, startup: StartupTimer) -> None:
        """Load the model on all ranks: the min-KV-cache all-reduce."""
        loader = ModelLoader(self.config.parallel, self.layout, self.group, startup.mark)
        loaded = loader.load(engine, text.engine_text_config, has_cold_caches(self.config, os.environ))
        if self.group.rank == 0:
            self.run_dir.update_metadata(engine={**vars(loaded.info), "kv_cache_bytes": loaded.agreed_kv_bytes})
        logger.info(str(startup))

    def make_loop(
        self, planner: ShardPlanner, engine: EngineSupervisor, results: ResultRecorder, shutdown: ShutdownMonitor
    ) -> GenerationLoop:
        config = self.config
        num_samples = config.sampling.get("n") or 1
        loop_config = LoopConfig(config.work.reserve_rows, num_samples, config.run.max_leading_errors)
        return GenerationLoop(planner, engine, results, self.group, loop_config, lambda: shutdown.reason)

    def generate(self, loop: GenerationLoop, source: RequestSource, status_file: StatusFile) -> None:
        """Generate until no rank has unfinished work: the unfinished-work all-reduce. Rank 0 shows the progress."""
        num_before, started_s = status_file.num_done or 0, time.monotonic()
        progress = ProgressDisplay(len(self.rows), num_before, self.config.run.progress_interval_s)

        def on_progress(totals: Totals) -> None:
            status_file.num_done = num_before + totals.num_rows
            progress.update(totals)

        if self.group.rank == 0:
            progress.open_bar()
        try:
            totals = loop.run(source, on_progress)
        finally:
            progress.close()
        elapsed_s = time.monotonic() - started_s
        logger.info(
            f"generated {format_count(totals.num_rows, 'row')}, {format_count(totals.num_generated_tokens, 'token')} "
            f"in {format_duration(elapsed_s)} ({totals.num_generated_tokens / max(elapsed_s, 1e-9):,.0f} tokens/s)"
        )

    def write(self, journal: JournalWriter, manifest: RankManifest) -> None:
        """Gather rows and manifests, and write the final dataset on rank 0."""
        config = self.config
        manifests = gather_results(self.group, self.run_dir, journal, manifest, config.output)
        for finding in summarize_run(manifests or []):
            logger.info(finding)
        has_samples = config.sampling.get("n", 1) != 1 or "n" in config.sampling_columns
        result_config = ResultConfig(config.output, config.data.columns, has_samples)
        write_result(self.group, self.rows, self.run_dir, result_config)


def _watch_for_shutdown(config: Config, status_file: StatusFile) -> ShutdownMonitor:
    deadline_s, deadline_name = find_deadline(config.run.time_limit, config.run.stop_margin_s, os.environ, time.time())
    shutdown = ShutdownMonitor(deadline_s, deadline_name, before_exit=lambda: status_file.write_once(EXIT_RESUMABLE))
    shutdown.install_handlers()
    return shutdown


def _check_columns(config: Config, columns: Sequence[str]) -> None:
    """Raise ConfigError for the first column that the configuration names and the input lacks."""
    check_prompt_columns(config.prompt, columns)
    named = {f"sampling.from_columns.{field}": column for field, column in config.sampling_columns.items()}
    if config.work.hint_column is not None:
        named["work.hint_column"] = config.work.hint_column
    for key, column in named.items():
        if column not in columns:
            hint = suggest_name(column, columns, "columns")
            raise ConfigError(f"{key}: {column!r} is no column of the dataset{hint}")
    check_output_columns(list(columns), config.data.columns, config.output.token_ids)


def _is_already_complete(config: Config, group: RankGroup, run_dir: RunDir, identity: Mapping[str, Any]) -> bool:
    """Return True if rank 0's run directory holds this run's result, and nothing is to be retried. Collective."""
    is_same = not diff_identities(run_dir.read_metadata().get("identity"), identity)
    wants_more = bool(config.run.retry_errors) or config.run.resume == "never"
    is_complete: bool = group.all_gather_object(run_dir.is_finished and is_same and not wants_more)[0]
    if is_complete:
        logger.info(f"{run_dir.path} holds this run's finished result already, nothing to do")
    return is_complete


def _check_engine_options(engine: EngineSupervisor, config: Config, group: RankGroup) -> None:
    """Raise ConfigError if vLLM rejects an option, before a model loads. Collective."""
    if config.parallel.lock_step and not config.parallel.enable_expert_parallel:
        logger.info("parallel.lock_step=true: engines wait for each other at every step, which only costs time here")
    for note in group.run_on_all_ranks(lambda: engine.check_options(group.raise_if_peer_failed)):
        logger.info(note)
