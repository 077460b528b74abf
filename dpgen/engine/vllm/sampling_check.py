"""Check sampling before the model loads, as vLLM does when a request comes in.

Constraints (JSON schemas, regular expressions, choices, grammars) are checked by the grammar backend that vLLM would
choose for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.tokenizers import cached_tokenizer_from_config

from dpgen.config.checks import CONSTRAINTS
from dpgen.engine.vllm.field_names import VllmFields


def list_vllm_fields() -> VllmFields:
    """Return the names of the loaded vLLM's fields."""
    return VllmFields(
        {field.name for field in dataclasses.fields(EngineArgs)},
        set(SamplingParams.__struct_fields__),
        {field.name for field in dataclasses.fields(StructuredOutputsParams)},
    )


def check_params(params: SamplingParams, config: VllmConfig) -> None:
    """Check sampling against the model's configuration.

    Raises:
        ValueError: vLLM rejects it.
    """
    has_tokenizer = params.structured_outputs is not None and not config.model_config.skip_tokenizer_init
    params.verify(
        config.model_config,
        config.speculative_config,
        config.structured_outputs_config,
        cached_tokenizer_from_config(config.model_config) if has_tokenizer else None,
    )


def name_constraint(section: str, constraint: Any, *, is_output_schema: bool) -> str:
    """Return the key of the configuration that holds a constraint, e.g. sampling.structured_outputs.regex.

    Args:
        constraint: the `structured_outputs` of the section.
        is_output_schema: True if `output.schema` has set that of the section `sampling`.
    """
    if is_output_schema and section == "sampling":
        return "output.schema"
    names = [name for name in CONSTRAINTS if isinstance(constraint, Mapping) and constraint.get(name) is not None]
    return f"{section}.structured_outputs" + (f".{names[0]}" if len(names) == 1 else "")
