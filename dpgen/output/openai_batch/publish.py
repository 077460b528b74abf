"""Put a run's responses into one file, for users who asked for a file rather than a run directory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpgen.config.checks import find_scheme
from dpgen.errors import ConfigError, DpgenError
from dpgen.journal.files import FileSystem
from dpgen.journal.run_dir import RunDir
from dpgen.output.file_set import REWRITE_HINT, list_files
from dpgen.output.openai_batch.response_files import FILE_SUFFIX
from dpgen.output.upload.result_upload import check_file_target, upload_file

STAGED_FILE = ".responses-to-upload"  # in the run directory, until its address has it


def check_output_file(output_file: str, input_file: str, run_dir: RunDir, options: Mapping[str, Any]) -> None:
    """Check that a file can take the responses, and make its folder. Only rank 0 calls this.

    Args:
        options: of the store, where the file is an address.

    Raises:
        ConfigError: the file can't be written, or is the batch file, or in the run directory.
    """
    if find_scheme(output_file) is not None:
        if output_file == input_file:
            raise ConfigError(f"-o {output_file}: is the batch file itself; write the responses to another one")
        check_file_target(output_file, options)
        return
    target = _find_target(output_file)
    try:
        if target.is_dir() or output_file.endswith("/"):
            raise ConfigError(f"-o {output_file}: is a folder: must be a file")
        if target.exists() and not target.is_file():
            raise ConfigError(f"-o {output_file}: must be a file")
        if target == _find_target(input_file):
            raise ConfigError(f"-o {output_file}: is the batch file itself; write the responses to another one")
        if target.is_relative_to(_find_target(str(run_dir.path))):
            raise ConfigError(f"-o {output_file}: must not be in the run directory {run_dir.path}")
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"-o {output_file}: can't be written: {error.strerror}") from None
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"-o {output_file}: can't be written: no permission for {target.parent}")


def publish_responses(run_dir: RunDir, output_file: str, options: Mapping[str, Any]) -> None:
    """Write the run's response files as one file, whole or not at all. Only rank 0 calls this.

    Args:
        options: of the store, where the file is an address.

    Raises:
        DpgenError: the disk refuses.
        TransferStopped: the store refuses or fails.
    """
    if find_scheme(output_file) is not None:
        staged = run_dir.path / STAGED_FILE
        _write_file(run_dir, str(staged))
        upload_file(staged, output_file, options)
        staged.unlink(missing_ok=True)
        return
    _write_file(run_dir, output_file)


def _write_file(run_dir: RunDir, output_file: str) -> None:
    files, target = FileSystem(), _find_target(output_file)
    temporary = target.with_name(f".{target.name}.dpgen-tmp")
    paths, problem = list_files(run_dir.dataset, FILE_SUFFIX)
    if problem is not None:
        raise DpgenError(f"{run_dir.path}: {problem}: {REWRITE_HINT}")
    try:
        with temporary.open("wb") as file:
            for path in paths:
                with path.open("rb") as part:
                    shutil.copyfileobj(part, file, 1 << 20)
        files.sync_path(temporary)
        files.replace(temporary, target)
        files.sync_directory(target.parent)
    except OSError as error:
        raise DpgenError(
            f"-o {output_file} can't be written: {error.strerror}. The responses are safe in {run_dir.dataset}: free "
            "space, then run the same command again"
        ) from None


def _find_target(path: str) -> Path:
    """Return the file behind a path, so that a link stays one."""
    return Path(os.path.realpath(os.path.expanduser(path)))
