"""The pipe between a rank and its engine, under loads at which a careless one would block."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.jobs import wait_for

from dpgen.engine.media.buffers import BufferMeter, MediaBuffer
from dpgen.engine.messages import (
    EngineReady,
    EngineSpec,
    EngineStats,
    EngineTextConfig,
    Event,
    KvBytesMeasured,
    OptionsChecked,
    RowsFinished,
)
from dpgen.engine.process import EngineProcess
from dpgen.engine.starting.log_file import EngineLog
from dpgen.engine.starting.server_process import ServerProcess, build_engine_env
from dpgen.errors import EngineError, EngineStuck
from dpgen.records import Request, RequestId

pytestmark = pytest.mark.multi


def start(log: EngineLog, is_measured: bool = False, **options: object) -> EngineProcess:
    spec = EngineSpec("fake", "none", options, {"max_tokens": 2000}, token_ids=True, is_measured=is_measured)
    environment = build_engine_env(os.environ, gpus=None, num_cores=1, log_level="warning")
    return EngineProcess(spec, ServerProcess("fake", environment, None), log)


def load(process: EngineProcess) -> None:
    """Answer the engine's messages until it is ready."""
    events: list[Event] = []
    while not any(isinstance(event, EngineReady) for event in events):
        events = process.poll(1.0)
        for event in events:
            if isinstance(event, OptionsChecked):
                process.load_model()
            elif isinstance(event, KvBytesMeasured):
                process.set_kv_bytes(event.num_bytes)
                process.set_text_config(EngineTextConfig())


@pytest.fixture
def engine() -> Iterator[EngineProcess]:
    process = start(EngineLog("warning"), max_model_len=1 << 20, max_num_seqs=512)
    load(process)
    yield process
    process.kill()


def test_an_engine_that_may_load_at_once_does_so_without_a_further_message() -> None:
    process = start(EngineLog("warning"), kv_cache_memory_bytes=1 << 16)
    try:
        process.load_model()
        events: list[Event] = []
        while len(events) < 2:
            events += process.poll(1.0)
        assert events == [OptionsChecked(max_num_seqs=16), KvBytesMeasured(1 << 16)]
        process.set_kv_bytes(1 << 15)
        process.set_text_config(EngineTextConfig())
        while not (events := process.poll(1.0)):
            pass
        [ready] = events
        assert isinstance(ready, EngineReady) and ready.info.num_kv_blocks == 32
        assert [name for name, _ in ready.phases] == ["imports", "options", "model", "KV cache"]
    finally:
        process.kill()


def test_an_engine_whose_options_are_wrong_does_not_load(tmp_path: Path) -> None:
    log = EngineLog("warning")
    log.open(tmp_path / "log")
    process = start(log, max_num_sequences=3, load_output="weights")
    try:
        process.load_model()
        while not (events := process.poll(1.0)):
            pass
        [checked] = events
        assert isinstance(checked, OptionsChecked) and "max_num_sequences" in str(checked.problem)
        with pytest.raises(EngineError, match="exited with status 0"):
            process.poll(10.0)
        assert "weights" not in (tmp_path / "log").read_text()
    finally:
        process.kill()


def test_both_sides_may_send_more_than_the_pipe_holds_at_once(engine: EngineProcess) -> None:
    batch = 100  # about 10 MB to the engine and 4 MB back
    for first in range(0, 5 * batch, batch):
        engine.submit([Request(RequestId(row), [7] * 50_000) for row in range(first, first + batch)])
        if first == 0:
            wait_for(lambda: count_unread_bytes(engine) > 100_000)  # more than the pipe holds, and nobody reads it
    rows: set[int] = set()
    deadline_s = time.monotonic() + 120
    while len(rows) < 5 * batch:
        assert time.monotonic() < deadline_s, f"only {len(rows)} rows came back"
        for event in engine.poll(1.0):
            if isinstance(event, RowsFinished):
                rows |= {result.row for result in event.results}
    assert rows == set(range(5 * batch))


def test_stats_come_before_the_last_row(engine: EngineProcess) -> None:
    num_tokens = 0
    for num_rows in (3, 1, 2):
        engine.submit([Request(RequestId(row), [7], None, {"max_tokens": 5 + row}) for row in range(num_rows)])
        num_tokens += sum(5 + row for row in range(num_rows))
        num_reported_tokens, num_finished = 0, 0
        while num_finished < num_rows:
            for event in engine.poll(1.0):
                if isinstance(event, EngineStats):
                    num_reported_tokens = event.num_generated_tokens
                elif isinstance(event, RowsFinished):
                    num_finished += len(event.results)
        assert num_reported_tokens == num_tokens, "after the last row nobody may read any more"


@pytest.mark.parametrize("is_measured", [True, False])
def test_stats_are_sampled_more_often_while_the_number_of_engines_is_measured(is_measured: bool) -> None:
    process = start(EngineLog("warning"), is_measured=is_measured, step_s=0.01)
    try:
        load(process)
        process.submit([Request(RequestId(0), [7], None, {"max_tokens": 1000})])
        stats: list[EngineStats] = []
        while len(stats) < 2:
            stats += [event for event in process.poll(1.0) if isinstance(event, EngineStats)]
        assert [one.is_sample for one in stats] == [False, is_measured]
        assert (stats[1].elapsed_s - stats[0].elapsed_s < 1.0) == is_measured
    finally:
        process.kill()


def count_unread_bytes(engine: EngineProcess) -> int:
    count = bytearray(4)
    fcntl.ioctl(engine.pipe.fileno(), termios.FIONREAD, count)
    return int.from_bytes(count, sys.byteorder)


def test_a_killed_engine_is_noticed_at_once_with_the_signal(engine: EngineProcess) -> None:
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="was killed by SIGKILL") as raised:
        poll_for_ten_seconds(engine)
    assert raised.value.signal is signal.SIGKILL


def test_an_engine_that_sigkill_does_not_end_is_not_waited_for_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = build_engine_env(os.environ, gpus=None, num_cores=1, log_level="warning")
    process = EngineProcess(
        EngineSpec("fake", "none"), ServerProcess("fake", environment, None), EngineLog("warning"), kill_timeout_s=0.2
    )
    with monkeypatch.context() as context:
        context.setattr(os, "killpg", lambda group, number: None)  # as for a process that a driver holds
        with pytest.raises(EngineStuck, match=rf"^the engine process {process.pid} can't be ended"):
            process.kill()
    os.killpg(process.pid, signal.SIGKILL)
    process._process.wait()
    process.kill()


def test_a_failure_names_the_log_file_which_holds_the_traceback(tmp_path: Path) -> None:
    log = EngineLog("warning")
    log.open(tmp_path / "rank-3.engine.log")
    process = start(log, load_error="no such device")
    with pytest.raises(EngineError) as raised:
        load(process)
    assert str(raised.value) == f"the engine failed: RuntimeError: no such device, see {log.path}"
    lines = (tmp_path / "rank-3.engine.log").read_text().splitlines()
    assert lines[0].endswith(f"engine life 1 of this attempt, pid {process.pid}")
    assert lines[1] == "Traceback (most recent call last):" and lines[-1] == "RuntimeError: no such device"


def test_a_failure_before_the_log_file_is_open_shows_the_last_lines() -> None:
    process = start(EngineLog("warning"), load_error="no such device")
    with pytest.raises(EngineError) as raised:
        load(process)
    first, *last_lines = str(raised.value).splitlines()
    assert first == "the engine failed: RuntimeError: no such device, its last lines:"
    assert last_lines[-1] == "    RuntimeError: no such device", last_lines


def test_an_engine_that_failed_before_the_rank_first_looked_is_reported_in_its_own_words(tmp_path: Path) -> None:
    log = EngineLog("warning")
    log.open(tmp_path / "rank-3.engine.log")
    process = start(log, load_error="no such device")
    process.load_model()
    process._process.wait()
    [checked] = process.poll(1.0)
    assert isinstance(checked, OptionsChecked) and checked.problem is None
    with pytest.raises(EngineError, match=r"^the engine failed: RuntimeError: no such device, see ") as raised:
        process.poll(1.0)
    assert not raised.value.last_lines, "the log file is named instead"


def test_a_workers_error_in_the_output_counts_where_the_engine_reports_only_that_a_worker_failed(
    tmp_path: Path,
) -> None:
    log = EngineLog("error")
    log.open(tmp_path / "rank-3.engine.log")
    process = start(
        log,
        load_output="(Worker_TP1 pid=7) ERROR torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        load_error="WorkerProc initialization failed due to an exception in a background process.",
    )
    with pytest.raises(EngineError) as raised:
        load(process)
    assert raised.value.is_out_of_memory
    assert "CUDA" not in str(raised.value), "the log file is named instead"


def poll_for_ten_seconds(engine: EngineProcess) -> None:
    for _ in range(100):
        engine.poll(0.1)


def test_the_environment_of_the_launcher_stays_out_of_the_engine() -> None:
    launcher = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "TORCHELASTIC_RUN_ID": "x", "SLURM_PROCID": "1"}
    kept = build_engine_env({**launcher, "HOME": "/h"}, gpus=["2", "3"], num_cores=4, log_level="info")
    assert not set(launcher) & set(kept)
    assert kept["HOME"] == "/h" and kept["CUDA_VISIBLE_DEVICES"] == "2,3" and "OMP_NUM_THREADS" not in kept
    on_cpu = build_engine_env({}, gpus=None, num_cores=4, log_level="info")
    assert on_cpu["OMP_NUM_THREADS"] == "4" and on_cpu["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD"])
def test_an_engine_on_the_cpu_keeps_freed_memory_unless_the_user_chose_otherwise(name: str) -> None:
    def build(environ: dict[str, str], gpus: list[str] | None = None) -> dict[str, str]:
        return build_engine_env(environ, gpus=gpus, num_cores=1, log_level="info", keeps_memory=True)

    assert "glibc.malloc.trim_threshold" in build({})["GLIBC_TUNABLES"]
    assert "GLIBC_TUNABLES" not in build({}, ["0"])
    assert build({name: "own"}).get("GLIBC_TUNABLES") == {name: "own"}.get("GLIBC_TUNABLES")


@pytest.mark.parametrize(
    ("log_level", "vllm_level"), [("error", "INFO"), ("warning", "INFO"), ("info", "INFO"), ("debug", "DEBUG")]
)
def test_vllm_logs_for_the_file_whatever_the_terminal_shows(log_level: str, vllm_level: str) -> None:
    environment = build_engine_env({"VLLM_LOGGING_LEVEL": "ERROR"}, gpus=None, num_cores=1, log_level=log_level)
    assert environment["VLLM_LOGGING_LEVEL"] == vllm_level
    assert ("TORCH_CPP_LOG_LEVEL" in environment) == (log_level in ("warning", "error"))
    assert "PYTHONWARNINGS" not in environment, "Python's warnings go to the file, and only there"


def test_the_media_of_a_finished_row_are_freed_though_nothing_more_is_sent(engine: EngineProcess) -> None:
    meter = BufferMeter()
    buffer = MediaBuffer(meter)
    buffer.write([b""])
    requests = [Request(RequestId(0), [65], sampling={"max_tokens": 1}, media=buffer)]
    engine.submit(requests)
    while not any(isinstance(event, RowsFinished) for event in engine.poll(1.0)):
        pass
    del requests, buffer
    assert meter.num_buffers == 0
