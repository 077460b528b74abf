"""Whole runs on real vLLM (its CPU build): any number of ranks generates the same result, row by row."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import REPO, Launcher, list_engine_lines, load_result
from helpers.tiny_model import ENGINE, save_tiny_model
from helpers.tiny_tokenizers import add_special_tokens
from helpers.vllm_version import SINCE_SEEDS, find_vllm_minor

pytestmark = [pytest.mark.vllm, pytest.mark.multi]

# Twelve kinds of bad row, and the type of the error that each gets.
BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"messages": [{"role": "user", "content": "word " * 400}]}, "prompt_too_long"),
    ({"messages": None}, "wrong_type"),
    ({"messages": []}, "empty_prompt"),
    ({"messages": [{"role": "wizard", "content": "abracadabra"}]}, "chat_template_failed"),
    ({"messages": [{"role": "user", "content": "x"}], "temperature": -1.0}, "bad_sampling"),
    ({"messages": [{"role": "user", "content": "x"}], "temperature": float("nan")}, "bad_sampling"),
    ({"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}, "bad_sampling"),
    ({"messages": [{"role": "user", "content": "x"}], "top_p": 1.5}, "bad_sampling"),
    ({"messages": [{"role": "user", "content": "x"}], "top_k": -7}, "bad_sampling"),
    ({"messages": [{"role": "user", "content": "x"}], "regex": "a(b"}, "bad_sampling"),
    ({"messages": [{"role": "user", "content": "x"}], "allowed_token_ids": [99999]}, "bad_sampling"),
    ({"messages": [{"role": None, "content": "x"}]}, "wrong_type"),
]

WORDS = "the quick brown fox jumps over the lazy dog hello world there user tool system"


def make_mixed_rows(count: int) -> list[dict[str, Any]]:
    """Return greedy and seeded rows, with one turn and several, short and long, and all bad rows in between."""
    empty = {
        "temperature": None,
        "max_tokens": None,
        "top_p": None,
        "top_k": None,
        "regex": None,
        "allowed_token_ids": None,
    }
    rows, words = [], WORDS.split()
    for index in range(count):
        text = " ".join(words[(index * 7 + step) % len(words)] for step in range(1 + index % 23))
        turns = [{"role": "user", "content": text}]
        if index % 5 == 0:
            turns = [{"role": "system", "content": "be brief"}, *turns]
        if index % 7 == 0:
            turns += [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "there"}]
        rows.append(
            {
                **empty,
                "messages": turns,
                "temperature": 0.0 if index % 3 == 0 else 0.9,
                "max_tokens": 1 + (index * 13) % 40,
            }
        )
    for place, (bad, _) in enumerate(BAD_ROWS):
        rows.insert(5 + place * 17, {**empty, **bad})
    return rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def write(write_config: Callable[..., str], model: Path) -> Callable[..., str]:
    def write(rows: list[dict[str, Any]], **sections: Any) -> str:
        base: dict[str, Any] = {
            "run": {"engine": "vllm", "log_level": "error"},
            "data": {"prompt_column": None, "messages_column": "messages"},
            "model": str(model),
            "engine": ENGINE,
        }
        return write_config(rows, **{**base, **sections})

    return write


FROM_COLUMNS = {name: name for name in ("temperature", "max_tokens", "top_p", "top_k", "allowed_token_ids")}


@pytest.mark.slow
def test_three_ranks_generate_row_by_row_what_one_rank_generates(
    launcher: Launcher, write: Callable[..., str], tmp_path: Path
) -> None:
    rows = make_mixed_rows(208)
    for row in rows:
        row["structured_outputs"] = None if row["regex"] is None else {"regex": row["regex"]}
    conf = write(rows, sampling={"from_columns": {**FROM_COLUMNS, "structured_outputs": "structured_outputs"}})
    results = {}
    for ranks in (1, 3):
        run_dir = tmp_path / f"ranks-{ranks}" / "run"
        job = launcher.dpgen("run", conf, f"run.dir={run_dir}", ranks=ranks)
        assert job.wait() == 0, job.output
        results[ranks] = load_result(run_dir)
    for result in results.values():
        assert [row["row_id"] for row in result] == list(range(len(rows)))
    keeps_seeds = find_vllm_minor() >= SINCE_SEEDS
    alone, spread = (  # as text: a NaN in the input is not equal to itself
        [repr(row) for row in results[ranks] if keeps_seeds or row["temperature"] != 0.9] for ranks in (1, 3)
    )
    assert spread == alone

    errors = {row["row_id"]: row["error"] for row in results[1] if row["error"]}
    assert [error["type"] for error in errors.values()] == [kind for _, kind in BAD_ROWS], errors
    assert all(error["message"] for error in errors.values())
    good = [row for row in results[1] if not row["error"]]
    assert len(good) == 208
    assert all(row["num_generated_tokens"] <= row["max_tokens"] for row in good)
    assert len({row["generated_text"] for row in good}) > 150, "rows have texts of their own"


def test_two_ranks_and_one_row_under_slurms_environment(
    launcher: Launcher, write: Callable[..., str], tmp_path: Path
) -> None:
    conf = write([{"messages": [{"role": "user", "content": "hello"}]}], sampling={"ignore_eos": True})
    # The ranks have unequal memory for their KV cache; all get the smaller one.
    jobs = launcher.start_like_srun("run", conf, rank_arguments=[[], ["engine.kv_cache_memory_bytes=33554432"]])
    assert [job.wait() for job in jobs] == [0, 0], "".join(job.output for job in jobs)
    [row] = load_result(tmp_path / "run")
    assert row["finish_reason"] == "length"
    assert row["num_prompt_tokens"] + row["num_generated_tokens"] == ENGINE["max_model_len"], (
        "max_tokens is the rest of the context unless given"
    )
    engine = json.loads((tmp_path / "run" / "run.json").read_text())["engine"]
    per_block_bytes = 2 * 2 * 4 * 32 * 4 * engine["kv_block_tokens"]  # K and V, layers, heads, head_dim, float32
    assert engine["num_kv_blocks"] == (32 << 20) // per_block_bytes
    assert "on every rank (32 MiB of 64 MiB free here)" in jobs[0].output
    assert "vLLM on the CPU: no chunked prefill" in jobs[0].output
    assert ("seeds have no effect beside greedy rows" in jobs[0].output) == (find_vllm_minor() < SINCE_SEEDS)
    assert all("Triton" not in job.output for job in jobs), "a warning that no user can act on stays off the terminal"


def test_fewer_rows_are_admitted_where_the_kv_cache_is_short(
    launcher: Launcher, write: Callable[..., str], tmp_path: Path
) -> None:
    conf = write(
        [{"prompt": f"hello {index}"} for index in range(160)],
        data={"prompt_column": "prompt"},
        # 16 blocks of 128 tokens: 16 short sequences fit, and 8 long ones.
        engine={**ENGINE, "max_num_seqs": 16, "kv_cache_memory_bytes": 4 << 20},
        sampling={"ignore_eos": True, "max_tokens": 200},
    )
    job = launcher.dpgen("run", conf)
    assert job.wait() == 0, job.output
    rows = load_result(tmp_path / "run")
    assert [row["row_id"] for row in rows] == list(range(160))
    assert {(row["finish_reason"], row["num_generated_tokens"]) for row in rows} == {("length", 200)}
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["engine"]["num_kv_blocks"] == 16
    assert re.search(r"KV cache is short.* \d+ sequences", job.output), job.output
    # If dpgen kept 16 sequences running, nearly every row would be preempted, most of them more than once.
    assert 0 < facts["manifests"][0]["num_preemptions"] < 80, facts["manifests"]


def test_sampling_starts_from_the_models_generation_config(
    launcher: Launcher, write: Callable[..., str], tmp_path: Path
) -> None:
    model = shutil.copytree(REPO / "conf" / "demo" / "model", tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "top_k": 1, "max_new_tokens": 7}))
    conf = write(
        [{"prompt": "1 + 1", "budget": None}, {"prompt": "1 + 1", "budget": 3}, {"prompt": "1 + 1", "budget": 20}],
        data={"prompt_column": "prompt"},
        model=str(model),
        engine={**ENGINE, "max_model_len": 128},
        sampling={"temperature": 2.0, "n": 4, "ignore_eos": True, "from_columns": {"max_tokens": "budget"}},
        output={"token_ids": True},
    )
    job = launcher.dpgen("run", conf)
    assert job.wait() == 0, job.output
    rows = load_result(tmp_path / "run")
    assert [row["num_generated_tokens"] for row in rows] == [[7] * 4, [3] * 4, [20] * 4], (
        "a row's own value has precedence"
    )
    for row in rows:
        first, *others = row["generated_token_ids"]
        assert others == [first] * 3, "with top_k=1 however hot samples are the same"


def test_the_demo_model_adds_correctly(launcher: Launcher, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = launcher.dpgen("run", "conf/demo.yaml", f"run.dir={run_dir}", ranks=2)
    assert job.wait() == 0, job.output
    assert not list_engine_lines(job.output), "nothing of what vLLM logs concerns a newcomer"
    versions = json.loads((run_dir / "run.json").read_text())["engine"]["versions"]
    assert versions["model runner"] == "V1", "the CPU build has no Triton, which V2 needs"
    shown = launcher.start([launcher.python, "launch/show_demo.py", str(run_dir)])
    assert shown.wait() == 0, shown.output
    score = re.search(r"(\d+) of 512 answers are right", shown.output)
    assert score and int(score[1]) >= 0.95 * 512, shown.output


def test_thoughts_calls_and_answers_come_out_in_columns_of_their_own(launcher: Launcher, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "plain", max_model_len=1024)
    add_special_tokens(model, "<think>", "</think>", "<tool_call>", "</tool_call>")
    call = r'<tool_call>\n\{"name": "get_weather", "arguments": \{"city": "[ab]"\}\}\n</tool_call>'
    grammars = [r"<think>[ab]{3}</think>[cd]{3}", rf"<think>[ab]{{3}}</think>{call}", r"<think>[ab]{3}"]
    lines = [{"messages": [{"role": "user", "content": "hi"}], "grammar": {"regex": regex}} for regex in grammars]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = launcher.dpgen(
        "run",
        "conf/tool_calls.yaml",
        f"run.dir={tmp_path / 'run'}",
        f"data.path={tmp_path / 'questions.jsonl'}",
        f"model={model}",
        *(f"engine.{name}={value}" for name, value in {**ENGINE, "max_model_len": 1024}.items()),
        "sampling={max_tokens: 200, temperature: 0, from_columns: {structured_outputs: grammar}}",
        "output.reasoning_parser=deepseek_r1",
        "engine.reasoning_parser=''",  # these grammars describe the thoughts, too
    )
    assert job.wait() == 0, job.output
    answer, call_row, unfinished = load_result(tmp_path / "run")
    assert re.fullmatch("[ab]{3}", answer["reasoning"]) and re.fullmatch("[cd]{3}", answer["generated_text"])
    assert (answer["tool_calls"], answer["parse_error"], answer["error"]) == ([], None, None)
    [made] = call_row["tool_calls"]
    assert made["id"] == "call_1_0_0" and made["name"] == "get_weather"
    assert json.loads(made["arguments"])["city"] in ("a", "b")
    assert (call_row["generated_text"], len(call_row["reasoning"])) == ("", 3)
    assert len(unfinished["reasoning"]) == 3 and unfinished["generated_text"] == ""
    verified = launcher.dpgen("verify", str(tmp_path / "run"))
    assert verified.wait() == 0, verified.output
