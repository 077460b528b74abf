"""Connect two or more ranks by torch.distributed's gloo backend and its TCPStore.

In: a `Topology`. Out: `GlooGroup`, the `RankGroup` of all ranks. Home of `torch.distributed`.
Imported for two or more ranks only: a world of one needs no torch.
Never imports another wing than `lifecycle`, nor what uses a group.
"""
