"""Skip tests that need more than this machine has, or fail them where the environment requires them to run."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def skip_or_fail(reason: str, *variables: str) -> NoReturn:
    """Skip the test with the reason; fail it if one of these environment variables is set, as in CI."""
    for variable in variables:
        if os.environ.get(variable, "0") not in ("", "0"):
            pytest.fail(f"{variable} is set, but {reason}")
    pytest.skip(reason)
