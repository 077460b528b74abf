"""Simulate a conversation: the model plays the user, too, from a description of the row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpgen.programs.columns import read_text
from dpgen.programs.handle import Llm

_OPENING = "(The chat is open. Write your first message.)"  # what the user sees before the first message
_SWAPPED = {"user": "assistant", "assistant": "user"}


async def converse(
    row: Mapping[str, Any],
    llm: Llm,
    *,
    column: str = "persona",
    num_turns: int = 3,
    system: str | None = None,
    user_system: str = (
        "You are the user of an assistant, and not the assistant. This is you:\n{persona}\n\n"
        "Write only your next message."
    ),
) -> dict[str, Any]:
    """Return the conversation as chat messages.

    Args:
        column: with what the user is like, and wants.
        num_turns: messages of the user, each followed by one of the assistant.
        system: the assistant's system message.
        user_system: that of the model as the user; a template of str.format with persona.
    """
    as_user = user_system.format(persona=read_text(row, column))
    messages: list[dict[str, Any]] = []
    for _ in range(num_turns):
        seen = [{"role": _SWAPPED[message["role"]], "content": message["content"]} for message in messages]
        view = [{"role": "user", "content": _OPENING}, *seen]
        said = await llm.chat(view, system=as_user)
        messages.append({"role": "user", "content": said.text})
        answer = await llm.chat(messages, system=system)
        messages.append({"role": "assistant", "content": answer.text})
    return {"messages": messages}
