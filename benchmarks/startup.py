"""Measure the time from the command to the first request, compared with vLLM's own, and the time of `--help`.

    python benchmarks/startup.py [--rounds 5] [--model DIR]

Runs a script that makes an `LLM`, and dpgen, in turn: alone, and as one rank under torchrun. torchrun's own start does
not count as dpgen's, since a script under torchrun waits for it, too. Timed from the start of the process until the
model is loaded and requests can go to it.

Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import REPO, TINY_ENGINE, make_parser, make_tiny_model, measure_in_turn, run_benchmark, write_rows

_SCRIPT = (
    "import json, sys; from vllm import LLM; LLM(sys.argv[1], **json.loads(sys.argv[2])); print('ready', flush=True)"
)
_TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", help="a directory; the tests' tiny model by default")
    parser.add_argument("--engine", help="engine options as JSON")
    options = parser.parse_args()
    run_benchmark("startup", options.dir, lambda work_dir: measure(options, work_dir))


def measure(options: argparse.Namespace, work_dir: Path) -> dict[str, Any]:
    model = str(options.model or make_tiny_model(work_dir))
    engine = options.engine or json.dumps(TINY_ENGINE)
    data = write_rows(work_dir / "rows.jsonl", [{"prompt": f"hello {number}"} for number in range(100)])
    script, log = write_script(work_dir), work_dir / "log"
    num_runs = 0

    def start_dpgen(*launcher: str) -> float:
        nonlocal num_runs
        num_runs += 1
        run_dir = work_dir / f"run-{num_runs}"
        config = [f"run.dir={run_dir}", f"model={model}", f"data.path={data}", "data.prompt_column=prompt"]
        command = [*launcher, "-m", "dpgen", "run", *config, "sampling.max_tokens=5", f"engine={engine}"]
        return time_until(command, "ready after", log)

    ways = {
        "LLM(...)": lambda: time_until(["-c", _SCRIPT, model, engine], "ready", log),
        "LLM(...), torchrun": lambda: time_until([*_TORCHRUN, str(script), model, engine], "ready", log),
        "dpgen": start_dpgen,
        "dpgen, torchrun": lambda: start_dpgen(*_TORCHRUN),
        "dpgen run --help": lambda: time_until(["-m", "dpgen", "run", "--help"], "", log),
    }
    for way in ways.values():
        way()  # a warm-up: fills caches
    seconds = measure_in_turn(ways, options.rounds)
    return {"seconds": seconds, "added_s": print_table(seconds)}


def print_table(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Print each way's time, and return the seconds that dpgen's take beyond the script's."""
    scripts = {"dpgen": "LLM(...)", "dpgen, torchrun": "LLM(...), torchrun"}
    print(f"{'way':<22} {'seconds':>8} {'more than LLM(...)':>20}")
    added_s: dict[str, float] = {}
    for name, times_s in seconds.items():
        if name in scripts:
            pairs = zip(times_s, seconds[scripts[name]], strict=True)
            added_s[name] = round(statistics.median(own_s - script_s for own_s, script_s in pairs), 2)
        print(f"{name:<22} {statistics.median(times_s):>8.2f} {added_s.get(name, ''):>20}")
    return added_s


def write_script(work_dir: Path) -> Path:
    path = work_dir / "script.py"
    path.write_text(_SCRIPT.replace("; ", "\n") + "\n")
    return path


def time_until(arguments: Sequence[str], text: str, log: Path) -> float:
    """Return the seconds until a Python program prints `text`, or exits if `text` is empty; then wait for its exit."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPO), "VLLM_LOGGING_LEVEL": "ERROR"}
    env |= {"PYTHONUNBUFFERED": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    started_s, seconds = time.monotonic(), None
    process = subprocess.Popen(
        [sys.executable, *arguments], env=env, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    with log.open("w") as copy:
        for line in process.stdout:
            copy.write(line)
            if text and seconds is None and text in line:
                seconds = time.monotonic() - started_s
    if process.wait() != 0 or (text and seconds is None):
        sys.exit(log.read_text())
    return time.monotonic() - started_s if seconds is None else seconds


if __name__ == "__main__":
    main()
