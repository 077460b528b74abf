"""Compare one rank of dpgen, with durable rows, with vLLM's `LLM.embed()`: the same texts, the same core.

    python benchmarks/embed.py [--rows 2000] [--rounds 5] [--max-words 60]
    python benchmarks/embed.py --model BAAI/bge-base-en-v1.5 --device gpu --rows 100000      # on a GPU

dpgen times its own loop: plan, tokenize, admission, engine process, journal. Both keep their loaded engines in
processes of their own, on one core unless on a GPU, and sleep while the other is timed. Texts are of 1 to `--max-words`
words, most of them short. Start-up is not timed.

Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from engine import Peer, prepare_process
from measure import REPO, compute_ratio, make_parser, measure_in_turn, run_benchmark, write_rows

ENGINE = {"dtype": "float32", "max_num_seqs": 64, "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}


def main() -> None:
    options = parse_options()
    engine = json.loads(options.engine) if options.engine else ENGINE
    settings = {"engine": engine, "device": options.device}
    run_benchmark("embed", options.dir, lambda work_dir: measure(options, engine, work_dir), **settings)


def parse_options() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-words", type=int, default=60)
    parser.add_argument("--model", help="a directory; the tests' tiny BERT by default")
    parser.add_argument("--engine", help="engine options as JSON, the same for both")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--core", type=int, default=0, help="the core that both run on, without a GPU")
    return parser.parse_args()


def measure(options: argparse.Namespace, engine: dict[str, Any], work_dir: Path) -> dict[str, Any]:
    model = Path(options.model) if options.model else make_tiny_bert(work_dir)
    path = write_rows(work_dir / "texts.jsonl", make_texts(options.rows, options.max_words))
    peers = {
        way: Peer(run, options, model, engine, work_dir) for way, run in (("dpgen", run_dpgen), ("embed", run_llm))
    }
    for way, peer in peers.items():
        peer.time(way, path)  # a warm-up
    ways = {way: (lambda way=way, peer=peer: peer.time(way, path)) for way, peer in peers.items()}
    seconds = measure_in_turn(ways, options.rounds)
    for peer in peers.values():
        peer.close()
    ratio = compute_ratio(seconds["embed"], seconds["dpgen"])
    print(f"{'way':<8} {'seconds':>9} {'rows/s':>9}")
    for way, times_s in seconds.items():
        median_s = sorted(times_s)[len(times_s) // 2]
        print(f"{way:<8} {median_s:>9.2f} {options.rows / median_s:>9,.0f}")
    print(f"LLM.embed over dpgen: {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})")
    rounded = {way: [round(time_s, 3) for time_s in times_s] for way, times_s in seconds.items()}
    return {"rows": options.rows, "seconds": rounded, "embed_over_dpgen": ratio}


def make_tiny_bert(work_dir: Path) -> Path:
    """Write the tests' BERT."""
    sys.path.insert(0, str(REPO / "tests"))
    from helpers.tiny_pooling import save_tiny_pooling

    model: Path = save_tiny_pooling("bert", work_dir / "model")
    return model


def make_texts(num_rows: int, max_words: int) -> list[dict[str, str]]:
    """Return texts of 1 to `max_words` words, which are one token each."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
    chance = random.Random(0)
    lengths = [max(1, round(max_words * chance.random() ** 2)) for _ in range(num_rows)]
    return [{"prompt": " ".join(chance.choice(words) for _ in range(length))} for length in lengths]


def run_llm(pipe: Connection, core: int | None, model: str, engine: dict[str, Any], work_dir: str) -> None:
    """Embed with `LLM.embed()` as its users call it."""
    prepare_process(core, f"{work_dir}/llm.log")
    from vllm import LLM

    llm = LLM(model, **engine)
    pipe.send("loaded")
    while (command := pipe.recv()) is not None:
        texts = [json.loads(line)["prompt"] for line in Path(command[1]).read_text().splitlines()]
        started_s, processor_s = time.monotonic(), time.process_time()
        outputs = llm.embed(texts, use_tqdm=False)
        seconds = time.monotonic() - started_s
        assert len(outputs) == len(texts)
        pipe.send((seconds, time.process_time() - processor_s))


def run_dpgen(pipe: Connection, core: int | None, model: str, engine: dict[str, Any], work_dir: str) -> None:
    """Embed with dpgen's rank: everything of `dpgen.run` between loading the engine and writing the result."""
    prepare_process(core, f"{work_dir}/dpgen.log")
    import datasets

    from dpgen.config.loader import load
    from dpgen.data.input_rows import InputRows
    from dpgen.distributed.group import SingleRankGroup
    from dpgen.distributed.topology import read_topology
    from dpgen.engine.starting.launch import build_engine_spec, build_text_pipeline, make_engine_factory
    from dpgen.engine.starting.limits import EngineLimits
    from dpgen.engine.starting.log_file import EngineLog
    from dpgen.engine.supervisor import EngineSupervisor
    from dpgen.journal.run_dir import RunDir

    settings = [f"model={model}", "task=embed", "data.prompt_column=prompt", f"engine={json.dumps(engine)}"]
    config = load([], [*settings, f"run.dir={work_dir}/run", f"data.path={work_dir}/texts.jsonl"])
    topology, log = read_topology({}), EngineLog(config.run.log_level)
    log.open(Path(work_dir) / "engine.log")
    supervisor = EngineSupervisor(
        make_engine_factory(config, topology, SingleRankGroup(), None, log),
        build_engine_spec(config, topology, None),
        EngineLimits(timeout_s=600, start_timeout_s=600, max_deaths=1),
    )
    supervisor.check_options(lambda: None)
    texts = build_text_pipeline(config, log, InputRows(datasets.Dataset.from_dict({})))
    texts.describe_model(supervisor.load_model(lambda num_bytes: num_bytes, lambda: None, texts.engine_text_config))
    pipe.send("loaded")
    attempt = 0
    while pipe.recv() is not None:
        attempt += 1
        run_dir = RunDir(f"{work_dir}/run-{attempt}")
        run_dir.create()
        pipe.send(time_rank(config, run_dir.journal, attempt, supervisor, texts))
    supervisor.close()


def time_rank(config: Any, journal_dir: Path, attempt: int, supervisor: Any, texts: Any) -> tuple[float, float]:
    """Embed all rows with a loaded engine; return the seconds, and the processor seconds of this process."""
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
    planner_config = PlannerConfig(
        OrderConfig.from_config(config),
        retry_errors=False,
        columns=("prompt",),
        lockstep=False,
        claims_rows=True,
        attempt=attempt,
    )
    planner = ShardPlanner(planner_config, rows, journal_dir, group, RequestBuilder(texts.render, None, {}))
    source, journal = planner.plan(), JournalWriter(journal_dir, attempt, 0)
    loop_config = LoopConfig(config.work.reserve_rows, reads_only=True)
    results = ResultRecorder(journal, texts.detokenizer)
    totals = GenerationLoop(planner, supervisor, results, group, loop_config, lambda: None).run(source)
    journal.close()
    seconds = time.monotonic() - started_s
    assert totals.num_rows == len(rows) and totals.num_errors == 0, totals
    return seconds, time.process_time() - processor_s


if __name__ == "__main__":
    main()
