"""Find the chat template of a prompt, and check that it can use what it is given.

- A tokenizer may have several templates by name. Without a name it chooses: `tool_use` for prompts with tools, else
  `default` (`get_chat_template` of transformers). So two rows may have two templates.
- Follows vLLM 0.32: `resolve_chat_template` in `vllm/renderers/hf.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dpgen.config.prompt import PromptConfig
from dpgen.data.prompts.chat import ContentFormat
from dpgen.data.prompts.content_format import detect_content_format, template_variables
from dpgen.data.prompts.template_kwargs import check_template_kwargs, describe_unknown_name, find_accepted_names
from dpgen.errors import ConfigError, RowRefused, suggest_name


def load_chat_template(config: PromptConfig) -> str | None:
    """Return the text of `data.chat_template`, read from its file if it names one (`load_chat_template` of vLLM).

    None where it is not set, or asks for one of the tokenizer's by its name.

    Raises:
        ConfigError: it looks like a path, but can't be read.
    """
    if config.chat_template is None or config.chat_template_name is not None:
        return None
    try:
        return Path(config.chat_template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if any(sign in config.chat_template for sign in "{}\n"):
            return str(config.chat_template)
        raise ConfigError(
            f"data.chat_template={config.chat_template} can't be read: {error}; one of the tokenizer's by its name is "
            f"{{name: {config.chat_template}}}"
        ) from None


def find_own_template(config: PromptConfig, tokenizer: Any) -> str | None:
    """Return the text of `data.chat_template`; None where it is not set, and the tokenizer chooses.

    Raises:
        ConfigError: its file can't be read, or the tokenizer has no template of its name.
    """
    name = config.chat_template_name
    if name is None:
        return load_chat_template(config)
    templates = getattr(tokenizer, "chat_template", None)
    if isinstance(templates, str):
        templates = {"default": templates}
    if not isinstance(templates, Mapping) or not templates:
        raise ConfigError(f"data.chat_template.name={name}: the tokenizer has no chat template")
    if name not in templates:
        hint = suggest_name(name, sorted(templates), "chat templates")
        raise ConfigError(f"data.chat_template.name={name}: the tokenizer has no chat template of this name{hint}")
    return str(templates[name])


@dataclass(frozen=True)
class ChatTemplate:
    """Hold a chat template.

    Attributes:
        text: the template.
        accepted_names: keywords that reach it.
    """

    text: str
    accepted_names: frozenset[str]

    @cached_property
    def content_format(self) -> ContentFormat:
        """Return the format that it expects of messages' contents."""
        return detect_content_format(self.text)


class ChatTemplates:
    """Find the chat template of each prompt: one for prompts with tools, and one for the others.

    Args:
        config: how a row becomes a prompt.
        tokenizer: of transformers.

    Raises:
        ConfigError: there is no chat template, it is broken, or it can't use something that the configuration gives it.
    """

    def __init__(self, config: PromptConfig, tokenizer: Any) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._own = find_own_template(config, tokenizer)
        self._found: dict[bool, ChatTemplate] = {}
        tools = config.chat_template_kwargs.get("tools")
        main = self._find(config.has_tools or tools is not None)
        check_template_kwargs(config.chat_template_kwargs, tokenizer, main.text)
        if config.has_tools and "tools" not in template_variables(main.text):
            key = "tools" if config.tools is not None else "tools_column"
            raise ConfigError(f"data.{key}: the chat template does not use 'tools', so the model would not see any")

    def select(self, template_kwargs: Mapping[str, Any]) -> ChatTemplate:
        """Return the chat template of a prompt.

        Args:
            template_kwargs: the prompt's variables, tools included.

        Raises:
            RowRefused: `chat_template_failed`, `bad_template_kwargs`: a variable of the row that no template uses.
        """
        try:
            template = self._find(template_kwargs.get("tools") is not None)
        except ConfigError as error:  # a tokenizer whose only templates are for prompts of the other kind
            raise RowRefused("chat_template_failed", str(error)) from error
        if self._config.request_column is not None:
            return template  # vLLM's server leaves out what the template does not use
        own_names = template_kwargs.keys() - self._config.chat_template_kwargs.keys()
        for name in sorted(own_names - template.accepted_names):
            unknown = describe_unknown_name(name, self._tokenizer, template.text)
            source = self._config.chat_template_kwargs_column or "template_kwargs"
            raise RowRefused("bad_template_kwargs", f"{source}: {unknown}")
        return template

    def _find(self, has_tools: bool) -> ChatTemplate:
        if has_tools not in self._found:
            text = _resolve_chat_template(self._tokenizer, self._own, has_tools)
            self._found[has_tools] = ChatTemplate(text, frozenset(find_accepted_names(self._tokenizer, text)))
        return self._found[has_tools]


def _resolve_chat_template(tokenizer: Any, own_template: str | None, has_tools: bool) -> str:
    """Return `data.chat_template` or else the tokenizer's (`resolve_chat_template` of vLLM)."""
    try:
        template = str(tokenizer.get_chat_template(own_template, tools=[] if has_tools else None))
    except (ValueError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).strip()
        raise ConfigError(f"the tokenizer has no chat template; set data.chat_template ({reason})") from error
    _check_syntax(template)
    return template


def _check_syntax(template: str) -> None:
    import jinja2

    try:
        template_variables(template)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"data.chat_template, line {error.lineno}: {error.message}") from error


def check_chat_without_tokenizer(config: PromptConfig, model: str) -> str | None:
    """Check `data.chat_template` and its variables where no tokenizer is loaded; return a note if they can't be.

    Args:
        model: the model's folder, whose own chat template counts if there is no other; or any name.

    Raises:
        ConfigError: as `ChatTemplates`.
    """
    template = load_chat_template(config) or _read_chat_template(Path(model).expanduser())
    if template is not None:
        _check_syntax(template)
        if config.chat_template_kwargs:
            check_template_kwargs(config.chat_template_kwargs, None, template)
        return None
    return "data.chat_template_kwargs is not checked without a chat template" if config.chat_template_kwargs else None


def _read_chat_template(folder: Path) -> str | None:
    """Return the chat template in a model's folder; None if there is none, or several."""
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        pass
    try:
        template = json.loads((folder / "tokenizer_config.json").read_bytes())["chat_template"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return template if isinstance(template, str) else None
