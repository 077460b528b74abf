"""Count what a thousand ranks and a hundred million rows cost, and compare it with budgets.

    python benchmarks/scale.py [--only ranks,rows] [--json]

Real ranks on this machine show the law by which the traffic of forming a group grows. Stand-ins of up to 4,096 ranks
use the product's own functions on one real store (scale_ranks.py). Plans, a resumed shard and a result are made of
synthetic rows and journals (scale_rows.py). A figure is

counted   by the kernel or by Python's audit hooks, with as many ranks, rows or files as the line says
measured  in seconds, which depend on this machine; where it says so, processor time, which other work changes little
reckoned  from counted or measured figures, as the line says

Prints a table, and one JSON line last; `--json` prints that line alone. Ends with status 1 if a budget is missed.
`--counts-only` judges no seconds, for a machine that is busy with other work.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measure import REPO, make_parser, run_benchmark

_LARGE, _LARGEST = 1000, 4096  # ranks of the budgets
_MIN_RANKS_OF_LAW = 32  # of the largest real group: with fewer, how long ranks waited decides
_RESULT_ROWS = 100_000_000


@dataclass(frozen=True)
class Figure:
    """A line of the table.

    Attributes:
        budget: the most that it may be; None where there is no budget.
        how: "counted", "measured" or "reckoned".
    """

    name: str
    value: float
    unit: str
    how: str
    budget: float | None = None

    @property
    def is_missed(self) -> bool:
        return self.budget is not None and self.value > self.budget

    def __str__(self) -> str:
        budget = "" if self.budget is None else f"{self.budget:,g}"
        return f"{self.name:<86} {self.value:>12,.6g} {self.unit:<9} {budget:>7} {self.how:<9}" + (
            " MISSED" if self.is_missed else ""
        )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--only", default="ranks,rows")
    parser.add_argument("--processes", default="4,8,16,32,64", help="real ranks")
    parser.add_argument("--forming", type=int, default=_LARGE, help="stand-ins that form a group")
    parser.add_argument("--watched", type=int, default=_LARGEST, help="stand-ins whose leases rank 0 watches")
    parser.add_argument("--seconds", type=float, default=30.0, help="of watching them")
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of a plan")
    parser.add_argument("--segments", type=int, default=1024, help="segments of a result")
    parser.add_argument("--rows-per-segment", type=int, default=20)
    parser.add_argument("--counts-only", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures: list[Figure] = []

    def measure(work_dir: Path) -> list[dict[str, Any]]:
        parts = {"ranks": count_ranks, "rows": count_rows}
        for name in options.only.split(","):
            for figure in parts[name](options, work_dir):
                figures.append(figure)
                if not options.json:
                    print(figure, flush=True)
        return [asdict(figure) for figure in figures]

    if not options.json:
        print(f"{'':<86} {'':>12} {'':<9} {'budget':>7}")
    run_benchmark("scale", options.dir, measure, command=" ".join(["python", *sys.argv]))
    sys.exit(any(figure.is_missed and not (options.counts_only and figure.how == "measured") for figure in figures))


def count_ranks(options: argparse.Namespace, work_dir: Path) -> Iterator[Figure]:
    """Yield the figures of group formation, and of rank 0's main thread."""
    num_bytes = []
    for num_ranks in options.processes.split(","):
        group = _run("scale_ranks.py", "formation", num_ranks)
        num_bytes.append((group["ranks"], group["bytes"]))
        title = f"forming a group of {group['ranks']} real ranks"
        yield Figure(f"{title}: through rank 0's store", group["bytes"] / 1e3, "kB", "counted")
        yield Figure(f"{title}: messages to it", group["messages"], "", "counted")
        yield Figure(f"{title}: rank 0's files", group["rank_0_files"], "", "counted")
        yield Figure(f"{title}: time, on one machine", group["seconds"], "s", "measured")
    square, linear = _fit(num_bytes)
    law = f"{square:.1f} N^2 + {linear:.0f} N bytes"
    reckoned_mb = (square * _LARGE**2 + linear * _LARGE) / 1e6
    budget = 50 if num_bytes[-1][0] >= _MIN_RANKS_OF_LAW else None
    yield Figure(f"forming a group of {_LARGE:,}: through rank 0, by {law}", reckoned_mb, "MB", "reckoned", budget)
    group = _run("scale_ranks.py", "addresses", options.forming)
    title = f"forming a group of {group['ranks']:,} stand-ins"
    yield Figure(f"{title}: through rank 0's store", group["bytes"] / 1e6, "MB", "counted", 50)
    yield Figure(f"{title}: messages to it", group["messages"], "", "counted")
    yield Figure(f"{title}: rank 0's files, without gloo's", group["rank_0_files"], "", "counted")
    yield Figure(f"{title}: time, all on one machine", group["formation_s"], "s", "measured", 10)
    yield Figure(f"{title}: rank 0's main thread, processor time", group["formation_cpu_s"], "s", "measured")
    yield Figure(f"{title}: rank 0's process, its store included", group["formation_process_s"], "s", "measured")
    watched = _run("scale_ranks.py", "leases", options.watched, options.seconds)
    title = f"leases and totals of {watched['ranks']:,} stand-ins: rank 0's"
    busy = 100 * (watched["leases_fraction"] + watched["totals_fraction"])
    yield Figure(f"{title} main thread is busy, processor time", busy, "%", "measured", 2)
    waits = 100 * watched["wait_fraction"]
    yield Figure(f"{title} main thread, waits for the store and a core included", waits, "%", "measured")
    yield Figure(f"{title} loop of 100 turns a second", 100 * watched["loop_cpu_fraction"], "%", "measured")
    yield Figure(f"{title} files, without gloo's", watched["rank_0_files"], "", "counted")


def count_rows(options: argparse.Namespace, work_dir: Path) -> Iterator[Figure]:
    """Yield the figures of plans and of a resumed shard, in processor time, and of writing the result."""
    plans = _run("scale_rows.py", "reshard", options.rows, work_dir / "plans")
    for kind in ("dataset", "longest_first", "measured", "prefix"):
        title, plan = f"{plans['rows']:,} rows over {plans['ranks']:,} ranks, {kind}", plans[kind]
        yield Figure(f"{title}: a reshard", plan["reshard_s"], "s", "measured", 5)
        yield Figure(
            f"{title}: a reshard after a loss, journals read", plan["reshard_after_loss_s"], "s", "measured", 5
        )
        yield Figure(f"{title}: prompts read again", plan["prompts_read_again"], "", "counted", 0)
        yield Figure(f"{title}: opening a shard, one claim read", 1e3 * plan["open_shard_s"], "ms", "measured", 50)
    reading, title = plans["reading"], "reading prompts and journals for a plan"
    yield Figure(f"{title}: rows between two heartbeats", reading["rows_per_heartbeat"], "", "counted", 1000)
    yield Figure(f"{title}: longest time between two heartbeats", reading["longest_gap_s"], "s", "measured", 60)
    opens = _run("scale_rows.py", "write", options.segments, options.rows_per_segment, work_dir / "result")
    title, per_file = f"writing {opens['rows']:,} rows from {opens['segments']:,} segments", opens["opens_per_file"]
    yield Figure(f"{title}: opens per segment and batch", per_file / opens["batches"], "", "counted", 1)
    yield Figure(f"{title}: opens per segment, in {opens['batches']} batches", per_file, "", "counted")
    # Segments that stay open are opened once, however many batches there are.
    num_opens = opens["segments"] * per_file * (1 if per_file <= 1 else _RESULT_ROWS / opens["rows"])
    title = f"writing {_RESULT_ROWS:,} rows from as many segments, by this"
    yield Figure(f"{title}: opens", num_opens, "", "reckoned")


def _run(program: str, *arguments: Any) -> dict[str, Any]:
    command = [sys.executable, str(REPO / "benchmarks" / program), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed with status {done.returncode}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _fit(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Return a and b of a N^2 + b N, by the points with the fewest and the most ranks."""
    (few, low), (many, high) = points[0], points[-1]
    square = (high / many - low / few) / (many - few) if many != few else 0.0
    return square, high / many - square * many


if __name__ == "__main__":
    main()
