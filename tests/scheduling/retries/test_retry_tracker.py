"""What follows from a check: further attempts and their seeds, results with errors, nothing twice after a restart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from dpgen.engine.checking.completion_checker import CheckedResult
from dpgen.journal.attempts import RejectedAttempt, Rejection, decode_attempt
from dpgen.records import (
    Completion,
    Request,
    RequestId,
    RowError,
    RowResult,
    UndecodedRow,
    derive_seed,
)
from dpgen.result_codec import encode_result
from dpgen.scheduling.retries.earlier_attempts import EarlierAttempts
from dpgen.scheduling.retries.retry_tracker import RetryConfig, RetryTracker

SEED = 3


class FakeChecker:
    """Reject completions whose text begins with "bad"."""

    def __init__(self) -> None:
        self._results: list[RowResult] = []

    def __len__(self) -> int:
        return len(self._results)

    @property
    def pending_ids(self) -> list[RequestId]:
        return [result.id for result in self._results]

    def expect(self, row: int) -> None:
        pass

    def submit(self, result: RowResult, first_attempt: int) -> None:
        self._results.append(result)

    def poll(self) -> list[CheckedResult]:
        results, self._results = self._results, []
        return [CheckedResult(result, tuple(map(self._check, result.completions))) for result in results]

    def _check(self, completion: Completion) -> Rejection | None:
        return Rejection("regex", f"found {completion.text}") if completion.text.startswith("bad") else None


class Harness:
    """A tracker, what it has journaled, and an engine that answers as a test says."""

    def __init__(self, journal: Sequence[bytes] = (), num_ended: int = 0, **config: Any) -> None:
        self.journal = list(journal)
        self._earlier, self._num_ended = [decode_attempt(record) for record in journal], num_ended
        self.tracker = RetryTracker(
            RetryConfig(run_seed=SEED, **config),
            FakeChecker(),  # type: ignore[arg-type]
            lambda row, record: self.journal.append(record),
            self._find,
            lambda: 20,
        )
        self.requests: list[Request] = []

    def _find(self, row: int) -> EarlierAttempts | None:
        if not self._earlier and not self._num_ended:
            return None
        return EarlierAttempts(self._num_ended, self._earlier)

    def run(self, generate: Callable[[Request], RowResult], request: Request) -> RowResult:
        """Generate a row until it has its result."""
        begun = self.tracker.begin(request)
        if isinstance(begun, RowResult):
            return begun
        waiting = [begun] if begun else []
        while True:
            while (retry := self.tracker.take_retry()) is not None:
                waiting.append(retry)
            assert waiting, "the row has neither a result nor a request"
            taken = waiting.pop(0)
            self.requests.append(taken)
            joined = self.tracker.join_pieces(generate(taken).with_id(taken.id))
            assert isinstance(joined, RowResult)
            final = self.tracker.submit(joined)
            for result in [final] if final else self.tracker.poll():
                return result


def make_request(row: int = 7, **sampling: Any) -> Request:
    fields = {"seed": derive_seed(SEED, RequestId(row)), **sampling}
    return Request(RequestId(row), [1, 2], None, fields, adapter="math")


def make_result(*texts: str, reason: str = "stop", num_tokens: int = 2) -> RowResult:
    completions = tuple(Completion(text, reason, num_tokens, list(range(num_tokens))) for text in texts)
    return RowResult(7, 2, completions)


def answer(*results: RowResult) -> Callable[[Request], RowResult]:
    remaining = list(results)
    return lambda request: remaining.pop(0)


def test_a_row_that_passes_has_the_result_that_it_has_without_checks() -> None:
    harness = Harness()
    result = harness.run(answer(make_result("a", "b")), make_request())
    assert encode_result(result) == encode_result(
        RowResult(7, 2, (Completion("a", "stop", 2), Completion("b", "stop", 2)))
    )
    assert harness.requests == [make_request()] and not harness.journal


def test_each_attempt_has_a_seed_of_its_own_and_the_retry_sampling() -> None:
    harness = Harness(sampling={"temperature": 1.0})
    result = harness.run(
        answer(make_result("bad 1"), make_result("bad 2"), make_result("good")), make_request(top_p=0.5)
    )
    assert [completion.text for completion in result.completions] == ["good"] and result.error is None
    assert result.id == RequestId(7), "the row's own result"
    first, second, third = harness.requests
    assert [request.id for request in (first, second, third)] == [RequestId(7, attempt=k) for k in range(3)]
    seeds = [derive_seed(SEED, request.id) for request in (first, second, third)]
    assert [request.sampling["seed"] for request in (first, second, third)] == seeds
    for retry in (second, third):
        assert retry.sampling == {"seed": retry.sampling["seed"], "top_p": 0.5, "temperature": 1.0, "n": 1}
        assert (retry.prompt_token_ids, retry.adapter) == ([1, 2], "math")
    assert harness.tracker.counts.num_retries == {"regex": 2} and harness.tracker.counts.num_rejected_tokens == 4


def test_a_seed_from_a_column_gives_each_attempt_another_one() -> None:
    harness = Harness()
    harness.run(answer(make_result("bad"), make_result("good")), make_request(seed=5))
    assert [request.sampling["seed"] for request in harness.requests] == [5, derive_seed(5, RequestId(7, attempt=1))]


def test_an_unseeded_run_stays_unseeded() -> None:
    harness = Harness()
    harness.tracker._config = replace(harness.tracker._config, run_seed=None)
    harness.run(answer(make_result("bad"), make_result("good")), Request(RequestId(7), [1, 2]))
    assert all("seed" not in request.sampling for request in harness.requests)


@pytest.mark.parametrize("keep_rejected", [False, True])
def test_after_the_last_attempt_the_row_has_an_error_and_its_text_if_that_is_kept(keep_rejected: bool) -> None:
    harness = Harness(max_attempts=2, keep_rejected=keep_rejected)
    result = harness.run(answer(make_result("bad 1"), make_result("bad 2")), make_request())
    assert result.error == RowError("check_failed", "regex: found bad 2 (after 2 attempts)")
    kept = Completion("bad 2", None, 0, rejection="regex: found bad 2")
    assert result.completions == ((kept,) if keep_rejected else ())
    assert [decode_attempt(record).id.attempt for record in harness.journal] == [0, 1]


def test_of_several_samples_only_those_that_failed_are_generated_again() -> None:
    harness = Harness(max_attempts=2)
    answers = {0: make_result("a", "bad", "bad"), 1: make_result("b"), 2: make_result("bad again")}
    result = harness.run(lambda request: answers[request.id.sample], make_request())
    assert [request.id for request in harness.requests] == [
        RequestId(7),
        RequestId(7, sample=1, attempt=1),
        RequestId(7, sample=2, attempt=1),
    ]
    assert [(c.text, c.rejection) for c in result.completions] == [
        ("a", None),
        ("b", None),
        ("", "regex: found bad again"),
    ]
    assert result.error == RowError("check_failed", "1 of 3 samples failed: sample 2: regex: found bad again")


@pytest.mark.parametrize("num_done", range(1, 5))
def test_a_restart_repeats_no_attempt(num_done: int) -> None:
    answers = {
        RequestId(7): make_result("a", "bad"),
        RequestId(7, sample=1, attempt=1): make_result("bad"),
        RequestId(7, sample=1, attempt=2): make_result("bad"),
        RequestId(7, sample=1, attempt=3): make_result("good"),
    }
    undisturbed = Harness(max_attempts=4)
    expected = undisturbed.run(lambda request: answers[request.id], make_request())
    assert expected.error is None and len(undisturbed.journal) == 4
    resumed = Harness(undisturbed.journal[:num_done], max_attempts=4)
    assert resumed.run(lambda request: answers[request.id], make_request()) == expected
    assert resumed.requests == undisturbed.requests[num_done:]


def test_another_try_has_other_attempt_numbers_and_seeds() -> None:
    harness = Harness(num_ended=3)
    harness.run(answer(make_result("bad"), make_result("good")), make_request())
    assert [request.id.attempt for request in harness.requests] == [3, 4]
    assert harness.requests[0].sampling["seed"] == derive_seed(SEED, RequestId(7, attempt=3))
    assert "n" not in harness.requests[0].sampling, "it generates all samples"


def test_a_row_that_the_engine_rejects_keeps_its_error() -> None:
    refused = RowResult(7, error=RowError("prompt_too_long", "600 tokens"))
    assert Harness().run(answer(refused), make_request()) == refused
    poison = RowResult(7, error=RowError("poison_row", "it killed its engine"))
    harness = Harness()
    result = harness.run(answer(make_result("bad"), poison), make_request())
    assert result.error == poison.error and len(harness.requests) == 2, "no attempt after it"


def test_a_truncated_sample_continues_from_its_own_tokens() -> None:
    harness = Harness(continue_truncated=True, keep_token_ids=True, sampling={"max_tokens": 4})
    result = harness.run(
        answer(make_result("one ", reason="length"), make_result("two ", reason="length"), make_result("end")),
        make_request(max_tokens=2),
    )
    [whole] = result.completions
    assert (whole.text, whole.finish_reason, whole.num_tokens, whole.token_ids) == (
        "one two end",
        "stop",
        6,
        [0, 1, 0, 1, 0, 1],
    )
    prompts = [request.prompt_token_ids for request in harness.requests]
    assert prompts == [[1, 2], [1, 2, 0, 1], [1, 2, 0, 1, 0, 1]]
    assert [request.sampling["max_tokens"] for request in harness.requests] == [2, 4, 4]
    assert result.num_prompt_tokens == 2 and harness.tracker.counts.num_rejected_tokens == 0
    resumed = Harness(harness.journal[:1], continue_truncated=True, keep_token_ids=True, sampling={"max_tokens": 4})
    again = resumed.run(answer(make_result("two ", reason="length"), make_result("end")), make_request(max_tokens=2))
    assert again == result and resumed.requests == harness.requests[1:]


def test_a_sample_without_room_or_attempts_is_left_to_its_checks() -> None:
    full = make_result("a", reason="length", num_tokens=18)
    assert Harness(continue_truncated=True).run(answer(full), make_request()).error is None, "the context is full"
    once = make_result("bad", reason="length")
    result = Harness(continue_truncated=True, max_attempts=1).run(answer(once), make_request())
    assert result.error is not None and "found bad" in result.error.message


def test_a_continued_sample_is_decoded_as_a_whole() -> None:
    harness = Harness(continue_truncated=True)
    request = harness.tracker.begin(make_request())
    assert isinstance(request, Request)
    harness.tracker.submit(make_result("é", reason="length").with_id(request.id))
    harness.tracker.poll()
    retry = harness.tracker.take_retry()
    assert retry is not None
    rest = UndecodedRow(make_result("").with_id(retry.id), ([8],), True, retry.prompt_token_ids or [])
    whole = harness.tracker.join_pieces(rest)
    assert isinstance(whole, UndecodedRow)
    assert (whole.token_ids, whole.prompt_token_ids) == (([0, 1, 8],), [1, 2])


def test_rows_that_need_an_engine_are_given_back_with_their_attempts() -> None:
    harness = Harness()
    for row, text in ((1, "bad"), (2, "good"), (3, "bad")):
        harness.tracker.begin(make_request(row))
        harness.tracker.submit(replace(make_result(text), row=row))
        if row == 1:
            harness.tracker.poll()
    assert list(harness.tracker.pending_rows) == [1, 2, 3] and harness.tracker.num_checking == 2
    records = harness.tracker.drop(parsing=())
    assert [decode_attempt(record).id for record in records] == [RequestId(1)], "the others are being checked"
    assert list(harness.tracker.pending_rows) == [2, 3] and not harness.tracker.has_retries


def test_a_row_whose_samples_are_apart_is_given_back_once_all_of_it_needs_an_engine() -> None:
    harness = Harness()
    tracker = harness.tracker
    tracker.begin(make_request())
    tracker.submit(make_result("bad", "bad"))
    tracker.poll()
    first, second = tracker.take_retry(), tracker.take_retry()
    assert first is not None and second is not None
    tracker.submit(make_result("bad").with_id(first.id))  # the other one is in the engine, which is abandoned
    assert tracker.drop(parsing=()) == [] and tracker.has_retries, "the row is kept, and needs an engine"
    tracker.poll()
    records = tracker.drop(parsing=())
    assert [decode_attempt(record).id for record in records] == [RequestId(7), first.id]
    assert not list(tracker.pending_rows) and not tracker.has_retries


def test_an_attempt_comes_out_of_its_record_as_it_went_in() -> None:
    from dpgen.journal.attempts import encode_attempt

    result = make_result("a\n", "b\ud800").with_id(RequestId(7, 0, 1, 2))
    attempt = RejectedAttempt(result, (None, Rejection("function", "ü\n")))
    assert decode_attempt(encode_attempt(attempt)) == attempt
