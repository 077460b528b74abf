"""What the report says of runs of all kinds: finished, dead, empty, damaged, of older versions, and very large."""

from __future__ import annotations

import html
import json
import logging
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.clock import FakeClock
from helpers.reported_run import SECRET, ReportedRun, make_eventful_run

from dpgen.journal.format import Frames
from dpgen.report import writing
from dpgen.report.distributions import describe_latencies, describe_lengths
from dpgen.report.facts import RunEnding, collect_facts
from dpgen.report.page import MAX_BYTES, render_page
from dpgen.report.row_sampler import RowSampler
from dpgen.report.time_budget import TimeBudget
from dpgen.report.timeline import read_timeline
from dpgen.report.writing import write_final_report


def render(path: Path, outcome: RunEnding | None = None) -> str:
    return render_page(collect_facts(path, TimeBudget(), outcome))


def read_text(page: str) -> str:
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page.partition("<body>")[2])))


def test_the_counts_are_those_of_the_journal(tmp_path: Path) -> None:
    facts = collect_facts(make_eventful_run(tmp_path / "run").path, TimeBudget())
    journal = facts.journal
    assert (journal.num_done, journal.num_errors, journal.num_repeated, journal.num_rejected) == (390, 9, 10, 10)
    assert {name: number for name, (number, _) in journal.errors.items()} == {
        "too_long": 5,
        "<script>alert(9)</script>": 4,
    }
    assert journal.rejections["regex"][0] == 10 and journal.mean_rejected_tokens == 20
    assert journal.statistics.finish_reasons == {"stop": 381, "length": 380}
    assert len(journal.statistics.rows) == 8 and facts.latencies == [0, 0, 10, 18, 60, 18, 2]


def test_the_time_of_all_ranks_is_accounted_for(tmp_path: Path) -> None:
    facts = collect_facts(make_eventful_run(tmp_path / "run").path, TimeBudget())
    spending, efficiency = facts.spending, facts.efficiency
    assert spending is not None and efficiency is not None
    assert spending.unit == "GPU" and spending.total_s == pytest.approx(2 * (35 + 60))
    assert spending.seconds["start"] == pytest.approx(4 * 10)
    # The first attempt was cut off in its tail. One rank of two has rows there, the other one waits.
    assert spending.seconds["tail"] == pytest.approx(5 + 8) and spending.seconds["idle"] == pytest.approx(5 + 8)
    assert spending.seconds["rejected"] > 0 and spending.seconds["lost"] > 0
    assert 0 < efficiency.fraction < 1 and efficiency.wall_s == pytest.approx(95)
    assert efficiency.fraction + sum(share for _, share in efficiency.limits) == pytest.approx(1, abs=0.03)
    assert [attempt.pause_s for attempt in facts.timeline.attempts] == [None, pytest.approx(7_200 - 35)]


def test_no_secret_is_on_the_page(tmp_path: Path) -> None:
    run = make_eventful_run(tmp_path / "run")
    run.texts = (f"my key is {SECRET}",)
    run.write_rows(2, 5, range(380, 391))
    page = render(run.path)
    assert "hf_token: " in page and SECRET not in page


@pytest.mark.parametrize(
    ("damage", "note"),
    [
        (lambda run: shutil.rmtree(run / "status"), "No rank's history is here"),
        (lambda run: shutil.rmtree(run / "journal"), "No row has a result."),
        (lambda run: (run / "run.json").unlink(), "There is no run.json"),
        (lambda run: (run / "run.json").write_text("{"), "run.json can't be read"),
        (lambda run: (run / "run.json").write_text('{"identity": 3, "engine": [], "manifests": 1}'), "390"),
        (lambda run: (run / "config.yaml").unlink(), "There is no config.yaml"),
        (lambda run: (run / "config.yaml").write_text("a: [\n\x00"), "390"),
        (lambda run: (run / "_SUCCESS").write_text("[]"), "390"),
        (lambda run: [path.write_bytes(b"\0" * 99) for path in (run / "journal").iterdir()], "No row has a result."),
        (lambda run: _damage_payloads(run / "journal"), "are damaged: see dpgen verify"),
        (lambda run: (run / "status" / "rank-1.history.jsonl").unlink(), "The histories of 1 of 2 ranks are here"),
    ],
)  # fmt: skip
def test_a_page_is_made_of_what_is_there(damage: Callable[[Path], object], note: str, tmp_path: Path) -> None:
    run = make_eventful_run(tmp_path / "run")
    damage(run.path)
    assert note in read_text(render(run.path))


def _damage_payloads(journal: Path) -> None:
    for path in journal.iterdir():
        data = bytearray(path.read_bytes())
        data[100] ^= 0xFF  # in the first record of a sealed segment, whose index stays sound
        path.write_bytes(data)


@pytest.mark.parametrize(
    "line",
    [
        b"not json",
        b"[]",
        b'{"attempt": "x", "elapsed_s": 1}',
        b'{"attempt": 2, "elapsed_s": null}',
        b'{"attempt": 2, "elapsed_s": 1e999, "phase": "generating"}',
        b'{"attempt": 2, "elapsed_s": -5}',
        b'{"attempt": 2, "elapsed_s": 30.5, "phase": 7, "num_running": "many", "run_num_unclaimed": [1]}',
        b'{"attempt": 2, "elapsed_s": 31, "phase": "<b>", "num_generated_tokens": null, "time": {}}',
        b"\xff\xfe\x00",
    ],
)
def test_damaged_lines_of_a_history_are_left_out(line: bytes, tmp_path: Path) -> None:
    run = make_eventful_run(tmp_path / "run")
    with (run.path / "status" / "rank-0.history.jsonl").open("ab") as file:
        file.write(line + b"\n")
    facts = collect_facts(run.path, TimeBudget())
    assert facts.timeline.length_s == pytest.approx(95)
    assert "Throughput" in render_page(facts)


@pytest.mark.parametrize(
    ("num_rows", "error", "texts"),
    [
        (0, None, ["rows done 0 of 0 rows", "No row has an error."]),
        (1, None, ["rows done 1 of 1 rows, 100 %", "2 completions"]),
        (3, "too_long", ["rows done 3 of 3 rows", "100 % of them", "too_long 3 rows"]),
    ],
)
def test_small_runs_have_a_page(num_rows: int, error: str | None, texts: list[str], tmp_path: Path) -> None:
    run = ReportedRun(tmp_path / "run", num_rows)
    run.write_run_json()
    if num_rows:
        run.write_rows(1, 0, range(num_rows), error)
    (run.path / "_SUCCESS").write_text(json.dumps({"num_rows": num_rows, "num_generated_tokens": 0}))
    text = read_text(render(run.path, RunEnding("finished")))
    assert all(part in text for part in texts), text


def test_a_run_of_one_second_has_a_timeline(tmp_path: Path) -> None:
    run = ReportedRun(tmp_path / "run", 1)
    run.write_run_json(num_ranks=1)
    run.write_rows(1, 0, [0])
    samples = [
        {"attempt": 1, "elapsed_s": 0, "phase": "starting", "is_change": True},
        {"attempt": 1, "elapsed_s": 0.7, "phase": "generating", "is_change": True},
        {"attempt": 1, "elapsed_s": 1.0, "phase": "finished", "state": "finished", "num_generated_tokens": 105},
    ]
    (run.path / "status/rank-0.history.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    text = read_text(render(run.path))
    assert "Timeline of the rank" in text and "generating what is in the result 30 %" in text


def test_an_empty_directory_has_a_page_that_says_so(tmp_path: Path) -> None:
    text = read_text(render(tmp_path))
    assert "There is no run.json" in text and "No row has a result." in text


def test_the_page_stays_small_whatever_the_texts(tmp_path: Path) -> None:
    run = ReportedRun(tmp_path / "run", 20, texts=["\x00<&\u202e" * 50_000])
    run.write_run_json()
    run.write_rows(1, 0, range(20))
    (run.path / "config.yaml").write_text("prompt: |\n" + "  <&>\"'\n" * 100_000)
    assert len(render(run.path).encode()) < MAX_BYTES


def test_an_hour_of_many_attempts_stays_small(tmp_path: Path) -> None:
    run = make_eventful_run(tmp_path / "run")
    for attempt in range(3, 40):
        for rank in (0, 1):
            run.write_history(rank, attempt, start_time=1e9 + 10_000 * attempt)
    assert len(render(run.path).encode()) < 150_000


def test_of_very_many_rows_a_sample_is_kept_each_row_with_all_its_results() -> None:
    sampler = RowSampler(1_000)
    for number in range(20):  # 400,000 results of 200,000 rows
        rows = np.arange(number % 10 * 20_000, (number % 10 + 1) * 20_000)
        zeros = np.zeros(len(rows), np.int64)
        sampler.add(Path(f"segment-{number}"), Frames(rows, zeros, zeros.astype(np.uint32), zeros > 0, zeros > 0))
    kept = np.concatenate([frames.row for _, frames in sampler.get_segments()])
    rows, counts = np.unique(kept, return_counts=True)
    assert sampler.num_seen == 400_000 and len(kept) == 1_000 and (counts == 2).mean() > 0.99
    assert 80_000 < rows.mean() < 120_000, "every row has the same chance"


def test_what_is_not_read_in_time_is_named(tmp_path: Path) -> None:
    run, clock = make_eventful_run(tmp_path / "run"), FakeClock()
    budget = TimeBudget(1.0, clock)
    clock.now_s = 2.0
    text = read_text(render_page(collect_facts(run.path, budget)))
    assert "2 of 2 ranks' histories were not read for lack of time" in text
    assert re.search(r"\d+ of \d+ segments of the journal were not read for lack of time", text)


def test_ranks_of_an_attempt_start_together_whatever_their_clocks_say(tmp_path: Path) -> None:
    run = ReportedRun(tmp_path / "run", 10)
    run.write_history(0, start_time=1e9)
    run.write_history(1, start_time=5e9)
    timeline = read_timeline(run.path / "status", TimeBudget(), is_over=True)
    assert timeline.length_s == 60 and [rank.end_s for rank in timeline.attempts[0].ranks] == [60, 60]


def test_a_report_that_fails_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(f"a fault with {SECRET}")

    monkeypatch.setattr(writing, "collect_facts", fail)
    with caplog.at_level(logging.INFO):
        write_final_report(str(tmp_path), RunEnding("finished"))
    [record] = caplog.records
    assert record.levelno == logging.WARNING and "the report is not written: RuntimeError: a fault" in record.message
    assert SECRET not in record.message and f"'dpgen report {tmp_path}' tries again" in record.message


def test_a_report_on_a_hanging_disk_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()
    monkeypatch.setattr(writing, "collect_facts", lambda *_: released.wait())
    try:
        write_final_report(str(tmp_path), RunEnding("finished"), timeout_s=0.05)
    finally:
        released.set()
    assert "the report is not written: this takes longer than 0.05 s" in caplog.text


def test_a_directory_in_the_report_s_place_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_eventful_run(tmp_path / "run")
    (run.path / "report.html").mkdir()
    write_final_report(str(run.path), RunEnding("finished"))
    assert caplog.text.count("the report is not written") == 1


@pytest.mark.parametrize("values", [[5], [0, 0], [1, 2, 3], [7] * 50 + [9_000_000], list(range(1000))])
def test_lengths_fill_a_histogram(values: list[int]) -> None:
    shown = describe_lengths(values)
    assert shown is not None and sum(bar.number for bar in shown.bars) == len(values)
    assert all(0 <= bar.start < bar.end <= 1 for bar in shown.bars) and all(0 <= place <= 1 for place, _ in shown.ticks)


def test_latencies_are_shown_by_their_bins() -> None:
    shown = describe_latencies([0, 0, 1, 8, 1])
    assert shown is not None and [bar.number for bar in shown.bars] == [1, 8, 1]
    assert dict(shown.figures) == {"median": "≤ 26 ms", "90 %": "≤ 26 ms", "99 %": "≤ 31 ms", "max": "≤ 31 ms"}
    assert describe_latencies([]) is None and describe_latencies([0, 0]) is None


def test_the_bound_is_the_time_of_all_tokens_at_full_speed_also_without_the_last_words_of_a_rank(
    tmp_path: Path,
) -> None:
    run = ReportedRun(tmp_path / "run", 400)
    run.write_run_json()
    run.write_rows(1, 0, range(400))
    run.write_history(0)
    run.write_history(1, state="", length_s=40)
    facts = collect_facts(run.path, TimeBudget(), RunEnding("finished"))
    assert facts.efficiency is not None and facts.spending is not None
    speed = facts.efficiency.full_tokens_per_s
    assert facts.efficiency.bound_s == pytest.approx(facts.num_generated_tokens / speed)
    assert facts.spending.num_generated_tokens == 72_000
