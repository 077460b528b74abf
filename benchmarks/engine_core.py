"""Measure the engine process's own work for each token: the processor time of `VllmBackend`, step by step.

    python benchmarks/engine_core.py [--seqs 64] [--tokens 128] [--rounds 7] [--device cpu] [--model DIR]

vLLM in this process, all sequences in step: no rank, no pipe. With the tests' tiny model Python is most of the time.
Ways, in turn in every round:
- plain: vLLM as it is
- hooks: with the hooks of dpgen/engine/vllm/hooks/hot_path.py, as in every run
- seeded: the same, with a seed for every row, as in every run whose run.seed is not null
- seeded plain: with seeds, without the hooks

Prints microseconds of processor time (--device gpu: of wall-clock time) a token: of all, and of what is not the model
runner's, since that is what the hooks can save. Also how often and how long Python collected garbage. One JSON line
last.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import os
import pstats
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import TINY_ENGINE, compute_ratio, make_parser, make_tiny_model, measure_in_turn, run_benchmark

_WARM_UP_STEPS = 8


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seqs", type=int, default=64, help="sequences that run at a time")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each sequence")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--model", type=Path, help="see random_model.py; the tests' tiny model by default")
    parser.add_argument("--engine", type=json.loads, default={}, help="further engine options, as JSON")
    parser.add_argument("--ways", default="plain,hooks,seeded")
    parser.add_argument("--profile", type=Path, help="also write a profile of the way `hooks` to this file")
    options = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    if options.device == "cpu":
        os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])  # before torch counts the cores
        os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    settings = {name: getattr(options, name) for name in ("seqs", "prompt", "tokens", "rounds", "device")}
    run_benchmark("engine_core", options.dir, lambda work_dir: Bench(options, work_dir).measure(), **settings)


class Bench:
    """Step one engine through the same rows again and again."""

    def __init__(self, options: argparse.Namespace, work_dir: Path) -> None:
        from dpgen.engine.messages import EngineSpec, EngineTextConfig
        from dpgen.engine.vllm.vllm_backend import VllmBackend

        self.options = options
        model = options.model or make_tiny_model(work_dir)
        engine = {} if options.model else dict(TINY_ENGINE)
        engine |= {"max_num_seqs": options.seqs, **options.engine}
        sampling = {"temperature": 1.0, "ignore_eos": True, "max_tokens": options.tokens}
        self.backend = VllmBackend(EngineSpec("vllm", str(model), engine, sampling, ("seed",)))
        self.backend.check_options()
        self.info = self.backend.load(lambda measured: measured)
        self.backend.prepare_job(EngineTextConfig(skip_detokenize=True))
        assert self.backend._engine is not None
        self.engine = self.backend._engine
        self.hooks = self.backend._hooks
        self.num_rows, self.runner_s = 0, 0.0
        self.outside_us: dict[str, list[float]] = {}
        self.clock = time.perf_counter if options.device == "gpu" else time.process_time
        executor = self.engine.engine_core.engine_core.model_executor  # type: ignore[attr-defined]
        for name in ("execute_model", "sample_tokens"):
            setattr(executor, name, self._time_runner(getattr(executor, name)))
        self.num_collections, self.collecting_s, self._began_s = 0, 0.0, 0.0
        gc.callbacks.append(self._count_collection)

    def measure(self) -> dict[str, Any]:
        ways: dict[str, Callable[[], float]] = {
            "plain": lambda: self.run("plain", has_hooks=False),
            "hooks": lambda: self.run("hooks"),
            "seeded": lambda: self.run("seeded", is_seeded=True),
            "seeded plain": lambda: self.run("seeded plain", is_seeded=True, has_hooks=False),
        }
        self.run("hooks")  # fills caches
        self.outside_us.clear()
        self.num_collections, self.collecting_s = 0, 0.0
        chosen = {name: ways[name] for name in self.options.ways.split(",")}
        us = measure_in_turn(chosen, self.options.rounds)
        if self.options.profile:
            self.run("profile", profile=self.options.profile)
        first, outside = next(iter(us)), self.outside_us
        return {
            "versions": self.info.versions,
            "us_per_token": {name: round(statistics.median(values), 2) for name, values in us.items()},
            "outside_runner": {name: round(statistics.median(outside[name]), 2) for name in us},
            f"over_{first}": {name: compute_ratio(us[name], us[first]) for name in us if name != first},
            f"outside_runner_over_{first}": {
                name: compute_ratio(outside[name], outside[first]) for name in us if name != first
            },
            "garbage_collections": self.num_collections,
            "garbage_collection_s": round(self.collecting_s, 4),
        }

    def run(self, way: str, *, is_seeded: bool = False, has_hooks: bool = True, profile: Path | None = None) -> float:
        """Generate all tokens of one batch; return microseconds for each token of its steps without a prompt."""
        from dpgen.records import Request, RequestId

        for hook in self.hooks:
            hook.install() if has_hooks else hook.remove()
        self.engine.reset_prefix_cache()
        prompts = random.Random(self.num_rows)
        for _ in range(self.options.seqs):
            self.num_rows += 1
            prompt = [prompts.randrange(3, 256) for _ in range(self.options.prompt)]
            sampling = {"seed": self.num_rows if is_seeded else None}
            self.backend.add_request(Request(RequestId(self.num_rows), prompt, None, sampling))
        scheduler = self.engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]
        num_finished = 0
        while scheduler.get_request_counts()[1]:
            num_finished += len(self.backend.step())
        for _ in range(_WARM_UP_STEPS):
            num_finished += len(self.backend.step())
        num_before = self.backend.stats().num_generated_tokens
        profiler = cProfile.Profile()
        if profile is not None:
            profiler.enable()
        self.runner_s, began_s = 0.0, self.clock()
        while num_finished < self.options.seqs:
            num_finished += len(self.backend.step())
        seconds = self.clock() - began_s
        if profile is not None:
            profiler.disable()
            with profile.open("w") as out:
                pstats.Stats(profiler, stream=out).sort_stats("tottime").print_stats(50)
        num_tokens = self.backend.stats().num_generated_tokens - num_before
        self.outside_us.setdefault(way, []).append(1e6 * (seconds - self.runner_s) / num_tokens)
        return 1e6 * seconds / num_tokens

    def _time_runner(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began_s = self.clock()
            try:
                return call(*args, **kwargs)
            finally:
                self.runner_s += self.clock() - began_s

        return timed

    def _count_collection(self, phase: str, _: Any) -> None:
        if phase == "start":
            self._began_s = time.perf_counter()
        else:
            self.num_collections += 1
            self.collecting_s += time.perf_counter() - self._began_s


if __name__ == "__main__":
    main()
