"""Runs in virtual time: what can be reckoned by hand comes out as reckoned, and the command says it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.jobs import REPO

from dpgen.config.schema import WorkConfig
from dpgen.engine.messages import EngineInfo, Event, RowsFinished
from dpgen.errors import ConfigError
from dpgen.records import Completion, Request, RowResult
from dpgen.scheduling.order import RowOrder
from dpgen.simulation.calibration import calibrate
from dpgen.simulation.lengths import sample_lengths
from dpgen.simulation.simulator import EngineCostModel, SimulationResult, simulate

REASONING = str(REPO / "benchmarks" / "reasoning_output_lengths.json")


def run(
    model: EngineCostModel, lengths: list[int] | np.ndarray, ranks: int = 1, prompt: int = 0, **more: Any
) -> SimulationResult:
    tokens = np.array(lengths, dtype=np.int64)
    order = more.pop("order", RowOrder(np.arange(len(tokens))))
    slowness = more.pop("slowness", None)
    return simulate(model, tokens, np.full(len(tokens), prompt), order, ranks, WorkConfig(**more), slowness)


def test_one_full_batch_takes_its_steps() -> None:
    found = run(EngineCostModel(1.0, 0.1, max_num_seqs=4), [10, 10, 10, 10])
    assert found.wall_s == pytest.approx(10 * (1.0 + 0.4))
    assert found.bound_s == pytest.approx(found.wall_s) and found.efficiency == pytest.approx(1)


def test_steps_get_shorter_as_rows_finish_and_longer_with_the_kv_cache() -> None:
    assert run(EngineCostModel(1.0, 0.1, max_num_seqs=4), [2, 5]).wall_s == pytest.approx(2 * 1.2 + 3 * 1.1)
    # Each step reads all tokens that there are by then: 5 + 1, 5 + 2, 5 + 3.
    model = EngineCostModel(1.0, 0.0, kv_s=0.01, prefill_s=0.5, max_num_seqs=4)
    assert run(model, [3], prompt=5).wall_s == pytest.approx(3 + 5 * 0.5 + 0.01 * (6 + 7 + 8))
    assert model.compute_lower_bounds_s(np.array([3]), np.array([5]), 1)[1] == pytest.approx(
        3 + 5 * 0.5 + 0.01 * (6 + 7 + 8)
    )


def test_the_longest_row_bounds_any_number_of_ranks() -> None:
    found = run(EngineCostModel(1.0, 0.0, max_num_seqs=2), [100, *[1] * 50], ranks=8)
    assert found.bound_s == found.wall_s == 100


def test_a_short_kv_cache_sets_rows_back_and_loses_none() -> None:
    lengths = sample_lengths("lognormal:100:0.5", 400)
    wide = run(EngineCostModel(1e-3, 1e-5, prefill_s=1e-5, max_num_seqs=64), lengths, prompt=20)
    tight = run(EngineCostModel(1e-3, 1e-5, prefill_s=1e-5, max_num_seqs=64, kv_tokens=3000), lengths, prompt=20)
    assert wide.num_preemptions == 0 < tight.num_preemptions
    assert tight.wall_s > 1.3 * wide.wall_s


def test_help_evens_out_a_slow_rank_and_a_sorted_file() -> None:
    model, lengths = EngineCostModel(6e-3, 1e-5, max_num_seqs=32), np.sort(sample_lengths("lognormal:60:0.7", 4000))
    assert run(model, lengths, 4, slowness={1: 2.0}).balance > 0.95
    assert run(model, lengths, 4, slowness={1: 2.0}, steal=False).balance < 0.7
    half = RowOrder(np.stack([np.arange(2000), np.arange(2000, 4000)], axis=1).ravel())  # two contiguous pieces
    assert run(model, lengths, 2, order=half, steal=False).wall_s > 1.4 * run(model, lengths, 2).wall_s


def test_longest_first_shortens_the_tail_with_hints_that_are_only_roughly_right() -> None:
    model, lengths = EngineCostModel(8e-3, 4e-5, max_num_seqs=32), sample_lengths(REASONING, 16 * 8 * 32)
    hints = lengths * np.random.default_rng(0).lognormal(0, 0.5, len(lengths))
    plain, hinted = run(model, lengths, 8), run(model, lengths, 8, order=RowOrder(np.argsort(-hints)))
    assert hinted.efficiency > plain.efficiency + 0.1


@pytest.mark.slow
def test_a_million_rows_on_four_thousand_ranks_take_less_than_a_minute() -> None:
    lengths = sample_lengths(REASONING, 16 * 4096 * 16)
    started_s = time.process_time()
    found = run(EngineCostModel(8e-3, 4e-5, max_num_seqs=16), lengths, 4096)
    assert time.process_time() - started_s < 60
    assert found.num_claims < len(lengths) / 2


def test_drawn_lengths_are_those_of_the_distribution() -> None:
    drawn = sample_lengths(REASONING, 100_000)
    published = json.loads(Path(REASONING).read_text())
    assert drawn.mean() == pytest.approx(published["mean"], rel=0.03)
    assert np.median(drawn) == pytest.approx(published["quantiles"]["0.5"], rel=0.02)
    assert sample_lengths("constant:64", 3).tolist() == [64, 64, 64]
    assert np.median(sample_lengths("lognormal:250:0.7", 50_000)) == pytest.approx(250, rel=0.03)
    for wrong in ("constant", "lognormal:1", "nothing.json", "constant:x"):
        with pytest.raises(ConfigError, match="none of constant:TOKENS"):
            sample_lengths(wrong, 1)


class ModelledEngine:
    """Takes the time that a model says, on a clock of its own."""

    def __init__(self, model: EngineCostModel) -> None:
        self._model, self.now_s = model, 0.0
        self._events: list[Event] = []

    def submit(self, requests: list[Request]) -> None:
        lengths = np.array([each.sampling["max_tokens"] for each in requests])
        prompts = np.array([len(each.prompt_token_ids or ()) for each in requests])
        found = simulate(self._model, lengths, prompts, RowOrder(np.arange(len(requests))), 1, WorkConfig())
        self.now_s += found.wall_s + 0.003  # and the pipe
        results = [
            RowResult(each.row, 1, (Completion("", "length", each.sampling["max_tokens"]),)) for each in requests
        ]
        self._events.append(RowsFinished(results))

    def poll(self, timeout_s: float) -> list[Event]:
        events, self._events = self._events, []
        return events


def test_calibration_finds_the_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    model = EngineCostModel(8e-3, 40e-6, 1e-8, 20e-6, 128, 1 << 20)
    engine = ModelledEngine(model)
    monkeypatch.setattr("dpgen.simulation.calibration.time.monotonic", lambda: engine.now_s)
    lines: list[str] = []
    found = calibrate(engine, EngineInfo(128, 8192, 65536, 16), lines.append)
    for name in ("step_s", "seq_s", "kv_s", "prefill_s"):
        assert getattr(found, name) == pytest.approx(getattr(model, name), rel=0.1), name
    assert (found.max_num_seqs, found.kv_tokens) == (128, 1 << 20)
    assert len(lines) == 8


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dpgen", "simulate", *arguments], capture_output=True, text=True, cwd=REPO
    )


def test_the_command_says_how_long_and_what_would_help() -> None:
    done = command("--lengths", REASONING, "--max-num-seqs", "16", "--ranks", "2,8", "--rows", "2048")
    assert done.returncode == 0, done.stderr
    assert "2,048 rows" in done.stdout and "6 ms a step, 11 us a sequence" in done.stdout
    assert "GPU-hours" in done.stdout and "on 8 ranks other choices would take:" in done.stdout
    facts = json.loads(command(*done.args[4:], "--json").stdout)
    assert facts["ranks"]["2"]["efficiency"] > facts["ranks"]["8"]["efficiency"]
    assert facts["choices"]["contiguous pieces, and no help"] >= facts["ranks"]["8"]["wall_s"]
    [shown] = re.findall(r"^ +8 .* (0\.\d\d) +0\.\d\d$", done.stdout, re.MULTILINE)
    assert float(shown) == pytest.approx(facts["ranks"]["8"]["efficiency"], abs=0.0051)


def test_the_command_learns_of_rows_with_the_same_prompt() -> None:
    done = command(
        "--lengths", REASONING, "--max-num-seqs", "16", "--ranks", "4", "--rows", "2048", "--group-rows", "16"
    )
    assert done.returncode == 0, done.stderr
    assert "128 prompts have several rows each: one of each goes first" in done.stdout
    choices = [line for line in done.stdout.splitlines() if line.startswith("  ")]
    [in_order] = [line for line in choices if line.endswith("work.order=dataset")]
    assert int(in_order.split()[0]) > 0, "without learning it takes longer"


def test_the_command_takes_rows_and_engine_from_a_configuration(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}" * 40, "budget": 5 + n % 90} for n in range(500)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    conf = [
        "run.dir=x",
        "model=none",
        "run.engine=fake",
        f"data.path={tmp_path}/rows.jsonl",
        "data.prompt_column=prompt",
    ]
    conf += ["sampling.from_columns={max_tokens: budget}", "engine.step_s=0.002", "engine.max_num_seqs=8"]
    conf += ["engine.max_model_len=4096"]
    done = command(*conf, "--calibrate", "--ranks", "1,4")
    assert done.returncode == 0, done.stderr
    assert "order of work: longest_first; by max_tokens (budget): 5 to 94" in done.stdout
    step_ms = float(done.stdout.split("engine: ")[1].split(" ms")[0])
    assert 1.5 < step_ms < 10, done.stdout
    assert "8 sequences" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "how long are the rows?"),
        (["--calibrate"], "need a configuration"),
        (["--lengths", "constant:5", "--ranks", "0"], "give numbers from 1"),
        (["--lengths", "constant:5", "--step-ms", "-1"], "--step-ms must be at least 0"),
        (["--lengths", "constant:5", "--group-rows", "0"], "it must be at least 1"),
        (["--lengths", "constant:5", "--group-rows", "4", "--group-noise", "-1"], "--group-noise must be at least 0"),
        (["conf/demo.yaml", "--lengths", "constant:5", "--group-rows", "4"], "for rows that are drawn"),
        (["--lengths", "some:5"], "none of constant:TOKENS"),
        (["run.dir=x", "model=m", "data.path=conf/demo/questions.jsonl", "data.prompt_column=question"], "how long"),
        (
            ["conf/demo.yaml", "--length-column", "answr"],
            "'answr' is no column of the dataset; did you mean 'answer'?",
        ),
    ],
)
def test_wrong_usage_is_one_clear_line(arguments: list[str], message: str) -> None:
    done = command(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
