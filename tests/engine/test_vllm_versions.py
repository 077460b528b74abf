"""What changed between versions of vLLM, against facts read in the source of each (`helpers.vllm_signatures`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from helpers.vllm_signatures import CALLS, RECORD, accepts, list_imports, merge, open_source, read_signatures

from dpgen.config.environment import read_versions
from dpgen.engine.messages import EngineSpec
from dpgen.engine.vllm.field_names import VllmFields
from dpgen.engine.vllm.versions import ADDED_IN, NEWEST, OLDEST, REMOVED, describe_version

FACTS: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
HOW_TO_RECORD = "read new wheels with: python tests/helpers/vllm_signatures.py VERSION=WHEEL ..."
SECTIONS = {"engine": "EngineArgs", "sampling": "SamplingParams"}
WHEEL = os.environ.get("DPGEN_VLLM_WHEEL")


def test_each_version_has_what_dpgen_imports_of_vllm() -> None:
    assert FACTS["imports"] == list_imports(), HOW_TO_RECORD
    assert FACTS["missing"] == {version: [] for version in FACTS["versions"]}
    assert (FACTS["versions"][0], FACTS["versions"][-1]) == (OLDEST, NEWEST)


@pytest.mark.parametrize(("name", "call"), [entry for names in CALLS.values() for entry in names.items()])
def test_each_version_takes_the_calls_that_dpgen_makes(name: str, call: tuple[int, tuple[str, ...]]) -> None:
    for parameters, versions in FACTS["calls"][name].items():
        assert parameters != "-" and accepts(parameters.split(), *call), f"{name}({parameters}) of vLLM {versions}"


def test_a_call_is_compared_with_names_defaults_and_places() -> None:
    parameters = ["request", "prompt", "priority=", "*more"]
    assert accepts(parameters, 2, ("priority",)) and accepts(parameters, 5, ())
    assert not accepts(parameters, 1, ()), "the prompt is needed"
    assert not accepts(parameters, 2, ("lora",)) and not accepts(["a"], 2, ()) and not accepts(None, 0, ())


@pytest.mark.parametrize("section", SECTIONS)
def test_the_table_names_each_field_that_went_or_came(section: str) -> None:
    versions: list[str] = FACTS["versions"]
    changed: dict[str, list[str]] = FACTS["changed_fields"][SECTIONS[section]]
    removed, added = {}, {}
    for name, having in changed.items():
        if having[-1] != versions[-1]:
            removed[name] = versions[versions.index(having[-1]) + 1]
        elif not name.startswith("_"):
            added[name] = having[0]
    assert {name: removal.version for name, removal in REMOVED[section].items()} == removed
    assert {name: version for version, names in ADDED_IN[section].items() for name in names} == added


def test_a_removed_field_is_refused_with_what_to_do_instead_and_a_later_one_with_its_version() -> None:
    fields = VllmFields({"max_num_seqs"}, {"temperature"}, set())
    options = {"calculate_kv_scales": True, "watchdog_config": {}, "swap_space": 4}
    spec = EngineSpec("vllm", "m", options, {"watermarking": True}, sampling_by_rank=({"watermarking": False},))
    scales, watchdog, swap, *watermarking = fields.find_unknown(spec)
    assert scales.startswith("unknown key 'engine.calculate_kv_scales': vLLM 0.28 has removed it; leave it out: ")
    assert watchdog.startswith("unknown key 'engine.watchdog_config': vLLM 0.33 and later have it")
    assert "without a successor" in swap, "names that went earlier keep their hints"
    assert [line.partition("'")[2].partition("'")[0] for line in watermarking] == [
        "sampling.watermarking",
        "sampling_by_rank[0].watermarking",
    ]
    assert describe_version("engine", "watchdog_config", "0.32.0") == (
        "unknown key 'engine.watchdog_config': vLLM 0.33 and later have it; 0.32.0 is installed"
    )
    assert describe_version("engine", "max_num_seqz", None) is None


@pytest.mark.vllm
def test_the_record_is_of_the_installed_vllm() -> None:
    package = find_spec("vllm")
    assert package is not None and package.submodule_search_locations
    version = ".".join(read_versions()["vllm"].split(".")[:2])
    if version not in FACTS["versions"]:
        pytest.skip(f"vLLM {version} is not recorded: {HOW_TO_RECORD}")
    facts = merge({version: read_signatures(open_source(Path(next(iter(package.submodule_search_locations))).parent))})
    assert facts["missing"] == {version: []}
    for name, recorded in FACTS["calls"].items():
        [(parameters, _)] = facts["calls"][name].items()
        assert version in recorded[parameters], name


@pytest.mark.slow
@pytest.mark.skipif(WHEEL is None, reason="needs DPGEN_VLLM_WHEEL=PATH, a wheel of vLLM, for a GPU or not")
def test_dpgen_s_modules_import_with_the_source_of_a_wheel(tmp_path: Path) -> None:
    assert WHEEL is not None
    with zipfile.ZipFile(WHEEL) as wheel:
        wheel.extractall(tmp_path, [name for name in wheel.namelist() if name.endswith((".py", ".json"))])
    modules = ("executors", "adapters", "vllm_render", "sampling_check", "vllm_backend")
    program = "import vllm; print(vllm.__file__); " + "; ".join(f"import dpgen.engine.vllm.{name}" for name in modules)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-P", "-c", program], env=environ, capture_output=True, text=True)
    assert done.returncode == 0 and str(tmp_path) in done.stdout, done.stderr
    facts = read_signatures(open_source(Path(WHEEL)))
    assert facts["missing"] == []
    for names in CALLS.values():
        for name, call in names.items():
            assert accepts(facts["calls"][name], *call), name
