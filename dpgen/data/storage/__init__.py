"""Read from and write to what fsspec reaches: `store` → `listing` → `fetching` for the input, `store` for the result.

In: an address (``s3://bucket/rows/*.parquet``) with the options of its store. Out: files on this node's disk.
Only `store` imports fsspec; a store's own package (s3fs, gcsfs, adlfs) is an extra. Nothing here knows of ranks.
"""
