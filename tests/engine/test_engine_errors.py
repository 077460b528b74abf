"""Engines' errors by their texts, which are those of vLLM 0.32, torch and cuBLAS."""

from __future__ import annotations

import pytest

from dpgen.errors import EngineError, FreeMemory

STILL_HELD = (
    "ValueError: Free memory on device cuda:0 (11.2/79.1 GiB) on startup is less than desired GPU memory utilization "
    "(0.9, 71.2 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
)
CONTEXT_TOO_LONG = (
    "ValueError: To serve at least one request with the model's max seq len (131072), (16.00 GiB KV cache is needed, "
    "which is larger than the available KV cache memory (3.10 GiB). Based on the available memory, the estimated "
    "maximum model length is 25392. Try increasing `gpu_memory_utilization` or decreasing `max_model_len`."
)
WORKER_FAILED = "Exception: WorkerProc initialization failed due to an exception in a background process."


@pytest.mark.parametrize(
    "text",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`.",
        STILL_HELD,
    ],
)
def test_an_engine_is_out_of_memory_by_any_of_its_words(text: str) -> None:
    assert EngineError(f"the engine failed: {text}").is_out_of_memory
    assert EngineError("the engine process exited with status 1", last_lines=[text]).is_out_of_memory
    assert EngineError(f"the engine failed: {WORKER_FAILED}", output=["x", text, "y"]).is_out_of_memory


def test_output_that_only_speaks_of_memory_is_no_cause() -> None:
    output = ["INFO 11-26 15:34:45 [config.py:7] lower max_num_seqs if you run out of memory"]
    assert not EngineError(f"the engine failed: {WORKER_FAILED}", output=output).is_out_of_memory


def test_memory_that_others_hold_is_told_apart() -> None:
    assert EngineError(STILL_HELD).free_memory == FreeMemory("cuda:0", 11.2, 79.1, is_at_start=True)
    assert EngineError("CUDA out of memory").free_memory is None


def test_a_context_that_does_not_fit_advises_a_shorter_one() -> None:
    error = EngineError(f"the engine failed: {CONTEXT_TOO_LONG}")
    assert not error.is_out_of_memory and error.is_context_too_long
    assert error.summarize().endswith(", set a smaller engine.max_model_len")
    assert "max_model_len" not in EngineError("boom").summarize()
