"""Values between ranks: what arrives is what was sent, and a stranger's bytes are dropped without running anything."""

from __future__ import annotations

import contextlib
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpgen.distributed.codec import ForeignMessage, decode, encode
from dpgen.distributed.group import SingleRankGroup

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@given(VALUES)
def test_what_arrives_is_what_was_sent(value: Any) -> None:
    assert decode(encode(value)) == value


def test_a_tuple_arrives_as_a_list_and_no_dict_is_taken_for_anything_else() -> None:
    assert decode(encode((1, ("b", b"x"), {"b": 1, "d": [b"y"]}))) == [1, ["b", b"x"], {"b": 1, "d": [b"y"]}]
    assert math.isnan(decode(encode(math.nan))) and decode(encode("\ud800")) == "\ud800"


def test_bytes_travel_raw() -> None:
    data = bytes(range(256)) * 4096
    assert len(encode(["segment", 0, data])) < len(data) + 64


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1, 2}, "type set"),
        (np.int64(1), "type int64"),
        ([np.bool_(True)], "type bool"),
        ({"a": {1: 2}}, "key of type int"),
        (object(), "type object"),
    ],
)
def test_what_could_arrive_as_something_else_is_rejected_where_it_is_sent(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        encode(value)
    with pytest.raises(TypeError, match=message):  # so a test of one rank notices it, too
        SingleRankGroup().all_gather_object(value)
    with pytest.raises(TypeError, match=message):
        SingleRankGroup().gather_object(value)


GOOD = encode([1, b"xyz", {"a": 1}])
HEAD = GOOD.index(b"[")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        pickle.dumps([1, b"xyz"]),
        bytes(len(GOOD)),
        GOOD[:-1],
        GOOD + b"z",
        GOOD[:HEAD],
        GOOD.replace(b'"b":3', b'"b":9'),
        GOOD.replace(b'"b":3', b'"b":-1'[:5] + b"1"),
        GOOD.replace(b'"b":3', b'"c":3'),
        GOOD.replace(b'"b":3', b'"b":"'),
        GOOD.replace(b'"a"', b"[1]"),
        b"dpgen\x00\x02" + GOOD[7:],
        GOOD[:7] + b"\xff" * 8 + GOOD[15:],
        GOOD[:7] + (100_000).to_bytes(8, "little") + b"[" * 100_000,
    ],
)
def test_bytes_of_another_program_or_version_are_dropped(data: bytes) -> None:
    with pytest.raises(ForeignMessage, match="a stranger or another version of dpgen is connected"):
        decode(data)


@given(st.binary(max_size=60), st.integers(min_value=0, max_value=len(GOOD)))
def test_damaged_messages_never_raise_anything_else(noise: bytes, place: int) -> None:
    for data in (noise, GOOD[:place] + noise, GOOD[:15] + noise):
        with contextlib.suppress(ForeignMessage):
            decode(data)
            assert data.startswith(GOOD[:7]), "what begins otherwise is never taken for a message"
