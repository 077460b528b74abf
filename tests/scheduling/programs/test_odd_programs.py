"""Programs that do what is unusual: odd results and errors, callbacks, generators, computing, odd arguments."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from datetime import date
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from helpers.jobs import wait_for
from helpers.program_harness import Harness

from dpgen.programs.handle import CallFailed, Llm
from dpgen.records import RowError
from dpgen.scheduling.programs import event_loop


class BrokenMapping(Mapping[str, Any]):
    def __getitem__(self, key: str) -> Any:
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        raise OSError("it lies on a server that is gone")

    def __len__(self) -> int:
        return 1


class SilentError(Exception):
    def __str__(self) -> str:
        raise AttributeError("no text")


async def end_as_row_says(row: dict[str, Any], llm: Llm) -> Any:
    kind = row["q"]
    if kind == "row 0":
        return BrokenMapping()
    if kind == "row 1":
        raise SilentError
    if kind == "row 2":
        raise CallFailed(5, None)  # type: ignore[arg-type]
    if kind == "row 3":
        raise asyncio.CancelledError
    return {"value": "\ud800", "number": np.float32(0.5), "numbers": np.arange(3)}


def test_a_program_with_an_odd_end_is_its_rows_error_at_once(make_harness: Callable[..., Harness]) -> None:
    harness = make_harness(end_as_row_says)
    for row in range(5):
        harness.begin(row)
    results = {result.row: result for result in harness.finish(5)}
    errors = [results[row].error for row in range(4)]
    assert [error and error.type for error in errors] == ["program_bad_result", *["program_failed"] * 3]
    assert errors[0] is not None and "OSError: it lies on a server that is gone (test_odd_programs.py" in str(errors[0])
    assert errors[1] is not None and "SilentError: its text can't be made: AttributeError" in errors[1].message
    assert results[4].completions[0].parsed == '{"value":"\ud800","number":0.5,"numbers":[0,1,2]}'


async def iterate(row: dict[str, Any], llm: Llm) -> dict[str, Any]:
    async def count() -> AsyncIterator[int]:
        for number in range(3):
            yield number

    async for number in count():  # leaves the generator behind: the event loop closes it, by a task
        await llm.complete(f"number {number}")
        break
    beside: list[asyncio.Future[Any]] = []
    asyncio.get_running_loop().call_soon(lambda: beside.append(asyncio.ensure_future(llm.complete("beside"))))
    texts = [(await llm.complete("second")).text, (await llm.complete("third")).text]
    return {"texts": [*texts, (await beside[0]).text]}


def test_calls_after_a_generator_or_a_callback_have_the_same_place_after_a_restart(
    make_harness: Callable[..., Harness],
) -> None:
    first = make_harness(iterate)
    first.begin(1)
    for count in (1, 2, 1):
        for request in first.take(count):
            first.answer(request, str(request.prompt))
    [result] = first.finish()
    again = make_harness(iterate, first.records)
    again.begin(1)
    [repeated] = again.finish()
    assert repeated == result and not again.records, "no call is asked again"


async def compute(row: dict[str, Any], llm: Llm) -> dict[str, Any]:
    await asyncio.sleep(0.01)
    ends_s = time.monotonic() + 0.05
    while time.monotonic() < ends_s:
        pass
    return {}


def test_many_programs_that_compute_in_turn_are_not_taken_for_one_that_blocks(
    make_harness: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_loop, "_PING_INTERVAL_S", 0.0)
    monkeypatch.setattr(event_loop, "_MAX_BLOCKED_S", 0.5)  # together they take three times as long
    harness = make_harness(compute)
    for row in range(30):
        harness.begin(row)
    assert not [result for result in harness.finish(30) if result.error is not None]


async def block(row: dict[str, Any], llm: Llm) -> dict[str, Any]:
    while True:
        time.sleep(0.001)


def test_programs_that_all_block_are_interrupted_one_after_the_other(
    make_harness: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_loop, "_MIN_BLOCKED_S", 0.05)
    monkeypatch.setattr(event_loop, "_PING_INTERVAL_S", 0.0)
    monkeypatch.setattr(event_loop, "_MAX_BLOCKED_S", 5.0)
    harness = make_harness(block, timeout_s=0.2)
    for row in range(3):
        harness.begin(row)
    errors = [result.error for result in harness.finish(3)]
    assert [error and error.type for error in errors] == ["program_timeout"] * 3


async def use_tools(row: dict[str, Any], llm: Llm) -> dict[str, Any]:
    columns = {"day": date(2026, 1, 2), "image": b"png", "price": Decimal("1.5"), "vector": np.arange(2)}
    number = await llm.tool(count_columns, columns)
    try:
        await llm.tool(cancel)
    except CallFailed as error:
        return {"number": number, "error": error.type}
    return {}


def count_columns(columns: dict[str, Any]) -> int:
    return len(columns)


def cancel() -> None:
    raise asyncio.CancelledError


def test_tools_take_rows_with_dates_and_bytes_and_may_raise_what_they_like(
    make_harness: Callable[..., Harness],
) -> None:
    harness = make_harness(use_tools)
    harness.begin(0)
    [result] = harness.finish()
    assert result.completions and result.completions[0].parsed == '{"number":4,"error":"tool_failed"}'
    again = make_harness(use_tools, harness.records)
    again.begin(0)
    assert again.finish() == [result] and not again.records


async def pass_object(row: dict[str, Any], llm: Llm) -> dict[str, Any]:
    await llm.tool(count_columns, {"x": object()})
    return {}


def test_an_argument_that_is_no_json_is_told_with_the_programs_own_line(make_harness: Callable[..., Harness]) -> None:
    harness = make_harness(pass_object)
    harness.begin(0)
    [result] = harness.finish()
    assert result.error is not None and result.error.type == "program_failed"
    assert "a call takes values of JSON: an object is none (test_odd_programs.py, line" in result.error.message


async def change_later(row: dict[str, Any], llm: Llm, seen: list[str]) -> dict[str, Any]:
    seen.append(row["q"])
    messages = [{"role": "user", "content": "before"}]
    call = asyncio.ensure_future(llm.chat(messages))
    await asyncio.sleep(0)
    messages[0]["content"] = "after"
    return {"answer": (await call).text, "seen": seen}


def test_what_a_program_changes_reaches_neither_its_calls_nor_other_rows(make_harness: Callable[..., Harness]) -> None:
    harness = make_harness(change_later, options={"seen": []})
    harness.begin(0)
    harness.begin(1)
    for request in harness.take(2):
        assert request.prompt == [{"role": "user", "content": "before"}]
        harness.answer(request, "x")
    results = {result.row: result.completions[0].parsed for result in harness.finish(2)}
    assert results == {row: f'{{"answer":"x","seen":["row {row}"]}}' for row in (0, 1)}


@pytest.mark.parametrize("kind", ["null text", "null score"])
def test_a_null_column_in_a_call_is_the_rows_error(make_harness: Callable[..., Harness], kind: str) -> None:
    async def program(row: dict[str, Any], llm: Llm) -> dict[str, Any]:
        if kind == "null score":
            await llm.score("x", None, as_chat=False)  # type: ignore[arg-type]
        return {"text": (await llm.complete(None)).text}  # type: ignore[arg-type]

    harness = make_harness(program)
    harness.begin(0)
    if kind == "null score":
        assert harness.finish()[0].error == RowError("wrong_type", "llm.score: the completion is null, not a string")
    else:
        assert harness.take(1)[0].prompt is None, "what renders prompts rejects it"


async def continue_samples(row: dict[str, Any], llm: Llm) -> dict[str, Any]:
    messages = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "1,"}]
    answers = await llm.samples(messages, 2, continue_final_message=True, system="s")
    return {"answers": len(answers)}


def test_samples_take_what_a_chat_takes(make_harness: Callable[..., Harness]) -> None:
    harness = make_harness(continue_samples)
    harness.begin(0)
    [request] = harness.take(1)
    assert request.prompt[0] == {"role": "system", "content": "s"}
    assert "continue_final_message" not in request.sampling and request.sampling["n"] == 2


def test_a_call_that_asks_the_same_after_a_divergence_is_the_same_call(make_harness: Callable[..., Harness]) -> None:
    """A tool that has run for these arguments does not run again: it may have sent something."""
    sent: list[str] = []
    version = "1"

    def send(text: str) -> int:
        sent.append(text)
        return len(sent)

    async def program(row: dict[str, Any], llm: Llm) -> dict[str, Any]:
        await llm.complete(f"version {version}")
        number = await llm.tool(send, "hello")
        last = await llm.complete(f"last of {version}")
        return {"number": number, "last": last.text}

    harness = make_harness(program)
    harness.begin(0)
    harness.answer(harness.take(1)[0], "x")
    harness.take(1)
    wait_for(lambda: len(harness.records) == 2)
    version = "2"
    again = make_harness(program, harness.records)
    again.begin(0)
    for prompt in ("version 2", "last of 2"):
        [request] = again.take(1)
        assert request.prompt == prompt
        again.answer(request, "y")
    [result] = again.finish()
    assert result.completions[0].parsed == '{"number":1,"last":"y"}' and sent == ["hello"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "it returned NaN or infinity, which is no value of JSON; return null for it"),
        (b"x", "it returned a bytes, which is no value of JSON"),
        (BrokenMapping(), "it returned a BrokenMapping, which is no value of JSON"),
    ],
)
def test_what_a_tool_returns_that_is_no_json_is_named(
    make_harness: Callable[..., Harness], value: Any, message: str
) -> None:
    async def program(row: dict[str, Any], llm: Llm) -> dict[str, Any]:
        return {"value": await llm.tool(lambda: value)}

    harness = make_harness(program)
    harness.begin(0)
    assert harness.finish()[0].error == RowError("tool_failed", f"call 0: {message}")
