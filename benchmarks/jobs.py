"""The whole job, from command to result, next to what else there is: vLLM's run_batch, and torchrun with static shards.

    python benchmarks/jobs.py [--rows 1500] [--rounds 5] [--ray-python PYTHON]

The same rows with heavy-tailed lengths, the same model and engine options, the same two cores; each way starts from
nothing, loads, generates and writes its result. Ways: dpgen on two ranks; static_shards.py on two ranks; run_batch, one
engine on both cores (which takes chats, not plain prompts); with --ray-python, a Python that has vLLM and ray[data],
Ray Data LLM with two replicas, a thread each (ray_llm.py).

A table for people, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import REPO, TINY_ENGINE, interleaved, machine, ratio, timed, tiny_model, torchrun, workload, write_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", default="dpgen,static,run_batch")
    parser.add_argument("--ray-python", help="measures Ray Data LLM, too, in this Python's environment")
    parser.add_argument("--dir", help="where to write; the system's temporary folder by default")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.dir))
    try:
        model = tiny_model(folder)
        rows = workload("reasoning", options.rows, 1024)
        data = write_rows(folder / "rows.jsonl", rows)
        ways = {
            "dpgen": lambda: _dpgen(folder, model, data),
            "static": lambda: _static(folder, model, data),
            "run_batch": lambda: _run_batch(folder, model, rows),
            "ray": lambda: _ray(folder, model, data, options.ray_python),
        }
        names = options.ways.split(",") + (["ray"] if options.ray_python else [])
        seconds = interleaved({name: ways[name] for name in names}, options.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found: dict[str, Any] = {"seconds": seconds}
    print(f"{'way':<12} {'seconds':>9} {'dpgen is faster by':>28}")
    for name, each in seconds.items():
        found[f"{name}_over_dpgen"] = faster = ratio(each, seconds["dpgen"])
        shown = f"{faster['median']:.2f} ({faster['min']:.2f} to {faster['max']:.2f})"
        print(f"{name:<12} {sorted(each)[len(each) // 2]:>9.1f} {shown:>28}")
    print(json.dumps({"benchmark": "jobs", **machine(), "found": found}))


def _fresh(folder: Path, name: str) -> Path:
    path = folder / name
    shutil.rmtree(path, ignore_errors=True)
    return path


def _dpgen(folder: Path, model: Path, data: Path) -> float:
    run_dir = _fresh(folder, "run")
    words = [f"run.dir={run_dir}", f"model={model}", f"data.path={data}", "data.prompt_column=prompt"]
    words += ["sampling.ignore_eos=true", "sampling.temperature=1.0", "sampling.from_columns={max_tokens: budget}"]
    return torchrun(2, [*words, f"engine={json.dumps(TINY_ENGINE)}"], folder / "dpgen.log", HF_HOME=str(folder / "hf"))


def _static(folder: Path, model: Path, data: Path) -> float:
    out = _fresh(folder, "static")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = [str(REPO / "benchmarks" / "static_shards.py"), str(data), str(out), str(model), json.dumps(TINY_ENGINE)]
    return timed([*launcher, *program], folder / "static.log")


def _ray(folder: Path, model: Path, data: Path, python: str) -> float:
    program = [str(REPO / "benchmarks" / "ray_llm.py"), str(data), str(_fresh(folder, "ray")), str(model)]
    own = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
    return timed([python, *program, json.dumps(TINY_ENGINE), "2"], folder / "ray.log", **own)


def _run_batch(folder: Path, model: Path, rows: list[dict[str, Any]]) -> float:
    def request(number: int, row: dict[str, Any]) -> dict[str, Any]:
        messages = [{"role": "user", "content": row["prompt"]}]
        body = {"model": str(model), "messages": messages, "max_tokens": row["budget"], "ignore_eos": True}
        return {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}

    source = write_rows(folder / "batch.jsonl", [request(number, row) for number, row in enumerate(rows)])
    options = []
    for name, value in TINY_ENGINE.items():
        flag = "--" + name.replace("_", "-")
        options += (
            [flag if value is True else flag.replace("--", "--no-", 1)]
            if isinstance(value, bool)
            else [flag, str(value)]
        )
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.run_batch",
        "-i",
        str(source),
        "-o",
        str(folder / "batch.out"),
    ]
    own = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2", "VLLM_LOGGING_LEVEL": "ERROR"}
    seconds = timed([*command, "--model", str(model), *options], folder / "batch.log", **own)
    written = (folder / "batch.out").read_text().splitlines()
    if len(written) != len(rows):
        sys.exit((folder / "batch.log").read_text())
    return seconds


if __name__ == "__main__":
    main()
