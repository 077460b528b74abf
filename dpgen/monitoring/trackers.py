"""Pass a run's numbers on to where its user watches runs: `output.track`. Each package is imported only if asked for.

- A missing package is an error of the configuration, before a model loads.
- A thread of its own feeds all trackers: one that hangs costs neither rows nor status files. Where numbers come faster
  than they can be passed on, the newest count. A tracker that fails is reported once, and not used again.
"""

from __future__ import annotations

import importlib
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dpgen.config.schema import Config
from dpgen.errors import ConfigError
from dpgen.journal.run_dir import RunDir
from dpgen.monitoring.status.record import RankRecord

logger = logging.getLogger(__name__)

_PACKAGES = {"prometheus": "prometheus_client", "tensorboard": "tensorboard", "wandb": "wandb"}
_MODULES = {"prometheus": "prometheus_client", "tensorboard": "tensorboard.summary", "wandb": "wandb"}
_CLOSE_TIMEOUT_S = 30.0  # for an upload of the last numbers
_RANK_GAUGES = ("num_rows", "tokens_per_s", "num_running", "num_waiting", "kv_cache_usage")
_COUNTERS = ("num_done", "num_errors", "num_prompt_tokens", "num_cached_tokens", "num_generated_tokens")


class Tracker(Protocol):
    """Take a run's numbers. Each method may raise anything, and is called in one thread."""

    def put(self, record: RankRecord, peers: Mapping[int, RankRecord]) -> None:
        """Take rank 0's record, which holds the whole run's numbers, and those of all ranks that can be seen."""

    def close(self) -> None:
        """Pass on what is left."""


def check_trackers(names: Sequence[str]) -> None:
    """Import the packages of trackers.

    Raises:
        ConfigError: a package is missing or broken; names what to install.
    """
    mistakes = []
    for name in names:
        try:
            importlib.import_module(_MODULES[name])
        except ImportError as error:
            package = _PACKAGES[name].replace("_", "-")
            mistakes.append(f"output.track: {name} needs the package {package} ({error}): pip install {package}")
    if mistakes:
        raise ConfigError(*mistakes)


def open_trackers(config: Config, run_dir: RunDir) -> dict[str, Tracker]:
    """Return the trackers that a configuration asks for; each opens its target with the first numbers."""
    make: dict[str, Callable[[], Tracker]] = {
        "prometheus": lambda: PrometheusTracker(run_dir.status / "metrics.prom"),
        "tensorboard": lambda: TensorBoardTracker(run_dir.status / "tensorboard"),
        "wandb": lambda: WandbTracker(run_dir.path.resolve().name, {"model": config.model, "run_dir": config.run.dir}),
    }
    return {name: make[name]() for name in dict.fromkeys(config.output.track)}


class TrackerThread:
    """Feed trackers from a thread."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)
        self._queue: queue.Queue[tuple[RankRecord, Mapping[int, RankRecord]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._feed, name="trackers", daemon=True)
        self._thread.start()

    def put(self, record: RankRecord, peers: Mapping[int, RankRecord]) -> None:
        """Pass numbers on, now or never; never blocks."""
        self._queue.put((record, dict(peers)))

    def close(self) -> None:
        """Pass on the last numbers, and end the thread; wait for half a minute at most."""
        self._queue.put(None)
        self._thread.join(_CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            logger.warning(f"output.track: {', '.join(self._trackers)} did not end within {_CLOSE_TIMEOUT_S:.0f} s")

    def _feed(self) -> None:
        is_open = True
        while is_open:
            item, is_open = self._take_newest()
            for name in list(self._trackers):
                try:
                    if item is not None:
                        self._trackers[name].put(*item)
                    if not is_open:
                        self._trackers[name].close()
                except Exception as error:  # noqa: BLE001 - foreign code, at the boundary of a thread
                    del self._trackers[name]
                    reason = " ".join(f"{type(error).__name__}: {error}".split())
                    logger.warning(f"output.track: {name} takes no numbers any more, the run continues: {reason}")

    def _take_newest(self) -> tuple[tuple[RankRecord, Mapping[int, RankRecord]] | None, bool]:
        """Wait for numbers; return the newest, and False once there will be no more."""
        item, newest = self._queue.get(), None
        while item is not None:
            newest = item
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return newest, True
        return newest, False


class PrometheusTracker:
    """Write a text file in Prometheus' format, as node_exporter's textfile collector reads it; replaced in one step."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def put(self, record: RankRecord, peers: Mapping[int, RankRecord]) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, write_to_textfile

        registry = CollectorRegistry()
        for name, value in list_numbers(record).items():
            if name in _COUNTERS:
                Counter(_make_metric_name(name), f"{name} of the run", registry=registry).inc(value)
            else:
                Gauge(_make_metric_name(name), f"{name} of the run", registry=registry).set(value)
        state = Gauge("dpgen_state", "1 for the state that rank 0 is in", ["state"], registry=registry)
        state.labels(record.state).set(1)
        for name in _RANK_GAUGES:
            gauge = Gauge(
                f"dpgen_rank_{name.removeprefix('num_')}", f"{name} of a rank", ["rank", "host"], registry=registry
            )
            for peer in peers.values():
                value = getattr(peer.counts, name)
                if value is not None:
                    gauge.labels(str(peer.rank), peer.process.host).set(value)
        write_to_textfile(str(self._path), registry)

    def close(self) -> None:
        return


class TensorBoardTracker:
    """Write scalars for TensorBoard; a step is the number of rows that are done."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: Any = None

    def put(self, record: RankRecord, peers: Mapping[int, RankRecord]) -> None:
        if self._writer is None:
            from tensorboard.summary import Writer

            self._writer = Writer(str(self._directory))
        numbers = list_numbers(record)
        for name, value in numbers.items():
            self._writer.add_scalar(f"dpgen/{name}", value, int(numbers.get("num_done", 0)))
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandbTracker:
    """Log to Weights & Biases, one run of theirs for each attempt, all of one group; set up by their variables."""

    def __init__(self, group: str, config: Mapping[str, Any]) -> None:
        self._group, self._config = group, dict(config)
        self._run: Any = None

    def put(self, record: RankRecord, peers: Mapping[int, RankRecord]) -> None:
        if self._run is None:
            import wandb

            name = f"{self._group}-{record.attempt}"
            self._run = wandb.init(group=self._group, name=name, job_type="dpgen", config=self._config)
        self._run.log(list_numbers(record))

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def list_numbers(record: RankRecord) -> dict[str, float]:
    """Return the whole run's numbers by name, those that are known."""
    run = {} if record.run is None else vars(record.run)
    return {name: value for name, value in run.items() if value is not None}


def _make_metric_name(name: str) -> str:
    return f"dpgen_{'rows_done' if name == 'num_done' else name.removeprefix('num_')}"
