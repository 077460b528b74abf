"""Whole runs of the tasks embed, classify, score and reward on the fake engine: ranks, kills, files, Python."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.jobs import Launcher, WriteConfig, load_result, make_numbered_rows, wait_for
from helpers.results import count_journal_bytes, load_all_rows, run_undisturbed

pytestmark = pytest.mark.multi

PAIRS = [{"q": f"query {i}", "docs": [f"document {j}" for j in range(1 + i % 4)]} for i in range(40)]
SCORES = {"prompt_column": None, "query_column": "q", "documents_column": "docs"}


def run(launcher: Launcher, conf: str, *overrides: str, ranks: int = 1) -> str:
    job = launcher.dpgen("run", conf, *overrides, ranks=ranks)
    assert job.wait() == 0, job.output
    return job.output


@pytest.mark.slow
def test_embeddings_survive_kills_and_are_the_same_on_any_number_of_ranks(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(80), task="embed", engine={"step_s": 1.0, "max_num_seqs": 4})
    job = launcher.dpgen("run", conf, ranks=2)
    wait_for(lambda: count_journal_bytes(tmp_path / "run") > 500)
    job.end()
    output = run(launcher, conf, "engine.step_s=0")
    assert "0 tokens/s" not in output.replace("prompt tokens/s", "") and "prompt tokens" in output
    result = load_all_rows(tmp_path / "run", 80)
    assert result == run_undisturbed(launcher, conf, tmp_path / "undisturbed" / "run")
    assert all(np.linalg.norm(row["embedding"]) == pytest.approx(1, abs=1e-5) for row in result)
    verified = launcher.dpgen("verify", str(tmp_path / "run"))
    assert verified.wait() == 0 and "complete and sound" in verified.output, verified.output


@pytest.mark.slow
def test_each_task_has_its_columns_and_bad_rows_fail_alone(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [*PAIRS, {"q": None, "docs": ["x"]}, {"q": "x", "docs": []}]
    conf = write_config(rows, task="score", data=SCORES)
    run(launcher, conf, ranks=2)
    result = load_result(tmp_path / "run")
    assert [len(row["score"]) for row in result[:40]] == [len(row["docs"]) for row in PAIRS]
    assert [row["error"]["type"] for row in result[40:]] == ["wrong_type", "empty_prompt"]
    assert "generated_text" not in result[0]

    texts = [{"prompt": "a text"}, {"prompt": "x" * 600}, {"prompt": None}]
    for task, overrides in {"classify": ["data.too_long=truncate"], "reward": ["output.reward_per=token"]}.items():
        conf = write_config(texts, task=task, run={"dir": str(tmp_path / task)})
        run(launcher, conf, *overrides)
        file = pd.read_parquet(next((tmp_path / task / "dataset").glob("*.parquet")))
        assert [error and error["type"] for error in file["error"]][2] == "wrong_type"
        if task == "classify":
            probs = file["probs"][0]
            assert sum(probs.values()) == pytest.approx(1) and file["label"][0] == max(probs, key=probs.get)
            assert file["num_cut_tokens"].tolist()[:2] == [0, 600 - 512]
        else:
            assert len(file["reward"][0]) == len("a text") and file["error"][1]["type"] == "prompt_too_long"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "int8", "binary"])
def test_embeddings_are_written_in_the_type_that_is_asked_for(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, dtype: str
) -> None:
    conf = write_config(make_numbered_rows(20), task="embed")
    run(launcher, conf)
    run(launcher, conf, f"output.embedding_dtype={dtype}", f"run.dir={tmp_path / dtype}")
    exact = np.array([row["embedding"] for row in load_result(tmp_path / "run")])
    file = pd.read_parquet(next((tmp_path / dtype / "dataset").glob("*.parquet")))
    stored = np.stack(file["embedding"].to_list())
    if dtype == "binary":
        bits = np.unpackbits((stored.astype(np.int16) + 128).astype(np.uint8), axis=1)
        assert (bits == (exact > 0)).all()
    else:
        assert stored.dtype == dtype
        lengths = np.linalg.norm(stored.astype(np.float64), axis=1) * np.linalg.norm(exact, axis=1)
        assert ((stored * exact).sum(axis=1) / lengths > 0.9995).all(), "as the cosine sees them, they are the same"
    verified = launcher.dpgen("verify", str(tmp_path / dtype))
    assert verified.wait() == 0, verified.output


@pytest.mark.slow
def test_embeddings_can_be_exported_and_written_as_json_lines(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(10), task="embed", output={"format": "jsonl"})
    run(launcher, conf)
    verified = launcher.dpgen("verify", str(tmp_path / "run"))
    assert verified.wait() == 0, verified.output
    lines = [json.loads(line) for path in (tmp_path / "run" / "dataset").glob("*.jsonl") for line in path.open()]
    run(launcher, conf, f"run.dir={tmp_path / 'parquet'}", "output.format=parquet")
    exported = launcher.dpgen("export", str(tmp_path / "parquet"), str(tmp_path / "out.jsonl"))
    assert exported.wait() == 0, exported.output
    others = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    assert [row["embedding"] for row in lines] == [row["embedding"] for row in others]


@pytest.mark.slow
def test_requests_for_embeddings_of_a_batch_file_are_answered(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    from openai.types import CreateEmbeddingResponse  # takes seconds, and every worker imports this module

    bodies: list[dict[str, Any]] = [
        {"input": "hello"},
        {"input": ["hello", "there"], "encoding_format": "base64", "dimensions": 8},
        {"input": [[104, 105], [7]]},
        {"input": []},
        {"input": "x", "encoding_format": "hex"},
    ]
    lines = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/embeddings", "body": {"model": "none", **body}}
        for i, body in enumerate(bodies)
    ]
    lines.append({**lines[0], "url": "/v1/chat/completions", "body": {"model": "none", "messages": []}})
    data = {"prompt_column": None, "format": "openai_batch"}
    conf = write_config(lines, task="embed", data=data, output={"format": "openai_batch"})
    run(launcher, conf)
    [file] = (tmp_path / "run" / "dataset").glob("*.jsonl")
    responses = [json.loads(line) for line in file.open()]
    assert [line["response"]["status_code"] for line in responses] == [200, 200, 200, 400, 400, 400]
    answers = [CreateEmbeddingResponse.model_validate(line["response"]["body"]) for line in responses[:1]]
    assert len(answers[0].data[0].embedding) == 16 and answers[0].usage.prompt_tokens == 5
    several = responses[1]["response"]["body"]["data"]
    assert [item["index"] for item in several] == [0, 1]
    assert len(np.frombuffer(base64.b64decode(several[0]["embedding"]), "<f4")) == 8
    verified = launcher.dpgen("verify", str(tmp_path / "run"))
    assert verified.wait() == 0, verified.output
