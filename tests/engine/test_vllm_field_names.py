"""Names of vLLM's fields, read in its source without importing it."""

from __future__ import annotations

import pytest

from dpgen.engine.vllm.field_names import read_vllm_fields


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
