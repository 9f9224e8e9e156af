"""Name of Megatron's tracker, the file of a directory of checkpoints that says which iteration is the newest.

It stands by itself since a conversion looks for it before anything large is imported.
"""

TRACKER = "latest_checkpointed_iteration.txt"
