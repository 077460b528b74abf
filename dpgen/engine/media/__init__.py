"""Prepare media for the engine: load, decode and process them in worker processes of the rank, ahead of admission.

- In: requests whose prompts hold media. Out: the same requests with token ids, and with what the model takes of the
  media in shared memory, which the engine maps. What can't be prepared is its row's typed error.
- `preparer` is the rank's side, `handling` the workers', `buffers` the memory between rank, workers and engine.
- Never imports vllm: `dpgen.engine.vllm.media` has vLLM's part, on both sides of the memory.
"""
