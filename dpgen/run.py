"""The main job, as a story: config → topology → rows → claim → engine → journal → gather → dataset."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpgen import gather, journal
from dpgen.claims import Claims
from dpgen.collectives import Group
from dpgen.config import Config
from dpgen.dataset_out import check_columns, write_dataset
from dpgen.engine.process import EngineProcess, engine_environment
from dpgen.engine.protocol import Checked, EngineInfo, EngineSpec, KvMeasured, Ready
from dpgen.errors import ConfigError
from dpgen.feed import Feed, RenderPrompt
from dpgen.folder import RunFolder, differences, identity_of
from dpgen.generate import Generation, Totals
from dpgen.journal import Journal
from dpgen.progress import Progress, duration, speaker
from dpgen.render import Renderer, TokenizerSettings, known_to_transformers, load_tokenizer
from dpgen.rows import Rows, Shard, open_rows
from dpgen.topology import Topology, cores_of_rank, gpus_of_rank


def run(config: Config, topology: Topology, group: Group) -> None:
    """Generates every row of `config.data` that has no result yet, and writes the final dataset.

    Collective: every rank of `group` calls it with the same configuration.

    Raises:
        ConfigError: something in the configuration or the input is wrong; no model was loaded.
        DpgenError: anything else that a user can mend; see its subclasses.
    """
    say = speaker(topology.dp_rank)
    tell = say if topology.is_first else _silence  # what one rank says for all
    with ExitStack() as stack:
        engine = stack.enter_context(_Started(config, topology, group))  # imports vLLM while we read the data
        rows, folder, identity = _open(config, topology, group)
        if folder.is_finished and not differences(folder.read().get("identity"), identity):
            tell(f"{folder.path} holds this run's finished result already; nothing to do")
            return
        for note in engine.check():
            tell(note)
        group.agree(lambda: folder.check(identity, config.run.resume))
        attempt = _begin_attempt(config, topology, group, folder, identity)
        todo = _rows_to_do(rows, folder, topology, group)
        own_journal = Journal(folder.journal, attempt, topology.dp_rank)
        stack.callback(own_journal.close)
        tell(_plan(rows, todo, topology, attempt))

        feed = Feed(
            Claims(
                group.store,
                f"dpgen/cursor/{attempt}",
                [len(range(shard, len(todo), group.size)) for shard in range(group.size)],
                group.rank,
                steal=config.work.steal,
                max_rows=config.work.claim_rows,
            ),
            _shards(rows, todo, group.size, _columns_read(config)),
            engine.renderer(),
            run_seed=config.run.seed,
            sampling_columns=config.sampling_columns,
        )
        info = engine.load(tell, sync_kv_cache=config.parallel.sync_kv_cache) if len(todo) else None
        progress = Progress(len(rows), len(rows) - len(todo), tell, config.run.progress_interval_s)
        if topology.is_first:
            folder.update(engine=None if info is None else vars(info))
            progress.open_bar()
            stack.callback(progress.close)
        started_s = time.monotonic()
        totals = Totals()
        if info is not None:
            totals = Generation(
                feed,
                engine.process,
                own_journal,
                group,
                max_in_flight=info.max_num_seqs + config.work.reserve_rows,
                max_leading_errors=config.run.max_leading_errors,
                show=progress.show,
            ).run()
        progress.close()
        own_journal.close()
        engine.close()  # the model's memory is free while the result is written
        tell(_summary(totals, time.monotonic() - started_s))
        _finish(config, topology, group, rows, folder, own_journal, tell)


def _open(config: Config, topology: Topology, group: Group) -> tuple[Rows, RunFolder, dict[str, Any]]:
    """The input and the run folder, both checked on all ranks, and what identifies the run."""

    def read() -> tuple[Rows, dict[str, Any] | None]:
        with group.node_leader_first(topology):
            rows = open_rows(config.data)
            return rows, rows.fingerprint() if topology.leads_node else None

    rows, fingerprint = group.agree(read)
    fingerprints = [each for each in group.all_gather_object(fingerprint) if each is not None]
    folder = RunFolder(config.run.dir)
    identity = identity_of(config, fingerprints[0])

    def check() -> None:
        if any(each != fingerprints[0] for each in fingerprints):
            raise ConfigError(f"data.path={config.data.path} holds other rows on one node than on another")
        if not rows.is_empty:
            config.prompt.check_columns(rows.columns)
            for name, column in config.sampling_columns.items():
                if column not in rows.columns:
                    raise ConfigError(f"sampling.from_columns: {name} is to come from {column!r}, which is no column")
            check_columns(rows.columns, config.data.columns, config.output.token_ids)

    group.agree(check)
    return rows, folder, identity


def _begin_attempt(
    config: Config, topology: Topology, group: Group, folder: RunFolder, identity: Mapping[str, Any]
) -> int:
    """Makes the folder and gives this attempt's number: one more than any that has written there."""

    def create() -> int:
        with group.node_leader_first(topology):
            folder.create()
        return journal.last_attempt(folder.journal)

    attempt: int = 1 + max(group.all_gather_object(group.agree(create)))

    def record() -> None:
        if topology.is_first:
            folder.write_config(config)
            folder.update(identity=identity, attempt=attempt, dp_size=group.size)

    group.agree(record)
    return attempt


def _rows_to_do(rows: Rows, folder: RunFolder, topology: Topology, group: Group) -> np.ndarray:
    """Indices of the rows without a result, in order of work: what no node's journal holds."""
    done = np.zeros(len(rows), dtype=bool)
    if topology.leads_node:
        found = journal.scan(folder.journal).row
        done[found[found < len(rows)]] = True
    return np.flatnonzero(~group.union(done))


def _shards(rows: Rows, todo: np.ndarray, num_shards: int, columns: list[str] | None) -> Callable[[int], Shard]:
    """Opens shards as they are asked for: most ranks need few besides their own."""
    opened: dict[int, Shard] = {}

    def shard(index: int) -> Shard:
        if index not in opened:
            opened[index] = rows.shard(todo, num_shards, index, columns)
        return opened[index]

    return shard


def _columns_read(config: Config) -> list[str] | None:
    """The columns that generating reads; None for all, which a template may."""
    if config.data.template is not None:
        return None
    source = config.data.prompt_column or config.data.messages_column
    assert source is not None
    return sorted({source, *config.sampling_columns.values()})


def _finish(
    config: Config,
    topology: Topology,
    group: Group,
    rows: Rows,
    folder: RunFolder,
    own_journal: Journal,
    tell: Callable[[str], None],
) -> None:
    """Gathers manifests, and rows where they are elsewhere; rank 0 writes the result."""
    seen = gather.sees_rank_0(group, folder.path)
    manifest = Manifest(topology.dp_rank, topology.node, seen, own_journal.num_rows, own_journal.num_bytes)
    manifests = group.gather_object(manifest)
    elsewhere = not seen if config.output.gather == "auto" else config.output.gather == "always"
    sending = []
    if elsewhere and not topology.is_first:
        # Besides its own, a node's first rank sends what earlier attempts left there.
        earlier = journal.segments(folder.journal) if topology.leads_node and not seen else []
        sending = sorted({*earlier, own_journal.path})
    rounds = gather.bring_home(group, folder.journal, sending, config.output.gather_bytes)
    if rounds:
        tell(f"rows gathered to rank 0 in {rounds} rounds")

    def write() -> None:
        if not topology.is_first:
            return
        assert manifests is not None
        folder.update(manifests=[vars(each) for each in manifests], gather_rounds=rounds)
        has_samples = config.sampling.get("n", 1) != 1 or "n" in config.sampling_columns
        facts = write_dataset(rows, folder, config.output, config.data.columns, has_samples)
        tell(f"done: {facts['num_rows']:,} rows, {facts['num_errors']:,} with an error, in {folder.dataset}")

    group.agree(write)


@dataclass(frozen=True)
class Manifest:
    """What a rank tells rank 0 at the end."""

    rank: int
    node: str
    sees_rank_0: bool
    num_rows: int
    num_bytes: int


class _Started:
    """This rank's engine process, from its start to its end."""

    def __init__(self, config: Config, topology: Topology, group: Group) -> None:
        self._config, self._topology, self._group = config, topology, group
        tokenizer = TokenizerSettings.from_engine(config.model, config.engine)
        self._tokenizer_settings = tokenizer
        self._renders_here = config.run.engine == "fake" or known_to_transformers(tokenizer)
        visible = _visible_gpus(os.environ)
        affinities = group.all_gather_object((topology.node, frozenset(os.sched_getaffinity(0))))
        on_node = [cores for node, cores in affinities if node == topology.node]
        cores: list[int] | None = None
        gpus: list[str] | None = None
        if visible and config.run.engine == "vllm":
            gpus = group.agree(
                lambda: gpus_of_rank(topology, visible, config.gpus_per_rank, share=config.parallel.share_devices)
            )
        else:
            group.agree(lambda: None)
            cores = cores_of_rank(on_node, min(topology.local_rank, len(on_node) - 1))
        self.process = EngineProcess(
            EngineSpec(
                kind=config.run.engine,
                model=config.model,
                options=dict(config.engine),
                sampling=config.sampling_fields,
                sampling_columns=tuple(config.sampling_columns),
                prompt_settings=None if self._renders_here else config.prompt,
                tensor_parallel_size=config.parallel.tensor_parallel_size,
                pipeline_parallel_size=config.parallel.pipeline_parallel_size,
                local_size=topology.local_size,
                token_ids=config.output.token_ids,
            ),
            engine_environment(os.environ, gpus=gpus, num_cores=len(cores or ()), log_level=config.run.log_level),
            cores,
            speaker(topology.dp_rank, "engine"),
        )

    def __enter__(self) -> _Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()

    def close(self) -> None:
        self.process.close()

    def check(self) -> tuple[str, ...]:
        """Waits for the engine's word on its options; its notes for the log."""

        def hear() -> tuple[str, ...]:
            checked = self._await(Checked)
            if checked.problem is not None:
                raise ConfigError(checked.problem)
            return tuple(checked.notes)

        return self._group.agree(hear)

    def renderer(self) -> RenderPrompt:
        """How a row becomes a prompt: token ids, or what the engine is to tokenize."""
        settings = self._config.prompt
        if self._config.run.engine == "fake":
            from dpgen.engine.fake import FakeTokenizer

            tokenizer, text_of = FakeTokenizer(), Renderer(settings, None)
            return lambda row: (tokenizer.encode(str(text_of.prompt(row))), None)
        if not self._renders_here:
            raw = Renderer(settings, None)
            return lambda row: (None, raw.prompt(row))
        renderer = self._group.agree(lambda: Renderer(settings, load_tokenizer(self._tokenizer_settings)))
        return lambda row: (renderer.render(row), None)

    def load(self, tell: Callable[[str], None], *, sync_kv_cache: bool) -> EngineInfo:
        """Loads the model; on the way the ranks agree on the KV cache's size: the min-KV-cache all-reduce."""
        started_s = time.monotonic()
        self.process.load()
        measured = self._await(KvMeasured).num_bytes
        agreed = measured
        if sync_kv_cache:
            [agreed] = self._group.wait(self._group.reduce([measured], "min"))
        self.process.agree_kv(agreed)
        info: EngineInfo = self._await(Ready).info
        tell(
            f"KV cache: {info.num_kv_blocks:,} blocks of {info.kv_block_tokens} tokens"
            f"{' on every rank' if sync_kv_cache else ''} ({agreed / 2**20:,.0f} MiB; {measured / 2**20:,.0f} MiB free "
            f"here); {info.max_num_seqs} sequences at a time; loaded in {duration(time.monotonic() - started_s)}"
        )
        return info

    def _await(self, kind: type[Any]) -> Any:
        """The engine's next word, of that kind; meanwhile a failing peer ends the wait."""
        while True:
            self._group.raise_if_peer_failed()
            for event in self.process.poll(0.2):
                if isinstance(event, kind):
                    return event


def _visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """The GPUs that this process may use, as CUDA names them, without loading CUDA here."""
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [each.strip() for each in named.split(",") if each.strip() not in ("", "-1")]
    nodes = [name for name in os.listdir("/dev") if name.startswith("nvidia") and name[6:].isdigit()]
    return [str(index) for index in range(len(nodes))]


def _plan(rows: Rows, todo: np.ndarray, topology: Topology, attempt: int) -> str:
    ranks = f"{topology.dp_size} rank{'s' if topology.dp_size > 1 else ''}"
    if attempt == 1:
        return f"{len(rows):,} rows over {ranks}"
    return (
        f"attempt {attempt}: {len(rows) - len(todo):,} of {len(rows):,} rows are done, {len(todo):,} to go over {ranks}"
    )


def _summary(totals: Totals, elapsed_s: float) -> str:
    rate = totals.num_generated_tokens / elapsed_s if elapsed_s > 0 else 0.0
    return (
        f"generated {totals.num_rows:,} rows, {totals.num_generated_tokens:,} tokens in {duration(elapsed_s)} "
        f"({rate:,.0f} tokens/s)"
    )


def _silence(line: str) -> None:
    """What the other ranks do where rank 0 speaks for all."""
