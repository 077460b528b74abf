"""dpgen: generate with an LLM over a whole dataset, data-parallel, launched by torchrun or srun."""
