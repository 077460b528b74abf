"""Estimate how long a run takes, on how many ranks, and what would make it shorter: `dpgen simulate`.

Lines for people or, with `--json`, one JSON object. Its keys are stable, those of `choices` included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dpgen.commands.arguments.parser import complete_configuration
from dpgen.config.secrets import redact_text
from dpgen.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, ConfigError, DpgenError
from dpgen.formatting import format_count, format_duration
from dpgen.simulation import reference
from dpgen.simulation.lengths import LENGTHS_HELP

if TYPE_CHECKING:
    from dpgen.commands.scenario import Scenario
    from dpgen.scheduling.order import RowOrder
    from dpgen.simulation.simulator import SimulationResult

_DESCRIPTION = """\
Run dpgen's own claims and admission in virtual time, with modelled engines: a step takes A + C x sequences + K x tokens
in the KV cache, and P for each prompt token. Print how long a run takes on each number of ranks, its GPU-hours, how
near that is to what no schedule can beat (the bound, see dpgen/scheduling/tail/bound.py), what other choices of work.*
would change, and up to how many ranks are efficient.

Rows and their lengths come from a configuration's dataset, or are sampled from a distribution:

  dpgen simulate conf.yaml --length-column num_generated_tokens --calibrate --ranks 8,16,32
  dpgen simulate --lengths lognormal:250:0.7 --rows 1000000 --ranks 1,64,4096
"""

_MIN_EFFICIENCY = 0.8
# Key in `--json`, which is stable → text for people.
_ALTERNATIVES = {
    "work.order=dataset": "work.order=dataset",
    "work.order=longest_first, by hints that are right": "work.order=longest_first, by exact hints",
    "work.steal=false": "work.steal=false",
    "contiguous pieces, and no help": "contiguous chunks of the file, without stealing",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments and description to its parser."""
    parser.description = _DESCRIPTION
    add = parser.add_argument
    complete_configuration(
        add("configuration", nargs="*", metavar="CONFIG.yaml | key=value", help="as for dpgen run; may be left out")
    )
    add("--ranks", default="1,8,64,512,4096", help="numbers of ranks, separated by commas (default: %(default)s)")
    add("--rows", type=int, help="number of rows with sampled lengths (default: 16 per sequence that can run)")
    add("--lengths", metavar="KIND", help=f"generated tokens per row: {LENGTHS_HELP}")
    add("--length-column", metavar="COLUMN", help="generated tokens per row, from a column of the dataset")
    add(
        "--hint-noise",
        type=float,
        metavar="SIGMA",
        help="longest rows first, by hints with a lognormal error of this sigma",
    )
    add(
        "--group-rows",
        type=int,
        default=1,
        metavar="N",
        help="rows with the same prompt; their lengths differ by --group-noise and are measured on probe rows",
    )
    add("--group-noise", type=float, default=0.2, metavar="SIGMA", help="lognormal (default: %(default)s)")
    add("--prompt-tokens", type=int, help="tokens of every prompt (default: the dataset's characters / 4, or 0)")
    add("--seed", type=int, default=0, help="seed of all sampling (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object instead of lines for people")
    _add_engine_arguments(parser)


def main(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    from dpgen.commands.scenario import build_scenario

    try:
        _print_report(options, build_scenario(options))
    except DpgenError as error:
        print(f"dpgen simulate: {redact_text(str(error))}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED
    return EXIT_OK


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "the engine (default: as measured with --calibrate, a Llama of 8 billion parameters in bf16 on one H100)"
    )
    add = group.add_argument
    add("--calibrate", action="store_true", help="measure A, C, K and P with the configuration's engine, here")
    add("--step-ms", type=float, default=reference.STEP_MS, help="A, milliseconds (default: %(default)s)")
    add("--seq-us", type=float, default=reference.SEQ_US, help="C, microseconds (default: %(default)s)")
    add("--kv-ns", type=float, default=reference.KV_NS, help="K, nanoseconds (default: %(default)s)")
    add("--prefill-us", type=float, default=reference.PREFILL_US, help="P, microseconds (default: %(default)s)")
    add("--max-num-seqs", type=int, default=reference.MAX_NUM_SEQS, help="sequences at a time (default: %(default)s)")
    add("--kv-tokens", type=int, help="tokens that the KV cache holds (default: no limit)")


def _print_report(options: argparse.Namespace, scenario: Scenario) -> None:
    from dpgen.commands.scenario import parse_ranks

    num_rows = len(scenario.workload.lengths)
    if num_rows == 0:
        raise ConfigError("there are no rows")
    ranks = [num_ranks for num_ranks in parse_ranks(options.ranks) if num_ranks <= num_rows] or [1]
    results = {num_ranks: _simulate(scenario, num_ranks) for num_ranks in ranks}
    alternatives = dict(_simulate_alternatives(scenario, ranks[-1]))
    if options.json:
        print(json.dumps(_format_json(scenario, results, alternatives)))
    else:
        print("\n".join(_format_text(scenario, results, alternatives)))


def _simulate(scenario: Scenario, num_ranks: int, order: RowOrder | None = None, **work: Any) -> SimulationResult:
    from dpgen.simulation.simulator import simulate

    workload = dataclasses.replace(scenario.workload, order=order or scenario.workload.order)
    return simulate(scenario.model, workload, num_ranks, dataclasses.replace(scenario.work, **work))


def _simulate_alternatives(scenario: Scenario, num_ranks: int) -> Iterator[tuple[str, SimulationResult]]:
    """Yield the results of other orders and claims for the same rows, by the keys of `_ALTERNATIVES`."""
    import numpy as np

    from dpgen.scheduling.order import RowOrder

    lengths, order = scenario.workload.lengths, scenario.workload.order
    rows = np.argsort(-lengths, kind="stable")
    longest_first = RowOrder(rows, "longest_first", lengths=lengths[rows].astype(np.float32))
    if order.kind != "dataset":
        yield "work.order=dataset", _simulate(scenario, num_ranks, RowOrder(np.sort(order.rows)))
    yield "work.order=longest_first, by hints that are right", _simulate(scenario, num_ranks, longest_first)
    yield "work.steal=false", _simulate(scenario, num_ranks, steal=False)
    # A script that gives each rank a contiguous chunk of the file. Shards are strided, so the chunks are interleaved.
    chunks = np.array_split(np.sort(order.rows), num_ranks)
    padded = np.concatenate([np.concatenate([chunk, np.full(len(chunks[0]) - len(chunk), -1)]) for chunk in chunks])
    rows = padded.reshape(num_ranks, -1).T.ravel()
    yield "contiguous pieces, and no help", _simulate(scenario, num_ranks, RowOrder(rows[rows >= 0]), steal=False)


def _format_json(
    scenario: Scenario, results: dict[int, SimulationResult], alternatives: dict[str, SimulationResult]
) -> dict[str, Any]:
    return {
        "num_rows": len(scenario.workload.lengths),
        "num_generated_tokens": int(scenario.workload.lengths.sum()),
        "engine": dataclasses.asdict(scenario.model),
        "order": scenario.workload.order.kind,
        "ranks": {
            str(num_ranks): {
                "wall_s": round(result.wall_s, 3),
                "gpu_hours": round(result.wall_s * num_ranks * scenario.gpus_per_rank / 3600, 3),
                "efficiency": round(result.efficiency, 4),
                "balance": round(result.balance, 4),
                "bound_s": round(result.bound_s, 3),
                "num_claims": result.num_claims,
                "num_preemptions": result.num_preemptions,
            }
            for num_ranks, result in results.items()
        },
        "choices": {name: round(result.wall_s, 3) for name, result in alternatives.items()},
        "most_ranks_that_pay": _find_max_efficient_ranks(results),
    }


def _format_text(
    scenario: Scenario, results: dict[int, SimulationResult], alternatives: dict[str, SimulationResult]
) -> Iterator[str]:
    yield from _format_scenario(scenario)
    yield ""
    yield f"{'ranks':>7} {'time':>14} {'GPU-hours':>11} {'bound':>14} {'efficiency':>11} {'balance':>8}"
    for num_ranks, result in results.items():
        gpu_hours = result.wall_s * num_ranks * scenario.gpus_per_rank / 3600
        fractions = f"{result.efficiency:>11.2f} {result.balance:>8.2f}"
        times = f"{format_duration(result.wall_s):>14} {gpu_hours:>11,.2f} {format_duration(result.bound_s):>14}"
        yield f"{num_ranks:>7,} {times} {fractions}"
    max_ranks = max(results)
    yield ""
    yield f"on {format_count(max_ranks, 'rank')} other choices would take:"
    for name, result in alternatives.items():
        change = 100 * (result.wall_s / results[max_ranks].wall_s - 1)
        yield f"  {change:>+5.0f} %  {_ALTERNATIVES[name]}"
    if num_preemptions := results[max_ranks].num_preemptions:
        yield (
            f"the KV cache is too small for {scenario.model.max_num_seqs:,} sequences at a time: "
            f"{format_count(num_preemptions, 'preemption')} on {format_count(max_ranks, 'rank')}"
        )
    max_efficient = _find_max_efficient_ranks(results)
    yield (
        f"largest of these numbers of ranks with an efficiency of at least {_MIN_EFFICIENCY}: {max_efficient:,}"
        if max_efficient
        else f"none of these numbers of ranks reaches an efficiency of {_MIN_EFFICIENCY}"
    )


def _format_scenario(scenario: Scenario) -> Iterator[str]:
    lengths, model = scenario.workload.lengths, scenario.model
    yield (
        f"{format_count(len(lengths), 'row')}, {lengths.sum():,} tokens to generate (mean {lengths.mean():,.0f}, "
        f"max {lengths.max():,}), prompts of {scenario.workload.prompt_lengths.mean():,.0f} tokens"
    )
    kv_cache = "without limit" if model.kv_tokens is None else f"of {model.kv_tokens:,} tokens"
    yield (
        f"engine: {1e3 * model.step_s:.3g} ms per step, {1e6 * model.seq_s:.3g} us per sequence, "
        f"{1e9 * model.kv_s:.3g} ns per token in the KV cache, {1e6 * model.prefill_s:.3g} us per prompt token, "
        f"at most {model.max_num_seqs:,} sequences, KV cache {kv_cache}"
    )
    yield str(scenario.workload.order)


def _find_max_efficient_ranks(results: dict[int, SimulationResult]) -> int:
    return max((num_ranks for num_ranks, result in results.items() if result.efficiency >= _MIN_EFFICIENCY), default=0)
