"""How many rows an engine is given: enough, not too many, and fewer where its KV cache is short."""

from __future__ import annotations

from dpgen.records import Request
from dpgen.scheduling.admission import AdmissionController
from dpgen.scheduling.request_source import RequestSource

PLENTY = 1 << 20


class Rows(RequestSource):
    """Rows without end, of which a rank may hold back so many."""

    def __init__(self, first: int, num_seqs: int, fair_share: int, fair_size: int) -> None:
        self.fair_share, self._fair_size, self._num_seqs = fair_share, fair_size, num_seqs
        self._next = first

    @property
    def max_waiting(self) -> int:
        return self._fair_size

    def next_request(self) -> Request:
        self._next += 1
        return Request(self._next - 1, [1], sampling={"n": self._num_seqs} if self._num_seqs > 1 else {})


def fill(
    admission: AdmissionController, max_num_seqs: int, num_seqs: int = 1, fair_share: int = PLENTY, fair: int = PLENTY
) -> int:
    """How many rows are admitted."""
    first = 1 + max(admission, default=-1)
    requests, refused = admission.admit(Rows(first, num_seqs, fair_share, fair), max_num_seqs, now_s=float(first))
    assert not refused
    return len(requests)


def test_an_engine_has_a_reserve_beyond_what_it_runs() -> None:
    admission = AdmissionController(reserve_rows=4)
    assert fill(admission, 8) == 12
    admission.release(3)
    admission.release(0)
    assert fill(admission, 8) == 2
    assert admission.oldest_admitted_s == 0.0
    assert len(admission) == 12


def test_the_reserve_shrinks_with_what_is_left() -> None:
    assert fill(AdmissionController(reserve_rows=4), 8, fair=1) == 9
    assert fill(AdmissionController(reserve_rows=4), 8, fair=0) == 8
    assert fill(AdmissionController(reserve_rows=4), 8, fair_share=5) == 5, "no rank takes what others could start"


def test_a_row_of_several_samples_counts_as_so_many_sequences() -> None:
    assert fill(AdmissionController(reserve_rows=4), 8, num_seqs=4) == 3


def test_a_lost_engine_gets_nothing() -> None:
    assert fill(AdmissionController(reserve_rows=4), 0) == 0


def test_fewer_are_admitted_while_rows_are_set_back_and_more_again_later() -> None:
    admission = AdmissionController(reserve_rows=4)
    fill(admission, 64)
    assert not admission.update_limit(num_running=60, num_preemptions=1, max_num_seqs=64, now_s=1), "one is no pressure"
    assert admission.update_limit(num_running=40, num_preemptions=9, max_num_seqs=64, now_s=2)
    assert admission.seq_limit == 40
    for row in range(20):
        admission.release(row)
    assert fill(admission, 64) == 0, "48 are in hand, and 40 fit"
    for row in range(20, 30):
        admission.release(row)
    assert fill(admission, 64) == 2, "without a reserve"
    for second in range(3, 7):
        assert not admission.update_limit(num_running=40, num_preemptions=9, max_num_seqs=64, now_s=second)
    assert admission.seq_limit == 40
    admission.update_limit(num_running=40, num_preemptions=9, max_num_seqs=64, now_s=8)
    assert admission.seq_limit == 42
    assert not admission.update_limit(num_running=42, num_preemptions=10, max_num_seqs=64, now_s=12), "calm starts anew"
    admission.update_limit(num_running=42, num_preemptions=10, max_num_seqs=64, now_s=16)
    assert admission.seq_limit == 42
    for second in range(17, 120):
        admission.update_limit(num_running=42, num_preemptions=10, max_num_seqs=64, now_s=second)
    assert admission.seq_limit is None
    assert fill(admission, 64) == 28


def test_another_engines_count_starts_from_nought() -> None:
    admission = AdmissionController(reserve_rows=0)
    admission.update_limit(num_running=8, num_preemptions=100, max_num_seqs=8, now_s=1)
    assert admission.seq_limit == 8
    assert not admission.update_limit(num_running=8, num_preemptions=0, max_num_seqs=8, now_s=2)
