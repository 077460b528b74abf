"""Fields that vLLM doesn't know: what replaced them, or the nearest one, or no hint at all."""

from __future__ import annotations

import re

import pytest

from dpgen.config import loader
from dpgen.config.options import legal_keys
from dpgen.config.vllm import vllm_fields
from dpgen.errors import ConfigError, find_nearest_name

ENGINE = {"max_num_seqs", "max_model_len", "structured_outputs_config", "dtype", "seed"}
SAMPLING = {"stop", "top_p", "top_k", "temperature", "max_tokens", "structured_outputs", "seed", "n"}


@pytest.mark.parametrize(
    ("section", "name", "words"),
    [
        (
            "sampling",
            "guided_json",
            "unknown key 'sampling.guided_json': write sampling.structured_outputs={json: ...}",
        ),
        (
            "sampling_by_rank[1]",
            "guided_regex",
            "'sampling_by_rank[1].guided_regex': write sampling.structured_outputs",
        ),
        ("sampling", "best_of", "sampling.n samples are all returned"),
        ("sampling", "lora_request", "write lora={NAME: PATH}, and data.lora_column"),
        ("sampling", "use_beam_search", "no beam search"),
        ("sampling", "max_new_tokens", "write sampling.max_tokens"),
        ("sampling", "max_model_len", "write engine.max_model_len"),
        ("engine", "temperature", "write sampling.temperature"),
        ("engine", "rope_scaling", "write engine.hf_overrides={rope_parameters: {...}}"),
        ("engine", "task", "write task=embed, classify, score or reward"),
        ("engine", "swap_space", "vLLM has removed it without a successor"),
        ("engine", "max_num_seq", "did you mean 'engine.max_num_seqs'?"),
        ("sampling", "top_q", "did you mean 'sampling.top_"),
    ],
)
def test_a_field_of_another_version_names_what_replaced_it(section: str, name: str, words: str) -> None:
    legal, other = (ENGINE, SAMPLING) if section == "engine" else (SAMPLING, ENGINE)
    assert words in vllm_fields.describe_unknown_field(section, name, legal, other)


@pytest.mark.parametrize("name", ["zzz", "watermark", "best", "prefix"])
def test_a_field_that_is_like_no_other_gets_no_hint(name: str) -> None:
    described = vllm_fields.describe_unknown_field("sampling", name, SAMPLING, ENGINE)
    assert "did you mean" not in described and "write" not in described


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("run.sed", "run.seed"), ("dta.path", "data.path"), ("prompt_column", "data.prompt_column"), ("engin.x", "engine"),
     ("samplin", "sampling"), ("run.best_of", None), ("data.zzz", None), ("data.max_rows", None)],
)  # fmt: skip
def test_a_misspelt_key_is_compared_within_its_section(name: str, nearest: str | None) -> None:
    assert find_nearest_name(name, [key for key, _, _ in legal_keys()]) == nearest


def test_a_field_without_its_section_is_told_its_section() -> None:
    for override, words in (
        ("temperature=1", "write sampling.temperature"),
        ("run.dtype=half", "write engine.dtype"),
        ("tp=2", "write parallel.tensor_parallel_size"),
        ("work.batch_size=8", "write engine.max_num_seqs"),
        ("max_new_tokens=5", "write sampling.max_tokens"),
        ("data.enable_thinking=false", "write data.chat_template_kwargs={enable_thinking: ...}"),
        ("parallel.data_parallel_size=2", "data parallelism comes from dpgen's ranks"),
        ("data.prompt_template=x", "write data.template"),
        ("output_dir=x", "write run.dir"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)):
            loader.load([], [override])


@pytest.mark.vllm
def test_the_table_of_replaced_names_fits_the_installed_vllm() -> None:
    import dataclasses

    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams

    fields = {
        "engine": {field.name for field in dataclasses.fields(EngineArgs)},
        "sampling": set(SamplingParams.__struct_fields__),
    }
    for table in (vllm_fields._ENGINE, vllm_fields._SAMPLING):
        for name, successor in table.items():
            for section, field in re.findall(r"\b(engine|sampling)\.(\w+)", successor):
                assert field in fields[section], f"{name}: {successor}"
            for kind in re.findall(r"structured_outputs={(\w+):", successor):
                assert kind in {field.name for field in dataclasses.fields(StructuredOutputsParams)}
    assert not vllm_fields._ENGINE.keys() & fields["engine"]
    assert not vllm_fields._SAMPLING.keys() & fields["sampling"]
    for name, section in vllm_fields._COMMON.items():
        assert name in fields[section]
