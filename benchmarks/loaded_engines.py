"""Keep loaded engines in processes of their own, of dpgen's ranks and of vLLM's LLM, and time them on the same rows.

- A process sleeps while another one is timed. Start-up is not timed.
- A rank's pass is what a run does between loading the engine and writing the result: plan, render, admission, engine
  process, text, journal. It is made of the run's own parts.
- Without a GPU each process has one core: a rank shares its core with its engine's process. A rank with columns of
  media may use all cores, and so may the workers that prepare them; its engine keeps its core.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_HEARTBEAT_S = 0.5  # a rank that waits for the next pass must not be taken for stuck
_NUM_LOG_CHARS = 4000  # of a process that ended, shown

PassFn = Callable[[Any, str, list[dict[str, Any]]], float]
SettingsFn = Callable[[str, str], list[str]]


@dataclass(frozen=True)
class Place:
    """Say which of how many ranks a process is, the port of their store, and its core; None for all cores."""

    rank: int
    size: int
    port: int
    core: int | None

    def prepare_process(self, log: str) -> None:
        """Bind this process to its core, and redirect its output to a file."""
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if self.core is not None:
            os.sched_setaffinity(0, [self.core])
            os.environ["OMP_NUM_THREADS"] = "1"
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # on one core a second process only slows LLM down
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

    def list_variables(self) -> dict[str, str]:
        """Return the variables that a launcher would set; none for a rank alone."""
        if self.size == 1:
            return {}
        numbers = {"RANK": self.rank, "WORLD_SIZE": self.size, "LOCAL_RANK": self.rank, "LOCAL_WORLD_SIZE": self.size}
        numbers["MASTER_PORT"] = self.port
        return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


class Peer:
    """Keep engines loaded in processes of their own, and time one way at a time; a context, which ends the processes.

    Args:
        serve: `serve_ranks` or `serve_llm`, as a function of the pipe, the place of the process and `arguments`.
        num_processes: of as many ranks; each has a core of its own, from `options.core` on.

    Attributes:
        processor_s: processor seconds of the first process itself in the last pass: of a rank, without its engine.
        total_processor_s: of each pass, those of all processes and their children: of ranks, with their engines. They
            compare ways also on a machine that others use, where two processes get more time than one.
    """

    def __init__(
        self, serve: Any, options: argparse.Namespace, work_dir: Path, *arguments: Any, num_processes: int = 1
    ) -> None:
        self._log = work_dir / f"{serve.__name__}.log"
        self._pipes: list[Connection] = []
        context, port = mp.get_context("spawn"), _find_free_port()
        self._processes = []
        for rank in range(num_processes):
            ours, theirs = mp.Pipe()
            place = Place(rank, num_processes, port, options.core + rank if options.device == "cpu" else None)
            process = context.Process(target=serve, args=(theirs, place, str(work_dir), *arguments))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._receive_all()  # loaded
        self.processor_s, self.total_processor_s = 0.0, list[float]()

    def time(self, way: str, path: Path) -> float:
        """Return the seconds of a pass, of the slowest process."""
        before_s = self._measure_processor_time()
        for pipe in self._pipes:
            pipe.send((way, str(path)))
        measured = self._receive_all()
        self.total_processor_s.append(self._measure_processor_time() - before_s)
        self.processor_s = float(measured[0][1])
        return max(float(seconds) for seconds, _ in measured)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, error_type: Any, *_: Any) -> None:
        if error_type is not None:
            self._kill()
            return
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()

    def _measure_processor_time(self) -> float:
        """Return the processor seconds so far of all processes and their children."""
        pids = [process.pid for process in self._processes]
        seconds = 0.0
        while pids:
            folder = Path(f"/proc/{pids.pop()}")
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime, stime
            pids += [int(pid) for path in folder.glob("task/*/children") for pid in path.read_text().split()]
        return seconds

    def _receive_all(self) -> list[Any]:
        """Return what each process says; exit with the end of their log if one has ended."""
        try:
            return [pipe.recv() for pipe in self._pipes]
        except EOFError:
            self._kill()
            sys.exit(f"a process of {self._log.stem} has ended:\n{self._log.read_text()[-_NUM_LOG_CHARS:]}")


def _find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def serve_llm(pipe: Connection, place: Place, work_dir: str, model: str, engine: dict[str, Any], run: PassFn) -> None:
    """Load vLLM's `LLM`, and time the passes that the pipe asks for.

    Args:
        run: makes a pass of a way over rows, given the `LLM`, and returns its seconds.
    """
    place.prepare_process(f"{work_dir}/serve_llm.log")
    from vllm import LLM

    llm = LLM(model, **engine)
    pipe.send("loaded")
    while (command := pipe.recv()) is not None:
        way, path = command
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        processor_s = time.process_time()
        seconds = run(llm, way, rows)
        pipe.send((seconds, time.process_time() - processor_s))


def serve_ranks(pipe: Connection, place: Place, work_dir: str, list_settings: SettingsFn) -> None:
    """Load a rank's engine, and time the passes that the pipe asks for.

    Args:
        list_settings: returns the arguments of `dpgen run` for a way and a path of rows.
    """
    all_cores = os.sched_getaffinity(0)
    place.prepare_process(f"{work_dir}/serve_ranks.log")
    import datasets

    from dpgen.config.loader import load
    from dpgen.data.input_rows import InputRows
    from dpgen.distributed.group import RankGroup, SingleRankGroup
    from dpgen.distributed.layout import build_layout
    from dpgen.distributed.topology import read_topology
    from dpgen.engine.keeping.keeper import EngineKeeper
    from dpgen.engine.starting.launch import build_text_pipeline, check_engine_options, prepare_engine
    from dpgen.engine.starting.log_file import EngineLog
    from dpgen.engine.starting.media_workers import add_media_preparer
    from dpgen.journal.run_dir import RunDir

    group: RankGroup = SingleRankGroup()
    topology = read_topology(place.list_variables())
    if place.size > 1:
        from dpgen.distributed.gloo.rank_group import GlooGroup

        group = GlooGroup(topology)
    config = load([], list_settings("dpgen", f"{work_dir}/no-rows.jsonl"))
    log = EngineLog(config.run.log_level)
    log.open(Path(work_dir) / f"rank-{place.rank}.engine.log")
    engine = prepare_engine(config, topology, build_layout(topology, config.parallel), group, log, EngineKeeper())()
    check_engine_options(engine, config.parallel, group)
    texts = build_text_pipeline(config, log, InputRows(datasets.Dataset.from_dict({})))
    if config.prompt.has_media_columns:
        os.sched_setaffinity(0, all_cores)
        texts = add_media_preparer(texts, config, topology, log)
    texts.describe_model(
        engine.load_model(lambda num_bytes: num_bytes, group.raise_if_peer_failed, texts.engine_text_config)
    )
    pipe.send("loaded")
    attempt = 0
    while (command := _wait_for_command(pipe, group)) is not None:
        attempt += 1
        run_dir = RunDir(f"{work_dir}/run-{attempt}")
        run_dir.create()
        pipe.send(time_rank(load([], list_settings(*command)), run_dir.journal, attempt, engine, texts, group))
    texts.close()
    engine.kill()
    group.close()


def _wait_for_command(pipe: Connection, group: Any) -> Any:
    while not pipe.poll(_HEARTBEAT_S):
        group.heartbeat()
    return pipe.recv()


def time_rank(
    config: Any, journal_dir: Path, attempt: int, engine: Any, texts: Any, group: Any = None
) -> tuple[float, float]:
    """Make the pass of a rank with a loaded engine; return the seconds, and the processor seconds of this process.

    Args:
        engine: a loaded `EnginePool`.
        group: a `RankGroup`; None for a rank alone.
    """
    from dpgen.data.input_loading import load_input
    from dpgen.distributed.group import SingleRankGroup
    from dpgen.distributed.layout import Layout
    from dpgen.journal.row_notes import RowNote
    from dpgen.journal.writer import JournalWriter
    from dpgen.run_parts import build_loop_config, build_planner_config, build_recorder, build_request_builder
    from dpgen.scheduling.generation_loop import GenerationLoop
    from dpgen.scheduling.planner import ShardPlanner

    group = group or SingleRankGroup()
    rows, note = load_input(config.data), RowNote()
    group.all_gather_object(None)  # all ranks begin together
    started_s, processor_s = time.monotonic(), time.process_time()
    settings = build_planner_config(config, rows.columns, Layout(group.size), attempt, is_mixed=False)
    builder = build_request_builder(config, rows, texts, {}, note)
    planner = ShardPlanner(settings, rows, journal_dir, group, builder)
    source = planner.plan()
    journal = JournalWriter(journal_dir, attempt, group.rank)
    results = build_recorder(config, journal, texts, note, planner, engine)
    totals = GenerationLoop(planner, engine, results, group, build_loop_config(config), lambda: None).run(source)
    journal.close()
    seconds = time.monotonic() - started_s
    assert totals.num_rows == len(rows) and totals.num_errors == 0, totals
    return seconds, time.process_time() - processor_s


def print_heading(first: str, unit: str) -> None:
    """Print the names of `print_table`'s columns."""
    print(f"{first:<14} {'way':<14} {'seconds':>9} {unit:>10} {'dpgen is faster by':>28}")


def print_table(name: str, seconds: dict[str, list[float]], num_units: int, ratios: dict[str, Any]) -> None:
    """Print a row for each way: its median seconds, its rate, and how much faster dpgen is.

    Args:
        ratios: of each way, as `compute_ratio` gives it.
    """
    for way, times_s in seconds.items():
        median_s = sorted(times_s)[len(times_s) // 2]
        ratio = ratios.get(way)
        faster_by = "" if ratio is None else f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})"
        print(f"{name:<14} {way:<14} {median_s:>9.2f} {num_units / median_s:>10,.0f} {faster_by:>28}", flush=True)
