"""Where a run's numbers go beside its own files: each tracker, and what happens without its package."""

from __future__ import annotations

import importlib.util
import logging
import sys
import threading
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import wait_for

from dpgen.config import schema
from dpgen.config.checks import TRACKERS
from dpgen.config.loader import load
from dpgen.errors import ConfigError
from dpgen.monitoring import trackers
from dpgen.monitoring.status.record import ProcessIdentity, RankCounts, RankRecord, RunCounts
from dpgen.monitoring.trackers import PrometheusTracker, TensorBoardTracker, TrackerThread, WandbTracker, check_trackers

RUN = RunCounts(1000, 400, 3, num_generated_tokens=5000, tokens_per_s=120)


def make_record(rank: int = 0, **fields: Any) -> RankRecord:
    process = ProcessIdentity(f'node"{rank}')
    return RankRecord(rank, 2, attempt=1, process=process, counts=RankCounts(tokens_per_s=60 + rank), run=RUN, **fields)


def test_prometheus_reads_what_is_written(tmp_path: Path) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    tracker = PrometheusTracker(tmp_path / "metrics.prom")
    for _ in range(2):
        tracker.put(make_record(), {rank: make_record(rank) for rank in range(2)})
    families = parser.text_string_to_metric_families((tmp_path / "metrics.prom").read_text())
    samples = {(s.name, s.labels.get("rank")): s.value for family in families for s in family.samples}
    assert samples["dpgen_rows_done_total", None] == 400 and samples["dpgen_rows", None] == 1000
    assert samples["dpgen_errors_total", None] == 3 and samples["dpgen_generated_tokens_total", None] == 5000
    assert samples["dpgen_tokens_per_s", None] == 120 and samples["dpgen_rank_tokens_per_s", "1"] == 61
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.prom"], "no temporary file is left"


def test_tensorboard_gets_scalars_by_rows_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, directory: str) -> None:
            assert directory == str(tmp_path / "tb")

        def add_scalar(self, *arguments: Any) -> None:
            written.append(arguments)

        def flush(self) -> None:
            written.append(("flush",))

        def close(self) -> None:
            written.append(("close",))

    module = types.ModuleType("tensorboard.summary")
    module.Writer = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "tensorboard.summary", module)
    check_trackers(["tensorboard"])
    tracker = TensorBoardTracker(tmp_path / "tb")
    tracker.put(make_record(), {})
    tracker.close()
    assert ("dpgen/num_generated_tokens", 5000, 400) in written and written[-2:] == [("flush",), ("close",)]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_itself_writes_an_event_file(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path / "tb")
    tracker.put(make_record(), {})
    tracker.close()
    assert any(path.stat().st_size for path in (tmp_path / "tb").iterdir())


def test_wandb_gets_the_numbers_of_each_attempt_in_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Run:
        def log(self, numbers: Mapping[str, float]) -> None:
            calls.append(numbers)

        def finish(self) -> None:
            calls.append("finish")

    def init(**arguments: Any) -> Run:
        calls.append(arguments)
        return Run()

    module = types.ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    tracker = WandbTracker("answers", {"model": "m"})
    for _ in range(2):
        tracker.put(make_record(), {})
    tracker.close()
    first, *numbers, last = calls
    assert (first["group"], first["name"], first["config"]) == ("answers", "answers-1", {"model": "m"})
    assert [n["num_done"] for n in numbers] == [400, 400] and last == "finish"


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_named_with_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = trackers._PACKAGES[name]
    for module in (package, trackers._MODULES[name]):
        monkeypatch.setitem(sys.modules, module, None)  # an import then raises ImportError
    with pytest.raises(ConfigError, match=f"output.track: {name} needs .*: pip install {package.replace('_', '-')}$"):
        check_trackers([name])


def test_an_unknown_tracker_is_rejected_with_the_nearest_name(tmp_path: Path) -> None:
    arguments = [f"run.dir={tmp_path}", "model=m", "data.path=d", "data.prompt_column=p", "output.track=[wandbb]"]
    with pytest.raises(ConfigError, match=r"output\.track: there is no 'wandbb'; did you mean 'wandb'"):
        load([], arguments)
    assert schema.OutputConfig().track == []


class _Recorder:
    def __init__(self, put: Callable[[RankRecord], None]) -> None:
        self._put, self.is_closed = put, False

    def put(self, record: RankRecord, peers: Mapping[int, RankRecord]) -> None:
        self._put(record)

    def close(self) -> None:
        self.is_closed = True


def test_a_tracker_that_fails_is_reported_once_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    def fail(record: RankRecord) -> None:
        raise RuntimeError("no network\nat all")

    got: list[int] = []
    good, bad = _Recorder(lambda record: got.append(record.sequence)), _Recorder(fail)
    thread = TrackerThread({"wandb": bad, "prometheus": good})
    caplog.set_level(logging.INFO)
    for sequence in range(5):
        thread.put(make_record(sequence=sequence), {})
    thread.close()
    assert got[-1] == 4 and good.is_closed and not bad.is_closed
    [message] = caplog.messages
    assert (
        message == "output.track: wandb takes no numbers any more, the run continues: RuntimeError: no network at all"
    )


def test_a_tracker_that_hangs_blocks_nobody_and_gets_the_newest_numbers_then() -> None:
    release, got = threading.Event(), list[int]()

    def hang(record: RankRecord) -> None:
        release.wait()
        got.append(record.sequence)

    thread = TrackerThread({"wandb": _Recorder(hang)})
    for sequence in range(1000):
        thread.put(make_record(sequence=sequence), {})
    release.set()
    wait_for(lambda: got[-1:] == [999])
    thread.close()
    assert len(got) < 1000
