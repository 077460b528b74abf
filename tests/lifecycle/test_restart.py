"""Telling a restart of a job from another job on the same run directory."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import pytest
from helpers.jobs import Launcher

from dpgen.lifecycle.restart import describe_start, is_restart, merge_starts

JOB = {"SLURM_JOB_ID": "77"}


def start(environ: dict[str, str], torchrun: str | None = None) -> dict[str, Any]:
    return merge_starts([{**describe_start(environ, "node"), "torchrun": torchrun}])


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (start(JOB), start({**JOB, "SLURM_RESTART_COUNT": "1"}), True),
        (start({**JOB, "SLURM_RESTART_COUNT": "1"}), start({**JOB, "SLURM_RESTART_COUNT": "3"}), True),
        (start({**JOB, "SLURM_RESTART_COUNT": "1"}), start({**JOB, "SLURM_RESTART_COUNT": "1"}), False),  # another step
        (start(JOB), start({"SLURM_JOB_ID": "78", "SLURM_RESTART_COUNT": "1"}), False),
        (start({}), start({}), False),
        (start({}, "node 7 100"), start({}, "node 7 100"), True),
        (start({}, "node 7 100"), start({}, "node 7 200"), False),  # another process of the same id
        (start({}, "node 7 100"), start({}), False),
        (start(JOB, "node 7 100"), start({**JOB, "SLURM_RESTART_COUNT": "1"}, "node 8 200"), True),
        (None, start({}, "node 7 100"), False),
    ],
)
def test_a_restart_is_by_the_same_torchrun_or_of_the_same_slurm_job(
    before: Any, now: dict[str, Any], expected: bool
) -> None:
    assert is_restart(json.loads(json.dumps(before)), now) == expected


def test_one_torchrun_of_several_is_enough() -> None:
    ranks = [{**start({}), "torchrun": agent} for agent in ("a 1 1", "b 2 2", "b 2 2", None)]
    assert merge_starts(ranks)["torchrun"] == ["a 1 1", "b 2 2"]
    assert is_restart(merge_starts(ranks), merge_starts(ranks[1:]))


PROGRAM = """
import os, subprocess, sys
from dpgen.lifecycle.restart import describe_start

if len(sys.argv) > 1:
    print("REPORT", describe_start(os.environ, "node")["torchrun"], flush=True)
else:
    command = [sys.executable, "-c", PROGRAM, "rank"]
    script = ["sh", "-c", '"$@"; exit $?', "sh", *command]
    print("REPORT", describe_start(os.environ, "node")["torchrun"], flush=True)
    for argv in (command, script):
        subprocess.run(argv, env={**os.environ, "TORCHELASTIC_RUN_ID": "none"}, check=True)
"""


def test_torchrun_is_found_also_above_a_script_around_its_ranks(launcher: Launcher) -> None:
    program = f"PROGRAM = {PROGRAM!r}\n{PROGRAM}"
    job = launcher.start([sys.executable, "-c", program])
    pid = job.process.pid
    assert job.wait() == 0, job.output
    alone, direct, by_script = [line.removeprefix("REPORT ") for line in job.output.splitlines()]
    assert alone == "None" and direct == by_script and direct.startswith(f"node {pid} "), job.output
    assert os.getpid() != pid
