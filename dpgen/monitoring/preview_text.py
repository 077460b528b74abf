"""Format a preview for people: coloured by rich in a terminal, else as plain text.

- Prompts, column names and messages come from the data, which may be hostile: whatever could move a terminal's cursor,
  or hide or reorder text, is shown escaped. Line breaks of a prompt stay line breaks.
- This module imports rich only to write to a terminal.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO

from dpgen.formatting import escape_text, format_count
from dpgen.monitoring.preview import Preview
from dpgen.monitoring.preview_prompts import PromptPiece, PromptView
from dpgen.monitoring.preview_rows import ErrorGroup, TokenCounts

Line = list[tuple[str, str]]  # (text, style)

# Styles, as rich knows them.
PLAIN, TITLE, DIM, BAD = "", "bold", "dim", "bold red"
_PIECE_STYLES = {"text": PLAIN, "special": "bold magenta", "completion": "green"}
_MAX_CHARS = 2_000  # of a prompt; the middle of a longer one is left out
_END_CHARS = 500
_BAR_WIDTH = 40
_MAX_RANKS = 8
_MAX_VALUE_CHARS = 200


def write_lines(lines: Iterable[Line], stream: TextIO | None = None) -> None:
    """Write lines to stdout, or another stream; in colour where it is a terminal that has any."""
    stream = sys.stdout if stream is None else stream
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")  # a terminal or a file may hold few characters
    if not stream.isatty():
        stream.writelines(f"{''.join(text for text, _ in line)}\n" for line in lines)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    for line in lines:
        console.print(Text.assemble(*line), soft_wrap=True)


def format_preview(preview: Preview, *, is_whole: bool = False) -> Iterator[Line]:
    """Yield a preview's lines.

    Args:
        is_whole: show prompts of any length whole.
    """
    yield from _format_input(preview)
    for prompt in preview.prompts:
        yield []
        yield from _format_prompt(prompt, is_whole)
    if preview.prompts:
        yield []
        yield from _format_sampling(preview.prompts)
    yield from _format_tokens(preview)
    yield from _format_errors(preview)
    yield []
    sample = f" (chosen from a sample of {format_count(preview.num_rows, 'row')})" if preview.order.is_sample else ""
    yield [("order of work  ", TITLE), (escape_text(preview.order.description) + sample, PLAIN)]
    yield from _format_ranks(preview)
    if preview.unused_columns:
        yield []
        yield [("unused columns  ", TITLE), (", ".join(map(escape_text, preview.unused_columns)), PLAIN)]


def format_notes(notes: Iterable[str]) -> Iterator[Line]:
    """Yield a line for each note."""
    yield from ([("note  ", TITLE), (escape_text(note), PLAIN)] for note in notes)


def _format_input(preview: Preview) -> Iterator[Line]:
    examined = "all of them examined"
    if preview.is_sample:
        examined = (
            f"a random sample of {preview.num_examined:,} examined, and all numbers of rows and tokens are for it"
        )
    yield [("input  ", TITLE), (f"{format_count(preview.num_rows, 'row')}, {examined}", PLAIN)]
    used = ", ".join(map(escape_text, preview.used_columns))
    yield [("model  ", TITLE), (f"{escape_text(preview.model)}, prompts from {used or 'no column'}", PLAIN)]


def _format_prompt(prompt: PromptView, is_whole: bool) -> Iterator[Line]:
    if prompt.num_tokens is None:
        yield [(f"row {prompt.row}", TITLE)]
    else:
        counted = format_count(prompt.num_tokens, "token")
        if prompt.num_completion_tokens:
            counted += f", {prompt.num_completion_tokens:,} of them the given completion"
        adapter = "" if prompt.adapter is None else f", adapter {escape_text(prompt.adapter)}"
        yield [(f"row {prompt.row}  ", TITLE), (counted + adapter, DIM)]
    if prompt.error is not None:
        yield [(f"{prompt.error['type']}: {escape_text(prompt.error['message'])}", BAD)]
    yield from _split_lines(prompt.pieces if is_whole else _shorten(prompt.pieces))


def _shorten(pieces: list[PromptPiece]) -> list[PromptPiece]:
    """Return the pieces without the middle of a long prompt."""
    num_chars = sum(len(piece.text) for piece in pieces)
    if num_chars <= _MAX_CHARS:
        return pieces
    head_end, tail_start, position = _MAX_CHARS - _END_CHARS, num_chars - _END_CHARS, 0
    head, tail = [], []
    for piece in pieces:
        head.append(PromptPiece(piece.text[: max(0, head_end - position)], piece.kind))
        tail.append(PromptPiece(piece.text[max(0, tail_start - position) :], piece.kind))
        position += len(piece.text)
    left_out = PromptPiece(f"\n... {tail_start - head_end:,} characters left out, --row shows all ...\n", "note")
    return [piece for piece in (*head, left_out, *tail) if piece.text]


def _split_lines(pieces: Iterable[PromptPiece]) -> Iterator[Line]:
    line: Line = [("  ", PLAIN)]
    has_text = False
    for piece in pieces:
        style = _PIECE_STYLES.get(piece.kind, DIM)
        first, *others = escape_text(piece.text, keep="\n").split("\n")
        line.append((first, style))
        for text in others:
            yield line
            line = [("  ", PLAIN), (text, style)]
        has_text = True
    if has_text:
        yield line


def _format_sampling(prompts: list[PromptView]) -> Iterator[Line]:
    shown = next((prompt for prompt in prompts if prompt.sampling), None)
    if shown is None:
        return
    yield [(f"sampling of row {shown.row}", TITLE)]
    for name, field in shown.sampling.items():
        value = "no limit" if field.value is None else json.dumps(field.value, default=str)
        value = value if len(value) <= _MAX_VALUE_CHARS else value[:_MAX_VALUE_CHARS] + "..."
        yield [(f"  {escape_text(name)}={escape_text(value)}", PLAIN), (f"  ({escape_text(field.origin)})", DIM)]


def _format_tokens(preview: Preview) -> Iterator[Line]:
    counts, limit = preview.tokens, preview.max_model_len
    if counts is None:
        return
    estimated = "" if preview.token_counter == "tokenizer" else f" (counted as {preview.token_counter})"
    yield []
    yield [
        (f"tokens of a prompt{estimated}  ", TITLE),
        (f"p50 {counts.p50:,}, p90 {counts.p90:,}, p99 {counts.p99:,}, max {counts.max:,}", PLAIN),
        (f", mean {counts.mean:,.0f}, min {counts.min:,}", DIM),
    ]
    if limit is None:
        yield [("  max_model_len is known only to vLLM", DIM)]
    else:
        yield [(f"  max_model_len={limit.num_tokens:,}", PLAIN), (f", by {limit.origin}", DIM)]
    yield from _format_histogram(counts, None if limit is None else limit.num_tokens)


def _format_histogram(counts: TokenCounts, limit: int | None) -> Iterator[Line]:
    most = max(num_rows for _, _, num_rows in counts.histogram)
    names = [f"{low:,}" if low == high else f"{low:,} - {high:,}" for low, high, _ in counts.histogram]
    width = max(map(len, names))
    for name, (low, _, num_rows) in zip(names, counts.histogram, strict=True):
        bar = "#" * (-(-_BAR_WIDTH * num_rows // most))
        is_too_long = limit is not None and low >= limit
        yield [(f"  {name:>{width}} ", DIM), (bar, BAD if is_too_long else PLAIN), (f" {num_rows:,}", DIM)]


def _format_errors(preview: Preview) -> Iterator[Line]:
    yield []
    if not preview.errors:
        if preview.num_examined:
            yield [("rows that fail  ", TITLE), ("none", PLAIN)]
        return
    num_failing = preview.num_examined - preview.num_sound
    yield [("rows that fail  ", TITLE), (f"{num_failing:,} of {preview.num_examined:,}", PLAIN)]
    for group in preview.errors:
        yield [(f"  {group.type}  ", BAD), (f"{format_count(group.num_rows, 'row')}: {_format_rows(group)}", PLAIN)]
        yield [(f"    row {group.rows[0]}: {escape_text(group.example)}", DIM)]
    if preview.all_fail:
        yield [("EVERY EXAMINED ROW FAILS: a run would generate nothing", BAD)]


def _format_rows(group: ErrorGroup) -> str:
    more = group.num_rows - len(group.rows)
    return ", ".join(map(str, group.rows)) + (f" and {more:,} more" if more else "")


def _format_ranks(preview: Preview) -> Iterator[Line]:
    size = preview.ranks_per_engine
    yield []
    shared = f", {size} for each engine" if size > 1 else ""
    yield [(f"{format_count(preview.num_ranks, 'rank')}{shared}", TITLE), ("  each may steal rows from others", DIM)]
    about = "about " if preview.order.is_sample or preview.is_sample else ""
    for part in preview.ranks[:_MAX_RANKS]:
        name = f"rank {part.rank}" if size == 1 else f"ranks {part.rank} to {part.rank + size - 1}"
        first = f", first {', '.join(map(str, part.first_rows))}" if part.first_rows else ""
        tokens = f"{about}{format_count(part.num_prompt_tokens, 'prompt token')}"
        yield [(f"  {name}: {format_count(part.num_rows, 'row')}{first}, {tokens}", PLAIN)]
    if len(preview.ranks) > _MAX_RANKS:
        rows = [part.num_rows for part in preview.ranks]
        others = format_count(len(rows) - _MAX_RANKS, "other engine" if size > 1 else "other rank")
        yield [(f"  and {others}; each has {min(rows):,} to {format_count(max(rows), 'row')}", DIM)]
