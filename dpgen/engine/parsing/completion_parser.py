"""Have the completions of finished rows parsed in worker processes: the rank's half."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from dpgen.config.completion_checks import CheckConfig
from dpgen.config.prompt import PromptConfig
from dpgen.config.sections import OutputConfig
from dpgen.data.input_rows import InputRows
from dpgen.data.openai_batch.requests import drop_prompt, read_server_request
from dpgen.data.prompts.chat_prompt import ChatPromptBuilder
from dpgen.data.tokenizer import TokenizerConfig
from dpgen.engine.checking.checks import checks_parse_json
from dpgen.engine.parsing.vllm_parsers import ParserInfo, ParserSpec, ParseTask
from dpgen.engine.starting.server_process import select_own_environment
from dpgen.errors import ConfigError
from dpgen.logprobs import TokenLogprobs
from dpgen.records import Completion, RequestId, RowResult
from dpgen.workers.pool import WorkerPool, WorkerRefused, WorkerSpec

_TIMEOUT_S = 60.0

Tools = list[dict[str, Any]]


class ToolFinder:
    """Find the tools that the model was offered for a row, which tell parsers the types of arguments.

    Args:
        prompt: how rows become prompts.
    """

    def __init__(self, prompt: PromptConfig, rows: InputRows) -> None:
        self.template_kwargs = prompt.chat_template_kwargs
        self._rows, self._column, self._request_column = rows, prompt.tools_column, prompt.request_column
        self._builder = ChatPromptBuilder(prompt, rows.has_added_nulls)
        self._of_run: Tools | None = prompt.tools or prompt.chat_template_kwargs.get("tools")

    def make_task(self, row: int, completions: tuple[Completion, ...]) -> ParseTask:
        """Return the task to parse a row's completions."""
        if self._request_column is None:
            return ParseTask(row, completions, self.find(row))
        [columns] = self._rows.iter_rows(np.array([row]), [self._request_column])
        request = drop_prompt(read_server_request(columns[self._request_column]))
        return ParseTask(row, completions, request=request)

    def find(self, row: int) -> Tools | None:
        """Return the row's tools; None for none. Its request was made, so they are sound."""
        if self._column is None:
            return self._of_run
        [columns] = self._rows.iter_rows(np.array([row]), [self._column])
        return self._builder.read_tools(columns) or None


class CompletionParser:
    """Parse completions, off the rank's main thread and in any order.

    Args:
        pool: workers that `vllm_parsers.start` has made ready.
        tools: finds the tools of each row.

    Attributes:
        find_tools_of_call: returns the tools that a call of a row's program offered; None for those of the run.
    """

    find_tools_of_call: Callable[[RequestId], Tools | None] | None = None

    def __init__(self, pool: WorkerPool, tools: ToolFinder) -> None:
        self._pool, self._tools = pool, tools
        self._results: dict[RequestId, RowResult] = {}  # rows that are being parsed

    @property
    def pending_ids(self) -> Collection[RequestId]:
        """Ids of the results that are being parsed."""
        return self._results.keys()

    def __len__(self) -> int:
        return len(self._results)

    def wait_until_ready(self, on_wait: Callable[[], None]) -> ParserInfo:
        """Wait for the workers, and return what they ask of the engine.

        Raises:
            ConfigError: there is no such parser, or it doesn't fit the model.
            DpgenError: the workers died.
        """
        try:
            info = self._pool.wait_until_ready(on_wait)
        except WorkerRefused as error:
            raise ConfigError(str(error)) from None
        assert isinstance(info, ParserInfo)
        return info

    def submit(self, result: RowResult) -> None:
        """Add a row; `poll` returns it, parsed."""
        self._results[result.id] = result
        # Parsers need no log-probabilities: their arrays stay here.
        completions = tuple(_replace_logprobs(completion, None) for completion in result.completions)
        of_call = None if self.find_tools_of_call is None else self.find_tools_of_call(result.id)
        if of_call is None:
            task = self._tools.make_task(result.row, completions)
        else:
            task = ParseTask(result.row, completions, of_call)
        self._pool.submit(result.id, task)

    def poll(self) -> list[RowResult]:
        """Return the rows that have been parsed since the last call."""
        parsed = []
        for answer in self._pool.poll():
            assert isinstance(answer.key, RequestId)
            result = self._results.pop(answer.key)
            if answer.failure is None:
                answered: tuple[Completion, ...] = answer.value
                completions = tuple(
                    _replace_logprobs(completion, before.logprobs)
                    for completion, before in zip(answered, result.completions, strict=True)
                )
            else:  # the text stays
                completions = tuple(
                    dataclasses.replace(completion, parse_error=answer.failure) for completion in result.completions
                )
            parsed.append(dataclasses.replace(result, completions=completions))
        return parsed

    def close(self) -> None:
        """End the workers."""
        self._pool.close()


def _replace_logprobs(completion: Completion, logprobs: TokenLogprobs | None) -> Completion:
    return completion if completion.logprobs is logprobs else dataclasses.replace(completion, logprobs=logprobs)


def start_completion_parser(
    output: OutputConfig,
    check: CheckConfig,
    tokenizer: TokenizerConfig | None,
    tools: ToolFinder,
    log: Callable[[str], None],
) -> CompletionParser | None:
    """Start the workers that a configuration asks for; None if it asks for no parsing.

    Args:
        check: with it, the workers that check texts may also parse them; see `checks_parse_json`.
        tokenizer: the model's; None for the fake engine.
        tools: finds the tools of each row, and knows `data.chat_template_kwargs`.
        log: takes each line that the workers print.
    """
    if not output.parses_with_vllm and (not output.parses_json or checks_parse_json(check, output)):
        return None
    spec = ParserSpec(
        tokenizer,
        output.reasoning_parser_or_none,
        output.tool_parser,
        keep_reasoning=output.reasoning == "split",
        parse_json=output.parses_json,
        template_kwargs=dict(tools.template_kwargs),
    )
    environment = select_own_environment(os.environ)
    environment["CUDA_VISIBLE_DEVICES"] = ""  # parsing needs no device, and must not take memory from the engine
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    workers = WorkerSpec(
        "the parser", "dpgen.engine.parsing.vllm_parsers:start", (spec,), environment, timeout_s=_TIMEOUT_S
    )
    return CompletionParser(WorkerPool(workers, log), tools)
