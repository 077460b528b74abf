"""Numbers and flags of `engine.*`: written as texts, and such that are none."""

from __future__ import annotations

from typing import Any

import pytest

from dpgen.config.loader import load
from dpgen.config.schema import Config
from dpgen.engine.pool.engine_count import estimate_engine_bytes, plan_engine_count
from dpgen.errors import ConfigError


def make_config(*words: str) -> Config:
    return load([], ["run.dir=r", "model=m", "data.path=d.jsonl", "data.prompt_column=p", *words])


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ('max_num_seqs="16"', 16),
        ("max_num_seqs=' 16 '", 16),
        ("kv_cache_memory_bytes=6e9", 6_000_000_000),
        ('gpu_memory_utilization=".5"', 0.5),
        ('trust_remote_code="False"', False),
        ("enable_prefix_caching='off'", False),
        ("enforce_eager=1", True),
        ("max_num_seqs=null", None),
        ('revision="123"', "123"),
        ('a_later_option="1"', "1"),
    ],
)
def test_a_number_or_flag_in_quotes_is_one(written: str, value: Any) -> None:
    [read] = make_config(f"engine.{written}").engine.values()
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        ("max_num_seqs=many", "a whole number"),
        ("max_num_seqs=true", "a whole number"),
        ("max_num_seqs=1.5", "a whole number"),
        ("max_model_len=auto", "a whole number"),
        ("max_num_batched_tokens={decode: 1}", "a whole number"),
        ("gpu_memory_utilization=[0.5]", "a number"),
        ("gpu_memory_utilization=.nan", "a number"),
        ("enforce_eager=maybe", "true or false"),
        ("enforce_eager=2", "true or false"),
    ],
)
def test_what_is_no_number_or_flag_is_a_mistake_that_names_the_key(written: str, kind: str) -> None:
    name = written.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"^engine\.{name}=.*: must be {kind}$"):
        make_config(f"engine.{written}")


def test_memory_is_planned_with_numbers_in_quotes_and_with_a_context_of_what_fits() -> None:
    config = make_config('engine.max_num_seqs="256"', 'engine.max_model_len="128"')
    assert estimate_engine_bytes(1 << 30, 32 << 10, config.engine) == 4 << 30
    assert plan_engine_count(config, 1e9, 16, on_gpu=True).is_auto
    assert estimate_engine_bytes(1 << 30, 32 << 10, {"max_model_len": -1}) == estimate_engine_bytes(
        1 << 30, 32 << 10, {}
    )
