"""Configuration: YAML files and key=value in, a checked and frozen `Config` out.

`schema` holds every key with its default, help and limits, `sections` those of the sections. `loader` merges the
layers, and `yaml/` reads one of them and knows its lines.
Importing this wing is instant: it never imports torch, vLLM, datasets, transformers or numpy, and OmegaConf and YAML
only while a configuration is loaded or written.
"""
