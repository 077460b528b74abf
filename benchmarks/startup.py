"""Measure the time from the command to the first token, compared with vLLM's own, and the time of `--help`.

    python benchmarks/startup.py [--rounds 5] [--ranks 1,4] [--caches warm|cold|both] [--device cpu|gpu] [--model DIR]
        [--timeout 600]

Runs a script that only makes an `LLM` and generates one token, and dpgen on one row a rank, in turn, and both under
torchrun. torchrun's own start does not count as dpgen's, since a script under torchrun waits for it, too. With several
ranks the script is done when its last process is.

- `ready`: from the start of the command until the model is loaded and requests can go to it.
- `token`: until the first row is finished, of each rank; dpgen's is synced to the disk then.
- With cold caches, each run has empty ones of vLLM (compiled code), inductor, Triton and `datasets`. What the system
  holds of files in memory stays.
- `--against DIR` measures another checkout of dpgen in the same rounds: its `phases` come second.

Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from measure import REPO, TINY_ENGINE, make_parser, make_tiny_model, measure_in_turn, run_benchmark, write_rows

from dpgen.engine.starting.server_process import LAUNCHER_NAMES, LAUNCHER_PREFIXES

_SCRIPT = """
import json, os, sys
if "LOCAL_RANK" in os.environ:
    if sys.argv[3] == "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["LOCAL_RANK"]
    names, prefixes = json.loads(sys.argv[4])  # of the launcher: vLLM would join its world
    for name in [name for name in os.environ if name in names or name.startswith(tuple(prefixes))]:
        del os.environ[name]
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], **json.loads(sys.argv[2]))
    print("ready after", flush=True)
    llm.generate(["hello"], SamplingParams(max_tokens=1), use_tqdm=False)
    print("generated 1", flush=True)
    os._exit(0)
"""
_READY, _TOKEN = "ready after", "generated "  # what both ways print
_LLM, _DPGEN, _OTHER, _HELP = "LLM(...)", "dpgen", "dpgen before", "dpgen run --help"
_CACHES = {
    "VLLM_CACHE_ROOT": "vllm",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "HF_DATASETS_CACHE": "datasets",
    "XDG_CACHE_HOME": "other",
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", default="1", help="comma-separated; 0 is one process without torchrun")
    parser.add_argument("--caches", choices=("warm", "cold", "both"), default="warm")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--against", type=Path, help="the root of another checkout")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of dpgen; may be repeated")
    parser.add_argument("--model", help="a directory; the tests' tiny model by default")
    parser.add_argument("--engine", help="engine options as JSON")
    parser.add_argument("--stop-after", type=float, default=1e9, help="seconds after which no further round begins")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one start of one way may take")
    options = parser.parse_args()
    run_benchmark("startup", options.dir, lambda work_dir: measure(options, work_dir), device=options.device)


def measure(options: argparse.Namespace, work_dir: Path) -> dict[str, Any]:
    """Return seconds and ratios by caches, ranks and way."""
    started_s = time.monotonic()
    runs, found = Runs(options, work_dir), dict[str, Any]()
    for caches in ("cold", "warm") if options.caches == "both" else (options.caches,):
        for num_ranks in map(int, options.ranks.split(",")):
            ways = {_LLM: runs.make_script(num_ranks), _DPGEN: runs.make_dpgen(REPO, num_ranks)}
            if options.against is not None:
                ways[_OTHER] = runs.make_dpgen(options.against, num_ranks)
            name = f"{caches}, {num_ranks} rank(s)"
            if caches == "warm" and options.caches == "warm":
                for way_name, way in ways.items():
                    print(f"  warm-up: {way_name} {way(is_cold=False)[-1]:.2f}", file=sys.stderr, flush=True)
            found[name] = runs.measure(ways, caches, started_s + options.stop_after)
            print_table(name, found[name])
    found[_HELP] = time_until([sys.executable, "-m", "dpgen", "run", "--help"], [], work_dir / "log")[-1]
    print(f"{_HELP}: {found[_HELP]:.2f} s")
    return found


class Runs:
    """Make the ways to start, and time them.

    A warm start has the caches that the last cold one of its way filled. Where only warm ones are measured, all share
    the caches of the first.

    Attributes:
        phases: dpgen's lines on its phases so far.
    """

    def __init__(self, options: argparse.Namespace, work_dir: Path) -> None:
        self._options, self._work_dir, self._num_runs = options, work_dir, 0
        self._model = str(options.model or make_tiny_model(work_dir))
        self._engine = options.engine or json.dumps(TINY_ENGINE)
        self._script = work_dir / "script.py"
        self._script.write_text(_SCRIPT)
        self.phases: list[str] = []

    def measure(self, ways: Mapping[str, Callable[..., list[float]]], caches: str, deadline_s: float) -> dict[str, Any]:
        times_s: dict[str, list[list[float]]] = {name: [] for name in ways}

        def time_way(name: str) -> float:
            times_s[name].append(ways[name](is_cold=caches == "cold"))
            return times_s[name][-1][-1]

        for number in range(self._options.rounds):
            if time.monotonic() < deadline_s:
                print(f" {caches}, round {number + 1}", file=sys.stderr, flush=True)
                in_turn = list(ways) if number % 2 == 0 else list(ways)[::-1]
                measure_in_turn({name: functools.partial(time_way, name) for name in in_turn}, 1)
        return {"seconds": times_s, "over LLM": dict(compare(times_s)), "phases": self.phases[-2:]}

    def make_script(self, num_ranks: int) -> Callable[..., list[float]]:
        launcher_variables = json.dumps([sorted(LAUNCHER_NAMES), LAUNCHER_PREFIXES])
        command = [*launch(num_ranks), str(self._script), self._model, self._engine, self._options.device]
        command.append(launcher_variables)
        return lambda is_cold: self._time(command, "script", is_cold, count=max(1, num_ranks))

    def make_dpgen(self, repo: Path, num_ranks: int) -> Callable[..., list[float]]:
        rows = [{"prompt": f"hello {number}"} for number in range(max(1, num_ranks))]
        data = write_rows(self._work_dir / f"rows-{num_ranks}.jsonl", rows)

        def start(is_cold: bool) -> list[float]:
            run_dir = self._work_dir / f"run-{self._num_runs}"
            config = [f"run.dir={run_dir}", f"model={self._model}", f"data.path={data}", "data.prompt_column=prompt"]
            command = [*launch(num_ranks), "-m", "dpgen", "run", *config, f"engine={self._engine}"]
            return self._time([*command, "sampling.max_tokens=1", *self._options.set], repo.name, is_cold, repo)

        return start

    def _time(self, command: Sequence[str], kind: str, is_cold: bool, repo: Path = REPO, count: int = 1) -> list[float]:
        self._num_runs += 1
        caches = self._work_dir / "caches" / ("shared" if self._options.caches == "warm" else kind)
        if is_cold:
            shutil.rmtree(caches, ignore_errors=True)
        env = {name: str(caches / folder) for name, folder in _CACHES.items()}
        log = self._work_dir / "log"
        times_s = time_until(command, [_READY, _TOKEN], log, repo, count, env, self._options.timeout)
        phases = [line.strip() for line in log.read_text().splitlines() if f"{_READY} " in line]
        print("".join(f"    {line}\n" for line in phases), end="", file=sys.stderr, flush=True)
        self.phases += phases
        return times_s


def launch(num_ranks: int) -> list[str]:
    if num_ranks == 0:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]


def compare(times_s: Mapping[str, Sequence[Sequence[float]]]) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield each way's median ratios to the script of the same round: until ready, and until the first token."""
    for name, rounds in times_s.items():
        ratios = [
            [own_s / script_s for own_s, script_s in zip(own, script, strict=True)]
            for own, script in zip(rounds, times_s[_LLM], strict=True)
        ]
        columns = list(zip(*ratios, strict=True))
        if name != _LLM and columns:
            ready, token = (round(statistics.median(column), 3) for column in columns)
            yield name, {"ready": ready, "token": token}


def print_table(name: str, found: Mapping[str, Any]) -> None:
    print(f"{name}\n{'way':<22} {'ready':>8} {'token':>8} {'ready / LLM':>12} {'token / LLM':>12}")
    for way, rounds in found["seconds"].items():
        medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
        over = found["over LLM"].get(way, {})
        print(f"{way:<22} " + " ".join(f"{s:>8.2f}" for s in medians) + "".join(f" {r:>12.2f}" for r in over.values()))
    for line in found["phases"]:
        print(f"  {line}")
    sys.stdout.flush()


def time_until(
    command: Sequence[str],
    texts: Sequence[str],
    log: Path,
    repo: Path = REPO,
    count: int = 1,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 600.0,
) -> list[float]:
    """Return the seconds until a program prints each text, and until it exits; only the former if there are texts.

    If the program fails, prints less, or takes too long, exit and print its output.

    Args:
        repo: the root of the checkout whose dpgen it imports.
        count: the lines with a text that it prints; the last counts.
    """
    path = os.pathsep.join([str(repo), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "ERROR"}
    env |= {"PYTHONUNBUFFERED": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    env |= environment or {}
    started_s, seconds, lines = time.monotonic(), {text: list[float]() for text in texts}, list[str]()
    process = subprocess.Popen(
        command,
        env=env,
        cwd=repo,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )

    def read() -> None:
        for line in process.stdout or ():
            lines.append(line)
            for text in texts:
                if text in line:
                    seconds[text].append(time.monotonic() - started_s)

    reader = threading.Thread(target=read, daemon=True)  # a child that stays holds the pipe open
    reader.start()
    try:
        process.wait(timeout_s)
        how = f"status {process.returncode}"
    except subprocess.TimeoutExpired:
        how = f"no end within {timeout_s:.0f} s"
    finally:
        exited_s = time.monotonic() - started_s
        end_tree(process)
    reader.join(timeout=5)
    log.write_text("".join(lines))
    if process.returncode != 0 or any(len(times_s) < count for times_s in seconds.values()):
        found = ", ".join(f"{len(times_s)} of {count} {text!r}" for text, times_s in seconds.items())
        sys.exit(f"{''.join(lines)}{' '.join(command)}: {how}, {found}")
    return [times_s[count - 1] for times_s in seconds.values()] or [exited_s]


def end_tree(process: subprocess.Popen[str]) -> None:
    """End a process with all that it has started; torchrun's processes have sessions of their own."""
    children = list[psutil.Process]()
    if process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.kill()
    process.wait()


if __name__ == "__main__":
    main()
