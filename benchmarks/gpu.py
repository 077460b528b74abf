"""Measure dpgen on the GPUs of one host: one table, row by row, against `LLM.generate()` and over several ranks.

    python benchmarks/gpu.py [--only '1b-*,8b-dpgen'] [--gpus 4] [--budget-s 240] [--scale 0.5]
    python benchmarks/gpu.py --list

Models of 1 and 8 billion parameters with random weights, made here. Rows of one GPU run at the same time on different
GPUs; rows of several GPUs run alone. The order of the rows is that of their importance, except that a row's base comes
first: with --budget-s, rows that would not end in time are left out, and said. Start-up is not in tokens/s.

Prints each row when it is measured, then the tables as markdown with the machine, versions, commit and date, each row's
command, and one JSON line last.
"""

from __future__ import annotations

import fnmatch
import json
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from gpu_rows import BenchmarkRow, list_rows
from gpu_runs import RowRunner
from measure import describe_machine, list_gpu_names, make_parser, run_benchmark

_MIN_TIMEOUT_S = 150.0
_BUDGET_SLACK_S = 20.0


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--only", default="*", help="names of rows, separated by commas; * and ? as in a shell")
    parser.add_argument("--list", action="store_true", help="print the rows and their commands, and run none")
    parser.add_argument("--gpus", type=int, help="how many of the visible GPUs to use; all by default")
    parser.add_argument("--budget-s", type=float, help="leave out rows that would not end within these seconds")
    parser.add_argument("--scale", type=float, default=1.0, help="multiply the number of rows of each dataset")
    parser.add_argument("--model", help="a directory, in place of the random models")
    parser.add_argument("--engine", help="engine options as JSON, in place of those of the records")
    parser.add_argument("--commit", help="the commit, where this copy has no repository")
    options = parser.parse_args()
    gpus = _list_visible()[: options.gpus]
    patterns = options.only.split(",")
    rows = list_rows(max(1, len(gpus)), options.scale)
    unknown = [pattern for pattern in patterns if not fnmatch.filter([row.name for row in rows], pattern)]
    if unknown:
        parser.error(f"--only: no row is named {', '.join(unknown)} with {len(gpus)} GPUs; --list shows the rows")
    rows = [row for row in rows if any(fnmatch.fnmatch(row.name, pattern) for pattern in patterns)]
    machine = describe_machine()
    if options.commit:
        machine["commit"] = options.commit

    def measure(work_dir: Path) -> dict[str, Any]:
        runner = RowRunner(work_dir, options.model, json.loads(options.engine) if options.engine else None)
        if options.list:
            for row in rows:
                print(f"{row.name} (GPUs: {row.gpus}, about {row.estimate_s():.0f} s): {runner.show_command(row)}\n")
            return {}
        table = GpuTable(runner, gpus or ["0"], options.budget_s)
        table.run(rows)
        print(table.format(rows, machine), flush=True)
        return table.measured

    run_benchmark("gpu", options.dir, measure, **machine)


def _list_visible() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(index) for index in range(len(list_gpu_names()))]


class GpuTable:
    """Run rows on the GPUs that are free, and format what they measured.

    Attributes:
        measured: by row; a row that failed or was left out has only the reason, as `not_run`.
    """

    def __init__(self, runner: RowRunner, gpus: list[str], budget_s: float | None) -> None:
        self.measured: dict[str, dict[str, Any]] = {}
        self._runner, self._num_gpus, self._free = runner, len(gpus), list(gpus)
        self._started_s, self._budget_s = time.monotonic(), budget_s
        self._changed = threading.Condition()

    def run(self, rows: list[BenchmarkRow]) -> None:
        """Run each row once its GPUs are free, in order."""
        threads = []
        for row in rows:
            with self._changed:
                self._changed.wait_for(partial(self._has_free, min(row.gpus, self._num_gpus)))
                if reason := self._find_obstacle(row):
                    self._record(row, {"not_run": reason})
                    continue
                gpus, self._free = self._free[: row.gpus], self._free[row.gpus :]
            thread = threading.Thread(target=self._run_row, args=(row, gpus))
            thread.start()
            threads.append(thread)
        for thread in threads:
            thread.join()

    def _has_free(self, count: int) -> bool:
        return len(self._free) >= count

    def _find_obstacle(self, row: BenchmarkRow) -> str | None:
        if row.gpus > self._num_gpus:
            return f"it needs {row.gpus} GPUs"
        remaining_s = self._compute_remaining_s()
        if row.estimate_s() > remaining_s:
            return f"it takes about {row.estimate_s():.0f} s, and {max(0.0, remaining_s):.0f} s are left"
        return None

    def _compute_remaining_s(self) -> float:
        elapsed_s = time.monotonic() - self._started_s
        return float("inf") if self._budget_s is None else self._budget_s - elapsed_s

    def _run_row(self, row: BenchmarkRow, gpus: list[str]) -> None:
        timeout_s = min(_MIN_TIMEOUT_S + 3 * row.estimate_s(), self._compute_remaining_s() + _BUDGET_SLACK_S)
        try:
            measured = {"gpus": gpus, **self._runner.run(row, gpus, timeout_s)}
        except SystemExit as error:  # the row's command failed
            measured = {"not_run": "it failed", "output": str(error)[-3_000:]}
        except Exception as error:  # noqa: BLE001 - the other rows are measured all the same
            measured = {"not_run": f"{type(error).__name__}: {error}"}
        with self._changed:
            self._record(row, measured)
            self._free = sorted([*self._free, *gpus], key=lambda gpu: (len(gpu), gpu))
            self._changed.notify_all()

    def _record(self, row: BenchmarkRow, measured: dict[str, Any]) -> None:
        self.measured[row.name] = measured
        elapsed_s = time.monotonic() - self._started_s
        print(f"{elapsed_s:5.0f} s  {row.name}: {json.dumps(measured)}", file=sys.stderr, flush=True)

    def format(self, rows: list[BenchmarkRow], machine: dict[str, Any]) -> str:
        """Return the tables as markdown."""
        found = [row for row in rows if "not_run" not in self.measured[row.name]]
        names = sorted({f"{machine['gpus'].count(name)} x {name}" for name in machine["gpus"]}) or ["no GPU"]
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        lines = [
            f"{', '.join(names)}, {machine['cores']} cores; {versions}, Python {machine['python']}; "
            f"commit {machine['commit']}, {machine['date']}."
        ]
        for size in dict.fromkeys(row.size for row in found):
            own = [row for row in found if row.size == size]
            rates = [f"| {row.title} | {self._format_rate(row)} |" for row in own if row.way != "profile"]
            if rates:
                lines += ["", f"| {size.upper()}, bf16, random weights | tokens/s | |", "|---|---|---|", *rates]
            steps = [f"| {row.title} | {self._format_step(row)} |" for row in own if row.way == "profile"]
            if steps:
                lines += ["", f"| {size.upper()} | step | processor | kernels | GPU busy |", "|---|---|---|---|---|"]
                lines += steps
        for row in rows:
            if reason := self.measured[row.name].get("not_run"):
                lines += ["", f"Not measured: {row.name}, {reason}."]
        lines += ["", "```bash", *(f"{self._runner.show_command(row)}    # {row.name}" for row in found), "```"]
        return "\n".join(lines)

    def _format_rate(self, row: BenchmarkRow) -> str:
        measured = self.measured[row.name]
        rate, remarks = measured["tokens_per_s"], []
        base = self.measured.get(row.base or "", {}).get("tokens_per_s")
        if base:
            ratio = rate / base / row.base_factor
            times = f"{row.base_factor} x " if row.base_factor > 1 else ""
            remarks.append(f"{ratio:.3f} of {times}{row.base}" if times else f"{ratio:.2f} times {row.base}")
        if row.ranks > 1:
            remarks.append(f"balance {measured['balance']:.3f}")
        if "of_the_bound" in measured:
            remarks.append(f"{measured['of_the_bound']} of the bound")
        if (busy := self._estimate_busy(row)) is not None:
            remarks.append(f"GPU busy {busy:.2f}")
        if row.death:
            remarks.append("complete" if measured["is_complete"] else "NOT COMPLETE")
        if row.way == "dpgen":
            ideal_s = measured["tokens"] / base / row.base_factor if base and row.gpus > 1 else None
            remarks.append(
                f"whole job {measured['wall_s']:.1f} s, {measured['seconds']:.1f} s generating"
                + (f", {ideal_s / measured['wall_s']:.2f} of ideal" if ideal_s else "")
            )
            remarks += [f"ready {measured['ready']}"] if "ready" in measured else []
            remarks += [measured["engines"]] if "engines" in measured else []
        return f"{rate:,.0f} | {'; '.join(remarks)}"

    def _estimate_busy(self, row: BenchmarkRow) -> float | None:
        """Return the fraction of time in which kernels run, by the kernels of a full step of the same model."""
        profile = self.measured.get(f"{row.size}-profile", {})
        if "kernels_ms" not in profile or row.workload != "chat" or row.engine:
            return None
        rate: float = self.measured[row.name]["tokens_per_s"] / row.gpus
        return float(rate * profile["kernels_ms"]) / 1e3 / int(profile["sequences"])

    def _format_step(self, row: BenchmarkRow) -> str:
        measured = self.measured[row.name]
        kernels, busy = "-", "-"
        if "kernels_ms" in measured:
            kernels = f"{measured['kernels_ms']:.1f} ms of {measured['profiled_step_ms']:.1f}"
            busy = f"{measured['gpu_busy']:.2f}"
        return f"{measured['step_ms']:.1f} ms | {measured['processor_ms']:.1f} ms | {kernels} | {busy}"


if __name__ == "__main__":
    main()
