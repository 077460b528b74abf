"""Name the flags of `vllm run-batch`, and what each means to dpgen: a key of the configuration, nothing, or a mistake.

- The flags are those of vLLM 0.32; a test compares them with the installed vLLM's.
- A flag without an entry of its own is a field of vLLM's EngineArgs: --max-model-len is engine.max_model_len.
- vLLM itself is not imported: that takes seconds.
"""

from __future__ import annotations


def _list_names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Flags that take no value; each has a --no- form.
SWITCHES = _list_names(
    """
    aggregate-engine-logging allow-deprecated-quantization async-scheduling cohere-is-reasoning-model
    cudagraph-metrics data-parallel-external-lb data-parallel-hybrid-lb data-parallel-multi-port-external-lb
    dcp-q-replicate disable-cascade-attn disable-chunked-mm-input disable-custom-all-reduce
    disable-hybrid-kv-cache-manager disable-log-stats disable-nccl-for-dp-synchronization disable-sliding-window
    enable-auto-tool-choice enable-batch-sharded-sampling enable-chunked-prefill enable-cumem-allocator enable-dbo
    enable-elastic-ep enable-ep-weight-filter enable-eplb enable-expert-parallel enable-fault-tolerance
    enable-flashinfer-autotune enable-force-include-usage enable-hc-sp enable-layerwise-nvtx-tracing
    enable-log-deltas enable-log-outputs enable-log-requests enable-logging-iteration-details enable-lora
    enable-mamba-cache-stochastic-rounding enable-mamba-shared-prefix-checkpoint enable-metrics enable-mfu-metrics
    enable-mixed-moe-lora-format enable-mm-embeds enable-moe-shared-loras enable-nccl-comm-suspend
    enable-per-request-metrics enable-prefix-caching enable-prompt-embeds enable-prompt-tokens-details
    enable-return-routed-experts enable-scale-out enable-server-load-tracking enable-shm-tensor-arena
    enable-sleep-mode enable-tokenizer-info-endpoint enable-tower-connector-lora enable-trace-replay enforce-eager
    exclude-tools-when-tool-choice-none fail-on-environ-validation fully-sharded-loras interleave-mm-strings
    jit-monitor-verbose kv-cache-metrics kv-sharing-fast-prefill language-model-only log-error-stack
    long-prefill-token-threshold-adaptive mm-device-do-normalize mm-encoder-only numa-bind ray-workers-use-nsight
    return-sampling-mask return-tokens-as-token-ids scheduler-reserve-full-isl skip-mm-profiling
    skip-tokenizer-init sleep-mode-offload-cudagraph specialize-active-lora swa-bounded-replay tokens-only
    trust-remote-code trust-request-chat-template trust-request-mm-kwargs use-fp64-gumbel use-replayssm
    use-tqdm-on-load
    """
)
# Flags that take one value or more.
LISTS = _list_names(
    """
    allowed-media-domains collect-detailed-traces cpu-offload-params cudagraph-capture-sizes ignore-patterns
    kv-cache-dtype-skip-layers logits-processors lora-modules lora-target-modules numa-bind-cpus numa-bind-nodes
    offload-params served-model-name sleep-preserve-parameter-names
    """
)
# Flags that take one value.
VALUES = _list_names(
    """
    additional-config all2all-backend allowed-local-media-path anthropic-disabled-thinking-effort
    attention-backend attention-config aux-output-config block-size chat-template chat-template-content-format
    code-revision cohere-format compilation-config config-format convert cp-kv-cache-interleave-size
    cpu-distributed-timeout-seconds cpu-offload-gb custom-histogram-buckets data-parallel-address
    data-parallel-backend data-parallel-rank data-parallel-rpc-port data-parallel-size data-parallel-size-local
    data-parallel-start-rank dbo-decode-token-threshold dbo-prefill-token-threshold dcp-comm-backend
    dcp-kv-cache-interleave-size decode-context-parallel-size default-chat-template-kwargs default-mm-loras
    device-ids diffusion-config distributed-executor-backend distributed-timeout-seconds download-dir
    dp-sync-interval dtype ec-manager-config ec-transfer-config elastic-ep-max-dp-size engram-config eplb-config
    expert-placement-strategy fault-tolerance-config fingerprint-mode fingerprint-value gdn-prefill-backend
    generation-config gpu-memory-utilization hf-config-path hf-overrides hf-token host input-file
    io-processor-plugin ir-op-priority jit-monitor-mode kda-decode-backend kda-prefill-backend kernel-config
    kv-cache-dtype kv-cache-memory-bytes kv-cache-metrics-sample kv-events-config kv-offloading-backend
    kv-offloading-size kv-transfer-config limit-mm-per-prompt linear-backend load-format log-config-file log-level
    logging-config logprobs-mode long-prefill-token-threshold lora-dtype mamba-backend mamba-block-size
    mamba-cache-dtype mamba-cache-mode mamba-cache-philox-rounds mamba-ssm-cache-dtype mamba-ssu-algorithm
    master-addr master-port max-cpu-loras max-cudagraph-capture-size max-log-len max-logprobs max-lora-cls-labels
    max-lora-rank max-loras max-model-len max-num-active-seqs max-num-batched-tokens max-num-queued-reqs
    max-num-queued-tokens max-num-scheduled-tokens max-num-seqs max-parallel-loading-workers media-io-kwargs
    mm-encoder-attn-backend mm-encoder-attn-dtype mm-encoder-fp8-scale-path mm-encoder-fp8-scale-save-margin
    mm-encoder-fp8-scale-save-path mm-encoder-tp-mode mm-hasher-algorithm mm-ipc-gpu-memory-gb
    mm-processor-cache-gb mm-processor-cache-type mm-processor-device mm-processor-kwargs
    mm-shm-cache-max-object-size-mb mm-tensor-ipc model model-class-overrides model-impl model-loader-extra-config
    moe-backend nnodes node-rank num-gpu-blocks-override offload-backend offload-group-size offload-num-in-group
    offload-prefetch-step optimization-level otlp-traces-endpoint output-file output-tmp-dir
    override-generation-config per-request-spec-decode-metrics performance-mode pipeline-parallel-size
    pooler-config port prefill-context-parallel-size prefill-schedule-interval prefix-cache-retention-interval
    prefix-caching-hash-algo prefix-match-unit profiler-config pt-load-map-location quantization
    quantization-config reasoning-config reasoning-parser reasoning-parser-plugin renderer-num-workers
    replayssm-buffer-len response-role revision runner safetensors-load-strategy safetensors-prefetch-block-size
    safetensors-prefetch-num-threads scheduler-cls scheduling-policy seed show-hidden-metrics-for-version
    shutdown-timeout sparse-indexer-topk-backend spec-method spec-model spec-tokens speculative-config
    sse-keep-alive-interval stream-interval structured-outputs-config tensor-parallel-size tokenizer
    tokenizer-mode tokenizer-revision tool-call-parser tool-parser-plugin tool-server tool-strict-level
    ubatch-size url video-pruning-method video-pruning-rate watermark watermark-config weight-transfer-config
    worker-cls worker-extension-cls
    """
)
SHORT_FORMS = {
    "-i": "input-file",
    "-o": "output-file",
    "-q": "quantization",
    "-n": "nnodes",
    "-r": "node-rank",
    "-tp": "tensor-parallel-size",
    "-pp": "pipeline-parallel-size",
    "-ep": "enable-expert-parallel",
    "-dcp": "decode-context-parallel-size",
    "-pcp": "prefill-context-parallel-size",
    "-dp": "data-parallel-size",
    "-dpn": "data-parallel-rank",
    "-dpr": "data-parallel-start-rank",
    "-dpl": "data-parallel-size-local",
    "-dpa": "data-parallel-address",
    "-dpp": "data-parallel-rpc-port",
    "-dpb": "data-parallel-backend",
    "-dph": "data-parallel-hybrid-lb",
    "-dpe": "data-parallel-external-lb",
    "-dpm": "data-parallel-multi-port-external-lb",
    "-sc": "speculative-config",
    "-dc": "diffusion-config",
    "-cc": "compilation-config",
    "-ac": "attention-config",
    "-O": "optimization-level",
    "--device-memory-utilization": "gpu-memory-utilization",
}
# Keys of dpgen that flags set.
KEYS = {
    "model": "model",
    "seed": "run.seed",
    "tensor-parallel-size": "parallel.tensor_parallel_size",
    "pipeline-parallel-size": "parallel.pipeline_parallel_size",
    "enable-expert-parallel": "parallel.enable_expert_parallel",
    "chat-template": "data.chat_template",
    "default-chat-template-kwargs": "data.chat_template_kwargs",
}
# Flags whose values are texts, also where they look like numbers.
TEXTS = _list_names(
    """
    chat-template code-revision download-dir hf-config-path hf-token load-format model quantization revision
    served-model-name tokenizer tokenizer-revision
    """
)
# Flags whose values may be written 4k (4,000) or 4K (4,096).
SIZES = _list_names("kv-cache-memory-bytes max-model-len max-num-batched-tokens safetensors-prefetch-block-size")
# Flags of a server, of its metrics and its log lines: they change no response.
IGNORED = _list_names(
    """
    aggregate-engine-logging anthropic-disabled-thinking-effort cohere-format cohere-is-reasoning-model
    disable-log-stats enable-force-include-usage enable-log-deltas enable-log-outputs enable-log-requests
    enable-metrics enable-scale-out enable-server-load-tracking enable-tokenizer-info-endpoint host log-config-file
    log-error-stack log-level logging-config max-log-len output-tmp-dir port shutdown-timeout sse-keep-alive-interval
    url
    """
)
_RANKS = "start one rank for each model copy: torchrun --nproc-per-node N -m dpgen run-batch ..."
_LAUNCHER = "the launcher says where ranks run: torchrun --nnodes ..., or srun"
_RESPONSES = "dpgen's responses don't have it; leave it out"
_FINGERPRINT = "dpgen's own names the run; leave it out"
# Flags that dpgen can't honour, each with the reason and what to do.
REFUSED = {
    **{name: _RANKS for name in SWITCHES | VALUES if name.startswith("data-parallel-")},
    **dict.fromkeys(("master-addr", "master-port", "nnodes", "node-rank", "device-ids"), _LAUNCHER),
    **dict.fromkeys(
        ("enable-prompt-tokens-details", "enable-per-request-metrics", "return-tokens-as-token-ids"), _RESPONSES
    ),
    **dict.fromkeys(("fingerprint-mode", "fingerprint-value"), _FINGERPRINT),
    "distributed-executor-backend": "dpgen's own agrees on the KV cache's size; leave it out",
    "tool-parser-plugin": "dpgen takes vLLM's own parsers only: --tool-call-parser",
    "reasoning-parser-plugin": "dpgen takes vLLM's own parsers only: --reasoning-parser",
    "tool-server": "dpgen calls no tools; leave it out",
    "tool-strict-level": "dpgen has vLLM's default, auto; leave it out",
    "tokens-only": "requests and responses are text; leave it out",
    "trust-request-chat-template": "a line can't bring its own chat template; use --chat-template for all",
    "trust-request-mm-kwargs": "dpgen generates from text; leave it out",
    "exclude-tools-when-tool-choice-none": "a prompt has its request's tools, as by vLLM's default; leave it out",
    "response-role": "the role is assistant, as by vLLM's default; leave it out",
    "chat-template-content-format": "dpgen finds the format by the template, as vLLM's auto does; leave it out",
}
# Values that say what holds anyway.
DEFAULTS = {
    "chat-template-content-format": "auto",
    "data-parallel-size": "1",
    "nnodes": "1",
    "node-rank": "0",
    "response-role": "assistant",
    "tool-strict-level": "auto",
}
