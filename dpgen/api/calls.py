"""Prepare one call: check its configuration, save its rows in the run directory, and end it with a result or an error.

- Rows go to RUN_DIR/input/DIGEST, a folder named by their contents. A resumed call finds them there; a call with other
  rows leaves them alone, and is rejected by the ranks, as `dpgen run` is.
- A temporary run directory is removed once its result is in memory. It is kept, and named, where rows would be lost.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from glob import iglob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpgen.api.jobs import Outcome, RankJob, ResultOn
from dpgen.api.settings import PLACEHOLDER, Layer
from dpgen.config.checks import find_scheme
from dpgen.config.loader import load_values
from dpgen.config.schema import Config
from dpgen.errors import ConfigError, DpgenError
from dpgen.journal.run_dir import RunDir

if TYPE_CHECKING:
    import datasets

    from dpgen.data.input_rows import InputRows
    from dpgen.distributed.topology import Topology

logger = logging.getLogger(__name__)

_MAX_SHOWN = 40
_PATH_BEGINNINGS = ("/", "~/", "./", "../")


@dataclass(frozen=True)
class Call:
    """Describe one call.

    Attributes:
        config: of its job.
        job: for its ranks.
        is_temporary: the run directory was made for this call.
        new_input: the folder with the rows, if this call has written it.
    """

    config: Config
    job: RankJob
    is_temporary: bool
    new_input: Path | None

    @property
    def run_dir(self) -> RunDir:
        """Return the run directory."""
        return RunDir(self.config.run.dir)

    def raise_if_failed(self, outcome: Outcome) -> None:
        """Raise the error that ended the job, if one has.

        Raises:
            DpgenError: see `Outcome.to_error`. It names the run directory, unless nothing is kept there.
        """
        if outcome.error_type is None:
            return
        path = self.run_dir.path
        hint = f" (in Python: the same call, with run_dir={str(path)!r})" if outcome.exit_status == 75 else ""
        error = outcome.to_error(hint)
        if isinstance(error, ConfigError):
            self.discard_input()
        if not self.is_temporary or not isinstance(error, ConfigError):
            error.run_dir = path
        raise error

    def discard_input(self) -> None:
        """Remove what `prepare_call` has made for a job that did not begin."""
        if self.is_temporary:
            shutil.rmtree(self.run_dir.path, ignore_errors=True)
        elif self.new_input is not None:
            shutil.rmtree(self.new_input, ignore_errors=True)
            for folder in (self.run_dir.input, self.run_dir.path):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()

    def warn_if_left(self) -> None:
        """Name a temporary run directory whose job was broken off."""
        if self.is_temporary:
            path = self.run_dir.path
            logger.warning(
                f"the unfinished run is kept in {path}. The same call, with run_dir={str(path)!r}, resumes it"
            )

    def load_result(self) -> datasets.Dataset:
        """Return the result, and remove a temporary run directory."""
        result = load_rows(self.run_dir, self.config.output.format, in_memory=self.is_temporary)
        self.discard_result()
        return result

    def discard_result(self) -> None:
        """Remove a temporary run directory."""
        if self.is_temporary:
            shutil.rmtree(self.run_dir.path, ignore_errors=True)


def prepare_call(dataset: Any, layers: Sequence[Layer], topology: Topology, result_on: ResultOn) -> Call:
    """Return a call that is ready for its ranks: its configuration is checked, and its rows are saved.

    Args:
        dataset: rows, or a path as `data.path` takes it.
        layers: see `dpgen.config.loader.load_values`.
        topology: of this process in the launcher's world.

    Raises:
        ConfigError: something in the configuration or the rows is wrong.
    """
    if result_on not in ("rank0", "all"):
        raise ConfigError(f"result_on={result_on!r}: must be 'rank0' or 'all'")
    paths = _find_paths(dataset)
    given = {"data": {"path": PLACEHOLDER if paths is None else paths}}
    defaults = {"run": {"dir": PLACEHOLDER}}
    config = load_values([("defaults", defaults), *layers, ("dataset", given)])
    if "openai_batch" in (config.output.format, config.data.format):
        raise ConfigError("a batch file gives a response file, and no Dataset: use dpgen run-batch")
    rows = None if paths is not None else _to_input_rows(dataset)
    is_temporary = config.run.dir == PLACEHOLDER
    if is_temporary:
        directory = tempfile.mkdtemp(prefix="dpgen-run-")
    else:
        directory = os.path.abspath(os.path.expanduser(config.run.dir))  # the program may change its directory
    config = replace(config, run=replace(config.run, dir=directory))
    call = Call(config, RankJob(config, "", result_on), is_temporary, None)
    if rows is None:
        return call
    try:
        return _save_rows(call, rows, topology)
    except BaseException:
        call.discard_input()
        raise


def load_rows(run_dir: RunDir, file_format: str, *, in_memory: bool) -> datasets.Dataset:
    """Return the rows of a finished run; see `dpgen.data.saved_dataset.load_result_dataset`."""
    from dpgen.data.saved_dataset import keep_quiet, load_result_dataset
    from dpgen.output.file_set import REWRITE_HINT, list_files
    from dpgen.output.json_lines import JSONL_ENCODING

    if (problem := list_files(run_dir.dataset, file_format)[1]) is not None:
        raise DpgenError(f"run_dir={run_dir.path}: {problem}: {REWRITE_HINT}")
    with keep_quiet():
        # A rank that was sent its copy of the result has no _SUCCESS.
        encoding = int(run_dir.read_success().get("jsonl_encoding", 1)) if run_dir.is_finished else JSONL_ENCODING
        cache = run_dir.path / ".cache"
        return load_result_dataset(run_dir.dataset, file_format, cache, in_memory=in_memory, encoding=encoding)


def _find_paths(dataset: Any) -> str | list[str] | None:
    """Return a dataset that is the name of one, as `data.path` takes it; None if it holds rows itself.

    Raises:
        ConfigError: it is a list of texts, as `LLM.generate` takes prompts.
    """
    if isinstance(dataset, (str, Path)):
        return str(dataset)
    if isinstance(dataset, (list, tuple)) and dataset and all(isinstance(entry, (str, Path)) for entry in dataset):
        paths = [str(entry) for entry in dataset]
        # One name with a slash may be of a Hub dataset.
        if any(" " in path or "/" not in path for path in paths) and not any(map(_looks_like_file, paths)):
            raise ConfigError(
                f"dataset[0] is the text {paths[0][:_MAX_SHOWN]!r}, and names no file: a row is a dict of columns: "
                '[{"prompt": text} for text in texts] with prompt_column="prompt"'
            )
        return paths
    return None


def _looks_like_file(path: str) -> bool:
    """Return True if no prompt looks like this: slashes alone make no path, as in "What is 1/2 + 1/3?"."""
    from dpgen.data.reading.files import is_data_file

    is_path = path.startswith(_PATH_BEGINNINGS) or find_scheme(path) is not None
    return is_path or is_data_file(path) or os.path.exists(path) or (" " not in path and any(iglob(path)))


def _to_input_rows(dataset: Any) -> InputRows:
    from dpgen.data.saved_dataset import keep_quiet, to_input_rows

    with keep_quiet():
        return to_input_rows(dataset)


def _save_rows(call: Call, rows: InputRows, topology: Topology) -> Call:
    from dpgen.data.saved_dataset import compute_digest, keep_quiet, read_as_saved, save_whole

    with keep_quiet():
        rows = read_as_saved(rows, call.run_dir.input)
        digest = compute_digest(rows)
        path = call.run_dir.input / digest
        # Where a node's ranks share the folder, its first one saves the rows, and opens them before the others do.
        is_writer = call.is_temporary or topology.local_rank == 0
        is_new = is_writer and save_whole(rows, path)
    config = replace(call.config, data=replace(call.config.data, path=os.path.abspath(path)))
    return Call(config, replace(call.job, config=config, digest=digest), call.is_temporary, path if is_new else None)


def load_result(run_dir: str | Path) -> datasets.Dataset:
    """Return the rows of a finished run, in input order, as `generate` does.

    Args:
        run_dir: the run directory, of a call or of `dpgen run`.

    Raises:
        ConfigError: there is no finished run.
        DpgenError: its dataset can't be read.

    Example:
        >>> import dpgen
        >>> rows = dpgen.generate([{"q": "1+1?"}], model="none", prompt_column="q", run_dir=folder,
        ...                       run={"engine": "fake"}, quiet=True)
        >>> dpgen.load_result(folder)["row_id"][:]
        [0]
    """
    found = RunDir(str(run_dir))
    identity = found.read_metadata().get("identity")
    if not found.is_finished or not identity:
        raise ConfigError(f"run_dir={found.path} holds no finished run")
    file_format = str(identity["output"]["format"])
    if file_format == "openai_batch":
        raise ConfigError(f"run_dir={found.path} holds a response file, and no dataset: it is {found.dataset}")
    return load_rows(found, file_format, in_memory=False)


def make_error_job(error: DpgenError) -> RankJob:
    """Return the job of a rank whose program could not prepare its call: the other ranks learn why."""
    return RankJob(error, "", "rank0")
