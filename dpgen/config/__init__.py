"""Configuration: YAML files and key=value in, a checked and frozen `Config` out.

`schema` holds every key with its default, help and limits, `loader` merges the layers, `yaml12` reads YAML 1.2.
Importing this wing is instant: it never imports torch, vLLM, datasets, transformers or numpy, and OmegaConf and YAML
only while a configuration is loaded or written.
"""
