"""What the journal costs: while a run writes it, and when a run resumes from it.

    python benchmarks/journal.py [--rows 10000000] [--seconds 30] [--dir FOLDER]

1. Cost: 10,000 rows/s of ordinary size, with a disk that is really synced; processor time of the journal, its thread
   included, above that of the same loop without a journal. Target: under 3 % of a core per 1,000 rows/s.
2. Memory: of a process that appends a million rows, after a tenth of them and at the end.
3. Resume: N finished rows with tiny payloads, in shuffled order, in the journals of 8 ranks; then `index_journal` in a process
   of its own, the median of three: all sealed, and then with one rank's last segment unsealed, as a kill leaves it.
   The page cache holds what is read.

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
from pathlib import Path
from typing import Any

import numpy as np

from dpgen.journal.reader import index_journal, list_segments, read_segment
from dpgen.journal.writer import JournalWriter
from dpgen.records import Completion, RowResult

RANKS = 8
RATE = 10_000
ORDINARY_TEXT = "The quick brown fox jumps over the lazy dog, and says why. " * 10  # 600 bytes


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        path = Path(folder)
        found: dict[str, Any] = {"rows": options.rows, "python": platform.python_version(), "numpy": np.__version__}
        found |= _cost(path / "cost", options.seconds)
        found |= _child("memory", path / "memory")
        found |= _fill(path / "resume", options.rows)
        found |= _median_scan("scan", path / "resume")
        _unseal(list_segments(path / "resume")[-1])
        found |= _median_scan("scan_after_kill", path / "resume")
    for name, value in found.items():
        print(f"{name:<45} {value:>14,.2f}" if isinstance(value, float) else f"{name:<45} {value!s:>14}")
    print(json.dumps(found))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--dir", help="where to write (a real disk); the system's temporary folder by default")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, folder = options.child
        print(json.dumps({"scan": _scan, "memory": _memory}[name](Path(folder))))
        sys.exit()
    return options


def _child(name: str, folder: Path) -> dict[str, Any]:
    """One measurement in a process of its own, whose memory is nobody else's."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, __file__, "--child", name, str(folder)], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _median_scan(name: str, folder: Path) -> dict[str, Any]:
    tries = sorted((_child("scan", folder) for _ in range(3)), key=lambda each: float(each["seconds"]))
    return {f"{name}_{key}": value for key, value in tries[1].items()}


def _cost(folder: Path, seconds: float) -> dict[str, Any]:
    folder.mkdir()
    bare_s = _paced(None, seconds)
    journal = JournalWriter(folder, 1, 0)
    cost_s = _paced(journal, seconds)
    started_s = time.process_time()
    journal.close()
    cost_s += time.process_time() - started_s
    percent = 100 * (cost_s - bare_s) / seconds / (RATE / 1000)
    return {"core_percent_per_1000_rows_per_s": percent, "bytes_a_row": journal.num_bytes / journal.num_rows}


def _paced(journal: JournalWriter | None, seconds: float) -> float:
    """Processor seconds of making `RATE` results a second, and appending them where there is a journal."""
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


def _memory(folder: Path) -> dict[str, Any]:
    journal = JournalWriter(folder, 1, 0)
    early = 0
    for row in range(1_000_000):
        journal.append(RowResult(row, 100, (Completion(ORDINARY_TEXT, "stop", 150),)))
        if row % 1000 == 0:
            journal.raise_if_failed()
            time.sleep(0.01)
        if row == 100_000:
            early = _resident_bytes()
    late = _resident_bytes()
    journal.close()
    return {
        "append_mib_after_100_000_rows": early / 2**20,
        "append_mib_after_1_000_000_rows": late / 2**20,
        "files_of_1_000_000_rows": len(journal.paths),
    }


def _fill(folder: Path, num_rows: int) -> dict[str, Any]:
    """Journals of finished rows in shuffled order: what many engines leave behind."""
    folder.mkdir()
    rows = np.random.default_rng(0).permutation(num_rows)
    completions = (Completion("ok", "stop", 1),)
    cpu_s = time.process_time()
    for rank in range(RANKS):
        journal = JournalWriter(folder, 1, rank)
        for row in rows[rank::RANKS].tolist():
            journal.append(RowResult(row, 1, completions))
        journal.close()
    spent_s = time.process_time() - cpu_s
    return {"append_microseconds_a_row": 1e6 * spent_s / num_rows, "scan_files": len(list_segments(folder))}


def _unseal(path: Path) -> None:
    frames = read_segment(path).frames
    os.truncate(path, int(frames.offset[-1] + frames.length[-1]))


def _scan(folder: Path) -> dict[str, Any]:
    before = _resident_bytes()
    started_s = time.monotonic()
    index = index_journal(folder)
    elapsed_s = time.monotonic() - started_s
    arrays = (index.row, index.file, index.offset, index.length, index.error)
    assert (np.diff(index.row) == 1).all()
    return {
        "seconds": elapsed_s,
        "rows_per_s": len(index) / elapsed_s,
        "kept_bytes_a_row": sum(each.nbytes for each in arrays) / len(index),
        "peak_bytes_a_row": (_peak_bytes() - before) / len(index),
    }


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak_bytes() -> int:
    [line] = [each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
