"""Test what a template inserts, how it names columns, and which columns it reads."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dpgen.config.prompt import PromptConfig
from dpgen.data.prompts.columns import check_prompt_columns, select_prompt_columns
from dpgen.data.prompts.render import PromptRenderer
from dpgen.errors import ConfigError, RowRefused

ORDER = {"order": {"items": "2 apples", "values": "x", "title": "t"}}
NAMES = {"question-text": "1 + 1 =", "my col": "2 + 2 =", "class": "3", "1st": "a", "none": "b"}


def render(template: str, row: dict[str, Any]) -> Any:
    config = PromptConfig(template=template)
    check_prompt_columns(config, list(row))
    columns = select_prompt_columns(config, list(row))
    return PromptRenderer(config, None).build_prompt({name: row[name] for name in columns})


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ order.items }}, {{ order.values }}, {{ order.title }}", "2 apples, x, t"),
        ("{{ order['items'] }}", "2 apples"),
        ("{{ row.order.items }}", "2 apples"),
        ("{{ order.keys() | join(' ') }}", "items values title"),
        ("{% for order in [order] %}{{ order.items }}{% endfor %}", "2 apples"),
        ("{{ [order] | map(attribute='items') | join }}", "2 apples"),
    ],
)
def test_keys_of_a_nested_value_come_before_methods(template: str, text: str) -> None:
    assert render(template, ORDER) == text


@pytest.mark.parametrize(
    ("template", "value", "reason"),
    [
        ("{{ p.items }}", {"a": 1}, "it inserts the function or method 'items': call it"),
        ("{{ p['items'] }}", {"a": 1}, "function or method 'items'"),
        ("{{ p.title }}", "a text", "function or method 'title'"),
        ("{{ p }}{{ range }}", "x", "function or method"),
        ("{{ p }}{{ joiner() }}", "x", "function or method"),
        ("{{ p | map('upper') }}", ["a"], "it inserts a generator, not its values: add | list, or | join"),
        ("{{ p.items() }}", {"a": 1}, "it inserts a dict_items"),
        ("{{ p.keys() }}", {"a": 1}, "it inserts a dict_keys"),
        ("{{ p.values() }}", {"a": 1}, "it inserts a dict_values"),
        ("{{ p }}", b"x", r"it inserts bytes: decode them, e.g. {{ column.decode\(\) }}"),
        ("{{ p.missing }}", {"a": 1}, "has no attribute 'missing'"),
    ],
)
def test_what_no_prompt_should_hold_is_an_error_of_the_row(template: str, value: Any, reason: str) -> None:
    with pytest.raises(RowRefused, match=reason) as raised:
        render(template, {"p": value})
    assert raised.value.type == "template_failed"


@pytest.mark.parametrize(
    ("template", "text", "columns"),
    [
        ("{{ row['question-text'] }}", "1 + 1 =", ["question-text"]),
        ("{{ row['my col'] }} {{ row.class }} {{ row['none'] }}", "2 + 2 = 3 b", ["my col", "class", "none"]),
        ("{{ class }}", "3", ["class"]),
        ("{{ row.get('1st') }}", "a", list(NAMES)),
        ("{{ row | length }}", "5", list(NAMES)),
        ("{% for row in [class] %}{{ row }}{% endfor %}", "3", ["class"]),
    ],
)
def test_row_names_any_column_and_only_what_is_used_is_read(template: str, text: str, columns: list[str]) -> None:
    assert render(template, NAMES) == text
    assert select_prompt_columns(PromptConfig(template=template), list(NAMES)) == columns


def test_a_column_of_the_name_row_stays_one() -> None:
    assert render("{{ row }} {{ row.a }}", {"row": {"a": "x"}, "a": "y"}) == "{'a': 'x'} x"
    assert select_prompt_columns(PromptConfig(template="{{ row.a }}"), ["row", "a"]) == ["row"]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% if range %}In range {{ range }}: {% endif %}{{ q }}", "one"),
        ("{{ range or 'none' }}", "none"),
        ("{{ namespace.x }} {{ dict }} {{ cycler }} {{ joiner }} {{ lipsum }}", "1 d c j l"),
        ("{% for i in range(2) %}{{ i }}{{ row['range'] }}{% endfor %} {{ q }}", "01 one"),
        ("{{ row | length }}{% for i in range(2) %}{{ i }}{% endfor %}", "801"),
        ("{% set namespace = namespace(n=1) %}{{ namespace.n }} {{ q }}", "1 one"),
        ("{{ row['self'] }} {% for self in [q] %}{{ self }}{% endfor %}", "s one"),
    ],
)
def test_a_column_comes_before_the_function_of_jinja_that_has_its_name(template: str, text: str) -> None:
    names = {"dict": "d", "cycler": "c", "joiner": "j", "lipsum": "l", "self": "s"}
    assert render(template, {"range": "", "namespace": {"x": 1}, "q": "one", **names}) == text


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ range }}{% for i in range(2) %}{{ i }}{% endfor %}", "range"),
        ("{{ self }} {{ q }}", "self"),
        ("{{ self }}", "self"),
    ],
)
def test_a_name_that_could_be_a_column_or_jinjas_is_refused(template: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data.template: '{name}' is .* {{{{ row\['{name}'\] }}}}$"):
        check_prompt_columns(PromptConfig(template=template), ["range", "self", "q"])


@pytest.mark.parametrize(
    ("template", "hint"),
    [
        ("{{ question-text }}", "'question' is no column.*no variable, write {{ row['question-text'] }}"),
        ("{{ my col }}", "data.template, line 1: .*write {{ row['my col'] }}"),
        ("{{ 1st }}", "line 1: .*write {{ row['1st'] }}"),
        ("{question-text}", "names no column; write {{ row['question-text'] }}, with two braces"),
        ("{{ clas }}", "'clas' is no column of the dataset; did you mean 'class'?"),
        ("{{ zzz }}", "'zzz' is no column of the dataset; columns: row['question-text'], row['my col'], class, "),
        ("{{ row['qestion-text'] }}", "row['qestion-text']: .*did you mean 'question-text'?"),
        ("{{ row.clas }}", "row['clas']: 'clas' is no column of the dataset; did you mean 'class'?"),
    ],
)
def test_a_wrong_name_is_refused_with_how_to_write_it(template: str, hint: str) -> None:
    pattern = ".*".join(map(re.escape, hint.split(".*")))
    with pytest.raises(ConfigError, match=pattern):
        check_prompt_columns(PromptConfig(template=template), list(NAMES))
