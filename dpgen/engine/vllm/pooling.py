"""Run the tasks of pooling models on vLLM's engine: embed, classify, score and reward.

- The same parts of vLLM 0.26 to 0.33 are used: `PoolingParams`, `PoolerConfig.task`, `PoolingRequestOutput`.
- vLLM's own names of tasks differ: a cross-encoder's scores and a reward model's rewards are `classify` there, those of
  single tokens `token_classify`.
- A loaded model makes one vector before the first row, which tells how wide its vectors are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from vllm.config import PoolerConfig
from vllm.inputs.engine import tokens_input
from vllm.outputs import PoolingRequestOutput
from vllm.pooling_params import PoolingParams
from vllm.v1.engine.llm_engine import LLMEngine

from dpgen.config.pooling.pooling_config import PoolingConfig
from dpgen.data.prompts.pooling import BI_ENCODER, CROSS_ENCODER
from dpgen.engine.messages import EngineSpec
from dpgen.engine.pooling_rows import PoolingRow
from dpgen.engine.vllm.rejections import summarize_error
from dpgen.errors import ConfigError, RowRefused
from dpgen.records import PooledKind, PoolingRequest, Request, RowResult

_POOLING, _GENERATE = "pooling", "generate"  # vLLM's names of what a model is run for
_PROBE = "dpgen-probe"  # vLLM's id of the request that tells the width
# Architectures whose own head gives a vector to each token.
_TOKEN_HEADS = ("RewardModel", "ForTokenClassification")
_REWARD_HEADS = ("ForSequenceClassification", *_TOKEN_HEADS)


def add_pooler_task(options: dict[str, Any], config: PoolingConfig) -> None:
    """Set the task in `pooler_config` where the configuration alone tells it, unless the user has.

    Raises:
        ConfigError: vLLM rejects the options that are there.
    """
    given = options.get("pooler_config") or {}
    if not isinstance(given, Mapping) or given.get("task"):
        return
    task = {"embed": "embed", "classify": "classify"}.get(config.task)
    if config.task == "reward" and config.reward_per == "token":
        task = "token_classify"
    try:
        options["pooler_config"] = PoolerConfig(**given, **({} if task is None else {"task": task}))  # type: ignore[arg-type]
    except Exception as error:  # noqa: BLE001 - vLLM's errors have no common base
        raise ConfigError(f"vLLM rejects engine.pooler_config: {summarize_error(error)}") from None


def find_wrong_model(spec: EngineSpec, model_config: Any) -> Iterator[str]:
    """Yield one line if the model can't do the task, as far as it shows before its weights are loaded.

    Args:
        model_config: vLLM's `ModelConfig`.
    """
    config, model = spec.pooling, spec.model
    is_pooling = model_config.runner_type == _POOLING
    if config is None:
        if is_pooling:
            yield f"task=generate: {model} is a pooling model, which generates no text: set task=embed, classify, ..."
        return
    if not is_pooling:
        yield (
            f"task={config.task}: {model} is a model that generates text; engine.runner=pooling makes vectors of its "
            "hidden states all the same (with engine.convert=embed or classify)"
        )
        return
    score_type = model_config.score_type
    architectures = [str(name) for name in model_config.architectures]
    has_classes = score_type == CROSS_ENCODER or any(name.endswith(_REWARD_HEADS) for name in architectures)
    if config.task == "embed" and has_classes:
        yield f"task=embed: {model} classifies ({', '.join(architectures)}): set task=classify, score or reward"
    if config.task in ("classify", "reward") and not has_classes:
        yield (
            f"task={config.task}: {model} has no head for classes ({', '.join(architectures)}): set task=embed, or "
            "engine.convert=classify"
        )
    num_labels = getattr(model_config.hf_config, "num_labels", 0)
    if config.task == "score" and has_classes and num_labels != 1:
        yield f"task=score: {model} has {num_labels} classes, and a score comes from one: set task=classify"
    if config.dimensions is not None:
        try:
            PoolingParams(task="embed", dimensions=config.dimensions).verify(model_config)
        except Exception as error:  # noqa: BLE001 - vLLM's errors have no common base
            yield f"vLLM rejects output.dimensions: {summarize_error(error)}"


class OwnPoolingParams(PoolingParams):
    """Spare vLLM the deep copy of parameters that no other request has."""

    def clone(self) -> OwnPoolingParams:
        return self


class VllmPooling:
    """Send sequences to a loaded engine, and collect their vectors.

    Args:
        engine: vLLM's engine with a pooling model.

    Raises:
        ConfigError: the model can't do the task.
    """

    def __init__(self, engine: LLMEngine, config: PoolingConfig) -> None:
        self._engine, self._config = engine, config
        self._model_config = engine.vllm_config.model_config
        self._rows: dict[str, tuple[PoolingRow, int]] = {}  # row and sequence, by vLLM's id
        self._supported = tuple(engine.get_supported_tasks())
        self.kind = self._probe()

    def add(self, name: str, request: Request, token_ids: list[int], adapter: Any) -> None:
        """Add a request's sequences; all of them or none.

        Args:
            name: vLLM's id of the request; its sequences' begin with it.
            token_ids: the tokens of all sequences, one after the other.
            adapter: vLLM's `LoRARequest`.

        Raises:
            Exception: vLLM rejects one.
        """
        pooling = request.pooling
        if pooling is None:
            raise RowRefused("bad_request", "the engine pools hidden states, and the request is to generate text")
        row, names = PoolingRow(request, len(token_ids), self._config.embedding_dtype), list[str]()
        try:
            for number, tokens in enumerate(pooling.split(token_ids)):
                params = self._make_params(pooling, number)
                names.append(f"{name}/{number}")
                self._rows[names[-1]] = (row, number)
                self._engine.add_request(names[-1], tokens_input(tokens), params, lora_request=adapter)
        except Exception:
            self.abort(names)
            raise

    def abort(self, names: list[str] | None = None) -> None:
        """Drop sequences.

        Args:
            names: vLLM's ids; None for all.
        """
        names = list(self._rows) if names is None else names
        for name in names:
            self._rows.pop(name, None)
        self._engine.abort_request(names)

    def read(self, output: PoolingRequestOutput[Any]) -> RowResult | None:
        """Return the result of the request that the output completes; None where sequences of it are missing."""
        row, number = self._rows.pop(output.request_id)
        return row.add(number, self._read_vectors(output, row.is_per_token))

    def _read_vectors(self, output: PoolingRequestOutput[Any], is_per_token: bool) -> np.ndarray:
        vectors: np.ndarray = output.outputs.data.float().cpu().numpy()
        if self._config.task == "reward" and not is_per_token and vectors.ndim == 2:
            vectors = vectors[-1]  # of the last token, which has seen the whole text
        if is_per_token and vectors.ndim == 1:
            return vectors[:, None]
        return vectors.reshape(1) if vectors.ndim == 0 else vectors

    def _make_params(self, pooling: PoolingRequest, sequence: int) -> PoolingParams:
        """Return vLLM's parameters of a sequence.

        Raises:
            RowRefused: the model can't do the task, or has no such dimensions.
        """
        params = OwnPoolingParams(
            task=self._find_task(pooling.task, is_per_token=pooling.is_per_token),  # type: ignore[arg-type]
            dimensions=pooling.dimensions,
            use_activation=pooling.normalize,
        )
        if pooling.second_starts and pooling.second_starts[sequence] >= 0:
            params.extra_kwargs = {"compressed_token_type_ids": pooling.second_starts[sequence]}
        return params

    def _find_task(self, task: str, *, is_per_token: bool = False) -> str:
        """Return vLLM's name of a task."""
        if task == "score":
            task = self._score_task
        elif task == "reward":
            is_row = not is_per_token and "classify" in self._supported
            task = "classify" if is_row else "token_classify"
        if task not in self._supported:
            supported = ", ".join(self._supported)
            raise RowRefused("bad_request", f"the model does not support vLLM's task {task!r}, but {supported}")
        return task

    @property
    def _score_task(self) -> str:
        tasks = {CROSS_ENCODER: "classify", BI_ENCODER: "embed"}
        return tasks.get(self._model_config.score_type, "token_embed")

    def _probe(self) -> PooledKind:
        """Return what the model's vectors are, by those of a sequence of one token."""
        config = self._config
        pooling = PoolingRequest(
            config.task,
            dimensions=config.dimensions,
            normalize=config.normalize,
            is_per_token=config.reward_per == "token",
        )
        try:
            self._engine.add_request(_PROBE, tokens_input([0]), self._make_params(pooling, 0))
        except RowRefused as error:
            raise ConfigError(f"task={config.task}: {error.message}") from None
        except Exception as error:  # noqa: BLE001 - vLLM's errors have no common base
            raise ConfigError(f"task={config.task}: vLLM rejects it: {summarize_error(error)}") from None
        outputs: list[Any] = []
        while not outputs:
            outputs = [output for output in self._engine.step() if output.finished]
        width = int(self._read_vectors(outputs[0], pooling.is_per_token).shape[-1])
        labels = self._list_labels(width) if config.task == "classify" else ()
        model_config = self._model_config
        return PooledKind(width, labels, model_config.score_type, bool(model_config.use_sep_token))

    def _list_labels(self, num_labels: int) -> tuple[str, ...]:
        """Return the names of the model's classes, each once; LABEL_0, ... where it has no names for them."""
        names = getattr(self._model_config.hf_config, "id2label", None) or {}
        labels = tuple(str(names.get(index, names.get(str(index)))) for index in range(num_labels))
        is_named = len(names) == num_labels and len(set(labels)) == num_labels
        return labels if is_named else tuple(f"LABEL_{index}" for index in range(num_labels))
