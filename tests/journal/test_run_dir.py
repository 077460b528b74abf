"""Test what a run is: which settings make it another run."""

from __future__ import annotations

from typing import Any

import pytest

from dpgen.config.schema import Config, DataConfig, RunConfig
from dpgen.journal.run_dir import compute_run_identity, diff_identities

INPUT = {"num_rows": 1, "columns": ["prompt"], "content": "00"}


def compute_identity(engine: dict[str, Any]) -> dict[str, Any]:
    config = Config(
        run=RunConfig(dir="run"), data=DataConfig(path="rows.jsonl", prompt_column="prompt"), model="m", engine=engine
    )
    return compute_run_identity(config, INPUT)


@pytest.mark.parametrize("load_format", ["dummy", "bitsandbytes", "gguf", "a_plugin"])
def test_a_load_format_of_other_weights_is_another_run(load_format: str) -> None:
    differences = diff_identities(compute_identity({}), compute_identity({"load_format": load_format}))
    assert differences == [f'engine.load_format: null → "{load_format}"'], "random weights would end in the result"


@pytest.mark.parametrize("load_format", ["auto", "safetensors", "runai_streamer", "pt"])
def test_a_load_format_of_the_same_weights_is_the_same_run(load_format: str) -> None:
    assert compute_identity({"load_format": load_format}) == compute_identity({}), "older run directories lack the key"
