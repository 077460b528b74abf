"""Know which seeds vLLM's engine can hold.

vLLM's server alone checks seeds: one beyond the limits ends the engine, and the other rows in flight with it.
"""

from __future__ import annotations

_MIN_SEED, _MAX_SEED = -(2**63), 2**63 - 1


def find_wrong_seed(seed: int, num_samples: int) -> str | None:
    """Return what is wrong with a seed that vLLM's engine can't hold; None if it can. Sample i gets seed + i."""
    if _MIN_SEED <= seed <= _MAX_SEED - (num_samples - 1):
        return None
    mistake = f"seed={seed}: must be from -2**63 to 2**63 - {num_samples}"
    return mistake if num_samples == 1 else f"{mistake}, as the last of n={num_samples} samples gets seed + n - 1"
