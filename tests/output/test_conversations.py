"""Test the column of conversations, as fine-tuning reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.dataset_files import make_run

from dpgen.config.schema import Config
from dpgen.config.sections import DataConfig, OutputConfig, RunConfig
from dpgen.errors import ConfigError
from dpgen.output.conversations import append_turn
from dpgen.output.verification import verify
from dpgen.records import Completion, RowError, RowResult, ToolCall

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 5}}}
MESSAGES: list[Any] = [
    [{"role": "user", "content": "hi"}],
    [{"role": "user", "content": 7}],
    [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "4", "tool_call_id": "c1"},
    ],
]
RESULTS = [
    RowResult(0, 3, (Completion("hello", "stop", 1, reasoning="greet"), Completion("ho\ud800", "stop", 1))),
    RowResult(1, error=RowError("wrong_type", "why")),
    RowResult(2, 3, (Completion("", "stop", 5, tool_calls=(ToolCall("call_2_0_0", "g", '{"y": 1}'),)),)),
]


def drop_nulls(messages: Any) -> Any:
    return None if messages is None else [{k: v for k, v in one.items() if v is not None} for one in messages]


# In the second case the result's column takes the place of the input's.
@pytest.fixture(params=[("parquet", "chat"), ("jsonl", "messages")])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    file_format, column = request.param
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({column: chat}) + "\n" for chat in MESSAGES))
    data = DataConfig(path=str(tmp_path / "rows.jsonl"), messages_column=column, system_prompt="be brief")
    keys = {"reasoning": "split", "tool_parser": "hermes", "explode": True, "messages": True}
    return make_run(tmp_path, data, RESULTS, file_format, sampling={"n": 2}, **keys).path


def test_the_conversation_ends_with_the_turn_of_the_model(run: Path, tmp_path: Path) -> None:
    loaded = datasets.load_dataset(str(run / "dataset"), split="train", cache_dir=str(tmp_path / "cache"))
    first, second, failed, called = [drop_nulls(row["messages"]) for row in loaded]
    begin = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert first == [*begin, {"role": "assistant", "content": "hello", "reasoning_content": "greet"}]
    assert second == [*begin, {"role": "assistant", "content": "ho\\ud800"}]
    assert failed is None
    question, asked, answer, turn = called[1:]
    assert question["content"] == "a\nb"
    assert asked["tool_calls"] == [{**CALL, "function": {"name": "f", "arguments": '{"x": 5}'}}]
    assert answer == {"role": "tool", "content": "4", "tool_call_id": "c1"}
    assert turn["tool_calls"] == [
        {"id": "call_2_0_0", "type": "function", "function": {"name": "g", "arguments": '{"y": 1}'}}
    ]
    assert "content" not in turn


def test_verify_checks_conversations_where_it_has_the_input(run: Path) -> None:
    report = verify(run)
    assert (report.verdict, report.problems) == ("sound", [])
    path = next((run / "dataset").glob("train-*"))
    if path.suffix == ".jsonl":
        path.write_text(path.read_text().replace('"content": "hello"', '"content": "hullo"'))
    else:
        table = pq.read_table(path)
        index = table.column_names.index("messages")
        chats = table.column(index).to_pylist()
        chats[0][-1]["content"] = "hullo"
        pq.write_table(table.set_column(index, table.field(index), pa.array(chats, table.field(index).type)), path)
    assert any("messages differs from the journal's" in line for line in verify(run).problems)
    assert verify(run, check_input=False).problems == [], "a conversation can't be checked without the input"


def test_a_turn_that_was_continued_is_one_message() -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hel"}]
    [_, turn] = append_turn(chat, Completion("lo", "stop", 1))
    assert turn["content"] == "Hello"
    assert chat[1]["content"] == "Hel", "the input stays as it is"


@pytest.mark.parametrize(
    ("data", "sampling", "message"),
    [
        (
            {"prompt_column": "p"},
            {},
            "output.messages=true needs a chat: set data.messages_column",
        ),
        ({"messages_column": "m"}, {"n": 2}, "output.messages=true makes one conversation a row: set output.explode"),
    ],
)
def test_a_configuration_without_one_conversation_a_row_is_refused(
    data: dict[str, Any], sampling: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        Config(
            run=RunConfig(dir="d"),
            model="m",
            data=DataConfig(path="x", **data),
            sampling=sampling,
            output=OutputConfig(messages=True),
        )
    assert message in str(raised.value)
