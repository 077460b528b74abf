"""The engine process: checks, loads, then admits and steps for as long as its rank keeps the pipe open.

Started by `dpgen.engine.process` as ``python -m dpgen.engine.server FD PARENT``: its end of the pipe, and
the rank's process id.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from dpgen.engine.messages import (
    Backend,
    EngineFailed,
    EngineReady,
    EngineSpec,
    EngineStats,
    KvBytesMeasured,
    LoadModel,
    OptionsChecked,
    RowsFinished,
    SetKvBytes,
    Shutdown,
    UndecodedRow,
)
from dpgen.errors import ConfigError, RowRefused
from dpgen.imports import imports_without_gc
from dpgen.lifecycle.parent_death import set_parent_death_signal
from dpgen.records import Request, RowResult, make_rejected_result

if TYPE_CHECKING:
    from dpgen.engine.lockstep import LockstepGroup

_STATS_INTERVAL_S = 1.0
_IDLE_S = 0.005  # between rounds of processes that go round together and have nothing to do


def main() -> None:
    set_parent_death_signal(signal.SIGKILL, int(sys.argv[2]))  # a killed rank leaves no engine holding a GPU
    # A batch system signals every process of a job, whatever its session; when the engine ends is its rank's to say.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    pipe: Connection = Connection(int(sys.argv[1]))
    try:
        _serve(pipe)
        sys.stdout.flush()
        os._exit(0)  # all is closed; to take down what vLLM has imported takes Python longer than a second
    except (EOFError, ConnectionError):
        return  # the rank is gone, and with it whoever wanted these rows
    except Exception as error:  # noqa: BLE001 - the process boundary: everything becomes a message to the rank
        traceback.print_exc()
        _try_send(pipe, EngineFailed(f"{type(error).__name__}: {error}"))
        sys.exit(1)


def _serve(pipe: Connection) -> None:
    spec: EngineSpec = pipe.recv()
    backend = _build_backend(spec)
    try:
        notes = backend.check_options()
    except ConfigError as error:
        pipe.send(OptionsChecked(problem=str(error)))
        return
    pipe.send(OptionsChecked(notes=notes))
    load_request = pipe.recv()
    if isinstance(load_request, Shutdown):
        return
    assert isinstance(load_request, LoadModel)

    def agree_kv(measured_bytes: int) -> int:
        if load_request.kv_bytes is not None:
            return load_request.kv_bytes
        pipe.send(KvBytesMeasured(measured_bytes))
        answer = pipe.recv()
        assert isinstance(answer, SetKvBytes)
        return answer.num_bytes

    info = backend.load(agree_kv, load_request.text_config)
    if spec.world is None:
        pipe.send(EngineReady(info))
        _generate(pipe, backend)
    else:
        from dpgen.engine.lockstep import LockstepGroup

        crew = LockstepGroup(spec.world)
        pipe.send(EngineReady(info))
        _generate_lockstep(pipe, backend, crew)
    backend.close()


def _generate(pipe: Connection, backend: Backend) -> None:
    """Admits whatever has arrived, steps, sends what is finished; sleeps only when there is no work."""
    report = _EventSender(pipe, backend)
    while True:
        finished: list[RowResult | UndecodedRow] = []
        while pipe.poll(0 if backend.has_unfinished_requests() or finished else None):
            message = pipe.recv()
            if isinstance(message, Shutdown):
                return
            report.num_in_flight += len(message)
            finished += _add_requests(backend, message)
        if backend.has_unfinished_requests():
            finished += backend.step()
        report.send(finished)


def _generate_lockstep(pipe: Connection, backend: Backend, crew: LockstepGroup) -> None:
    """The same in lock-step with other processes: all admit the same before the same step; the leader reports.

    Goes round until all were told to stop, since none can step, or stop, alone. `has_work` agrees with the other
    groups and so is asked once a round, whatever comes of it.
    """
    report = _EventSender(pipe, backend)
    stop_requested = False
    while True:
        requests: list[Request] = []
        while pipe.poll(0):
            message = pipe.recv()
            if isinstance(message, Shutdown):
                stop_requested = True
            else:
                requests += message
        requests, is_over = crew.exchange(requests, stop_requested)
        if is_over:
            return
        report.num_in_flight += len(requests)
        finished = _add_requests(backend, requests)
        if backend.has_unfinished_requests():
            finished += backend.step()
        elif not requests:
            time.sleep(_IDLE_S)
        if crew.is_leader:
            report.send(finished)


def _add_requests(backend: Backend, requests: list[Request]) -> list[RowResult | UndecodedRow]:
    """Admits rows; the results of those that are refused."""
    results: list[RowResult | UndecodedRow] = []
    for request in requests:
        try:
            backend.add_request(request)
        except RowRefused as why:
            results.append(make_rejected_result(request.row, why))
    return results


class _EventSender:
    """What goes up: finished rows at once, numbers now and then, and before the last row.

    Attributes:
        num_inside: rows that have come and not been sent back.
    """

    def __init__(self, pipe: Connection, backend: Backend) -> None:
        self._pipe, self._build_backend = pipe, backend
        self._next_stats_s = 0.0
        self.num_in_flight = 0

    def send(self, finished: list[RowResult | UndecodedRow]) -> None:
        self.num_in_flight -= len(finished)
        is_last = bool(finished) and self.num_in_flight == 0  # after it the rank may be through, and read no more
        if is_last or time.monotonic() >= self._next_stats_s:
            self._next_stats_s = time.monotonic() + _STATS_INTERVAL_S
            stats: EngineStats = self._build_backend.stats()
            self._pipe.send(stats)
        if finished:
            results = [each for each in finished if isinstance(each, RowResult)]
            self._pipe.send(RowsFinished(results, [each for each in finished if isinstance(each, UndecodedRow)]))


def _build_backend(spec: EngineSpec) -> Backend:
    if spec.kind == "fake":
        from dpgen.engine.fake_backend import FakeBackend

        return FakeBackend(spec)
    # The CPU build says so at every start, whatever its log level is: that its Triton is made for GPUs is no news.
    at_import = logging.getLogger("vllm.triton_utils.importing")
    at_import.addFilter(lambda record: "doesn't include CPU backend" not in record.getMessage())
    with imports_without_gc():
        from dpgen.engine.vllm_backend import VllmBackend

    return VllmBackend(spec)


def _try_send(pipe: Connection, message: EngineFailed) -> None:
    try:
        pipe.send(message)
    except (OSError, ValueError):
        return  # nobody is listening any more


if __name__ == "__main__":
    main()
