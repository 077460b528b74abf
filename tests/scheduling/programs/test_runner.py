"""Rows' programs in one process: numbering, seeds, recalled calls, what runs at once, what an engine's loss leaves."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
from helpers.jobs import wait_for
from helpers.program_harness import Harness, decode

from dpgen.journal.calls import AskedText, FinishedCall
from dpgen.programs.handle import Llm
from dpgen.records import RequestId, RowError, RowResult, derive_row_seed, derive_seed


async def three(row: dict[str, Any], llm: Llm) -> dict[str, Any]:
    first = await llm.complete(row["q"], max_tokens=4)
    pair = await asyncio.gather(two(llm, f"a {first.text}"), two(llm, f"b {first.text}"))
    return {"pair": pair}


async def two(llm: Llm, text: str) -> str:
    first = await llm.complete(text)
    return (await llm.complete(f"{text} then {first.text}")).text


def run_three(harness: Harness, *, is_swapped: bool) -> tuple[RowResult, dict[str, Any]]:
    """Run the program, with the second chain's call answered first where swapped; also return places by prompt."""
    harness.begin(5)
    [first] = harness.take(1)
    harness.answer(first, "x")
    a, b = harness.take(2)
    last = []
    for request in (b, a) if is_swapped else (a, b):
        harness.answer(request, "y")
        last += harness.take(1)
    for request in last:
        harness.answer(request, f"end of {request.prompt}")
    [result] = harness.finish()
    seeds = {request.prompt: (request.id, request.sampling) for request in (first, a, b, *last)}
    return result, seeds


def test_a_call_has_the_same_id_and_seed_whichever_of_several_is_answered_first(
    make_harness: Callable[..., Harness],
) -> None:
    plain, seeds = run_three(make_harness(three), is_swapped=False)
    swapped, same_seeds = run_three(make_harness(three), is_swapped=True)
    assert (plain, seeds) == (swapped, same_seeds) and len({id for id, _ in seeds.values()}) == 5
    assert plain.num_calls == 5 and plain.num_prompt_tokens == 15 and plain.num_generated_tokens == 10
    assert plain.completions[0].parsed == '{"pair":["end of a x then y","end of b x then y"]}'
    id, sampling = seeds["row 5"]
    assert (id, sampling) == (RequestId(5), {"seed": derive_row_seed(7, 5), "top_p": 0.5, "max_tokens": 4})
    id, sampling = seeds["b x"]
    assert sampling["seed"] == derive_seed(7, id)


def test_finished_calls_are_answered_from_the_journal_and_one_that_asks_otherwise_is_asked_anew(
    make_harness: Callable[..., Harness], caplog: pytest.LogCaptureFixture
) -> None:
    before = make_harness(three)
    result, _ = run_three(before, is_swapped=True)
    assert [call.place for call in before.records] == ["0", "2.0", "1.0", "2.1", "1.1"]
    again = make_harness(three, before.records)
    again.begin(5)
    assert again.finish() == [result] and again.records == [], "no call is asked"
    changed = [
        FinishedCall(call.place, AskedText.of("another"), call.result) if call.place == "1.1" else call
        for call in before.records
    ]
    other = make_harness(three, changed)
    other.begin(5)
    [request] = other.take(1)
    assert request.prompt == "a x then y"
    assert (
        'row 5, call 1.1: the program asks something else than before the restart (before: ..."another"' in caplog.text
    )
    other.answer(request, "end of a x then y")
    assert other.finish() == [result]


def test_rows_begin_as_the_engine_has_room_and_calls_of_rows_begun_come_first(
    make_harness: Callable[..., Harness],
) -> None:
    harness = make_harness(three, max_running=3)
    assert harness.runner.can_begin
    harness.begin(0)
    wait_for(lambda: harness.runner.has_retries)
    assert not harness.runner.can_begin, "a call waits"
    harness.take(1)
    wait_for(lambda: harness.runner.can_begin)
    harness.begin(1)
    harness.begin(2)
    harness.take(2)
    assert not harness.runner.can_begin, "as many run as may"
    assert list(harness.runner.pending_rows) == [0, 1, 2]


def test_an_abandoned_engines_rows_are_given_up_with_their_calls_but_for_those_whose_function_runs(
    make_harness: Callable[..., Harness],
) -> None:
    is_done = threading.Event()

    async def program(row: dict[str, Any], llm: Llm) -> dict[str, Any]:
        text = (await llm.complete(row["q"])).text
        if text == "slow":
            await llm.tool(is_done.wait, 60)
        return {"text": (await llm.complete(text)).text}

    harness = make_harness(program)
    harness.begin(0)
    harness.begin(1)
    first, second = harness.take(2)
    harness.answer(first, "slow")
    harness.answer(second, "quick")
    harness.take(1)
    wait_for(lambda: harness.loop.num_tools == 1)
    dropped = [decode(record) for record in harness.runner.drop([])]
    assert [(call.id.row, call.place) for call in dropped] == [(1, "0")]
    assert list(harness.runner.pending_rows) == [0] and not harness.runner.has_retries
    is_done.set()
    wait_for(lambda: harness.runner.has_retries)  # the call after the function: stranded, so the row is dropped, too
    dropped = [decode(record) for record in harness.runner.drop([])]
    assert [(call.id.row, call.place) for call in dropped] == [(0, "0"), (0, "1")], "what the function returned, too"
    assert not harness.runner.pending_rows


def test_a_row_whose_answer_is_being_parsed_is_not_given_up(make_harness: Callable[..., Harness]) -> None:
    harness = make_harness(three)
    harness.begin(1)
    harness.begin(2)
    parsing = harness.take(2)[0]
    assert not harness.runner.drop([parsing.id])
    assert list(harness.runner.pending_rows) == [parsing.row]
    harness.answer(parsing, "parsed")
    wait_for(lambda: harness.runner.has_retries)
    dropped = [decode(record) for record in harness.runner.drop([])]
    assert {call.id.row for call in dropped} == {parsing.row}, "its answer is kept, so nothing is asked twice"


async def look(question: str) -> str:
    await asyncio.gather(asyncio.sleep(0), asyncio.sleep(0))
    return question


async def look_and_ask(row: dict[str, Any], llm: Llm) -> dict[str, Any]:
    found = await llm.tool(look, row["q"])
    return {"answer": (await llm.complete(found)).text}


def test_what_an_async_tool_begins_takes_no_place_of_the_program(make_harness: Callable[..., Harness]) -> None:
    first = make_harness(look_and_ask)
    first.begin(1)
    [asked] = first.take(1)
    again = make_harness(look_and_ask, first.records)  # killed: the tool answers from the journal
    again.begin(1)
    [asked_again] = again.take(1)
    assert (asked_again.id, asked_again.sampling) == (asked.id, asked.sampling)


async def ask_in_group(row: dict[str, Any], llm: Llm) -> dict[str, Any]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(llm.complete(row["q"]))
    return {"answer": task.result().text}


def test_a_failed_call_of_a_task_group_keeps_its_error(make_harness: Callable[..., Harness]) -> None:
    harness = make_harness(ask_in_group)
    harness.begin(1)
    [asked] = harness.take(1)
    harness.runner.submit(RowResult(1, error=RowError("prompt_too_long", "607 tokens")).with_id(asked.id))
    [result] = harness.finish()
    assert result.error is not None and result.error.type == "prompt_too_long"


def test_a_result_that_comes_after_its_program_has_ended_is_no_rows_result(
    make_harness: Callable[..., Harness],
) -> None:
    async def program(row: dict[str, Any], llm: Llm) -> dict[str, Any]:
        left = asyncio.ensure_future(llm.complete("left behind"))
        await llm.complete("awaited")
        assert not left.done()
        return {}

    harness = make_harness(program)
    harness.begin(4)
    by_prompt = {request.prompt: request for request in harness.take(2)}
    harness.answer(by_prompt["awaited"], "x")
    [result] = harness.finish()
    assert result.error is None and result.num_calls == 2
    harness.answer(by_prompt["left behind"], "late")
    assert harness.runner.poll() == [] and len(harness.records) == 1


def test_a_program_that_catches_all_is_not_closed_as_garbage(make_harness: Callable[..., Harness]) -> None:
    """It would catch that, too, and loop for ever in whichever thread collects garbage."""
    caught: list[str] = []

    async def program(row: dict[str, Any], llm: Llm) -> None:
        while len(caught) < 10:
            try:
                await llm.complete(row["q"])
            except BaseException as error:  # noqa: BLE001 - what a careless program does
                caught.append(type(error).__name__)

    harness = make_harness(program, max_calls=0)
    harness.begin(1)
    [result] = harness.finish()
    assert result.error is not None and result.error.type == "program_too_many_calls"
    harness.loop.close()
    del harness
    gc.collect()
    assert "GeneratorExit" not in caught
