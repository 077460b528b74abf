"""Test the JSON Schema of the configuration: it is shipped, takes what dpgen takes, and rejects what dpgen rejects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from helpers.jobs import REPO

from dpgen.cli import main
from dpgen.config.json_schema import build_json_schema, list_value_choices
from dpgen.config.options import legal_keys
from dpgen.config.vllm import vllm_types
from dpgen.config.yaml.yaml_source import read_file

SHIPPED = REPO / "conf" / "config.schema.json"


def find_mistakes(value: Any) -> list[str]:
    """Return the keys that an editor underlines."""
    validator = jsonschema.Draft7Validator(build_json_schema())
    return [".".join(map(str, error.path)) or error.message for error in validator.iter_errors(value)]


def test_the_shipped_schema_is_the_one_that_is_generated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--schema"]) == 0
    remedy = "it differs from the code: dpgen config --schema > conf/config.schema.json"
    assert SHIPPED.read_text() == capsys.readouterr().out, remedy
    jsonschema.Draft7Validator.check_schema(json.loads(SHIPPED.read_text()))


def test_every_key_is_in_the_schema_with_its_help_and_default() -> None:
    sections = build_json_schema()["properties"]
    for name, default, help in legal_keys():
        section, _, key = name.partition(".")
        schema = sections[section]["properties"][key] if key else sections[section]
        assert schema["description"] == help
        assert schema.get("default", "???") == default


@pytest.mark.parametrize("path", sorted((REPO / "conf").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_is_valid_and_names_the_schema(path: Path) -> None:
    assert find_mistakes(read_file(str(path)).value) == []
    assert path.read_text().startswith("# yaml-language-server: $schema=config.schema.json\n")


@pytest.mark.parametrize(
    "text",
    [
        "run: {dir: 007, time_limit: 3600, retry_errors: [poison_row]}",
        "run: {dir: '${oc.env:X}', seed: '${oc.env:SEED}', engine: '${oc.env:ENGINE}', engine_timeout_s: 5}",
        "engine:\n",
        "data: {path: [a.jsonl, b.jsonl], tools: [{name: f}], chat_template: {name: tool_use}, columns: [1, a]}",
        "data: {limit: 1e6}",
        "engine: {some_field_of_a_later_version: 1, max_model_len: 8192, dtype: float64}",
        "sampling: {temperature: 1, stop: x, from_columns: {n: k}, structured_outputs: {json: {}}}",
        "sampling_by_rank: [{temperature: 0.2}, {top_p: 0.9, other: x}]",
        "lora: {math: adapters/math}\nmodel: 7",
    ],
)
def test_what_dpgen_takes_is_valid(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    assert find_mistakes(read_file(str(tmp_path / "a.yaml")).value) == []


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("run: {dri: a}", "run"),
        ("runn: {dir: a}", "Additional properties"),
        ("run: {seed: x}", "run.seed"),
        ("run: {engine: vlm}", "run.engine"),
        ("run: {retry_errors: [poisn_row]}", "run.retry_errors"),
        ("run: {engine_timeout_s: 0}", "run.engine_timeout_s"),
        ("run: {max_engine_deaths: 1.5}", "run.max_engine_deaths"),
        ("run: runs/a", "run"),
        ("data: {path: []}", "data.path"),
        ("data: {path: {a: b}}", "data.path"),
        ("data: {prompt_column: [a]}", "data.prompt_column"),
        ("data: {as_chat: maybe}", "data.as_chat"),
        ("data: {columns: question}", "data.columns"),
        ("data: {chat_template: {nam: x}}", "data.chat_template"),
        ("engine: [a]", "engine"),
        ("engine: {max_num_seqs: many}", "engine.max_num_seqs"),
        ("engine: {tensor_parallel_size: 2}", "engine.tensor_parallel_size"),
        ("sampling: {temperature: hot}", "sampling.temperature"),
        ("sampling_by_rank: {temperature: 1}", "sampling_by_rank"),
        ("sampling_by_rank: [{top_p: x}]", "sampling_by_rank"),
        ("work: {claim_rows: 0}", "work.claim_rows"),
        ("output: {format: csv}", "output.format"),
        ("lora: [a]", "lora"),
    ],
)
def test_what_dpgen_rejects_is_underlined(text: str, key: str) -> None:
    mistakes = find_mistakes(yaml.safe_load(text))
    assert len(mistakes) == 1 and mistakes[0].startswith(key), mistakes


def test_an_old_name_says_what_to_write_instead() -> None:
    section = build_json_schema()["properties"]["sampling"]["properties"]
    assert section["max_new_tokens"]["deprecated"] and "sampling.max_tokens" in section["max_new_tokens"]["description"]
    assert find_mistakes({"sampling": {"max_new_tokens": 5}}) == [], "a later vLLM may know the name"


def test_keys_can_be_completed_with_their_choices() -> None:
    choices = list_value_choices()
    assert choices["run.engine"] == ["vllm", "fake"] and choices["work.steal"] == ["true", "false"]
    assert choices["engine.dtype"][:2] == ["auto", "bfloat16"] and choices["run.dir"] == []
    assert choices["sampling.temperature"] == [] and "sampling.max_new_tokens" not in choices
    assert {name for name, _, _ in legal_keys()} - {"engine", "sampling"} <= choices.keys()


@pytest.mark.vllm
def test_the_listed_fields_are_vllm_s() -> None:
    import dataclasses

    from vllm import EngineArgs, SamplingParams

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    assert set(vllm_types.list_fields(vllm_types.ENGINE_TYPES)) <= known
    assert set(vllm_types.list_fields(vllm_types.SAMPLING_TYPES)) <= set(SamplingParams.__struct_fields__)
