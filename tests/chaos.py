"""Run random faults into runs until they are complete, and compare each result with an undisturbed run's.

    python tests/chaos.py --faults 1000 --workers 8           # on the fake engine
    python tests/chaos.py --faults 30 --engine vllm           # on real vLLM, with the demo's model
    python tests/chaos.py --faults 20 --kinds kill_rank,stop_rank

- A run is started again and again, alone, as srun starts ranks or by torchrun, on a random number of ranks, with up to
  three faults at a time (`helpers/chaos/faults.py` lists their kinds), until it is complete.
- Each kind happens once before any happens twice.
- Rows may not be lost, duplicated, out of order or different, `dpgen verify` must find the result sound, exit statuses
  must be 0 or 75 (1 for faults that warrant it), no process may be left over, and no attempt may hang.
- With several workers, as many series run side by side.
- The output ends with a table and one JSON line. The exit status is 1, and the directory is kept, after any failure.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.chaos.series import SeriesResult, list_kinds, make_schedule, run_series

_ROWS = {"fake": 150, "vllm": 150}


def main() -> int:
    options = parse_options()
    folder = Path(tempfile.mkdtemp(prefix="dpgen-chaos-"))
    started_s = time.monotonic()
    results = run_workers(options, folder)
    facts = summarize(options, results, time.monotonic() - started_s)
    failures = [result.failure for result in results if result.failure]
    for name, value in facts.items():
        print(f"{name:>18}  {value}")
    if failures:
        print(f"repeat with --seed {options.seed}; files are kept in {folder}")
    else:
        shutil.rmtree(folder)
        print("no row lost, duplicated, out of order, or different; no process left over; no attempt hung")
    print(json.dumps(facts))
    return 1 if failures else 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--faults", "--kills", type=int, default=60)
    parser.add_argument("--engine", choices=["fake", "vllm"], default="fake")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--kinds", help="kinds of faults, separated by commas; all by default")
    options = parser.parse_args()
    try:
        options.kinds = list_kinds(options.kinds)
    except ValueError as error:
        parser.error(str(error))
    options.rows = options.rows or _ROWS[options.engine]
    return options


def run_workers(options: argparse.Namespace, folder: Path) -> list[SeriesResult]:
    """Run one series a worker, and return their results."""
    schedule = make_schedule(options.kinds, options.engine, options.faults, options.seed)
    num_workers = min(options.workers, len(schedule))
    series = [
        (folder / f"series-{number}", options.engine, options.rows, schedule[number::num_workers], seed)
        for number, seed in enumerate(range(1000 * options.seed, 1000 * options.seed + num_workers))
    ]
    if num_workers == 1:
        return [run_series(*series[0])[0]]
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run_series, *arguments) for arguments in series]
        return [future.result()[0] for future in as_completed(futures)]


def summarize(options: argparse.Namespace, results: list[SeriesResult], elapsed_s: float) -> dict[str, Any]:
    faults = sum((result.faults for result in results), start=type(results[0].faults)())
    launchers = sum((result.launchers for result in results), start=type(faults)())
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    skipped = sum((result.skipped for result in results), start=type(faults)())
    return {
        "engine": options.engine,
        "faults": dict(sorted(faults.items())),
        "skipped": dict(skipped),
        "launchers": dict(sorted(launchers.items())),
        "num_faults": sum(faults.values()),
        "num_kinds": len(faults),
        "num_runs": sum(result.num_runs for result in results),
        "num_attempts": sum(result.num_attempts for result in results),
        "num_ended_by_hand": sum(result.num_ended for result in results),
        "longest_attempt_s": round(max(result.longest_attempt_s for result in results), 1),
        "rows_per_run": options.rows,
        "workers": options.workers,
        "seed": options.seed,
        "seconds": round(elapsed_s),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime),
    }


if __name__ == "__main__":
    sys.exit(main())
