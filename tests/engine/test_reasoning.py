"""A model that thinks is constrained by a grammar only once it has thought, as vLLM's server does it."""

from __future__ import annotations

from typing import Any

import pytest

from dpgen.engine.messages import EngineSpec
from dpgen.engine.vllm.reasoning import ReasoningState, find_engine_parser, find_state, make_core_request

GRAMMAR = {"structured_outputs": {"regex": "a+"}}


@pytest.mark.parametrize(
    ("fields", "parser"),
    [
        ({"sampling": GRAMMAR}, "qwen3"),
        ({"sampling_columns": ("structured_outputs",)}, "qwen3"),
        ({"sampling_by_rank": (GRAMMAR,)}, "qwen3"),
        ({"reads_requests": True}, "qwen3"),
        ({"sampling": {"temperature": 0}}, None),
        ({"sampling": GRAMMAR, "reasoning_parser": None}, None),
        ({"sampling": GRAMMAR, "options": {"reasoning_parser": "olmo3"}}, None),
        ({"sampling": GRAMMAR, "options": {"reasoning_parser": ""}}, None),
    ],
)
def test_the_engine_knows_the_parser_where_a_text_may_be_constrained(
    fields: dict[str, Any], parser: str | None
) -> None:
    spec = EngineSpec(**{"kind": "vllm", "model": "none", "reasoning_parser": "qwen3", **fields})
    assert find_engine_parser(spec) == parser


class Chat:
    """A chat whose reasoning ends with token 9."""

    def resolve_reasoning_ended(self, parser: Any, token_ids: list[int]) -> bool | None:
        return None if parser is None else 9 in token_ids


class OldChat:
    """A chat of vLLM 0.26 to 0.31, whose server asks the parser itself."""

    def __init__(self, include_reasoning: bool = True, **grammars: bool) -> None:
        self.include_reasoning = include_reasoning
        self.__dict__.update(grammars)


class Parser:
    reasoning_parser = "any"

    @staticmethod
    def is_reasoning_end(token_ids: list[int]) -> bool:
        return 9 in token_ids


class Makers:
    """Make parsers that read reasoning."""

    def make(self, chat: Any) -> Any:
        return Parser

    def get_template_kwargs(self, chat: Any) -> dict[str, Any]:
        return {"enable_thinking": True}


def test_the_engine_is_told_where_the_reasoning_stands_in_the_prompt() -> None:
    kwargs = {"chat_template_kwargs": {"enable_thinking": True}}
    makers: Any = Makers()
    assert find_state(Chat(), makers, [1, 2]) == ReasoningState(False, kwargs)
    assert find_state(Chat(), makers, [1, 9]) == ReasoningState(True, kwargs)
    assert find_state(Chat(), None, [1, 9]) is None, "the engine finds it"


def test_an_older_vllm_is_told_the_same() -> None:
    kwargs = {"chat_template_kwargs": {"enable_thinking": True}}
    makers: Any = Makers()
    assert find_state(OldChat(), makers, [1, 2]) == ReasoningState(False, kwargs)
    assert find_state(OldChat(), makers, [1, 9]) == ReasoningState(True, kwargs)
    assert find_state(OldChat(), None, [1, 9]) is None
    for chat in (
        OldChat(include_reasoning=False),
        OldChat(_grammar_from_parser=True),
        OldChat(_grammar_from_tool_parser=True),
    ):
        assert find_state(chat, makers, [1, 2]) == ReasoningState(True, kwargs)


def test_a_request_of_the_engine_carries_the_state_of_its_reasoning() -> None:
    class Engine:
        class input_processor:
            @staticmethod
            def process_inputs(name: str, prompt: Any, params: Any, **others: Any) -> Any:
                return type("CoreRequest", (), {"request_id": name, **others})()

        def get_supported_tasks(self) -> tuple[str, ...]:
            return ("generate",)

    request = make_core_request(Engine(), "5", {}, None, "adapter", ReasoningState(True, {"a": 1}))
    assert (request.reasoning_ended, request.reasoning_parser_kwargs) == (True, {"a": 1})
    assert (request.request_id, request.lora_request) == ("5", "adapter")
