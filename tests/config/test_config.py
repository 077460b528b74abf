"""Configuration: precedence, and a helpful error for each mistake, all mistakes at once."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers.jobs import REPO

from dpgen.config import checks, loader, options, schema
from dpgen.errors import ERROR_TYPES, ConfigError

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


def test_a_later_file_overrides_an_earlier_one_and_the_command_line_overrides_both(tmp_path: Path) -> None:
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text(BASE + "engine: {max_num_seqs: 1, max_model_len: 10}\nsampling: {temperature: 0.1}\n")
    second.write_text("engine: {max_num_seqs: 2}\nsampling: {temperature: 0.2}\n")
    config = loader.load([str(first), str(second)], ["sampling.temperature=0.3"])
    assert config.engine == {"max_num_seqs": 2, "max_model_len": 10}
    assert config.sampling == {"temperature": 0.3}
    assert config.run.seed == 0, "a key that no layer sets keeps its default"


WRONG = [
    ("data.promt_column=x", "unknown key 'data.promt_column'; did you mean 'data.prompt_column'"),
    ("prompt_column=x", "did you mean 'data.prompt_column'"),
    ("dta.path=x", "did you mean 'data.path'"),
    ("run=3", "run is a section of keys"),
    ("run.seed=abc", "'abc'.*Integer.*run.seed"),
    ("run.seed=-1", "run.seed=-1: must be from 0"),
    ("run.resume=sometimes", "'auto', 'never', 'force'"),
    ("run.retry_errors=poison_row", "must be true, false, or a list"),
    ("run.retry_errors=[poison_rwo]", "no error type 'poison_rwo'; did you mean 'poison_row'"),
    ("run.time_limit=soon", "must be seconds, or H:MM:SS"),
    ("run.engine=tgi", "'vllm', 'fake'"),
    ("run.log_format=xml", "'text', 'json'"),
    ("run.dir=", "run.dir='': must be the directory"),
    ("run.progress_interval_s=0", "at least 0.1"),
    ("data.path=[[1]]", r"data.path=\[\[1\]\]: must be a path"),
    ("data.split=", "data.split='': must be a text, or null"),
    ("run.seed=", "run.seed has no value; leave the key out, or write null"),
    ("sampling.max_tokens=", "sampling.max_tokens has no value"),
    ("model.name=x", "model is a text, not a section: model=TEXT"),
    ("engine=null", "engine is a section of keys"),
    ("sampling.stop=", "sampling.stop has no value"),
    ("sampling.stop=### Human", "YAML reads a comment, and no value; for the text write 'sampling.stop=\"### Human\"'"),
    ("sampling.stop=END # now", "YAML reads 'END' and drops the rest as a comment; for the text write"),
    ("sampling.stop=[### Human]", "not valid YAML: .*; put each text in it in quotes"),
    ("sampling.stop=Question:", r"YAML reads \{'Question': None\}; for the text write 'sampling.stop=\"Question:\"'"),
    ("sampling.stop=[Question:, A]", r"YAML reads \{'Question': None\}; for the text write 'Question:'"),
    ("sampling.stop=[Q: x]", r"""YAML reads \{'Q': 'x'\}, no text; .* 'sampling.stop=\["Q: x"\]'"""),
    ("sampling.stop=- a", "YAML reads .'a'.; for the text write 'sampling.stop=\"- a\"'"),
    ("sampling.stop=[a, null]", "YAML reads None, no text; quotes make it one: 'sampling.stop=..null"),
    ("sampling_by_rank=[{stop: [[true]]}]", r"sampling_by_rank\[0\].stop: YAML reads \[True\]"),
    ("sampling.stop=\n", r"sampling.stop=\\n: YAML reads no value; for the text write 'sampling.stop=\"\\n\"'"),
    (r"sampling.stop=\n", r"for a line break or a tab write 'sampling.stop=\"\\n\"'"),
    (r"sampling.stop=[a, '\n\n']", r"\\n is a backslash and a letter here"),
    (r"sampling.stop=\t", r"\\t is a backslash and a letter here"),
    (r"data.template=Q: {{ question }}\nA:", r"write, in bash, \$'data.template=Q: {{ question }}\\nA:'"),
    (r"data.system_prompt=Be brief.\nBe kind.", r"write, in bash, \$'data.system_prompt=Be brief.\\nBe kind.'"),
    ("sampling.stop=end ", "YAML reads 'end'; for the text write 'sampling.stop=\"end \"'"),
    ("sampling.stop={{ q }}", "begins a YAML mapping; for the text write 'sampling.stop=\"{{ q }}\"'"),
    *(
        (f"sampling.stop={text}", f"for the text write .*{text[0]}" if text[0] not in "|*" else "for the text write")
        for text in ("*a", "&a", "&nbsp; x", "!a", "%a", "@a", "`", "|", ">", "---", "...", "'a", '"a')
    ),
    ("data.chat_template_kwargs={enable_thinking:false}", "a blank is missing .* write enable_thinking: false"),
    ("data.chat_template_kwargs=enable_thinking:false", "a blank is missing after the colon"),
    ("data.chat_template_kwargs={enable_thinking}", r"YAML reads \{'enable_thinking': None\}"),
    ("data.chat_template_kwargs={enable_thinking: no}", "no is a text here, not false; write false"),
    ("data.chat_template_kwargs.enable_thinking=On", "On is a text here, not true; write true"),
    ("engine.enforce_eager=no", "no is a text here, not false; write false"),
    ("engine.max_num_seqs=1_000", "1_000 is a text here, not 1000; write 1000"),
    ("sampling={n: 1, n: 2}", "sampling.n is there twice"),
    ("data.limit=1.5e0", "Integer.*data.limit"),
    (f"data.limit={'9' * 5000}", "data.limit=999"),
    (f"sampling.stop={'[' * 5000}", "too deep a list"),
    ("data.path=[]", r"data.path=\[\]: must be a path"),
    ("data.limit=-1", "data.limit=-1: must be at least 0"),
    ("data.limit=1.5", "Integer.*data.limit"),
    ("data.select=a:b", "data.select='a:b': must look like"),
    ("data.select=0:9:0", "step must be at least 1"),
    ("data.messages_column=m", "data.prompt_column and data.messages_column are set"),
    ("data={path: a.csv, prompt_column: null}", "exactly one of data.prompt_column, .* none is set"),
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
    *(
        (f"sampling_by_rank={text}", f"sampling_by_rank={re.escape(text)}: sampling_by_rank is a list of sections")
        for text in ("[1]", "null", "[null]", "[[]]")
    ),
    ("sampling_by_rank=[{}, {seed: 1}]", r"sampling_by_rank\[1\].seed can't be set: .*run.seed"),
    ("sampling_by_rank=[{n: 2}]", r"sampling_by_rank\[0\].n can't be set: .*sampling.n"),
    ("sampling_by_rank=[{from_columns: {n: n}}]", r"\[0\].from_columns can't be set: sampling.from_columns"),
    ("sampling.logprobs=-1", "sampling.logprobs=-1: must be how many .* not -1 for the whole vocabulary"),
    ("sampling.prompt_logprobs=true", "sampling.prompt_logprobs=True: must be how many of the most likely tokens"),
    ("sampling_by_rank=[{logprobs: many}]", r"sampling_by_rank\[0\].logprobs='many': must be how many"),
    ("work.claim_rows=0", "work.claim_rows=0: must be at least 1"),
    ("output.format=csv", "'parquet', 'jsonl'"),
    ("output.gather_bytes=10", "output.gather_bytes=10: must be at least 65536"),
    ("parallel.tensor_parallel_size=0", "at least 1"),
    ("run.seed=[", "not valid YAML"),
    ("nonsense", "neither a YAML file nor key=value"),
    # Slips of a hand, and forms of other tools.
    ("sampling.stop=“Question:”", "“ is no quote in YAML: write ' or \""),
    ("sampling.stop=[‘a’, b]", "‘ is no quote in YAML"),
    ('sampling.stop=a"', "a quote is lost: the text ends in \" .* write 'a\"'"),
    ("sampling.n=2\u00a0", r"U\+00A0 looks like a blank and is none"),
    ("sampling.stop=None", "None is a text here, not null; write null"),
    ("data.split=None", "None is a text here, not null; write data.split=null"),
    ("run.dir=None", "None is a text here, not null; give a value"),
    ("engine.hf_overrides={'a': None}", "None is a text here, not null"),
    ("run.dir='out'", "the quotes are a part of the text here; write the text without them"),
    ("data.template=“{{ q }}”", "the quotes are a part of the text here"),
    ("run.dir==out", "two equals signs; write run.dir=out"),
    ("sampling.stop=???", r"sampling.stop: \?\?\? stands for a value that is missing"),
    ("engine={x: ['???']}", r"engine.x.0: \?\?\? stands for a value that is missing"),
    ("data.limit=???", r"data.limit: \?\?\? stands for a value that is missing"),
    (r"sampling.stop=\x0a", r"for the character write 'sampling.stop=\"\\n\"'"),
    (r"sampling.stop=[\u003c]", 'for the character write the item as "<", in double quotes'),
    ("sampling.stop=café\udce9", "is no UTF-8"),
    ("run.dir=café\udce9", "is no UTF-8"),
    ("data.path=café\udce9", r"is no UTF-8: name the file by a pattern, \? for such a byte"),
    ('sampling.stop="\\ud83d"', "half of a surrogate pair"),
    ("sampling={n=2}", "a key and its value are written n: 2, not n=2"),
    ("sampling=n: 2", "for a mapping write 'sampling={n: 2}'"),
    ("sampling={logit_bias: {1: 2, 1.0: 3}}", "sampling.logit_bias.1.0 is there twice"),
    ("sampling.stop='a', 'b'", "text follows the closing quote; for the text write"),
    ("+run.seed=2", "nor key=value; write run.seed=2"),
    ("~run.seed", "no key can be removed: write run.seed=null"),
    ("run.seed =2", "write run.seed=2"),
    ("run.seed: 2", "write run.seed=2"),
    ("--engine.max-num-seqs=2", "write engine.max_num_seqs=2"),
    ("sampling..n=2", r"nor key=value$"),
    ("sampling.stop=${nothing}", r"not found \(for a literal \${ write \\\${\)"),
    ("sampling.stop=${oc.env:DPGEN_NOT_SET}", "the environment variable DPGEN_NOT_SET is not set"),
    ("sampling.stop=${PATH}", r"for an environment variable write \${oc.env:PATH}"),
    ("data.columns=a", r"data.columns is a list of names: data.columns=\[NAME, ...\]"),
    ("data.columns=[[a]]", "data.columns is a list of names"),
    ("data.as_chat=2", "data.as_chat=2: must be true or false"),
    ("data.render_timeout_s=.inf", r"data.render_timeout_s=inf: must be below 1e\+09"),
    ("output.rows_per_file=1e30", "output.rows_per_file=.*: must be below"),
    ("data.limit=.nan", "Integer.*data.limit"),
    ("run.stop_margin_s=nan", "must be at least 0"),
    ("work=x", "work is a section of keys, not a value: work.KEY=VALUE"),
    ("work=steal:false", "a blank is missing after the colon of 'steal:false'"),
    ("DATA.LIMIT=3", "did you mean 'data.limit'"),
    ("engine_max=3", "unknown key 'engine_max'"),
    ("model=", "model='': must be a directory or a Hub name"),
    ("lora=adapters/math", "lora is a section of keys, not a value: lora.KEY=VALUE"),
    ("lora.math=", "lora.math has no value"),
    ("lora.math.path=x", "lora.math=.*: must be the adapter's directory or Hub name"),
    ("lora={'': x}", "an adapter needs a name"),
    ("lora={a: x, b: y}", r"lora holds 2 adapters \(a, b\): data.lora_column must name the column"),
    ("data.lora_column=kind", "data.lora_column needs lora, the adapters by name"),
    ("data.lora_column=", "data.lora_column='': must be a text, or null"),
    ("lora_column=kind", "did you mean 'data.lora_column'"),
]


@pytest.mark.parametrize(("override", "words"), WRONG, ids=[override for override, _ in WRONG])
def test_a_wrong_value_is_rejected_in_one_clear_line(
    load: Callable[..., schema.Config], override: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        load(override)
    assert "\n" not in str(raised.value), "one mistake is one line"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: {dir: x}\nmodel: m\n", "missing: data.path"),
        ("- a\n- b\n", "must hold sections"),
        ("run: {dir: x\n", r"a.yaml:1:6: the { is not closed"),
        ("run: {dirr: x}\n", "did you mean 'run.dir'"),
        (BASE + "run.seed: 1\n", r"'run.seed' must be a key of its section: run: {seed: VALUE}"),
        (BASE + "nonsense: {}\n", "unknown key 'nonsense'"),
    ],
)
def test_a_wrong_file_is_rejected(load: Callable[..., schema.Config], text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(text=text)


def test_a_missing_file_is_named() -> None:
    for name in ("nowhere.yaml", "conf.yaml.bak", "questions.jsonl", "data.jsonl", "model.safetensors"):
        with pytest.raises(ConfigError, match=rf"no such configuration file: {re.escape(name)}$"):
            loader.load([name], [])
    for key in ("data.limit", "engine.max_model_len", "sampling.n"):
        with pytest.raises(ConfigError, match=rf"file: {key}; a key is written {key}=VALUE"):
            loader.load_from_args([key, "10"])


def mistakes_of(load: Callable[..., schema.Config], *overrides: str, text: str = BASE) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as raised:
        load(*overrides, text=text)
    headline, *lines = str(raised.value).splitlines()
    assert headline == f"{len(lines)} mistakes in the configuration:"
    assert [line.strip() for line in lines] == list(raised.value.mistakes), "one line for each mistake"
    return raised.value.mistakes


def test_unknown_keys_and_wrong_types_of_all_layers_are_reported_at_once(
    load: Callable[..., schema.Config], tmp_path: Path
) -> None:
    text = BASE + "work: {order: random, stel: false}\nparalel: {lock_step: true}\n"
    mistakes = mistakes_of(load, "run.sed=1", "data.limit=few", "sampling_by_rank={n: 1}", text=text)
    path = tmp_path / "a.yaml"
    for mistake, words in zip(
        mistakes,
        [
            f"{path}:5: unknown key 'work.stel'; did you mean 'work.steal'?",
            f"{path}:6: unknown key 'paralel.lock_step'; did you mean 'parallel.lock_step'?",
            f"{path}:5: Invalid value 'random'",
            "run.sed=1: unknown key 'run.sed'; did you mean 'run.seed'?",
            "data.limit=few: Value 'few'",
            "sampling_by_rank={n: 1}: sampling_by_rank is a list of sections",
        ],
        strict=True,
    ):
        assert mistake.startswith(words)


def test_wrong_values_and_contradictions_are_reported_at_once(load: Callable[..., schema.Config]) -> None:
    mistakes = mistakes_of(
        load,
        *("run.seed=-1", "run.time_limit=soon", "data.limit=-1", "data.select=a:b", "engine.model=x"),
        *("sampling.seed=1", "sampling_by_rank=[{n: 2}]", "parallel.lock_step=true", "data.messages_column=m"),
        "data.continue_final_message=true",
    )
    starts = ["data.limit=-1", "run.seed=-1", "run.time_limit", "data.select='a:b'", "engine.model", "sampling.seed"]
    starts += [
        "sampling_by_rank[0].n",
        "parallel.lock_step=true",
        "data.prompt_column and",
        "data.continue_final_message=true",
    ]
    for mistake, start in zip(mistakes, starts, strict=True):
        assert mistake.startswith(start)


def test_log_probabilities_that_the_users_own_limit_forbids_are_refused_with_what_to_write(
    load: Callable[..., schema.Config],
) -> None:
    with pytest.raises(ConfigError, match=r"engine.max_logprobs=10 allows fewer; .* set it to 30"):
        load("sampling.logprobs=30", "engine.max_logprobs=10")
    load("sampling.logprobs=30", "engine.max_logprobs=-1")
    load("sampling.logprobs=30")


def test_prompts_whose_log_probabilities_are_computed_are_not_ordered_for_the_prefix_cache(
    load: Callable[..., schema.Config],
) -> None:
    assert load().reads_prefix_cache and load("sampling.logprobs=1").reads_prefix_cache
    for override in ("engine.enable_prefix_caching=false", "sampling.prompt_logprobs=0", "data.completion_column=a"):
        assert not load(override).reads_prefix_cache, "vLLM computes such prompts whole"


def test_keys_that_scoring_would_ignore_are_refused(load: Callable[..., schema.Config]) -> None:
    with pytest.raises(ConfigError) as raised:
        load("data.completion_column=answer", "sampling={temperature: 1, n: 2}", "sampling_by_rank=[{logprobs: 1}]")
    assert [line.partition(" has no effect: data.completion_column")[0] for line in raised.value.mistakes] == [
        *("sampling.temperature", "sampling.n", "sampling_by_rank[0].logprobs")
    ]
    load("data.completion_column=answer", "sampling.prompt_logprobs=3")
    output = "output={explode: true, parse: json, token_ids: true, reasoning: strip, format: jsonl}"
    with pytest.raises(ConfigError) as raised:
        load("data.completion_column=answer", output)
    assert [line.partition(" has no effect: data.completion_column")[0] for line in raised.value.mistakes] == [
        *("output.token_ids", "output.explode", "output.reasoning", "output.parse")
    ]


def test_wrong_values_are_reported_beside_unknown_and_missing_keys(
    load: Callable[..., schema.Config], tmp_path: Path
) -> None:
    text = "run: {dir: x, seed: -1}\ndata: {prompt_column: p}\n"
    assert mistakes_of(load, "engin.x=1", text=text) == (
        "engin.x=1: unknown key 'engin.x'; did you mean 'engine'?",
        "missing: data.path, model; set them in a YAML file or as data.path=VALUE "
        f"({options.describe_option('data.path')})",
        f"run.seed=-1: must be from 0 to 2**63 - 1, or null ({tmp_path / 'a.yaml'}:1)",
    )


def test_a_wrong_value_names_the_line_that_set_it_last(load: Callable[..., schema.Config], tmp_path: Path) -> None:
    text = BASE + "sampling_by_rank:\n  - temperature: 1\n  - seed: 1\n"
    with pytest.raises(ConfigError, match=r"^sampling_by_rank\[1\].seed can't be set: .* \(.*a.yaml:7\)$"):
        load(text=text)
    with pytest.raises(ConfigError, match=r"^sampling_by_rank\[1\].seed can't be set: .* COLUMN}$"):
        load("sampling_by_rank=[{}, {seed: 2}]", text=text)
    with pytest.raises(ConfigError, match=r"^data.split='': must be a text, or null for none$"):
        load("data.split=")


@pytest.mark.parametrize(
    ("text", "overrides", "why"),
    [
        ("run: {dirr: x}\nmodel: m\ndata: {path: p, prompt_column: p}\n", [], "run.dir is not missing but misspelt"),
        ("run: {dir: [x]}\nmodel: m\ndata: {path: p, prompt_column: p}\n", [], "run.dir is wrong, not missing"),
        ("run: {dir: x}\nmodel: m\ndata: {path: p, promt_column: p}\n", [], "a prompt is there, but misspelt"),
        ("", ["nowhere.yaml"], "the keys may be in the file that is not there"),
    ],
)
def test_what_may_follow_from_a_mistake_is_not_reported_beside_it(
    tmp_path: Path, text: str, overrides: list[str], why: str
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        loader.load_from_args([str(path), *overrides])
    assert len(raised.value.mistakes) == 1, why


def test_several_mistakes_survive_pickling() -> None:
    error = ConfigError("a=1: must be 2", "b=1: must be 2")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_the_dumped_configuration_holds_no_secret_and_loads_again(
    load: Callable[..., schema.Config], tmp_path: Path
) -> None:
    config = load(
        "engine.hf_token=hf_abc", "engine.max_num_seqs=3", "sampling.max_tokens=7", "sampling.stop_token_ids=[1]"
    )
    text = schema.to_yaml(config)
    assert "hf_abc" not in text
    assert yaml.safe_load(text)["sampling"] == {"max_tokens": 7, "stop_token_ids": [1]}
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert loader.load([str(again)], ["engine.hf_token=hf_abc"]) == config


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
        ("data.split=~", None),
        ("data.split=NULL", None),
        ("lora.a=007", {"a": "007"}),
        ("lora={a: 1e3}", {"a": "1e3"}),
    ],
)
def test_a_text_on_the_command_line_is_taken_as_it_stands(
    load: Callable[..., schema.Config], override: str, value: object
) -> None:
    section, _, key = override.partition("=")[0].partition(".")
    body = getattr(load(override), section)
    assert (getattr(body, key) if key and section != "lora" else body) == value


@pytest.mark.parametrize("text", ["007", "1e3", "true", ".5", "0x10", "<<", "${", "$${{ x }}", "a=b", "</s>", "12:30"])
def test_a_stop_string_is_the_text_that_is_written(load: Callable[..., schema.Config], text: str) -> None:
    assert load(f"sampling.stop={text}").sampling == {"stop": text}
    config = load(text=BASE + f"sampling_by_rank:\n- bad_words:\n  - {text}\n")
    assert config.sampling_by_rank == [{"bad_words": [text]}]
    assert load(text=schema.to_yaml(config)) == config, "the resolved configuration is read as the same"


def test_a_required_value_may_be_marked_as_missing_for_another_source_to_give(
    load: Callable[..., schema.Config],
) -> None:
    text = BASE.replace("some/model", "???")
    assert load("model=m", text=text).model == "m"
    with pytest.raises(ConfigError, match="missing: model"):
        load(text=text)


def test_run_retry_errors_takes_each_error_type_that_a_row_can_get() -> None:
    source = "".join(path.read_text() for path in (REPO / "dpgen").rglob("*.py"))
    raised = set(re.findall(r'(?:RowRefused|RowError|make_rejected_result)\(\s*"(\w+)"', source))
    assert {"wrong_type", "poison_row"} <= raised <= set(ERROR_TYPES)
    assert all(f"`{name}`" in (REPO / "conf" / "README.md").read_text() for name in ERROR_TYPES)


def test_a_template_needs_no_quoting_and_may_hold_dollars(load: Callable[..., schema.Config]) -> None:
    template = "Price: ${{ price }} or ${y}: {{ question }}"
    config = load("data.prompt_column=null", f"data.template={template}")
    assert config.data.template == template
    in_yaml = load(text=BASE.replace("prompt_column: prompt", f"template: '{template}'"))
    assert in_yaml.data.template == template
    assert yaml.safe_load(schema.to_yaml(in_yaml))["data"]["template"] == template


def test_a_later_list_of_sampling_by_rank_replaces_an_earlier_one(
    load: Callable[..., schema.Config],
) -> None:
    config = load("sampling_by_rank=[{top_p: 0.5}]", text=BASE + "sampling_by_rank: [{temperature: 0.2}, {}]\n")
    assert config.sampling_by_rank == [{"top_p": 0.5}]


def test_a_range_selects_what_a_slice_selects() -> None:
    rows = list(range(100))
    assert rows[checks.parse_range("10:20")] == rows[10:20]
    assert rows[checks.parse_range(":5")] == rows[:5]
    assert rows[checks.parse_range("::25")] == rows[::25]
