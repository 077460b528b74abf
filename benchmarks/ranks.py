"""Measure two ranks with the real engine: are both busy to the end, and how much faster are they than static shards?

    python benchmarks/ranks.py [--scenes even,sorted,slow] [--rows 1500] [--rounds 5]
    python benchmarks/ranks.py --model DIR --engine '{"dtype": "bfloat16", ...}' --set parallel.share_devices=true

Whole runs of `torchrun -m dpgen run` with two ranks, a core each (or sharing a GPU). Scenes:
even    every workload, shuffled and sorted by length: the mean over the maximum of the ranks' busy times
sorted  the file sorted by length, against static contiguous chunks (static_shards.py): the slowest rank's time
slow    the engine of one rank stopped half of the time (SIGSTOP and SIGCONT, 20 ms each)

Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import threading
import time
from pathlib import Path
from typing import Any

from measure import (
    REPO,
    TINY_ENGINE,
    build_job_settings,
    build_torchrun_command,
    compute_ratio,
    find_engine,
    make_parser,
    make_rows,
    make_tiny_model,
    measure_in_turn,
    read_run,
    run_benchmark,
    time_command,
    time_dpgen,
    write_rows,
)

_STOPPED_S = 0.02


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--scenes", default="even,sorted,slow")
    parser.add_argument("--workloads", default="constant:64,chat,reasoning")
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--longest", type=int, default=1024, help="tokens of the longest row")
    parser.add_argument("--model", help="a directory; the tests' tiny model by default")
    parser.add_argument("--engine", help="engine options as JSON")
    parser.add_argument("--set", action="append", default=[], help="a further key=value for dpgen")
    options = parser.parse_args()

    def measure(work_dir: Path) -> dict[str, Any]:
        bench = Bench(options, work_dir)
        scenes = {"even": bench.measure_even, "sorted": bench.measure_sorted, "slow": bench.measure_slow}
        return {scene: scenes[scene]() for scene in options.scenes.split(",")}

    run_benchmark("ranks", options.dir, measure)


class Bench:
    """Run the scenes with one model and one set of engine options."""

    def __init__(self, options: argparse.Namespace, work_dir: Path) -> None:
        self.options, self.work_dir = options, work_dir
        self.model = Path(options.model) if options.model else make_tiny_model(work_dir)
        self.engine: dict[str, Any] = json.loads(options.engine) if options.engine else TINY_ENGINE
        self.num_runs = 0

    def measure_even(self) -> dict[str, Any]:
        record = {}
        for kind in self.options.workloads.split(","):
            for is_sorted in (False, True):
                data = self.write_rows(kind, is_sorted)
                runs = [self.run_dpgen(data) for _ in range(self.options.rounds)]
                name = f"{kind}, {'sorted' if is_sorted else 'shuffled'}"
                record[name] = {key: _compute_range([run[key] for run in runs]) for key in ("balance", "longest_s")}
                print(f"even    {name:<24} balance {record[name]['balance']}", flush=True)
        return record

    def measure_sorted(self) -> dict[str, Any]:
        record = {}
        for kind in ("chat", "reasoning"):
            data = self.write_rows(kind, is_sorted=True)
            ways = {
                "static": lambda data=data: self.time_static_shards(data),
                "dpgen": lambda data=data: self.run_dpgen(data)["longest_s"],
            }
            seconds = measure_in_turn(ways, self.options.rounds)
            ratio = compute_ratio(seconds["static"], seconds["dpgen"])
            record[kind] = {"static_over_dpgen": ratio, "seconds": seconds}
            print(f"sorted  {kind:<24} static over dpgen {ratio}", flush=True)
        return record

    def measure_slow(self) -> dict[str, Any]:
        data = self.write_rows("chat", is_sorted=False)
        runs = [self.run_dpgen(data, slow_rank=1) for _ in range(self.options.rounds)]
        record = {
            "balance": _compute_range([run["balance"] for run in runs]),
            "slow_ranks_share_of_tokens": _compute_range([run["tokens"][1] / sum(run["tokens"]) for run in runs]),
        }
        print(f"slow    {'chat, shuffled':<24} {record}", flush=True)
        return record

    def write_rows(self, kind: str, is_sorted: bool) -> Path:
        rows = make_rows(kind, self.options.rows, self.options.longest, is_sorted=is_sorted)
        return write_rows(self.work_dir / f"{kind.replace(':', '-')}-{is_sorted}.jsonl", rows)

    def run_dpgen(self, data: Path, slow_rank: int | None = None) -> dict[str, Any]:
        """Run dpgen on two ranks; return both ranks' busy seconds and tokens, and the balance."""
        self.num_runs += 1
        run_dir = self.work_dir / f"run-{self.num_runs}"
        config = build_job_settings(run_dir, self.model, data, self.engine)
        config += ["run.seed=null", *self.options.set]
        is_done = threading.Event()
        if slow_rank is not None:
            threading.Thread(target=_slow_down, args=(str(run_dir), slow_rank, is_done), daemon=True).start()
        wall_s = time_dpgen(2, config, run_dir.with_suffix(".log"), HF_HOME=str(self.work_dir / "hf"))
        is_done.set()
        return {**read_run(run_dir), "wall_s": wall_s}

    def time_static_shards(self, data: Path) -> float:
        """Return the slowest rank's seconds of generating contiguous chunks."""
        self.num_runs += 1
        out = self.work_dir / f"static-{self.num_runs}"
        program = [str(REPO / "benchmarks" / "static_shards.py"), str(data), str(out), str(self.model)]
        command = [*build_torchrun_command(2), *program, json.dumps(self.engine), "contiguous"]
        time_command(command, out.with_suffix(".log"))
        return max(float(path.read_text()) for path in out.glob("*.seconds"))


def _slow_down(run_dir: str, rank: int, is_done: threading.Event) -> None:
    """Stop the engine process of one rank half of the time, from its start until `is_done`."""
    engine = None
    while not is_done.wait(0.2) and engine is None:
        engine = find_engine(run_dir, rank)
    with contextlib.suppress(ProcessLookupError):
        while engine is not None and not is_done.is_set():
            os.kill(engine, signal.SIGSTOP)
            time.sleep(_STOPPED_S)
            os.kill(engine, signal.SIGCONT)
            time.sleep(_STOPPED_S)


def _compute_range(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


if __name__ == "__main__":
    main()
