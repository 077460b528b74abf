"""The fake engine: its options, checked all at once as vLLM's are, and how often its faults happen over all lives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpgen.engine.fake_backend import FakeBackend
from dpgen.engine.messages import EngineSpec
from dpgen.errors import ConfigError, RowRefused
from dpgen.records import Request, RequestId, RowResult, ServerRequest


def load_backend(**options: Any) -> FakeBackend:
    backend = FakeBackend(EngineSpec("fake", "none", options))
    backend.check_options()
    backend.load(lambda num_bytes: num_bytes)
    return backend


def make_request(row: int) -> Request:
    return Request(RequestId(row), list(f"row {row}".encode()), sampling={"max_tokens": 2})


def test_a_start_fails_as_often_as_max_faults_says(tmp_path: Path) -> None:
    options = {"load_error": "not yet", "max_faults": 2, "fault_dir": str(tmp_path)}
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not yet"):
            load_backend(**options)
    load_backend(**options)


def test_a_row_fails_as_often_as_max_faults_says(tmp_path: Path) -> None:
    options = {"raise_on": "row 1", "max_faults": 1, "fault_dir": str(tmp_path)}
    with pytest.raises(RuntimeError, match="raised by"):
        load_backend(**options).add_request(make_request(1))
    load_backend(**options).add_request(make_request(1))


def test_an_engine_livelocks_once_it_has_finished_enough_rows(tmp_path: Path) -> None:
    backend = load_backend(livelock_after=1, max_faults=1, fault_dir=str(tmp_path))
    for row in range(3):
        backend.add_request(make_request(row))
    num_finished = [len(backend.step()) for _ in range(4)]
    assert num_finished == [0, 3, 0, 0]
    backend.add_request(make_request(3))
    tokens_before = backend.stats().num_generated_tokens
    assert [backend.step() for _ in range(4)] == [[]] * 4
    assert backend.stats().num_generated_tokens == tokens_before, "it says that it gets nowhere"
    assert backend.has_unfinished_requests()


def test_max_faults_without_a_place_to_count_them_is_rejected() -> None:
    with pytest.raises(ConfigError, match="fault_dir"):
        load_backend(max_faults=1)


def test_all_wrong_options_of_an_engine_are_reported_at_once() -> None:
    options = {"max_num_seqs": 0, "max_num_sequences": 3, "top_p": 1}
    with pytest.raises(ConfigError) as raised:
        FakeBackend(EngineSpec("fake", "m", options=options, sampling={"best_of": 1})).check_options()
    assert [mistake.split("; ")[0] for mistake in raised.value.mistakes] == [
        "unknown key 'engine.max_num_sequences'",
        "unknown key 'engine.top_p': write sampling.top_p",
        "unknown key 'sampling.best_of': vLLM has removed it",
        "engine.max_num_seqs=0: must be a whole number of at least 1",
    ]


def test_a_configuration_for_vllm_is_taken() -> None:
    options = {"max_num_seqs": 2, "dtype": "float32", "enable_prefix_caching": True}
    sampling = {"top_k": 5, "structured_outputs": {"json_object": True}}
    backend = FakeBackend(EngineSpec("fake", "m", options=options, sampling=sampling))
    assert backend.check_options() == () and backend.max_num_seqs == 2


@pytest.mark.parametrize("name", ["kv_cache_memory_bytes", "max_num_seqs", "max_model_len", "gpu_memory_utilization"])
def test_an_option_that_is_null_has_its_default(name: str) -> None:
    backend, default = load_backend(**{name: None}), load_backend()
    for one in (backend, default):
        one.add_request(make_request(1))
    assert (backend.step(), backend.stats()) == (default.step(), default.stats())


def test_a_field_of_a_request_that_vllm_does_not_know_costs_its_row() -> None:
    backend = load_backend()
    with pytest.raises(RowRefused, match=r"unknown key 'sampling.max_tokns'; did you mean 'sampling.max_tokens'"):
        backend.add_request(Request(RequestId(1), [1, 2], sampling={"max_tokns": 2}))


@pytest.mark.parametrize("given", [4, 4.0, "4", " 4.0 "])
def test_a_number_is_what_vllm_takes_it_for(given: Any) -> None:
    backend = load_backend()
    sampling = {"max_tokens": given, "n": True, "logprobs": "0", "seed": given}
    backend.add_request(Request(RequestId(1), [1, 2], sampling=sampling))
    [result] = [result for _ in range(4) for result in backend.step()]
    assert isinstance(result, RowResult)
    [completion] = result.completions
    assert (completion.num_tokens, type(completion.num_tokens)) == (4, int), "a truth value can't be written"
    assert completion.text.endswith("-0 4") and completion.logprobs is not None


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"max_tokens": 2.5}, "max_tokens=2.5: must be a whole number"),
        ({"max_tokens": False}, "max_tokens=False: must be at least 1"),
        ({"max_tokens": [4]}, r"max_tokens=\[4\]: must be a whole number"),
        ({"n": 10**30}, "n=10+: must be at most 16384"),
        ({"logprobs": 10**30}, "logprobs=10+: must be at most 256"),
        ({"seed": 2**63}, r"seed=9\d+8: must be from -2\*\*63 to 2\*\*63 - 1"),
        ({"seed": "9" * 30}, r"seed=9+: must be from -2\*\*63 to 2\*\*63 - 1"),
        ({"seed": 2**63 - 1, "n": 2}, r"seed=9\d+7: must be from -2\*\*63 to 2\*\*63 - 2, as the last of n=2"),
    ],
)
def test_a_number_that_vllm_rejects_costs_its_row(sampling: dict[str, Any], message: str) -> None:
    backend = load_backend()
    with pytest.raises(RowRefused, match=f"^{message}") as refused:
        backend.add_request(Request(RequestId(1), [1, 2], sampling={"max_tokens": 2} | sampling))
    assert refused.value.type == "bad_sampling" and not backend.has_unfinished_requests()
    body = {"prompt": "x", **sampling}
    if sampling.keys() != {"logprobs"}:
        request = Request(RequestId(1), [1], sampling={}, server_request=ServerRequest("/v1/completions", body))
        with pytest.raises(RowRefused, match=f"^{message}") as refused:
            backend.add_request(request)
        assert refused.value.type == "bad_request", "as vLLM's server says of a line of a batch file"


@pytest.mark.parametrize("name", ["logprobs", "n"])
def test_a_bad_number_costs_its_row_and_not_the_engine(name: str) -> None:
    backend = load_backend()
    for count in (-1, "many"):
        with pytest.raises(RowRefused, match=f"{name}="):
            backend.add_request(Request(RequestId(1), [1, 2], sampling={"max_tokens": 2, name: count}))
    assert not backend.has_unfinished_requests()
