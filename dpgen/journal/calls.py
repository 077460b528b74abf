"""Encode the finished calls of rows' programs as journal records of their own, so that a restart repeats none of them.

- A record is a line of JSON, then the call's result as `encode_result` writes it. What a tool returned is the text of
  a completion, as JSON.
- The line holds the call's place in the program, and what was asked: its hash, and the beginning of it, to show the
  difference where the program asks something else in its next life.
- Like rejected attempts, calls make no row done, and belong to no result's hash.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import PurePath
from typing import Any
from uuid import UUID

from dpgen.formatting import describe_type
from dpgen.records import RequestId, RowResult
from dpgen.result_codec import decode_result, encode_result

_MAX_SHOWN_CHARS = 1_000
_CONTEXT_CHARS = 30


@dataclass(frozen=True)
class AskedText:
    """Hold what a call asks, as far as it is kept.

    Attributes:
        digest: of the whole.
        beginning: its first 1,000 characters. num_chars: of the whole.
    """

    digest: str
    beginning: str
    num_chars: int

    @classmethod
    def of(cls, asked: Any) -> AskedText:
        """Return what is kept of a value of JSON; it may hold dates, bytes and the like, as columns do.

        Raises:
            TypeError: it holds something else.
        """
        try:
            text = json.dumps(asked, sort_keys=True, separators=(",", ":"), default=_to_json_value)
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(f"a call takes values of JSON: {error}") from None
        digest = hashlib.blake2b(text.encode("ascii"), digest_size=16).hexdigest()
        return cls(digest, text[:_MAX_SHOWN_CHARS], len(text))

    def describe_difference(self, now: AskedText) -> str:
        """Return where two texts differ, with the characters around that."""
        before, after = self.beginning, now.beginning
        pairs = zip(before, after, strict=False)
        first = next((index for index, (old, new) in enumerate(pairs) if old != new), min(len(before), len(after)))
        if first == len(before) == len(after):
            return f"both begin alike, and differ after {first:,} characters"
        start = max(0, first - _CONTEXT_CHARS)
        old, new = (text[start : first + _CONTEXT_CHARS] for text in (before, after))
        return f"before: ...{old}..., now: ...{new}..."


def _to_json_value(value: Any) -> Any:
    """Return what stands for a value that JSON does not have; equal values must give the same in each process."""
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": hashlib.blake2b(value, digest_size=16).hexdigest()}
    if isinstance(value, (date, time, timedelta, Decimal, UUID, PurePath)):
        return str(value)
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{describe_type(value)} is none")


@dataclass(frozen=True)
class FinishedCall:
    """Hold a finished call of a row's program.

    Attributes:
        place: where in the program it is: "2" for its third call; "2.0" for the first call in a task that was begun
            as the third.
        result: with the id of the call.
    """

    place: str
    asked: AskedText
    result: RowResult

    @property
    def id(self) -> RequestId:
        """Return the id of the call."""
        return self.result.id


def encode_call(call: FinishedCall) -> bytes:
    """Return a call as one journal record."""
    asked = [call.asked.digest, call.asked.beginning, call.asked.num_chars]
    line = json.dumps({"request": list(call.id)[1:], "place": call.place, "asked": asked}, separators=(",", ":"))
    return b"\n".join([line.encode("ascii"), encode_result(call.result)])


def decode_call(record: bytes) -> FinishedCall | None:
    """Return the call from a record of `encode_call`; None if it is the record of a rejected attempt.

    Raises:
        ValueError, KeyError, TypeError: nobody wrote these bytes.
    """
    line, _, data = record.partition(b"\n")
    fields, result = json.loads(line), decode_result(data)
    if "place" not in fields:
        return None
    result = result.with_id(RequestId(result.row, *fields["request"]))
    return FinishedCall(fields["place"], AskedText(*fields["asked"]), result)
