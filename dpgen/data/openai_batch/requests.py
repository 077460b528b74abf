"""Make a prompt of a line of a batch file, as vLLM's server makes it of the request.

- Follows vLLM 0.32: `vllm/entrypoints/openai/chat_completion/protocol.py` (build_chat_params),
  `vllm/renderers/online_renderer.py` (render_chat, render_completion).
- What is not about the prompt is checked by the engine, with vLLM's own classes of requests.
- Limits: one prompt a line; no suffix or beam search, and no echo of a prompt of token ids.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dpgen.config.prompt import RESERVED_KWARGS, PromptConfig
from dpgen.data.openai_batch.lines import (
    BAD_REQUEST,
    CHAT_URL,
    EMBEDDINGS_URL,
    UNSUPPORTED_REQUEST,
    parse_batch_line,
)
from dpgen.data.prompts.chat import ChatPrompt, Message, validate_messages
from dpgen.errors import RowRefused
from dpgen.formatting import describe_type
from dpgen.records import Request, ServerRequest

_PROMPT_KEYS = ("messages", "prompt")  # which the engine gets as tokens
# Fields that change the answer and that dpgen can't honour, each with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "kv_transfer_params": (None,),
    "ec_transfer_params": (None,),
    "prompt_embeds": (None,),
    "suffix": (None,),
    "use_beam_search": (None, False),
    "mm_processor_kwargs": (None, {}),
    "media_io_kwargs": (None, {}),
}
_REASONS = {
    "mm_processor_kwargs": ": set engine.mm_processor_kwargs for all rows",
    "media_io_kwargs": ": set engine.media_io_kwargs for all rows",
    "suffix": ": vLLM's server takes it for a few models alone. Write the prompt with the model's own marks",
    "use_beam_search": ". Ask for several samples instead: n, with a temperature",
}
DEFAULT_COMPLETION_TOKENS = 16  # of /v1/completions; chats may fill the context
_UNSET = (None, "auto")  # values of template variables that keep the default (`merge_kwargs` of vLLM)
_FLAGS = ("add_generation_prompt", "continue_final_message")


def read_server_request(text: Any) -> ServerRequest:
    """Return the request of a line.

    Raises:
        RowRefused: `bad_request`, `unsupported_request`, `invalid_text`.
    """
    if not isinstance(text, str):
        raise RowRefused(BAD_REQUEST, f"the line is {describe_type(text)}, not a text")
    line = parse_batch_line(text)
    if line.error is not None:
        raise RowRefused(line.error.type, line.error.message)
    assert line.url is not None and line.body is not None
    return ServerRequest(line.url, line.body)


def find_max_tokens(text: Any) -> int | None:
    """Return how many tokens a line allows its answer to have; None if it does not say, or can't be answered."""
    try:
        request = read_server_request(text)
    except RowRefused:
        return None
    limit = request.body.get("max_completion_tokens") if request.url == CHAT_URL else None
    limit = request.body.get("max_tokens") if limit is None else limit
    if limit is None and request.url != CHAT_URL:
        return DEFAULT_COMPLETION_TOKENS
    return limit if type(limit) is int and 0 <= limit < 1 << 53 else None


def select_plain_sampling(request: ServerRequest) -> dict[str, Any]:
    """Return the fields of SamplingParams that a stand-in for a model knows, as a request gives them, not checked."""
    names = ["max_tokens", "n", "seed", "prompt_logprobs"]
    fields = {name: value for name in names if (value := request.body.get(name)) is not None}
    if request.url == CHAT_URL:
        if (limit := request.body.get("max_completion_tokens")) is not None:
            fields["max_tokens"] = limit
        if request.body.get("logprobs"):
            fields["logprobs"] = request.body.get("top_logprobs") or 0
    else:
        fields.setdefault("max_tokens", DEFAULT_COMPLETION_TOKENS)
        if (count := request.body.get("logprobs")) is not None:
            fields["logprobs"] = count
    if request.body.get("echo"):
        if "logprobs" in fields:
            fields.setdefault("prompt_logprobs", fields["logprobs"])
        if request.url != CHAT_URL and fields["max_tokens"] == 0:
            fields["max_tokens"] = 1  # vLLM can't generate none
    return fields


def lay_retry_over(request: Request, body: Mapping[str, Any], retry_names: Collection[str]) -> dict[str, Any]:
    """Return a request's body as one further attempt of a sample has it; the body itself for the first attempt.

    Args:
        retry_names: the fields that `check.retry_sampling` sets.
    """
    if not request.id.attempt:
        return dict(body)
    names = {"n", "seed", *retry_names} & request.sampling.keys()
    own = {name: request.sampling[name] for name in names}
    kept = {name: value for name, value in body.items() if "max_tokens" not in own or name != "max_completion_tokens"}
    return {**kept, **own}


def is_constrained(request: Request) -> bool:
    """Return True if the text follows a grammar: the request's own, or that of its line in a batch file."""
    body = {} if request.server_request is None else request.server_request.body
    demands_call = body.get("tool_choice") not in (None, "none", "auto")
    has_form = body.get("response_format") not in (None, {"type": "text"})
    constraints = (request.sampling.get("structured_outputs"), body.get("structured_outputs"))
    return demands_call or has_form or any(value is not None for value in constraints)


def get_echo(request: ServerRequest) -> str:
    """Return the text that a request wants to have in front of its answer's; "" for none.

    That is the prompt of a completion, or the last message of a chat if the answer has the same role.
    """
    body = request.body
    if not body.get("echo"):
        return ""
    if request.url != CHAT_URL:
        return "" if body.get("return_token_ids") else str(_get_prompt(body))
    message = body["messages"][-1]
    content = message.get("content") if message.get("role") == find_role(body) else None
    if isinstance(content, list):
        return "\n".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)
    return content or ""


def find_role(body: Mapping[str, Any]) -> str:
    """Return who speaks in the answer to a chat: where the model continues the last message, the one who wrote that."""
    messages = body.get("messages")
    if body.get("add_generation_prompt", True) or not messages or not isinstance(messages[-1], dict):
        return "assistant"
    return str(messages[-1].get("role", "assistant"))


def drop_prompt(request: ServerRequest) -> ServerRequest:
    """Return a request without its prompt, which the engine gets as tokens."""
    return ServerRequest(request.url, {key: value for key, value in request.body.items() if key not in _PROMPT_KEYS})


def build_request_prompt(request: ServerRequest, config: PromptConfig) -> str | list[Any] | ChatPrompt:
    """Return a request's prompt: a text or a list of token ids, which nobody has checked, or a chat.

    Args:
        config: gives the run's `chat_template_kwargs`.

    Raises:
        RowRefused: `bad_request`, `unsupported_request`; for a chat also as `validate_messages`.
    """
    if request.url == EMBEDDINGS_URL:
        raise RowRefused(UNSUPPORTED_REQUEST, f"'url' is '{EMBEDDINGS_URL}', which needs task=embed")
    body = request.body
    if body.get("stream"):
        raise RowRefused(BAD_REQUEST, "'stream' is set, and a batch has no streams")
    for key, harmless in _UNSUPPORTED.items():
        if body.get(key) not in harmless:
            raise RowRefused(UNSUPPORTED_REQUEST, f"{key!r} is not supported{_REASONS.get(key, '')}")
    if request.url == CHAT_URL:
        return _build_chat(body, config)
    prompt = _get_prompt(body)
    if body.get("echo") and not isinstance(prompt, str):
        raise RowRefused(UNSUPPORTED_REQUEST, "'echo' of a prompt of token ids is not supported; give its text")
    return prompt


def adds_special_tokens(request: ServerRequest) -> bool:
    """Return True if the tokenizer adds its special tokens to a request's prompt, which a chat template has written."""
    return bool(read_flag(request.body, "add_special_tokens", request.url != CHAT_URL))


def get_cut_length(request: ServerRequest) -> int | None:
    """Return the number of tokens that the tokenizer cuts a prompt to; None where it does not cut.

    The engine makes any other cut, on tokens.
    """
    length = request.body.get("truncate_prompt_tokens")
    if type(length) is not int or length < 0 or request.body.get("truncation_side") is not None:
        return None
    return length


def read_flag(body: Mapping[str, Any], key: str, default: bool) -> bool:
    """Return a truth value of a body.

    Raises:
        RowRefused: `bad_request`.
    """
    value = body.get(key, default)
    if not isinstance(value, bool):
        raise RowRefused(BAD_REQUEST, f"{key!r} is {describe_type(value)}, not true or false")
    return value


def _get_prompt(body: Mapping[str, Any]) -> str | list[Any]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        if len(prompt) > 1:
            raise RowRefused(UNSUPPORTED_REQUEST, f"'prompt' holds {len(prompt):,} prompts; give each its own line")
        prompt = prompt[0]
    if not isinstance(prompt, (str, list)):
        raise RowRefused(BAD_REQUEST, f"'prompt' is {describe_type(prompt)}, neither a text nor a list of token ids")
    if not prompt:
        raise RowRefused("empty_prompt", "'prompt' is empty")
    return prompt


def _build_chat(body: Mapping[str, Any], config: PromptConfig) -> ChatPrompt:
    messages = body.get("messages")
    if isinstance(messages, list):
        messages = [_rename_reasoning(message) for message in messages]
    tools = None if body.get("tools") is None else _build_tools(body["tools"])
    own = _read_template_kwargs(body)
    effort = body.get("reasoning_effort")
    extra = {"documents": body.get("documents"), "reasoning_effort": effort}
    if effort is not None and "enable_thinking" not in own:
        extra["enable_thinking"] = effort != "none"
    of_request = {**own, **{key: value for key, value in extra.items() if value not in _UNSET}}
    kwargs = dict(config.chat_template_kwargs)
    if tools is not None:
        kwargs["tools"] = tools
    return {
        "messages": validate_messages(messages),
        "template_kwargs": {**kwargs, **{key: value for key, value in of_request.items() if value not in _UNSET}},
        "is_continued": read_flag(body, "continue_final_message", False),
        "add_generation_prompt": read_flag(body, "add_generation_prompt", True),
        "add_special_tokens": read_flag(body, "add_special_tokens", False),
    }


def _rename_reasoning(message: Any) -> Message | Any:
    """Return a message whose reasoning has the name that templates know."""
    if not isinstance(message, dict) or "reasoning_content" not in message:
        return message
    renamed = {key: value for key, value in message.items() if key != "reasoning_content"}
    if renamed.get("reasoning") is None and message["reasoning_content"] is not None:
        renamed["reasoning"] = message["reasoning_content"]
    return renamed


def _read_template_kwargs(body: Mapping[str, Any]) -> dict[str, Any]:
    kwargs = body.get("chat_template_kwargs")
    if kwargs is None:
        kwargs = {}
    if not isinstance(kwargs, dict):
        raise RowRefused(BAD_REQUEST, f"'chat_template_kwargs' is {describe_type(kwargs)}, not an object")
    if body.get("chat_template") is not None or kwargs.get("chat_template") is not None:
        raise RowRefused(BAD_REQUEST, "a request may not bring its own 'chat_template'; set data.chat_template")
    for name in sorted((kwargs.keys() & RESERVED_KWARGS) - {*_FLAGS, "chat_template"}):
        raise RowRefused(BAD_REQUEST, f"'chat_template_kwargs' may not hold {name!r}")
    return {key: value for key, value in kwargs.items() if key not in (*_FLAGS, "chat_template")}


def _build_tools(tools: Any) -> list[dict[str, Any]]:
    """Return tools as the server passes them to a chat template: keys in its order, absent ones null."""
    if not isinstance(tools, list) or not tools:
        raise RowRefused(BAD_REQUEST, "'tools' is not a list of at least one tool")
    return [_build_tool(f"tool {index}", tool) for index, tool in enumerate(tools)]


def _build_tool(where: str, tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type", "function") != "function":
        raise RowRefused(BAD_REQUEST, f"{where} is not {{type: function, function: {{name, parameters}}}}")
    if not isinstance(function.get("name"), str):
        raise RowRefused(BAD_REQUEST, f"{where} has no 'name' that is a text")
    defer = tool.get("defer_loading")
    if function.get("defer_loading") is None:
        function = {**function, "defer_loading": defer}
    built = {"name": function["name"], "description": function.get("description")}
    built["parameters"] = function.get("parameters")
    built |= {key: function[key] for key in ("strict", "defer_loading") if function.get(key) is not None}
    return {"type": "function", "function": built, **({} if defer is None else {"defer_loading": defer})}
