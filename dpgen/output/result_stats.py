"""What `_SUCCESS` says of a result: counts, and a hash over every row in input order."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

from dpgen.records import RowResult


class ResultStats:
    """Counts and hashes results; they must come in input order."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)
        self._num_rows = self._num_generated_tokens = 0
        self._errors: Counter[str] = Counter()
        self.first_error = ""

    def add(self, result: RowResult) -> None:
        self._digest.update(repr(result).encode("utf-8", "backslashreplace"))
        self._num_rows += 1
        if result.error is not None:
            self.first_error = self.first_error or f"row {result.row}: {result.error.type}: {result.error.message}"
            self._errors[result.error.type] += 1
        self._num_generated_tokens += result.num_generated_tokens

    def to_dict(self) -> dict[str, Any]:
        """num_rows, num_errors, errors (type → number), num_generated_tokens, hash."""
        return {
            "num_rows": self._num_rows,
            "num_errors": self._errors.total(),
            "errors": dict(sorted(self._errors.items())),
            "num_generated_tokens": self._num_generated_tokens,
            "hash": self._digest.hexdigest(),
        }
