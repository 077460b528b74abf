"""Errors of ranks reach the program as errors of the same kind, with the whole message."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpgen.api.jobs import Outcome, read_outcomes, write_outcome
from dpgen.distributed.group import PeerLost
from dpgen.errors import (
    ConfigError,
    DpgenError,
    EngineError,
    EngineHung,
    Interrupted,
    LockstepEngineLost,
    NoRowSucceeded,
    PeerFailed,
)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConfigError("one", "two"), ConfigError),
        (Interrupted("stopped"), Interrupted),
        (NoRowSucceeded("none"), NoRowSucceeded),
        (EngineError("it died", last_lines=["a", "b"]), EngineError),
        (EngineHung("it hangs"), EngineHung),
        (LockstepEngineLost("gone"), LockstepEngineLost),
        (PeerFailed("rank 1 failed: x", 2), ConfigError),
        (PeerFailed("rank 1 failed: x", 75), PeerFailed),
        (PeerLost("lost rank 1"), DpgenError),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else type(value).__name__,
)
def test_an_error_keeps_its_kind_its_message_and_its_status(
    error: DpgenError, kind: type[DpgenError], tmp_path: Path
) -> None:
    write_outcome(tmp_path, 3, Outcome.of_error(1, error))
    [outcome] = read_outcomes(tmp_path, 3)
    raised = outcome.to_error()
    assert type(raised) is kind and str(raised) == str(error) and raised.exit_status == error.exit_status
    assert str(outcome.to_error(" (hint)")).endswith(" (hint)")


def test_a_full_disk_takes_a_success_and_refuses_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes = Path.write_bytes

    def write_to_full_disk(path: Path, content: bytes) -> int:
        if content:
            raise OSError(28, "No space left on device")
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_to_full_disk)
    write_outcome(tmp_path, 3, Outcome(12))
    assert read_outcomes(tmp_path, 3) == [Outcome(12)]
    with pytest.raises(OSError, match="No space"):
        write_outcome(tmp_path, 3, Outcome.of_error(1, DpgenError("it failed")))
