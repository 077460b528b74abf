"""Compare one rank of dpgen, with durable rows, with vLLM's `LLM.generate()`: the same rows, the same core.

    python benchmarks/engine.py [--rows 800] [--rounds 5] [--workloads constant:64,chat,reasoning]
    python benchmarks/engine.py --model DIR --engine '{"dtype": "bfloat16"}' --device gpu --rows 4000      # on a GPU

Ways:
- generate: `LLM.generate()` in one call
- chunks-256, chunks-64: the same in chunks of rows, as scripts do that save now and then
- dpgen: dpgen's own loop (plan, render, admission, engine process, detokenize, journal) without seeds, as `generate()`
  has none
- dpgen-seeded: the same with a seed for every row, which is dpgen's default

Both keep their loaded engines (see `loaded_engines`), on one core unless on a GPU. Every round times all ways in turn.
Lengths are forced by `ignore_eos` and every row's `max_tokens`.

Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from llm_generate import time_generate
from loaded_engines import Peer, print_heading, print_table, serve_llm, serve_ranks
from measure import (
    TINY_ENGINE,
    add_engine_options,
    build_job_settings,
    compute_ratio,
    make_parser,
    make_rows,
    make_tiny_model,
    measure_in_turn,
    run_engine_benchmark,
    write_rows,
)


def main() -> None:
    run_engine_benchmark("engine", parse_options(), TINY_ENGINE, measure)


def parse_options() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_engine_options(parser, 800, "the tests' tiny model")
    parser.add_argument("--longest", type=int, default=1024, help="tokens of the longest row")
    parser.add_argument("--workloads", default="constant:64,chat,reasoning")
    parser.add_argument("--ways", default="dpgen,generate,chunks-256,chunks-64")
    return parser.parse_args()


def measure(options: argparse.Namespace, engine: dict[str, Any], work_dir: Path) -> dict[str, Any]:
    model = str(options.model or make_tiny_model(work_dir))
    names = options.ways.split(",")
    inputs = {kind: work_dir / f"{kind.replace(':', '-')}.jsonl" for kind in options.workloads.split(",")}
    for kind, path in inputs.items():
        write_rows(path, make_rows(kind, options.rows, options.longest))
    print_heading("workload", "tokens/s")
    record: dict[str, Any] = {}
    with ExitStack() as stack:
        settings = partial(list_settings, str(work_dir), model, engine)
        dpgen = llm = stack.enter_context(Peer(serve_ranks, options, work_dir, settings))
        if not all(name.startswith("dpgen") for name in names):
            # All ways of LLM share a process: the machine must hold two engines at once.
            llm = stack.enter_context(Peer(serve_llm, options, work_dir, model, engine, generate))
        for kind, path in inputs.items():
            ways = {
                name: (lambda name=name, path=path: (dpgen if name.startswith("dpgen") else llm).time(name, path))
                for name in names
            }
            ways[names[0]]()  # a warm-up: compiles, and fills caches
            record[kind] = summarize(kind, measure_in_turn(ways, options.rounds), path)
            record[kind]["rank_processor_s"] = round(dpgen.processor_s, 3)
    return record


def summarize(kind: str, seconds: dict[str, list[float]], path: Path) -> dict[str, Any]:
    """Print a table row for each way, and return the workload's part of the record."""
    num_tokens = sum(json.loads(line)["budget"] for line in path.read_text().splitlines())
    ratios = {way: compute_ratio(times_s, seconds["dpgen"]) for way, times_s in seconds.items() if way != "dpgen"}
    print_table(kind, seconds, num_tokens, ratios)
    rounded = {name: [round(time_s, 3) for time_s in times_s] for name, times_s in seconds.items()}
    of_ways = {f"{way}_over_dpgen": ratio for way, ratio in ratios.items()}
    return {"tokens": num_tokens, "seconds": rounded, **of_ways}


def generate(llm: Any, way: str, rows: list[dict[str, Any]]) -> float:
    """Generate with `LLM.generate()` as its users call it; return the seconds."""
    chunk_rows = int(way.partition("-")[2]) if "-" in way else len(rows)
    llm.reset_prefix_cache()
    return time_generate(llm, rows, chunk_rows)


def list_settings(work_dir: str, model: str, engine: dict[str, Any], way: str, path: str) -> list[str]:
    """Return the arguments of `dpgen run` of a way."""
    seed = "0" if way == "dpgen-seeded" else "null"
    settings = build_job_settings(Path(work_dir) / "run", model, Path(path), engine)
    return [*settings, f"run.seed={seed}", "parallel.engines_per_rank=1"]


if __name__ == "__main__":
    main()
