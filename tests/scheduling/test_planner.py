"""Plans of one rank: they cover the rows that no journal holds and no rank has begun, with new cursors each time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from helpers.rank_threads import ThreadGroup, run_ranks

from dpgen.config.prompt import PromptConfig
from dpgen.config.sections import WorkConfig
from dpgen.data.input_rows import InputRows
from dpgen.distributed.group import InMemoryStore, PeerLost, SingleRankGroup
from dpgen.errors import NoEngineLeft
from dpgen.journal.engine_notes import BlameState, EngineNote, write_engine_note
from dpgen.journal.row_notes import RENDERING, open_note
from dpgen.journal.writer import JournalWriter
from dpgen.records import Completion, Request, RowError, RowResult
from dpgen.scheduling.groups.prompt_groups import RankState
from dpgen.scheduling.order_config import OrderConfig
from dpgen.scheduling.planner import PlannerConfig, ShardPlanner
from dpgen.scheduling.request_builder import RequestBuilder
from dpgen.scheduling.request_source import RequestSource

NUM_ROWS = 20


def make_planner(
    journal_dir: Path, group: SingleRankGroup, retry_errors: bool | list[str] = False, claims_rows: bool = True
) -> ShardPlanner:
    columns = {"prompt": [f"row number {row}" for row in range(NUM_ROWS)], "budget": [None, 5] * (NUM_ROWS // 2)}
    rows = InputRows(datasets.Dataset.from_dict(columns))
    order = OrderConfig(WorkConfig(), PromptConfig(prompt_column="prompt"), None, prefix_caching=True)
    config = PlannerConfig(
        order, retry_errors, ("budget", "prompt"), lockstep=False, claims_rows=claims_rows, attempt=3
    )
    builder = RequestBuilder(lambda row: (None, row["prompt"]), None, {"max_tokens": "budget"}, [{"max_tokens": 2}])
    return ShardPlanner(config, rows, journal_dir, group, builder)


class RecordingRows(InputRows):
    """Count how often prompts are read to order rows, also by copies."""

    def __init__(self, dataset: datasets.Dataset) -> None:
        super().__init__(dataset)
        self._reads: list[int] = []

    @property
    def num_reads(self) -> int:
        return len(self._reads)

    def iter_rows(self, row_ids: np.ndarray, columns: Any) -> Any:
        self._reads.append(len(row_ids))
        return super().iter_rows(row_ids, columns)


def add_peer(value: Any, state: list[Any]) -> list[Any]:
    """Return what is gathered with a peer in this state, which knows of no death and no slow row."""
    if isinstance(value, list):
        return [value, state if len(value) == len(state) else []]
    return [value, value if isinstance(value, str) else None]


class ShrinkingGroup(SingleRankGroup):
    """Shrink when a test says so, and let it change what the other ranks are said to have gathered."""

    num_shrinks = 0  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.change_gathered: Callable[[Any], list[Any]] = lambda value: [value]

    def all_gather_object(self, value: Any) -> list[Any]:
        return self.change_gathered(value)


def make_ordering_planner(
    journal_dir: Path, group: SingleRankGroup, order: str, prompts: list[str], template: str = "{{ prompt }}"
) -> tuple[ShardPlanner, RecordingRows]:
    rows = RecordingRows(datasets.Dataset.from_dict({"prompt": prompts}))
    order_config = OrderConfig(WorkConfig(order=order), PromptConfig(template=template), None, True)
    config = PlannerConfig(
        order_config, False, ("prompt",), lockstep=False, claims_rows=True, attempt=1, render_timeout_s=0.2
    )
    builder = RequestBuilder(lambda row: (None, row["prompt"]), None, {})
    return ShardPlanner(config, rows, journal_dir, group, builder), rows


def write_journal(journal_dir: Path, succeeded: list[int], failed: dict[int, str], rank: int = 0) -> None:
    journal_dir.mkdir(parents=True, exist_ok=True)
    journal = JournalWriter(journal_dir, 1, rank)
    for row in succeeded:
        journal.append(RowResult(row, 1, (Completion("text", "stop", 1),)))
    for row, error_type in failed.items():
        journal.append(RowResult(row, error=RowError(error_type, "reason")))
    journal.close()


def take_requests(source: RequestSource) -> list[Request]:
    requests = []
    while (request := source.next_request()) is not None:
        assert isinstance(request, Request)
        requests.append(request)
    return requests


def take_rows(source: RequestSource) -> list[int]:
    return sorted(request.row for request in take_requests(source))


@pytest.mark.parametrize(
    ("retry_errors", "retried"),
    [(False, []), (True, [4, 5]), (["poison_row"], [5]), (["wrong_type", "poison_row"], [4, 5])],
)
def test_a_plan_covers_the_rows_that_no_journal_holds_and_failed_ones_to_retry(
    tmp_path: Path, retry_errors: bool | list[str], retried: list[int]
) -> None:
    write_journal(tmp_path, [0, 1, 2], {4: "wrong_type", 5: "poison_row"})
    planner = make_planner(tmp_path, SingleRankGroup(), retry_errors)
    rows = take_rows(planner.plan())
    assert rows == sorted(set(range(NUM_ROWS)) - {0, 1, 2, 4, 5} | set(retried))
    assert planner.num_remaining_rows == len(rows)


def test_rows_that_lost_ranks_have_finished_count_as_done(tmp_path: Path) -> None:
    group = ShrinkingGroup()
    write_journal(tmp_path, [0, 1], {})
    planner = make_planner(tmp_path, group)
    planner.plan()
    assert planner.num_inherited_rows == 0, "rows of an earlier attempt were done before this one"
    # This rank has finished row 2 and runs row 3; the lost rank has finished rows 2 to 5.
    write_journal(tmp_path, [2, 3, 4, 5], {}, rank=1)
    group.num_shrinks += 1
    planner.plan(RankState(finished=np.array([2]), running=np.array([3])))
    assert planner.num_inherited_rows == 2
    planner.plan(RankState(finished=np.array([2]), running=np.array([], dtype=np.int64)))
    assert planner.num_inherited_rows == 3, "row 3 was taken from this rank's engine"


def test_a_plan_knows_if_a_row_of_the_run_has_succeeded_before(tmp_path: Path) -> None:
    group = ShrinkingGroup()
    planner = make_planner(tmp_path, group)
    planner.plan()
    assert not planner.has_completions
    write_journal(tmp_path, [], {4: "wrong_type"})
    group.num_shrinks += 1
    planner.plan()
    assert not planner.has_completions
    write_journal(tmp_path, [5], {}, rank=1)
    group.num_shrinks += 1
    planner.plan()
    assert planner.has_completions
    request = planner.build_succeeded_request()
    assert request is not None and request.row == planner.succeeded_row == 5


def test_all_ranks_know_a_row_that_succeeded_although_one_of_them_reads_the_journal(tmp_path: Path) -> None:
    group = ShrinkingGroup()
    planner = make_planner(tmp_path, group)
    assert planner.build_succeeded_request() is None
    group.change_gathered = lambda value: add_peer(value, [False, "", 0, True, [], 7])
    planner.plan()
    assert planner.succeeded_row == 7


def test_another_node_may_hold_the_rows_that_have_succeeded(tmp_path: Path) -> None:
    group = ShrinkingGroup()
    group.change_gathered = lambda value: add_peer(value, [False, "", 0, True, [], None])
    planner = make_planner(tmp_path, group)
    planner.plan()
    assert planner.has_completions


def test_a_run_without_any_success_starts_over(tmp_path: Path) -> None:
    write_journal(tmp_path, [], {4: "wrong_type"})
    assert take_rows(make_planner(tmp_path, SingleRankGroup()).plan()) == list(range(NUM_ROWS))


def test_a_reshard_leaves_out_rows_that_are_finished_or_running_and_has_new_cursors(tmp_path: Path) -> None:
    group = SingleRankGroup()
    store = group.store
    planner = make_planner(tmp_path, group)
    first = planner.plan()
    assert first.next_request() is not None, "some rows are claimed, and return to the next plan"
    state = RankState(np.array([0, 1]), np.array([5, 5]), np.array([2]))
    assert take_rows(planner.plan(state)) == list(range(3, NUM_ROWS))
    assert isinstance(store, InMemoryStore)
    claimed = store.get_many(["dpgen/cursor/3/0/1/0", "dpgen/cursor/3/0/2/0"])
    assert all(claimed), "cursors are named after attempt, shrinks, plan and rank"


def test_requests_carry_the_rows_own_sampling(tmp_path: Path) -> None:
    requests = {request.row: request for request in take_requests(make_planner(tmp_path, SingleRankGroup()).plan())}
    assert (requests[0].prompt, requests[0].sampling) == ("row number 0", {"max_tokens": 2}), "a null keeps the entry's"
    assert (requests[1].prompt, requests[1].sampling) == ("row number 1", {"max_tokens": 5})


def test_rows_without_any_engine_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    planner = make_planner(tmp_path, SingleRankGroup())
    with pytest.raises(NoEngineLeft) as caught:
        planner.plan(has_engine=False)
    assert str(caught.value) == (
        "no rank has a working engine left: each crashed repeatedly (see the engine errors above). "
        "Fix the cause, then rerun the same command to resume"
    )
    assert caught.value.exit_status == 75


def test_a_rank_without_work_needs_no_engine(tmp_path: Path) -> None:
    write_journal(tmp_path, list(range(NUM_ROWS)), {})
    planner = make_planner(tmp_path, SingleRankGroup(), claims_rows=False)
    assert planner.plan(has_engine=False).is_exhausted
    assert planner.num_remaining_rows == 0


LENGTHS = [7, 90, 30, 2, 55, 61, 18, 44]
LONGEST_FIRST = [1, 5, 4, 7, 2, 6, 0, 3]


def test_a_reshard_keeps_the_first_order_and_reads_no_prompt_again(tmp_path: Path) -> None:
    prompts = [chr(97 + row) * length for row, length in enumerate(LENGTHS)]
    planner, rows = make_ordering_planner(tmp_path, SingleRankGroup(), "longest_first", prompts)
    planner.plan()
    assert planner.order.rows.tolist() == LONGEST_FIRST
    num_reads = rows.num_reads
    planner.plan(RankState(np.array([1, 4]), np.array([3, 3]), np.array([2, 6])))
    assert planner.order.rows.tolist() == [5, 7, 0, 3]
    assert planner.order.description == "longest first (as in the first plan)"
    planner.plan(RankState(np.array([1, 4, 5]), np.array([3, 3, 3])))
    assert planner.order.rows.tolist() == [7, 2, 6, 0, 3], "rows that ran at the second plan may return in a later one"
    assert rows.num_reads == num_reads, "reading all prompts again would leave the engines idle"


class WatchedGroup(SingleRankGroup):
    """Count the signs of life of this rank's main thread, and lose a peer when a test says so."""

    num_beats, lose_peer_at = 0, -1

    def raise_if_peer_failed(self) -> None:
        self.num_beats += 1
        if self.num_beats == self.lose_peer_at:
            raise PeerLost("lost rank 1")


@pytest.mark.parametrize("order", ["longest_first", "prefix"])
def test_a_rank_that_reads_all_prompts_of_a_large_input_shows_that_it_gets_on(tmp_path: Path, order: str) -> None:
    group = WatchedGroup()
    planner, _ = make_ordering_planner(tmp_path, group, order, [f"prompt {row}" for row in range(10_500)])
    planner.plan()
    assert group.num_beats == 11, "one for each 1,000 rows read"


def test_reading_a_column_of_hints_and_the_journals_shows_progress_too(tmp_path: Path) -> None:
    group = WatchedGroup()
    for rank in range(3):
        write_journal(tmp_path, [rank], {10 + rank: "poison_row"}, rank)
    rows = InputRows(datasets.Dataset.from_dict({"prompt": ["text"] * 4_000, "length": [*range(4_000)]}))
    order = OrderConfig(
        WorkConfig(order="longest_first", hint_column="length"), PromptConfig(prompt_column="prompt"), None, True
    )
    config = PlannerConfig(order, ["poison_row"], ("prompt",), lockstep=False, claims_rows=True, attempt=2)
    builder = RequestBuilder(lambda row: (None, row["prompt"]), None, {})
    ShardPlanner(config, rows, tmp_path, group, builder).plan()
    assert group.num_beats == 3 + 1 + 4, "three segments, one batch of failed rows, 3,997 rows with a hint"


def test_a_peer_that_is_lost_while_prompts_are_read_is_noticed_before_all_are_read(tmp_path: Path) -> None:
    group = WatchedGroup()
    group.lose_peer_at = 2
    planner, _ = make_ordering_planner(tmp_path, group, "longest_first", [f"prompt {row}" for row in range(5_000)])
    with pytest.raises(PeerLost):
        planner.plan()
    assert group.num_beats == 2


def test_a_reshard_keeps_prefix_groups_together(tmp_path: Path) -> None:
    prompts = [f"{chr(97 + row % 12) * 400}{row}" for row in range(60)]
    planner, rows = make_ordering_planner(tmp_path, SingleRankGroup(), "prefix", prompts)
    planner.plan()
    first, num_reads = planner.order, rows.num_reads
    done = np.array([*range(0, 36, 12), *range(1, 60, 12)])  # three rows of one group, and all of another
    planner.plan(RankState(done, np.ones(len(done), dtype=np.int64)))
    order = planner.order
    assert order.groups is not None and order.weights is not None and first.weights is not None
    assert [set(group % 12) for group in np.split(order.rows, order.groups[1:])] == [{0}, *({n} for n in range(2, 12))]
    weight_of_row = dict(zip(first.rows.tolist(), first.weights.tolist(), strict=True))
    assert order.weights.tolist() == [weight_of_row[row] for row in order.rows.tolist()]
    assert sum(order.shard(2, 64).sizes) > 0
    assert rows.num_reads == num_reads


def test_rows_from_all_parts_of_the_order_come_first_where_a_plan_asks_for_them(tmp_path: Path) -> None:
    prompts = [chr(97 + row) * length for row, length in enumerate(LENGTHS)]
    planner, _ = make_ordering_planner(tmp_path, SingleRankGroup(), "longest_first", prompts)
    planner.plan()
    source = planner.plan(RankState(np.array([1]), np.array([0])), spread_first=True)
    assert planner.order.rows.tolist() == [3, 0, 2, 5, 4, 7, 6]
    assert [request.row for request in take_requests(source)] == planner.order.rows.tolist()
    assert planner.order.num_spread == 3, "the last row, and those 2 and 4 positions from the end"
    planner.plan(RankState(np.array([1, 3]), np.array([0, 0])))
    assert planner.order.rows.tolist() == [5, 4, 7, 2, 6, 0], "a later plan is in the first order again"


def test_rows_from_all_parts_of_an_order_by_prefix_are_groups_of_their_own(tmp_path: Path) -> None:
    prompts = [f"{chr(97 + row % 12) * 400}{row}" for row in range(60)]
    planner, _ = make_ordering_planner(tmp_path, SingleRankGroup(), "prefix", prompts)
    planner.plan()
    planner.plan(RankState(np.array([0]), np.array([0])), spread_first=True)
    order = planner.order
    assert order.groups is not None
    single, grouped = np.split(order.groups, [order.num_spread])
    assert single.tolist() == [0, 1, 2, 3, 4, 5]
    assert [set(rows % 12) for rows in np.split(order.rows[6:], grouped[1:] - 6)] == [{n} for n in range(12)]
    assert sorted(order.rows) == list(range(1, 60))
    for rows, _ in order.shard(2, 64).groups or []:
        assert len(rows) and rows[0] in order.rows[:6], "each rank starts with one of them"


def test_rows_that_the_first_order_lacks_are_ordered_with_all_others(tmp_path: Path) -> None:
    """The journal of a lost node held rows of an earlier attempt, and no remaining rank can read it."""
    write_journal(tmp_path, [1, 2], {})
    group = ShrinkingGroup()
    prompts = [chr(97 + row) * length for row, length in enumerate(LENGTHS)]
    planner, _ = make_ordering_planner(tmp_path, group, "longest_first", prompts)
    planner.plan()
    assert planner.order.rows.tolist() == [5, 4, 7, 6, 0, 3]
    for path in tmp_path.iterdir():
        path.unlink()
    group.num_shrinks = 1
    planner.plan(RankState(np.array([5]), np.array([3])))
    assert planner.order.rows.tolist() == [1, 4, 7, 2, 6, 0, 3]


def test_all_ranks_order_again_where_one_of_them_lacks_the_first_order(tmp_path: Path) -> None:
    """A peer that died during the first plan left some ranks with its order, and others without."""
    group = ShrinkingGroup()
    prompts = [chr(97 + row) * length for row, length in enumerate(LENGTHS)]
    planner, rows = make_ordering_planner(tmp_path, group, "longest_first", prompts)
    planner.plan()
    num_reads = rows.num_reads
    group.change_gathered = lambda value: add_peer(value, [False, "", 0, False, [], None])
    planner.plan(RankState(np.array([1]), np.array([3])))
    assert planner.order.rows.tolist() == LONGEST_FIRST[1:]
    assert rows.num_reads > num_reads, "each rank must compute the same order, so all compute it from the prompts"


LOOPS = "{% for _ in range(99999) %}{% for _ in range(99999) %}{% endfor %}{% endfor %}"
HANGING = f"{{% if prompt.startswith('hang') %}}{LOOPS}{{% endif %}}{{{{ prompt }}}}"


def test_a_row_that_takes_too_long_to_render_is_left_out_of_the_order_and_rejected(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [chr(97 + row) * length for row, length in enumerate(LENGTHS)]
    prompts[5] = "hang"
    planner, _ = make_ordering_planner(tmp_path, SingleRankGroup(), "longest_first", prompts, HANGING)
    source = planner.plan()
    assert planner.order.rows.tolist() == [1, 4, 7, 2, 6, 0, 3, 5]
    assert caplog.messages == ["rendering takes longer than data.render_timeout_s=0.2, rejecting 1 row: 5"]
    results = [source.next_request() for _ in prompts]
    [rejected] = [result for result in results if isinstance(result, RowResult)]
    assert rejected.row == 5 and rejected.error is not None and rejected.error.type == "render_timeout"


def test_a_row_that_is_slow_on_another_rank_is_left_out_of_this_ranks_order_too(tmp_path: Path) -> None:
    group = ShrinkingGroup()
    prompts = [chr(97 + row) * length for row, length in enumerate(LENGTHS)]
    planner, _ = make_ordering_planner(tmp_path, group, "longest_first", prompts)
    reports = iter([4, None])

    def gather(value: Any) -> list[Any]:
        return [value, next(reports)] if value is None and group.has_slow_peer else [value]

    group.has_slow_peer, group.change_gathered = False, gather  # type: ignore[attr-defined]
    compute_order = planner._left_out._try

    def try_order(rows: np.ndarray, action: Callable[..., Any]) -> Any:
        group.has_slow_peer = False  # type: ignore[attr-defined]
        return compute_order(rows, action)

    def run_on_all_ranks(action: Callable[[], Any]) -> Any:
        order = action()
        group.has_slow_peer = True  # type: ignore[attr-defined]
        return order

    planner._left_out._try = try_order  # type: ignore[method-assign]
    group.run_on_all_ranks = run_on_all_ranks  # type: ignore[method-assign]
    planner.plan()
    assert planner.order.rows.tolist() == [1, 5, 7, 2, 6, 0, 3, 4], "all ranks have the same order"


def test_where_many_rows_take_too_long_to_render_the_order_is_that_of_the_dataset(tmp_path: Path) -> None:
    prompts = [f"hang {row}" if row % 2 else "text" * row for row in range(12)]
    planner, _ = make_ordering_planner(tmp_path, SingleRankGroup(), "longest_first", prompts, HANGING)
    planner.plan()
    assert planner.order.rows.tolist() == list(range(12))
    assert planner.order.reason == "because rendering takes longer than data.render_timeout_s=0.2 for several rows"


def die_while_rendering(journal_dir: Path, attempt: int, row: int) -> None:
    """Leave the note of a process that died on a row."""
    note = open_note(journal_dir, attempt, 0)
    words = note.run(RENDERING, row, Path.read_bytes, journal_dir / note.name)
    (journal_dir / note.name).write_bytes(words)


def test_a_row_on_which_a_process_died_is_not_read_for_the_order_and_comes_last(tmp_path: Path) -> None:
    die_while_rendering(tmp_path, 1, row=5)
    prompts = [chr(97 + row) * length for row, length in enumerate(LENGTHS)]
    prompts[5] = "hang"
    planner, _ = make_ordering_planner(tmp_path, SingleRankGroup(), "longest_first", prompts, HANGING)
    assert take_rows(planner.plan()) == list(range(8)), "one death blames no row"
    assert planner.order.rows.tolist() == [1, 4, 7, 2, 6, 0, 3, 5]


def test_a_row_on_which_a_process_died_comes_last_in_every_order_and_later_plan(tmp_path: Path) -> None:
    group = ShrinkingGroup()
    planner = make_planner(tmp_path, group)
    planner.plan()
    die_while_rendering(tmp_path, 1, row=5)
    group.num_shrinks = 1  # type: ignore[assignment]
    planner.plan(spread_first=True)
    order = planner.order.rows.tolist()
    assert order[-1] == 5 and sorted(order) == list(range(NUM_ROWS)) and planner.order.num_spread == 5


def test_a_row_on_which_two_processes_died_is_rejected_without_another_try(tmp_path: Path) -> None:
    for attempt in (1, 2):
        die_while_rendering(tmp_path, attempt, row=5)
    source = make_planner(tmp_path, SingleRankGroup()).plan()
    results = [source.next_request() for _ in range(NUM_ROWS)]
    [rejected] = [result for result in results if isinstance(result, RowResult)]
    assert rejected.row == 5 and rejected.error is not None and rejected.error.type == "render_crashed"


def test_a_row_that_was_recorded_as_an_error_of_its_process_may_be_tried_again(tmp_path: Path) -> None:
    for attempt in (1, 2):
        die_while_rendering(tmp_path, attempt, row=5)
    write_journal(tmp_path, [0], {5: "render_crashed"})
    assert 5 in take_rows(make_planner(tmp_path, SingleRankGroup(), ["render_crashed"]).plan())


# ---- rows that may have killed an engine that several ranks share


def make_shared_planner(tmp_path: Path, group: SingleRankGroup, blame: BlameState) -> ShardPlanner:
    write_engine_note(tmp_path, EngineNote(2, 0, 0, 1, 1, None, blame))
    planner = make_planner(tmp_path, group)
    planner._config = dataclasses.replace(planner._config, has_shared_engine=True)
    return planner


def as_state(rows: list[int]) -> RankState:
    return RankState(np.array(rows, dtype=np.int64), np.zeros(len(rows), dtype=np.int64))


def test_suspects_of_the_last_attempt_are_planned_first_and_alone(tmp_path: Path) -> None:
    write_journal(tmp_path, [0, 7], {})
    planner = make_shared_planner(tmp_path, SingleRankGroup(), BlameState(groups=[[5, 6], [7, 8]], held=[(9, "boom")]))
    assert take_rows(planner.plan()) == [5, 6, 8, 9], "row 7 has a result by now"
    assert planner.num_postponed_rows == NUM_ROWS - 6 and planner.num_remaining_rows == NUM_ROWS - 2
    assert planner.blame.groups == [[5, 6], [8]] and planner.blame.held == [(9, "boom")]
    rest = take_rows(planner.plan(as_state([5, 6, 8, 9])))
    assert rest == [1, 2, 3, 4, *range(10, NUM_ROWS)] and planner.num_postponed_rows == 0


def test_rows_to_be_tried_alone_come_last_if_no_row_has_ever_succeeded(tmp_path: Path) -> None:
    planner = make_shared_planner(tmp_path, SingleRankGroup(), BlameState(groups=[[5, 6], [8]], held=[(9, "boom")]))
    assert take_rows(planner.plan()) == [5, 6]
    planner.plan(as_state([5, 6]))
    assert planner.order.rows.tolist()[-2:] == [8, 9] and planner.num_postponed_rows == 0


def test_only_rank_0_gets_suspects_and_the_others_know_those_that_run_alone(tmp_path: Path) -> None:
    write_journal(tmp_path, [0], {})
    blame = BlameState(groups=[[5, 6], [8]], held=[(9, "boom")])

    def plan(group: ThreadGroup) -> tuple[list[int], int, BlameState]:
        planner = make_shared_planner(tmp_path, group, blame)
        return take_rows(planner.plan()), planner.num_postponed_rows, planner.blame

    first, second = run_ranks(plan, ["node", "node"])
    assert first == ([5, 6, 8, 9], NUM_ROWS - 5, blame)
    assert second == ([], NUM_ROWS - 5, BlameState(groups=[[8]], held=[(9, "boom")]))
