"""The fake engine: it checks its options as vLLM's does, all at once."""

from __future__ import annotations

import pytest

from dpgen.engine.fake_backend import FakeBackend
from dpgen.engine.messages import EngineSpec
from dpgen.errors import ConfigError


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
