"""Declare the sections of the configuration: each key's default, help and limits.

- Each field carries its help, so `--help` and conf/reference.yaml can't drift from the code (tests compare them).
- Importing this module loads nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

MISSING = "???"  # OmegaConf's mark of a value that must be given


def option(help: str, default: Any = None, *, factory: Any = None, minimum: float | None = None) -> Any:
    """Return a field with its default, its help, and the least value it may have."""
    metadata = {"help": help, "minimum": minimum}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunConfig:
    """Hold `run.*`: where the run lives and how it behaves."""

    dir: str = option("the run directory: journal, result and report; required", MISSING)
    seed: int | None = option(
        "seed of the run; the seed of a row is derived from it, the row's index and the sample's index; "
        "null leaves sampling unseeded (and not reproducible)",
        0,
    )
    resume: Literal["auto", "never", "force"] = option(
        "if the run directory holds an unfinished run: auto resumes it if nothing that changes results differs, "
        "force resumes it whatever differs but the input, never rejects any directory that is not empty (but a job "
        "that torchrun --max-restarts or SLURM restarts resumes its own run)",
        "auto",
    )
    retry_errors: Any = option(
        "generate failed rows again: true, or the error types to retry, e.g. [poison_row]; also in a finished run",
        False,
    )
    engine: Literal["vllm", "fake"] = option(
        "what generates: vllm, or fake, a stand-in without a model to try a configuration with", "vllm"
    )
    log_level: Literal["debug", "info", "warning", "error"] = option(
        "the lowest level of the engine's log lines that are shown on the terminal; all of the engine's lines are in "
        "RUN_DIR/logs/rank-N.engine.log",
        "warning",
    )
    log_format: Literal["text", "json"] = option(
        "of dpgen's log lines: text for people, json for one JSON object a line", "text"
    )
    engine_timeout_s: float = option(
        "restart an engine that has work but makes no progress for this many seconds, since it hangs",
        600.0,
        minimum=1,
    )
    engine_start_timeout_s: float = option(
        "the same while it starts: seconds for importing vLLM, and again for loading the model", 3600.0, minimum=1
    )
    max_engine_deaths: int = option(
        "abandon an engine after this many deaths in a row without a finished row between them; other ranks take "
        "its rows",
        8,
        minimum=1,
    )
    time_limit: str | None = option("stop after this time, resumable: seconds, or 'H:MM:SS' (in quotes, for YAML)")
    stop_margin_s: float = option("seconds before SLURM's end time at which the run stops", 60.0, minimum=0)
    progress_interval_s: float = option("seconds between progress lines where there is no terminal", 30.0, minimum=0.1)
    progress: Literal["run", "ranks"] = option(
        "what is shown while a run goes: the whole run, or ranks for a line on each rank, too; 'dpgen status' shows "
        "both at any time",
        "run",
    )
    show_rows: int = option(
        "how many rows are logged at the end, drawn from those of rank 0: the end of the prompt, the beginning of the "
        "answer",
        3,
        minimum=0,
    )
    report: bool = option(
        "write RUN_DIR/report.html when the run ends: a page with charts, errors and a few rows; 'dpgen report' writes "
        "it at any time",
        True,
    )
    max_leading_errors: int = option(
        "stop the run if its first rows all fail, this many of them and a few from the rest of the order, since then "
        "the fault is not in the rows; 0: never; without effect once a row of the run has succeeded",
        100,
        minimum=0,
    )
    allow_all_errors: bool = option("end with status 0 also if no row of the run has succeeded", False)


@dataclass(frozen=True)
class DataConfig:
    """Hold `data.*`: the rows, and how a row becomes a prompt."""

    path: Any = option(
        "what to read: a file, glob, list of files, directory, save_to_disk directory, or Hub name; each may be an "
        "address, too (s3://, gs://, az://, hf://datasets/..., https://), which is fetched once a node; required",
        MISSING,
    )
    storage_options: dict[str, Any] = option(
        "options of fsspec for the store of data.path, e.g. {endpoint_url: ..., anon: true}; credentials rather come "
        "from the environment",
        factory=dict,
    )
    cache_dir: str | None = option(
        "where fetched files are kept, best on a disk of each node; by default in the cache folder of datasets"
    )
    format: Literal["auto", "rows", "openai_batch"] = option(
        "what the files hold: rows; or openai_batch, a request a line, {custom_id, method, url, body}, as OpenAI's "
        "Batch API and `vllm run-batch` take them; auto takes files of JSON lines for requests if their first lines "
        "are some and no key says how rows become prompts",
        "auto",
    )
    name: str | None = option("the Hub dataset's configuration name")
    split: str | None = option("the split; may be left out where there is only one")
    revision: str | None = option("the Hub dataset's branch, tag or commit")
    prompt_column: str | None = option("a text column that is the prompt, as LLM.generate takes it")
    messages_column: str | None = option("a column of chat messages, as LLM.chat takes it")
    template: str | None = option(
        "a Jinja template over the columns that makes the prompt: 'Q: {{ question }}'; {{ row['my col'] }} where a "
        "column's name is no variable; or its file, relative to the working directory: '@prompts/solve.jinja'"
    )
    token_ids_column: str | None = option("a column of lists of token ids that are the prompt")
    completion_column: str | None = option(
        "a text column with a given completion of each prompt: its log-probability is computed, nothing is generated"
    )
    query_column: str | None = option(
        "with task=score or classify: a text column that is the first text of a pair, as LLM.score takes it"
    )
    document_column: str | None = option("a text column that is the second text of the pair")
    documents_column: str | None = option(
        "in its place, with task=score: a column of lists of texts, each scored with the query, as in reranking"
    )
    too_long: Literal["error", "truncate", "chunk_mean"] = option(
        "with another task than generate, what becomes of a text that exceeds the model's context: error, "
        "prompt_too_long; truncate, its beginning is read, and a column num_cut_tokens says how much was cut; "
        "chunk_mean, for task=embed: its parts' embeddings are averaged, and a column num_chunks says how many",
        "error",
    )
    as_chat: bool = option(
        "send the text of prompt_column or template as one user message through the chat template", False
    )
    system_prompt: str | None = option(
        "a system message put before the others (with messages_column or as_chat), or its file: '@prompts/system.txt'"
    )
    system_prompt_column: str | None = option("a text column that is the system message; a null keeps system_prompt")
    prefill_column: str | None = option(
        "a text column that begins the assistant's answer; the model continues it, and generated_text holds only what "
        "it adds; null or empty: none"
    )
    chat_template: Any = option(
        "a chat template, or the path of one, instead of the model's own; {name: tool_use} takes one of the "
        "tokenizer's by its name"
    )
    chat_template_kwargs: dict[str, Any] = option(
        "passed to the chat template, e.g. {enable_thinking: false}", factory=dict
    )
    chat_template_kwargs_column: str | None = option(
        "a column of objects, or of JSON text, laid over chat_template_kwargs row by row"
    )
    tools: Any = option(
        "functions for the chat template: a list, in OpenAI's form or {name: ..., parameters: ...} alone, or JSON text "
        "of one, or its file: '@tools.json'"
    )
    tools_column: str | None = option(
        "a column of the same, as lists or JSON text; a null keeps tools, an empty list is none"
    )
    add_generation_prompt: bool = option("end a chat prompt with the opening of the assistant's answer", True)
    continue_final_message: bool = option("leave the last chat message open, for the model to continue", False)
    lora_column: str | None = option(
        "a column that names the row's adapter in lora; null: the model without an adapter; with more adapters than "
        "engine.max_loras (4 unless given) the rows of each run together, unless work.order=dataset"
    )
    render_timeout_s: float = option(
        "reject a row, as render_timeout, whose prompt takes longer than this many seconds to render", 60.0, minimum=0.1
    )
    images_column: Any = option(
        "a column of images for models that see, or a list of columns: what datasets stores (Image), bytes, paths, or "
        "data: and http(s): URLs, each one or a list a row; they fill the messages' placeholders ({type: image}) in "
        "order, or else come before the first user's text; null: none"
    )
    audios_column: Any = option("the same of audio, for models that hear; placeholders are {type: audio}")
    videos_column: Any = option("the same of videos; placeholders are {type: video}")
    media_dir: str | None = option(
        "the folder that relative paths of images, audio and video start from; only files below it are read, links "
        "followed; by default the folders of the input's files"
    )
    fetch_urls: list[str] = option(
        "hosts that images, audio and video may be fetched from over http(s), redirects included: [images.example.com, "
        "'*.example.org', 'host:8080']; none by default; an address in a private network is never fetched",
        factory=list,
    )
    fetch_timeout_s: float = option(
        "seconds in which one image, audio or video is fetched, repeated tries included", 30.0, minimum=0.1
    )
    max_media_bytes: int = option(
        "reject a row, as media_too_large, with an image, audio or video whose file is larger", 256 << 20, minimum=1
    )
    max_image_pixels: int = option(
        "reject a row, as media_too_large, with an image of more pixels by its header, before it is decoded; the "
        "default is Pillow's and vLLM's own limit",
        178_956_970,
        minimum=1,
    )
    media_workers: Any = option(
        "worker processes of each rank that load, decode and preprocess images, audio and video ahead of the engine: a "
        "number, or auto, by the rank's processor cores",
        "auto",
    )
    max_prepared_bytes: int = option(
        "the maximum bytes of each rank's images, audio and video that are preprocessed and wait for the engine",
        4 << 30,
        minimum=1 << 20,
    )
    max_held_bytes: int = option(
        "the maximum bytes of each rank's images, audio and video in shared memory: those that workers have, that wait "
        "for the engine, and of rows that it has, until these end; at the limit no row with media is admitted. The "
        "last rows tell how much the next ones will take, so one that is larger, or among the first, may exceed the "
        "limit",
        16 << 30,
        minimum=1 << 20,
    )
    select: str | None = option("a range of rows, start:stop or start:stop:step, counted from 0")
    limit: int | None = option("the maximum number of rows, after select; a run resumes with a larger one", minimum=0)
    columns: list[str] | None = option("the input columns kept in the result; all by default")


@dataclass(frozen=True)
class ParallelConfig:
    """Hold `parallel.*`: how ranks and devices are laid out."""

    tensor_parallel_size: int = option("GPUs that one model copy is split over, within a rank", 1, minimum=1)
    pipeline_parallel_size: int = option("pipeline stages of one model copy, within a rank", 1, minimum=1)
    launcher: Literal["internal", "external"] = option(
        "who starts the processes of one model copy: internal, one process a rank, and vLLM starts workers below it; "
        "external, one process a GPU, and neighbouring ranks make an engine together (vLLM's external_launcher)",
        "internal",
    )
    enable_expert_parallel: bool = option(
        "split a mixture of experts over GPUs: over those of a rank; with launcher=external over all ranks, whose "
        "engines then step together",
        False,
    )
    lock_step: bool = option(
        "with launcher=external: all engines step together although no experts are split; this only costs time", False
    )
    load_first: Literal["auto", "always", "never"] = option(
        "whether the first rank of each node loads its model before the others do, so that one rank downloads it and "
        "fills vLLM's compile cache: auto where the weights are not there yet, or that cache is not and a rank has "
        "fewer than 16 cores",
        "auto",
    )
    sync_kv_cache: bool = option("give every rank the smallest rank's number of KV cache blocks", True)
    share_devices: bool = option(
        "let the ranks of a node share its GPUs, and divide their memory, where there are too few", False
    )
    engines_per_rank: Any = option(
        "engine processes of a rank, which divide its GPU and its memory: a number, or auto, which starts more beside "
        "the first where the processor is the limit, as with small models, and logs why; always 1 with tensor or "
        "pipeline parallelism, with launcher=external, and, for auto, on the CPU",
        "auto",
    )


@dataclass(frozen=True)
class WorkConfig:
    """Hold `work.*`: in which order rows run, and how ranks claim them."""

    order: Literal["auto", "dataset", "longest_first", "prefix"] = option(
        "which rows run first: dataset, in input order; longest_first, by work.hint_column, or else by the rows' own "
        "max_tokens, or else by measured lengths of rows with the same prompt, or else by prompt lengths; prefix, "
        "rows that share a prompt prefix together, for vLLM's prefix cache; auto chooses from a sample of the data, "
        "and logs the choice",
        "auto",
    )
    hint_column: str | None = option("a column of numbers that estimate how long rows get, e.g. expected output tokens")
    steal: bool = option(
        "a rank that has run out of rows, or is well ahead, steals rows from the fullest other shard", True
    )
    claim_rows: int = option(
        "the maximum number of rows that a rank claims from a shard at a time, and no more than max_num_seqs; claims "
        "shrink towards the end",
        64,
        minimum=1,
    )
    reserve_rows: int = option(
        "the maximum number of sequences that wait in the engine beyond max_num_seqs, so that it never runs short; "
        "fewer wait towards the end",
        32,
        minimum=0,
    )


@dataclass(frozen=True)
class OutputConfig:
    """Hold `output.*`: the final dataset."""

    format: Literal["parquet", "jsonl", "openai_batch"] = option(
        "of RUN_DIR/dataset; jsonl can't hold bytes, durations, maps, NaN and infinities, and holds dates, times and "
        "decimals as text; openai_batch, for a batch file alone, is the response file of OpenAI's Batch API and "
        "`vllm run-batch`: a response for each line",
        "parquet",
    )
    to: str | None = option(
        "a folder or address (s3://BUCKET/FOLDER) that the finished result is uploaded to, _SUCCESS last; an upload "
        "that broke off is continued by the same command; the run directory keeps its own copy"
    )
    storage_options: dict[str, Any] = option("options of fsspec for the store of output.to", factory=dict)
    rows_per_file: int = option("the maximum number of rows in one file of the result", 500_000, minimum=1)
    gather: Literal["auto", "always", "never"] = option(
        "send rows to rank 0 through gather_object: auto does where a rank does not see rank 0's run directory",
        "auto",
    )
    gather_bytes: int = option(
        "the maximum bytes of rows that rank 0 receives in one gather_object round", 64 << 20, minimum=1 << 16
    )
    token_ids: bool = option("add the column generated_token_ids", False)
    explode: bool = option("write each sample as a row of its own, with its number in a column sample_id", False)
    reasoning: Literal["keep", "split", "strip"] = option(
        "what a model thinks before it answers: keep it in generated_text, split it off into a column reasoning, or "
        "strip it",
        "keep",
    )
    reasoning_parser: str = option(
        "vLLM's reasoning parser that finds it, e.g. qwen3 or deepseek_r1; auto chooses by the model's type. "
        "Structured outputs begin after the reasoning, unless engine.reasoning_parser='' is set",
        "auto",
    )
    tool_parser: str | None = option(
        "vLLM's tool parser, e.g. hermes: takes tool calls out of generated_text, into a column tool_calls of "
        "{id, name, arguments}"
    )
    messages: bool = option(
        "add the column messages: the conversation with the model's turn, ready for fine-tuning; one a row, hence with "
        "output.explode where a row has several samples",
        False,
    )
    parse: Literal["text", "json"] = option(
        "how generated_text is read: as text; or as json, into a column parsed with its value as JSON text (a Markdown "
        "fence around it is no error)",
        "text",
    )
    schema: Any = option(
        "a JSON Schema that every text follows: the schema itself, its file ('@schemas/answer.json'), or the import "
        "path of a Pydantic model (package.module:Model); sets sampling.structured_outputs.json and parse=json, and "
        "gives the column parsed its types"
    )
    embedding_dtype: Literal["float32", "float16", "int8", "binary"] = option(
        "of the column embedding, with task=embed: int8 scales each vector so that its largest number is 127, which "
        "keeps cosine similarities; binary has a bit for each dimension, 1 above 0, packed into int8 as "
        "sentence-transformers does",
        "float32",
    )
    dimensions: int | None = option(
        "keep this many dimensions of an embedding, of models that were trained for it (Matryoshka)", minimum=1
    )
    normalize: bool | None = option(
        "scale embeddings to length 1; null as the model's files say, which is true for nearly all"
    )
    reward_per: Literal["row", "token"] = option(
        "with task=reward: one reward a row (the last token's, of models that give one to each token), or a list with "
        "one a token",
        "row",
    )
    track: list[str] = option(
        "where the run's numbers go beside RUN_DIR/status: prometheus (a text file, RUN_DIR/status/metrics.prom), "
        "tensorboard (RUN_DIR/status/tensorboard), wandb (set up by its own variables, e.g. WANDB_PROJECT); each needs "
        "its package",
        factory=list,
    )

    @property
    def reasoning_parser_or_none(self) -> str | None:
        """Return `reasoning_parser` if it is used."""
        return None if self.reasoning == "keep" else self.reasoning_parser

    @property
    def parses_with_vllm(self) -> bool:
        """Return True if vLLM's parsers take reasoning or tool calls out of texts."""
        return self.reasoning != "keep" or self.tool_parser is not None

    @property
    def parses_json(self) -> bool:
        """Return True if texts are read as JSON."""
        return self.parse == "json" or self.schema is not None
