"""Measure the memory of every rank and engine of a whole run, until `_SUCCESS`, at two input sizes.

    python benchmarks/memory.py [--rows 1000000] [--ranks 2] [--dir DIRECTORY]

Runs `torchrun -m dpgen run` on the fake engine over a tenth of the rows and over all rows, with prompts of 300 bytes.
Samples each process's own memory (RssAnon: without the input's mapped files) five times a second. Memory is flat if
ten times the rows take a few bytes more per row, on every rank, including rank 0 while it writes the result.

Prints a table for people, and one JSON line last.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from measure import build_torchrun_command, make_parser

_PROMPT_BYTES = 300
_BATCH = 50_000
_SAMPLE_S = 0.2


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    measured: dict[str, Any] = {"rows": options.rows, "ranks": options.ranks, "python": platform.python_version()}
    peaks = []
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        for num_rows in (options.rows // 10, options.rows):
            seconds, peak = run(Path(directory) / str(num_rows), num_rows, options.ranks)
            measured[f"seconds_{num_rows}"] = round(seconds, 1)
            peaks.append(peak)
    few, many = peaks
    print(f"{'MiB at its peak':<20} {options.rows // 10:>14,} {options.rows:>14,} {'bytes a row':>14}")
    for name in sorted(many):
        per_row_bytes = (many[name] - few[name]) / (options.rows * 0.9)
        print(f"{name:<20} {few[name] / 2**20:>14.0f} {many[name] / 2**20:>14.0f} {per_row_bytes:>14.0f}")
        measured[name] = {"peak_bytes": [few[name], many[name]], "bytes_a_row": round(per_row_bytes, 1)}
    print(json.dumps(measured))


def run(directory: Path, num_rows: int, num_ranks: int) -> tuple[float, dict[str, int]]:
    """Finish one run; return its seconds and each process's peak in bytes."""
    write_input(directory / "rows.parquet", num_rows)
    config = [
        f"run.dir={directory / 'run'}",
        "run.engine=fake",
        "model=none",
        f"data.path={directory / 'rows.parquet'}",
        "data.prompt_column=prompt",
        "sampling.max_tokens=4",
        "engine.max_num_seqs=256",
        "engine.max_model_len=1024",
    ]
    started_s = time.monotonic()
    with (directory / "log").open("wb") as log:
        launcher = subprocess.Popen(
            [*build_torchrun_command(num_ranks), "-m", "dpgen", "run", *config],
            env={**os.environ, "HF_HOME": str(directory / "hf"), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        peak: dict[str, int] = defaultdict(int)
        while launcher.poll() is None:
            for name, anonymous_bytes in measure_processes(launcher.pid):
                peak[name] = max(peak[name], anonymous_bytes)
            time.sleep(_SAMPLE_S)
    if launcher.returncode != 0 or not (directory / "run" / "_SUCCESS").exists():
        sys.exit((directory / "log").read_text())
    return time.monotonic() - started_s, dict(peak)


def write_input(path: Path, num_rows: int) -> None:
    path.parent.mkdir(parents=True)
    with pq.ParquetWriter(path, pa.schema([("prompt", pa.string())])) as out:
        for start in range(0, num_rows, _BATCH):
            rows = range(start, min(start + _BATCH, num_rows))
            out.write_table(pa.table({"prompt": [f"row {row} ".ljust(_PROMPT_BYTES, "x") for row in rows]}))


def measure_processes(launcher: int) -> list[tuple[str, int]]:
    """Return (name, anonymous bytes) of every rank and engine below the launcher."""
    measured = []
    for rank_pid in list_children(launcher):
        rank = read_environment(rank_pid).get("RANK")
        if rank is not None:
            measured.append((f"rank {rank}", read_anonymous_bytes(rank_pid)))
            engine_pids = list_children(rank_pid)
            measured += [(f"engine of rank {rank}", read_anonymous_bytes(pid)) for pid in engine_pids]
    return measured


def list_children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def read_environment(pid: int) -> dict[str, str]:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(pair.decode(errors="replace").partition("=")[::2] for pair in pairs)


def read_anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:")), 0)


if __name__ == "__main__":
    main()
