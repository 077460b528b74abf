"""Give the column `parsed` the types that `output.schema` declares.

In: a JSON Schema, and the JSON text of a completion. Out: an Arrow type, and the value as Arrow takes it, or why it
does not fit. `derivation` turns the schema into a `value_types.ValueType`.
"""
