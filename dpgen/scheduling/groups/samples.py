"""Take a sample of the rows, and sum up its values."""

from __future__ import annotations

import numpy as np

SAMPLE_ROWS = 20_000


def sample_rows(remaining: np.ndarray) -> np.ndarray:
    """Return some of the rows: half of them neighbours, since related rows often stand together."""
    if len(remaining) <= SAMPLE_ROWS:
        return remaining
    blocks = np.linspace(0, len(remaining) - 500, SAMPLE_ROWS // 1000).astype(np.int64)
    together = (blocks[:, None] + np.arange(500)).ravel()
    apart = np.random.default_rng(0).choice(len(remaining), SAMPLE_ROWS // 2, replace=False)
    sample: np.ndarray = remaining[np.unique(np.concatenate([together, apart]))]
    return sample


def compute_tail_ratio(values: np.ndarray) -> float:
    """Return the 99th percentile over the median."""
    if values.dtype.kind == "f":
        values = values[~np.isnan(values)]
    if not len(values):
        return 1.0
    median, high = np.quantile(values, [0.5, 0.99])
    return float(high / max(median, 1))


def format_range(values: np.ndarray, unit: str = "") -> str:
    """Return ``min 1, median 20, max 300 characters``."""
    if not len(values):
        return "no row has one"
    low, median, high = _compute_min_median_max(values)
    return f"min {low:,.0f}, median {median:,.0f}, max {high:,.0f} {unit}".rstrip()


def _compute_min_median_max(values: np.ndarray) -> tuple[float, float, float]:
    low, median, high = np.quantile(values, [0.0, 0.5, 1.0])
    return float(low), float(median), float(high)
