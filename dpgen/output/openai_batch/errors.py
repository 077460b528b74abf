"""Say how vLLM's server would answer a row that has an error: by its type, the status and the name of the error.

The one table from dpgen's error types to HTTP statuses. Rows whose own values are wrong are 400 or 404; those that
failed on the way are 500.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from dpgen.output.column_values import escape_surrogates
from dpgen.records import RowError


class HttpError(NamedTuple):
    """Hold how vLLM's server answers a kind of error.

    Attributes:
        status_code: of HTTP.
        name: vLLM's name of the error.
        param: the field of the request that is to blame; None for none in particular.
    """

    status_code: int
    name: str
    param: str | None = None


_BAD_REQUEST = HttpError(400, "BadRequestError")
_UNKNOWN_MODEL = HttpError(404, "NotFoundError", "model")
_INTERNAL = HttpError(500, "InternalServerError")

HTTP_ERRORS: dict[str, HttpError] = {
    **dict.fromkeys(
        (
            *("bad_request", "unsupported_request", "invalid_text", "wrong_type", "empty_prompt", "empty_completion"),
            *("template_failed", "chat_template_failed", "unsupported_content", "out_of_vocabulary", "bad_sampling"),
            *("bad_tools", "bad_template_kwargs", "media_missing", "media_invalid", "media_too_large"),
            *("media_not_allowed", "media_mismatch"),
        ),
        _BAD_REQUEST,
    ),
    "prompt_too_long": HttpError(400, "BadRequestError", "input_tokens"),
    **dict.fromkeys(("unknown_model", "unknown_adapter"), _UNKNOWN_MODEL),
    **dict.fromkeys(
        (
            *("tokenizer_failed", "render_timeout", "render_crashed", "engine_refused", "poison_row", "decode_failed"),
            *("check_failed", "not_finite", "media_fetch_failed"),
            *("program_failed", "program_timeout", "program_too_many_calls", "program_bad_result", "tool_failed"),
        ),
        _INTERNAL,
    ),
}


def find_http_error(error: RowError) -> HttpError:
    """Return how vLLM's server answers an error; as a fault of its own where the type is of another version."""
    return HTTP_ERRORS.get(error.type, _INTERNAL)


def build_error(error: RowError) -> dict[str, Any]:
    """Return the value of a response line's `error`: vLLM's error response, with dpgen's type as `error_type`."""
    answer = find_http_error(error)
    return {
        "error": {
            "message": escape_surrogates(error.message),
            "type": answer.name,
            "param": answer.param,
            "code": answer.status_code,
            "error_type": error.type,
        }
    }
