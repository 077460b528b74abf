"""The main job, as a story: config → topology → rows → claim → engine → journal → gather → dataset."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from dpgen.config.schema import Config
from dpgen.data.input_rows import Rows, open_rows
from dpgen.distributed.group import Group
from dpgen.distributed.layout import Layout, layout_of, world_of
from dpgen.distributed.topology import Topology
from dpgen.engine.launch import engine_spec, engine_starter, is_cold, open_tokenizer
from dpgen.engine.messages import TextWork
from dpgen.engine.supervisor import EngineSupervisor
from dpgen.errors import EXIT_RESUMABLE, ConfigError, nearest
from dpgen.formatting import counted, duration
from dpgen.journal.reader import last_attempt, segments
from dpgen.journal.run_dir import RunFolder, differences, identity_of
from dpgen.journal.writer import Journal
from dpgen.lifecycle.shutdown import Stop, deadline
from dpgen.lifecycle.status_file import Ending
from dpgen.log import speaker
from dpgen.monitoring.progress import Progress
from dpgen.monitoring.run_report import Manifest, findings
from dpgen.monitoring.startup import Phases, Waiting
from dpgen.output.dataset_writer import check_columns, write_dataset
from dpgen.output.gather import bring_home, sees_rank_0
from dpgen.scheduling.generation_loop import Generation, Totals
from dpgen.scheduling.planner import Dealer

_LOADED = "dpgen/loaded"  # in the store: how many ranks have loaded their models; below it, of each node
_LOOK_S = 0.1


def run(config: Config, topology: Topology, group: Group, ending: Ending, phases: Phases) -> None:
    """Generates every row of `config.data` that has no result yet, and writes the final dataset.

    Collective: every rank of `group` calls it with the same configuration. Keeps `ending.num_done` current, and tells
    what `phases` of its start-up took how long.

    Raises:
        ConfigError: something in the configuration or the input is wrong; no model was loaded.
        Interrupted: told to stop; the same command goes on.
        DpgenError: anything else that a user can mend; see its subclasses.
    """
    say = speaker(topology.dp_rank)
    tell = say if topology.is_first else _silence  # what one rank says for all
    deadline_s, deadline_name = deadline(config.run.time_limit, config.run.stop_margin_s, os.environ, time.time())
    stop = Stop(deadline_s, deadline_name, before_exit=lambda: ending.tell_if_untold(EXIT_RESUMABLE))
    stop.install()
    with ExitStack() as stack:
        layout = group.agree(lambda: layout_of(topology, config.parallel))
        engine = _start_engine(config, topology, layout, group, say)  # imports vLLM meanwhile
        stack.callback(engine.kill)
        rows, folder, identity = _open(config, group)
        phases.end("input")
        if group.all_gather_object(_is_finished(config, folder, identity))[0]:  # rank 0's folder is the one
            tell(f"{folder.path} holds this run's finished result already; nothing to do")
            return
        if layout.lock_step and not config.parallel.enable_expert_parallel:
            tell("parallel.lock_step=true: engines wait for each other at every step, which only costs here")
        texts = group.agree(lambda: open_tokenizer(config, tell))
        phases.end("tokenizer")
        for note in group.agree(lambda: engine.check(group.raise_if_peer_failed)):
            tell(note)
        phases.end("engine's options")
        attempt = _begin_attempt(config, group, folder, identity)
        own_journal = Journal(folder.journal, attempt, topology.dp_rank)
        stack.callback(own_journal.close)

        dealer = Dealer(
            config,
            rows,
            folder,
            group,
            attempt,
            texts.render,
            claims_rows=layout.leads,
            in_lock_step=layout.lock_step,
            tell=tell,
        )
        feed = dealer.deal()
        tell(_plan(len(rows), dealer.num_todo, layout.num_engines, attempt))
        ending.num_done = len(rows) - dealer.num_todo
        own = Manifest(group.rank, group.nodes[group.rank])
        if dealer.num_todo:
            tell(str(dealer.order))
            phases.end("rows to do")
            _load(engine, texts.in_engine, config, layout, group, folder, phases, tell)
            tell(str(phases))
            generation = Generation(
                feed,
                engine,
                own_journal,
                group,
                deal=dealer.deal,
                stop_reason=lambda: stop.reason,
                detokenizer=texts.detokenizer,
                reserve_rows=config.work.reserve_rows,
                num_samples=config.sampling.get("n") or 1,
                max_leading_errors=config.run.max_leading_errors,
                say=say,
            )
            progress = Progress(len(rows), len(rows) - dealer.num_todo, tell, config.run.progress_interval_s)
            with stop.asked_for():
                _generate(generation, progress, ending, tell if topology.is_first else None)
            own = generation.contribution(own)
        engine.stop()  # it frees the model's memory while the result is written
        own_journal.close()
        _finish(config, group, rows, folder, own_journal, own, tell)
        stop.ignore()
        engine.close()


def _is_finished(config: Config, folder: RunFolder, identity: Mapping[str, Any]) -> bool:
    """Whether this very run is finished, and nothing more is wanted of it."""
    is_same = not differences(folder.read().get("identity"), identity)
    return folder.is_finished and is_same and not config.run.retry_errors and config.run.resume != "never"


def _start_engine(
    config: Config, topology: Topology, layout: Layout, group: Group, say: Callable[[str], None]
) -> EngineSupervisor:
    world = world_of(topology, layout, group)
    return EngineSupervisor(
        engine_starter(config, topology, group, world),
        engine_spec(config, topology, world),
        say,
        stands_alone=world is None,
        timeout_s=config.run.engine_timeout_s,
        start_timeout_s=config.run.engine_start_timeout_s,
        max_deaths=config.run.max_engine_deaths,
    )


def _open(config: Config, group: Group) -> tuple[Rows, RunFolder, dict[str, Any]]:
    """The input and the run folder, both checked on all ranks, and what identifies the run."""

    def read() -> tuple[Rows, dict[str, Any] | None]:
        with group.node_leader_first():
            rows = open_rows(config.data)
            return rows, rows.fingerprint() if group.leads_node else None

    rows, fingerprint = group.agree(read)
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
                    f"{nearest(column, rows.columns, 'columns')}"
                )
        hint = config.work.hint_column
        if hint is not None and hint not in rows.columns:
            raise ConfigError(
                f"work.hint_column: {hint!r} is no column of the dataset{nearest(hint, rows.columns, 'columns')}"
            )
        check_columns(rows.columns, config.data.columns, config.output.token_ids)

    group.agree(check)
    return rows, RunFolder(config.run.dir), identity_of(config, fingerprints[0])


def _begin_attempt(config: Config, group: Group, folder: RunFolder, identity: Mapping[str, Any]) -> int:
    """Checks and makes the folder; this attempt's number: one more than any that has written there."""

    def check() -> None:
        folder.check(identity, config.run.resume)
        if group.rank == 0:
            folder.lock()

    def create() -> int:
        with group.node_leader_first():
            folder.create()
        return last_attempt(folder.journal)

    group.agree(check)
    attempt: int = 1 + max(group.all_gather_object(group.agree(create)))

    def record() -> None:
        if group.rank == 0:
            folder.success.unlink(missing_ok=True)  # failed rows of a finished run are tried again: it is unfinished
            folder.write_config(config)
            folder.update(identity=identity, attempt=attempt, dp_size=group.size)

    def record_elsewhere() -> None:
        if not folder.read():  # a folder that rank 0 doesn't see: it, too, knows what it holds
            folder.update(identity=identity)

    group.agree(record)
    group.agree(record_elsewhere)
    return attempt


def _load(
    engine: EngineSupervisor,
    text: TextWork,
    config: Config,
    layout: Layout,
    group: Group,
    folder: RunFolder,
    phases: Phases,
    tell: Callable[[str], None],
) -> None:
    """Loads the model; on the way the ranks agree on the KV cache's size: the min-KV-cache all-reduce."""
    measured, agreed = 0, 0
    waiting = Waiting(
        tell,
        lambda: (
            f"this rank's model is loaded, {group.store.add(_LOADED, 0)} of {group.size} are; the KV cache's size is "
            "agreed with the last (parallel.sync_kv_cache=false does without)"
        ),
    )

    def agree_kv(measured_bytes: int) -> int:
        nonlocal measured, agreed
        measured = agreed = measured_bytes
        phases.end("model")
        group.store.add(f"{_LOADED}/{group.nodes[group.rank]}", 1)
        if config.parallel.sync_kv_cache:
            group.store.add(_LOADED, 1)
            [agreed] = group.wait(group.reduce([measured_bytes], "min"), waiting)
            phases.end("other ranks' models")
        return agreed

    if _loads_later(config, layout, group):
        while group.store.add(f"{_LOADED}/{group.nodes[group.rank]}", 0) == 0:
            group.raise_if_peer_failed()
            time.sleep(_LOOK_S)
        phases.end("the node's first model")
    info = engine.load(agree_kv, group.raise_if_peer_failed, text)
    phases.end("KV cache")
    tell(
        f"KV cache: {info.num_kv_blocks:,} blocks of {info.kv_block_tokens} tokens"
        f"{' on every rank' if config.parallel.sync_kv_cache else ''} ({agreed / 2**20:,.0f} MiB; "
        f"{measured / 2**20:,.0f} MiB free here); {counted(info.max_num_seqs, 'sequence')} at a time"
    )
    if group.rank == 0:
        folder.update(engine={**vars(info), "kv_cache_bytes": agreed})


def _generate(generation: Generation, progress: Progress, ending: Ending, tell: Callable[[str], None] | None) -> None:
    """Generates until all ranks are through; the first rank shows how far they are, and `tell`s what came of it."""
    num_before, started_s = ending.num_done or 0, time.monotonic()

    def show(totals: Totals) -> None:
        ending.num_done = num_before + totals.num_rows
        progress.show(totals)

    if tell is not None:
        progress.open_bar()
    try:
        totals = generation.run(show)
    finally:
        progress.close()
    if tell is not None:
        tell(_summary(totals, time.monotonic() - started_s))


def _loads_later(config: Config, layout: Layout, group: Group) -> bool:
    """Whether this rank waits until its node's first one has loaded its model. Collective."""
    is_cold_here = group.all_gather_object(is_cold(config, os.environ))
    if layout.is_shared or group.leads_node or config.parallel.load_first == "never":
        return False  # processes that make an engine together load together
    first = group.nodes.index(group.nodes[group.rank])
    return config.parallel.load_first == "always" or is_cold_here[first]


def _finish(
    config: Config,
    group: Group,
    rows: Rows,
    folder: RunFolder,
    own_journal: Journal,
    own: Manifest,
    tell: Callable[[str], None],
) -> None:
    """Gathers manifests, and rows where they are elsewhere; rank 0 writes the result."""
    seen = sees_rank_0(group, folder.path)
    own = replace(
        own, rank=group.rank, sees_rank_0=seen, num_rows=own_journal.num_rows, num_bytes=own_journal.num_bytes
    )
    manifests = group.gather_object(own)
    elsewhere = not seen if config.output.gather == "auto" else config.output.gather == "always"
    sending = []
    if elsewhere and group.rank > 0:
        # Besides its own, a node's first rank sends what earlier attempts left there.
        left = segments(folder.journal) if group.leads_node and not seen else []
        this_attempt = own_journal.path.name.partition("-rank-")[0] + "-"
        earlier = [path for path in left if not path.name.startswith(this_attempt)]
        sending = sorted({*earlier, *own_journal.paths})
    rounds = bring_home(group, folder.journal, sending, config.output.gather_bytes)
    if rounds:
        tell(f"rows gathered to rank 0 in {counted(rounds, 'round')}")

    def write() -> None:
        if manifests is None:  # not rank 0
            return
        folder.update(manifests=[vars(each) for each in manifests], gather_rounds=rounds)
        for finding in findings(manifests):
            tell(finding)
        has_samples = config.sampling.get("n", 1) != 1 or "n" in config.sampling_columns
        facts = write_dataset(rows, folder, config.output, config.data.columns, has_samples)
        if facts["num_errors"]:
            kinds = ", ".join(f"{number:,} {kind}" for kind, number in facts["errors"].items())
            tell(f"rows with an error: {kinds}; the first is {facts['first_error']}")
        tell(f"done: {counted(facts['num_rows'], 'row')}, {facts['num_errors']:,} with an error, in {folder.dataset}")

    group.agree(write)


def _plan(num_rows: int, num_todo: int, num_ranks: int, attempt: int) -> str:
    ranks = counted(num_ranks, "rank")
    if attempt == 1:
        return f"{counted(num_rows, 'row')} over {ranks}"
    done = num_rows - num_todo
    return f"attempt {attempt}: {done:,} of {num_rows:,} rows are done, {num_todo:,} to go over {ranks}"


def _summary(totals: Totals, elapsed_s: float) -> str:
    rate = totals.num_generated_tokens / elapsed_s if elapsed_s > 0 else 0.0
    return (
        f"generated {counted(totals.num_rows, 'row')}, {counted(totals.num_generated_tokens, 'token')} "
        f"in {duration(elapsed_s)} "
        f"({rate:,.0f} tokens/s)"
    )


def _silence(line: str) -> None:
    """What the other ranks do where rank 0 speaks for all."""
