"""From the command to the first request: how much longer than vLLM itself takes, and how long `--help` takes.

    python benchmarks/startup.py [--rounds 5] [--model DIR]

Alternately a script that makes an `LLM`, and dpgen, alone and as one rank under torchrun (whose own start is not
counted as dpgen's: a script under torchrun waits for it, too). Timed from the start of the process until the model is
loaded and requests can go to it.

A table for people, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import REPO, TINY_ENGINE, interleaved, machine, tiny_model, write_rows

_BARE = (
    "import json, sys; from vllm import LLM; LLM(sys.argv[1], **json.loads(sys.argv[2])); print('ready', flush=True)"
)
_TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", help="a folder; the tests' tiny model by default")
    parser.add_argument("--engine", help="engine options as JSON")
    parser.add_argument("--dir", help="where to write; the system's temporary folder by default")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.dir))
    try:
        found = measure(options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"benchmark": "startup", **machine(), "found": found}))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model = Path(options.model) if options.model else tiny_model(folder)
    engine = options.engine or json.dumps(TINY_ENGINE)
    data = write_rows(folder / "rows.jsonl", [{"prompt": f"hello {number}"} for number in range(100)])
    number = 0

    def dpgen(*launcher: str) -> float:
        nonlocal number
        number += 1
        words = [f"run.dir={folder}/run-{number}", f"model={model}", f"data.path={data}", "data.prompt_column=prompt"]
        command = [*launcher, "-m", "dpgen", "run", *words, "sampling.max_tokens=5", f"engine={engine}"]
        return until(command, "ready after", folder / "log")

    ways = {
        "LLM(...)": lambda: until(["-c", _BARE, str(model), engine], "ready", folder / "log"),
        "LLM(...), torchrun": lambda: until(
            [*_TORCHRUN, str(write_script(folder)), str(model), engine], "ready", folder / "log"
        ),
        "dpgen": dpgen,
        "dpgen, torchrun": lambda: dpgen(*_TORCHRUN),
        "dpgen run --help": lambda: until(["-m", "dpgen", "run", "--help"], "", folder / "log"),
    }
    for way in ways.values():
        way()  # fills caches
    seconds = interleaved(ways, options.rounds)
    print(f"{'way':<22} {'seconds':>8} {'more than LLM(...)':>20}")
    added: dict[str, float] = {}
    for name, each in seconds.items():
        peer = {"dpgen": "LLM(...)", "dpgen, torchrun": "LLM(...), torchrun"}.get(name)
        if peer:
            added[name] = round(statistics.median(a - b for a, b in zip(each, seconds[peer], strict=True)), 2)
        print(f"{name:<22} {statistics.median(each):>8.2f} {added.get(name, ''):>20}")
    return {"seconds": seconds, "added_s": added}


def write_script(folder: Path) -> Path:
    path = folder / "bare.py"
    path.write_text(_BARE.replace("; ", "\n") + "\n")
    return path


def until(arguments: Sequence[str], words: str, log: Path) -> float:
    """Seconds until a program prints some words, or ends if there are none to wait for; then waits for its end."""
    own = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPO), "VLLM_LOGGING_LEVEL": "ERROR"}
    own |= {"PYTHONUNBUFFERED": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    started_s, seconds = time.monotonic(), None
    process = subprocess.Popen(
        [sys.executable, *arguments], env=own, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    with log.open("w") as copy:
        for line in process.stdout:
            copy.write(line)
            if words and seconds is None and words in line:
                seconds = time.monotonic() - started_s
    if process.wait() != 0 or (words and seconds is None):
        sys.exit(log.read_text())
    return time.monotonic() - started_s if seconds is None else seconds


if __name__ == "__main__":
    main()
