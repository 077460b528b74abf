"""Answer an OpenAI batch file in one command: `dpgen run-batch`, with the flags of `vllm run-batch`.

- It is `dpgen run` with the configuration that the flags make, on a run directory next to the response file. The same
  command therefore resumes, at any world size.
- Rank 0 writes the response file at the end, whole or not at all.
- vLLM's flags can't be declared to argparse, since dpgen knows more of them than it could explain; see
  `dpgen.commands.arguments.batch_flags`. argparse makes the help.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpgen.commands.arguments.batch_flags import BatchCommand, parse_batch_flags
from dpgen.commands.arguments.parser import CommandParser, complete_directories, complete_files
from dpgen.config.secrets import redact_text
from dpgen.rank_process import RankSteps, run_rank

if TYPE_CHECKING:
    from dpgen.config.schema import Config

logger = logging.getLogger(__name__)

_USAGE = """\
dpgen run-batch -i IN.jsonl -o OUT.jsonl --model MODEL [--VLLM-FLAG [VALUE] ...] [CONFIG.yaml ...] [key=value ...]"""

_DESCRIPTION = """\
Answer every line of an OpenAI batch file, and write the response file, as vllm run-batch does.

  dpgen run-batch -i in.jsonl -o out.jsonl --model Qwen/Qwen3-0.6B --max-model-len 4096
  torchrun --nproc-per-node 8 -m dpgen run-batch -i in.jsonl -o out.jsonl --model ... --seed 1
  dpgen run-batch -i s3://bucket/in.jsonl -o s3://bucket/out.jsonl --model ...
  srun -n 64 python -m dpgen run-batch -i in.jsonl -o out.jsonl --model ... -tp 4 run.time_limit=3600

The flags are those of vllm run-batch:
  - fields of the engine: --max-model-len, --dtype, --enforce-eager, --no-enable-prefix-caching, -tp, -pp, ...
  - of the requests: --served-model-name, --chat-template, --lora-modules NAME=PATH ..., --reasoning-parser,
    --enable-auto-tool-choice with --tool-call-parser
Those of a server (--port, --enable-metrics, ...) have no effect, and those that can't be honoured are refused. dpgen's
own keys may follow as key=value or in YAML files; see dpgen run --help.

Finished lines are safe in the run directory: the same command resumes, on any number of ranks. Lines are those of
/v1/chat/completions and /v1/completions, or with task=embed of /v1/embeddings. A line that can't be answered is a
response with an error.
"""

_EPILOG = "exit status: 0 done, 2 wrong usage or configuration, 75 stopped but resumable, 1 anything else"


def add_arguments(parser: CommandParser) -> None:
    """Declare the command line of `dpgen run-batch`."""
    parser.usage, parser.description, parser.epilog = _USAGE, _DESCRIPTION, _EPILOG
    parser.set_defaults(accepts_unknown=True)  # vLLM's flags
    complete_files(
        parser.add_argument("configuration", nargs="*", metavar="CONFIG.yaml | key=value", help="as for dpgen run")
    )
    complete_files(
        parser.add_argument("-i", "--input-file", metavar="IN.jsonl", help="the batch file, a path or an address")
    )
    complete_files(parser.add_argument("-o", "--output-file", metavar="OUT.jsonl", help="the response file, likewise"))
    parser.add_argument("--model", help="a folder or a Hub name")
    complete_directories(
        parser.add_argument("--run-dir", metavar="DIR", help="the run directory (default: OUT.jsonl.run)")
    )


def main(options: argparse.Namespace) -> int:
    """Run this process's rank and return its exit status."""
    command = BatchCommand()

    def load() -> Config:
        nonlocal command
        command = parse_batch_flags(options.arguments)
        return load_batch_config(command.arguments)

    def prepare(config: Config) -> None:
        from dpgen.journal.run_dir import RunDir
        from dpgen.output.openai_batch.publish import check_output_file

        for note in command.notes:
            logger.info(note)
        options = config.output.storage_options
        check_output_file(command.output_file, command.input_file, RunDir(config.run.dir), options)

    def publish(config: Config) -> None:
        from dpgen.journal.run_dir import RunDir
        from dpgen.output.openai_batch.publish import publish_responses

        publish_responses(RunDir(config.run.dir), command.output_file, config.output.storage_options)
        logger.info(f"wrote the responses to {redact_text(command.output_file)}")

    return run_rank(load, options.arguments, RankSteps(prepare=prepare, publish=publish))


def load_batch_config(arguments: Sequence[str]) -> Config:
    """Return the configuration of `BatchCommand.arguments`.

    Raises:
        ConfigError: it is wrong, or writes something else than a response file.
    """
    from dpgen.config.loader import load_from_args
    from dpgen.errors import ConfigError

    config = load_from_args(arguments)
    if config.output.format != "openai_batch":
        raise ConfigError(f"output.format={config.output.format}: run-batch writes a response file; leave the key out")
    return config
