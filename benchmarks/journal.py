"""Measure the journal's cost while a run writes it, and the time to resume from it.

    python benchmarks/journal.py [--rows 10000000] [--seconds 30] [--dir DIRECTORY]      # on a real disk

1. Cost: 10,000 rows/s of ordinary size on a disk with real syncs. CPU time of the journal, its thread included, on top
   of the same loop without a journal. Target: under 3 % of a core per 1,000 rows/s.
2. Memory: of a process that appends a million rows, after a tenth of them and at the end.
3. Resume: N finished rows with tiny payloads, in shuffled order, in the journals of 8 ranks. `index_journal` runs in a
   process of its own, the median of three: all segments sealed, then with one rank's last segment unsealed, as a kill
   leaves it. The page cache holds all files.

Prints a table for people, and one JSON line last.
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
from pathlib import Path
from typing import Any

import numpy as np
from measure import make_parser

from dpgen.journal.reader import index_journal, list_segments, read_segment
from dpgen.journal.writer import JournalWriter
from dpgen.records import Completion, RowResult

RANKS = 8
RATE = 10_000
ORDINARY_TEXT = "The quick brown fox jumps over the lazy dog, and says why. " * 10  # 600 bytes


def main() -> None:
    options = _parse_options()
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        path = Path(directory)
        measured: dict[str, Any] = {"rows": options.rows, "python": platform.python_version(), "numpy": np.__version__}
        measured |= _measure_cost(path / "cost", options.seconds)
        measured |= _run_child("memory", path / "memory")
        measured |= _fill_journals(path / "resume", options.rows)
        measured |= _measure_scan("scan", path / "resume")
        _unseal(list_segments(path / "resume")[-1])
        measured |= _measure_scan("scan_after_kill", path / "resume")
    for name, value in measured.items():
        print(f"{name:<45} {value:>14,.2f}" if isinstance(value, float) else f"{name:<45} {value!s:>14}")
    print(json.dumps(measured))


def _parse_options() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, directory = options.child
        print(json.dumps({"scan": _scan, "memory": _append}[name](Path(directory))))
        sys.exit()
    return options


def _run_child(name: str, directory: Path) -> dict[str, Any]:
    """Measure in a process of its own, so that its memory holds nothing else."""
    directory.mkdir(exist_ok=True)
    child = subprocess.run(
        [sys.executable, __file__, "--child", name, str(directory)], check=True, stdout=subprocess.PIPE, text=True
    )
    measured: dict[str, Any] = json.loads(child.stdout)
    return measured


def _measure_scan(name: str, directory: Path) -> dict[str, Any]:
    scans = sorted((_run_child("scan", directory) for _ in range(3)), key=lambda scan: float(scan["seconds"]))
    return {f"{name}_{key}": value for key, value in scans[1].items()}


def _measure_cost(directory: Path, seconds: float) -> dict[str, Any]:
    directory.mkdir()
    baseline_s = _make_results(None, seconds)
    journal = JournalWriter(directory, 1, 0)
    journal_s = _make_results(journal, seconds)
    started_s = time.process_time()
    journal.close()
    journal_s += time.process_time() - started_s
    percent = 100 * (journal_s - baseline_s) / seconds / (RATE / 1000)
    return {"core_percent_per_1000_rows_per_s": percent, "bytes_a_row": journal.num_bytes / journal.num_rows}


def _make_results(journal: JournalWriter | None, seconds: float) -> float:
    """Make `RATE` results per second, append them if there is a journal, and return the CPU seconds."""
    started_s, cpu_s = time.monotonic(), time.process_time()
    batch = RATE // 100
    for number in range(int(seconds * 100)):
        for row in range(number * batch, (number + 1) * batch):
            result = RowResult(row, 100, (Completion(ORDINARY_TEXT, "stop", 150),))
            if journal is not None:
                journal.append(result)
        if journal is not None:
            journal.raise_if_failed()
        time.sleep(max(0.0, started_s + (number + 1) / 100 - time.monotonic()))
    return time.process_time() - cpu_s


def _append(directory: Path) -> dict[str, Any]:
    journal = JournalWriter(directory, 1, 0)
    early_bytes = 0
    for row in range(1_000_000):
        journal.append(RowResult(row, 100, (Completion(ORDINARY_TEXT, "stop", 150),)))
        if row % 1000 == 0:
            journal.raise_if_failed()
            time.sleep(0.01)
        if row == 100_000:
            early_bytes = _get_resident_bytes()
    late_bytes = _get_resident_bytes()
    journal.close()
    return {
        "append_mib_after_100_000_rows": early_bytes / 2**20,
        "append_mib_after_1_000_000_rows": late_bytes / 2**20,
        "files_of_1_000_000_rows": len(journal.paths),
    }


def _fill_journals(directory: Path, num_rows: int) -> dict[str, Any]:
    """Write journals of finished rows in shuffled order, as many engines do."""
    directory.mkdir()
    rows = np.random.default_rng(0).permutation(num_rows)
    completions = (Completion("ok", "stop", 1),)
    cpu_s = time.process_time()
    for rank in range(RANKS):
        journal = JournalWriter(directory, 1, rank)
        for row in rows[rank::RANKS].tolist():
            journal.append(RowResult(row, 1, completions))
        journal.close()
    append_s = time.process_time() - cpu_s
    return {"append_microseconds_a_row": 1e6 * append_s / num_rows, "scan_files": len(list_segments(directory))}


def _unseal(path: Path) -> None:
    frames = read_segment(path).frames
    os.truncate(path, int(frames.offset[-1] + frames.length[-1]))


def _scan(directory: Path) -> dict[str, Any]:
    before_bytes = _get_resident_bytes()
    started_s = time.monotonic()
    index = index_journal(directory)
    elapsed_s = time.monotonic() - started_s
    arrays = (index.row, index.file, index.offset, index.length, index.error)
    assert (np.diff(index.row) == 1).all()
    return {
        "seconds": elapsed_s,
        "rows_per_s": len(index) / elapsed_s,
        "kept_bytes_a_row": sum(values.nbytes for values in arrays) / len(index),
        "peak_bytes_a_row": (_get_peak_bytes() - before_bytes) / len(index),
    }


def _get_resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _get_peak_bytes() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
