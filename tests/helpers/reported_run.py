"""Make a run directory as a run would leave it, without a run: with deaths, retries, errors and hostile text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpgen.journal.attempts import RejectedAttempt, Rejection, encode_attempt
from dpgen.journal.writer import JournalWriter
from dpgen.monitoring.status.record import (
    ErrorKind,
    ProcessIdentity,
    RankCounts,
    RankRecord,
    RunCounts,
    write_record,
)
from dpgen.records import Completion, RowError, RowResult

HOSTILE_TEXTS = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>",
    "</pre></details></main><iframe src=javascript:alert(3)></iframe><!-- ",
    "\x1b[31mred\x1b[0m \x00 NUL \x07 bell \u202e reversed \u2066 isolated \ud800 half",
    "x" * 100_000,
    "مرحبا بالعالم، هذا نص من اليمين إلى اليسار",
    "{{ 7 * 7 }} {% raw %} ]]> &amp; \" ' `",
    "<style>body{display:none}</style><base href=http://evil/><meta http-equiv=refresh content=0>",
    "\n" * 500 + "end",
)
SECRET = "hf_" + "abcdefghijklmnopqrstuvwxyz012345"


class ReportedRun:
    """A run directory.

    Args:
        texts: of the answers, in turn.
    """

    def __init__(self, path: Path, num_rows: int = 0, texts: Sequence[str] = ("an answer",)) -> None:
        self.path, self.texts = path, texts
        (path / "status").mkdir(parents=True)
        (path / "journal").mkdir()
        self.num_rows = num_rows

    def write_run_json(self, num_ranks: int = 2, attempt: int = 1) -> None:
        identity = {"input": {"num_rows": self.num_rows, "columns": ["prompt"], "content": "c0ffee", "version": 2}}
        identity |= {"model": "org/<b>model</b>", "sampling": {"n": 2}, "seed": 0}
        manifests = [{"rank": r, "busy_s": 50.0, "num_generated_tokens": 9_000} for r in range(num_ranks)]
        engine = {"max_num_seqs": 64, "max_model_len": 512, "device": "cuda", "versions": {"vllm": "0.27.0"}}
        content = {"identity": identity, "attempt": attempt, "dp_size": num_ranks, "manifests": manifests}
        content |= {"engine": engine, "versions": {"1": {"dpgen": "0.1.0"}}}
        (self.path / "run.json").write_text(json.dumps(content))
        config = "run: {dir: runs/a}\nmodel: m\ndata: {path: in.jsonl, prompt_column: prompt}\n"
        config += f"engine: {{hf_token: {SECRET}}}\n"
        (self.path / "config.yaml").write_text(config)

    def write_rows(self, attempt: int, rank: int, rows: Sequence[int], error: str | None = None) -> None:
        """Write results of rows: with an error, or with two samples each."""
        journal = JournalWriter(self.path / "journal", attempt, rank)
        for row in rows:
            text = self.texts[row % len(self.texts)]
            if error is not None:
                journal.append(RowResult(row, error=RowError(error, f"row {row}: {text}")))
                continue
            samples = (Completion(text, "stop", 5 + row % 90), Completion(f"{text} ({row})", "length", 100))
            journal.append(RowResult(row, 10 + row % 50, samples))
        journal.seal()
        journal.close()

    def write_rejected(self, attempt: int, rank: int, rows: Sequence[int]) -> None:
        """Write attempts at rows that a check has rejected."""
        journal = JournalWriter(self.path / "journal", attempt, rank)
        for row in rows:
            text = self.texts[row % len(self.texts)]
            result = RowResult(row, 10, (Completion(text, "stop", 20),))
            attempted = RejectedAttempt(result, (Rejection("regex", f"not found in {text[:200]}"),))
            journal.append_attempt(row, encode_attempt(attempted))
        journal.append(RowResult(rows[0], 10, (Completion("good", "stop", 5),)))
        journal.seal()
        journal.close()

    def write_history(
        self, rank: int, attempt: int = 1, *, start_time: float = 1e9, state: str = "finished", length_s: float = 60
    ) -> None:
        """Append a rank's history: ten seconds of start-up, then samples every five seconds, with a tail."""
        with (self.path / "status" / f"rank-{rank}.history.jsonl").open("a") as file:
            for sample in _make_samples(rank, attempt, start_time, state, length_s):
                file.write(json.dumps(sample) + "\n")

    def write_record(self, rank: int, num_ranks: int = 2, attempt: int = 1, **fields: Any) -> None:
        """Write a rank's status, as of a rank that has ended."""
        counts = RankCounts(num_rows=100, num_generated_tokens=9_000, num_prompt_tokens=1_000, num_cached_tokens=400)
        known = {
            "process": ProcessIdentity(f"node-<{rank}>", "elsewhere", 1, 1),
            "state": "finished",
            "phase": "finished",
            "counts": counts,
            "latencies": (0, 0, 5, 9, 30, 9, 1),
            "run": RunCounts(self.num_rows, self.num_rows),
            "errors": (ErrorKind("too_long", 2, 1, "<i>x</i>"),),
        }
        record = RankRecord(rank, num_ranks, attempt, **{**known, **fields})
        write_record(self.path / "status", record)


def make_eventful_run(path: Path, num_ranks: int = 2) -> ReportedRun:
    """Return a run of two attempts: the first was killed, rows were generated again, failed checks, and had errors."""
    run = ReportedRun(path, 400, HOSTILE_TEXTS)
    run.write_run_json(num_ranks, attempt=2)
    run.write_rows(1, 0, range(0, 150))
    run.write_rows(2, 0, range(140, 300))
    run.write_rows(2, 1, range(300, 380))
    run.write_rejected(2, 2, range(380, 390))
    run.write_rows(2, 3, range(391, 396), error="too_long")
    run.write_rows(2, 4, range(396, 400), error="<script>alert(9)</script>")
    for rank in range(num_ranks):
        run.write_history(rank, 1, state="", length_s=40)
        run.write_history(rank, 2, start_time=1e9 + 7_200)
        run.write_record(rank, num_ranks, 2)
    return run


def _make_samples(rank: int, attempt: int, start_time: float, state: str, length_s: float) -> Iterator[dict[str, Any]]:
    def at(elapsed_s: float, **fields: Any) -> dict[str, Any]:
        return {"attempt": attempt, "time": start_time + elapsed_s, "elapsed_s": elapsed_s, **fields}

    yield at(0.0, phase="starting", is_change=True)
    yield at(2.0, phase="loading the model", is_change=True)
    yield at(9.0, phase="loading the model", step="model", is_change=True)
    yield at(10.0, phase="generating", is_change=True)
    num_steps = int(length_s - 15) // 5
    for step in range(1, num_steps + 1):
        is_tail = step > num_steps - 2
        counts: dict[str, Any] = {"num_running": 64, "tokens_per_s": 1_000 - 40 * (rank % 5)}
        if is_tail:
            counts = {"num_running": 5} if rank % 2 == 0 else {}
        else:
            counts["run_num_unclaimed"] = 100 - step
        counts |= {
            "num_generated_tokens": 4_000 * step,
            "run_num_generated_tokens": 8_000 * step,
            "run_num_done": 40 * step,
        }
        counts |= {"num_engine_restarts": 1} if step >= 3 and rank == 1 else {}
        yield at(10.0 + 5 * step, phase="generating", **counts)
    if state:
        end = {"num_generated_tokens": 4_000 * num_steps, "run_num_generated_tokens": 8_000 * num_steps}
        yield at(length_s - 2, phase="writing the result", is_change=True)
        yield at(length_s, phase="finished", state=state, **end)
