"""Format numbers for a page: few digits, with units."""

from __future__ import annotations

from dpgen.formatting import format_duration


def format_number(number: float) -> str:
    """Return ``512``, ``9,120``, ``12.3 k``, ``1.24 M`` or ``3.1 G``."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (99_999.5, "k")):
        if abs(number) >= limit:
            scaled = number / {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}[unit]
            return f"{scaled:.{0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2}f} {unit}"
    return f"{number:,.0f}" if number >= 10 or number == round(number) else f"{number:.1f}"


def format_percent(fraction: float) -> str:
    """Return ``12 %``, ``3.4 %``, ``< 0.1 %`` or ``0 %``."""
    percent = 100 * fraction
    if percent == 0 or percent >= 9.95:
        return f"{percent:.0f} %"
    return f"{percent:.1f} %" if percent >= 0.1 else "< 0.1 %"


def format_seconds(seconds: float) -> str:
    """Return ``120 ms``, ``2.4 s``, ``42 s`` or ``3 min 20 s``."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 9.95 else format_duration(seconds)
