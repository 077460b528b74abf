"""Functions for `check.function` in tests: jobs import them by name, with tests/ in PYTHONPATH."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any


def draw(row: dict[str, Any], completion: Any) -> float:
    """Return a number from 0 to 1 that depends on the row, the sample and the attempt alone."""
    name = f"{row['prompt']}/{completion.sample}/{completion.attempt}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "little") / 2**32


def fail_sometimes(row: dict[str, Any], completion: Any) -> bool | str:
    """Fail 40 % of all attempts."""
    return draw(row, completion) >= 0.4 or "bad luck"


def log_and_fail_sometimes(row: dict[str, Any], completion: Any) -> bool | str:
    """Do the same, and write a line for each attempt into the file that the row names."""
    with Path(row["log"]).open("a") as file:
        file.write(f"{row['prompt']}/{completion.sample}/{completion.attempt}\n")
    return fail_sometimes(row, completion)


def misbehave(row: dict[str, Any], completion: Any) -> bool:
    """End the process, hang or raise, as the row's prompt says, at the first attempt."""
    if completion.attempt == 0:
        if row["prompt"] == "exit":
            os._exit(3)
        if row["prompt"] == "hang":
            time.sleep(600)
        if row["prompt"] == "raise":
            raise KeyError("no such key")
    return True
