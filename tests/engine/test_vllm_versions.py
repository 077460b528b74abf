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
from helpers.vllm_signatures import RECORD, merge, read_facts
from helpers.vllm_source import VllmSource, accepts
from helpers.vllm_uses import find_uses, read_uses
from helpers.vllm_version import find_vllm_minor

from dpgen.engine.messages import EngineSpec
from dpgen.engine.vllm.field_names import VllmFields
from dpgen.engine.vllm.versions import ADDED_IN, CHANGED, NEWEST, OLDEST, REMOVED, describe_version, keeps_seeds_on_cpu

FACTS: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
HOW_TO_RECORD = "read new wheels with: python tests/helpers/vllm_signatures.py VERSION=WHEEL ..."
SECTIONS = {"engine": "EngineArgs", "sampling": "SamplingParams"}
WHEEL = os.environ.get("DPGEN_VLLM_WHEEL")


USES, UNKNOWN = find_uses()
GOOD_IN_ALL = ("value", "method", "class", "taken")
UNGUARDED = {use.key for use in USES if not use.is_guarded}


def test_the_record_has_each_use_of_vllm_in_dpgen() -> None:
    new = {f"{use.where} {use.key}" for use in USES if use.key not in FACTS["uses"]}
    assert not new, HOW_TO_RECORD
    assert FACTS["uses"].keys() == {use.key for use in USES}, HOW_TO_RECORD
    assert (FACTS["versions"][0], FACTS["versions"][-1]) == (OLDEST, NEWEST)
    assert not UNKNOWN, "helpers/vllm_classes.py has to say of which class of vLLM these are"


def test_each_version_has_what_dpgen_uses_and_takes_its_calls() -> None:
    kinds = {use: FACTS["uses"].get(use.key) for use in USES if use.key in UNGUARDED}
    wrong = {f"{use.where} {use.key}: {kind}" for use, kind in kinds.items() if kind not in GOOD_IN_ALL}
    hint = "where versions differ, ask first: with hasattr, or a default of getattr"
    assert not wrong, "\n".join([hint, *sorted(wrong)])


def test_what_dpgen_asks_for_first_is_a_change_that_the_table_names() -> None:
    for key in {use.key for use in USES} - UNGUARDED:
        kinds = FACTS["uses"][key]
        assert isinstance(kinds, dict), f"{key}: all versions have it, so nobody has to ask"
        later = max(kinds.values())[0]
        name = key.partition("(")[0].rpartition(".")[2]
        assert any(version == later and name in text for version, text, _ in CHANGED), f"{later}: {name}"


VLLM = {
    "vllm/__init__.py": "",
    "vllm/config/__init__.py": "from .model import ModelConfig as ModelConfig\nfrom vllm.config.vllm import VllmConfig",
    "vllm/config/model.py": """
class Base:
    def get_width(self, kind, *, exact=False): self.width = 3
@dataclass
class ModelConfig(Base):
    model: str
    kind: ClassVar[str] = "x"
    seed: int = 0
    @property
    def is_large(self): return True
    @staticmethod
    def read(path, **others): return None
""",
    "vllm/config/vllm.py": "class VllmConfig:\n    model_config: ModelConfig",
    "vllm/registry.py": """
from vllm.config.model import ModelConfig
REGISTRY = ModelConfig('a')
def find(a, b=1): pass
""",
}
USER = """
from vllm.config import ModelConfig, VllmConfig
from vllm.registry import REGISTRY, find
try:
    from vllm.gone import thing
except ImportError:
    pass
class Owner:
    def __init__(self, config: VllmConfig | None, model_config: Any, other: Any) -> None:
        self._model = config.model_config
        self._model.{use}
        find(1, b=2)
        other.unheard
    def ask(self, model_config: Any) -> None:
        if hasattr(model_config, "newer"):
            model_config.newer
        getattr(model_config, "newest", None)
"""


@pytest.mark.parametrize(
    ("use", "key", "kind"),
    [
        ("seed", "vllm.config:ModelConfig.seed", "value"),
        ("width", "vllm.config:ModelConfig.width", "value"),
        ("is_large", "vllm.config:ModelConfig.is_large", "value"),
        ("get_width", "vllm.config:ModelConfig.get_width", "method"),
        ("height", "vllm.config:ModelConfig.height", "-"),
        ("get_width(1, exact=True)", "vllm.config:ModelConfig.get_width(1 exact)", "taken"),
        ("get_width(1, True)", "vllm.config:ModelConfig.get_width(2)", "refused"),
        ("get_width(1, fast=True)", "vllm.config:ModelConfig.get_width(1 fast)", "refused"),
        ("get_width()", "vllm.config:ModelConfig.get_width(0)", "refused"),
        ("read(1, any=2)", "vllm.config:ModelConfig.read(1 any)", "taken"),
        ("x == ModelConfig(model=1)", "vllm.config:ModelConfig(0 model)", "taken"),
        ("x == ModelConfig(seed=1)", "vllm.config:ModelConfig(0 seed)", "refused"),
        ("x == ModelConfig(seed=1, **kw)", "vllm.config:ModelConfig(0 seed *)", "taken"),
        ("x == ModelConfig('m', kind=1)", "vllm.config:ModelConfig(1 kind)", "refused"),
        ("x == REGISTRY.read(1)", "vllm.registry:REGISTRY.read(1)", "taken"),
        ("x == REGISTRY.rear(1)", "vllm.registry:REGISTRY.rear(1)", "-"),
    ],
)
def test_uses_are_found_by_themselves_and_compared_with_vllms_source(
    use: str, key: str, kind: str, tmp_path: Path
) -> None:
    for name, text in VLLM.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    source = VllmSource(tmp_path)
    uses, unknown = read_uses(USER.replace("{use}", use), "dpgen/engine/vllm/example.py")
    kinds = {use.key: source.describe(use.target, use.call) for use in uses}
    assert kinds[key] == kind
    assert kinds["vllm.registry:find(1 b)"] == "taken" and kinds["vllm.config:VllmConfig.model_config"] == "value"
    assert [line.rpartition(" ")[2] for line in unknown] == ["other.unheard"]
    assert {use.key for use in uses if use.is_guarded} == {
        "vllm.gone:thing",
        "vllm.config:ModelConfig.newer",
        "vllm.config:ModelConfig.newest",
    }


def test_a_call_is_compared_with_names_defaults_and_places() -> None:
    parameters = ["request", "prompt", "priority=", "*more"]
    assert accepts(parameters, "2 priority") and accepts(parameters, "5") and accepts(parameters, "0 *")
    assert not accepts(parameters, "1"), "the prompt is needed"
    assert not accepts(parameters, "2 lora") and not accepts(["a"], "2")
    assert not accepts(["a", "**"], "1 a") and not accepts(["a", "*", "b="], "2")


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


def test_vllm_s_build_for_the_cpu_keeps_seeds_from_0_29_on() -> None:
    assert not any(map(keeps_seeds_on_cpu, ("0.26.0", "0.28.1")))
    assert all(map(keeps_seeds_on_cpu, ("0.29.0rc1", "0.32.0", "0.33rc1", "1.0.0", "dev")))


@pytest.mark.vllm
def test_the_record_is_of_the_installed_vllm() -> None:
    package = find_spec("vllm")
    assert package is not None and package.submodule_search_locations
    version = find_vllm_minor()
    if version not in FACTS["versions"]:
        pytest.skip(f"vLLM {version} is not recorded: {HOW_TO_RECORD}")
    source = VllmSource(Path(next(iter(package.submodule_search_locations))).parent)
    facts = merge({version: read_facts(source)})
    for name, kinds in FACTS["uses"].items():
        assert facts["uses"][name] == kinds or version in kinds[facts["uses"][name]], name
    for text, versions in FACTS["warnings"].items():
        assert (facts["warnings"][text] == [version]) == (version in versions), text


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
    facts = read_facts(VllmSource(Path(WHEEL)))["uses"]
    assert {key: kind for key, kind in facts.items() if key in UNGUARDED and kind in ("-", "refused")} == {}
