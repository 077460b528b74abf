"""Measure what coordination costs a rank: claims in the store, the all-reduce once a second, the journal.

    python benchmarks/coordination.py [--ranks 2,8,32] [--rows-a-rank 256]

Starts real processes: N ranks under torchrun on this machine. Each does what a rank does for coordination, and nothing
else: it claims rows (`ShardClaimer` on torchrun's store), journals them, and takes part in syncs of totals. The rows
cost nothing to make. A claim is timed as the rank waits for it, the journal and the sync by the rank's processor time.
Claims and journal are compared with the time of a row on an H100 with a model of 8 billion parameters (`--row-ms`).

Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from measure import REPO, build_torchrun_command, make_parser, run_benchmark, time_command

_SYNCS = 20


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", default="2,8,32")
    parser.add_argument("--rows-a-rank", type=int, default=4096)
    parser.add_argument(
        "--row-ms", type=float, default=250.0, help="engine time of a row: 1,527 tokens at 6,100 a second"
    )
    options = parser.parse_args()
    run_benchmark("coordination", options.dir, lambda work_dir: measure(options, work_dir), row_ms=options.row_ms)


def measure(options: argparse.Namespace, work_dir: Path) -> dict[str, Any]:
    record: dict[str, Any] = {}
    print(f"{'ranks':>6} {'claim a row, us':>17} {'journal a row, us':>18} {'sync, ms':>14} {'engine time':>15}")
    for num_ranks in map(int, options.ranks.split(",")):
        out_dir = work_dir / str(num_ranks)
        out_dir.mkdir()
        program = [str(Path(__file__)), "--part", str(out_dir), str(options.rows_a_rank)]
        time_command([*build_torchrun_command(num_ranks), *program], work_dir / "log")
        parts = [json.loads(path.read_text()) for path in out_dir.glob("*.json")]
        mean = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
        # A sync runs beside the engine and no rank waits for it, so it costs no more than its processor time.
        fraction = (mean["claim_us"] + mean["journal_us"]) / (1000 * options.row_ms)
        rounded = {name: round(value, 3) for name, value in mean.items()}
        record[str(num_ranks)] = {**rounded, "share": round(fraction, 6)}
        columns = f"{mean['claim_us']:>17.1f} {mean['journal_us']:>18.1f} {mean['agree_cpu_ms']:>14.2f}"
        print(f"{num_ranks:>6} {columns} {100 * fraction:>13.4f} %", flush=True)
    return record


def part(out_dir: Path, num_rows: int) -> None:
    """Run one rank's part, and write its measurements to a file in `out_dir`."""
    sys.path.insert(0, str(REPO))
    from dpgen.distributed.gloo.rank_group import GlooGroup
    from dpgen.distributed.topology import read_topology
    from dpgen.journal.writer import JournalWriter
    from dpgen.records import Completion, RowResult
    from dpgen.scheduling.claims import ClaimPolicy, ShardClaimer

    group = GlooGroup(read_topology(os.environ))
    cursors = [f"cursor/{rank}" for rank in range(group.size)]
    group.checked_store.add(cursors[group.rank], 0)
    group.all_gather_object(None)
    sizes, policy = [num_rows] * group.size, ClaimPolicy(steal=True, max_size=64)
    claimer = ShardClaimer(group.checked_store, cursors, sizes, group.rank, policy)
    started_s, num_claimed = time.monotonic(), 0
    while (claim := claimer.claim(64)) is not None:
        num_claimed += claim.stop - claim.start
    claim_s = time.monotonic() - started_s
    group.all_gather_object(None)
    totals = [0] * (10 + group.size)
    started_s, cpu_s = time.monotonic(), time.process_time()
    for _ in range(_SYNCS):
        group.wait(group.all_reduce_async(totals, "sum"))
    sync_s, sync_cpu_s = time.monotonic() - started_s, time.process_time() - cpu_s
    group.all_gather_object(None)
    journal_dir = out_dir / f"journal-{group.rank}"
    journal_dir.mkdir()
    journal = JournalWriter(journal_dir, 1, group.rank)
    result = RowResult(0, 500, (Completion("x" * 6000, "stop", 1527),))
    cpu_s = time.process_time()
    for _ in range(1000):
        journal.append(result)
    journal.close()
    journal_s = time.process_time() - cpu_s
    group.all_gather_object(None)
    measurements = {
        "claim_us": 1e6 * claim_s / max(1, num_claimed),
        "agree_ms": 1e3 * sync_s / _SYNCS,
        "agree_cpu_ms": 1e3 * sync_cpu_s / _SYNCS,
        "journal_us": 1e6 * journal_s / 1000,
    }
    (out_dir / f"{group.rank}.json").write_text(json.dumps(measurements))
    group.close()
    os._exit(0)  # as dpgen exits: native threads may abort the interpreter's regular exit


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        part(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
