"""Test the order of work: every row once, long rows first, shared prefixes together, and a choice with its reason."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import pytest

from dpgen.config.loader import load_from_args
from dpgen.config.prompt import PromptConfig
from dpgen.config.sections import WorkConfig
from dpgen.data.input_rows import InputRows
from dpgen.data.prompts.render import make_prompt_text_fn
from dpgen.distributed.layout import Layout
from dpgen.scheduling.groups import prefix_groups
from dpgen.scheduling.groups.adapters import AdapterConfig
from dpgen.scheduling.groups.prompt_groups import RankState
from dpgen.scheduling.order import RowOrder, order_by_measured_lengths, order_rows
from dpgen.scheduling.order_config import OrderConfig
from dpgen.scheduling.planner import PlannerConfig

DOCUMENTS = ["".join(random.Random(seed).choices("abcdefgh ", k=900 + 300 * seed)) for seed in range(20)]


def make_config(
    order: str = "auto",
    *,
    hint_column: str | None = None,
    max_tokens_column: str | None = None,
    prompt: PromptConfig | None = None,
    prefix_caching: bool = True,
    adapters: AdapterConfig | None = None,
) -> OrderConfig:
    work = WorkConfig(order=order, hint_column=hint_column)
    prompt = prompt or PromptConfig(prompt_column="prompt")
    return OrderConfig(work, prompt, max_tokens_column, prefix_caching, adapters or AdapterConfig())


def find_order(config: OrderConfig, rows: list[dict[str, Any]], remaining: list[int] | None = None) -> RowOrder:
    row_ids = np.arange(len(rows)) if remaining is None else np.array(remaining)
    input_rows = InputRows(datasets.Dataset.from_list(rows))
    make_text = make_prompt_text_fn(config.prompt)
    order = order_rows(config, input_rows, row_ids, lambda row, columns: make_text(columns))
    assert sorted(order.rows) == sorted(row_ids), "every row once, and no other"
    return order


def make_questions(num_per_document: int, shuffled: bool = True) -> list[dict[str, Any]]:
    rows = [
        {"prompt": f"{text} Q{number}", "document": document}
        for document, text in enumerate(DOCUMENTS)
        for number in range(num_per_document)
    ]
    if shuffled:
        random.Random(0).shuffle(rows)
    return rows


def count_changes(documents: Sequence[Any]) -> int:
    return sum(first != second for first, second in itertools.pairwise(documents))


def test_long_rows_come_first_by_their_own_max_tokens() -> None:
    rows = [{"prompt": "x", "budget": budget} for budget in [5, 900, None, 7, 900, 30]]
    order = find_order(make_config(max_tokens_column="budget"), rows)
    assert order.rows.tolist() == [1, 2, 4, 5, 3, 0], "a row without a value may be as long as any"
    assert order.kind == "longest_first"
    assert order.reason == "by max_tokens from column budget (min 5, median 30, max 900 tokens)"


def test_a_hint_column_takes_precedence_over_max_tokens() -> None:
    rows = [{"prompt": "x", "budget": 10 - n, "expected": str(n * n)} for n in range(8)]
    config = make_config(hint_column="expected", max_tokens_column="budget")
    order = find_order(config, rows, remaining=[1, 2, 6, 7])
    assert order.rows.tolist() == [7, 6, 2, 1]
    assert order.reason == "by hint column expected (min 1, median 20, max 49)"


def test_a_limit_that_stands_for_none_is_no_expected_length() -> None:
    rows = [{"prompt": "x", "budget": 2**31 - 1 if n == 3 else 10 * n + 1} for n in range(8)]
    order = find_order(make_config(max_tokens_column="budget"), rows)
    assert order.rows[0] == 3 and order.lengths is not None and order.lengths.max() < 1e8


def test_hints_that_hardly_vary_are_ignored() -> None:
    config = make_config(max_tokens_column="budget")
    order = find_order(config, [{"prompt": "x", "budget": 100 + n} for n in range(8)])
    assert (order.kind, order.rows.tolist()) == ("dataset", list(range(8)))
    assert order.reason == "because column budget varies too little to sort by"


def test_prompt_length_is_the_last_hint() -> None:
    rows = [{"prompt": chr(97 + n) * n**4} for n in range(20)]
    assert find_order(make_config("longest_first"), rows).rows.tolist() == list(range(19, -1, -1))
    assert find_order(make_config(), rows).kind == "longest_first"
    short_prompts = [{"prompt": chr(97 + n) * n * n} for n in range(20)]
    assert find_order(make_config(), short_prompts).kind == "dataset", "short prompts cost little in any order"


def test_one_row_of_each_prompt_group_goes_first_as_a_probe() -> None:
    rows = [{"prompt": f"solve {n % 10}", "document": 0} for n in range(80)]
    order = find_order(make_config(), rows)
    assert (order.kind, order.num_probes) == ("longest_first", 10)
    assert order.rows[:10].tolist() == list(range(10))
    assert order.reason == "by measured length (10 probe rows first, one of each unmeasured prompt group)"


def test_a_prefix_cache_or_a_hint_is_worth_more_than_probes() -> None:
    long_prompts = [{"prompt": f"{DOCUMENTS[n % 10]}!"} for n in range(80)]
    assert find_order(make_config(), long_prompts).kind == "prefix"
    with_hints = [{"prompt": f"solve {n % 10}", "budget": n * n} for n in range(80)]
    assert find_order(make_config(max_tokens_column="budget"), with_hints).prompt_groups is None


@pytest.mark.parametrize("shuffled", [True, False])
def test_rows_that_share_a_prefix_stand_together(shuffled: bool) -> None:
    rows = make_questions(6, shuffled)
    order = find_order(make_config(), rows)
    assert order.kind == "prefix", order.reason
    documents = [rows[row]["document"] for row in order.rows]
    assert count_changes(documents) == len(DOCUMENTS) - 1, "each document's questions stand together"
    assert "(120 of 120 prompts share a prefix in 20 groups, " in order.reason


def test_a_description_is_one_line_without_semicolons() -> None:
    assert RowOrder(np.arange(2)).description == "dataset order"
    order = find_order(make_config("longest_first"), [{"prompt": "abc"}, {"prompt": "a"}])
    assert order.description == "longest first by prompt length (min 1, median 2, max 3 characters)"
    assert str(order) == f"order of work: {order.description}"
    order = find_order(make_config(), make_questions(6))
    assert order.description.startswith("grouped by prefix (120 of 120 prompts"), "kind and reason read as one phrase"


def test_prefix_groups_stay_whole_and_shards_weigh_the_same() -> None:
    rows = make_questions(6)
    shards = find_order(make_config("prefix"), rows).shard(4, max_rows=64)
    assert shards.groups is not None
    shard_of_document: dict[int, int] = {}
    weights = []
    for shard, (row_ids, chunk_starts) in enumerate(shards.groups):
        for row in row_ids:
            document = rows[row]["document"]
            assert shard_of_document.setdefault(document, shard) == shard, "one rank has all rows of a document"
        assert chunk_starts[0] == 0 and chunk_starts[-1] == len(row_ids) and (np.diff(chunk_starts) > 0).all()
        assert shards.sizes[shard] == len(chunk_starts) - 1
        weights.append(sum(len(DOCUMENTS[document]) for document in {rows[row]["document"] for row in row_ids}))
    assert sorted(row for row_ids, _ in shards.groups for row in row_ids) == list(range(120))
    assert min(weights) > 0.8 * max(weights)


def test_a_groups_first_row_is_computed_before_the_others_start() -> None:
    rows = make_questions(6)
    shards = find_order(make_config("prefix"), rows).shard(1, max_rows=64)
    assert shards.groups is not None
    [(row_ids, _)] = shards.groups
    positions_of_document: dict[int, list[int]] = {}
    for position, row in enumerate(row_ids):
        positions_of_document.setdefault(rows[row]["document"], []).append(position)
    first, *others = sorted(positions_of_document.values())
    assert first == [0, *range(2, 7)]
    for positions in others:
        assert positions[1] - positions[0] >= 6, "the first row stands in the group before"
        assert positions[-1] - positions[1] == 4, "the others stand together"


def test_a_group_of_more_than_half_a_shard_is_split() -> None:
    rows = [{"prompt": DOCUMENTS[row == 0] + str(row)} for row in range(100)]
    rows += [{"prompt": f"{n}"} for n in range(900)]
    shards = find_order(make_config("prefix"), rows).shard(20, max_rows=64)
    assert shards.groups is not None
    num_grouped = [sum(0 < row < 100 for row in row_ids) for row_ids, _ in shards.groups]
    assert max(num_grouped) <= 50 and sum(num_grouped) == 99


def test_a_prefix_that_all_rows_share_makes_no_group() -> None:
    system = "You are a helpful assistant. " * 40
    rows = [{"prompt": f"{system}{n} {chr(97 + n % 26) * 50}"} for n in range(100)]
    assert find_order(make_config(), rows).kind == "dataset"
    assert find_order(make_config("prefix"), rows).reason == "because no prompts share a prefix"


def test_groups_are_found_behind_a_prefix_that_all_rows_share() -> None:
    rows = [{**row, "prompt": "You are a helpful assistant. " * 40 + row["prompt"]} for row in make_questions(6)]
    order = find_order(make_config(), rows)
    assert count_changes([rows[row]["document"] for row in order.rows]) == len(DOCUMENTS) - 1


def test_without_a_prefix_cache_rows_are_not_grouped_by_prefix() -> None:
    assert find_order(make_config(prefix_caching=False), make_questions(6)).kind != "prefix"


@pytest.mark.parametrize(
    ("prompt", "make_row"),
    [
        (PromptConfig(template="{{ text }}?"), lambda text: {"text": text}),
        (
            PromptConfig(messages_column="m", system_prompt="be brief"),
            lambda text: {"m": [{"role": "user", "content": text}]},
        ),
        (PromptConfig(prompt_column="prompt", as_chat=True), lambda text: {"prompt": text}),
    ],
)
def test_prompts_of_every_kind_are_compared(prompt: PromptConfig, make_row: Callable[[str], dict[str, Any]]) -> None:
    rows = [make_row(row["prompt"]) for row in make_questions(6)]
    assert find_order(make_config(prompt=prompt), rows).kind == "prefix"


def test_rows_without_a_prompt_are_ordered_too() -> None:
    rows = [*make_questions(6), {"prompt": None, "document": -1}, {"prompt": "", "document": -1}]
    assert find_order(make_config(), rows).kind == "prefix"
    assert find_order(make_config("longest_first"), [{"prompt": None}, {"prompt": "abc"}]).rows.tolist() == [1, 0]


def test_only_a_sample_of_a_large_dataset_is_read() -> None:
    rows = [{"prompt": f"{n}", "budget": n % 50} for n in range(30_000)]
    num_read: list[int] = []

    class RecordingRows(InputRows):
        def iter_rows(self, row_ids: np.ndarray, columns: Any) -> Any:
            num_read.append(len(row_ids))
            return super().iter_rows(row_ids, columns)

    config = make_config(max_tokens_column="budget")
    input_rows = RecordingRows(datasets.Dataset.from_list(rows))
    make_text = make_prompt_text_fn(config.prompt)
    order = order_rows(config, input_rows, np.arange(30_000), lambda row, columns: make_text(columns))
    assert order.kind == "longest_first" and len(num_read) == 1 and num_read[0] <= 20_000
    assert [rows[row]["budget"] for row in order.rows] == sorted((row["budget"] for row in rows), reverse=True)


def test_every_shard_has_its_part_of_the_longest_rows() -> None:
    shards = RowOrder(np.arange(100)).shard(7, max_rows=64)
    assert shards.groups is None and shards.sizes == [15, 15, 14, 14, 14, 14, 14]


def test_rows_that_are_put_last_leave_the_others_in_their_order_and_groups() -> None:
    order = RowOrder(
        np.array([7, 3, 5, 1, 9, 2]), "prefix", groups=np.array([0, 3]), weights=np.arange(6.0), num_probes=3
    ).put_last({3, 1, 8})
    assert order.rows.tolist() == [7, 5, 9, 2, 3, 1]
    assert order.groups is not None and order.groups.tolist() == [0, 2, 4, 5]
    assert order.weights is not None and order.weights.tolist() == [0, 2, 4, 5, 1, 3]
    assert order.num_probes == 2


@pytest.mark.parametrize(("num_probes", "num_probes_after"), [(0, 0), (2, 5)])
def test_rows_that_are_put_first_come_before_the_probes_and_are_waited_for_with_them(
    num_probes: int, num_probes_after: int
) -> None:
    order = RowOrder(np.array([7, 3, 5, 1, 9, 2]), "longest_first", num_probes=num_probes).spread_first()
    assert order.rows.tolist() == [2, 9, 5, 7, 3, 1]
    assert (order.num_spread, order.num_probes) == (3, num_probes_after)


def test_rows_that_remain_keep_their_order_and_groups_unless_the_order_lacks_one_of_them() -> None:
    order = RowOrder(np.array([7, 3, 5, 1, 9, 2]), "prefix", "why", groups=np.array([0, 3]), weights=np.arange(6.0))
    is_remaining = np.zeros(10, np.bool_)
    is_remaining[[3, 9, 2]] = True
    selected = order.select(is_remaining)
    assert selected is not None and selected.rows.tolist() == [3, 9, 2]
    assert (selected.kind, selected.reason) == ("prefix", "(as in the first plan)")
    assert selected.groups is not None and selected.groups.tolist() == [0, 1]
    assert selected.weights is not None and selected.weights.tolist() == [1, 4, 5]
    is_remaining[8] = True
    assert order.select(is_remaining) is None


def test_rows_that_are_appended_are_groups_of_their_own_and_of_mean_weight() -> None:
    rows = np.array([8, 6])
    order = RowOrder(np.array([7, 3, 5, 1]), "prefix", groups=np.array([0, 3]), weights=np.arange(4.0)).append(rows)
    assert order.rows.tolist() == [7, 3, 5, 1, 8, 6] and order.num_probes == order.num_spread == 0
    assert order.groups is not None and order.groups.tolist() == [0, 3, 4, 5]
    assert order.weights is not None and order.weights.tolist() == [0, 1, 2, 3, 1.5, 1.5]
    order = RowOrder(np.array([7, 3])).append(rows)
    assert order.rows.tolist() == [7, 3, 8, 6] and order.groups is None and order.weights is None


@pytest.mark.parametrize("num_shards", [1, 3, 16])
def test_a_million_small_groups_are_shared_out_evenly_without_a_step_for_each(
    monkeypatch: pytest.MonkeyPatch, num_shards: int
) -> None:
    monkeypatch.setattr("dpgen.scheduling.groups.prefix_groups._MAX_BALANCED_GROUPS", 64)
    num_rows = 6_000
    groups = np.arange(0, num_rows, 3)
    weights = np.random.default_rng(0).lognormal(5, 1, num_rows)
    spec = RowOrder(np.arange(num_rows), "prefix", "", groups, weights).shard(num_shards, 64)
    assert spec.groups is not None
    assert sorted(np.concatenate([rows for rows, _ in spec.groups])) == list(range(num_rows))
    loads = [weights[rows].sum() for rows, _ in spec.groups]
    assert max(loads) < 1.05 * min(loads)


@pytest.mark.parametrize("order", ["auto", "prefix", "longest_first"])
def test_the_line_about_the_order_counts_no_text_where_no_prompt_can_be_made(order: str) -> None:
    rows: list[dict[str, Any]] = [{"prompt": None, "other": "x"} for _ in range(20)]
    line = str(find_order(make_config(order), rows))
    assert "%" not in line and "min 0" not in line, line


def test_rows_without_a_prompt_are_no_prompts_of_length_0() -> None:
    rows: list[dict[str, Any]] = [{"prompt": "x" * 7}, {"prompt": None}, {"prompt": "y" * 5}]
    order = find_order(make_config("longest_first"), rows)
    assert str(order).endswith("by prompt length (min 5, median 6, max 7 characters), 1 row without a prompt last")
    assert order.rows.tolist() == [0, 2, 1]
    order = find_order(make_config("longest_first"), [*rows[1:2] * 2, rows[0]])
    assert str(order).endswith("(min 7, median 7, max 7 characters), 2 rows without a prompt last")
    order = find_order(make_config("longest_first"), [rows[0], *rows[1:2] * 3, rows[2]])
    assert str(order).endswith("5, median 6, max 7 characters), 3 rows without a prompt last")
    order = find_order(make_config("longest_first"), [rows[1]] * 2)
    assert str(order).endswith("by prompt length (no row has one)")


def test_a_hint_column_without_a_number_has_no_range() -> None:
    order = find_order(make_config("longest_first", hint_column="hint"), [{"prompt": "x", "hint": "a"}] * 3)
    assert str(order) == "order of work: longest first by hint column hint (no row has one)"
    order = find_order(make_config(hint_column="hint"), [{"prompt": "x", "hint": "a"}] * 3)
    assert str(order) == "order of work: dataset order because column hint holds no number"


TWO_SLOTS = AdapterConfig(("a", "b", "c"), "adapter", num_slots=2)


def make_rows_with_adapters(num_rows: int) -> list[dict[str, Any]]:
    names = ["b", "a", None, "c"]
    return [
        {"prompt": f"question {row}", "adapter": names[row % 4], "budget": (row * 7) % 40} for row in range(num_rows)
    ]


def test_rows_of_one_adapter_run_together_where_slots_are_few() -> None:
    rows = make_rows_with_adapters(40)
    order = find_order(make_config(adapters=TWO_SLOTS), rows)
    assert [rows[row]["adapter"] for row in order.rows] == ["b"] * 10 + ["a"] * 10 + [None] * 10 + ["c"] * 10
    assert all(list(part) == sorted(part) for part in np.split(order.rows, 4)), "in their own order"
    assert order.description.startswith("dataset order because ")
    assert order.description.endswith(", one adapter after the other (3 adapters, 2 slots)")
    remaining = np.ones(40, dtype=bool)
    remaining[order.rows[:5]] = False
    later = order.select(remaining)
    assert later is not None and later.rows.tolist() == order.rows[5:].tolist()
    assert "(as in the first plan), one adapter after the other" in later.description


def test_long_rows_of_an_adapter_come_first_among_its_rows() -> None:
    rows = make_rows_with_adapters(40)
    order = find_order(make_config("longest_first", hint_column="budget", adapters=TWO_SLOTS), rows)
    parts = np.split(order.rows, 4)
    assert len({rows[part[0]]["adapter"] for part in parts}) == 4
    assert count_changes([rows[row]["adapter"] for row in order.rows]) == 3
    for part in parts:
        budgets = [rows[row]["budget"] for row in part]
        assert budgets == sorted(budgets, reverse=True)
    assert rows[order.rows[0]]["budget"] == 39, "the adapter of the longest row comes first"


def test_every_rank_gets_its_part_of_each_adapters_rows() -> None:
    rows = make_rows_with_adapters(400)
    order = find_order(make_config(adapters=TWO_SLOTS), rows)
    shards = [[rows[row]["adapter"] for row in order.rows[shard::4]] for shard in range(4)]
    assert all(shard.count(name) == 25 for shard in shards for name in ("a", "b", "c", None))


@pytest.mark.parametrize("order", ["auto", "dataset"])
def test_adapters_change_no_order_with_enough_slots_or_in_dataset_order(order: str) -> None:
    num_slots = 3 if order == "auto" else 1
    config = make_config(order, adapters=AdapterConfig(("a", "b", "c"), "adapter", num_slots))
    found = find_order(config, make_rows_with_adapters(40))
    assert found.rows.tolist() == list(range(40)) and "adapter" not in found.description


def test_prompts_of_different_adapters_share_no_prefix() -> None:
    rows = [{"prompt": DOCUMENTS[row // 2 % 10], "adapter": "ab"[row % 2]} for row in range(20)]
    config = make_config("prefix", adapters=AdapterConfig(("a", "b"), "adapter", 2))
    assert find_order(config, rows).reason == "because no prompts share a prefix"
    assert find_order(make_config("prefix"), rows).kind == "prefix"


def test_prefix_groups_stay_whole_and_one_adapters_groups_run_together() -> None:
    rows = [{**question, "adapter": "abc"[question["document"] % 3]} for question in make_questions(6)]
    order = find_order(make_config(adapters=TWO_SLOTS), rows)
    assert order.kind == "prefix" and order.groups is not None
    assert len(order.groups) == len(DOCUMENTS)
    assert count_changes([rows[row]["document"] for row in order.rows]) == len(DOCUMENTS) - 1
    assert count_changes([rows[row]["adapter"] for row in order.rows]) == 2
    shards = order.shard(2, max_rows=8)
    assert shards.groups is not None
    for shard, _ in shards.groups:
        adapters = [rows[row]["adapter"] for row in shard]
        assert {*adapters} == {"a", "b", "c"}
        assert count_changes(adapters) <= 2 + 4, "but for heads that are computed early"


def test_probes_stay_first_and_a_reshard_keeps_adapters_together() -> None:
    rows = [{"prompt": f"solve {row % 10}", "adapter": "abc"[row % 10 % 3]} for row in range(80)]
    order = find_order(make_config(adapters=TWO_SLOTS), rows)
    assert order.num_probes == 10 and order.prompt_groups is not None
    assert sorted(order.rows[:10]) == list(range(10))
    for part in (order.rows[:10], order.rows[10:]):
        assert count_changes([rows[row]["adapter"] for row in part]) == 2
    state = RankState(np.arange(10), np.arange(10) + 1)
    remaining = np.arange(10, 80)
    later = order_by_measured_lengths(
        remaining, order.prompt_groups, order.prompt_groups.count(state), order.adapter_groups
    )
    assert count_changes([rows[row]["adapter"] for row in later.rows]) == 2
    assert later.rows[0] % 10 == 9, "the longest prompt's adapter comes first"


def test_the_first_rows_of_a_mixed_order_stand_for_all_rows() -> None:
    rows = [{"prompt": "x", "budget": budget} for budget in range(1000)]
    config = dataclasses.replace(make_config(max_tokens_column="budget", order="longest_first"), is_mixed=True)
    order = find_order(config, rows)
    for num_first in (10, 64, 300):
        assert abs(order.rows[:num_first].mean() - 500) < 60
    assert order.description.startswith("mixed lengths (spread over longest first by max_tokens")


@pytest.mark.parametrize("num_shards", [1, 2, 3, 8])
def test_every_batch_of_rows_that_are_only_read_has_texts_of_all_lengths(num_shards: int) -> None:
    rows = [{"prompt": "x" * (1 + (row // 50) ** 2)} for row in range(2048)]
    lengths = np.array([len(row["prompt"]) for row in rows])
    order = find_order(dataclasses.replace(make_config(), reads_only=True, num_shards=num_shards), rows)
    assert order.description.startswith("mixed lengths (spread over longest first by prompt length (min 1, ")
    assert sorted(order.rows) == list(range(2048)), "each row once"
    assert (lengths[order.rows[-128:]] == np.sort(lengths)[:128][::-1]).all(), "the shortest come last"
    spec = order.shard(num_shards, 64)
    for shard in range(num_shards):
        mixed = lengths[spec.take(order.rows, shard)][: 1920 // num_shards]
        batches = [mixed[start : start + 64].mean() for start in range(0, len(mixed) - 63, 64)]
        assert max(batches) < 1.3 * min(batches)


@pytest.mark.parametrize("num_lost", [0, 1, 3, 7])
def test_on_any_number_of_ranks_any_batch_of_a_mixed_order_is_spread_over_all_rows(num_lost: int) -> None:
    for num_ranks in (8, 16, 69, 138, 268, 511, 512, *range(20, 512, 16)):
        num_left = num_ranks - num_lost
        order = RowOrder(np.arange(num_left * 4 * 64), "longest_first").mix(num_ranks)
        spec = order.shard(num_left, 64)
        shards = np.array([spec.take(order.rows, shard) for shard in range(num_left)])
        batches = shards.reshape(num_left, 4, 64).mean(axis=2) / order.rows.size
        assert abs(batches - 0.5).max() < (0.07 if num_lost else 0.02), num_ranks


def test_a_run_mixes_its_rows_for_as_many_shards_as_it_has_engines() -> None:
    config = load_from_args(["data.path=x.jsonl", "model=m", "task=embed", "data.prompt_column=text", "run.dir=r"])
    planner_config = PlannerConfig.from_config(config, ["text"], Layout(num_engines=69, group_size=2), 0)
    rows = [{"text": "x" * (1 + row)} for row in range(69 * 64)]
    order = find_order(planner_config.order, rows)
    shard = order.shard(69, 64).take(order.rows, 5)[:60]
    assert abs(shard.mean() / len(rows) - 0.53) < 0.02, "of the fifteen sixteenths that don't come last"


def test_prompts_that_are_only_read_are_measured_and_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing takes more than half of the time, and all samples of a prompt are read alike."""
    compared: list[str] = []
    monkeypatch.setattr(prefix_groups, "_hash", lambda text, value: compared.append(text) or 0)
    rows = [{"prompt": "x" * (1 + row % 7) if row else None} for row in range(64)]
    order = find_order(dataclasses.replace(make_config("longest_first"), reads_only=True), rows)
    lengths = [len(rows[row]["prompt"] or "") for row in order.rows]
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] == 0
    assert order.description.endswith("(min 1, median 4, max 7 characters), 1 row without a prompt last")
    assert not compared


def test_the_order_of_rows_that_are_only_read_can_be_chosen() -> None:
    rows = [{"prompt": "x" * length} for length in (3, 1, 2)]
    for order, expected in (("longest_first", [0, 2, 1]), ("dataset", [0, 1, 2])):
        assert find_order(dataclasses.replace(make_config(order), reads_only=True), rows).rows.tolist() == expected


def test_rows_with_the_same_prefix_stay_together_in_a_mixed_order() -> None:
    rows = make_questions(5)
    order = find_order(dataclasses.replace(make_config("prefix"), is_mixed=True), rows)
    assert count_changes([rows[row]["document"] for row in order.rows]) == len(DOCUMENTS) - 1


def count_hits(order: RowOrder, num_shards: int, group_rows: int) -> float:
    """Return the share of rows whose group has an earlier row in the same shard, at most 512 rows before."""
    num_hits, spec = 0, order.shard(num_shards, 32)
    for shard in range(num_shards):
        seen: dict[int, int] = {}
        for place, row in enumerate(spec.list_rows(order.rows, shard).tolist()):
            num_hits += place - seen.get(row // group_rows, -512) < 512
            seen[row // group_rows] = place
    return num_hits / len(order.rows)


@pytest.mark.parametrize("num_shards", [1, 8])
@pytest.mark.parametrize("kind", ["prefix", "dataset"])
def test_in_a_mixed_order_as_many_rows_find_their_prefix_as_in_a_run(kind: str, num_shards: int) -> None:
    rows, group_rows = np.arange(40_000), 8 if kind == "prefix" else 8 * num_shards
    order = RowOrder(rows)
    if kind == "prefix":
        order = RowOrder(rows, "prefix", "", rows[::group_rows], np.ones(len(rows)))
    mixed = order.mix(num_shards)
    assert sorted(mixed.rows) == rows.tolist()
    assert count_hits(order, num_shards, group_rows) == 0.875
    assert count_hits(mixed, num_shards, group_rows) > 0.86
    spec = mixed.shard(num_shards, 32)
    for shard in range(num_shards):
        first = spec.list_rows(mixed.rows, shard)[:2048]
        assert abs(first.mean() / len(rows) - 0.5) < 0.1, "the first rows stand for all"


def test_rows_of_programs_are_mixed_in_a_trial() -> None:
    rows = [{"hint": 1000 - row} for row in range(1000)]
    prompt = PromptConfig(call_column="call")
    for hint in (None, "hint"):
        config = make_config(hint_column=hint, prompt=prompt)
        assert find_order(config, rows).rows[:3].tolist() == [0, 1, 2]
        mixed = find_order(dataclasses.replace(config, is_mixed=True), rows)
        assert abs(mixed.rows[:100].mean() - 500) < 60
