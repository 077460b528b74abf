"""Check the `data.*` keys that decide how a row becomes a prompt, and whether they fit together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dpgen.config.tools import parse_tools
from dpgen.errors import ConfigError

# Names that chat_template_kwargs may not hold: keys of their own in `data`, and arguments that vLLM itself passes.
RESERVED_KWARGS = frozenset(
    {
        *("add_generation_prompt", "chat_template", "continue_final_message"),
        *("conversation", "messages", "return_dict", "tokenize"),
    }
)
PROMPT_SOURCES = ("prompt_column", "messages_column", "template", "token_ids_column")
REQUEST_COLUMN = "request"  # of a batch file: the line as it stands
CALL_COLUMN = "call"  # of no file: what a row's program asks of the model
# Keys without effect unless a chat template is applied.
_CHAT_KEYS = (
    *("system_prompt", "system_prompt_column", "prefill_column", "chat_template", "chat_template_kwargs"),
    *("chat_template_kwargs_column", "tools", "tools_column", "continue_final_message"),
)
_SCORE_TEMPLATE_KEYS = ("chat_template", "chat_template_kwargs")  # which may make one text of a pair, too


@dataclass(frozen=True)
class PromptConfig:
    """Hold the `data.*` keys that decide how a row becomes a prompt.

    Exactly one of the first four is set, or `request_column`, `call_column`, or `query_column` with one of documents.

    A key of a later version is None unless it is set: run directories of older versions lack it, which means the same.

    Attributes:
        prompt_column: a text column that is the prompt.
        messages_column: a column of chat messages: a list of {role, content, ...}.
        template: a Jinja2 template over the row's columns, e.g. ``"Q: {{ question }}"``. A null that it inserts
            rejects the row; ``{{ column or "" }}`` accepts nulls.
        token_ids_column: a column of lists of token ids that are the prompt.
        completion_column: a text column whose text is scored as the prompt's completion.
        as_chat: make the text one user message, and apply the chat template.
        system_prompt: a system message put before all others.
        system_prompt_column: a text column that takes its place; a null keeps it.
        prefill_column: a text column that begins the assistant's answer, which the model continues.
        chat_template: a chat template, a file that holds one, or {name: ...} of one of the tokenizer's, instead of the
            one that the tokenizer chooses.
        chat_template_kwargs: variables for the chat template, ``documents`` included.
        chat_template_kwargs_column: a column of further variables, as an object or JSON text.
        tools: functions for the chat template, in OpenAI's form once the config is made; None for none.
        tools_column: a column of tools that take their place; a null keeps them.
        add_generation_prompt: end a chat prompt with the opening of the assistant's answer.
        continue_final_message: leave the last message open, for the model to continue.
        request_column: a text column of the lines of a batch file, which say all of this; no key of its own.
        query_column, document_column: columns of the two texts of a pair, for models that read both.
        documents_column: in place of the latter, a column of lists of texts.
        images_column, audios_column, videos_column: columns of media, one or a list of them.
        call_column: stands for the calls that rows' programs make, each of which says its prompt; no key of its own.

    Raises:
        ConfigError: keys that contradict each other, or that would have no effect; all of them at once.
    """

    prompt_column: str | None = None
    messages_column: str | None = None
    template: str | None = None
    token_ids_column: str | None = None
    completion_column: str | None = None
    as_chat: bool = False
    system_prompt: str | None = None
    system_prompt_column: str | None = None
    prefill_column: str | None = None
    chat_template: Any = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    chat_template_kwargs_column: str | None = None
    tools: Any = None
    tools_column: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    request_column: str | None = None
    query_column: str | None = None
    document_column: str | None = None
    documents_column: str | None = None
    call_column: str | None = None
    images_column: Any = None
    audios_column: Any = None
    videos_column: Any = None

    def __post_init__(self) -> None:
        if mistakes := list(self._find_mistakes()):
            raise ConfigError(*mistakes)
        object.__setattr__(self, "tools", None if self.tools is None else parse_tools(self.tools) or None)

    @property
    def is_chat(self) -> bool:
        """Return True if a chat template is applied."""
        return self.as_chat or self.messages_column is not None

    @property
    def is_pair(self) -> bool:
        """Return True if a row holds a pair of texts rather than a prompt."""
        return any(name is not None for name in (self.query_column, self.document_column, self.documents_column))

    @property
    def may_be_chat(self) -> bool:
        """Return True if a chat template is applied to some rows, if not to all."""
        return self.is_chat or not self.is_of_rows

    @property
    def is_of_rows(self) -> bool:
        """Return True if rows are prompts; False where they are requests, or their programs make calls."""
        return self.request_column is None and self.call_column is None

    @property
    def media_columns(self) -> dict[str, list[str]]:
        """Return the columns of media by kind: "image", "audio", "video"."""
        given = {kind: getattr(self, f"{kind}s_column") for kind in ("image", "audio", "video")}
        return {
            kind: [] if value is None else [value] if isinstance(value, str) else list(value)
            for kind, value in given.items()
        }

    @property
    def has_media_columns(self) -> bool:
        """Return True if columns hold media."""
        return any(self.media_columns.values())

    @property
    def without_media(self) -> PromptConfig:
        """Return the same without the columns of media, for what compares and measures texts."""
        return replace(self, images_column=None, audios_column=None, videos_column=None)

    @property
    def chat_template_name(self) -> str | None:
        """Return the name of the tokenizer's chat template that `chat_template` asks for; None if it asks for none."""
        return self.chat_template["name"] if isinstance(self.chat_template, Mapping) else None

    @property
    def has_tools(self) -> bool:
        """Return True if a row's chat template may be given tools by `tools` or `tools_column`."""
        return self.tools is not None or self.tools_column is not None

    def _find_mistakes(self) -> Iterator[str]:
        given = [name for name in PROMPT_SOURCES if getattr(self, name) is not None]
        if self.is_pair:
            yield from self._find_wrong_pair(given)
        elif self.is_of_rows and len(given) != 1:
            source = f"a prompt comes from exactly one of {_join_keys(PROMPT_SOURCES, ', ')}"
            yield f"{_join_keys(given, ' and ')} are set: {source}" if given else f"{source}; none is set"
        if self.as_chat and self.messages_column is not None:
            yield "data.as_chat=true makes a text one message, but data.messages_column holds messages already"
        if self.as_chat and self.token_ids_column is not None:
            yield "data.as_chat=true makes a text one message, but data.token_ids_column holds tokens already"
        for name in _CHAT_KEYS:
            if getattr(self, name) and not (self.may_be_chat or (self.is_pair and name in _SCORE_TEMPLATE_KEYS)):
                yield f"data.{name} needs a chat: set data.messages_column, or data.as_chat=true"
        if self.continue_final_message and self.add_generation_prompt:
            yield "data.continue_final_message=true needs data.add_generation_prompt=false"
        if self.continue_final_message and self.prefill_column is not None:
            yield "data.continue_final_message=true leaves the last message open, and data.prefill_column adds another"
        if not _is_chat_template(self.chat_template):
            yield f"data.chat_template={self.chat_template!r}: must be a text, a path, or {{name: NAME}}"
        for name in sorted(RESERVED_KWARGS & set(self.chat_template_kwargs)):
            yield f"data.chat_template_kwargs may not hold {name}: it is not for the template"
        yield from self._find_wrong_tools()

    def _find_wrong_pair(self, given: list[str]) -> Iterator[str]:
        pair = "data.query_column and data.document_column"
        if self.query_column is None or (self.document_column is None) == (self.documents_column is None):
            yield f"{pair} (or data.documents_column) make a pair: set the query's and one of the others"
        if given or self.as_chat or self.completion_column is not None:
            others = [*given, *(["as_chat"] if self.as_chat else [])]
            others += ["completion_column"] if self.completion_column is not None else []
            yield f"{pair} are the row's texts, and {_join_keys(others, ' and ')} is set, too: leave one of them out"

    def _find_wrong_tools(self) -> Iterator[str]:
        if "tools" in self.chat_template_kwargs and self.has_tools:
            key = "tools" if self.tools is not None else "tools_column"
            yield f"data.chat_template_kwargs.tools and data.{key} are set: give the tools in one place"
        if self.tools is not None:
            try:
                parse_tools(self.tools)
            except ValueError as error:
                yield f"data.tools: {error}"


def _is_chat_template(value: Any) -> bool:
    if isinstance(value, Mapping):
        return set(value) == {"name"} and isinstance(value["name"], str) and bool(value["name"])
    return value is None or (isinstance(value, str) and bool(value))


def _join_keys(names: Iterable[str], separator: str) -> str:
    return separator.join(f"data.{name}" for name in names)
