"""Programs for `program.function` in tests: jobs import them by name, with tests/ in PYTHONPATH."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from dpgen.programs.handle import CallFailed, Llm


async def branch(row: dict[str, Any], llm: Llm, width: int = 2) -> dict[str, Any]:
    """Draft, then two chains of calls side by side whose calls take different times, samples, a score, a function."""
    draft = await llm.chat(row["prompt"], max_tokens=1 + llm.random.randrange(6))
    ends = await asyncio.gather(*(_chain(llm, number, draft.text) for number in range(width)))
    samples = await llm.samples("several", 2, as_chat=False, max_tokens=2)
    score = await llm.score(draft.text, " yes", as_chat=False)
    num_chars = await llm.tool(count_chars, draft.text, log=row.get("log"), name=row["prompt"])
    return {
        **{"draft": draft.text, "ends": ends, "samples": [sample.text for sample in samples]},
        **{"score": score.logprob, "num_chars": num_chars},
    }


async def _chain(llm: Llm, number: int, text: str) -> str:
    first = await llm.complete(f"{number}: {text}", max_tokens=1 + (number * 5 + len(text)) % 7)
    return (await llm.complete(f"then {first.text}", max_tokens=3)).text


def count_chars(text: str, log: str | None, name: str) -> int:
    """Write a line to a file, and return the length of a text."""
    if log is not None:
        with Path(log).open("a") as file:
            file.write(f"{name}\n")
    return len(text)


async def misbehave(row: dict[str, Any], llm: Llm) -> Any:
    """End as the row says."""
    kind = row["prompt"]
    if kind == "raise":
        return row["no such key"]
    if kind == "exit":
        raise SystemExit(3)
    if kind == "none":
        return None
    if kind == "object":
        return {"answer": object()}
    if kind == "wrong type":
        return {"answer": 3}
    if kind == "lacks":
        return {}
    if kind == "slow":
        await asyncio.sleep(600)
    if kind == "blocks":
        while True:
            time.sleep(0.01)
    if kind == "too many":
        while True:
            await llm.complete("again", max_tokens=1)
    if kind == "too many, and catches all":
        while True:
            try:
                await llm.complete("again", max_tokens=1)
            except BaseException:  # noqa: BLE001 - what a careless program does
                continue
    if kind == "too long":
        await llm.complete("x" * 600)
    if kind == "tool":
        await llm.tool(int, "no number")
    if kind == "embed":
        await llm.embed("x")
    if kind == "caught":
        try:
            await llm.complete("x" * 600)
        except CallFailed as error:
            return {"answer": error.type}
    return {"answer": (await llm.complete(kind, max_tokens=2)).text}


async def drift(row: dict[str, Any], llm: Llm) -> dict[str, Any]:
    """Ask something else each time that the program runs: it reads a file that another start finds changed."""
    first = await llm.complete("the same", max_tokens=2)
    second = await llm.complete(f"the version is {Path(row['version']).read_text()}", max_tokens=2)
    rest = [await llm.complete(f"{row['prompt']} {number}", max_tokens=9) for number in range(4)]
    return {"texts": [first.text, second.text, *(answer.text for answer in rest)]}


def not_async(row: dict[str, Any], llm: Llm) -> dict[str, Any]:
    """Return nothing: no program is like this."""
    return {}


async def call_function_first(row: dict[str, Any], llm: Llm) -> dict[str, Any]:
    """Call a function before the model."""
    await llm.tool(count_chars, "x", log="ran", name="ran")
    return {"text": (await llm.complete("x")).text}


async def look_twice(row: dict[str, Any], llm: Llm) -> dict[str, Any]:
    """Ask about the row's image, and again with the answer before it."""
    image = {"type": "image_url", "image_url": {"url": row["image"]}}
    first = await llm.chat([{"role": "user", "content": [image, {"type": "text", "text": row["prompt"]}]}])
    second = await llm.chat([{"role": "user", "content": [{"type": "text", "text": first.text}, image]}])
    return {"first": first.text, "second": second.text}
