"""What vLLM's engine can't keep of a row's sampling costs that row alone; test_bad_input.py has the real engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dpgen.engine.vllm.rejections import SamplingLimits


def apply(*, is_v2: bool = True, **fields: Any) -> Any:
    """Return a row's sampling as an engine with a context of 100 tokens gets it; `fields` are not the default."""
    defaults = {"n": 1, "seed": None, "max_tokens": None, "min_tokens": 0, "logprobs": None, "prompt_logprobs": None}
    defaults |= dict.fromkeys(("allowed_token_ids", "logit_bias", "stop_token_ids"))
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=100), use_v2_model_runner=is_v2)
    params = SimpleNamespace(**(defaults | fields))
    SamplingLimits(config, SimpleNamespace()).apply(params)  # type: ignore[arg-type]
    return params


@pytest.mark.parametrize(("seed", "n"), [(2**63, 1), (2**127, 1), (-(2**63) - 1, 1), (2**63 - 1, 2)])
def test_a_seed_that_64_bits_do_not_hold_costs_its_row(seed: int, n: int) -> None:
    with pytest.raises(ValueError, match=rf"^seed={seed}: must be from -2\*\*63 to 2\*\*63 - {n}"):
        apply(seed=seed, n=n)


@pytest.mark.parametrize(("seed", "n"), [(2**63 - 1, 1), (2**63 - 2, 2), (-(2**63), 9)])
def test_the_last_seed_that_they_hold_is_taken(seed: int, n: int) -> None:
    assert apply(seed=seed, n=n).seed == seed


@pytest.mark.parametrize("n", [1, 2])
def test_generators_of_the_v1_runner_take_unsigned_seeds(n: int) -> None:
    for seed in (2**63, 2**64 - n):
        assert apply(is_v2=False, seed=seed, n=n).seed == seed
    with pytest.raises(ValueError, match=rf"^seed={2**64 - n + 1}: must be from -2\*\*63 to 2\*\*64 - {n}"):
        apply(is_v2=False, seed=2**64 - n + 1, n=n)


def test_a_length_beyond_the_context_is_the_contexts() -> None:
    params = apply(max_tokens=10**30, min_tokens=10**20)
    assert (params.max_tokens, params.min_tokens) == (100, 100), "32 bits hold no more than 2**31 - 1 of both together"
    params = apply(max_tokens=7, min_tokens=3)
    assert (params.max_tokens, params.min_tokens) == (7, 3)
    assert apply().max_tokens is None


@pytest.mark.parametrize(
    ("name", "most", "others"),
    [("allowed_token_ids", 1024, {}), ("logit_bias", 1024, {}), ("stop_token_ids", 128, {"min_tokens": 1})],
)
def test_more_items_than_an_engine_has_room_for_cost_their_row(name: str, most: int, others: dict[str, int]) -> None:
    apply(**{name: dict.fromkeys(range(most))}, **others)
    too_many = {name: dict.fromkeys(range(most + 1))}
    with pytest.raises(ValueError, match=f"^{name} has {most + 1:,} items: vLLM's V2 model runner takes at most"):
        apply(**too_many, **others)
    apply(**too_many, **others, is_v2=False)


def test_stop_tokens_that_are_not_kept_off_may_be_many() -> None:
    assert len(apply(stop_token_ids=list(range(500))).stop_token_ids) == 500
