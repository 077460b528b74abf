"""Make harnesses of programs, and end them after each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers.program_harness import Harness


@pytest.fixture
def make_harness() -> Iterator[Callable[..., Harness]]:
    made: list[Harness] = []

    def make(*arguments: Any, **others: Any) -> Harness:
        made.append(Harness(*arguments, **others))
        return made[-1]

    yield make
    for harness in made:
        harness.loop.close()
