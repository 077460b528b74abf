"""Limit how long an engine may get nowhere, and how often it may die."""

from __future__ import annotations

import os
from dataclasses import dataclass

from dpgen.config.schema import RunConfig

# DPGEN_START_RETRY_S is for tests, which would otherwise wait 20 seconds for an engine that never starts.
_START_RETRY_S = float(os.environ.get("DPGEN_START_RETRY_S") or 10.0)


@dataclass(frozen=True)
class EngineLimits:
    """Limit how long an engine may get nowhere, and how often it may die.

    Attributes:
        timeout_s: seconds without progress, while it has work, after which an engine counts as hung.
        start_timeout_s: seconds without a message while it starts: for the check of its options, and again for loading
            the model.
        max_deaths: deaths in a row, without a finished row between them, after which the engine is abandoned.
        start_retry_s: seconds before a start that failed is tried again.
    """

    timeout_s: float
    start_timeout_s: float
    max_deaths: int
    start_retry_s: float = _START_RETRY_S

    @classmethod
    def from_config(cls, run: RunConfig) -> EngineLimits:
        """Return the limits that the configuration sets."""
        return cls(run.engine_timeout_s, run.engine_start_timeout_s, run.max_engine_deaths)
