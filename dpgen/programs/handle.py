"""The handle `llm` that a program gets: its calls of the model, and of the user's own functions.

    async def critique(row, llm):
        draft = await llm.chat(row["question"], max_tokens=400)
        notes = await llm.chat(f"Find the faults:\\n{draft.text}", temperature=0.2)
        final = await llm.chat(f"Rewrite:\\n{draft.text}\\n{notes.text}")
        return {"draft": draft.text, "final": final.text}

- A call's prompt, sampling and seed follow from the program and the row alone. So after a restart the program runs
  again, and its finished calls are answered from the journal.
- Calls may run side by side, by `asyncio.gather` or tasks: a call is known by the task that makes it and its number
  there, not by the time. What is drawn at random comes from `llm.random`.
- A call that can't be made raises `CallFailed`. A program may catch it; else it is the row's error.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dpgen.formatting import describe_type
from dpgen.logprobs import TokenLogprobs
from dpgen.records import Completion, RowResult, ToolCall

Messages = str | Sequence[Mapping[str, Any]]
_CHAT_OPTIONS = ("system", "tools", "template_kwargs", "continue_final_message")


class CallFailed(Exception):
    """Report a call without an answer.

    Attributes:
        type: one of dpgen's error types, as `prompt_too_long`.
        message: the reason.
    """

    def __init__(self, type: str, message: str) -> None:
        super().__init__(message)
        self.type, self.message = type, message


@dataclass(frozen=True)
class ModelAnswer:
    """Hold what the model has answered to a call.

    Attributes:
        text: the generated text, without what output.reasoning and output.tool_parser have taken out.
        finish_reason: vLLM's: "stop", "length", ...
        num_tokens: generated tokens. num_prompt_tokens: those of the prompt.
        reasoning: what the model thought before it answered; None unless output.reasoning=split found any.
        tool_calls: each with id, name and arguments (JSON text).
        token_ids: the generated tokens; None unless output.token_ids or logprobs ask for them.
        logprobs: of the generated tokens; None unless the call, or sampling, asks for them.
    """

    text: str
    finish_reason: str | None
    num_tokens: int
    num_prompt_tokens: int
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    token_ids: list[int] | None = None
    logprobs: TokenLogprobs | None = None

    def to_message(self) -> dict[str, Any]:
        """Return the answer as the assistant's message of a chat."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message


@dataclass(frozen=True)
class Score:
    """Hold what the model makes of a given completion.

    Attributes:
        logprob: the completion's log-probability after the prompt. num_tokens: of the completion.
        is_greedy: True if each of its tokens is more likely than any other token there.
    """

    logprob: float
    num_tokens: int
    is_greedy: bool

    @property
    def mean_logprob(self) -> float:
        """Return the log-probability of a token, by which completions of different lengths compare."""
        return self.logprob / max(1, self.num_tokens)


@dataclass(frozen=True)
class ModelCall:
    """Hold what a program asks of the model.

    Attributes:
        kind: "chat", "complete" or "score", for messages.
        prompt: a text, token ids, or the messages of a chat.
        is_chat: True if the chat template is applied to `prompt`.
        template: tools, and variables of the chat template, of this call alone.
        sampling: fields of SamplingParams over those of the run.
        completion: the text to score; None to generate.
    """

    kind: str
    prompt: Any
    is_chat: bool
    template: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    completion: str | None = None


class Port(Protocol):
    """Interface of what answers a program's calls."""

    async def ask(self, call: ModelCall) -> RowResult:
        """Return the model's result; raises CallFailed."""

    async def run_tool(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what a function of the user returns, which runs once; raises CallFailed."""


class Llm:
    """Make the calls of one row's program.

    Attributes:
        row_id: the row's index in the input.
        random: draws the same numbers each time that the row's program runs.
    """

    def __init__(self, row_id: int, seed: int, port: Port) -> None:
        self.row_id, self._port = row_id, port
        self.random = random.Random(seed)

    async def chat(
        self,
        messages: Messages,
        *,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        **sampling: Any,
    ) -> ModelAnswer:
        """Return the model's answer to a chat.

        Args:
            messages: as LLM.chat takes them, or the text of a user's message.
            system: a system message before them.
            tools: functions for the chat template, in place of data.tools.
            template_kwargs: laid over data.chat_template_kwargs.
            continue_final_message: leave the last message, the assistant's, open: the model continues it.
            sampling: fields of SamplingParams, laid over `sampling`.

        Raises:
            CallFailed: as a row fails, e.g. `prompt_too_long`.
        """
        options = (system, tools, template_kwargs, continue_final_message)
        [answer] = await self._generate(_make_chat(messages, options, sampling))
        return answer

    async def complete(self, prompt: str | Sequence[int], **sampling: Any) -> ModelAnswer:
        """Return the model's continuation of a text, or of token ids, without a chat template; see `chat`."""
        [answer] = await self._generate(ModelCall("complete", _to_prompt(prompt), False, sampling=_check_n(sampling)))
        return answer

    async def samples(self, messages: Messages, n: int, *, as_chat: bool = True, **others: Any) -> list[ModelAnswer]:
        """Return `n` answers to one prompt, which the engine computes once.

        Args:
            as_chat: False for continuations of the text, as `complete` gives them.
            others: as for `chat`, or for `complete`.
        """
        if type(n) is not int or n < 1:
            raise ValueError(f"llm.samples: n={n!r} must be a whole number of at least 1")
        if as_chat:
            call = _make_chat(messages, tuple(others.pop(name, None) for name in _CHAT_OPTIONS), others)
        else:
            call = ModelCall("complete", _to_prompt(messages), False, sampling=_check_n(others))
        call.sampling["n"] = n
        return await self._generate(call)

    async def json(self, messages: Messages, schema: Any, **others: Any) -> Any:
        """Return the value of an answer that follows a JSON Schema; see `chat`.

        Args:
            schema: a JSON Schema, or a Pydantic model.
            others: as for `chat`.

        Raises:
            CallFailed: also `program_failed`: the text is no JSON, e.g. since max_tokens cut it off.
        """
        if hasattr(schema, "model_json_schema"):
            schema = schema.model_json_schema()
        answer = await self.chat(messages, structured_outputs={"json": schema}, **others)
        try:
            return json.loads(answer.text, strict=False)  # a grammar may let control characters pass
        except (ValueError, RecursionError) as error:
            raise CallFailed(
                "program_failed",
                f"llm.json: the answer is no JSON: {error}, it ended by {answer.finish_reason}: {answer.text[:80]!r}",
            ) from None

    async def score(
        self, prompt: Messages | Sequence[int], completion: str, *, as_chat: bool = True, **others: Any
    ) -> Score:
        """Return the log-probability of a given completion; nothing is generated.

        Args:
            as_chat: False for a completion of the text itself.
            others: `system` and `template_kwargs`, as for `chat`.
        """
        if not isinstance(completion, str):
            raise CallFailed("wrong_type", f"llm.score: the completion is {describe_type(completion)}, not a string")
        if as_chat:
            options = (others.pop("system", None), None, others.pop("template_kwargs", None), False)
            chat = _make_chat(prompt, options, others)
            call = ModelCall("score", chat.prompt, True, chat.template, chat.sampling, completion)
        else:
            call = ModelCall("score", _to_prompt(prompt), False, {}, others, completion)
        result = await self._port.ask(call)
        assert result.scored is not None
        logprobs = result.scored.logprobs
        return Score(float(logprobs.total), len(logprobs), result.scored.is_greedy)

    async def embed(self, text: str) -> list[float]:
        """Raise CallFailed: vLLM loads a model for one task, and the run's is loaded to generate.

        Embed in a run of its own over this run's result: data.path=RUN_DIR/dataset.
        """
        raise CallFailed(
            "unsupported_request",
            "llm.embed: the engine is loaded to generate, and vLLM embeds with a model that is loaded for that alone; "
            "embed in a run of its own, with task=embed and data.path=RUN_DIR/dataset",
        )

    async def tool(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what a function of yours returns. It runs once, in a thread; its result is journaled.

        After a restart the result comes from the journal. A death within half a second after the function has returned
        may come before the journal is synced; then it runs again.

        Args:
            function: a function, or an async one, which runs on the event loop.
            args, kwargs: what it gets; values of JSON, since they tell whether a journaled result is that of this call.

        Raises:
            CallFailed: `tool_failed`, the function raised, or returned no value of JSON.
        """
        return await self._port.run_tool(function, args, kwargs)

    async def _generate(self, call: ModelCall) -> list[ModelAnswer]:
        result = await self._port.ask(call)
        return [_to_answer(completion, result.num_prompt_tokens or 0) for completion in result.completions]


def _to_answer(completion: Completion, num_prompt_tokens: int) -> ModelAnswer:
    return ModelAnswer(
        completion.text,
        completion.finish_reason,
        completion.num_tokens,
        num_prompt_tokens,
        completion.reasoning,
        completion.tool_calls,
        completion.token_ids,
        completion.logprobs,
    )


def _make_chat(messages: Any, options: tuple[Any, ...], sampling: dict[str, Any]) -> ModelCall:
    """Return a chat's call. It holds copies, since the program may change its messages before they are rendered.

    Args:
        options: the values of `_CHAT_OPTIONS`.
    """
    system, tools, template_kwargs, is_continued = options
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    chat = messages
    if isinstance(messages, (list, tuple)):
        chat = [] if system is None else [{"role": "system", "content": system}]
        chat += [dict(message) if isinstance(message, Mapping) else message for message in messages]
    template: dict[str, Any] = {}
    if template_kwargs:
        template["kwargs"] = dict(template_kwargs)
    if tools is not None:
        template["tools"] = list(tools)
    if is_continued:
        template["is_continued"] = True
    return ModelCall("chat", chat, True, template, _check_n(sampling))


def _check_n(sampling: dict[str, Any]) -> dict[str, Any]:
    if "n" in sampling:
        raise TypeError("a call has one answer: use llm.samples(messages, n) for several")
    return sampling


def _to_prompt(prompt: Any) -> Any:
    if hasattr(prompt, "tolist"):  # of numpy
        return prompt.tolist()
    return list(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, str) else prompt
