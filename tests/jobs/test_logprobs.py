"""Log-probabilities of whole runs on the fake engine: any number of ranks and restarts gives the same arrays."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.jobs import Launcher, WriteConfig, load_result, wait_for
from helpers.results import count_journal_bytes, load_all_rows, run_undisturbed

pytestmark = pytest.mark.multi


@pytest.mark.slow
def test_log_probabilities_survive_kills_and_are_the_same_on_any_number_of_ranks(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    rows = [{"prompt": f"row number {index}", "k": index % 4 or None} for index in range(60)]
    sampling = {"n": 2, "logprobs": 1, "prompt_logprobs": 2, "from_columns": {"logprobs": "k"}}
    conf = write_config(rows, sampling=sampling, engine={"step_s": 0.02, "max_num_seqs": 4})
    job = launcher.dpgen("run", conf, ranks=2)
    wait_for(lambda: count_journal_bytes(tmp_path / "run") > 20_000)
    job.end()
    job = launcher.dpgen("run", conf, "engine.step_s=0")
    assert job.wait() == 0, job.output
    result = load_all_rows(tmp_path / "run", 60)
    assert result == run_undisturbed(launcher, conf, tmp_path / "undisturbed" / "run")
    for row in result:
        for number in range(2):
            num_tokens = row["num_generated_tokens"][number]
            assert len(row["generated_token_ids"][number]) == len(row["token_logprobs"][number]) == num_tokens
            assert len(row["top_logprobs"][number]) == num_tokens * (row["k"] or 1)
        assert row["prompt_logprobs"][0] is None and len(row["prompt_top_logprobs"]) == 2 * row["num_prompt_tokens"]
    verified = launcher.dpgen("verify", str(tmp_path / "run"))
    assert verified.wait() == 0 and "complete and sound" in verified.output, verified.output


@pytest.mark.slow
def test_given_completions_are_scored_and_bad_ones_fail_alone(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    answers = [" yes", "", None, "no", 5, "x" * 600]
    rows = [{"prompt": f"question {index}", "answer": answer} for index, answer in enumerate(answers)]
    conf = write_config(
        [row | {"answer": [answer]} if answer == 5 else row for row, answer in zip(rows, answers, strict=True)],
        data={"completion_column": "answer"},
        output={"format": "jsonl"},
    )
    job = launcher.dpgen("run", conf, ranks=2)
    assert job.wait() == 0, job.output
    result = load_result(tmp_path / "run")
    assert [row["error"] and row["error"]["type"] for row in result] == [
        *(None, "empty_completion", "wrong_type", None, "wrong_type", "prompt_too_long")
    ]
    assert result[0]["completion_token_ids"] == list(b" yes") and result[0]["num_prompt_tokens"] == len("question 0")
    assert result[0]["completion_logprob"] == pytest.approx(sum(result[0]["completion_token_logprobs"]))
    assert "generated_text" not in result[0]
    verified = launcher.dpgen("verify", str(tmp_path / "run"))
    assert verified.wait() == 0, verified.output
