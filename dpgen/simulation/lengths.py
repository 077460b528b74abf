"""Sample the lengths of made-up rows from named distributions of generated tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from dpgen.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

_MAX_TOKENS = 1e15  # far beyond any context, and exact as a float
LENGTHS_HELP = "constant:TOKENS, lognormal:MEDIAN:SIGMA, or a JSON file with quantiles"


def sample_lengths(kind: str, num_rows: int, seed: int = 0) -> np.ndarray:
    """Return the tokens to generate of each row, int64[num_rows], at least 1, in random order.

    Args:
        kind: ``constant:64``; ``lognormal:250:0.7``, with its median and sigma; or a file with
            ``{"quantiles": {"0.5": 792, ...}}``, or with a list of evenly spaced quantiles from 0 to 1.

    Raises:
        ConfigError: `kind` is none of these.
    """
    import numpy as np  # here, since `dpgen simulate --help` reads `LENGTHS_HELP`

    random = np.random.default_rng(seed)
    name, *numbers = kind.split(":")
    try:
        if name == "constant" and len(numbers) == 1:
            samples = np.full(num_rows, float(numbers[0]))
        elif name == "lognormal" and len(numbers) == 2:
            samples = float(numbers[0]) * random.lognormal(0.0, float(numbers[1]), num_rows)
        else:
            probabilities, values = _read_quantiles(Path(kind))
            samples = np.interp(random.random(num_rows), probabilities, values)
        if not ((samples >= 0) & (samples < _MAX_TOKENS)).all():
            raise ValueError("tokens can't be negative or infinite")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"lengths={kind}: must be {LENGTHS_HELP} ({error})") from None
    lengths: np.ndarray = np.maximum(1, samples.round()).astype(np.int64)
    return lengths


def _read_quantiles(path: Path) -> tuple[list[float], list[float]]:
    """Return probabilities, ascending, and the tokens of each quantile."""
    quantiles = json.loads(path.read_text())["quantiles"]
    if isinstance(quantiles, dict):
        pairs = sorted((float(probability), float(value)) for probability, value in quantiles.items())
        return [probability for probability, _ in pairs], [value for _, value in pairs]
    import numpy as np

    return list(np.linspace(0, 1, len(quantiles))), list(map(float, quantiles))
