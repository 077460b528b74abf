"""Test that ranks which were started with different jobs end before a model loads, with the key named."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.jobs import Launcher, WriteConfig, make_numbered_rows

from dpgen.config.schema import Config
from dpgen.config.sections import DataConfig, ParallelConfig, RunConfig
from dpgen.distributed import agreement
from dpgen.distributed.group import SingleRankGroup
from dpgen.errors import ConfigError


class TwoRanks(SingleRankGroup):
    """Gather this rank's value and the value that another rank gave at the same call."""

    size = 2

    def __init__(self, peer: list[object]) -> None:
        super().__init__()
        self.peer, self.gathered = peer, list[object]()

    def all_gather_object(self, value: object) -> list[object]:
        self.gathered.append(value)
        peer = self.peer[len(self.gathered) - 1] if len(self.gathered) <= len(self.peer) else None
        return [value, peer]


def make_config(engine: dict[str, object] | None = None, run_dir: str = "run", **sections: object) -> Config:
    return Config(
        run=RunConfig(dir=run_dir),
        data=DataConfig(path=f"{run_dir}/rows.jsonl", prompt_column="prompt"),
        model="m",
        engine=engine or {},
        **sections,  # type: ignore[arg-type]
    )


def gather_values(config: Config) -> list[object]:
    """Return what a rank with this configuration sends where its peer differs."""
    group = TwoRanks(["", {}, None])
    with pytest.raises(ConfigError):
        agreement.check_same_job(config, group)
    return group.gathered


def find_difference(config: Config, other: Config) -> str:
    """Return the error of rank 0 with `config` beside rank 1 with `other`; "" if both may run."""
    try:
        agreement.check_same_job(config, TwoRanks(gather_values(other)))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_ranks_with_other_sampling_or_another_seed_end_with_both_values(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(40), sampling={"max_tokens": 5})
    jobs = launcher.start_like_srun("run", conf, rank_arguments=[[], ["sampling.max_tokens=7", "run.seed=2"]])
    assert [job.wait() for job in jobs] == [2, 2], jobs[0].output + jobs[1].output
    output = jobs[0].output + jobs[1].output
    assert "sampling.max_tokens: 5 on rank 0, 7 on rank 1" in output
    assert "run.seed: 0 on rank 0, 2 on rank 1" in output, "every differing key is named"
    assert not (tmp_path / "run").exists(), "no row was generated"


def test_options_that_decide_on_collectives_are_compared() -> None:
    other = make_config(parallel=ParallelConfig(sync_kv_cache=False))
    assert "parallel.sync_kv_cache: true on rank 0, false on rank 1" in find_difference(make_config(), other)


def test_options_that_change_only_the_speed_and_local_paths_may_differ() -> None:
    other = make_config({"max_num_seqs": 4, "step_s": 0.1, "load_format": "safetensors"}, run_dir="/local/run")
    assert find_difference(make_config(), other) == ""


def test_two_different_secrets_differ_and_neither_is_shown() -> None:
    one, other = (make_config({"some_plugin": {"api_key": f"secret-{name}"}}) for name in "ab")
    error = find_difference(one, other)
    assert "engine.some_plugin" in error and "secret-" not in error


def test_versions_and_variables_that_change_results_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setattr(agreement, "read_versions", lambda: {"vllm": "0.31.0"})
    peer = gather_values(config)
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
    monkeypatch.delenv("VLLM_LOGGING_LEVEL")
    monkeypatch.setattr(agreement, "read_versions", lambda: {"vllm": "0.32.0"})
    with pytest.raises(ConfigError) as raised:
        agreement.check_same_job(config, TwoRanks(peer))
    text = str(raised.value)
    assert 'version of vllm: "0.32.0" on rank 0, "0.31.0" on rank 1' in text
    assert 'variable VLLM_USE_V2_MODEL_RUNNER: not set on rank 0, "1" on rank 1' in text
    assert "VLLM_LOGGING_LEVEL" not in text, "it changes no result"
