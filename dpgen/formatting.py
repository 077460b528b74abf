"""Format numbers, values and row indices for messages: no "1 rows", no "a int"; "0-41,57" for ranges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def format_count(number: int, noun: str) -> str:
    """Return ``1 row`` or ``12,000 rows``, for nouns whose plural ends in s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_bytes(number: int) -> str:
    """Return ``1.2 GB`` for 1,234,567,890."""
    size, units = float(number), iter(("bytes", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while size >= 1000 and unit != "TB":
        size, unit = size / 1000, next(units)
    return f"{number:,} bytes" if unit == "bytes" else f"{size:,.1f} {unit}"


def describe_type(value: Any) -> str:
    """Return ``null``, ``a str`` or ``an int``, for messages about a value of the wrong type."""
    if value is None:
        return "null"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def suggest_conversion(content: bytes = b"") -> str:
    """Return the command for text that is no UTF-8: UTF-16 by its mark, or Windows-1252, of which Latin-1 is a part."""
    encoding = "UTF-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "WINDOWS-1252"
    return f"iconv -f {encoding} -t UTF-8"


def format_extra(extra: str) -> str:
    """Return how to install an extra of dpgen. The package index has another project under the name `dpgen`."""
    return f"pip install '.[{extra}]' in dpgen's checkout"


def format_duration(seconds: float) -> str:
    """Return ``42 s``, ``3 min 20 s``, ``5 h 07 min`` or ``2 d 03 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def escape_text(text: str, *, keep: str = "") -> str:
    """Return foreign text on one line, safe for a terminal: what does not print as itself becomes an escape.

    That is control characters, line breaks, marks that change the direction of text, and halves of pairs.

    Args:
        keep: characters that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape", "surrogatepass").decode("ascii")
        for char in text
    )


def format_ranges(rows: np.ndarray) -> str:
    """Return row indices (ascending, without duplicates) as "0-41,57"; empty for none."""
    import numpy as np

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
    import numpy as np

    return f"{len(rows):,} ({truncate_ranges(format_ranges(np.unique(rows)))})"
