"""YAML files: what is written is what is meant, or the line is shown with a caret and how to write it."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import yaml
from helpers.jobs import REPO

from dpgen.config import loader, schema
from dpgen.config.yaml import yaml12
from dpgen.errors import ConfigError

HEAD = "run: {dir: out}\nmodel: some/model\ndata:\n  path: rows.jsonl\n"
BASE = HEAD + "  prompt_column: prompt\n"

# (the file's last lines, after HEAD or BASE; line and column of the caret; words of the message)
SLIPS = [
    ("a repeated section", BASE + "data:\n  limit: 1\n", (6, 1), "data is there twice: in line 3 and in line 6"),
    ("a repeated key", BASE + "  path: b\n", (6, 3), "data.path is there twice: in line 4 and in line 6"),
    ("a repeated key, deep", BASE + "engine: {a: {b: 1, b: 2}}\n", (6, 20), "engine.a.b is there twice"),
    (
        "a repeated key in a list",
        BASE + "sampling_by_rank:\n- n: 1\n  n: 2\n",
        (8, 3),
        "sampling_by_rank.0.n is there tw",
    ),
    ("the same number twice", BASE + "sampling: {logit_bias: {7: 1, 07: 2}}\n", (6, 31), "is there twice"),
    ("a tab", HEAD + "\tprompt_column: p\n", (5, 1), "a tab can't stand here; indent with blanks"),
    ("a tab after a key", HEAD + "  prompt_column:\tp\n", (5, 17), "a tab can't stand here"),
    ("braces", HEAD + "  template: {{ q }}\n", (5, 13), "put the text in quotes: template: '{{ q }}'"),
    ("braces and text", HEAD + "  template: {{ q }} is\n", (5, 21), "put the text in quotes: template: '{{ q }} is'"),
    ("braces in a list", BASE + "sampling: {stop: [{{ q }}]}\n", (6, 19), "put a text such as {{ name }} in quotes"),
    ("one brace", HEAD + "  template: {q}\n", (5, 14), "put a text in braces in quotes: '{q}'"),
    ("a colon", HEAD + "  template: Q: {{ q }}\n", (5, 14), "put the text in quotes: template: 'Q: {{ q }}'"),
    ("a colon at the end", BASE + "sampling:\n  stop: Q:\n", (7, 10), "put the text in quotes: stop: 'Q:'"),
    (
        "a colon in a list",
        BASE + "sampling:\n  stop:\n    - Q:\n",
        (8, 7),
        "YAML reads {'Q': None}; for the text write 'Q:'",
    ),
    ("an alias", "data:\n  path: *.jsonl\n", (2, 10), "put the text in quotes: path: '*.jsonl'"),
    ("an alias in a list", "data:\n  path:\n  - *.jsonl\n", (3, 6), "put the text in quotes: '*.jsonl'"),
    ("an anchor", BASE + "sampling:\n  stop: &nbsp; x\n", (7, 14), "put the text in quotes: stop: '&nbsp; x'"),
    ("an anchor of its own", BASE + "sampling:\n  stop: &amp x\n", (7, 9), "nothing refers to the anchor &amp"),
    ("a tag", BASE + "sampling:\n  stop: !x y\n", (7, 9), "put a text that begins with ! in quotes"),
    ("a Python object", BASE + "sampling: !!python/name:os.system\n", (6, 11), "!!python/name:os.system is no type"),
    ("a reserved character", BASE + "sampling:\n  stop: @x\n", (7, 9), "put the text in quotes: stop: '@x'"),
    ("a dash", BASE + "sampling:\n  stop: - x\n", (7, 9), "put the text in quotes: stop: '- x'"),
    ("a bar", BASE + "sampling:\n  stop: |\n  n: 1\n", (7, 9), "for the text | write '|'"),
    ("a comment", BASE + "sampling:\n  stop: ### Human\n", (7, 3), "for the text write stop: '### Human'"),
    ("no value", BASE + "  limit:\n", (6, 3), "data.limit has no value; leave the key out, or write null"),
    ("a backslash and an n", HEAD + "  template: 'Q\\nA {{ q }}'\n", (5, 13), "put it in double quotes"),
    ("the same without quotes", BASE + "sampling: {stop: \\n}\n", (6, 18), "put it in double quotes"),
    ("an unknown escape", BASE + 'sampling:\n  stop: "\\d"\n', (7, 11), "write \\\\, or use single quotes"),
    (
        "no blank",
        BASE + "sampling:\n  n:2\n  top_p: 1\n",
        (8, 8),
        "the line before: a blank is missing after the colon",
    ),
    ("no blank, later", BASE + "sampling:\n  top_p: 1\n  n:2\n", (8, 3), "a blank is missing after the colon: n: 2"),
    ("no blank in braces", BASE + "sampling: {n:2}\n", (6, 12), "a blank is missing after the colon of 'n:2'"),
    ("too deep", HEAD + "   prompt_column: p\n", (5, 17), "indented deeper than the line before"),
    ("not deep enough", HEAD + " prompt_column: p\n", (5, 2), "the indentation fits no line above"),
    ("an open quote", BASE + 'sampling:\n  stop: "a\n  n: 2\n', (7, 9), 'the quote " is not closed in this line'),
    ("a quote in quotes", BASE + "sampling:\n  stop: 'it's'\n", (7, 13), "inside of ' write ''"),
    ("an open bracket", BASE + "sampling:\n  stop: [a\n  n: 2\n", (8, 4), "the [ of line 7 is not closed"),
    ("an open brace", BASE + "sampling: {n: 2\n", (6, 11), "the { is not closed"),
    ("an equals sign", BASE + "sampling = 1\n", (6, 1), "this line is not `key: value`"),
    ("two documents", BASE + "---\nsampling: {}\n", (6, 1), "a configuration is one"),
    ("a control character", BASE + "\x07", (6, 1), "the character U+0007 can't stand in YAML"),
    (
        "a word for true",
        BASE + "engine: {enforce_eager: yes}\n",
        (6, 25),
        "write true, or for the text 'yes', with quotes",
    ),
    ("None", BASE + "sampling: {stop: None}\n", (6, 18), "None is a text here, not null; write null, or for the text"),
    ("None for a text", BASE + "work: {hint_column: None}\n", (6, 21), "None is a text here, not null"),
    ("curly quotes", BASE + "sampling:\n  stop: “Q:”\n", (7, 9), "“ is no quote in YAML"),
    ("curly quotes in a list", BASE + "sampling: {stop: [a, ‘b’]}\n", (6, 22), "‘ is no quote in YAML"),
    ("a lost quote", BASE + 'sampling:\n  stop: Q:"\n', (7, 9), 'a quote is lost: the text ends in "'),
    ("a lost quote in a list", BASE + 'sampling: {stop: [Q:"]}\n', (6, 19), "a quote is lost"),
    ("a lost quote of a key", BASE + 'engine: {a": 1}\n', (6, 10), "a quote is lost"),
    ("a no-break space", BASE + "sampling:\n  n:\u00a02\n", (7, 3), "U+00A0 looks like a blank and is none"),
    ("one behind a value", BASE + "sampling:\n  n: 2\u00a0\n", (7, 6), "U+00A0 looks like a blank"),
    ("one in the indentation", BASE + "sampling:\n\u00a0 n: 2\n", (7, 1), "U+00A0 looks like a blank"),
    ("a wide colon", BASE + "sampling:\n  n：2\n", (7, 3), "U+FF1A looks like a colon"),
    ("a mark of byte order", "run: {dir: x}\n\ufeffmodel: m\n", (2, 1), "U+FEFF looks like a blank"),
    ("a number sign in a text", BASE + "sampling:\n  stop: a #1\n", (7, 9), "for the text write stop: 'a #1'"),
    (
        "one before a column",
        HEAD + "  template: No. #{{ q }}\n",
        (5, 13),
        "for the text write template: 'No. #{{ q }}'",
    ),
    ("one in a path", BASE.replace("some/model", "m #2"), (2, 8), "for the text write model: 'm #2'"),
    ("a comment in a list", BASE + "sampling:\n  stop:\n  - ### Human\n", (8, 4), "for the text write - '### Human'"),
    ("an equals sign in braces", BASE + "sampling: {n=2}\n", (6, 12), "written n: 2, not n=2"),
    ("the same key as a float", BASE + "engine: {a: {1: 2, 1.0: 3}}\n", (6, 20), "engine.a.1.0 is there twice"),
    ("half of a pair", BASE + 'sampling: {stop: "\\ud800"}\n', (6, 18), "half of a surrogate pair"),
    ("a bracket too many", BASE + "sampling:\n  stop: [a]]\n", (7, 12), "this ] closes nothing"),
    ("a brace too many", BASE + "sampling: {n: 1}}\n", (6, 17), "this } closes nothing"),
    ("a number with _", BASE + "sampling: {max_tokens: 1_000}\n", (6, 24), "write 1000"),
]


def load(tmp_path: Path, text: str | bytes) -> schema.Config:
    path = tmp_path / "a.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return loader.load([str(path)], [])


@pytest.mark.parametrize(("text", "place", "words"), [slip[1:] for slip in SLIPS], ids=[slip[0] for slip in SLIPS])
def test_a_slip_is_shown_with_its_line_a_caret_and_how_to_write_it(
    tmp_path: Path, text: str, place: tuple[int, int], words: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, text)
    assert len(raised.value.mistakes) == 1
    head, shown, caret = str(raised.value).split("\n")
    line, column = place
    assert head.startswith(f"{tmp_path / 'a.yaml'}:{line}:{column}: ") and words in head
    written = re.split(r"\n", text)[line - 1]
    assert shown == "    " + written.replace("\t", "→").replace("\x07", "?").replace("\u00a0", "?").replace(
        "\ufeff", "?"
    )
    assert caret == " " * (4 + column - 1) + "^"


def test_all_slips_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, BASE + "sampling: {n: 1, n: 2, a:3}\nengine:\n  x:\n")
    assert len(raised.value.mistakes) == 3
    headline, *lines = str(raised.value).splitlines()
    assert headline == "3 mistakes in the configuration:" and len(lines) == 9


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: {dir: x}\nmodel: é\n".encode("latin-1"), "a.yaml:2: this is no UTF-8 .byte 0xe9.; convert it, .*1252"),
        (BASE.encode("utf-16"), "a.yaml:1: this is no UTF-8 .*iconv -f UTF-16"),
        (BASE + "sampling: " + "[" * 5000, "nested too deeply"),
        (BASE + "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ), "more than 100,000 values"),
        (BASE + "sampling: &a {b: *a}\n", "a.yaml:6"),
        (BASE + "sampling: {<<: 3}\n", "a.yaml:6"),
        (BASE + f"  limit: {'9' * 5000}\n", "a.yaml:6"),
        (BASE + "sampling: !!int x\n", "a.yaml:6"),
        (BASE + "?\nsampling:\n  n: 1\n", "a.yaml:6:2: a key is a name here, not None"),
        (BASE + "resume:\n", "a.yaml:6: unknown key 'resume'"),
        (BASE + "sampling.n: 2\n", r"a.yaml:6: 'sampling.n' must be a key of its section: sampling: \{n: VALUE\}"),
        (BASE + "engine: {true: 1}\n", "a.yaml:6:10: a key is a name here, not True"),
    ],
    ids=lambda value: str(value)[-20:],
)  # fmt: skip
def test_what_no_yaml_reader_should_be_given_is_refused_in_one_message(
    tmp_path: Path, text: str | bytes, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        (BASE + "sampling:\nengine:\n  # max_num_seqs: 3\nwork:\n", "sampling", {}),
        (HEAD + "  template: 'costs \\${{ price }} or ${x}, $\\nabla \\text{x}$'\n", "data.template",
         "costs \\${{ price }} or ${x}, $\\nabla \\text{x}$"),
        (HEAD + "  template: |\n    \\nu \\n \\\\${{ q }}\n", "data.template", "\\nu \\n \\\\${{ q }}\n"),
        (HEAD + "  template: '{{ q | replace(\"\\n\", \" \") }}'\n", "data.template", '{{ q | replace("\\n", " ") }}'),
        (HEAD + '  template: "Q: {{ q }}\\nA:"\n', "data.template", "Q: {{ q }}\nA:"),
        (HEAD + '  template: "Q: {{ q }}\\\\nA:"\n', "data.template", "Q: {{ q }}\\nA:"),
        (HEAD + "  template: 'Q: {{ q }}' # a comment\n", "data.template", "Q: {{ q }}"),
        (BASE + "sampling: {stop: [yes, 'Q:', \"\\n\", '### Human']}\n", "sampling",
         {"stop": ["yes", "Q:", "\n", "### Human"]}),
        (BASE.replace("some/model", "1e3"), "model", "1e3"),
        (BASE.replace("rows.jsonl", "007"), "data.path", "007"),
        (BASE.replace("rows.jsonl", "[007, 2024-01-02]"), "data.path", ["007", "2024-01-02"]),
        (BASE.replace(": prompt", ": true"), "data.prompt_column", "true"),
        (BASE + "  columns: [1, no, 0x10]\n", "data.columns", ["1", "no", "0x10"]),
        (BASE + "  revision: 12345e6\n", "data.revision", "12345e6"),
        (BASE + "  limit: 1e3\n", "data.limit", 1000),
        (BASE + "  limit: 1_000\n", "data.limit", 1000),
        (BASE + "  limit: null\n", "data.limit", None),
        (BASE + "  as_chat: yes\n", "data.as_chat", True),
        ("\ufeff---\n" + BASE.replace("\n", "\r\n"), "data.prompt_column", "prompt"),
        (BASE + "sampling: &s {n: 2}\nengine: {<<: *s, n: 3}\n", "engine", {"n": 3}),
        (BASE + "sampling: {stop: ['None', '“a”', 'b\"', 'a #1', 'x\u00a0']} # one\n", "sampling",
         {"stop": ["None", "“a”", 'b"', "a #1", "x\u00a0"]}),
        (BASE + "sampling: {stop: [“a” said b, it's, a  b, 5\"x]} #two\n", "sampling",
         {"stop": ["“a” said b", "it's", "a  b", '5"x']}),
        (BASE + 'sampling: {stop: "\\ud83d\\ude00"}\n', "sampling", {"stop": "\U0001f600"}),
        (BASE + "sampling: {stop: [007, true, 1e3, <<]}\n", "sampling", {"stop": ["007", "true", "1e3", "<<"]}),
        (BASE + "sampling: {stop: '${{ x }}', structured_outputs: {regex: '^${'}}\n", "sampling",
         {"stop": "${{ x }}", "structured_outputs": {"regex": "^${"}}),
        (BASE + "sampling_by_rank:\n  # - {n: 2}\n", "sampling_by_rank", []),
        (BASE + "sampling: {structured_outputs: {choice: [yes, no], regex: '\\n+'}}\n", "sampling",
         {"structured_outputs": {"choice": ["yes", "no"], "regex": "\\n+"}}),
    ],
    ids=lambda value: str(value)[-20:],
)  # fmt: skip
def test_what_is_meant_is_read(tmp_path: Path, text: str, key: str, value: object) -> None:
    config = load(tmp_path, text)
    read: object = config
    for part in key.split("."):
        read = getattr(read, part)
    assert read == value
    assert load(tmp_path, schema.to_yaml(config)) == config, "the resolved configuration is read as the same"


@pytest.mark.parametrize("seed", range(20))
def test_a_template_of_any_dollars_braces_and_backslashes_is_taken_as_it_stands(tmp_path: Path, seed: int) -> None:
    chosen = random.Random(seed)
    template = "".join(chosen.choices(["\\", "$", "{", "}", "${", "a", " "], k=30)) + "{{ q }}"
    config = load(tmp_path, HEAD + "  template: '" + template + "'\n")
    assert config.data.template == template


@pytest.mark.parametrize(
    "text", ["1e3", "0o7", "010", "yes", "10:20", "1_000", "null", "~", "=", "<<", "2024-01-02", "", "a\nb\n"]
)
def test_a_text_that_is_written_is_read_again_as_the_same_text_in_both_versions_of_yaml(text: str) -> None:
    written = yaml12.dump({"a": [text]})
    assert yaml.safe_load(written) == {"a": [text]}
    assert yaml.load(written, Loader=yaml12.Loader) == {"a": [text]}


def mutate(text: str, chosen: random.Random) -> str:
    """Return a text with one slip of a hand: a character or line dropped, doubled, swapped, moved or mistyped."""
    place = chosen.randrange(len(text))
    before, char, after = text[:place], text[place], text[place + 1 :]
    signs = [match.start() for match in re.finditer("[\"'{}\\[\\]:,]", text)]
    sign = chosen.choice(signs)
    lines = text.splitlines(keepends=True)
    line = chosen.randrange(len(lines))
    head, tail = lines[:line], lines[line + 1 :]
    return chosen.choice(
        [
            before + after,
            before + char * 2 + after,
            before + after[:1] + char + after[1:],
            before + chosen.choice("\t:#{}[]'\"*&!|>%@`-?,\n \\$\x00é") + char + after,
            text[:sign] + text[sign + 1 :],
            "".join([*head, *tail]),
            "".join([*head, lines[line] * 2, *tail]),
            "".join([*head, lines[line][1:], *tail]),
            "".join([*head, " " + lines[line], *tail]),
            "".join([*head, lines[line].replace(" ", "\t", 1), *tail]),
        ]
    )


SHIPPED = sorted((REPO / "conf").glob("*.yaml"))
QUOTED = """\
run: {dir: 'runs/x', retry_errors: [poison_row]}
model: "a/b"
data:
  path: ['a/*.jsonl', "b.jsonl"]
  template: "Q: {{ question }}\\nA:"
  as_chat: true
  chat_template_kwargs: {enable_thinking: false, style: "x"}
sampling:
  stop: ["Question:", '### Human', "\\n"]
  structured_outputs: {json: {type: object, "properties": {a: {type: 'integer'}}}}
sampling_by_rank:
  - temperature: 0.2
  - {temperature: 0.9, top_p: 1e-1}
"""


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))])
def test_a_configuration_with_a_slip_is_read_as_shown_or_refused_in_a_line_that_names_the_place(
    tmp_path: Path, seed: int
) -> None:
    chosen = random.Random(seed)
    small = [path for path in SHIPPED if path.name != "reference.yaml"]
    texts = [path.read_text() for path in (small * 2 + SHIPPED)] + [QUOTED] * 6
    for text in (mutate(text, chosen) for text in texts):
        error = None
        try:
            config = load(tmp_path, text)
        except ConfigError as refused:
            error = refused
        if error is None:
            assert load(tmp_path, schema.to_yaml(config)) == config, "the resolved configuration shows what is meant"
            continue
        assert error.exit_status == 2
        for mistake in error.mistakes:
            head, *shown = mistake.splitlines()
            assert re.search(r"a\.yaml:\d+|^missing: \w|^a prompt comes .* none is set", head), text
            assert not shown or (len(shown) == 2 and shown[1].strip() == "^"), "the line, and a caret below"
