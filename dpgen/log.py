"""How a rank speaks: whole lines on stderr, each saying who said it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TextIO


def setup_logging(rank: int, part: str = "", stream: TextIO | None = None) -> Callable[[str], None]:
    """A function that prints a line saying which rank spoke.

    Args:
        part: of the rank: "engine", or nothing for the rank process itself.
    """
    name = f"[rank {rank}{' ' + part if part else ''}]"

    def say(line: str) -> None:
        out = stream or sys.stderr
        # One write a line: lines of several processes on one terminal then don't run into each other.
        out.write(f"{name} {line}\n")
        out.flush()

    return say
