"""Write the status files of ranks as they would, without ranks: of this host or of another one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from dpgen.monitoring.status.liveness import LivenessJudge
from dpgen.monitoring.status.record import ProcessIdentity, RankCounts, RankRecord, RunCounts, write_record
from dpgen.monitoring.status.run_status import RunWatcher
from helpers.clock import FakeClock

HERE = "boot-of-this-host pid:[1]"
ELSEWHERE = "boot-of-another-host pid:[1]"


class StatusFiles:
    """A run directory that ranks write their status to, and a reader whose clock and processes are the test's.

    Attributes:
        clock: the reader's.
        processes: of the reader's host: process id → (start, state).
    """

    def __init__(self, run_dir: Path, attempt: int = 1) -> None:
        self.run_dir, self.attempt = run_dir, attempt
        self.clock = FakeClock(1000.0)
        self.processes: dict[int, tuple[int, str]] = {}
        (run_dir / "status").mkdir(parents=True)
        self.write_run_json(attempt=attempt)
        judge = LivenessJudge(self.clock, HERE, self.processes.get)
        self.watcher = RunWatcher(run_dir, judge)
        self._sequence = 0

    def write_run_json(self, **fields: Any) -> None:
        (self.run_dir / "run.json").write_text(json.dumps(fields))

    def write(
        self, rank: int, num_ranks: int = 1, *, machine: str = HERE, is_running: bool = True, **fields: Any
    ) -> RankRecord:
        """Write a rank's record once more: its sequence number grows. `counts` and `run` are dictionaries."""
        self._sequence += 1
        pid = 100 + rank
        if machine == HERE and is_running:
            self.processes[pid] = (7, "S")
        elif machine == HERE:
            self.processes.pop(pid, None)
        fields = {"attempt": self.attempt, "phase": "generating", "time": 5e9 * (machine == ELSEWHERE), **fields}
        fields["counts"] = RankCounts(**fields.get("counts", {}))
        fields["run"] = RunCounts(**fields["run"]) if fields.get("run") else None
        host = "here" if machine == HERE else f"node-{rank}"
        record = RankRecord(
            rank, num_ranks, process=ProcessIdentity(host, machine, pid, 7), sequence=self._sequence, **fields
        )
        write_record(self.run_dir / "status", record)
        return record

    def rewrite(self, record: RankRecord) -> RankRecord:
        """Write a record again, as a rank does that lives on."""
        again = dataclasses.replace(record, sequence=record.sequence + 1)
        write_record(self.run_dir / "status", again)
        return again
