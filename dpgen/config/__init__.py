"""Configuration: YAML files and key=value in, a checked and frozen `Config` out.

`schema` holds every key with its default, help and limits. `loader` merges the layers, `yaml_source` reads one of them
and knows its lines, `yaml_slips` says what is wrong in a line, `yaml12` reads the scalars of YAML 1.2.
Importing this wing is instant: it never imports torch, vLLM, datasets, transformers or numpy, and OmegaConf and YAML
only while a configuration is loaded or written.
"""
