"""A rank's devices, divided among its engines, and the number of them that its model's files suggest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpgen.config.loader import load
from dpgen.engine.starting.engine_starter import Placement, divide_cores, plan_engines
from dpgen.engine.starting.log_file import EngineLog

LLAMA_1B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 128_256,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def test_engines_divide_their_ranks_cores() -> None:
    assert [divide_cores(range(5), index, 2) for index in range(2)] == [range(2), range(2, 5)]
    assert [list(divide_cores([3, 7], index, 3)) for index in range(3)] == [[3], [7], [3]]


@pytest.mark.parametrize(("changes", "number"), [({}, 4), ({"hidden_size": 8192, "num_hidden_layers": 60}, 1)])
def test_the_models_configuration_tells_its_size_without_weights_or_transformers(
    tmp_path: Path, changes: dict[str, int], number: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_1B | changes))
    config = load([], ["run.dir=r", f"model={tmp_path}", "data.path=d.jsonl", "data.prompt_column=p"])
    count, engine_bytes = plan_engines(config, 0, Placement(["0"], range(16), 1, None, False, "warning"))
    assert count.number == number
    if number > 1:
        assert "weights of 2.5 GB" in count.why
        assert engine_bytes == pytest.approx(2.5e9 + (2 << 30) + 256 * 512 * 32768, rel=0.02)


def test_further_engines_have_log_files_beside_the_first(tmp_path: Path) -> None:
    log = EngineLog("warning")
    log.open(tmp_path / "rank-3.engine.log")
    assert log.get_sibling(0) is log and log.get_sibling(1) is log.get_sibling(1)
    log.get_sibling(2).write("hello")
    assert (tmp_path / "rank-3.engine-2.log").read_text() == "hello\n"
