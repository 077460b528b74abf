"""Answer several times, ask for a reward of each answer, and keep the best.

vLLM loads a model for one task, so a reward model can't be asked in the same run. The reward is a grade that the model
gives (`grade`), the likelihood of the answer (`likelihood`), or a function of yours. For the scores of a reward model,
return all answers, and score them in a run of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from dpgen.imports import load_function
from dpgen.programs.handle import Llm

_REWARDS = ("grade", "likelihood")
_GRADES = [str(grade) for grade in range(1, 11)]
_PROMPT = (
    "Grade the answer from 1 (wrong or useless) to 10 (right and complete). Write only the number.\n\n"
    "Question: {question}\n\nAnswer: {answer}"
)


async def choose(
    row: Mapping[str, Any],
    llm: Llm,
    *,
    column: str = "question",
    num_answers: int = 4,
    reward: str = "grade",
    grade_prompt: str = _PROMPT,
) -> dict[str, Any]:
    """Return the answer with the largest reward, the first of those that have the same.

    Args:
        column: of the question.
        reward: "grade", "likelihood" (the mean log-probability of its tokens), or package.module:name of a function of
            the row and the text.
        grade_prompt: a template of str.format with question and answer.
    """
    question = row[column]
    function = None if reward in _REWARDS else load_function("program.options.reward", reward)
    texts = [answer.text for answer in await llm.samples(question, num_answers)]

    async def compute(text: str) -> float:
        if reward == "likelihood":
            return (await llm.score(question, text)).mean_logprob if text else float("-1e9")
        if function is None:
            prompt = grade_prompt.format(question=question, answer=text)
            grade = await llm.chat(prompt, temperature=0, max_tokens=4, structured_outputs={"choice": _GRADES})
            return float(grade.text) if grade.text in _GRADES else 0.0
        return float(await llm.tool(function, dict(row), text))

    rewards = await asyncio.gather(*map(compute, texts))
    best = max(range(len(texts)), key=lambda index: rewards[index])
    return {"best": texts[best], "reward": rewards[best], "texts": texts, "rewards": list(rewards)}
