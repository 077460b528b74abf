"""A row's own sampling parameters are those of the input, without what its file format added to them."""

from __future__ import annotations

from typing import Any

import pytest

from dpgen.scheduling.request_source import RequestBuilder


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
