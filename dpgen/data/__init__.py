"""Data: `data.*` keys in; input rows, each row's prompt as token ids, and the decoded text of its completions out.

A row is known by its index in the input. Prompts and texts are those of vLLM 0.32, token for token.
`input_rows` and `input_loading` are the only home of Hugging Face `datasets`; transformers and jinja2 are imported when
first needed.
This wing never imports vLLM or torch, and knows neither ranks nor engines.
"""
