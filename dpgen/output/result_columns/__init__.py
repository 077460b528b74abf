"""Describe single columns that results add to the input's."""
