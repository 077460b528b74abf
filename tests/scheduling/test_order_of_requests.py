"""The order of work of a batch file: by what its lines say of themselves."""

from __future__ import annotations

import json
from typing import Any

import datasets
import numpy as np

from dpgen.config.prompt import PromptConfig
from dpgen.config.sections import WorkConfig
from dpgen.data.input_rows import InputRows
from dpgen.data.prompts.render import make_prompt_text_fn
from dpgen.scheduling.groups.adapters import AdapterConfig
from dpgen.scheduling.order import RowOrder, order_rows
from dpgen.scheduling.order_config import OrderConfig


def find_order(bodies: list[dict[str, Any] | None], **adapters: Any) -> RowOrder:
    """Return the order of lines with these bodies; None is a malformed line."""
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions"}
    texts = ["{" if body is None else json.dumps({**line, "body": {"prompt": "a", **body}}) for body in bodies]
    rows = InputRows(datasets.Dataset.from_dict({"request": texts}))
    prompt = PromptConfig(request_column="request")
    config = OrderConfig(
        WorkConfig(), prompt, "request", prefix_caching=True, adapters=AdapterConfig(**adapters, model_names=("m",))
    )
    make_text = make_prompt_text_fn(prompt)
    return order_rows(config, rows, np.arange(len(texts)), lambda row, columns: make_text(columns))


def test_requests_that_may_be_long_come_first() -> None:
    order = find_order([{"max_tokens": limit} for limit in (5, 900, 7, 300, 5, 5)] + [None])
    assert order.kind == "longest_first" and list(order.rows[:4]) == [1, 6, 3, 2]
    assert order.reason.startswith("by max_tokens from column request (min 5"), "a line that says nothing may be long"


def test_lines_that_say_nothing_of_their_length_are_ordered_as_other_rows() -> None:
    order = find_order([None, None, None])
    assert "max_tokens" not in order.reason and list(order.rows) == [0, 1, 2]


def test_lines_of_one_adapter_stay_together_where_engines_hold_few() -> None:
    names = ["x", "m", "y", "x", "z", "y", None, "unknown"]
    bodies: list[dict[str, Any] | None] = [{"model": name, "prompt": name or "-"} for name in names]
    order = find_order(bodies, names=("x", "y", "z"), column="request", num_slots=2)
    models = [names[row] for row in order.rows]
    assert models == ["x", "x", "m", None, "unknown", "y", "y", "z"], "a row that will be rejected needs none"
