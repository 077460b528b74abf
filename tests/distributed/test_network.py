"""Reaching rank 0's host by its name."""

from __future__ import annotations

import logging
import socket
from typing import Any

import pytest
from helpers.jobs import wait_for

from dpgen.distributed.network import wait_until_resolved
from dpgen.errors import ConfigError

SOURCE = "RANK=1, WORLD_SIZE=2, MASTER_ADDR=nohost"


def refuse_name(*_: Any, **__: Any) -> Any:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_a_rank_says_that_rank_0s_host_does_not_resolve_and_goes_on_once_it_does(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer_once_announced(*arguments: Any, **_: Any) -> Any:
        wait_for(lambda: bool(caplog.messages))
        return [] if len(answers) else answers.append(1) or refuse_name()

    answers: list[int] = []
    monkeypatch.setattr("dpgen.log._FIRST_NOTICE_S", 0.0)
    monkeypatch.setattr("dpgen.distributed.network.socket.getaddrinfo", answer_once_announced)
    wait_until_resolved("nohost", SOURCE, limit_s=600)
    assert caplog.messages[0].startswith("waiting for the name of rank 0's host, nohost, to resolve on this host: ")
    assert f"({SOURCE}). Set MASTER_ADDR to" in caplog.messages[0]
    assert caplog.records[0].levelno == logging.WARNING, "so that ranks other than 0 say it, too"


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("nohost", r"nohost, does not resolve on .*: Name or service not known \(RANK=1, .*MASTER_ADDR=nohost\)"),
        ("." * 3 + "x" * 70, "MASTER_ADDR='...xxx.* is no host name or address"),
    ],
)
def test_a_name_that_never_resolves_is_rejected_by_its_variables(
    host: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if host == "nohost":
        monkeypatch.setattr("dpgen.distributed.network.socket.getaddrinfo", refuse_name)
    with pytest.raises(ConfigError, match=message):
        wait_until_resolved(host, SOURCE, limit_s=-1)
