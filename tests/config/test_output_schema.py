"""`output.schema` is a schema, its file or a Pydantic model, and sets the constraint of every row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpgen.config import loader
from dpgen.config.schema import Config, to_yaml
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


@pytest.mark.parametrize(
    "text",
    [
        'output: {schema: "@answer.json"}',
        "output: {schema: answer.json}",
        f"output: {{schema: {json.dumps(SCHEMA)}}}",
        "output:\n  schema: |\n    " + json.dumps(SCHEMA).replace("${", "\\${"),
    ],
)
def test_a_schema_may_be_a_file_a_mapping_or_json_text(load: Callable[..., Config], text: str) -> None:
    config = load(text=BASE + text)
    assert config.output.schema == SCHEMA
    assert config.sampling_fields == {"structured_outputs": {"json": SCHEMA}}
    assert config.output.parses_json
    again = load(text=to_yaml(config))
    assert again == config, "config.yaml of the run directory gives the same run"


def test_a_schema_may_be_a_pydantic_model(load: Callable[..., Config]) -> None:
    Path("answers").mkdir()
    Path("answers/models.py").write_text(MODEL)
    schema = load("output.schema=answers.models:Answer").output.schema
    assert schema["properties"] == {"text": {"title": "Text", "type": "string"}}
    for name, reason in {
        "answers.models:Anser": "answers.models has no Anser",
        "answers.models:limit": "limit is no Pydantic model",
        "answers.model:Answer": "ModuleNotFoundError: No module named 'answers.model'",
    }.items():
        with pytest.raises(ConfigError) as caught:
            load(f"output.schema={name}")
        assert caught.value.mistakes[0].startswith(f"output.schema={name}: {reason}")
        assert len(caught.value.mistakes) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["output.schema=@none.json"], "output.schema=none.json can't be read: there is no such file in the working"),
        (["output.schema=conf.yaml"], "output.schema=conf.yaml: conf.yaml: the text is not valid JSON"),
        (["output.schema=list.json"], "output.schema=list.json: list.json holds a list, not a JSON Schema object"),
        (["output.schema=3"], "output.schema=3: must be a JSON Schema, its file (@schemas/answer.json), or a Pydantic"),
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
def test_a_schema_that_is_none_is_refused_once(load: Callable[..., Config], overrides: list[str], message: str) -> None:
    Path("list.json").write_text("[1]")
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
