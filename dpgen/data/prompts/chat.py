"""Turn a row's chat messages into the conversation that vLLM passes to a chat template.

- Follows vLLM 0.32: `vllm/renderers/chat_utils.py` (parse_chat_messages and what it calls) and `vllm/renderers/hf.py`
  (the developer role). `dpgen.data.prompts.content_format` finds the content format that a template expects.
- A row's messages are never changed: each function returns copies.
- A part with an image, audio or a video becomes ``{"type": "media", "media": MediaPart}``, beside keys that the
  template receives. Nothing here loads it: prompts with media become tokens in workers (`dpgen.data.media`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from dpgen.data.media.message_parts import MEDIA_PART_KEYS, read_media_part
from dpgen.data.media.parts import MEDIA_TYPE
from dpgen.data.nested import drop_nulls
from dpgen.errors import RowRefused
from dpgen.formatting import describe_type

Message = dict[str, Any]
ContentFormat = Literal["string", "openai"]


class ChatPrompt(TypedDict):
    """Hold a chat prompt in plain values, since it may travel to the engine.

    Keys:
        messages: as `validate_messages` returns them.
        template_kwargs: variables for the chat template, tools included.
        is_continued: True if the model continues the last message.
        add_generation_prompt: True if the prompt ends with the opening of the assistant's answer.
        add_special_tokens: True if the tokenizer adds its special tokens to what the template has written.
    """

    messages: list[Message]
    template_kwargs: dict[str, Any]
    is_continued: bool
    add_generation_prompt: bool
    add_special_tokens: bool


# The key that holds the text, by the type of a text part (MM_PARSER_MAP of vLLM).
_TEXT_KEYS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
# Types whose parts vLLM skips when the text is missing; for the other types it fails.
_TEXT_OPTIONAL = ("text", "refusal")
# Keys that vLLM interprets; the template receives the other keys of a text part (`cache_control`, ...).
KNOWN_PART_KEYS = {
    *("type", "text", "refusal", "thinking", "closed", "name", "file", "data", "uuid"),
    *("image_url", "image_pil", "image_embeds", "video_url", "video_embeds"),
    *("audio_url", "audio_embeds", "input_audio", "prompt_cache_breakpoint"),
}
# Claude Code puts this line before system texts; vLLM drops it, since it defeats the prefix cache.
_BILLING_HEADER = "x-anthropic-billing-header"


def validate_messages(value: Any) -> list[Message]:
    """Return a copy of a row's messages without null keys, after checking that they are a conversation.

    A null key and an absent key mean the same; see `drop_nulls`. (Tool arguments that are JSON text keep their nulls.)

    Args:
        value: a list of {role, content, ...}; content is a string, a list of parts, or absent.

    Raises:
        RowRefused: `wrong_type`, `empty_prompt` (no message), `unsupported_content` (parts of unknown types).
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        hint = "; store them as a list of {role, content}" if isinstance(value, str | Mapping) else ""
        raise _make_wrong_type_error(f"messages are {describe_type(value)}, not a list{hint}")
    if not value:
        raise RowRefused("empty_prompt", "the list of messages is empty")
    try:
        messages = [drop_nulls(message) for message in value]
    except RecursionError:
        raise _make_wrong_type_error("messages are nested too deep") from None
    for index, message in enumerate(messages):
        _check_message(f"message {index}", message)
    return messages


def to_conversation(messages: Sequence[Message], content_format: ContentFormat) -> list[Message]:
    """Return validated messages as vLLM passes them to a chat template.

    Args:
        messages: as `validate_messages` returns them.
        content_format: "string" joins the text parts of a message with newlines; "openai" makes every content
            a list of parts.

    Raises:
        RowRefused: `wrong_type`, tool arguments that cannot be parsed.
    """
    return [_to_template_message(message, content_format) for message in messages]


def merge_developer_role(conversation: list[Message], template: str) -> list[Message]:
    """Return the conversation with developer and system messages merged in front, if the template lacks that role."""
    has_role = '"developer"' in template or "'developer'" in template
    if has_role or all(message["role"] != "developer" for message in conversation):
        return conversation
    renamed = [_as_system(message) if message["role"] == "developer" else message for message in conversation]
    system = [message for message in renamed if message["role"] == "system"]
    if len(system) == 1 and renamed[0]["role"] == "system":
        return renamed
    texts = [text for message in system if (text := _join_texts(message.get("content", "")))]
    others = [message for message in renamed if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(texts)}, *others]


def _check_message(where: str, message: Any) -> None:
    if not isinstance(message, dict):
        raise _make_wrong_type_error(f"{where} is {describe_type(message)}, not a {{role, content}}")
    if not isinstance(message.get("role"), str):
        raise _make_wrong_type_error(f"{where} has no 'role' that is a string; its keys: {_join_keys(message)}")
    content = message.get("content", "")
    if isinstance(content, list):
        for index, part in enumerate(content):
            content[index] = _read_part(f"{where}, part {index}", part)
    elif not isinstance(content, str):
        raise _make_wrong_type_error(
            f"{where}: content is {describe_type(content)}, neither a string nor a list of parts"
        )
    if message["role"] == "assistant":
        _check_tool_calls(where, message.get("tool_calls", []))


def _read_part(where: str, part: Any) -> Any:
    """Return a part of a message as it is, or with its medium as a `MediaPart`."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise _make_wrong_type_error(f"{where} is {describe_type(part)}, neither a string nor a part with a type")
    part_type = part.get("type")
    if part_type == "tool_reference" and isinstance(part.get("name"), str):
        return part
    if "uuid" not in part and (medium := read_media_part(where, part)) is not None:
        extras = {key: value for key, value in part.items() if key not in KNOWN_PART_KEYS | MEDIA_PART_KEYS}
        return {**extras, "type": MEDIA_TYPE, MEDIA_TYPE: medium}
    # vLLM takes a part with a uuid for a medium that it has seen before, whatever its type.
    if not isinstance(part_type, str) or part_type not in _TEXT_KEYS or "uuid" in part:
        description = f"type {part_type!r}" if part_type is not None else f"no type; its keys: {_join_keys(part)}"
        description += ", with a uuid" if "uuid" in part else ""
        raise RowRefused("unsupported_content", f"{where} ({description}) is neither text nor an image, audio or video")
    text = part.get(_TEXT_KEYS[part_type])
    if not isinstance(text, str) and not (text is None and part_type in _TEXT_OPTIONAL):
        raise _make_wrong_type_error(f"{where}: {_TEXT_KEYS[part_type]!r} is {describe_type(text)}, not a string")
    return part


def _check_tool_calls(where: str, calls: Any) -> None:
    if not isinstance(calls, list):
        raise _make_wrong_type_error(f"{where}: tool_calls is {describe_type(calls)}, not a list")
    for call in calls:
        if not isinstance(call, dict) or call.get("type", "function") != "function":
            raise _make_wrong_type_error(f"{where}: tool_calls may only hold calls of type 'function'")
        if not isinstance(call.get("function"), dict):
            raise _make_wrong_type_error(f"{where}: a tool call has no 'function' with a name and arguments")


def _to_template_message(message: Message, content_format: ContentFormat) -> Message:
    role = message["role"]
    result: Message = {"role": role, "content": _build_content(message, content_format)}
    if role == "assistant":
        # An empty list is dropped, too: templates take the key alone for a tool call.
        if message.get("tool_calls"):
            result["tool_calls"] = [_parse_tool_call(call) for call in message["tool_calls"]]
        if "reasoning" in message:
            result["reasoning"] = result["reasoning_content"] = message["reasoning"]
    elif role == "tool" and "tool_call_id" in message:
        result["tool_call_id"] = message["tool_call_id"]
    for key in ("name", "task"):
        if isinstance(message.get(key), str):
            result[key] = message[key]
    if role == "developer":
        result["tools"] = message.get("tools")
    return result


def _build_content(message: Message, content_format: ContentFormat) -> str | list[Any]:
    content = message.get("content", [])
    parts = [content] if isinstance(content, str) else content
    if message["role"] == "system":
        parts = _drop_billing_header(parts)
    template_parts = [converted for part in parts if (converted := _to_template_part(part)) is not None]
    texts = [part["text"] if part["type"] == "text" else part["name"] for part in template_parts]
    if content_format == "string":
        return "\n".join(text for text in texts if text)  # vLLM skips empty texts in this format only
    # Most templates accept only a string as a tool's answer, even if they accept parts in other messages.
    is_plain_tool = message["role"] == "tool" and all(part["type"] == "text" for part in template_parts)
    return "\n".join(texts) if is_plain_tool else template_parts


def _to_template_part(part: Any) -> Message | None:
    """Return a part as templates of the "openai" format receive it; None for a part that vLLM skips."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if part["type"] == "tool_reference":
        return {"type": "tool_reference", "name": part["name"]}
    text = part.get(_TEXT_KEYS[part["type"]])
    if text is None:
        return None
    extras = {key: value for key, value in part.items() if key not in KNOWN_PART_KEYS}
    return {"type": "text", "text": text, **extras}


def _drop_billing_header(parts: Sequence[Any]) -> list[Any]:
    kept: list[Any] = []
    for part in parts:
        is_text = not isinstance(part, str) and part.get("type") == "text"
        text = part.get("text") if is_text else part
        if not (isinstance(text, str) and text.startswith(_BILLING_HEADER)):
            kept.append(part)
        elif rest := text.partition("\n")[2]:
            kept.append({**part, "text": rest} if is_text else rest)
    return kept


def _parse_tool_call(call: Message) -> Message:
    """Return a tool call with its arguments as an object: templates expect one, the OpenAI format has JSON text."""
    arguments = call["function"].get("arguments")
    if isinstance(arguments, str) and arguments:
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            arguments = {}  # as in vLLM: broken arguments in a history don't reject the row
        except (ValueError, RecursionError) as error:
            raise _make_wrong_type_error(f"the arguments of a tool call cannot be parsed: {error}") from None
    if not isinstance(arguments, dict):
        arguments = {}
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _as_system(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "tools"} | {"role": "system"}


def _join_texts(content: Any) -> str:
    if not isinstance(content, list):
        return str(content)
    return "\n".join(part["text"] for part in content if "text" in part)


def _join_keys(value: Mapping[Any, Any]) -> str:
    return ", ".join(map(str, value)) or "none"


def _make_wrong_type_error(message: str) -> RowRefused:
    return RowRefused("wrong_type", message)
