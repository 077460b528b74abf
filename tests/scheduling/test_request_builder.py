"""A row's request: its own sampling parameters, without what its file format added to them, and its adapter."""

from __future__ import annotations

from typing import Any

import pytest

from dpgen.errors import RowRefused
from dpgen.records import derive_row_seed
from dpgen.scheduling.groups.adapters import AdapterConfig
from dpgen.scheduling.request_builder import RequestBuilder


@pytest.mark.parametrize(
    ("has_added_nulls", "expected"),
    [(True, {"json": {"type": "object"}}), (False, {"json": {"type": "object", "const": None}, "regex": None})],
)
def test_nulls_that_arrow_added_to_a_rows_parameters_are_dropped(
    has_added_nulls: bool, expected: dict[str, Any]
) -> None:
    builder = RequestBuilder(
        lambda row: ([1], None), None, {"structured_outputs": "so"}, has_added_nulls=has_added_nulls
    )
    row = {"so": {"json": {"type": "object", "const": None}, "regex": None}}
    assert builder.build(0, row).sampling == {"structured_outputs": expected}


MATH_AND_CODE = AdapterConfig(("code", "math"), "adapter", 4)


@pytest.mark.parametrize(
    ("adapters", "row", "expected"),
    [
        (AdapterConfig(), {}, None),
        (AdapterConfig(("math",)), {}, "math"),
        (MATH_AND_CODE, {"adapter": "math"}, "math"),
        (MATH_AND_CODE, {"adapter": None}, None),
    ],
)
def test_a_request_names_the_rows_adapter(adapters: AdapterConfig, row: dict[str, Any], expected: str | None) -> None:
    builder = RequestBuilder(lambda row: ([1], None), 0, {}, adapters=adapters)
    request = builder.build(5, row)
    assert request.adapter == expected
    assert request.sampling == {"seed": derive_row_seed(0, 5)}, "a row's seed does not depend on its adapter"


@pytest.mark.parametrize(
    ("name", "error_type", "message"),
    [
        ("maths", "unknown_adapter", "adapter: there is no adapter 'maths'; did you mean 'math'? adapters: code, math"),
        ("", "unknown_adapter", "adapter: there is no adapter ''; adapters: code, math"),
        (7, "wrong_type", "adapter is an int, not a string"),
        (["math"], "wrong_type", "adapter is a list, not a string"),
    ],
)
def test_a_row_with_another_name_than_an_adapters_fails_alone(name: Any, error_type: str, message: str) -> None:
    builder = RequestBuilder(lambda row: ([1], None), None, {}, adapters=MATH_AND_CODE)
    with pytest.raises(RowRefused) as caught:
        builder.build(0, {"adapter": name})
    assert (caught.value.type, caught.value.message) == (error_type, message)
