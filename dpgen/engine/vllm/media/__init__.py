"""Process media as vLLM does, in a worker of the rank, and hand them to vLLM in the engine."""
