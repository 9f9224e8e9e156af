"""Checkpoints: opened in any format, read by slice, proved whole, and loaded into a running model.

Sub-rooms, each importing only those above it:

    index/      a checkpoint as an index: named tensors, cut into boxes, each stored at known bytes
    directory/  iteration directories: names, tracker, staging, publication, integrity, manifest
    pickles/    torch archives and pickles: read without running code from them, written without torch
    reading/    slices out of files
    tensors/    Megatron's tensors: the table, their dimensions, which entries are new
    formats/    one folder per format, one entry point: `open_checkpoint`
    proof/      whether a checkpoint is whole, and where two differ
    live/       saves and loads a running Megatron-Core model

Nothing outside this room and `convert` reads or writes a checkpoint file.
"""
