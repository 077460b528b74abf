"""Measure what checks cost: a JSON Schema, and a Python check that fails a fifth of all attempts, on the real engine.

    python benchmarks/checks.py [--rows 10000] [--rounds 3] [--ranks 1] [--side-by-side]

The tests' tiny model writes JSON by a grammar. Ways, in turn in every round, or at the same time on one core each:
- checked: rows are generated until they pass, at most --max-attempts times
- unchecked: as many rows as the checked run is expected to make attempts, so that both generate equally many tokens

Compares generated tokens per second from the first row submitted to the last one finished, and the processor time of
the rank, its workers and the engine for each attempt. Exits with an error unless every row is valid or explained.
Prints one JSON line last: attempts over their expected number, the throughputs and the processor times.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from measure import (
    REPO,
    TINY_ENGINE,
    compute_ratio,
    make_parser,
    make_rows,
    make_tiny_model,
    measure_in_turn,
    measure_side_by_side,
    run_benchmark,
    time_dpgen,
    write_rows,
)
from processor_time import ProcessorMeter

FAILING_FRACTION = 0.2
NUMBER = "(10|200|3000)"
GRAMMAR = rf"\[{NUMBER}(,{NUMBER}){{15}}\]"  # a JSON grammar would let a random model write blanks for ever
SCHEMA = {"type": "array", "items": {"enum": [10, 200, 3000]}, "minItems": 16, "maxItems": 16}


def fail_a_fifth(row: dict[str, Any], completion: Any) -> bool | str:
    """Fail by the row and the attempt alone; called by dpgen's workers."""
    digest = hashlib.blake2b(f"{row['prompt']}/{completion.attempt}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >= FAILING_FRACTION * 2**32 or "bad luck"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--max-attempts", type=int, default=5)
    parser.add_argument("--side-by-side", action="store_true", help="both ways at once, each on a core of its own")
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in ("rows", "ranks", "max_attempts", "side_by_side")}
    run_benchmark("checks", options.dir, lambda work_dir: Bench(options, work_dir).measure(), **settings)


class Bench:
    """Run both ways over rows of their own number, and read what the runs report."""

    def __init__(self, options: argparse.Namespace, work_dir: Path) -> None:
        self.options, self.work_dir = options, work_dir
        self.model = make_tiny_model(work_dir)
        self.expected = sum(FAILING_FRACTION**attempt for attempt in range(options.max_attempts))
        self.attempts: list[int] = []
        self.processor_ms: dict[str, dict[str, float]] = {}  # of the last round, by way and by process

    def measure(self) -> dict[str, Any]:
        ways = {"checked": self.run_checked, "unchecked": self.run_unchecked}
        if self.options.side_by_side:
            first, second = ways.items()
            rates = measure_side_by_side(first, second, self.options.rounds)
        else:
            rates = measure_in_turn(ways, self.options.rounds)
        return {
            "tokens_per_s": {name: round(statistics.median(values)) for name, values in rates.items()},
            "checked_over_unchecked": compute_ratio(rates["checked"], rates["unchecked"]),
            "processor_ms_per_attempt": self.processor_ms,
            "attempts_over_expected": round(max(self.attempts) / (self.expected * self.options.rows), 4),
        }

    def run_checked(self) -> float:
        check = {"function": "checks:fail_a_fifth", "json_schema": SCHEMA, "max_attempts": self.options.max_attempts}
        manifests = self._run("checked", self.options.rows, f"check={json.dumps(check)}")
        self.attempts.append(_count_attempts(self.options.rows, manifests))
        self._check_result(self.work_dir / "checked")
        return _compute_rate(manifests)

    def run_unchecked(self) -> float:
        return _compute_rate(self._run("unchecked", round(self.expected * self.options.rows)))

    def _run(self, name: str, num_rows: int, *arguments: str) -> list[dict[str, Any]]:
        data = write_rows(self.work_dir / f"{name}.jsonl", make_rows("constant:64", num_rows, 64))
        run_dir = self.work_dir / name
        shutil.rmtree(run_dir, ignore_errors=True)
        config = [f"run.dir={run_dir}", f"model={self.model}", f"data.path={data}", "data.prompt_column=prompt"]
        config += [f"sampling.structured_outputs={json.dumps({'regex': GRAMMAR})}", "sampling.max_tokens=200"]
        config += [f"engine={json.dumps(TINY_ENGINE)}", "output.parse=json", *arguments]
        path = str(REPO / "benchmarks")
        meter = ProcessorMeter(run_dir)
        with meter.running():
            time_dpgen(self.options.ranks, config, self.work_dir / f"{name}.log", PYTHONPATH=path)
        manifests: list[dict[str, Any]] = json.loads((run_dir / "run.json").read_text())["manifests"]
        self.processor_ms[name] = meter.measure_by_role(_count_attempts(num_rows, manifests))
        return manifests

    def _check_result(self, run_dir: Path) -> None:
        """Exit unless each row is valid, or has an error that explains why not."""
        import datasets

        datasets.disable_progress_bars()
        rows = datasets.load_dataset(str(run_dir / "dataset"), split="train", cache_dir=str(self.work_dir / "cache"))
        for row in rows:
            is_valid = row["error"] is None and len(json.loads(row["generated_text"])) == SCHEMA["minItems"]
            is_explained = row["error"] is not None and row["error"]["type"] == "check_failed"
            if not is_valid and not is_explained:
                sys.exit(f"row {row['row_id']} is neither valid nor explained: {row}")
        if len(rows) != self.options.rows:
            sys.exit(f"{len(rows)} of {self.options.rows} rows")


def _count_attempts(num_rows: int, manifests: list[dict[str, Any]]) -> int:
    return num_rows + sum(sum(manifest["num_retries"].values()) for manifest in manifests)


def _compute_rate(manifests: list[dict[str, Any]]) -> float:
    """Return tokens per second of all ranks together, those of rejected attempts included."""
    num_tokens = sum(manifest["num_generated_tokens"] + manifest["num_rejected_tokens"] for manifest in manifests)
    return float(num_tokens / max(manifest["busy_s"] for manifest in manifests))


if __name__ == "__main__":
    main()
