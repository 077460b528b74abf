"""A dataset row → the prompt's token ids: exactly those that vLLM's LLM.generate or LLM.chat would use.

    settings = PromptSettings(messages_column="messages")
    settings.check_columns(dataset.column_names)
    tokenizer = load_tokenizer(TokenizerSettings.from_engine(model, engine))
    Renderer(settings, tokenizer).render(row)  # [1, 15, ...]

A text becomes tokens as LLM.generate makes them: with the special tokens that the tokenizer adds. Messages go
through the chat template to text, and that text becomes tokens *without* them, as in LLM.chat, for the
template has written them: both together are the classic doubled BOS.

Follows vLLM 0.32: `vllm/entrypoints/common/offline.py` (_preprocess_cmpl, _preprocess_chat),
`vllm/renderers/base.py` (_tokenize_prompt), `vllm/renderers/hf.py` (safe_apply_chat_template). Limits: text
only, decoder-only models; tokenizers that only vLLM knows (`is_supported_by_transformers` is false) are rendered by
`dpgen.engine.vllm_render`. A chat template that writes today's date gives other tokens tomorrow.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpgen.data.chat import Message, merge_developer_role, to_conversation, validate_messages
from dpgen.data.content_format import detect_content_format, template_variables
from dpgen.data.row_template import check_row_template, compile_row_template, template_columns
from dpgen.data.tokenizer import (
    TokenizerConfig,
    find_reason_to_tokenize_in_engine,
    is_supported_by_transformers,
    load_tokenizer,
)
from dpgen.errors import ConfigError, RowRefused, suggest_name
from dpgen.formatting import describe_type

__all__ = [
    "PromptConfig",
    "PromptRenderer",
    "TokenizerConfig",
    "find_reason_to_tokenize_in_engine",
    "is_supported_by_transformers",
    "load_tokenizer",
]

# What chat_template_kwargs may not hold: settings of their own, and what vLLM itself passes.
_RESERVED_KWARGS = {
    *("add_generation_prompt", "chat_template", "continue_final_message"),
    *("conversation", "messages", "return_dict", "tokenize"),
}


@dataclass(frozen=True)
class PromptConfig:
    """How a row becomes a prompt: the `data.*` keys of those names. Exactly one of the first three is set.

    Attributes:
        prompt_column: a text column that is the prompt.
        messages_column: a column of chat messages: a list of {role, content, ...}.
        template: a Jinja2 template over the row's columns, e.g. ``"Q: {{ question }}"``. A null that it
            inserts refuses the row; ``{{ column or "" }}`` says otherwise.
        as_chat: make the text one user message, and apply the chat template.
        system_prompt: a system message put before the others, whatever they are.
        chat_template: a chat template, or a file that holds one, instead of the model's own.
        chat_template_kwargs: variables for the chat template, ``tools`` and ``documents`` included.
        add_generation_prompt: end a chat prompt with the opening of the assistant's answer.
        continue_final_message: leave the last message open, to be gone on with.

    Raises:
        ConfigError: settings that contradict each other, or would have no effect.
    """

    prompt_column: str | None = None
    messages_column: str | None = None
    template: str | None = None
    as_chat: bool = False
    system_prompt: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    def __post_init__(self) -> None:
        sources = {name: getattr(self, name) for name in ("prompt_column", "messages_column", "template")}
        given = [name for name, value in sources.items() if value is not None]
        if len(given) != 1:
            found = f"{_join_keys(given, ' and ')} are set" if given else "none is set"
            raise ConfigError(f"a prompt comes from exactly one of {_join_keys(sources, ', ')}; {found}")
        if self.as_chat and self.messages_column is not None:
            raise ConfigError("data.as_chat makes a text one message; data.messages_column holds messages already")
        for name in ("system_prompt", "chat_template", "chat_template_kwargs", "continue_final_message"):
            if getattr(self, name) and not self.is_chat:
                raise ConfigError(f"data.{name} needs a chat: set data.messages_column, or data.as_chat=true")
        if self.continue_final_message and self.add_generation_prompt:
            raise ConfigError("data.continue_final_message=true needs data.add_generation_prompt=false")
        if reserved := sorted(_RESERVED_KWARGS & set(self.chat_template_kwargs)):
            raise ConfigError(f"data.chat_template_kwargs may not hold {reserved[0]}; it is not for the template")

    @property
    def is_chat(self) -> bool:
        """Whether a chat template is applied."""
        return self.as_chat or self.messages_column is not None

    def check_columns(self, columns: Sequence[str]) -> None:
        """Compare the settings with the dataset's columns, before anything is loaded.

        Raises:
            ConfigError: a column that is not there, or a template that is broken or names no column.
        """
        if self.template is not None:
            check_row_template(self.template, columns)
            return
        which = "prompt_column" if self.prompt_column is not None else "messages_column"
        name = getattr(self, which)
        if name not in columns:
            raise ConfigError(
                f"data.{which}: {name!r} is no column of the dataset{suggest_name(name, columns, 'columns')}"
            )

    def columns(self, columns: Sequence[str]) -> list[str]:
        """Those of the dataset's columns that a prompt is made of."""
        if self.template is not None:
            named = template_columns(self.template)
            return [name for name in columns if name in named]
        return [name for name in (self.prompt_column, self.messages_column) if name is not None]

    def load_chat_template(self) -> str | None:
        """The text of `chat_template`, read from its file if it names one (`load_chat_template` of vLLM).

        Raises:
            ConfigError: it looks like a path, but cannot be read.
        """
        if self.chat_template is None:
            return None
        try:
            return Path(self.chat_template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            if any(sign in self.chat_template for sign in "{}\n"):
                return self.chat_template
            raise ConfigError(f"data.chat_template={self.chat_template} can't be read: {error}") from None


class PromptRenderer:
    """Turns rows into prompts, and prompts into token ids.

    Args:
        settings: how a row becomes a prompt.
        tokenizer: what `load_tokenizer` returns; None where the engine renders, and only `prompt` is called.

    Raises:
        ConfigError: a template that is broken, or a chat without a chat template.
    """

    def __init__(self, settings: PromptConfig, tokenizer: Any) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._template = None if settings.template is None else compile_row_template(settings.template)
        if settings.is_chat and tokenizer is not None:
            self._tools = settings.chat_template_kwargs.get("tools")
            given = settings.load_chat_template()
            self._chat_template = _resolve_chat_template(tokenizer, given, self._tools)
            self._content_format = detect_content_format(self._chat_template)
            self._chat_kwargs = _select_template_kwargs(settings, tokenizer, self._chat_template)

    def build_prompt(self, row: Mapping[str, Any]) -> str | list[Message]:
        """The row's prompt: the text for LLM.generate, or the messages for LLM.chat.

        Raises:
            RowRefused: `wrong_type`, `template_failed`, `empty_prompt`, `unsupported_content`,
                `invalid_text`.
        """
        settings = self._settings
        if settings.messages_column is not None:
            messages = validate_messages(row.get(settings.messages_column))
        else:
            text = self._text(row)
            _reject_surrogates(text)
            if not settings.as_chat:
                return text
            messages = [{"role": "user", "content": text}]
        if settings.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": settings.system_prompt})
        return messages

    def tokenize_row(self, row: Mapping[str, Any]) -> list[int]:
        """The row's prompt as token ids, at least one.

        Raises:
            RowRefused: as `prompt`, and `chat_template_failed`, `tokenizer_failed`.
        """
        assert self._tokenizer is not None, "this Renderer was made without a tokenizer"
        prompt = self.build_prompt(row)
        if isinstance(prompt, str):
            return self._tokenize(prompt, add_special_tokens=True)
        return self._tokenize(self._chat_text(prompt), add_special_tokens=False)

    def _text(self, row: Mapping[str, Any]) -> str:
        if self._template is not None:
            try:
                return self._template.render(dict(row))
            except Exception as error:  # a template is a program: it may fail in any way
                raise RowRefused("template_failed", f"the template failed: {_describe_error(error)}") from error
        column = self._settings.prompt_column
        assert column is not None
        text = row.get(column)
        if not isinstance(text, str):
            raise RowRefused("wrong_type", f"{column} is {describe_type(text)}, not a string")
        return text

    def _chat_text(self, messages: list[Message]) -> str:
        conversation = to_conversation(messages, self._content_format)
        conversation = merge_developer_role(conversation, self._chat_template)
        try:
            text = self._tokenizer.apply_chat_template(
                conversation=conversation,
                tools=self._tools,
                chat_template=self._chat_template,
                tokenize=False,
                **self._chat_kwargs,
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise RowRefused("chat_template_failed", f"the chat template failed: {_describe_error(error)}") from error
        assert isinstance(text, str)
        _reject_surrogates(text)
        return text

    def _tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            ids = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        except Exception as error:  # foreign code, perhaps the model's own
            raise RowRefused("tokenizer_failed", f"the tokenizer failed: {_describe_error(error)}") from error
        if not ids:
            raise RowRefused("empty_prompt", "the prompt has no tokens")
        return list(ids)


def make_prompt_text_fn(settings: PromptConfig) -> Callable[[Mapping[str, Any]], str]:
    """What gives a row's prompt as one text, to compare and measure it by, before any template of the model's.

    What it gives raises as `PromptRenderer.prompt` does.
    """
    prompt_of = PromptRenderer(settings, None).build_prompt

    def text(row: Mapping[str, Any]) -> str:
        prompt = prompt_of(row)
        return prompt if isinstance(prompt, str) else "\n".join(f"{each['role']}\n{each['content']}" for each in prompt)

    return text


def _join_keys(names: Iterable[str], separator: str) -> str:
    return separator.join(f"data.{name}" for name in names)


def _resolve_chat_template(tokenizer: Any, given: str | None, tools: Any) -> str:
    """The template in force: the given one, or the tokenizer's (`resolve_chat_template` of vLLM)."""
    import jinja2

    try:
        template = str(tokenizer.get_chat_template(given, tools=tools))
    except (ValueError, AttributeError) as error:
        reason = f"the tokenizer has no chat template; set data.chat_template ({_describe_error(error)})"
        raise ConfigError(reason) from error
    try:
        template_variables(template)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"data.chat_template, line {error.lineno}: {error.message}") from error
    return template


def _select_template_kwargs(settings: PromptConfig, tokenizer: Any, template: str) -> dict[str, Any]:
    """The keywords that reach the template (`resolve_chat_template_kwargs` of vLLM drops the others)."""
    from transformers import PreTrainedTokenizerBase

    own = {
        "add_generation_prompt": settings.add_generation_prompt,
        "continue_final_message": settings.continue_final_message,
        "return_dict": False,
    }
    accepted = template_variables(template)
    accepted |= inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys()
    accepted |= inspect.signature(tokenizer.apply_chat_template).parameters.keys()
    wanted = {**settings.chat_template_kwargs, **own}
    return {key: value for key, value in wanted.items() if key in accepted and key != "tools"}


def _reject_surrogates(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        where = f"character {error.start} is half of a surrogate pair"
        raise RowRefused("invalid_text", f"{where}, which no encoding of text can hold") from None


def _describe_error(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip()
