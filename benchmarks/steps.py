"""Measure what an order of rows can gain on an engine: the number of steps, and the cost of a step by its sequences.

    python benchmarks/steps.py [--rows 1500] [--rounds 3] [--workload reasoning]

vLLM alone, on one core, in this process: no rank, no pipe, no journal. The same rows run in two ways: in the order of
the file, all given to the engine at once, as `LLM.generate()` does; and longest first, with 32 rows waiting, as dpgen
does. An order gains at most the time of steps with few sequences, beyond the cost of their tokens in full steps.

Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from measure import (
    TINY_ENGINE,
    compute_ratio,
    make_parser,
    make_rows,
    make_tiny_model,
    measure_in_turn,
    run_benchmark,
)

_RESERVE_ROWS = 32


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--longest", type=int, default=1024, help="tokens of the longest row")
    parser.add_argument("--workload", default="reasoning")
    parser.add_argument("--core", type=int, default=0)
    options = parser.parse_args()
    os.sched_setaffinity(0, [options.core])  # before torch counts the cores
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    run_benchmark("steps", options.dir, lambda work_dir: Bench(options, work_dir).measure())


class Bench:
    """Step one vLLM engine through the same rows, in two orders."""

    def __init__(self, options: argparse.Namespace, work_dir: Path) -> None:
        from transformers import AutoTokenizer

        from dpgen.engine.messages import EngineSpec, EngineTextConfig
        from dpgen.engine.vllm.vllm_backend import VllmBackend

        model = make_tiny_model(work_dir)
        sampling = {"temperature": 1.0, "ignore_eos": True}
        self.backend = VllmBackend(EngineSpec("vllm", str(model), dict(TINY_ENGINE), sampling, ("max_tokens",)))
        self.backend.check_options()
        self.backend.load(lambda measured: measured)
        self.backend.prepare_job(EngineTextConfig(skip_detokenize=True))
        rows = make_rows(options.workload, options.rows, options.longest)
        self.budgets = [row["budget"] for row in rows]
        tokenizer = AutoTokenizer.from_pretrained(model)
        self.prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
        self.num_rounds = options.rounds

    def measure(self) -> dict[str, Any]:
        file_order = list(range(len(self.budgets)))
        longest_first = sorted(file_order, key=lambda row: -self.budgets[row])
        steps: dict[str, list[tuple[int, float]]] = {}

        def time_way(name: str, order: list[int], max_rows: int) -> float:
            steps[name] = self.run(order, max_rows)
            return sum(seconds for _, seconds in steps[name])

        self.run(file_order, len(file_order))  # a warm-up: fills caches
        max_rows = TINY_ENGINE["max_num_seqs"] + _RESERVE_ROWS
        ways = {
            "as they come": lambda: time_way("as they come", file_order, len(file_order)),
            "longest first": lambda: time_way("longest first", longest_first, max_rows),
        }
        seconds = measure_in_turn(ways, self.num_rounds)
        gain = compute_ratio(seconds["as they come"], seconds["longest first"])
        record: dict[str, Any] = {"seconds": seconds, "gain": gain}
        record |= {name: summarize_steps(name, steps[name]) for name in steps}
        print(f"longest first is faster by {gain}")
        return record

    def run(self, order: list[int], max_rows: int) -> list[tuple[int, float]]:
        """Finish all rows, at most `max_rows` in the engine at a time; return each step's sequences and its seconds.

        A step's sequences are those that run before the step.
        """
        from dpgen.records import Request, RequestId

        engine = self.backend._engine
        assert engine is not None
        engine.reset_prefix_cache()
        scheduler = engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]
        remaining, num_in_flight, steps = iter(order), 0, list[tuple[int, float]]()
        while True:
            while num_in_flight < max_rows and (row := next(remaining, None)) is not None:
                self.backend.add_request(
                    Request(RequestId(row), self.prompts[row], None, {"max_tokens": self.budgets[row]})
                )
                num_in_flight += 1
            if not num_in_flight:
                return steps
            num_running, started_s = len(scheduler.running), time.perf_counter()
            num_in_flight -= len(self.backend.step())
            steps.append((num_running, time.perf_counter() - started_s))


def summarize_steps(name: str, steps: list[tuple[int, float]]) -> dict[str, Any]:
    """Print the number and the mean time of steps by their sequences, in classes of eight; return the same."""
    seconds_by_class = defaultdict(list)
    for num_running, step_s in steps:
        seconds_by_class[min(num_running, TINY_ENGINE["max_num_seqs"] - 1) // 8 * 8].append(step_s)
    by_sequences = {
        f"{low}-{low + 7}": {"steps": len(times_s), "ms": round(1e3 * sum(times_s) / len(times_s), 2)}
        for low, times_s in sorted(seconds_by_class.items())
    }
    print(f"{name}: {len(steps)} steps in the last round")
    for sequences, summary in by_sequences.items():
        print(f"  {sequences:>6} sequences before it {summary['steps']:>6} steps of {summary['ms']:>6.2f} ms")
    return {"steps": len(steps), "by_sequences": by_sequences}


if __name__ == "__main__":
    main()
