"""The command line of `dpgen run-batch`: vLLM's flags become keys, and what can't be honoured is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from helpers.vllm_version import find_vllm_minor

from dpgen.commands.arguments.batch_flags import parse_batch_flags
from dpgen.commands.run_batch import load_batch_config
from dpgen.config.vllm import vllm_flags as flags
from dpgen.engine.vllm.versions import ADDED_IN, REMOVED
from dpgen.errors import ConfigError

FOLLOWED = "0.32"  # the version of vLLM whose flags dpgen knows
FILES = ("-i", "in.jsonl", "-o", "out.jsonl", "--model", "org/model")


def overrides(*arguments: str) -> list[str]:
    """Return the keys that flags set, without those of every command."""
    return [text for text in parse_batch_flags([*FILES, *arguments]).overrides if text != "model=org/model"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--max-model-len", "4096"), ["engine.max_model_len=4096"]),
        (("--max_model_len=4096",), ["engine.max_model_len=4096"]),
        (("--max-model-len", "4k"), ["engine.max_model_len=4000"]),
        (("--max-model-len", "4K"), ["engine.max_model_len=4096"]),
        (("--max-model-len", "auto"), ["engine.max_model_len=-1"]),
        (("--gpu-memory-utilization", "0.9"), ["engine.gpu_memory_utilization=0.9"]),
        (("--dtype", "float16"), ['engine.dtype="float16"']),
        (("--revision", "007"), ['engine.revision="007"']),
        (("--quantization", "None"), ['engine.quantization="None"']),
        (("--attention-backend", "None"), ["engine.attention_backend=null"]),
        (("--enforce-eager",), ["engine.enforce_eager=true"]),
        (("--no-enable-prefix-caching",), ["engine.enable_prefix_caching=false"]),
        (("--hf-overrides", '{"a": 1}'), ['engine.hf_overrides={"a": 1}']),
        (("--hf-overrides", '{"a": "${x}"}'), ['engine.hf_overrides={"a": "\\\\${x}"}']),
        (
            ("--compilation-config.mode", "3", "-cc.pass.x=true"),
            ['engine.compilation_config={"mode": 3, "pass": {"x": true}}'],
        ),
        (("-O3",), ["engine.optimization_level=3"]),
        (("--served-model-name", "a", "b"), ['engine.served_model_name=["a", "b"]']),
        (("--cudagraph-capture-sizes", "1", "2", "engine.x=1"), ["engine.cudagraph_capture_sizes=[1, 2]"]),
        (
            ("-tp", "4", "-pp", "2", "-ep"),
            [
                "parallel.tensor_parallel_size=4",
                "parallel.pipeline_parallel_size=2",
                "parallel.enable_expert_parallel=true",
            ],
        ),
        (("--seed", "7"), ["run.seed=7"]),
        (("--chat-template", "a {{ b }}.jinja"), ["data.chat_template=a {{ b }}.jinja"]),
        (("--enable-lora", "--lora-modules", "a=x", '{"name": "b", "path": "y"}'), ['lora={"a": "x", "b": "y"}']),
        (("--enable-lora",), ["engine.enable_lora=true"]),
        (("--enable-auto-tool-choice", "--tool-call-parser", "hermes"), ["output.tool_parser=hermes"]),
        (("--tool-call-parser", "hermes"), []),
        (
            ("--reasoning-parser", "qwen3"),
            ["output.reasoning=split", "output.reasoning_parser=qwen3", 'engine.reasoning_parser="qwen3"'],
        ),
        (("-dp", "1", "--response-role", "assistant", "--no-tokens-only"), []),
        (("--seed", "1", "--seed", "2"), ["run.seed=2"]),
        (("--cpu-offload-gb", "-1"), ["engine.cpu_offload_gb=-1"]),
    ],
)
def test_a_flag_of_vllm_sets_the_key_that_means_the_same(arguments: tuple[str, ...], expected: list[str]) -> None:
    assert overrides(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--max-modle-len", "3"), "unknown option --max-modle-len, did you mean --max-model-len?"),
        (("--zzyzx",), "unknown option --zzyzx; see dpgen run-batch --help"),
        (("-x",), "unknown option -x"),
        (("--max-num-seqs",), "--max-num-seqs needs a value"),
        (("--enforce-eager=1",), "--enforce-eager takes no value; write --no-enforce-eager"),
        (("-dp", "8"), "--data-parallel-size can't be honoured: start one rank for each model copy: torchrun"),
        (("--nnodes", "2"), "--nnodes can't be honoured: the launcher says where ranks run"),
        (("--tool-server", "demo"), "--tool-server can't be honoured"),
        (("--enable-auto-tool-choice",), "--enable-auto-tool-choice needs --tool-call-parser NAME"),
        (("--lora-modules", "a"), "--lora-modules a: must be NAME=PATH"),
        (("--config", "c.yaml"), "--config is not read"),
        (("--run-dir", "s3://x/run"), "must be a local path"),
    ],
)
def test_a_flag_that_can_not_be_honoured_is_named_with_what_to_do(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_batch_flags([*FILES, *arguments])
    assert words in str(caught.value)


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_batch_flags(["--max-modle-len", "3", "-dp", "8"])
    assert len(caught.value.mistakes) == 3, "the files are missing, too"


def test_flags_of_a_server_have_no_effect_and_are_named() -> None:
    command = parse_batch_flags([*FILES, "--port", "80", "--enable-metrics"])
    assert command.overrides == ["model=org/model"]
    assert command.notes == [f"--{name} has no effect: dpgen starts no server" for name in ("port", "enable-metrics")]


def test_keys_at_the_end_stand_over_the_flags_and_the_run_directory_is_next_to_the_output() -> None:
    command = parse_batch_flags([*FILES, "--seed", "1", "run.seed=2", "--max-num-seqs", "4"])
    config = load_batch_config(command.arguments)
    assert (config.run.dir, config.run.seed, config.model) == ("out.jsonl.run", 2, "org/model")
    assert (config.data.path, config.data.format, config.output.format) == ("in.jsonl", "openai_batch", "openai_batch")
    assert config.engine == {"max_num_seqs": 4}
    command = parse_batch_flags([*FILES, "--run-dir", "elsewhere"])
    assert load_batch_config(command.arguments).run.dir == "elsewhere"


@pytest.mark.parametrize("name", ["[1].jsonl", "${x}.jsonl", "${oc.env:HOME}", r"a\${b}.jsonl", "a$${.jsonl", "a #1"])
def test_what_a_flag_says_stands_for_itself(name: str) -> None:
    names = f"-i {name}|-o {name}.out|--model {name}|--tokenizer {name}|--lora-modules a={name}"
    given = [part for pair in names.split("|") for part in pair.split(" ", 1)]
    config = load_batch_config(parse_batch_flags([*given, "--override-generation-config.x", name]).arguments)
    assert Path(config.data.path) == Path(name)
    assert (config.run.dir, config.model, config.lora) == (f"{name}.out.run", name, {"a": name})
    assert config.engine == {"tokenizer": name, "override_generation_config": {"x": name}}


def test_yaml_files_stand_below_the_flags(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("run: {seed: 5}\nwork: {claim_rows: 3}\n")
    config = load_batch_config(parse_batch_flags([*FILES, str(tmp_path / "a.yaml"), "--seed", "1"]).arguments)
    assert (config.run.seed, config.work.claim_rows) == (1, 3)


def test_another_output_format_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"output\.format=parquet: run-batch writes a response file"):
        load_batch_config(parse_batch_flags([*FILES, "output.format=parquet"]).arguments)


def test_each_flag_is_of_one_kind() -> None:
    assert not flags.SWITCHES & flags.LISTS and not flags.VALUES & (flags.SWITCHES | flags.LISTS)
    known = flags.SWITCHES | flags.LISTS | flags.VALUES
    mentioned = {*flags.SHORT_FORMS.values(), *flags.KEYS, *flags.TEXTS, *flags.SIZES, *flags.IGNORED, *flags.REFUSED}
    assert mentioned | set(flags.DEFAULTS) <= known
    assert not flags.IGNORED & set(flags.REFUSED)


@pytest.mark.vllm
@pytest.mark.slow
def test_the_flags_are_those_of_the_installed_vllm() -> None:
    from vllm.engine.arg_utils import EngineArgs

    try:
        from vllm.entrypoints.launchers.run_batch import make_arg_parser
    except ImportError:  # before 0.29
        from vllm.entrypoints.openai.run_batch import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    kinds: dict[str, set[str]] = {"switch": set(), "list": set(), "value": set()}
    for action in parser._actions:
        name = next(option[2:] for option in action.option_strings if option.startswith("--"))
        if name != "help":
            kinds["switch" if action.nargs == 0 else "list" if action.nargs == "+" else "value"].add(name)
            shorts = {option for option in action.option_strings if not option.startswith("--no-")} - {f"--{name}"}
            assert all(flags.SHORT_FORMS.get(short) == name for short in shorts), name
    version = find_vllm_minor()
    removed = {name.replace("_", "-") for name in REMOVED["engine"]}
    later = {name.replace("_", "-") for came, names in ADDED_IN["engine"].items() if came > version for name in names}
    for kind, known in {"switch": flags.SWITCHES, "list": flags.LISTS, "value": flags.VALUES}.items():
        assert kinds[kind] - removed <= known
        missing = known - kinds[kind] - later
        # No table tells when the flags of vLLM's server came, which dpgen does without.
        assert not missing or (version != FOLLOWED and missing <= flags.IGNORED | set(flags.REFUSED))
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(EngineArgs)}
    own = {"input-file", "output-file", "lora-modules", "tool-call-parser", "enable-auto-tool-choice", *flags.KEYS}
    passed_on = (flags.SWITCHES | flags.LISTS | flags.VALUES) - flags.IGNORED - set(flags.REFUSED) - own
    assert passed_on - later <= fields
