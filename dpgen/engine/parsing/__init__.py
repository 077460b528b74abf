"""Take a completion's text apart: reasoning, tool calls, and JSON.

In: the texts of finished rows. Out: the same rows with the parts in fields of their own.
The rank's half (`completion_parser`) submits and collects; the workers' half (`vllm_parsers`, `json_text`) parses, in
worker processes, with vLLM's own parsers.
"""
