"""Megatron's checkpoints: read, written, spread over other numbers of ranks. See docs/megatron.md.

`split` says where elements stand, `shards` reads and writes the files of ranks, `stacked` reads Megatron's distributed
checkpoints, `convert` makes one of our models of them and back, `cli` has the command, `core` runs a model in
megatron-core. What Megatron calls things stands in `llmshearing.families.megatron`.
"""
