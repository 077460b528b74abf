"""Read one file or argument of YAML: its values, its lines, and what is wrong in them.

In: a file's text, or an argument. Out: values with the line of each, or a sentence with the remedy.
`yaml_source` reads a whole text and knows its lines, `yaml_slips` says what is wrong in a line, `yaml12` reads the
scalars of YAML 1.2 and writes them, `misread_texts` finds texts that YAML has changed, `layers` makes them
ready for OmegaConf. Imports only `errors`.
"""
