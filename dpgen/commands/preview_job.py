"""Build and print a preview with its estimate: what `dpgen preview` and `dpgen run --dry-run` share.

Only `commands` sees both what a preview holds (`dpgen.monitoring`) and what it estimates (`dpgen.simulation`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from dpgen.config.schema import Config
from dpgen.data.openai_batch.recognition import resolve_format
from dpgen.formatting import format_count, format_duration
from dpgen.monitoring.earlier_run import EarlierRun, find_earlier_run
from dpgen.monitoring.preview import Preview, PreviewOptions, build_preview
from dpgen.monitoring.preview_text import BAD, DIM, PLAIN, TITLE, Line, format_notes, format_preview, write_lines
from dpgen.simulation.estimate import READS_ONLY, Estimate, EstimateOptions, estimate_run


def print_preview(
    config: Config,
    options: PreviewOptions,
    *,
    as_json: bool = False,
    calibrate: str | None = None,
    gpu: str | None = None,
    lengths: str | None = None,
) -> None:
    """Print the preview of a run on stdout.

    Args:
        calibrate: an earlier run's directory; None for the run's own.
        gpu, lengths: see `EstimateOptions`.

    Raises:
        ConfigError: something in the configuration, the input or an option is wrong.
    """
    config = resolve_format(config)
    earlier = find_earlier_run(config.run.dir, calibrate)
    preview, examined, model_config = build_preview(config, options)
    estimate = estimate_run(config, preview, examined, model_config, EstimateOptions(gpu, lengths, earlier))
    notes = [*preview.notes, *([] if estimate is None else estimate.notes)]
    if calibrate is None and earlier is not None:
        notes.append(_describe_finished(earlier))
    with contextlib.suppress(BrokenPipeError):  # the reader has seen enough, as with `| head`
        if as_json:
            print(json.dumps(_to_json(preview, estimate, notes), default=str))
        else:
            write_lines(_iter_lines(preview, estimate, notes, is_whole=bool(options.rows)))


def _describe_finished(earlier: EarlierRun) -> str:
    num_done = format_count(earlier.num_done, "row")
    return f"run.dir={earlier.path} holds results of {num_done}; the preview is of all rows"


def _to_json(preview: Preview, estimate: Estimate | None, notes: list[str]) -> dict[str, Any]:
    shown = dataclasses.asdict(preview)
    for prompt, view in zip(shown["prompts"], preview.prompts, strict=True):
        prompt["text"] = view.text if view.pieces else None
    names = ("fewest", "most", "num_rows")
    if shown["tokens"] is not None:
        shown["tokens"]["histogram"] = [dict(zip(names, bar, strict=True)) for bar in shown["tokens"]["histogram"]]
    estimated = None if estimate is None else dataclasses.asdict(estimate)
    return {**shown, "all_fail": preview.all_fail, "estimate": estimated, "notes": notes}


def _iter_lines(preview: Preview, estimate: Estimate | None, notes: list[str], *, is_whole: bool) -> Iterator[Line]:
    yield from format_preview(preview, is_whole=is_whole)
    if estimate is not None:
        yield []
        yield from _format_estimate(estimate)
    if notes:
        yield []
        yield from format_notes(notes)
    if preview.all_fail:  # once more at the end, which is what stays on the screen
        yield []
        yield [("EVERY EXAMINED ROW FAILS: a run would generate nothing", BAD)]


def _format_estimate(estimate: Estimate) -> Iterator[Line]:
    rough = "ROUGH: " if estimate.is_rough else ""
    gpus = f", {estimate.gpu_hours:,.2f} GPU-hours on {format_count(estimate.num_gpus, 'GPU')}"
    yield [
        ("estimate  ", TITLE),
        (f"{rough}{format_duration(estimate.wall_s)}{gpus if estimate.num_gpus else ''}", PLAIN),
        (", start-up not counted", DIM),
    ]
    if estimate.lengths_source == READS_ONLY:
        yield [(f"  {format_count(estimate.num_prompt_tokens, 'prompt token')}, which are only read", PLAIN)]
        yield [(f"  speed: {estimate.engine_source}", DIM)]
        return
    at_most = "" if estimate.max_generated_tokens is None else f" (at most {estimate.max_generated_tokens:,})"
    yield [
        (f"  {format_count(estimate.num_prompt_tokens, 'prompt token')}, ", PLAIN),
        (f"{format_count(estimate.num_generated_tokens, 'token')} to generate{at_most}", PLAIN),
    ]
    yield [(f"  lengths: {estimate.lengths_source}", DIM)]
    yield [(f"  speed: {estimate.engine_source}", DIM)]
