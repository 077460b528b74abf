"""Judge two answers in both orders: a verdict counts only if it does not depend on which one is read first."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from dpgen.programs.columns import read_text
from dpgen.programs.handle import Llm

_PROMPT = (
    "Which answer is better? Write A or B, or tie if they are equally good, and nothing else.\n\nQuestion: {question}"
    "\n\nAnswer A: {a}\n\nAnswer B: {b}"
)
_VERDICTS = ("A", "B", "tie")
_SWAPPED = {"A": "B", "B": "A", "tie": "tie"}


async def judge(
    row: Mapping[str, Any],
    llm: Llm,
    *,
    column: str = "question",
    first_column: str = "answer_a",
    second_column: str = "answer_b",
    prompt: str = _PROMPT,
) -> dict[str, Any]:
    """Return the winner: "A" for the answer of `first_column`, "B" for the other, or "tie".

    Args:
        column: of the question.
        prompt: a template of str.format with question, a and b.
    """
    question, first, second = (read_text(row, name) for name in (column, first_column, second_column))
    verdicts = await asyncio.gather(
        _ask(llm, prompt.format(question=question, a=first, b=second)),
        _ask(llm, prompt.format(question=question, a=second, b=first)),
    )
    there, back = verdicts[0], _SWAPPED[verdicts[1]]
    return {"winner": there if there == back else "tie", "is_consistent": there == back, "verdicts": list(verdicts)}


async def _ask(llm: Llm, prompt: str) -> str:
    answer = await llm.chat(prompt, temperature=0, max_tokens=8, structured_outputs={"choice": list(_VERDICTS)})
    word = answer.text.strip()
    return word if word in _VERDICTS else "tie"
