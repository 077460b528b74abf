"""Drive vLLM inside the engine process: its engine, and its renderer for tokenizers that only vLLM knows.

In: an `EngineSpec` and `Request`, from `dpgen.engine.server`.
Out: `RowResult` and `UndecodedRow`.
The only home of the package `vllm`. Never imported by a rank process, but for `field_names`, which imports no vLLM.
"""
