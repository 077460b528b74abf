"""What `dpgen` exports: importing it costs nothing, and its signatures change only on purpose."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
from helpers.jobs import REPO

import dpgen
from dpgen.api.settings import JobSettings, Settings

# A change here breaks programs of users: add optional keywords only, and say so in CHANGELOG.md.
SIGNATURES = {
    "generate": (
        "(dataset: 'Any', *, model: 'str | Path | None' = None, run_dir: 'str | Path | None' = None, config: "
        "'ConfigSource | None' = None, result_on: 'ResultOn' = 'rank0', **settings: 'Unpack[JobSettings]') -> "
        "'datasets.Dataset | None'"
    ),
    "stream": (
        "(dataset: 'Any', *, model: 'str | Path | None' = None, run_dir: 'str | Path | None' = None, config: "
        "'ConfigSource | None' = None, **settings: 'Unpack[JobSettings]') -> 'Iterator[dict[str, Any]]'"
    ),
    "Session": (
        "(*, model: 'str | Path | None' = None, config: 'ConfigSource | None' = None, **settings: "
        "'Unpack[JobSettings]') -> 'None'"
    ),
    "Session.generate": (
        "(self, dataset: 'Any', *, run_dir: 'str | Path | None' = None, result_on: 'ResultOn' = 'rank0', **settings: "
        "'Unpack[Settings]') -> 'datasets.Dataset | None'"
    ),
    "Session.stream": (
        "(self, dataset: 'Any', *, run_dir: 'str | Path | None' = None, **settings: 'Unpack[Settings]') -> "
        "'Iterator[dict[str, Any]]'"
    ),
    "load_config": "(config: 'ConfigSource', overrides: 'Sequence[str]' = ()) -> 'Config'",
    "load_result": "(run_dir: 'str | Path') -> 'datasets.Dataset'",
}
KEYWORDS = (
    *("prompt_column", "messages_column", "template", "as_chat", "system_prompt", "columns", "seed"),
    *("task", "sampling", "sampling_by_rank", "engine", "lora"),
    *("data", "run", "parallel", "work", "output", "check", "program"),
)
NAMES = {
    *("generate", "stream", "Session", "load_config", "load_result"),
    *(
        "Config",
        "RunConfig",
        "DataConfig",
        "ParallelConfig",
        "WorkConfig",
        "OutputConfig",
        "CheckConfig",
        "ProgramConfig",
    ),
    *("DpgenError", "ConfigError", "Interrupted", "EngineError", "NoEngineLeft", "NoRowSucceeded"),
    *("PeerFailed", "JoinFailed", "RanksLost"),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_public_signature_is_the_published_one(name: str) -> None:
    target = dpgen
    for part in name.split("."):
        target = getattr(target, part)
    assert callable(target) and str(inspect.signature(target)) == SIGNATURES[name]


def test_keywords_are_the_published_ones() -> None:
    assert tuple(Settings.__annotations__) == KEYWORDS
    assert tuple(JobSettings.__annotations__) == (*KEYWORDS, "num_gpus", "quiet")


def test_each_name_is_exported_and_found() -> None:
    assert set(dpgen.__all__) == NAMES and set(dir(dpgen)) >= NAMES
    assert all(getattr(dpgen, name).__name__ == name for name in dpgen.__all__)
    with pytest.raises(AttributeError, match="module 'dpgen' has no attribute 'genrate'"):
        dpgen.genrate  # noqa: B018 - what is tested


def test_errors_say_whether_the_same_call_goes_on() -> None:
    assert dpgen.Interrupted("x").is_resumable and not dpgen.ConfigError("x").is_resumable
    assert issubclass(dpgen.RanksLost, dpgen.DpgenError) and dpgen.DpgenError("x").run_dir is None


def test_importing_the_package_takes_less_than_a_tenth_of_a_second() -> None:
    program = "import time; t = time.process_time(); import dpgen; print(time.process_time() - t)"
    took_s = [
        float(subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(took_s) < 0.1, "seconds of the processor, which other processes do not lengthen"
