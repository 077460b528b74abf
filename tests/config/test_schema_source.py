"""A schema is given as itself, its file or a Pydantic model; `output.schema` sets the constraint of every row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpgen.config import loader
from dpgen.config.schema import Config, to_yaml
from dpgen.config.schema_source import SCHEMA_KEYS
from dpgen.errors import ConfigError
from dpgen.journal.run_identity import compute_run_identity

BASE = "run: {dir: out}\nmodel: m\ndata: {path: rows.jsonl, prompt_column: p}\n"
SCHEMA = {"type": "object", "properties": {"password": {"type": "string", "pattern": "^${a}$"}}, "required": []}
MODEL = """
import sys
from pydantic import BaseModel
print("a line of the module's own")
class Answer(BaseModel):
    text: str
    class Inner(BaseModel):
        x: int
limit = 3
"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    monkeypatch.chdir(tmp_path)
    Path("answer.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(SCHEMA).encode())

    def load(*overrides: str, text: str = BASE) -> Config:
        Path("conf.yaml").write_text(text)
        return loader.load(["conf.yaml"], list(overrides))

    return load


def get_schema(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


@pytest.mark.parametrize("key", SCHEMA_KEYS)
@pytest.mark.parametrize(
    "text",
    [
        '{schema: "@answer.json"}',
        "{schema: answer.json}",
        f"{{schema: {json.dumps(SCHEMA)}}}",
        "\n  schema: |\n    " + json.dumps(SCHEMA).replace("${", "\\${"),
    ],
)
def test_a_schema_may_be_a_file_a_mapping_or_json_text(load: Callable[..., Config], key: str, text: str) -> None:
    section, _, name = key.partition(".")
    config = load(text=f"{BASE}{section}: {text.replace('schema:', f'{name}:', 1)}")
    assert get_schema(config, key) == SCHEMA
    again = load(text=to_yaml(config))
    assert again == config, "config.yaml of the run directory gives the same run"
    assert load(f"{key}=@answer.json") == load(f"{key}=answer.json") == config


def test_an_output_schema_constrains_every_row(load: Callable[..., Config]) -> None:
    config = load("output.schema=@answer.json")
    assert config.sampling_fields == {"structured_outputs": {"json": SCHEMA}}
    assert config.output.parses_json


@pytest.mark.parametrize("key", SCHEMA_KEYS)
def test_a_schema_may_be_a_pydantic_model(load: Callable[..., Config], key: str) -> None:
    Path("answers").mkdir()
    Path("answers/models.py").write_text(MODEL)
    schema = get_schema(load(f"{key}=answers.models:Answer"), key)
    assert schema["properties"] == {"text": {"title": "Text", "type": "string"}}
    for name, reason in {
        "answers.models:Anser": "answers.models has no Anser",
        "answers.models:limit": "limit is no Pydantic model",
        "answers.model:Answer": "ModuleNotFoundError: No module named 'answers.model'",
    }.items():
        with pytest.raises(ConfigError) as caught:
            load(f"{key}={name}")
        assert caught.value.mistakes[0].startswith(f"{key}={name}: {reason}")
        assert len(caught.value.mistakes) == 1


@pytest.mark.parametrize("key", SCHEMA_KEYS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("@none.json", "none.json can't be read: there is no such file in the working"),
        ("conf.yaml", "conf.yaml: conf.yaml: the text is not valid JSON"),
        ("list.json", "list.json: list.json holds a list, not a JSON Schema object"),
        ("3", "3: must be a JSON Schema, its file (@schemas/answer.json), or a Pydantic"),
    ],
)
def test_a_schema_that_is_none_is_refused_once_and_alike(
    load: Callable[..., Config], key: str, value: str, message: str
) -> None:
    Path("list.json").write_text("[1]")
    with pytest.raises(ConfigError) as caught:
        load(f"{key}={value}")
    [mistake] = caught.value.mistakes
    assert mistake.startswith(f"{key}={message}")


def test_a_check_may_take_any_json(load: Callable[..., Config]) -> None:
    assert load("check.json_schema={}").check.json_schema == {}
    assert load("check.json_schema=true").check.json_schema is True


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["output.schema={}"], "output.schema={}: must be a JSON Schema"),
        (
            ["output.schema=@answer.json", "sampling.structured_outputs={regex: a}"],
            "output.schema and sampling.structured_outputs.regex are set: a text follows one of them",
        ),
        (
            ["output.schema=@answer.json", "sampling_by_rank=[{structured_outputs: {choice: [a]}}]"],
            "output.schema and sampling_by_rank[0].structured_outputs.choice are set",
        ),
        (["output.schema=@answer.json", "data.completion_column=p"], "output.schema has no effect: data.completion"),
    ],
)
def test_an_output_schema_that_can_not_be_followed_is_refused_once(
    load: Callable[..., Config], overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    [mistake] = caught.value.mistakes
    assert mistake.startswith(message)


def test_a_schema_that_can_not_be_read_hides_no_other_mistake(load: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError) as caught:
        load("output.schema=@none.json", "data.limit=-1")
    assert len(caught.value.mistakes) == 2


@pytest.mark.parametrize(
    ("key", "get"),
    [
        ("output.schema", lambda config: config.output.schema),
        ("check.json_schema", lambda config: config.check.json_schema),
        ("sampling.structured_outputs.json", lambda config: config.sampling["structured_outputs"]["json"]),
    ],
)
def test_a_later_schema_takes_the_place_of_an_earlier_one(
    load: Callable[..., Config], key: str, get: Callable[[Config], Any]
) -> None:
    config = load(f"{key}={json.dumps(SCHEMA)}", f"{key}={{type: array}}")
    assert get(config) == {"type": "array"}, "merged they would be a schema that nobody has written"


def test_other_fields_of_structured_outputs_go_with_a_schema(load: Callable[..., Config]) -> None:
    config = load("output.schema={type: array}", "sampling.structured_outputs={disable_any_whitespace: true}")
    assert config.sampling_fields["structured_outputs"] == {"disable_any_whitespace": True, "json": {"type": "array"}}


def test_a_run_is_known_by_its_schema_and_older_runs_have_none(load: Callable[..., Config]) -> None:
    def identify(*overrides: str) -> dict[str, Any]:
        output: dict[str, Any] = compute_run_identity(load(*overrides), {"num_rows": 1})["output"]
        return output

    assert identify("output.schema=answer.json")["schema"] == SCHEMA, "with the properties named like secrets"
    assert "schema" not in identify()
    assert yaml.safe_load(to_yaml(load("output.schema=answer.json")))["output"]["schema"]["properties"]["password"]
