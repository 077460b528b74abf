"""Add the assistant's turn to the conversation that a row was generated from, ready for fine-tuning.

- Messages are in the form of OpenAI's chat completions. Every message has the same keys, since an Arrow column has one
  type; a key that says nothing is null.
- A message's text parts are joined by newlines, with ``<image PATH>`` in the place of an image inside messages. Where
  columns hold the images, contents are lists of parts {type, text, url}, as transformers and trainers take them beside
  the column: {type: image} with its path or URL, never its contents. Keys of a message that are not listed in
  `_build_message` are left out.
- Where the model continued the last message, the message and its continuation are one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dpgen.config.prompt import PromptConfig
from dpgen.data.input_rows import InputRows
from dpgen.data.media.parts import MEDIA_TYPE, MediaPart, iter_media_parts
from dpgen.data.prompts.chat import Message
from dpgen.data.prompts.columns import select_prompt_columns
from dpgen.data.prompts.render import PromptRenderer
from dpgen.errors import RowRefused
from dpgen.records import Completion

if TYPE_CHECKING:
    import pyarrow as pa


class ConversationReader:
    """Read the conversations that requests were made of.

    Args:
        prompt: how rows become prompts; makes chats.
    """

    def __init__(self, rows: InputRows, prompt: PromptConfig) -> None:
        self._rows, self._renderer = rows, PromptRenderer(prompt, None)
        self._columns = select_prompt_columns(prompt, rows.columns)

    def read(self, row_ids: Sequence[int] | np.ndarray) -> list[list[Message] | None]:
        """Return the rows' messages, system prompt included; None for a row that was rejected."""
        return [self._build(row) for row in self._rows.iter_rows(np.asarray(row_ids, np.int64), self._columns)]

    def _build(self, row: dict[str, Any]) -> list[Message] | None:
        try:
            prompt = self._renderer.build_prompt(row)
        except RowRefused:
            return None
        assert isinstance(prompt, dict), "the configuration was checked: prompts are chats"
        for part in iter_media_parts(prompt["messages"]):  # a batch of images may fill the memory
            medium = part[MEDIA_TYPE]
            part[MEDIA_TYPE] = MediaPart(medium.kind, medium.where, source=medium.reference)
        return prompt["messages"]


def get_messages_type(*, has_parts: bool = False) -> pa.DataType:
    """Return the Arrow type of a conversation: a list of messages.

    Args:
        has_parts: True if contents are lists of parts, since columns hold media.
    """
    import pyarrow as pa

    text = pa.string()
    content = pa.list_(pa.struct([(name, text) for name in ("type", "text", "url")])) if has_parts else text
    call = pa.struct([("id", text), ("type", text), ("function", pa.struct([("name", text), ("arguments", text)]))])
    return pa.list_(
        pa.struct(
            [
                ("role", text),
                ("content", content),
                ("reasoning_content", text),
                ("tool_calls", pa.list_(call)),
                ("tool_call_id", text),
                ("name", text),
            ]
        )
    )


def append_turn(
    conversation: Sequence[Message], completion: Completion, *, has_parts: bool = False
) -> list[dict[str, Any]]:
    """Return a conversation with the model's turn: its answer, reasoning and calls.

    Args:
        has_parts: True to give contents as lists of parts.
    """
    messages = [_build_message(message) for message in conversation]
    turn = _build_message(
        {
            "role": "assistant",
            "content": None if completion.tool_calls and not completion.text else completion.text,
            "reasoning": completion.reasoning,
            "tool_calls": [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in completion.tool_calls
            ],
        }
    )
    if messages and messages[-1]["role"] == "assistant":  # the model continued it
        begun = messages.pop()
        turn["content"] = (begun["content"] or "") + (turn["content"] or "")
        turn["reasoning_content"] = turn["reasoning_content"] or begun["reasoning_content"]
        turn["tool_calls"] = turn["tool_calls"] or begun["tool_calls"]
    if has_parts:
        for message, source in zip(messages, conversation, strict=False):  # without the one that was continued
            message["content"] = _list_parts(source.get("content"))
        turn["content"] = _list_parts(turn["content"])
    return [*messages, turn]


def _list_parts(content: Any) -> list[dict[str, Any]]:
    """Return a message's content as parts of one type, {type, text, url}."""
    parts = []
    for part in [content] if isinstance(content, str) else content or ():
        if isinstance(part, dict) and MEDIA_TYPE in part:
            parts.append({"type": part[MEDIA_TYPE].kind, "text": None, "url": part[MEDIA_TYPE].reference})
        elif text := _find_text(part):
            parts.append({"type": "text", "text": text, "url": None})
    return parts


def _build_message(message: Message) -> dict[str, Any]:
    reasoning = message.get("reasoning", message.get("reasoning_content"))
    return {
        "role": message["role"],
        "content": _join_content(message.get("content")),
        "reasoning_content": reasoning if isinstance(reasoning, str) else None,
        "tool_calls": [_build_call(call) for call in message.get("tool_calls") or ()] or None,
        "tool_call_id": _get_text(message, "tool_call_id"),
        "name": _get_text(message, "name"),
    }


def _join_content(content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    return "\n".join(text for part in content if (text := _find_text(part)))


def _find_text(part: str | dict[str, Any]) -> str:
    if isinstance(part, str):
        return part
    if MEDIA_TYPE in part:
        return str(part[MEDIA_TYPE].describe())
    names = ("text", "refusal", "thinking", "name")
    return next((part[name] for name in names if isinstance(part.get(name), str)), "")


def _build_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    return {
        "id": _get_text(call, "id"),
        "type": "function",
        "function": {"name": _get_text(function, "name"), "arguments": arguments},
    }


def _get_text(values: dict[str, Any], key: str) -> str | None:
    return values[key] if isinstance(values.get(key), str) else None
