"""All bad input of tests/helpers/bad_input.py, given to a user's command on real vLLM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.bad_input import BAD_CONFIGS, BAD_ENGINE_CONFIGS, BAD_ROWS, HELLO, TEMPLATE
from helpers.jobs import EACH_IN_TURN, Launcher, load_result, run_each_command
from helpers.kept_engine import KeptEngine
from helpers.tiny_adapter import save_adapter
from helpers.tiny_model import ENGINE

pytestmark = [pytest.mark.vllm, pytest.mark.multi]

GOOD = {
    "data.messages_column": {"messages": HELLO},
    "data.prompt_column": {"prompt": "hello there"},
    "data.token_ids_column": {"ids": [5, 6, 7]},
    "data.template": {"kind": "plain", "text": "hello there"},
}


@pytest.fixture(scope="module")
def models(bos_model: Path, plain_model: Path) -> dict[str, Path]:
    """Return the models by tokenizer: `bos` is strict about roles; with `plain`, an empty text has no tokens."""
    return {"bos": bos_model, "plain": plain_model}


@pytest.fixture
def write(write_config: Callable[..., str], models: dict[str, Path]) -> Callable[..., str]:
    def write(rows: list[dict[str, Any]], tokenizer: str = "plain", **sections: Any) -> str:
        run = {"engine": "vllm", "log_level": "error"}
        return write_config(rows, run=run, model=str(models[tokenizer]), engine=ENGINE, **sections)

    return write


@pytest.mark.xdist_group("engines")  # one engine runs most of the sources
@pytest.mark.parametrize("source", BAD_ROWS)
def test_a_bad_row_gets_its_error_and_its_neighbours_their_text(
    kept_engine: KeptEngine, write: Callable[..., str], tmp_path: Path, source: str
) -> None:
    table = BAD_ROWS[source]
    fields = {name for _, row, _, _ in table for name in row}
    rows = []
    for _, bad, _, _ in table:
        rows += [dict.fromkeys(fields) | GOOD[source], dict.fromkeys(fields) | bad]
    prompt: dict[str, Any] = {"prompt_column": None, "columns": []}
    prompt[source.partition(".")[2]] = TEMPLATE if source == "data.template" else None
    if source != "data.template":
        prompt[source.partition(".")[2]] = next(iter(GOOD[source]))
    sampling = sorted(fields - {"messages", "prompt", "ids", "kind", "text", "number", "meta", "list"})
    conf = write(
        rows,
        "bos" if source == "data.messages_column" else "plain",
        data=prompt,
        sampling={"temperature": 0, "max_tokens": 4, "from_columns": {name: name for name in sampling}},
    )
    kept_engine.run(conf, "run.max_leading_errors=0")
    result = load_result(tmp_path / "run")
    assert len(result) == 2 * len(table)
    texts = {repr(row["generated_text"]) for row in result[::2]}
    assert len(texts) == 1 and not any(row["error"] for row in result[::2]), "all good rows are the same"
    errors = {
        what: (row["error"] or {"type": "none, but a text", "message": str(row["generated_text"])})
        for row, (what, _, _, _) in zip(result[1::2], table, strict=True)
    }
    wrong = {
        what: errors[what]
        for what, _, error_type, words in table
        if errors[what]["type"] != error_type or words not in errors[what]["message"]
    }
    assert not wrong


# Checks the options of each command as the engine process does before it loads a model, in one process with vLLM.
EACH_CHECKED = """
import json, sys
from dpgen.config.loader import load_from_args
from dpgen.engine.starting.launch import build_engine_spec
from dpgen.engine.vllm.vllm_backend import VllmBackend
from dpgen.errors import ConfigError
from dpgen.distributed.topology import Topology

for words in json.loads(sys.argv[1]):
    spec = build_engine_spec(load_from_args(words), Topology(), None)
    try:
        VllmBackend(spec).check_options()
        problem = None
    except ConfigError as error:
        problem = str(error)
    print("REPORT " + json.dumps(problem), flush=True)
"""


def assert_one_line(output: str, message: str) -> None:
    line = output.strip()
    assert line.startswith("dpgen: error: ") and message in line and "\n" not in line, output


def test_a_bad_configuration_is_rejected_in_one_line_before_a_model_loads(
    launcher: Launcher, write: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "broken.jsonl").write_text('{"prompt": "x"}\n{"prompt": \n')
    save_adapter(tmp_path / "adapter")
    conf = write([{"prompt": "hello"}])
    commands = [[conf, *(word.replace("{folder}", str(tmp_path)) for word in words)] for _, words, _ in BAD_CONFIGS]
    for (what, _, message), (status, output) in zip(
        BAD_CONFIGS, run_each_command(launcher, EACH_IN_TURN, commands), strict=True
    ):
        assert status == 2, f"{what}: {output}"
        assert_one_line(output, message)
    assert not (tmp_path / "run").exists(), "no run directory is made for a bad configuration"


def test_several_mistakes_are_reported_at_once_one_per_line(
    launcher: Launcher, write: Callable[..., str], tmp_path: Path
) -> None:
    overrides = ["run.sed=1", "data.limit=-1", "engine.model=x"]
    [(status, output)] = run_each_command(launcher, EACH_IN_TURN, [[write([{"prompt": "hello"}]), *overrides]])
    assert status == 2
    headline, *lines = output.strip().splitlines()
    assert headline == "dpgen: error: 3 mistakes in the configuration:"
    assert [override.partition("=")[0] in line for override, line in zip(overrides, lines, strict=True)] == [True] * 3
    assert not (tmp_path / "run").exists(), "no run directory is made for a bad configuration"


def test_bad_engine_options_are_rejected_before_a_model_loads(
    launcher: Launcher, write: Callable[..., str], tmp_path: Path
) -> None:
    conf = write([{"prompt": "hello"}])
    save_adapter(tmp_path / "rank-12", rank=12)
    save_adapter(tmp_path / "odd", lora_alpha="high")
    several = ["engine.tokenizer_mode=[slow]", "sampling_by_rank=[{top_p: high}, {min_p: low}]"]
    all_words = [*(words for _, words, _ in BAD_ENGINE_CONFIGS), several]
    commands = [[conf, *(word.replace("{folder}", str(tmp_path)) for word in words)] for words in all_words]
    *problems, all_at_once = run_each_command(launcher, EACH_CHECKED, commands)
    headline, *lines = all_at_once.splitlines()
    assert headline == "3 mistakes in the configuration:" and len(lines) == 3
    for (what, _, message), problem in zip(BAD_ENGINE_CONFIGS, problems, strict=True):
        assert problem is not None and message in problem and "\n" not in problem, f"{what}: {problem}"


def test_a_bad_engine_option_reaches_the_user_in_one_line(
    launcher: Launcher, write: Callable[..., str], tmp_path: Path
) -> None:
    _, words, message = BAD_ENGINE_CONFIGS[-1]
    job = launcher.dpgen("run", write([{"prompt": "hello"}]), *words)
    assert job.wait() == 2, job.output
    assert_one_line(job.output, message)
    assert not (tmp_path / "run").exists(), "no run directory is made for a bad configuration"
