"""Format sets of row indices as ranges: "0-41,57"."""

from __future__ import annotations

import numpy as np


def format_ranges(rows: np.ndarray) -> str:
    """Return row indices (ascending, without duplicates) as "0-41,57"; empty for none."""
    if not len(rows):
        return ""
    starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)
    ends = np.append(starts[1:], len(rows)) - 1
    pairs = zip(rows[starts].tolist(), rows[ends].tolist(), strict=True)
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in pairs)


def truncate_ranges(text: str, max_chars: int = 60) -> str:
    """Return ranges cut to a length that fits a line."""
    return text if len(text) <= max_chars else text[: text.rindex(",", 0, max_chars)] + ", ..."


def format_rows(rows: np.ndarray) -> str:
    """Return the number of rows and, in brackets, their ranges: "3 (7-9)"."""
    return f"{len(rows):,} ({truncate_ranges(format_ranges(np.unique(rows)))})"
