"""Measure where the time of an engine's step goes: wall clock, processor, and kernels on the GPU.

    python benchmarks/step_profile.py MODEL --engine '{"load_format": "dummy", ...}' [--sequences 256] [--seeds]

dpgen's engine, in this process, with its own options: prompts of 300 tokens, 60 to 260 tokens generated, all sequences
running. First without a profiler, for the step's own time, then with torch's, for the kernels (on a GPU).

Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable
from typing import Any

_PROMPT_TOKENS = 300
_WARM_UP_STEPS, _TIMED_STEPS, _PROFILED_STEPS = 60, 200, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--engine", default="{}", help="engine options as JSON")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--seeds", action="store_true", help="give each row a seed")
    options = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    engine = {**json.loads(options.engine), "max_num_seqs": options.sequences}
    print("PROFILE", json.dumps(profile_steps(options.model, engine, has_seeds=options.seeds)), flush=True)


def profile_steps(model: str, engine: dict[str, Any], *, has_seeds: bool) -> dict[str, Any]:
    """Return the milliseconds of a step, its processor time and its kernels, and the fraction that the GPU is busy."""
    import torch

    from dpgen.engine.messages import EngineSpec, EngineTextConfig
    from dpgen.engine.vllm.vllm_backend import VllmBackend

    sampling = {"temperature": 1.0, "ignore_eos": True}
    backend = VllmBackend(EngineSpec("vllm", model, engine, sampling, ("max_tokens", "seed")))
    backend.check_options()
    backend.load(lambda measured: measured)
    backend.prepare_job(EngineTextConfig(skip_detokenize=True))
    _add_requests(backend, engine["max_num_seqs"], has_seeds=has_seeds)
    wait: Callable[[], None] = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def run_steps(count: int) -> tuple[float, float]:
        """Return milliseconds a step: of wall clock, and of this process's processor time."""
        wait()
        started_s, processor_s = time.perf_counter(), time.process_time()
        for _ in range(count):
            backend.step()
        wait()
        spent_s, spent_processor_s = time.perf_counter() - started_s, time.process_time() - processor_s
        return 1e3 * spent_s / count, 1e3 * spent_processor_s / count

    run_steps(_WARM_UP_STEPS)
    step_ms, processor_ms = run_steps(_TIMED_STEPS)
    measured: dict[str, Any] = {
        "sequences": engine["max_num_seqs"],
        "seeds": has_seeds,
        "step_ms": round(step_ms, 2),
        "processor_ms": round(processor_ms, 2),
    }
    if torch.cuda.is_available():
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            profiled_ms, _ = run_steps(_PROFILED_STEPS)
        events = profiler.key_averages()
        kernels_ms = sum(event.self_device_time_total for event in events) / _PROFILED_STEPS / 1e3
        measured |= {"profiled_step_ms": round(profiled_ms, 2), "kernels_ms": round(kernels_ms, 2)}
        measured["gpu_busy"] = round(kernels_ms / profiled_ms, 3)
    return measured


def _add_requests(backend: Any, count: int, *, has_seeds: bool) -> None:
    from dpgen.records import Request, RequestId

    tokens = random.Random(0)
    max_tokens = 2 * (_WARM_UP_STEPS + _TIMED_STEPS + _PROFILED_STEPS)  # none ends while it is timed
    for row in range(count):
        prompt = [tokens.randrange(2, 500) for _ in range(_PROMPT_TOKENS)]
        sampling = {"max_tokens": max_tokens} | ({"seed": row} if has_seeds else {})
        backend.add_request(Request(RequestId(row), prompt, None, sampling))


if __name__ == "__main__":
    main()
