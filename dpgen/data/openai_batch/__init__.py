"""Read the request files of OpenAI's Batch API and of `vllm run-batch`: one request a line, in any quality.

- In: a line of text. Out: its custom_id, URL and body, or a typed error; and from these a prompt with its sampling.
- A malformed line is the error of that line, never of the run.
- Never imports vLLM.
"""
