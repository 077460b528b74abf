"""What a whole run holds in memory: every rank and engine, from the first row to `_SUCCESS`, at two sizes of input.

    python benchmarks/memory.py [--rows 1000000] [--ranks 2] [--dir FOLDER]

Runs `torchrun -m dpgen run` on the fake engine over a tenth of the rows and over all of them, with prompts of 300
bytes, and samples each process's own memory (RssAnon: without the input's mapped files) five times a second. Flat
means: ten times the rows, and a few bytes more for each, on every rank, rank 0 and its writing of the result included.

A table for people, and one JSON line last.
"""

from __future__ import annotations

import argparse
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

_PROMPT_BYTES = 300
_BATCH = 50_000
_SAMPLE_S = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dir", help="where to write; the system's temporary folder by default")
    options = parser.parse_args()
    found: dict[str, Any] = {"rows": options.rows, "ranks": options.ranks, "python": platform.python_version()}
    peaks = []
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        for num_rows in (options.rows // 10, options.rows):
            seconds, peak = run(Path(folder) / str(num_rows), num_rows, options.ranks)
            found[f"seconds_{num_rows}"] = round(seconds, 1)
            peaks.append(peak)
    few, many = peaks
    print(f"{'MiB at its peak':<20} {options.rows // 10:>14,} {options.rows:>14,} {'bytes a row':>14}")
    for name in sorted(many):
        per_row_bytes = (many[name] - few[name]) / (options.rows * 0.9)
        print(f"{name:<20} {few[name] / 2**20:>14.0f} {many[name] / 2**20:>14.0f} {per_row_bytes:>14.0f}")
        found[name] = {"peak_bytes": [few[name], many[name]], "bytes_a_row": round(per_row_bytes, 1)}
    print(json.dumps(found))


def run(folder: Path, num_rows: int, num_ranks: int) -> tuple[float, dict[str, int]]:
    """One run; its seconds, and each process's peak in bytes."""
    write_input(folder / "rows.parquet", num_rows)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    configuration = [
        f"run.dir={folder / 'run'}",
        "run.engine=fake",
        "model=none",
        f"data.path={folder / 'rows.parquet'}",
        "data.prompt_column=prompt",
        "sampling.max_tokens=4",
        "engine.max_num_seqs=256",
        "engine.max_model_len=1024",
    ]
    started_s = time.monotonic()
    with (folder / "log").open("wb") as log:
        launcher = subprocess.Popen(
            [*torchrun, "-m", "dpgen", "run", *configuration],
            env={**os.environ, "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        peak: dict[str, int] = defaultdict(int)
        while launcher.poll() is None:
            for name, anonymous_bytes in processes(launcher.pid):
                peak[name] = max(peak[name], anonymous_bytes)
            time.sleep(_SAMPLE_S)
    if launcher.returncode != 0 or not (folder / "run" / "_SUCCESS").exists():
        sys.exit((folder / "log").read_text())
    return time.monotonic() - started_s, dict(peak)


def write_input(path: Path, num_rows: int) -> None:
    path.parent.mkdir(parents=True)
    with pq.ParquetWriter(path, pa.schema([("prompt", pa.string())])) as out:
        for start in range(0, num_rows, _BATCH):
            rows = range(start, min(start + _BATCH, num_rows))
            out.write_table(pa.table({"prompt": [f"row {row} ".ljust(_PROMPT_BYTES, "x") for row in rows]}))


def processes(launcher: int) -> list[tuple[str, int]]:
    """(name, anonymous bytes) of every rank and engine below the launcher."""
    found = []
    for rank in children(launcher):
        number = environment(rank).get("RANK")
        if number is not None:
            found.append((f"rank {number}", anonymous(rank)))
            found += [(f"engine of rank {number}", anonymous(engine)) for engine in children(rank)]
    return found


def children(pid: int) -> list[int]:
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def environment(pid: int) -> dict[str, str]:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(pair.decode(errors="replace").partition("=")[::2] for pair in pairs)  # type: ignore[misc]


def anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:")), 0)


if __name__ == "__main__":
    main()
