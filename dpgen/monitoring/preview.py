"""Preview a run before it begins: its prompts, their lengths, failing rows, the order of work, and each rank's part.

- Everything comes from the functions that the run itself calls, and mistakes in the configuration are the run's errors.
- No process is started, no model is loaded, and nothing is written to the run directory.
- Of a large input a sample is read, and said to be one. The order of work is chosen from the sample from which the run
  chooses it, too.

Limits: an input of which rows are done already is shown whole. What only a loaded vLLM finds out (options that exclude
each other, illegal values of sampling parameters, too little memory) is not checked.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpgen.config.schema import Config
from dpgen.data.input_loading import load_input
from dpgen.data.input_rows import InputRows
from dpgen.data.media.policy import MediaPolicy
from dpgen.data.model_facts import (
    ContextLimit,
    find_context_limit,
    get_vocabulary_size,
    load_model_config,
    read_generation_config,
)
from dpgen.data.reading.files import check_run_dir_apart
from dpgen.distributed.group import SingleRankGroup
from dpgen.distributed.layout import Layout, build_layout
from dpgen.distributed.topology import Topology
from dpgen.engine.fake_backend import FakeBackend, FakeOptions
from dpgen.engine.messages import EngineSpec
from dpgen.engine.starting.launch import TextPipeline, build_engine_spec, load_text_steps
from dpgen.engine.starting.model_files import check_files, expand_model_path
from dpgen.engine.starting.pooling_text import guess_context
from dpgen.engine.vllm.field_names import read_vllm_fields
from dpgen.errors import ConfigError
from dpgen.formatting import format_count
from dpgen.journal.run_dir import RunDir
from dpgen.monitoring.preview_prompts import PromptView, PromptViewer
from dpgen.monitoring.preview_rows import ErrorGroup, ExaminedRows, RowExaminer, TokenCounts, examine_rows
from dpgen.monitoring.trackers import check_trackers
from dpgen.output.column_check import check_columns, check_result, list_used_columns
from dpgen.scheduling.groups.samples import SAMPLE_ROWS, sample_rows
from dpgen.scheduling.order import RowOrder
from dpgen.scheduling.order_config import OrderConfig
from dpgen.scheduling.programs.first_call import FirstCallBuilder
from dpgen.scheduling.programs.loading import load_program, pass_columns
from dpgen.scheduling.progress.slow_rows import SlowRowFilter
from dpgen.scheduling.request_builder import RequestBuilder
from dpgen.scheduling.sources import SourceMaker

_MAX_EXAMINE_S = 20.0
_FIRST_ROWS = 5


@dataclass(frozen=True)
class PreviewOptions:
    """Say what to preview.

    Attributes:
        num_prompts: how many rows from the first on are shown.
        rows: show these instead.
        max_examined: the most rows whose tokens are counted.
        num_ranks: processes that the job is to have.
    """

    num_prompts: int = 3
    rows: tuple[int, ...] = ()
    max_examined: int = 10_000
    num_ranks: int = 1


@dataclass(frozen=True)
class OrderView:
    """Hold the order of work, as the run's log has it.

    Attributes:
        is_sample: True if it was chosen, and its numbers are, from a sample of the rows.
    """

    kind: str
    description: str
    is_sample: bool


@dataclass(frozen=True)
class RankPart:
    """Hold the shard with which a rank begins; other ranks may steal from it.

    Attributes:
        rank: the first of the processes that share an engine.
        first_rows: the first rows, in order.
        num_prompt_tokens: an estimate where not every row was examined.
    """

    rank: int
    num_rows: int
    first_rows: list[int]
    num_prompt_tokens: int


@dataclass(frozen=True)
class Preview:
    """Hold everything that a preview shows; `dpgen preview --json` has it under these names.

    Attributes:
        num_examined: rows whose requests were made.
        is_sample: True if that is not all of them.
        token_counter: what counts the tokens: "tokenizer", "bytes" (the fake engine) or "characters / 4".
        tokens: of the prompts; None if no row has one.
        num_sound: examined rows that an engine would take.
        ranks_per_engine: processes that share an engine.
        unused_columns: columns that no request is made from; the result keeps them, unless `data.columns` leaves them
            out.
        notes: what else to know, one sentence each.
    """

    model: str
    num_rows: int
    num_examined: int
    is_sample: bool
    max_model_len: ContextLimit | None
    token_counter: str
    tokens: TokenCounts | None
    num_sound: int
    errors: list[ErrorGroup]
    prompts: list[PromptView]
    order: OrderView
    num_ranks: int
    ranks_per_engine: int
    ranks: list[RankPart]
    used_columns: list[str]
    unused_columns: list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def all_fail(self) -> bool:
        """Return True if each examined row fails."""
        return self.num_examined > 0 and self.num_sound == 0


def build_preview(config: Config, options: PreviewOptions) -> tuple[Preview, ExaminedRows, Any]:
    """Return the preview of a run, what was found of each examined row, and the model's configuration.

    The last is a `transformers.PretrainedConfig`; None where there is none, or for the fake engine.

    Raises:
        ConfigError: something in the configuration or the input is wrong, as in the run.
    """
    layout = build_layout(Topology(dp_size=options.num_ranks), config.parallel)
    check_files(config)
    spec = build_engine_spec(config, Topology(), None)
    rows, notes = _open_input(config)
    _check_row_numbers(options.rows, len(rows))
    text = load_text_steps(config, rows)
    notes += _check_option_names(spec)
    model_config, of_model, limit = _read_model(config)
    if text.pooling_context is not None:
        num_tokens = None if limit is None else limit.num_tokens
        vars(text.pooling_context).update(vars(guess_context(config, model_config, num_tokens)))
    notes += _find_long_context(config, model_config, limit)
    slow_rows = SlowRowFilter(config.prompt, config.data.render_timeout_s, SingleRankGroup())
    order, is_order_sample = _order_rows(config, rows, slow_rows, layout.num_engines)
    builder = _make_builder(config, rows, text, slow_rows)
    num_ids = None if text.engine_reason is None else get_vocabulary_size(model_config)
    examiner = RowExaminer(builder, spec, of_model, None if limit is None else limit.num_tokens, num_ids)
    used = [] if rows.is_empty else list(dict.fromkeys(list_used_columns(config, rows.columns)))
    examined = examine_rows(examiner, rows, used, options.max_examined, _MAX_EXAMINE_S)
    viewer = PromptViewer(config, examiner, text.tokenizer, MediaPolicy.from_config(config.data))
    preview = Preview(
        config.model,
        len(rows),
        len(examined),
        len(examined) < len(rows),
        limit,
        _describe_counter(config, text),
        examined.count_tokens(len(rows)),
        int(examined.is_sound.sum()),
        examined.errors,
        _view_prompts(viewer, rows, used, options),
        OrderView(order.kind, order.description, is_order_sample),
        options.num_ranks,
        layout.group_size,
        _divide_rows(config, order, layout, examined, len(rows)),
        used,
        [name for name in rows.columns if name not in used],
        [*notes, *_describe_text(config, text), *viewer.notes],
    )
    return preview, examined, model_config


def _open_input(config: Config) -> tuple[InputRows, list[str]]:
    """Return the input, checked as the run checks it, and notes."""
    run_dir = RunDir(config.run.dir)
    check_run_dir_apart(config.data.path, run_dir.path)
    run_dir.read_metadata()  # rejects a file in place of the directory
    rows = load_input(config.data)
    if rows.is_empty:
        return rows, ["the input has no rows, so the result will have none"]
    check_columns(config, rows)
    check_trackers(config.output.track)
    return rows, [note for _, note in check_result(config, rows)]


def _make_builder(
    config: Config, rows: InputRows, text: TextPipeline, slow_rows: SlowRowFilter
) -> RequestBuilder | FirstCallBuilder:
    """Return what builds the rows' requests, or those of the first calls of their programs."""
    program = load_program(config.program)
    render = text.render if program is None else pass_columns
    builder = RequestBuilder.from_config(config, rows, render, rejected_rows=slow_rows.errors)
    return builder if program is None else FirstCallBuilder(program, builder, text.render)


def _check_row_numbers(row_ids: tuple[int, ...], num_rows: int) -> None:
    for row in row_ids:
        if not 0 <= row < num_rows:
            raise ConfigError(f"--row={row}: the input has {format_count(num_rows, 'row')}, counted from 0")


def _check_option_names(spec: EngineSpec) -> list[str]:
    """Reject keys of `engine` and `sampling` that the engine doesn't know; return a note if that can't be told."""
    if spec.kind == "fake":
        FakeBackend(spec).check_options()
        return []
    fields = read_vllm_fields()
    if fields is None:
        return ["vLLM is not installed here, so the names of engine.* and sampling.* are not checked"]
    if mistakes := list(fields.find_unknown(spec)):
        raise ConfigError(*mistakes)
    return []


def _read_model(config: Config) -> tuple[Any, dict[str, Any], ContextLimit | None]:
    """Return the model's configuration, its own sampling, and its context."""
    if config.run.engine == "fake":
        options = FakeOptions(**config.engine)
        origin = "engine.max_model_len" if "max_model_len" in config.engine else "the fake engine's default"
        return None, {}, ContextLimit(options.max_model_len, origin)
    model = expand_model_path(config)
    model_config = load_model_config(model, config.engine)
    of_model = read_generation_config(model, model_config, config.engine)
    return model_config, of_model, find_context_limit(model_config, config.engine)


def _find_long_context(config: Config, model_config: Any, limit: ContextLimit | None) -> list[str]:
    """Return a note if `engine.max_model_len` is beyond the model's context, which vLLM rejects."""
    of_model = find_context_limit(model_config, {**config.engine, "max_model_len": None})
    if limit is None or of_model is None or limit.num_tokens <= of_model.num_tokens:
        return []
    return [
        f"engine.max_model_len={limit.num_tokens:,} exceeds the model's context of {of_model.num_tokens:,} "
        f"({of_model.origin}): vLLM rejects it, unless VLLM_ALLOW_LONG_MAX_MODEL_LEN=1"
    ]


def _order_rows(config: Config, rows: InputRows, slow_rows: SlowRowFilter, num_shards: int) -> tuple[RowOrder, bool]:
    """Return the order of all rows, or of the sample from which the run chooses, and whether it is a sample's."""
    row_ids, order_config = np.arange(len(rows)), OrderConfig.from_config(config, num_shards)
    if len(rows) <= SAMPLE_ROWS or config.work.order == "dataset":
        return slow_rows.order(order_config, rows, row_ids), False
    order = slow_rows.order(dataclasses.replace(order_config, is_sample=True), rows, sample_rows(row_ids))
    if order.kind == "dataset":
        order = RowOrder(row_ids, reason=order.reason)
    return order, True


def _view_prompts(
    viewer: PromptViewer, rows: InputRows, columns: list[str], options: PreviewOptions
) -> list[PromptView]:
    row_ids = np.array(options.rows or range(min(options.num_prompts, len(rows))), dtype=np.int64)
    values = rows.iter_rows(row_ids, columns) if len(row_ids) else iter([])
    return [viewer.view(row, columns) for row, columns in zip(row_ids.tolist(), values, strict=True)]


def _divide_rows(
    config: Config, order: RowOrder, layout: Layout, examined: ExaminedRows, num_rows: int
) -> list[RankPart]:
    """Return each engine's shard, scaled to all rows where the order is a sample's."""
    tokens = np.maximum(examined.num_tokens, 0)  # by row, unless they are a sample
    mean_tokens = float(tokens.mean()) if len(tokens) else 0.0
    if len(order.rows) < num_rows:
        order = dataclasses.replace(order, lengths=None)  # a sample's rows are too few to plan the end by
    shards = SourceMaker(order, config.work, layout.num_engines, lockstep=layout.lockstep).shards
    scale = num_rows / max(1, len(order.rows))
    parts = []
    for index in range(layout.num_engines):
        row_ids = shards.list_first_rows(order.rows, index)
        # Single rows are dealt in turn, so that their number is known without the order.
        is_dealt = not (shards.groups or shards.num_heads)
        count = len(range(index, num_rows, layout.num_engines)) if is_dealt else round(len(row_ids) * scale)
        first = row_ids[:_FIRST_ROWS].tolist()
        num_tokens = int(tokens[row_ids].sum()) if len(tokens) == num_rows else round(mean_tokens * count)
        parts.append(RankPart(index * layout.group_size, count, first, num_tokens))
    return parts


def _describe_counter(config: Config, text: TextPipeline) -> str:
    if config.run.engine == "fake":
        return "bytes"
    return "tokenizer" if text.tokenizer is not None or config.prompt.token_ids_column else "characters / 4"


def _describe_text(config: Config, text: TextPipeline) -> list[str]:
    notes = []
    if config.run.engine == "fake":
        notes.append("run.engine=fake: a token is a byte, and no chat template is applied")
    elif text.engine_reason and not config.prompt.token_ids_column:
        notes.append(
            f"only vLLM can tokenize these prompts ({text.engine_reason}): tokens are estimated, and rows that are too "
            "long are not found"
        )
    if config.parallel.engines_per_rank not in ("auto", 1):
        notes.append(
            f"each rank runs {config.parallel.engines_per_rank} engines: the estimate of time takes it for one"
        )
    parses = config.output.tool_parser is not None or config.output.reasoning != "keep"
    if parses and config.run.engine != "fake":
        notes.append("the parsers of output.* may change sampling.skip_special_tokens when the run begins")
    if config.reads_requests:
        notes.append("sampling of a batch file's lines is completed and checked by vLLM's own classes, in the run")
    if config.check.is_used:
        most = format_count(config.check.max_attempts, "time")
        notes.append(f"completions are checked, and generated up to {most}: the estimate counts one")
    if config.program.is_used:
        notes.append(
            "prompts are those of the first call of each row's program: its other calls follow from the answers, so "
            "the estimate counts one call a row"
        )
    if config.sampling_columns:
        notes.append("whether the values of sampling.from_columns are legal is checked by the engine, in the run")
    return notes
