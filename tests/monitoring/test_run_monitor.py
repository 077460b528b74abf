"""Rows that are shown at the end of a run: as the model saw them, and safe for a terminal."""

from __future__ import annotations

from typing import Any

import pytest

from dpgen.formatting import escape_text
from dpgen.monitoring.run_monitor import find_prompt_end
from dpgen.monitoring.status.page import format_rank_lines
from dpgen.monitoring.status.record import ProcessIdentity, RankCounts, RankRecord
from dpgen.monitoring.status.result_tally import ResultTally
from dpgen.records import Completion, Request, RequestId, RowError, RowResult
from dpgen.scheduling.progress.throughput import UNKNOWN_RATE


def test_a_prompt_shows_its_end_with_special_tokens() -> None:
    shown = find_prompt_end(
        Request(RequestId(0), list(range(1000))), lambda ids: "".join(f"<{token_id}>" for token_id in ids)
    )
    assert shown.startswith('"...') and shown.endswith('<998><999>"') and len(shown) < 120


def make_chat(message: dict[str, str]) -> dict[str, Any]:
    return {"messages": [message], "template_kwargs": {}}


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (None, "(no prompt)"),
        (Request(RequestId(0), None, "a text"), '"a text"'),
        (Request(RequestId(0), None, make_chat({"role": "user", "content": "hi\n"})), r'"hi\n"'),
        (Request(RequestId(0), None, make_chat({"role": "user"})), '"None"'),
        (Request(RequestId(0), [1, 2]), "(2 tokens)"),
    ],
)
def test_prompts_without_a_tokenizer_show_what_there_is(request_: Any, expected: str) -> None:
    assert find_prompt_end(request_, None) == expected


def test_the_rows_shown_are_drawn_from_the_whole_run_and_bounded() -> None:
    tally = ResultTally(num_samples=3)
    for row in range(1000):
        error = RowError("a", "b") if row % 2 else None
        completions = () if error else (Completion("x" * 10_000, "stop", 5),)
        tally.add_all([RowResult(row, 1, completions, error)])
    rows = [sample.row for sample in tally.samples]
    assert len(rows) == 3 and all(row % 2 == 0 for row in rows) and rows == sorted(rows) and rows[-1] > 100
    assert all(len(sample.text) == 500 for sample in tally.samples), "hostile answers may be long"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain äöü 漢字 🙂", "plain äöü 漢字 🙂"),
        ("\x1b[2J\x07\r\n\t", r"\x1b[2J\x07\r\n\t"),
        ("\x9b31m\x7f", r"\x9b31m\x7f"),
        ("a\u202egnp.exe\u2066", r"a\u202egnp.exe\u2066"),
        ("\ud800", r"\ud800"),
        ("\u2028\u200b\ufeff", r"\u2028\u200b\ufeff"),
    ],
)
def test_hostile_text_is_escaped(text: str, expected: str) -> None:
    assert escape_text(text) == expected


def test_each_rank_has_a_line_also_where_its_files_are_elsewhere() -> None:
    counts = RankCounts(num_rows=12, num_errors=1, num_running=4, num_waiting=2, tokens_per_s=950, kv_cache_usage=0.5)
    record = RankRecord(1, 3, process=ProcessIdentity("node-b"), phase="generating", counts=counts)
    assert list(format_rank_lines({1: record}, (1200, 900, UNKNOWN_RATE))) == [
        "rank 0: 1,200 tokens/s",
        "rank 1 on node-b: generating, 12 rows, 950 tokens/s, 4 running, 2 waiting, KV 50 %, 1 error",
        "rank 2: no rate yet",
    ]
