"""Let a model think before structured outputs constrain its text, as vLLM's server does.

- Follows vLLM 0.32: `_engine_reasoning_kwargs` in `vllm/entrypoints/openai/chat_completion/serving.py`, and what
  `add_request` makes of it in `vllm/v1/engine/async_llm.py`, which `LLMEngine` lacks.
- The engine constrains a text from its first token unless `engine.reasoning_parser` is set. Where the run splits
  reasoning from its texts, it is therefore set to the same parser.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from dpgen.data.tokenizer import TokenizerConfig
from dpgen.engine.messages import EngineSpec
from dpgen.engine.parsing.request_parsers import ParserMaker
from dpgen.engine.parsing.vllm_parsers import choose_reasoning_parser


class ReasoningState(NamedTuple):
    """Hold what vLLM's server tells the engine about the reasoning of an answer.

    Attributes:
        has_ended: True to constrain the text from its first token.
        parser_kwargs: keywords of the engine's own reasoning parser.
    """

    has_ended: bool | None
    parser_kwargs: dict[str, Any] | None


def find_engine_parser(spec: EngineSpec) -> str | None:
    """Return the value of `engine.reasoning_parser` for a run; None to leave it as it is.

    A run without structured outputs needs none. Whoever starts the run's parsers reports a name that can't be resolved.
    """
    may_constrain = spec.reads_requests or any(name == "structured_outputs" for _, name in spec.iter_sampling_names())
    if spec.reasoning_parser is None or not may_constrain or spec.options.get("reasoning_parser") is not None:
        return None
    if spec.reasoning_parser != "auto":
        return spec.reasoning_parser
    from vllm.tokenizers import get_tokenizer

    config = TokenizerConfig.from_engine(spec.model, spec.options)
    try:
        tokenizer = get_tokenizer(
            config.name,
            tokenizer_mode=config.tokenizer_mode,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
        return choose_reasoning_parser(config, tokenizer)
    except Exception:  # noqa: BLE001 - vLLM's errors have no common base
        return None


def find_state(chat: Any, makers: ParserMaker | None, token_ids: Sequence[int]) -> ReasoningState | None:
    """Return the state of the reasoning where an answer begins; None where the engine finds it itself.

    Args:
        chat: vLLM's `ChatCompletionRequest`, adjusted to the run's parsers.
        token_ids: the prompt.
    """
    parser = None if makers is None else makers.make(chat)
    kwargs = None
    if makers is not None and parser is not None and parser.reasoning_parser is not None:
        kwargs = {"chat_template_kwargs": makers.get_template_kwargs(chat)}
    state = ReasoningState(_has_ended(chat, parser, list(token_ids)), kwargs)
    return None if state == ReasoningState(None, None) else state


def _has_ended(chat: Any, parser: Any, token_ids: list[int]) -> bool | None:
    """Return `reasoning_ended` as vLLM's server tells it the engine."""
    if hasattr(chat, "resolve_reasoning_ended"):  # from vLLM 0.32 on; before, its server does what follows
        has_ended: bool | None = chat.resolve_reasoning_ended(parser, token_ids)
        return has_ended
    has_old_grammar = getattr(chat, "_grammar_from_tool_parser", False)  # its name in vLLM 0.26
    if has_old_grammar or getattr(chat, "_grammar_from_parser", False) or not chat.include_reasoning:
        return True
    return None if parser is None or parser.reasoning_parser is None else bool(parser.is_reasoning_end(token_ids))


def make_core_request(engine: Any, name: str, prompt: Any, params: Any, adapter: Any, reasoning: ReasoningState) -> Any:
    """Return vLLM's `EngineCoreRequest` of a request, with the state of its reasoning."""
    request = engine.input_processor.process_inputs(
        name, prompt, params, supported_tasks=engine.get_supported_tasks(), lora_request=adapter
    )
    request.reasoning_ended, request.reasoning_parser_kwargs = reasoning
    return request
