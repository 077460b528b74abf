"""Say why vLLM rejects a row or an option, and reject sampling that vLLM takes and its engine dies of.

A value that an array of the engine has no room for raises while the engine steps, and so costs all rows in flight.
vLLM 0.32 has seeds and lengths in `vllm/v1/worker/gpu/states.py` and `sample/states.py`, and in a generator of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pydantic

from dpgen.config.vllm.sampling_numbers import find_wrong_seed
from dpgen.data.prompts.token_ids import exceeds_context

if TYPE_CHECKING:
    from dpgen.engine.vllm.adapters import VllmAdapters

# Items of one request that the arrays of the V2 model runner hold (`sample/logit_bias.py`).
_MAX_ITEMS = {"allowed_token_ids": 1024, "logit_bias": 1024, "stop_token_ids": 128}


class SamplingLimits:
    """Hold a row's sampling to what vLLM's engine can keep of it, and dpgen of its result.

    Args:
        config: vLLM's `VllmConfig`; None where the engine's options are wrong.
    """

    def __init__(self, config: Any, adapters: VllmAdapters) -> None:
        self._model, self._adapters = None if config is None else config.model_config, adapters
        is_v2 = getattr(config, "use_v2_model_runner", False)
        self._max_items = _MAX_ITEMS if is_v2 else {}
        self._seed_bits = 63 if is_v2 or config is None else 64

    def apply(self, params: Any) -> None:
        """Lower lengths beyond the context, where every row ends, to the context's.

        Args:
            params: vLLM's `SamplingParams`.

        Raises:
            ValueError: another value can't be kept.
        """
        if params.seed is not None and (mistake := find_wrong_seed(params.seed, params.n, self._seed_bits)):
            raise ValueError(mistake)
        for name, most in self._max_items.items():
            is_kept = name != "stop_token_ids" or params.min_tokens > 0  # else they only end the row
            if is_kept and (count := len(getattr(params, name) or ())) > most:
                raise ValueError(f"{name} has {count:,} items: vLLM's V2 model runner takes at most {most:,}")
        if self._model is not None:
            limit = self._model.max_model_len
            params.max_tokens = None if params.max_tokens is None else min(params.max_tokens, limit)
            params.min_tokens = min(params.min_tokens, limit)
        self._check_logprobs(params)

    def _check_logprobs(self, params: Any) -> None:
        """Raise ValueError for a number of log-probabilities that dpgen can't keep, or that vLLM does not compute."""
        model = self._model
        if params.prompt_logprobs is not None:
            self._adapters.check_prompt_logprobs()
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(params, name)
            if count is not None and count < 0:
                raise ValueError(f"{name}={count}: must be at least 0; dpgen keeps the same number for each token")
            if count is None or model is None:
                continue
            if count > model.get_vocab_size():
                raise ValueError(f"{name}={count}: the model has only {model.get_vocab_size()} tokens")
            if 0 <= model.max_logprobs < count:
                raise ValueError(f"{name}={count}: more than engine.max_logprobs={model.max_logprobs}; set that higher")


def classify_rejection(
    error: Exception, num_prompt_tokens: int, max_model_len: int, default: str = "bad_sampling"
) -> str:
    """Return the error type of a row that vLLM's `add_request` rejected; vLLM itself gives only a message.

    Args:
        default: the type where nothing else tells it.
    """
    if num_prompt_tokens == 0:
        return "empty_prompt"
    if exceeds_context(num_prompt_tokens, max_model_len):
        return "prompt_too_long"
    if "out of vocabulary" in str(error).lower():
        return "out_of_vocabulary"
    return default


def summarize_error(error: Exception) -> str:
    """Return an error of vLLM or pydantic as one line."""
    if isinstance(error, pydantic.ValidationError):
        parts = []
        for problem in error.errors(include_url=False, include_context=False):
            path = ".".join(str(part) for part in problem["loc"] if "[" not in str(part))
            if problem["type"] != "is_instance_of":
                parts.append(f"{path}: {problem['msg']}" if path else str(problem["msg"]))
        if parts:
            return "; ".join(parts)
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if lines and lines[0].endswith(":"):  # a regular expression, its place and the reason follow
        return " ".join(lines)[:300]
    return lines[0] if lines else type(error).__name__
