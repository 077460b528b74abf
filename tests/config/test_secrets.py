"""Test which values are secrets: they reach no file, and other values are not touched."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dpgen.commands import slurm
from dpgen.config import loader
from dpgen.config.secrets import REMOVED, has_secret, redact_secrets, redact_text
from dpgen.errors import ConfigError
from dpgen.journal.run_identity import diff_identities
from dpgen.rank_process import _write_error

HF_TOKEN = "hf_" + "a1B2" * 8
AWS_KEY = "AKIA" + "Z" * 16


@pytest.mark.parametrize(
    "key",
    [
        *("hf_token", "token", "HF-Token", "wandb_token", "api_key", "OPENAI_API_KEY", "password", "auth"),
        *("aws_secret_access_key", "access_key", "secret", "client_secret", "credentials", "private_key"),
        *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "apiKey", "secretKey", "accessToken", "hfToken", "X-API-Key"),
        *("db_pwd", "cookie", "account_key", "signing_key", "connection_string", "bearer", "APIKey", "x-auth-token"),
    ],
)
def test_a_secret_is_recognised_by_its_key(key: str) -> None:
    assert redact_secrets({"loader": {key: "xyz"}}) == {"loader": {key: REMOVED}}
    assert has_secret({"loader": {key: "xyz"}})


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("s3://me:pass@host/rows", f"s3://{REMOVED}@host/rows"),
        (f"https://host/x?key={AWS_KEY}", f"https://host/x?key={REMOVED}"),
        (f"Bearer {HF_TOKEN}", f"Bearer {REMOVED}"),
        ("Bearer 0123456789abcdef.x", f"Bearer {REMOVED}"),
        ("postgres://me:p@ss:word@host/rows", f"postgres://{REMOVED}@host/rows"),
        ("https://host/x?token=abc&y=1", f"https://host/x?token={REMOVED}&y=1"),
        ("https://host/x?y=1&api_key=abc#z", f"https://host/x?y=1&api_key={REMOVED}#z"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl", REMOVED),
        ("sk-" + "a1" * 12, REMOVED),
        ("glpat-" + "a1" * 12, REMOVED),
        ("sk-proj-" + "a" * 30, REMOVED),
        ("https://account.blob/x?sp=r&sig=a%2Fb&x=1", f"https://account.blob/x?sp=r&sig={REMOVED}&x=1"),
        ("s3://key:sec/ret+x@bucket/rows", f"s3://{REMOVED}@bucket/rows"),
        ("https://0123456789abcdef0123456789abcdef@host/x", f"https://{REMOVED}@host/x"),
        ("https://host/x?API-Key=abc&page=2", f"https://host/x?API-Key={REMOVED}&page=2"),
        ("https://host/x?clientSecret=abc", f"https://host/x?clientSecret={REMOVED}"),
        ("https://host/x#access_token=abc", f"https://host/x#access_token={REMOVED}"),
        ("https://host/x?X-Goog-Signature=abc", f"https://host/x?X-Goog-Signature={REMOVED}"),
        (
            "https://host/x?X-Amz-Security-Token=abc&Key-Pair-Id=K",
            f"https://host/x?X-Amz-Security-Token={REMOVED}&Key-Pair-Id=K",
        ),
        ("AccountName=a;AccountKey=b0b==;Suffix=c", f"AccountName=a;AccountKey={REMOVED};Suffix=c"),
        ("bearer 0123456789abcdef.x", f"bearer {REMOVED}"),
        ("gsk_" + "a1" * 16, REMOVED),
        ("nvapi-" + "a1" * 16, REMOVED),
        ("ya29." + "a1" * 12, REMOVED),
        ("sk_live_" + "a1" * 12, REMOVED),
    ],
)
def test_a_secret_is_recognised_by_its_form_under_any_key(text: str, redacted: str) -> None:
    assert redact_secrets({"path": [text]}) == {"path": [redacted]}
    assert has_secret(text)


@pytest.mark.parametrize(
    "value",
    [
        {"api_keys": ["a", "b"]},
        {"hf_tokens": ["a"]},
        {"passwords": ["a"]},
        {"secrets": {"me": "a"}},
        {"auth": {"u": "p"}},
    ],
)
def test_all_texts_in_a_list_or_mapping_of_secrets_are_secrets(value: dict[str, Any]) -> None:
    assert "a" not in str(redact_secrets(value)).replace(REMOVED, "").replace(next(iter(value)), "")
    assert REMOVED in str(redact_secrets(value)) and has_secret(value)


@pytest.mark.parametrize(
    "value",
    [
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        {"max_tokens": 5, "token": None, "stop_token_ids": [1]},
        {"think_token": "<think>", "fim_prefix_token": "<|fim_prefix|>", "sot_token": "[SOT]"},
        {"tokenizer": "a/b", "max_tokens": "7", "tokens": "x", "token_column": "t", "password_column": "p"},
        {"api_key_env": "X", "secretary": "x", "authors": "x", "public_key": "x", "key": "x", "keys": ["x"]},
        {"path": "https://host:8080?mail=me@host", "model": "sk-learn-model-of-a-long-name"},
        {"ignore_eos_token": "x", "prefix_token": "▁", "max_token": "5", "my_bos_token": "B", "hf_token": ""},
        {"path": "https://me@host/x?max_tokens=5&page=2", "template": "x?token={{ token }}", "cache_key": "a"},
        {"template": "risk-averse: {{ question }}", "path": "https://host:8080/rows", "author": "me"},
    ],
)
def test_other_values_are_kept(value: dict[str, Any]) -> None:
    assert redact_secrets(value) == value
    assert not has_secret(value)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("", ["engine.hf_token=abcdef # x"]),
        ("", ["engine.api_keys=[abcdef, {b]"]),
        ("", ["data.path=[https://me:abcdef@host/x"]),
        ("engine:\n  hf_token: 'abcdef\n", []),
        ("engine:\n  hf_token: {{ abcdef }}\n", []),
        ('engine: 1\nengine: 2\n  password: "abcdef" x\n', []),
    ],
)
def test_an_error_of_the_configuration_shows_no_secret(tmp_path: Path, text: str, arguments: list[str]) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        loader.load([str(tmp_path / "a.yaml")], arguments)
    assert "abcdef" not in redact_text(str(raised.value))


def test_the_closing_error_of_a_run_shows_no_secret(capfd: pytest.CaptureFixture[str]) -> None:
    _write_error(ConfigError("data.path=https://me:abcdef@host/x: addresses are not read"), "text")
    written = capfd.readouterr().err
    assert f"https://{REMOVED}@host/x" in written and "abcdef" not in written


def test_a_run_directory_of_a_version_that_recognised_other_secrets_is_the_same_run() -> None:
    assert diff_identities({"bos_token": REMOVED}, {"bos_token": "<s>"}) == []
    assert diff_identities({"path": "s3://me:pass@host"}, redact_secrets({"path": "s3://me:pass@host"})) == []
    assert diff_identities({"path": "s3://one"}, {"path": "s3://other"}) != []


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["engine.hf_token=abc"], "engine.hf_token"),
        (["engine={hf_token: abc}"], "engine"),
        (["data.path=https://me:pass@host/rows.jsonl"], "data.path"),
        (["sampling.max_tokens=5"], None),
    ],
)
def test_dpgen_slurm_warns_of_secrets_that_its_script_holds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], overrides: Sequence[str], key: str | None
) -> None:
    monkeypatch.setattr(slurm, "script_for", lambda arguments: ("script", False))
    assert slurm.main(Namespace(arguments=["conf.yaml", *overrides])) == 0
    captured = capsys.readouterr()
    assert captured.out == "script", "nothing is removed from the script"
    assert captured.err == "" if key is None else f"in clear text: {key}. " in captured.err
