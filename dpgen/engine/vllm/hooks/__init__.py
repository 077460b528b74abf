"""Spare vLLM work that leads to nothing, by hooks on its objects. Changes no result."""
