"""One rank of dpgen, durability on, against vLLM's `LLM.generate()` over the same rows on the same core.

    python benchmarks/engine.py [--rows 800] [--rounds 5] [--workloads constant:64,chat,reasoning]
    python benchmarks/engine.py --model DIR --engine '{"dtype": "bfloat16"}' --device gpu --rows 4000      # on a GPU

Ways: `LLM.generate()` in one call; the same in chunks of 256 and of 64 rows (what scripts do that save now and then);
dpgen's own loop (dealing, rendering, admission, engine process, detokenizing, journal), without seeds, as `generate()`
has none, or (dpgen-seeded) with a seed of its own for every row, as dpgen has it unless told otherwise. dpgen and LLM
keep their loaded engines in processes of their own, on one core unless it is a GPU, and sleep while the other is timed.
Every round times all ways, one after the other. Not timed: starting up. Lengths are forced: `ignore_eos`, and every
row's `max_tokens`.

A table for people, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import shutil
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from measure import TINY_ENGINE, interleaved, machine, ratio, tiny_model, workload, write_rows


def main() -> None:
    options = arguments()
    folder = Path(tempfile.mkdtemp(dir=options.dir))
    try:
        model = Path(options.model) if options.model else tiny_model(folder)
        engine = json.loads(options.engine) if options.engine else TINY_ENGINE
        found = measure(options, model, engine, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"benchmark": "engine", **machine(), "engine": engine, "device": options.device, "found": found}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--longest", type=int, default=1024, help="tokens of the longest row")
    parser.add_argument("--workloads", default="constant:64,chat,reasoning")
    parser.add_argument("--ways", default="dpgen,generate,chunks-256,chunks-64")
    parser.add_argument("--model", help="a folder; the tests' tiny model by default")
    parser.add_argument("--engine", help="engine options as JSON, the same for all ways")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--core", type=int, default=0, help="the core that all ways run on, without a GPU")
    parser.add_argument("--dir", help="where to write; the system's temporary folder by default")
    return parser.parse_args()


def measure(options: argparse.Namespace, model: Path, engine: dict[str, Any], folder: Path) -> dict[str, Any]:
    names = options.ways.split(",")
    kinds = options.workloads.split(",")
    inputs = {kind: folder / f"{kind.replace(':', '-')}.jsonl" for kind in kinds}
    for kind, path in inputs.items():
        write_rows(path, workload(kind, options.rows, options.longest))
    print(f"{'workload':<14} {'way':<14} {'seconds':>9} {'tokens/s':>10} {'dpgen is faster by':>28}")
    found: dict[str, Any] = {}
    # Ways of LLM share a process. Two engines at once must fit the machine.
    peers = {"dpgen": Peer(run_dpgen, options, model, engine, folder)}
    if not all(name.startswith("dpgen") for name in names):
        peers["generate"] = Peer(run_llm, options, model, engine, folder)

    def peer_of(name: str) -> Peer:
        return peers["dpgen" if name.startswith("dpgen") else "generate"]

    for kind, path in inputs.items():
        ways = {name: (lambda name=name, path=path: peer_of(name).time(name, path)) for name in names}
        for way in ways.values():
            way()  # the first pass compiles, and fills caches
            break
        seconds = interleaved(ways, options.rounds)
        num_tokens = sum(json.loads(line)["budget"] for line in path.read_text().splitlines())
        found[kind] = {"tokens": num_tokens, "seconds": {k: [round(s, 3) for s in v] for k, v in seconds.items()}}
        found[kind]["rank_processor_s"] = round(peers["dpgen"].processor_s, 3)
        for name, each in seconds.items():
            shown = ""
            if name != "dpgen":
                found[kind][f"{name}_over_dpgen"] = faster = ratio(each, seconds["dpgen"])
                shown = f"{faster['median']:.3f} ({faster['min']:.3f} to {faster['max']:.3f})"
            middle_s = sorted(each)[len(each) // 2]
            print(f"{kind:<14} {name:<14} {middle_s:>9.2f} {num_tokens / middle_s:>10,.0f} {shown:>28}", flush=True)
    for peer in peers.values():
        peer.close()
    return found


class Peer:
    """A process that keeps an engine loaded, and times a way when it is asked to."""

    def __init__(
        self, target: Any, options: argparse.Namespace, model: Path, engine: dict[str, Any], folder: Path
    ) -> None:
        self._pipe, theirs = mp.Pipe()
        context = mp.get_context("spawn")
        core = options.core if options.device == "cpu" else None
        self._process = context.Process(target=target, args=(theirs, core, str(model), engine, str(folder)))
        self._process.start()
        theirs.close()
        self._pipe.recv()  # loaded
        self.processor_s = 0.0  # of the process itself, in the last pass: dpgen's rank without its engine

    def time(self, way: str, path: Path) -> float:
        self._pipe.send((way, str(path)))
        seconds: float
        seconds, self.processor_s = self._pipe.recv()
        return seconds

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def settle(core: int | None, log: str) -> None:
    """Moves this process to its core, and what it prints to a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if core is not None:
        os.sched_setaffinity(0, [core])
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # on one core a second process only costs LLM
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"


def run_llm(pipe: Connection, core: int | None, model: str, engine: dict[str, Any], folder: str) -> None:
    """`LLM.generate()` as its users call it."""
    settle(core, f"{folder}/llm.log")
    from vllm import LLM, SamplingParams

    llm = LLM(model, **engine)
    pipe.send("loaded")
    while (order := pipe.recv()) is not None:
        way, path = order
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        chunk = int(way.partition("-")[2]) if "-" in way else len(rows)
        llm.reset_prefix_cache()
        started_s, processor_s = time.monotonic(), time.process_time()
        texts = []
        for start in range(0, len(rows), chunk):
            some = rows[start : start + chunk]
            params = [SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=row["budget"]) for row in some]
            outputs = llm.generate([row["prompt"] for row in some], params, use_tqdm=False)
            texts += [output.outputs[0].text for output in outputs]
        seconds = time.monotonic() - started_s
        assert len(texts) == len(rows)
        pipe.send((seconds, time.process_time() - processor_s))


def run_dpgen(pipe: Connection, core: int | None, model: str, engine: dict[str, Any], folder: str) -> None:
    """dpgen's rank: everything of `dpgen.run` between loading the engine and writing the result."""
    settle(core, f"{folder}/dpgen.log")
    from dpgen.config.loader import load
    from dpgen.data.input_rows import load_input
    from dpgen.distributed.group import SingleRankGroup
    from dpgen.distributed.topology import read_topology
    from dpgen.engine.launch import build_engine_spec, build_text_pipeline, make_engine_factory
    from dpgen.engine.supervisor import EngineSupervisor
    from dpgen.journal.run_dir import RunDir
    from dpgen.journal.writer import JournalWriter
    from dpgen.scheduling.generation_loop import GenerationLoop
    from dpgen.scheduling.planner import ShardPlanner

    def config_of(path: str, seed: str) -> Any:
        settings = [f"run.dir={folder}/run", f"model={model}", f"data.path={path}", "data.prompt_column=prompt"]
        settings += [
            "sampling.ignore_eos=true",
            "sampling.temperature=1.0",
            "sampling.from_columns={max_tokens: budget}",
        ]
        return load([], [*settings, f"run.seed={seed}", f"engine={json.dumps(engine)}"])

    config, topology, group = config_of("rows.jsonl", "null"), read_topology({}), SingleRankGroup()
    supervisor = EngineSupervisor(
        make_engine_factory(config, topology, group, None),
        build_engine_spec(config, topology, None),
        lambda line: print(line, flush=True),
        timeout_s=600,
        start_timeout_s=600,
        max_deaths=1,
    )
    print(supervisor.check_options(lambda: None), flush=True)
    texts = build_text_pipeline(config, print)
    supervisor.load_model(lambda measured: measured, lambda: None, texts.engine_text_config)
    pipe.send("loaded")
    attempt = 0
    while (order := pipe.recv()) is not None:
        attempt += 1
        run_folder = RunDir(f"{folder}/run-{attempt}")
        run_folder.create()
        config = config_of(order[1], "0" if order[0] == "dpgen-seeded" else "null")
        rows = load_input(config.data)
        started_s, processor_s = time.monotonic(), time.process_time()
        dealer = ShardPlanner(config, rows, run_folder, group, attempt, texts.render)
        feed = dealer.plan()
        journal = JournalWriter(run_folder.journal, attempt, 0)
        totals = GenerationLoop(
            feed,
            supervisor,
            journal,
            group,
            reshard=dealer.plan,
            detokenizer=texts.detokenizer,
            reserve_rows=config.work.reserve_rows,
        ).run()
        journal.close()
        seconds = time.monotonic() - started_s
        assert totals.num_rows == len(rows) and totals.num_errors == 0, totals
        pipe.send((seconds, time.process_time() - processor_s))
    supervisor.close()


if __name__ == "__main__":
    sys.exit(main())
