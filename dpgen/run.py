"""The main job, as a story: config → topology → rows → claim → engine → journal → gather → dataset."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from dpgen.config.schema import Config
from dpgen.data.input_rows import InputRows, load_input
from dpgen.distributed.group import RankGroup
from dpgen.distributed.layout import Layout, build_engine_world, build_layout
from dpgen.distributed.topology import Topology
from dpgen.engine.launch import build_engine_spec, build_text_pipeline, has_cold_caches, make_engine_factory
from dpgen.engine.messages import EngineTextConfig
from dpgen.engine.supervisor import EngineSupervisor
from dpgen.errors import EXIT_RESUMABLE, ConfigError, suggest_name
from dpgen.formatting import format_count, format_duration
from dpgen.journal.reader import last_attempt, list_segments
from dpgen.journal.run_dir import RunDir, compute_run_identity, diff_identities
from dpgen.journal.writer import JournalWriter
from dpgen.lifecycle.shutdown import ShutdownMonitor, find_deadline
from dpgen.lifecycle.status_file import StatusFile
from dpgen.log import setup_logging
from dpgen.monitoring.progress import ProgressDisplay
from dpgen.monitoring.run_report import RankManifest, summarize_run
from dpgen.monitoring.startup import PeriodicLog, StartupTimer
from dpgen.output.dataset_writer import check_output_columns, write_dataset
from dpgen.output.gather import gather_segments, shares_run_dir
from dpgen.scheduling.generation_loop import GenerationLoop, Totals
from dpgen.scheduling.planner import ShardPlanner

_LOADED = "dpgen/loaded"  # in the store: how many ranks have loaded their models; below it, of each node
_POLL_S = 0.1


def run(config: Config, topology: Topology, group: RankGroup, ending: StatusFile, phases: StartupTimer) -> None:
    """Generates every row of `config.data` that has no result yet, and writes the final dataset.

    Collective: every rank of `group` calls it with the same configuration. Keeps `ending.num_done` current, and tells
    what `phases` of its start-up took how long.

    Raises:
        ConfigError: something in the configuration or the input is wrong; no model was loaded.
        Interrupted: told to stop; the same command goes on.
        DpgenError: anything else that a user can mend; see its subclasses.
    """
    say = setup_logging(topology.dp_rank)
    tell = say if topology.is_rank_0 else _silence  # what one rank says for all
    deadline_s, deadline_name = find_deadline(config.run.time_limit, config.run.stop_margin_s, os.environ, time.time())
    stop = ShutdownMonitor(deadline_s, deadline_name, before_exit=lambda: ending.write_once(EXIT_RESUMABLE))
    stop.install_handlers()
    with ExitStack() as stack:
        layout = group.run_on_all_ranks(lambda: build_layout(topology, config.parallel))
        engine = _start_engine(config, topology, layout, group, say)  # imports vLLM meanwhile
        stack.callback(engine.kill)
        rows, folder, identity = _open_input(config, group)
        phases.mark("input")
        if group.all_gather_object(_is_already_complete(config, folder, identity))[0]:  # rank 0's folder is the one
            tell(f"{folder.path} holds this run's finished result already; nothing to do")
            return
        if layout.lockstep and not config.parallel.enable_expert_parallel:
            tell("parallel.lock_step=true: engines wait for each other at every step, which only costs here")
        texts = group.run_on_all_ranks(lambda: build_text_pipeline(config, tell))
        phases.mark("tokenizer")
        for note in group.run_on_all_ranks(lambda: engine.check_options(group.raise_if_peer_failed)):
            tell(note)
        phases.mark("engine's options")
        attempt = _begin_attempt(config, group, folder, identity)
        own_journal = JournalWriter(folder.journal, attempt, topology.dp_rank)
        stack.callback(own_journal.close)

        dealer = ShardPlanner(
            config,
            rows,
            folder,
            group,
            attempt,
            texts.render,
            claims_rows=layout.is_group_leader,
            in_lockstep=layout.lockstep,
            tell=tell,
        )
        feed = dealer.plan()
        tell(_describe_plan(len(rows), dealer.num_remaining_rows, layout.num_engines, attempt))
        ending.num_done = len(rows) - dealer.num_remaining_rows
        own = RankManifest(group.rank, group.nodes[group.rank])
        if dealer.num_remaining_rows:
            tell(str(dealer.order))
            phases.mark("rows to do")
            _load_model(engine, texts.engine_text_config, config, layout, group, folder, phases, tell)
            tell(str(phases))
            generation = GenerationLoop(
                feed,
                engine,
                own_journal,
                group,
                reshard=dealer.plan,
                stop_reason=lambda: stop.reason,
                detokenizer=texts.detokenizer,
                reserve_rows=config.work.reserve_rows,
                num_samples=config.sampling.get("n") or 1,
                max_leading_errors=config.run.max_leading_errors,
                say=say,
            )
            progress = ProgressDisplay(
                len(rows), len(rows) - dealer.num_remaining_rows, tell, config.run.progress_interval_s
            )
            with stop.defer_signals():
                _generate(generation, progress, ending, tell if topology.is_rank_0 else None)
            own = generation.fill_manifest(own)
        engine.stop()  # it frees the model's memory while the result is written
        own_journal.close()
        _write_result(config, group, rows, folder, own_journal, own, tell)
        stop.ignore_signals()
        engine.close()


def _is_already_complete(config: Config, folder: RunDir, identity: Mapping[str, Any]) -> bool:
    """Whether this very run is finished, and nothing more is wanted of it."""
    is_same = not diff_identities(folder.read_metadata().get("identity"), identity)
    return folder.is_finished and is_same and not config.run.retry_errors and config.run.resume != "never"


def _start_engine(
    config: Config, topology: Topology, layout: Layout, group: RankGroup, say: Callable[[str], None]
) -> EngineSupervisor:
    world = build_engine_world(topology, layout, group)
    return EngineSupervisor(
        make_engine_factory(config, topology, group, world),
        build_engine_spec(config, topology, world),
        say,
        can_restart=world is None,
        timeout_s=config.run.engine_timeout_s,
        start_timeout_s=config.run.engine_start_timeout_s,
        max_deaths=config.run.max_engine_deaths,
    )


def _open_input(config: Config, group: RankGroup) -> tuple[InputRows, RunDir, dict[str, Any]]:
    """The input and the run folder, both checked on all ranks, and what identifies the run."""

    def read() -> tuple[InputRows, dict[str, Any] | None]:
        with group.node_leader_first():
            rows = load_input(config.data)
            return rows, rows.fingerprint() if group.is_node_leader else None

    rows, fingerprint = group.run_on_all_ranks(read)
    fingerprints = [each for each in group.all_gather_object(fingerprint) if each is not None]

    sizes = group.all_gather_object(len(rows))

    def check() -> None:
        if any(num_rows != len(rows) for num_rows in sizes):
            raise ConfigError(f"data.path={config.data.path} gives other ranks another number of rows; is it growing?")
        if any(each != fingerprints[0] for each in fingerprints):
            raise ConfigError(f"data.path={config.data.path} holds other rows on one node than on another")
        if rows.is_empty:
            return  # and its columns may be unknown
        config.prompt.check_columns(rows.columns)
        for name, column in config.sampling_columns.items():
            if column not in rows.columns:
                raise ConfigError(
                    f"sampling.from_columns: {name} is to come from {column!r}, which is no column of the dataset"
                    f"{suggest_name(column, rows.columns, 'columns')}"
                )
        hint = config.work.hint_column
        if hint is not None and hint not in rows.columns:
            raise ConfigError(
                f"work.hint_column: {hint!r} is no column of the dataset{suggest_name(hint, rows.columns, 'columns')}"
            )
        check_output_columns(rows.columns, config.data.columns, config.output.token_ids)

    group.run_on_all_ranks(check)
    return rows, RunDir(config.run.dir), compute_run_identity(config, fingerprints[0])


def _begin_attempt(config: Config, group: RankGroup, folder: RunDir, identity: Mapping[str, Any]) -> int:
    """Checks and makes the folder; this attempt's number: one more than any that has written there."""

    def check() -> None:
        folder.check_resumable(identity, config.run.resume)
        if group.rank == 0:
            folder.lock()

    def create() -> int:
        with group.node_leader_first():
            folder.create()
        return last_attempt(folder.journal)

    group.run_on_all_ranks(check)
    attempt: int = 1 + max(group.all_gather_object(group.run_on_all_ranks(create)))

    def record() -> None:
        if group.rank == 0:
            folder.success.unlink(missing_ok=True)  # failed rows of a finished run are tried again: it is unfinished
            folder.write_config(config)
            folder.update_metadata(identity=identity, attempt=attempt, dp_size=group.size)

    def record_elsewhere() -> None:
        if not folder.read_metadata():  # a folder that rank 0 doesn't see: it, too, knows what it holds
            folder.update_metadata(identity=identity)

    group.run_on_all_ranks(record)
    group.run_on_all_ranks(record_elsewhere)
    return attempt


def _load_model(
    engine: EngineSupervisor,
    text: EngineTextConfig,
    config: Config,
    layout: Layout,
    group: RankGroup,
    folder: RunDir,
    phases: StartupTimer,
    tell: Callable[[str], None],
) -> None:
    """Loads the model; on the way the ranks agree on the KV cache's size: the min-KV-cache all-reduce."""
    measured, agreed = 0, 0
    waiting = PeriodicLog(
        tell,
        lambda: (
            f"this rank's model is loaded, {group.store.add(_LOADED, 0)} of {group.size} are; the KV cache's size is "
            "agreed with the last (parallel.sync_kv_cache=false does without)"
        ),
    )

    def agree_kv(measured_bytes: int) -> int:
        nonlocal measured, agreed
        measured = agreed = measured_bytes
        phases.mark("model")
        group.store.add(f"{_LOADED}/{group.nodes[group.rank]}", 1)
        if config.parallel.sync_kv_cache:
            group.store.add(_LOADED, 1)
            [agreed] = group.wait(group.all_reduce_async([measured_bytes], "min"), waiting)
            phases.mark("other ranks' models")
        return agreed

    if _waits_for_node_leader(config, layout, group):
        while group.store.add(f"{_LOADED}/{group.nodes[group.rank]}", 0) == 0:
            group.raise_if_peer_failed()
            time.sleep(_POLL_S)
        phases.mark("the node's first model")
    info = engine.load_model(agree_kv, group.raise_if_peer_failed, text)
    phases.mark("KV cache")
    tell(
        f"KV cache: {info.num_kv_blocks:,} blocks of {info.kv_block_tokens} tokens"
        f"{' on every rank' if config.parallel.sync_kv_cache else ''} ({agreed / 2**20:,.0f} MiB; "
        f"{measured / 2**20:,.0f} MiB free here); {format_count(info.max_num_seqs, 'sequence')} at a time"
    )
    if group.rank == 0:
        folder.update_metadata(engine={**vars(info), "kv_cache_bytes": agreed})


def _generate(
    generation: GenerationLoop, progress: ProgressDisplay, ending: StatusFile, tell: Callable[[str], None] | None
) -> None:
    """Generates until all ranks are through; the first rank shows how far they are, and `tell`s what came of it."""
    num_before, started_s = ending.num_done or 0, time.monotonic()

    def show(totals: Totals) -> None:
        ending.num_done = num_before + totals.num_rows
        progress.update(totals)

    if tell is not None:
        progress.open_bar()
    try:
        totals = generation.run(show)
    finally:
        progress.close()
    if tell is not None:
        tell(_describe_totals(totals, time.monotonic() - started_s))


def _waits_for_node_leader(config: Config, layout: Layout, group: RankGroup) -> bool:
    """Whether this rank waits until its node's first one has loaded its model. Collective."""
    is_cold_here = group.all_gather_object(has_cold_caches(config, os.environ))
    if layout.has_shared_engine or group.is_node_leader or config.parallel.load_first == "never":
        return False  # processes that make an engine together load together
    first = group.nodes.index(group.nodes[group.rank])
    return config.parallel.load_first == "always" or is_cold_here[first]


def _write_result(
    config: Config,
    group: RankGroup,
    rows: InputRows,
    folder: RunDir,
    own_journal: JournalWriter,
    own: RankManifest,
    tell: Callable[[str], None],
) -> None:
    """Gathers manifests, and rows where they are elsewhere; rank 0 writes the result."""
    seen = shares_run_dir(group, folder.path)
    own = replace(
        own, rank=group.rank, sees_rank_0=seen, num_rows=own_journal.num_rows, num_bytes=own_journal.num_bytes
    )
    manifests = group.gather_object(own)
    elsewhere = not seen if config.output.gather == "auto" else config.output.gather == "always"
    sending = []
    if elsewhere and group.rank > 0:
        # Besides its own, a node's first rank sends what earlier attempts left there.
        left = list_segments(folder.journal) if group.is_node_leader and not seen else []
        this_attempt = own_journal.path.name.partition("-rank-")[0] + "-"
        earlier = [path for path in left if not path.name.startswith(this_attempt)]
        sending = sorted({*earlier, *own_journal.paths})
    rounds = gather_segments(group, folder.journal, sending, config.output.gather_bytes)
    if rounds:
        tell(f"rows gathered to rank 0 in {format_count(rounds, 'round')}")

    def write() -> None:
        if manifests is None:  # not rank 0
            return
        folder.update_metadata(manifests=[vars(each) for each in manifests], gather_rounds=rounds)
        for finding in summarize_run(manifests):
            tell(finding)
        has_samples = config.sampling.get("n", 1) != 1 or "n" in config.sampling_columns
        facts = write_dataset(rows, folder, config.output, config.data.columns, has_samples)
        if facts["num_errors"]:
            kinds = ", ".join(f"{number:,} {kind}" for kind, number in facts["errors"].items())
            tell(f"rows with an error: {kinds}; the first is {facts['first_error']}")
        tell(
            f"done: {format_count(facts['num_rows'], 'row')}, {facts['num_errors']:,} with an error, "
            f"in {folder.dataset}"
        )

    group.run_on_all_ranks(write)


def _describe_plan(num_rows: int, num_todo: int, num_ranks: int, attempt: int) -> str:
    ranks = format_count(num_ranks, "rank")
    if attempt == 1:
        return f"{format_count(num_rows, 'row')} over {ranks}"
    done = num_rows - num_todo
    return f"attempt {attempt}: {done:,} of {num_rows:,} rows are done, {num_todo:,} to go over {ranks}"


def _describe_totals(totals: Totals, elapsed_s: float) -> str:
    rate = totals.num_generated_tokens / elapsed_s if elapsed_s > 0 else 0.0
    return (
        f"generated {format_count(totals.num_rows, 'row')}, {format_count(totals.num_generated_tokens, 'token')} "
        f"in {format_duration(elapsed_s)} "
        f"({rate:,.0f} tokens/s)"
    )


def _silence(line: str) -> None:
    """What the other ranks do where rank 0 speaks for all."""
