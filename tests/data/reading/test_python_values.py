"""A row's values are whole in Python, and one that Python can't hold costs no other row its type."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers.dataset_files import make_rows, make_run

from dpgen.config.prompt import PromptConfig
from dpgen.data.prompts.render import PromptRenderer
from dpgen.data.reading.python_values import to_python_values
from dpgen.output.verification import verify
from dpgen.records import Completion, RowResult

DAY = datetime.date(2024, 2, 29)
DAYS = (DAY - datetime.date(1970, 1, 1)).days
BEFORE_YEAR_1 = pa.array([DAYS, -1_000_000, None], pa.int32()).cast(pa.date32())


@pytest.mark.parametrize(
    ("array", "values"),
    [
        (BEFORE_YEAR_1, [DAY, "-0768-02-04", None]),
        (pa.chunked_array([BEFORE_YEAR_1[:1], BEFORE_YEAR_1[1:]]), [DAY, "-0768-02-04", None]),
        (pa.array([-62135596800001], pa.timestamp("ms")), ["0000-12-31 23:59:59.999"]),
        (pa.ListArray.from_arrays([0, 1, 3], BEFORE_YEAR_1), [[DAY], ["-0768-02-04", None]]),
        (pa.StructArray.from_arrays([BEFORE_YEAR_1], ["x"]), [{"x": DAY}, {"x": "-0768-02-04"}, {"x": None}]),
        (pa.array([1], pa.time64("ns")), ["00:00:00.000000001"]),
        (pa.array([[1]], pa.list_(pa.time64("ns"), 1)), [["00:00:00.000000001"]]),
        (pa.array([1], pa.time64("us")), [datetime.time(0, 0, 0, 1)]),
    ],
)
def test_no_value_is_cut_off_and_none_is_lost(array: Any, values: list[Any]) -> None:
    assert to_python_values(array) == values


def test_a_date_beyond_pythons_is_rendered(tmp_path: Path) -> None:
    table = pa.table({"day": BEFORE_YEAR_1[:2]})
    renderer = PromptRenderer(PromptConfig(template="{{ day }}"), None)
    prompts = [renderer.build_prompt(row) for row in make_rows(table).iter_rows(np.arange(2), ["day"])]
    assert prompts == ["2024-02-29", "-0768-02-04"]
    results = [RowResult(row, 1, (Completion("x", "stop", 1),)) for row in range(2)]
    assert verify(make_run(tmp_path, table, results).path).verdict == "sound"
