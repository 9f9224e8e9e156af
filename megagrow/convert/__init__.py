"""Converts one checkpoint into another: any format, any parallel layout, any larger shape, in one streaming pass.

Sub-rooms, each importing only those above it:

    plan/     which source tensor each target tensor comes from, and how it is made; pure
    make/     the values of any box of a target tensor
    targets/  target directories planned to the byte, one module per format
    early/    what starts before anything large is imported: worker processes, read-ahead of the source
    work/     the journal, the workers, and the units that they make
    run/      a whole conversion: check, make, publish
"""
