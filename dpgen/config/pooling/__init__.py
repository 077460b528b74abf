"""Declare and check the keys of tasks that pool a model's hidden states: embed, classify, score, reward."""
