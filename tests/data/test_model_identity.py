"""A model is what its files say, not what its name says."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpgen.config.prompt import PromptConfig
from dpgen.config.schema import Config, DataConfig, RunConfig
from dpgen.data import model_identity
from dpgen.data.model_identity import hash_chat_template, identify_model
from dpgen.journal.run_dir import FOUND_KEYS, compute_run_identity, diff_identities

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
