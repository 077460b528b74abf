"""Admission: an engine gets enough rows, not too many, and fewer where its KV cache is short."""

from __future__ import annotations

from dpgen.records import Request, RequestId
from dpgen.scheduling.admission import AdmissionController
from dpgen.scheduling.request_source import RequestSource

PLENTY = 1 << 20


class EndlessSource(RequestSource):
    """Provide rows without end, of which a rank may hold back `max_waiting`."""

    def __init__(self, first: int, num_seqs: int, fair_share: int, max_waiting: int) -> None:
        self.fair_share, self._max_waiting, self._num_seqs = fair_share, max_waiting, num_seqs
        self._next = first

    @property
    def max_waiting(self) -> int:
        return self._max_waiting

    def next_request(self) -> Request:
        self._next += 1
        return Request(RequestId(self._next - 1), [1], sampling={"n": self._num_seqs} if self._num_seqs > 1 else {})


def admit(
    admission: AdmissionController,
    max_num_seqs: int,
    num_seqs: int = 1,
    fair_share: int = PLENTY,
    max_waiting: int = PLENTY,
) -> int:
    """Admit rows, and return how many."""
    first = 1 + max(admission, default=-1)
    source = EndlessSource(first, num_seqs, fair_share, max_waiting)
    requests, rejected = admission.admit(source, max_num_seqs, now_s=float(first))
    assert not rejected
    return len(requests)


def test_an_engine_has_a_reserve_beyond_the_rows_it_runs() -> None:
    admission = AdmissionController(reserve_rows=4)
    assert admit(admission, 8) == 12
    admission.release([RequestId(3)])
    admission.release([RequestId(0)])
    assert admit(admission, 8) == 2
    assert admission.oldest_admitted_s == 0.0
    assert len(admission) == 12


def test_the_reserve_shrinks_with_the_remaining_rows() -> None:
    assert admit(AdmissionController(reserve_rows=4), 8, max_waiting=1) == 9
    assert admit(AdmissionController(reserve_rows=4), 8, max_waiting=0) == 8
    assert admit(AdmissionController(reserve_rows=4), 8, fair_share=5) == 5, "no rank takes what others could start"


def test_a_row_of_several_samples_counts_as_several_sequences() -> None:
    assert admit(AdmissionController(reserve_rows=4), 8, num_seqs=4) == 3


def test_an_abandoned_engine_gets_no_rows() -> None:
    assert admit(AdmissionController(reserve_rows=4), 0) == 0


def test_fewer_sequences_are_admitted_after_preemptions_and_more_again_later() -> None:
    admission = AdmissionController(reserve_rows=4)
    admit(admission, 64)
    assert not admission.update_limit(num_running=60, num_preemptions=1, max_num_seqs=64, now_s=1), (
        "one preemption does not mean that the KV cache is short"
    )
    assert admission.update_limit(num_running=40, num_preemptions=9, max_num_seqs=64, now_s=2)
    assert admission.seq_limit == 40
    for row in range(20):
        admission.release([RequestId(row)])
    assert admit(admission, 64) == 0, "48 are in flight, and 40 fit"
    for row in range(20, 30):
        admission.release([RequestId(row)])
    assert admit(admission, 64) == 2, "without a reserve"
    for second in range(3, 7):
        assert not admission.update_limit(num_running=40, num_preemptions=9, max_num_seqs=64, now_s=second)
    assert admission.seq_limit == 40
    admission.update_limit(num_running=40, num_preemptions=9, max_num_seqs=64, now_s=8)
    assert admission.seq_limit == 42
    assert not admission.update_limit(num_running=42, num_preemptions=10, max_num_seqs=64, now_s=12), (
        "a preemption starts the quiet time again"
    )
    admission.update_limit(num_running=42, num_preemptions=10, max_num_seqs=64, now_s=16)
    assert admission.seq_limit == 42
    for second in range(17, 120):
        admission.update_limit(num_running=42, num_preemptions=10, max_num_seqs=64, now_s=second)
    assert admission.seq_limit is None
    assert admit(admission, 64) == 28


def test_a_limit_follows_the_number_of_engines_that_have_a_kv_cache_each() -> None:
    admission = AdmissionController(reserve_rows=4)
    admit(admission, 256)
    assert admission.update_limit(num_running=100, num_preemptions=50, max_num_seqs=256, now_s=1)
    admission.scale_limit(0)
    assert admission.seq_limit == 100, "the engine starts again"
    admission.scale_limit(2)
    assert admission.seq_limit == 200, "a second one joins it"
    assert admit(admission, 128) == 0 and admission.seq_limit == 200, "fewer places have as large a KV cache"
    admission.scale_limit(1)
    assert admission.seq_limit == 100, "it is lost, and the one that is left would preempt"


def test_a_new_engines_preemptions_are_counted_from_zero() -> None:
    admission = AdmissionController(reserve_rows=0)
    admission.update_limit(num_running=8, num_preemptions=100, max_num_seqs=8, now_s=1)
    assert admission.seq_limit == 8
    assert not admission.update_limit(num_running=8, num_preemptions=0, max_num_seqs=8, now_s=2)
