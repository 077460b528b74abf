r"""Say what is wrong in YAML that can't be read, or that reads as something else than it looks like.

PyYAML's own words ("could not find expected ':'") name neither the slip nor the remedy. Most slips are one of a few: a
text that needs quotes, a tab, a missing blank after a colon, an indentation that fits no line, a quote that is not
closed. Each is recognised by the line that it stands in.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable

import yaml

from dpgen.config.yaml.layers import make_literal

_LINE_BREAKS = re.compile("\r\n|[\r\n\x85\u2028\u2029]")  # as PyYAML counts lines
_ENTRY = re.compile(r"^\s*(?P<dashes>(?:- +)*)(?:(?P<key>[\w.-]+) *: +)?(?P<value>.*?)\s*$")
_QUOTED = re.compile(r"""'(?:[^']|'')*'|"(?:[^"\\]|\\.)*\"""")
_PLAIN_NAME = re.compile(r"(?!(?i:null)$)[^\W\d][\w.-]*")  # read as it is written in a list
_MAX_EXCERPT = 100  # characters of a line

# What a backslash and a letter stand for where no escapes are read. `\nabla` and `\text` are LaTeX.
_ESCAPE = re.compile(
    r"\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\[rt](?![a-z])|\\n(?!(?:abla|eq|e|u|ot|otin|ewline|ewcommand|oindent|mid|olimits)(?![a-z]))"
)

# Characters that look like a blank: no-break, of a fixed width, of no width, ideographic.
_ODD_BLANKS = "\u00a0\u1680\u2000-\u200c\u202f\u205f\u2060\u3000\ufeff"
_CURLY_QUOTES = "\u201c-\u201f\u2018-\u201b"

# Words of PyYAML's messages, and what they mean to a user.
_MEANINGS = (
    ("while scanning a quoted scalar", "the quote that opens here is never closed"),
    ("expected <block end>", "the indentation fits no line above, or a text needs quotes"),
    ("could not find expected ':'", "this line is not `key: value`; a key needs a colon and a blank, a text quotes"),
    ("mapping values are not allowed", "a key can't stand here; check the indentation, or put a text in quotes"),
    ("expected ',' or ']'", "the [ is not closed, a comma is missing, or a text needs quotes"),
    ("expected ',' or '}'", "the { is not closed, a comma is missing, or a text needs quotes"),
    ("expected the node content", "a value is missing"),
    ("expected '<document start>'", "what stands before is complete, or the indentation fits no line above"),
    ("sequence entries are not allowed", "a list can't begin here; put a text that begins with - in quotes"),
    (
        "expected alphabetic or numeric",
        "*, & and % at the start of a text have a meaning of their own; put it in quotes",
    ),
    ("could not determine a constructor", "! at the start of a text names a type; put it in quotes"),
    ("found undefined alias", "* at the start of a text has a meaning of its own; put it in quotes"),
    ("cannot start any token", "a text can't begin with this character; put it in quotes"),
    ("expected a single document", "a second document begins here; a configuration is one"),
    ("unknown escape character", "in double quotes a backslash begins an escape: write \\\\, or use single quotes"),
)


def split_lines(text: str) -> list[str]:
    """Return the lines of a text, as PyYAML counts them."""
    return _LINE_BREAKS.split(text)


def show_place(text: str, line: int, column: int) -> str:
    """Return two lines: the line of a text, and a caret below the column; both counted from 0.

    A tab is shown as an arrow.
    """
    lines = split_lines(text)
    shown = (lines[line] if line < len(lines) else "").replace("\t", "→")
    shown = "".join(char if char.isprintable() else "?" for char in shown)
    start = max(0, column - _MAX_EXCERPT // 2) if len(shown) > _MAX_EXCERPT else 0
    return f"    {shown[start : start + _MAX_EXCERPT].rstrip()}\n    {' ' * (column - start)}^"


def split_entry(line: str) -> tuple[str, str]:
    """Return the key and the value of a line ``key: value``; "" for a key that is not there."""
    entry = _ENTRY.match(line)
    return (entry["key"] or "", entry["value"]) if entry else ("", "")


def quote(text: str) -> str:
    """Return how to write a text in YAML, so that it is read as it stands."""
    if re.search(r"[\n\t\r]", text):
        return json.dumps(text, ensure_ascii=False)
    return "'" + text.replace("'", "''") + "'"


def write_names(key: str, names: Iterable[str]) -> str:
    """Return ``key=[a,b]`` to be pasted into a shell, with those names in quotes that YAML may read otherwise."""
    texts = [name if _PLAIN_NAME.fullmatch(name) else _write_literal(name) for name in names]
    argument = f"{key}=[{','.join(texts)}]"
    return shlex.quote(argument) if any(text.startswith('"') for text in texts) else argument


def _write_literal(text: str) -> str:
    return json.dumps(make_literal(text), ensure_ascii=not text.isprintable())


def has_unread_escape(text: str) -> bool:
    r"""Return True if a text that reads no escapes holds ``\n``, ``\r`` or ``\t`` outside of Jinja's braces."""
    if not _ESCAPE.search(text):
        return False
    if not re.search(r"\{[{%#]", text):
        return True
    import jinja2

    try:
        tokens = list(jinja2.Environment().lex(text))
    except jinja2.TemplateSyntaxError:
        return False  # the template is refused for this later
    return any(kind == "data" and _ESCAPE.search(part) for _, kind, part in tokens)


def explain_plain_text(text: str) -> str | None:
    """Return what is wrong with a text or key without quotes that reads otherwise than it looks; None if nothing is."""
    if odd := re.search(rf"^[{_ODD_BLANKS}]|(?<=:)[{_ODD_BLANKS}]|[{_ODD_BLANKS}]$", text):
        return f"U+{ord(odd[0]):04X} looks like a blank and is none here: write a blank, or put the text in quotes"
    if "\uff1a" in text and re.match(r"\w+\uff1a", text):
        return "U+FF1A looks like a colon and is none here: write a colon and a blank, or put the text in quotes"
    if re.match(rf"[{_CURLY_QUOTES}]", text) and not re.search(rf"[{_CURLY_QUOTES}][^{_CURLY_QUOTES}]+$", text[1:]):
        return f"{text[0]} is no quote in YAML: write ' or \", or put the text in quotes, with {text[0]}"
    quote_mark = text[-1:]
    if quote_mark in ("'", '"') and text.count(quote_mark) % 2 == 1 and len(text) > 1:
        return f"a quote is lost: the text ends in {quote_mark} and does not begin with it; for it write {quote(text)}"
    return None


def explain_unread_escape(key: str, text: str, *, is_yaml: bool, is_file: bool) -> str:
    r"""Return what is wrong with a text for which `has_unread_escape` is true, and how to write it."""
    escape = _ESCAPE.findall(text)[0]
    meaning = "a line break or a tab" if len(escape) == 2 else "the character"
    remedy = "put it in double quotes"
    if not is_file:
        meant = _decode_escapes(text)
        if is_yaml and re.search(r"\.\d", key):  # an item of a list
            remedy = f"write the item as {json.dumps(meant, ensure_ascii=False)}, in double quotes"
        elif is_yaml:
            remedy = f"write {shlex.quote(f'{key}={json.dumps(meant, ensure_ascii=False)}')}"
        else:
            remedy = "write, in bash, $'" + f"{key}={text}".replace("'", "\\'") + "'"
    what = "a letter" if len(escape) == 2 else "letters"
    return (
        f"{escape} is a backslash and {what} here; for {meaning} {remedy}; if the backslash is meant, put the text "
        "below | in a YAML file"
    )


def _decode_escapes(text: str) -> str:
    letters = {"n": "\n", "r": "\r", "t": "\t"}
    pattern = r"\\+(?:([nrt])|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4}))"
    return re.sub(pattern, lambda match: letters.get(match[1]) or chr(int(match[2] or match[3], 16)), text)


def explain_syntax_error(error: yaml.YAMLError, text: str) -> tuple[int, int, str]:
    """Return the line and column, counted from 0, and the words for a text that PyYAML can't read."""
    if isinstance(error, yaml.reader.ReaderError):
        before = split_lines(text[: error.position])
        return len(before) - 1, len(before[-1]), explain_in_general(error)
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return 0, 0, str(error)
    mark, context, problem = error.problem_mark, error.context_mark, error.problem or ""
    words = f"{error.context or ''}: {problem}"
    lines = split_lines(text)
    if "found character '\\t'" in problem:
        return mark.line, mark.column, "a tab can't stand here; indent with blanks"
    if context is not None and (words.startswith("while scanning a quoted") or "could not find expected" in problem):
        if "escape" not in words:
            mark = context
    elif mark.line >= len(lines) or not lines[mark.line].strip():  # the end of the file
        mark = context or mark
    at_mark = lines[mark.line][mark.column : mark.column + 1] if mark.line < len(lines) else ""
    if at_mark in ("]", "}") and "expected <block end>" in problem:
        return mark.line, mark.column, f"this {at_mark} closes nothing; put a text that holds it in quotes"
    slip = _find_slip(lines, mark.line, mark.column)
    meaning = explain_in_general(error)
    if context is not None and context.line != mark.line and meaning.startswith(("the [", "the {")):
        meaning = f"{meaning[:5]} of line {context.line + 1}{meaning[5:]}"
    return mark.line, mark.column, slip or meaning


def explain_in_general(error: yaml.YAMLError) -> str:
    """Return the words for what PyYAML can't read, whatever the line is in which it stands."""
    if isinstance(error, yaml.reader.ReaderError):
        return f"the character U+{error.character:04X} can't stand in YAML"
    if not isinstance(error, yaml.MarkedYAMLError):
        return str(error)
    words = f"{error.context or ''}: {error.problem or ''}"
    return next((text for sign, text in _MEANINGS if sign in words), error.problem or words)


def explain_value(line: str, column: int) -> str | None:
    """Return what is wrong with the value of a line ``key: value``, or None if it looks sound.

    Args:
        column: where PyYAML stopped; a value to the right of it is not the cause.
    """
    entry = _ENTRY.match(line)
    assert entry is not None
    key, value = entry["key"], entry["value"]
    if column < entry.start("value") or not (key or entry["dashes"]):
        return None
    if value[:1] not in ("'", '"'):
        value = re.split(r"\s#", value)[0].rstrip()
    if re.fullmatch(r"[|>][-+0-9]*", value):
        return None
    remedy = f"put the text in quotes: {f'{key}: ' if key else ''}{quote(value)}"
    if value.startswith(("{{", "{%", "{#")):
        return f"{value[:2]} begins a YAML mapping; {remedy}"
    if value[:1] in ("*", "&", "!", "%", "@", "`", "|", ">", "?") or (key and f"{value} ".startswith("- ")):
        return f"a value that begins with {value[0]} is no plain text in YAML; {remedy}"
    if value[:1] in ("'", '"'):
        quoted = _QUOTED.match(value)
        if quoted is None:
            return f"the quote {value[0]} is not closed in this line"
        rest = value[quoted.end() :].strip()
        if rest and key and rest[0] not in "#:":
            return f"text follows the closing quote; inside of {value[0]} write {_ESCAPED_QUOTES[value[0]]}"
        return None
    if value[:1] not in ("[", "{") and key and re.search(r":(\s|$)", value):
        return f"a colon in a text begins a key; {remedy}"
    return None


_ESCAPED_QUOTES = {"'": "'' for a quote", '"': '\\" for a quote'}


def _find_slip(lines: list[str], number: int, column: int) -> str | None:
    """Return what is wrong in a line at which PyYAML stopped, or in the one before; None if that is not known."""
    line = lines[number] if number < len(lines) else ""
    if re.match(r" *\t", line):
        return "a tab can't stand here; indent with blanks"
    if slip := explain_value(line, column):
        return slip
    before = next((text for text in reversed(lines[:number]) if text.strip() and not text.lstrip().startswith("#")), "")
    for candidate, place in ((line, ""), (before, "the line before: ")):
        if match := re.match(r"\s*(?:- +)*([A-Za-z_][\w.]*):([^\s:/].*)$", candidate):
            return f"{place}a blank is missing after the colon: {match[1]}: {match[2].strip()}"
    if _indentation(line) > _indentation(before) and re.match(r"\s*[\w.]+: +[^\s#|>]", before):
        return "this line is indented deeper than the line before, which has a value already"
    return None


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip())
