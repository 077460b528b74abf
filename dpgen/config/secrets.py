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
    "access_tokens",
    "cookies",
    "customer_key",
    "ssecustomer_key",
    "account_key",
    "api_key",
    "api_keys",
    "api_tokens",
    "apikey",
    "apikeys",
    "auth",
    "auth_tokens",
    "authorization",
    "bearer",
    "connection_string",
    "cookie",
    "credential",
    "credentials",
    "credentials_json",
    "encryption_key",
    "hf_tokens",
    "passphrase",
    "passwd",
    "password",
    "passwords",
    "private_key",
    "pwd",
    "secret",
    "secret_key",
    "secrets",
    "shared_key",
    "signing_key",
    "ssh_key",
    "subscription_key",
    "token",
)

# Names of secrets in the options of a store, beside those: s3fs takes `key` and `secret`, webdav `auth`, sftp `pkey`.
_STORE_SECRETS = ("key", "username", "user", "sas", "pkey", "passcode", "cookies")

# Names of secrets in the query of a URL, beside those: signed URLs of Azure, AWS and Google.
_SIGNATURES: tuple[str, ...] = (
    "sig",
    "signature",
    "x_amz_signature",
    "x_goog_signature",
    "x_amz_credential",
    "x_goog_credential",
)
_SIGNATURES += ("awsaccess_key_id", "google_access_id")

# Tokens of a vocabulary, not of an account: the words before `_token`.
_SPECIAL_TOKENS = (
    *("additional_special", "assistant", "audio", "begin", "boi", "bos", "cls", "decoder_start", "end", "eoi", "eos"),
    *(
        "eot",
        "image",
        "mask",
        "max",
        "middle",
        "min",
        "next",
        "num",
        "pad",
        "prefix",
        "sep",
        "special",
        "start",
        "stop",
    ),
    *("suffix", "system", "think_end", "think_start", "unk", "user", "video"),
)

_SECRET_FORMS = re.compile(
    r"(?<=://)[^/\s:@?#]*:(?![0-9]+/)[^\s?#]+(?=@)"  # user and password of a URL
    r"|(?<=://)[A-Za-z0-9_-]{20,}(?=@)"  # a token as the user of a URL
    r"|(?<=\b[Bb]earer )(?=\S*[0-9])[A-Za-z0-9._~+/=-]{12,}|(?<=\bBearer )[A-Za-z0-9._~+/=-]{16,}"  # HTTP
    r"|\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]+"  # JSON Web Token
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"  # AWS
    r"|\bhf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|\bsk-(?:(?:ant|proj|svcacct)-|(?=[A-Za-z0-9_-]*[0-9]))[A-Za-z0-9_-]{20,}"  # OpenAI, Anthropic
    r"|\b(?:gh[opsru]_|github_pat_)[A-Za-z0-9_]{20,}"  # GitHub
    r"|\bglpat-[A-Za-z0-9_-]{20,}"  # GitLab
    r"|\bAIza[0-9A-Za-z_-]{35}"  # Google
    r"|\bya29\.[A-Za-z0-9_-]{20,}"
    r"|\bxox[abprs]-[A-Za-z0-9-]{10,}"  # Slack
    r"|\b(?:gsk|npm|r8)_[A-Za-z0-9]{30,}"  # Groq, npm, Replicate
    r"|\b(?:nvapi|pypi)-[A-Za-z0-9_-]{20,}"  # NVIDIA, PyPI
    r"|\b[sr]k_(?:live|test)_[A-Za-z0-9]{16,}"  # Stripe
    r"|\bdop_v1_[0-9a-f]{40,}"  # DigitalOcean
    r"|\bSG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}"  # SendGrid
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)


# Of JSON Schema: each maps names to schemas.
_SCHEMA_KEYS = ("properties", "patternProperties", "$defs", "definitions")

# ``name=value`` in the query or fragment of a URL, or in a connection string: ``AccountName=a;AccountKey=b``.
_PAIR = re.compile(r"(?:(?<=[?&#;])|^)([A-Za-z][\w.-]*)=([^&#;\s]+)")


def redact_secrets(value: Any, key: str = "") -> Any:
    """Return a copy of nested dicts and lists, with ``<removed>`` for secrets.

    Args:
        key: the last part of the key that the value belongs to.
    """
    if isinstance(value, Mapping):
        return {str(name): redact_secrets(item, _find_item_key(key, str(name), item)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_secrets(item, key) for item in value]
    if not isinstance(value, str):
        return value
    return REMOVED if value and _is_secret(key, value) else redact_text(value)


def redact_text(text: str) -> str:
    """Return a text with ``<removed>`` for each part that has the form of a secret."""

    def redact_pair(pair: re.Match[str]) -> str:
        return f"{pair[1]}={REMOVED}" if _is_secret_parameter(pair[1], pair[2]) else pair[0]

    return _PAIR.sub(redact_pair, _SECRET_FORMS.sub(REMOVED, text))


def has_secret(value: Any, key: str = "") -> bool:
    """Return True if `redact_secrets` would remove anything."""
    if isinstance(value, Mapping):
        return any(has_secret(item, _find_item_key(key, str(name), item)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return any(has_secret(item, key) for item in value)
    return isinstance(value, str) and redact_secrets(value, key) != value


def _find_item_key(key: str, name: str, item: Any) -> str:
    """Return the name that tells whether an item of a mapping is secret.

    Args:
        key: of the mapping.
        name: of the item in it.
    """
    if key in _SCHEMA_KEYS and isinstance(item, Mapping):
        return ""  # a schema says what a password looks like, and holds none
    if key == "storage_options" and _to_words(name) in _STORE_SECRETS:
        return "secret"
    return key if _is_secret_name(key) else name


def _is_secret_parameter(name: str, value: str) -> bool:
    if value.startswith(("{", REMOVED)):  # a template's place, not a value
        return False
    return _to_words(name) in _SIGNATURES or _is_secret(name, value)


def _is_secret(key: str, value: str) -> bool:
    name = _to_words(key)
    if name.endswith("_token"):
        words = name.removesuffix("_token")
        is_special = any(words == token or words.endswith(f"_{token}") for token in _SPECIAL_TOKENS)
        if is_special or re.fullmatch(r"<.*>|\[.*\]", value):
            return False
    return _is_secret_name(key)


def _is_secret_name(key: str) -> bool:
    name = _to_words(key)
    return any(name == secret or name.endswith(f"_{secret}") for secret in _SECRET_NAMES)


def _to_words(key: str) -> str:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)  # secretKey
    return words.lower().replace("-", "_")
