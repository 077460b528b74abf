"""Read one source of the configuration: a YAML file, or the value of a key on the command line.

- A source knows where each key stands, so that a mistake can name its line.
- What YAML reads as something else than it looks like is refused, with how to write it: a repeated key, a comment or a
  blank that cuts a text off, a name in braces without a value, a key without a value.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from typing import Any

import yaml

from dpgen.config.options import find_type
from dpgen.config.secrets import REMOVED, has_secret, redact_secrets
from dpgen.config.yaml import yaml12, yaml_slips
from dpgen.errors import ConfigError
from dpgen.formatting import suggest_conversion

KeyPath = tuple[str, ...]

_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}
_NO_VALUE = "leave the key out, or write null where none is meant"
_MAX_SHOWN = 300  # characters of an argument
_MAX_NODES = 100_000  # a few aliases of aliases can stand for billions
_KEY = re.compile(r"[a-z_]+(\.\w+)+")


@dataclass(frozen=True)
class YamlSource:
    """Hold what one source says, and where.

    Attributes:
        name: the file's path, or the argument of the command line.
        text: the source's text.
        is_file: False for an argument.
        value: the value as Python reads it; an argument's is that of its key.
        nodes: the node of each value, by its path of keys and list indices from the configuration's root; empty for an
            argument that is taken as it stands.
        marks: where each key stands, or an item of a list.
    """

    name: str
    text: str
    is_file: bool
    value: Any
    nodes: dict[KeyPath, yaml.Node] = field(default_factory=dict)
    marks: dict[KeyPath, yaml.Mark] = field(default_factory=dict)

    def describe(self, path: KeyPath, problem: str) -> str:
        """Return a mistake with the place of its key, in one line."""
        place = self.find_place(path)
        return f"{self.name if place is None else place}: {problem}"

    def describe_value(self, path: KeyPath, problem: str) -> str:
        """Return a mistake with the place of the value, and for a file the line with a caret below."""
        node = self.nodes.get(path)
        if node is None or not self.is_file:
            return f"{self.name}: {problem}"
        return _at(self.name, self.text, node.start_mark.line, node.start_mark.column, problem)

    def find_place(self, path: KeyPath) -> str | None:
        """Return the file and line of a key, or None for an argument."""
        mark = self.marks.get(path)
        return f"{self.name}:{mark.line + 1}" if mark is not None and self.is_file else None

    def is_empty(self, path: KeyPath) -> bool:
        """Return True if nothing is written where a value belongs."""
        node = self.nodes.get(path)
        return isinstance(node, yaml.ScalarNode) and node.style is None and not node.value

    def find_plain_text(self, path: KeyPath) -> str | None:
        """Return a value as it is written, if it is a scalar without quotes and not null."""
        node = self.nodes.get(path)
        if not isinstance(node, yaml.ScalarNode) or node.style is not None or node.tag.endswith(":null"):
            return None
        return str(node.value)

    def find_comment(self, path: KeyPath) -> str | None:
        """Return the comment that follows a value without quotes in its line of a file; None if there is none."""
        if not self.is_file or self.find_plain_text(path) is None:
            return None
        rest = yaml_slips.split_lines(self.text[self.nodes[path].end_mark.index :])[0]
        comment = re.match(r"\s+(#.*)", rest)
        return comment[1].rstrip() if comment else None

    def reads_escapes(self, path: KeyPath) -> bool:
        r"""Return True if ``\n`` is a line break there, or a text of several lines shows that none is missing."""
        node = self.nodes.get(path)
        return isinstance(node, yaml.ScalarNode) and node.style in ('"', "|", ">")


def read_file(path: str) -> YamlSource:
    """Return what a YAML file says.

    Raises:
        ConfigError: it isn't there, can't be read, is not YAML, or holds slips; all slips at once.
    """
    text = _read_text(path)
    try:
        loader = _MarkedLoader(text)
        root = loader.get_single_node()
        checker = _NodeChecker(loader, path, text, is_file=True)
        value = {} if root is None else checker.construct(root, ())
    except yaml.YAMLError as error:
        raise ConfigError(_at(path, text, *yaml_slips.explain_syntax_error(error, text))) from None
    except RecursionError:
        raise ConfigError(f"{path}: its lists and mappings are nested too deeply") from None
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold sections (run, data, model, ...), not a list or a value")
    return YamlSource(path, text, True, value, checker.nodes, checker.marks)


def read_argument(argument: str, path: KeyPath, text: str, *, may_be_text: bool) -> YamlSource:
    """Return what an argument of the command line says, whose value is YAML.

    Args:
        argument: as it was given: key=value.
        path: the parts of its key.
        text: its value.
        may_be_text: the key takes texts; False for numbers, flags and names of choices.

    Raises:
        ConfigError: the value is no YAML, or YAML reads something else than stands there.
    """
    try:
        return _read_argument(argument, path, text, may_be_text)
    except ConfigError:
        if not has_secret(text, path[-1]):
            raise
        problem = "YAML reads it as something else than a text; put it in quotes"
        raise ConfigError(f"{_show_argument(argument)}: {problem}") from None


def _read_argument(argument: str, path: KeyPath, text: str, may_be_text: bool) -> YamlSource:
    name, key = _show_argument(argument), ".".join(path)
    if not text.strip(" "):
        raise ConfigError(f"{name}: {key} has no value; {_NO_VALUE}")
    remedy = ""
    if text[0] in "[{":
        remedy = "; put each text in it in quotes"
    elif may_be_text:
        remedy = f"; {_write_text(key, text)}"
    if re.match(r"\w+: ", text):
        remedy = f"; for a mapping write {shlex.quote(f'{key}={{{text}}}')}" + (f", {remedy[2:]}" if remedy else "")
    if may_be_text and text.startswith(("{{", "{%")):
        raise ConfigError(f"{name}: {text[:2]} begins a YAML mapping; {_write_text(key, text)}")
    try:
        loader = _MarkedLoader(text)
        root = loader.get_single_node()
        if root is None or not _reads_all(root, text):
            value = None if root is None else loader.construct_document(root)
            raise ConfigError(f"{name}: {_describe_unread(text, value)}{remedy}")
        checker = _NodeChecker(loader, name, text, is_file=False)
        value = checker.construct(root, path)
    except yaml.YAMLError as error:
        problem = yaml_slips.explain_in_general(error)
        if text[0] in "'\"" and "what stands before" in problem:
            problem = "text follows the closing quote"
        if "in quotes" in problem and text[0] in "[{":
            remedy = ""
        raise ConfigError(f"{name}: the value is not valid YAML: {problem}{remedy}") from None
    except (RecursionError, ValueError):
        raise ConfigError(f"{name}: the value can't be read: too deep a list, or too long a number") from None
    return YamlSource(name, text, False, _nest(path, value), checker.nodes)


def take_as_it_stands(argument: str, path: KeyPath, text: str) -> YamlSource:
    """Return what an argument of the command line says, whose value is a text and not YAML."""
    return YamlSource(_show_argument(argument), text, False, _nest(path, text))


class _MarkedLoader(yaml12.Loader):
    """Remember the anchors, so that one that nothing refers to is seen: ``stop: &nbsp; x``."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.unused_anchors: dict[str, yaml.Mark] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        anchor = getattr(event, "anchor", None)
        if anchor is not None and isinstance(event, yaml.AliasEvent):
            self.unused_anchors.pop(anchor, None)
        elif anchor is not None:
            self.unused_anchors[anchor] = event.start_mark
        return super().compose_node(parent, index)


class _NodeChecker:
    """Walk over the nodes of a document, note where each stands, and collect the slips in them."""

    def __init__(self, loader: _MarkedLoader, name: str, text: str, *, is_file: bool) -> None:
        self.nodes: dict[KeyPath, yaml.Node] = {}
        self.marks: dict[KeyPath, yaml.Mark] = {}
        self._loader = loader
        self._name, self._text, self._is_file = name, text, is_file
        self._slips: list[str] = []
        self._ancestors: list[yaml.Node] = []

    def construct(self, root: yaml.Node, path: KeyPath) -> Any:
        """Return the value of a document.

        Raises:
            ConfigError: all slips.
        """
        self._visit(root, path)
        for anchor, mark in self._loader.unused_anchors.items():
            self._note(mark, f"nothing refers to the anchor &{anchor}; put a text that begins with & in quotes")
        if self._slips:
            raise ConfigError(*dict.fromkeys(self._slips))
        return self._loader.construct_document(root)

    def _note(self, mark: yaml.Mark, problem: str) -> None:
        self._slips.append(
            _at(self._name, self._text, mark.line, mark.column, problem)
            if self._is_file
            else f"{self._name}: {problem}"
        )

    def _visit(self, node: yaml.Node, path: KeyPath) -> None:
        if len(self.nodes) > _MAX_NODES:
            raise ConfigError(f"{self._name}: more than {_MAX_NODES:,} values; are these the rows of a dataset?")
        if any(node is ancestor for ancestor in self._ancestors):
            self._note(node.start_mark, "an anchor holds itself")
            return
        self.nodes[path] = node
        if node.tag not in _TAGS:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            self._note(node.start_mark, f"{tag} is no type known here; put a text that begins with ! in quotes")
            return
        self._ancestors.append(node)
        if isinstance(node, yaml.MappingNode):
            self._visit_mapping(node, path)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._visit_value(item, (*path, str(index)), item.start_mark)
        else:
            self._read_scalar(node)
        self._ancestors.pop()

    def _visit_mapping(self, node: yaml.MappingNode, path: KeyPath) -> None:
        first_lines: dict[Any, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problem = "YAML reads braces in braces as a mapping; put a text such as {{ name }} in quotes"
                self._note(node.start_mark, self._explain(node) or problem)
                continue
            name, key_path = self._read_scalar(key), (*path, key.value)
            if len(path) < 2 and not key.tag.endswith((":str", ":merge")):
                self._note(key.start_mark, f"a key is a name here, not {name!r}")
                continue
            if name in first_lines:  # 1 and 1.0 are the same key
                lines = f": in line {first_lines[name] + 1} and in line {key.start_mark.line + 1}"
                self._note(key.start_mark, f"{'.'.join(key_path)} is there twice{lines if self._is_file else ''}")
            first_lines.setdefault(name, key.start_mark.line)
            between = self._text[key.end_mark.index : value.start_mark.index]
            if node.flow_style and isinstance(value, yaml.ScalarNode) and not value.value and ":" not in between:
                self._note(key.start_mark, self._explain_lone_name(key))
                continue
            if key.tag.endswith(":merge"):
                self._note_merged(value, path)
            is_lone = len(node.value) == 1 and isinstance(self._parent, yaml.SequenceNode)
            self._visit_value(value, key_path, key.start_mark, lone_key=key.value if is_lone else None)

    @property
    def _parent(self) -> yaml.Node | None:
        return self._ancestors[-2] if len(self._ancestors) > 1 else None

    def _visit_value(self, node: yaml.Node, path: KeyPath, mark: yaml.Mark, lone_key: str | None = None) -> None:
        self.marks[path] = mark
        is_section = self._is_file and len(path) == 1
        is_bare = isinstance(node, yaml.ScalarNode) and node.tag in _TAGS and not node.value
        if is_bare and node.style is None and not is_section:
            self._note(mark, self._explain_no_value(path, mark.line, lone_key))
        elif is_bare and node.style in ("|", ">"):
            self._note(node.start_mark, f"no text follows {node.style}; for the text {node.style} write '{node.style}'")
        else:
            self._visit(node, path)

    def _note_merged(self, node: yaml.Node, path: KeyPath) -> None:
        """Note where the keys stand that a mapping takes from another one: ``<<: *other``."""
        for mapping in [node] if isinstance(node, yaml.MappingNode) else node.value:
            for key, value in mapping.value if isinstance(mapping, yaml.MappingNode) else ():
                self.nodes.setdefault((*path, str(key.value)), value)
                self.marks.setdefault((*path, str(key.value)), key.start_mark)

    def _read_scalar(self, node: yaml.ScalarNode) -> Any:
        if node.style is None and node.tag.endswith(":str"):
            problem = yaml_slips.explain_plain_text(node.value)
            if problem is not None:
                self._note(node.start_mark, problem)
        try:
            return self._loader.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
            self._note(node.start_mark, f"{node.value[:20]!r} can't be read: {problem}")

    def _explain(self, node: yaml.Node) -> str | None:
        if not self._is_file:
            return None
        mark = node.start_mark
        return yaml_slips.explain_value(yaml_slips.split_lines(self._text)[mark.line], mark.column)

    def _explain_lone_name(self, key: yaml.ScalarNode) -> str:
        name, colon, value = key.value.partition(":")
        if colon and key.style is None:
            return f"a blank is missing after the colon of {key.value!r}: write {name}: {value}"
        if re.fullmatch(r"\w+=.*", key.value) and key.style is None:
            name, _, value = key.value.partition("=")
            return f"a key and its value are written {name}: {value}, not {key.value}"
        remedy = f"put a text in braces in quotes: {yaml_slips.quote('{' + key.value + '}')}"
        return self._explain(key) or f"YAML reads {{{key.value!r}: None}}; {remedy}"

    def _explain_no_value(self, path: KeyPath, line: int, lone_key: str | None) -> str:
        if lone_key is not None:  # an item of a list: "Question:"
            remedy = f"for the text write {yaml_slips.quote(f'{lone_key}:')}"
            return f"YAML reads {{{lone_key!r}: None}}; {remedy}, for a mapping {{{lone_key}: null}}"
        comment = re.search(r"[:-]\s+(#.*?)\s*$", yaml_slips.split_lines(self._text)[line])
        if comment:
            key = "- " if path[-1].isdigit() else f"{path[-1]}: "
            remedy = f"for the text write {key}{yaml_slips.quote(comment[1])}"
            return f"{'.'.join(path)} has no value, since what follows # is a comment; {remedy}; {_NO_VALUE}"
        return f"{'.'.join(path)} has no value; {_NO_VALUE}"


def _at(name: str, text: str, line: int, column: int, problem: str) -> str:
    """Return a mistake in a file: its place, counted from 1, what is wrong, and the line with a caret below.

    A secret in the line is left out.
    """
    mistake = f"{name}:{line + 1}:{column + 1}: {problem}\n{yaml_slips.show_place(text, line, column)}"
    lines = yaml_slips.split_lines(text)
    key, value = yaml_slips.split_entry(lines[line]) if line < len(lines) else ("", "")
    return mistake.replace(value, REMOVED) if value and has_secret(value, key) else mistake


def _nest(path: KeyPath, value: Any) -> Any:
    for part in reversed(path):
        value = {part: value}
    return value


def _write_text(key: str, text: str) -> str:
    return f"for the text write {shlex.quote(f'{key}={json.dumps(text, ensure_ascii=False)}')}"


def _show_argument(argument: str) -> str:
    """Return an argument in one line, without a secret in it."""
    key, equals, text = argument.partition("=")
    shown = f"{key}{equals}{redact_secrets(text, key.rpartition('.')[2])}"
    shown = shown if shown.isprintable() else repr(shown)[1:-1]
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."


def _read_text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        hint = f"; a key is written {path}=VALUE" if _is_key(path) else ""
        raise ConfigError(f"no such configuration file: {path}{hint}") from None
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"this is no UTF-8 (byte 0x{content[error.start]:02x})"
        raise ConfigError(f"{path}:{line}: {what}; convert it, e.g. {suggest_conversion(content)}") from None


def _is_key(name: str) -> bool:
    """Return True if a name is a key of a section, and not a file's, as far as one can tell."""
    is_known = find_type(name) or find_type(name.partition(".")[0]).startswith("dict")
    return bool(_KEY.fullmatch(name) and is_known) and not name.endswith((".yaml", ".yml", ".json"))


def _reads_all(root: yaml.Node, text: str) -> bool:
    """Return True if YAML reads the whole text as the value that it looks like: no comment, no key, nothing cut off."""
    if isinstance(root, yaml.ScalarNode) and root.style is None:
        is_text = root.tag.endswith(":str")
        return bool(root.value) and root.value == (text if is_text else text.strip(" "))
    is_flow = root.style in ("'", '"') if isinstance(root, yaml.ScalarNode) else root.flow_style
    return bool(is_flow) and not (text[: root.start_mark.index] + text[root.end_mark.index :]).strip()


def _describe_unread(text: str, value: Any) -> str:
    if value is None:
        return "YAML reads a comment, and no value" if "#" in text else "YAML reads no value"
    rest = " and drops the rest as a comment" if " #" in text else ""
    return f"YAML reads {value!r}{rest}"
