"""Keywords of a call become the same checked configuration as keys of a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dpgen
from dpgen.api.settings import JobSettings, Layer, list_layers, make_layer
from dpgen.config.loader import load_values

LEGAL = ["model", "run_dir", *JobSettings.__annotations__]
BASE: Layer = ("base", {"model": "none", "run": {"dir": "runs/a"}, "data": {"path": "rows.jsonl"}})


def make_config(**keywords: Any) -> dpgen.Config:
    return load_values([BASE, make_layer("generate", {"prompt_column": "q", **keywords}, LEGAL)])


def describe_mistake(**keywords: Any) -> str:
    with pytest.raises(dpgen.ConfigError) as caught:
        make_config(**keywords)
    return str(caught.value)


def test_short_keywords_are_keys_of_their_sections() -> None:
    config = make_config(seed=None, columns=("q",), system_prompt="Be brief.", as_chat=True, run_dir=Path("runs/b"))
    assert (config.run.seed, config.run.dir) == (None, "runs/b")
    assert (config.data.columns, config.data.system_prompt) == (["q"], "Be brief.")


def test_sections_are_mappings_or_their_own_classes() -> None:
    config = make_config(
        work=dpgen.WorkConfig(order="dataset"), output={"token_ids": True}, sampling={"n": np.int64(2)}
    )
    assert (config.work.order, config.output.token_ids, config.sampling) == ("dataset", True, {"n": 2})


def test_a_later_layer_changes_single_keys() -> None:
    layers = [BASE, make_layer("Session", {"prompt_column": "q", "sampling": {"top_p": 0.5, "n": 2}}, LEGAL)]
    config = load_values([*layers, make_layer("generate", {"sampling": {"n": 3}}, LEGAL)])
    assert config.sampling == {"top_p": 0.5, "n": 3}


def test_a_config_is_taken_as_it_is() -> None:
    config = make_config(data={"system_prompt": "@@home", "as_chat": True})
    assert config.data.system_prompt == "@home"
    assert dpgen.load_config(config) == config
    changed = dataclasses.replace(config, model="other")
    assert load_values(list_layers(changed)) == changed


class Answer:
    """Stand for a Pydantic model."""

    @staticmethod
    def model_json_schema() -> dict[str, Any]:
        return {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def test_a_pydantic_model_is_a_schema() -> None:
    assert make_config(output={"schema": Answer}).output.schema == Answer.model_json_schema()


def passes(text: str) -> bool:
    return bool(text)


def test_a_function_is_a_check_if_ranks_can_import_it() -> None:
    layer = make_layer("generate", {"check": {"function": passes}}, LEGAL)[1]
    assert layer == {"check": {"function": f"{passes.__module__}:passes"}}
    assert "can't be imported by the rank processes" in describe_mistake(check={"function": lambda text: True})


@pytest.mark.parametrize(
    ("keywords", "parts"),
    [
        ({"promt_column": "q"}, ["'promt_column'", "prompt_column"]),
        ({"max_tokens": 5}, ["'max_tokens'", "write sampling.max_tokens"]),
        ({"token_ids_column": "ids"}, ["write data={'token_ids_column': ...}"]),
        ({"data": {"promt_column": "q"}}, ["generate()", "'data.promt_column'", "data.prompt_column"]),
        ({"data": {"prompt_column": "p"}}, ["prompt_column is given twice"]),
        ({"sampling": 3}, ["sampling is a section of keys"]),
        ({"work": {"claim_rows": 0}}, ["work.claim_rows=0: must be at least 1"]),
        ({"promt_column": "q", "max_tokens": 5}, ["2 mistakes", "promt_column", "max_tokens"]),
    ],
)
def test_a_wrong_keyword_is_named_with_what_was_meant(keywords: dict[str, Any], parts: list[str]) -> None:
    message = describe_mistake(**keywords)
    assert all(part in message for part in parts), message


def test_files_are_merged_and_overridden(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: a\nrun: {dir: runs/a}\ndata: {path: x.jsonl, prompt_column: q}\n")
    (tmp_path / "b.yaml").write_text("model: b\n")
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    assert dpgen.load_config(files).model == "b"
    assert dpgen.load_config(files[0], ["model=c"]).model == "c"
    with pytest.raises(dpgen.ConfigError, match="no-such"):
        dpgen.load_config(tmp_path / "no-such.yaml")
