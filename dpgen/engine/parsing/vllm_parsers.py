"""Parse completions in a worker process: with vLLM's reasoning and tool parsers, then as JSON.

Follows vLLM 0.32, `vllm/parser/abstract_parser.py` (DelegatingParser.parse): the reasoning first, then the tool calls
of what is left; each text gets parsers of its own, since parsers keep state.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dpgen.data.tokenizer import TokenizerConfig, fetch_config_files
from dpgen.engine.messages import RequestParsers
from dpgen.engine.parsing.json_text import read_json
from dpgen.errors import find_nearest_name
from dpgen.records import Completion, ServerRequest, ToolCall

# By the model's type, for `output.reasoning_parser=auto`; names of vLLM 0.26 to 0.33.
_REASONING_PARSERS = {
    "deepseek_v2": "deepseek_r1",
    "deepseek_v3": "deepseek_r1",
    "ernie4_5_moe": "ernie45",
    "glm4_moe": "glm45",
    "granite": "granite",
    "hunyuan_v1_moe": "hunyuan_a13b",
    "kimi_k2": "kimi_k2",
    "minimax_m2": "minimax_m2",
    "olmo3": "olmo3",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3",
    "qwen3_next": "qwen3",
    "seed_oss": "seed_oss",
    "step3": "step3",
}
_MAX_CACHED_REQUESTS = 1000
_RANDOM_ID_PREFIXES = ("chatcmpl-tool-", "call_")  # of ids that vLLM makes up


@dataclass(frozen=True)
class ParserSpec:
    """Name the parsers, and what they need.

    Attributes:
        tokenizer: the model's; None for the fake engine, whose texts hold neither reasoning nor calls.
        reasoning_parser: vLLM's name, or "auto"; None to leave the reasoning in the text.
        tool_parser: vLLM's name; None to leave calls in the text.
        keep_reasoning: False to drop the reasoning.
        parse_json: read what is left as JSON.
        template_kwargs: `data.chat_template_kwargs`, since `enable_thinking` and the like change what parsers expect.
    """

    tokenizer: TokenizerConfig | None
    reasoning_parser: str | None = None
    tool_parser: str | None = None
    keep_reasoning: bool = True
    parse_json: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ParserInfo:
    """Say what the parsers ask of the engine.

    Attributes:
        sampling: fields of SamplingParams that they need, e.g. special tokens in the text.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ParseTask:
    """Hold one row's completions, and the tools that the model was offered, or the request that they answer."""

    row: int
    completions: tuple[Completion, ...]
    tools: Sequence[Mapping[str, Any]] | None = None
    request: ServerRequest | None = None


def start(spec: ParserSpec) -> tuple[Callable[[ParseTask], tuple[Completion, ...]], ParserInfo]:
    """Return the handler of parse tasks, and what it asks of the engine; the factory of a pool's workers.

    Raises:
        ValueError: vLLM has no such parser, or it can't be used with this tokenizer.
    """
    if spec.tokenizer is None or (spec.reasoning_parser is None and spec.tool_parser is None):
        text_parser = None
        info = ParserInfo()
    else:
        text_parser = _VllmParser(spec)
        info = text_parser.find_info()

    def handle(task: ParseTask) -> tuple[Completion, ...]:
        return tuple(parse(completion, f"{task.row}_{i}", task) for i, completion in enumerate(task.completions))

    def parse(completion: Completion, sample: str, task: ParseTask) -> Completion:
        if text_parser is not None:
            try:
                if task.request is None:
                    completion = text_parser.parse(completion, sample, task.tools)
                else:
                    completion = text_parser.parse_answer(completion, sample, task.request)
            except Exception as error:  # noqa: BLE001 - foreign code: the text stays
                return replace(completion, parse_error=_describe(error))
        if spec.parse_json and not completion.tool_calls:
            found = read_json(completion.text)
            return replace(completion, parsed=found.canonical, parse_error=found.error)
        return completion

    return handle, info


class _VllmParser:
    """Take reasoning and tool calls out of texts."""

    def __init__(self, spec: ParserSpec) -> None:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.tokenizers import get_tokenizer

        tokenizer = spec.tokenizer
        assert tokenizer is not None
        self._spec = spec
        self._request_class: Any = ChatCompletionRequest
        self._tool_class = None if spec.tool_parser is None else _find_tool_parser(spec.tool_parser)
        self._takes_template_kwargs = self._tool_class is not None and _is_engine_adapter(self._tool_class)
        self._tokenizer: Any = get_tokenizer(
            tokenizer.name,
            tokenizer_mode=tokenizer.tokenizer_mode,
            revision=tokenizer.revision,
            trust_remote_code=tokenizer.trust_remote_code,
        )
        reasoning_parser = spec.reasoning_parser
        if reasoning_parser == "auto":
            reasoning_parser = choose_reasoning_parser(tokenizer, self._tokenizer)
        self._reasoning_class = None if reasoning_parser is None else _find_reasoning_parser(reasoning_parser)
        self._requests: dict[str, Any] = {}
        self._request_parsers: Any = None  # made when the first answer to a request comes
        for kind, name, make in (
            ("output.reasoning_parser", reasoning_parser, self._make_reasoning_parser),
            ("output.tool_parser", spec.tool_parser, self._make_tool_parser),
        ):
            try:
                if name is not None:
                    make(self._get_request(None))
            except Exception as error:
                raise ValueError(f"{kind}={name} can't be used with this model: {_describe(error)}") from error
        try:
            self.parse(Completion("text", "stop", 1), "", None)
        except Exception as error:  # rows meet any other error again, and report it
            if isinstance(error, NotImplementedError):
                names = " and ".join(name for name in (reasoning_parser, spec.tool_parser) if name is not None)
                raise ValueError(f"vLLM's parser {names} reads only the streams of vLLM's server") from error

    def find_info(self) -> ParserInfo:
        """Return what the parsers ask of the engine, as vLLM's server does for a request with tools."""
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
        request = self._get_request([tool] if self._tool_class else None)
        for make in (self._make_reasoning_parser, self._make_tool_parser):
            parser = make(request)
            if parser is not None:
                request = parser.adjust_request(request)
        names = ("skip_special_tokens", "spaces_between_special_tokens")
        defaults = self._request_class(messages=[], model="")
        changed = {name: getattr(request, name) for name in names}
        return ParserInfo({name: value for name, value in changed.items() if value != getattr(defaults, name)})

    def parse(self, completion: Completion, sample: str, tools: Sequence[Mapping[str, Any]] | None) -> Completion:
        """Return a completion with reasoning and calls in fields of their own.

        Args:
            sample: names the completion within the run, for the ids of its calls.
        """
        request = self._get_request(tools)
        reasoning, text = None, completion.text
        calls: tuple[ToolCall, ...] = ()
        if (parser := self._make_reasoning_parser(request)) is not None:
            reasoning, content = parser.extract_reasoning(text, request)
            text = content or ""
        if (parser := self._make_tool_parser(request)) is not None:
            found = parser.extract_tool_calls(text, request)
            if found is not None and found.tools_called:
                functions = [(call.id, call.function) for call in found.tool_calls]
                calls = tuple(
                    ToolCall(_make_call_id(id, sample, number), function.name, function.arguments)
                    for number, (id, function) in enumerate(functions)
                )
                text = found.content or ""
                text = text if text.strip() else ""
        kept = reasoning if self._spec.keep_reasoning else None
        return replace(completion, text=text, reasoning=kept, tool_calls=calls)

    def parse_answer(self, completion: Completion, sample: str, request: ServerRequest) -> Completion:
        """Return the answer to a request, with reasoning and calls in fields of their own.

        Args:
            sample: as for `parse`.
        """
        from dpgen.engine.parsing import request_parsers

        if self._request_parsers is None:
            spec = self._spec
            parsers = RequestParsers(spec.tool_parser, spec.reasoning_parser, spec.template_kwargs)
            assert spec.tokenizer is not None
            parser_class = request_parsers.find_parser_class(parsers, spec.tokenizer, self._tokenizer)
            self._request_parsers = request_parsers.ParserMaker(parser_class, self._tokenizer, spec.template_kwargs)
        make_call_id = lambda id, number: _make_call_id(id, sample, number)  # noqa: E731
        return request_parsers.parse_answer(
            completion, request, self._request_parsers, make_call_id, keep_reasoning=self._spec.keep_reasoning
        )

    def _get_request(self, tools: Sequence[Mapping[str, Any]] | None) -> Any:
        """Return the server's request that offers these tools; parsers read the tools' types from it."""
        key = json.dumps(tools)
        if key not in self._requests:
            if len(self._requests) > _MAX_CACHED_REQUESTS:
                self._requests.clear()
            fields: dict[str, Any] = {"tools": tools, "tool_choice": "auto"} if tools else {}
            kwargs = dict(self._spec.template_kwargs)
            self._requests[key] = self._request_class(messages=[], model="", chat_template_kwargs=kwargs, **fields)
        return self._requests[key]

    def _make_reasoning_parser(self, request: Any) -> Any:
        if self._reasoning_class is None:
            return None
        return self._reasoning_class(self._tokenizer, chat_template_kwargs=dict(self._spec.template_kwargs))

    def _make_tool_parser(self, request: Any) -> Any:
        if self._tool_class is None:
            return None
        kwargs = {"chat_template_kwargs": dict(self._spec.template_kwargs)} if self._takes_template_kwargs else {}
        return self._tool_class(self._tokenizer, request.tools, **kwargs)


def _make_call_id(id: str | None, sample: str, number: int) -> str:
    """Return a call's id: the model's, or one that is the same whenever the row is generated."""
    is_random = not id or id.startswith(_RANDOM_ID_PREFIXES)
    return f"call_{sample}_{number}" if is_random else str(id)


def choose_reasoning_parser(config: TokenizerConfig, tokenizer: Any) -> str:
    """Return vLLM's name of the parser for a model: by its type, or by its tags.

    Raises:
        ValueError: neither tells how the model writes its reasoning.
    """
    directory = fetch_config_files(config.model or config.name, config.model_revision)
    try:
        model_type = json.loads((directory / "config.json").read_bytes()).get("model_type") if directory else None
    except (OSError, ValueError, AttributeError):
        model_type = None
    if model_type in _REASONING_PARSERS:
        return _REASONING_PARSERS[model_type]
    if "</think>" in str(getattr(tokenizer, "chat_template", "")) or "</think>" in tokenizer.get_vocab():
        return "deepseek_r1"
    raise ValueError(
        f"output.reasoning_parser=auto: nothing says how a model of the type {model_type!r} writes its reasoning. Name "
        "one of vLLM's parsers, e.g. output.reasoning_parser=deepseek_r1 for <think>...</think>"
    )


def _find_reasoning_parser(name: str) -> Any:
    from vllm.reasoning import ReasoningParserManager

    return _find(name, "output.reasoning_parser", ReasoningParserManager, "reasoning_parsers", "get_reasoning_parser")


def _find_tool_parser(name: str) -> Any:
    from vllm.tool_parsers import ToolParserManager

    return _find(name, "output.tool_parser", ToolParserManager, "tool_parsers", "get_tool_parser")


def _is_engine_adapter(tool_class: Any) -> bool:
    """Return True if vLLM makes this tool parser with the keywords of its reasoning parsers."""
    from vllm.parser.engine.adapters import ParserEngineToolAdapter

    return issubclass(tool_class, ParserEngineToolAdapter)


def _find(name: str, key: str, manager: Any, registry: str, getter: str) -> Any:
    names = sorted({*getattr(manager, registry), *getattr(manager, "lazy_parsers", {})})
    if name not in names:
        nearest = find_nearest_name(name, names)
        hint = f"; did you mean {nearest!r}?" if nearest else "."
        raise ValueError(f"{key}={name} is no parser of this vLLM{hint} Its parsers: {', '.join(names)}")
    return getattr(manager, getter)(name)


def _describe(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
