"""Compare one rank of dpgen, with durable rows, with vLLM's `LLM.generate()`: the same rows, the same core.

    python benchmarks/engine.py [--rows 800] [--rounds 5] [--workloads constant:64,chat,reasoning]
    python benchmarks/engine.py --model DIR --engine '{"dtype": "bfloat16"}' --device gpu --rows 4000      # on a GPU

Ways:
- generate: `LLM.generate()` in one call
- chunks-256, chunks-64: the same in chunks of rows, as scripts do that save now and then
- dpgen: dpgen's own loop (plan, render, admission, engine process, detokenize, journal) without seeds, as `generate()`
  has none
- dpgen-seeded: the same with a seed for every row, which is dpgen's default

dpgen and LLM keep their loaded engines in processes of their own, on one core unless on a GPU, and sleep while the
other is timed. Every round times all ways in turn. Start-up is not timed. Lengths are forced by `ignore_eos` and every
row's `max_tokens`.

Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from llm_generate import time_generate
from measure import (
    TINY_ENGINE,
    build_job_settings,
    compute_ratio,
    make_parser,
    make_rows,
    make_tiny_model,
    measure_in_turn,
    run_benchmark,
    write_rows,
)


def main() -> None:
    options = parse_options()
    engine = json.loads(options.engine) if options.engine else TINY_ENGINE
    settings = {"engine": engine, "device": options.device}
    run_benchmark("engine", options.dir, lambda work_dir: measure(options, engine, work_dir), **settings)


def parse_options() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--longest", type=int, default=1024, help="tokens of the longest row")
    parser.add_argument("--workloads", default="constant:64,chat,reasoning")
    parser.add_argument("--ways", default="dpgen,generate,chunks-256,chunks-64")
    parser.add_argument("--model", help="a directory; the tests' tiny model by default")
    parser.add_argument("--engine", help="engine options as JSON, the same for all ways")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--core", type=int, default=0, help="the core that all ways run on, without a GPU")
    return parser.parse_args()


def measure(options: argparse.Namespace, engine: dict[str, Any], work_dir: Path) -> dict[str, Any]:
    model = Path(options.model) if options.model else make_tiny_model(work_dir)
    names = options.ways.split(",")
    inputs = {kind: work_dir / f"{kind.replace(':', '-')}.jsonl" for kind in options.workloads.split(",")}
    for kind, path in inputs.items():
        write_rows(path, make_rows(kind, options.rows, options.longest))
    print(f"{'workload':<14} {'way':<14} {'seconds':>9} {'tokens/s':>10} {'dpgen is faster by':>28}")
    record: dict[str, Any] = {}
    # All ways of LLM share a process: the machine must hold two engines at once.
    dpgen = Peer(run_dpgen, options, model, engine, work_dir)
    peers = [dpgen]
    if not all(name.startswith("dpgen") for name in names):
        peers.append(Peer(run_llm, options, model, engine, work_dir))
    for kind, path in inputs.items():
        ways = {
            name: (lambda name=name, path=path: peers[0 if name.startswith("dpgen") else 1].time(name, path))
            for name in names
        }
        ways[names[0]]()  # a warm-up: compiles, and fills caches
        seconds = measure_in_turn(ways, options.rounds)
        record[kind] = summarize(kind, seconds, path)
        record[kind]["rank_processor_s"] = round(dpgen.processor_s, 3)
    for peer in peers:
        peer.close()
    return record


def summarize(kind: str, seconds: dict[str, list[float]], path: Path) -> dict[str, Any]:
    """Print a table row for each way, and return the workload's part of the record."""
    num_tokens = sum(json.loads(line)["budget"] for line in path.read_text().splitlines())
    rounded = {name: [round(time_s, 3) for time_s in times_s] for name, times_s in seconds.items()}
    record: dict[str, Any] = {"tokens": num_tokens, "seconds": rounded}
    for name, times_s in seconds.items():
        faster_by = ""
        if name != "dpgen":
            record[f"{name}_over_dpgen"] = ratio = compute_ratio(times_s, seconds["dpgen"])
            faster_by = f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})"
        median_s = sorted(times_s)[len(times_s) // 2]
        print(f"{kind:<14} {name:<14} {median_s:>9.2f} {num_tokens / median_s:>10,.0f} {faster_by:>28}", flush=True)
    return record


class Peer:
    """Keep an engine loaded in a process of its own, and time one way at a time.

    Attributes:
        processor_s: processor seconds of the process itself in the last pass: for dpgen, the rank without its engine.
    """

    def __init__(
        self, target: Any, options: argparse.Namespace, model: Path, engine: dict[str, Any], work_dir: Path
    ) -> None:
        self._pipe, child_pipe = mp.Pipe()
        context = mp.get_context("spawn")
        core = options.core if options.device == "cpu" else None
        self._process = context.Process(target=target, args=(child_pipe, core, str(model), engine, str(work_dir)))
        self._process.start()
        child_pipe.close()
        self._pipe.recv()  # loaded
        self.processor_s = 0.0

    def time(self, way: str, path: Path) -> float:
        self._pipe.send((way, str(path)))
        seconds: float
        seconds, self.processor_s = self._pipe.recv()
        return seconds

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def prepare_process(core: int | None, log: str) -> None:
    """Bind this process to its core, and redirect its output to a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if core is not None:
        os.sched_setaffinity(0, [core])
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # on one core a second process only slows LLM down
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"


def run_llm(pipe: Connection, core: int | None, model: str, engine: dict[str, Any], work_dir: str) -> None:
    """Generate with `LLM.generate()` as its users call it."""
    prepare_process(core, f"{work_dir}/llm.log")
    from vllm import LLM

    llm = LLM(model, **engine)
    pipe.send("loaded")
    while (command := pipe.recv()) is not None:
        way, path = command
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        chunk_rows = int(way.partition("-")[2]) if "-" in way else len(rows)
        llm.reset_prefix_cache()
        processor_s = time.process_time()
        seconds = time_generate(llm, rows, chunk_rows)
        pipe.send((seconds, time.process_time() - processor_s))


def run_dpgen(pipe: Connection, core: int | None, model: str, engine: dict[str, Any], work_dir: str) -> None:
    """Generate with dpgen's rank: everything of `dpgen.run` between loading the engine and writing the result."""
    prepare_process(core, f"{work_dir}/dpgen.log")
    import datasets

    from dpgen.data.input_rows import InputRows
    from dpgen.distributed.group import SingleRankGroup
    from dpgen.distributed.topology import read_topology
    from dpgen.engine.starting.launch import build_engine_spec, build_text_pipeline, make_engine_factory
    from dpgen.engine.starting.limits import EngineLimits
    from dpgen.engine.starting.log_file import EngineLog
    from dpgen.engine.supervisor import EngineSupervisor
    from dpgen.journal.run_dir import RunDir

    config = load_config(work_dir, model, engine, "rows.jsonl", "null")
    topology, log = read_topology({}), EngineLog(config.run.log_level)
    log.open(Path(work_dir) / "engine.log")
    supervisor = EngineSupervisor(
        make_engine_factory(config, topology, SingleRankGroup(), None, log),
        build_engine_spec(config, topology, None),
        EngineLimits(timeout_s=600, start_timeout_s=600, max_deaths=1),
    )
    print(supervisor.check_options(lambda: None), flush=True)
    texts = build_text_pipeline(config, EngineLog(config.run.log_level), InputRows(datasets.Dataset.from_dict({})))
    supervisor.load_model(lambda measured_bytes: measured_bytes, lambda: None, texts.engine_text_config)
    pipe.send("loaded")
    attempt = 0
    while (command := pipe.recv()) is not None:
        way, path = command
        attempt += 1
        run_dir = RunDir(f"{work_dir}/run-{attempt}")
        run_dir.create()
        config = load_config(work_dir, model, engine, path, "0" if way == "dpgen-seeded" else "null")
        pipe.send(time_rank(config, run_dir.journal, attempt, supervisor, texts))
    supervisor.close()


def load_config(work_dir: str, model: str, engine: dict[str, Any], path: str, seed: str) -> Any:
    from dpgen.config.loader import load

    return load([], [*build_job_settings(Path(work_dir) / "run", model, Path(path), engine), f"run.seed={seed}"])


def time_rank(config: Any, journal_dir: Path, attempt: int, supervisor: Any, texts: Any) -> tuple[float, float]:
    """Generate all rows with a loaded engine; return the seconds, and the processor seconds of this process."""
    from dpgen.data.input_loading import load_input
    from dpgen.distributed.group import SingleRankGroup
    from dpgen.journal.writer import JournalWriter
    from dpgen.scheduling.generation_loop import GenerationLoop, LoopConfig
    from dpgen.scheduling.order_config import OrderConfig
    from dpgen.scheduling.planner import PlannerConfig, ShardPlanner
    from dpgen.scheduling.request_builder import RequestBuilder
    from dpgen.scheduling.result_recorder import ResultRecorder

    rows, group = load_input(config.data), SingleRankGroup()
    started_s, processor_s = time.monotonic(), time.process_time()
    order = OrderConfig(config.work, config.prompt, "budget", bool(config.engine.get("enable_prefix_caching", True)))
    planner_config = PlannerConfig(
        order, retry_errors=False, columns=("budget", "prompt"), lockstep=False, claims_rows=True, attempt=attempt
    )
    builder = RequestBuilder(texts.render, config.run.seed, config.sampling_columns)
    planner = ShardPlanner(planner_config, rows, journal_dir, group, builder)
    source = planner.plan()
    journal = JournalWriter(journal_dir, attempt, 0)
    results, loop_config = ResultRecorder(journal, texts.detokenizer), LoopConfig(config.work.reserve_rows)
    totals = GenerationLoop(planner, supervisor, results, group, loop_config, lambda: None).run(source)
    journal.close()
    seconds = time.monotonic() - started_s
    assert totals.num_rows == len(rows) and totals.num_errors == 0, totals
    return seconds, time.process_time() - processor_s


if __name__ == "__main__":
    main()
