"""The pipe between a rank and its engine, under loads that would block a careless one."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import termios
import time
from collections.abc import Iterator

import pytest
from helpers.jobs import wait_for

from dpgen.engine.messages import (
    EngineReady,
    EngineSpec,
    EngineStats,
    EngineTextConfig,
    KvBytesMeasured,
    OptionsChecked,
    RowsFinished,
)
from dpgen.engine.process import EngineProcess, build_engine_env
from dpgen.errors import EngineError
from dpgen.records import Request

pytestmark = pytest.mark.multi


@pytest.fixture
def engine() -> Iterator[EngineProcess]:
    options = {"max_model_len": 1 << 20, "max_num_seqs": 512}
    spec = EngineSpec("fake", "none", options, {"max_tokens": 2000}, token_ids=True)
    environment = build_engine_env(os.environ, gpus=None, num_cores=1, log_level="warning")
    process = EngineProcess(spec, environment, None, lambda line: None)
    heard: list[type] = []
    while EngineReady not in heard:
        for event in process.poll(1.0):
            heard.append(type(event))
            if isinstance(event, OptionsChecked):
                process.load_model(EngineTextConfig())
            elif isinstance(event, KvBytesMeasured):
                process.set_kv_bytes(event.num_bytes)
    yield process
    process.kill()


def test_both_sides_may_send_more_than_the_pipe_holds_at_once(engine: EngineProcess) -> None:
    batch = 100  # about 10 MB down and 4 MB up, at a time
    for start in range(0, 5 * batch, batch):
        engine.submit([Request(row, [7] * 50_000) for row in range(start, start + batch)])
        if start == 0:
            wait_for(lambda: unread_bytes(engine) > 100_000)  # it sends more than the pipe holds, and nobody reads
    rows: set[int] = set()
    deadline_s = time.monotonic() + 120
    while len(rows) < 5 * batch:
        assert time.monotonic() < deadline_s, f"only {len(rows)} rows came back"
        for event in engine.poll(1.0):
            if isinstance(event, RowsFinished):
                rows |= {result.row for result in event.results}
    assert rows == set(range(5 * batch))


def test_the_numbers_come_before_the_last_row(engine: EngineProcess) -> None:
    """After it nobody may listen any more."""
    num_tokens = 0
    for num_rows in (3, 1, 2):
        engine.submit([Request(row, [7], None, {"max_tokens": 5 + row}) for row in range(num_rows)])
        num_tokens += sum(5 + row for row in range(num_rows))
        told, rows = 0, 0
        while rows < num_rows:
            for event in engine.poll(1.0):
                if isinstance(event, EngineStats):
                    told = event.num_generated_tokens
                elif isinstance(event, RowsFinished):
                    rows += len(event.results)
        assert told == num_tokens


def unread_bytes(engine: EngineProcess) -> int:
    count = bytearray(4)
    fcntl.ioctl(engine._pipe.fileno(), termios.FIONREAD, count)
    return int.from_bytes(count, sys.byteorder)


def test_a_killed_engine_is_seen_at_once_with_the_signal(engine: EngineProcess) -> None:
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="was ended by SIGKILL") as raised:
        listen(engine)
    assert raised.value.signal is signal.SIGKILL


def listen(engine: EngineProcess) -> None:
    for _ in range(100):
        engine.poll(0.1)


def test_the_environment_of_the_launcher_stays_out_of_the_engine() -> None:
    launcher = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "TORCHELASTIC_RUN_ID": "x", "SLURM_PROCID": "1"}
    kept = build_engine_env({**launcher, "HOME": "/h"}, gpus=["2", "3"], num_cores=4, log_level="info")
    assert not set(launcher) & set(kept)
    assert kept["HOME"] == "/h" and kept["CUDA_VISIBLE_DEVICES"] == "2,3" and "OMP_NUM_THREADS" not in kept
    on_cpu = build_engine_env({}, gpus=None, num_cores=4, log_level="info")
    assert on_cpu["OMP_NUM_THREADS"] == "4" and on_cpu["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
