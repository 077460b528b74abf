"""Names of vLLM's fields, read in its source without importing it."""

from __future__ import annotations

from typing import Any

import pytest

from dpgen.engine.vllm.field_names import VllmFields, read_vllm_fields


@pytest.mark.vllm
def test_the_names_in_vllm_s_source_are_those_of_its_classes() -> None:
    import dataclasses

    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams

    fields = read_vllm_fields()
    assert fields is not None
    assert fields.engine == {field.name for field in dataclasses.fields(EngineArgs)}
    assert fields.sampling == set(SamplingParams.__struct_fields__)
    assert fields.constraints == {field.name for field in dataclasses.fields(StructuredOutputsParams)}


def test_without_vllm_no_names_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpgen.engine.vllm.field_names.find_spec", lambda name: None)
    assert read_vllm_fields() is None


@pytest.mark.parametrize(
    ("sampling", "line"),
    [
        ({"temperature": 1, "structured_outputs": {"json": {}}}, None),
        ({"temperature": 1, "structured_outputs": "text"}, None),
        ({"temprature": 1}, "unknown key 'sampling.temprature'; did you mean 'sampling.temperature'?"),
        ({"output_kind": 1}, "unknown key 'sampling.output_kind'"),
        ({"structured_outputs": {"jsn": {}}}, "unknown key 'structured_outputs.jsn'; did you mean"),
    ],
)
def test_a_misspelt_field_of_a_programs_call_is_told(sampling: dict[str, Any], line: str | None) -> None:
    """vLLM itself ignores what it doesn't know, and would sample otherwise than asked."""
    fields = VllmFields({"max_num_seqs"}, {"temperature", "structured_outputs", "output_kind"}, {"json", "regex"})
    found = fields.find_unknown_of_request(sampling)
    assert found is None if line is None else found is not None and found.startswith(line), found
