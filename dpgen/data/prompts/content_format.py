"""Detect the format of message contents that a chat template expects: strings, or lists of parts.

- Follows vLLM 0.32: `_detect_content_format` and what it calls in `vllm/renderers/hf.py`.
- vLLM reads the template's syntax tree: a template that loops over a message's content expects lists ("openai"), any
  other template strings ("string").
- A guess that differs from vLLM's would change tokens. So this code repeats vLLM's rules exactly, with its false
  guesses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from dpgen.data.prompts.chat import ContentFormat

if TYPE_CHECKING:
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment


def detect_content_format(template: str) -> ContentFormat:
    """Return "openai" for a template that loops over the content of messages, else "string"."""
    import jinja2

    try:
        loops_over_content = any(True for _ in _iter_content_loops(_environment().parse(template)))
    except (jinja2.TemplateError, AssertionError):
        return "string"  # as in vLLM: the default for a syntax tree of an unexpected shape
    return "openai" if loops_over_content else "string"


def template_variables(template: str) -> set[str]:
    """Return the names that a chat template looks up from outside.

    Raises:
        jinja2.TemplateSyntaxError: with `lineno` and `message`; also for filters that do not exist.
    """
    from jinja2 import meta

    return meta.find_undeclared_variables(_environment().parse(template))


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    """Return an environment that parses all that `transformers.utils.chat_template_utils` compiles.

    That includes the `generation` tag.
    """
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_generation_support")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    return ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )


def _iter_content_loops(root: nodes.Template) -> Iterator[nodes.For]:
    """Yield the loops over a message's content, over a macro parameter that holds it, or over a name `content`."""
    from jinja2 import nodes

    messages = list(_iter_message_names(root))
    in_macros: set[int] = set()
    parameters: dict[int, set[str]] = {}
    for macro in root.find_all(nodes.Macro):
        given = _find_content_parameters(root, macro, messages)
        for loop in macro.find_all(nodes.For):
            in_macros.add(id(loop))
            if given:
                parameters[id(loop)] = given

    for loop in root.find_all(nodes.For):
        over = loop.iter
        if any(_is_lookup_of(over, name, "content") for name in messages):
            is_content = True
        elif not isinstance(over, nodes.Name):
            is_content = False
        else:
            is_content = over.name in parameters.get(id(loop), ()) or (
                id(loop) not in in_macros and over.name == "content"
            )
        if is_content:
            assert isinstance(loop.target, nodes.Name)
            yield loop


def _find_content_parameters(root: nodes.Template, macro: nodes.Macro, messages: list[str]) -> set[str]:
    """Return the macro's parameters to which some call passes a message's content."""
    from jinja2 import nodes

    names = [argument.name for argument in macro.args]
    given: set[str] = set()
    for call in root.find_all(nodes.Call):
        if not (isinstance(call.node, nodes.Name) and call.node.name == macro.name):
            continue
        passed = list(zip(names, call.args, strict=False))
        passed += [(keyword.key, keyword.value) for keyword in call.kwargs if keyword.key in names]
        given |= {
            name for name, value in passed if any(_is_lookup_of(value, message, "content") for message in messages)
        }
    return given


def _iter_message_names(root: nodes.Template) -> Iterator[str]:
    """Yield the loop variables that stand for one message."""
    from jinja2 import nodes

    lists = list(_iter_aliases(root, "messages"))
    for loop in root.find_all(nodes.For):
        if any(_is_lookup_of(loop.iter, name) for name in lists):
            assert isinstance(loop.target, nodes.Name)
            yield loop.target.name


def _iter_aliases(root: nodes.Template, name: str) -> Iterator[str]:
    """Yield the name, then every name that it or a slice of it is assigned to, directly or in several steps."""
    from jinja2 import nodes

    yield name
    aliases = {name}
    queue = deque([name])
    while queue:
        source = queue.popleft()
        for assignment in root.find_all(nodes.Assign):
            if _is_lookup_of(assignment.node, source):
                assert isinstance(assignment.target, nodes.Name)
                # Each name once: names may be assigned to themselves, or in a circle.
                if assignment.target.name not in aliases:
                    aliases.add(assignment.target.name)
                    queue.append(assignment.target.name)
                    yield assignment.target.name


def _is_lookup_of(node: nodes.Node, name: str, key: str | None = None) -> bool:
    """Return True if the expression is `name` (or `name.key`, `name['key']`), perhaps filtered, tested or sliced."""
    from jinja2 import nodes

    if isinstance(node, nodes.Filter):
        return node.node is not None and _is_lookup_of(node.node, name, key)
    if isinstance(node, nodes.Test):
        return _is_lookup_of(node.node, name, key)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _is_lookup_of(node.node, name, key)
    if key is None:
        return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name
    if isinstance(node, nodes.Getitem):
        return _is_bare_name(node.node, name) and isinstance(node.arg, nodes.Const) and node.arg.value == key
    return isinstance(node, nodes.Getattr) and _is_bare_name(node.node, name) and node.attr == key


def _is_bare_name(node: nodes.Node, name: str) -> bool:
    from jinja2 import nodes

    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name
