"""A Session with a real engine gives what runs of the command give, and loads the model once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.jobs import Launcher, load_result, write_into
from helpers.tiny_model import ENGINE, save_tiny_model

import dpgen

pytestmark = [pytest.mark.vllm, pytest.mark.multi]

ROWS = [{"prompt": "the quick brown fox"[: 3 + index]} for index in range(12)]
SAMPLINGS = [{"max_tokens": 6, "temperature": 0}, {"max_tokens": 9, "top_p": 0.9, "logprobs": 1}]


def test_two_calls_with_one_engine_equal_two_runs(launcher: Launcher, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "plain")
    results = []
    with dpgen.Session(model=model, prompt_column="prompt", engine=ENGINE) as session:
        results.append(session.generate(ROWS, run_dir=tmp_path / "a", sampling=SAMPLINGS[0]))
        unequal = [{**row, "budget": 200 if number else 2} for number, row in enumerate(ROWS)]
        sampling = {"from_columns": {"max_tokens": "budget"}, "ignore_eos": True}
        stream = session.stream(unequal, run_dir=tmp_path / "b", sampling=sampling)  # broken off in the engine
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        with pytest.raises(dpgen.ConfigError, match="vLLM rejects a sampling"):
            session.generate(ROWS, sampling={"temperature": -1})
        results.append(session.generate(ROWS, run_dir=tmp_path / "c", sampling=SAMPLINGS[1]))
    for sampling, result in zip(SAMPLINGS, results, strict=True):
        run_dir = tmp_path / f"run-{sampling['max_tokens']}"
        sections = {"engine": ENGINE, "sampling": sampling}
        run = {"dir": str(run_dir), "engine": "vllm"}
        job = launcher.dpgen("run", write_into(tmp_path, ROWS, model=str(model), run=run, **sections))
        assert job.wait() == 0, job.output
        assert result is not None and result.to_list() == load_result(run_dir)
    logs = [(tmp_path / name / "logs" / "rank-0.engine.log").read_text() for name in "abc"]
    assert len({tuple(re.findall(r"engine life .* pid (\d+)", log)) for log in logs}) == 1
    assert [len(re.findall("Loading weights|Loading safetensors", log)) > 0 for log in logs] == [True, False, False]
