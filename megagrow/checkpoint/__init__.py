"""Bytes and slices: what a checkpoint holds, how it is read, written, grown, published and checked.

`names` is the table of tensors, `fused` the row orders of fused ones. `directory` knows iteration directories
and the tracker, `torch_dist` reads and writes Megatron's format by slice without a model, `convert` turns one
checkpoint into a larger one, `verify` proves a checkpoint whole, and `megatron_live` moves a running model's
state to and from disk. Nothing outside this room looks into a checkpoint file.
"""
