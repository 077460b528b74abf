"""Recognise secrets in a configuration, by the name of their key and by their form, and keep them out of files.

- Only texts are secrets: numbers, and texts that name a special token of a tokenizer (`bos_token`), are none.
- A key of an unknown `*_token` counts as a secret, since a value that is removed by mistake costs less than one kept.
  Its value is none if it looks like a special token: ``<think>``, ``[SEP]``.
- Names are compared word by word: `tokenizer` holds no `token`, `secretKey` is `secret_key`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

REMOVED = "<removed>"

# A key is one of these names, or ends in one: aws_secret_access_key, OPENAI_API_KEY.
_SECRET_NAMES = (
    "access_key",
    "access_key_id",
    "api_key",
    "apikey",
    "auth",
    "authorization",
    "credential",
    "credentials",
    "passphrase",
    "passwd",
    "password",
    "private_key",
    "secret",
    "secret_key",
    "token",
)

# Names of secrets in the query of a URL: ``?token=...``.
_SECRET_PARAMETERS = ("access_token", "api_key", "apikey", "auth_token", "password", "secret", "sig", "token")

# Tokens of a vocabulary, not of an account.
_SPECIAL_TOKENS = frozenset(
    f"{name}_token"
    for name in (
        "additional_special",
        "assistant",
        "audio",
        "begin",
        "bos",
        "cls",
        "decoder_start",
        "end",
        "eos",
        "eot",
        "image",
        "mask",
        "pad",
        "sep",
        "special",
        "start",
        "stop",
        "system",
        "think_end",
        "think_start",
        "unk",
        "user",
        "video",
    )
)

_SECRET_FORMS = re.compile(
    r"(?<=://)[^/\s:@?#]*:[^/\s?#]+(?=@)"  # user and password of a URL
    + "".join(rf"|(?<=[?&]{name}=)[^&#\s]+" for name in _SECRET_PARAMETERS)
    + r"|(?<=X-Amz-Signature=)[^&\s]+"  # signed URLs of AWS
    r"|(?<=\bBearer )[A-Za-z0-9._~+/=-]{16,}"  # HTTP
    r"|\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]+"  # JSON Web Token
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"  # AWS
    r"|\bhf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|\bsk-(?:(?:ant|proj|svcacct)-|(?=[A-Za-z0-9_-]*[0-9]))[A-Za-z0-9_-]{20,}"  # OpenAI, Anthropic
    r"|\b(?:gh[opsru]_|github_pat_)[A-Za-z0-9_]{20,}"  # GitHub
    r"|\bglpat-[A-Za-z0-9_-]{20,}"  # GitLab
    r"|\bAIza[0-9A-Za-z_-]{35}"  # Google
    r"|\bxox[abprs]-[A-Za-z0-9-]{10,}"  # Slack
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)


def redact_secrets(value: Any, key: str = "") -> Any:
    """Return a copy of nested dicts and lists, with ``<removed>`` for secrets.

    Args:
        key: the last part of the key that the value belongs to.
    """
    if isinstance(value, Mapping):
        return {str(name): redact_secrets(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_secrets(item, key) for item in value]
    if not isinstance(value, str):
        return value
    return REMOVED if _is_secret(key, value) else _SECRET_FORMS.sub(REMOVED, value)


def has_secret(value: Any, key: str = "") -> bool:
    """Return True if `redact_secrets` would remove anything."""
    if isinstance(value, Mapping):
        return any(has_secret(item, str(name)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return any(has_secret(item, key) for item in value)
    return isinstance(value, str) and redact_secrets(value, key) != value


def _is_secret(key: str, value: str) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)  # secretKey
    name = words.lower().replace("-", "_")
    if name in _SPECIAL_TOKENS or (name.endswith("_token") and re.fullmatch(r"<.*>|\[.*\]", value)):
        return False
    return any(name == secret or name.endswith(f"_{secret}") for secret in _SECRET_NAMES)
