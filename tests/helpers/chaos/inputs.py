"""Write the input and the configuration of the runs, and generate the rows that each run must end with."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import yaml

from helpers.jobs import REPO, Launcher, load_result

STEP_S = 0.02  # of the fake engine: a row takes 0.3 s on average
_HANG = "{% for _ in range(99999) %}{% for _ in range(99999) %}{% endfor %}{% endfor %}"


class Inputs:
    """The two inputs of a series: without and with a row whose rendering hangs.

    Args:
        folder: receives the files.
    """

    def __init__(self, folder: Path, engine: str, num_rows: int, random: Random, launcher: Launcher) -> None:
        self._folder, self._engine, self._launcher = folder, engine, launcher
        sums = [f"What is {random.randrange(1000)} + {random.randrange(1000)}?" for _ in range(num_rows)]
        if engine == "fake":  # faults choose a row by its number; the demo's model needs short prompts
            sums = [f"{text} Question number {row}." for row, text in enumerate(sums)]
        self._rows = [{"prompt": text} for text in sums]
        self._hanging_row = random.randrange(num_rows)
        self._expected: dict[bool, list[dict[str, Any]]] = {}

    def write_config(self, hangs: bool) -> str:
        """Return the path of the configuration for one of the two inputs."""
        name = "hanging" if hangs else "plain"
        path = self._folder / f"{name}.yaml"
        if path.exists():
            return str(path)
        rows = [{**row, "hang": int(hangs and number == self._hanging_row)} for number, row in enumerate(self._rows)]
        data_path = self._folder / f"{name}.jsonl"
        data_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        template = f"{{% if hang %}}{_HANG}{{% endif %}}{{{{ prompt }}}}"
        conf: dict[str, Any] = {
            "run": {"dir": "set by each attempt", "engine": self._engine, "log_level": "error"},
            "model": str(REPO / "conf" / "demo" / "model"),
            "data": {"path": str(data_path), "template": template, "render_timeout_s": 0.3},
            "work": {"order": "dataset"},
            "output": {"gather_bytes": 1 << 16},
            "sampling": {"temperature": 0.8},
        }
        if self._engine == "fake":
            conf["engine"] = {"max_num_seqs": 8}
        else:
            conf["data"]["as_chat"] = True
            conf["engine"] = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 8, "enforce_eager": True}
            conf["engine"]["kv_cache_memory_bytes"] = 32 << 20
            conf["sampling"] |= {"top_k": 0, "max_tokens": 80, "ignore_eos": True}
        path.write_text(yaml.safe_dump(conf))
        return str(path)

    def get_expected(self, hangs: bool) -> list[dict[str, Any]]:
        """Return the rows of an undisturbed run."""
        if hangs not in self._expected:
            run_dir = self._folder / f"undisturbed-{hangs}" / "run"
            job = self._launcher.dpgen("run", self.write_config(hangs), f"run.dir={run_dir}")
            assert job.wait(600) == 0, job.output
            job.end()
            self._expected[hangs] = load_result(run_dir)
            errors = [row["row_id"] for row in self._expected[hangs] if row["error"]]
            assert errors == ([self._hanging_row] if hangs else []), errors
        return self._expected[hangs]
