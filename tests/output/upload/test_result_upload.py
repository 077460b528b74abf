"""A finished result is uploaded whole: what broke off continues, leftovers go, `_SUCCESS` comes last."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.stores import S3Server, serve_s3

from dpgen.data.storage import fetching
from dpgen.errors import EXIT_RESUMABLE, ConfigError, TransferStopped
from dpgen.journal.run_dir import RunDir
from dpgen.output.upload.result_upload import ResultUpload, check_file_target, describe_unfinished_upload, upload_file


@pytest.fixture
def server() -> Iterator[S3Server]:
    with serve_s3("bucket") as server:
        yield server


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(str(tmp_path / "run"))
    write_result(run_dir, 3)
    return run_dir


def write_result(run_dir: RunDir, num_files: int) -> None:
    """Write the files of a result; older ones stay as they are."""
    run_dir.dataset.mkdir(parents=True, exist_ok=True)
    for path in run_dir.dataset.iterdir():
        if not path.name.endswith(f"of-{num_files}.parquet"):
            path.unlink()
    for number in range(num_files):
        (run_dir.dataset / f"train-{number}-of-{num_files}.parquet").write_text(f"rows {number} of {num_files}")
    run_dir.success.write_text(json.dumps({"num_files": num_files}))


def upload(run_dir: RunDir, server: S3Server, to: str = "s3://bucket/out") -> None:
    work = ResultUpload(run_dir, to, server.options)
    work.check()
    work.upload()


RESULT = ["_SUCCESS", "train-0-of-3.parquet", "train-1-of-3.parquet", "train-2-of-3.parquet"]


def test_success_is_uploaded_last_and_the_same_command_uploads_nothing_more(run_dir: RunDir, server: S3Server) -> None:
    upload(run_dir, server)
    assert [name for name in server.list_names("bucket/out") if not name.startswith(".")] == RESULT
    put = [path for method, path, _ in server.requests if method == "PUT"]
    assert put[-1] == "/bucket/out/_SUCCESS"
    del server.requests[:]
    upload(run_dir, server)
    assert not server.count("PUT", "/out/_SUCCESS") and not server.count("PUT", "/out/train")


def test_an_upload_that_broke_off_continues_where_it_stopped(
    run_dir: RunDir, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_MAX_TRIES", 1)
    server.refuse = lambda method, path: 403 if method == "PUT" and "train-2" in path else None
    with pytest.raises(
        TransferStopped, match=r"complete in .*dataset, but its upload stopped: .*train-2.*status 403"
    ) as stop:
        upload(run_dir, server)
    assert stop.value.exit_status == EXIT_RESUMABLE
    there = server.list_names("bucket/out")
    assert "_SUCCESS" not in there
    assert "the result is not in s3://bucket/out yet" in str(describe_unfinished_upload(run_dir))
    server.refuse = lambda method, path: None
    del server.requests[:]
    upload(run_dir, server)
    assert describe_unfinished_upload(run_dir) is None
    assert server.count("PUT", "/out/train") == 3 - sum("train" in name for name in there)
    assert [name for name in server.list_names("bucket/out") if not name.startswith(".")] == RESULT


def test_files_of_an_earlier_result_are_removed_before_success(run_dir: RunDir, server: S3Server) -> None:
    upload(run_dir, server)
    write_result(run_dir, 2)
    upload(run_dir, server)
    names = [name for name in server.list_names("bucket/out") if not name.startswith(".")]
    assert names == ["_SUCCESS", "train-0-of-2.parquet", "train-1-of-2.parquet"]


def test_a_result_that_changed_there_is_uploaded_again(run_dir: RunDir, server: S3Server) -> None:
    upload(run_dir, server)
    server.file_system.pipe("bucket/out/train-1-of-3.parquet", b"damaged")
    upload(run_dir, server)
    assert server.file_system.cat("bucket/out/train-1-of-3.parquet") == b"rows 1 of 3"


def test_a_place_with_other_files_or_another_runs_result_is_refused(
    run_dir: RunDir, server: S3Server, tmp_path: Path
) -> None:
    server.file_system.pipe("bucket/mine/thesis.txt", b"x")
    with pytest.raises(
        ConfigError, match=r"output.to=s3://bucket/mine holds files that no run uploaded \(thesis.txt\)"
    ):
        upload(run_dir, server, "s3://bucket/mine")
    upload(run_dir, server)
    other = RunDir(str(tmp_path / "other"))
    write_result(other, 1)
    with pytest.raises(ConfigError, match="holds the result of another run directory"):
        upload(other, server)
    assert server.file_system.exists("bucket/mine/thesis.txt")


def test_what_came_to_the_place_during_the_run_is_neither_replaced_nor_removed(
    run_dir: RunDir, server: S3Server, tmp_path: Path
) -> None:
    other = RunDir(str(tmp_path / "other"))
    write_result(other, 2)
    works = [ResultUpload(run, "s3://bucket/both", server.options) for run in (run_dir, other)]
    for work in works:
        work.check()
    works[0].upload()
    with pytest.raises(TransferStopped, match="holds the result of another run directory"):
        works[1].upload()
    server.file_system.pipe("bucket/both/notes.txt", b"x")
    write_result(run_dir, 2)
    upload(run_dir, server, "s3://bucket/both")
    names = [name for name in server.list_names("bucket/both") if not name.startswith(".")]
    assert names == ["_SUCCESS", "notes.txt", "train-0-of-2.parquet", "train-1-of-2.parquet"]


def test_a_place_that_is_used_again_keeps_no_file_of_the_first_time(run_dir: RunDir, server: S3Server) -> None:
    for place, num_files in (("first", 3), ("second", 2), ("first", 2)):
        write_result(run_dir, num_files)
        upload(run_dir, server, f"s3://bucket/{place}")
    names = [name for name in server.list_names("bucket/first") if not name.startswith(".")]
    assert names == ["_SUCCESS", "train-0-of-2.parquet", "train-1-of-2.parquet"]


@pytest.mark.parametrize("to", ["{folder}/out", "file://{folder}/out", "memory://{name}/out"])
def test_folders_and_other_stores_are_places_too(run_dir: RunDir, tmp_path: Path, to: str) -> None:
    import fsspec

    address = to.format(folder=tmp_path, name=tmp_path.name)
    for num_files in (3, 2):
        write_result(run_dir, num_files)
        work = ResultUpload(run_dir, address, {})
        work.check()
        work.upload()
        file_system, path = fsspec.url_to_fs(address)
        names = {name.rpartition("/")[2] for name in file_system.find(path)}
        assert {name for name in names if not name.startswith(".")} == {
            "_SUCCESS",
            *(f"train-{number}-of-{num_files}.parquet" for number in range(num_files)),
        }


def test_a_place_that_cannot_be_written_is_refused_before_the_run(run_dir: RunDir, server: S3Server) -> None:
    with pytest.raises(ConfigError, match=r"output.to=s3://nowhere/out: there is no such bucket"):
        ResultUpload(run_dir, "s3://nowhere/out", server.options).check()
    server.refuse = lambda method, path: 403 if method == "PUT" else None
    with pytest.raises(ConfigError, match=r"output.to=s3://bucket/new: the store refuses access .status 403"):
        ResultUpload(run_dir, "s3://bucket/new", server.options).check()
    with pytest.raises(ConfigError, match="must not be in the run directory"):
        ResultUpload(run_dir, str(run_dir.path / "copy"), {}).check()


def test_one_file_is_uploaded_to_an_address(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "responses").write_text("{}\n")
    check_file_target("s3://bucket/answers/out.jsonl", server.options)
    upload_file(tmp_path / "responses", "s3://bucket/answers/out.jsonl", server.options)
    assert server.list_names("bucket/answers") == ["out.jsonl"]
    with pytest.raises(ConfigError, match="-o s3://bucket/answers/: is a folder"):
        check_file_target("s3://bucket/answers/", server.options)
    monkeypatch.setattr(fetching, "_MAX_TRIES", 1)
    server.refuse = lambda method, path: 403
    with pytest.raises(TransferStopped, match=r"the responses are complete in .*, but their upload stopped"):
        upload_file(tmp_path / "responses", "s3://bucket/answers/out.jsonl", server.options)
