"""Configuration: precedence, and an error that helps for each thing that can be wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dpgen.config import loader, schema
from dpgen.errors import ConfigError

BASE = """
run: {dir: out}
model: some/model
data: {path: rows.jsonl, prompt_column: prompt}
"""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., schema.Config]:
    def load(*overrides: str, text: str = BASE) -> schema.Config:
        path = tmp_path / "a.yaml"
        path.write_text(text)
        return loader.load([str(path)], list(overrides))

    return load


def test_later_yaml_wins_over_earlier_and_the_command_line_over_both(tmp_path: Path) -> None:
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text(BASE + "engine: {max_num_seqs: 1, max_model_len: 10}\nsampling: {temperature: 0.1}\n")
    second.write_text("engine: {max_num_seqs: 2}\nsampling: {temperature: 0.2}\n")
    found = loader.load([str(first), str(second)], ["sampling.temperature=0.3"])
    assert found.engine == {"max_num_seqs": 2, "max_model_len": 10}
    assert found.sampling == {"temperature": 0.3}
    assert found.run.seed == 0, "a default stands where nothing was given"


WRONG = [
    ("data.promt_column=x", "unknown key 'data.promt_column'; did you mean 'data.prompt_column'"),
    ("prompt_column=x", "did you mean 'data.prompt_column'"),
    ("dta.path=x", "did you mean 'data.path'"),
    ("run=3", "run is a section of keys"),
    ("run.seed=abc", "'abc'.*Integer.*run.seed"),
    ("run.seed=-1", "run.seed is -1"),
    ("run.resume=sometimes", "'auto', 'never', 'force'"),
    ("run.retry_errors=poison_row", "must be true, false, or a list"),
    ("run.time_limit=soon", "must be seconds, or H:MM:SS"),
    ("run.engine=tgi", "'vllm', 'fake'"),
    ("run.dir=", "run.dir"),
    ("run.progress_interval_s=0", "at least 0.1"),
    ("data.path=[1]", "data.path is"),
    ("data.path=[]", "data.path is"),
    ("data.limit=-1", "data.limit is -1; it must be at least 0"),
    ("data.limit=1.5", "Integer.*data.limit"),
    ("data.select=a:b", "data.select is 'a:b'; it must look like"),
    ("data.select=0:9:0", "step must be at least 1"),
    ("data.messages_column=m", "data.prompt_column and data.messages_column are set"),
    ("data.prompt_column=null", "exactly one of data.prompt_column, .* none is set"),
    ("data.system_prompt=Hello", "data.system_prompt needs a chat"),
    ("data.chat_template_kwargs=[1]", "data.chat_template_kwargs"),
    ("engine=3", "engine"),
    ("engine.model=x", "engine.model is set by model"),
    ("engine.seed=1", "engine.seed is set by run.seed"),
    ("engine.tensor_parallel_size=2", "parallel.tensor_parallel_size"),
    ("engine.data_parallel_size=2", "dpgen's ranks"),
    ("sampling.seed=1", "set run.seed"),
    ("sampling.from_columns=[a]", "maps a sampling field to a column"),
    ("sampling_byrank=[{n: 2}]", "did you mean 'sampling_by_rank'"),
    ("sampling_by_rank=3", "sampling_by_rank=3"),
    ("sampling_by_rank={temperature: 1}", "sampling_by_rank is a list of sections"),
    ("sampling_by_rank.0.temperature=1", "sampling_by_rank is a list of sections"),
    ("sampling_by_rank=[1]", r"sampling_by_rank=\[1\]"),
    ("sampling_by_rank=[{}, {seed: 1}]", r"sampling_by_rank\[1\].seed can't be set: .*run.seed"),
    ("sampling_by_rank=[{n: 2}]", r"sampling_by_rank\[0\].n can't be set: .*sampling.n"),
    ("sampling_by_rank=[{from_columns: {n: n}}]", r"\[0\].from_columns can't be set: sampling.from_columns"),
    ("work.claim_rows=0", "work.claim_rows is 0"),
    ("output.format=csv", "'parquet', 'jsonl'"),
    ("output.gather_bytes=10", "output.gather_bytes"),
    ("parallel.tensor_parallel_size=0", "at least 1"),
    ("run.seed=[", "not valid YAML"),
    ("nonsense", "neither a YAML file nor key=value"),
    ("model=", "model"),
]


@pytest.mark.parametrize(("override", "words"), WRONG, ids=[each[0] for each in WRONG])
def test_a_wrong_value_is_refused_in_one_clear_line(
    load: Callable[..., schema.Config], override: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        load(override)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: {dir: x}\nmodel: m\n", "missing: data.path"),
        ("- a\n- b\n", "must hold sections"),
        ("run: {dir: x\n", "not valid YAML.*line"),
        ("run: {dirr: x}\n", "did you mean 'run.dir'"),
    ],
)
def test_a_wrong_file_is_refused(load: Callable[..., schema.Config], text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(text=text)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no such configuration file: nowhere\.yaml"):
        loader.load(["nowhere.yaml"], [])


def test_the_dumped_configuration_holds_no_secret_and_loads_again(
    load: Callable[..., schema.Config], tmp_path: Path
) -> None:
    found = load(
        "engine.hf_token=hf_abc", "engine.max_num_seqs=3", "sampling.max_tokens=7", "sampling.stop_token_ids=[1]"
    )
    text = schema.to_yaml(found)
    assert "hf_abc" not in text
    assert yaml.safe_load(text)["sampling"] == {"max_tokens": 7, "stop_token_ids": [1]}
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert loader.load([str(again)], ["engine.hf_token=hf_abc"]) == found


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.select=10:20", "10:20"),  # in YAML 1.1 that is 620
        ("run.dir=010", "010"),
        ("data.prompt_column=yes", "yes"),
        ("model=1e3", "1e3"),
        ("data.path=out/a b", "out/a b"),
        ("data.path=[a,b]", ["a", "b"]),
        ("data.limit=null", None),
    ],
)
def test_a_text_on_the_command_line_is_taken_as_it_stands(
    load: Callable[..., schema.Config], override: str, value: object
) -> None:
    section, _, key = override.partition("=")[0].partition(".")
    found = getattr(load(override), section)
    assert (getattr(found, key) if key else found) == value


def test_a_template_needs_no_quoting_and_may_hold_dollars(load: Callable[..., schema.Config]) -> None:
    template = "Price: ${{ price }} or ${y}: {{ question }}"
    found = load("data.prompt_column=null", f"data.template={template}")
    assert found.data.template == template
    in_yaml = load(text=BASE.replace("prompt_column: prompt", f"template: '{template}'"))
    assert in_yaml.data.template == template
    assert yaml.safe_load(schema.to_yaml(in_yaml))["data"]["template"] == template


def test_a_later_list_of_sampling_by_rank_takes_the_place_of_an_earlier_one(
    load: Callable[..., schema.Config],
) -> None:
    found = load("sampling_by_rank=[{top_p: 0.5}]", text=BASE + "sampling_by_rank: [{temperature: 0.2}, {}]\n")
    assert found.sampling_by_rank == [{"top_p": 0.5}]


def test_ranges() -> None:
    rows = list(range(100))
    assert rows[schema.parse_range("10:20")] == rows[10:20]
    assert rows[schema.parse_range(":5")] == rows[:5]
    assert rows[schema.parse_range("::25")] == rows[::25]
