"""Check completions in worker processes: by their form, a JSON Schema, and the user's function."""
