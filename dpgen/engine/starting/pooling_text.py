"""Make what turns rows into requests for a pooling model: beside the tokenizer, or for the fake engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpgen.config.pooling.pooling_config import PoolingConfig
from dpgen.config.prompt import PromptConfig
from dpgen.config.schema import Config
from dpgen.data.prompts.pooling import (
    BI_ENCODER,
    CROSS_ENCODER,
    ByteTokenizer,
    PoolingContext,
    PoolingRenderer,
    PoolingTokenizer,
    ScoreTemplate,
    wrap_untokenized,
)
from dpgen.data.prompts.render import Prompt, PromptRenderer, RenderFn
from dpgen.errors import ConfigError


def make_pooling_renderer(
    config: Config, tokenizer: Any, prompts: PromptRenderer, context: PoolingContext
) -> PoolingRenderer:
    """Return what renders rows with a tokenizer of transformers.

    Args:
        context: what the loaded model says; filled once it is loaded.

    Raises:
        ConfigError: the score template can't be used.
    """
    assert config.pooling is not None
    template = None
    if config.prompt.is_pair and config.prompt.chat_template is not None:
        template = ScoreTemplate(config.prompt, tokenizer)
    pooling_tokenizer = PoolingTokenizer(tokenizer, prompts)
    return PoolingRenderer(config.pooling, config.prompt, prompts, pooling_tokenizer, context, template)


def make_fake_pooling_renderer(
    config: Config, tokenize: Callable[[Prompt], list[int]], prompts: PromptRenderer, context: PoolingContext
) -> PoolingRenderer:
    """Return what renders rows for the fake engine, whose tokens are bytes."""
    assert config.pooling is not None
    return PoolingRenderer(config.pooling, config.prompt, prompts, ByteTokenizer(tokenize), context)


def wrap_untokenized_prompts(render: RenderFn, pooling: PoolingConfig, prompt: PromptConfig, reason: str) -> RenderFn:
    """Return a function that renders as `render` does, for prompts that the engine tokenizes.

    Args:
        reason: why the engine tokenizes.

    Raises:
        ConfigError: the rows are pairs, requests of a batch file, or may have to be cut.
    """
    key = None
    if prompt.is_pair:
        key = "data.query_column"
    elif prompt.request_column is not None:
        key = "a batch file of embeddings"
    elif pooling.too_long != "error":
        key = f"data.too_long={pooling.too_long}"
    if key is not None:
        raise ConfigError(f"{key} needs a tokenizer that transformers can load{reason and f': {reason}'}")
    return lambda row: wrap_untokenized(render(row), pooling)


def guess_context(config: Config, model_config: Any, max_model_len: int | None) -> PoolingContext:
    """Return what a model is likely to say of itself, by its configuration, before it is loaded.

    Args:
        model_config: of transformers; None where there is none.
    """
    architectures = getattr(model_config, "architectures", None) or ()
    is_classifier = any(str(name).endswith("ForSequenceClassification") for name in architectures)
    is_converted = config.engine.get("convert") == "classify" or model_config is None
    score_type = CROSS_ENCODER if is_classifier or is_converted else BI_ENCODER
    return PoolingContext(max_model_len, score_type, bool(getattr(model_config, "use_sep_token", True)))
