"""Prompts: a row and `data.*` keys in; its prompt out, as token ids, or as what the engine tokenizes.

`render` is the way in. Chats and templates are those of vLLM 0.32, token for token. transformers and jinja2 are
imported when first needed.
"""
