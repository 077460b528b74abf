"""A preview for people: what it says, in colour or plain, and hostile text escaped."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import write_into

from dpgen.config.loader import load
from dpgen.formatting import escape_text
from dpgen.monitoring.preview import PreviewOptions, build_preview
from dpgen.monitoring.preview_prompts import PromptPiece, PromptView
from dpgen.monitoring.preview_text import format_notes, format_preview, write_lines

HOSTILE = "a\x1b[2J\x1b]0;owned\x07\rb\u202ec\u2028d\x00\u200be\x9b31m\ud800"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(folder: Path, rows: list[dict[str, Any]], stream: io.StringIO | None = None, **options: Any) -> str:
    sections = options.pop("sections", {})
    if (row := options.pop("row", None)) is not None:
        options["rows"] = (row,)
    config = load([write_into(folder, rows, **sections)], [])
    preview, _, _ = build_preview(config, PreviewOptions(**options))
    stream = stream or io.StringIO()
    write_lines(format_preview(preview, is_whole=bool(options.get("rows"))), stream)
    return stream.getvalue()


def is_harmless(output: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in output)


@pytest.mark.parametrize("column", ["prompt", "b\x1b[31mad", "bad\nname"])
def test_hostile_text_is_escaped_wherever_it_stands(column: str, tmp_path: Path) -> None:
    rows = [{"prompt": HOSTILE[:-1], column: HOSTILE[:-1]}, {"prompt": HOSTILE}, {"prompt": "x", column: "\x1b"}]
    output = show(tmp_path, rows)
    assert is_harmless(output)
    assert r"a\x1b[2J\x1b]0;owned\x07\rb\u202ec\u2028d\x00\u200be\x9b31m" in output


def test_hostile_adapters_and_errors_are_escaped(tmp_path: Path) -> None:
    sections = {"lora": {"x": "a", "y": "b"}, "data": {"lora_column": "adapter"}}
    output = show(tmp_path, [{"prompt": "x", "adapter": "\x1b[2J"}], sections=sections)
    assert is_harmless(output) and "unknown_adapter" in output


def test_notes_are_escaped() -> None:
    stream = io.StringIO()
    write_lines(format_notes(["\x1b[2J"]), stream)
    assert stream.getvalue() == "note  \\x1b[2J\n"


def test_only_a_terminal_gets_colours_and_the_same_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    rows = [{"prompt": HOSTILE[:-1] + "[bold]:smile: 123"}, {"prompt": None}]
    plain, coloured = show(tmp_path, rows), show(tmp_path, rows, Terminal())
    assert "\x1b" not in plain and "\x1b[1;31m" in coloured
    without_codes = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert without_codes == plain


def test_special_tokens_stand_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpgen.monitoring import preview_text

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    pieces = [PromptPiece("<s>", "special"), PromptPiece("hello\nthere")]
    stream = Terminal()
    write_lines(preview_text._format_prompt(PromptView(0, pieces, [1, 2], 2), False), stream)
    assert "\x1b[1;35m<s>\x1b[0mhello\n  there\n" in stream.getvalue()


def test_a_long_prompt_is_shortened_unless_its_row_is_asked_for(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * 5_000 + "END"}]
    sections = {"engine": {"max_model_len": 10_000}}
    output = show(tmp_path, rows, sections=sections)
    assert "3,003 characters left out, --row shows all" in output and "xEND\n" in output
    assert "x" * 5_000 + "END" in show(tmp_path, rows, row=0, sections=sections)


def test_what_is_most_important_is_said(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * number, "other": 1} for number in range(1, 30)] + [{"prompt": None}]
    output = show(tmp_path, rows, num_ranks=2, sections={"engine": {"max_model_len": 25}})
    for line in (
        "input  30 rows, all of them examined\n",
        "rows that fail  6 of 30\n",
        "  prompt_too_long  5 rows: 24, 25, 26, 27, 28\n",
        "  wrong_type  1 row: 29\n",
        "    row 29: prompt is null, not a string\n",
        "  max_model_len=25, by engine.max_model_len\n",
        "order of work  dataset order because no hint predicts the rows' lengths and prompts share few prefixes\n",
        "  rank 1: 15 rows, first 1, 3, 5, 7, 9, ",
        "unused columns  other\n",
    ):
        assert line in output, line


def test_a_preview_in_which_all_rows_fail_says_so_loudly(tmp_path: Path) -> None:
    output = show(tmp_path, [{"prompt": None}] * 3)
    assert "EVERY EXAMINED ROW FAILS: a run would generate nothing\n" in output


def test_many_ranks_are_summed_up(tmp_path: Path) -> None:
    output = show(tmp_path, [{"prompt": "x"}] * 100, num_ranks=64)
    assert "and 56 other ranks; each has 1 to 2 rows" in output and "rank 8:" not in output


def test_a_stream_of_few_characters_gets_the_others_escaped(tmp_path: Path) -> None:
    held = io.BytesIO()
    stream = io.TextIOWrapper(held, encoding="ascii")
    write_lines([[("é 漢", "")]], stream)
    stream.flush()
    assert held.getvalue() == b"\\xe9 \\u6f22\n"


@pytest.mark.parametrize(("text", "shown"), [("plain é 漢", "plain é 漢"), ("\t\n", "\\t\\n"), ("\u00a0", "\\xa0")])
def test_printable_text_stays_as_it_is(text: str, shown: str) -> None:
    assert escape_text(text) == shown
