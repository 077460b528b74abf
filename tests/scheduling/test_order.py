"""The order of work: every row once, long ones first, those that begin alike together, and a choice that says why."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from dpgen.config.schema import Config, DataConfig, RunConfig, WorkConfig
from dpgen.data.input_rows import InputRows
from dpgen.data.render import make_prompt_text_fn
from dpgen.scheduling.order import RowOrder, order_rows

DOCUMENTS = ["".join(random.Random(seed).choices("abcdefgh ", k=900 + 300 * seed)) for seed in range(20)]
FROM_COLUMN = {"from_columns": {"max_tokens": "budget"}}


def config_of(order: str = "auto", sampling: dict[str, Any] | None = None, **more: Any) -> Config:
    work = {key: more.pop(key) for key in list(more) if key in ("hint_column", "claim_rows")}
    data = DataConfig(path="x", **{"prompt_column": "prompt", **more.pop("data", {})})
    return Config(
        run=RunConfig(dir="x"),
        model="m",
        data=data,
        work=WorkConfig(order=order, **work),
        sampling=sampling or {},
        **more,
    )


def ordered(config: Config, rows: list[dict[str, Any]], todo: list[int] | None = None) -> RowOrder:
    opened = InputRows(datasets.Dataset.from_list(rows))
    which = np.arange(len(rows)) if todo is None else np.array(todo)
    order = order_rows(config, opened, which, make_prompt_text_fn(config.prompt))
    assert sorted(order.rows) == sorted(which), "every row once, and no other"
    return order


def questions(num_each: int, shuffled: bool = True) -> list[dict[str, Any]]:
    rows = [{"prompt": f"{text} Q{n}", "document": d} for d, text in enumerate(DOCUMENTS) for n in range(num_each)]
    if shuffled:
        random.Random(0).shuffle(rows)
    return rows


def test_long_rows_come_first_by_their_own_max_tokens() -> None:
    rows = [{"prompt": "x", "budget": budget} for budget in [5, 900, None, 7, 900, 30]]
    order = ordered(config_of(sampling=FROM_COLUMN), rows)
    assert order.rows.tolist() == [1, 2, 4, 5, 3, 0], "one that says nothing may be as long as any"
    assert order.kind == "longest_first"
    assert order.reason == "by max_tokens (budget): 5 to 900, half of them below 30"


def test_a_hint_column_goes_before_max_tokens() -> None:
    rows = [{"prompt": "x", "budget": 10 - n, "expected": str(n * n)} for n in range(8)]
    order = ordered(config_of(sampling=FROM_COLUMN, hint_column="expected"), rows, todo=[1, 2, 6, 7])
    assert order.rows.tolist() == [7, 6, 2, 1]


def test_budgets_that_are_all_alike_say_nothing() -> None:
    order = ordered(config_of(sampling=FROM_COLUMN), [{"prompt": "x", "budget": 100 + n} for n in range(8)])
    assert (order.kind, order.rows.tolist()) == ("dataset", list(range(8)))
    assert order.reason == "budget differs little from row to row"


def test_prompts_lengths_are_the_last_hint() -> None:
    rows = [{"prompt": chr(97 + n) * n**4} for n in range(20)]
    assert ordered(config_of("longest_first"), rows).rows.tolist() == list(range(19, -1, -1))
    assert ordered(config_of(), rows).kind == "longest_first"
    short = [{"prompt": chr(97 + n) * n * n} for n in range(20)]
    assert ordered(config_of(), short).kind == "dataset", "short prompts cost little in any order"


def test_of_rows_with_the_same_prompt_one_goes_first_and_tells_of_the_others() -> None:
    rows = [{"prompt": f"solve {n % 10}", "document": 0} for n in range(80)]
    order = ordered(config_of(), rows)
    assert (order.kind, order.num_probes) == ("longest_first", 10)
    assert order.rows[:10].tolist() == list(range(10))
    assert order.reason.startswith("10 prompts have several rows each: one of each goes first")
    # Where prompts are long the prefix cache saves more than an order by length; and a hint says more than siblings.
    assert ordered(config_of(), [{"prompt": f"{DOCUMENTS[n % 10]}!"} for n in range(80)]).kind == "prefix"
    hinted = [{"prompt": f"solve {n % 10}", "budget": n * n} for n in range(80)]
    assert ordered(config_of(sampling=FROM_COLUMN), hinted).prompt_groups is None


@pytest.mark.parametrize("shuffled", [True, False])
def test_rows_that_begin_alike_go_together(shuffled: bool) -> None:
    rows = questions(6, shuffled)
    order = ordered(config_of(), rows)
    assert order.kind == "prefix", order.reason
    documents = [rows[row]["document"] for row in order.rows]
    changes = sum(a != b for a, b in itertools.pairwise(documents))
    assert changes == len(DOCUMENTS) - 1, "each document's questions stand together"
    assert "120 of 120 prompts begin as others do, in 20 groups" in order.reason


def test_groups_are_dealt_whole_and_shards_weigh_the_same() -> None:
    rows = questions(6)
    order = ordered(config_of("prefix"), rows)
    split = order.shard(4, max_rows=64)
    assert split.groups is not None
    home: dict[int, int] = {}
    weights = []
    for shard, (row_ids, starts) in enumerate(split.groups):
        for row in row_ids:
            assert home.setdefault(rows[row]["document"], shard) == shard, "a document is one rank's"
        assert starts[0] == 0 and starts[-1] == len(row_ids) and (np.diff(starts) > 0).all()
        assert split.sizes[shard] == len(starts) - 1
        weights.append(sum(len(DOCUMENTS[d]) for d in {rows[row]["document"] for row in row_ids}))
    assert sorted(row for row_ids, _ in split.groups for row in row_ids) == list(range(120))
    assert min(weights) > 0.8 * max(weights)


def test_a_groups_first_row_is_through_before_the_others_come() -> None:
    rows = questions(6)
    split = ordered(config_of("prefix"), rows).shard(1, max_rows=64)
    assert split.groups is not None
    [(row_ids, _)] = split.groups
    places: dict[int, list[int]] = {}
    for place, row in enumerate(row_ids):
        places.setdefault(rows[row]["document"], []).append(place)
    first, *others = sorted(places.values())
    assert first == [0, *range(2, 7)]
    assert all(each[1] - each[0] >= 6 and each[-1] - each[1] == 4 for each in others)


def test_a_group_of_half_a_shard_is_cut() -> None:
    rows = [{"prompt": DOCUMENTS[row == 0] + str(row)} for row in range(100)]
    rows += [{"prompt": f"{n}"} for n in range(900)]
    split = ordered(config_of("prefix"), rows).shard(20, max_rows=64)
    assert split.groups is not None
    with_document = [sum(0 < row < 100 for row in row_ids) for row_ids, _ in split.groups]
    assert max(with_document) <= 50 and sum(with_document) == 99


def test_a_beginning_that_all_rows_share_is_no_group() -> None:
    system = "You are a helpful assistant. " * 40
    rows = [{"prompt": f"{system}{n} {chr(97 + n % 26) * 50}"} for n in range(100)]
    assert ordered(config_of(), rows).kind == "dataset"
    assert ordered(config_of("prefix"), rows).reason == "no prompts begin alike"


def test_below_a_beginning_that_all_share_groups_are_found() -> None:
    rows = [{**row, "prompt": "You are a helpful assistant. " * 40 + row["prompt"]} for row in questions(6)]
    order = ordered(config_of(), rows)
    documents = [rows[row]["document"] for row in order.rows]
    assert sum(a != b for a, b in itertools.pairwise(documents)) == len(DOCUMENTS) - 1


def test_without_a_prefix_cache_there_is_no_order_for_it() -> None:
    assert ordered(config_of(engine={"enable_prefix_caching": False}), questions(6)).kind != "prefix"


@pytest.mark.parametrize(
    ("data", "row_of"),
    [
        ({"prompt_column": None, "template": "{{ text }}?"}, lambda text: {"text": text}),
        (
            {"prompt_column": None, "messages_column": "m", "system_prompt": "be brief"},
            lambda text: {"m": [{"role": "user", "content": text}]},
        ),
        ({"as_chat": True}, lambda text: {"prompt": text}),
    ],
)
def test_prompts_of_every_kind_are_compared(data: dict[str, Any], row_of: Callable[[str], dict[str, Any]]) -> None:
    rows = [row_of(row["prompt"]) for row in questions(6)]
    assert ordered(config_of(data=data), rows).kind == "prefix"


def test_rows_without_a_prompt_are_no_obstacle() -> None:
    rows = [*questions(6), {"prompt": None, "document": -1}, {"prompt": "", "document": -1}]
    assert ordered(config_of(), rows).kind == "prefix"
    assert ordered(config_of("longest_first"), [{"prompt": None}, {"prompt": "abc"}]).rows.tolist() == [1, 0]


def test_a_large_dataset_is_only_looked_at(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}", "budget": n % 50} for n in range(30_000)]
    read: list[int] = []

    class Watched(InputRows):
        def iter_rows(self, row_ids: np.ndarray, columns: Any) -> Any:
            read.append(len(row_ids))
            return super().iter_rows(row_ids, columns)

    config = config_of(sampling=FROM_COLUMN)
    order = order_rows(
        config, Watched(datasets.Dataset.from_list(rows)), np.arange(30_000), make_prompt_text_fn(config.prompt)
    )
    assert order.kind == "longest_first" and len(read) == 1 and read[0] <= 20_000
    assert [rows[row]["budget"] for row in order.rows] == sorted((row["budget"] for row in rows), reverse=True)


def test_a_shard_has_its_share_of_the_longest() -> None:
    order = RowOrder(np.arange(100))
    split = order.shard(7, max_rows=64)
    assert split.groups is None and split.sizes == [15, 15, 14, 14, 14, 14, 14]
