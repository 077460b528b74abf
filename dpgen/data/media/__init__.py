"""Images, audio and video of prompts: values of columns and parts of messages in; their contents, as bytes, out.

- The rank reads where a medium is, and no more: `message_parts` and `columns` make `MediaPart`s of a row's values.
- Workers load it: `loading` reads files, data: URLs and what `fetching` gets over HTTP; `images` looks at an image's
  header. Decoding is vLLM's own, so that pixels are those of `LLM.chat`.
- What is wrong with a medium is its row's typed error: media_missing, media_invalid, media_too_large,
  media_not_allowed, media_fetch_failed, media_mismatch.

Nothing here imports vllm or datasets; PIL and urllib3 are imported when first needed.
"""
