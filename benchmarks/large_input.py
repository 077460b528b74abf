"""Measure the start of a run over a large input: until the engine may take its first row.

    python benchmarks/large_input.py [--rows 1000000] [--row-bytes 10000] [--rounds 3] [--compare CHECKOUT]

Runs `dpgen run` on the fake engine, until it logs that it is ready. The first start of a round has an empty HF_HOME and
no run folder; the second is the same command again. The kernel holds no page of the input or of what the first start
has cached. `--compare` measures another checkout of dpgen in turn with this one.

Prints a table, and one JSON line last: seconds, and seconds of processor time with all child processes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from measure import REPO, WORDS, make_parser, make_tiny_model, run_benchmark

_NUM_DOCUMENTS = 997  # different ones
_READY = "ready after"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--row-bytes", type=int, default=10_000)
    parser.add_argument("--format", choices=["jsonl", "parquet"], default="jsonl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compare", type=Path, metavar="CHECKOUT")
    options = parser.parse_args()
    settings = {"rows": options.rows, "row_bytes": options.row_bytes, "format": options.format}
    run_benchmark("large_input", options.dir, lambda work_dir: measure(options, work_dir), **settings)


def measure(options: argparse.Namespace, work_dir: Path) -> dict[str, Any]:
    """Return the seconds of each start, by checkout and start."""
    model = make_tiny_model(work_dir)
    data = work_dir / f"rows.{options.format}"
    write = {"jsonl": write_json_lines, "parquet": write_parquet}[options.format]
    write(data, make_rows(options.rows, options.row_bytes))
    checkouts = {"this": REPO} | ({"compared": options.compare.resolve()} if options.compare else {})
    measured: dict[str, Any] = {f"{name}, {start}": [] for name in checkouts for start in ("first", "second")}
    for number in range(options.rounds):
        for name in list(checkouts)[:: -1 if number % 2 else 1]:
            folder = work_dir / "start"
            for start in ("first", "second"):
                forget_pages(work_dir)
                times_s = time_start(checkouts[name], folder, model, data)
                measured[f"{name}, {start}"].append(times_s)
                print(f"  round {number + 1}: {name}, {start} {times_s}", file=sys.stderr, flush=True)
            shutil.rmtree(folder)
    print_table(measured)
    return {"input_bytes": data.stat().st_size, "seconds": measured}


def print_table(measured: dict[str, list[dict[str, float]]]) -> None:
    print(f"{'start':<20} {'seconds':>24} {'processor time':>24}")
    for name, starts in measured.items():
        columns = []
        for kind in ("seconds", "processor_s"):
            values = [start[kind] for start in starts]
            columns.append(f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        print(f"{name:<20} {columns[0]:>24} {columns[1]:>24}")


def make_rows(num_rows: int, row_bytes: int) -> Iterator[dict[str, Any]]:
    """Yield rows of about `row_bytes` with a short prompt of their own, and a document that few others have."""
    words = random.Random(0)
    documents = [" ".join(words.choices(WORDS, k=row_bytes // 5))[: row_bytes - 100] for _ in range(_NUM_DOCUMENTS)]
    for row in range(num_rows):
        document = documents[row % _NUM_DOCUMENTS]
        yield {"id": row, "prompt": f"question {row}", "document": document, "source": "web", "score": row % 1000 / 7}


def write_json_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with path.open("w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    batch = [next(rows)]
    with pq.ParquetWriter(path, pa.Table.from_pylist(batch).schema, compression="none", use_dictionary=False) as writer:
        for row in rows:
            batch.append(row)
            if len(batch) == 10_000:
                writer.write_table(pa.Table.from_pylist(batch))
                batch = []
        if batch:
            writer.write_table(pa.Table.from_pylist(batch))


def forget_pages(folder: Path) -> None:
    """Make the kernel write all files to the disk, and forget what it holds of those in a folder."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def time_start(checkout: Path, folder: Path, model: Path, data: Path) -> dict[str, float]:
    """Start a run until it is ready and interrupt it; return what the start took."""
    config = [f"run.dir={folder / 'run'}", "run.engine=fake", f"model={model}", f"data.path={data}"]
    config += ["data.prompt_column=prompt", "sampling.max_tokens=5"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "PYTHONPATH": str(checkout)}
    env.pop("HF_DATASETS_CACHE", None)
    command = [sys.executable, "-m", "dpgen", "run", *config]
    before_s, started_s = _read_children_s(), time.monotonic()
    process = subprocess.Popen(command, env=env, cwd=checkout, stderr=subprocess.PIPE, text=True)
    seconds, lines = _wait_for_line(process.stderr or (), lambda: time.monotonic() - started_s)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    if seconds is None:
        sys.exit("".join(lines))
    return {"seconds": round(seconds, 1), "processor_s": round(_read_children_s() - before_s, 1)}


def _wait_for_line(lines: Any, read_seconds: Callable[[], float]) -> tuple[float | None, Sequence[str]]:
    """Return the time at which a process is ready, or None if it ended before, and what it has printed."""
    printed = []
    for line in lines:
        printed.append(line)
        if _READY in line:
            return read_seconds(), printed
    return None, printed


def _read_children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
