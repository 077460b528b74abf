"""Read and write YAML with the scalars of YAML 1.2, through PyYAML, which knows YAML 1.1.

- In YAML 1.1, ``10:20`` is 620 (base 60), ``010`` is 8, ``yes`` is true, and ``1e-5`` is a text. Nobody means that.
- These lines stay instead of ruamel.yaml 0.19. It would be a second YAML library beside PyYAML, which OmegaConf
  requires, and it still reads ``1_000`` as 1000, ``0b11`` as 3 and ``2024-01-02`` as a date: the core schema of
  YAML 1.2 has neither.
- Limits: only the scalars are YAML 1.2.
"""

from __future__ import annotations

import re
from typing import Any

import yaml


class Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Resolve scalars by the core schema: https://yaml.org/spec/1.2.2/#103-core-schema."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own declaration


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Put a text in quotes if YAML 1.1 or YAML 1.2 would read something else without them."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        if kind is not yaml.ScalarNode or tag != _TEXT or not implicit[0]:
            return tag
        return next((core for core, pattern in _PATTERNS.items() if pattern.match(value)), tag)


_TEXT = "tag:yaml.org,2002:str"
_CORE = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
)
_PATTERNS = {tag: re.compile(rf"^(?:{pattern})$") for tag, pattern, _ in _CORE}
for _tag, _, _first in _CORE:
    Loader.add_implicit_resolver(_tag, _PATTERNS[_tag], [c if c != "\0" else "" for c in _first])


def _integer(loader: Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text, 10)  # 010 is ten


def _text(loader: Loader, node: yaml.ScalarNode) -> str:
    """Return a text, with each pair of surrogates as one character, as JSON writes those beyond U+FFFF."""
    text: str = loader.construct_scalar(node)
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        problem = "it holds half of a surrogate pair, which no text can hold"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


Loader.add_constructor("tag:yaml.org,2002:int", _integer)
Loader.add_constructor("tag:yaml.org,2002:str", _text)
Loader.add_constructor("tag:yaml.org,2002:merge", _text)  # << as a value


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    from dpgen.config.yaml.misread_texts import needs_quotes

    # Double quotes show that a backslash is meant as one; single ones, that a text such as None is.
    style = '"' if "\\" in text else "'" if needs_quotes(text) else None
    return dumper.represent_scalar(_TEXT, text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump(value: Any) -> str:
    """Return a value as YAML that reads the same in YAML 1.1 and 1.2; keys keep their order."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text
