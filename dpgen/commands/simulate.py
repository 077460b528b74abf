"""`dpgen simulate`: how long a run would take, on how many ranks, and what would make it shorter."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpgen.config.schema import Config, WorkConfig
from dpgen.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, ConfigError, DpgenError, suggest_name
from dpgen.formatting import format_count, format_duration
from dpgen.scheduling.order import RowOrder, order_by_measured_lengths
from dpgen.scheduling.prompt_groups import PromptGroups, RankState
from dpgen.simulation.lengths import LENGTHS_HELP, sample_lengths
from dpgen.simulation.simulator import EngineCostModel, SimulationResult, simulate

_DESCRIPTION = """\
Runs dpgen's own claims and admission in virtual time, with engines that are a formula: a step takes
A + C x sequences + K x tokens in the KV cache, and P for each prompt token. Says how long a run would take on so many
ranks, how many GPU-hours, how near that is to what no schedule can beat (all work at full batches, or the longest row),
what other choices of work.* would change, and up to how many ranks pay.

Rows and their lengths come from a configuration's dataset, or are drawn from a distribution:

  dpgen simulate conf.yaml --length-column num_generated_tokens --calibrate --ranks 8,16,32
  dpgen simulate --lengths lognormal:250:0.7 --rows 1000000 --ranks 1,64,4096
"""
_MIN_EFFICIENCY = 0.8  # efficiency from which on a number of ranks is said to pay
_CHARS_PER_TOKEN = 4


@dataclass(frozen=True)
class Scenario:
    """What is simulated.

    Attributes:
        lengths, prompt_lengths: tokens of each row, int64.
        order: the order of work that a run would take.
    """

    lengths: np.ndarray
    prompt_lengths: np.ndarray
    order: RowOrder
    work: WorkConfig
    model: EngineCostModel
    gpus_per_rank: int = 1


def main(arguments: Sequence[str]) -> int:
    """Runs the command; the exit status."""
    parser = _parser()
    try:
        options = parser.parse_intermixed_args(list(arguments))
    except SystemExit as ended:
        return int(ended.code or 0)
    try:
        _report(options, _build_scenario(options))
    except ConfigError as error:
        print(f"dpgen simulate: {error}", file=sys.stderr)
        return EXIT_USAGE
    except DpgenError as error:
        print(f"dpgen simulate: {error}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "dpgen simulate", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("configuration", nargs="*", metavar="CONFIG.yaml | key=value", help="as for dpgen run; may be left out")
    add("--ranks", default="1,8,64,512,4096", help="numbers of ranks, with commas (default: %(default)s)")
    add("--rows", type=int, help="how many rows, where lengths are drawn (default: 16 for each sequence that can run)")
    add("--lengths", metavar="KIND", help=f"generated tokens a row: {LENGTHS_HELP}")
    add("--length-column", metavar="COLUMN", help="generated tokens a row, from a column of the dataset")
    add(
        "--hint-noise",
        type=float,
        metavar="SIGMA",
        help="longest rows first, by hints that are off by this lognormally",
    )
    add(
        "--group-rows",
        type=int,
        default=1,
        metavar="N",
        help="so many rows have one prompt: their lengths differ by --group-noise, and are learnt from each other",
    )
    add("--group-noise", type=float, default=0.2, metavar="SIGMA", help="lognormally (default: %(default)s)")
    add("--prompt-tokens", type=int, help="tokens of every prompt (default: the dataset's characters / 4, or 0)")
    add("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    add("--json", action="store_true", help="one JSON object instead of lines for people")
    engine = parser.add_argument_group(
        "the engine (default: as measured with --calibrate, a Llama of 8 billion parameters in bf16 on one H100)"
    )
    add = engine.add_argument
    add("--calibrate", action="store_true", help="measure A, C, K and P with the configuration's engine, here")
    add("--step-ms", type=float, default=6.0, help="A, milliseconds (default: %(default)s)")
    add("--seq-us", type=float, default=11.0, help="C, microseconds (default: %(default)s)")
    add("--kv-ns", type=float, default=52.0, help="K, nanoseconds (default: %(default)s)")
    add("--prefill-us", type=float, default=23.0, help="P, microseconds (default: %(default)s)")
    add("--max-num-seqs", type=int, default=256, help="sequences at a time (default: %(default)s)")
    add("--kv-tokens", type=int, help="tokens that the KV cache holds (default: no limit)")
    return parser


def _build_scenario(options: argparse.Namespace) -> Scenario:
    config = _config(options)
    for name, value in {"--hint-noise": options.hint_noise, "--group-noise": options.group_noise}.items():
        if value is not None and value < 0:
            raise ConfigError(f"{name} must be at least 0")
    work = config.work if config else WorkConfig()
    model = _calibrate_model(config) if options.calibrate else _build_model(options)
    random = np.random.default_rng(options.seed + 1)
    if config is None or options.rows is not None:
        if options.lengths is None:
            raise ConfigError("how long are the rows? Give --lengths KIND, or a configuration and --length-column")
        num_rows = options.rows or 16 * max(_ranks(options)) * model.max_num_seqs
        lengths, order = _draw_rows(options, num_rows, random)
        prompts = np.zeros(num_rows, dtype=np.int64)
    else:
        lengths, prompts, order = _load_rows(options, config)
    if config is not None and options.rows is None and options.group_rows > 1:
        raise ConfigError("--group-rows is for rows that are drawn: give --lengths and --rows")
    if options.prompt_tokens is not None:
        prompts = np.full(len(lengths), options.prompt_tokens)
    if options.hint_noise is not None:
        hints = lengths * random.lognormal(0.0, options.hint_noise, len(lengths))
        reason = f"by hints that are off by a factor of {np.exp(options.hint_noise):.1f}, mostly"
        order = RowOrder(np.argsort(-hints, kind="stable"), "longest_first", reason)
    return Scenario(lengths, prompts, order, work, model, config.gpus_per_rank if config else 1)


def _draw_rows(options: argparse.Namespace, num_rows: int, random: np.random.Generator) -> tuple[np.ndarray, RowOrder]:
    """Lengths of rows that are in no dataset, and the order of work that a run would take."""
    group_rows, every = options.group_rows, np.arange(num_rows)
    if group_rows < 1:
        raise ConfigError(f"--group-rows {group_rows}: it must be at least 1")
    if group_rows == 1:
        return sample_lengths(options.lengths, num_rows, options.seed), RowOrder(every)
    lengths = sample_lengths(options.lengths, -(-num_rows // group_rows), options.seed)[every // group_rows]
    lengths = np.maximum(1, lengths * random.lognormal(0.0, options.group_noise, num_rows)).astype(np.int64)
    siblings = PromptGroups(every // group_rows)
    return lengths, order_by_measured_lengths(every, siblings, siblings.count(RankState()))


def _config(options: argparse.Namespace) -> Config | None:
    if not options.configuration:
        if options.calibrate or options.length_column:
            raise ConfigError("--calibrate and --length-column need a configuration: dpgen simulate CONFIG.yaml ...")
        return None
    from dpgen.config.loader import load_from_args

    return load_from_args(options.configuration)


def _load_rows(options: argparse.Namespace, config: Config) -> tuple[np.ndarray, np.ndarray, RowOrder]:
    """Lengths, prompt lengths and the order of work of a configuration's rows."""
    from dpgen.data.input_rows import load_input
    from dpgen.data.render import make_prompt_text_fn
    from dpgen.scheduling.order import order_rows
    from dpgen.scheduling.prefix_groups import group_by_prefix

    rows = load_input(config.data)
    config.prompt.check_columns(rows.columns)
    every, text_of = np.arange(len(rows)), make_prompt_text_fn(config.prompt)
    column = options.length_column or config.work.hint_column or config.sampling_columns.get("max_tokens")
    if options.lengths is not None:
        lengths = sample_lengths(options.lengths, len(rows), options.seed)
    elif column is None:
        raise ConfigError("how long are the rows? Give --length-column COLUMN, or --lengths KIND")
    elif column not in rows.columns:
        raise ConfigError(f"{column!r} is no column of the dataset{suggest_name(column, rows.columns, 'columns')}")
    else:
        lengths = np.maximum(1, np.nan_to_num(rows.read_numbers(column, every), nan=1)).astype(np.int64)
    prompts = group_by_prefix(rows, every, config.prompt.columns(rows.columns), text_of).lengths // _CHARS_PER_TOKEN
    return lengths, prompts, order_rows(config, rows, every, text_of)


def _build_model(options: argparse.Namespace) -> EngineCostModel:
    model = EngineCostModel(
        options.step_ms / 1e3,
        options.seq_us / 1e6,
        options.kv_ns / 1e9,
        options.prefill_us / 1e6,
        options.max_num_seqs,
        options.kv_tokens,
    )
    least = {"--step-ms": model.step_s, "--seq-us": model.seq_s, "--kv-ns": model.kv_s, "--prefill-us": model.prefill_s}
    for name, value in least.items():
        if value < 0:
            raise ConfigError(f"{name} must be at least 0")
    if model.max_num_seqs < 1 or (model.kv_tokens is not None and model.kv_tokens < 1):
        raise ConfigError("--max-num-seqs and --kv-tokens must be at least 1")
    return model


def _calibrate_model(config: Config | None) -> EngineCostModel:
    """The constants of the configuration's engine, measured on this machine."""
    assert config is not None
    from dpgen.distributed.group import SingleRankGroup
    from dpgen.distributed.topology import read_topology
    from dpgen.engine.launch import build_engine_spec, make_engine_factory
    from dpgen.engine.supervisor import EngineSupervisor
    from dpgen.simulation.calibration import calibrate

    def say(line: str) -> None:
        print(f"calibrating: {line}", file=sys.stderr)

    def nothing() -> None: ...

    topology, group = read_topology({}), SingleRankGroup()
    sampling = {key: value for key, value in config.sampling.items() if key in ("temperature", "top_p", "top_k")}
    config = dataclasses.replace(config, sampling=sampling, sampling_by_rank=[])
    engine = EngineSupervisor(
        make_engine_factory(config, topology, group, None),
        build_engine_spec(config, topology, None),
        say,
        timeout_s=config.run.engine_timeout_s,
        start_timeout_s=config.run.engine_start_timeout_s,
        max_deaths=1,
    )
    try:
        for note in engine.check_options(nothing):
            say(note)
        info = engine.load_model(lambda measured: measured, nothing)
        return calibrate(engine, info, say)
    finally:
        engine.kill()


def _ranks(options: argparse.Namespace) -> list[int]:
    try:
        ranks = sorted({int(each) for each in options.ranks.split(",")})
    except ValueError:
        ranks = []
    if not ranks or ranks[0] < 1:
        raise ConfigError(f"--ranks {options.ranks}: give numbers from 1, with commas between them")
    return ranks


def _report(options: argparse.Namespace, scene: Scenario) -> None:
    num_rows = len(scene.lengths)
    if num_rows == 0:
        raise ConfigError("there are no rows")
    ranks = [number for number in _ranks(options) if number <= num_rows] or [1]
    outcomes = {number: _simulate(scene, number) for number in ranks}
    choices = dict(_simulate_alternatives(scene, ranks[-1]))
    if options.json:
        print(json.dumps(_format_json(scene, outcomes, choices)))
        return
    print("\n".join(_format_text(scene, outcomes, choices)))


def _simulate(scene: Scenario, num_ranks: int, order: RowOrder | None = None, **work: Any) -> SimulationResult:
    changed = dataclasses.replace(scene.work, **work)
    return simulate(scene.model, scene.lengths, scene.prompt_lengths, order or scene.order, num_ranks, changed)


def _simulate_alternatives(scene: Scenario, num_ranks: int) -> Iterator[tuple[str, SimulationResult]]:
    """Other ways to deal the same rows to so many ranks."""
    by_length = RowOrder(np.argsort(-scene.lengths, kind="stable"), "longest_first")
    if scene.order.kind != "dataset":
        yield "work.order=dataset", _simulate(scene, num_ranks, RowOrder(np.sort(scene.order.rows)))
    yield "work.order=longest_first, by hints that are right", _simulate(scene, num_ranks, by_length)
    yield "work.steal=false", _simulate(scene, num_ranks, steal=False)
    # What a script does that gives each rank a piece of the file.
    pieces = np.array_split(np.sort(scene.order.rows), num_ranks)
    strided = np.concatenate([np.concatenate([piece, np.full(len(pieces[0]) - len(piece), -1)]) for piece in pieces])
    dealt = strided.reshape(num_ranks, -1).T.ravel()
    yield "contiguous pieces, and no help", _simulate(scene, num_ranks, RowOrder(dealt[dealt >= 0]), steal=False)


def _format_json(
    scene: Scenario, outcomes: dict[int, SimulationResult], choices: dict[str, SimulationResult]
) -> dict[str, Any]:
    return {
        "num_rows": len(scene.lengths),
        "num_generated_tokens": int(scene.lengths.sum()),
        "engine": dataclasses.asdict(scene.model),
        "order": scene.order.kind,
        "ranks": {
            str(number): {
                "wall_s": round(found.wall_s, 3),
                "gpu_hours": round(found.wall_s * number * scene.gpus_per_rank / 3600, 3),
                "efficiency": round(found.efficiency, 4),
                "balance": round(found.balance, 4),
                "bound_s": round(found.bound_s, 3),
                "num_claims": found.num_claims,
                "num_preemptions": found.num_preemptions,
            }
            for number, found in outcomes.items()
        },
        "choices": {name: round(found.wall_s, 3) for name, found in choices.items()},
        "most_ranks_that_pay": _find_max_efficient_ranks(outcomes),
    }


def _format_text(
    scene: Scenario, outcomes: dict[int, SimulationResult], choices: dict[str, SimulationResult]
) -> Iterator[str]:
    lengths, model = scene.lengths, scene.model
    yield (
        f"{format_count(len(lengths), 'row')}, {lengths.sum():,} tokens to generate (mean {lengths.mean():,.0f}, "
        f"longest {lengths.max():,}), prompts of {scene.prompt_lengths.mean():,.0f} tokens"
    )
    kv = "any number of" if model.kv_tokens is None else f"{model.kv_tokens:,}"
    yield (
        f"engine: {1e3 * model.step_s:.3g} ms a step, {1e6 * model.seq_s:.3g} us a sequence, {1e9 * model.kv_s:.3g} ns "
        f"a token in the KV cache, {1e6 * model.prefill_s:.3g} us a prompt token; {model.max_num_seqs:,} sequences, "
        f"{kv} tokens"
    )
    yield str(scene.order)
    yield ""
    yield f"{'ranks':>7} {'time':>14} {'GPU-hours':>11} {'efficiency':>11} {'balance':>8}"
    for number, found in outcomes.items():
        gpu_hours = found.wall_s * number * scene.gpus_per_rank / 3600
        measures = f"{found.efficiency:>11.2f} {found.balance:>8.2f}"
        yield f"{number:>7,} {format_duration(found.wall_s):>14} {gpu_hours:>11,.2f} {measures}"
    most = max(outcomes)
    yield ""
    yield f"on {format_count(most, 'rank')} other choices would take:"
    for name, found in choices.items():
        change = 100 * (found.wall_s / outcomes[most].wall_s - 1)
        yield f"  {change:>+5.0f} %  {name}"
    if outcomes[most].num_preemptions:
        yield f"the KV cache runs short: {outcomes[most].num_preemptions:,} sequences are set back on {most:,} ranks"
    pays = _find_max_efficient_ranks(outcomes)
    yield (
        f"up to {format_count(pays, 'rank')} pay, of those looked at: their efficiency is {_MIN_EFFICIENCY} or more"
        if pays
        else f"none of these numbers of ranks reaches an efficiency of {_MIN_EFFICIENCY}"
    )


def _find_max_efficient_ranks(outcomes: dict[int, SimulationResult]) -> int:
    return max((number for number, found in outcomes.items() if found.efficiency >= _MIN_EFFICIENCY), default=0)
