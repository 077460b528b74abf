"""Keys of `data` may name files, whose texts the configuration then holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dpgen.config import loader
from dpgen.config.schema import Config, to_yaml
from dpgen.errors import ConfigError

BASE = "run: {dir: out}\nmodel: m\ndata: {path: rows.jsonl}\n"
AS_CHAT = ["data.as_chat=true"]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    monkeypatch.chdir(tmp_path)

    def load(*overrides: str, text: str = BASE) -> Config:
        Path("conf.yaml").write_text(text)
        return loader.load(["conf.yaml"], list(overrides))

    return load


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"Q: {{ a }}\nA:", "Q: {{ a }}\nA:"),
        (b"Q: {{ a }}\n", "Q: {{ a }}"),
        (b"Q: {{ a }}\n\n", "Q: {{ a }}\n"),
        (b"\xef\xbb\xbfQ: {{ a }}\r\nA:\r\n", "Q: {{ a }}\nA:"),
        (rb"${{ a }} \n \${x} ${oc.env:HOME} \\", r"${{ a }} \n \${x} ${oc.env:HOME} \\"),
        ("é {{ a }}".encode(), "é {{ a }}"),
    ],
)
def test_a_template_in_a_file_is_the_text_of_the_file(load: Callable[..., Config], content: bytes, text: str) -> None:
    Path("prompts").mkdir()
    Path("prompts/solve.jinja").write_bytes(content)
    assert load("data.template=@prompts/solve.jinja").data.template == text
    in_yaml = BASE.replace("rows.jsonl", "rows.jsonl, template: '@prompts/solve.jinja'")
    assert load(text=in_yaml).data.template == text


def test_a_template_that_begins_with_a_sign_stays_one(load: Callable[..., Config]) -> None:
    assert load("data.template=@{{ user }} asks").data.template == "@{{ user }} asks"
    assert load("data.template=@@{{ user }}").data.template == "@@{{ user }}"


def test_a_file_that_a_later_layer_replaces_is_not_read(load: Callable[..., Config]) -> None:
    in_yaml = BASE.replace("rows.jsonl", "rows.jsonl, template: '@none.jinja'")
    assert load("data.template={{ a }}", text=in_yaml).data.template == "{{ a }}"


def test_prompts_and_tools_may_be_files(load: Callable[..., Config]) -> None:
    Path("system.txt").write_text("be brief\n")
    Path("chat.jinja").write_text("{{ messages }}\n")
    tools = [{"name": "sum", "description": "costs ${5}"}]
    Path("tools.json").write_text(json.dumps(tools, indent=2))
    files = ["data.system_prompt=@system.txt", "data.chat_template=@chat.jinja", "data.tools=@tools.json"]
    config = load("data.prompt_column=p", *AS_CHAT, *files)
    assert (config.data.system_prompt, config.data.chat_template) == ("be brief", "{{ messages }}\n")
    assert config.prompt.tools == [{"type": "function", "function": tools[0]}]


def test_a_system_prompt_may_begin_with_a_sign_and_is_written_so_that_it_is_read_again(
    load: Callable[..., Config],
) -> None:
    chat = ["data.prompt_column=p", *AS_CHAT]
    for given, meant in {"@@team": "@team", "@@@team": "@@team", "@ann\n@bob": "@ann\n@bob", "a@b": "a@b"}.items():
        config = load(*chat, f"data.system_prompt={given}")
        assert config.data.system_prompt == meant
        assert load(text=to_yaml(config)).data.system_prompt == meant


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("data.template=@none.jinja", "data.template=@none.jinja can't be read: there is no such file in the working "),
        ("data.template=@/none/x", "data.template=@/none/x can't be read: there is no such file$"),
        ("data.template=@.", "data.template=@. can't be read: Is a directory"),
        ("data.template=@", "data.template=@ can't be read: Is a directory"),
        ("data.template=@latin.txt", "data.template=@latin.txt can't be read: it is no UTF-8 .byte 0xe9 at position 1"),
        ("data.system_prompt=@team", "no such file .*; a text that begins with @ is written @@"),
        ("data.chat_template=@none", "data.chat_template=@none can't be read"),
        ("data.tools=@none.json", "data.tools=@none.json can't be read"),
        ("data.tools=@latin.txt", "data.tools=@latin.txt can't be read: it is no UTF-8"),
        ("data.tools=@broken.json", "data.tools: the text is not valid JSON: .*line 1"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(load: Callable[..., Config], argument: str, words: str) -> None:
    Path("latin.txt").write_bytes(b"caf\xe9"[2:])
    Path("broken.json").write_text("[{")
    source = [] if argument.startswith("data.template") else ["data.prompt_column=p", *AS_CHAT]
    with pytest.raises(ConfigError, match=words) as raised:
        load(*source, argument)
    assert len(raised.value.mistakes) == 1


def test_a_file_that_is_not_there_is_reported_with_the_other_mistakes_and_its_line(
    load: Callable[..., Config],
) -> None:
    in_yaml = BASE.replace("{path: rows.jsonl}", "\n  path: rows.jsonl\n  template: '@none.jinja'\n  limit: -1")
    with pytest.raises(ConfigError) as raised:
        load(text=in_yaml)
    assert [mistake.split("=")[0] for mistake in raised.value.mistakes] == ["data.template", "data.limit"]
    assert all("conf.yaml:" in mistake for mistake in raised.value.mistakes)


@pytest.mark.parametrize("argument", ["data.chat_template={name: tool_use}", "data.chat_template.name=tool_use"])
def test_a_chat_template_has_a_name_or_is_a_text(load: Callable[..., Config], argument: str) -> None:
    chat = ["data.prompt_column=p", *AS_CHAT]
    assert load(*chat, argument).data.chat_template == {"name": "tool_use"}
    assert load(*chat, argument).prompt.chat_template_name == "tool_use"
    for text in ("{{ messages }}", "{% for m in messages %}{{ m.content }}{% endfor %}", "chat.jinja", "1e3", "true"):
        assert load(*chat, f"data.chat_template={text}").data.chat_template == text
    assert load(*chat, "data.chat_template=null").data.chat_template is None
    in_yaml = "{path: rows.jsonl, prompt_column: p, as_chat: true, chat_template: {name: tool_use}}"
    assert load(text=BASE.replace("{path: rows.jsonl}", in_yaml)).prompt.chat_template_name == "tool_use"


@pytest.mark.parametrize(
    "argument",
    [
        "data.tools=[{name: sum}]",
        'data.tools=[{"type": "function", "function": {"name": "sum"}}]',
        'data.tools=\'[{"name": "sum"}]\'',
    ],
)
def test_tools_on_the_command_line_are_yaml_or_json(load: Callable[..., Config], argument: str) -> None:
    config = load("data.prompt_column=p", *AS_CHAT, argument)
    assert config.prompt.tools == [{"type": "function", "function": {"name": "sum"}}]
