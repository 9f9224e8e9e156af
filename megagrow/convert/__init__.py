"""From one checkpoint to another: any format, any parallel layout, any larger shape, in one streaming pass.

Sub-rooms, each importing only those above it:

    plan/     which target tensor comes from which source tensor, and how; pure
    make/     the values of any box of a target tensor
    targets/  target directories planned to the byte, one module a format
    early/    what starts before anything large is imported: worker processes, the kernel's read-ahead
    work/     the journal, the workers, and the units that they make
    run/      a whole conversion: check, make, publish
"""
