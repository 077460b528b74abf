"""Stand in for vLLM without a model: same messages, made-up text. For trying a configuration, tests and simulations.

- The text depends only on the prompt, the seed, max_tokens and the adapter, as a real engine's text should. It begins
  with the adapter's name.
- Its options (`FakeOptions`) make it slow, small, or broken in each way that real engines break.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import os
import signal
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpgen.config.vllm.sampling_numbers import read_sampling_numbers
from dpgen.config.vllm.vllm_fields import describe_unknown_field
from dpgen.config.vllm.vllm_types import ENGINE_TYPES, SAMPLING_TYPES, list_fields
from dpgen.data.openai_batch.lines import BAD_REQUEST
from dpgen.data.prompts.token_ids import reject_too_long
from dpgen.engine.fake_vectors import describe_fake_vectors, make_fake_vectors
from dpgen.engine.messages import AgreeKvFn, EngineInfo, EngineSpec, EngineStats, EngineTextConfig
from dpgen.errors import ConfigError, RowRefused
from dpgen.logprobs import TokenLogprobs, from_rows
from dpgen.records import Completion, PooledKind, Request, RequestId, RowResult, ScoredCompletion, UndecodedRow

_BLOCK_TOKENS = 16
_BYTES_PER_TOKEN = 64
_LIVELOCK_STEP_S = 0.01
_NUM_IDS = 256  # of `FakeTokenizer`


@dataclass(frozen=True)
class FakeOptions:
    """List the fake engine's `engine.*` keys. An option `*_on` applies to rows whose prompt contains its text.

    All of `load_error`, `livelock_after` and `*_on` but `refuse_on` are faults, which `max_faults` limits.

    Attributes:
        step_s: seconds of one step, in which every running row gains a token.
        processor_s: seconds of one step for which a real engine's thread would compute.
        kernel_s: seconds of one step in which it would use the device, beside its thread; engines with the same
            `device_lock` wait for each other there.
        device_lock: a file that stands for the device.
        seq_s: seconds more, for each running row.
        load_s: seconds of loading.
        kv_cache_memory_bytes: bytes reported as free.
        load_error: fail to load, with this message.
        load_output: print this while loading.
        load_lock: a file; loading takes, after that, as long as another process has the file locked.
        free_gib: memory that other processes leave of 100 GiB; None for all. As on a GPU, loading fails if it is less
            than `gpu_memory_utilization`.
        crash_on, hang_on, raise_on: kill the engine process, hang for good, or raise.
        livelock_on: step on and on, and report stats, without a token for any row.
        livelock_after: the same, once this many rows are finished.
        refuse_on: reject the row.
        prepare_s: seconds that a worker takes for the media of a row.
        prepare_crash_on, prepare_hang_on: kill the worker that prepares the media of the row, or hang it.
        max_faults: be faulty this many times, then sound; None: always. Needs `fault_dir`.
        fault_dir: a directory that counts the faults, one file each, over all lives of the engines that share it.
    """

    max_num_seqs: int = 16
    max_model_len: int = 512
    step_s: float = 0.0
    processor_s: float = 0.0
    kernel_s: float = 0.0
    device_lock: str | None = None
    seq_s: float = 0.0
    load_s: float = 0.0
    kv_cache_memory_bytes: int = 1 << 20
    load_error: str | None = None
    load_output: str | None = None
    load_lock: str | None = None
    free_gib: float | None = None
    gpu_memory_utilization: float = 0.9
    crash_on: str | None = None
    hang_on: str | None = None
    raise_on: str | None = None
    livelock_on: str | None = None
    livelock_after: int | None = None
    refuse_on: str | None = None
    prepare_s: float = 0.0
    prepare_crash_on: str | None = None
    prepare_hang_on: str | None = None
    max_faults: int | None = None
    fault_dir: str | None = None


_OPTIONS = frozenset(field.name for field in dataclasses.fields(FakeOptions))
# A configuration for vLLM can be tried: vLLM's fields are taken, and those without a meaning here have no effect.
_ENGINE_FIELDS = _OPTIONS | list_fields(ENGINE_TYPES).keys()
_SAMPLING_FIELDS = frozenset(list_fields(SAMPLING_TYPES))


class FakeTokenizer:
    """Make one token of each byte of UTF-8."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))


def decode(token_ids: Sequence[int]) -> str:
    """Return the text of tokens of `FakeTokenizer`; tokens of another vocabulary as numbers."""
    try:
        return bytes(token_ids).decode("utf-8", "replace")
    except ValueError:
        return " ".join(map(str, token_ids))


@dataclass
class _Running:
    request: Request
    text: str
    max_tokens: int
    num_samples: int
    sampling: dict[str, Any]
    num_tokens: int = 0

    @property
    def num_sequences(self) -> int:
        """Return how many of the sequences that run at a time this row takes, of a pooling model."""
        return 1 if self.request.pooling is None else self.request.pooling.num_sequences


class FakeBackend:
    """Implement `Backend` without a model."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._options = FakeOptions()
        self._rows: OrderedDict[RequestId, _Running] = OrderedDict()
        self._num_tokens = self._num_finished = self._num_read = 0
        self._num_steps = self._num_reported_steps = 0
        self._last_report_s = time.monotonic()
        self._is_livelocked = False
        self.memory_fraction = spec.memory_fraction  # of all jobs

    @property
    def num_engines(self) -> int:
        return self._spec.num_engines

    @property
    def max_num_seqs(self) -> int:
        return self._options.max_num_seqs

    def check_options(self) -> tuple[str, ...]:
        self._check_names()
        options = self._spec.options.items()
        self._options = FakeOptions(**{k: v for k, v in options if k in _OPTIONS and v is not None})
        return ()

    def begin_job(self, spec: EngineSpec) -> tuple[str, ...]:
        self._spec = spec
        self._rows.clear()
        self._num_tokens = self._num_finished = self._num_read = 0
        self._check_names()
        return ()

    def prepare_job(self, text_config: EngineTextConfig) -> None:
        return

    def _check_names(self) -> None:
        names = [*(("engine", name) for name in self._spec.options), *self._spec.iter_sampling_names()]
        mistakes = []
        for section, name in names:
            legal, other = _ENGINE_FIELDS, _SAMPLING_FIELDS
            if section != "engine":
                legal, other = other, legal
            if name not in legal:
                mistakes.append(describe_unknown_field(section, name, legal, other))
        for name in ("max_num_seqs", "max_model_len"):
            value = self._spec.options.get(name)
            if value is not None and (not isinstance(value, int) or value < 1):  # with 0 the run would never end
                mistakes.append(f"engine.{name}={value!r}: must be a whole number of at least 1")
        if self._spec.options.get("max_faults") is not None and self._spec.options.get("fault_dir") is None:
            mistakes.append("engine.max_faults needs engine.fault_dir, the directory that counts the faults")
        if mistakes:
            raise ConfigError(*mistakes)

    def load(self, agree_kv: AgreeKvFn) -> EngineInfo:
        time.sleep(self._options.load_s)
        if self._options.load_output is not None:
            print(self._options.load_output, flush=True)
        if self._options.load_lock is not None:
            with open(self._options.load_lock, "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH)
        self._check_free_memory()
        if self._options.load_error is not None and self._takes_fault():
            raise RuntimeError(self._options.load_error)
        kv_bytes = agree_kv(self._options.kv_cache_memory_bytes)
        return EngineInfo(
            max_num_seqs=self._options.max_num_seqs,
            max_model_len=self._options.max_model_len,
            num_kv_blocks=kv_bytes // (_BLOCK_TOKENS * _BYTES_PER_TOKEN),
            kv_block_tokens=_BLOCK_TOKENS,
            device="none",
        )

    @property
    def pooled(self) -> PooledKind | None:
        return None if self._spec.pooling is None else describe_fake_vectors(self._spec.pooling)

    def _check_free_memory(self) -> None:
        free, fraction = self._options.free_gib, self._options.gpu_memory_utilization
        if free is not None and free < 100 * fraction and self._takes_fault():
            raise ValueError(
                f"Free memory on device cuda:0 ({free}/100.0 GiB) on startup is less than desired GPU memory "
                f"utilization ({fraction}, {100 * fraction} GiB). Decrease GPU memory utilization or reduce GPU memory "
                "used by other processes."
            )

    def add_request(self, request: Request) -> None:
        assert request.prompt_token_ids is not None
        num_prompt_tokens = len(request.prompt_token_ids)
        prompt = decode(request.prompt_token_ids)
        if request.pooling is not None:
            self._inject_fault(prompt)
            self._rows[request.id] = _Running(request, "", 1, 0, {})
            return
        reject_too_long(num_prompt_tokens, self._options.max_model_len)
        if request.media is not None:
            _check_media(request.media.read(), prompt)
        self._inject_fault(prompt)
        sampling = self._read_sampling(request)
        digest = hashlib.blake2b(f"{prompt}/{sampling.get('seed')}".encode(), digest_size=8)
        text = digest.hexdigest() if request.adapter is None else f"{request.adapter} {digest.hexdigest()}"
        max_tokens = sampling.get("max_tokens")
        if max_tokens is None:
            max_tokens = 1 + digest.digest()[0] % 32
        max_tokens = min(max_tokens, self._options.max_model_len - num_prompt_tokens)
        if request.num_completion_tokens:
            max_tokens = 1
        self._rows[request.id] = _Running(request, text, max_tokens, sampling.get("n") or 1, sampling)

    def _read_sampling(self, request: Request) -> dict[str, Any]:
        sampling = self._spec.resolve_sampling({}, request)
        if unknown := request.sampling.keys() - _SAMPLING_FIELDS:
            reason = describe_unknown_field("sampling", min(unknown), _SAMPLING_FIELDS, _ENGINE_FIELDS)
            raise RowRefused("bad_sampling", reason)
        try:
            return read_sampling_numbers(sampling, _NUM_IDS)
        except ValueError as error:
            raise RowRefused("bad_sampling" if request.server_request is None else BAD_REQUEST, str(error)) from None

    def step(self) -> list[RowResult | UndecodedRow]:
        self._run_model()
        results: list[RowResult | UndecodedRow] = []
        livelock_after = self._options.livelock_after
        if livelock_after is not None and not self._is_livelocked and self._num_finished >= livelock_after:
            self._is_livelocked = self._takes_fault()
        if self._is_livelocked:
            time.sleep(_LIVELOCK_STEP_S)
            return results
        num_running = 0
        for id, running in list(self._rows.items())[: self._options.max_num_seqs]:
            if (num_running := num_running + running.num_sequences) > max(
                self._options.max_num_seqs, running.num_sequences
            ):
                break
            running.num_tokens += 1
            self._num_tokens += running.num_samples
            if running.num_tokens >= running.max_tokens:
                del self._rows[id]
                results.append(self._make_result(running).with_id(id))
        self._num_finished += len(results)
        return results

    def _run_model(self) -> None:
        """Take the time of a step: the thread's, or that of the kernels where they take longer."""
        options, begin_s = self._options, time.monotonic()
        self._num_steps += 1
        if options.kernel_s:
            with open(options.device_lock or os.devnull, "a") as device:
                fcntl.flock(device, fcntl.LOCK_EX)
                time.sleep(options.kernel_s)
        num_running = min(len(self._rows), options.max_num_seqs)
        step_s = max(options.step_s + options.seq_s * num_running, options.processor_s)
        rest_s = step_s - (time.monotonic() - begin_s)
        time.sleep(max(0.0, rest_s))

    def has_unfinished_requests(self) -> bool:
        return bool(self._rows)

    def stats(self) -> EngineStats:
        num_running = min(len(self._rows), self._options.max_num_seqs)
        usage = round(num_running / self._options.max_num_seqs, 4)
        return EngineStats(
            self._num_tokens,
            num_running,
            len(self._rows) - num_running,
            num_computed_tokens=self._num_read,
            kv_cache_usage=usage,
            processor_s=self._num_steps * self._options.processor_s,
            device_busy=self._measure_device() if self._options.kernel_s else None,
        )

    def _measure_device(self) -> float:
        num_steps, self._num_reported_steps = self._num_steps - self._num_reported_steps, self._num_steps
        elapsed_s, self._last_report_s = time.monotonic() - self._last_report_s, time.monotonic()
        return min(1.0, num_steps * self._options.kernel_s / max(elapsed_s, 1e-9))

    def close(self) -> None:
        return

    def _make_result(self, running: _Running) -> RowResult:
        request, sampling = running.request, running.sampling
        assert request.prompt_token_ids is not None
        if request.pooling is not None:
            self._num_read += len(request.prompt_token_ids)
            return make_fake_vectors(request, request.pooling)
        num_prompt_tokens = len(request.prompt_token_ids) - request.num_completion_tokens
        k, prompt_k = sampling.get("logprobs"), sampling.get("prompt_logprobs")
        prompt = None
        if prompt_k is not None or request.num_completion_tokens:
            prompt = _make_logprobs(request.prompt_token_ids, prompt_k or 0, num_without=1)
        prompt_logprobs = None if prompt is None or prompt_k is None else prompt.slice(0, num_prompt_tokens)
        if prompt is not None and request.num_completion_tokens:
            completion = prompt.slice(num_prompt_tokens, len(prompt))
            scored = ScoredCompletion(completion, bool((completion.logprobs > -2).all()))
            return RowResult(request.row, num_prompt_tokens, prompt_logprobs=prompt_logprobs, scored=scored)
        token_ids = list(range(running.max_tokens))
        completions = tuple(
            Completion(
                f"{running.text}-{sample} {running.max_tokens}",
                "length",
                running.max_tokens,
                token_ids if self._spec.token_ids and k is None else None,
                logprobs=None if k is None else _make_logprobs(token_ids, k),
            )
            for sample in range(running.num_samples)
        )
        return RowResult(request.row, num_prompt_tokens, completions, prompt_logprobs=prompt_logprobs)

    def _inject_fault(self, prompt: str) -> None:
        options = self._options
        if options.refuse_on is not None and options.refuse_on in prompt:
            raise RowRefused("bad_sampling", f"rejected by engine.refuse_on={options.refuse_on!r}")
        if self._is_hit_by(options.crash_on, prompt):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._is_hit_by(options.hang_on, prompt):
            while True:
                time.sleep(3600)
        if self._is_hit_by(options.livelock_on, prompt):
            self._is_livelocked = True
        if self._is_hit_by(options.raise_on, prompt):
            raise RuntimeError(f"raised by engine.raise_on={options.raise_on!r}")

    def _is_hit_by(self, text: str | None, prompt: str) -> bool:
        return text is not None and text in prompt and self._takes_fault()

    def _takes_fault(self) -> bool:
        """Count one more fault, and return True unless `max_faults` of them have been taken before."""
        if self._options.fault_dir is None:
            return True
        number = 0
        while self._options.max_faults is None or number < self._options.max_faults:
            try:
                open(os.path.join(self._options.fault_dir, f"fault-{number}"), "x").close()  # also between processes
                return True
            except FileExistsError:
                number += 1
        return False


def _check_media(parts: Sequence[memoryview], prompt: str) -> None:
    """Raise RuntimeError if the media are not those that the prompt was made of."""
    digests = [hashlib.blake2b(part, digest_size=8).hexdigest() for part in parts[1:]]
    if not prompt.startswith(bytes(parts[0]).decode()) or not all(digest in prompt for digest in digests):
        raise RuntimeError("the media in the shared memory are those of another row")


def _make_logprobs(token_ids: Sequence[int], k: int, num_without: int = 0) -> TokenLogprobs:
    """Return made-up log-probabilities, which depend on the tokens alone.

    Args:
        num_without: how many tokens at the start have none.
    """
    ids = np.asarray(token_ids[num_without:], np.int32)[:, None]
    rows = np.concatenate([ids, (ids + np.arange(k)) % 256], axis=1)
    values = np.concatenate([-(1 + ids % 7) / 10, np.repeat(-(1 + np.arange(k)[None]) / 10, len(ids), axis=0)], axis=1)
    return from_rows(token_ids, rows, values, k)
