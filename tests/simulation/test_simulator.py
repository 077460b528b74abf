"""Test simulated runs: results match those computed by hand, and `dpgen simulate` reports them."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.jobs import REPO, Launcher, run_each_command

from dpgen.cli import build_parser
from dpgen.commands.scenario import build_scenario
from dpgen.config.sections import WorkConfig
from dpgen.engine.messages import EngineInfo, Event, RowsFinished
from dpgen.errors import ConfigError
from dpgen.records import Completion, Request, RowResult
from dpgen.scheduling.order import RowOrder
from dpgen.simulation.calibration import calibrate
from dpgen.simulation.lengths import sample_lengths
from dpgen.simulation.simulator import EngineCostModel, SimulationResult, Workload, simulate

REASONING = str(REPO / "benchmarks" / "reasoning_output_lengths.json")


def run(
    model: EngineCostModel,
    lengths: list[int] | np.ndarray,
    num_ranks: int = 1,
    *,
    prompt: int = 0,
    order: RowOrder | None = None,
    slowdown: dict[int, float] | None = None,
    **work: Any,
) -> SimulationResult:
    tokens = np.array(lengths, dtype=np.int64)
    workload = Workload(tokens, np.full(len(tokens), prompt), order or RowOrder(np.arange(len(tokens))))
    return simulate(model, workload, num_ranks, WorkConfig(**work), slowdown)


def test_one_full_batch_takes_its_steps() -> None:
    result = run(EngineCostModel(1.0, 0.1, max_num_seqs=4), [10, 10, 10, 10])
    assert result.wall_s == pytest.approx(10 * (1.0 + 0.4))
    assert result.bound_s == pytest.approx(result.wall_s) and result.efficiency == pytest.approx(1)


def test_steps_get_shorter_as_rows_finish_and_longer_with_the_kv_cache() -> None:
    assert run(EngineCostModel(1.0, 0.1, max_num_seqs=4), [2, 5]).wall_s == pytest.approx(2 * 1.2 + 3 * 1.1)
    # Each step reads all tokens so far: 5 + 1, 5 + 2, 5 + 3.
    model = EngineCostModel(1.0, 0.0, kv_s=0.01, prefill_s=0.5, max_num_seqs=4)
    assert run(model, [3], prompt=5).wall_s == pytest.approx(3 + 5 * 0.5 + 0.01 * (6 + 7 + 8))
    assert model.compute_bound_s(np.array([3]), np.array([5]), 1) == pytest.approx(3 + 5 * 0.5 + 0.01 * (6 + 7 + 8))


def test_the_longest_row_bounds_any_number_of_ranks() -> None:
    result = run(EngineCostModel(1.0, 0.0, max_num_seqs=2), [100, *[1] * 50], 8)
    assert result.bound_s == result.wall_s == 100


def test_a_small_kv_cache_preempts_rows_and_loses_none() -> None:
    lengths = sample_lengths("lognormal:100:0.5", 400)
    large = run(EngineCostModel(1e-3, 1e-5, prefill_s=1e-5, max_num_seqs=64), lengths, prompt=20)
    small = run(EngineCostModel(1e-3, 1e-5, prefill_s=1e-5, max_num_seqs=64, kv_tokens=3000), lengths, prompt=20)
    assert large.num_preemptions == 0 < small.num_preemptions
    assert small.wall_s > 1.3 * large.wall_s


def test_stealing_balances_a_slow_rank_and_a_sorted_file() -> None:
    model, lengths = EngineCostModel(6e-3, 1e-5, max_num_seqs=32), np.sort(sample_lengths("lognormal:60:0.7", 4000))
    assert run(model, lengths, 4, slowdown={1: 2.0}).balance > 0.95
    assert run(model, lengths, 4, slowdown={1: 2.0}, steal=False).balance < 0.7
    halves = RowOrder(np.stack([np.arange(2000), np.arange(2000, 4000)], axis=1).ravel())  # two contiguous chunks
    assert run(model, lengths, 2, order=halves, steal=False).wall_s > 1.4 * run(model, lengths, 2).wall_s


def test_longest_first_shortens_the_tail_even_with_inaccurate_hints() -> None:
    model, lengths = EngineCostModel(8e-3, 4e-5, max_num_seqs=32), sample_lengths(REASONING, 16 * 8 * 32)
    hints = lengths * np.random.default_rng(0).lognormal(0, 0.5, len(lengths))
    in_dataset_order, by_hints = run(model, lengths, 8), run(model, lengths, 8, order=RowOrder(np.argsort(-hints)))
    assert by_hints.efficiency > in_dataset_order.efficiency + 0.1


@pytest.mark.slow
def test_a_row_costs_about_as_much_time_on_a_thousand_ranks_as_on_a_hundred() -> None:
    def simulate_on(num_ranks: int) -> float:
        lengths = sample_lengths(REASONING, 16 * num_ranks * 16)
        started_s = time.process_time()
        result = run(EngineCostModel(8e-3, 4e-5, max_num_seqs=16), lengths, num_ranks)
        assert result.num_claims < len(lengths) / 2
        return (time.process_time() - started_s) / len(lengths)

    assert simulate_on(1024) < 3 * simulate_on(128)


def test_sampled_lengths_follow_the_distribution() -> None:
    lengths = sample_lengths(REASONING, 100_000)
    published = json.loads(Path(REASONING).read_text())
    assert lengths.mean() == pytest.approx(published["mean"], rel=0.03)
    assert np.median(lengths) == pytest.approx(published["quantiles"]["0.5"], rel=0.02)
    assert sample_lengths("constant:64", 3).tolist() == [64, 64, 64]
    assert np.median(sample_lengths("lognormal:250:0.7", 50_000)) == pytest.approx(250, rel=0.03)


@pytest.mark.parametrize(
    "kind", ["constant", "lognormal:1", "nothing.json", "constant:x", "constant:-5", "constant:nan"]
)
def test_a_wrong_distribution_is_reported_with_the_legal_ones(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"lengths={re.escape(kind)}: must be constant:TOKENS"):
        sample_lengths(kind, 1)


class ModelledEngine:
    """Take the time that a model gives, on a clock of its own."""

    def __init__(self, model: EngineCostModel) -> None:
        self._model, self.now_s = model, 0.0
        self._events: list[Event] = []

    def submit(self, requests: list[Request]) -> None:
        lengths = np.array([request.sampling["max_tokens"] for request in requests])
        prompt_lengths = np.array([len(request.prompt_token_ids or ()) for request in requests])
        workload = Workload(lengths, prompt_lengths, RowOrder(np.arange(len(requests))))
        self.now_s += simulate(self._model, workload, 1, WorkConfig()).wall_s + 0.003  # the pipe takes time, too
        results = [
            RowResult(request.row, 1, (Completion("", "length", request.sampling["max_tokens"]),))
            for request in requests
        ]
        self._events.append(RowsFinished(results))

    def poll(self, timeout_s: float) -> list[Event]:
        events, self._events = self._events, []
        return events


def test_calibration_finds_the_constants(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dpgen")
    model = EngineCostModel(8e-3, 40e-6, 1e-8, 20e-6, 128, 1 << 20)
    engine = ModelledEngine(model)
    monkeypatch.setattr("dpgen.simulation.calibration.time.monotonic", lambda: engine.now_s)
    calibrated = calibrate(engine, EngineInfo(128, 8192, 65536, 16))
    for name in ("step_s", "seq_s", "kv_s", "prefill_s"):
        assert getattr(calibrated, name) == pytest.approx(getattr(model, name), rel=0.1), name
    assert (calibrated.max_num_seqs, calibrated.kv_tokens) == (128, 1 << 20)
    assert len(caplog.messages) == 8


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dpgen", "simulate", *arguments], capture_output=True, text=True, cwd=REPO
    )


def test_the_command_reports_times_and_better_choices() -> None:
    arguments = ["--lengths", REASONING, "--max-num-seqs", "16", "--ranks", "2,8", "--rows", "2048"]
    done = run_command(*arguments)
    assert done.returncode == 0, done.stderr
    assert "2,048 rows" in done.stdout and "6 ms per step, 11 us per sequence" in done.stdout
    assert "GPU-hours" in done.stdout and "on 8 ranks other choices would take:" in done.stdout
    report = json.loads(run_command(*arguments, "--json").stdout)
    assert report["ranks"]["2"]["efficiency"] > report["ranks"]["8"]["efficiency"]
    assert report["choices"]["contiguous pieces, and no help"] >= report["ranks"]["8"]["wall_s"]
    [efficiency] = re.findall(r"^ +8 .* (0\.\d\d) +0\.\d\d$", done.stdout, re.MULTILINE)
    assert float(efficiency) == pytest.approx(report["ranks"]["8"]["efficiency"], abs=0.0051)


def test_the_keys_of_the_json_report_are_stable() -> None:
    arguments = ["--lengths", "lognormal:60:0.7", "--max-num-seqs", "8", "--ranks", "2", "--rows", "64"]
    report = json.loads(run_command(*arguments, "--hint-noise", "0.5", "--json").stdout)
    assert list(report) == [
        *("num_rows", "num_generated_tokens", "engine", "order", "ranks", "choices", "most_ranks_that_pay")
    ]
    assert list(report["engine"]) == ["step_s", "seq_s", "kv_s", "prefill_s", "max_num_seqs", "kv_tokens"]
    assert list(report["ranks"]["2"]) == [
        *("wall_s", "gpu_hours", "efficiency", "balance", "bound_s", "num_claims", "num_preemptions")
    ]
    assert list(report["choices"]) == [
        "work.order=dataset",
        "work.order=longest_first, by hints that are right",
        "work.steal=false",
        "contiguous pieces, and no help",
    ]


def test_the_command_measures_lengths_of_rows_with_the_same_prompt() -> None:
    done = run_command(
        "--lengths", REASONING, "--max-num-seqs", "16", "--ranks", "4", "--rows", "2048", "--group-rows", "16"
    )
    assert done.returncode == 0, done.stderr
    assert "(128 probe rows first, one of each unmeasured prompt group)" in done.stdout
    alternatives = [line for line in done.stdout.splitlines() if line.startswith("  ")]
    [dataset_order] = [line for line in alternatives if line.endswith("work.order=dataset")]
    assert int(dataset_order.split()[0]) > 0, "without measured lengths the run takes longer"


def test_the_command_takes_rows_and_engine_from_a_configuration(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}" * 40, "budget": 5 + n % 90} for n in range(500)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    configuration = [
        "run.dir=x",
        "model=none",
        "run.engine=fake",
        f"data.path={tmp_path}/rows.jsonl",
        "data.prompt_column=prompt",
        "sampling.from_columns={max_tokens: budget}",
        "engine.step_s=0.002",
        "engine.max_num_seqs=8",
        "engine.max_model_len=4096",
    ]
    done = run_command(*configuration, "--calibrate", "--ranks", "1,4")
    assert done.returncode == 0, done.stderr
    assert "order of work: longest first by max_tokens from column budget (min 5, median " in done.stdout
    step_ms = float(done.stdout.split("engine: ")[1].split(" ms")[0])
    assert 1.5 < step_ms < 10, done.stdout
    assert "calibrating: 8 sequences" in done.stderr


@pytest.mark.parametrize("samples", ["sampling.n=3", "sampling.from_columns={n: samples}"])
def test_each_sample_of_a_row_takes_its_time(samples: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"row {n}", "budget": 5 + n % 90, "samples": 3 if n else 10**19} for n in range(600)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    configuration = ["run.dir=x", "model=none", f"data.path={tmp_path}/rows.jsonl", "data.prompt_column=prompt"]
    options = ["--length-column", "budget", "--ranks", "1", "--max-num-seqs", "8", "--json"]
    one, three = (run_command(*configuration, *more, *options) for more in ([], [samples]))
    assert (one.returncode, three.returncode) == (0, 0), three.stderr
    [seconds, of_samples] = [json.loads(done.stdout)["ranks"]["1"]["wall_s"] for done in (one, three)]
    assert of_samples == pytest.approx(3 * seconds, rel=0.02)
    assert re.search(r"600 rows have 1,(800|798) samples \(sampling\.n\)", three.stderr), "one row's number is none"


def test_the_rows_of_a_program_have_the_lengths_that_are_given(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"row {n}"}) + "\n" for n in range(600)))
    recipe = str(REPO / "conf" / "self_consistency.yaml")
    done = run_command(recipe, f"data.path={tmp_path}/rows.jsonl", "--lengths", "constant:50", "--ranks", "1")
    assert done.returncode == 0, done.stderr
    assert "600 rows" in done.stdout


def test_a_row_that_takes_too_long_to_render_is_left_out_of_a_simulated_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "hang" if n == 3 else "x" * 4 * n, "budget": 5} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loop = "{% for _ in range(99999) %}{% for _ in range(99999) %}{% endfor %}{% endfor %}"
    template = f"{{% if prompt == 'hang' %}}{loop}{{% endif %}}{{{{ prompt }}}}"
    configuration = ["run.dir=x", "model=none", "run.engine=fake", f"data.path={tmp_path}/rows.jsonl"]
    configuration += [f"data.template={template}", "data.render_timeout_s=0.3", "work.order=longest_first"]
    options = build_parser("simulate")[0].parse_args(["simulate", *configuration, "--length-column", "budget"])
    monkeypatch.setattr("dpgen.commands.scenario.setup_logging", lambda *_: None)
    workload = build_scenario(options).workload
    assert caplog.messages == ["rendering takes longer than data.render_timeout_s=0.3, rejecting 1 row: 3"]
    assert workload.order.rows.tolist() == [7, 6, 5, 4, 2, 1, 0, 3]
    assert workload.prompt_lengths.tolist() == [0, 1, 2, 0, 4, 5, 6, 7]


# Runs `dpgen simulate` with each list of arguments, and reports its exit status, stdout and stderr.
EACH_SIMULATED = """
import contextlib, io, json, sys
from dpgen.cli import main

for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
        status = main(["simulate", *arguments])
    print("REPORT " + json.dumps([status, stdout.getvalue(), stderr.getvalue()]), flush=True)
"""

WRONG_USAGE: list[tuple[list[str], str]] = [
    ([], "the rows' lengths are unknown: pass --lengths KIND"),
    (["--calibrate"], "need a configuration"),
    (["--lengths", "constant:5", "--ranks", "0"], "--ranks=0: must be numbers of at least 1"),
    (["--lengths", "constant:5", "--step-ms", "-1"], "--step-ms=-1: must be at least 0"),
    (["--lengths", "constant:5", "--rows", "0"], "--rows=0: must be at least 1"),
    (["--lengths", "constant:5", "--seed", "-1"], "--seed=-1: must be at least 0"),
    (["--lengths", "constant:5", "--prompt-tokens", "-1"], "--prompt-tokens=-1: must be at least 0"),
    (["--lengths", "constant:5", "--seq-us", "nan"], "--seq-us=nan: must be a finite number"),
    (["--lengths", "constant:5", "--group-rows", "0"], "--group-rows=0: must be at least 1"),
    (
        ["--lengths", "constant:5", "--group-rows", "4", "--group-noise", "-1"],
        "--group-noise=-1: must be at least 0",
    ),
    (["conf/demo.yaml", "--lengths", "constant:5", "--group-rows", "4"], "only for sampled rows"),
    (["--lengths", "some:5"], "must be constant:TOKENS"),
    (
        ["run.dir=x", "model=m", "data.path=conf/demo/questions.jsonl", "data.prompt_column=question"],
        "the rows' lengths are unknown",
    ),
    (
        ["conf/demo.yaml", "--length-column", "answr"],
        "'answr' is no column of the dataset; did you mean 'answer'?",
    ),
    (["conf/demo.yaml", "--length-column", "question"], "column 'question' holds no number"),
    (
        ["conf/demo.yaml", "--lengths", "constant:5", "work.order=longest_first", "work.hint_column=answr"],
        "work.hint_column: 'answr' is no column of the dataset; did you mean 'answer'?",
    ),
    (
        ["conf/demo.yaml", "--lengths", "constant:5", "lora={a: x, b: y}", "data.lora_column=answr"],
        "data.lora_column: 'answr' is no column of the dataset; did you mean 'answer'?",
    ),
]


def test_wrong_usage_is_one_clear_line(launcher: Launcher) -> None:
    reports = run_each_command(launcher, EACH_SIMULATED, [arguments for arguments, _ in WRONG_USAGE])
    for (arguments, message), (status, stdout, stderr) in zip(WRONG_USAGE, reports, strict=True):
        assert status == 2 and stdout == "", f"{arguments}: {stdout}{stderr}"
        assert message in stderr and len(stderr.splitlines()) == 1, f"{arguments}: {stderr}"
