"""Write the response files of OpenAI's Batch API and of `vllm run-batch`: one line for each line of the batch file.

In: the lines of the batch file, and the journal's results. Out: the files of RUN_DIR/dataset, and what `verify` says of
them. Never imports the engine.
"""
