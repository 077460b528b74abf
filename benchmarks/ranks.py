"""Two ranks and the real engine: are both busy to the end, and how much faster is that than static pieces?

    python benchmarks/ranks.py [--scenes even,sorted,slow] [--rows 1500] [--rounds 5]
    python benchmarks/ranks.py --model DIR --engine '{"dtype": "bfloat16", ...}' --set parallel.share_devices=true

Whole `torchrun -m dpgen run`s with two ranks, a core each (or sharing a GPU). Scenes:
even    every workload, shuffled and sorted by length: the mean over the longest of the ranks' busy times
sorted  the file sorted by length, against static contiguous pieces (static_shards.py): the slowest rank's time
slow    the engine of one rank stopped half of the time (SIGSTOP and SIGCONT, 20 ms each)

A table for people, and one JSON line last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from measure import REPO, TINY_ENGINE, interleaved, machine, ratio, timed, tiny_model, torchrun, workload, write_rows

_DUTY_S = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", default="even,sorted,slow")
    parser.add_argument("--workloads", default="constant:64,chat,reasoning")
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--longest", type=int, default=1024)
    parser.add_argument("--model")
    parser.add_argument("--engine", help="engine options as JSON")
    parser.add_argument("--set", action="append", default=[], help="a further key=value for dpgen")
    parser.add_argument("--dir", help="where to write; the system's temporary folder by default")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.dir))
    try:
        bench = Bench(options, folder)
        found = {scene: getattr(bench, scene)() for scene in options.scenes.split(",")}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"benchmark": "ranks", **machine(), "found": found}))


class Bench:
    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.model = Path(options.model) if options.model else tiny_model(folder)
        self.engine: dict[str, Any] = json.loads(options.engine) if options.engine else TINY_ENGINE
        self.number = 0

    def dpgen(self, rows: Path, *settings: str, slow_rank: int | None = None) -> dict[str, Any]:
        """A run's own account: busy seconds of each rank, and what follows from them."""
        self.number += 1
        run_dir = self.folder / f"run-{self.number}"
        words = [f"run.dir={run_dir}", f"model={self.model}", f"data.path={rows}", "data.prompt_column=prompt"]
        words += ["sampling.ignore_eos=true", "sampling.temperature=1.0", "sampling.from_columns={max_tokens: budget}"]
        words += [f"engine={json.dumps(self.engine)}", "run.seed=null", *self.options.set, *settings]
        done = threading.Event()
        if slow_rank is not None:
            threading.Thread(target=_slow_down, args=(str(run_dir), slow_rank, done), daemon=True).start()
        wall_s = torchrun(2, words, run_dir.with_suffix(".log"), HF_HOME=str(self.folder / "hf"))
        done.set()
        ranks = json.loads((run_dir / "run.json").read_text())["manifests"]
        busy_s = [each["busy_s"] for each in ranks]
        tokens = [each["num_generated_tokens"] for each in ranks]
        return {
            "busy_s": busy_s,
            "balance": sum(busy_s) / (2 * max(busy_s)),
            "longest_s": max(busy_s),
            "wall_s": wall_s,
            "tokens": tokens,
        }

    def static(self, rows: Path) -> float:
        """The slowest rank's seconds of generating, with contiguous pieces."""
        self.number += 1
        out = self.folder / f"static-{self.number}"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        program = [str(REPO / "benchmarks" / "static_shards.py"), str(rows), str(out), str(self.model)]
        timed([*launcher, *program, json.dumps(self.engine), "contiguous"], out.with_suffix(".log"))
        return max(float(each.read_text()) for each in out.glob("*.seconds"))

    def rows(self, kind: str, is_sorted: bool) -> Path:
        rows = workload(kind, self.options.rows, self.options.longest, is_sorted=is_sorted)
        return write_rows(self.folder / f"{kind.replace(':', '-')}-{is_sorted}.jsonl", rows)

    def even(self) -> dict[str, Any]:
        found = {}
        for kind in self.options.workloads.split(","):
            for is_sorted in (False, True):
                rows = self.rows(kind, is_sorted)
                runs = [self.dpgen(rows) for _ in range(self.options.rounds)]
                balances = [each["balance"] for each in runs]
                name = f"{kind}, {'sorted' if is_sorted else 'shuffled'}"
                found[name] = {"balance": _spread(balances), "longest_s": _spread([each["longest_s"] for each in runs])}
                print(f"even    {name:<24} balance {found[name]['balance']}", flush=True)
        return found

    def sorted(self) -> dict[str, Any]:
        found = {}
        for kind in ("chat", "reasoning"):
            rows = self.rows(kind, is_sorted=True)
            ways = {
                "static": lambda rows=rows: self.static(rows),
                "dpgen": lambda rows=rows: self.dpgen(rows)["longest_s"],
            }
            seconds = interleaved(ways, self.options.rounds)
            found[kind] = {"static_over_dpgen": ratio(seconds["static"], seconds["dpgen"]), "seconds": seconds}
            print(f"sorted  {kind:<24} static over dpgen {found[kind]['static_over_dpgen']}", flush=True)
        return found

    def slow(self) -> dict[str, Any]:
        runs = [self.dpgen(self.rows("chat", is_sorted=False), slow_rank=1) for _ in range(self.options.rounds)]
        found = {
            "balance": _spread([each["balance"] for each in runs]),
            "slow_ranks_share_of_tokens": _spread([each["tokens"][1] / sum(each["tokens"]) for each in runs]),
        }
        print(f"slow    {'chat, shuffled':<24} {found}", flush=True)
        return found


def _slow_down(run_dir: str, rank: int, done: threading.Event) -> None:
    """Stops the engine process of one rank half of the time, from when it has been started until `done`."""
    engine = None
    while not done.wait(0.2) and engine is None:
        engine = _engine_of(run_dir, rank)
    with contextlib.suppress(ProcessLookupError):
        while engine is not None and not done.is_set():
            os.kill(engine, signal.SIGSTOP)
            time.sleep(_DUTY_S)
            os.kill(engine, signal.SIGCONT)
            time.sleep(_DUTY_S)


def _engine_of(run_dir: str, rank: int) -> int | None:
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            variables = (entry / "environ").read_bytes().split(b"\0")
            if f"run.dir={run_dir}".encode() in words and f"RANK={rank}".encode() in variables:
                for child in (entry / "task" / entry.name / "children").read_text().split():
                    return int(child)
    return None


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


if __name__ == "__main__":
    main()
