"""Write batch files, and read response files as users of the `openai` package do."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


def make_chat(custom_id: str, text: str = "hello", model: str = "none", **body: Any) -> str:
    """Return a request for a chat."""
    messages = [{"role": "user", "content": text}]
    body = {"model": model, "messages": messages, "max_tokens": 8, **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body})


def make_completion(custom_id: str, prompt: Any = "hello", model: str = "none", **body: Any) -> str:
    """Return a request for a completion."""
    body = {"model": model, "prompt": prompt, "max_tokens": 8, **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": COMPLETIONS, "body": body})


def make_embeddings(custom_id: str, model: str = "none", **body: Any) -> str:
    """Return a request for embeddings."""
    body = {"model": model, "input": "hello", **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": EMBEDDINGS, "body": body})


def make_numbered_requests(count: int) -> list[str]:
    """Return requests whose prompts differ: two chats, then a completion, and so on."""
    makers = (make_chat, make_chat, make_completion)
    return [makers[number % 3](f"request-{number}", f"row number {number}") for number in range(count)]


def write_batch(path: Path, lines: Sequence[str]) -> Path:
    """Write a batch file, and return it."""
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def read_responses(path: Path) -> list[dict[str, Any]]:
    """Return a response file's lines, after parsing each answer with OpenAI's own types."""
    from openai.types import Completion, CreateEmbeddingResponse
    from openai.types.chat import ChatCompletion

    types = {"chat.completion": ChatCompletion, "text_completion": Completion, "list": CreateEmbeddingResponse}
    responses = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    for response in responses:
        body = response["response"]["body"]
        if body is not None:
            types[body["object"]].model_validate(decode_embeddings(body))
        assert (body is None) == (response["error"] is not None) == (response["response"]["status_code"] != 200)
    return responses


def decode_embeddings(body: dict[str, Any]) -> dict[str, Any]:
    """Return a response body whose embeddings are numbers, as the `openai` package makes them of base64."""
    if body["object"] != "list":
        return body
    data = [{**item, "embedding": _decode(item["embedding"])} for item in body["data"]]
    return {**body, "data": data}


def _decode(embedding: list[float] | str) -> list[float]:
    if isinstance(embedding, list):
        return embedding
    return [float(number) for number in np.frombuffer(base64.b64decode(embedding), "<f4")]


def drop_creation(response: dict[str, Any]) -> dict[str, Any]:
    """Return a response without what differs between two runs that are the same."""
    body = response["response"]["body"]
    kept = None if body is None else {key: value for key, value in body.items() if key != "created"}
    return {**response, "response": {**response["response"], "body": kept}}
