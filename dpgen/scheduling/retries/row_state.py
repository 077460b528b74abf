"""Hold where a row with rejected samples stands, and make the error that tells of them."""

from __future__ import annotations

from dataclasses import dataclass

from dpgen.formatting import format_count
from dpgen.journal.attempts import RejectedAttempt, Rejection
from dpgen.logprobs import TokenLogprobs
from dpgen.records import Completion, Request, RequestId, RowError

_MAX_NAMED_SAMPLES = 5


@dataclass
class SampleState:
    """Hold where one sample stands.

    Attributes:
        completion: of its last attempt.
        rejection: why that one was rejected; None if it passed.
        num_attempts: attempts that have ended.
        error: why its last request has no completion; None if it has.
        is_running: True while another attempt is requested.
    """

    completion: Completion
    rejection: Rejection | None
    num_attempts: int
    error: RowError | None = None
    is_running: bool = False

    @property
    def is_continued(self) -> bool:
        """True if the next attempt continues the last one."""
        return self.rejection is not None and self.rejection.check == "truncated"


class RowState:
    """Hold a row that has been requested and has no result.

    Attributes:
        request: the row's own, for all samples.
        first_attempt: number of its first attempt; not 0 where all attempts of an earlier try have failed.
        samples: by number; empty before the first attempt has ended.
        attempts: what the journal has of them.
        num_checking: results that are being checked.
    """

    def __init__(self, request: Request, first_attempt: int) -> None:
        self.request, self.first_attempt = request, first_attempt
        self.samples: dict[int, SampleState] = {}
        self.attempts: list[RejectedAttempt] = []
        self.num_checking = 0
        self.num_prompt_tokens: int | None = None
        self.prompt_logprobs: TokenLogprobs | None = None

    @property
    def is_checking(self) -> bool:
        return self.num_checking > 0

    @property
    def first_id(self) -> RequestId:
        """Return the id of the request for all samples."""
        return RequestId(self.request.row, attempt=self.first_attempt)

    def apply(self, attempt: RejectedAttempt) -> None:
        """Take what an attempt has led to, in this attempt of the job or an earlier one."""
        result = attempt.result
        self.attempts.append(attempt)
        if attempt.id == self.first_id:
            self.num_prompt_tokens, self.prompt_logprobs = result.num_prompt_tokens, result.prompt_logprobs
            pairs = zip(result.completions, attempt.rejections, strict=True)
            self.samples = {number: SampleState(*pair, num_attempts=1) for number, pair in enumerate(pairs)}
            return
        if (sample := self.samples.get(result.sample)) is None:
            return  # the record of the first attempt is damaged: the row begins again
        sample.num_attempts, sample.is_running = 1 + result.attempt - self.first_attempt, False
        sample.error, sample.rejection = result.error, attempt.rejections[0]
        if result.completions:
            sample.completion = result.completions[0]


def make_row_error(samples: list[SampleState], failed: list[int]) -> RowError:
    """Return the error of a row with failed samples."""
    if len(samples) == 1:
        [sample] = samples
        if sample.error is not None:
            return sample.error
        attempts = format_count(sample.num_attempts, "attempt")
        return RowError("check_failed", f"{sample.rejection} (after {attempts})")
    named = [f"sample {number}: {samples[number].rejection}" for number in failed[:_MAX_NAMED_SAMPLES]]
    if len(failed) > len(named):
        named.append("...")
    return RowError("check_failed", f"{len(failed)} of {len(samples)} samples failed: {'; '.join(named)}")
