"""Measure how near short jobs come to the time that no schedule can beat, before and after a change.

    python benchmarks/tail.py [--waves 6,16] [--noise 0,0.3] [--skew 0,2] [--fake-rows 600] [--compare CHECKOUT]

sim    four ranks in the simulator, a wave being 1,024 rows; steps as a model of 8 billion parameters takes them on an
       H100 (`dpgen.simulation.reference`). `--noise` is the error of the hints, `--skew` the seconds after which two of
       the ranks start, the second half as late.
fake   whole jobs of four ranks on the fake engine, a sixteenth of the sequences and of the lengths: what the closing
       lines say. `--compare` runs them in turn with the package of another checkout.

"Before" in the simulator is the same order without expected lengths: no rank yields, and no block of rows is set apart.
Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from measure import (
    REPO,
    build_torchrun_command,
    make_parser,
    make_rows,
    run_benchmark,
    time_command,
    write_rows,
)

_LONGEST = {"chat": 2048, "reasoning": 3500}
_RANKS, _SEQS = 4, 256


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--waves", default="6,16")
    parser.add_argument("--noise", default="0,0.3")
    parser.add_argument("--skew", default="0,2")
    parser.add_argument("--fake-rows", type=int, default=0, help="rows of the whole jobs; 0 for none")
    parser.add_argument("--rounds", type=int, default=1, help="of the whole jobs")
    parser.add_argument("--compare", help="a checkout whose package runs the whole jobs in turn with this one's")
    options = parser.parse_args()

    def measure(work_dir: Path) -> dict[str, Any]:
        record = {"sim": simulate_all(options)}
        if options.fake_rows:
            record["fake"] = run_fake_jobs(options, work_dir)
        return record

    run_benchmark("tail", options.dir, measure)


def simulate_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    records = []
    print(f"sim   {'workload':<10} {'waves':>5} {'noise':>5} {'skew':>4} {'bound':>8} {'before':>7} {'after':>7}")
    for kind in _LONGEST:
        for waves in map(float, options.waves.split(",")):
            for noise in map(float, options.noise.split(",")):
                for skew_s in map(float, options.skew.split(",")):
                    record = simulate_case(kind, round(waves * _RANKS * _SEQS), noise, skew_s)
                    records.append(record)
                    print(
                        f"sim   {kind:<10} {waves:>5g} {noise:>5g} {skew_s:>4g} {record['bound_s']:>6.2f} s "
                        f"{record['before']:>7.3f} {record['after']:>7.3f}",
                        flush=True,
                    )
    return records


def simulate_case(kind: str, num_rows: int, noise: float, skew_s: float) -> dict[str, Any]:
    """Return the bound, and what fraction of the time taken it is, before and after."""
    import numpy as np

    from dpgen.config.sections import WorkConfig
    from dpgen.scheduling.order import RowOrder
    from dpgen.simulation import reference
    from dpgen.simulation.simulator import EngineCostModel, Workload, simulate

    costs = (reference.STEP_MS / 1e3, reference.SEQ_US / 1e6, reference.KV_NS / 1e9, reference.PREFILL_US / 1e6)
    model = EngineCostModel(*costs, max_num_seqs=_SEQS)
    rows = make_rows(kind, num_rows, _LONGEST[kind])
    lengths = np.array([row["budget"] for row in rows])
    prompt_lengths = np.array([len(row["prompt"].split()) for row in rows])
    hints = lengths * np.random.default_rng(1).lognormal(0.0, noise, num_rows)
    positions = np.argsort(-hints, kind="stable")
    after = RowOrder(positions, "longest_first", lengths=hints[positions].astype(np.float32))
    start_s = {0: skew_s, 1: skew_s / 2}
    record: dict[str, Any] = {"workload": kind, "rows": num_rows, "noise": noise, "skew_s": skew_s}
    for name, order in (("before", dataclasses.replace(after, lengths=None)), ("after", after)):
        result = simulate(model, Workload(lengths, prompt_lengths, order), _RANKS, WorkConfig(), start_s=start_s)
        late_s = sum(start_s.values()) / _RANKS  # no schedule makes use of the time before an engine is ready
        record |= {"bound_s": round(result.bound_s + late_s, 3)}
        record[name] = round((result.bound_s + late_s) / result.wall_s, 4)
    return record


def run_fake_jobs(options: argparse.Namespace, work_dir: Path) -> list[dict[str, Any]]:
    ways = {"after": REPO, **({"before": Path(options.compare)} if options.compare else {})}
    records = []
    for kind, longest in _LONGEST.items():
        rows = make_rows(kind, options.fake_rows, longest // 4)
        data = write_rows(work_dir / f"{kind}.jsonl", rows)
        for number in range(options.rounds):
            for name, checkout in ways.items():
                run_dir = work_dir / f"{kind}-{number}-{name}"
                record = {"workload": kind, "way": name, **run_fake_job(run_dir, data, checkout)}
                records.append(record)
                print(f"fake  {record}", flush=True)
    return records


def run_fake_job(run_dir: Path, data: Path, checkout: Path) -> dict[str, Any]:
    """Return the closing lines' figures of one job of four ranks, 16 sequences each."""
    engine = {"max_num_seqs": 16, "max_model_len": 4096, "step_s": 0.024, "seq_s": 0.002}
    words = [f"run.dir={run_dir}", "model=fake", f"data.path={data}", "data.prompt_column=prompt"]
    words += ["run.engine=fake", f"engine={json.dumps(engine)}", "sampling.from_columns={max_tokens: budget}"]
    command = [*build_torchrun_command(_RANKS), "-m", "dpgen", "run", *words]
    log = run_dir.with_suffix(".log")
    wall_s = time_command(command, log, checkout)
    metadata = json.loads((run_dir / "run.json").read_text())
    busy_s = [rank["busy_s"] for rank in metadata["manifests"]]
    tokens = sum(rank["num_generated_tokens"] for rank in metadata["manifests"])
    return {
        "wall_s": round(wall_s, 1),
        "busy_s": busy_s,
        "tokens_per_s": round(tokens / max(busy_s)),
        "balance": round(sum(busy_s) / len(busy_s) / max(busy_s), 3),
        "efficiency": metadata.get("efficiency"),
    }


if __name__ == "__main__":
    main()
