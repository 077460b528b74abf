"""Draft, find the faults, revise: each round sees the notes on the last text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpgen.programs.handle import Llm


async def revise(
    row: Mapping[str, Any],
    llm: Llm,
    *,
    column: str = "question",
    num_rounds: int = 1,
    notes_prompt: str = "Name the faults of this answer, briefly.\n\nQuestion: {question}\n\nAnswer: {answer}",
    final_prompt: str = (
        "Rewrite the answer without these faults. Write only the answer.\n\nQuestion: {question}\n\nAnswer: {answer}"
        "\n\nFaults: {notes}"
    ),
) -> dict[str, Any]:
    """Return a draft, the last notes on it, and the final text.

    Args:
        column: of the question.
        num_rounds: of notes and revisions.
        notes_prompt, final_prompt: templates of str.format with question, answer and notes.
    """
    question = row[column]
    draft = (await llm.chat(question)).text
    final, notes = draft, ""
    for _ in range(num_rounds):
        notes = (await llm.chat(notes_prompt.format(question=question, answer=final))).text
        final = (await llm.chat(final_prompt.format(question=question, answer=final, notes=notes))).text
    return {"draft": draft, "notes": notes, "final": final}
