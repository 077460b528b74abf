"""Test that finished runs still verify after fields and hash versions are added."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpgen import records
from dpgen.journal.reader import JournalReader, index_journal, list_segments, read_segment
from dpgen.output.result_stats import HASH_ENCODINGS, HASH_VERSION, ResultStats
from dpgen.result_codec import decode_result, encode_result

OLD_RUN = Path(__file__).resolve().parents[1] / "run_dirs" / "1b51951" / "finished"

RESULTS = (
    records.RowResult(0, 3, (records.Completion("hello", "stop", 2),)),
    records.RowResult(
        1, 1, (records.Completion("漢\ud800\n'", None, 1, [5]), records.Completion("b", "length", 2, []))
    ),
    records.RowResult(2, 607, error=records.RowError("prompt_too_long", 'too "long"')),
    records.RowResult(3),
)


# The classes as at commit 1b51951: version 1 hashes their `repr`.


@dataclass(frozen=True, slots=True)
class Completion:
    text: str
    finish_reason: str | None
    num_tokens: int
    token_ids: list[int] | None = None


@dataclass(frozen=True, slots=True)
class RowError:
    type: str
    message: str


@dataclass(frozen=True, slots=True)
class RowResult:
    row: int
    num_prompt_tokens: int | None = None
    completions: tuple[Completion, ...] = ()
    error: RowError | None = None


def to_classes_of_1b51951(result: records.RowResult) -> RowResult:
    completions = tuple(Completion(c.text, c.finish_reason, c.num_tokens, c.token_ids) for c in result.completions)
    error = None if result.error is None else RowError(result.error.type, result.error.message)
    return RowResult(result.row, result.num_prompt_tokens, completions, error)


# Classes as a later commit may have them, with one more field each.


@dataclass(frozen=True, slots=True)
class LaterCompletion(records.Completion):
    cumulative_logprob: float | None = None


@dataclass(frozen=True, slots=True)
class LaterRowError(records.RowError):
    num_attempts: int = 1


@dataclass(frozen=True, slots=True)
class LaterRowResult(records.RowResult):
    num_cached_tokens: int = 0


def to_later_classes(result: records.RowResult) -> LaterRowResult:
    completions = tuple(LaterCompletion(c.text, c.finish_reason, c.num_tokens, c.token_ids) for c in result.completions)
    error = None if result.error is None else LaterRowError(result.error.type, result.error.message)
    return LaterRowResult(result.row, result.num_prompt_tokens, completions, error)


def read_old_results() -> list[records.RowResult]:
    index = index_journal(OLD_RUN / "journal")
    with JournalReader(index) as reader:
        return [reader.result(position) for position in range(len(index))]


def compute_hash(results: list[records.RowResult] | tuple[records.RowResult, ...], version: int) -> str:
    stats = ResultStats(version)
    for result in results:
        stats.add(result)
    return str(stats.to_dict()["hash"])


results = st.builds(
    records.RowResult,
    st.integers(0, 1 << 40),
    st.none() | st.integers(0, 9999),
    st.lists(
        st.builds(
            records.Completion,
            st.text(st.characters(codec=None), max_size=20),
            st.sampled_from(["stop", "length", None]),
            st.integers(0, 9999),
            st.none() | st.lists(st.integers(0, 99_999), max_size=4),
        ),
        max_size=3,
    ).map(tuple),
    st.none() | st.builds(records.RowError, st.text(max_size=9), st.text(max_size=20)),
)


# ---- version 1


def test_version_1_gives_the_hash_that_an_older_commit_wrote() -> None:
    success = json.loads((OLD_RUN / "_SUCCESS").read_text())
    stats = ResultStats(1)
    for result in read_old_results():
        stats.add(result)
    assert stats.to_dict() == {**success, "hash_version": 1}


def test_version_1_hashes_these_bytes() -> None:
    encode = HASH_ENCODINGS[1][1]
    assert [encode(result) for result in RESULTS] == [
        b"RowResult(row=0, num_prompt_tokens=3, completions=(Completion(text='hello', finish_reason='stop', "
        b"num_tokens=2, token_ids=None),), error=None)",
        'RowResult(row=1, num_prompt_tokens=1, completions=(Completion(text="漢\\ud800\\n\'", finish_reason=None, '
        "num_tokens=1, token_ids=[5]), Completion(text='b', finish_reason='length', num_tokens=2, token_ids=[])), "
        "error=None)".encode(),
        b"RowResult(row=2, num_prompt_tokens=607, completions=(), error=RowError(type='prompt_too_long', "
        b"message='too \"long\"'))",
        b"RowResult(row=3, num_prompt_tokens=None, completions=(), error=None)",
    ]


@settings(deadline=None)  # a loaded machine takes any time
@given(result=results)
def test_version_1_equals_the_repr_of_the_old_classes(result: records.RowResult) -> None:
    expected = repr(to_classes_of_1b51951(result)).encode("utf-8", "backslashreplace")
    assert HASH_ENCODINGS[1][1](result) == expected


@pytest.mark.parametrize("version", HASH_ENCODINGS)
def test_a_new_field_with_its_default_does_not_change_the_hash(version: int) -> None:
    later = [to_later_classes(result) for result in RESULTS]
    assert "cumulative_logprob" in repr(later), "the test would prove nothing otherwise"
    assert compute_hash(tuple(later), version) == compute_hash(RESULTS, version)


# ---- version 2


def test_version_2_is_written_and_gives_this_hash() -> None:
    assert ResultStats().to_dict()["hash_version"] == HASH_VERSION == 2
    assert compute_hash(read_old_results(), 2) == "a8b621424c406d22c050d40f1fa7aa73"
    assert compute_hash(RESULTS, 2) == "b1d1027bf5628937e1196c029819def4"
    assert compute_hash([], 2) == "564e20ae22b4e4b642528a3ca06ac8d2"


def test_version_2_hashes_journal_records_that_keep_their_bytes() -> None:
    """Records of an older commit have the same bytes after decoding and encoding, or its hash would not hold."""
    for path in list_segments(OLD_RUN / "journal"):
        content, frames = path.read_bytes(), read_segment(path).frames
        for offset, length in zip(frames.offset.tolist(), frames.length.tolist(), strict=True):
            record = content[offset : offset + length]
            assert encode_result(decode_result(record)) == record


@settings(deadline=None)  # a loaded machine takes any time
@given(result=results)
def test_version_2_encodes_a_result_as_one_line(result: records.RowResult) -> None:
    encoded = HASH_ENCODINGS[2][1](result)
    assert encoded.count(b"\n") == 1 and encoded.endswith(b"\n"), "two results can't be read as others"


@pytest.mark.parametrize("version", HASH_ENCODINGS)
def test_the_hash_depends_on_every_result_and_on_their_order(version: int) -> None:
    hashes = [
        compute_hash(some, version) for some in (RESULTS, RESULTS[:-1], RESULTS[1:], RESULTS[::-1], RESULTS + RESULTS)
    ]
    assert len(set(hashes)) == len(hashes)


# ---- counts


def test_errors_are_counted_by_type_and_the_first_one_is_kept() -> None:
    stats = ResultStats()
    for result in RESULTS:
        stats.add(result)
    summary = stats.to_dict()
    assert (summary["num_rows"], summary["num_errors"], summary["num_generated_tokens"]) == (4, 1, 5)
    assert summary["errors"] == {"prompt_too_long": 1}
    assert stats.first_error == 'row 2: prompt_too_long: too "long"'
