"""Turn journals into the final dataset, and verify a run directory.

In: the ranks' journals (`dpgen.journal`) and the input rows (`dpgen.data`). Out: `RUN_DIR/dataset` in input order,
`_SUCCESS` with counts and a hash, and the report of `dpgen verify`.
Never imports torch, vLLM, `engine` or `scheduling`.
"""
