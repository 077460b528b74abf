"""What working together costs a rank: claims in the store, the all-reduce once a second, the journal.

    python benchmarks/coordination.py [--ranks 2,8,32] [--rows-a-rank 256]

Real processes: so many ranks under torchrun on this machine, each over its own share of rows that cost nothing to make,
do what a rank does for coordination and nothing else: claim rows (`ShardClaimer` on torchrun's store), journal them, and take
part in agreements. Claims are timed as a rank waits for them, the journal and the agreement by the rank's processor
time; claims and journal are set against what an engine of 8 billion parameters on an H100 takes for a row (`--row-ms`).

A table for people, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import REPO, machine, timed

_AGREEMENTS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,8,32")
    parser.add_argument("--rows-a-rank", type=int, default=4096)
    parser.add_argument(
        "--row-ms", type=float, default=250.0, help="engine time of a row: 1,527 tokens at 6,100 a second"
    )
    parser.add_argument("--dir", help="where to write; the system's temporary folder by default")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.dir))
    found: dict[str, Any] = {}
    try:
        print(
            f"{'ranks':>6} {'claim a row, us':>17} {'journal a row, us':>18} {'agreement, ms':>14} {'engine time':>15}"
        )
        for ranks in map(int, options.ranks.split(",")):
            out = folder / str(ranks)
            out.mkdir()
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            timed([*launcher, str(Path(__file__)), "--part", str(out), str(options.rows_a_rank)], folder / "log")
            parts = [json.loads(each.read_text()) for each in out.glob("*.json")]
            mean = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
            # An agreement runs beside the engine, and nobody waits for it: it takes no more than its processor time.
            share = (mean["claim_us"] + mean["journal_us"]) / (1000 * options.row_ms)
            found[str(ranks)] = {**{name: round(value, 3) for name, value in mean.items()}, "share": round(share, 6)}
            shown = f"{mean['claim_us']:>17.1f} {mean['journal_us']:>18.1f} {mean['agree_cpu_ms']:>14.2f}"
            print(f"{ranks:>6} {shown} {100 * share:>13.4f} %", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"benchmark": "coordination", **machine(), "row_ms": options.row_ms, "found": found}))


def part(folder: Path, num_rows: int) -> None:
    """One rank's part."""
    sys.path.insert(0, str(REPO))
    from dpgen.distributed.gloo import GlooGroup
    from dpgen.distributed.topology import read_topology
    from dpgen.journal.writer import JournalWriter
    from dpgen.records import Completion, RowResult
    from dpgen.scheduling.claims import ShardClaimer

    group = GlooGroup(read_topology(os.environ))
    cursors = [f"cursor/{rank}" for rank in range(group.size)]
    group.checked_store.add(cursors[group.rank], 0)
    group.all_gather_object(None)
    claims = ShardClaimer(group.checked_store, cursors, [num_rows] * group.size, group.rank, steal=True, max_size=64)
    started_s, claimed = time.monotonic(), 0
    while (claim := claims.claim(64)) is not None:
        claimed += claim.stop - claim.start
    claim_s = time.monotonic() - started_s
    group.all_gather_object(None)
    totals = [0] * (10 + group.size)
    started_s, cpu_s = time.monotonic(), time.process_time()
    for _ in range(_AGREEMENTS):
        group.wait(group.all_reduce_async(totals, "sum"))
    agree_s, agree_cpu_s = time.monotonic() - started_s, time.process_time() - cpu_s
    group.all_gather_object(None)
    own_folder = folder / f"journal-{group.rank}"
    own_folder.mkdir()
    journal = JournalWriter(own_folder, 1, group.rank)
    result = RowResult(0, 500, (Completion("x" * 6000, "stop", 1527),))
    cpu_s = time.process_time()
    for _ in range(1000):
        journal.append(result)
    journal.close()
    journal_s = time.process_time() - cpu_s
    group.all_gather_object(None)
    facts = {
        "claim_us": 1e6 * claim_s / max(1, claimed),
        "agree_ms": 1e3 * agree_s / _AGREEMENTS,
        "agree_cpu_ms": 1e3 * agree_cpu_s / _AGREEMENTS,
        "journal_us": 1e6 * journal_s / 1000,
    }
    (folder / f"{group.rank}.json").write_text(json.dumps(facts))
    group.close()
    os._exit(0)  # as dpgen ends: native threads may abort the interpreter's own way out


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        part(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
