"""A model is what its files say, not what its name says."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpgen.config.prompt import PromptConfig
from dpgen.config.schema import Config
from dpgen.config.sections import DataConfig, RunConfig
from dpgen.data import model_identity
from dpgen.data.model_identity import hash_chat_template, identify_adapters, identify_model
from dpgen.journal.run_identity import FOUND_KEYS, compute_run_identity, diff_identities

FILES = {"config.json": b"{}", "tokenizer.json": b"[]", "chat_template.jinja": b"{{ messages }}", "README.md": b"#"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "latest"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}" + bytes(100_000))
    return folder


def compute_identity(model: str, engine: dict[str, Any] | None = None, prompt: PromptConfig | None = None) -> Any:
    data = DataConfig(path="rows.jsonl", prompt_column="prompt")
    config = Config(run=RunConfig(dir="run"), data=data, model=model, engine=engine or {})
    template = hash_chat_template(prompt or config.prompt)
    found = {"model_files": identify_model(model, engine or {}), "chat_template_hash": template, "variables": {}}
    return compute_run_identity(config, {"num_rows": 1}, found)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"])
def test_a_file_that_changed_under_the_same_name_is_another_model(model: Path, name: str) -> None:
    before, file = compute_identity(str(model)), model / name
    status = file.stat()
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"x")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    [difference] = diff_identities(before, compute_identity(str(model)))
    assert difference.startswith(f"{name} of model: "), "the secret-like name of a tokenizer's file hides nothing"


def test_weights_of_another_date_are_another_model(model: Path) -> None:
    before = compute_identity(str(model))
    os.utime(model / "model.safetensors", (1, 1))
    assert len(diff_identities(before, compute_identity(str(model)))) == 1


def test_files_that_no_model_is_made_of_do_not_count(model: Path) -> None:
    before = compute_identity(str(model))
    (model / "README.md").write_text("another")
    (model / "training_args.bin").write_text("another")
    (model / "checkpoint-1").mkdir()
    assert compute_identity(str(model)) == before


def test_a_tokenizer_elsewhere_and_other_files_that_options_name_count(model: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text("[]")
    engine = {
        "tokenizer": str(tmp_path / "other"),
        "some_adapter": str(tmp_path / "other"),
        "speculative_config": {"model": str(tmp_path / "other"), "method": "eagle", "cache": str(tmp_path / "other")},
    }
    before = compute_identity(str(model), engine)
    (tmp_path / "other" / "tokenizer.json").write_text("[1]")
    differences = diff_identities(before, compute_identity(str(model), engine))
    assert [difference.partition(":")[0] for difference in differences] == [
        "tokenizer.json of engine.some_adapter",
        "tokenizer.json of engine.speculative_config[model]",
        "tokenizer.json of engine.tokenizer",
    ]


def test_an_option_may_name_a_folder_by_a_relative_path(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "drafts").mkdir()
    shutil.copytree(model, tmp_path / "drafts" / "small")
    monkeypatch.chdir(tmp_path)
    engine = {"speculative_config": {"model": "drafts/small"}, "some_adapter": "drafts/small", "other": "no/path"}
    assert identify_model(str(model), engine).keys() == {"model", "speculative_config[model]", "some_adapter"}


def test_a_branch_that_moved_on_the_hub_is_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    commits = iter(["1111", "2222"])
    monkeypatch.setattr(model_identity, "fetch_config_files", lambda *_: Path("/cache/snapshots", next(commits)))
    differences = diff_identities(compute_identity("user/model"), compute_identity("user/model"))
    assert differences == ['commit of model: "1111" → "2222"']


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "math"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}" + bytes(100))
    return folder


def compute_adapter_identity(
    lora: dict[str, str], column: str | None = None, engine: dict[str, Any] | None = None
) -> dict[str, Any]:
    data = DataConfig(path="rows.jsonl", prompt_column="prompt", lora_column=column)
    config = Config(run=RunConfig(dir="run"), data=data, model="none", engine=engine or {}, lora=lora)
    return compute_run_identity(config, {"num_rows": 1}, {"lora_files": identify_adapters(lora)} if lora else {})


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_changed_under_the_same_name_is_another_run(adapter: Path, name: str) -> None:
    before = compute_adapter_identity({"math": str(adapter)})
    content = (adapter / name).read_bytes()
    (adapter / name).write_bytes(content + b" ")
    [difference] = diff_identities(before, compute_adapter_identity({"math": str(adapter)}))
    assert difference.startswith(f"{name} of lora.math: ")


def test_other_adapters_or_another_choice_of_them_are_another_run(adapter: Path) -> None:
    before = compute_adapter_identity({"math": str(adapter)})
    [difference] = diff_identities(compute_adapter_identity({}), before)
    assert difference.startswith('lora: null → {"math": "'), "a long path is cut"
    assert diff_identities(before, compute_adapter_identity({"math": str(adapter)}, "kind")) == [
        'data.lora_column: null → "kind"'
    ]
    renamed = diff_identities(before, compute_adapter_identity({"maths": str(adapter)}))
    assert f'lora.math: "{adapter}" → null' in renamed


def test_options_that_follow_from_the_adapters_change_no_run(adapter: Path) -> None:
    lora = {"math": str(adapter)}
    engine = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 64, "max_cpu_loras": 9}
    assert compute_adapter_identity(lora) == compute_adapter_identity(lora, engine=engine)
    assert "max_loras" in compute_adapter_identity({}, engine=engine)["engine"], "as older versions wrote it"


def test_a_run_without_adapters_is_what_older_versions_wrote() -> None:
    assert not [key for key in compute_adapter_identity({}) if "lora" in key]


def test_an_adapter_of_the_hub_is_known_by_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_identity, "fetch_adapter", lambda place, is_cached: Path("/cache/snapshots/1111"))
    assert identify_adapters({"math": "user/math"}) == {"math": {"commit": "1111"}}


def test_a_chat_template_file_is_known_by_its_text(model: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    prompt = PromptConfig(messages_column="messages", chat_template=str(tmp_path / "chat.jinja"))
    before = compute_identity(str(model), prompt=prompt)
    (tmp_path / "chat.jinja").write_text("{{ messages[0] }}")
    [difference] = diff_identities(before, compute_identity(str(model), prompt=prompt))
    assert difference.startswith("the text in the file data.chat_template: ")


def test_an_older_run_directory_is_compared_on_what_it_has(model: Path) -> None:
    now = compute_identity(str(model))
    assert diff_identities({key: value for key, value in now.items() if key not in FOUND_KEYS}, now) == []
