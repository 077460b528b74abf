"""Which engine of a rank gets a request."""

from __future__ import annotations

from dpgen.engine.pool.router import RequestRouter
from dpgen.records import Request, RequestId

SIZES = {0: 64, 1: 64}


def make_request(row: int, prefix: int = 0, adapter: str | None = None, **sampling: int) -> Request:
    return Request(RequestId(row), [prefix] * 64 + [row], sampling=dict(sampling), adapter=adapter)


def test_rows_with_the_same_beginning_stay_on_one_engine_while_that_costs_no_balance() -> None:
    router = RequestRouter(1)
    places = [router.place(make_request(row, prefix=row // 6), SIZES) for row in range(48)]
    groups = [set(places[start : start + 6]) for start in range(0, 48, 6)]
    assert all(len(group) == 1 for group in groups)
    assert abs(router.count(0) - router.count(1)) <= 0.125 * 64 + 1


def test_a_prefix_that_all_rows_share_does_not_keep_them_on_one_engine() -> None:
    router = RequestRouter(1)
    for row in range(96):
        router.place(make_request(row), SIZES)
    assert abs(router.count(0) - router.count(1)) <= 0.125 * 64 + 1


def test_rows_of_an_adapter_stay_together() -> None:
    router = RequestRouter(1)
    places = [router.place(make_request(row, adapter="ab"[row % 2]), SIZES) for row in range(8)]
    assert places == [0, 1] * 4


def test_finished_and_given_up_rows_make_room() -> None:
    router = RequestRouter(2)
    router.place(make_request(0), {0: 64})
    router.place(make_request(1, n=5), {0: 64})
    assert router.count(0) == 2 + 5 and router.find(RequestId(1)) == 0
    router.remove(RequestId(1))
    router.remove(RequestId(7))
    assert router.count(0) == 2


def test_larger_engines_get_more() -> None:
    router = RequestRouter(1)
    for row in range(30):
        router.place(make_request(row, prefix=row), {0: 64, 1: 32})
    assert (router.count(0), router.count(1)) == (20, 10)


def test_a_prompt_that_the_engine_tokenizes_has_a_beginning_too() -> None:
    router = RequestRouter(1)
    requests = [Request(RequestId(row), None, "ab"[row % 2] * 300 + str(row)) for row in range(6)]
    assert [router.place(request, SIZES) for request in requests] == [0, 1] * 3
