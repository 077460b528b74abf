"""Know which names of `data.chat_template_kwargs`, and of its column, a chat template can use; others are refused.

- The template's own variables count, and the parameters of `apply_chat_template` (`resolve_chat_template_kwargs` of
  vLLM, which drops all others without a word).
- A hint names only the template's own variables, without what transformers passes itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from dpgen.data.prompts.content_format import template_variables
from dpgen.errors import ConfigError, suggest_name

# What transformers gives every chat template: `transformers.utils.chat_template_utils`.
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now", "tojson"}

# The names of special tokens that each tokenizer may have; it gives them to its template.
_SPECIAL_TOKENS = {f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}


def find_accepted_names(tokenizer: Any, template: str) -> set[str]:
    """Return the keywords that reach a chat template, or `apply_chat_template` itself."""
    from transformers import PreTrainedTokenizerBase

    names = template_variables(template)
    for function in (PreTrainedTokenizerBase.apply_chat_template, getattr(tokenizer, "apply_chat_template", None)):
        if function is not None:
            names |= inspect.signature(function).parameters.keys()
    return names - {"self", "kwargs"}


def check_template_kwargs(kwargs: Mapping[str, Any], tokenizer: Any, template: str) -> None:
    """Check that the template can use each name of `data.chat_template_kwargs`.

    Raises:
        ConfigError: names that neither it nor transformers knows; all of them at once.
    """
    unknown = sorted(kwargs.keys() - find_accepted_names(tokenizer, template))
    if unknown:
        raise ConfigError(
            *(f"data.chat_template_kwargs: {describe_unknown_name(name, tokenizer, template)}" for name in unknown)
        )


def describe_unknown_name(name: str, tokenizer: Any, template: str) -> str:
    """Return a sentence about a name that the template can't use, with those that it can."""
    names = sorted(_find_own_variables(tokenizer, template))
    hint = suggest_name(name, names, "its variables") if names else ", nor any other variable"
    return f"the chat template does not use {name!r}{hint}"


def _find_own_variables(tokenizer: Any, template: str) -> set[str]:
    from jinja2.defaults import DEFAULT_NAMESPACE

    special_tokens = {*_SPECIAL_TOKENS, *getattr(tokenizer, "special_tokens_map", {})}
    return template_variables(template) - _GIVEN - set(DEFAULT_NAMESPACE) - special_tokens
