"""Results of trials are kept for the next start of the same search, on the same kind of machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpgen.tuning.store import describe_machine, read_results, write_results
from dpgen.tuning.trial import Measurement, TrialResult

H100, H200 = ({"GPU": name, "vLLM": "0.26.0"} for name in ("NVIDIA H100", "NVIDIA H200"))
RESULTS = [TrialResult(1, {}, (Measurement(256, 1000.0, 1.0, 10, 2000),), num_rows=10)]


def test_results_are_those_of_the_same_job_on_the_same_machine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "dpgen")
    assert read_results(tmp_path, "a", H100) == []
    write_results(tmp_path, "a", H100, RESULTS)
    assert read_results(tmp_path, "a", H100) == RESULTS
    assert read_results(tmp_path, "another job", H100) == [] and caplog.messages == []
    for other in (H200, {**H100, "vLLM": "0.32.0"}, {}):
        assert read_results(tmp_path, "a", other) == []
    assert caplog.messages[0] == (
        "1 trial of an earlier start left out: measured on GPU NVIDIA H100 with vLLM 0.26.0, and this is GPU NVIDIA "
        "H200 with vLLM 0.26.0"
    )
    assert len(caplog.messages) == 3


def test_a_machine_is_its_gpu_and_its_vllm() -> None:
    assert set(describe_machine()) <= {"GPU", "vLLM"}
