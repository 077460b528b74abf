"""Texts and pairs become the sequences that vLLM would read; long ones are cut as data.too_long says."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.bad_input import BAD_PAIRS
from helpers.tiny_pooling import save_bert_tokenizer

from dpgen.config.pooling.pooling_config import PoolingConfig
from dpgen.config.prompt import PromptConfig
from dpgen.data.prompts.pooling import (
    BI_ENCODER,
    CROSS_ENCODER,
    ByteTokenizer,
    PoolingContext,
    PoolingRenderer,
    PoolingTokenizer,
    ScoreTemplate,
)
from dpgen.data.prompts.render import PromptRenderer
from dpgen.data.tokenizer import TokenizerConfig, load_tokenizer
from dpgen.errors import RowRefused

CLS, SEP = 2, 3
PAIRS = PromptConfig(query_column="query", documents_column="documents")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("bert")
    save_bert_tokenizer(folder)
    return load_tokenizer(TokenizerConfig(str(folder)))


def make_renderer(
    tokenizer: Any, task: str, prompt: PromptConfig, score_type: str = CROSS_ENCODER, **keys: Any
) -> PoolingRenderer:
    context = PoolingContext(max_model_len=8, score_type=score_type)
    prompts = PromptRenderer(prompt, tokenizer)
    template = None if prompt.chat_template is None else ScoreTemplate(prompt, tokenizer)
    config = PoolingConfig(task, **keys)
    return PoolingRenderer(config, prompt, prompts, PoolingTokenizer(tokenizer, prompts), context, template)


def test_a_text_that_fits_is_read_as_the_tokenizer_makes_it(tokenizer: Any) -> None:
    renderer = make_renderer(tokenizer, "embed", PromptConfig(prompt_column="text"))
    rendered = renderer.render({"text": "the quick fox"})
    assert rendered.token_ids == tokenizer("the quick fox")["input_ids"]
    assert rendered.pooling is not None and rendered.pooling.num_sequences == 1


def test_a_long_text_is_an_error_unless_it_may_be_cut(tokenizer: Any) -> None:
    renderer = make_renderer(tokenizer, "embed", PromptConfig(prompt_column="text"))
    with pytest.raises(RowRefused, match="has 12 tokens, max_model_len=8") as refused:
        renderer.render({"text": "the quick brown fox jumps over the lazy dog ."})
    assert refused.value.type == "prompt_too_long"


def test_a_long_text_is_truncated_as_the_tokenizer_truncates_it(tokenizer: Any) -> None:
    renderer = make_renderer(tokenizer, "embed", PromptConfig(prompt_column="text"), too_long="truncate")
    text = "the quick brown fox jumps over the lazy dog ."
    rendered = renderer.render({"text": text})
    assert rendered.token_ids == tokenizer(text, truncation=True, max_length=8)["input_ids"]
    assert rendered.pooling is not None and rendered.pooling.num_cut_tokens == 4


def test_each_chunk_of_a_long_text_begins_and_ends_as_a_text_does(tokenizer: Any) -> None:
    renderer = make_renderer(tokenizer, "embed", PromptConfig(prompt_column="text"), too_long="chunk_mean")
    text = "the quick brown fox jumps over the lazy dog ."
    rendered = renderer.render({"text": text})
    assert rendered.pooling is not None and rendered.token_ids is not None
    chunks = list(rendered.pooling.split(rendered.token_ids))
    assert [len(chunk) for chunk in chunks] == [8, 6]
    assert all(chunk[0] == CLS and chunk[-1] == SEP for chunk in chunks)
    assert rendered.pooling.texts == (0, 0), "both are parts of one text"
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [token for chunk in chunks for token in chunk[1:-1]] == own, "no token is lost"


def test_token_ids_are_cut_without_special_tokens(tokenizer: Any) -> None:
    renderer = make_renderer(tokenizer, "embed", PromptConfig(token_ids_column="ids"), too_long="chunk_mean")
    rendered = renderer.render({"ids": list(range(10, 27))})
    assert rendered.pooling is not None and rendered.pooling.lengths == (8, 8, 1)


def test_a_cross_encoder_reads_query_and_document_as_one_sequence(tokenizer: Any) -> None:
    renderer = make_renderer(tokenizer, "score", PAIRS)
    rendered = renderer.render({"query": "the fox", "documents": ["a dog", "jumps"]})
    assert rendered.pooling is not None and rendered.token_ids is not None
    first, second = rendered.pooling.split(rendered.token_ids)
    assert first == tokenizer("the fox", "a dog")["input_ids"] and second == tokenizer("the fox", "jumps")["input_ids"]
    assert rendered.pooling.second_starts == (4, 4), "where token_type_ids turn to 1"
    assert not rendered.pooling.has_query


def test_an_embedding_model_reads_query_and_documents_alone(tokenizer: Any) -> None:
    renderer = make_renderer(tokenizer, "score", PAIRS, BI_ENCODER)
    rendered = renderer.render({"query": "the fox", "documents": ["a dog", "jumps"]})
    assert rendered.pooling is not None and rendered.pooling.has_query and len(rendered.pooling.lengths) == 3


def test_the_longer_text_of_a_pair_is_cut_first(tokenizer: Any) -> None:
    renderer = make_renderer(tokenizer, "score", PAIRS, too_long="truncate")
    rendered = renderer.render({"query": "fox", "documents": ["the quick brown dog jumps over ."]})
    expected = tokenizer("fox", "the quick brown dog jumps over .", truncation=True, max_length=8)
    assert rendered.token_ids == expected["input_ids"]
    assert rendered.pooling is not None and rendered.pooling.num_cut_tokens == 3


def test_a_score_template_makes_one_text_of_a_pair(tokenizer: Any) -> None:
    template = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}"
    prompt = PromptConfig(query_column="query", document_column="document", chat_template=template)
    rendered = make_renderer(tokenizer, "score", prompt).render({"query": "fox", "document": "dog"})
    assert rendered.token_ids == tokenizer("q fox d dog ")["input_ids"]


@pytest.mark.parametrize("case", BAD_PAIRS, ids=[case[0] for case in BAD_PAIRS])
def test_a_bad_pair_is_its_rows_error(tokenizer: Any, case: tuple[str, dict[str, Any], str, str]) -> None:
    _, row, error_type, words = case
    with pytest.raises(RowRefused) as refused:
        make_renderer(tokenizer, "score", PAIRS).render(row)
    assert refused.value.type == error_type and words in refused.value.message


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"query": "x", "documents": "y"}, "wrong_type: documents is a str, not a list"),
        ({"query": "x", "documents": ["\ud800"]}, "invalid_text: character 0"),
    ],
)
def test_a_pair_that_no_file_of_json_lines_holds_is_its_rows_error(
    tokenizer: Any, row: dict[str, Any], error: str
) -> None:
    with pytest.raises(RowRefused) as refused:
        make_renderer(tokenizer, "score", PAIRS).render(row)
    assert f"{refused.value.type}: {refused.value.message}".startswith(error)


def test_a_text_without_tokens_is_its_rows_error_on_the_fake_engine_too() -> None:
    prompt = PromptConfig(prompt_column="text")
    tokenizer = ByteTokenizer(lambda text: list(str(text).encode()))
    renderer = PoolingRenderer(
        PoolingConfig("reward"), prompt, PromptRenderer(prompt, None), tokenizer, PoolingContext()
    )
    with pytest.raises(RowRefused) as refused:
        renderer.render({"text": ""})
    assert refused.value.type == "empty_prompt"
