"""Count what many rows cost rank 0's main thread and the disk; see scale.py, which runs this program.

    python benchmarks/scale_rows.py reshard 10000000 DIR     # plans of one rank of 1,000, after a loss
    python benchmarks/scale_rows.py write 1024 20 DIR        # a result from 1,024 segments of 20 rows

The rows are real `datasets`, and the journals are written by the product's own writer. Only the prompts are not read
for the first order: it is made from synthetic lengths and hashes, since reading 10 M prompts takes minutes. Seconds are
the main thread's own (processor time), and the disk's cache holds all files. Prints one JSON line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from dpgen.config.prompt import PromptConfig
from dpgen.config.sections import OutputConfig, WorkConfig
from dpgen.data.input_rows import InputRows
from dpgen.data.prompts.render import RenderedPrompt
from dpgen.distributed.group import SingleRankGroup
from dpgen.journal.reader import BATCH_ROWS, list_segments
from dpgen.journal.run_dir import RunDir
from dpgen.journal.writer import JournalWriter
from dpgen.output.columns import DatasetFormat
from dpgen.output.dataset_writer import write_dataset
from dpgen.records import Completion, RowResult
from dpgen.scheduling import order
from dpgen.scheduling.groups.prefix_groups import _LEVELS, PrefixGroups
from dpgen.scheduling.groups.prompt_groups import RankState
from dpgen.scheduling.order_config import OrderConfig
from dpgen.scheduling.planner import PlannerConfig, ShardPlanner
from dpgen.scheduling.request_builder import RequestBuilder

_NUM_RANKS = 1000
_JOURNALED_FRACTION = 0.1  # of all rows, by this rank's node
_MAX_READ_ROWS = 200_000
_ROWS_PER_GROUP = 16  # of a prefix, or of a prompt
_KINDS = {"dataset": "dataset", "longest_first": "longest_first", "measured": "auto", "prefix": "prefix"}


def main() -> None:
    kind, *rest = sys.argv[1:]
    if kind == "reshard":
        measured = measure_reshards(int(rest[0]), Path(rest[1]))
    else:
        measured = count_opens(int(rest[0]), int(rest[1]), Path(rest[2]))
    print(json.dumps(measured), flush=True)


# ---- plans


class ManyRanks(SingleRankGroup):
    """Stand in for a group of which this rank is one, and all others are in its state.

    Attributes:
        heartbeats_s: when the main thread showed that it gets on.
    """

    size = _NUM_RANKS
    num_shrinks = 0

    def __init__(self) -> None:
        super().__init__()
        self.nodes = [f"node {rank // 8}" for rank in range(self.size)]
        self.heartbeats_s: list[float] = []

    def raise_if_peer_failed(self) -> None:
        self.heartbeats_s.append(time.monotonic())

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value] * self.size


def measure_reshards(num_rows: int, work_dir: Path) -> dict[str, Any]:
    """Return the main thread's seconds of a reshard in each order, and of opening a shard of a resumed run."""
    rows = InputRows(datasets.Dataset.from_dict({"row": np.arange(num_rows)}))
    journal_dir = work_dir / "journal"
    finished = _write_journal(journal_dir, num_rows)
    measured: dict[str, Any] = {"rows": num_rows, "ranks": _NUM_RANKS, "journaled_rows": len(finished)}
    measured["reading"] = _measure_heartbeats(rows, journal_dir)
    for kind in _KINDS:
        measured[kind] = _measure_order(rows, journal_dir, kind)
    return measured


def _measure_heartbeats(rows: InputRows, journal_dir: Path) -> dict[str, Any]:
    """Read prompts for the first order, at most 200,000 of them, and return how often the rank gives a sign of life."""
    num_rows = min(len(rows), _MAX_READ_ROWS)
    group = ManyRanks()
    few = InputRows(rows.dataset.select(range(num_rows)))
    planner = _make_planner(few, journal_dir, group, WorkConfig(order="longest_first"))
    began_s = time.monotonic()
    planner.plan()
    times_s = [began_s, *group.heartbeats_s, time.monotonic()]
    num_beats = len(times_s) - 2 - len(list_segments(journal_dir))
    return {
        "rows_per_heartbeat": planner.num_remaining_rows / max(1, num_beats),
        "longest_gap_s": float(np.diff(times_s).max()),
    }


def _measure_order(rows: InputRows, journal_dir: Path, kind: str) -> dict[str, Any]:
    num_reads = 0

    def read_prompts(_rows: InputRows, row_ids: np.ndarray, *_: Any) -> PrefixGroups:
        nonlocal num_reads
        num_reads += len(row_ids)
        return _make_prompts(row_ids, kind)

    order.group_by_prefix = read_prompts  # type: ignore[assignment, attr-defined]
    group = ManyRanks()
    planner = _make_planner(rows, journal_dir, group, WorkConfig(order=_KINDS[kind]))  # type: ignore[arg-type]
    first_plan_s = _time(planner.plan)
    num_first_reads = num_reads
    finished = np.arange(1, len(rows), 20)
    state = RankState(finished, np.full(len(finished), 7), np.arange(2, 600, 20))
    reshard_s = _time(lambda: planner.plan(state))
    group.num_shrinks = 1
    reshard_after_loss_s = _time(lambda: planner.plan(state))
    claim_rows = WorkConfig().claim_rows
    shards = planner.order.shard(_NUM_RANKS, claim_rows)
    num_claimed = min(claim_rows, shards.sizes[1])  # rows, or groups of rows
    return {
        "order": planner.order.description,
        "first_plan_s": first_plan_s,
        "reshard_s": reshard_s,
        "reshard_after_loss_s": reshard_after_loss_s,
        "prompts_read_again": num_reads - num_first_reads,
        "open_shard_s": _time(
            lambda: [*shards.open(rows, planner.order.rows, 1, ("row",)).read_positions(0, num_claimed)]
        ),
    }


def _write_journal(journal_dir: Path, num_rows: int) -> np.ndarray:
    journal_dir.mkdir(parents=True)
    finished = np.arange(0, num_rows, round(1 / _JOURNALED_FRACTION))
    journal = JournalWriter(journal_dir, 1, 0)
    for row in finished.tolist():
        journal.append(RowResult(row, 1, (Completion("ok", "stop", 1),)))
    journal.close()
    return finished


def _make_prompts(row_ids: np.ndarray, kind: str) -> PrefixGroups:
    """Return prompts of 600 characters, of which several have a prefix or everything in common, in any order."""
    random = np.random.default_rng(1)
    group = random.permutation(len(row_ids)) // _ROWS_PER_GROUP + 1
    hashes = np.zeros((len(_LEVELS), len(row_ids)), dtype=np.uint32)
    hashes[0] = group
    hashes[1] = np.arange(len(row_ids))
    lengths = random.integers(512, 1024, len(row_ids))
    if kind == "measured":  # short prompts, the same within a group
        return PrefixGroups(np.full(len(row_ids), 100), np.zeros_like(hashes), group.astype(np.int64))
    return PrefixGroups(lengths, hashes, np.arange(1, len(row_ids) + 1))


def _make_planner(rows: InputRows, journal_dir: Path, group: ManyRanks, work: WorkConfig) -> ShardPlanner:
    order_config = OrderConfig(work, PromptConfig(prompt_column="row"), None, prefix_caching=work.order == "prefix")
    config = PlannerConfig(order_config, False, ("row",), lockstep=False, claims_rows=True, attempt=2)
    builder = RequestBuilder(lambda row: RenderedPrompt(None, row["row"]), None, {})
    return ShardPlanner(config, rows, journal_dir, group, builder)


def _time(action: Callable[[], Any]) -> float:
    started_s = time.thread_time()
    action()
    return round(time.thread_time() - started_s, 4)


# ---- opens


def count_opens(num_segments: int, rows_per_segment: int, work_dir: Path) -> dict[str, Any]:
    """Write a result of rows that lie in the segments in turn, and return how often a segment was opened.

    Returns:
        opens of the segment that was opened most often while rows were read; the index opens each once more.
    """
    run_dir = RunDir(str(work_dir / "run"))
    run_dir.create()
    num_rows = num_segments * rows_per_segment
    for rank in range(num_segments):
        journal = JournalWriter(run_dir.journal, 1, rank)
        for row in range(rank, num_rows, num_segments):
            journal.append(RowResult(row, 1, (Completion("ok", "stop", 1),)))
        journal.close()
    rows = InputRows(datasets.Dataset.from_dict({"row": np.arange(num_rows)}))
    opens: dict[str, int] = {}

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith(".journal"):
            opens[str(arguments[0])] = opens.get(str(arguments[0]), 0) + 1

    sys.addaudithook(count)
    write_dataset(rows, run_dir, DatasetFormat(), OutputConfig().rows_per_file)
    num_batches = -(-num_rows // BATCH_ROWS)
    return {
        "segments": num_segments,
        "rows": num_rows,
        "batches": num_batches,
        "opens_per_file": max(opens.values()) - 1,
    }


if __name__ == "__main__":
    main()
