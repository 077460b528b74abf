"""Read the lines that an engine prints: their level, what of a progress bar is kept, and which warnings matter.

- A warning matters unless `HARMLESS_WARNINGS` lists it. Two that differ only in numbers are the same.
- The lines of a traceback belong to the error above or below them.

Limits: a level is recognized in vLLM's text format and in the glog format of torch, not in formats that the user
configures (vLLM's `logging_config`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

# vLLM 0.32: "(Worker_TP0 pid=7) WARNING 11-26 15:34:45 [cpu.py:224] ...", after VLLM_LOGGING_PREFIX where that is set.
# Earlier versions name only their worker processes.
_VLLM_LEVEL = re.compile(r"\b(DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d \[")
_VLLM_RECORD = re.compile(rf"(?:\(\w+ pid=\d+\) )?{_VLLM_LEVEL.pattern}(?P<file>[\w./]*?)(?::\d+)?\] ?(?P<message>.*)")
_MAX_PREFIX_CHARS = 200  # a level that stands further to the right belongs to the message
# torch: "[rank0]:[W1126 15:34:45.343577260 utils.cpp:68] ..." from C++, without inner brackets from Python.
_GLOG_LEVEL = re.compile(r"(?:\[rank\d+\]:)?\[?([IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ ")
_GLOG_LEVELS = {"I": logging.INFO, "W": logging.WARNING, "E": logging.ERROR, "F": logging.CRITICAL}
_GLOG_MESSAGE = re.compile(r".*?\b([\w./]+:\d+)\] ?(.*)")
# tqdm: "Capturing CUDA graphs:  40%|████      | 2/5 [00:01<00:01,  1.9it/s]", and "...: 40% Completed | 2/5 [...]".
_PROGRESS_BAR = re.compile(r"\d+%[^\[]*\[[^\]]*\]")
_NUMBER = re.compile(r"\d+")
_TRACEBACK_LINE = re.compile(
    r"\s|Traceback \(most recent call last\):|[~^]+$|$|During handling of the above|The above exc"
)
_EXCEPTION = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)(?:: .+|$)")
_REFERS_ABOVE = "root cause"  # "WorkerProc initialization failed ... See stack trace for root cause." and others

# Warnings that no user has to act on, each of some version of vLLM from 0.26 to 0.33: the file, the beginning of the
# message (a regular expression), and why.
HARMLESS_WARNINGS = (
    ("jit_monitor.py", r"\w+ \w+ \w+ \w+ during inference: ", "a kernel is compiled once, with its first batch"),
    ("arg_utils.py", "The global random seed is set to", "the process is the engine's own, and rows have their seeds"),
    (
        "arg_utils.py",
        "This model does not officially support disabling chunked",
        "dpgen does so on the CPU, and says so",
    ),
    ("utils.py", "Attempted to load weight ", "it follows from engine.dtype, one line for each weight"),
    ("vllm.py", "Enforce eager set, ", "engine.enforce_eager says it"),
    ("vllm.py", "Inductor compilation was disabled by user settings", "it follows from engine.enforce_eager"),
    ("gpu_model_runner.py", "Skipping CUDA graph capture", "it follows from engine.enforce_eager"),
    ("vllm.py", "Model Runner V2 ", "both runners work, and run.json names the one in use"),
    (
        "model.py",
        "Default vLLM sampling parameters have been overridden",
        "dpgen wants the model's own, as LLM.generate",
    ),
    ("cpu.py", "Triton is not installed", "the CPU build needs none"),
    (
        "cpu.py",
        "Reset SSM cache type to float32 for accelerated GDN mamba backend 'none'",
        "on processors with AVX-512 BF16, of models that have no such state",
    ),
    ("cpu_worker.py", "CPU backend doesn't allow to use `torch.set_num_threads`", "it keeps the threads that it has"),
    ("cpu_worker.py", r"lib\w+ is not found in LD_PRELOAD", "it makes the CPU build faster, which is for trying out"),
    (
        "multiproc_executor.py",
        r"\[shutdown\] Executor: workers still running",
        "its rows are finished, and dpgen ends it",
    ),
    ("torch_utils.py", r"OMP_NUM_THREADS=\d+ is set", "dpgen sets it to the engine's share of the cores"),
)


def find_level(line: str) -> int | None:
    """Return the level of a line that vLLM or torch has logged, as in `logging`; None for all other output."""
    match = _VLLM_LEVEL.search(line, 0, _MAX_PREFIX_CHARS)
    if match is not None:
        return logging.getLevelNamesMapping()[match[1]]
    match = _GLOG_LEVEL.match(line)
    return None if match is None else _GLOG_LEVELS[match[1]]


def split_progress(line: str) -> list[str]:
    """Return what a terminal would show of a line in the end: the last state of a progress bar, and what follows it.

    A bar writes each state over the one before, and what is logged meanwhile stands behind it in the same line.
    """
    states = [state for state in line.split("\r") if state.strip()]
    if not states:
        return []
    last = states[-1]
    bar = _PROGRESS_BAR.search(last)
    record = None if bar is None else _VLLM_RECORD.search(last, bar.end())
    if record is None:
        return [last]
    return [last[: record.start()].rstrip(), last[record.start() :]]


def is_harmless(line: str) -> bool:
    """Return True for a warning that no user has to act on."""
    file, message = _split(line)
    name = file.rpartition("/")[2]
    return any(name == known and re.match(text, message) for known, text, _ in HARMLESS_WARNINGS)


def is_traceback(line: str) -> bool:
    """Return True for a logged line of a traceback, but for the exception itself."""
    return _TRACEBACK_LINE.match(_split(line)[1]) is not None


def make_message_key(line: str) -> str:
    """Return a text that is the same for all lines with the same message, whatever its time, process and numbers."""
    return _NUMBER.sub("0", ": ".join(_split(line)))


def find_root_cause(message: str, output: Sequence[str]) -> str:
    """Return the exception to which an engine's last one only refers, as those of vLLM's processes do; else `message`.

    Args:
        output: the end of the engine's output.
    """
    if _REFERS_ABOVE not in message.lower():
        return message
    logged = [_split(line)[1] for line in output if (find_level(line) or 0) >= logging.ERROR]
    for lines in (logged, output):
        for line in reversed(lines):
            if _EXCEPTION.match(line) and _REFERS_ABOVE not in line.lower():
                return line
    return message


def _split(line: str) -> tuple[str, str]:
    """Return the source file that a logged line names, and its message."""
    if match := _VLLM_RECORD.search(line, 0, len(line)):
        return match["file"], match["message"]
    if _GLOG_LEVEL.match(line) and (match := _GLOG_MESSAGE.match(line)):
        return match[1], match[2]
    return "", line
