"""Build what `dpgen simulate` simulates from its options: rows with lengths, their order of work, and an engine model.

- Rows come from a configuration's dataset, or their lengths are sampled from a distribution.
- The engine model comes from options, or is calibrated with the configuration's engine.
- Nothing here joins other ranks or writes to a run directory.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
from dataclasses import dataclass

import numpy as np

from dpgen.config.schema import Config
from dpgen.config.sections import WorkConfig
from dpgen.config.vllm.sampling_numbers import MAX_SAMPLES
from dpgen.data.input_rows import InputRows
from dpgen.errors import ConfigError, suggest_name
from dpgen.formatting import format_count
from dpgen.log import setup_logging
from dpgen.scheduling.groups.prompt_groups import PromptGroups, RankState
from dpgen.scheduling.order import PromptTextFn, RowOrder, order_by_measured_lengths
from dpgen.scheduling.order_config import OrderConfig
from dpgen.simulation.lengths import sample_lengths
from dpgen.simulation.simulator import EngineCostModel, Workload

logger = logging.getLogger(__name__)

_CHARS_PER_TOKEN = 4
_ROWS_PER_SEQ = 16  # default number of sampled rows, for each sequence that can run
_MINIMA = {
    **dict.fromkeys(("rows", "group_rows", "max_num_seqs", "kv_tokens"), 1),
    **dict.fromkeys(("hint_noise", "group_noise", "prompt_tokens", "seed"), 0),
    **dict.fromkeys(("step_ms", "seq_us", "kv_ns", "prefill_us"), 0),
}
_LENGTHS_UNKNOWN = "the rows' lengths are unknown: pass --lengths KIND, or a configuration with --length-column COLUMN"


@dataclass(frozen=True)
class Scenario:
    """Everything that `dpgen simulate` simulates, but for the number of ranks."""

    workload: Workload
    work: WorkConfig
    model: EngineCostModel
    gpus_per_rank: int = 1


def build_scenario(options: argparse.Namespace) -> Scenario:
    """Return the scenario that the options of `dpgen simulate` describe.

    Raises:
        ConfigError: an option or a key of the configuration is wrong, or the rows' lengths are unknown.
        DpgenError: the engine could not be calibrated.
    """
    config = _load_config(options)
    if config is not None:
        setup_logging(0, config.run.log_format)
    _check_options(options, config)
    model = _calibrate_model(config) if config is not None and options.calibrate else _build_model(options)
    random = np.random.default_rng(options.seed + 1)
    if config is None or options.rows is not None:
        num_rows = options.rows or _ROWS_PER_SEQ * max(parse_ranks(options.ranks)) * model.max_num_seqs
        workload = _sample_workload(options, num_rows, random)
    else:
        workload = _load_workload(options, config)
    if options.prompt_tokens is not None:
        workload = dataclasses.replace(workload, prompt_lengths=np.full(len(workload.lengths), options.prompt_tokens))
    if options.hint_noise is not None:
        workload = dataclasses.replace(workload, order=_order_by_noisy_hints(workload.lengths, options, random))
    work = config.work if config else WorkConfig()
    return Scenario(workload, work, model, config.gpus_per_rank if config else 1)


def parse_ranks(text: str) -> list[int]:
    """Return the numbers of ranks in ``1,8,64``, ascending.

    Raises:
        ConfigError: the text holds anything else.
    """
    try:
        ranks = sorted({int(number) for number in text.split(",")})
    except ValueError:
        ranks = []
    if not ranks or ranks[0] < 1:
        raise ConfigError(f"--ranks={text}: must be numbers of at least 1, separated by commas")
    return ranks


def _load_config(options: argparse.Namespace) -> Config | None:
    if not options.configuration:
        if options.calibrate or options.length_column:
            raise ConfigError("--calibrate and --length-column need a configuration: dpgen simulate CONFIG.yaml ...")
        return None
    from dpgen.config.loader import load_from_args

    return load_from_args(options.configuration)


def _check_options(options: argparse.Namespace, config: Config | None) -> None:
    for name, minimum in _MINIMA.items():
        value = getattr(options, name)
        if value is not None and not minimum <= value < math.inf:
            bound = f"at least {minimum}" if value < minimum else "a finite number"
            raise ConfigError(f"--{name.replace('_', '-')}={value:g}: must be {bound}")
    if config is None or options.rows is not None:
        if options.lengths is None:
            raise ConfigError(_LENGTHS_UNKNOWN)
    elif options.group_rows > 1:
        raise ConfigError(f"--group-rows={options.group_rows}: only for sampled rows. Pass --lengths and --rows, too")


def _sample_workload(options: argparse.Namespace, num_rows: int, random: np.random.Generator) -> Workload:
    """Return rows without a dataset, their lengths sampled, in the order of work that a run would take."""
    group_rows, rows = options.group_rows, np.arange(num_rows)
    prompt_lengths = np.zeros(num_rows, dtype=np.int64)
    if group_rows == 1:
        return Workload(sample_lengths(options.lengths, num_rows, options.seed), prompt_lengths, RowOrder(rows))
    group = rows // group_rows
    lengths = sample_lengths(options.lengths, -(-num_rows // group_rows), options.seed)[group]
    lengths = np.maximum(1, lengths * random.lognormal(0.0, options.group_noise, num_rows)).astype(np.int64)
    prompt_groups = PromptGroups(group)
    order = order_by_measured_lengths(rows, prompt_groups, prompt_groups.count(RankState()))
    return Workload(lengths, prompt_lengths, order)


def _load_workload(options: argparse.Namespace, config: Config) -> Workload:
    """Return the rows of a configuration's dataset, in the order of work that a run would take."""
    from dpgen.data.input_loading import load_input
    from dpgen.data.openai_batch.recognition import resolve_format
    from dpgen.data.prompts.columns import select_prompt_columns
    from dpgen.distributed.group import SingleRankGroup
    from dpgen.output.column_check import check_columns
    from dpgen.scheduling.groups.prefix_groups import group_by_prefix
    from dpgen.scheduling.order import order_rows
    from dpgen.scheduling.progress.slow_rows import SlowRowFilter

    config = resolve_format(config)
    rows = load_input(config.data)
    check_columns(config, rows)
    row_ids, prompt_lengths = np.arange(len(rows)), np.zeros(len(rows), dtype=np.int64)
    lengths = _read_lengths(options, config, rows)
    order_config = OrderConfig.from_config(config, max(parse_ranks(options.ranks)))

    def order(row_ids: np.ndarray, text_of: PromptTextFn) -> RowOrder:
        if config.program.is_used:  # its calls say their prompts
            return order_rows(order_config, rows, row_ids, text_of)
        prompts = group_by_prefix(
            rows, row_ids, select_prompt_columns(config.prompt.without_media, rows.columns), text_of
        )
        prompt_lengths[row_ids] = prompts.lengths // _CHARS_PER_TOKEN
        return order_rows(order_config, rows, row_ids, text_of)

    slow_rows = SlowRowFilter(config.prompt, config.data.render_timeout_s, SingleRankGroup())
    ordered = slow_rows.compute(row_ids, order)
    if ordered is None:
        raise ConfigError(f"rendering takes longer than {slow_rows.limit} for several rows: a run would reject them")
    workload = Workload(lengths, prompt_lengths, ordered.append(row_ids[slow_rows.is_left_out(row_ids)]))
    return _repeat_rows(workload, _count_samples(config, rows))


def _count_samples(config: Config, rows: InputRows) -> np.ndarray:
    """Return the samples of each row, int64[num_rows]; 1 where a row has a number that vLLM rejects."""
    number = config.sampling.get("n", 1)
    counts = np.full(len(rows), number if isinstance(number, int) else 1, dtype=np.int64)
    if (column := config.sampling_columns.get("n")) is not None:
        values = rows.read_numbers(column, np.arange(len(rows)))
        is_count = (values >= 1) & (values <= MAX_SAMPLES)
        counts = np.where(np.isnan(values), counts, np.where(is_count, values, 1)).astype(np.int64)
    return counts


def _repeat_rows(workload: Workload, counts: np.ndarray) -> Workload:
    """Return the workload with a row for each sample, those of a row one after the other.

    Args:
        counts: samples of each row, int64[num_dataset_rows].
    """
    if len(counts) == 0 or counts.max() == 1:
        return workload
    order, in_order = workload.order, counts[workload.order.rows]
    ends, first = np.cumsum(in_order), np.cumsum(counts) - counts
    rows = np.repeat(first[order.rows] - (ends - in_order), in_order) + np.arange(ends[-1])
    repeated = dataclasses.replace(
        order,
        rows=rows,
        groups=None if order.groups is None else (ends - in_order)[order.groups],
        weights=None if order.weights is None else np.repeat(order.weights, in_order),
        lengths=None if order.lengths is None else np.repeat(order.lengths, in_order),
        prompt_groups=None,  # no lengths are measured: samples of a row differ as rows do
        num_probes=0,
        num_spread=0,
        adapter_groups=None,
        make_tracker=lambda: None,
    )
    logger.info(
        f"{format_count(len(counts), 'row')} have {format_count(len(rows), 'sample')} (sampling.n), which are "
        "simulated as rows of the same length"
    )
    return Workload(np.repeat(workload.lengths, counts), np.repeat(workload.prompt_lengths, counts), repeated)


def _read_lengths(options: argparse.Namespace, config: Config, rows: InputRows) -> np.ndarray:
    if options.lengths is not None:
        return sample_lengths(options.lengths, len(rows), options.seed)
    column = options.length_column or config.work.hint_column or config.sampling_columns.get("max_tokens")
    if column is None:
        raise ConfigError(_LENGTHS_UNKNOWN)
    if column not in rows.columns:
        raise ConfigError(f"{column!r} is no column of the dataset{suggest_name(column, rows.columns, 'columns')}")
    values = rows.read_numbers(column, np.arange(len(rows)))
    if len(values) and np.isnan(values).all():
        raise ConfigError(f"column {column!r} holds no number, so the rows' lengths are unknown")
    lengths: np.ndarray = np.maximum(1, np.nan_to_num(values, nan=1)).astype(np.int64)
    return lengths


def _order_by_noisy_hints(lengths: np.ndarray, options: argparse.Namespace, random: np.random.Generator) -> RowOrder:
    hints = lengths * random.lognormal(0.0, options.hint_noise, len(lengths))
    reason = f"by hints with a typical error of a factor of {np.exp(options.hint_noise):.1f}"
    rows = np.argsort(-hints, kind="stable")
    return RowOrder(rows, "longest_first", reason, lengths=hints[rows].astype(np.float32))


def _build_model(options: argparse.Namespace) -> EngineCostModel:
    return EngineCostModel(
        options.step_ms / 1e3,
        options.seq_us / 1e6,
        options.kv_ns / 1e9,
        options.prefill_us / 1e6,
        options.max_num_seqs,
        options.kv_tokens,
    )


def _calibrate_model(config: Config) -> EngineCostModel:
    """Measure the constants of the configuration's engine on this machine."""
    from dpgen.distributed.group import SingleRankGroup
    from dpgen.distributed.topology import read_topology
    from dpgen.engine.starting.launch import build_engine_spec, make_engine_factory
    from dpgen.engine.starting.limits import EngineLimits
    from dpgen.engine.starting.log_file import EngineLog
    from dpgen.engine.supervisor import EngineSupervisor
    from dpgen.simulation.calibration import calibrate

    def do_nothing() -> None: ...

    topology, group = read_topology({}), SingleRankGroup()
    sampling = {key: value for key, value in config.sampling.items() if key in ("temperature", "top_p", "top_k")}
    config = dataclasses.replace(config, sampling=sampling, sampling_by_rank=[])
    engine = EngineSupervisor(
        make_engine_factory(config, topology, group, None, EngineLog(config.run.log_level)),
        build_engine_spec(config, topology, None),
        dataclasses.replace(EngineLimits.from_config(config.run), max_deaths=1),
    )
    try:
        for note in engine.check_options(do_nothing):
            logger.info(note)
        info = engine.load_model(lambda measured_bytes: measured_bytes, do_nothing)
        return calibrate(engine, info)
    finally:
        engine.kill()
