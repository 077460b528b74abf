"""Push an export to a dataset repository of the Hugging Face Hub, through `huggingface_hub`.

- The Parquet files are kept in RUN_DIR/.hub-export until the Hub has all of them. The same command pushes them
  again, and the Hub asks only for what it does not have yet.
- A repository that holds something else is refused unless it may be overwritten. Nothing of it is deleted but the
  Parquet files of an earlier export.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpgen.config.secrets import redact_text
from dpgen.data.hub import explain_hub_error
from dpgen.errors import ConfigError, DpgenError, TransferStopped
from dpgen.journal.files import atomic_write_text
from dpgen.journal.reader import list_segments
from dpgen.journal.run_dir import RunDir
from dpgen.output.export.card import CARD_MARK
from dpgen.output.export.export import ExportReport, export_run
from dpgen.output.export.selection import Selection

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_STAGE, _STATE = ".hub-export", "state.json"
_OWN_FILES = "train-*-of-*.parquet"


@dataclass(frozen=True)
class HubTarget:
    """Name where to push.

    Attributes:
        name: ``user/name``, or a name of the user whose token is used.
        private: make the repository private, and refuse one that is public.
        overwrite: also push to a repository that holds something else.
    """

    name: str
    private: bool = False
    overwrite: bool = False


def push_run(run_dir: RunDir, target: HubTarget, selection: Selection) -> tuple[ExportReport, str]:
    """Export a run's rows as Parquet files with a card, and push them. Return the report and the dataset's address.

    Raises:
        ConfigError: see `export_run`; or the Hub refuses the repository or its name, or it holds something else.
        TransferStopped: the network, or the Hub, is not there; or the upload broke off.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    api = HfApi(library_name="dpgen")
    stage = run_dir.path / _STAGE
    with _explain_errors(target.name):
        name = _prepare_repository(api, target, is_resumed=_read_state(stage).get("pushed_to") == target.name)
    report = _export_to_stage(run_dir, stage, selection)
    _write_state(stage, pushed_to=target.name)
    with _explain_errors(target.name):
        api.upload_folder(
            repo_id=name,
            repo_type="dataset",
            folder_path=stage / "dataset",
            commit_message=f"Export {report.num_exported:,} rows with dpgen",
            delete_patterns=_OWN_FILES,  # of an earlier export with more files
        )
    shutil.rmtree(stage, ignore_errors=True)
    return report, f"{api.endpoint}/datasets/{name}"


def _prepare_repository(api: HfApi, target: HubTarget, *, is_resumed: bool) -> str:
    """Create the repository if it is not there, check what it holds, and return its full name.

    Args:
        is_resumed: an earlier export began to push to it.
    """
    url = api.create_repo(target.name, repo_type="dataset", private=target.private or None, exist_ok=True)
    info = api.dataset_info(url.repo_id)
    if target.private and not info.private:
        raise ConfigError(
            f"--private: the dataset {url.repo_id} is there already and is public: make it private in its settings, or "
            "choose another name"
        )
    others = [file.rfilename for file in info.siblings or () if file.rfilename != ".gitattributes"]
    if others and not target.overwrite and not is_resumed and not _is_own(api, url.repo_id, others):
        raise ConfigError(
            f"the dataset {url.repo_id} is there already, and no dpgen export wrote it ({', '.join(others[:3])}): "
            "choose another name, or push to it with --overwrite, which replaces README.md"
        )
    return str(url.repo_id)


def _is_own(api: HfApi, name: str, files: Sequence[str]) -> bool:
    """Return True if the repository's card is one of an export."""
    if "README.md" not in files:
        return False
    path = api.hf_hub_download(name, "README.md", repo_type="dataset")
    return CARD_MARK in Path(path).read_text(encoding="utf-8", errors="replace")


def _export_to_stage(run_dir: RunDir, stage: Path, selection: Selection) -> ExportReport:
    """Write the files to push, unless an upload that broke off has left the same ones."""
    key = _compute_key(run_dir, selection)
    state = _read_state(stage)
    if state.get("key") == key and (stage / "dataset").is_dir():
        return ExportReport(**state["report"])
    shutil.rmtree(stage, ignore_errors=True)
    report = export_run(run_dir, str(stage / "dataset"), "parquet", selection, for_hub=True)
    _write_state(stage, key=key, report=asdict(report))
    return report


def _compute_key(run_dir: RunDir, selection: Selection) -> str:
    """Return a hash of what the exported files follow from."""
    segments = [(path.name, path.stat().st_size) for path in list_segments(run_dir.journal)]
    facts = [run_dir.read_success(), segments, asdict(selection), run_dir.read_metadata()]
    return hashlib.blake2b(json.dumps(facts, default=str).encode(), digest_size=16).hexdigest()


def _read_state(stage: Path) -> dict[str, Any]:
    try:
        state = json.loads((stage / _STATE).read_bytes())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _write_state(stage: Path, **facts: Any) -> None:
    atomic_write_text(stage / _STATE, json.dumps({**_read_state(stage), **facts}))


@contextmanager
def _explain_errors(name: str) -> Iterator[None]:
    """Turn the errors of `huggingface_hub` into those of dpgen, without the token that a message may hold.

    Raises:
        ConfigError: the Hub refuses the name or the token.
        TransferStopped: anything else, which may be over at the next try.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except (DpgenError, KeyboardInterrupt):
        raise
    except (HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        raise ConfigError(f"--push-to-hub {name}: {_summarize(error)}") from None
    except Exception as error:  # noqa: BLE001 - the client passes on errors of its HTTP library, which it has changed
        reason = explain_hub_error(name, error, "dataset")
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if reason is not None or status in (400, 401, 403, 404, 409, 422):
            raise ConfigError(f"--push-to-hub {name}: {reason or _summarize(error)}") from None
        raise TransferStopped(
            f"the upload to {name} broke off: {_summarize(error)}. The same command continues it"
        ) from None


def _summarize(error: BaseException) -> str:
    """Return the first line of an error, or of its cause where that says more."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    cause = error.__cause__
    if cause is not None and str(cause).strip() and str(cause) not in text:
        text = f"{text} ({str(cause).strip().splitlines()[0]})"
    token = os.environ.get("HF_TOKEN")
    return redact_text(text.replace(token, "<removed>") if token else text)
