"""Embeddings, classes, scores and rewards on real vLLM: those of LLM.embed, LLM.classify, LLM.score and LLM.encode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.bad_input import BAD_PAIRS
from helpers.jobs import REPO, Launcher, load_result, read_run_json
from helpers.tiny_pooling import ENGINE, LABELS, WORDS, save_tiny_pooling

pytestmark = [pytest.mark.vllm, pytest.mark.multi, pytest.mark.slow, pytest.mark.xdist_group("engines")]

VOCABULARY = WORDS.split()
TEXTS = [" ".join(VOCABULARY[(7 * i + j) % len(VOCABULARY)] for j in range(1 + i % 9)) for i in range(24)]
LONG = " ".join(VOCABULARY * 4)  # more than the context of 64 tokens
PAIRS = [{"query": text, "documents": TEXTS[i + 1 : i + 2 + i % 3]} for i, text in enumerate(TEXTS[:12])]
CHATS = [[{"role": "user", "content": text[:9]}, {"role": "assistant", "content": text[:-9:-1]}] for text in TEXTS]

# Computes what vLLM itself makes of the same texts, with each model in turn.
REFERENCE = """
import gc, json, sys
from vllm import LLM, PoolingParams
from vllm.config import PoolerConfig
from vllm.distributed import cleanup_dist_env_and_memory

given = json.loads(sys.argv[1])
texts, pairs = given["texts"], given["pairs"]
found = {}
for kind, folder in given["models"].items():
    more = {"pooler_config": PoolerConfig(task="token_classify")} if kind == "tokens" else {}
    llm = LLM(folder, **given["engine"], **more)
    tokenizer, quiet = llm.get_tokenizer(), {"use_tqdm": False}
    if kind == "bert":
        found["embed"] = [output.outputs.embedding for output in llm.embed(texts, **quiet)]
        found["cosine"] = [[o.outputs.score for o in llm.score(p["query"], p["documents"], **quiet)] for p in pairs]
        own, chunks = tokenizer(given["long"], add_special_tokens=False)["input_ids"], []
        for start in range(0, len(own), 62):
            chunks.append({"prompt_token_ids": [2, *own[start : start + 62], 3]})
        outputs = llm.embed(chunks, **quiet)
        found["chunks"] = [[len(c["prompt_token_ids"]), o.outputs.embedding] for c, o in zip(chunks, outputs)]
    elif kind == "qwen":
        params = PoolingParams(dimensions=16)
        found["short"] = [o.outputs.embedding for o in llm.embed(texts, pooling_params=params, **quiet)]
    elif kind == "cross":
        found["score"] = [[o.outputs.score for o in llm.score(p["query"], p["documents"], **quiet)] for p in pairs]
    elif kind == "classes":
        found["probs"] = [output.outputs.probs for output in llm.classify(texts, **quiet)]
    else:
        chats = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in given["chats"]]
        prompts = [{"prompt_token_ids": tokenizer(c, add_special_tokens=False)["input_ids"]} for c in chats]
        task = "token_classify" if kind == "tokens" else "classify"
        found[task] = [o.outputs.data.tolist() for o in llm.encode(prompts, pooling_task=task, **quiet)]
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
print("FOUND " + json.dumps(found))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_tiny_pooling(kind, folder / kind) for kind in ("bert", "qwen", "cross", "classes", "reward")}


@pytest.fixture(scope="module")
def expected(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    given = {
        "models": {kind: str(folder) for kind, folder in {**models, "tokens": models["reward"]}.items()},
        "engine": {**ENGINE, "kv_cache_memory_bytes": 64 << 20},
        **{"texts": TEXTS, "pairs": PAIRS, "chats": CHATS, "long": LONG},
    }
    launcher = Launcher(tmp_path_factory.mktemp("reference"))
    job = launcher.start(
        [launcher.python, "-c", REFERENCE, json.dumps(given)],
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
    )
    try:
        assert job.wait() == 0, job.output
    finally:
        job.end()
    [line] = [line for line in job.output.splitlines() if line.startswith("FOUND ")]
    found: dict[str, Any] = json.loads(line.removeprefix("FOUND "))
    return found


@pytest.fixture
def generate(launcher: Launcher, models: dict[str, Path], tmp_path: Path) -> Any:
    def generate(
        kind: str, rows: list[dict[str, Any]], *arguments: str, name: str = "run", ranks: int = 1
    ) -> list[dict[str, Any]]:
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        engine = {**ENGINE, "kv_cache_memory_bytes": 64 << 20}
        common = [f"model={models[kind]}", f"run.dir={tmp_path / name}", f"data.path={data}", "run.report=false"]
        options = [f"engine={json.dumps(engine)}"]
        job = launcher.dpgen("run", *arguments, *common, *options, ranks=ranks)
        assert job.wait() == 0, job.output
        return load_result(tmp_path / name)

    return generate


def test_embeddings_are_those_of_llm_embed(
    generate: Any, expected: dict[str, Any], launcher: Launcher, tmp_path: Path
) -> None:
    rows = [{"text": text} for text in [*TEXTS, LONG]]
    recipe = str(REPO / "conf" / "embed.yaml")
    result = generate("bert", rows, recipe, "output.embedding_dtype=float32", ranks=2)
    found = np.array([row["embedding"] for row in result])
    assert np.abs(found[:-1] - np.array(expected["embed"])).max() < 1e-5
    assert [row["num_chunks"] for row in result] == [1] * len(TEXTS) + [len(expected["chunks"])]
    lengths, chunks = zip(*expected["chunks"], strict=True)
    mean = np.average(np.array(chunks), axis=0, weights=lengths)
    assert np.abs(found[-1] - mean / np.linalg.norm(mean)).max() < 1e-5
    assert read_run_json(tmp_path / "run")["engine"]["pooled"]["width"] == 128
    verified = launcher.dpgen("verify", str(tmp_path / "run"))
    assert verified.wait() == 0, verified.output


def test_shorter_embeddings_of_a_decoder_are_those_of_llm_embed(generate: Any, expected: dict[str, Any]) -> None:
    rows = [{"text": text} for text in TEXTS]
    result = generate("qwen", rows, "task=embed", "data.prompt_column=text", "output.dimensions=16")
    assert np.abs(np.array([row["embedding"] for row in result]) - np.array(expected["short"])).max() < 1e-5


def test_scores_are_those_of_llm_score(generate: Any, expected: dict[str, Any]) -> None:
    recipe = str(REPO / "conf" / "rerank.yaml")
    for kind, key in (("cross", "score"), ("bert", "cosine")):
        rows = [*PAIRS, *(row for _, row, _, _ in BAD_PAIRS)]
        result = generate(kind, rows, recipe, "data.too_long=error", name=key)
        for row, scores in zip(result, expected[key], strict=False):
            assert row["score"] == pytest.approx(scores, abs=1e-5)
        errors = [row["error"]["type"] for row in result[len(PAIRS) :]]
        assert errors == [error_type for _, _, error_type, _ in BAD_PAIRS], "each bad row fails alone"


def test_classes_are_those_of_llm_classify_with_the_models_names(generate: Any, expected: dict[str, Any]) -> None:
    result = generate("classes", [{"text": text} for text in TEXTS], "task=classify", "data.prompt_column=text")
    for row, probs in zip(result, expected["probs"], strict=True):
        assert list(row["probs"]) == list(LABELS.values())
        assert list(row["probs"].values()) == pytest.approx(probs, abs=1e-5)
        assert row["label"] == LABELS[int(np.argmax(probs))]


def test_rewards_are_those_of_llm_encode_by_row_and_by_token(generate: Any, expected: dict[str, Any]) -> None:
    recipe, rows = str(REPO / "conf" / "reward.yaml"), [{"messages": chat} for chat in CHATS]
    by_row = generate("reward", rows, recipe)
    assert [row["reward"] for row in by_row] == pytest.approx([value for [value] in expected["classify"]], abs=1e-5)
    by_token = generate("reward", rows[:6], recipe, "output.reward_per=token", name="tokens")
    for row, values in zip(by_token, expected["token_classify"], strict=False):
        assert row["reward"] == pytest.approx([value for [value] in values], abs=1e-5)


def test_sentence_transformers_embeds_the_same_and_reads_every_type(generate: Any, models: dict[str, Path]) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.util.quantization import quantize_embeddings
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models["qwen"])
    tokenizer.pad_token = tokenizer.eos_token  # which it needs for texts of several lengths
    tokenizer.save_pretrained(models["qwen"])
    arguments, rows = ("task=embed", "data.prompt_column=text"), [{"text": text} for text in TEXTS]
    found = {
        dtype: np.array(
            [
                row["embedding"]
                for row in generate("qwen", rows, *arguments, f"output.embedding_dtype={dtype}", name=dtype)
            ]
        )
        for dtype in ("float32", "int8", "binary")
    }
    exact, util = found["float32"].astype(np.float32), sentence_transformers.util
    own = sentence_transformers.SentenceTransformer(str(models["qwen"]), device="cpu").encode(TEXTS)
    assert np.abs(exact - own).max() < 1e-5
    expected = util.semantic_search(own, own, top_k=3)
    for hits, others in zip(util.semantic_search(exact, own, top_k=3), expected, strict=True):
        assert [hit["score"] for hit in hits] == pytest.approx([hit["score"] for hit in others], abs=1e-5)
    assert np.abs(np.diag(util.cos_sim(found["int8"].astype(np.float32), exact)) - 1).max() < 1e-3
    assert (found["binary"] == quantize_embeddings(exact, "binary")).all()
