"""How long the rows of a made-up dataset are: named distributions of generated tokens, for simulations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from dpgen.errors import ConfigError

LENGTHS_HELP = "constant:TOKENS, lognormal:MEDIAN:SIGMA, or a JSON file with quantiles"


def sample_lengths(kind: str, num_rows: int, seed: int = 0) -> np.ndarray:
    """Tokens to generate of so many rows, int64, at least 1 each, in random order.

    Args:
        kind: ``constant:64``; ``lognormal:250:0.7``, its median and sigma; or a file that holds
            ``{"quantiles": {"0.5": 792, ...}}``, or a list of evenly spaced ones from 0 to 1.

    Raises:
        ConfigError: none of these.
    """
    random = np.random.default_rng(seed)
    name, *numbers = kind.split(":")
    try:
        if name == "constant" and len(numbers) == 1:
            drawn = np.full(num_rows, float(numbers[0]))
        elif name == "lognormal" and len(numbers) == 2:
            drawn = random.lognormal(np.log(float(numbers[0])), float(numbers[1]), num_rows)
        else:
            places, values = _read_quantiles(Path(kind))
            drawn = np.interp(random.random(num_rows), places, values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"lengths {kind!r} are none of {LENGTHS_HELP} ({error})") from None
    lengths: np.ndarray = np.maximum(1, drawn.round()).astype(np.int64)
    return lengths


def _read_quantiles(path: Path) -> tuple[list[float], list[float]]:
    found = json.loads(path.read_text())
    quantiles = found["quantiles"]
    if isinstance(quantiles, dict):
        pairs = sorted((float(place), float(value)) for place, value in quantiles.items())
        return [place for place, _ in pairs], [value for _, value in pairs]
    return list(np.linspace(0, 1, len(quantiles))), list(map(float, quantiles))
