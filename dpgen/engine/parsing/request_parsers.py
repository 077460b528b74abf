"""Parse the answers to requests of a batch file as vLLM's server does, for each request with its own tools and choices.

Follows vLLM 0.32: `chat_completion_full_generator` in `vllm/entrypoints/openai/chat_completion/serving.py`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from dpgen.data.openai_batch.lines import CHAT_URL
from dpgen.data.tokenizer import TokenizerConfig
from dpgen.engine.messages import RequestParsers
from dpgen.engine.parsing.vllm_parsers import choose_reasoning_parser
from dpgen.records import Completion, ServerRequest, ToolCall


class ParserMaker:
    """Make vLLM's parsers of completions, one for each completion, since parsers keep state.

    Args:
        parser_class: vLLM's `Parser` for the run's tool and reasoning parsers.
        tokenizer: vLLM's, of the model.
        template_kwargs: `data.chat_template_kwargs`.
        model_config: vLLM's; None in a worker, which has none.
    """

    def __init__(
        self, parser_class: Any, tokenizer: Any, template_kwargs: Mapping[str, Any], model_config: Any = None
    ) -> None:
        self._class, self._tokenizer = parser_class, tokenizer
        self._template_kwargs, self._model_config = dict(template_kwargs), model_config

    @property
    def reads_calls(self) -> bool:
        """Return True if there is a parser of tool calls."""
        return self._class.tool_parser_cls is not None

    def adjusts(self, request: Any) -> bool:
        """Return True if a chat is to be adjusted before its answer is generated."""
        is_always = getattr(self._class, "always_adjust_request", False)  # from vLLM 0.32 on
        return bool(is_always or self._class.reasoning_parser_cls is not None or request.tool_choice != "none")

    def make(self, request: Any) -> Any:
        """Return the parser of an answer to a chat, vLLM's `ChatCompletionRequest`."""
        kwargs = self.get_template_kwargs(request)
        return self._class(self._tokenizer, request.tools, model_config=self._model_config, chat_template_kwargs=kwargs)

    def get_template_kwargs(self, request: Any) -> dict[str, Any]:
        """Return the variables of a chat's template, the run's included."""
        params = request.build_chat_params(None, "auto").with_defaults(self._template_kwargs)
        kwargs: dict[str, Any] = params.chat_template_kwargs
        return kwargs


def find_parser_class(parsers: RequestParsers, config: TokenizerConfig, tokenizer: Any) -> Any:
    """Return vLLM's class of parsers, as its server makes it; None where neither parser is named.

    Args:
        config: of the model's tokenizer.

    Raises:
        ValueError, KeyError: vLLM has no such parser, or nothing tells how the model writes its reasoning.
    """
    from vllm.parser import ParserManager

    reasoning_parser = parsers.reasoning_parser
    if reasoning_parser == "auto":
        reasoning_parser = choose_reasoning_parser(config, tokenizer)
    takes_tokenizer = "tokenizer" in inspect.signature(ParserManager.get_parser).parameters  # from vLLM 0.32 on
    return ParserManager.get_parser(
        tool_parser_name=parsers.tool_parser,
        reasoning_parser_name=reasoning_parser,
        enable_auto_tools=parsers.tool_parser is not None,
        model_name=config.model or config.name,
        **({"tokenizer": tokenizer} if takes_tokenizer else {}),
    )


def parse_answer(
    completion: Completion,
    request: ServerRequest,
    maker: ParserMaker,
    make_call_id: Callable[[str | None, int], str],
    *,
    keep_reasoning: bool,
) -> Completion:
    """Return an answer with reasoning and calls in fields of their own, as the request wants them.

    Args:
        make_call_id: returns a call's id, given the one that the parser found and the call's number.
    """
    if request.url != CHAT_URL:
        return completion
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    chat = ChatCompletionRequest.model_validate({**request.body, "messages": []})
    if maker.adjusts(chat):
        chat = maker.make(chat).adjust_request(request=chat)
    reasoning, content, found = maker.make(chat).parse(
        completion.text,
        chat,
        enable_auto_tools=maker.reads_calls,
        model_output_token_ids=completion.token_ids or (),
    )
    found = list(found or ())
    if chat.parallel_tool_calls is False:
        found = found[:1]
    calls = tuple(ToolCall(make_call_id(call.id, i), call.name, call.arguments) for i, call in enumerate(found))
    kept = reasoning if keep_reasoning and chat.include_reasoning else None
    is_null = True if content is None else None
    return dataclasses.replace(
        completion, text=content or "", reasoning=kept, tool_calls=calls, has_null_content=is_null
    )
