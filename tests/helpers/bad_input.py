"""List bad input: every kind of bad row and of bad configuration, each with its error.

tests/jobs/test_bad_input.py gives all of it to a user's command: `dpgen run`, on real vLLM.
"""

from __future__ import annotations

from typing import Any

HELLO = [{"role": "user", "content": "hello"}]
LONG = "word " * 400  # the test's model has a context of 256 tokens

# (what is wrong, the row, the error's type, words of its message), by the key that names the prompt's source.
BAD_ROWS: dict[str, list[tuple[str, dict[str, Any], str, str]]] = {
    "data.messages_column": [
        ("too long", {"messages": [{"role": "user", "content": LONG}]}, "prompt_too_long", "256"),
        ("no value", {"messages": None}, "wrong_type", "list"),
        ("no messages", {"messages": []}, "empty_prompt", "the list of messages is empty"),
        ("an unknown role", {"messages": [{"role": "wizard", "content": "x"}]}, "chat_template_failed", "wizard"),
        ("no role", {"messages": [{"role": None, "content": "x"}]}, "wrong_type", "role"),
        ("temperature below 0", {"messages": HELLO, "temperature": -1.0}, "bad_sampling", "temperature"),
        ("temperature not a number", {"messages": HELLO, "temperature": float("nan")}, "bad_sampling", "temperature"),
        ("max_tokens 0", {"messages": HELLO, "max_tokens": 0}, "bad_sampling", "max_tokens"),
        ("max_tokens below 0", {"messages": HELLO, "max_tokens": -5}, "bad_sampling", "max_tokens"),
        ("top_p above 1", {"messages": HELLO, "top_p": 1.5}, "bad_sampling", "top_p"),
        ("top_p 0", {"messages": HELLO, "top_p": 0.0}, "bad_sampling", "top_p"),
        ("top_k below -1", {"messages": HELLO, "top_k": -7}, "bad_sampling", "top_k"),
        ("min_p above 1", {"messages": HELLO, "min_p": 2.0}, "bad_sampling", "min_p"),
        ("presence_penalty above 2", {"messages": HELLO, "presence_penalty": 9.0}, "bad_sampling", "presence_penalty"),
        ("frequency_penalty below -2", {"messages": HELLO, "frequency_penalty": -9.0}, "bad_sampling", "frequency"),
        ("repetition_penalty 0", {"messages": HELLO, "repetition_penalty": 0.0}, "bad_sampling", "repetition_penalty"),
        ("logprobs below 0", {"messages": HELLO, "logprobs": -1}, "bad_sampling", "logprobs=-1: must be at least 0"),
        (
            "more logprobs than the engine's limit",
            {"messages": HELLO, "logprobs": 21},
            "bad_sampling",
            "engine.max_logprobs=20",
        ),
        ("more logprobs than tokens", {"messages": HELLO, "prompt_logprobs": 600}, "bad_sampling", "only 512 tokens"),
        ("min_tokens below 0", {"messages": HELLO, "min_tokens": -1}, "bad_sampling", "min_tokens"),
        ("min_tokens above max_tokens", {"messages": HELLO, "min_tokens": 9, "max_tokens": 3}, "bad_sampling", "min_"),
        ("an empty stop string", {"messages": HELLO, "stop": [""]}, "bad_sampling", "stop"),
        (
            "a regex that is not valid",
            {"messages": HELLO, "structured_outputs": {"regex": "a(b"}},
            "bad_sampling",
            "a(b",
        ),
        (
            "a schema that is not valid",
            {"messages": HELLO, "structured_outputs": {"json": {"type": "objekt"}}},
            "bad_sampling",
            "Invalid type: objekt",
        ),
        (
            "a constraint that is no JSON",
            {"messages": HELLO, "structured_outputs": "{"},
            "bad_sampling",
            "not valid JSON",
        ),
        (
            "a token that does not exist",
            {"messages": HELLO, "allowed_token_ids": [99999]},
            "bad_sampling",
            "allowed_token",
        ),
        ("no token allowed", {"messages": HELLO, "allowed_token_ids": []}, "bad_sampling", "allowed_token"),
    ],
    "data.prompt_column": [
        ("no value", {"prompt": None}, "wrong_type", "null"),
        ("empty", {"prompt": ""}, "empty_prompt", ""),
        ("too long", {"prompt": LONG}, "prompt_too_long", "256"),
        ("n 0", {"prompt": "hello", "n": 0}, "bad_sampling", "n must be"),
        ("n below 0", {"prompt": "hello", "n": -1}, "bad_sampling", "n must be"),
        (
            "a seed of more than 64 bits",
            {"prompt": "hello", "seed": 2**64, "temperature": 1.0},
            "bad_sampling",
            "seed=18446744073709551616: must be from -2**63 to 2**64 - 1",
        ),
        (
            "a seed whose last sample's has more than 64 bits",
            {"prompt": "hello", "seed": 2**64 - 1, "n": 2, "temperature": 1.0},
            "bad_sampling",
            "2**63 to 2**64 - 2, as the last of n=2 samples",
        ),
    ],
    "data.token_ids_column": [
        ("no value", {"ids": None}, "wrong_type", "ids is null, not a list of token ids"),
        ("a text", {"ids": "1 2 3"}, "wrong_type", "ids is a str"),
        ("no token", {"ids": []}, "empty_prompt", "no token ids"),
        ("a null", {"ids": [1, None]}, "wrong_type", "item 1 is null"),
        ("a number that is not whole", {"ids": [1, 2.5]}, "wrong_type", "item 1 is a float"),
        ("a truth value", {"ids": [True]}, "wrong_type", "item 0 is a bool"),
        ("a negative id", {"ids": [1, -1]}, "out_of_vocabulary", "-1, which is negative"),
        ("an id beyond the vocabulary", {"ids": [99999]}, "out_of_vocabulary", "99999"),
        ("too long", {"ids": [5] * 400}, "prompt_too_long", "256"),
    ],
    "data.template": [
        ("no value where one is used", {"kind": "upper", "text": None}, "template_failed", "upper"),
        ("a division by zero", {"kind": "divide", "number": 0}, "template_failed", "zero"),
        ("arithmetic with a text", {"kind": "add", "text": "x"}, "template_failed", ""),
        (
            "a field that is missing",
            {"kind": "field", "meta": {"author": None}},
            "template_failed",
            "no attribute 'name'",
        ),
        ("no struct at all", {"kind": "field", "meta": None}, "template_failed", ""),
        ("an item that is missing", {"kind": "item", "list": []}, "template_failed", ""),
        ("access that the sandbox forbids", {"kind": "inside"}, "template_failed", "unsafe"),
        ("an empty result", {"kind": "nothing"}, "empty_prompt", ""),
        ("a result that is too long", {"kind": "repeat", "number": 100_000}, "prompt_too_long", "256"),
    ],
}

# The same for rows that name an adapter of conf/lora.yaml.
BAD_ADAPTER_ROWS: list[tuple[str, dict[str, Any], str, str]] = [
    ("an adapter that is not there", {"question": "hello", "adapter": "cod"}, "unknown_adapter", "did you mean 'code'"),
    ("an adapter without a name", {"question": "hello", "adapter": ""}, "unknown_adapter", "adapters: code, math"),
    ("an adapter by its number", {"question": "hello", "adapter": 1}, "wrong_type", "adapter is an int, not a string"),
    (
        "a prompt's log-probabilities beside adapters, on the CPU",
        {"question": "hello", "adapter": "math", "scores": 1},
        "bad_sampling",
        "vLLM on the CPU can't compute a prompt's log-probabilities with lora",
    ),
]

# The same for the pairs of task=score; tests/data/prompts/test_pooling.py reads it, with a context of 8 tokens, and
# tests/jobs/test_tasks_vllm.py runs it.
BAD_PAIRS: list[tuple[str, dict[str, Any], str, str]] = [
    ("no query", {"query": None, "documents": ["x"]}, "wrong_type", "query is null, not a string"),
    ("no documents", {"query": "x", "documents": None}, "wrong_type", "documents is null, not a list"),
    ("an empty list of documents", {"query": "x", "documents": []}, "empty_prompt", "documents is an empty list"),
    ("a document that is null", {"query": "x", "documents": ["y", None]}, "wrong_type", "documents is null, not a str"),
    ("a pair that is too long", {"query": "the", "documents": ["dog " * 99]}, "prompt_too_long", "data.too_long=trunc"),
]

# The same for parts of a prompt that come from columns; tests/jobs/test_prompt_columns.py runs it, on a recipe.
BAD_PROMPT_COLUMNS: list[tuple[str, dict[str, Any], str, str]] = [
    ("a system message that is no text", {"system": ["be brief"]}, "wrong_type", "system is a list, not a string"),
    ("a beginning that is no text", {"prefill": 3}, "wrong_type", "prefill is an int, not a string"),
    ("tools that are a number", {"tools": 3}, "bad_tools", "tools are an int, not a list of functions"),
    ("tools that are no JSON", {"tools": "[{"}, "bad_tools", "not valid JSON"),
    ("a tool without a name", {"tools": [{"parameters": {}}]}, "bad_tools", "tool 0 has no 'name'"),
    ("a tool that is no function", {"tools": [{"type": "web_search"}]}, "bad_tools", "the type 'web_search'"),
    ("a variable that is unknown", {"chat": {"enable_thinkng": False}}, "bad_template_kwargs", "'enable_thinking'?"),
    ("a variable with a key of its own", {"chat": {"tools": []}}, "bad_template_kwargs", "chat may not hold tools"),
    ("variables that are no JSON", {"chat": "{enable"}, "bad_template_kwargs", "not valid JSON"),
    ("variables that are a list", {"chat": [1]}, "bad_template_kwargs", "chat is a list, not an object"),
    ("a stop string that is a number", {"stop": 3}, "bad_sampling", "stop"),
    ("an empty stop string", {"stop": ""}, "bad_sampling", "stop"),
    ("a null among the stop strings", {"stop": ["a", None]}, "bad_sampling", "stop"),
]

_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_NO_URL = [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
_NO_IMAGE = [{"role": "user", "content": [{"type": "image"}]}]
_UUID = [{"role": "user", "content": [{"type": "image_url", "image_url": None, "uuid": "7"}]}]

# The same for lines of a batch file, (what is wrong, URL, body, ...); tests/data/openai_batch runs it. Lines that are
# no requests at all are in its test_lines.py; what only vLLM rejects is in tests/engine/test_server_requests_vllm.py.
BAD_REQUESTS: list[tuple[str, str, dict[str, Any], str, str]] = [
    ("a stream", _CHAT, {"messages": HELLO, "stream": True}, "bad_request", "'stream' is set"),
    (
        "an echo of ids",
        _COMPLETIONS,
        {"prompt": [5], "echo": True},
        "unsupported_request",
        "'echo' of a prompt of token",
    ),
    (
        "options of the image processor",
        _CHAT,
        {"messages": HELLO, "mm_processor_kwargs": {"max_pixels": 4}},
        "unsupported_request",
        "'mm_processor_kwargs' is not supported: set engine.mm_processor_kwargs",
    ),
    ("beam search", _CHAT, {"messages": HELLO, "use_beam_search": True}, "unsupported_request", "'use_beam_search'"),
    ("a chat template", _CHAT, {"messages": HELLO, "chat_template": "x"}, "bad_request", "set data.chat_template"),
    (
        "a chat template among the variables",
        _CHAT,
        {"messages": HELLO, "chat_template_kwargs": {"chat_template": "x"}},
        "bad_request",
        "set data.chat_template",
    ),
    (
        "a variable that is none",
        _CHAT,
        {"messages": HELLO, "chat_template_kwargs": {"tokenize": True}},
        "bad_request",
        "may not hold 'tokenize'",
    ),
    (
        "variables that are a list",
        _CHAT,
        {"messages": HELLO, "chat_template_kwargs": [1]},
        "bad_request",
        "'chat_template_kwargs' is a list",
    ),
    (
        "a flag that is a text",
        _CHAT,
        {"messages": HELLO, "add_generation_prompt": "yes"},
        "bad_request",
        "'add_generation_prompt' is a str, not true or false",
    ),
    ("no tool", _CHAT, {"messages": HELLO, "tools": []}, "bad_request", "'tools' is not a list of at least one tool"),
    (
        "a tool that is no function",
        _CHAT,
        {"messages": HELLO, "tools": [{"type": "x"}]},
        "bad_request",
        "tool 0 is not",
    ),
    ("a tool without a name", _CHAT, {"messages": HELLO, "tools": [{"function": {}}]}, "bad_request", "no 'name'"),
    ("no messages", _CHAT, {}, "wrong_type", "messages are null"),
    ("an empty list of messages", _CHAT, {"messages": []}, "empty_prompt", "the list of messages is empty"),
    ("an image without a URL", _CHAT, {"messages": _NO_URL}, "wrong_type", "has no 'image_url' with the image"),
    ("a placeholder for an image", _CHAT, {"messages": _NO_IMAGE}, "media_mismatch", "has no image: put it there"),
    ("an image by its uuid", _CHAT, {"messages": _UUID}, "unsupported_content", "with a uuid"),
    ("no prompt", _COMPLETIONS, {}, "bad_request", "'prompt' is null"),
    ("an empty prompt", _COMPLETIONS, {"prompt": ""}, "empty_prompt", "'prompt' is empty"),
    ("several prompts", _COMPLETIONS, {"prompt": ["a", "b"]}, "unsupported_request", "'prompt' holds 2 prompts"),
    ("a suffix", _COMPLETIONS, {"prompt": "a", "suffix": "b"}, "unsupported_request", "'suffix'"),
    ("embeddings of a prompt", _COMPLETIONS, {"prompt_embeds": "b"}, "unsupported_request", "'prompt_embeds'"),
    ("a text among token ids", _COMPLETIONS, {"prompt": [1, "a"]}, "wrong_type", "'prompt': item 1 is a str"),
    ("a negative token id", _COMPLETIONS, {"prompt": [-1]}, "out_of_vocabulary", "negative"),
    ("another endpoint", "/v1/embeddings", {"input": "a"}, "unsupported_request", "needs task=embed"),
]

TEMPLATE = (
    "{% if kind == 'upper' %}{{ text.upper() }}{% elif kind == 'divide' %}{{ 1 / number }}"
    "{% elif kind == 'add' %}{{ text + 1 }}{% elif kind == 'field' %}{{ meta.author.name }}"
    "{% elif kind == 'item' %}{{ list[3].upper() }}{% elif kind == 'inside' %}{{ kind.__class__.__mro__ }}"
    "{% elif kind == 'nothing' %}{% elif kind == 'repeat' %}{{ 'word ' * number }}{% else %}{{ text }}{% endif %}"
)

_PROGRAM = ["data.prompt_column=null", "data.messages_column=null"]
_BATCH = ["data.prompt_column=null", "data.format=openai_batch"]

# (what is wrong, arguments of the command, words of its error). All exit with status 2, before a model loads.
BAD_CONFIGS: list[tuple[str, list[str], str]] = [
    ("a misspelt key", ["data.promt_column=x"], "unknown key 'data.promt_column'; did you mean 'data.prompt_column'"),
    ("a misspelt section", ["dta.path=x"], "did you mean 'data.path'"),
    ("a section that is a number", ["run=3"], "run is a section of keys"),
    ("a number that is a word", ["run.seed=abc"], "run.seed"),
    ("an engine's number that is a word", ["engine.max_num_seqs=many"], "engine.max_num_seqs='many': must be a whole"),
    ("a choice that is not legal", ["run.resume=sometimes"], "'auto', 'never', 'force'"),
    ("a limit below its minimum", ["data.limit=-1"], "data.limit=-1: must be at least 0"),
    ("a range that is not valid", ["data.select=a:b"], "data.select='a:b'"),
    ("a time that is not valid", ["run.time_limit=soon"], "must be seconds, or H:MM:SS"),
    ("two prompts", ["data.messages_column=m"], "data.prompt_column and data.messages_column are set"),
    ("no prompt", ["data.prompt_column=null"], "none is set"),
    (
        "a batch file and a key that its lines give",
        ["data.format=openai_batch"],
        "data.prompt_column has no effect: with data.format=openai_batch each line is a whole request",
    ),
    (
        "images beside token ids",
        ["data.prompt_column=null", "data.token_ids_column=ids", "data.images_column=image"],
        "data.images_column and data.token_ids_column are set: token ids have no places for media",
    ),
    (
        "a URL in place of a host",
        ["data.fetch_urls=[https://x.org/a]"],
        "'https://x.org/a' is no host: write it without",
    ),
    ("a folder of images that is not there", ["data.media_dir=nowhere"], "data.media_dir=nowhere: there is no such"),
    ("a column of images that is not there", ["data.images_column=img"], "data.images_column: 'img' is no column"),
    ("a system prompt without a chat", ["data.system_prompt=Hello"], "needs a chat"),
    ("a key that another sets", ["engine.tensor_parallel_size=2"], "parallel.tensor_parallel_size"),
    ("not YAML", ["run.seed=["], "not valid YAML"),
    ("a comment as a value", ["sampling.stop=### Human"], "YAML reads a comment, and no value; for the text write"),
    ("a colon at the end of a text", ["sampling.stop=Question:"], "YAML reads {'Question': None}; for the text write"),
    ("a backslash and an n", ["sampling.stop=\\n"], "for a line break or a tab write 'sampling.stop=\"\\n\"'"),
    (
        "the same in a template",
        ["data.prompt_column=null", "data.template={{ prompt }}\\nA:"],
        "write, in bash, $'data.",
    ),
    ("a mapping as a text", ["sampling.stop=[Q: x]"], "YAML reads {'Q': 'x'}, no text; quotes make it one"),
    ("curly quotes", ["sampling.stop=“Question:”"], "“ is no quote in YAML"),
    ("Python's None", ["sampling.stop=None"], "None is a text here, not null"),
    ("no value", ["sampling.max_tokens="], "sampling.max_tokens has no value"),
    ("no blank after a colon", ["data.chat_template_kwargs={enable_thinking:false}"], "write enable_thinking: false"),
    ("a word for false", ["data.chat_template_kwargs={enable_thinking: no}"], "no is a text here, not false"),
    ("a key twice", ["sampling={n: 1, n: 2}"], "sampling.n is there twice"),
    ("a key without its section", ["temperature=0.5"], "unknown key 'temperature'; write sampling.temperature"),
    ("neither a file nor key=value", ["nonsense"], "no such configuration file: nonsense"),
    ("an unknown option", ["--fast"], "unknown option --fast"),
    ("input that is not there", ["data.path=nowhere.jsonl"], "no such file or directory: nowhere.jsonl"),
    ("a glob that matches nothing", ["data.path=nowhere/*.jsonl"], "no file matches nowhere/*.jsonl"),
    ("a kind of file that is unknown", ["data.path=README.md"], "is none of the known kinds"),
    ("a file whose content does not fit its name", ["data.path={folder}/broken.jsonl"], "broken.jsonl"),
    ("token ids and a text", ["data.token_ids_column=ids"], "data.prompt_column and data.token_ids_column are set"),
    ("a beginning without a chat", ["data.prefill_column=prompt"], "data.prefill_column needs a chat"),
    ("a column of a prompt's part that is not there", ["data.as_chat=true", "data.tools_column=promt"], "'prompt'"),
    ("tools that are no tools", ["data.as_chat=true", "data.tools=[{}]"], "data.tools: tool 0 has no 'name'"),
    ("tools that are no JSON", ["data.as_chat=true", "data.tools=@{folder}/broken.jsonl"], "not valid JSON"),
    (
        "tools in two places",
        ["data.as_chat=true", "data.tools=[{name: f}]", "data.chat_template_kwargs={tools: []}"],
        "data.chat_template_kwargs.tools and data.tools are set",
    ),
    (
        "tools for a chat template that takes none",
        ["data.as_chat=true", "data.tools=[{name: f}]", "data.chat_template={{ messages }}"],
        "data.tools: the chat template does not use 'tools'",
    ),
    (
        "a name of no chat template",
        ["data.as_chat=true", "data.chat_template={name: tool_use}"],
        "no chat template of this name; chat templates: default",
    ),
    (
        "a template's file that is not there",
        ["data.prompt_column=null", "data.template=@none.jinja"],
        "data.template=@none.jinja can't be read: there is no such file in the working directory",
    ),
    ("a revision of a file", ["data.revision=main"], "data.revision=main is for a dataset of the Hub"),
    ("a range without rows", ["data.select=100000:"], "data.select=100000:: selects none of the input's"),
    ("a range that ends before it begins", ["data.select=2:1"], "data.select=2:1: selects none of the input's"),
    ("an error type that is none", ["run.retry_errors=[poison_rwo]"], "did you mean 'poison_row'"),
    ("a run directory that is a file", ["run.dir=README.md"], "run.dir=README.md is a file: must be a directory"),
    ("a split that is not there", ["data.split=test"], "test"),
    ("a column that is not there", ["data.prompt_column=promt"], "did you mean 'prompt'"),
    ("a template's column that is not there", ["data.prompt_column=null", "data.template={{ promt }}"], "'prompt'"),
    ("a template that is not valid", ["data.prompt_column=null", "data.template={{ prompt"], "data.template, line 1"),
    ("a sampling column that is not there", ["sampling.from_columns={max_tokens: promt}"], "did you mean 'prompt'"),
    ("a kept column that is not there", ["data.columns=[promt]"], "data.columns: there is no column 'promt'"),
    ("log-probabilities of the whole vocabulary", ["sampling.logprobs=-1"], "sampling.logprobs=-1: must be how many"),
    (
        "more log-probabilities than a limit",
        ["sampling.logprobs=30", "engine.max_logprobs=10"],
        "engine.max_logprobs=10 allows fewer; leave that out, or set it to 30",
    ),
    ("a completion's column that is not there", ["data.completion_column=promt"], "did you mean 'prompt'"),
    (
        "samples where nothing is generated",
        ["data.completion_column=prompt", "sampling.n=2"],
        "sampling.n has no effect: data.completion_column",
    ),
    ("a schema's file that is not there", ["output.schema=@none.json"], "output.schema=none.json can't be read: there"),
    ("a schema that is a number", ["output.schema=3"], "output.schema=3: must be a JSON Schema, its file (@schemas"),
    (
        "a schema of a model that is not there",
        ["output.schema=json:Answer"],
        "output.schema=json:Answer: json has no A",
    ),
    (
        "a schema and another constraint",
        ["output.schema={type: array}", "sampling.structured_outputs={regex: a}"],
        "output.schema and sampling.structured_outputs.regex are set",
    ),
    (
        "a schema where nothing is generated",
        ["data.completion_column=prompt", "output.schema={type: array}"],
        "output.schema has no effect: data.completion_column",
    ),
    ("a rank's number of samples", ["sampling_by_rank=[{n: 2}]"], "sampling_by_rank[0].n can't be set"),
    (
        "a variable that the chat template does not use",
        ["data.as_chat=true", "data.chat_template_kwargs={enable_thinkng: false}"],
        "the chat template does not use 'enable_thinkng'",
    ),
    ("an adapter that is not there", ["lora.math=./no-such"], "lora.math=./no-such: there is no such directory"),
    ("an adapter that is a file", ["lora.math=README.md"], "lora.math=README.md: is a file"),
    ("a model as an adapter", ["lora.math=conf/demo/model"], "is no adapter: conf/demo/model holds no adapter_config"),
    (
        "adapters and no choice",
        ["lora={math: a, code: b}"],
        "lora holds 2 adapters (math, code): data.lora_column must",
    ),
    ("a choice without adapters", ["data.lora_column=adapter"], "data.lora_column needs lora"),
    ("an adapter without a place", ["lora.math=' '"], "lora.math=' ': must be the adapter's directory or Hub name"),
    (
        "a column of adapters that is not there",
        ["lora.math={folder}/adapter", "data.lora_column=promt"],
        "data.lora_column: 'promt' is no column of the dataset; did you mean 'prompt'",
    ),
    ("a check's pattern that is none", ["check.regex=("], "check.regex='(': is no regular expression"),
    ("a schema's file that is not there", ["check.json_schema=no-such.json"], "no-such.json can't be read: there"),
    ("a schema's file that is no JSON", ["check.json_schema=README.md"], "README.md: the text is not valid JSON"),
    ("a schema that is none", ["check.json_schema={type: objekt}"], "check.json_schema is no JSON Schema, at $.type"),
    ("a check that is not there", ["check.function=no_such:f"], "check.function=no_such:f: no_such can't be imported"),
    ("a program that is not there", [*_PROGRAM, "program.function=no_such:f"], "no_such can't be imported"),
    ("a program's name without a module", [*_PROGRAM, "program.function=f"], "must look like package.module:name"),
    (
        "a program that is not async",
        [*_PROGRAM, "program.function=json:loads"],
        "program.function=json:loads: must be an async function: async def loads(row, llm)",
    ),
    (
        "an option that the program does not take",
        [*_PROGRAM, "program.function=dpgen.programs.critique:revise", "program.options.rounds=3"],
        "can't be called with (row, llm, rounds=...), as program.options has it",
    ),
    (
        "options without a program",
        ["program.timeout_s=3"],
        "program.timeout_s has no effect: program.function is not set",
    ),
    (
        "a prompt beside a program",
        ["program.function=dpgen.programs.critique:revise"],
        "data.prompt_column has no effect: program.function makes a row's calls",
    ),
    (
        "checks beside a program",
        [*_PROGRAM, "program.function=dpgen.programs.critique:revise", "check.non_empty=true"],
        "check has no effect: program.function makes a row's calls",
    ),
    (
        "an unknown type of a program's column",
        [*_PROGRAM, "program.function=dpgen.programs.critique:revise", "program.returns={final: text}"],
        "program.returns.final: there is no type 'text'",
    ),
    (
        "a program's column that dpgen has itself",
        [*_PROGRAM, "program.function=dpgen.programs.critique:revise", "program.returns={row_id: integer}"],
        "program.returns.row_id: the result has a column 'row_id' of its own",
    ),
    (
        "a program of a model that generates nothing",
        [*_PROGRAM, "program.function=dpgen.programs.critique:revise", "task=embed"],
        "task=embed generates nothing, and program.function makes calls that do",
    ),
    (
        "an order by prompts of a program",
        [*_PROGRAM, "program.function=dpgen.programs.critique:revise", "work.order=prefix"],
        "work.order=prefix needs prompts",
    ),
    ("a check's name without a module", ["check.function=f"], "must look like package.module:name"),
    ("a finish reason that is none", ["check.finish_reason=[stopp]"], "did you mean 'stop'"),
    ("a fraction above 1", ["check.max_repetition=20"], "check.max_repetition=20.0: must be from 0 to 1"),
    (
        "a retry with several samples",
        ["check.non_empty=true", "check.retry_sampling.n=2"],
        "check.retry_sampling.n can't be set",
    ),
    (
        "a text of a grammar that is to be continued",
        ["check.continue_truncated=true", "sampling.structured_outputs.regex=a+"],
        "check.continue_truncated=true can't continue a text of output.schema or structured_outputs",
    ),
    ("retries without a check", ["check.max_attempts=5"], "check.max_attempts has no effect: no check is set"),
    (
        "responses to rows that are no requests",
        ["output.format=openai_batch"],
        "output.format=openai_batch answers the requests of a batch file, and the input is none",
    ),
    ("a task that is none", ["task=embedd"], "task"),
    (
        "sampling where nothing is sampled",
        ["task=embed", "sampling.temperature=0"],
        "sampling has no effect: task=embed",
    ),
    (
        "a check of what is not generated",
        ["task=classify", "check.non_empty=true"],
        "check has no effect: task=classify generates no text",
    ),
    ("a parsed text where none is generated", ["task=embed", "output.parse=json"], "output.parse has no effect"),
    ("a score of one text", ["task=score"], "task=score compares texts: set data.query_column"),
    (
        "a query without a document",
        ["task=score", "data.prompt_column=null", "data.query_column=prompt"],
        "make a pair: set the query's",
    ),
    (
        "documents for a classifier",
        ["task=classify", "data.prompt_column=null", "data.query_column=prompt", "data.documents_column=prompt"],
        "data.documents_column needs task=score",
    ),
    ("a query where text is generated", ["data.query_column=prompt"], "data.query_column needs task=score"),
    ("long texts cut where text is generated", ["data.too_long=truncate"], "data.too_long=truncate needs task=embed"),
    (
        "a mean of classes",
        ["task=classify", "data.too_long=chunk_mean"],
        "data.too_long=chunk_mean averages embeddings: task=classify has none",
    ),
    ("an embedding's type where none is made", ["output.embedding_dtype=int8"], "output.embedding_dtype=int8 has no"),
    (
        "an embedding's type in responses",
        [*_BATCH, "task=embed", "output.format=openai_batch", "output.embedding_dtype=int8"],
        "output.embedding_dtype has no effect: with output.format=openai_batch each line is a response",
    ),
    ("no dimensions", ["task=embed", "output.dimensions=0"], "output.dimensions=0: must be at least 1"),
    ("a reward a token where none is given", ["task=embed", "output.reward_per=token"], "output.reward_per=token has"),
    ("a model that is not there", ["model=./no-such-model"], "model=./no-such-model: there is no such directory"),
]

# The same for options of vLLM: the engine process rejects them, before a model loads.
BAD_ENGINE_CONFIGS: list[tuple[str, list[str], str]] = [
    ("an engine's key that is misspelt", ["engine.max_num_seq=3"], "did you mean 'engine.max_num_seqs'"),
    ("an engine's text that is a number", ["engine.revision=1e5"], "put it in quotes"),
    ("an engine's key of an older vLLM", ["engine.guided_decoding_backend=outlines"], "structured_outputs_config"),
    ("an engine's key that is of sampling", ["engine.top_p=0.9"], "unknown key 'engine.top_p': write sampling.top_p"),
    ("a context longer than the model's", ["engine.max_model_len=100000"], "max_model_len"),
    (
        "an adapter's rank above the limit",
        ["lora.x={folder}/rank-12", "engine.max_lora_rank=8"],
        "lora.x has rank 12; leave",
    ),
    ("adapters that are switched off", ["lora.x={folder}/rank-12", "engine.enable_lora=false"], "contradicts lora"),
    (
        "too few slots for adapters",
        ["lora.x={folder}/rank-12", "engine.max_loras=1"],
        "engine.max_loras=1: vLLM on the CPU",
    ),
    ("an adapter that only vLLM rejects", ["lora.x={folder}/odd"], "vLLM rejects lora.x="),
    ("a sampling key that is misspelt", ["sampling.top_q=1"], "did you mean 'sampling.top_"),
    ("a sampling number that is a word", ["sampling.temperature=hot"], "sampling"),
    ("a sampling key of an older vLLM", ["sampling.guided_json={type: object}"], "sampling.structured_outputs={json: "),
    ("a sampling key that is gone", ["sampling.best_of=2"], "unknown key 'sampling.best_of': vLLM has removed it"),
    ("a sampling key of beam search", ["sampling.use_beam_search=true"], "SamplingParams has no beam search"),
    (
        "a kind of structured output that is none",
        ["sampling.structured_outputs={json: {}, whitespace_patern: x}"],
        "did you mean 'sampling.structured_outputs.whitespace_pattern'",
    ),
    (
        "a schema that is not valid",
        ["output.schema={type: objekt}"],
        "vLLM rejects output.schema: Grammar error: Invalid",
    ),
    (
        "a schema that no grammar can follow",
        ["output.schema={type: array, items: {type: string}, uniqueItems: true}"],
        'vLLM rejects output.schema: Grammar error: Unimplemented keys: ["uniqueItems"]',
    ),
    (
        "a regular expression that is not valid",
        ["sampling.structured_outputs={regex: a(b}"],
        "vLLM rejects sampling.structured_outputs.regex: Grammar error: at 1(8): invalid regex",
    ),
    (
        "a grammar that is not valid",
        ["sampling.structured_outputs={grammar: 'start: foo'}"],
        "vLLM rejects sampling.structured_outputs.grammar: Grammar error",
    ),
    (
        "no choice",
        ["sampling.structured_outputs={choice: []}"],
        "vLLM rejects sampling.structured_outputs.choice: Choice '[]' cannot be an empty list",
    ),
    (
        "a choice that is a number",
        ["sampling.structured_outputs={choice: [3]}"],
        "vLLM rejects sampling.structured_outputs.choice: ",
    ),
    (
        "two constraints",
        ["sampling.structured_outputs={choice: [a], regex: a}"],
        "vLLM rejects sampling.structured_outputs: ",
    ),
    (
        "a rank's regular expression that is not valid",
        ["sampling_by_rank=[{}, {structured_outputs: {regex: a(b}}]"],
        "vLLM rejects sampling_by_rank[1].structured_outputs.regex: Grammar error",
    ),
    ("a token that the model does not have", ["sampling.allowed_token_ids=[99999]"], "vLLM rejects a sampling.* key: "),
    ("an adapter in sampling", ["sampling.lora_request=x"], "write lora={NAME: PATH}"),
    ("more log-probabilities than tokens", ["sampling.logprobs=600"], "logprobs=600: the model has only 512 tokens"),
    ("how log-probabilities are passed on", ["sampling.flat_logprobs=true"], "unknown key 'sampling.flat_logprobs'"),
    ("embeddings of a model that generates", ["task=embed"], "is a model that generates text; engine.runner=pooling"),
    ("dimensions that the model lacks", ["task=embed", "engine.runner=pooling", "output.dimensions=8"], "dimensions"),
    ("classes of a model without", ["task=classify", "engine.runner=pooling"], "has no head for classes"),
    ("a sampling key like no other", ["sampling.zzz=1"], "unknown key 'sampling.zzz'"),
    (
        "a retry's sampling key misspelt",
        ["check.non_empty=true", "check.retry_sampling.top_q=1"],
        "did you mean 'check.retry_sampling.top_",
    ),
    (
        "a retry's sampling number that is a word",
        ["check.non_empty=true", "check.retry_sampling.temperature=hot"],
        "vLLM rejects a check.retry_sampling.* key",
    ),
    ("a rank's sampling key misspelt", ["sampling_by_rank=[{}, {top_q: 1}]"], "did you mean 'sampling_by_rank[1].top_"),
    ("a rank's sampling number that is a word", ["sampling_by_rank=[{temperature: hot}]"], "sampling_by_rank[0]"),
]
