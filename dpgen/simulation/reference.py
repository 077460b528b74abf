"""Hold the constants of the engine that was measured once, by which others are estimated. Imports nothing heavy."""

from __future__ import annotations

# A Llama of 8 billion parameters in bf16 on one H100, as `dpgen simulate --calibrate` measured it.
STEP_MS = 6.0  # A
SEQ_US = 11.0  # C
KV_NS = 52.0  # K
PREFILL_US = 23.0  # P
MAX_NUM_SEQS = 256

# That model, as `dpgen.data.model_facts.estimate_model_size` counts it.
NUM_ACTIVE_PARAMS = 7.5e9
WEIGHT_BYTES = 16.06e9
KV_BYTES = 131_072
