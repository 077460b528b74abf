"""Generate over rows of a Python program: in one call, row by row, or in several calls with one loaded engine."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack, get_type_hints

from dpgen.api.calls import Call, make_error_job, prepare_call
from dpgen.api.jobs import Outcome, ResultOn
from dpgen.api.processes import RankProcesses
from dpgen.api.settings import ConfigSource, JobSettings, Layer, Settings, list_layers, make_layer
from dpgen.config.schema import Config
from dpgen.distributed.topology import Topology, read_topology
from dpgen.errors import ConfigError, DpgenError, Interrupted, NoRowSucceeded

if TYPE_CHECKING:
    import datasets

# What an engine is started with: a Session can't change it between calls.
_ENGINE_KEYWORDS = ("model", "task", "engine", "lora", "parallel")


def generate(
    dataset: Any,
    *,
    model: str | Path | None = None,
    run_dir: str | Path | None = None,
    config: ConfigSource | None = None,
    result_on: ResultOn = "rank0",
    **settings: Unpack[JobSettings],
) -> datasets.Dataset | None:
    """Generate every row of a dataset, and return the result as a Dataset in input order.

    Under torchrun or srun every rank calls it, with the same arguments. In a notebook, or any program started alone,
    it runs one rank, or starts `num_gpus` on this machine.

    Args:
        dataset: a datasets.Dataset, a list of dicts, a dict of columns, a pandas or Polars frame; or what `data.path`
            names: a file, a glob, a list of files, a directory, or a Hub dataset. Values of dicts that JSON has are
            read as in a JSONL file: types may be mixed, and objects may have different keys.
        model: a directory, or a Hub name.
        run_dir: the run directory. The same call on it resumes, and generates no finished row again. Without it, a
            temporary one; it is removed once the result is in memory.
        config: a YAML file, several, or a `dpgen.Config`; the other arguments are laid over it.
        result_on: under a launcher, which ranks get the result: "rank0", or "all".
        settings: further keys of the configuration, see `Settings`: prompt_column, messages_column, template,
            system_prompt, sampling={...}, engine={...}, data={...}, check={...}, seed, ...; num_gpus; quiet.

    Returns:
        the kept input columns and those of the result: row_id, generated_text, finish_reason, num_prompt_tokens,
        num_generated_tokens, error, and those that `output` adds. None on a rank that gets no result.

    Raises:
        ConfigError: something in the arguments or the rows is wrong. No model was loaded.
        Interrupted: by Ctrl-C, a signal or `run.time_limit`. The same call resumes, with the error's `run_dir`.
        NoRowSucceeded: the result is written, and every row of it has an error.
        DpgenError: anything else; see `DpgenError.is_resumable`.

    Example:
        >>> import dpgen
        >>> rows = dpgen.generate(
        ...     [{"q": "What is 1+1?"}, {"q": "What is a rank?"}],
        ...     model="none", prompt_column="q", sampling={"max_tokens": 5}, run={"engine": "fake"}, quiet=True,
        ... )
        >>> rows["num_generated_tokens"][:]
        [5, 5]
    """
    runner = _Runner("generate", _pop_launch(settings), _get_names(JobSettings))
    call = runner.prepare(dataset, {"model": model, "run_dir": run_dir, **settings}, list_layers(config), result_on)
    return runner.run(call, runner.close)


def stream(
    dataset: Any,
    *,
    model: str | Path | None = None,
    run_dir: str | Path | None = None,
    config: ConfigSource | None = None,
    **settings: Unpack[JobSettings],
) -> Iterator[dict[str, Any]]:
    """Generate every row of a dataset, and yield each as it is finished, in any order.

    The run begins with the first row that is asked for. Breaking off, closing or forgetting the iterator stops it,
    resumable: the same call with the same `run_dir` goes on, and yields all rows, those finished before first. A slow
    consumer does not slow the engine down: finished rows wait in the run directory.

    Under torchrun or srun every rank calls it and iterates; rank 0 gets all rows, those of other nodes at the end where
    they have run directories of their own, and the other ranks get none.

    Args:
        dataset, model, run_dir, config, settings: see `generate`.

    Yields:
        a dict of the columns that `generate` returns, each row exactly once.

    Raises:
        DpgenError: as `generate` does; a wrong argument at the call, anything else at a row.

    Example:
        >>> import dpgen
        >>> for row in dpgen.stream(
        ...     {"q": ["What is 1+1?"]}, model="none", prompt_column="q", run={"engine": "fake"}, quiet=True
        ... ):
        ...     print(row["row_id"], row["finish_reason"])
        0 length
    """
    runner = _Runner("stream", _pop_launch(settings), _get_names(JobSettings))
    call = runner.prepare(dataset, {"model": model, "run_dir": run_dir, **settings}, list_layers(config), "rank0")
    return runner.iter_rows(call, runner.close)


class Session:
    """Run several calls with one loaded engine; a context manager, which ends the engine.

    Each call is a run of its own, with its own rows, sampling and run directory, and with all guarantees of one. What
    the engine is started with stays: model, task, engine, lora, parallel.

    Under torchrun or srun every rank has the session and makes the same calls.

    Args:
        model, config, settings: see `generate`; they hold for every call, and a call's own are laid over them.

    Example:
        >>> import dpgen
        >>> with dpgen.Session(model="none", prompt_column="q", run={"engine": "fake"}, quiet=True) as session:
        ...     short = session.generate([{"q": "What is 1+1?"}], sampling={"max_tokens": 2})
        ...     long = session.generate(short.select_columns("q"), sampling={"max_tokens": 9})
        >>> short["num_generated_tokens"][:], long["num_generated_tokens"][:]
        ([2], [9])
    """

    def __init__(
        self,
        *,
        model: str | Path | None = None,
        config: ConfigSource | None = None,
        **settings: Unpack[JobSettings],
    ) -> None:
        launch = _pop_launch(settings)
        layer = make_layer("Session", {"model": model, **settings}, ["model", *_get_names(Settings)])
        self._layers = [*list_layers(config), layer]
        legal = [name for name in _get_names(Settings) if name not in _ENGINE_KEYWORDS]
        self._runner = _Runner("Session.generate", launch, legal, keeps_engine=True)

    def generate(
        self,
        dataset: Any,
        *,
        run_dir: str | Path | None = None,
        result_on: ResultOn = "rank0",
        **settings: Unpack[Settings],
    ) -> datasets.Dataset | None:
        """Generate every row of a dataset, as `dpgen.generate` does.

        Raises:
            ConfigError: as `dpgen.generate`; or a setting that the loaded engine can't change, which is named; or a
                stream of this session is not finished.
            DpgenError: as `dpgen.generate`. The session goes on.
        """
        call = self._runner.prepare(dataset, {"run_dir": run_dir, **settings}, self._layers, result_on)
        return self._runner.run(call, self._runner.release)

    def stream(
        self, dataset: Any, *, run_dir: str | Path | None = None, **settings: Unpack[Settings]
    ) -> Iterator[dict[str, Any]]:
        """Yield each row of a dataset as it is finished, as `dpgen.stream` does; one stream at a time."""
        call = self._runner.prepare(dataset, {"run_dir": run_dir, **settings}, self._layers, "rank0")
        return self._runner.iter_rows(call, self._runner.release)

    def close(self) -> None:
        """End the engine; safe to call twice. Another call loads it again."""
        self._runner.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Runner:
    """Prepare calls, and run them on one set of rank processes.

    Args:
        name: of the function, for messages.
        launch: num_gpus and quiet.
        legal: the keywords of a call.
        keeps_engine: whether its calls share an engine.
    """

    def __init__(self, name: str, launch: Mapping[str, Any], legal: list[str], *, keeps_engine: bool = False) -> None:
        self._name, self._keeps_engine = name, keeps_engine
        self._legal = ["run_dir", *legal] if keeps_engine else ["model", "run_dir", *legal]
        self._num_gpus, self._is_quiet = launch.get("num_gpus"), bool(launch.get("quiet"))
        self._topology: Topology = read_topology(os.environ) if self._num_gpus is None else Topology()
        if self._num_gpus is not None and read_topology(os.environ).dp_size > 1:
            raise ConfigError(
                f"num_gpus={self._num_gpus}: the launcher has started the ranks already; each calls without num_gpus"
            )
        if self._num_gpus is not None and (type(self._num_gpus) is not int or self._num_gpus < 1):
            raise ConfigError(f"num_gpus={self._num_gpus!r}: must be a whole number of at least 1")
        self._ranks: RankProcesses | None = None
        self._engine_keys: dict[str, Any] | None = None  # of the first call
        self._in_use = threading.Lock()

    def prepare(self, dataset: Any, keywords: Mapping[str, Any], layers: list[Layer], result_on: ResultOn) -> Call:
        """Return a call; its rows are saved."""
        try:
            kept = [name for name in keywords if self._keeps_engine and name in _ENGINE_KEYWORDS]
            if kept:
                raise ConfigError(
                    f"{self._name}(): a Session keeps its engine, so {', '.join(kept)} can't change between calls: set "
                    "it in dpgen.Session(...), or end this session and begin another"
                )
            layer = make_layer(self._name, keywords, self._legal)
            call = prepare_call(dataset, [*layers, layer], self._topology, result_on)
            try:
                self._check(call.config)
            except BaseException:
                call.discard_input()
                raise
        except DpgenError as error:
            self._tell_other_ranks(error)
            raise
        return call

    def run(self, call: Call, on_end: Callable[[], None]) -> datasets.Dataset | None:
        """Run a call and return its result, on the ranks that get it; `on_end` is called once the ranks are free."""
        ranks = self._begin(call)
        try:
            outcome = ranks.wait()
        finally:
            on_end()
        call.raise_if_failed(outcome)
        if self._topology.dp_rank == 0 or call.job.result_on == "all":
            return call.load_result()
        call.discard_result()
        return None

    def iter_rows(self, call: Call, on_end: Callable[[], None]) -> Iterator[dict[str, Any]]:
        """Yield the rows of a call; `on_end` is called after the last one, or after the break."""
        from dpgen.api.row_stream import RowStream

        last_attempt = call.run_dir.read_metadata().get("attempt") or 0
        ranks = self._begin(call)
        rows, is_all_given = RowStream(call.config, ranks, last_attempt), False
        try:
            if self._topology.dp_rank == 0:
                yield from rows.iter_rows()
            else:
                rows.outcome = ranks.wait()
            is_all_given = True
        except KeyboardInterrupt:
            if rows.outcome is None:
                ranks.interrupt()
                rows.outcome = ranks.wait()
            if rows.outcome.error_type in (None, NoRowSucceeded.__name__):  # all is generated, and not all was given
                rows.outcome = Outcome.of_error(0, Interrupted("interrupted by SIGINT"))
            is_all_given = True  # the error names the directory
        finally:
            if rows.outcome is None:
                ranks.interrupt()
                ranks.wait()
            if not is_all_given:
                call.warn_if_left()
            on_end()
        assert rows.outcome is not None
        call.raise_if_failed(rows.outcome)
        call.discard_result()

    def release(self) -> None:
        """Let another call use the ranks."""
        if self._ranks is not None and (not self._ranks.is_alive or self._ranks.poll() is None):
            self._ranks.kill()
            self._ranks = None
        with suppress(RuntimeError):
            self._in_use.release()

    def close(self) -> None:
        """End the ranks."""
        ranks, self._ranks = self._ranks, None
        if ranks is not None:
            ranks.close()

    def _begin(self, call: Call) -> RankProcesses:
        if not self._in_use.acquire(blocking=False):
            call.discard_input()
            raise ConfigError(
                "this Session is in use: finish or close its stream, or its call in another thread, first"
            )
        try:
            if self._ranks is not None and not self._ranks.is_alive:  # it died between two calls
                self._ranks.kill()
                self._ranks = None
            if self._ranks is None:
                self._ranks = RankProcesses(self._count_ranks(call.config), is_quiet=self._is_quiet)
            self._ranks.submit(call.job)
        except BaseException:
            ranks, self._ranks = self._ranks, None
            if ranks is not None:
                ranks.kill()
            call.discard_input()
            self._in_use.release()
            raise
        return self._ranks

    def _count_ranks(self, config: Config) -> int | None:
        return None if self._num_gpus is None else self._num_gpus // config.gpus_per_rank

    def _check(self, config: Config) -> None:
        """Check what the number of GPUs, or an engine that is loaded already, rules out."""
        if self._num_gpus is not None and self._num_gpus % config.gpus_per_rank:
            bound = f"a multiple of the {config.gpus_per_rank} GPUs of a rank (parallel)"
            raise ConfigError(f"num_gpus={self._num_gpus}: must be {bound}")
        if not self._keeps_engine:
            return
        if config.parallel.launcher == "external":
            raise ConfigError("parallel.launcher=external: a Session can't keep engines of several ranks; use generate")
        keys = {name: getattr(config, name) for name in _ENGINE_KEYWORDS} | {"run.engine": config.run.engine}
        before = self._engine_keys or keys
        if changed := [name for name in keys if keys[name] != before[name]]:
            raise ConfigError(f"{', '.join(changed)} can't change between calls of a Session, which keeps its engine")
        self._engine_keys = keys

    def _tell_other_ranks(self, error: DpgenError) -> None:
        """Let the other ranks end with this rank's error, instead of waiting for it."""
        if self._topology.dp_size == 1:
            return
        ranks = self._ranks or RankProcesses(None, is_quiet=self._is_quiet)
        self._ranks = ranks
        ranks.submit(make_error_job(error))
        ranks.wait()
        if not self._keeps_engine:
            self.close()


def _pop_launch(settings: Any) -> dict[str, Any]:
    """Take the keywords that are no keys of the configuration out of a call's."""
    return {name: settings.pop(name) for name in ("num_gpus", "quiet") if name in settings}


def _get_names(kind: Any) -> list[str]:
    return [name for name in get_type_hints(kind) if name not in ("num_gpus", "quiet")]
