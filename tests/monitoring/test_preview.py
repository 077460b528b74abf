"""The preview of a run shows what the run will do: its prompts, its failing rows, its order, its ranks."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.jobs import REPO, write_into
from helpers.tiny_tokenizers import NAMES, save_model_without_weights

from dpgen.config.loader import load
from dpgen.config.schema import Config
from dpgen.data.input_loading import load_input
from dpgen.engine.starting.launch import load_text_steps
from dpgen.errors import ConfigError
from dpgen.monitoring.preview import Preview, PreviewOptions, build_preview
from dpgen.records import derive_row_seed
from dpgen.scheduling.programs import first_call
from dpgen.scheduling.request_builder import RequestBuilder

CHATS = [
    {"messages": [{"role": "user", "content": f"hello {number}"}], "budget": number, "id": f"r{number}"}
    for number in range(1, 6)
]
MESSAGES = {"path": "rows.jsonl", "prompt_column": None, "messages_column": "messages"}


def make_config(folder: Path, rows: list[dict[str, Any]], *overrides: str, **sections: Any) -> Config:
    return load([write_into(folder, rows, **sections)], list(overrides))


def make_vllm_config(folder: Path, rows: list[dict[str, Any]], tokenizer: str = "plain", **sections: Any) -> Config:
    """Return a configuration for vLLM over a model with a tiny tokenizer; chats unless `data` says otherwise."""
    model = save_model_without_weights(folder / "model", tokenizer)
    sections["data"] = sections.get("data", {"prompt_column": None, "messages_column": "messages"})
    return make_config(folder, rows, run={"engine": "vllm"}, model=str(model), **sections)


def preview(config: Config, **options: Any) -> Preview:
    return build_preview(config, PreviewOptions(**options))[0]


# ---- prompts


@pytest.mark.parametrize("tokenizer", NAMES)
def test_the_prompts_shown_are_those_that_the_run_sends(tokenizer: str, tmp_path: Path) -> None:
    config = make_vllm_config(tmp_path, CHATS, tokenizer)
    rows = load_input(config.data)
    builder = RequestBuilder.from_config(config, rows, load_text_steps(config, rows).render)
    shown = preview(config, num_prompts=5).prompts
    for view, columns in zip(shown, rows.iter_rows(np.arange(5), rows.columns), strict=True):
        request = builder.build(view.row, columns)
        assert view.token_ids == request.prompt_token_ids
        assert {name: view.sampling[name].value for name in request.sampling} == request.sampling


def test_special_tokens_are_pieces_of_their_own_and_the_text_is_that_of_the_template(tmp_path: Path) -> None:
    [first, *_] = preview(make_vllm_config(tmp_path, CHATS)).prompts
    assert first.text == "<|im_start|>user\nhello 1<|im_end|>\n<|im_start|>assistant\n"
    assert [piece.text for piece in first.pieces if piece.kind == "special"] == [
        *("<|im_start|>", "<|im_end|>", "<|im_start|>")
    ]


def test_a_doubled_bos_is_seen(tmp_path: Path) -> None:
    rows = [{"prompt": "<s>hello"}]
    [view] = preview(make_vllm_config(tmp_path, rows, "bos", data={"prompt_column": "prompt"})).prompts
    assert [(piece.text, piece.kind) for piece in view.pieces] == [
        *(("<s>", "special"), ("<s>", "special"), ("hello", "text"))
    ]


def test_a_given_completion_is_shown_apart_from_its_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": "hello", "answer": " world"}]
    config = make_vllm_config(tmp_path, rows, data={"prompt_column": "prompt", "completion_column": "answer"})
    [view] = preview(config).prompts
    assert [(piece.text, piece.kind) for piece in view.pieces] == [("hello", "text"), (" world", "completion")]
    assert view.sampling["max_tokens"].value == 1


@pytest.mark.parametrize(("options", "shown"), [({}, [0, 1, 2]), ({"num_prompts": 1}, [0]), ({"rows": (4, 1)}, [4, 1])])
def test_the_rows_asked_for_are_shown(options: dict[str, Any], shown: list[int], tmp_path: Path) -> None:
    views = preview(make_config(tmp_path, [{"prompt": f"p{number}"} for number in range(5)]), **options).prompts
    assert [view.row for view in views] == shown
    assert [view.text for view in views] == [f"p{number}" for number in shown]


@pytest.mark.parametrize("row", [-1, 2])
def test_a_row_that_is_not_there_is_refused(row: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"--row={row}: the input has 2 rows, counted from 0"):
        preview(make_config(tmp_path, [{"prompt": "a"}, {"prompt": "b"}]), rows=(row,))


def test_prompts_that_only_vllm_can_tokenize_are_shown_as_text_with_the_reason(tmp_path: Path) -> None:
    shown = preview(make_vllm_config(tmp_path, CHATS, engine={"tokenizer_mode": "mistral"}))
    assert shown.prompts[0].text == "user: hello 1" and shown.prompts[0].token_ids is None
    assert shown.token_counter == "characters / 4"
    assert any("only vLLM can tokenize these prompts (tokenizer_mode=mistral" in note for note in shown.notes)


# ---- sampling


def test_each_field_of_sampling_says_where_it_comes_from(tmp_path: Path) -> None:
    sampling = {"top_p": 0.5, "from_columns": {"max_tokens": "budget"}}
    config = make_vllm_config(tmp_path, CHATS, sampling=sampling, sampling_by_rank=[{"min_p": 0.1}, {"min_p": 0.2}])
    generation = {"temperature": 0.6, "top_p": 0.8}
    (Path(config.model) / "generation_config.json").write_text(json.dumps(generation))
    second = preview(config).prompts[1].sampling
    assert {name: (field.value, field.origin) for name, field in second.items()} == {
        "max_tokens": (2, "column budget"),
        "temperature": (0.6, "the model's generation config"),
        "top_p": (0.5, "sampling"),
        "min_p": (0.2, "sampling_by_rank[1]"),
        "seed": (derive_row_seed(0, 1), "run.seed and the row's index"),
    }


def test_without_a_limit_a_completion_may_fill_the_context(tmp_path: Path) -> None:
    [view, *_] = preview(make_vllm_config(tmp_path, CHATS)).prompts
    assert view.num_tokens is not None
    assert view.sampling["max_tokens"].value == 256 - view.num_tokens
    assert view.sampling["max_tokens"].origin == "the rest of the context"


def test_a_context_beyond_the_model_s_is_noted(tmp_path: Path) -> None:
    shown = preview(make_vllm_config(tmp_path, CHATS, engine={"max_model_len": 300}))
    [note] = shown.notes
    assert note.startswith("engine.max_model_len=300 exceeds the model's context of 256 (max_position_embeddings in")


# ---- rows that fail


def test_failing_rows_are_counted_by_the_run_s_error_types(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "hello"}]},
        {"messages": None},
        {"messages": []},
        {"messages": [{"role": "user", "content": "long " * 300}]},
        {"messages": [{"role": "user", "content": [{"type": "image_embeds", "image_embeds": "x"}]}]},
        {"messages": [{"role": "user", "content": "\udc80"}]},
        {"messages": None},
    ]
    shown = preview(make_vllm_config(tmp_path, rows))
    groups = {group.type: group.rows for group in shown.errors}
    assert groups["prompt_too_long"] == [3]
    assert sorted(row for found in groups.values() for row in found) == [1, 2, 3, 4, 5, 6]
    assert shown.num_sound == 1 and not shown.all_fail
    assert shown.prompts[1].error is not None and shown.prompts[1].error["type"] in groups


def test_images_are_looked_at_in_the_rows_shown(tmp_path: Path) -> None:
    url = f"data:image/gif;base64,{SMALL_GIF}"
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    rows: list[dict[str, Any]] = [
        {"messages": chat, "image": image} for image in (url, "no.png", "https://x.org/a.png")
    ]
    data = {"prompt_column": None, "messages_column": "messages", "images_column": "image"}
    shown = preview(make_vllm_config(tmp_path, rows, data=data), num_prompts=3)
    assert [view.text for view in shown.prompts] == [
        "user: <image 1x1 GIF, 34 bytes>\nWhat?",
        "",
        "user: <image https://x.org/a.png>\nWhat?",
    ]
    error = shown.prompts[1].error
    assert error is not None and error["type"] == "media_missing" and "no such file: no.png" in error["message"]
    assert any("tokens of images, audio and video are not counted" in note for note in shown.notes)


def test_a_run_of_the_fake_engine_fails_on_the_same_rows_for_the_same_reasons(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "x" * number} for number in (1, 15, 16, 17)]
    rows += [{"prompt": None}, {"prompt": 3}]
    shown = preview(make_config(tmp_path, rows, engine={"max_model_len": 16}))
    assert {group.type: group.rows for group in shown.errors} == {"prompt_too_long": [2, 3], "wrong_type": [4, 5]}
    assert shown.errors[0].example == "the prompt has 16 tokens, max_model_len=16"


def test_a_preview_in_which_all_rows_fail_says_so_and_is_no_error(tmp_path: Path) -> None:
    assert preview(make_config(tmp_path, [{"prompt": None}] * 3)).all_fail


def test_a_row_that_takes_too_long_to_render_is_among_those_that_fail(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "hang"}]
    loop = "{% for _ in range(99999) %}{% for _ in range(99999) %}{% endfor %}{% endfor %}"
    template = f"{{% if prompt == 'hang' %}}{loop}{{% endif %}}{{{{ prompt }}}}"
    data = {"prompt_column": None, "template": template, "render_timeout_s": 0.3}
    shown = preview(make_config(tmp_path, rows, data=data))
    assert [(group.type, group.rows) for group in shown.errors] == [("render_timeout", [1])]


def test_token_counts_are_exact_where_all_rows_are_examined(tmp_path: Path) -> None:
    shown = preview(make_config(tmp_path, [{"prompt": "x" * number} for number in range(1, 101)]))
    tokens = shown.tokens
    assert tokens is not None
    assert (tokens.min, tokens.p50, tokens.p90, tokens.p99, tokens.max) == (1, 51, 91, 100, 100)
    assert tokens.total == 5050 and sum(num_rows for _, _, num_rows in tokens.histogram) == 100
    assert not shown.is_sample


# ---- order and ranks


def test_the_order_is_the_run_s_with_its_reason(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{number}", "hint": 10 ** (number % 4)} for number in range(40)]
    shown = preview(make_config(tmp_path, rows, work={"hint_column": "hint"}))
    assert shown.order.kind == "longest_first"
    assert shown.order.description.startswith("longest first by hint column hint (min 1")


def test_each_rank_gets_every_nth_row_and_all_rows_go_to_one(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * number} for number in range(1, 11)]
    shown = preview(make_config(tmp_path, rows), num_ranks=3)
    assert [(part.num_rows, part.first_rows) for part in shown.ranks] == [
        *((4, [0, 3, 6, 9]), (3, [1, 4, 7]), (3, [2, 5, 8]))
    ]
    assert sum(part.num_prompt_tokens for part in shown.ranks) == 55


def test_processes_that_share_an_engine_get_one_part(tmp_path: Path) -> None:
    parallel = {"launcher": "external", "tensor_parallel_size": 2}
    shown = preview(make_config(tmp_path, [{"prompt": "x"}] * 8, parallel=parallel), num_ranks=4)
    assert [(part.rank, part.num_rows) for part in shown.ranks] == [(0, 4), (2, 4)]
    with pytest.raises(ConfigError, match="start 2 or 4"):
        preview(make_config(tmp_path, [{"prompt": "x"}] * 8, parallel=parallel), num_ranks=3)


def test_unused_columns_are_named(tmp_path: Path) -> None:
    config = make_vllm_config(tmp_path, CHATS, sampling={"from_columns": {"max_tokens": "budget"}})
    shown = preview(config)
    assert shown.used_columns == ["messages", "budget"] and shown.unused_columns == ["id"]


# ---- wrong configurations


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.prompt_column=promt", "did you mean 'prompt'"),
        ("engine.max_seqs=3", "unknown key 'engine.max_seqs'"),
        ("sampling.temprature=3", "unknown key 'sampling.temprature'; did you mean 'sampling.temperature'"),
        ("engine.max_model_len=0", "engine.max_model_len=0: must be a whole number"),
        ("work.hint_column=size", "work.hint_column: 'size' is no column"),
        ("data.path=nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_a_wrong_configuration_is_refused_as_by_the_run(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        preview(make_config(tmp_path, [{"prompt": "x"}], override))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"engine": {"max_seq_len": 8}}, "unknown key 'engine.max_seq_len': write engine.max_model_len"),
        ({"sampling": {"best_of": 2}}, "unknown key 'sampling.best_of': vLLM has removed it"),
        ({"sampling": {"structured_outputs": {"jsn": {}}}}, "did you mean 'sampling.structured_outputs.json'"),
    ],
)
def test_names_that_vllm_does_not_know_are_refused_without_importing_it(
    sections: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    with pytest.raises(ConfigError, match=message):
        preview(make_vllm_config(tmp_path, CHATS, **sections))


def test_a_model_without_weights_is_refused(tmp_path: Path) -> None:
    config = make_vllm_config(tmp_path, CHATS)
    (Path(config.model) / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="holds no weights"):
        preview(config)


def test_an_empty_input_is_no_mistake(tmp_path: Path) -> None:
    shown = preview(make_config(tmp_path, []), num_ranks=2)
    assert shown.num_rows == 0 and shown.tokens is None and not shown.all_fail
    assert [part.num_rows for part in shown.ranks] == [0, 0]
    assert "the input has no rows, so the result will have none" in shown.notes


# ---- large inputs


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a parquet file of a million rows; every tenth fails."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path_factory.mktemp("million") / "rows.parquet"
    part = pa.array([None, *["some prompt", "another one", "one more one"] * 3] * 100, pa.string())
    pq.write_table(pa.table({"prompt": pa.chunked_array([part] * 1_000)}), path)
    return path


def test_a_million_rows_are_sampled_and_the_preview_says_so(million: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, [], f"data.path={million}")
    shown = preview(config, num_ranks=8, max_examined=1_000)
    assert shown.num_rows == 1_000_000 and shown.num_examined == 1_000 and shown.is_sample
    assert shown.order.is_sample
    assert [part.num_rows for part in shown.ranks] == [125_000] * 8
    [group] = shown.errors
    assert group.type == "wrong_type" and 50 < group.num_rows < 150
    assert shown.tokens is not None and 9_000_000 < shown.tokens.total < 11_000_000


def test_the_order_of_a_sample_is_that_of_all_rows(tmp_path: Path) -> None:
    """Eight samples of each prompt, each a row: the sample's rows that stand apart hide most of them."""
    rows = [{"prompt": f"prompt {number // 8}"} for number in range(24_000)]
    shown = preview(make_config(tmp_path, rows), max_examined=100)
    assert shown.order.is_sample and "measured length" in shown.order.description


def test_examining_ends_in_time_with_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpgen.monitoring.preview._MAX_EXAMINE_S", -1.0)
    shown = preview(make_config(tmp_path, [{"prompt": "x"}] * 1_000))
    assert shown.num_examined == 200 and shown.is_sample


# ---- shipped recipes

RECIPES = sorted(path.name for path in (REPO / "conf").glob("*.yaml") if path.name != "reference.yaml")
# One row for each recipe whose data is not in the repository.
SMALL_GIF = "R0lGODlhAQABAIAAAAAAAP///ywAAAAAAQABAAACAUwAOw=="
RECIPE_ROWS: dict[str, dict[str, Any]] = {
    "70b_tp4.yaml": {"messages": [{"role": "user", "content": "hello"}]},
    "batch.yaml": {
        **{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"},
        "body": {"model": "qwen3", "messages": [{"role": "user", "content": "hello"}]},
    },
    "checked.yaml": {"article": "hello"},
    "kv_offload.yaml": {"document": "hello", "question": "why?"},
    "prefix_caching.yaml": {"document": "hello", "question": "why?"},
    "quantized.yaml": {"prompt": "hello"},
    "speculative.yaml": {"prompt": "hello"},
    "structured.yaml": {"review": "hello"},
    "chat_hub.yaml": {"question": "What is 1 + 1?", "answer": "2"},
    "jsonl.yaml": {"prompt": "hello", "budget": 5},
    "logprobs.yaml": {"prompt": "hello"},
    "lora.yaml": {"question": "hello", "adapter": "math"},
    "prompt_columns.yaml": {
        **{"task": "hello", "my example": "hi", "system": "Be brief.", "tools": None},
        **{"prefill": None, "chat": None, "stop": ["x"]},
    },
    "embed.yaml": {"text": "hello"},
    "images.yaml": {"question": "What is it?", "image": f"data:image/gif;base64,{SMALL_GIF}"},
    "rerank.yaml": {"query": "why?", "documents": ["hello", "there"]},
    "reward.yaml": {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]},
    "s3.yaml": {"prompt": "hello"},
    "samples.yaml": {"tokens": [5, 6]},
    "score.yaml": {"question": "hello", "answer": " world"},
    "critique.yaml": {"question": "hello"},
    "self_consistency.yaml": {"question": "hello"},
    "tool_loop.yaml": {"question": "hello"},
    "best_of_n.yaml": {"question": "hello"},
    "user_simulation.yaml": {"persona": "hello"},
    "pairwise_judge.yaml": {"question": "hello", "answer_a": "a", "answer_b": "b"},
    "stages_judge.yaml": {"question": "hello", "final": "hi"},
    "tool_calls.yaml": {"messages": [{"role": "user", "content": "hello"}]},
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_can_be_previewed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny tokenizer and a row of its own in place of the Hub's model and data."""
    monkeypatch.chdir(REPO)
    overrides = []
    if name != "demo.yaml":
        rows = tmp_path / "rows.jsonl"
        rows.write_text(json.dumps(RECIPE_ROWS[name]) + "\n")
        model = save_model_without_weights(tmp_path / "model", max_position_embeddings=32768)
        overrides = [f"data.path={rows}", "data.name=null", "data.split=null", f"model={model}"]
        if name == "lora.yaml":
            overrides += ["run.engine=fake", "engine={}", "sampling={}"]
    shown = preview(load([f"conf/{name}"], overrides), num_prompts=1)
    assert shown.num_sound == shown.num_examined and shown.prompts[0].text, shown.errors
    assert shown.max_model_len is not None


def test_lines_of_a_batch_file_are_shown_with_their_own_sampling_and_errors(tmp_path: Path) -> None:
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"model": "m", "prompt": "hello", "temperature": 0.5, "seed": 7}),
        ("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}),
        ("/v1/chat/completions", {"model": "another", "messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/embeddings", {"model": "m", "input": "hi"}),
    ]
    lines = [json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body}) for url, body in bodies]
    (tmp_path / "requests.jsonl").write_text("\n".join([*lines, "no JSON"]) + "\n")
    overrides = [
        *(f"run.dir={tmp_path / 'run'}", f"data.path={tmp_path / 'requests.jsonl'}", "data.format=openai_batch"),
        *("model=m", "run.engine=fake", "sampling.top_p=0.9", "check.non_empty=true"),
    ]
    shown = preview(load([], overrides), num_prompts=3)
    completion, chat, other = shown.prompts
    origins = {name: (field.value, field.origin) for name, field in completion.sampling.items()}
    assert origins == {
        "max_tokens": (16, "vLLM's server"),
        "temperature": (0.5, "the request"),
        "seed": (7, "the request"),
        "top_p": (0.9, "sampling"),
    }
    assert chat.sampling["max_tokens"].value == 5 and chat.sampling["max_tokens"].origin == "the request"
    assert other.error is not None and other.error["type"] == "unknown_model"
    assert {group.type: group.rows for group in shown.errors} == {
        "unknown_model": [2],
        "unsupported_request": [3],
        "bad_request": [4],
    }
    assert any("vLLM's own classes" in note for note in shown.notes)
    assert any("generated up to 3 times" in note for note in shown.notes)


def test_of_a_program_the_first_call_is_shown_and_no_function_is_run(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "why?", "persona": "a fox"}\n')
    common = [f"run.dir={tmp_path / 'run'}", f"data.path={rows}", "model=m", "run.engine=fake", "sampling.top_p=0.9"]
    shown = preview(load([], [*common, "program.function=dpgen.programs.best_of_n:choose"]), num_prompts=1)
    [prompt] = shown.prompts
    assert prompt.text == "[{'role': 'user', 'content': 'why?'}]" and shown.num_sound == 1
    origins = {name: (field.value, field.origin) for name, field in prompt.sampling.items()}
    assert origins["n"] == (4, "the program") and origins["top_p"] == (0.9, "sampling")
    assert any("the first call of each row's program" in note for note in shown.notes)
    calls_tool = preview(load([], [*common, "program.function=helpers.programs:call_function_first"]), num_prompts=1)
    assert calls_tool.errors[0].example == "it calls a function before it asks the model, and a preview runs none"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["slow", "blocks"])
def test_a_program_that_asks_nothing_for_long_does_not_hold_up_the_preview(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_call, "_MAX_PATIENCE_S", 0.2)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f'{{"prompt": "{kind}"}}\n{{"prompt": "good"}}\n{{"prompt": "{kind}"}}\n')
    common = [f"run.dir={tmp_path / 'run'}", f"data.path={rows}", "model=m", "run.engine=fake"]
    shown = preview(load([], [*common, "program.function=helpers.programs:misbehave"]), num_prompts=3)
    [group] = shown.errors
    assert (group.type, group.rows) == ("program_timeout", [0, 2]) and "it asks the model nothing for" in group.example
    assert shown.prompts[1].text == "good"
