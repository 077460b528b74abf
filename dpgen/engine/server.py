"""Run the engine process: check the options, load the model, then admit rows and step until the rank shuts it down.

- `dpgen.engine.starting.server_process` starts it as ``python -m dpgen.engine.server FD PARENT KIND``: its end of the
  pipe, the rank's process id, and `run.engine`.
- It imports the engine before it reads its spec, which may come much later, or never.
- `LoadModel` may wait in the pipe from the start: the model then loads while the rank still reads its input.
- It ends with its rank: at the end of the pipe, and by SIGKILL when the rank process dies.
- A rank that keeps its engine gives it one job after the other (`BeginJob`); the model is loaded once.
- Every exception becomes an `EngineFailed` message, and its traceback goes to stderr, hence to the engine's log file.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, TypeVar

from dpgen.engine.messages import (
    Backend,
    BeginJob,
    EngineFailed,
    EngineReady,
    EngineSpec,
    EngineStats,
    KvBytesMeasured,
    LoadModel,
    OptionsChecked,
    RowsFinished,
    SetKvBytes,
    SetTextConfig,
    Shutdown,
)
from dpgen.errors import ConfigError, RowRefused
from dpgen.formatting import format_extra
from dpgen.imports import imports_without_gc
from dpgen.lifecycle.parent_death import set_parent_death_signal
from dpgen.records import Request, RowResult, UndecodedRow, make_rejected_result

if TYPE_CHECKING:
    from dpgen.engine.lockstep import LockstepGroup

T = TypeVar("T")

_STATS_INTERVAL_S = 1.0
_SAMPLE_INTERVAL_S = 0.25  # while the number of engines is measured; see `dpgen.engine.pool.engine_count`
_SAMPLED_S = 30.0  # most often it is known by then; else it takes some seconds more
_IDLE_S = 0.005  # sleep between two rounds of lockstep processes that have no work


def main() -> None:
    """Serve the rank whose pipe and process id the command line names."""
    set_parent_death_signal(signal.SIGKILL, int(sys.argv[2]))  # a killed rank leaves no engine holding a GPU
    # A batch system signals every process of a job, in every session. The rank decides when its engine ends.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    pipe: Connection = Connection(int(sys.argv[1]))
    try:
        _serve(pipe, sys.argv[3])
        sys.stdout.flush()
        os._exit(0)  # all is closed; Python's own teardown of vLLM's modules would take longer than a second
    except (EOFError, ConnectionError):
        return  # the rank is gone, and nobody else wants these rows
    except Exception as error:  # noqa: BLE001 - the process boundary: everything becomes a message to the rank
        traceback.print_exc()
        _try_send(pipe, EngineFailed(f"{type(error).__name__}: {error}"))
        sys.exit(1)


def _serve(pipe: Connection, kind: str) -> None:
    timer, problem = _StartTimer(), ""
    try:
        build_backend = _import_backend(kind)
    except ImportError as error:
        traceback.print_exc()
        problem = _describe_failed_import(error)
    timer.mark("imports")
    spec: EngineSpec = timer.exclude(pipe.recv)
    if problem:
        pipe.send(OptionsChecked(problem=problem))
        return
    backend = build_backend(spec)
    try:
        notes = backend.check_options()
        timer.mark("options")
    except ConfigError as error:
        pipe.send(OptionsChecked(problem=str(error)))
        return
    pipe.send(_report_options(backend, notes))
    load_request = timer.exclude(pipe.recv)
    if isinstance(load_request, Shutdown):
        return
    assert isinstance(load_request, LoadModel)
    kv_bytes = 0

    def agree_kv(measured_bytes: int) -> int:
        nonlocal kv_bytes
        timer.mark("model")
        answer = timer.exclude(lambda: _agree_kv(pipe, load_request, measured_bytes))
        if not isinstance(answer, SetKvBytes):
            raise EOFError("the rank ends this engine before it has its KV cache")
        kv_bytes = answer.num_bytes
        return kv_bytes

    def load() -> EngineReady:
        info = backend.load(agree_kv)
        timer.mark("KV cache")
        _prepare_job(pipe, backend)
        return EngineReady(dataclasses.replace(info, pooled=backend.pooled), tuple(timer.phases))

    if spec.world is None:
        ready = load()
        pipe.send(ready)
        message = _generate(pipe, backend, spec)
        while message is not None:
            message = _serve_next_job(pipe, backend, message, EngineReady(ready.info), kv_bytes)
    else:
        from dpgen.engine.lockstep import LockstepGroup, host_store_on_loopback

        store = host_store_on_loopback(spec.world)
        ready = load()
        lockstep_group = LockstepGroup(spec.world)
        pipe.send(ready)
        _generate_lockstep(pipe, backend, lockstep_group)
        del store  # kept until here, as long as any process may ask it
    backend.close()


def _report_options(backend: Backend, notes: tuple[str, ...]) -> OptionsChecked:
    return OptionsChecked(None, notes, backend.num_engines, backend.max_num_seqs, backend.memory_fraction)


def _agree_kv(pipe: Connection, load_request: LoadModel, measured_bytes: int) -> SetKvBytes | BeginJob | Shutdown:
    """Return the KV cache's size, or what the rank wants instead: to end the engine, or to begin another job."""
    if load_request.kv_bytes is not None:  # others may hold more memory than at the agreement
        return SetKvBytes(min(load_request.kv_bytes, measured_bytes))
    pipe.send(KvBytesMeasured(measured_bytes))
    answer = pipe.recv()
    assert isinstance(answer, SetKvBytes | BeginJob | Shutdown)
    return answer


def _prepare_job(pipe: Connection, backend: Backend) -> None:
    message = pipe.recv()
    assert isinstance(message, SetTextConfig)
    backend.prepare_job(message.text_config)


def _serve_next_job(
    pipe: Connection, backend: Backend, begin: BeginJob, ready: EngineReady, kv_bytes: int
) -> BeginJob | None:
    """Serve one more job with the loaded model, and return the request for the next; None for the end.

    Args:
        kv_bytes: the loaded KV cache's, which is what this engine has to offer in the ranks' agreement.
    """
    try:
        checked = _report_options(backend, backend.begin_job(begin.spec))
    except ConfigError as error:
        checked = OptionsChecked(problem=str(error))
    pipe.send(checked)
    message = pipe.recv()
    if isinstance(message, LoadModel):
        message = _agree_kv(pipe, message, kv_bytes)
    if isinstance(message, SetKvBytes):
        _prepare_job(pipe, backend)
        pipe.send(dataclasses.replace(ready, info=dataclasses.replace(ready.info, pooled=backend.pooled)))
        return _generate(pipe, backend, begin.spec)
    return message if isinstance(message, BeginJob) else None


def _generate(pipe: Connection, backend: Backend, spec: EngineSpec) -> BeginJob | None:
    """Admit the rows that have arrived, step, send the finished rows; sleep only when there is no work.

    Returns:
        the request for another job; None where the rank wants the engine to end.
    """
    sender = _EventSender(pipe, backend, sampled_s=_SAMPLED_S if spec.is_measured else 0.0)
    while True:
        finished: list[RowResult | UndecodedRow] = []
        while pipe.poll(0 if backend.has_unfinished_requests() or finished else None):
            message = pipe.recv()
            if isinstance(message, BeginJob):
                return message
            if isinstance(message, Shutdown):
                return None
            sender.num_in_flight += len(message)
            finished += _add_requests(backend, message)
        if backend.has_unfinished_requests():
            finished += backend.step()
            sender.num_steps += 1
        sender.send(finished)


def _generate_lockstep(pipe: Connection, backend: Backend, group: LockstepGroup) -> None:
    """Generate in lockstep with other processes: all admit the same rows before the same step; the leader reports.

    Continues until every process was asked to shut down, since none can step, or stop, alone. With mixtures of
    experts `has_unfinished_requests` is a collective of all groups, so each round calls it exactly once.
    """
    from dpgen.engine.lockstep import encode_requests

    sender = _EventSender(pipe, backend)
    stop_requested = False
    while True:
        requests: list[Request] = []
        while pipe.poll(0):
            message = pipe.recv()
            if isinstance(message, Shutdown):
                stop_requested = True
            else:
                requests += message
        encoded, rejected = encode_requests(requests, shares_memory=group.shares_memory)
        requests, is_over = group.exchange(encoded, stop_requested)
        if is_over:
            return
        sender.num_in_flight += len(requests) + len(rejected)
        finished = [*rejected, *_add_requests(backend, requests)]
        if backend.has_unfinished_requests():
            finished += backend.step()
        elif not requests:
            time.sleep(_IDLE_S)
        if group.is_leader:
            sender.send(finished)


def _add_requests(backend: Backend, requests: list[Request]) -> list[RowResult | UndecodedRow]:
    """Admit rows, and return results for the rejected ones."""
    results: list[RowResult | UndecodedRow] = []
    for request in requests:
        try:
            backend.add_request(request)
        except RowRefused as rejection:
            results.append(make_rejected_result(request.id, rejection))
    return results


class _StartTimer:
    """Measure what this process does until it is ready.

    Attributes:
        phases: each with its seconds.
    """

    def __init__(self) -> None:
        self.phases: list[tuple[str, float]] = []
        self._began_s = time.monotonic()

    def mark(self, name: str) -> None:
        """End a phase and name it."""
        now_s = time.monotonic()
        self.phases.append((name, now_s - self._began_s))
        self._began_s = now_s

    def exclude(self, wait: Callable[[], T]) -> T:
        """Return what `wait` returns; the next phase begins then."""
        result = wait()
        self._began_s = time.monotonic()
        return result


class _EventSender:
    """Send finished rows to the rank immediately, and stats once a second and before the last row.

    Args:
        sampled_s: seconds from the first row on, for which stats are sampled more often.

    Attributes:
        num_in_flight: rows received and not yet sent back.
        num_steps: of the backend so far.
    """

    def __init__(self, pipe: Connection, backend: Backend, sampled_s: float = 0.0) -> None:
        self._pipe, self._backend, self._sampled_s = pipe, backend, sampled_s
        self._next_stats_s = self._next_sample_s = 0.0
        self._sampled_until_s: float | None = None
        self._begin_s, self._begin_processor_s = time.monotonic(), time.thread_time()
        self.num_in_flight = self.num_steps = 0

    def send(self, finished: list[RowResult | UndecodedRow]) -> None:
        self.num_in_flight -= len(finished)
        is_last = bool(finished) and self.num_in_flight == 0  # the rank may stop reading after it
        now_s = time.monotonic()
        is_due = is_last or now_s >= self._next_stats_s
        if self._sampled_until_s is None:
            self._sampled_until_s = now_s + self._sampled_s
        if is_due or self._next_sample_s <= now_s < self._sampled_until_s:
            self._next_sample_s = now_s + _SAMPLE_INTERVAL_S
            if is_due:
                self._next_stats_s = now_s + _STATS_INTERVAL_S
            self._pipe.send(dataclasses.replace(self._measure(), is_sample=not is_due))
        if finished:
            results = [row for row in finished if isinstance(row, RowResult)]
            self._pipe.send(RowsFinished(results, [row for row in finished if isinstance(row, UndecodedRow)]))

    def _measure(self) -> EngineStats:
        """Return the backend's statistics, with the times of its steps; a fake one has its own of the processor."""
        stats = self._backend.stats()
        return dataclasses.replace(
            stats,
            num_steps=self.num_steps,
            elapsed_s=time.monotonic() - self._begin_s,
            processor_s=stats.processor_s or time.thread_time() - self._begin_processor_s,
        )


def _import_backend(kind: str) -> Callable[[EngineSpec], Backend]:
    if kind == "fake":
        from dpgen.engine.fake_backend import FakeBackend

        return FakeBackend
    # The CPU build warns at every start that its Triton is made for GPUs. No user can act on this.
    import_logger = logging.getLogger("vllm.triton_utils.importing")
    import_logger.addFilter(lambda record: "doesn't include CPU backend" not in record.getMessage())
    with imports_without_gc():
        from dpgen.engine.vllm.vllm_backend import VllmBackend

    return VllmBackend


def _describe_failed_import(error: ImportError) -> str:
    """Return one line on why the engine can't be imported, and what to do."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    advice = f"install it: {format_extra('gpu')} for NVIDIA GPUs, or [cpu] in place of [gpu]"
    if "libcuda.so" in reason:
        advice = f"the NVIDIA driver is missing, as on login nodes: run where the GPUs are, or {format_extra('cpu')}"
    return f"vLLM can't be imported on {socket.gethostname()}: {reason}; {advice}"


def _try_send(pipe: Connection, message: EngineFailed) -> None:
    try:
        pipe.send(message)
    except (OSError, ValueError):
        return  # the rank is gone


if __name__ == "__main__":
    main()
