"""User errors: each is reported once, with exit status 2, and a finished run stays as it was."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.jobs import EACH_IN_TURN, Launcher, WriteConfig, load_result, make_numbered_rows, run_each_command

pytestmark = pytest.mark.multi

# (an argument of the command line, words of the error), one each that the configuration, the input and the engine find.
WRONG = [
    ("data.promt_column=x", "did you mean 'data.prompt_column'"),
    ("data.prompt_column=promt", "data.prompt_column: 'promt' is no column of the dataset; did you mean 'prompt'"),
    ("engine.max_num_seq=3", "unknown key 'engine.max_num_seq'; did you mean 'engine.max_num_seqs'"),
]
# More of them, all in one process.
WRONG_TOO = [
    ("engine.max_num_seqs=0", "engine.max_num_seqs=0: must be a whole number of at least 1"),
    ("sampling.max_token=3", "unknown key 'sampling.max_token'; did you mean 'sampling.max_tokens'"),
    (
        "sampling_by_rank=[{}, {max_token: 3}]",
        "unknown key 'sampling_by_rank[1].max_token'; did you mean 'sampling_by_rank[1].max_tokens'",
    ),
    (
        "sampling.from_columns={max_tokens: promp}",
        "sampling.from_columns.max_tokens: 'promp' is no column of the dataset; did you mean 'prompt'",
    ),
    ("data.columns=[promt]", "data.columns: there is no column 'promt'; did you mean 'prompt'"),
    ("data.path=nowhere.jsonl", "no such file or directory: nowhere.jsonl"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("override", "words"), WRONG)
def test_a_wrong_configuration_is_reported_once_for_all_ranks_with_exit_status_2(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, override: str, words: str
) -> None:
    jobs = launcher.start_like_srun("run", write_config(make_numbered_rows(3)), override, rank_arguments=[[], []])
    assert [job.wait() for job in jobs] == [2, 2]
    output = "".join(job.output for job in jobs)
    assert output.count(words) == 1, output
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "_SUCCESS").exists()


def test_other_wrong_configurations_are_reported_in_the_same_way(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(3))
    reports = run_each_command(launcher, EACH_IN_TURN, [[conf, override] for override, _ in WRONG_TOO])
    for (_, words), (status, output) in zip(WRONG_TOO, reports, strict=True):
        assert status == 2 and output.count(words) == 1 and "Traceback" not in output, output
    assert not (tmp_path / "run" / "_SUCCESS").exists()


@pytest.mark.slow
def test_torchrun_shows_the_cause_once_at_the_end_of_its_output(launcher: Launcher, write_config: WriteConfig) -> None:
    job = launcher.dpgen("run", write_config(make_numbered_rows(3)), "engine.max_num_seq=3", ranks=2)
    assert job.wait() == 1, "torchrun exits with 1 whatever the status of its workers"
    assert job.output.count("did you mean 'engine.max_num_seqs'") == 1, job.output
    assert "did you mean" in "".join(job.output.splitlines()[-3:])
    assert job.output.count("exitcode  : 2") == 2


def test_an_input_column_with_the_name_of_an_output_column_is_rejected(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    rows = [{"prompt": "p", "error": "mine"}]
    job = launcher.dpgen("run", write_config(rows))
    assert job.wait() == 2
    assert "data.columns=[prompt]" in job.output
    assert launcher.dpgen("run", write_config(rows), "data.columns=[prompt]").wait() == 0
    assert load_result(tmp_path / "run")[0]["error"] is None


@pytest.mark.slow
def test_a_finished_run_is_not_repeated_and_a_different_run_in_its_directory_is_rejected(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(5))
    assert launcher.dpgen("run", conf).wait() == 0
    marker = (tmp_path / "run" / "_SUCCESS").stat().st_mtime_ns
    again = launcher.dpgen("run", conf, "work.claim_rows=3", "engine.max_num_seqs=2")
    assert again.wait() == 0, "keys that do not change results may differ"
    assert "finished result already" in again.output
    other = launcher.dpgen("run", conf, "sampling.max_tokens=7")
    assert other.wait() == 2
    assert re.search(r"holds results of other settings: sampling.max_tokens: null → 7", other.output), other.output
    changed = write_config([*make_numbered_rows(4), {"prompt": "new"}])
    other = launcher.dpgen("run", changed)
    assert other.wait() == 2
    assert "input.content" in other.output
    assert (tmp_path / "run" / "_SUCCESS").stat().st_mtime_ns == marker


def test_a_directory_with_other_files_is_rejected_as_run_directory(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    job = launcher.dpgen("run", write_config(make_numbered_rows(3)))
    assert job.wait() == 2
    assert "thesis.tex" in job.output


@pytest.mark.slow
def test_another_sampling_by_rank_makes_a_different_run(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(4))
    assert launcher.dpgen("run", conf, "sampling_by_rank=[{max_tokens: 2}, {max_tokens: 3}]").wait() == 0
    for entries, shown in (("[{max_tokens: 2}]", '[{"max_tokens": 2}]'), ("[]", "null")):
        other = launcher.dpgen("run", conf, f"sampling_by_rank={entries}")
        assert other.wait() == 2
        assert f'sampling_by_rank: [{{"max_tokens": 2}}, {{"max_tokens": 3}}] → {shown}' in other.output, other.output
    assert [row["num_generated_tokens"] for row in load_result(tmp_path / "run")] == [2, 3, 2, 3]
