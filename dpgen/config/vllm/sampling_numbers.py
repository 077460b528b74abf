"""Read the whole numbers of sampling as vLLM does, and know which seeds its engine can hold.

vLLM's server alone checks seeds: one beyond the limits ends the engine, and the other rows in flight with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpgen.config.vllm.engine_numbers import read_number

MAX_SAMPLES = 16384  # of a request, by vLLM's default


def find_wrong_seed(seed: int, num_samples: int, num_bits: int = 63) -> str | None:
    """Return what is wrong with a seed that vLLM's engine can't hold; None if it can. Sample i gets seed + i.

    Args:
        num_bits: of a seed above 0: 63 in the V2 model runner, and in requests to vLLM's server; 64 in the V1 model
            runner, whose generators are torch's.
    """
    if -(2**63) <= seed <= 2**num_bits - num_samples:
        return None
    mistake = f"seed={seed}: must be from -2**63 to 2**{num_bits} - {num_samples}"
    return mistake if num_samples == 1 else f"{mistake}, as the last of n={num_samples} samples gets seed + n - 1"


def read_sampling_numbers(sampling: Mapping[str, Any], num_ids: int) -> dict[str, Any]:
    """Return fields of SamplingParams with numbers in place of what vLLM takes for them: true, 4.0, "4".

    Args:
        num_ids: of the vocabulary: the most log-probabilities for a token.

    Raises:
        ValueError: a field is no whole number, or vLLM would reject it.
    """
    fields = dict(sampling)
    limits = {"max_tokens": (1, None), "n": (1, MAX_SAMPLES), "seed": (None, None)}
    limits |= dict.fromkeys(("logprobs", "prompt_logprobs"), (0, num_ids))
    for name, (least, most) in limits.items():
        if (given := fields.get(name)) is None:
            continue
        value = read_number("integer", given)
        if not isinstance(value, int):
            raise ValueError(f"{name}={given!r}: must be a whole number")
        if least is not None and value < least:
            raise ValueError(f"{name}={given!r}: must be at least {least}")
        if most is not None and value > most:
            raise ValueError(f"{name}={given!r}: must be at most {most}")
        fields[name] = int(value)
    seed = fields.get("seed")
    if seed is not None and (mistake := find_wrong_seed(seed, fields.get("n") or 1)) is not None:
        raise ValueError(mistake)
    return fields
