"""What an order of rows can gain on an engine: how many steps it makes, and what a step costs, by how full it is.

    python benchmarks/steps.py [--rows 1500] [--rounds 3] [--workload reasoning]

vLLM alone, on one core, in this process: no rank, no pipe, no journal. The same rows in the order of the file, all
given to the engine at once, as `LLM.generate()` does it; and longest first, with 32 of them waiting, as dpgen does it.
The most that an order can gain is what steps with few sequences take, beyond what their tokens would cost in full ones.

A table for people, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from measure import TINY_ENGINE, interleaved, machine, ratio, tiny_model, workload

_RESERVE_ROWS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--longest", type=int, default=1024, help="tokens of the longest row")
    parser.add_argument("--workload", default="reasoning")
    parser.add_argument("--core", type=int, default=0)
    options = parser.parse_args()
    os.sched_setaffinity(0, [options.core])  # before torch counts the cores
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    folder = Path(tempfile.mkdtemp())
    try:
        found = Bench(options, folder).measure()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"benchmark": "steps", **machine(), "found": found}))


class Bench:
    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        from transformers import AutoTokenizer

        from dpgen.engine.messages import EngineSpec, EngineTextConfig
        from dpgen.engine.vllm_backend import VllmBackend

        model = tiny_model(folder)
        sampling = {"temperature": 1.0, "ignore_eos": True}
        self.backend = VllmBackend(EngineSpec("vllm", str(model), dict(TINY_ENGINE), sampling, ("max_tokens",)))
        self.backend.check_options()
        self.backend.load(lambda measured: measured, EngineTextConfig(skip_detokenize=True))
        rows = workload(options.workload, options.rows, options.longest)
        self.budgets = [row["budget"] for row in rows]
        tokenizer = AutoTokenizer.from_pretrained(model)
        self.prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
        self.rounds = options.rounds

    def measure(self) -> dict[str, Any]:
        as_they_come = list(range(len(self.budgets)))
        longest_first = sorted(as_they_come, key=lambda row: -self.budgets[row])
        steps: dict[str, list[tuple[int, float]]] = {}

        def way(name: str, order: list[int], most: int) -> float:
            steps[name] = self.run(order, most)
            return sum(seconds for _, seconds in steps[name])

        self.run(as_they_come, len(as_they_come))  # the first pass fills caches
        most = TINY_ENGINE["max_num_seqs"] + _RESERVE_ROWS
        ways = {
            "as they come": lambda: way("as they come", as_they_come, len(as_they_come)),
            "longest first": lambda: way("longest first", longest_first, most),
        }
        seconds = interleaved(ways, self.rounds)
        found: dict[str, Any] = {"seconds": seconds, "gain": ratio(seconds["as they come"], seconds["longest first"])}
        for name, each in steps.items():
            by_fill = defaultdict(list)
            for num_running, step_s in each:
                by_fill[min(num_running, TINY_ENGINE["max_num_seqs"] - 1) // 8 * 8].append(step_s)
            found[name] = {
                "steps": len(each),
                "by_sequences": {
                    f"{low}-{low + 7}": {"steps": len(some), "ms": round(1e3 * sum(some) / len(some), 2)}
                    for low, some in sorted(by_fill.items())
                },
            }
            print(f"{name}: {len(each)} steps in the last round")
            for fill, some in found[name]["by_sequences"].items():
                print(f"  {fill:>6} sequences before it {some['steps']:>6} steps of {some['ms']:>6.2f} ms")
        print(f"longest first is faster by {found['gain']}")
        return found

    def run(self, order: list[int], most: int) -> list[tuple[int, float]]:
        """All rows, at most so many in the engine at a time; of every step, the sequences before it and its seconds."""
        from dpgen.records import Request

        engine = self.backend._engine
        assert engine is not None
        engine.reset_prefix_cache()
        scheduler = engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]
        waiting, num_inside, steps = iter(order), 0, []
        while True:
            while num_inside < most and (row := next(waiting, None)) is not None:
                self.backend.add_request(Request(row, self.prompts[row], None, {"max_tokens": self.budgets[row]}))
                num_inside += 1
            if not num_inside:
                return steps
            num_running, started_s = len(scheduler.running), time.perf_counter()
            num_inside -= len(self.backend.step())
            steps.append((num_running, time.perf_counter() - started_s))


if __name__ == "__main__":
    sys.exit(main())
