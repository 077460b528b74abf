"""Counting this process's GPUs, and checking the model's files, before an engine starts."""

from __future__ import annotations

import logging

import pytest

from dpgen.engine.starting.visible_gpus import list_visible_gpus, parse_visible_gpus
from dpgen.errors import ConfigError

FOUR_GPUS = ["null", "nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm"]
UUID = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"
MIG = "MIG-41b35b42-1f30-5a9b-a5b5-3c28b4b5a1e4"
OLD_MIG = f"MIG-{UUID}/1/0"


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("", []),
        ("  ", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("none", []),
        ("0", ["0"]),
        ("3,1", ["3", "1"]),
        (" 0 , 2 ", ["0", "2"]),
        ("0,1,", ["0", "1"]),
        ("01", ["1"]),
        ("1,-1,2", ["1"]),
        (f"{UUID},0", [UUID, "0"]),
        ("GPU-8932f937", ["GPU-8932f937"]),
        (f"{MIG},{OLD_MIG}", [MIG, OLD_MIG]),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(text: str, gpus: list[str]) -> None:
    assert parse_visible_gpus(text) == gpus


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,0", "names 0 twice"),
        ("0,00", "names 00 twice"),
        (f"{UUID},{UUID}", f"names {UUID} twice"),
        ("0,,1", "a blank entry names no GPU"),
        (",0", "a blank entry names no GPU"),
        ("all", "'all' names no GPU.*unset it to use all GPUs"),
        ("0;1", "'0;1' names no GPU"),
        ("0 1", "'0 1' names no GPU"),
        ("0,NoDevFiles", "'NoDevFiles' names no GPU"),
        ("cuda:0", "'cuda:0' names no GPU"),
        ("0-3", "'0-3' names no GPU"),
        ("1.5", "'1.5' names no GPU"),
        ("²", "'²' names no GPU"),
        ("4", "this machine has 4 GPUs, numbered from 0, and CUDA would not see 4"),
        ("0,7", "CUDA would not see 7"),
    ],
)
def test_devices_that_cuda_would_not_see_are_rejected_by_the_variables_name(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"CUDA_VISIBLE_DEVICES=.*{message}"):
        list_visible_gpus({"CUDA_VISIBLE_DEVICES": text}, FOUR_GPUS)


def test_gpus_are_counted_by_the_variable_or_else_by_their_files(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert list_visible_gpus({}, FOUR_GPUS) == ["0", "1", "2", "3"]
    assert list_visible_gpus({"CUDA_VISIBLE_DEVICES": "2"}, FOUR_GPUS) == ["2"]
    assert list_visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}, FOUR_GPUS) == []
    assert not caplog.messages
    assert list_visible_gpus({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, FOUR_GPUS) == []
    assert list_visible_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}, ["null"]) == [], "a leftover on a machine without GPUs"
    assert caplog.messages == [
        "CUDA_VISIBLE_DEVICES='NoDevFiles': no GPU is visible",
        "CUDA_VISIBLE_DEVICES='0,1': no GPU is visible",
    ]
