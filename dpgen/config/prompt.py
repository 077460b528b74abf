"""Check the `data.*` keys that decide how a row becomes a prompt, and whether they fit together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dpgen.errors import ConfigError

# Names that chat_template_kwargs may not hold: keys of their own in `data`, and arguments that vLLM itself passes.
_RESERVED_KWARGS = {
    *("add_generation_prompt", "chat_template", "continue_final_message"),
    *("conversation", "messages", "return_dict", "tokenize"),
}


@dataclass(frozen=True)
class PromptConfig:
    """Hold the `data.*` keys that decide how a row becomes a prompt. Exactly one of the first three is set.

    Attributes:
        prompt_column: a text column that is the prompt.
        messages_column: a column of chat messages: a list of {role, content, ...}.
        template: a Jinja2 template over the row's columns, e.g. ``"Q: {{ question }}"``. A null that it inserts
            rejects the row; ``{{ column or "" }}`` accepts nulls.
        as_chat: make the text one user message, and apply the chat template.
        system_prompt: a system message put before all others.
        chat_template: a chat template, or a file that holds one, instead of the model's own.
        chat_template_kwargs: variables for the chat template, ``tools`` and ``documents`` included.
        add_generation_prompt: end a chat prompt with the opening of the assistant's answer.
        continue_final_message: leave the last message open, for the model to continue.

    Raises:
        ConfigError: keys that contradict each other, or that would have no effect; all of them at once.
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
        if mistakes := list(self._find_mistakes()):
            raise ConfigError(*mistakes)

    @property
    def is_chat(self) -> bool:
        """Return True if a chat template is applied."""
        return self.as_chat or self.messages_column is not None

    def _find_mistakes(self) -> Iterator[str]:
        sources = {name: getattr(self, name) for name in ("prompt_column", "messages_column", "template")}
        given = [name for name, value in sources.items() if value is not None]
        if len(given) != 1:
            source = f"a prompt comes from exactly one of {_join_keys(sources, ', ')}"
            yield f"{_join_keys(given, ' and ')} are set: {source}" if given else f"{source}; none is set"
        if self.as_chat and self.messages_column is not None:
            yield "data.as_chat=true makes a text one message, but data.messages_column holds messages already"
        for name in ("system_prompt", "chat_template", "chat_template_kwargs", "continue_final_message"):
            if getattr(self, name) and not self.is_chat:
                yield f"data.{name} needs a chat: set data.messages_column, or data.as_chat=true"
        if self.continue_final_message and self.add_generation_prompt:
            yield "data.continue_final_message=true needs data.add_generation_prompt=false"
        for name in sorted(_RESERVED_KWARGS & set(self.chat_template_kwargs)):
            yield f"data.chat_template_kwargs may not hold {name}: it is not for the template"


def _join_keys(names: Iterable[str], separator: str) -> str:
    return separator.join(f"data.{name}" for name in names)
