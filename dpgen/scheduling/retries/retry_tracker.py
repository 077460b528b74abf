"""Follow each row until its samples have passed their checks, or have no attempt left.

- A row's first request generates all of its samples. Each sample that fails is generated again by a request of its own,
  with the next attempt's number and seed, or is continued from its tokens where it was cut off.
- Each attempt is journaled before the next one is requested, and so is a sample that passes while others don't. A row
  that earlier attempts of the job have begun continues from these records.
- A row whose samples all pass at once leaves no trace: its result is the one that it would have without checks.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from dpgen.config.completion_checks import CHECK_NAMES
from dpgen.config.schema import Config
from dpgen.engine.checking.completion_checker import CheckedResult, CompletionChecker
from dpgen.journal.attempts import RejectedAttempt, Rejection, encode_attempt
from dpgen.records import Completion, Request, RequestId, RowResult, UndecodedRow
from dpgen.scheduling.request_builder import derive_request_seed
from dpgen.scheduling.retries.continuation import extend_prompt, has_room, join_result
from dpgen.scheduling.retries.earlier_attempts import EarlierAttempts
from dpgen.scheduling.retries.row_state import RowState, SampleState, make_row_error


@dataclass(frozen=True)
class RetryConfig:
    """Settings of a `RetryTracker`.

    Attributes:
        max_attempts: times that a sample is generated, or continued.
        sampling: fields of SamplingParams laid over those of the row.
        run_seed: as in `RequestBuilder`.
        continue_truncated: continue samples that were cut off.
        keep_rejected: keep the text of samples that have no attempt left.
        keep_token_ids: keep token ids in results.
        drop_prompt_logprobs: further attempts need no log-probabilities of the prompt.
    """

    max_attempts: int = 3
    sampling: dict[str, Any] = field(default_factory=dict)
    run_seed: int | None = None
    continue_truncated: bool = False
    keep_rejected: bool = False
    keep_token_ids: bool = False
    drop_prompt_logprobs: bool = False

    @classmethod
    def from_config(cls, config: Config) -> RetryConfig:
        """Return the settings of a run."""
        check = config.check
        return cls(
            check.max_attempts,
            dict(check.retry_sampling),
            config.run.seed,
            check.continue_truncated,
            check.keep_rejected,
            config.output.token_ids or config.keeps_logprobs,
            config.keeps_logprobs,
        )


class RetryCounts(NamedTuple):
    """Count what checks have cost this rank.

    Attributes:
        num_retries: further attempts requested, by the check that the one before had failed.
        num_rejected_tokens: tokens of attempts that are no part of a result.
    """

    num_retries: Counter[str]
    num_rejected_tokens: int

    @property
    def by_check(self) -> tuple[int, ...]:
        """Return `num_retries` in the order of `CHECK_NAMES`."""
        return tuple(self.num_retries[check] for check in CHECK_NAMES)


class RetryTracker:
    """Check results, and decide what follows from the checks.

    Args:
        checker: checks completions.
        append_attempt: writes a record of `encode_attempt` to the journal, given the row.
        find_earlier: returns what earlier attempts of the job have journaled of a row; None for nothing.
        get_max_model_len: returns the engine's limit of tokens of prompt and completion together.
    """

    num_preparing = 0  # further attempts have what workers have prepared for the first one

    def __init__(
        self,
        config: RetryConfig,
        checker: CompletionChecker,
        append_attempt: Callable[[int, bytes], None],
        find_earlier: Callable[[int], EarlierAttempts[RejectedAttempt] | None],
        get_max_model_len: Callable[[], int],
    ) -> None:
        self._config, self._checker = config, checker
        self._append_attempt, self._find_earlier = append_attempt, find_earlier
        self._get_max_model_len = get_max_model_len
        self._rows: dict[int, RowState] = {}
        self._retries: deque[Request] = deque()
        self._texts: dict[RequestId, list[str]] = {}  # before they are parsed
        self.counts = RetryCounts(Counter(), 0)
        self.num_calls = 0  # each row is one request

    # ---- requests

    def begin(self, request: Request) -> Request | RowResult | None:
        """Return what a row begins with: its first request, or the result that its earlier attempts leave no choice of.

        None if further attempts at the row are requested: `take_retry` returns them.
        """
        earlier = self._find_earlier(request.row)
        first = (
            request if earlier is None else self._make_request(request, RequestId(request.row, attempt=earlier.first))
        )
        row = self._rows[request.row] = RowState(request, first.id.attempt)
        self._checker.expect(request.row)
        attempts = [] if earlier is None else earlier.current
        for attempt in attempts:
            row.apply(attempt)
        if not row.samples:
            row.attempts.clear()
            return first
        return self._continue(row)

    @property
    def can_begin(self) -> bool:
        """True: a row waits for nothing but the engine."""
        return True

    @property
    def num_begun(self) -> int:
        """0: a row that has begun has a request in the engine, or is being checked."""
        return 0

    def prepare(self) -> bool:
        """Return False: requests are made at once."""
        return False

    @property
    def has_retries(self) -> bool:
        """True while requests wait to be taken."""
        return bool(self._retries)

    def take_retry(self) -> Request | None:
        """Return the next request for a further attempt; None if there is none."""
        return self._retries.popleft() if self._retries else None

    @property
    def pending_rows(self) -> Collection[int]:
        """Rows without a result, of which an attempt is rejected or being checked."""
        return [row for row, state in self._rows.items() if state.samples or state.is_checking]

    @property
    def num_checking(self) -> int:
        """Number of results that are being checked."""
        return len(self._checker)

    def drop(self, parsing: Collection[RequestId]) -> list[bytes]:
        """Forget the rows that need an engine, since there is none, and return the records of their attempts.

        A row of which a sample is still being parsed or checked is kept until that has ended. If other samples of it
        need an engine, they wait as retries, so that this is called again.

        Args:
            parsing: ids of the results that are being parsed.
        """
        self._retries.clear()
        kept = {*parsing, *self._checker.pending_ids}
        kept_rows = {id.row for id in kept}
        records: list[bytes] = []
        for number, row in list(self._rows.items()):
            if number not in kept_rows:
                records += map(encode_attempt, row.attempts)
                del self._rows[number]
                continue
            running = [sample for sample, state in row.samples.items() if state.is_running]
            retries = [self._make_retry(row, sample) for sample in running]
            self._retries.extend(retry for retry in retries if retry.id not in kept)
        return records

    # ---- results

    def join_pieces(self, result: RowResult | UndecodedRow) -> RowResult | UndecodedRow:
        """Return the result of a whole sample, if the request continued one; before it is decoded."""
        row = self._rows.get(result.id.row)
        sample = None if row is None else row.samples.get(result.id.sample)
        prompt = None if row is None else row.request.prompt_token_ids
        if sample is None or not sample.is_continued or prompt is None:
            return result
        return join_result(sample.completion, result, prompt)

    def keep_texts(self, result: RowResult) -> None:
        """Keep the texts of a result as they are before they are parsed: what continues one follows this text."""
        if self._config.continue_truncated and result.row in self._rows:
            self._texts[result.id] = [completion.text for completion in result.completions]

    def submit(self, result: RowResult) -> RowResult | None:
        """Check a result, decoded and parsed; `poll` returns what becomes of it. One without completions is final here.

        Returns:
            the row's result, if there is no more to do.
        """
        row = self._rows.get(result.row)
        if row is None:  # never begun: its prompt was rejected, or its earlier attempts are its result
            return result
        if not result.completions:
            return self._decide(row, CheckedResult(result, ()))
        row.num_checking += 1
        self._checker.submit(result, row.first_attempt)
        return None

    def close(self) -> None:
        """Do nothing: the checker's owner ends it."""

    def poll(self) -> list[RowResult]:
        """Return the rows' results that the checks have led to since the last call."""
        finals = []
        for checked in self._checker.poll():
            row = self._rows[checked.result.row]
            row.num_checking -= 1
            if (final := self._decide(row, checked)) is not None:
                finals.append(final)
        return finals

    def _decide(self, row: RowState, checked: CheckedResult) -> RowResult | None:
        result, texts = checked.result, self._texts.pop(checked.result.id, None)
        is_first = not row.samples
        rejections = checked.rejections or (Rejection(*_get_error(result)),)
        if result.completions:
            rejections = tuple(map(self._prefer_continuing(row, result), result.completions, rejections))
        if is_first and (result.error is not None or not any(rejections)):
            del self._rows[result.row]
            return self._strip(result.with_id(RequestId(result.row)))
        attempt = RejectedAttempt(_drop_what_is_not_needed(result, rejections, texts), rejections)
        row.apply(attempt)
        self._append_attempt(result.row, encode_attempt(attempt))
        self._count_rejected(attempt)
        return self._continue(row, only=result)

    def _prefer_continuing(
        self, row: RowState, result: RowResult
    ) -> Callable[[Completion, Rejection | None], Rejection | None]:
        """Return a function that rejects a completion as truncated, whatever its checks say, if it can be continued."""
        num_attempts = 1 + result.attempt - row.first_attempt

        def prefer(completion: Completion, rejection: Rejection | None) -> Rejection | None:
            can_continue = self._config.continue_truncated and num_attempts < self._config.max_attempts
            if can_continue and has_room(row.request, completion, self._get_max_model_len()):
                return Rejection("truncated", "it ended by length")
            return rejection

        return prefer

    def _count_rejected(self, attempt: RejectedAttempt) -> None:
        pairs = zip(attempt.result.completions, attempt.rejections, strict=False)
        lost = sum(done.num_tokens for done, why in pairs if why is not None and why.check != "truncated")
        self.counts = self.counts._replace(num_rejected_tokens=self.counts.num_rejected_tokens + lost)

    # ---- what follows

    def _continue(self, row: RowState, only: RowResult | None = None) -> RowResult | None:
        """Request further attempts, and return the row's result if there are none, and none is running.

        Args:
            only: the result after which the requests follow; None for all samples, after a restart.
        """
        places = range(len(row.samples)) if only is None or only.id == row.first_id else [only.sample]
        for number in places:
            sample = row.samples[number]
            has_attempts = sample.num_attempts < self._config.max_attempts and sample.error is None
            if sample.rejection is None or not has_attempts:
                continue
            self._retries.append(self._make_retry(row, number))
            sample.is_running = True
            self.counts.num_retries[sample.rejection.check] += 1
        if any(sample.is_running for sample in row.samples.values()):
            return None
        del self._rows[row.request.row]
        return self._make_result(row)

    def _make_retry(self, row: RowState, number: int) -> Request:
        """Return the request for a sample's next attempt."""
        sample = row.samples[number]
        id = RequestId(row.request.row, 0, number, row.first_attempt + sample.num_attempts)
        retry = self._make_request(row.request, id, self._config.sampling)
        return extend_prompt(retry, sample.completion) if sample.is_continued else retry

    def _make_request(self, request: Request, id: RequestId, sampling: dict[str, Any] | None = None) -> Request:
        """Return the row's request with another id and that one's seed.

        Args:
            sampling: laid over the row's, for one sample; None for a request for all samples.
        """
        fields = dict(request.sampling)
        if id.attempt and (seed := derive_request_seed(self._config.run_seed, fields, id)) is not None:
            fields["seed"] = seed
        if sampling is not None:
            fields |= {**sampling, "n": 1}
            if self._config.drop_prompt_logprobs:
                fields["prompt_logprobs"] = None
        return replace(request, id=id, sampling=fields)

    def _make_result(self, row: RowState) -> RowResult:
        samples = [row.samples[number] for number in range(len(row.samples))]
        failed = [number for number, sample in enumerate(samples) if sample.rejection is not None]
        completions = tuple(map(self._finish_sample, samples))
        error = None if not failed else make_row_error(samples, failed)
        if len(samples) == 1 and failed and not (self._config.keep_rejected and completions[0].text):
            completions = ()
        result = RowResult(row.request.row, row.num_prompt_tokens, completions, error, row.prompt_logprobs)
        return self._strip(result)

    def _finish_sample(self, sample: SampleState) -> Completion:
        if sample.rejection is None:
            return sample.completion
        text = sample.completion.text if self._config.keep_rejected else ""
        return Completion(text, None, 0, rejection=str(sample.rejection))

    def _strip(self, result: RowResult) -> RowResult:
        """Return a result without token ids that only continuing needed."""
        if self._config.keep_token_ids or all(completion.token_ids is None for completion in result.completions):
            return result
        return replace(
            result, completions=tuple(replace(completion, token_ids=None) for completion in result.completions)
        )


def _get_error(result: RowResult) -> tuple[str, str]:
    return ("", "") if result.error is None else (result.error.type, result.error.message)


def _drop_what_is_not_needed(
    result: RowResult, rejections: Sequence[Rejection | None], texts: Sequence[str] | None
) -> RowResult:
    """Return a result without tokens of completions that are generated again, and without parts of those continued.

    Args:
        texts: the completions' texts before they were parsed; None where they are not parsed.
    """
    completions = list(result.completions)
    for number, rejection in enumerate(rejections[: len(completions)]):
        completion = completions[number]
        if rejection is not None and rejection.check == "truncated":
            kept = Completion(completion.text if texts is None else texts[number], "length", completion.num_tokens)
            completions[number] = replace(kept, token_ids=completion.token_ids, logprobs=completion.logprobs)
        elif rejection is not None:
            completions[number] = replace(completion, token_ids=None, logprobs=None)
    return replace(result, completions=tuple(completions))
