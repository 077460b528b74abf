"""Say in one line why a store refuses or fails, and what to do about it, whatever package talks to it."""

from __future__ import annotations

from typing import Any

from dpgen.config.secrets import redact_text
from dpgen.data.hub import explain_hub_error, iter_causes

_NO_CREDENTIALS: tuple[str, ...] = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "DefaultCredentialsError",
    "ProfileNotFound",
)
_NO_CREDENTIALS += ("CredentialRetrievalError", "TokenRetrievalError", "UnauthorizedSSOTokenError")
_REFUSED_CREDENTIALS = (
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
)
_WRONG_REGION = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301")
_UNREACHABLE: tuple[str, ...] = (
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ConnectTimeout",
    "ConnectError",
    "ClientConnectorError",
)
_UNREACHABLE += ("ClientConnectorDNSError", "gaierror", "ReadTimeoutError", "ServerTimeoutError", "FSTimeoutError")
_UNREACHABLE += ("ConnectionTimeoutError", "SocketTimeoutError", "ServerDisconnectedError", "ProxyConnectionError")
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, on every node, or {key}={{anon: true}} "
    "for a public bucket",
    "gs": "log in (`gcloud auth application-default login`), set GOOGLE_APPLICATION_CREDENTIALS on every node, or "
    "{key}={{token: anon}} for a public bucket",
    "az": "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, on every "
    "node",
    "hf": "log in (`hf auth login`, or set HF_TOKEN) on every node",
}
_FAMILIES = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "adl": "az"}


def explain_store_error(scheme: str, error: BaseException, key: str) -> str:
    """Return why a store refused or failed, and what to do.

    Args:
        scheme: of the address, e.g. "s3".
        key: the configuration key with the store's options.
    """
    causes = list(iter_causes(error))
    if scheme == "hf" and (reason := explain_hub_error("the repository", error, "dataset")) is not None:
        return reason
    names = {base.__name__ for cause in causes for base in type(cause).__mro__}
    codes = [code for cause in causes if (code := _find_code(cause))]
    statuses = [status for cause in causes if (status := _find_status(cause))]
    advice = _CREDENTIALS.get(_FAMILIES.get(scheme, scheme), "set its credentials in {key}").format(key=key)
    if names.intersection(_NO_CREDENTIALS):
        return f"there are no credentials for it: {advice}"
    if refused := [code for code in codes if code in _REFUSED_CREDENTIALS]:
        return f"the store refuses the credentials ({refused[0]}): {advice}"
    if any(code in _WRONG_REGION for code in codes) or 301 in statuses:
        option = f"{key}={{client_kwargs: {{region_name: NAME}}}}"
        return f"the bucket is in another region: set AWS_DEFAULT_REGION, or {option}"
    if "NoSuchBucket" in codes or any("bucket does not exist" in str(cause) for cause in causes):
        return "there is no such bucket"
    if "PermissionError" in names or {401, 403}.intersection(statuses):
        status = next((status for status in statuses if status in (401, 403)), 403)
        return f"the store refuses access (status {status}): check the permissions, or {advice}"
    if 404 in statuses or "NoSuchKey" in codes:
        return "there is no such object"
    text = _summarize(causes)
    if isinstance(error, TypeError):
        return f"{key}: {text}"
    if names.intersection(_UNREACHABLE) or (names & {"ConnectionError", "TimeoutError"}):
        return f"the store can't be reached ({text}): check the address, {key}, and the network of this node"
    if failed := [status for status in statuses if status >= 500 or status == 429]:
        return f"the store fails or is busy (status {failed[0]}); start again later"
    return "there is no such object" if "FileNotFoundError" in names else text


def is_lasting(error: BaseException) -> bool:
    """Return True if the same call would fail again at once: what is asked for is not there, or not allowed."""
    causes = list(iter_causes(error))
    if any(isinstance(cause, (PermissionError, IsADirectoryError, NotADirectoryError)) for cause in causes):
        return True
    statuses = [status for cause in causes if (status := _find_status(cause))]
    if any(status >= 500 or status in (408, 429) for status in statuses):
        return False
    return bool(statuses) or isinstance(error, FileNotFoundError)


def _find_code(error: BaseException) -> str | None:
    """Return the code of an error of S3."""
    response: Any = getattr(error, "response", None)
    details = response.get("Error") if isinstance(response, dict) else None
    return str(details.get("Code", "")) if isinstance(details, dict) else None


def _find_status(error: BaseException) -> int | None:
    """Return the HTTP status of an error, of whichever package."""
    response: Any = getattr(error, "response", None)
    metadata = response.get("ResponseMetadata") if isinstance(response, dict) else None
    name = next((name for name in ("status", "status_code", "code") if hasattr(error, name)), "")
    places = [
        getattr(error, name, None),
        getattr(response, "status_code", None),
        (metadata or {}).get("HTTPStatusCode"),
    ]
    return next((place for place in places if isinstance(place, int) and 100 <= place < 600), None)


def _summarize(causes: list[BaseException]) -> str:
    """Return the first line of the innermost cause that says something."""
    for cause in reversed(causes):
        text = (getattr(cause, "strerror", None) or str(cause)).strip()
        if text:
            return redact_text(text.splitlines()[0])
    return type(causes[0]).__name__
