"""Compute the content of `_SUCCESS`: counts, and a hash over every result in input order.

The hash is blake2b over a versioned encoding of the results, and `_SUCCESS` names the version:

- Version 1, which older files leave unnamed, hashes the `repr` that results had at commit 1b51951. It depends on the
  classes' names and fields and on what this Python considers printable. `verify` still computes it.
- Version 2 hashes a prefix with the version, then the journal record of each result, ended by a newline.

A change to an encoding needs a new version: runs that are finished must still verify.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from typing import Any

from dpgen.records import Completion, RowError, RowResult
from dpgen.result_codec import encode_result

HASH_VERSION = 2


class ResultStats:
    """Count and hash results, which must be added in input order.

    Args:
        hash_version: a key of `HASH_ENCODINGS`.

    Attributes:
        first_error: the first row with an error, for a person; "" if there is none.
        most_frequent_error: the first row with an error of the most frequent type, likewise.
    """

    def __init__(self, hash_version: int = HASH_VERSION) -> None:
        prefix, self._encode = HASH_ENCODINGS[hash_version]
        self._hash_version = hash_version
        self._digest = hashlib.blake2b(prefix, digest_size=16)
        self._num_rows = self._num_generated_tokens = 0
        self._errors: Counter[str] = Counter()
        self._examples: dict[str, str] = {}  # error type → its first row

    @property
    def first_error(self) -> str:
        return next(iter(self._examples.values()), "")

    @property
    def most_frequent_error(self) -> str:
        return self._examples[self._errors.most_common(1)[0][0]] if self._errors else ""

    def add(self, result: RowResult) -> None:
        self._digest.update(self._encode(result))
        self._num_rows += 1
        if result.error is not None:
            example = f"row {result.row}: {result.error.type}: {result.error.message}"
            self._examples.setdefault(result.error.type, example)
            self._errors[result.error.type] += 1
        self._num_generated_tokens += result.num_generated_tokens

    def to_dict(self) -> dict[str, Any]:
        """Return num_rows, num_errors, errors (type → number), num_generated_tokens, hash_version and hash."""
        return {
            "num_rows": self._num_rows,
            "num_errors": self._errors.total(),
            "errors": dict(sorted(self._errors.items())),
            "num_generated_tokens": self._num_generated_tokens,
            "hash_version": self._hash_version,
            "hash": self._digest.hexdigest(),
        }


def _encode_v1(result: RowResult) -> bytes:
    """Return `repr(result)` as at commit 1b51951, whatever fields the classes have today."""
    completions = ", ".join(map(_format_completion_v1, result.completions))
    if len(result.completions) == 1:
        completions += ","  # as in the repr of a tuple
    text = (
        f"RowResult(row={result.row!r}, num_prompt_tokens={result.num_prompt_tokens!r}, "
        f"completions=({completions}), error={_format_error_v1(result.error)})"
    )
    return text.encode("utf-8", "backslashreplace")


def _format_completion_v1(completion: Completion) -> str:
    return (
        f"Completion(text={completion.text!r}, finish_reason={completion.finish_reason!r}, "
        f"num_tokens={completion.num_tokens!r}, token_ids={completion.token_ids!r})"
    )


def _format_error_v1(error: RowError | None) -> str:
    return "None" if error is None else f"RowError(type={error.type!r}, message={error.message!r})"


def _encode_v2(result: RowResult) -> bytes:
    # A record is one line, which lists the bytes of arrays after it, so results can't run into each other.
    return encode_result(result) + b"\n"


# Version → what is hashed first, and the encoding of a result.
HASH_ENCODINGS: dict[int, tuple[bytes, Callable[[RowResult], bytes]]] = {
    1: (b"", _encode_v1),
    2: (b"dpgen result hash 2\n", _encode_v2),
}
