"""Answer several times, and take the answer that most of them come to (Wang et al., 2022, arXiv:2203.11171)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from dpgen.programs.handle import Llm


async def vote(
    row: Mapping[str, Any],
    llm: Llm,
    *,
    column: str = "question",
    num_answers: int = 8,
    pattern: str = r"-?\d+(?:[.,]\d+)*",
) -> dict[str, Any]:
    """Return the answer with the most votes, the first of those that have equally many; null if no text has one.

    Args:
        column: of the question.
        pattern: a regular expression of Python; its last match in a text, or the match's first group, is the answer.
    """
    answers = await llm.samples(row[column], num_answers)
    votes = Counter(found for answer in answers if (found := find_answer(answer.text, pattern)) is not None)
    winner, num_votes = votes.most_common(1)[0] if votes else (None, 0)
    return {"answer": winner, "num_votes": num_votes, "texts": [answer.text for answer in answers]}


def find_answer(text: str, pattern: str) -> str | None:
    """Return the last match of a pattern, or its first group; None if there is none."""
    matches = list(re.finditer(pattern, text))
    return (matches[-1][1] if matches[-1].groups() else matches[-1][0]) if matches else None
