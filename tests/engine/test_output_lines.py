"""What is kept of an engine's lines: progress bars, harmless warnings, and the exception behind the last one."""

from __future__ import annotations

import json

import pytest
from helpers import vllm_signatures

from dpgen.engine.output_lines import (
    HARMLESS_WARNINGS,
    find_root_cause,
    is_harmless,
    is_traceback,
    make_message_key,
    split_progress,
)

PREFIX = "(MainProcess pid=8) WARNING 11-27 06:47:16"
# Printed by vLLM 0.32 on the CPU, or built of the texts in its source.
HARMLESS_LINES = [
    f"{PREFIX} [arg_utils.py:1945] The global random seed is set to 0. Since "
    "VLLM_ENABLE_V1_MULTIPROCESSING is set to False, this may affect the random state of the Python process.",
    f"{PREFIX} [arg_utils.py:3005] This model does not officially support disabling "
    "chunked prefill. Disabling this manually may cause the engine to crash or produce incorrect outputs.",
    f"{PREFIX} [vllm.py:1703] Enforce eager set, disabling torch.compile, CUDAGraphs, ",
    f"{PREFIX} [vllm.py:1727] Inductor compilation was disabled by user settings, ",
    f"{PREFIX} [cpu.py:224] Triton is not installed. triton-cpu is expected on x86.",
    f"{PREFIX} [vllm.py:725] Model Runner V2 requires Triton; using the V1 model runner",
    f"{PREFIX} [vllm.py:731] Model Runner V2 does not yet support encoders; using the V1",
    f"{PREFIX} [model.py:1893] Default vLLM sampling parameters have been overridden by",
    f"{PREFIX} [cpu_worker.py:114] libtcmalloc is not found in LD_PRELOAD. For best ",
    "(Worker_TP1 pid=9) WARNING 11-27 06:47:17 [torch_utils.py:283] OMP_NUM_THREADS=2 is set; leaving Torch threads",
    f"{PREFIX} [multiproc_executor.py:491] [shutdown] Executor: workers still running after grace period; count=2",
    f"{PREFIX} [utils.py:333] Attempted to load weight lm_head.weight with dtype torch.float32 into parameter with ",
    "WARNING 11-27 06:47:17 [v1/worker/gpu_model_runner.py:83] Skipping CUDA graph capture. To turn on CUDA",
    f"{PREFIX} [cpu.py:317] Reset SSM cache type to float32 for accelerated GDN mamba backend 'none'.",
]
REAL_WARNINGS = [
    f"{PREFIX} [arg_utils.py:9] This model does not officially support chunked prefill.",
    f"{PREFIX} [cuda.py:9] The global random seed is set to 0.",
    f"{PREFIX} [model.py:9] Your device GPU 7.5 doesn't support bfloat16. Falling back",
    "[W1127 06:47:16.343577260 utils.cpp:68] Warning: NUMA binding: Using MEMBIND policy",
    f"{PREFIX} [cpu.py:317] Reset SSM cache type to float32 for accelerated GDN mamba backend 'mamba2'.",
]
BAR = "Capturing CUDA graphs (decode, FULL): {}%|███       | {}/5 [00:0{}<00:01,  1.98it/s]"
LOADING = "Loading safetensors checkpoint shards: {}% Completed | {}/4 [00:00<?, ?it/s]"
RECORD = f"{PREFIX} [cache.py:224] few blocks"


@pytest.mark.parametrize("line", HARMLESS_LINES)
def test_a_warning_that_nobody_has_to_act_on_is_harmless(line: str) -> None:
    assert is_harmless(line)


@pytest.mark.parametrize("line", REAL_WARNINGS)
def test_other_warnings_are_real_also_with_words_of_harmless_ones(line: str) -> None:
    assert not is_harmless(line)


def test_some_version_of_vllm_has_each_harmless_warning() -> None:
    recorded: dict[str, list[str]] = json.loads(vllm_signatures.RECORD.read_text(encoding="utf-8"))["warnings"]
    assert recorded.keys() == {text for _, text, _ in HARMLESS_WARNINGS}, "see helpers/vllm_signatures.py"
    assert all(recorded.values())


@pytest.mark.parametrize("bar", [BAR, LOADING])
def test_of_a_progress_bar_only_the_last_state_is_kept_and_what_is_logged_behind_it_is_a_line(bar: str) -> None:
    states = "\r".join(bar.format(20 * i, i, i) for i in range(5))
    assert split_progress(f"\r{states}\r") == [bar.format(80, 4, 4)]
    assert split_progress(states + RECORD) == [bar.format(80, 4, 4), RECORD]
    assert split_progress(RECORD) == [RECORD] and split_progress("\r \r") == split_progress("") == []
    percent = f"{PREFIX} [cache.py:224] 95% of [blocks] are in use"
    assert split_progress(percent) == [percent]


def test_the_lines_of_a_traceback_are_told_from_the_exception() -> None:
    prefix = "(Worker_TP0 pid=7) ERROR 11-26 16:12:57 [x.py:7]"
    assert all(
        is_traceback(f"{prefix} {text}")
        for text in ("  File", "    ^^^^", "^^^", "", "Traceback (most recent call last):")
    )
    assert not any(is_traceback(f"{prefix} {text}") for text in ("ValueError: x", "WorkerProc failed to start."))


def test_messages_are_the_same_but_for_their_numbers_time_and_process() -> None:
    other = RECORD.replace("pid=8", "pid=9").replace("06:47", "06:48")
    assert make_message_key(RECORD) == make_message_key(other) == "cache.py: few blocks"
    assert make_message_key(f"{RECORD} on 7") == make_message_key(f"{RECORD} on 12") != make_message_key(RECORD)
    glog = "[rank{}]:[W112{} 06:47:16.343577260 ProcessGroupNCCL.cpp:68] Warning: device {}"
    assert make_message_key(glog.format(0, 6, 0)) == make_message_key(glog.format(3, 7, 3))


def test_an_exception_that_refers_to_others_is_replaced_by_the_one_that_it_means() -> None:
    failed = (
        "Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace for "
        "root cause."
    )
    worker = "(Worker_TP{} pid=7) ERROR 11-26 16:12:57 [multiproc_executor.py:871] {}"
    memory = (
        "ValueError: Free memory on device cuda:0 (1/80 GiB) on startup is less than desired GPU memory utilization"
    )
    output = [
        worker.format(0, "WorkerProc failed to start."),
        worker.format(0, "Traceback (most recent call last):"),
        worker.format(0, memory),
        "Traceback (most recent call last):",
        failed,
    ]
    assert find_root_cause(failed, output) == memory
    assert find_root_cause(failed, ["torch.OutOfMemoryError: CUDA out of memory", failed]).startswith("torch.Out")
    assert find_root_cause(failed, ["nothing", failed]) == failed
    assert find_root_cause("ValueError: own", output) == "ValueError: own"
