"""Test what a run is, and which run may use a directory."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dpgen.config.schema import Config
from dpgen.config.sections import DataConfig, RunConfig
from dpgen.errors import ConfigError, DpgenError
from dpgen.journal.run_dir import RunDir
from dpgen.journal.run_identity import (
    compute_run_identity,
    describe_hashed_files,
    diff_identities,
    find_fingerprint,
    get_fingerprint_version,
    get_num_rows,
)
from dpgen.journal.writer import JournalWriter
from dpgen.records import Completion, RowResult

INPUT = {"num_rows": 1, "columns": ["prompt"], "content": "00"}


def compute_identity(engine: dict[str, Any], **keys: Any) -> dict[str, Any]:
    data = DataConfig(path="rows.jsonl", prompt_column="prompt", **keys)
    config = Config(run=RunConfig(dir="run"), data=data, model="m", engine=engine)
    return compute_run_identity(config, INPUT)


@pytest.mark.parametrize("load_format", ["dummy", "bitsandbytes", "gguf", "a_plugin"])
def test_a_load_format_of_other_weights_is_another_run(load_format: str) -> None:
    differences = diff_identities(compute_identity({}), compute_identity({"load_format": load_format}))
    assert differences == [f'engine.load_format: null → "{load_format}"'], "random weights would end in the result"


def test_an_option_that_older_versions_took_for_part_of_a_run_is_no_difference() -> None:
    before = compute_identity({})
    before["engine"]["performance_mode"] = "throughput"  # only doubles vLLM's own limits of sequences and tokens
    assert diff_identities(before, compute_identity({})) == []
    assert compute_identity({"performance_mode": "throughput"}) == compute_identity({})


@pytest.mark.parametrize("load_format", ["auto", "safetensors", "runai_streamer", "pt"])
def test_a_load_format_of_the_same_weights_is_the_same_run(load_format: str) -> None:
    assert compute_identity({"load_format": load_format}) == compute_identity({}), "older run directories lack the key"


def write_run(path: Path, identity: dict[str, Any] | None = None, rows: Sequence[int] = (0,)) -> RunDir:
    """Write a run directory as a run leaves it: run.json, unless there is no identity, and a journal of these rows."""
    run_dir = RunDir(str(path))
    run_dir.create()
    journal = JournalWriter(run_dir.journal, 1, 0)
    for row in rows:
        journal.append(RowResult(row, 3, (Completion("text", "stop", 2),)))
    journal.close()
    if identity is not None:
        run_dir.update_metadata(identity=identity)
    return run_dir


# ---- the directory and its small files


def test_a_run_directory_is_created_with_its_parents_and_may_exist(tmp_path: Path) -> None:
    run_dir = RunDir(str(tmp_path / "project" / "run"))
    run_dir.create()
    run_dir.create()
    names = [path.name for path in (run_dir.journal, run_dir.dataset, run_dir.logs, run_dir.success)]
    assert names == ["journal", "dataset", "logs", "_SUCCESS"]
    assert [path.name for path in run_dir.path.iterdir()] == ["journal"]
    assert RunDir("~/run").path == Path.home() / "run"


def test_a_run_directory_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run_dir = RunDir(str(tmp_path / "file" / "run"))
    with pytest.raises(ConfigError, match=r"run\.dir=.*/file/run can't be created: Not a directory"):
        run_dir.create()
    with pytest.raises(ConfigError, match=r"run\.dir=.*/file/run can't be used: Not a directory"):
        run_dir.lock()


@pytest.mark.parametrize("denied", [os.W_OK, os.X_OK])
def test_a_run_directory_that_is_not_writable_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, denied: int
) -> None:
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & denied)  # root may write everywhere
    with pytest.raises(ConfigError, match=r"run\.dir=.* is not writable"):
        RunDir(str(tmp_path)).create()


def count_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_two_runs_never_share_a_directory(tmp_path: Path) -> None:
    path = tmp_path / "project" / "run"
    run_dir = RunDir(str(path))
    run_dir.lock()
    num_descriptors = count_descriptors()
    with pytest.raises(ConfigError, match="is in use by another live run"):
        RunDir(str(path)).lock()
    assert count_descriptors() == num_descriptors
    run_dir.lock()  # by the same run, which repeats a stage
    run_dir.unlock()  # as the end of the process does
    run_dir.lock()
    run_dir.unlock()


def test_a_run_starts_on_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    num_descriptors = count_descriptors()
    RunDir(str(tmp_path)).lock()
    assert count_descriptors() == num_descriptors


def test_fields_of_run_json_are_added_and_replaced(tmp_path: Path) -> None:
    run_dir = RunDir(str(tmp_path))
    assert run_dir.read_metadata() == {}
    run_dir.update_metadata(attempt=1, versions={"vllm": "1"})
    run_dir.update_metadata(attempt=2)
    assert run_dir.read_metadata() == {"attempt": 2, "versions": {"vllm": "1"}}


@pytest.mark.parametrize(
    ("content", "message"), [("{", r"run\.json can't be read: "), ("[]", r"run\.json is damaged: must hold a JSON")]
)
def test_a_run_json_that_is_damaged_is_an_error(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(DpgenError, match=message):
        RunDir(str(tmp_path)).read_metadata()


def test_a_run_json_that_is_not_readable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run.json").mkdir()
    with pytest.raises(DpgenError, match=r"run\.json can't be read: .*Is a directory"):
        RunDir(str(tmp_path)).read_metadata()


@pytest.mark.parametrize(
    ("content", "success"),
    [('{"num_done": 3}', {"num_done": 3}), ("{", {}), ("[]", {}), ("", {}), ("\xff", {}), (None, {})],
)
def test_a_success_file_that_is_damaged_counts_as_empty(
    tmp_path: Path, content: str | None, success: dict[str, Any]
) -> None:
    run_dir = RunDir(str(tmp_path))
    if content is not None:
        run_dir.success.write_bytes(content.encode("latin-1"))
    assert run_dir.is_finished == (content is not None)
    assert run_dir.read_success() == success
    run_dir.mark_unfinished()
    run_dir.mark_unfinished()
    assert not run_dir.is_finished


def test_a_rank_removes_the_success_file_that_was_there_when_it_began_and_none_that_others_write_later(
    tmp_path: Path,
) -> None:
    run_dir = RunDir(str(tmp_path))
    mark = run_dir.prepare_to_mark_unfinished()
    run_dir.success.write_text("written while this rank was cut off")
    mark()
    assert run_dir.is_finished
    mark = run_dir.prepare_to_mark_unfinished()
    mark()
    assert not run_dir.is_finished, "failed rows are generated again"
    run_dir.success.write_text("an earlier result")
    mark = run_dir.prepare_to_mark_unfinished()
    run_dir.mark_unfinished()
    run_dir.success.write_text("the result of this attempt")
    mark()
    assert run_dir.is_finished


# ---- which run may resume in a directory


RESUME = ["auto", "never", "force"]
RUN, OTHER_RUN = compute_identity({}), compute_identity({"dtype": "float32"})


@pytest.mark.parametrize("resume", RESUME)
def test_a_new_run_may_use_an_empty_directory(tmp_path: Path, resume: str) -> None:
    run_dir = RunDir(str(tmp_path / "run"))
    run_dir.check_resumable(RUN, resume)
    run_dir.create()
    (run_dir.path / ".lock").write_text("")
    run_dir.check_resumable(RUN, resume)
    assert sorted(path.name for path in run_dir.path.iterdir()) == [".lock", "journal"]
    (run_dir.path / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match=r"notes\.txt|is not empty"):
        run_dir.check_resumable(RUN, resume)


def test_a_file_in_place_of_the_run_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    run_dir = RunDir(str(tmp_path / "run"))
    for check in (run_dir.read_metadata, lambda: run_dir.check_resumable(RUN, "auto")):
        with pytest.raises(ConfigError, match=r"^run.dir=.*/run is a file: must be a directory$"):
            check()


@pytest.mark.parametrize("name", ["config.yaml", "journal/attempt-0001-rank-00000-part-0000.journal"])
def test_a_run_that_may_not_resume_wants_an_empty_directory(tmp_path: Path, name: str) -> None:
    run_dir = RunDir(str(tmp_path))
    run_dir.create()
    (tmp_path / name).write_text("")
    run_dir.check_resumable(RUN, "auto")
    with pytest.raises(ConfigError, match=r"run\.resume=never: .* is not empty"):
        run_dir.check_resumable(RUN, "never")


@pytest.mark.parametrize("resume", ["auto", "force"])
def test_a_directory_of_other_files_is_refused(tmp_path: Path, resume: str) -> None:
    run_dir = RunDir(str(tmp_path))
    for name in ("journal", "ranks", "config.yaml", "dataset", "_SUCCESS", "logs", ".lock"):
        (tmp_path / name).mkdir()
    run_dir.check_resumable(RUN, resume)
    for name in ("d", "c", "b", "a"):
        (tmp_path / name).write_text("")
    with pytest.raises(ConfigError, match=r"holds files that no run wrote \(a, b, c\)\. Choose another directory"):
        run_dir.check_resumable(RUN, resume)
    run_dir.update_metadata(identity=RUN)
    run_dir.check_resumable(RUN, resume)


def test_journals_of_an_unknown_run_are_resumed_by_force_alone(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path)
    with pytest.raises(ConfigError, match=r"holds journals, but no run\.json .* run\.resume=force"):
        run_dir.check_resumable(RUN, "auto")
    run_dir.check_resumable(RUN, "force")


@pytest.mark.parametrize("resume", ["auto", "force"])
def test_the_same_run_resumes(tmp_path: Path, resume: str) -> None:
    write_run(tmp_path, RUN).check_resumable(RUN, resume)


def test_other_settings_resume_by_force_or_before_the_first_row(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "rows", RUN)
    message = r'holds results of other settings: engine\.dtype: null → "float32"\. .* run\.resume=force'
    with pytest.raises(ConfigError, match=message):
        run_dir.check_resumable(OTHER_RUN, "auto")
    run_dir.check_resumable(OTHER_RUN, "force")
    write_run(tmp_path / "no rows", RUN, rows=[]).check_resumable(OTHER_RUN, "auto")


@pytest.mark.parametrize("resume", ["auto", "force"])
def test_an_input_may_grow_but_not_change(tmp_path: Path, resume: str) -> None:
    run_dir = write_run(tmp_path, RUN)
    grown = {**RUN, "input": {**INPUT, "num_rows": 5, "content": "11"}}
    run_dir.check_resumable(grown, resume, {1: INPUT})
    for prefixes in (None, {}, {5: INPUT}, {1: {**INPUT, "content": "22"}}):
        with pytest.raises(ConfigError, match=r"another input: input\.content: .*; input\.num_rows: 1 → 5\. Give it"):
            run_dir.check_resumable(grown, resume, prefixes)
    with pytest.raises(ConfigError, match=r"other settings: engine\.dtype: [^;]*\. Choose"):
        run_dir.check_resumable({**OTHER_RUN, "input": grown["input"]}, "auto", {1: INPUT})


@pytest.mark.parametrize(
    ("metadata", "num_rows", "version"),
    [
        ({}, None, 1),
        ({"identity": None}, None, 1),
        ({"identity": {"input": None}}, None, 1),
        ({"identity": {"input": {"num_rows": "7", "version": 2}}}, None, 2),
        ({"identity": {"input": {"num_rows": 7}}}, 7, 1),
        ({"identity": {"input": {"num_rows": 0, "version": 3}}}, 0, 3),
    ],
)
def test_a_run_json_may_lack_what_older_versions_did_not_write(
    metadata: dict[str, Any], num_rows: int | None, version: int
) -> None:
    assert (get_num_rows(metadata), get_fingerprint_version(metadata)) == (num_rows, version)


class Rows:
    """Input rows with a fingerprint of each version.

    Attributes:
        calls: the arguments of the fingerprints that were computed.
    """

    def __init__(self, key: str | None = "files", *, fails_on_version_1: bool = False) -> None:
        self.key, self.calls = key, list[tuple[int | None, int | None]]()
        self._fails_on_version_1 = fails_on_version_1

    def __len__(self) -> int:
        return 7

    def fingerprint(self, num_rows: int | None, version: int | None) -> dict[str, Any]:
        self.calls.append((num_rows, version))
        if version == 1 and self._fails_on_version_1:
            raise ConfigError("a column can't be read")
        return make_fingerprint(2 if version is None else version)


def make_fingerprint(version: int) -> dict[str, Any]:
    return {"num_rows": 7, "content": f"{version}"} | ({} if version == 1 else {"version": version})


NEWEST, VERSION_1 = (None, None), (None, 1)


@pytest.mark.parametrize(
    ("rows", "stored", "calls", "version"),
    [
        (Rows(), make_fingerprint(1), [VERSION_1], 1),
        (Rows(), make_fingerprint(2), [NEWEST], 2),
        (Rows(), {**make_fingerprint(1), "content": "other"}, [VERSION_1, NEWEST], 2),
        (Rows(), {**make_fingerprint(1), "num_rows": 8}, [NEWEST], 2),
        (Rows(fails_on_version_1=True), make_fingerprint(1), [VERSION_1, NEWEST], 2),
        (Rows(), {}, [NEWEST], 2),
    ],
)
def test_an_input_has_the_fingerprint_of_the_version_that_its_run_began_with(
    rows: Rows, stored: dict[str, Any], calls: list[tuple[int | None, int | None]], version: int
) -> None:
    assert find_fingerprint(rows, {"identity": {"input": stored}}) == make_fingerprint(version)
    assert rows.calls == calls


def test_an_input_of_the_same_files_is_not_hashed_again() -> None:
    rows, fingerprint = Rows(), {"num_rows": 7, "content": "as hashed before"}
    recorded = describe_hashed_files(rows, fingerprint)
    assert find_fingerprint(rows, recorded) == fingerprint and not rows.calls
    for others in (Rows("other files"), Rows(None)):
        assert find_fingerprint(others, recorded) == make_fingerprint(2) and others.calls == [NEWEST]
    unknown = Rows(None)
    assert find_fingerprint(unknown, describe_hashed_files(unknown, fingerprint)) == make_fingerprint(2)


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("model", "model"),
        ("seed", "run.seed"),
        ("columns", "data.columns"),
        ("engine.kind", "run.engine"),
        ("engine.dtype", "engine.dtype"),
        ("prompt.system", "data.system"),
        ("variables.VLLM_X", "environment variable VLLM_X"),
        ("chat_template_hash", "the text in the file data.chat_template"),
        ("code.check.function=m:f", "the source of check.function=m:f"),
        ("model_files.model.config.json", "config.json of model"),
        ("model_files.tokenizer.merges.txt", "merges.txt of engine.tokenizer"),
    ],
)
def test_a_difference_names_what_the_user_can_change(path: str, key: str) -> None:
    assert diff_identities(1, 2, path) == [f"{key}: 1 → 2"]


def test_a_difference_shows_the_beginning_of_a_long_value() -> None:
    whole, cut = "x" * 78, "y" * 79
    assert diff_identities({"model": whole}, {"model": cut}) == [f'model: "{whole}" → "{cut[:76]}...']


def test_a_run_of_a_version_with_fewer_ways_to_make_a_prompt_is_the_same_run() -> None:
    now = compute_identity({})
    old_keys = {"prompt_column", "messages_column", "template", "as_chat", "system_prompt", "chat_template"}
    old_keys |= {"chat_template_kwargs", "add_generation_prompt", "continue_final_message"}
    before = {**now, "prompt": {key: value for key, value in now["prompt"].items() if key in old_keys}}
    assert diff_identities(before, now) == []
    with_tools = [
        compute_identity({}, as_chat=True, tools=tools)
        for tools in ('[{"name": "f"}]', [{"type": "function", "function": {"name": "f"}}])
    ]
    assert with_tools[0] == with_tools[1], "tools are known by what they are, in whatever form"
    keys = [difference.partition(":")[0] for difference in diff_identities(before, with_tools[0])]
    assert keys == ["data.as_chat", "data.tools"]


def test_a_key_that_older_versions_did_not_write_is_no_difference() -> None:
    before, now = {"model": "m"}, {"model": "m", "model_files": {"model": "1"}, "variables": {}}
    assert diff_identities(before, now) == []
    assert diff_identities({**before, "variables": {"X": "1"}}, now) == ['environment variable X: "1" → null']
    nested = diff_identities({"engine": {}}, {"engine": {"variables": 1}})
    assert nested == ["engine.variables: null → 1"], "it is one everywhere else"
