"""Compare whole jobs, from command to result: dpgen, vLLM's run_batch, torchrun with static shards, Ray Data LLM.

    python benchmarks/jobs.py [--rows 1500] [--rounds 5] [--ray-python PYTHON]

The same rows with heavy-tailed lengths, the same model and engine options, the same two cores. Each way starts from
scratch: it loads, generates and writes its result. The ways are:
- dpgen on two ranks
- static_shards.py on two ranks
- run_batch, one engine on both cores (it takes chats, not plain prompts)
- Ray Data LLM with two replicas of one thread each (ray_llm.py); needs --ray-python, a Python with vLLM and ray[data]

Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from measure import (
    REPO,
    TINY_ENGINE,
    build_job_settings,
    build_torchrun_command,
    compute_ratio,
    make_parser,
    make_rows,
    make_tiny_model,
    measure_in_turn,
    run_benchmark,
    time_command,
    time_dpgen,
    write_rows,
)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", default="dpgen,static,run_batch")
    parser.add_argument("--ray-python", help="measure Ray Data LLM, too, in this Python's environment")
    options = parser.parse_args()
    run_benchmark("jobs", options.dir, lambda work_dir: measure(options, work_dir))


def measure(options: argparse.Namespace, work_dir: Path) -> dict[str, Any]:
    model = make_tiny_model(work_dir)
    rows = make_rows("reasoning", options.rows, 1024)
    data = write_rows(work_dir / "rows.jsonl", rows)
    ways = {
        "dpgen": lambda: _time_dpgen(work_dir, model, data),
        "static": lambda: _time_static_shards(work_dir, model, data),
        "run_batch": lambda: _time_run_batch(work_dir, model, rows),
        "ray": lambda: _time_ray(work_dir, model, data, options.ray_python),
    }
    names = options.ways.split(",") + (["ray"] if options.ray_python else [])
    seconds = measure_in_turn({name: ways[name] for name in names}, options.rounds)
    record: dict[str, Any] = {"seconds": seconds}
    print(f"{'way':<12} {'seconds':>9} {'dpgen is faster by':>28}")
    for name, times_s in seconds.items():
        record[f"{name}_over_dpgen"] = ratio = compute_ratio(times_s, seconds["dpgen"])
        faster_by = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        print(f"{name:<12} {sorted(times_s)[len(times_s) // 2]:>9.1f} {faster_by:>28}")
    return record


def _make_fresh_path(work_dir: Path, name: str) -> Path:
    path = work_dir / name
    shutil.rmtree(path, ignore_errors=True)
    return path


def _time_dpgen(work_dir: Path, model: Path, data: Path) -> float:
    run_dir = _make_fresh_path(work_dir, "run")
    config = build_job_settings(run_dir, model, data, TINY_ENGINE)
    return time_dpgen(2, config, work_dir / "dpgen.log", HF_HOME=str(work_dir / "hf"))


def _time_static_shards(work_dir: Path, model: Path, data: Path) -> float:
    out = _make_fresh_path(work_dir, "static")
    program = [str(REPO / "benchmarks" / "static_shards.py"), str(data), str(out), str(model), json.dumps(TINY_ENGINE)]
    return time_command([*build_torchrun_command(2), *program], work_dir / "static.log")


def _time_ray(work_dir: Path, model: Path, data: Path, python: str) -> float:
    out = _make_fresh_path(work_dir, "ray")
    program = [str(REPO / "benchmarks" / "ray_llm.py"), str(data), str(out), str(model)]
    env: dict[str, Any] = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
    return time_command([python, *program, json.dumps(TINY_ENGINE), "2"], work_dir / "ray.log", **env)


def _time_run_batch(work_dir: Path, model: Path, rows: list[dict[str, Any]]) -> float:
    requests = [_make_batch_request(model, number, row) for number, row in enumerate(rows)]
    source, out = write_rows(work_dir / "batch.jsonl", requests), work_dir / "batch.out"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.run_batch", "-i", str(source), "-o", str(out)]
    command += ["--model", str(model)]
    for name, value in TINY_ENGINE.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            command.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            command += [flag, str(value)]
    env: dict[str, Any] = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2", "VLLM_LOGGING_LEVEL": "ERROR"}
    seconds = time_command(command, work_dir / "batch.log", **env)
    if len(out.read_text().splitlines()) != len(rows):
        sys.exit((work_dir / "batch.log").read_text())
    return seconds


def _make_batch_request(model: Path, number: int, row: dict[str, Any]) -> dict[str, Any]:
    messages = [{"role": "user", "content": row["prompt"]}]
    body = {"model": str(model), "messages": messages, "max_tokens": row["budget"], "ignore_eos": True}
    return {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}


if __name__ == "__main__":
    main()
