"""Encode rejected attempts at a row as journal records of their own, so that a restart repeats none of them.

- An attempt is the result of one request, and for each of its samples why a check rejected it, or null.
- A record is a line of JSON, then the result as `encode_result` writes it.
- A frame's flag tells attempts from results: they make no row done, and belong to no result's hash.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dpgen.records import RequestId, RowResult
from dpgen.result_codec import decode_result, encode_result


class Rejection(NamedTuple):
    """Say which check rejected a completion, and why, for a person."""

    check: str
    reason: str

    def __str__(self) -> str:
        return f"{self.check}: {self.reason}"


@dataclass(frozen=True)
class RejectedAttempt:
    """Hold what a request generated, and which of its samples were rejected.

    Attributes:
        result: with the completions, or with the error that the request ended with.
        rejections: one for each completion, None for one that passed; a single one where the request failed.
    """

    result: RowResult
    rejections: tuple[Rejection | None, ...]

    @property
    def id(self) -> RequestId:
        """Return the id of the request."""
        return self.result.id


def encode_attempt(attempt: RejectedAttempt) -> bytes:
    """Return an attempt as one journal record."""
    line = json.dumps({"request": list(attempt.id)[1:], "rejected": attempt.rejections}, separators=(",", ":"))
    return b"\n".join([line.encode("ascii"), encode_result(attempt.result)])


def decode_attempt(record: bytes) -> RejectedAttempt:
    """Return the attempt from a record of `encode_attempt`.

    Raises:
        ValueError, KeyError, TypeError: `encode_attempt` did not write these bytes.
    """
    line, _, data = record.partition(b"\n")
    fields, result = json.loads(line), decode_result(data)
    rejections: Sequence[Sequence[str] | None] = fields["rejected"]
    return RejectedAttempt(
        result.with_id(RequestId(result.row, *fields["request"])),
        tuple(None if rejection is None else Rejection(*rejection) for rejection in rejections),
    )
