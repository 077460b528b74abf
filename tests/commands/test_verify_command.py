"""Test the command line of `dpgen verify`; tests/output/test_verification.py tests the checks."""

from __future__ import annotations

import pytest

from dpgen.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: RUN_DIR"),
        (["a", "b"], "unexpected argument 'b'"),
        (["--jsn", "a"], "unknown option --jsn, did you mean --json?"),
        (["no/such/directory"], "RUN_DIR=no/such/directory: there is no such directory"),
    ],
)
def test_wrong_usage_ends_with_status_2_and_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", *arguments]) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1 and not output.out, output


def test_help_describes_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "check a run directory" in capsys.readouterr().out
    assert main(["verify", "--help"]) == 0
    output = capsys.readouterr().out
    assert "RUN_DIR" in output and "--no-input" in output and "exit status: 0 for a complete, sound result" in output
