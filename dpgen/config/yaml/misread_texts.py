r"""Find texts that likely mean something else than is read: ``\n``, ``enable_thinking: no``, ``stop: None``.

Each is refused, with how to write it: what is guessed would be wrong in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dpgen.config.options import find_type, is_text
from dpgen.config.yaml import yaml_slips

if TYPE_CHECKING:
    from dpgen.config.yaml.yaml_source import KeyPath, YamlSource

# Texts in which a backslash and an n are likely meant as a line break.
_TEXTS_WITH_LINES = re.compile(
    r"data\.(template|system_prompt|chat_template)|sampling(_by_rank\.\d+)?\.(stop|bad_words)\b"
)
# Keys of no fixed type, and words that YAML 1.1 took for true and false: as texts, all of them count as true.
_UNTYPED = re.compile(r"(data\.chat_template_kwargs|engine)\.")
_PASSED_THROUGH = re.compile(r"(data\.chat_template_kwargs|engine|sampling(_by_rank\.\d+)?)\.")
_FREE_TEXTS = re.compile(rf"{_TEXTS_WITH_LINES.pattern}|model$|run\.dir$|data\.(path|columns)\b|data\.\w+_column$")
_YAML_1_1_BOOLEANS = re.compile(r"yes|no|on|off", re.IGNORECASE)
_GROUPED_DIGITS = r"[-+]?\d+(_\d+)+"
_IN_QUOTES = re.compile(r"""("|')((?!\1).)+\1|[“”„‟][^“”„‟]+[“”„‟]|[‘’‚‛][^‘’‚‛]+[‘’‚‛]""", re.DOTALL)


def find_misread_texts(source: YamlSource) -> Iterator[str]:
    """Yield one line for each text of a source that likely means something else than is read."""
    for path, text in iter_texts(source.value):
        key = ".".join(path)
        if _TEXTS_WITH_LINES.match(key) and not source.reads_escapes(path) and yaml_slips.has_unread_escape(text):
            problem = yaml_slips.explain_unread_escape(key, text, is_yaml=path in source.nodes, is_file=source.is_file)
            yield source.describe_value(path, problem)
        if path not in source.nodes:
            yield from (source.describe(path, problem) for problem in _find_unquoted(key, text))
            continue
        comment = source.find_comment(path)
        if comment and _FREE_TEXTS.match(key) and (re.match(r"#[^#\s]", comment) or "{{" in comment):
            remedy = f"for the text write {path[-1]}: {yaml_slips.quote(f'{text} {comment}')}"
            problem = f"what follows # is a comment; {remedy}, for a comment a blank after #"
            yield source.describe_value(path, problem)
        if any(part.isdigit() for part in path[2:]) or not source.find_plain_text(path):
            continue
        if slip := _explain_word(key, text):
            yield source.describe_value(path, slip)


def iter_texts(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Yield each text in nested mappings and lists, with its path of keys and indices."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, (Mapping, list)):
        for name, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from iter_texts(item, (*path, str(name)))


def needs_quotes(text: str) -> bool:
    """Return True if a text without quotes would be refused under some key."""
    if _YAML_1_1_BOOLEANS.fullmatch(text) or text == "None" or re.fullmatch(_GROUPED_DIGITS, text):
        return True
    return yaml_slips.explain_plain_text(text) is not None


def _explain_word(key: str, text: str) -> str | None:
    """Return what is wrong with a word without quotes that is no text in another language; None if nothing is."""
    meant = None
    if text == "None" and (is_text(key) or _PASSED_THROUGH.match(key)):
        meant = "null"
    elif _UNTYPED.match(key) and _YAML_1_1_BOOLEANS.fullmatch(text):
        meant = "true" if text.lower() in ("yes", "on") else "false"
    elif _PASSED_THROUGH.match(key) and re.fullmatch(_GROUPED_DIGITS, text):
        meant = text.replace("_", "")
    if meant is None:
        return None
    return f"{text} is a text here, not {meant}; write {meant}, or for the text '{text}', with quotes"


def _find_unquoted(key: str, text: str) -> Iterator[str]:
    """Yield what is wrong with a text of the command line that is taken as it stands."""
    otherwise = "if they are meant, put the text in a YAML file"
    if text == "None":
        remedy = f"write {key}=null" if "None" in find_type(key) else "give a value"
        yield f"None is a text here, not null; {remedy}, or for the text use a YAML file"
    elif len(text) > 1 and _IN_QUOTES.fullmatch(text):
        yield f"the quotes are a part of the text here; write the text without them ({otherwise})"
    elif text.startswith("=") and not _TEXTS_WITH_LINES.match(key):
        yield f"two equals signs; write {key}={text.lstrip('=')}"
